"""How well a judge and the steered texts that it rated do: values, table, sentences."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.numbers import counted, setting
from workbench.core.stats import Estimate
from workbench.judges.gate import JudgeGate
from workbench.judges.protocol import MAX_FAILED_SHARE, Cost
from workbench.report.base import Headline, Metric, Report, Says, Section, Table, Text, beside
from workbench.steering.rating.questions import KINDS


@dataclass(frozen=True)
class RatedArm:
    """Ratings of one arm's texts, at the strength chosen on half of the prompts, measured on the other half.

    Intervals are over prompts, for these very features.

    Attributes:
        name: of the arm.
        ratings: mean rating by kind, 0 to 2.
        mean_of_harmonics: AxBench's aggregate.
        above_unsteered: that aggregate less the one of unsteered texts for the same concepts; None for themselves.
        harmonic_of_means: the aggregate of Arad, Mueller and Belinkov 2025, mean over features; no interval.
        strengths: chosen for each feature.
    """

    name: str
    ratings: dict[str, Estimate]
    mean_of_harmonics: Estimate
    above_unsteered: Estimate | None
    harmonic_of_means: float
    strengths: dict[str, float]


@dataclass(frozen=True, repr=False, kw_only=True)
class RatingReport(Report):
    """Ratings of steered texts beside those of their controls.

    Attributes:
        judge: who rated.
        gate: what it can do.
        arms: by arm; empty if the judge is refused or too many replies are missing.
        failed: share of ratings that could not be read; they count as 0, as in AxBench.
        prompts: evaluation prompts.
        left_out: arms of other features, for which no concept was given.
        waiting: questions in files that have no reply yet.
        cost: of the ratings; that of the gate is its own.
    """

    judge: str
    gate: JudgeGate
    arms: tuple[RatedArm, ...]
    failed: Estimate
    prompts: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    waiting: int = 0
    cost: Cost = Cost()

    def findings(self) -> tuple[str, ...]:
        """Whether the judge is believed, and how the arms compare with unsteered texts."""
        if self.waiting:
            return (f"NO SCORES YET. {self.waiting} questions have no reply; call this again when they have.",)
        if refusal := self.gate.refusal():
            return (f"NO SCORES. {self.judge}: {refusal}.",)
        if not self.arms:
            return (
                f"NO SCORES. Ratings that could not be read: {self.failed}; at most a share of "
                f"{setting(MAX_FAILED_SHARE)} may be.",
            )
        said = [
            f"{self.judge} rates, with {self.failed} of its replies unreadable (counted as 0).",
            f"Cost: {self.gate.cost + self.cost}.",
        ]
        for arm in self.arms:
            if arm.above_unsteered is not None:
                d = arm.above_unsteered
                word = "higher than" if d.low > 0 else "lower than" if d.high < 0 else "not clearly different from"
                said.append(f"{arm.name}: mean of harmonics {arm.mean_of_harmonics}, {word} unsteered ({d}).")
        if self.left_out:
            said.append(f"Not rated, since their features have no concept: {', '.join(self.left_out)}.")
        return tuple(said)

    def headline(self) -> Headline:
        """Mean of harmonics of the first steered arm beside unsteered texts."""
        if not self._beside():
            return Headline(sentence=self.findings()[0])
        name = str(self._beside()[0].rows[0][0])
        return Headline.of(
            Says(*(
                f"The judge rates texts of {name} {how} unsteered texts."
                for how in ("higher than", "no higher than", "lower than")
            )),
            self._beside()[0],
        )  # fmt: skip

    def _beside(self) -> tuple[Table, ...]:
        steered = next((arm for arm in self.arms if arm.above_unsteered is not None), None)
        unsteered = next((arm for arm in self.arms if arm.above_unsteered is None), None)
        if steered is None:
            return ()
        control = None if unsteered is None else (unsteered.name, unsteered.mean_of_harmonics)
        value = (steered.name, steered.mean_of_harmonics)
        return (beside("mean of harmonics", value, control, steered.above_unsteered),)

    def section(self) -> Section:
        """One row per arm, and what the judge can do."""
        rows = tuple(
            (arm.name, *(arm.ratings[kind] for kind in KINDS), arm.mean_of_harmonics, arm.harmonic_of_means,
             arm.above_unsteered)
            for arm in self.arms
        )  # fmt: skip
        columns = ("arm", *KINDS, "mean of harmonics (AxBench)", "harmonic of means", "less unsteered")
        caption = f"Ratings from 0 to 2 on {counted(len(self.prompts), 'prompts')} that chose no strength"
        gate = Table(
            ("kind", "right less wrong"), tuple(self.gate.margins.items()), f"What {self.judge} can tell, of 2 points"
        )
        how = Text(
            "Mean of harmonics: of each text's three ratings, 0 if one is 0, then the mean over texts. Harmonic of "
            "means: of the three mean ratings of a feature. They don't compare with each other."
        )
        blocks = (Table(columns, rows, caption), how, gate) if rows else (gate,)
        title, told = f"Ratings by {self.judge}", self._beside()
        return Section(title, (*blocks, *told), self.findings(), self.metrics(), self.headline())

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers."""
        metrics: dict[str, Metric] = {"failed": self.failed}
        for arm in self.arms:
            metrics[f"{arm.name}.harmonic_of_means"] = arm.harmonic_of_means
            metrics[f"{arm.name}.mean_of_harmonics"] = arm.mean_of_harmonics
        return metrics
