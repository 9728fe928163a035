"""How suspicious each row is, from the matrices alone; lower is more suspicious. Streamed in row blocks, fp32 rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.errors import UnknownNameError, did_you_mean
from workbench.glitch.weights import Matrix, TokenMatrices
from workbench.progress import track

INDICATORS: dict[str, str] = {
    "I_in": "norm of the input row",
    "I_cos": "cosine distance of the output row to the mean of the reference rows",
    "I_centred": "the same after the mean row is taken off every row",
    "I_l2": "distance of the output row to the mean of the reference rows",
}
"""Every indicator with its meaning; earlier ones win ties."""

EPS = 1e-6
ENOUGH = 0.9
"""AUC below which no indicator is used."""
CLEARLY = 0.02
"""By how much the AUC of a later indicator must be higher to be preferred: under-trained ordinary tokens blur it."""
_MAX_HELD_OUT = 512


@dataclass(frozen=True, eq=False)
class RowFacts:
    """What one pass over a matrix gives: index = row.

    Attributes:
        norm: L2 norm of each row; nan where the row is not finite.
        finite: rows without NaN or infinity.
        mean: mean of the finite rows, summed in fp64.
        classes: ids of each set of two or more bit-identical rows, zero rows left out.
    """

    norm: np.ndarray
    finite: np.ndarray
    mean: Tensor
    classes: tuple[tuple[int, ...], ...]

    @property
    def usable(self) -> np.ndarray:
        """Rows that have a direction: finite and not zero."""
        return self.finite & (np.nan_to_num(self.norm) > 0)


def read_rows(matrix: Matrix, block_rows: int, bias: Tensor | None = None, identical: bool = True) -> RowFacts:
    """Norms, mean, bad and bit-identical rows of a matrix in one pass; with `bias`, equal rows need equal biases."""
    norm, total = np.empty(matrix.n_rows), torch.zeros(matrix.width, dtype=torch.float64)
    seen: dict[bytes, list[int]] = {}
    finite = np.empty(matrix.n_rows, dtype=bool)
    blocks = -(-matrix.n_rows // block_rows)
    for start, block in track(
        matrix.blocks(block_rows), total=blocks, description=f"read {matrix.name}", unit="blocks"
    ):
        good = torch.isfinite(block).all(1)
        norm[start : start + len(block)] = torch.linalg.vector_norm(block, dim=1).numpy()
        finite[start : start + len(block)] = good.numpy()
        total += (block if bool(good.all()) else block[good]).sum(0, dtype=torch.float64)
        if identical:
            extra = None if bias is None else bias[start : start + len(block)]
            _note_rows(seen, block, extra, start)
    norm[~finite] = np.nan
    classes = tuple(tuple(ids) for ids in seen.values() if len(ids) > 1 and finite[ids[0]] and norm[ids[0]] > 0)
    return RowFacts(norm, finite, (total / max(1, int(finite.sum()))).float(), classes)


def _note_rows(seen: dict[bytes, list[int]], block: Tensor, bias: Tensor | None, start: int) -> None:
    # adding 0.0 turns -0.0 into 0.0: both give the same logits
    rows = (block if bias is None else torch.cat([block, bias[:, None]], 1)).add(0.0).contiguous().numpy()
    for k, row in enumerate(rows):
        seen.setdefault(hashlib.blake2b(row, digest_size=16).digest(), []).append(start + k)


def measure(
    matrices: TokenMatrices, inner: RowFacts, outer: RowFacts, reference: Sequence[int], block_rows: int
) -> dict[str, np.ndarray]:
    """The indicators of every row; nan where a row is not finite. Without a reference only `I_in`, and only if untied.

    `I_cos = 1 - e.u / max(|e| |u|, 1e-6)` and `I_l2 = |e - u|` with `u` the mean of the reference rows;
    `I_centred` is `I_cos` of `e - mean` and `u - mean`; `I_in = |e_in|`.
    A row that is exactly zero has `I_cos = 1`: it has no direction, and is reported apart.
    Source: Land and Bartolo 2024, section 2.2. `I_in` is never given for tied matrices, where it says nothing.
    """
    n = matrices.E_out.n_rows
    result: dict[str, np.ndarray] = {}
    if not matrices.tied:
        result["I_in"] = np.full(n, np.nan)
        shared = min(n, len(inner.norm))
        result["I_in"][:shared] = inner.norm[:shared]
    if not len(reference):
        return result
    u = matrices.E_out.rows(reference).double().mean(0).float()
    result |= {name: np.empty(n) for name in ("I_cos", "I_centred", "I_l2")}
    blocks = matrices.E_out.blocks(block_rows)
    for start, block in track(blocks, total=-(-n // block_rows), description="indicators", unit="blocks"):
        rows = slice(start, start + len(block))
        result["I_cos"][rows] = cosine_distance(block, u).numpy()
        result["I_centred"][rows] = cosine_distance(block - outer.mean, u - outer.mean).numpy()
        result["I_l2"][rows] = torch.linalg.vector_norm(block - u, dim=1).numpy()
    for values in result.values():
        values[~outer.finite] = np.nan
    return result


def cosine_distance(rows: Tensor, u: Tensor) -> Tensor:
    """One minus the cosine of each row with `u`; 1 for a zero row.

    >>> cosine_distance(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
    tensor([0., 1., 1.])
    """
    scale = torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(u)
    return 1 - (rows @ u) / scale.clamp_min(EPS)


@dataclass(frozen=True)
class Separation:
    """How well an indicator tells known-unused rows from ordinary tokens.

    Attributes:
        indicator: a key of `INDICATORS`.
        auc: chance that a reference row, held out of the reference, is lower than an ordinary token; 0.5 is chance.
        missed: share of ordinary tokens below the highest held-out reference row.
        n_reference: reference rows held out, one at a time.
        n_ordinary: ordinary tokens compared with.
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
    auc = auc_lower(held_out, there)
    return Separation(indicator, auc, float(np.mean(there < held_out.max())), len(held_out), len(there))


def auc_lower(low: np.ndarray, high: np.ndarray) -> float:
    """Chance that a value of `low` is below one of `high`, ties counting half.

    >>> auc_lower(np.array([1.0, 3.0]), np.array([2.0, 3.0]))  # (1 + 1 + 0 + 0.5) / 4
    0.625
    """
    there = np.sort(high)
    below, upto = np.searchsorted(there, low, "left"), np.searchsorted(there, low, "right")
    return float(np.mean(1 - (below + upto) / (2 * len(there))))


def held_out_values(
    indicator: str, matrices: TokenMatrices, outer: RowFacts, values: np.ndarray, reference: Sequence[int]
) -> np.ndarray:
    """The indicator of each reference row with that row left out of the reference mean; nan if it is the only one."""
    ids = list(reference)
    if indicator == "I_in":
        return values[ids]
    if len(ids) < 2:
        return np.full(len(ids), np.nan)
    total = matrices.E_out.rows(ids).double().sum(0)
    rows = matrices.E_out.rows(ids[:: -(-len(ids) // _MAX_HELD_OUT)])
    means = ((total - rows.double()) / (len(ids) - 1)).float()
    if indicator == "I_l2":
        return torch.linalg.vector_norm(rows - means, dim=1).numpy()
    shift = outer.mean if indicator == "I_centred" else torch.zeros_like(outer.mean)
    pairs = zip(rows - shift, means - shift, strict=True)
    return np.array([float(cosine_distance(row[None], mean)[0]) for row, mean in pairs])


def pick(measured: Sequence[Separation], asked: str | None = None, insist: bool = False) -> tuple[str | None, str]:
    """The indicator to rank by, and why: the first of `INDICATORS` that no other clearly beats.

    Returns None, with the reason, if none separates with an AUC of at least `ENOUGH`; with `insist` (the user named
    the reference) the first one, with the warning that nothing confirms it.
    """
    known = {s.indicator: s for s in measured}
    if asked is not None:
        if asked not in known:
            raise UnknownNameError(
                f"indicator={asked!r} is not available here (tied models have no I_in; the others need a reference). "
                + did_you_mean(asked, known)
            )
        return asked, f"{asked} as asked; held-out AUC {known[asked].auc:.4f}"
    table = ", ".join(f"{s.indicator} {s.auc:.4f}" for s in measured)
    good = [known[name] for name in INDICATORS if name in known and known[name].auc >= ENOUGH]
    if not good and insist and known:
        first = next(name for name in INDICATORS if name in known)
        return first, f"{first}, because the reference was given; NOT CONFIRMED by a held-out AUC ({table})"
    if not good:
        return None, f"no indicator separates the unused rows from ordinary tokens (AUC: {table or 'none measured'})"
    best = max(s.auc for s in good)
    chosen = next(s for s in good if s.auc >= best - CLEARLY)
    reason = (
        "is the highest" if chosen.auc == best else f"is within {CLEARLY} of the highest, and it is the simpler one"
    )
    return chosen.indicator, f"{chosen.indicator}: its held-out AUC {chosen.auc:.4f} {reason} (AUC: {table})"
