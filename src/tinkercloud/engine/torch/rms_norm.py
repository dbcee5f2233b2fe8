"""Root mean square normalisation (Zhang and Sennrich, 2019) over the last dimension, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from tinkercloud.engine.torch.kernels.backward import rms_norm_backward
from tinkercloud.engine.torch.kernels.compiled import have_kernels
from tinkercloud.engine.torch.kernels.rows import rms_norm


class RMSNorm:
    """x / rms(x) * weight; weight [D], or [H, D] for one of each head. The weight is frozen.

    Sums are float32 and a row's own, in fewer and faster calls than `torch.nn.functional.rms_norm` makes.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._share = 1 / weight.shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim == 2 and have_kernels(x):
            return rms_norm(x, self.weight, self.eps)
        normed = x * self._inverse(x)
        return (normed if normed.dtype == x.dtype else normed.to(x.dtype)).mul_(self.weight)

    def backward(self, x: Tensor, d_normed: Tensor, added: Tensor | None = None) -> Tensor:
        """The gradient of x from that of x normalised, in x's dtype, plus `added`."""
        if x.ndim == 2 and have_kernels(x):
            return rms_norm_backward(x, self.weight, self.eps, d_normed, added)
        inverse = self._inverse(x)
        d_unit = (d_normed * self.weight).float()
        # d_x = (d_unit - unit * mean(d_unit * unit)) / rms, with unit = x / rms
        along = (d_unit * x).sum(-1, keepdim=True).mul_(inverse).mul_(inverse).mul_(-self._share)
        d_x = d_unit.addcmul_(x, along).mul_(inverse).to(x.dtype)
        return d_x if added is None else d_x.add_(added)

    def _inverse(self, x: Tensor) -> Tensor:
        """1 / rms(x) float32 [..., 1]."""
        norm = vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(self._eps, norm, norm, value=self._share).rsqrt_()
