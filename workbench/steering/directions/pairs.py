"""One direction from contrast pairs, beside what a direction of shuffled labels and a random one reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
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

FOLDS, SHUFFLES, RANDOM = 5, 1000, 20
"""Folds of the cross-validation; shuffles of the labels; random directions."""
MORE = "more than with shuffled labels"
_SAYS = Says(
    works="The direction separates pairs that it was not made from, better than one made from shuffled labels.",
    no_better="The direction separates new pairs no better than one made from shuffled labels.",
    fails="",  # the test has one side
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Direction(Report):
    """A direction from contrast pairs, and whether it separates pairs that it was not made from.

    Attributes:
        site: where.
        vector: mean of the positive texts less that of the negative ones, in the units of the activations.
        separated: share of held-out pairs whose positive text lies further along a direction made from the others.
        shuffled: the same with the sides of each pair shuffled: mean and 95 % range over shuffles; near 0.5.
        more: `separated` minus `shuffled`; above 0 if at most 5 % of the shuffles, this labelling counted as one of
            them, reach `separated`. To turn round all pairs changes nothing, so five pairs are too few for that.
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
    more: Estimate
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
            f"{self.shuffled}, a difference of {self.more.change()}; by random directions {self.random}.",
        )

    def headline(self) -> Headline:
        """The share of separated pairs beside that of shuffled labels."""
        column = "share of pairs separated"
        value, control = ((self._table(), row, column) for row in ("direction", "shuffled labels"))
        return Headline.read(
            _SAYS, value=value, control=control, difference=(self._table(), "direction", MORE), difference_name=MORE
        )

    def section(self) -> Section:
        """The share of separated pairs beside those of the controls."""
        metrics: dict[str, Metric] = {name.replace(" ", "_"): value for name, value in self._arms().items()}
        metrics["more_than_shuffled"] = self.more
        title = f"A direction at {self.site} of {self.model}"
        return Section(title, (self._table(),), self.findings(), metrics, self.headline())

    def _arms(self) -> dict[str, Estimate]:
        return {"direction": self.separated, "shuffled labels": self.shuffled, "random direction": self.random}

    def _table(self) -> Table:
        rows = tuple((arm, share, self.more if arm == "direction" else None) for arm, share in self._arms().items())
        return Table(("arm", "share of pairs separated", MORE), rows, "Separation of held-out pairs")


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
    gaps = (a - b).double().cpu()
    folds = torch.arange(len(gaps)) % min(FOLDS, len(gaps))
    flips = _flips(len(gaps), seed)
    products = gaps @ gaps.T
    along = random_directions(vector, RANDOM, seed=seed).double().cpu() @ gaps.T
    (own,) = _separated(products, folds, torch.ones_like(flips[:1]))
    shuffled = _separated(products, folds, flips)
    pointed = _separated(torch.ones_like(products), folds, along)  # of a gap such a direction sees its projection alone
    labels = [side.index for side in (positives, negatives) if isinstance(side, Column)]
    return Direction(
        site=where, vector=vector, separated=wilson(own, len(gaps), unit="held-out pairs"),
        shuffled=_spread(shuffled, len(gaps), "shuffles"), more=_more(own, shuffled, len(gaps)),
        random=_spread(pointed, len(gaps), "random directions"),
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


def _flips(n: int, seed: int) -> Float[Tensor, "shuffles pairs"]:
    """1 for each pair that stays and -1 for each whose sides are exchanged: all ways, or random ones of very many."""
    if 2**n <= SHUFFLES:
        return torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * n)
    return torch.randint(0, 2, (SHUFFLES, n), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def _separated(
    products: Float[Tensor, "pairs pairs"], folds: Int[Tensor, " pairs"], weights: Float[Tensor, "draws pairs"]
) -> list[int]:
    """How many pairs lie the right way along the sum of the pairs of the other folds, for each draw.

    Args:
        products: scalar products of the gaps of the pairs.
        folds: number of each pair's fold.
        weights: of the gaps: -1 exchanges the sides of a pair.
    """
    others = products * (folds[:, None] != folds)
    return ((weights @ others * weights) > 0).sum(1).tolist()


def _spread(counts: Sequence[int], n: int, unit: str) -> Estimate:
    """Mean share with the range that holds 95 % of the draws."""
    shares = np.asarray(counts) / n
    low, high = np.quantile(shares, [0.025, 0.975])
    return Estimate(float(shares.mean()), float(low), float(high), len(counts), f"range of {len(counts)} {unit}", unit)


def _more(own: int, shuffled: Sequence[int], n: int) -> Estimate:
    """Share minus that of the shuffles, with the range of the 95 % of the labellings that separate least.

    Source: Phipson and Smyth 2010 (arXiv 1603.05766), for counting the labelling itself as one of the shuffles.

    >>> _more(6, [3] * 96 + [6] * 4, 6).low, _more(6, [3] * 95 + [6] * 5, 6).low  # 5 and 6 of 101
    (0.5, 0.0)
    """
    shares = np.asarray([own, *shuffled]) / n
    most = float(np.quantile(shares, 0.95, method="higher"))
    low, high = own / n - most, own / n - float(shares.min())
    return Estimate(
        own / n - float(np.mean(shuffled)) / n, low, high, len(shuffled), "one-sided range of the shuffles", "shuffles"
    )
