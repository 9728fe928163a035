"""Instability across environments that are found, not labelled: after "Discover and Cure"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.shift.automatic.heldout import held_out_logits
from circuits.shift.automatic.support import support
from circuits.shift.deciders import DECIDERS, Decision, FeatureDossier, Verdict
from circuits.shift.judging.prepare import Candidate, of_two_labels
from circuits.shift.task import ShiftStudy
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.numbers import number

COMPONENTS = 16
"""Principal components of the pooled activations in which environments are looked for."""
MIN_ROWS = 3
"""Texts of an environment below which it tells nothing."""


@DECIDERS.register("instability")
@checked
@dataclass(frozen=True)
class InstabilityDecider(OneLine):
    """Spurious if a step of the probe on one environment would weaken the feature, and on another strengthen it.

    Environments are two clusters of the texts of each label, by k-means on pooled activations and on whether a
    cross-validated probe is right. For environment e the mean of `(1 - p) s` over its texts is the direction of a
    gradient step, with p the cross-validated probability of the label and s the support that the feature gives it: what
    supports the label in every environment belongs to it. The score is the standard deviation of these means over
    environments.

    It names what differs, and is not calibrated: with errors at random some features differ by chance.
    `automatic_shift` tests on other texts before it ablates anything.

    Attributes:
        z: by how many standard errors the mean must be below 0 in some environment and above 0 in another.
        seed: of k-means and cross-validation.

    Source: Wu et al. 2023 (arXiv 2305.00650). Departures: concepts are SAE features; the sign of the step decides,
    since the label's own features differ in size between environments too.
    """

    z: float = 3.0
    seed: int = 0

    name = "instability"
    regime = "R3"
    information = (
        "ambiguous training texts with their labels, and environments that are found among them; it needs texts that "
        "break the correlation, but not which"
    )
    is_oracle = False

    def __post_init__(self) -> None:
        if not self.z >= 0:
            raise InvalidInputError(f"InstabilityDecider(z={self.z}): give 0 or more.")

    def of_study(self, study: ShiftStudy, candidates: Sequence[Candidate]) -> Instability:
        """The judge of these features, with environments found among the training texts."""
        of_two_labels(study, "the instability judge")
        y = np.array(study.task.train.label)
        logits = held_out_logits(study.train.x, y, study.options.probe)
        sign = 2 * y - 1
        environment = environments(study.train.x.double().cpu().numpy(), y, sign * logits > 0, self.seed)
        steps = support(study, candidates) / (1 + np.exp(np.clip(sign * logits, -500, 500)))[:, None]
        parts = [steps[environment == e] for e in np.unique(environment)]
        parts = [part for part in parts if len(part) >= MIN_ROWS]
        means = np.stack([part.mean(0) for part in parts])
        spread = np.stack([part.std(0, ddof=1) / math.sqrt(len(part)) for part in parts])
        z = np.divide(means, spread, out=np.zeros_like(means), where=spread > 0)
        names = [str(node) for node, _ in candidates]
        return Instability(self, {name: (means[:, i], z[:, i]) for i, name in enumerate(names)})

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """Refused: it needs the environments that `of_study` finds."""
        raise MismatchError(
            f"InstabilityDecider: {dossier.node} has no environments. Pass the judge to circuits.shift."
        )


@dataclass(frozen=True, eq=False)
class Instability(OneLine):
    """`InstabilityDecider` of one study.

    Attributes:
        decider: its options.
        steps: for each feature the mean step in each environment, and the same in standard errors.
    """

    decider: InstabilityDecider
    steps: Mapping[str, tuple[np.ndarray, np.ndarray]]

    name = InstabilityDecider.name
    regime = InstabilityDecider.regime
    information = InstabilityDecider.information
    is_oracle = False

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        means, z = self.steps[str(dossier.node)]
        limit = self.decider.z
        weakened, strengthened = bool((z < -limit).any()), bool((z > limit).any())
        decision: Decision = "unsure"
        if strengthened or weakened:
            decision = "spurious" if weakened and strengthened else "intended" if strengthened else "unsure"
        why = (
            f"a step on one of {len(means)} environments weakens it by {number(float(means.min()))} (z = "
            f"{number(float(z.min()))}), on another strengthens it by {number(float(means.max()))} "
            f"(z = {number(float(z.max()))})"
        )
        return Verdict(dossier.node, decision, float(means.std()), why)


def environments(x: np.ndarray, y: np.ndarray, right: np.ndarray, seed: int) -> np.ndarray:
    """For each row one of four environments: two clusters of each label, on activations and on whether it is right.

    Raises:
        DegenerateInputError: if the rows are all alike.
    """
    from sklearn.cluster import KMeans

    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1.0)
    u, s, _ = np.linalg.svd(z, full_matrices=False)
    if not s[0] > 0:
        raise DegenerateInputError("instability: all training texts have the same activations. Check the site.")
    # the largest component has a standard deviation of 1, whether the row is right at most one of 1
    embedding = np.concatenate(
        [u[:, :COMPONENTS] * s[:COMPONENTS] / (s[0] / math.sqrt(len(x))), 2.0 * right[:, None]], 1
    )
    found = np.zeros(len(y), dtype=int)
    for label in (0, 1):
        rows = np.flatnonzero(y == label)
        # sklearn annotates the number of starts as text
        clusters = KMeans(2, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
        found[rows] = 2 * label + clusters.fit_predict(embedding[rows])
    return found
