"""What a Parquet file says about its rows, in the file itself, so that a kill can't leave new rows under old words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.core.errors import CorruptFileError
from workbench.core.jsontext import parse_json
from workbench.core.records import to_jsonable

HEADER = b"workbench"
"""Key in the metadata of the Parquet schema."""


def header(record: Mapping[str, Any]) -> bytes:
    """A record as the value of `HEADER`."""
    return json.dumps(to_jsonable(record), allow_nan=False).encode()


def read_header(metadata: Mapping[bytes, bytes] | None, path: Path, remedy: str) -> dict[str, Any]:
    """The record in a file's metadata.

    Raises:
        CorruptFileError: if there is none, or it can't be read.
    """
    if metadata is None or HEADER not in metadata:
        raise CorruptFileError(f"{path} was not written by this version of the workbench: it has no header. {remedy}")
    return parse_json(metadata[HEADER], str(path), dict, remedy=remedy)
