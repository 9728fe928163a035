"""Parquet files that describe features; a header in the file says how its rows were made.

In the file itself, so that a kill can't leave new rows with an old header.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.core.errors import CorruptFileError, MissingFileError
from workbench.core.jsontext import Record, content_of, parse_json
from workbench.core.records import to_jsonable

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile

HEADER = b"workbench"
"""Key in the metadata of the Parquet schema."""


def with_header(schema: Schema, record: Mapping[str, object]) -> Schema:
    """The schema with a header; other metadata stays."""
    text = json.dumps(to_jsonable(record), allow_nan=False)
    return schema.with_metadata({**(schema.metadata or {}), HEADER: text.encode()})


@contextlib.contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[tuple[ParquetFile, Record]]:
    """A Parquet file and its header, for the lines that take values out of them.

    Args:
        path: of the file.
        what: it holds, for errors.
        remedy: what errors advise.

    Raises:
        MissingFileError: if there is no file.
        CorruptFileError: if it has no header, or its content can't be used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise MissingFileError(f"No {what} in {path.parent}: it has no {path.name}. {remedy}")
    with content_of(path, remedy, pa.ArrowException, OSError):
        file = pq.ParquetFile(path)
        header = (file.schema_arrow.metadata or {}).get(HEADER)
        if header is None:
            raise CorruptFileError(f"{path} has no header: another version, or another program, wrote it. {remedy}")
        yield file, parse_json(header, str(path), dict, remedy=remedy)
