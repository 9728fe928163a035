"""What a SHIFT study found: its tables, and the sentences that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.doctor.report import Examinable, marked
from circuits.shift.cue_panel import CuePanel
from circuits.shift.export.saving import save_classifier
from circuits.shift.heads.base import REGIMES
from circuits.shift.method_tables import against, methods_frame, said_by_comparisons, said_by_methods
from circuits.shift.rows import (
    AttributionRow,
    Collateral,
    Comparison,
    EditCheck,
    JudgedFeature,
    MethodRow,
    OverDraws,
)
from circuits.shift.task import ShiftStudy
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, require_known
from workbench.core.jsontext import Json
from workbench.core.numbers import counted, number, rounding_error
from workbench.core.records import to_jsonable
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, Text

if TYPE_CHECKING:
    import pandas as pd

SUBJECT, RANDOM = "SHIFT + retrain", "random features + retrain"
"""The methods of the headline."""


@dataclass(frozen=True, kw_only=True)
class ShiftReport(Examinable, Report):
    """Result of `circuits.shift`.

    Attributes:
        task: name of the task.
        label_name: what the label is, such as "professor or nurse".
        spurious_name: what the attribute is, None if it is not known.
        test_texts: what the test texts are, such as "balanced test texts".
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
        notes: how the task was made, in sentences.
        left_out: methods that need what the task does not have, or found nothing to compute, each in a sentence.
        cautions: what keeps the study from showing anything, such as a probe at chance, in sentences.
        cues: how far each method relies on each cue of the task; None if it has none.
        study: what was read and judged, for `save`; it is in no file and plays no part in equality.
        doctor: what the attribution doctor found of the effects that the candidates were ranked by.
    """

    task: str
    label_name: str
    spurious_name: str | None
    test_texts: str
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
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    cues: CuePanel | None = None
    study: ShiftStudy | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Json]:
        """The result in JSON types, without what was read."""
        return {name: value for name, value in to_jsonable(replace(self, study=None)).items() if name != "study"}

    @checked
    def save(self, folder: str | Path) -> Path:
        """Writes the repaired classifier (SHIFT + retrain), which then needs no SAE; see `circuits.load_classifier`.

        Raises:
            InvalidInputError: if the report was not made in this process.
            NotExactlyExportable: if the features of an SAE can't be written as neurons.
            EditError: if the saved classifier, loaded by its own loader, says anything else; nothing is written then.
        """
        if self.study is None:
            raise InvalidInputError(
                "ShiftReport.save: this report holds what was found and not what was read. Save the report that "
                "circuits.shift returns."
            )
        return save_classifier(self.study, folder)

    @checked
    def method(self, name: str) -> MethodRow:
        """The row of this method.

        Raises:
            UnknownNameError: if it is not in the table.
        """
        require_known("method in this study", name, [row.name for row in self.methods])
        return next(row for row in self.methods if row.name == name)

    def frame(self) -> pd.DataFrame:
        """One row per method: what it may see, its accuracies with their intervals, and how far it follows the cue."""
        return methods_frame(self.methods)

    @property
    def n_spurious(self) -> int:
        """How many features were judged spurious and ablated."""
        return sum(row.decision == "spurious" for row in self.verdicts)

    def findings(self) -> tuple[str, ...]:
        """Plain sentences: the problem, what SHIFT did to it, what the controls did."""
        said = (
            *self._problem(), *self.cautions, *self._outcome(), *self._controls(), *said_by_methods(self.methods),
            *(self.cues.findings() if self.cues else ()), *self.left_out, *self._cost(),
        )  # fmt: skip
        return (*said, f"Attribution doctor: {self.verdict}.")

    def _problem(self) -> tuple[str, ...]:
        plain = self.method("original")
        worst = f"Worst group {plain.worst_group}: {plain.worst}."
        if self.spurious_name is None or plain.spurious is None:
            return (
                f"A probe of {self.label_name} predicts on {self.test_texts} the label with accuracy {plain.label}; "
                f"the attribute of the texts is not known. {worst}",
            )
        is_fooled = plain.spurious.value > plain.label.value and (plain.cue_mcc is None or plain.cue_mcc.low > 0)
        verdict = "it follows the shortcut" if is_fooled else "it mostly reads the label, so there is little to remove"
        return (
            f"A probe trained where {self.label_name} and {self.spurious_name} go together predicts on "
            f"{self.test_texts} the label with accuracy {plain.label} and the attribute with {plain.spurious}: "
            f"{verdict}. {worst}",
        )

    def _outcome(self) -> tuple[str, ...]:
        if self.n_spurious == 0:
            return (
                f"The {self.judge} judge called none of {len(self.verdicts)} candidates spurious; nothing was ablated.",
            )
        lines = [*said_by_comparisons(self.comparisons)]
        row, again = self.method("SHIFT"), self.method(SUBJECT)
        lines.append(
            f"SHIFT ablated {self.n_spurious} of {len(self.verdicts)} candidates: {_accuracies(row)}; with the probe "
            f"retrained {_accuracies(again)}."
        )
        return tuple(lines)

    def _controls(self) -> tuple[str, ...]:
        rows = [row for row in self.methods if row.role in ("rival", "bound")]
        parts = "; ".join(f"{row.name} {row.label}" for row in rows)
        ahead = self._ahead()
        note = f" Simpler or better-informed methods ahead of SHIFT + retrain: {', '.join(ahead)}." if ahead else ""
        lines = [f"Controls, label accuracy: {parts}.{note}"] if rows else []
        if all(row.oracle_decision for row in self.verdicts):
            agree = sum(row.decision == row.oracle_decision for row in self.verdicts)
            lines.append(
                f"The {self.judge} judge and the oracle judge agree on {agree} of {len(self.verdicts)} candidates."
            )
        return tuple(lines)

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
            difference=(self._comparison_table(), against(compared), column),
            measure="label accuracy",
        )  # fmt: skip

    @property
    def _regression(self) -> str:
        return "logistic" if self.label_name.count(" or ") < 2 else "softmax"

    @property
    def _label(self) -> str:
        return f"accuracy: {self.label_name}"

    def _ahead(self) -> list[str]:
        """Simpler or better-informed methods that do better, by the interval of the paired difference."""
        rivals = {row.name for row in self.methods if row.role == "rival"}
        compared = [c for c in self.comparisons if c.better == SUBJECT and c.other in rivals]
        return [c.other for c in compared if c.excludes_zero and c.label.value < 0]

    def _method_table(self) -> Table:
        """By what a method may see, and in the order of the study within that."""
        header = ("method", "sees", "features", self._label, *self._attribute, "worst group", "which", "what it uses")
        rows = tuple(
            (m.name, m.regime, m.n_features, m.label, *self._attributes(m), m.worst, m.worst_group, m.information)
            for m in sorted(self.methods, key=lambda m: m.regime or "R9")
        )
        seen = "; ".join(
            f"{regime}: {what}" for regime, what in REGIMES.items() if regime in {m.regime for m in self.methods}
        )
        about = f"{self.test_texts.capitalize()}. "
        return Table(header, rows, f"{about}{_AGREEMENT_CAPTION if self._attribute else ''}{_METHODS_CAPTION} {seen}.")

    @property
    def _attribute(self) -> tuple[str, ...]:
        """The column of the attribute, if there is one."""
        return () if self.spurious_name is None else (f"agreement with {self.spurious_name}",)

    def _attributes(self, row: MethodRow | OverDraws) -> tuple[Estimate, ...]:
        return () if row.spurious is None else (row.spurious,)

    def _comparison_table(self) -> Table:
        return Table(
            ("difference", "label accuracy", "rows that break the correlation", "label accuracy over draws"),
            tuple((against(c), c.label, c.conflict, c.over_draws) for c in self.comparisons),
            "Differences over the same test texts, and over the draws of a random control. Only texts of this kind are "
            "covered.",
        )

    def _blocks(self) -> tuple[Text | Table | Bars, ...]:
        names, worst = tuple(m.name for m in self.methods), tuple(m.worst for m in self.methods)
        label = self._label
        verdicts = tuple(
            (v.feature, v.effect, v.decision, v.oracle_decision, v.spurious_share, v.target_share,
             " ".join(repr(token.strip()) for token, _ in v.top_tokens), v.why) for v in self.verdicts
        )  # fmt: skip
        return (
            Text(self._method_text()),
            Bars(marked(label, self.doctor), names, tuple(m.label for m in self.methods), "label accuracy", 0.5),
            Bars(marked("worst group", self.doctor), names, worst, "label accuracy", 0.5),
            self._method_table(),
            Table(
                ("control", label, *self._attribute, "worst group"),
                tuple((m.name, d.label, *self._attributes(d), d.worst) for m in self.methods if (d := m.over_draws)),
                "Random controls, with intervals over their draws instead of over texts.",
            ),
            self._comparison_table(),
            *(self.cues.tables() if self.cues else ()),
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
        made = "".join(f" {note}" for note in self.notes)
        return (
            f"{self.task}.{made} Probe: L2 {self._regression} regression on the mean of {self.probe_site} over "
            f"{self.tokens}; cross-validated on the ambiguous set {self.probe}, with shuffled labels "
            f"{self.shuffled}.\n\n"
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
            metrics |= {f"{key}.label": row.label, f"{key}.worst": row.worst}
            if row.spurious is not None:
                metrics[f"{key}.spurious"] = row.spurious
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


_AGREEMENT_CAPTION = "Attribute agreement of 0.5 means that the attribute does not matter. "
_METHODS_CAPTION = (
    "The interval of the worst group is over its own texts and not corrected for picking the worst of several."
)


def _accuracies(row: MethodRow) -> str:
    """The accuracies of a method in a sentence."""
    attribute = "" if row.spurious is None else f"attribute {row.spurious}, "
    return f"label {row.label}, {attribute}worst group {row.worst_group} {row.worst}"
