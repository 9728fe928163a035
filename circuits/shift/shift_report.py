"""What a SHIFT study found: rows of methods, verdicts, comparisons, and the sentences that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.shift.deciders import Decision
from workbench.controls.methods import Role
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.numbers import counted, number, rounding_error
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, Text

SUBJECT, RANDOM = "SHIFT + retrain", "random features + retrain"
"""The methods of the headline."""


@dataclass(frozen=True, kw_only=True)
class OverDraws:
    """A method of several random draws, with intervals over the draws: how much depends on which set was drawn.

    Attributes:
        label: label accuracy over all test rows.
        spurious: agreement with the spurious attribute.
        worst: label accuracy in the worst group.
    """

    label: Estimate
    spurious: Estimate
    worst: Estimate


@dataclass(frozen=True, kw_only=True)
class MethodRow(OneLine):
    """One method on the balanced test set.

    Attributes:
        name: the method.
        information: what it was allowed to use, beyond the ambiguous training rows.
        role: what it is in the study.
        n_features: how many features were ablated.
        label: share of test rows whose label is predicted; higher is better.
        spurious: share of test rows where the prediction equals the spurious attribute; 0.5 is best.
        worst: label accuracy in the worst of the four groups, over its own rows.
        worst_group: which one that is.
        over_draws: the same three with intervals over random draws, where the method is an average of them.
    """

    name: str
    information: str
    role: Role
    n_features: int
    label: Estimate
    spurious: Estimate
    worst: Estimate
    worst_group: str
    over_draws: OverDraws | None = None


@dataclass(frozen=True)
class Comparison:
    """Paired difference between two methods over the same test rows.

    Attributes:
        better: the method in front.
        other: the method that is subtracted.
        label: difference in label accuracy; positive means that `better` is better.
        conflict: the same over the rows in which label and attribute disagree with training.
        over_draws: `label` with an interval over the random draws of `other`, where it is an average of them.
    """

    better: str
    other: str
    label: Estimate
    conflict: Estimate
    over_draws: Estimate | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether neither other test rows nor other draws of the control are likely to turn the difference round."""
        return self.label.excludes(0.0) and (self.over_draws is None or self.over_draws.excludes(0.0))


@dataclass(frozen=True, kw_only=True)
class JudgedFeature:
    """A candidate feature with its verdict and the evidence behind it."""

    feature: str
    effect: float
    decision: Decision
    oracle_decision: Decision
    why: str
    top_tokens: tuple[tuple[str, float], ...]
    spurious_share: float
    target_share: float


@dataclass(frozen=True)
class AttributionRow:
    """How the effects at one site were made.

    Attributes:
        site: the site.
        method: the estimator and its baseline.
        total: measured change of the metric when all features are patched, in logits.
        gap: `|sum - total| / |total|`.
        n_rows: rows that were averaged.
        n_positive: features that support the label.
    """

    site: str
    method: str
    total: float
    gap: float
    n_rows: int
    n_positive: int


@dataclass(frozen=True)
class Collateral:
    """Change of next-token loss on plain text under ablation, in nats per token.

    Attributes:
        shift: of the features that were judged spurious, over rows of text.
        random: of as many random features, mean over all draws, over rows of text.
        random_over_draws: the same mean with its interval over draws.
    """

    shift: Estimate
    random: Estimate
    random_over_draws: Estimate


@dataclass(frozen=True)
class EditCheck:
    """The ablation against one made by plain hooks with the SAE's own encode and decode.

    Attributes:
        difference: between the two, relative to the size of the edit.
        allowed: difference that rounding explains, relative to the size of the edit; a study beyond it raises.
        n_rows: texts on which both were made.
    """

    difference: float
    allowed: float
    n_rows: int


