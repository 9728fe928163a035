"""Rows that outlive a kill: one JSON line each, appended batch after batch, for searches that choose as they go."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError
from workbench.core.jsontext import parse_json
from workbench.core.records import to_jsonable

TOKEN = "token_id"

Row = dict[str, object]


class Log:
    """An append-only file of rows that belongs to one key, such as a model, a set of prompts and a dtype.

    The first line holds the key; each further line is an object with an integer field that says what the row is about.
    Rows about the same thing are merged, a later field replacing an earlier one, so results may be written bit by bit.
    A line that a kill cut off is dropped when the file is opened again.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = Path(folder.name) / "tokens.jsonl"
    >>> Log(file, {"model": "a"}).append([{"token_id": 7, "p": 0.5}, {"token_id": 7, "q": 1.0}])
    >>> Log(file, {"model": "a"}).done()
    {7: {'token_id': 7, 'p': 0.5, 'q': 1.0}}
    >>> folder.cleanup()
    """

    def __init__(self, path: Path, key: Mapping[str, object], row_id: str = TOKEN) -> None:
        """Opens the file, or makes it.

        Args:
            path: the file; its folder is made.
            key: what results depend on, such as the fingerprint of the model and the hash of the prompts.
            row_id: name of the integer field that says what a row is about.

        Raises:
            MismatchError: if the file was written under another key.
            CorruptFileError: if a line other than the last is not JSON, or has no `row_id`.
        """
        self.path, self.key, self.row_id = Path(path), to_jsonable(dict(key)), row_id
        self._done: dict[int, Row] = {}
        lines = self._whole_lines()
        if lines:
            self._read(lines)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([{"key": self.key}])

    def done(self) -> dict[int, Row]:
        """What is known so far: `row_id` to its merged row. The rows are copies."""
        return {about: dict(row) for about, row in self._done.items()}

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes the rows; once this returns, a kill does not lose them. NaN is written as null.

        Raises:
            InvalidInputError: for a row without an integer `row_id`; then nothing is written.
        """
        by_id: list[tuple[int, Row]] = []
        for row in (to_jsonable(dict(row)) for row in rows):
            about = row.get(self.row_id)
            if type(about) is not int:
                raise InvalidInputError(
                    f"Log.append: the row {row} has no integer {self.row_id!r}. Each row is about one; name it."
                )
            by_id.append((about, dict(row)))
        if by_id:
            self._write([row for _, row in by_id])
        for about, row in by_id:
            self._done.setdefault(about, {}).update(row)

    def _whole_lines(self) -> list[bytes]:
        """The lines that were written completely; what is left of a last one is cut off the file."""
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(self.path, whole)
        return raw[:whole].split(b"\n")[:-1]

    def _read(self, lines: Sequence[bytes]) -> None:
        head, *rows = (self._parse(number, line) for number, line in enumerate(lines, 1))
        key = head.get("key")
        if not isinstance(key, dict):
            raise CorruptFileError(f"{self.path} does not begin with a key, so it is no log. Name another file.")
        require_same_key(self.path, key, self.key)
        for number, row in enumerate(rows, 2):
            about = row.get(self.row_id)
            if type(about) is not int:
                raise CorruptFileError(
                    f"{self.path}, line {number}: no integer {self.row_id!r}. Delete the line or the file."
                )
            self._done.setdefault(about, {}).update(row)

    def _parse(self, number: int, line: bytes) -> Row:
        remedy = "Delete the line, and its row is made again."
        return parse_json(line, f"{self.path}, line {number},", dict, remedy=remedy)

    def _write(self, rows: Sequence[Mapping[str, object]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n" for row in rows)
        # One unbuffered write, so that a kill can cut the last line only.
        with open(self.path, "ab", buffering=0) as file:
            file.write(lines.encode())


def require_same_key(where: Path | str, kept: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuses to continue results that depend on something else.

    Args:
        where: the file or folder that holds them.
        kept: what they depend on.
        now: what results depend on now.

    Raises:
        MismatchError: if the two differ, with every difference.
    """
    names = sorted(name for name in {*kept, *now} if name not in kept or name not in now or kept[name] != now[name])
    if names:
        differ = "; ".join(f"{n}: file {_short(kept, n)}, now {_short(now, n)}" for n in names)
        raise MismatchError(
            f"{where} holds results of something else ({differ}). They can't be continued; name another place, or "
            "delete this one to start again."
        )


def _short(key: Mapping[str, object], name: str) -> str:
    text = str(key.get(name, "nothing"))
    return text if len(text) <= 80 else text[:79] + "…"
