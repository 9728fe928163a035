"""Files that are either whole or not there, and what killed processes leave of them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from workbench.core.errors import InvalidInputError
from workbench.core.locks import HAS_LOCKS, try_lock

_SUFFIX = ".wb.tmp"
_swept: set[Path] = set()


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file through a temporary neighbour, fsync and rename, making its folder. Returns the path.

    Raises:
        InvalidInputError: if the path is a folder.
    """
    # surrogates come from tokens that are half a character; they must not stop a run from being saved
    raw = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    with replacing(path) as file:
        file.write(raw)
    return Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends; after an error, or a kill, the old one stays.

    What killed processes left of files in the same folder is removed. A library that wants a path gets `file.name`.

    Raises:
        InvalidInputError: if the path is a folder.
    """
    target = Path(path)
    refuse_address(target)
    if target.is_dir():
        raise InvalidInputError(f"{target} is a folder and can't be written as a file. Name a file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    file = _begin(target)
    partial = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(target.parent)


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Refuses an address such as s3://bucket/name, which as a path would be a folder `s3:` here.

    Raises:
        InvalidInputError: unless a folder of that name is there.
    """
    first = next(iter(Path(path).parts), "")
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", first) and not Path(first).exists():
        raise InvalidInputError(
            f"{os.fspath(path)} is an address; name a place on this machine, and copy what is written there."
        )


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _begin(target: Path) -> BinaryIO:
    """A new temporary file, locked for as long as it is open, so that others can tell that its writer lives."""
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
        file = open(partial, "xb")  # noqa: SIM115 - closed by the caller
        # another process may have taken the file for a dead one's before it was locked
        if not HAS_LOCKS or (try_lock(file.fileno()) and partial.exists()):
            return file
        file.close()


def _sweep(folder: Path) -> None:
    """Removes temporary files that no process has open, once for each folder."""
    if not HAS_LOCKS or folder in _swept:  # without locks, what a killed process leaves stays there
        return
    _swept.add(folder)
    for partial in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError), open(partial, "rb") as file:
            if try_lock(file.fileno()):
                partial.unlink()
