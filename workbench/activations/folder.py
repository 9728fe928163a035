"""Where the files of a store are: a folder on this machine, or any address that fsspec knows (s3://, gs://, memory://)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote

from workbench.core.atomic import refuse_address
from workbench.core.errors import InvalidInputError, MissingFileError, ResourceError, did_you_mean
from workbench.core.records import sync_folder
from workbench.models.embedded import cache_dir

Part = bytes | memoryview

WHOLE_UPLOADS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory")
"""Here an upload appears when it is complete, and a rename would copy the whole file."""

CACHE_GB = 50.0
"""Shards kept from other machines, unless `WORKBENCH_SHARD_CACHE_GB` says otherwise."""


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


def open_folder(where: str | Path | Folder) -> Folder:
    """The folder at a path or address; nothing is created.

    Raises:
        InvalidInputError: for an address that fsspec does not know, or whose package is missing.
    """
    if not isinstance(where, str | Path):
        return where
    text = str(where)
    # a Path has no double slash, so an address that went through one has lost it
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)(?:::|:/{1,2})(.*)", text, re.DOTALL)
    plain = found is None or not ("://" in text or "::" in text or _is_protocol(found[1]))
    if found is None or (plain and (isinstance(where, str) or Path(f"{found[1]}:").exists())):
        return LocalFolder(Path(where).expanduser())
    if found[1] in ("file", "local"):
        return LocalFolder(Path("/" + unquote(found[2]).lstrip("/")))
    return RemoteFolder(text if "::" in text else f"{found[1]}://{found[2].lstrip('/')}")


def require_local(where: str | Path) -> None:
    """Refuses what is no folder of this machine that can be written to.

    Raises:
        InvalidInputError: for an address, also one that lost a slash as a `Path`, or as `check_writable`.
    """
    refuse_address(where)
    folder = open_folder(where)
    if not isinstance(folder, LocalFolder):
        raise InvalidInputError(f"{where} is an address; name a folder of this machine, and copy it from there.")
    check_writable(folder)


def _is_protocol(name: str) -> bool:
    import fsspec

    return name in fsspec.available_protocols()


def check_writable(folder: Folder) -> None:
    """Refuses a folder of this machine that can't be made or written to, before any work is done for it.

    Raises:
        InvalidInputError: naming the place that is in the way.
    """
    if not isinstance(folder, LocalFolder):
        return
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InvalidInputError(f"{folder.where} can't be written: {existing} is a file. Name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidInputError(
            f"{folder.where} can't be written: {existing} is read-only for you. Name another folder, or change its "
            "permissions."
        )


@contextlib.contextmanager
def in_use(path: Path, shared: bool = False, *, temporary: bool = False) -> Iterator[None]:
    """Makes a folder and keeps other processes from writing to it, until the block ends or the process dies.

    A folder that was made for this and is still empty at the end is removed.

    Args:
        path: the folder.
        shared: let in others that share it too.
        temporary: remove the folder, if it is empty, even if an earlier process left it.

    Raises:
        InvalidInputError: if another process is at work there.
    """
    is_new = temporary or not path.exists()
    handle = _locked(path, shared)
    try:
        yield
    finally:
        if handle is not None:
            if is_new:
                _remove_if_empty(path, handle)
            os.close(handle)


def _locked(path: Path, shared: bool) -> int | None:
    """The open folder with a lock on it; None where there are no locks."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # not on Windows
            return None
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as unless_locked:
            handle = os.open(path, os.O_RDONLY)
            unless_locked.callback(os.close, handle)
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInputError(
                    f"Another process is writing to {path}. Wait until it has ended, or name another folder."
                ) from None
            except OSError:  # some network disks have no locks
                pass
            # the process before may have removed the folder between opening and locking
            if os.path.samestat(os.fstat(handle), path.stat()):
                unless_locked.pop_all()
                return handle


