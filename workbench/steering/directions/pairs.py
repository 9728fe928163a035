"""One direction from contrast pairs, beside what a direction of shuffled labels and a random one reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.controls.directions import random_directions
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import Estimate, wilson
from workbench.core.tokens import Column, labelled
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import Scope
from workbench.models.model import Model
from workbench.report.base import Headline, Metric, Report, Says, Section, Table
from workbench.steering.directions.contrast import difference_of_means, mean_activations

if TYPE_CHECKING:
    import pandas as pd

FOLDS, DRAWS = 5, 20
"""Folds of the cross-validation; shuffles of the labels, and random directions."""
_SAYS = Says(
    works="The direction separates pairs that it was not made from, better than its controls.",
    no_better="The direction separates new pairs no better than one made from shuffled labels.",
    fails="The direction separates new pairs worse than one made from shuffled labels.",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Direction(Report):
    """A direction from contrast pairs, and whether it separates pairs that it was not made from.

    Attributes:
        site: where.
        vector: mean of the positive texts less that of the negative ones, in the units of the activations.
        separated: share of held-out pairs whose positive text lies further along a direction made from the others.
        shuffled: the same with the sides of each pair shuffled: mean and 95 % range over shuffles; near 0.5.
        random: the same of random directions, pointed by the other pairs.
        projections: of each text on the unit vector, positives first; the vector was made from these texts.
        texts: the texts, in that order.
        made_for: fingerprint of the model.
        model: its name.
        index: labels of the texts, where both sides were columns of a table.
    """

    site: str
    vector: Float[Tensor, " d"]
    separated: Estimate
    shuffled: Estimate
    random: Estimate
    projections: Float[Tensor, " texts"]
    texts: tuple[str, ...]
    made_for: str
    model: str
    index: pd.Index | None = None

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The vector with length 1."""
        return self.vector / self.vector.norm()

    @checked
    def intervention(self, strength: float = 1.0, scope: Scope | None = None) -> Intervention:
        """The vector added at its site; strength 1 moves a text by the mean difference of the two sides."""
        edit = Intervention.at(self.site, Add(self.vector, strength), scope)
        return Intervention(edit.edits, self.made_for)

    def frame(self) -> pd.DataFrame:
        """One row per text: side, text, and its projection on the unit vector."""
        n = len(self.texts) // 2
        side = ["positive"] * n + ["negative"] * n
        columns = {"side": side, "text": self.texts, "projection": self.projections.cpu().numpy()}
        return labelled(columns, self.index, range(len(self.texts)))

    def findings(self) -> tuple[str, ...]:
        """Whether it separates, beside its controls."""
        return (
            f"{self.site}: {self.separated} of the held-out pairs are separated; with shuffled labels "
            f"{self.shuffled}, by random directions {self.random}.",
        )

    def headline(self) -> Headline:
        """The share of separated pairs beside that of shuffled labels."""
        column = "share of pairs separated"
        value, control = ((self._table(), row, column) for row in ("direction", "shuffled labels"))
        return Headline.read(_SAYS, value=value, control=control)

    def section(self) -> Section:
        """The share of separated pairs beside those of the controls."""
        metrics: dict[str, Metric] = {name.replace(" ", "_"): value for name, value in self._arms().items()}
        title = f"A direction at {self.site} of {self.model}"
        return Section(title, (self._table(),), self.findings(), metrics, self.headline())

    def _arms(self) -> dict[str, Estimate]:
        return {"direction": self.separated, "shuffled labels": self.shuffled, "random direction": self.random}

    def _table(self) -> Table:
        return Table(("arm", "share of pairs separated"), tuple(self._arms().items()), "Separation of held-out pairs")


