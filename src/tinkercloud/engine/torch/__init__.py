"""The torch engine: `TorchTrainer` and a sampler over one frozen base model.

Importing this package asks MKL for reproducible products. Strict mode gives each row of `x @ W` the same bits whatever
the other rows are and however many; without it MKL picks kernels by shape, and a tenant's numbers would depend on who
shares its batch. MKL reads the variable at its first product, so this must come before any. It costs nothing measurable
as long as the instruction set named is the machine's own. What MKL does not promise on other processors than Intel's,
`products` sees to.
"""

from __future__ import annotations

import os

import torch

_INSTRUCTIONS = torch.backends.cpu.get_cpu_capability()
if _INSTRUCTIONS in ("AVX2", "AVX512"):
    os.environ.setdefault("MKL_CBWR", f"{_INSTRUCTIONS},STRICT")
