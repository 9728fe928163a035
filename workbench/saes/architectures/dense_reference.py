"""The same steps by dense autograd: short, slow, and what every kernel is checked against."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.saes.architectures.base import Architecture, DenseBatch, StepOptions, StepResult
from workbench.saes.kernels.weights import SAEWeights


def reference_step(
    architecture: Architecture,
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    target: Float[Tensor, "rows d_out"] | None = None,
    options: StepOptions = StepOptions(),  # noqa: B008 - frozen
) -> StepResult:
    """What `architecture.step` returns, by autograd on `[rows, d_sae]` tensors in the precision of `x`.

    Raises:
        InvalidInputError: for an architecture without `dense`.
    """
    with torch.enable_grad():
        leaves = {name: t.detach().clone().requires_grad_() for name, t in weights.named().items()}
        w = SAEWeights(**leaves)
        read, wanted = (x - w.b_dec, x) if target is None else (x, target)
        losses = architecture.dense(DenseBatch(w, read, wanted, options))
        total = losses.loss + losses.aux + losses.sparsity
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return StepResult(
        losses.loss.detach(), losses.aux.detach(), losses.sparsity.detach(),
        SAEWeights(**dict(zip(leaves, gradients, strict=True))), (losses.acts > 0).sum(0), losses.threshold.detach(),
    )  # fmt: skip
