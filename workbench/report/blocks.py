"""What a report shows, as plain frozen values: prose, tables, plots, heat maps, coloured tokens.

Nothing here knows HTML or plots: `workbench.report` draws these values, `workbench.runs.run` stores them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, TypeVar

from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError, did_you_mean
from workbench.core.numbers import Number
from workbench.core.stats import Estimate

Cell = str | int | float | Estimate | None
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """Prose; a blank line starts a new paragraph."""

    text: str
    kind: Literal["text"] = field(default="text", init=False, repr=False)


@dataclass(frozen=True)
class Table(OneLine):
    """Rows of cells; an `Estimate` is shown with its interval. The first column names the row.

    Numbers in a column called "feature" are features of the study's SAE, and link to their cards where there are any.

    Attributes:
        caption: its first sentence is what the table is called.
        is_sample: texts that show a result better than a plot does; a section shows its first one open.

    Raises:
        ShapeError: if a row is not as wide as the header.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    is_sample: bool = False
    kind: Literal["table"] = field(default="table", init=False, repr=False)

    @classmethod
    def of(cls, items: Iterable[T], columns: Mapping[str, str | Callable[[T], Cell]], caption: str = "") -> Table:
        """One row per item; a column is the name of an attribute, or a function of the item.

        >>> Table.of([1j, 2j], {"real": "real", "twice": lambda item: 2 * item.imag}).rows
        ((0.0, 2.0), (0.0, 4.0))
        """
        read = [attrgetter(column) if isinstance(column, str) else column for column in columns.values()]
        return cls(tuple(columns), tuple(tuple(get(item) for get in read) for item in items), caption)

    @property
    def name(self) -> str:
        """First sentence of the caption.

        >>> Table(("a",), (), "What it costs: nats per token. Over rows.").name
        'What it costs: nats per token'
        """
        return re.split(r"\.(?:\s|$)", self.caption, maxsplit=1)[0] or ", ".join(self.columns)

    def cell(self, row: str, column: str) -> Cell:
        """The cell of the first row of this name.

        Raises:
            InvalidInputError: if there is no such row or column.
        """
        if column not in self.columns:
            raise InvalidInputError(
                f"Table {self.name!r} has no column {column!r}. {did_you_mean(column, self.columns)}"
            )
        for cells in self.rows:
            if str(cells[0]) == row:
                return cells[self.columns.index(column)]
        names = [str(cells[0]) for cells in self.rows]
        raise InvalidInputError(f"Table {self.name!r} has no row {row!r}. {did_you_mean(row, names)}")

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ShapeError(
                    f"Table {self.caption!r}: row {i} has {len(row)} cells, the header has {len(self.columns)} "
                    f"({', '.join(self.columns)}). Give every row one cell per column."
                )


@dataclass(frozen=True)
class Bars:
    """One bar with its interval per label; `reference` draws the value that would mean no effect."""

    title: str
    labels: tuple[str, ...]
    values: tuple[Estimate | Number, ...]
    y_label: str = ""
    reference: Number | None = None
    caption: str = ""
    kind: Literal["bars"] = field(default="bars", init=False, repr=False)

    def __post_init__(self) -> None:
        _same_length(f"Bars {self.title!r}", labels=self.labels, values=self.values)


@dataclass(frozen=True)
class Series:
    """One line of a `Lines` plot, with an optional band from `low` to `high`."""

    name: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    low: tuple[Number, ...] | None = None
    high: tuple[Number, ...] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise InvalidInputError(f"Series {self.name!r} has one end of its band. Give low and high, or neither.")
        band = {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}
        _same_length(f"Series {self.name!r}", x=self.x, y=self.y, **band)


@dataclass(frozen=True)
class Lines(OneLine):
    """Curves over a common x axis."""

    title: str
    series: tuple[Series, ...]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    caption: str = ""
    kind: Literal["lines"] = field(default="lines", init=False, repr=False)


@dataclass(frozen=True)
class Histogram:
    """How values are distributed; non-finite values are left out and counted in the caption."""

    title: str
    values: tuple[Number, ...]
    x_label: str = ""
    y_label: str = "count"
    bins: int = 30
    log_x: bool = False
    caption: str = ""
    kind: Literal["histogram"] = field(default="histogram", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise InvalidInputError(f"Histogram {self.title!r}: asked for {self.bins} bins; needs at least 1.")


@dataclass(frozen=True)
class Scatter:
    """One point per row; `labels` are written beside the points (an empty string for none)."""

    title: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    labels: tuple[str, ...] | None = None
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    caption: str = ""
    kind: Literal["scatter"] = field(default="scatter", init=False, repr=False)

    def __post_init__(self) -> None:
        extra = {} if self.labels is None else {"labels": self.labels}
        _same_length(f"Scatter {self.title!r}", x=self.x, y=self.y, **extra)


@dataclass(frozen=True)
class Tokens:
    """Token texts, coloured by their value: warm above zero, cool below, plain without a value."""

    rows: tuple[tuple[tuple[str, Number | None], ...], ...]
    caption: str = ""
    kind: Literal["tokens"] = field(default="tokens", init=False, repr=False)


MOST_CELLS = 1_500
"""Cells of all grids of a heat map that are drawn together; of more, the last columns are drawn."""


@dataclass(frozen=True)
class Grid:
    """Cells of a heat map; a value that is None or not finite has no colour.

    Attributes:
        name: what its cells are.
        rows: names of the rows, from the top.
        columns: names of the columns.
        values: a row of numbers per name of a row.
        texts: what stands in the cells; "" leaves them empty.

    Raises:
        ShapeError: if there is not one value per cell.
    """

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[Number | None, ...], ...]
    texts: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        _same_length(f"Grid {self.name!r}", rows=self.rows, values=self.values)
        for row in (*self.values, *self.texts):
            _same_length(f"Grid {self.name!r}", columns=self.columns, cells=row)


@dataclass(frozen=True)
class Heat(OneLine):
    """Heat maps side by side on one scale: warm above zero, cool below."""

    title: str
    grids: tuple[Grid, ...]
    caption: str = ""
    kind: Literal["heat"] = field(default="heat", init=False, repr=False)


Block = Text | Table | Bars | Lines | Histogram | Scatter | Tokens | Heat


def _same_length(what: str, **parts: tuple[object, ...]) -> None:
    if len({len(part) for part in parts.values()}) > 1:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        raise ShapeError(f"{what} has {sizes}; these must pair up. Give as many of each.")