def _remove_if_empty(path: Path, handle: int) -> None:
    """Removes a folder that is locked, unless others share it."""
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.rmdir()


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
            with _named_if_full(target):
                sha256 = _write_parts(partial, parts)
                if expected in (None, sha256):
                    os.replace(partial, target)
                    sync_folder(self.path)
                    return sha256
        finally:
            partial.unlink(missing_ok=True)
        return None

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


class RemoteFolder:
    """A folder at an fsspec address; shards are read through copies in the cache of this machine."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self._fs, self._root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            protocol = self.url.split(":")[0]
            known = did_you_mean(protocol, ("file", "memory", *WHOLE_UPLOADS, "sftp", "hdfs"))
            raise InvalidInputError(f"{url} can't be opened: {error}. {known} Install the package it needs.") from None

    @property
    def where(self) -> str:
        """The address."""
        return self.url

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self._fs.isfile(self._at(name)))

    def names(self) -> list[str]:
        """The files that are there, sorted."""
        if not self._fs.isdir(self._root):
            return []
        return sorted(str(path).rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` of a file."""
        try:
            return self._fs.cat_file(self._at(name), start=start or None, end=end)
        except FileNotFoundError:
            raise MissingFileError(f"No file {self.url}/{name}. Check the address, or harvest again.") from None

    def write(self, name: str, parts: Iterable[Part], expected: str | None = None) -> str | None:
        """Writes to the cache of this machine, then uploads. Returns the sha256."""
        scratch = _scratch()
        try:
            with _named_if_full(f"{self.url}/{name}"):
                sha256 = _write_parts(scratch, parts)
                if expected not in (None, sha256):
                    return None
                self._upload(scratch, name)
                if name.endswith(".safetensors"):
                    _keep(scratch, sha256)
        finally:
            scratch.unlink(missing_ok=True)
        return sha256

    def _upload(self, file: Path, name: str) -> None:
        self._fs.makedirs(self._root, exist_ok=True)
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        if set(protocols) & set(WHOLE_UPLOADS):
            self._fs.put_file(str(file), self._at(name))
            return
        partial = self._at(f".{name}.{secrets.token_hex(4)}.tmp")
        try:
            self._fs.put_file(str(file), partial)
            if self._fs.exists(self._at(name)):
                self._fs.rm_file(self._at(name))
            self._fs.mv(partial, self._at(name))
        finally:
            if self._fs.exists(partial):
                self._fs.rm_file(partial)

    def local(self, name: str, sha256: str) -> Path:
        """A copy of the file in the cache of this machine."""
        copy = _copy(sha256)
        if copy.is_file():
            copy.touch()
            return copy
        scratch = _scratch()
        try:
            with _named_if_full(copy):
                self._fs.get_file(self._at(name), str(scratch))
            return _keep(scratch, sha256)
        except FileNotFoundError:
            raise MissingFileError(
                f"Shard {self.url}/{name} is in the manifest but not there. Restore it, or run the same harvest with "
                "repair=True (--repair)."
            ) from None
        finally:
            scratch.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def discard(self, sha256: str) -> None:
        """Deletes the copy."""
        _copy(sha256).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Not known."""
        return None

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _write_parts(path: Path, parts: Iterable[Part]) -> str:
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
def _named_if_full(where: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"The disk is full: {where} could not be written. What was written before it is kept. Free some space and "
            "run the same command again; it goes on from here."
        ) from error


def _copy(sha256: str) -> Path:
    return cache_dir() / "shards" / f"{sha256}.safetensors"


def _scratch() -> Path:
    folder = cache_dir() / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".{secrets.token_hex(8)}.tmp"


def _keep(scratch: Path, sha256: str) -> Path:
    """Moves a file into the cache, and the files that were not used for longest out of it."""
    copy = _copy(sha256)
    os.replace(scratch, copy)
    copy.touch()
    limit = float(os.environ.get("WORKBENCH_SHARD_CACHE_GB") or CACHE_GB) * 1e9
    files = sorted(copy.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    used = 0
    for file in files:
        used += file.stat().st_size
        if used > limit and file != copy:
            file.unlink(missing_ok=True)
    return copy
