"""Dimuon: Muon for the factors of LoRA. Spectral steepest descent in the geometry of the product B A.

With W = W0 + s B A, A [r, in], B [out, r], a change D of B changes the product by D A. The D that lowers the loss most
for a given spectral norm of D A is msign(M R) R, R = (A A^T)^(-1/2), where M is the momentum of B's gradient and
msign(U S V^T) = U V^T; for A it is R msign(R M), R = (B^T B)^(-1/2). One step, for each factor by itself:

    M <- beta1 M + (1 - beta1) G              momentum, an exponential moving average
    D  = msign(M R) R  (B)  or  R msign(R M)  (A)
    X <- X - learning_rate * (r / 32) * sqrt(r) / ||D||_F * D

The family, its parameters, the Frobenius norm sqrt(r) of the direction and a rank correction relative to 32 are the
published contract; the formula is that of LoRA-Muon (Cesista, Crowson, Simal, Biderman, "LoRA-Muon: Spectral Steepest
Descent on the Low-Rank Manifold", arXiv 2606.12921). Where the public text is silent, these are choices:

- The norm sqrt(r) is that of the factor's own direction D, not of its product's. So no step is ever large however small
  the other factor is: a fresh B is zero, and R would be without bounds. The step's size then does not depend on the
  scale of the other factor, only its shape does.
- The Gram matrix is damped by `DAMPING` times its mean eigenvalue; a factor that is zero counts as the identity.
- The rank correction is r / 32. Since s = alpha / r and D's spectral norm is about 1, the product's change then has the
  same spectral norm at every rank, as AdamW's has.
- A momentum of zero gives a direction of zero (a fresh A's, as long as B is zero).
- Clipping is of the adapter's whole gradient, before the momentum. No weight decay, no bias correction (the direction
  does not depend on the momentum's scale).
- msign by Newton-Schulz: `SIGN_STEPS`, after division by the Frobenius norm. (A A^T)^(-1/2) by the coupled
  Newton-Schulz iteration in float64, `ROOT_STEPS` times.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tinkercloud.engine.operations import DimuonParams
from tinkercloud.engine.torch.adapter import Adapter

REFERENCE_RANK = 32
"""The rank at which the learning rate is applied as given."""

DAMPING = 1e-2
"""Added to the Gram matrix's eigenvalues, in units of their mean."""

SIGN_STEPS = ((3.4445, -4.7750, 2.0315),) * 7 + ((15 / 8, -10 / 8, 3 / 8),) * 3
"""(a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X. First Muon's steps (Jordan et al., 2024), which lift small
singular values by 3.4 each but end near 1, not at it; then the quintic Newton-Schulz steps, which end at 1."""

ROOT_STEPS = 20
"""The smallest eigenvalue, at least DAMPING / 128 of the Frobenius norm at rank 128, grows by 2.25 a step at first and
quadratically then; 17 would do."""


class Dimuon:
    """See `optimizer.Optimizer`."""

    moments = ("momentum",)

    def propose(self, adapter: Adapter, gradient: Tensor, params: DimuonParams) -> tuple[Tensor, dict[str, Tensor]]:
        layout, rank = adapter.layout, adapter.config.rank
        momentum = adapter.moments.get("momentum", torch.zeros_like(gradient))
        momentum = torch.lerp(momentum, gradient, 1 - params.beta1)
        updated = adapter.parameters.clone()
        # Every factor as [n, r]: A transposed, B as it is. Those of one shape run together.
        groups: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        matrices = (layout.matrices(flat) for flat in (momentum, adapter.parameters, updated))
        for (m_a, m_b), (a, b), (new_a, new_b) in zip(*matrices, strict=True):
            groups[m_a.shape[1]].append((m_a.t(), b, new_a.t()))
            groups[m_b.shape[0]].append((m_b, a.t(), new_b))
        scale = params.learning_rate * rank / REFERENCE_RANK
        for members in groups.values():
            grams = torch.stack([other.double().t() @ other.double() for _, other, _ in members])
            step = direction(torch.stack([moment for moment, _, _ in members]), grams)
            for (_, _, new), own in zip(members, step, strict=True):
                new.sub_(own, alpha=scale)
        return updated, {"momentum": momentum}


def direction(momentum: Tensor, gram: Tensor) -> Tensor:
    """msign(M R) R of Frobenius norm sqrt(r), R = gram^(-1/2): M float32 [k, n, r], gram float64 [k, r, r] of the other
    factor. Zero where M is."""
    root = inverse_root(gram).to(momentum.dtype)
    steepest = matrix_sign(momentum @ root) @ root
    return _unit(steepest) * momentum.shape[-1] ** 0.5


def matrix_sign(x: Tensor) -> Tensor:
    """U V^T of each x = U S V^T [k, n, r]; singular values below 1e-4 of the Frobenius norm count for less."""
    wide = x.shape[-2] < x.shape[-1]
    x = _unit(x.mT if wide else x)
    for a, b, c in SIGN_STEPS:
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return x.mT if wide else x


def inverse_root(gram: Tensor) -> Tensor:
    """(gram + DAMPING * its mean eigenvalue)^(-1/2), up to a positive factor: float64 [k, r, r], symmetric and positive
    semidefinite. For zero, the identity."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damped = torch.where(mean > 0, gram + DAMPING * mean * identity, identity)
    y, z = _unit(damped), identity.expand_as(damped)
    for _ in range(ROOT_STEPS):
        t = 1.5 * identity - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return z


def _unit(x: Tensor) -> Tensor:
    """Each [n, m] of x divided by its Frobenius norm; zero stays zero."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)
