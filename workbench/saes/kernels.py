"""The sparse training step of a TopK SAE: one dense matrix product selects, everything else touches only k features.

Weights are kept feature-major (one row per feature) so that gathering a feature reads one contiguous row; `W_enc` is
transposed only when the SAE is saved.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from workbench.errors import InvalidInputError, ShapeError
from workbench.saes.weights import SAEWeights

CHUNK_ROWS = 256
GROUP_SIZE = 16
MIN_GROUPED_FEATURES = 1024


@dataclass(frozen=True)
class SparseActs:
    """Feature activations of `rows` tokens: exactly k features each, values zero where fewer are positive."""

    indices: Int[Tensor, "rows k"]
    values: Float[Tensor, "rows k"]


@dataclass(frozen=True)
class StepResult:
    """What one training step computed.

    Attributes:
        loss: mean over tokens of the squared reconstruction error, summed over `d_in`.
        aux_loss: the auxiliary loss of the dead features, already multiplied by its coefficient; zero without them.
        gradients: of `loss + aux_loss`.
        fired: number of tokens on which each feature was positive.
    """

    loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    gradients: SAEWeights
    fired: Int[Tensor, " d_sae"]


@dataclass(frozen=True)
class AuxTask:
    """The auxiliary loss (AuxK) that revives dead features: they alone must explain the residual.

    Attributes:
        dead: indices of the features that count as dead.
        k: how many of them reconstruct the residual of each token.
        coefficient: weight of the loss, which is normalised by the variance of the residual.

    Source: Gao et al. 2024 (arXiv 2406.04093) A.2. The activations go through a ReLU, as there.
    """

    dead: Int[Tensor, " n_dead"]
    k: int
    coefficient: float = 1 / 32


def select_topk(
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    by_decoder_norm: bool = False,
) -> Int[Tensor, "rows k"]:
    """Indices of the k largest pre-activations of each row, in no particular order.

    The matrix product runs in `dtype`, chunk by chunk, so that no `[rows, d_sae]` tensor is ever made.

    Args:
        weights: the SAE.
        x: activations with `b_dec` already subtracted.
        k: how many features to keep.
        dtype: precision of the pre-activations that are ranked.
        by_decoder_norm: rank by pre-activation times decoder norm, as sae_lens does by default.
    """
    _check_k(k, weights.b_enc.numel())
    W, b = weights.W_enc, weights.b_enc
    if by_decoder_norm:
        norms = weights.W_dec.norm(dim=1)
        W, b = W * norms[:, None], b * norms
    W_low, b_low, x_low = W.to(dtype).t(), b.to(dtype), x.to(dtype)
    chosen = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    buffer = torch.empty(min(CHUNK_ROWS, len(x)), W.shape[0], dtype=dtype, device=x.device)
    for start in range(0, len(x), CHUNK_ROWS):
        rows = x_low[start : start + CHUNK_ROWS]
        pre = torch.addmm(b_low, rows, W_low, out=buffer[: len(rows)])
        chosen[start : start + len(rows)] = topk_indices(pre, k)
    return chosen


def topk_indices(pre: Float[Tensor, "rows d_sae"], k: int) -> Int[Tensor, "rows k"]:
    """Indices of the k largest entries of each row, exactly, in no particular order.

    Wide rows go in two stages: the k largest entries lie in the k strided groups with the largest maxima.

    >>> topk_indices(torch.tensor([[1.0, 5.0, 3.0]]), 2).sort().values
    tensor([[1, 2]])
    """
    n_rows, width = pre.shape
    if width < MIN_GROUPED_FEATURES or width % GROUP_SIZE or k > width // GROUP_SIZE:
        return pre.float().topk(k, sorted=False).indices
    n_groups = width // GROUP_SIZE
    maxima = pre.view(n_rows, GROUP_SIZE, n_groups).amax(1)
    groups = maxima.float().topk(k, sorted=False).indices
    members = torch.arange(GROUP_SIZE, device=pre.device).view(1, GROUP_SIZE, 1) * n_groups
    candidates = (groups[:, None, :] + members).flatten(1)
    best = pre.gather(1, candidates).float().topk(k, sorted=False).indices
    return candidates.gather(1, best)


def sampled_products(
    x: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_sae d_in"], indices: Int[Tensor, "rows k"]
) -> Float[Tensor, "rows k"]:
    """The dot products `x[i] . W[indices[i, j]]`, and only those.

    >>> sampled_products(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1]]))
    tensor([[2.]])
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return torch.einsum("nd,nkd->nk", x, W[indices])
    pattern = _csr(indices, torch.zeros(indices.numel(), dtype=x.dtype), W.shape[0])
    return torch.sparse.sampled_addmm(pattern, x, W.t(), beta=0.0).values().view(indices.shape)


def decode_sparse(acts: SparseActs, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "rows d_in"]:
    """`sum_j values[i, j] * W_dec[indices[i, j]]` per row, without the decoder bias."""
    return embedding_bag(acts.indices, W_dec, per_sample_weights=acts.values, mode="sum")


def encode_sparse(
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    by_decoder_norm: bool = False,
) -> SparseActs:
    """Activations of the k features with the largest pre-activations; values exact in the dtype of `x`.

    Args:
        weights: the SAE.
        x: activations, `b_dec` not yet subtracted.
        k: how many features to keep.
        dtype: precision of the selection only.
        by_decoder_norm: see `select_topk`.
    """
    centred = x - weights.b_dec
    indices = select_topk(weights, centred, k, dtype=dtype, by_decoder_norm=by_decoder_norm)
    values = sampled_products(centred, weights.W_enc, indices) + weights.b_enc[indices]
    return SparseActs(indices, values.clamp_min_(0))


