"""Which features are active: exact selection by pre-activation, chunk by chunk, without a `[rows, d_sae]` tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.kernels.sparse import SparseActs
from workbench.saes.kernels.weights import SAEWeights

CHUNK_ROWS = 256
GROUP_SIZE = 16
MIN_GROUPED_FEATURES = 1024
NEGATIVE_INFINITY = 0xFF80
"""Bits of the bf16 number; only NaN with a sign have larger ones."""
START_FACTOR = 0.97
POOL_FACTOR = 2
ROUNDING_MARGIN = 1.05
SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Ranking:
    """How features are ranked.

    Attributes:
        dtype: precision of the pre-activations that are compared.
        by_decoder_norm: rank by pre-activation times decoder norm, as sae_lens does by default.
    """

    dtype: torch.dtype = torch.float32
    by_decoder_norm: bool = False


class Encoder:
    """Pre-activations of one batch, chunk by chunk, in the precision and units of a ranking."""

    def __init__(self, weights: SAEWeights, x: Float[Tensor, "rows d_in"], ranking: Ranking) -> None:
        self.weights, self.x = weights, x
        # Ranking in a higher precision than that of the data would be wasted, in a lower one than asked wrong.
        self.dtype = ranking.dtype if ranking.dtype.itemsize < x.dtype.itemsize else x.dtype
        self.norms: Tensor | None = None
        W, b = weights.W_enc, weights.b_enc
        if ranking.by_decoder_norm:
            self.norms = weights.W_dec.norm(dim=1).clamp_min_(SMALLEST_NORM)
            W, b = torch.mul(W, self.norms[:, None], out=W.new_empty(W.shape, dtype=self.dtype)), b * self.norms
        self._W, self._b = W.to(self.dtype).t(), b.to(self.dtype)

    @property
    def is_exact(self) -> bool:
        """Whether the chunks have the precision of the data."""
        return self.dtype == self.x.dtype

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and pre-activations of each chunk; the buffer is used again for the next."""
        rows = min(CHUNK_ROWS, len(self.x))
        buffer = torch.empty(rows, len(self._b), dtype=self.dtype, device=self.x.device)
        for start in range(0, len(self.x), CHUNK_ROWS):
            some = self.x[start : start + CHUNK_ROWS].to(self.dtype)
            yield start, torch.addmm(self._b, some, self._W, out=buffer[: len(some)])

    def values(self, entries: SparseActs) -> Float[Tensor, " entries"]:
        """Pre-activations of entries in the precision of the data and without the decoder norm.

        Args:
            entries: their values are the ranked ones, which serve if they are precise.
        """
        if not self.is_exact:
            return entries.products(self.x, self.weights.W_enc).add_(self.weights.b_enc[entries.indices])
        return entries.values if self.norms is None else entries.values / self.norms[entries.indices]


def check_k(k: float | int, d_sae: int) -> None:
    """Raises unless `k` features can be chosen.

    Raises:
        InvalidInputError: if `k` is below 1 or above `d_sae`.
    """
    if not 1 <= k <= d_sae:
        raise InvalidInputError(f"k={k} features per token, but the SAE has d_sae={d_sae}. Choose 1 <= k <= d_sae.")


def select_topk(
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    k: int,
    ranking: Ranking = Ranking(),  # noqa: B008 - frozen
) -> SparseActs:
    """Activations of the k features with the largest pre-activations of each row; zero where those are not positive.

    Args:
        weights: the SAE.
        x: what the encoder reads, `b_dec` already subtracted if it reads `x - b_dec`.
        k: how many features to keep.
        ranking: precision and units of the comparison; the activations have the precision of `x`.
    """
    d_sae = weights.b_enc.numel()
    check_k(k, d_sae)
    encoder = Encoder(weights, x, ranking)
    indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    ranked = torch.empty(len(x), k, dtype=x.dtype, device=x.device)
    for start, pre in encoder.chunks():
        found = topk_indices(pre, k)
        indices[start : start + len(pre)] = found
        if encoder.is_exact:
            torch.gather(pre, 1, found, out=ranked[start : start + len(pre)])
    acts = SparseActs.of_rows(indices, ranked, d_sae)
    return acts.with_values(encoder.values(acts).clamp_min_(0))


