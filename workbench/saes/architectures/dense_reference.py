"""The same steps by dense autograd: short, slow, and what every kernel is checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures import (
    Architecture,
    AuxTask,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
    StepOptions,
    StepResult,
    TopK,
)
from workbench.saes.architectures.base import NO_VARIANCE
from workbench.saes.kernels.weights import SAEWeights


@dataclass(frozen=True)
class _Losses:
    loss: Tensor
    aux: Tensor
    sparsity: Tensor
    acts: Tensor
    threshold: Tensor


def reference_step(
    architecture: Architecture,
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    target: Float[Tensor, "rows d_out"] | None = None,
    options: StepOptions = StepOptions(),  # noqa: B008 - frozen
) -> StepResult:
    """What `architecture.step` returns, by autograd on `[rows, d_sae]` tensors in the precision of `x`.

    Raises:
        InvalidInputError: for an architecture that is not in `workbench.saes.architectures`.
    """
    with torch.enable_grad():
        leaves = {name: t.detach().clone().requires_grad_() for name, t in weights.named().items()}
        found = _losses(architecture, SAEWeights(**leaves), x, target, options)
        total = found.loss + found.aux + found.sparsity
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return StepResult(
        found.loss.detach(), found.aux.detach(), found.sparsity.detach(),
        SAEWeights(**dict(zip(leaves, gradients, strict=True))), (found.acts > 0).sum(0), found.threshold.detach(),
    )  # fmt: skip


def _losses(
    architecture: Architecture, w: SAEWeights, x: Tensor, target: Tensor | None, options: StepOptions
) -> _Losses:
    read = x if target is not None else x - w.b_dec
    wanted = x if target is None else target
    pre, norms = read @ w.W_enc.T + w.b_enc, w.W_dec.norm(dim=1)
    zero = pre.new_zeros(())
    if isinstance(architecture, TopK | BatchTopK | Matryoshka):
        acts, ranks = _chosen(architecture, pre, norms)
        widths = architecture.widths if isinstance(architecture, Matryoshka) else (len(norms),)
        errors = [acts[:, :n] @ w.W_dec[:n] + w.b_dec - wanted for n in widths]
        loss = sum((_mean_square(error) for error in errors), start=zero)
        aux = zero if options.aux is None else _aux(w, pre, -errors[-1].detach(), options.aux)
        return _Losses(loss, aux, zero, acts, _least(ranks[acts > 0]))
    if isinstance(architecture, ReLU):
        acts, aux = pre.relu(), zero
        penalty = (acts * norms).sum(1).mean()
    elif isinstance(architecture, JumpReLU):
        acts, aux = _Jump.apply(pre, w.threshold, architecture.bandwidth), zero
        counted = _Step.apply(pre, w.threshold, architecture.bandwidth)
        bounded = torch.tanh(architecture.tanh_scale * acts * norms)
        penalty = (counted if architecture.penalty == "step" else bounded).sum(1).mean()
    elif isinstance(architecture, Gated):
        assert w.r_mag is not None and w.b_mag is not None
        acts = (pre > 0) * ((read @ w.W_enc.T) * w.r_mag.exp() + w.b_mag).relu()
        W, b = (w.W_dec.detach(), w.b_dec.detach()) if architecture.frozen_decoder else (w.W_dec, w.b_dec)
        aux = _mean_square(pre.relu() @ W + b - wanted)
        penalty = (pre.relu() * norms).sum(1).mean()
    else:
        raise InvalidInputError(
            f"There is no reference for {type(architecture).__name__}. There is one for TopK, BatchTopK, Matryoshka, "
            "ReLU, JumpReLU and Gated. Use the architecture's own step."
        )
    loss = _mean_square(acts @ w.W_dec + w.b_dec - wanted)
    return _Losses(loss, aux, options.sparsity * penalty, acts, _least(acts[acts > 0]))


def _mean_square(error: Tensor) -> Tensor:
    return error.square().sum(1).mean()


def _least(values: Tensor) -> Tensor:
    return values.min() if values.numel() else values.new_full((), float("nan"))


def _chosen(architecture: TopK | BatchTopK | Matryoshka, pre: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of the chosen features, and what they were ranked by."""
    ranks = (pre * norms if architecture.by_decoder_norm else pre).detach()
    if isinstance(architecture, TopK):
        mask = torch.zeros_like(pre).scatter(1, ranks.topk(architecture.k).indices, 1.0)
        return pre.relu() * mask, pre.detach()
    order = ranks.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(pre.numel(), dtype=pre.dtype, device=pre.device)
    mask[order[: int(architecture.k * len(pre))]] = 1.0
    return pre.relu() * mask.view_as(pre), ranks


def _aux(w: SAEWeights, pre: Tensor, residual: Tensor, aux: AuxTask) -> Tensor:
    dead = pre[:, aux.dead]
    if aux.k < len(aux.dead):
        dead = torch.zeros_like(dead).scatter(1, dead.topk(aux.k).indices, dead.topk(aux.k).values)
    variance = (residual - residual.mean(0)).square().sum()
    if variance <= NO_VARIANCE * residual.square().sum():
        return variance.new_zeros(())
    return aux.coefficient * (dead.relu() @ w.W_dec[aux.dead] - residual).square().sum() / variance


class _Jump(torch.autograd.Function):
    """`x` where it exceeds the threshold; the threshold gets the estimate of eq. 11 of arXiv 2407.14435."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        (d_out,) = grad_outputs
        x, threshold = ctx.saved_tensors
        window = (x - threshold).abs() < ctx.bandwidth / 2
        return d_out * (x > threshold), -(threshold / ctx.bandwidth * window * d_out).sum(0), None


class _Step(torch.autograd.Function):
    """One where `x` exceeds the threshold; the threshold gets the estimate of eq. 12 of arXiv 2407.14435."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor, None]:  # noqa: D102
        (d_out,) = grad_outputs
        x, threshold = ctx.saved_tensors
        window = (x - threshold).abs() < ctx.bandwidth / 2
        return None, -(window * d_out / ctx.bandwidth).sum(0), None
