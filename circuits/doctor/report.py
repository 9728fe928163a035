"""What the doctor found, and how it is attached to an attribution."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.numbers import counted, number, setting
from workbench.core.stats import Estimate
from workbench.report.base import Headline, Metric, Report, Says, Section, Table, beside
from workbench.report.headline import verdict

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal["pass", "fail", "not applicable", "reported"]
E = TypeVar("E", bound="Examinable")
Better = Literal["at least", "at most", "above"]
NOT_CHECKED = "not checked"
"""What is said of an attribution without a report."""
NAMES = {
    1: "completeness", 2: "axioms", 3: "direct effects", 4: "rankings without gradient", 5: "randomisation",
    6: "settings", 7: "ROAR", 8: "DiffROAR", 9: "planted truth", 10: "deletion and insertion", 11: "gauge",
}  # fmt: skip
"""The eleven checks by their numbers."""
_SAYS = Says(
    "No check of the attribution failed.", "No check could be run.", "The attribution fails a check.",
    "No check could be run.",
)  # fmt: skip


@checked
@dataclass(frozen=True, kw_only=True)
class Check(OneLine):
    """One measurement of a check, beside its limit.

    Attributes:
        number: of the check, 1 to 11.
        part: what was measured.
        value: with its interval over inputs; a number where there is one value; None if it was not measured.
        limit: what it is held to; None where there is no limit.
        better: whether the value has to lie at least, at most, or above the limit.
        outcome: "reported" has no limit.
        why: what a failure means, or why it could not be run.
        spread: least value, quartiles and largest value over inputs, where the distribution matters.
    """

    number: int
    part: str
    value: Estimate | float | None = None
    limit: float | None = None
    better: Better = "at least"
    outcome: Outcome = "reported"
    why: str = ""
    spread: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Of the check."""
        return NAMES[self.number]

    @property
    def threshold(self) -> str:
        """The limit in words; "" where there is none."""
        return "" if self.limit is None else f"{self.better} {setting(self.limit)}"

    @property
    def shown(self) -> str:
        """The value as text."""
        if isinstance(self.value, Estimate):
            return " ".join(self.value.shown())
        return "" if self.value is None else number(self.value)


def judged(
    number: int, part: str, value: Estimate | float, limit: float, better: Better = "at least", why: str = "",
    spread: tuple[float, ...] = (),
) -> Check:  # fmt: skip
    """A measurement held to its limit with its whole interval, by the rule of all reports.

    >>> judged(3, "sign agreement", Estimate(0.9, 0.85, 0.95, 30, "t"), 0.8).outcome
    'pass'
    >>> judged(4, "against random", Estimate(0.2, -0.1, 0.5, 30, "t"), 0.0, "above").outcome
    'fail'
    """
    low = value.low if isinstance(value, Estimate) else value
    passed = low > limit if better == "above" else verdict(value, limit, better=better) == "works"
    return Check(
        number=number, part=part, value=value, limit=limit, better=better, outcome="pass" if passed else "fail",
        why="" if passed else why, spread=spread,
    )  # fmt: skip


def inapplicable(number: int, why: str, part: str = "") -> Check:
    """A check that could not be run."""
    return Check(number=number, part=part, outcome="not applicable", why=why)