def select_batch_topk(
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    count: int,
    ranking: Ranking = Ranking(),  # noqa: B008 - frozen
    start: float | None = None,
) -> SparseActs:
    """Activations of the `count` largest positive pre-activations of the batch; of equal ones the first are taken.

    Args:
        weights: the SAE.
        x: what the encoder reads.
        count: how many to keep; fewer are kept if fewer are positive.
        ranking: precision and units of the search. The candidates are compared in the precision of `x`, so a lower one
            only matters to entries that it ranks far too low.
        start: threshold of a similar batch, in the units of the ranking. Saves time, does not change the result.
    """
    encoder = Encoder(weights, x, ranking)
    wanted = count if encoder.is_exact else int(ROUNDING_MARGIN * count) + 1
    bound = 0.0 if start is None or not start > 0 else START_FACTOR * start
    flat, ranked = _pool(encoder, wanted, bound)
    if len(flat) < wanted and bound > 0:
        flat, ranked = _pool(encoder, wanted, 0.0)
    entries = _entries(flat, ranked.to(x.dtype), len(x), weights.b_enc.numel())
    values = encoder.values(entries)
    compared = values
    if not encoder.is_exact:
        compared = values if encoder.norms is None else values * encoder.norms[entries.indices]
    else:
        compared = ranked
    kept = (_first_largest(compared, count) & (values > 0)).nonzero().squeeze(1)
    return _entries(flat[kept], values[kept], len(x), weights.b_enc.numel())


def select_above(encoder: Encoder, cut: Float[Tensor, " d_sae"], limit: int | None = None) -> SparseActs | None:
    """Pre-activations above the cut of their feature; None if the first chunk has more than `limit` of them per row.

    Args:
        encoder: the batch.
        cut: one bound per feature.
        limit: most entries per row that are worth the sparse form.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for start, pre in encoder.chunks():
        flat = _flat_above(pre, cut.to(pre.dtype))
        if limit is not None and start == 0 and len(flat) > limit * len(pre):
            return None
        found.append((flat + start * pre.shape[1], pre.view(-1)[flat]))
    flat, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _entries(flat, values, len(encoder.x), len(cut))


def _pool(encoder: Encoder, wanted: int, bound: float) -> tuple[Tensor, Tensor]:
    """Position and value of entries above the bound, among them the `wanted` largest; the bound rises as they come."""
    places: list[Tensor] = []
    values: list[Tensor] = []
    size = 0
    for start, pre in encoder.chunks():
        flat = _flat_above(pre, bound)
        places.append(flat + start * pre.shape[1])
        values.append(pre.view(-1)[flat])
        size += len(flat)
        if size > POOL_FACTOR * wanted:
            place, value = torch.cat(places), torch.cat(values)
            kept = _first_largest(value, wanted).nonzero().squeeze(1)
            places, values, size = [place[kept]], [value[kept]], wanted
            # Later entries that equal the smallest would lose the tie.
            bound = float(values[0].min())
    return torch.cat(places), torch.cat(values)


def _first_largest(values: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest values; of those that equal the smallest of them, the first."""
    if count >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    least = _kth_largest(values, count)
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


def _kth_largest(values: Tensor, k: int) -> Tensor:
    place = len(values) - k
    if values.device.type != "cpu" or values.dtype == torch.bfloat16:
        return values.float().kthvalue(place + 1).values.to(values.dtype)
    return values.new_tensor(np.partition(values.numpy(), place)[place])


def _flat_above(pre: Tensor, bound: Tensor | float) -> Tensor:
    if pre.device.type != "cpu":
        return (pre > bound).view(-1).nonzero().squeeze(1)
    comparable = pre.float() if pre.dtype == torch.bfloat16 else pre
    limit = bound.to(comparable.dtype).numpy() if isinstance(bound, Tensor) else comparable.numpy().dtype.type(bound)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.flatnonzero(comparable.numpy() > limit))


def _entries(flat: Tensor, values: Tensor, rows: int, d_sae: int) -> SparseActs:
    row = flat // d_sae
    offsets = torch.searchsorted(row, torch.arange(rows + 1, device=flat.device))
    return SparseActs(offsets, flat - row * d_sae, values, d_sae)


