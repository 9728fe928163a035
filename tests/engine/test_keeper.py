from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from workbench.core import locks
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, MissingFileError
from workbench.engine.job import Made
from workbench.engine.keeper import Keeper
from workbench.engine.local import LocalFolder

KEY = {"model": "abc", "layers": (1, 2)}


@dataclass(frozen=True)
class Point:
    x: float
    y: tuple[int, ...]


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield str(tmp_path / "kept") if request.param == "local" else "memory://kept/here"


def test_what_was_put_is_there_after_opening_again(place: str) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([1], dtype=torch.int8)}
    with Keeper.open(place, KEY) as keep:
        assert keep.done() == {} and not keep.has("one")
        made = Made(Point(0.1 + 0.2, (1, 2)), tensors, {"parquet": iter([b"ab", b"", b"c"])}, units=7)
        receipt = keep.put("one", made, seconds=1.5)
    with Keeper.open(place, {"layers": [1, 2], "model": "abc"}) as again:
        assert again.done() == {"one": receipt} and again.has("one")
        assert again.value("one", Point) == Point(0.1 + 0.2, (1, 2))
        assert all(torch.equal(again.tensors("one")[name], tensors[name]) for name in tensors)
        assert again.file("one", "parquet") == b"abc"
    assert (receipt.units, receipt.seconds, receipt.files["parquet"].bytes) == (7, 1.5, 3)
    assert receipt.made_by["threads"] == torch.get_num_threads()


def test_the_files_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    with Keeper.open(tmp_path, KEY) as keep:
        (keep.scratch("one") / "state").write_text("half")
        keep.put("one", Made(1, files={"txt": [b"abc"]}))
        keep.log("tried").append([{"token_id": 1}])
        assert json.loads((tmp_path / "key.json").read_text()) == {"key": {"model": "abc", "layers": [1, 2]}}
        files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    body = "parts/one.ba7816bf8f01cfea.txt"
    assert files == {".lock", "key.json", "parts/one.json", body, "logs/tried.jsonl"}


def test_another_key_is_refused_by_the_fields_that_differ(place: str) -> None:
    Keeper.open(place, KEY).close()
    with pytest.raises(MismatchError, match=r"\(layers: file \[1, 2\], now \[1\]; seed: file nothing, now 3\)"):
        Keeper.open(place, {"model": "abc", "layers": [1], "seed": 3})
    for given, now in (({**KEY, "seed": None}, KEY), (KEY, {**KEY, "seed": None})):
        place_of_none = f"{place}-{len(given)}"
        Keeper.open(place_of_none, given).close()
        with pytest.raises(MismatchError, match="seed: file (None, now nothing|nothing, now None)"):
            Keeper.open(place_of_none, now)
    Keeper.open(place, KEY).close()


def test_a_keeper_that_is_refused_or_damaged_is_left_to_other_processes(tmp_path: Path) -> None:
    Keeper.open(tmp_path, KEY).close()
    held = len(locks._held)
    with pytest.raises(MismatchError):
        Keeper.open(tmp_path, {})
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(CorruptFileError):
        Keeper.open(tmp_path, KEY)
    assert len(locks._held) == held


def test_a_key_may_hold_half_a_character(place: str) -> None:
    for _ in range(2):
        with Keeper.open(place, {"prompt": "a\udcff"}) as keep:
            assert keep.once("prompt", str, lambda: "b\udcff") == "b\udcff"


def test_keys_have_folders_of_their_own_where_asked(place: str) -> None:
    a, b = (Keeper.of_key(place, {"seed": seed}) for seed in (0, 1))
    a.put("one", Made("a"))
    assert not b.has("one") and Keeper.of_key(place, {"seed": 0}).value("one", str) == "a"
    a, b = (Keeper.of_key(place, key) for key in ({"seed": 0, "k": 1}, {"k": 1, "seed": 0}))
    assert a.where == b.where, "whatever the order of the fields"


def test_once_makes_a_part_once(place: str) -> None:
    with Keeper.open(place, KEY) as keep:
        assert keep.once("mean", Point, lambda: Point(0.5, ())) == Point(0.5, ())
        assert keep.once("mean", Point, lambda: Point(1 / 0, ())) == Point(0.5, ())
        assert keep.once("nothing", type(None), lambda: None) is None
        assert keep.once("nothing", type(None), lambda: 1 / 0) is None


