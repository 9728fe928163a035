"""A folder that holds files by name, each whole or not there, and the kind that is on this machine."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

from workbench.core.errors import MissingFileError, ResourceError
from workbench.core.records import sync_folder

Part = bytes | memoryview

SECONDS_PER_DAY = 86_400
"""A temporary file of this age is left by a dead process; a younger one may be another machine's."""


@runtime_checkable
class Folder(Protocol):
    """Files by name, each written whole or not at all."""

    @property
    def where(self) -> Path | str:
        """Path or address, for people and for opening it again."""
        ...

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        ...

    def names(self) -> list[str]:
        """The files that are there, sorted."""
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file."""
        ...

    def write(self, name: str, parts: Iterable[Part], expected: str | None = None) -> str | None:
        """Writes a file, whole or not at all. Returns its sha256.

        With `expected`, a content of another sha256 leaves the file as it was and gives None.
        """
        ...

    def write_by_content(self, stem: str, ending: str, parts: Iterable[Part]) -> tuple[str, str]:
        """Writes a file under the name of its content, `stem.sha16.ending`. Returns the name and the sha256."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file, whole or not at all; False, and nothing is changed, if there is one of that name.

        Of several processes one succeeds where the place can tell: on this machine, on network disks with hard links,
        and at addresses that refuse to replace a file. Elsewhere it is looked up first, and then written.
        """
        ...

    def below(self, name: str) -> Folder:
        """The folder of that name inside this one."""
        ...

    def local(self, name: str, sha256: str) -> Path:
        """A file on this machine with the content: the file itself, or a copy in the cache."""
        ...

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        ...

    def discard(self, sha256: str) -> None:
        """Forgets a damaged copy."""
        ...

    def free_bytes(self) -> int | None:
        """Free space, where that can be known."""
        ...


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def where(self) -> Path:
        """The path."""
        return self.path

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.path / name).is_file()

    def names(self) -> list[str]:
        """The files that are there, sorted."""
        return sorted(file.name for file in self.path.iterdir()) if self.path.is_dir() else []

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file."""
        try:
            with (self.path / name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else end - start)
        except FileNotFoundError:
            raise MissingFileError(f"No file {self.path / name}. Check the path, or harvest again.") from None

    def write(self, name: str, parts: Iterable[Part], expected: str | None = None) -> str | None:
        """Writes through a temporary neighbour, fsync and rename. Returns the sha256."""
        target = self.path / name
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(f".{name}.*.tmp"):  # of a killed harvest
            left.unlink()
        partial = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with named_if_full(target):
                sha256 = write_parts(partial, parts)
                if expected in (None, sha256):
                    os.replace(partial, target)
                    sync_folder(self.path)
                    return sha256
        finally:
            partial.unlink(missing_ok=True)
        return None

    def write_by_content(self, stem: str, ending: str, parts: Iterable[Part]) -> tuple[str, str]:
        """Writes through a temporary neighbour, fsync and rename. Returns the name and the sha256."""
        with self._partial(stem) as partial, named_if_full(self.path / stem):
            sha256 = write_parts(partial, parts)
            name = content_name(stem, sha256, ending)
            os.replace(partial, self.path / name)
            sync_folder(self.path)
        return name, sha256

    def create(self, name: str, content: bytes) -> bool:
        """Writes a temporary neighbour and links it to the name, which fails if there is one."""
        target = self.path / name
        with self._partial(name) as partial, named_if_full(target):
            write_parts(partial, [content])
            try:
                os.link(partial, target)
            except FileExistsError:
                return False
            except OSError:  # a disk without hard links
                if target.exists():
                    return False
                os.replace(partial, target)
            sync_folder(self.path)
        return True

    @contextlib.contextmanager
    def _partial(self, name: str) -> Iterator[Path]:
        """A name for a temporary file; what processes left behind a day ago is removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > SECONDS_PER_DAY:
                    left.unlink()
        partial = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def below(self, name: str) -> LocalFolder:
        """The folder of that name inside this one."""
        return LocalFolder(self.path / name)

    def local(self, name: str, sha256: str) -> Path:  # noqa: ARG002
        """The file itself."""
        return self.path / name

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def discard(self, sha256: str) -> None:
        """Nothing: there is no copy."""

    def free_bytes(self) -> int | None:
        """Free space of the disk that the folder is on, or would be."""
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        return shutil.disk_usage(existing).free


def content_name(stem: str, sha256: str, ending: str) -> str:
    """The name of a file that is named after its content.

    >>> content_name("a", "0123456789abcdef0123", "parquet")
    'a.0123456789abcdef.parquet'
    """
    return f"{stem}.{sha256[:16]}.{ending}"


def write_parts(path: Path, parts: Iterable[Part]) -> str:
    """Writes a file and waits for the disk. Returns the sha256."""
    digest = hashlib.sha256()
    # hashing takes as long as writing and waiting for the disk, and all leave the interpreter free
    with path.open("wb") as file, ThreadPoolExecutor(1) as other:
        hashed = []
        for part in parts:
            hashed.append(other.submit(digest.update, part))
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        for done in hashed:
            done.result()
    return digest.hexdigest()


@contextlib.contextmanager
def named_if_full(where: Path | str) -> Iterator[None]:
    """Turns the error of a full disk inside the block into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"The disk is full: {where} could not be written. What was written before it is kept. Free some space and "
            "run the same command again; it goes on from here."
        ) from error


def cache_dir() -> Path:
    """Where models and copies of shards are kept: `WORKBENCH_CACHE`, else the user's cache directory."""
    if os.environ.get("WORKBENCH_CACHE"):
        return Path(os.environ["WORKBENCH_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "interp-workbench"
