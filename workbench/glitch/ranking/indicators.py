"""How suspicious each row is, from the matrices alone (lower is more suspicious), and which tokens are candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from workbench.controls.area import chance_above
from workbench.core.errors import UnknownNameError, did_you_mean
from workbench.core.numbers import counted, number, setting
from workbench.core.progress import track
from workbench.core.registry import Registry
from workbench.glitch.ranking.weights import Matrix, TokenMatrices

_TINY = 1e-30
MIN_AUC = 0.9
"""AUC below which no indicator is used."""
MIN_AUC_GAIN = 0.02
"""By how much the AUC of a later indicator must be higher to be preferred: under-trained ordinary tokens blur it."""
_MAX_HELD_OUT = 512


@dataclass(frozen=True, eq=False)
class RowFacts:
    """What one pass over a matrix gives: index = row.

    Attributes:
        norm: L2 norm of each row; nan where the row is not finite.
        mean: mean of the finite rows, summed in fp64.
        classes: ids of each set of two or more bit-identical rows, zero rows left out.
        component: the first principal component of the finite rows, of length 1, or None if it was not asked for.
    """

    norm: np.ndarray
    finite: np.ndarray
    mean: Tensor
    classes: tuple[tuple[int, ...], ...]
    component: Tensor | None = None

    @property
    def usable(self) -> np.ndarray:
        """Rows that have a direction: finite and not zero."""
        return self.finite & (np.nan_to_num(self.norm) > 0)


@dataclass(frozen=True)
class Indicator:
    """A number for each row, lower where the row is more suspicious.

    Attributes:
        meaning: in words.
        compare: the indicator of output rows, each against its own reference mean or all against one, with the facts
            on all output rows; None for the norm of the input row.
        needs_component: measured only when asked for, since the first principal component costs a matrix product.
    """

    meaning: str
    compare: Callable[[Tensor, Tensor, RowFacts], Tensor] | None = None
    needs_component: bool = False


INDICATORS: Registry[Indicator] = Registry("indicator")
"""Every indicator; earlier ones win ties."""


def read_rows(
    matrix: Matrix, block_rows: int, bias: Tensor | None = None, identical: bool = True, component: bool = False
) -> RowFacts:
    """Norms, mean, bad and bit-identical rows of a matrix in one pass; with `bias`, equal rows need equal biases.

    With `component` also the first principal component, which costs rows x d_model x d_model.
    """
    norm, total = np.empty(matrix.n_rows), torch.zeros(matrix.width, dtype=torch.float64)
    finite, key = np.empty(matrix.n_rows, dtype=bool), np.empty(matrix.n_rows, dtype=np.uint64)
    gram = torch.zeros(matrix.width, matrix.width, dtype=torch.float64) if component else None
    blocks, n_blocks = matrix.blocks(block_rows), -(-matrix.n_rows // block_rows)
    for start, block in track(blocks, total=n_blocks, description=f"read {matrix.name}", unit="blocks"):
        part = slice(start, start + len(block))
        norm[part] = torch.linalg.vector_norm(block, dim=1).numpy()
        # a sum is finite unless the row holds NaN or infinity, or overflows; only such rows are looked at one by one
        good = np.isfinite(norm[part])
        good[~good] = torch.isfinite(block[torch.from_numpy(~good)]).all(1).numpy()
        finite[part], key[part] = good, _sample_key(block)
        block = block if good.all() else block[torch.from_numpy(good)]
        total += block.sum(0, dtype=torch.float64)
        if gram is not None:
            gram += block.T @ block
    norm[~finite] = np.nan
    n = max(1, int(finite.sum()))
    mean = total / n
    first = None if gram is None else torch.linalg.eigh(gram / n - torch.outer(mean, mean)).eigenvectors[:, -1].float()
    usable = np.flatnonzero(finite & (np.nan_to_num(norm) > 0))
    classes = _equal_rows(matrix, bias, usable, key[usable], block_rows) if identical else ()
    return RowFacts(norm, finite, mean.float(), classes, first)


def _sample_key(block: Tensor) -> np.ndarray:
    """A number per row that is equal for equal rows, from at most 16 of its columns."""
    # adding 0.0 turns -0.0 into 0.0: both give the same logits
    some = block[:, :: -(-block.shape[1] // 16)].add(0.0).contiguous().numpy().view(np.uint32).astype(np.uint64)
    return (some * np.random.default_rng(0).integers(1, 2**63, some.shape[1], dtype=np.uint64)).sum(1, dtype=np.uint64)


def _equal_rows(
    matrix: Matrix, bias: Tensor | None, ids: np.ndarray, key: np.ndarray, block_rows: int
) -> tuple[tuple[int, ...], ...]:
    _, which, count = np.unique(key, return_inverse=True, return_counts=True)
    ids = ids[count[which] > 1]
    seen: dict[bytes, list[int]] = {}
    for start in range(0, len(ids), block_rows):
        part = ids[start : start + block_rows]
        rows = matrix.rows(part.tolist())
        rows = rows if bias is None else torch.cat([rows, bias[torch.from_numpy(part)][:, None]], 1)
        for i, row in zip(part.tolist(), rows.add(0.0).contiguous().numpy(), strict=True):
            seen.setdefault(hashlib.blake2b(row, digest_size=16).digest(), []).append(i)
    return tuple(tuple(same) for same in seen.values() if len(same) > 1)


def measure(
    matrices: TokenMatrices, inner: RowFacts, outer: RowFacts, reference: Sequence[int], block_rows: int
) -> dict[str, np.ndarray]:
    """The indicators of every row; nan where a row is not finite. Without a reference only `I_in`, and only if untied.

    `I_cos = 1 - e.u / (|e| |u|)` and `I_l2 = |e - u|` with `u` the mean of the reference rows;
    `I_centred` is `I_cos` of `e - mean` and `u - mean`; `I_1pc` of `e - (e.c) c` and `u - (u.c) c` with `c` the first
    component; `I_in = |e_in|`.
    A row that is exactly zero has `I_cos = 1`: it has no direction, and is reported apart.
    Source: Land and Bartolo 2024, section 2.2; without their lower limit of 1e-6 on `|e| |u|`, which calls rows that
    weight decay has shrunk orthogonal to the reference. `I_in` is never given for tied matrices, where it says nothing.
    """
    n = matrices.E_out.n_rows
    result: dict[str, np.ndarray] = {}
    if not matrices.tied:
        result["I_in"] = np.pad(inner.norm[:n], (0, max(0, n - len(inner.norm))), constant_values=np.nan)
    if not len(reference):
        return result
    u = matrices.E_out.rows(reference).double().mean(0).float()
    compared = {
        name: indicator.compare for name, indicator in INDICATORS.items()
        if indicator.compare is not None and (outer.component is not None or not indicator.needs_component)
    }  # fmt: skip
    result |= {name: np.empty(n) for name in compared}
    blocks = matrices.E_out.blocks(block_rows)
    for start, block in track(blocks, total=-(-n // block_rows), description="indicators", unit="blocks"):
        rows = slice(start, start + len(block))
        for name, compare in compared.items():
            result[name][rows] = compare(block, u[None], outer).numpy()
    for values in result.values():
        values[~outer.finite] = np.nan
    return result


def _cosine(rows: Tensor, means: Tensor, outer: RowFacts) -> Tensor:
    del outer
    if len(means) == 1:
        return cosine_distance(rows, means[0])
    return torch.stack([cosine_distance(row[None], mean)[0] for row, mean in zip(rows, means, strict=True)])


def _centred(rows: Tensor, means: Tensor, outer: RowFacts) -> Tensor:
    return _cosine(rows - outer.mean, means - outer.mean, outer)


def _without_component(rows: Tensor, means: Tensor, outer: RowFacts) -> Tensor:
    c = outer.component
    assert c is not None, "measured only with a component"
    return _cosine(rows - (rows @ c)[:, None] * c, means - (means @ c)[:, None] * c, outer)


def _euclidean(rows: Tensor, means: Tensor, outer: RowFacts) -> Tensor:
    del outer
    return torch.linalg.vector_norm(rows - means, dim=1)


INDICATORS.add("I_in", Indicator("norm of the input row"))
INDICATORS.add("I_cos", Indicator("cosine distance of the output row to the mean of the reference rows", _cosine))
INDICATORS.add("I_centred", Indicator("the same after the mean row is taken off every row", _centred))
INDICATORS.add("I_l2", Indicator("distance of the output row to the mean of the reference rows", _euclidean))
_1PC = "cosine distance after the first principal component of all rows is projected out"
INDICATORS.add("I_1pc", Indicator(_1PC, _without_component, needs_component=True))


def cosine_distance(rows: Tensor, u: Tensor) -> Tensor:
    """One minus the cosine of each row with `u`; 1 for a zero row.

    >>> cosine_distance(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
    tensor([0., 1., 1.])
    """
    # fp64, since nearly equal rows differ in the last digits of fp32, which depend on where a row lies in memory
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) * torch.linalg.vector_norm(u, dtype=torch.float64)
    return (1 - (rows.double() @ u.double()) / norm.clamp_min(_TINY)).to(rows.dtype)


@dataclass(frozen=True)
class Separation:
    """How well an indicator tells known-unused rows from ordinary tokens.

    Attributes:
        auc: chance that a reference row, held out of the reference, is lower than an ordinary token; 0.5 is chance.
        missed: share of ordinary tokens below the highest held-out reference row.
    """

    indicator: str
    auc: float
    missed: float
    n_reference: int
    n_ordinary: int


def separation(indicator: str, values: np.ndarray, ordinary: np.ndarray, held_out: np.ndarray) -> Separation:
    """AUC of the held-out values of reference rows against the ordinary tokens (ties count half)."""
    there = np.sort(values[ordinary][np.isfinite(values[ordinary])])
    held_out = held_out[np.isfinite(held_out)]
    if not len(there) or not len(held_out):
        return Separation(indicator, float("nan"), float("nan"), len(held_out), len(there))
    auc = chance_above(there, held_out)
    return Separation(indicator, auc, float(np.mean(there < held_out.max())), len(held_out), len(there))


def held_out_values(
    indicator: str, matrices: TokenMatrices, outer: RowFacts, values: np.ndarray, reference: Sequence[int]
) -> np.ndarray:
    """The indicator of each reference row, with that row left out of the reference mean; nan if it is the only one."""
    ids, compare = list(reference), INDICATORS[indicator].compare
    if compare is None:
        return values[ids]
    if len(ids) < 2:
        return np.full(len(ids), np.nan)
    total = matrices.E_out.rows(ids).double().sum(0)
    rows = matrices.E_out.rows(ids[:: -(-len(ids) // _MAX_HELD_OUT)])
    means = ((total - rows.double()) / (len(ids) - 1)).float()
    return compare(rows, means, outer).numpy()


def pick(measured: Sequence[Separation], asked: str | None = None, insist: bool = False) -> tuple[str | None, str]:
    """The indicator to rank by, and why: the first of `INDICATORS` that no other clearly beats.

    Returns None, with the reason, if none separates with an AUC of at least `MIN_AUC`; with `insist` (the user named
    the reference) the first one, with the warning that nothing confirms it.
    """
    known = {s.indicator: s for s in measured}
    if asked is not None:
        if asked not in known:
            raise UnknownNameError(
                f"indicator={asked!r} is not available here (tied models have no I_in; the others need a reference). "
                + did_you_mean(asked, known)
            )
        return asked, f"{asked} as asked; held-out AUC {number(known[asked].auc, 4)}"
    table = ", ".join(f"{s.indicator} {number(s.auc, 4)}" for s in measured)
    good = [known[name] for name in INDICATORS if name in known and known[name].auc >= MIN_AUC]
    if not good and insist and known:
        first = next(name for name in INDICATORS if name in known)
        return first, f"{first}, because the reference was given; NOT CONFIRMED by a held-out AUC ({table})"
    if not good:
        return None, f"no indicator separates the unused rows from ordinary tokens (AUC: {table or 'none measured'})"
    best = max(s.auc for s in good)
    chosen = next(s for s in good if s.auc >= best - MIN_AUC_GAIN)
    near = f"is within {MIN_AUC_GAIN} of the highest, and it is the simpler one"
    reason = "is the highest" if chosen.auc == best else near
    return chosen.indicator, f"{chosen.indicator}: its held-out AUC {number(chosen.auc, 4)} {reason} (AUC: {table})"


Method = Literal["false discovery rate", "percentile"]

PUBLISHED_PERCENT = 2.0
"""Share of ordinary tokens, in percent, that Land and Bartolo 2024 call candidates."""
MAX_FALSE_DISCOVERY_RATE = 0.1
"""Share of the candidates that may be ordinary tokens by the estimate."""
_MIN_VALUES = 200
_BINS, _SMOOTH = 64, 3
MAX_VALLEY_SHARE = 0.2
"""Two modes lie apart if the density between them falls below this share of the lower one's peak."""
_MIN_SHARE_BELOW, _MAX_SHARE_BELOW = 0.05, 0.75
"""Between these shares of the tokens a group below would distort the spread of the bulk and is not the bulk itself."""
_MIN_PEAK_COUNT = 20
"""A group needs so many tokens in its fullest bin: fewer may be a chance."""


@dataclass(frozen=True)
class Threshold:
    """Candidates lie at or below `value`, as do `percentile` % of the ordinary tokens; how it was chosen, and why."""

    value: float
    percentile: float
    method: Method
    why: str


def find_threshold(values: np.ndarray, percentile: float | None = None) -> Threshold:
    """The threshold for the indicator of ordinary tokens (finite; lower is more suspicious).

    Trained tokens are taken as normal around the median with the spread of the lower flank (median minus 16% quantile,
    which a few per cent of untrained tokens barely move). Where a larger group lies apart below the others, with a
    valley of the density between them, median and flank are those of the tokens above it. The threshold is the highest
    value at which the number of tokens that this normal puts below it is at most `MAX_FALSE_DISCOVERY_RATE` of the
    number found there. A percentile is used if it is asked for, or if that estimate is not to be had: fewer than 200
    values, no spread, or no excess in the tail.
    Source: Efron 2004 (empirical null, central matching); on one flank, since these distributions are skewed.

    >>> values = np.concatenate([np.full(3, 0.01), torch.special.ndtri(torch.linspace(0.001, 0.999, 997)).numpy() + 9])
    >>> find_threshold(values).value, find_threshold(values).percentile  # 3 of 1,000, while the bulk predicts none
    (0.01, 0.3)
    """
    low = np.sort(values)
    if not len(low):
        return Threshold(float("nan"), 0.0, "percentile", "there is nothing to rank")
    if percentile is not None:
        return _by_percentile(low, percentile, "as asked")
    if len(low) < _MIN_VALUES:
        why = f"{len(low)} ordinary tokens are too few to model their distribution"
        return _by_percentile(low, PUBLISHED_PERCENT, why)
    bulk, apart = _without_group(low)
    middle, flank = np.quantile(bulk, [0.5, 0.16])
    if middle <= flank:
        return _by_percentile(low, PUBLISHED_PERCENT, "a third of the ordinary tokens have the same value")
    expected = len(bulk) * torch.special.ndtr(torch.from_numpy((low - middle) / (middle - flank))).numpy()
    n_below = np.searchsorted(low, low, side="right")
    fits = np.flatnonzero((expected <= MAX_FALSE_DISCOVERY_RATE * n_below) & (low < flank))
    if not len(fits):
        return _by_percentile(low, PUBLISHED_PERCENT, "the low tail holds no more tokens than the bulk explains")
    k = int(fits[-1])
    n = int(n_below[k])
    why = (
        f"{counted(n, 'ordinary tokens')} lie there and the bulk (median {number(middle)}, lower spread "
        f"{number(middle - flank)}) explains {number(expected[k])}: a false discovery rate of "
        f"{number(expected[k] / n)}, if the bulk is normal{apart}"
    )
    return Threshold(float(low[k]), 100 * n / len(low), "false discovery rate", why)


def _without_group(low: np.ndarray) -> tuple[np.ndarray, str]:
    """The sorted values above a group that lies apart below the others, and a sentence about that group."""
    if (valley := find_valley(low)) is None:
        return low, ""
    n = int(np.searchsorted(low, valley))
    group = f". {number(n)} tokens, a share of {number(n / len(low))}, form a group of their own below {number(valley)}"
    return low[n:], f"{group}; the bulk is what lies above"


def find_valley(low: np.ndarray) -> float | None:
    """The deepest place between two modes of sorted values, or None if they have one mode.

    From a histogram of 64 bins, smoothed; both modes need a peak that is no chance, the density between them has to
    fall below `MAX_VALLEY_SHARE` of the lower peak, and `_MIN_SHARE_BELOW` to `_MAX_SHARE_BELOW` of the values lie
    below.

    >>> bell = torch.special.ndtri(torch.linspace(0.001, 0.999, 999)).numpy()
    >>> find_valley(bell) is None, 2 < find_valley(np.concatenate([bell, bell + 8])) < 6
    (True, True)
    """
    start, end = np.quantile(low, [0.001, 0.999])
    if end <= start:
        return None
    bins = min(_BINS, int(np.sqrt(len(low))))
    counts, edges = np.histogram(low, bins, (start, end))
    height = np.convolve(counts, np.full(_SMOOTH, 1 / _SMOOTH), "same")
    lower = np.minimum(np.maximum.accumulate(height), np.maximum.accumulate(height[::-1])[::-1])
    below = np.searchsorted(low, (edges[:-1] + edges[1:]) / 2) / len(low)
    fits = (lower >= _MIN_PEAK_COUNT) & (below >= _MIN_SHARE_BELOW) & (below <= _MAX_SHARE_BELOW)
    depth = np.where(fits, height / np.maximum(lower, 1), 1.0)
    at = int(depth.argmin())
    return float((edges[at] + edges[at + 1]) / 2) if depth[at] < MAX_VALLEY_SHARE else None


def _by_percentile(low: np.ndarray, percentile: float, why: str) -> Threshold:
    value = float(np.percentile(low, percentile))
    return Threshold(
        value, percentile, "percentile", f"the {setting(percentile)}% percentile of ordinary tokens, {why}"
    )