@checked
def direction(
    model: Model,
    positives: Sequence[str] | Column,
    negatives: Sequence[str] | Column,
    site: str | Site,
    *,
    tokens: Literal["mean", "last"] = "mean",
    seed: int = 0,
) -> Direction:
    """The difference of means of contrast pairs at a site, beside its controls.

    A text is the mean activation of its tokens, without the first and without attention sinks, or that of its last
    token. The share of pairs that are separated is cross-validated: each fifth of the pairs by a direction made from
    the others.

    Args:
        model: the model.
        positives: texts with what the direction is to stand for, or a column of a table.
        negatives: texts without it; the i-th belongs to the i-th positive.
        site: where.
        tokens: what of a text is read.
        seed: of the shuffles and the random directions.

    Raises:
        InvalidInputError: if the two sides are not pairs, or there are fewer than two.
        DegenerateInputError: if they do not differ at the site.

    Source: Turner et al. 2023 (arXiv 2308.10248) and Rimsky et al. 2023 (arXiv 2312.06681), who add it.
    """
    sides = [list(side.tolist() if isinstance(side, Column) else side) for side in (positives, negatives)]
    if len(sides[0]) != len(sides[1]) or len(sides[0]) < 2:
        raise InvalidInputError(
            f"direction: {len(sides[0])} positives and {len(sides[1])} negatives. Give two pairs or more, the i-th "
            "texts belonging together."
        )
    where = str(model.resolve(site))
    a, b = (_read(model, texts, where, tokens) for texts in sides)
    vector = difference_of_means(a, b)
    if not bool(vector.isfinite().all()) or not bool(vector.norm() > 0):
        raise DegenerateInputError(f"direction: the two sides do not differ at {where}. Give other texts or a site.")
    gaps, draws = (a - b).double().cpu(), torch.Generator().manual_seed(seed)
    folds = torch.arange(len(gaps)) % min(FOLDS, len(gaps))
    signs = torch.randint(0, 2, (DRAWS, len(gaps), 1), generator=draws) * 2.0 - 1
    noise = random_directions(vector, DRAWS, seed=seed).double().cpu()
    own = _separated(gaps, folds, _mean)
    shuffled = [_separated(gaps * sign, folds, _mean) for sign in signs]
    pointed = [_separated(gaps, folds, lambda others, v=v: v * (others @ v).mean().sign()) for v in noise]
    labels = [side.index for side in (positives, negatives) if isinstance(side, Column)]
    return Direction(
        site=where, vector=vector, separated=wilson(own, len(gaps), unit="held-out pairs"),
        shuffled=_spread(shuffled, len(gaps), "shuffles"), random=_spread(pointed, len(gaps), "random directions"),
        projections=torch.cat([a, b]).float() @ (vector / vector.norm()), texts=(*sides[0], *sides[1]),
        made_for=model.fingerprint, model=model.name, index=labels[0].append(labels[1]) if len(labels) == 2 else None,
    )  # fmt: skip


def _read(model: Model, texts: list[str], site: str, tokens: str) -> Float[Tensor, "texts d"]:
    batch = model.tokens(texts)
    if tokens == "last":
        where = torch.zeros_like(batch.mask)
        where[:, -1] = True
    else:
        acts = model.capture(batch, [site]).flat(site)
        where = TokenPolicy.of_batch(batch, acts).kept(batch, acts)
    return mean_activations(model, batch, [site], where)[site]


def _mean(others: Float[Tensor, "pairs d"]) -> Float[Tensor, " d"]:
    return others.mean(0)


def _separated(
    gaps: Float[Tensor, "pairs d"], folds: Tensor, make: Callable[[Float[Tensor, "others d"]], Float[Tensor, " d"]]
) -> int:
    """How many pairs lie the right way along a direction that is made from the pairs of the other folds."""
    return sum(int((gaps[folds == f] @ make(gaps[folds != f]) > 0).sum()) for f in folds.unique().tolist())


def _spread(counts: Sequence[int], n: int, unit: str) -> Estimate:
    """Mean share with the range that holds 95 % of the draws."""
    shares = np.asarray(counts) / n
    low, high = np.quantile(shares, [0.025, 0.975])
    return Estimate(float(shares.mean()), float(low), float(high), len(counts), f"range of {len(counts)} {unit}", unit)