@dataclass(frozen=True, kw_only=True)
class ShiftReport(Report):
    """Result of `circuits.shift`.

    Attributes:
        task: name of the task.
        label_name: what the label is, such as "professor or nurse".
        spurious_name: what the attribute is.
        probe_site: where the probe reads.
        probe: cross-validated accuracy of the probe on the ambiguous set, and of one with shuffled labels.
        shuffled: the latter.
        tokens: what is pooled, in words.
        judge: who judged.
        judge_information: from what.
        attribution: one row per site.
        verdicts: one per candidate, strongest effect first.
        methods: one row per method; controls included.
        comparisons: paired differences.
        random_draws: how many sets of random features were averaged.
        edit_check: the ablation against one by another path.
        collateral: loss on plain text, or None if no text was given.
    """

    task: str
    label_name: str
    spurious_name: str
    probe_site: str
    probe: Estimate
    shuffled: Estimate
    tokens: str
    judge: str
    judge_information: str
    attribution: tuple[AttributionRow, ...]
    verdicts: tuple[JudgedFeature, ...]
    methods: tuple[MethodRow, ...]
    comparisons: tuple[Comparison, ...]
    random_draws: int
    edit_check: EditCheck
    collateral: Collateral | None

    @checked
    def method(self, name: str) -> MethodRow:
        """The row of this method."""
        return next(row for row in self.methods if row.name == name)

    @property
    def n_spurious(self) -> int:
        """How many features were judged spurious and ablated."""
        return sum(row.decision == "spurious" for row in self.verdicts)

    def findings(self) -> tuple[str, ...]:
        """Plain sentences: the problem, what SHIFT did to it, what the controls did."""
        return (*self._problem(), *self._outcome(), *self._controls(), *self._cost())

    def _problem(self) -> tuple[str, ...]:
        plain = self.method("original")
        is_fooled = plain.spurious.value > plain.label.value
        verdict = "it follows the shortcut" if is_fooled else "it mostly reads the label, so there is little to remove"
        return (
            f"A probe trained where {self.label_name} and {self.spurious_name} go together predicts on balanced "
            f"test texts the label with accuracy {plain.label} and the attribute with {plain.spurious}: {verdict}. "
            f"Worst group {plain.worst_group}: {plain.worst}.",
        )

    def _outcome(self) -> tuple[str, ...]:
        if self.n_spurious == 0:
            return (
                f"The {self.judge} judge called none of {len(self.verdicts)} candidates spurious; nothing was ablated.",
            )
        lines = []
        for comparison in self.comparisons:
            difference = comparison.label
            if comparison.excludes_zero:
                verb = "beats" if difference.value > 0 else "is worse than"
            else:
                verb = "can't be told from"
            draws = comparison.over_draws
            lines.append(
                f"{comparison.better} {verb} {comparison.other}: label accuracy {difference.change()}, "
                f"on the rows that break the correlation {comparison.conflict.change()}"
                + ("." if draws is None else f"; over random sets {draws.change()}.")
            )
        row, again = self.method("SHIFT"), self.method(SUBJECT)
        lines.append(
            f"SHIFT ablated {self.n_spurious} of {len(self.verdicts)} candidates: label {row.label}, attribute "
            f"{row.spurious}, worst group {row.worst_group} {row.worst}; with the probe "
            "retrained label "
            f"{again.label}, attribute {again.spurious}, worst group {again.worst_group} "
            f"{again.worst}."
        )
        return tuple(lines)

    def _controls(self) -> tuple[str, ...]:
        rows = [row for row in self.methods if row.role in ("rival", "bound")]
        parts = "; ".join(f"{row.name} {row.label}" for row in rows)
        ahead = self._ahead()
        note = f" Simpler or better-informed methods ahead of SHIFT + retrain: {', '.join(ahead)}." if ahead else ""
        agree = sum(row.decision == row.oracle_decision for row in self.verdicts)
        return (
            f"Controls, label accuracy: {parts}.{note}",
            f"The {self.judge} judge and the oracle judge agree on {agree} of {len(self.verdicts)} candidates.",
        )

    def _cost(self) -> tuple[str, ...]:
        lines = [
            f"The effects at {row.site} miss a share of {number(row.gap)} of the measured total: a rough ranking."
            for row in self.attribution if row.gap > 0.1
        ]  # fmt: skip
        if self.collateral is not None:
            lines.append(
                f"Ablating these features changes the loss on plain text by {self.collateral.shift} nats per token, "
                f"as many random features by {self.collateral.random}, over their draws "
                f"{self.collateral.random_over_draws}."
            )
        return tuple(lines)

    def section(self) -> Section:
        """The report as a section: bars, the table of methods, comparisons, verdicts."""
        title = "SHIFT: removing a spurious attribute"
        return Section(title, self._blocks(), self.findings(), self._metrics(), self.headline())

    def headline(self) -> Headline:
        """Label accuracy beside that of as many random features, by the less certain of two paired differences."""
        value, control, table = self.method(SUBJECT), self.method(RANDOM), self._method_table()
        (compared,) = (c for c in self.comparisons if (c.better, c.other) == (SUBJECT, RANDOM))
        over = {"label accuracy": compared.label, "label accuracy over draws": compared.over_draws}
        measured = {column: e for column, e in over.items() if e is not None}
        column = min(measured, key=lambda column: max(measured[column].low, -measured[column].high))
        ahead = self._ahead()
        named = " and ".join(filter(None, (", ".join(ahead[:-1]), *ahead[-1:])))
        simpler = f"; {named} had a higher accuracy" if ahead else ""
        idle = "" if self.n_spurious else ": the judge called none of the candidates spurious"
        return Headline.read(
            Says(
                f"Ablating the features judged spurious helps the probe more than ablating random ones{simpler}.",
                f"Ablating the features judged spurious helps the probe no more than ablating random ones{idle}.",
                "Ablating the features judged spurious helps the probe less than ablating random ones.",
            ),
            value=(table, value.name, self._label), control=(table, control.name, self._label),
            difference=(self._comparison_table(), _against(compared), column),
            measure="label accuracy",
        )  # fmt: skip

    @property
    def _label(self) -> str:
        return f"accuracy: {self.label_name}"

    def _ahead(self) -> list[str]:
        """Simpler or better-informed methods that do better, by the interval of the paired difference."""
        rivals = {row.name for row in self.methods if row.role == "rival"}
        compared = [c for c in self.comparisons if c.better == SUBJECT and c.other in rivals]
        return [c.other for c in compared if c.excludes_zero and c.label.value < 0]

    def _method_table(self) -> Table:
        attribute = f"agreement with {self.spurious_name}"
        rows = tuple(
            (m.name, m.n_features, m.label, m.spurious, m.worst, m.worst_group, m.information) for m in self.methods
        )
        return Table(_METHODS_HEADER[:2] + (self._label, attribute) + _METHODS_HEADER[2:], rows, _METHODS_CAPTION)

    def _comparison_table(self) -> Table:
        return Table(
            ("difference", "label accuracy", "rows that break the correlation", "label accuracy over draws"),
            tuple((_against(c), c.label, c.conflict, c.over_draws) for c in self.comparisons),
            "Differences over the same test texts, and over the draws of a random control. Only the templates and "
            "words used here are covered.",
        )

    def _blocks(self) -> tuple[Text | Table | Bars, ...]:
        names = tuple(m.name for m in self.methods)
        label, attribute = self._label, f"agreement with {self.spurious_name}"
        verdicts = tuple(
            (v.feature, v.effect, v.decision, v.oracle_decision, v.spurious_share, v.target_share,
             " ".join(repr(token.strip()) for token, _ in v.top_tokens), v.why) for v in self.verdicts
        )  # fmt: skip
        return (
            Text(self._method_text()),
            Bars(label, names, tuple(m.label for m in self.methods), "label accuracy", 0.5),
            Bars("worst group", names, tuple(m.worst for m in self.methods), "label accuracy", 0.5),
            self._method_table(),
            Table(
                ("control", label, attribute, "worst group"),
                tuple((m.name, d.label, d.spurious, d.worst) for m in self.methods if (d := m.over_draws)),
                "Random controls, with intervals over their draws instead of over texts.",
            ),
            self._comparison_table(),
            Table(
                ("site", "method", "total", "gap", "rows", "positive"),
                tuple((a.site, a.method, a.total, a.gap, a.n_rows, a.n_positive) for a in self.attribution),
                "Effects on the probe's margin; positive supports the label that the row has. Only positive "
                "ones are candidates.",
            ),
            Table(
                ("feature", "effect", "verdict", "oracle", "on spurious words", "on label words", "top tokens", "why"),
                verdicts, f"Candidates, judged by the {self.judge} judge.",
            ),
        )  # fmt: skip

    def _method_text(self) -> str:
        check = self.edit_check
        checked = (
            f"texts by {rounding_error(check.difference)} of its size; rounding explains up to "
            f"{rounding_error(check.allowed)}"
            + (
                ", so this edit is too small for the dtype of the model and the SAE to be checked."
                if check.allowed >= 1
                else "."
            )
        )
        return (
            f"{self.task}. Probe: L2 logistic regression on the mean of {self.probe_site} over {self.tokens}; "
            "cross-validated "
            f"on the ambiguous set {self.probe}, with shuffled labels {self.shuffled}.\n\n"
            f"Judge: {self.judge}. It uses: {self.judge_information}. Features judged spurious are set to zero "
            "at every pooled "
            f"token, the SAE's error is kept. Random features: {counted(self.random_draws, 'draws')}, matched on "
            "activation frequency and norm. "
            f"Made by plain hooks with the SAE's own encode and decode, the edit differs on {check.n_rows} {checked}"
        )

    def _metrics(self) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {"n_candidates": len(self.verdicts), "n_spurious": self.n_spurious}
        for row in self.methods:
            key = row.name.replace(" + ", "_").replace(" ", "_").lower()
            metrics |= {f"{key}.label": row.label, f"{key}.spurious": row.spurious, f"{key}.worst": row.worst}
            if row.over_draws is not None:
                metrics[f"{key}.label.over_draws"] = row.over_draws.label
        for c in self.comparisons:
            metrics[f"{c.better} minus {c.other}".replace(" + ", "_").replace(" ", "_").lower()] = c.label
        if self.collateral is not None:
            metrics |= {
                "loss_change.shift": self.collateral.shift, "loss_change.random": self.collateral.random,
                "loss_change.random.over_draws": self.collateral.random_over_draws,
            }  # fmt: skip
        return metrics


_METHODS_HEADER = ("method", "features", "worst group", "which", "what it uses")
_METHODS_CAPTION = (
    "Balanced test texts of wording and names that training never saw. Attribute agreement of 0.5 means that "
    "the attribute does not matter. The interval of the worst group is over its own texts and not corrected for "
    "picking the worst of four."
)


def _against(comparison: Comparison) -> str:
    return f"{comparison.better} minus {comparison.other}"
