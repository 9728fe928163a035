"""On what effects are computed: rows, bases, metric, and the clean and the patched state of every site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.decomposition import Place, places, reads_of, refuse_unreached
from circuits.decomposition import bases as checked_bases
from circuits.metrics import AnyMetric, Examples, Metric, bound
from circuits.pairs import Pairs
from workbench.bases.base import CHUNK_ENTRIES, Basis
from workbench.bases.sae import AnySAE
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.hooks.capture import Activations
from workbench.models.model import Model

Baseline = Literal["patch", "zero", "zero_keep_error", "mean"]
BASELINES = ("patch", "zero", "zero_keep_error", "mean")


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What effects and edges are computed on: checked, on the model's device.

    Attributes:
        places: the bases with their sites.
        clean: the rows.
        patch: their counterparts, for baseline "patch".
        keep: the tokens that are patched.
        metric: bound to the rows.
        note: what was left out when the pairs were made.
    """

    model: Model
    places: list[Place]
    clean: TokenBatch
    patch: TokenBatch | None
    keep: Bool[Tensor, "batch pos"]
    metric: Metric
    baseline: Baseline
    note: str

    @property
    def sites(self) -> list[str]:
        """Every site that a basis reads or writes."""
        return reads_of(self.places)

    def batch(self, rows: Int[Tensor, " rows"], *, patch: bool = False) -> TokenBatch:
        """Some rows, with the padding of all."""
        whole = self.patch if patch and self.patch is not None else self.clean
        return TokenBatch(whole.ids[rows], whole.mask[rows])

    def chunks(self, size: int) -> list[Int[Tensor, " rows"]]:
        """The row numbers, so many at a time."""
        return list(torch.arange(len(self.clean), device=self.keep.device).split(max(1, size)))


def setting_of(
    model: Model, bases: Mapping[str, AnySAE], examples: Examples, metric: AnyMetric, baseline: Baseline,
    keep: Tensor | None = None, who: str = "node_effects",
) -> Setting:  # fmt: skip
    """Checks what effects are to be computed on.

    Raises:
        MismatchError: if the metric can't see a basis, or a basis belongs elsewhere.
        ShapeError: if the mask has another shape than the rows.
        InvalidInputError: if baseline "patch" has no counterparts.
        DegenerateInputError: if the mask keeps no token.
    """
    examples = examples.to(model.device)
    placed, reads = places(model, checked_bases(model, bases)), bound(metric, model, examples)
    refuse_unreached(model, [place.site for place in placed], reads.site, "The metric")
    pairs = examples if isinstance(examples, Pairs) else None
    clean = examples.clean if isinstance(examples, Pairs) else examples
    if baseline == "patch" and (pairs is None or pairs.patch is None):
        raise InvalidInputError(
            "baseline='patch' needs the counterparts of the prompts. Give Pairs with patch=, or another baseline: "
            f"{', '.join(BASELINES[1:])}."
        )
    if keep is None:
        keep = clean.mask if pairs is not None and baseline == "patch" else TokenPolicy.of_batch(clean).kept(clean)
    elif keep.shape != clean.ids.shape:
        raise ShapeError(f"{who}: keep {tuple(keep.shape)} and ids {tuple(clean.ids.shape)} must be alike.")
    keep = keep.to(model.device)
    changed = "" if pairs is None or baseline != "patch" else " at or behind the first difference of its pair"
    if pairs is not None and changed:
        keep = keep & pairs.changed()  # what comes before the first difference is the same in both runs
    if not bool(keep.any()):
        raise DegenerateInputError(f"{who}: the mask keeps no token{changed}, so there is nothing to patch. Keep one.")
    patch = pairs.patch if pairs is not None and baseline == "patch" else None
    return Setting(
        model=model, places=placed, clean=clean, patch=patch, keep=keep, metric=reads, baseline=baseline,
        note=pairs.note if pairs else "",
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SiteState:
    """Clean and patched state of the kept tokens of some rows at one place.

    Attributes:
        x: activations where the basis writes.
        read: activations where it reads.
        change: by what `x` changes when all of it is patched.
        patched_read: activations where it reads in the patched state; None if its features go elsewhere.
        target: what the coefficients go to where that is not read: None is zero.
    """

    x: Float[Tensor, "tokens d"]
    read: Float[Tensor, "tokens d_in"]
    change: Float[Tensor, "tokens d"]
    patched_read: Float[Tensor, "tokens d_in"] | None
    target: Float[Tensor, " d_sae"] | None

    def moves(self, basis: Basis, rows: slice) -> Float[Tensor, "tokens d_sae"]:
        """By how much each feature's coefficient changes."""
        now = basis.coefficients(self.read[rows])
        if self.patched_read is not None:
            return basis.coefficients(self.patched_read[rows]) - now
        return -now if self.target is None else self.target - now


class States:
    """States of the places of a setting, some rows at a time; means over all of them are taken once."""

    def __init__(self, setting: Setting, batch_size: int) -> None:
        self._setting, self._means = setting, {}
        if setting.baseline == "mean":
            self._means = means_of(setting, batch_size)

    def of(self, rows: Int[Tensor, " rows"]) -> dict[str, SiteState]:
        """The states of some rows, by site."""
        s = self._setting
        clean = s.model.capture(s.batch(rows), s.sites)
        patch = s.model.capture(s.batch(rows, patch=True), s.sites) if s.patch is not None else None
        return {place.site: self._state(place, s.keep[rows], clean, patch) for place in s.places}

    def _state(self, place: Place, keep: Tensor, clean: Activations, patch: Activations | None) -> SiteState:
        x, read = (precise(clean.flat(site)[keep]) for site in (place.site, place.read))
        if patch is not None:
            there, read_there = (precise(patch.flat(site)[keep]) for site in (place.site, place.read))
            return SiteState(x, read, there - x, read_there, None)
        if place.site in self._means:
            mean, parts = self._means[place.site]
            return SiteState(x, read, mean - x, None, parts)
        return SiteState(x, read, place.change(x, read, error=self._setting.baseline == "zero"), None, None)


def means_of(setting: Setting, batch_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site the mean activation and the mean coefficients, over all kept tokens."""
    sums: dict[str, list[Tensor]] = {}
    for rows in setting.chunks(batch_size):
        acts = setting.model.capture(setting.batch(rows), setting.sites)
        for place in setting.places:
            x, read = (precise(acts.flat(site)[setting.keep[rows]]) for site in (place.site, place.read))
            step = max(1, CHUNK_ENTRIES // place.basis.d_sae)
            parts = torch.stack([place.basis.coefficients(some).sum(0) for some in read.split(step)]).sum(0)
            found = sums.setdefault(place.site, [torch.zeros_like(x[0]), torch.zeros_like(parts)])
            found[0] += x.sum(0)
            found[1] += parts
    n = int(setting.keep.sum())
    return {site: (x / n, parts / n) for site, (x, parts) in sums.items()}
