"""The keeper of finished parts: what a stopped run does not make again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import GenericAlias, TracebackType, UnionType
from typing import TypeVar, cast

import torch
from torch import Tensor

from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, MissingFileError, did_you_mean
from workbench.core.jsontext import parse_json
from workbench.core.locks import lock_folder, refuse_folder_in_use, remove_dead, unlock_folder
from workbench.core.records import from_jsonable, to_jsonable
from workbench.engine.folder import open_folder
from workbench.engine.job import FileRecord, Made, Receipt
from workbench.engine.local import Folder, LocalFolder, Part, cache_dir, content_name
from workbench.engine.log import TOKEN, Log, require_same_key

T = TypeVar("T")

KEY_FILE = "key.json"
TENSORS = "safetensors"
DISTRIBUTIONS = ("interp-workbench", "torch", "transformers")
"""Whose version a receipt notes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BODY = re.compile(r"\.[0-9a-f]{16}$")


class Keeper:
    """Finished parts of one piece of work, each with a receipt; a part without a receipt does not exist.

    ```
    key.json                      what every part depends on
    parts/<name>.<sha16>.<ext>    contents, under their checksum
    parts/<name>.json             the receipt: written last, and only once
    scratch/<name>/               of a part that is being made; <name>~<token>/ where the keeper is shared
    logs/<name>.jsonl             rows of adaptive searches
    ```

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with Keeper.open(folder.name, {"model": "a"}) as keep:
    ...     keep.once("mean", float, lambda: 0.5)
    0.5
    >>> with Keeper.open(folder.name, {"model": "a"}) as keep:
    ...     keep.once("mean", float, lambda: 1 / 0)
    0.5
    >>> folder.cleanup()
    """

    def __init__(self, folder: Folder, key: Mapping[str, object], lock: contextlib.ExitStack | None = None) -> None:
        """Use `open` or `of_key`, which check the key and take the lock."""
        self.key = dict(key)
        self._folder, self._lock = folder, lock
        self._parts = folder.below("parts")
        self._own = "" if lock else f"~{secrets.token_hex(4)}"

    @classmethod
    def open(cls, where: str | Path, key: object, *, alone: bool = True) -> Keeper:
        """The keeper at a folder or an fsspec address; made if there is none.

        Args:
            where: path or address.
            key: all that results depend on, in any form that `to_jsonable` takes.
            alone: refuse a folder of this machine in which another process works; the lock of a killed one is free.
                Without, several processes may share the keeper: of two that make a part the first one wins.

        Raises:
            MismatchError: if it holds results of another key, with the fields that differ.
            InvalidInputError: if another process works there.
        """
        folder, plain = open_folder(where), _plain_key(key)
        is_locked = alone and isinstance(folder, LocalFolder)
        with contextlib.ExitStack() as lock:
            if isinstance(folder, LocalFolder) and is_locked:
                lock.enter_context(_locked(folder.path))
            if not folder.has(KEY_FILE):
                folder.create(KEY_FILE, _json_bytes({"key": plain}))
            kept = parse_json(folder.read(KEY_FILE), f"{folder.where}/{KEY_FILE}", dict).get("key", {})
            require_same_key(folder.where, kept, plain)
            return cls(folder, plain, lock.pop_all() if is_locked else None)

    @classmethod
    def of_key(cls, where: str | Path, key: object, *, alone: bool = False) -> Keeper:
        """The keeper in the folder of this key inside `where`; results of other keys stay in folders of their own."""
        text = json.dumps(to_jsonable(key), sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        inner = open_folder(where).below(name).where
        return cls.open(inner, key, alone=alone)

    def close(self) -> None:
        """Lets other processes in, once every keeper that this process has of the folder is closed."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def where(self) -> Path | str:
        """Path or address."""
        return self._folder.where

    def done(self) -> dict[str, Receipt]:
        """The receipts of all finished parts by name, in the order of names."""
        stems = [name.removesuffix(".json") for name in self._parts.names() if name.endswith(".json")]
        return {stem: self._receipt(stem) for stem in stems if not stem.startswith(".") and not _BODY.search(stem)}

    def has(self, name: str) -> bool:
        """Whether the part is finished."""
        return self._parts.has(f"{name}.json")

    def put(self, name: str, made: Made, *, strict: bool = False, seconds: float = 0.0) -> Receipt:
        """Keeps a part: its contents first, then its receipt. From here on a kill does not lose it.

        The first one wins. A second one with the same contents changes nothing; one with other contents is dropped and
        noted in `twice/`, for it shows that the work does not depend on the key alone.

        Args:
            name: of the part; a file name.
            made: what to keep.
            strict: raise instead of noting.
            seconds: that it took.

        Returns:
            The receipt that counts.

        Raises:
            MismatchError: with `strict`, if the part is there with other contents.
            InvalidInputError: if the name can't be that of a file.
        """
        _require_name(name)
        bodies = dict(made.files)
        if made.tensors:
            from safetensors.torch import save

            bodies[TENSORS] = [save({key: value.detach().cpu().contiguous() for key, value in made.tensors.items()})]
        files = {ending: self._write(name, ending, parts) for ending, parts in bodies.items()}
        receipt = Receipt(
            name=name, files=files, value=to_jsonable(made.value), units=made.units, seconds=seconds, made_by=_worker()
        )
        is_first = self._parts.create(f"{name}.json", _json_bytes(receipt))
        self._remove_scratch(name)
        return receipt if is_first else self._second(receipt, strict)

    def value(self, name: str, cls: type[T] | GenericAlias | UnionType) -> T:
        """The value of a part.

        Args:
            name: of the part.
            cls: its type, as `from_jsonable` takes it.

        Raises:
            MissingFileError: if there is no such part.
        """
        return cast("T", from_jsonable(cls, self._receipt(name).value))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part, on the CPU.

        Raises:
            MissingFileError: if there is no such part, or it has none.
            CorruptFileError: if they are not those that were kept.
        """
        from safetensors.torch import load

        return load(self.file(name, TENSORS))

    def file(self, name: str, which: str) -> bytes:
        """The content of a part's file, such as `which="parquet"`.

        Raises:
            MissingFileError: if there is no such part, or no such file of it.
            CorruptFileError: if it is not the one that was kept.
        """
        files = self._receipt(name).files
        if which not in files:
            raise MissingFileError(f"Part {name!r} in {self.where} has no {which} file. {did_you_mean(which, files)}")
        place, raw = content_name(name, files[which].sha256, which), None
        with contextlib.suppress(MissingFileError):
            raw = self._parts.read(place)
        if raw is None or hashlib.sha256(raw).hexdigest() != files[which].sha256:
            problem = "missing" if raw is None else "not what was written"
            raise CorruptFileError(
                f"{self._parts.where}/{place} is {problem}. Delete {name}.json beside it, and the part is made again."
            )
        return raw

    def once(self, name: str, cls: type[T] | GenericAlias | UnionType, make: Callable[[], T]) -> T:
        """The kept value of a part, or the one that `make` returns, which is kept.

        Args:
            name: of the part; a file name.
            cls: its type, as `from_jsonable` takes it.
            make: called when there is none.
        """
        _require_name(name)
        if self.has(name):
            return self.value(name, cls)
        made = make()
        self.put(name, Made(made))
        return made

    def log(self, name: str, row_id: str = TOKEN) -> Log:
        """An append-only file of rows with one writer, for searches that choose what to do next by what they found.

        Raises:
            InvalidInputError: at an address, where nothing can be appended.
        """
        _require_name(name)
        return Log(self._local("a log").path / "logs" / f"{name}.jsonl", self.key, row_id)

    def scratch(self, name: str) -> Path:
        """A folder of this machine for what a part needs while it is made; it is removed when the part is kept.

        A keeper that has its folder alone finds it again after a kill. One that shares its folder has scratch folders
        of its own, since another process may make the same part.
        """
        _require_name(name)
        folder = self._scratch_folder(name)
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            if self._lock is not None or lock_folder(folder):  # it may be taken for a dead one before it is locked
                return folder

    def _scratch_folder(self, name: str) -> Path:
        if isinstance(self._folder, LocalFolder):
            return self._folder.path / "scratch" / (name + self._own)
        place = hashlib.sha256(str(self.where).encode()).hexdigest()[:16]
        return cache_dir() / "scratch" / place / (name + self._own)

    def _remove_scratch(self, name: str) -> None:
        """Removes the part's scratch folder, and those of processes that died while they shared it."""
        folder = self._scratch_folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        unlock_folder(folder)
        for left in folder.parent.glob(f"{name}~*"):
            remove_dead(left)

    def _local(self, what: str) -> LocalFolder:
        if not isinstance(self._folder, LocalFolder):
            raise InvalidInputError(f"{self.where} is an address, and {what} is on this machine. Open a folder here.")
        return self._folder

    def _write(self, name: str, ending: str, parts: Iterable[Part]) -> FileRecord:
        import xxhash

        _require_name(ending)
        quick, size = xxhash.xxh3_128(), 0

        def counted() -> Iterator[Part]:
            nonlocal size
            for part in parts:
                quick.update(part)
                size += len(part)
                yield part

        _, sha256 = self._parts.write_by_content(name, ending, counted())
        return FileRecord(sha256, quick.hexdigest(), size)

    def _receipt(self, name: str) -> Receipt:
        try:
            raw = self._parts.read(f"{name}.json")
        except MissingFileError:
            known = (other.removesuffix(".json") for other in self._parts.names() if other.endswith(".json"))
            raise MissingFileError(f"{self.where} has no part {name!r}. {did_you_mean(name, known)}") from None
        remedy = "Delete it, and the part is made again."
        return from_jsonable(Receipt, parse_json(raw, f"{self._parts.where}/{name}.json", dict, remedy=remedy))

    def _second(self, receipt: Receipt, strict: bool) -> Receipt:
        """What to do with a part that is there already."""
        first = self._receipt(receipt.name)
        if receipt.same_content(first):
            return first
        for ending, record in receipt.files.items():
            if first.files.get(ending) != record:
                self._parts.remove(content_name(receipt.name, record.sha256, ending))
        if strict:
            raise MismatchError(
                f"Part {receipt.name!r} in {self.where} was made twice, not the same: first by {first.made_by}, now by "
                f"{receipt.made_by}. Use the same machine, threads and versions, or another folder."
            )
        self._folder.below("twice").create(f"{receipt.name}.{secrets.token_hex(4)}.json", _json_bytes(receipt))
        return first


_n_open: Counter[Path] = Counter()
"""Keepers of this process that have a folder alone."""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a folder against other processes, until the last block of this process ends."""
    path.mkdir(parents=True, exist_ok=True)
    folder = path.resolve()
    if not lock_folder(folder):
        raise refuse_folder_in_use(path)
    _n_open[folder] += 1
    try:
        yield
    finally:
        _n_open[folder] -= 1
        if not _n_open[folder]:
            unlock_folder(folder)


def _plain_key(key: object) -> dict[str, object]:
    plain = json.loads(json.dumps(to_jsonable(key)))
    return plain if isinstance(plain, dict) else {"key": plain}


def _json_bytes(value: object) -> bytes:
    text = json.dumps(to_jsonable(value), indent=1, ensure_ascii=False, allow_nan=False)
    # surrogates come from tokens that are half a character
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name) or _BODY.search(name):
        raise InvalidInputError(
            f"{name!r} can't name a part. Use letters, digits, '.', '_' and '-', beginning with a letter or digit, and "
            "no checksum at the end."
        )


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _worker() -> dict[str, object]:
    """Who makes a part."""
    return {
        "host": platform.node(), "pid": os.getpid(), "device": "cuda" if torch.cuda.is_initialized() else "cpu",
        "threads": torch.get_num_threads(), "versions": _versions(),
    }  # fmt: skip
