"""A lens by ridge regression of the last block's output on each earlier activation, from running sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import counted
from workbench.core.progress import task
from workbench.core.records import to_jsonable
from workbench.core.tokens import TokenBatch
from workbench.features.lenses.linear import LinearLens
from workbench.features.lenses.places import target_of
from workbench.features.lenses.source import batches_of, kept_tokens, middle, policy_of
from workbench.models.model import Model

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried on held-out rows: penalties, as multiples of the mean variance of a dimension."""
HELD_OUT_EVERY = 5
_ROWS = 8

Part = tuple[dict[str, Tensor], bool]
"""Activations of some tokens by site, and whether they are held out."""


class RidgeSums:
    """Sums of one site from which the regression follows, for rows to fit and held-out rows."""

    def __init__(self, centre: Float[Tensor, " d"], target_centre: Float[Tensor, " d"]) -> None:
        """Products are taken around a first guess of the means, so that large means cost no digits."""
        d = len(centre)
        self._centre, self._target_centre = centre.double(), target_centre.double()
        self.n = [0, 0]
        self._sums = torch.zeros(2, 2, d, dtype=torch.double)
        self._products = torch.zeros(2, 3, d, d, dtype=torch.double)

    def add(self, h: Float[Tensor, "n d"], y: Float[Tensor, "n d"], is_held_out: bool) -> None:
        """Counts some tokens."""
        dtype = torch.double if h.dtype == torch.double else torch.float
        x, z = h.cpu().to(dtype) - self._centre.to(dtype), y.cpu().to(dtype) - self._target_centre.to(dtype)
        side = int(is_held_out)
        self.n[side] += len(x)
        self._sums[side] += torch.stack([x.sum(0), z.sum(0)]).double()
        self._products[side] += torch.stack([x.T @ x, z.T @ x, z.T @ z]).double()

    def _moments(self, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of both, and the three covariances, of one side; of 2, of both sides."""
        sides = [0, 1] if side == 2 else [side]
        n = sum(self.n[s] for s in sides)
        x, z = self._sums[sides].sum(0) / n
        products = self._products[sides].sum(0) / n
        return x, z, products[0] - torch.outer(x, x), products[1] - torch.outer(z, x), products[2] - torch.outer(z, z)

    def solve(self, ridge: float | None = None) -> Solution:
        """The map of all rows, with the penalty that is best on held-out ones, or a given one."""
        found = self._error_by_ridge((ridge,) if ridge is not None else RIDGES)
        best = min(found, key=lambda r: found[r])
        x, z, cov, cross, _ = self._moments(2)
        weight = _ridge(cov, cross, best)
        bias = z + self._target_centre - weight @ (x + self._centre)
        return Solution(weight, bias, best, found[best])

    def _error_by_ridge(self, ridges: Sequence[float]) -> dict[float, float]:
        """FVU on held-out rows by penalty; nan where none is held out."""
        if not self.n[1]:
            return dict.fromkeys(ridges, float("nan"))
        x, z, cov, cross, _ = self._moments(0)
        held_x, held_z, held_cov, held_cross, held_target = self._moments(1)
        found = {}
        for ridge in ridges:
            a = _ridge(cov, cross, ridge)
            shift = held_z - z - a @ (held_x - x)
            error = held_target.trace() - 2 * (a * held_cross).sum() + ((a @ held_cov) * a).sum() + shift @ shift
            found[ridge] = float(error / held_target.trace())
        return found


@dataclass(frozen=True)
class Solution:
    """A map of one site.

    Attributes:
        ridge: the penalty.
        fvu: share of the target's variance that it leaves out on held-out rows, when fitted on the others.
    """

    weight: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    ridge: float
    fvu: float


def _ridge(cov: Float[Tensor, "d d"], cross: Float[Tensor, "d d"], ridge: float) -> Float[Tensor, "d d"]:
    """`cross (cov + ridge * mean variance)^-1`; directions without any variance are left out."""
    values, vectors = torch.linalg.eigh(cov)
    values = values.clamp_min(0)
    shrunk = values + ridge * values.mean()
    inverse = torch.where(shrunk > values[-1] * len(values) * 1e-15, 1 / shrunk, torch.zeros_like(shrunk))
    return (cross @ vectors * inverse) @ vectors.T


@torch.no_grad()
def fit_regression(
    model: Model, source: ActivationStore | TokenBatch, sites: tuple[str, ...], ridge: float | None = None
) -> LinearLens:
    """The regression lens: for each site the affine map whose output is closest to that of the last block.

    Every fifth row, or of a store its own held-out rows, chooses the penalty and is then fitted too.

    Raises:
        DegenerateInputError: if there are no more tokens than dimensions.
        MismatchError: for a store of another model.
    """
    target, sums, norms = target_of(model), dict[str, RidgeSums](), dict[str, list[Tensor]]()
    wanted = [*sites, target]
    parts = _of_store(model, source, wanted) if isinstance(source, ActivationStore) else _of_rows(model, source, wanted)
    for acts, is_held_out in parts:
        y = acts[target]
        for site in sites:
            if site not in sums:
                sums[site] = RidgeSums(acts[site].double().mean(0).cpu(), y.double().mean(0).cpu())
            sums[site].add(acts[site], y, is_held_out)
            norms.setdefault(site, []).append(acts[site].float().norm(dim=1).cpu())
    n = sum(next(iter(sums.values())).n) if sums else 0
    if n <= model.d_model:
        raise DegenerateInputError(
            f"A regression lens of width {model.d_model} needs more tokens than that; there are "
            f"{counted(n, 'tokens')}, first and special ones left out. Give more or longer texts."
        )
    solved = {site: sums[site].solve(ridge) for site in sites}
    dtype = torch.double if model.dtype == torch.double else torch.float
    return LinearLens(
        kind="regression", target=target, sites=sites, n_fit=n, unit="tokens", model_name=model.name,
        weights={site: s.weight.to(model.device, dtype) for site, s in solved.items()},
        biases={site: s.bias.to(model.device, dtype) for site, s in solved.items()},
        norms={site: float(torch.cat(parts).median()) for site, parts in norms.items()},
        fingerprint=model.fingerprint,
        recipe={"ridge": {site: s.ridge for site, s in solved.items()}, "fvu": to_jsonable(_fvu(solved))},
    )  # fmt: skip


def _fvu(solved: Mapping[str, Solution]) -> dict[str, float]:
    return {site: solution.fvu for site, solution in solved.items()}


def _of_store(model: Model, source: ActivationStore, sites: Sequence[str]) -> Iterator[Part]:
    """The stored activations; the store says which rows are held out."""
    source.check_model(model)
    with task(total=len(source), description="Reading activations", unit="tokens") as running:
        for index in range(len(source.manifest.shards)):
            for is_held_out in (False, True):
                acts = source.aligned_block(index, sites, "heldout" if is_held_out else "train")
                if len(acts[sites[0]]):
                    yield acts, is_held_out
                    running.advance(len(acts[sites[0]]))


def _of_rows(model: Model, batch: TokenBatch, sites: Sequence[str]) -> Iterator[Part]:
    """Activations of the tokens that count."""
    policy = policy_of(model, batch, middle(sites))
    with task(total=batch.n_tokens, description="Capturing", unit="tokens") as running:
        for number, part in enumerate(batches_of(batch, _ROWS)):
            acts = model.capture(part, sites)
            keep = kept_tokens(policy, part, acts[middle(sites)])
            held_out = (torch.arange(len(part)) + _ROWS * number) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            for is_held_out in (False, True):
                chosen = keep & (held_out == is_held_out).to(keep.device)[:, None]
                if bool(chosen.any()):
                    yield {site: acts[site][chosen.to(acts[site].device)] for site in sites}, is_held_out
            running.advance(part.n_tokens)