def topk_indices(pre: Float[Tensor, "rows d_sae"], k: int) -> Int[Tensor, "rows k"]:
    """Indices of the k largest entries of each row, exactly, in no particular order; NaN counts as largest.

    Wide rows go in two stages. The k-th largest maximum of strided groups is a bound that k entries reach, so the
    others need not be looked at.

    >>> topk_indices(torch.tensor([[1.0, 5.0, 3.0]]), 2).sort().values
    tensor([[1, 2]])
    """
    width = pre.shape[1]
    n_groups = width // GROUP_SIZE
    if width < MIN_GROUPED_FEATURES or k > n_groups:
        return _plain_topk(pre, k)
    if pre.device.type == "cpu":
        found = None
        if pre.dtype == torch.bfloat16:
            found = _topk_above_bound(pre.view(torch.int16), k, least=1) if _is_ordered(pre) else None
            pre = pre.float() if found is None else pre
        elif pre.dtype in (torch.float32, torch.float64):
            found = _topk_above_bound(pre, k)
        return _plain_topk(pre, k) if found is None else found
    if width % GROUP_SIZE:
        return _plain_topk(pre, k)
    maxima = pre.view(-1, GROUP_SIZE, n_groups).amax(1)
    groups = maxima.float().topk(k, sorted=False).indices
    members = torch.arange(GROUP_SIZE, device=pre.device).view(1, GROUP_SIZE, 1) * n_groups
    candidates = (groups[:, None, :] + members).flatten(1)
    return candidates.gather(1, _plain_topk(pre.gather(1, candidates), k))


def _plain_topk(pre: Tensor, k: int) -> Tensor:
    # The CPU kernel for bf16 is slower than the conversion.
    return (pre.float() if pre.dtype == torch.bfloat16 else pre).topk(k, sorted=False).indices


def _few_true(mask: np.ndarray) -> np.ndarray:
    """Flat positions of the true entries, in order; words of eight entries are looked at first, as most have none."""
    entries = mask.reshape(-1)
    if len(entries) % 8:
        return np.flatnonzero(entries)
    words = np.flatnonzero(entries.view(np.uint64))
    inside = np.flatnonzero(entries.reshape(-1, 8)[words])
    return words[inside // 8] * 8 + inside % 8


def _is_ordered(pre: Tensor) -> bool:
    """Whether the bits of bf16 values, as integers, are in the order of the values where these are positive.

    A NaN with a sign would count as a small value instead of the largest.
    """
    return bool(pre.view(torch.int16).numpy().view(np.uint16).max(initial=0) <= NEGATIVE_INFINITY)


def _topk_above_bound(pre: Tensor, k: int, least: int | None = None) -> Tensor | None:
    """Top k among the entries that reach the bound, usually few more than k; None if it is below `least`, or with NaN.

    numpy compares and partitions with vector instructions where torch does not: three to six times as fast, and twice
    that on 16-bit integers.
    """
    # Eight groups for each of the k keep the bound close to the k-th value, and few maxima to order.
    size = max(GROUP_SIZE, pre.shape[1] // (8 * k))
    n_groups, width = pre.shape[1] // size, pre.shape[1]
    maxima = pre[:, : n_groups * size].unflatten(1, (size, n_groups)).amax(1).numpy()
    place = n_groups - k
    # numpy orders 32-bit numbers faster than 16-bit integers.
    ordered = np.partition(maxima.astype(np.float32) if maxima.dtype == np.int16 else maxima, place, axis=1)
    if least is None and (np.isnan(ordered[:, place:]).any() or np.isnan(pre.numpy()[:, n_groups * size :]).any()):
        return None
    bound = ordered[:, place, None].astype(maxima.dtype)
    if least is not None and bound.min(initial=least) < least:
        return None
    values_at = pre.numpy()
    with np.errstate(invalid="ignore"):
        flat = _few_true(values_at >= bound)
    rows, columns = np.divmod(flat, width)
    counts = np.bincount(rows, minlength=len(pre))
    if counts.min() < k:  # a bound of NaN, which nothing reaches
        return None
    widest = int(counts.max())
    position = rows * widest + (np.arange(len(flat)) - (counts.cumsum() - counts)[rows])
    values = np.full((len(pre), widest), -np.inf, dtype=ordered.dtype)
    members = np.zeros((len(pre), widest), dtype=np.int64)
    values.reshape(-1)[position] = values_at.reshape(-1)[flat]
    members.reshape(-1)[position] = columns
    if widest == k:
        return torch.from_numpy(members)
    return torch.from_numpy(members).gather(1, torch.from_numpy(values).topk(k, sorted=False).indices)
