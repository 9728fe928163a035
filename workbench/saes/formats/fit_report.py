"""How well an SAE reconstructs at the site that it claims, and at those that it may have been mistaken for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.core.errors import MismatchError
from workbench.core.numbers import number
from workbench.core.stats import paired_difference
from workbench.report.base import Headline, Report, Says, Section, Table, beside

FVU_LIMIT = 1.0
"""Above this an SAE is refused: the mean of the tokens would reconstruct them better."""
USELESS = 1.0
"""From this mean over dimensions of the FVU of each, the means of the dimensions would do better than the SAE, and all
layers are tried."""
FEWEST_TEXTS = 8
"""With fewer texts there is no interval by which one place could be clearly better than another."""


@dataclass(frozen=True)
class Fit:
    """How well an SAE reconstructs at one place.

    Attributes:
        site: where it was made to read.
        how: what was done to the activations first, in words; empty for nothing.
        fvu: unexplained over total variance of the kept tokens; infinite if the reconstruction is.
        l0: active features per token.
        n_tokens: kept tokens.
        by_text: what each text adds to `fvu`.
        standardised_by_text: what each text adds to the mean over dimensions of the FVU of each dimension alone. A
            layer in which one dimension outweighs all others has a low FVU whatever the SAE; here it is one of many.
    """

    site: str
    how: str
    fvu: float
    l0: float
    n_tokens: int
    by_text: tuple[float, ...] = ()
    standardised_by_text: tuple[float, ...] = ()

    @property
    def place(self) -> str:
        """Site and treatment, as `resid_pre.15` or `resid_post.15 at scale 0.05`."""
        return f"{self.site} {self.how}".strip()

    @property
    def standardised(self) -> float:
        """Mean over dimensions of the FVU of each dimension alone."""
        return sum(self.standardised_by_text) if self.standardised_by_text else math.nan

    def clearly_below(self, other: Fit) -> bool:
        """Whether less is left unexplained here, by both measures and text by text on the same texts."""
        pairs = ((self.by_text, other.by_text), (self.standardised_by_text, other.standardised_by_text))
        return all(clearly_less(mine, theirs) for mine, theirs in pairs)


@dataclass(frozen=True, repr=False)
class FitReport(Report):
    """An SAE at the site it claims and at those it may have been mistaken for.

    The first token of each text, special tokens and those with a norm above ten medians are left out.

    Attributes:
        claimed: at its own site, on activations as they are.
        others: elsewhere, or on treated activations.
        looks_like: the one of `others` that the SAE was probably made for: one that is much better than `claimed`, or a
            site that is clearly better by both measures, as where a layer was counted from another number.
    """

    claimed: Fit
    others: tuple[Fit, ...]
    looks_like: Fit | None

    @property
    def ok(self) -> bool:
        """Whether nothing says that the SAE belongs elsewhere; one that was hardly trained may be of no use yet."""
        return self.looks_like is None and self.claimed.fvu <= FVU_LIMIT

    def findings(self) -> tuple[str, ...]:
        """What was found, in one sentence."""
        here = f"FVU {_number(self.claimed.fvu)} at {self.claimed.place}"
        about = f"({self.claimed.n_tokens} tokens, {number(self.claimed.l0)} active features per token)"
        if self.looks_like is not None:
            other = self.looks_like
            at = f"at {other.place if other.site != self.claimed.site else other.how}"
            at = at.replace("at at ", "at ")
            return (f"{here}; {at} it is {_number(other.fvu)}: this looks like {other.place} {about}.",)
        if self.ok:
            return (f"{here} {about}: {self._verdict()}",)
        best = min((other.fvu for other in self.others), default=math.inf)
        return (
            f"{here}, worse than the mean of the tokens, and no better than {_number(best)} at any of the "
            f"{len(self.others)} other sites and scales {about}: this is no SAE of this model, or its "
            "activations were treated in another way.",
        )

    def _verdict(self) -> str:
        """What to think of an SAE that no other place explains better."""
        if self.claimed.standardised >= USELESS:
            return (
                f"not usable: on average over the dimensions its error is {_number(self.claimed.standardised)} times "
                "their variance, worse than their means, and no other layer is clearly better."
            )
        lower = min((fit for fit in self.others if not fit.how), key=lambda fit: fit.fvu, default=self.claimed)
        if lower.fvu >= self.claimed.fvu:
            return "it fits."
        return (
            f"usable, but at {lower.site} it is {_number(lower.fvu)}; if that layer is meant, pass site={lower.site!r}."
        )

    def headline(self) -> Headline:
        """FVU at the site that it claims, beside the place that it looks made for, or the limit of what fits."""
        return Headline.of(
            Says("The SAE fits the site that it claims.", "", "The SAE does not fit the site that it claims."),
            self._beside(),
            "at most",
        )

    def _beside(self) -> Table:
        other, limit = self.looks_like, ("mean of the tokens", FVU_LIMIT)
        return beside(
            "FVU", (self.claimed.place, self.claimed.fvu), limit if other is None else (other.place, other.fvu)
        )

    def section(self) -> Section:
        """The finding with one row per place that was tried."""
        rows = tuple(
            (fit.place, fit.fvu, fit.standardised, fit.l0, fit.n_tokens) for fit in (self.claimed, *self.others)
        )
        columns = ("place", "FVU", "mean FVU of the dimensions", "L0", "tokens")
        table = Table(columns, rows, "The first row is the site that the SAE claims.")
        metrics = {
            "fvu": self.claimed.fvu,
            "standardised_fvu": self.claimed.standardised,
            "l0": self.claimed.l0,
            "n_tokens": self.claimed.n_tokens,
        }
        title = f"Does the SAE fit {self.claimed.site}?"
        return Section(title, (table, self._beside()), self.findings(), metrics, self.headline())

    def require(self) -> FitReport:
        """Itself, if the SAE fits.

        Raises:
            MismatchError: if it does not.
        """
        if self.ok:
            return self
        named = self.looks_like
        anyway = "check=False (--no-check)"
        advice = f"{anyway} uses it nevertheless."
        if named is not None and not named.how:
            advice = f"Pass site={named.site!r}, or {anyway} to use it where it says."
        elif named is not None and named.how.startswith("at scale"):
            advice = f"Pass scale={named.how.removeprefix('at scale ')}, or {anyway} to use it as it is."
        raise MismatchError(f"The SAE does not fit: {self.findings()[0]} {advice}")

    def _shown_line(self) -> str:
        state = "does not fit" if not self.ok else "of no use" if self.claimed.standardised >= USELESS else "ok"
        return f"{state}: {self.findings()[0]}"


def clearly_less(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether the values of the same texts are lower, by the interval of their paired difference."""
    if len(mine) < FEWEST_TEXTS or not np.isfinite([*mine, *theirs]).all():
        return False
    return paired_difference(mine, theirs, unit="texts").high < 0


def _number(value: float) -> str:
    return number(value) if math.isfinite(value) else "infinite"
