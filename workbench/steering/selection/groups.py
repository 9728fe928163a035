"""Which features the study steers with: groups of one SAE's features, selected in several ways."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.features.scores.table import FeatureTable
from workbench.steering.sweep.options import SteerOptions
from workbench.steering.sweep.prompts import NEUTRAL_PROMPTS
from workbench.steering.sweep.steer import check_prompts, frequencies, random_features

UNFILTERED, SECOND, FILTERED = "unfiltered", "unfiltered, another draw", "output score above the threshold"
MATCHED = "random, as frequent as those above the threshold"
BEST = {"best output scores": "output_score", "best input scores": "input_score",
        "largest change of confidence": "confidence_delta"}  # fmt: skip
GROUPS = (UNFILTERED, SECOND, FILTERED, MATCHED, *BEST)


@checked
@dataclass(frozen=True, kw_only=True)
class StudyOptions(OneLine):
    """Sizes and cuts of the study.

    Attributes:
        n_features: features per group and depth.
        strengths: factors on a_max; the best of each feature is chosen on half of the prompts.
        threshold: output score from which a feature counts as an output feature.
        high: from which input and output scores count as high.
        prompts: neutral texts.
        steering: details of steering.
        seed: of the draws of features.
    """

    n_features: int = 10
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    threshold: float = 0.01
    high: float = 0.1
    prompts: tuple[str, ...] = NEUTRAL_PROMPTS[:12]
    steering: SteerOptions = field(default_factory=lambda: SteerOptions(plain_texts=()))
    seed: int = 0

    def __post_init__(self) -> None:
        check_prompts(self.prompts, self.strengths, "StudyOptions")
        if self.n_features < 2 or not 0 < self.threshold < 1 or not 0 < self.high < 1:
            raise InvalidInputError(
                f"StudyOptions(n_features={self.n_features}, threshold={self.threshold}, high={self.high}): take two "
                "features or more, and cuts between 0 and 1."
            )


@checked
@dataclass(frozen=True, eq=False)
class Depth(OneLine):
    """An SAE at one depth and the scores of its features."""

    sae: AnySAE
    table: FeatureTable


def groups_of(depth: Depth, options: StudyOptions) -> dict[str, list[int]]:
    """The features of each group, fewer where there are not enough; groups without any are left out.

    Raises:
        DegenerateInputError: if fewer than two alive features have an output score.
    """
    table = depth.table
    alive = table.alive().dropna(subset=["output_score"])
    if len(alive) < 2:
        raise DegenerateInputError(
            f"selection_study: {len(alive)} alive features with an output score at {table.meta.get('site')}. Score all."
        )
    random, n = np.random.default_rng(options.seed), options.n_features
    order = random.permutation(alive["feature"].tolist()).tolist()
    good = alive[alive["output_score"] >= options.threshold]["feature"]
    filtered = [int(f) for f in random.permutation(good.tolist())[:n]]
    frequency = frequencies(table, len(as_basis(depth.sae).writing()))
    groups = {
        UNFILTERED: order[:n],
        SECOND: order[n : 2 * n],
        FILTERED: filtered,
        MATCHED: list(random_features(depth.sae, filtered, (), frequency, options.seed)),
    }
    for name, column in BEST.items():
        known = alive.dropna(subset=[column])
        size = known[column].abs().sort_values(ascending=False, kind="stable").index[:n]
        groups[name] = [int(f) for f in known.loc[size, "feature"]]
    return {name: group for name, group in groups.items() if group}