@checked
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DoctorReport(Report):
    """What the attribution doctor found.

    Attributes:
        what: which attribution was examined, and on what.
        checks: every measurement, by the number of its check.
        notes: what the attribution can't answer, and what to do instead, in words.
    """

    how_to_make: ClassVar[str] = "circuits.attribution_doctor(...) gives a report."
    what: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Check, ...]:
        """The measurements that do not meet their limits."""
        return tuple(check for check in self.checks if check.outcome == "fail")

    @property
    def numbers(self) -> tuple[int, ...]:
        """The checks that fail, by number."""
        return tuple(dict.fromkeys(check.number for check in self.failed))

    @property
    def ran(self) -> tuple[int, ...]:
        """The checks of which a measurement was held to a limit."""
        return tuple(dict.fromkeys(c.number for c in self.checks if c.outcome in ("pass", "fail")))

    @property
    def verdict(self) -> str:
        """In one line, for wherever the attribution is shown."""
        if self.failed:
            names = ", ".join(NAMES[number] for number in self.numbers)
            return f"failed {len(self.numbers)} of {counted(len(self.ran), 'checks')}: {names}"
        return f"passed {counted(len(self.ran), 'checks')}" if self.ran else NOT_CHECKED

    def frame(self) -> pd.DataFrame:
        """One row per measurement: check, name, part, value, low, high, n, threshold, outcome, why."""
        import pandas as pd

        rows = []
        for c in self.checks:
            known = c.value if isinstance(c.value, Estimate) else None
            plain = float("nan") if c.value is None else float(known.value if known else c.value)  # type: ignore[arg-type]
            ends = (float("nan"), float("nan"), 1) if known is None else (known.low, known.high, known.n)
            rows.append((c.number, c.name, c.part, plain, *ends, c.threshold, c.outcome, c.why))
        columns = ["check", "name", "part", "value", "low", "high", "n", "threshold", "outcome", "why"]
        return pd.DataFrame(rows, columns=columns)

    def headline(self) -> Headline:
        """How many checks fail, beside none."""
        return Headline.of(_SAYS, self._count(), "at most")

    def _count(self) -> Table:
        failed = len(self.numbers) if self.ran else None
        return beside("checks that fail", ("this attribution", failed), ("limit", 0))

    def findings(self) -> tuple[str, ...]:
        """The verdict, each failure with its number, and the notes."""
        said = [f"{self.what}: {self.verdict}."]
        for c in self.failed:
            said.append(f"{c.name}, {c.part}: {c.shown}, must be {c.threshold}. {c.why}".strip())
        return (*said, *self.notes)

    def section(self) -> Section:
        """A table of all measurements."""
        rows = tuple(
            (str(c.number), c.name, c.part, c.value, c.threshold, c.outcome, _why(c)) for c in self.checks
        )  # fmt: skip
        table = Table(("check", "name", "measured", "value", "threshold", "outcome", "why"), rows, "The checks")
        metrics: dict[str, Metric] = {"checks_failed": len(self.numbers), "checks_run": len(self.ran)}
        metrics |= {f"{c.number}.{c.part}": c.value for c in self.checks if c.value is not None}
        return Section("Attribution doctor", (table, self._count()), self.findings(), metrics, self.headline())

    def _shown_line(self) -> str:
        return self.verdict


def _why(check: Check) -> str:
    if not check.spread:
        return check.why
    spread = f"over inputs from {' / '.join(map(number, check.spread))} (least, quartiles, largest)"
    return f"{check.why}; {spread}" if check.why else spread


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Examinable:
    """Base of what carries the doctor's verdict.

    Attributes:
        doctor: what the doctor found; None if it was not asked.
    """

    doctor: DoctorReport | None = None

    @property
    def verdict(self) -> str:
        """What the doctor found, in one line."""
        return verdict_of(self.doctor)

    @checked
    def stamped(self: E, report: DoctorReport | None) -> E:
        """The same with what the doctor found; everything made of it carries the verdict too."""
        return dataclasses.replace(self, doctor=report)


def verdict_of(report: DoctorReport | None) -> str:
    """The verdict in one line; without a report, that there is none."""
    return NOT_CHECKED if report is None else report.verdict


def worse(a: DoctorReport | None, b: DoctorReport | None) -> DoctorReport | None:
    """Of two reports the one that is to be shown where both hold: one that fails, else none, else the first."""
    failing = [report for report in (a, b) if report is not None and report.failed]
    return failing[0] if failing else None if a is None or b is None else a


def attrs_of(report: DoctorReport | None) -> dict[str, object]:
    """What a table of pandas says in its `attrs`."""
    return {"doctor": verdict_of(report), "doctor_failed": [] if report is None else list(report.numbers)}


def marked(title: str, report: DoctorReport | None) -> str:
    """A title with what failed behind it; as it is where nothing failed.

    >>> marked("Nodes", None)
    'Nodes'
    """
    return title if (mark := watermark(report)) == "" else f"{title} ({mark})"


def watermark(report: DoctorReport | None) -> str:
    """What is written over a picture; "" where no check failed."""
    return "" if report is None or not report.failed else f"FAILED: {', '.join(NAMES[k] for k in report.numbers)}"
