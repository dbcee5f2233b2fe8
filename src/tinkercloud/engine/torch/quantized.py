"""Frozen linear layers in 8 or 4 bits, by bitsandbytes: less memory for the base model, the same LoRA.

Source: Dettmers et al., "LLM.int8()" (2022) for 8-bit rows with a scale each, and "QLoRA" (2023) for 4-bit NormalFloat
in blocks of 64 with a scale each. Only the weights are quantised: the library gives them back in the type of the rows,
for the length of one product. Its own 8-bit product rounds the rows too, and computes those columns in 16 bits in which
any row of the batch is large, so that a client's numbers would depend on others', and training's on how a batch is cut.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedConfig

from tinkercloud.engine.base_model import Quantization
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.peft_layout import PARTS
from tinkercloud.engine.torch.lora import LoraLinear

_ADAPTABLE = "|".join(name for names in PARTS.values() for name in names)
OTHER_LAYERS = rf"(?!(.*\.)?({_ADAPTABLE})$).*"
"""Paths of the layers that stay as they are, the unembedding among them."""


def quantization_of(wanted: Quantization, config: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """What transformers is to do while it loads a model; None without quantization. OperationError if it cannot."""
    given = getattr(config, "quantization_config", None) or {}
    method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
    if given and (wanted != "none" or method == "bitsandbytes"):
        raise OperationError(
            f"its files are quantised already ({method}); serve the files that they were made from, and set "
            "quantization to 8bit or 4bit"
        )
    if wanted == "none":
        return None
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise OperationError(
            f"quantization {wanted} needs {' and '.join(missing)}: pip install -e '.[quantized]' in tinkercloud's clone"
        )
    return BitsAndBytesConfig(
        load_in_8bit=wanted == "8bit",
        load_in_4bit=wanted == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=[OTHER_LAYERS],
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes holds a layer's weight."""
    return type(getattr(module, "weight", None)).__name__ in ("Int8Params", "Params4bit")


class QuantizedLoraLinear(LoraLinear):
    """A `LoraLinear` whose frozen weight is in 8 or 4 bits."""

    def __init__(self, base: nn.Linear, *place: Any) -> None:
        super().__init__(base, *place)
        from bitsandbytes import functional  # only who quantises has it

        self._library = functional

    def frozen_output(self, x: Tensor) -> Tensor:
        return linear(x, self.frozen_weight(x.dtype), self.bias)

    def frozen_input_gradient(self, d_output: Tensor) -> Tensor:
        return d_output @ self.frozen_weight(d_output.dtype)

    def frozen_weight(self, dtype: torch.dtype) -> Tensor:
        held = self.weight
        if held.dtype == torch.int8:
            return self._library.int8_vectorwise_dequant(held.data, held.SCB).to(dtype)
        return self._library.dequantize_4bit(held.data, held.quant_state).to(dtype)
