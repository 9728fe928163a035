from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.activations.test_harvest import SITE, SMALL, _hashes, _source
from tests.tiny import tiny_model
from workbench.activations.harvest import _Harvest, harvest
from workbench.activations.manifest import load_manifest
from workbench.activations.write_behind import write_behind
from workbench.engine import local as folder_module
from workbench.engine.folder import open_folder

PATIENCE = 20
"""Seconds until something that should have happened is given up."""


def test_the_next_is_made_while_one_is_written_and_never_two_are() -> None:
    made, writing, most = [threading.Event() for _ in range(4)], [0], [0]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    def write(written: tuple[int, ...], i: int) -> tuple[int, ...]:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        assert made[min(i + 1, 3)].wait(PATIENCE), "nothing was made meanwhile"
        writing[0] -= 1
        return (*written, i)

    assert write_behind(items(), write, ()) == (0, 1, 2, 3)
    assert most[0] == 1
    assert write_behind(iter(()), write, (7,)) == (7,)


def test_what_goes_wrong_while_writing_is_raised_and_nothing_is_written_after_it() -> None:
    tried = []

    def write(state: None, i: int) -> None:
        tried.append(i)
        if i == 1:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_behind(iter(range(5)), write, None)
    assert tried == [0, 1]


def test_an_interruption_lets_the_write_under_way_end() -> None:
    interrupted, done = threading.Event(), []

    def items() -> Iterator[int]:
        yield 0
        interrupted.set()
        raise KeyboardInterrupt

    def write(state: None, i: int) -> None:
        assert interrupted.wait(PATIENCE)
        done.append(i)

    with pytest.raises(KeyboardInterrupt):
        write_behind(items(), write, None)
    assert done == [0]


def test_an_error_of_writing_is_not_lost_behind_one_of_making() -> None:
    failed = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert failed.wait(PATIENCE)
        raise ValueError("not finite")

    def write(state: None, i: int) -> None:
        failed.set()
        raise OSError("full")

    with pytest.raises(ValueError, match="not finite") as error:
        write_behind(items(), write, None)
    assert error.value.__notes__ == ["Writing what was made before failed too: OSError('full')"]


@pytest.mark.parametrize("first", [KeyboardInterrupt, ValueError])
def test_a_second_ctrl_c_waits_for_the_write_under_way_too(first: type[BaseException]) -> None:
    main, waits, written = threading.main_thread(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        waits.set()
        raise first

    def write(state: None, i: int) -> None:
        assert waits.wait(PATIENCE)
        for _ in range(3):
            time.sleep(0.05)  # until the main thread waits; a signal wakes it
            signal.pthread_kill(main.ident or 0, signal.SIGINT)
        time.sleep(0.05)
        written.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_behind(items(), write, None)
        assert written.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_shard_is_not_overwritten_by_the_next_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest(tiny_model(), _source(), [SITE], tmp_path / "whole", options=SMALL)
    real_made, real_write, made = _Harvest._made, folder_module.write_parts, [threading.Event() for _ in range(5)]
    counting = iter(made)

    def noted(self: _Harvest, *args: Any) -> Any:
        found = real_made(self, *args)
        next(counting).set()
        return found

    def late(path: Path, parts: Any) -> str:
        if "shard-" in path.name:
            number = int(path.name.split("shard-")[1][:5])
            assert made[min(number + 1, 3)].wait(PATIENCE)
        return real_write(path, parts)

    monkeypatch.setattr(_Harvest, "_made", noted)
    monkeypatch.setattr(folder_module, "write_parts", late)
    harvest(tiny_model(), _source(), [SITE], tmp_path / "late", options=SMALL)
    assert sum(event.is_set() for event in made) == 4
    assert _hashes(tmp_path / "late") == _hashes(tmp_path / "whole")


def test_ctrl_c_keeps_every_shard_that_was_made(tmp_path: Path) -> None:
    model, forward = tiny_model(), iter(range(100))
    real = model.capture

    def capture(ids: torch.Tensor, sites: list[str], **named: bool) -> Any:
        if next(forward) == 5:  # the first look, two for each of two shards, and the first of the third
            raise KeyboardInterrupt
        return real(ids, sites, **named)

    object.__setattr__(model, "capture", capture)
    with pytest.raises(KeyboardInterrupt) as error:
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    assert "goes on from there" in error.value.__notes__[0]
    names = [shard.file for shard in load_manifest(open_folder(tmp_path / "s")).shards]
    assert names == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert not list((tmp_path / "s").glob(".*")), "nothing half-written is left"
    harvest(tiny_model(), _source(), [SITE], tmp_path / "s", options=SMALL)
    harvest(tiny_model(), _source(), [SITE], tmp_path / "whole", options=SMALL)
    assert _hashes(tmp_path / "s") == _hashes(tmp_path / "whole")
