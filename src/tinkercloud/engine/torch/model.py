"""The frozen base model: any `transformers` causal language model whose tokens meet only in attention.

Its linear layers are replaced by `LoraLinear`, its attention by `attention.attend`; all else is transformers' own.
The standard architectures run leaner, through `decoder`, with the same weights; loading compares the two.
One pass is a single row of tokens [T]: several sequences packed back to back, or one token of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from msgspec import structs
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tinkercloud.engine.base_model import BaseModelInfo, EngineOptions
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.peft_layout import EXPERT_PARAMETERS, PARTS
from tinkercloud.engine.torch.activations import Recomputation, activation_memory
from tinkercloud.engine.torch.attention import Attention, CurrentAttention, PackedAttention
from tinkercloud.engine.torch.decoder import standard_decoder
from tinkercloud.engine.torch.experts import AdaptedLayer, Experts, ExpertsLinear, are_fused_experts, can_adapt
from tinkercloud.engine.torch.kernels.compiled import kernels_for
from tinkercloud.engine.torch.latent_attention import LatentAttention, is_latent_attention
from tinkercloud.engine.torch.linear_attention import GatedDeltaNet, is_gated_delta_net
from tinkercloud.engine.torch.loading import (
    NOT_SERVED,
    config_of,
    device_of,
    dtype_of,
    fingerprint_in,
    folder_of,
    in_a_sentence,
    info_of,
    state_in,
    weights_of,
)
from tinkercloud.engine.torch.lora import BASE_ONLY, CurrentLora, LoraBatch, LoraLinear
from tinkercloud.engine.torch.packing import row_multiple_of
from tinkercloud.engine.torch.products import LEAST_ROWS, filled, is_narrow
from tinkercloud.engine.torch.quantized import QuantizedLoraLinear, is_quantized
from tinkercloud.engine.torch.threads import ThreadChoice

ROUTERS = re.compile(r"(gate|router)$")
"""Names of the modules that choose experts or weigh them: frozen, as docs/models.md says."""

LOADS = 2
"""How often files may be loaded, if they change meanwhile: a fingerprint must be of the bytes that were loaded."""

Progress = Callable[[float, str], None]
"""(fraction done, what is being done)"""


class BaseModel:
    """See the module's docstring. `info` says what it is, `linears` are its adaptable layers in a fixed order."""

    def __init__(self, model: PreTrainedModel, info: BaseModelInfo) -> None:
        """Takes `model` over and changes it in place. OperationError if it is not of a kind that can be packed."""
        self.info = info
        self.device, self.dtype = model.device, model.dtype
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        """What its parameters take of memory."""
        self._model = model.eval().requires_grad_(False)
        self._current_attention = CurrentAttention()
        self._current_lora = CurrentLora(model.device)
        self.linears: list[AdaptedLayer] = []
        for name, module in list(model.named_modules()):
            if is_gated_delta_net(module):
                model.set_submodule(name, GatedDeltaNet(module, self._current_attention))
            elif hasattr(module, "layer_idx"):
                module.current = self._current_attention
        decoder = model.get_decoder()
        path = next(name for name, module in model.named_modules() if module is decoder)
        modules = list(decoder.named_modules(prefix=path))
        shapes = [
            (module.out_features, module.in_features) if isinstance(module, nn.Linear) else parameter.shape
            for _, module in modules
            for parameter in module.parameters(recurse=False)
            if parameter.ndim == 2 and not isinstance(module, nn.Embedding)
        ]
        self._narrowest = min(map(min, shapes))
        self.row_multiple = row_multiple_of(outputs for outputs, _ in shapes)
        """Of a pass's rows, for numbers that do not depend on how many there are."""
        experts = [(name, module) for name, module in modules if are_fused_experts(name, module)]
        # To adapt only what is beside experts of another kind would be half of what was asked.
        foreign = self._foreign_experts = any(not can_adapt(module) for _, module in experts)
        for part, names in PARTS.items():
            if part == "mlp" and foreign:
                continue
            for name, module in modules:
                if name.rpartition(".")[2] in names and isinstance(module, nn.Linear):
                    self._adapt(name, module, part)
        for _, module in modules:
            # Where bits are promised, keys and values are kept: batched products do not keep them.
            if is_latent_attention(module) and not kernels_for(self.dtype, self.device):
                LatentAttention(module, self._current_attention, self._current_lora)
        self.gates_alternate = any(not module.is_concatenated for _, module in experts if not foreign)
        """Whether the rows of experts' gate_up_proj are gate, up, gate, up and so on."""
        for name, module in experts if not foreign else ():
            self._adapt_experts(name, module)
        unembedding = model.get_output_embeddings()
        self._adapt(
            next(name for name, module in model.named_modules() if module is unembedding), unembedding, "unembed"
        )
        self.others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        """Linear layers that no adapter adapts, such as a vision tower's."""
        self._decoder = decoder
        layers = getattr(decoder, "layers", ())
        self.num_layers = max(1, len(layers))
        self._recomputation = Recomputation(layers, self._current_attention, self._current_lora)
        self._lean = standard_decoder(model)
        self._threads = ThreadChoice(torch.get_num_threads() if model.device.type == "cpu" else 1)
        self.unembedding = self.linears[-1]

    @torch.no_grad()
    def _check_finite(self) -> None:
        """Refuse weights that are no numbers: what is computed with them may look like one that is."""
        for name, parameter in self._model.named_parameters():
            if not parameter.is_floating_point() or not parameter.numel() or parameter.element_size() == 1:
                continue  # float8 has no such comparison
            # The smallest and the largest are NaN if any is, and need one pass and no memory.
            if not all(torch.isfinite(end) for end in parameter.aminmax()):
                raise OperationError(f"its weights {name} have numbers that are not finite (NaN or infinity)")

    def check_whole(self) -> None:
        """Refuse architectures of whose attention or MLP not all layers would be adapted (fused q/k/v, layers that are
        no `nn.Linear`): a client would get less than it asked for, or nothing."""
        adapted = {layer.name.rpartition(".")[0] for layer in self.linears[:-1]}
        for parent in sorted(adapted):
            for name, child in self._model.get_submodule(parent).named_children():
                if isinstance(child, nn.Linear):
                    raise OperationError(
                        f"{self.info.architecture} is not supported: its layer {parent}.{name} would stay without LoRA "
                        "while others beside it are adapted"
                    )
        parts = {layer.part for layer in self.linears} | ({"mlp"} if self._foreign_experts else set())
        whole = parts.issuperset(PARTS)
        for name, module in self._decoder.named_modules():
            if _is_projection(name, module) and not (whole and isinstance(module, nn.Linear)):
                raise OperationError(
                    f"{self.info.architecture} is not supported: its layer {name}, a {type(module).__name__}, would "
                    "stay without LoRA; what can be adapted is an nn.Linear of one of the names in docs/models.md"
                )

    def _check_quantized(self) -> None:
        """Refuse to run quantised layers that are not ours (see `quantized` on the library's own products)."""
        for name, module in self._decoder.named_modules():
            if is_quantized(module) and not isinstance(module, QuantizedLoraLinear):
                raise OperationError(
                    f"{self.info.architecture} is not supported in {self.info.quantization}: its layer {name} is "
                    "quantised but none that LoRA adapts; set quantization to none"
                )

    def _adapt(self, name: str, module: nn.Linear, part: str) -> None:
        kind = QuantizedLoraLinear if is_quantized(module) else LoraLinear
        layer = kind(module, len(self.linears), name, part, self._current_lora)
        self._model.set_submodule(name, layer)
        self.linears.append(layer)

    def _adapt_experts(self, name: str, module: nn.Module) -> None:
        places = range(len(self.linears), len(self.linears) + len(EXPERT_PARAMETERS))
        linears = [
            ExpertsLinear(module, parameter, index, name)
            for parameter, index in zip(EXPERT_PARAMETERS, places, strict=True)
        ]
        self._model.set_submodule(name, Experts(module, linears, self._current_lora))
        self.linears += linears

    @classmethod
    def load(
        cls, options: EngineOptions, progress: Progress | None = None, fingerprints: Path | None = None
    ) -> BaseModel:
        """Load a base model from a folder or from the hub; in `fingerprints` is kept what was read of its files.
        OperationError says what is missing or not supported."""
        report = progress or (lambda fraction, what: None)
        if options.threads:
            torch.set_num_threads(options.threads)
        report(0.0, "finding files")
        folder = folder_of(options)
        device = device_of(options.device)
        dtype = dtype_of(options.dtype, device)
        disable_progress_bar()  # transformers' own; whoever asked for `progress` shows it
        for _ in range(LOADS):
            before = state_in(folder)
            report(0.2, "loading weights")
            model = weights_of(folder, config_of(folder, options), options, device, dtype)
            report(0.8, "reading weights for their fingerprint")
            fingerprint = fingerprint_in(folder, fingerprints)
            if state_in(folder) == before:
                break
            model = None  # the next one needs its memory
        else:
            raise OperationError(
                f"each time that the files in {folder} were loaded, they changed meanwhile; load them when they are "
                "complete and nobody writes there"
            )
        report(0.9, "checking")
        with in_a_sentence(NOT_SERVED, telling=()):
            base = cls(model, info_of(model, folder, fingerprint, options, device, dtype))
            base._check_finite()
            base._check_packing()
            base.check_whole()
            base._check_quantized()
        base.info = structs.replace(base.info, activations=activation_memory(base, options))
        report(1.0, "ready")
        return base

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, lora: LoraBatch, recompute: bool = False
    ) -> Tensor:
        """Hidden states [T, H] after the final norm of tokens [T] at positions [T] (int64) of their sequences.

        With `recompute`, layers keep only their inputs for a backward pass, which runs them again: the same bits.
        """
        self._recomputation.wanted = recompute
        self._current_attention.attention, self._current_lora.batch = attention, self._batch_of(lora)
        rows = len(tokens)
        is_alone = is_narrow(rows, self._narrowest, self._threads.most)
        with self._threads.timed((rows.bit_length(), torch.is_grad_enabled()), is_alone):
            if self._lean is not None:
                return self._lean(tokens, positions, attention, lora, self._current_lora.anchor, recompute)
            output = self._decoder(
                input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, return_dict=True
            )
            return output.last_hidden_state[0]

    def filling(self, rows: int) -> int:
        """How many rows a sampling step of so many lacks, for the same reason as `row_multiple`. The lean decoder works
        row by row, and only its products ask for more, those that are not its step's own."""
        if self._lean is None:
            return -rows % self.row_multiple
        return 0 if self.has_whole_steps else max(0, LEAST_ROWS - rows)

    @property
    def has_whole_steps(self) -> bool:
        """Whether a sampling step is one kernel, in which a token's numbers are the same bits as one row of many, that
        is of a prompt, and as the only one, that is when it was drawn."""
        return self._lean is not None and self._lean.step is not None

    def _batch_of(self, lora: LoraBatch) -> LoraBatch:
        """As this model's linear layers see it. transformers' modules sample with the products that they train with:
        without AVX-512 the kernels' order of sums is another one, and routers and states of linear attention enlarge
        the difference."""
        return lora if self._lean is not None else LoraBatch(lora)

    def use_all_threads(self) -> None:
        """For sums over a whole adapter: their bits do depend on the number of threads, so it is always this one."""
        torch.set_num_threads(self._threads.most)

    def logits(self, hidden: Tensor, lora: LoraBatch) -> Tensor:
        """Logits float32 [n, V] of hidden states [n, H]; the segments of `lora` count rows of `hidden`."""
        self._current_lora.batch = self._batch_of(lora)
        return self.unembedding(filled(hidden, LEAST_ROWS - len(hidden)))[: len(hidden)].float()

    def parameter(self, name: str) -> Tensor | None:
        """A frozen parameter by its path, None if there is none."""
        return dict(self._model.named_parameters(remove_duplicate=False)).get(name)

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Refuse architectures whose tokens meet elsewhere than in `attend`, or whose logits are not W h.

        A pack's second sequence must not notice what the first one is, and our logits must be the model's own.
        """
        length = 12
        first, other, second = (torch.arange(3 * length, device=self.device) * 7 % self.info.vocab_size).split(length)
        positions = torch.arange(length, device=self.device).repeat(2)
        pair, other_pair = torch.cat([first, second]), torch.cat([other, second])
        attention = PackedAttention([length, length])
        try:
            hidden = self.hidden_states(pair, positions, attention, BASE_ONLY)[length:]
            leak = _distance(self.hidden_states(other_pair, positions, attention, BASE_ONLY)[length:], hidden)
            own = self._model(input_ids=pair[None], position_ids=positions[None], use_cache=False).logits[0, length:]
        except (TypeError, AttributeError, RuntimeError) as error:
            raise OperationError(f"{self.info.architecture} is not supported: it cannot run packed: {error}") from error
        exact = self.dtype == torch.float32
        if leak > (1e-5 if exact else 1e-2):
            raise OperationError(
                f"{self.info.architecture} is not supported: its tokens see each other outside of attention, so "
                "several sequences cannot share a batch"
            )
        if _distance(self.logits(hidden, BASE_ONLY), own.float()) > (1e-3 if exact else 5e-2):
            raise OperationError(f"{self.info.architecture} is not supported: it changes logits after the unembedding")


def _is_projection(path: str, module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own, is not adapted, and is no embedding and no router."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or isinstance(module, nn.Embedding | LoraLinear):
        return False
    return not ROUTERS.search(path.rpartition(".")[2]) and "Router" not in type(module).__name__


def _distance(left: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return ((left - right).abs().max() / right.abs().max().clamp_min(1e-6)).item()
