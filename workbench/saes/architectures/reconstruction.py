"""The step that TopK, BatchTopK and Matryoshka share: squared error of a chosen sparse code, and AuxK."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.base import (
    NO_VARIANCE,
    AuxTask,
    Batch,
    DenseBatch,
    DenseLosses,
    StepOptions,
    StepResult,
)
from workbench.saes.config import SAEConfig
from workbench.saes.kernels.select import topk_indices
from workbench.saes.kernels.sparse import SparseActs
from workbench.saes.kernels.weights import SAEWeights

AUX_ROWS = 512


@dataclass(frozen=True)
class _AuxGradients:
    loss: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


def reconstruction_step(
    weights: SAEWeights, batch: Batch, acts: SparseActs, options: StepOptions, widths: tuple[int, ...]
) -> StepResult:
    """Loss and gradients for activations that were chosen.

    Args:
        weights: the SAE.
        batch: the batch.
        acts: activations of the chosen features; those of value zero get no gradient, as from a ReLU.
        options: of the step.
        widths: how many first features each nested reconstruction may use; the last is `d_sae`.
    """
    scale, products = 2 / len(batch.read), options.products
    error = batch.error(weights, products.decode(acts, weights.W_dec))
    aux = None
    if options.aux is not None and options.aux.dead.numel():
        aux = _aux_gradients(weights, batch.read, error, options.aux)
    error.mul_(scale)
    # From the widest prefix to the narrowest: features of a level serve that level and all wider ones.
    d_out = error.clone() if len(widths) > 1 else error
    loss, pieces = squared_norm(error), []
    for start, stop in zip(reversed((0, *widths[:-1])), reversed(widths), strict=True):
        part = acts if len(widths) == 1 else acts.between(start, stop)
        pieces.append(_level(weights, batch.read, part, d_out, start, options))
        if start:
            error.sub_(products.decode(part.with_values(part.values * scale), weights.W_dec[start:stop]))
            loss = loss + squared_norm(error)
            d_out.add_(error)
    gradients, fired = _join(pieces)
    gradients.b_dec.copy_(d_out.sum(0))
    aux_loss = loss.new_zeros(())
    if aux is not None and options.aux is not None:
        _add(gradients, aux, options.aux)
        aux_loss = aux.loss
    batch.add_input_gradient(weights, gradients, gradients.b_enc)
    return StepResult(
        loss / (scale * scale * len(batch.read)), aux_loss, loss.new_zeros(()), gradients, fired.long(),
        smallest_positive(acts.values),
    )  # fmt: skip


def squared_norm(error: Float[Tensor, "rows d"]) -> Float[Tensor, ""]:
    """Sum of squares, row by row for precision, without a copy of the tensor."""
    return torch.linalg.vector_norm(error, dim=1).square().sum()


def smallest_positive(values: Float[Tensor, " entries"]) -> Float[Tensor, ""]:
    """The smallest value above zero; NaN if there is none.

    >>> smallest_positive(torch.tensor([0.0, 3.0, 2.0]))
    tensor(2.)
    """
    least = torch.cat([values, values.new_full((1,), float("inf"))])
    least = least.masked_fill_(least <= 0, float("inf")).min()
    return least.where(least.isfinite(), float("nan"))


def _level(
    weights: SAEWeights, read: Tensor, part: SparseActs, d_out: Tensor, start: int, options: StepOptions
) -> tuple[SAEWeights, Tensor]:
    """Gradients and firing counts of the features from `start` on, of which `part` holds the activations."""
    W_dec = weights.W_dec[start : start + part.d_sae]
    positive = part.values > 0
    d_values = options.products.dots(part, d_out, W_dec).mul_(positive)
    lists = part.by_feature()
    g_dec, g_enc = options.products.sums(part, lists, [(part.values, d_out), (d_values, read)])
    level = SAEWeights(g_enc, lists.sum(d_values), g_dec, torch.empty_like(weights.b_dec))
    return level, lists.sum(positive.to(d_out.dtype))


def _join(pieces: list[tuple[SAEWeights, Tensor]]) -> tuple[SAEWeights, Tensor]:
    """Levels from the widest to the narrowest as one; each big tensor is freed before the next is joined."""
    if len(pieces) == 1:
        return pieces[0]
    levels, fired = [level for level, _ in reversed(pieces)], torch.cat([count for _, count in reversed(pieces)])
    joined = {name: torch.cat([getattr(level, name) for level in levels]) for name in ("W_enc", "b_enc", "W_dec")}
    return SAEWeights(**joined, b_dec=levels[0].b_dec), fired


def _aux_gradients(weights: SAEWeights, read: Tensor, error: Tensor, aux: AuxTask) -> _AuxGradients:
    """The auxiliary loss and its gradients; the residual, minus the error, is a constant."""
    W_enc, b_enc, W_dec = (t[aux.dead] for t in (weights.W_enc, weights.b_enc, weights.W_dec))
    g_enc, g_bias, g_dec = (torch.zeros_like(t) for t in (W_enc, b_enc, W_dec))
    mean, starts = error.mean(0), range(0, len(error), AUX_ROWS)
    variance = sum((squared_norm(error[i : i + AUX_ROWS] - mean) for i in starts), start=error.new_zeros(()))
    # A batch of one row, or of equal rows, has no variance that the loss could be relative to.
    has_some = variance > NO_VARIANCE * squared_norm(error)
    weight = torch.where(has_some, aux.coefficient / variance.where(has_some, 1.0), 0.0)
    total = error.new_zeros(())
    for i in starts:
        x = read[i : i + AUX_ROWS]
        acts = torch.addmm(b_enc, x, W_enc.t())
        if aux.k < aux.dead.numel():
            chosen = topk_indices(acts, aux.k)
            acts = torch.zeros_like(acts).scatter_(1, chosen, acts.gather(1, chosen))
        acts.clamp_min_(0)
        miss = torch.addmm(error[i : i + AUX_ROWS], acts, W_dec)
        total = total + squared_norm(miss)
        d_out = miss.mul_(2 * weight)
        d_pre = (d_out @ W_dec.t()).mul_(acts > 0)
        g_dec.addmm_(acts.t(), d_out)
        g_enc.addmm_(d_pre.t(), x)
        g_bias.add_(d_pre.sum(0))
    return _AuxGradients(total * weight, g_enc, g_bias, g_dec)


def _add(gradients: SAEWeights, part: _AuxGradients, aux: AuxTask) -> None:
    for name in ("W_enc", "b_enc", "W_dec"):
        getattr(gradients, name).index_add_(0, aux.dead, getattr(part, name))


def dense_reconstruction(
    batch: DenseBatch, acts: Tensor, kept: Tensor, widths: tuple[int, ...] | None = None
) -> DenseLosses:
    """The same by dense autograd.

    Args:
        batch: the batch.
        acts: activations, zero where they were not chosen.
        kept: what the chosen activations were compared by.
        widths: of the nested reconstructions; None for one by all features.
    """
    zero = batch.pre.new_zeros(())
    errors = [batch.error(acts[:, :n]) for n in widths or (acts.shape[1],)]
    loss, aux = sum((batch.mean_square(error) for error in errors), start=zero), batch.options.aux
    return DenseLosses(
        loss=loss, aux=zero if aux is None else _dense_aux(batch, -errors[-1].detach(), aux), sparsity=zero, acts=acts,
        threshold=batch.least(kept[acts > 0]),
    )  # fmt: skip


def _dense_aux(batch: DenseBatch, residual: Tensor, aux: AuxTask) -> Tensor:
    dead = batch.pre[:, aux.dead]
    if aux.k < len(aux.dead):
        dead = torch.zeros_like(dead).scatter(1, dead.topk(aux.k).indices, dead.topk(aux.k).values)
    variance = (residual - residual.mean(0)).square().sum()
    if variance <= NO_VARIANCE * residual.square().sum():
        return variance.new_zeros(())
    return aux.coefficient * (dead.relu() @ batch.weights.W_dec[aux.dead] - residual).square().sum() / variance


def check_k_of(config: SAEConfig) -> None:
    """Refuses a `k` that the SAE can't have.

    Raises:
        InvalidInputError: if it is below 1 or above the number of features.
    """
    if not 1 <= config.active <= config.d_sae:
        raise InvalidInputError(f"k={config.active}, d_sae={config.d_sae}: choose 1 <= k <= d_sae.")
