"""Documents from files: .txt, .jsonl and .parquet, read as a stream, and folders and patterns of them."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError, did_you_mean
from workbench.core.jsontext import parse_json
from workbench.core.records import not_utf8, read_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".txt", ".jsonl", ".parquet")
BYTES_PER_TOKEN_OF_TEXT = 3
ROWS_AT_ONCE = 1024


def text_files(paths: str | Path | Iterable[str | Path]) -> tuple[Path, ...]:
    """The files that paths, folders and patterns stand for; those of a folder or pattern in the order of their names.

    Raises:
        MissingFileError: for a path that does not exist, or stands for no file.
    """
    files: list[Path] = []
    for path in (Path(path).expanduser() for path in ([paths] if isinstance(paths, str | Path) else paths)):
        if path.is_file():
            files.append(path)
            continue
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
        else:
            inside = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not inside:
            raise MissingFileError(
                f"There is no file {path}, and as a folder or pattern it holds no {', '.join(SUFFIXES)}. Check the "
                "path."
            )
        files += sorted(inside)
    return tuple(files)


def documents(path: Path, column: str) -> Iterator[str]:
    """The documents of a file: the whole of a text file, a line of a .jsonl file, a row of a .parquet file.

    Raises:
        CorruptFileError: for a file that is not what its name says.
        InvalidInputError: where `column` is missing or holds no text.
    """
    if path.suffix == ".parquet":
        return _parquet(path, column)
    if path.suffix == ".jsonl":
        return _jsonl(path, column)
    return _whole(path)


def about_tokens(path: Path, column: str) -> int:
    """About how many tokens a file holds, taking three bytes of text for one."""
    if path.suffix != ".parquet":
        return path.stat().st_size // BYTES_PER_TOKEN_OF_TEXT + 1
    data = _open_parquet(path, column).metadata
    groups = (data.row_group(i) for i in range(data.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in columns if part.path_in_schema == column)
    return size // BYTES_PER_TOKEN_OF_TEXT + 1


def _whole(path: Path) -> Iterator[str]:
    yield read_text(path)


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        number = 0
        while True:
            number += 1
            try:
                line = next(lines, None)
            except UnicodeDecodeError as error:
                raise not_utf8(path, error) from None
            if line is None:
                return
            if line.strip():
                yield _text_of_line(line, column, f"{path} line {number}")


def _text_of_line(line: str, column: str, where: str) -> str:
    value = parse_json(line, where, foreign=True, remedy="Correct or remove the line.")
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where} holds a {type(value).__name__}, not an object with the key {column!r}.")
    if column not in value:
        raise InvalidInputError(f"{where} has no {column!r}. {did_you_mean(column, list(value))} Set column=.")
    if not isinstance(value[column], str):
        texts = [name for name, other in value.items() if isinstance(other, str)]
        instead = f"set column= to one of {texts}, or leave" if texts else "leave"
        raise InvalidInputError(
            f"{where} has {value[column]!r:.40} in {column!r}, not a text; {instead} such lines out of the file."
        )
    return value[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowException

    file = _open_parquet(path, column)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[column]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise InvalidInputError(
                        f"{path} row {number} has {type(value).__name__} in {column!r}, not text. Set column=, or "
                        "leave such rows out of the file."
                    )
                yield value
                number += 1
    except (ArrowException, OSError) as error:
        raise _not_parquet(path, error) from None


def _open_parquet(path: Path, column: str) -> ParquetFile:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise _not_parquet(path, error) from None
    names = file.schema_arrow.names
    if column not in names:
        raise InvalidInputError(f"{path} has no column {column!r}. {did_you_mean(column, names)} Set column=.")
    return file


def _not_parquet(path: Path, error: Exception) -> CorruptFileError:
    return CorruptFileError(f"{path} is not a readable Parquet file ({error}). Fetch it again, or leave it out.")
