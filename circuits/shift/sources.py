"""A task from whatever holds the table: a file of a known kind, a folder or an id of the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from circuits.shift.columns import HUB_COLUMNS, Columns, csv_frame, parquet_frame, records_frame
from circuits.shift.task import ShiftTask
from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import InvalidInputError, MissingFileError
from workbench.core.records import json_lines

if TYPE_CHECKING:
    import pandas as pd

FILES: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": csv_frame, ".tsv": csv_frame, ".parquet": parquet_frame,
    ".jsonl": lambda path: records_frame(json_lines(path)), ".ndjson": lambda path: records_frame(json_lines(path)),
}  # fmt: skip
"""How a table is read, by how the name of its file ends."""


@checked
def read_task(data: str | Path, *, limit: int | None = None, **columns: Unpack[Columns]) -> ShiftTask:
    """A task from a file (.csv, .tsv, .jsonl, .ndjson, .parquet), or else from a data set; see `ShiftTask.from_frame`.

    Args:
        data: path of a file; or folder or id of a data set, as `ShiftTask.from_hub` takes it.
        limit: only the first rows, of a data set those of each split.
        columns: columns and options as in `ShiftTask.from_frame`.

    Raises:
        InvalidInputError: if the file is of no known kind, text or label is not named, or the hub can't be reached.
        MissingFileError: if there is no such file.
        CorruptFileError: if it can't be read.
    """
    path = Path(data)
    if limit is not None and limit < 1:
        raise InvalidInputError(f"read_task(limit={limit}): needs at least 1.")
    if path.suffix.lower() in FILES and not path.is_dir():
        table = FILES[path.suffix.lower()](path)
        _require_named(path.name, [str(name) for name in table.columns], columns)
        return ShiftTask.from_frame(table.head(limit) if limit else table, **{"name": path.name, **columns})
    if path.is_file():
        raise InvalidInputError(
            f"{path} ends in {path.suffix or 'no suffix'!r}, and tables of {first_few(FILES, 9)} are read. Convert it, "
            "or rename it if it is one."
        )
    if not path.exists() and (path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", "..")):
        raise MissingFileError(
            f"There is no table {data}: no such file, folder or id of a data set (OWNER/NAME). Give a file that ends "
            f"in {first_few(FILES, 9)}."
        )
    if not {"text", "label"} <= {*columns, *HUB_COLUMNS.get("/".join(path.parts[-2:]), {})}:
        raise InvalidInputError(
            f"{data}: the columns of text and label are not named, and those of this data set are not known. Give "
            "text= and label=."
        )
    return ShiftTask.from_hub(str(data), limit=limit, **columns)


def _require_named(name: str, there: list[str], columns: Columns) -> None:
    missing = [use for use in ("text", "label") if use not in columns]
    if missing:
        raise InvalidInputError(
            f"{name}: the column of the {missing[0]} is not named. The table has {first_few(there, 8)}. Give "
            f"{' and '.join(f'{use}=' for use in missing)}."
        )