def test_a_body_without_a_receipt_is_no_part(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Keeper.open(place, KEY) as keep:
        create = type(keep._parts).create
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(keep._parts), "create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            keep.put("one", Made(1, files={"txt": [b"abc"]}))
        assert create is type(keep._parts).create
        assert not keep.has("one") and keep.done() == {}
        assert len(keep._parts.names()) == 1, "the body was there before the receipt"
        keep.put("one", Made(1, files={"txt": [b"abcd"]}))
        assert keep.file("one", "txt") == b"abcd"


def test_the_first_of_two_different_parts_wins_and_the_second_is_noted(place: str) -> None:
    with Keeper.open(place, KEY) as keep:
        first = keep.put("one", Made(1, files={"txt": [b"first"]}))
        assert keep.put("one", Made(1, files={"txt": [b"first"]}), strict=True) == first
        assert keep._folder.below("twice").names() == []
        assert keep.put("one", Made(1, files={"txt": [b"other"]})) == first
        assert keep.put("one", Made(2, files={"txt": [b"first"]})) == first
        assert len(keep._folder.below("twice").names()) == 2
        with pytest.raises(MismatchError, match=r"'one'.* made twice, not the same.*threads"):
            keep.put("one", Made(1, files={"txt": [b"other"]}), strict=True)
        assert keep.file("one", "txt") == b"first" and len(keep._parts.names()) == 2


def test_of_many_writers_of_one_part_one_wins_and_no_file_is_torn(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def write(i: int) -> str:
        keep = Keeper.open(tmp_path, KEY, alone=False)
        start.wait()
        receipt = keep.put("one", Made(i, files={"bin": [bytes([i]) * 100_000]}))
        return receipt.files["bin"].sha256

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(write, range(8)))) == 1
    keep = Keeper.open(tmp_path, KEY, alone=False)
    assert keep.file("one", "bin") == bytes([keep.value("one", int)]) * 100_000
    assert len(list((tmp_path / "parts").iterdir())) == 2 and len(list((tmp_path / "twice").iterdir())) == 7


def test_damage_is_named(tmp_path: Path) -> None:
    with Keeper.open(tmp_path, KEY) as keep:
        keep.put("one", Made(1, {"a": torch.ones(2)}))
        body = next(file for file in (tmp_path / "parts").iterdir() if file.suffix == ".safetensors")
        body.write_bytes(body.read_bytes()[:-1] + b"\x01")
        with pytest.raises(CorruptFileError, match=r"not what was written.*Delete one\.json"):
            keep.tensors("one")
        body.unlink()
        with pytest.raises(CorruptFileError, match="missing"):
            keep.tensors("one")
        with pytest.raises(MissingFileError, match="Did you mean one"):
            keep.value("onee", int)
        with pytest.raises(MissingFileError, match="no parquet file"):
            keep.file("one", "parquet")
        (tmp_path / "parts" / "one.json").write_text("{")
        with pytest.raises(CorruptFileError, match=r"one\.json.*the part is made again"):
            keep.done()


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "..", "a.0123456789abcdef", "a b"])
def test_what_can_not_name_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with Keeper.open(tmp_path, KEY) as keep:
        for use in (lambda: keep.put(name, Made(1)), lambda: keep.once(name, int, lambda: 1), lambda: keep.log(name)):
            with pytest.raises(InvalidInputError, match="can't name a part"):
                use()


def test_a_part_may_be_called_like_the_body_of_another(tmp_path: Path) -> None:
    with Keeper.open(tmp_path, KEY) as keep:
        keep.put("one", Made(1, files={"json": [b"{}"]}))
        assert keep.done().keys() == {"one"} and keep.file("one", "json") == b"{}"


HOLDS = """
import sys
from pathlib import Path
from workbench.core.locks import lock_folder
print(int(lock_folder(Path(sys.argv[1]))), flush=True)
input()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(InvalidInputError, match="Another process is writing to"):
            Keeper.open(tmp_path, {"a": 1})
        Keeper.open(tmp_path, {"a": 1}, alone=False)
        other.kill()
        other.wait()
    others = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with Keeper.open(tmp_path, {"a": 1}) as first:
        inner = Keeper.open(tmp_path, {"a": 1})  # this process may open it twice
        for _ in range(2):
            inner.close()
        assert subprocess.run(others, input=b"\n", capture_output=True, check=True).stdout == b"0\n"
        first.close()
        assert subprocess.run(others, input=b"\n", capture_output=True, check=True).stdout == b"1\n"


def test_keepers_that_share_a_folder_have_scratch_of_their_own_and_dead_ones_is_removed(place: str) -> None:
    first, second = (Keeper.open(place, KEY, alone=False) for _ in range(2))
    mine, other, neighbour = first.scratch("one"), second.scratch("one"), second.scratch("one.b")
    assert len({mine, other, neighbour}) == 3 and first.scratch("one") == mine
    (other / "state").write_text("half")
    dead = other.with_name("one~00000000")
    dead.mkdir()
    for file in (".lock", "state"):
        (dead / file).touch()
    first.put("one", Made(1))
    assert not mine.exists() and not dead.exists()
    assert (other / "state").read_text() == "half" and neighbour.exists()
    second.put("one", Made(1))
    assert not other.exists() and neighbour.exists()


def test_a_disk_without_hard_links_still_refuses_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("workbench.engine.local.os.link", no_links)
    folder = LocalFolder(tmp_path)
    assert folder.create("a", b"1") and not folder.create("a", b"2")
    assert folder.read("a") == b"1" and folder.names() == ["a"]
