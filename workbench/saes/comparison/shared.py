"""How many features two SAEs share, by the directions of their decoders or encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, SAELike, as_basis
from workbench.controls.overlap import Overlap, overlap
from workbench.core.arguments import checked, shown
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import number
from workbench.core.similarity import assign_directions
from workbench.core.stats import Estimate, wilson
from workbench.interventions.op import floats
from workbench.report.base import Headline, Metric, Report, Says, Section, Table, beside

Which = Literal["decoder", "encoder"]
SHARED_COSINE = 0.7
"""Cosine above which the pairs of a matching count as one feature."""


def directions(sae: object, which: Which = "decoder") -> Float[Tensor, "d_sae d_in"]:
    """One direction per feature: the decoder rows of an SAE, or its encoder columns. A matrix is taken as it is."""
    if isinstance(sae, Tensor):
        return floats(sae, "directions", (2,), "(d_sae, d_in), one direction per feature")
    if not isinstance(sae, SAELike | Basis):
        raise InvalidInputError(f"directions({shown(sae)}): give an SAE, as from load_sae, or a matrix (d_sae, d_in).")
    basis = as_basis(sae)
    return (basis.rows() if which == "decoder" else basis.encoder_directions()).cpu()


@dataclass(frozen=True)
class SharedFeatures(Report):
    """How many features of A are in B, by their directions.

    Intervals hold for other features of these two dictionaries, not for other seeds: train several for that.

    Attributes:
        which: directions of the decoder or of the encoder. Unit decoder rows fix the scale of a feature, not the space.
        ratio: shared feature ratio: share of the features of A whose partner in the one-to-one matching of largest sum
            has a signed cosine above the threshold.
        top1: share of the features of A that have any feature of B above the threshold; not one-to-one, so never less.
    """

    which: Which
    ratio: Estimate
    top1: Estimate
    overlap: Overlap
    method: str

    def findings(self) -> tuple[str, ...]:
        """The ratio beside the most that a dictionary without a match reaches."""
        return (
            f"{self.ratio} of the features are shared by {self.which} direction (one to one, cosine above "
            f"{self.overlap.threshold}); at most {number(self._null)} in a dictionary without a match. The "
            f"{self.overlap}.",
        )

    def headline(self) -> Headline:
        """Share of shared features beside the most that a dictionary without a match reaches."""
        how = ("more features than", "no more features than", "fewer features than")
        return Headline.of(
            Says(*(f"The two dictionaries share {word} unrelated ones." for word in how)), self._beside()
        )

    @property
    def _null(self) -> float:
        return max(draw.above.value for draws in self.overlap.nulls.values() for draw in draws)

    def _beside(self) -> Table:
        null = ("dictionaries without a match, at most", self._null)
        return beside("share of features that are shared", ("these two", self.ratio), null)

    def section(self) -> Section:
        """Ratio, top-1 ratio and mean largest cosine, beside the nulls."""
        rows = [("these two", self.ratio, self.top1, self.overlap.observed.mean_max)]
        for name, draws in self.overlap.nulls.items():
            rows += [(f"{name} dictionary (null)", None, draw.above, draw.mean_max) for draw in draws]
        table = Table(
            ("against", "shared feature ratio", "top-1 ratio", "mean largest cosine"),
            tuple(rows),
            f"Directions of the {self.which}; matching: {self.method}; threshold {self.overlap.threshold}. The top-1 "
            "ratio of a null bounds its shared feature ratio.",
        )
        metrics: dict[str, Metric] = {
            "sfr": self.ratio,
            "top1": self.top1,
            "mean_max_cosine": self.overlap.observed.mean_max,
        }
        return Section("Shared features", (table, self._beside()), self.findings(), metrics, self.headline())


@checked
def shared_features(
    a: AnySAE | Float[Tensor, "d_sae d_in"],
    b: AnySAE | Float[Tensor, "d_sae d_in"],
    *,
    which: Which = "decoder",
    threshold: float = SHARED_COSINE,
    draws: int = 3,
    seed: int = 0,
) -> SharedFeatures:
    """The shared feature ratio of two SAEs, with its null.

    Raises:
        ShapeError: if the widths differ.

    Source: FaithfulSAE (arXiv 2506.17673); the matching is that of Paulo and Belrose (arXiv 2501.16615). Signed cosine:
    a feature that points the other way is another feature.
    """
    x, y = directions(a, which), directions(b, which)
    matched = assign_directions(x, y)
    near = overlap(x, y, threshold=threshold, draws=draws, seed=seed)
    ratio = wilson(int((matched.scores > threshold).sum()), len(x), unit="features")
    return SharedFeatures(which, ratio, near.observed.above, near, matched.method)
