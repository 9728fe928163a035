from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.activations.test_harvest import SITE, SMALL, _hashes, _source
from tests.tiny import tiny_model
from workbench.activations.harvest import harvest
from workbench.activations.store import open_store
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError, ResourceError
from workbench.core.locks import in_use
from workbench.engine.folder import check_writable, open_folder, require_local
from workbench.engine.local import LocalFolder
from workbench.engine.remote import RemoteFolder
from workbench.models.model import Model


class _Renaming(MemoryFileSystem):
    """A file system on which an upload can be seen half done, as over SFTP."""

    protocol = "renaming"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    moved: list[str] = []
    broken = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("renaming://"))

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **kwargs: Any) -> None:
        super().put_file(lpath, rpath, *args, **kwargs)
        if self.broken:
            raise OSError("connection lost")

    def mv(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        self.moved.append(path2)
        super().mv(path1, path2, *args, **kwargs)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("renaming", _Renaming, clobber=True)
    for system in (MemoryFileSystem, _Renaming):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    _Renaming.moved.clear()
    yield


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").iterdir())


@pytest.mark.parametrize("protocol", ["memory", "renaming"])
def test_a_store_at_an_address_equals_one_on_disk(model: Model, tmp_path: Path, protocol: str) -> None:
    url = f"{protocol}://bucket/acts"
    store = harvest(model, _source(), [SITE], url, options=SMALL)
    assert store.path == url and url in repr(store)
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    system = fsspec.filesystem(protocol)
    there = {name.rsplit("/", 1)[-1]: system.cat_file(name) for name in system.ls("/bucket/acts", detail=False)}
    assert {name: hashlib.sha256(raw).hexdigest() for name, raw in there.items()} == _hashes(tmp_path / "s")
    found = open_store(url)
    assert torch.equal(torch.cat(list(found.read())), torch.cat(list(open_store(tmp_path / "s").read())))
    assert torch.equal(found.token_rows("all"), store.token_rows("all"))


def test_only_where_a_half_upload_could_be_seen_is_it_renamed(model: Model) -> None:
    harvest(model, _source(), [SITE], "renaming://bucket/acts", options=SMALL)
    assert _Renaming.moved[0].endswith("shard-00000.safetensors") and _Renaming.moved[-1].endswith("manifest.json")
    folder = open_folder("renaming://bucket/acts")
    _Renaming.broken = True
    try:
        with pytest.raises(OSError, match="connection lost"):
            folder.write("manifest.json", [b"new"])
    finally:
        _Renaming.broken = False
    assert folder.read("manifest.json") != b"new"
    assert not [name for name in folder.names() if name.endswith(".tmp")]


def test_shards_are_fetched_once_and_a_damaged_copy_is_not_kept(model: Model, tmp_path: Path) -> None:
    url = "memory://bucket/acts"
    harvest(model, _source(), [SITE], url, options=SMALL)
    assert len(_copies(tmp_path)) == len(open_store(url).manifest.shards), "what was written need not be fetched"
    for copy in _copies(tmp_path):
        copy.unlink()
    store = open_store(url)
    store.block(0)
    assert len(_copies(tmp_path)) == 1
    fsspec.filesystem("memory").rm_file("/bucket/acts/shard-00000.safetensors")
    open_store(url).block(0)
    _copies(tmp_path)[0].write_bytes(b"rotten")
    with pytest.raises(CorruptFileError, match=r"memory://bucket/acts/shard-00000"):
        open_store(url).block(0)
    with pytest.raises(MissingFileError, match=r"memory://bucket/acts/shard-00000.*repair=True"):
        open_store(url).block(0)
    store = harvest(model, _source(), [SITE], url, options=SMALL, repair=True)
    store.verify()


def test_a_repair_looks_at_what_is_there_and_not_at_the_copies(model: Model) -> None:
    url = "memory://bucket/acts"
    harvest(model, _source(), [SITE], url, options=SMALL)
    fsspec.filesystem("memory").pipe_file("/bucket/acts/shard-00001.safetensors", b"rotten")
    with pytest.raises(CorruptFileError, match="shard-00001"):
        harvest(model, _source(), [SITE], url, options=SMALL)
    harvest(model, _source(), [SITE], url, options=SMALL, repair=True)
    assert len(fsspec.filesystem("memory").cat_file("/bucket/acts/shard-00001.safetensors")) > 100


def test_the_cache_forgets_what_was_not_used_for_longest(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = harvest(model, _source(), [SITE], "memory://bucket/acts", options=SMALL)
    size = max(copy.stat().st_size for copy in _copies(tmp_path))
    for copy in _copies(tmp_path):
        copy.unlink()
    monkeypatch.setenv("WORKBENCH_SHARD_CACHE_GB", str(2.5 * size / 1e9))
    blocks = list(store.read())
    assert {copy.stem for copy in _copies(tmp_path)} == {shard.sha256 for shard in store.manifest.shards[-2:]}
    assert all(torch.isfinite(block).all() for block in blocks), "what was read stays readable"


def test_addresses_paths_and_what_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_folder(f"file://{tmp_path}/a%20b").where == tmp_path / "a b"
    assert isinstance(open_folder("acts/x"), LocalFolder)
    assert isinstance(open_folder("odd:/name"), LocalFolder)
    lost = open_folder(Path("memory://bucket/acts"))
    assert isinstance(lost, RemoteFolder) and lost.where == "memory://bucket/acts"
    with pytest.raises(InvalidInputError, match=r"memroy://x.*memory"):
        open_folder("memroy://x")
    with pytest.raises(MissingFileError, match=r"memory://nothing"):
        open_store("memory://nothing")


def test_file_addresses_are_folders(model: Model, tmp_path: Path) -> None:
    store = harvest(model, _source(), [SITE], f"file://{tmp_path}/s", options=SMALL)
    assert store.path == tmp_path / "s"
    assert open_store(str(tmp_path / "s")).rows == open_store(f"file://{tmp_path}/s").rows == store.rows


def test_a_full_disk_while_uploading_names_the_address(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, parts: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("workbench.engine.remote.write_parts", full)
    with pytest.raises(ResourceError, match=r"memory://bucket/acts/shard-00000"):
        harvest(model, _source(), [SITE], "memory://bucket/acts", options=SMALL)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_folder_reads_writes_and_lists(tmp_path: Path, kind: str) -> None:
    folder = open_folder(tmp_path / "f" if kind == "local" else "memory://f")
    assert folder.names() == [] and not folder.has("a")
    assert folder.write("a", [b"01", memoryview(b"2345")]) == hashlib.sha256(b"012345").hexdigest()
    assert folder.read("a") == b"012345"
    assert folder.read("a", 2, 4) == b"23"
    assert folder.read("a", 4) == b"45"
    assert folder.write("a", [b"other"], expected="0" * 64) is None
    assert folder.read("a") == b"012345"
    folder.write("a", [b"new"])
    assert folder.read("a") == b"new" and folder.names() == ["a"]
    folder.remove("a")
    folder.remove("a")
    assert not folder.has("a")
    with pytest.raises(MissingFileError, match="a"):
        folder.read("a")


def test_what_is_in_the_way_of_a_folder_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInputError, match=r"file is a file\. Name another folder"):
            check_writable(open_folder(place))
    check_writable(open_folder(tmp_path / "new" / "below"))
    assert not (tmp_path / "new").exists()


def test_home_is_not_a_folder_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("~/acts").where == tmp_path / "acts"


def test_one_process_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    with in_use(tmp_path / "a"):
        for shared in (False, True):
            with pytest.raises(InvalidInputError, match="Another process is writing"), in_use(tmp_path / "a", shared):
                pass
        with in_use(tmp_path / "b", shared=True), in_use(tmp_path / "b", shared=True):
            pass
    with in_use(tmp_path / "a"):
        assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_made_for_a_lock_goes_with_it_if_nothing_was_written(tmp_path: Path) -> None:
    new, there = tmp_path / "new", tmp_path / "there"
    there.mkdir()
    with in_use(new), in_use(there):
        pass
    assert not new.exists() and there.exists()
    with in_use(there, temporary=True):
        pass
    assert not there.exists()
    with in_use(new):
        (new / "file").write_text("", encoding="utf-8")
    assert new.exists()
    with in_use(there, shared=True):
        with in_use(there, shared=True, temporary=True):
            pass
        assert there.exists(), "another process is still at work in it"


def test_a_lock_on_a_folder_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def late(path: Path, flags: int) -> int:
        monkeypatch.undo()
        handle = real(path, flags)
        path.rmdir()
        return handle

    monkeypatch.setattr("workbench.core.locks.os.open", late)
    with in_use(tmp_path / "a"):
        with pytest.raises(InvalidInputError, match="Another process"), in_use(tmp_path / "a"):
            pass


def test_an_address_of_an_unknown_kind_that_lost_a_slash_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ("foo://bucket/x", Path("foo://bucket/x")):
        with pytest.raises(InvalidInputError, match="foo"):
            open_folder(address)
    with pytest.raises(InvalidInputError, match="is an address"):
        require_local(Path("memory://x/y"))
    require_local(tmp_path / "a")
    Path("foo:").mkdir()
    assert isinstance(open_folder(Path("foo:/x")), LocalFolder), "a folder of that name is one"
