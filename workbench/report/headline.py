"""The result of a study in one sentence, with a verdict that is computed and numbers that stand in a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import NOT_AVAILABLE, Number, number
from workbench.core.stats import Estimate
from workbench.report.blocks import Cell, Table

Verdict = Literal["works", "no better than its control", "fails", "not measured"]
Better = Literal["higher", "lower", "at least", "at most"]
Measured = Estimate | Number | None

DIFFERENCE = "paired difference"
BESIDE = "The number beside its control"
"""Column and name of the table that `beside` makes."""

VERDICTS: tuple[Verdict, ...] = ("works", "no better than its control", "fails", "not measured")


def verdict(
    value: Measured, control: Measured, difference: Estimate | None = None, better: Better = "higher"
) -> Verdict:
    """What a number says beside its control. This is the only rule by which a report judges.

    1. Without the number or its control, nothing was measured: "not measured".
    2. `better` "at least" or "at most": the control is a limit. "works" if the number meets it with its whole interval,
       otherwise "fails".
    3. With the interval of a difference (number minus control), paired or over draws of the control: "works" if the
       interval lies on the better side of 0, "fails" if it lies on the worse side, "no better than its control" if it
       holds 0.
    4. Otherwise the two intervals are compared: "works" or "fails" if they don't overlap, "no better than its control"
       if they do. Beside an interval, a number counts as one of no width; two numbers without intervals are compared
       where both are counts, otherwise it is "not measured" how sure they are.

    >>> verdict(Estimate(0.9, 0.8, 1.0, 40, "t"), Estimate(0.5, 0.4, 0.6, 40, "t"))
    'works'
    >>> verdict(Estimate(0.9, 0.8, 1.0, 40, "t"), Estimate(0.5, 0.4, 0.6, 40, "t"), better="lower")
    'fails'
    >>> verdict(0.9, 0.5, Estimate(0.4, -0.1, 0.9, 4, "t")), verdict(23, 23, better="at least"), verdict(0.9, None)
    ('no better than its control', 'works', 'not measured')
    """
    ends, limits = _ends(value), _ends(control)
    if ends is None or limits is None or (difference is not None and _ends(difference) is None):
        return "not measured"
    if better in ("at least", "at most"):
        met = ends[0] >= limits[0] if better == "at least" else ends[1] <= limits[1]
        return "works" if met else "fails"
    if difference is None and not any(isinstance(shown, Estimate | Integral) for shown in (value, control)):
        return "not measured"
    if difference is not None:
        ends, limits = (difference.low, difference.high), (0.0, 0.0)
    above, below = ends[0] > limits[1], ends[1] < limits[0]
    if not above and not below:
        return "no better than its control"
    return "works" if above == (better == "higher") else "fails"


@dataclass(frozen=True)
class Place:
    """A cell of a table among the blocks of the section.

    Attributes:
        table: name of the table.
        row: text of the row's first cell.
        column: heading of the column.
    """

    table: str
    row: str
    column: str


@dataclass(frozen=True)
class Says:
    """One sentence for each outcome, without numbers; the outcome that was measured is said."""

    works: str
    no_better: str
    fails: str
    not_measured: str = "Nothing was measured that could be compared with a control."

    def of(self, outcome: Verdict) -> str:
        """The sentence for a verdict."""
        return dict(zip(VERDICTS, (self.works, self.no_better, self.fails, self.not_measured), strict=True))[outcome]


@dataclass(frozen=True, kw_only=True)
class Headline(OneLine):
    """The result of a section: one sentence, one number beside its control, and a verdict that follows from the two.

    Attributes:
        sentence: what was found, without numbers.
        measure: what the number is, such as "label accuracy".
        value: the number.
        control: the same number for the control, or the limit that it is held to.
        control_name: what the control is.
        difference: number minus control, where its interval was measured, paired or over draws of the control.
        difference_name: what was subtracted from what, if not the control from the number.
        better: which way is better, or what kind of limit the control is.
        place: the cell that the number was read from.
        control_place: the cell that the control was read from.
        difference_place: the cell that the difference was read from.
    """

    sentence: str
    measure: str = ""
    value: Measured = None
    control: Measured = None
    control_name: str = ""
    difference: Estimate | None = None
    difference_name: str = DIFFERENCE
    better: Better = "higher"
    place: Place | None = None
    control_place: Place | None = None
    difference_place: Place | None = None

    @classmethod
    def read(
        cls,
        says: Says,
        *,
        value: tuple[Table, str, str],
        control: tuple[Table, str, str] | None = None,
        difference: tuple[Table, str, str] | None = None,
        measure: str = "",
        control_name: str = "",
        difference_name: str = DIFFERENCE,
        better: Better = "higher",
    ) -> Headline:
        """A headline whose numbers are read from tables: each is a table, the name of a row, and a column.

        The measure is called like its column and the control like its row, unless other names are given.

        Raises:
            InvalidInputError: if there is no such row or column, or the cell holds a text.

        >>> table = Table(("arm", "right"), (("SHIFT", 90), ("random", 50)), "Right answers")
        >>> Headline.read(Says("It works.", "It does nothing.", "It harms."), value=(table, "SHIFT", "right"),
        ...     control=(table, "random", "right")).sentence
        'It works.'
        """
        compared = None if difference is None else _read(difference)
        if compared is not None and not isinstance(compared, Estimate):
            raise InvalidInputError(
                f"{difference[1:] if difference else ''} has no interval. Give an Estimate as difference."
            )
        shown, beside = _read(value), None if control is None else _read(control)
        return cls(
            sentence=says.of(verdict(shown, beside, compared, better)),
            measure=measure or value[2], value=shown, control=beside, difference=compared, better=better,
            difference_name=difference_name,
            control_name=control_name or ("" if control is None else control[1]),
            place=_place(value), control_place=_place(control), difference_place=_place(difference),
        )  # fmt: skip

    @classmethod
    def of(cls, says: Says, table: Table, better: Better = "higher") -> Headline:
        """A headline read from a table of `beside`: the number in its first row, the control in its second."""
        column, names = table.columns[1], [str(row[0]) for row in table.rows]
        return cls.read(
            says, value=(table, names[0], column), control=(table, names[1], column) if len(names) > 1 else None,
            difference=(table, names[0], DIFFERENCE) if DIFFERENCE in table.columns else None, better=better,
        )  # fmt: skip

    @property
    def verdict(self) -> Verdict:
        """What the numbers say, by the one rule of `verdict`."""
        return verdict(self.value, self.control, self.difference, self.better)

    def require_in(self, tables: Sequence[Table]) -> None:
        """Checks that each number is the one that stands in its table.

        Raises:
            InvalidInputError: if a table has another number, or there is no such cell.
        """
        for place, shown in (
            (self.place, self.value), (self.control_place, self.control), (self.difference_place, self.difference),
        ):  # fmt: skip
            if place is None:
                continue
            table = next((table for table in tables if table.name == place.table), None)
            held = None if table is None else table.cell(place.row, place.column)
            if table is None or not _same(held, shown):
                raise InvalidInputError(
                    f"The headline {self.sentence!r} shows {shown}; {place} is {held if table else 'no table here'}. "
                    "Read it by Headline.read from a table that stands among the blocks of the section."
                )

    def line(self) -> str:
        """Verdict, sentence and numbers, for a terminal.

        >>> Headline(sentence="It works.", measure="right answers", value=90, control=50, control_name="random").line()
        'works: It works. Right answers: 90; random: 50.'
        """
        return f"{self.verdict}: {self.sentence}" + (f" {numbers}." if (numbers := self.numbers()) else "")

    def numbers(self) -> str:
        """The number beside its control, as text."""
        if self.value is None:
            return ""
        measure = self.measure[:1].upper() + self.measure[1:]
        shown = f"{measure}: {shown_measured(self.value)}"
        if self.control is not None:
            shown += f"; {self.control_name}: {shown_measured(self.control)}"
        if self.difference is not None:
            shown += f"; {self.difference_name}: {' '.join(self.difference.shown(sign=True))}"
        return shown


def beside(
    measure: str, value: tuple[str, Measured], control: tuple[str, Measured] | None, difference: Estimate | None = None
) -> Table:
    """A table of one number beside its control, for `Headline.of`.

    Args:
        measure: what both are, the heading of their column.
        value: name and number.
        control: name and number; None if there is no control.
        difference: number minus control, paired.
    """
    rows = [value] if control is None else [value, control]
    if difference is None:
        return Table(("measured", measure), tuple(rows), BESIDE)
    more = (*value, difference), *((*row, None) for row in rows[1:])
    return Table(("measured", measure, DIFFERENCE), more, BESIDE)


def shown_measured(value: Measured) -> str:
    """A number with its interval, if it has one."""
    if isinstance(value, Estimate):
        return " ".join(value.shown())
    return NOT_AVAILABLE if value is None else number(value)


def _read(where: tuple[Table, str, str]) -> Measured:
    table, row, column = where
    cell = table.cell(row, column)
    if isinstance(cell, str):
        raise InvalidInputError(f"Table {table.name!r}, row {row!r}, column {column!r} holds {cell!r}, not a number.")
    return cell


def _place(where: tuple[Table, str, str] | None) -> Place | None:
    return None if where is None else Place(where[0].name, where[1], where[2])


def _same(held: Cell, shown: Measured) -> bool:
    if isinstance(held, float) and math.isnan(held):
        held = None
    if isinstance(shown, float) and math.isnan(shown):
        shown = None
    if isinstance(held, Estimate) and isinstance(shown, Estimate):
        return repr(held) == repr(shown)  # nan is not equal to nan
    return held == shown


def _point(value: Measured) -> float:
    return float(value.value if isinstance(value, Estimate) else value or 0.0)


def _ends(value: Measured) -> tuple[float, float] | None:
    """Low and high; None for what was not measured."""
    if value is None:
        return None
    low, high = (value.low, value.high) if isinstance(value, Estimate) else (float(value), float(value))
    return None if math.isnan(low) or math.isnan(high) or not math.isfinite(_point(value)) else (low, high)
