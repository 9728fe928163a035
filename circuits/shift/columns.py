"""Columns of a table of texts, checked row by row; files that hold such tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from circuits.shift.strength import SplitOptions
from workbench.core.display import first_few
from workbench.core.errors import (
    DegenerateInputError,
    InvalidInputError,
    MissingFileError,
    UnknownNameError,
    did_you_mean,
)
from workbench.core.jsontext import Record, content_of
from workbench.core.numbers import counted

if TYPE_CHECKING:
    import pandas as pd

Choice: TypeAlias = Mapping[str | int, str] | Sequence[str | int] | None
"""Values of a column that are kept, in their order; a mapping also names them. None keeps all."""

SPLIT_COLUMN = "split of the data set"
"""Column of a table from the hub that holds the split."""


class Columns(TypedDict, total=False):
    """Columns and options that every reader of a table passes to `ShiftTask.from_frame`."""

    text: str
    label: str
    attribute: str | None
    split: str | None
    twin: str | None
    classes: Choice
    attributes: Choice
    spurious_words: Iterable[str]
    target_words: Iterable[str]
    name: str
    options: SplitOptions | None


HUB_COLUMNS: Mapping[str, Columns] = {
    "LabHC/bias_in_bios": Columns(
        text="hard_text", label="profession", attribute="gender", classes={21: "professor", 13: "nurse"},
        attributes={0: "male", 1: "female"},
    ),
}  # fmt: skip
"""What the columns of known data sets are called, by the id on the hub."""

SPLITS = {
    "train": "train", "training": "train", "test": "test",
    "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "balanced": "dev",
}  # fmt: skip
"""Names of splits in tables, and what they are here."""
_FIX = "Correct the file."


@dataclass(frozen=True)
class Values:
    """A column of names: the index of each row's value among the names.

    Attributes:
        names: the values in order.
        of_row: index of each row's value.
    """

    names: tuple[str, ...]
    of_row: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """The rows of a table that are used.

    Attributes:
        texts: the texts.
        label: their labels.
        attribute: their attributes, if the table has them.
        split: "train", "test" or "dev" per row, if the table says so.
        twin: the text with the attribute swapped, "" where there is none; None if the table has none.
        number: which row of the table each one is, from 0.
    """

    texts: tuple[str, ...]
    label: Values
    attribute: Values | None
    split: tuple[str, ...] | None
    twin: tuple[str, ...] | None
    number: tuple[int, ...]


def read_table(
    df: pd.DataFrame, *, text: str, label: str, attribute: str | None, split: str | None, twin: str | None,
    classes: Choice, attributes: Choice,
) -> TextTable:  # fmt: skip
    """The rows whose label and attribute are wanted.

    Raises:
        UnknownNameError: if a column, a class, an attribute or a split does not exist.
        DegenerateInputError: if no row is left, or they have one class or one attribute.
        InvalidInputError: if a text is missing, empty or no text, or a label, attribute or split is missing.
    """
    named = {"text": text, "label": label, "attribute": attribute, "split": split, "twin": twin}
    for use, column in named.items():
        if column is not None:
            _require_column(df, use, column)
    if not len(df):
        raise DegenerateInputError(
            f"The table has the columns {first_few(df.columns)} and no rows. Give rows of texts."
        )
    labels = _names(df, label)
    of_class = _order(label, labels, classes)
    kept = [row for row, name in enumerate(labels) if name in of_class]
    kinds, of_kind = None, {}
    if attribute is not None:
        every = _names(df, attribute, kept)
        of_kind = _order(attribute, every, attributes)
        kept = [row for row, name in zip(kept, every, strict=True) if name in of_kind]
        kinds = _names(df, attribute, kept)
    labels = _names(df, label, kept)
    return TextTable(
        texts=_texts(df, text, kept), number=tuple(kept), label=_values(label, labels, of_class),
        attribute=None if kinds is None else _values(str(attribute), kinds, of_kind),
        split=None if split is None else _splits(df, split, kept),
        twin=None if twin is None else _twins(df, twin, kept),
    )  # fmt: skip


def records_frame(records: Iterable[Record]) -> pd.DataFrame:
    """A table of records; a field that a record does not have is missing there."""
    import pandas as pd

    return pd.DataFrame(list(records), dtype=object)


def csv_frame(path: str | Path) -> pd.DataFrame:
    """A table with a header, separated by commas, or by tabs where the name ends in .tsv; every value is text.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is not UTF-8, a quote is not closed, or a row has more values than the header.
        InvalidInputError: if two columns have the same name.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no file {str(path)!r}. Give a file with a header and one row per text.")
    with path.open(encoding="utf-8-sig", newline="") as file, content_of(path, _FIX, csv.Error):
        reader = csv.DictReader(file, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = list(reader.fieldnames or ())
        rows: list[Record] = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more than the {len(names)} values of the header")
            rows.append(row)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInputError(f"{path} has the column {twice[0]!r} twice. Rename one.")
    return pd.DataFrame(rows, columns=names, dtype=object)


def parquet_frame(path: str | Path) -> pd.DataFrame:
    """The table of a Parquet file.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is no Parquet file.
    """
    import pandas as pd
    import pyarrow

    if not Path(path).is_file():
        raise MissingFileError(f"There is no file {str(path)!r}. Give a Parquet file with one row per text.")
    with content_of(path, _FIX, pyarrow.ArrowException, OSError):
        return pd.read_parquet(path)


def _require_column(df: pd.DataFrame, use: str, column: str) -> None:
    names = [str(name) for name in df.columns]
    if column not in names:
        raise UnknownNameError(f"The table has no column {column!r} ({use}=). {did_you_mean(column, names)}")
    if names.count(column) > 1:
        raise InvalidInputError(f"The table has the column {column!r} twice. Rename one.")


def _name(value: object) -> str | None:
    """A value of a column as a name; None if there is none.

    >>> [_name(value) for value in (21, 21.0, "21", " nurse ", "", None, float("nan"), True)]
    ['21', '21', '21', 'nurse', None, None, None, 'True']
    """
    if isinstance(value, float):
        return None if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    item = getattr(value, "item", None)
    return str(item() if callable(item) else value).strip() or None


def _names(df: pd.DataFrame, column: str, rows: Sequence[int] | None = None) -> list[str]:
    values = df[column].tolist()
    rows = range(len(values)) if rows is None else rows
    names = {row: _name(values[row]) for row in rows}
    _refuse([row for row, name in names.items() if name is None], column, "no value")
    return [str(name) for name in names.values()]


def _refuse(rows: Sequence[int], column: str, problem: str) -> None:
    if rows:
        which = f"row {rows[0]}" if len(rows) == 1 else f"{counted(len(rows), 'rows')} ({first_few(rows, 5)})"
        raise InvalidInputError(
            f"Column {column!r} has {problem} in {which}, counted from 0. Fill it, or leave the rows out."
        )


def _order(column: str, names: Sequence[str], choice: Choice) -> dict[str, str]:
    """Values that are kept, in order, each with its name."""
    there = sorted(set(names), key=lambda name: (not name.lstrip("-").isdigit(), _as_int(name), name))
    if choice is None:
        wanted = {name: name for name in there}
    elif isinstance(choice, Mapping):
        wanted = {str(value): str(name) for value, name in choice.items()}
    else:
        wanted = {str(value): str(value) for value in choice}
    for value in wanted:
        if value not in there:
            raise UnknownNameError(f"Column {column!r} has no value {value!r}. {did_you_mean(value, there)}")
    if len(wanted) < 2:
        only = first_few(map(repr, wanted or there), 3)
        raise DegenerateInputError(f"Column {column!r} has one value, {only}; needs two or more to tell apart.")
    return wanted


def _as_int(name: str) -> int:
    return int(name) if name.lstrip("-").isdigit() else 0


def _values(column: str, names: Sequence[str], order: Mapping[str, str]) -> Values:
    there = [value for value in order if value in set(names)]
    if len(there) < len(order):
        gone = next(value for value in order if value not in there)
        raise DegenerateInputError(f"Column {column!r}: no row of {order[gone]!r} is left. Leave it out, or give rows.")
    index = {value: i for i, value in enumerate(order)}
    return Values(tuple(order.values()), tuple(index[name] for name in names))


def _texts(df: pd.DataFrame, column: str, rows: Sequence[int]) -> tuple[str, ...]:
    values = df[column].tolist()
    missing = [row for row in rows if _name(values[row]) is None]
    empty = [row for row in missing if isinstance(values[row], str)]
    _refuse(empty, column, "an empty text")
    _refuse(missing, column, "no text")
    _refuse([row for row in rows if not isinstance(values[row], str)], column, "something that is not text")
    return tuple(values[row] for row in rows)


def _twins(df: pd.DataFrame, column: str, rows: Sequence[int]) -> tuple[str, ...]:
    values = df[column].tolist()
    there = [row for row in rows if _name(values[row]) is not None]
    _refuse([row for row in there if not isinstance(values[row], str)], column, "something that is not text")
    return tuple(values[row] if _name(values[row]) is not None else "" for row in rows)


def _splits(df: pd.DataFrame, column: str, rows: Sequence[int]) -> tuple[str, ...]:
    names = _names(df, column, rows)
    unknown = [name for name in dict.fromkeys(names) if name.lower() not in SPLITS]
    if unknown:
        raise UnknownNameError(
            f"Column {column!r} has the split {unknown[0]!r}. {did_you_mean(unknown[0].lower(), SPLITS)} Rename it."
        )
    return tuple(SPLITS[name.lower()] for name in names)