def topk_step(
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    aux: AuxTask | None = None,
    by_decoder_norm: bool = False,
) -> StepResult:
    """Loss and gradients of one batch, equal to dense autograd up to rounding.

    Args:
        weights: the SAE; not changed.
        x: the batch, fp32.
        k: features per token.
        dtype: precision of the selection; the chosen activations and all gradients are computed in fp32.
        aux: the auxiliary task of dead features, if any.
        by_decoder_norm: see `select_topk`.

    Raises:
        ShapeError: if `x` has another width than the SAE.
    """
    if x.shape[1] != weights.b_dec.numel():
        raise ShapeError(f"topk_step: x has shape {tuple(x.shape)}; this SAE reads d_in={weights.b_dec.numel()}.")
    acts = encode_sparse(weights, x, k, dtype=dtype, by_decoder_norm=by_decoder_norm)
    centred = x - weights.b_dec
    error = decode_sparse(acts, weights.W_dec) - centred
    loss = error.square().sum() / len(x)
    d_out = error * (2 / len(x))
    # A feature that was chosen with a value of zero got no gradient from the ReLU either.
    d_values = sampled_products(d_out, weights.W_dec, acts.indices).mul_(acts.values > 0)
    transpose = _Transpose.of(acts.indices, weights.b_enc.numel())
    gradients = SAEWeights(
        W_enc=transpose.weighted_sum(d_values, centred),
        b_enc=transpose.sum(d_values),
        W_dec=transpose.weighted_sum(acts.values, d_out),
        b_dec=d_out.sum(0),
    )
    fired = transpose.sum((acts.values > 0).to(x.dtype)).long()
    aux_loss = loss.new_zeros(())
    if aux is not None and aux.dead.numel():
        aux_loss = _add_aux(weights, centred, -error, aux, gradients)
    # x enters the encoder as x - b_dec; one matrix-vector product covers the whole batch.
    gradients.b_dec.sub_(gradients.b_enc @ weights.W_enc)
    return StepResult(loss, aux_loss, gradients, fired)


def _add_aux(
    weights: SAEWeights, centred: Tensor, residual: Tensor, aux: AuxTask, gradients: SAEWeights
) -> Float[Tensor, ""]:
    """Adds the gradients of the auxiliary loss in place and returns the loss; the residual is a constant."""
    W_enc, W_dec = weights.W_enc[aux.dead], weights.W_dec[aux.dead]
    pre = torch.addmm(weights.b_enc[aux.dead], centred, W_enc.t())
    if aux.k < aux.dead.numel():
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, topk_indices(pre, aux.k), True)
        pre.masked_fill_(~kept, 0)
    acts = pre.clamp_min_(0)
    error = acts @ W_dec - residual
    weight = aux.coefficient / (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    d_out = error * (2 * weight)
    d_pre = (d_out @ W_dec.t()).mul_(acts > 0)
    gradients.W_dec.index_add_(0, aux.dead, acts.t() @ d_out)
    gradients.W_enc.index_add_(0, aux.dead, d_pre.t() @ centred)
    gradients.b_enc.index_add_(0, aux.dead, d_pre.sum(0))
    return error.square().sum() * weight


@dataclass(frozen=True)
class _Transpose:
    """The (token, feature) pairs of a batch, ordered by feature: one sort serves both weight gradients."""

    order: Tensor
    rows: Tensor
    offsets: Tensor
    features: Tensor

    @classmethod
    def of(cls, indices: Tensor, d_sae: int) -> _Transpose:
        flat = indices.flatten()
        if flat.device.type == "cpu" and d_sae <= 2**16:
            # numpy sorts 16-bit keys by radix, about a hundred times faster than torch sorts integers.
            order = torch.from_numpy(np.argsort(flat.numpy().astype(np.uint16), kind="stable"))
        else:
            order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=d_sae)
        return cls(order, order // indices.shape[1], counts.cumsum(0) - counts, flat)

    def weighted_sum(self, values: Tensor, x: Tensor) -> Tensor:
        """Row f holds the sum over the tokens of feature f of `value * x[token]`."""
        per_sample = values.flatten()[self.order]
        return embedding_bag(self.rows, x, self.offsets, per_sample_weights=per_sample, mode="sum")

    def sum(self, values: Tensor) -> Tensor:
        """Entry f holds the sum of the values of feature f."""
        return torch.zeros(len(self.offsets), dtype=values.dtype, device=values.device).index_add_(
            0, self.features, values.flatten()
        )


def _csr(indices: Tensor, values: Tensor, width: int) -> Tensor:
    rows, k = indices.shape
    crow = torch.arange(0, rows * k + 1, k, dtype=torch.int32)
    with warnings.catch_warnings():
        # torch announces once per process that the CSR layout is in beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(crow, indices.flatten().int(), values, (rows, width), check_invariants=False)


def _check_k(k: int, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise InvalidInputError(f"k={k} features per token, but the SAE has d_sae={d_sae}. Choose 1 <= k <= d_sae.")


def probe_select_dtype(d_in: int, d_sae: int, rows: int = CHUNK_ROWS) -> torch.dtype:
    """The dtype in which the selecting matrix product is faster on this machine, measured in about 0.1 s.

    bf16 is chosen only when it is at least 1.2 times as fast.
    """
    x, W = torch.ones(rows, d_in), torch.ones(d_sae, d_in)
    seconds = {dtype: _best_seconds(x.to(dtype), W.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.2 < seconds[torch.float32] else torch.float32


def _best_seconds(x: Tensor, W: Tensor, repeats: int = 4) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(x, W.t())
        best = min(best, time.perf_counter() - start)
    return best
