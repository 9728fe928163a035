"""Files at an fsspec address, and the copies of them that this machine keeps."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from workbench.core.errors import InvalidInputError, MissingFileError, did_you_mean
from workbench.engine.local import Part, cache_dir, content_name, named_if_full, write_parts

WHOLE_UPLOADS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory")
"""Here an upload appears when it is complete, and a rename would copy the whole file."""

CACHE_GB = 50.0
"""Shards kept from other machines, unless `WORKBENCH_SHARD_CACHE_GB` says otherwise."""


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
            with named_if_full(f"{self.url}/{name}"):
                sha256 = write_parts(scratch, parts)
                if expected not in (None, sha256):
                    return None
                self._upload(scratch, name)
                if name.endswith(".safetensors"):
                    _keep(scratch, sha256)
        finally:
            scratch.unlink(missing_ok=True)
        return sha256

    def write_by_content(self, stem: str, ending: str, parts: Iterable[Part]) -> tuple[str, str]:
        """Writes to the cache of this machine, then uploads. Returns the name and the sha256."""
        scratch = _scratch()
        try:
            with named_if_full(f"{self.url}/{stem}"):
                sha256 = write_parts(scratch, parts)
                name = content_name(stem, sha256, ending)
                self._upload(scratch, name)
        finally:
            scratch.unlink(missing_ok=True)
        return name, sha256

    def create(self, name: str, content: bytes) -> bool:
        """Writes in a mode that refuses to replace a file, where the place has one."""
        self._fs.makedirs(self._root, exist_ok=True)
        try:
            self._fs.pipe_file(self._at(name), content, mode="create")
        except FileExistsError:
            return False
        except (NotImplementedError, TypeError, ValueError):  # the place has no such mode
            if self.has(name):
                return False
            self._fs.pipe_file(self._at(name), content)
        return True

    def below(self, name: str) -> RemoteFolder:
        """The folder of that name inside this one."""
        return RemoteFolder(f"{self.url}/{name}")

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
            with named_if_full(copy):
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
