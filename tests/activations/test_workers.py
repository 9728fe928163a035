"""Several processes that fill one store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.activations.test_harvest import SITE, SMALL, _hashes, _rows, _source
from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.packing import Source
from workbench.activations.sources import TextFiles, TokenRows
from workbench.activations.store import open_store
from workbench.core.errors import InvalidInputError, MismatchError, MissingFileError
from workbench.models.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _text(folder: Path) -> TextFiles:
    (folder / "a.txt").write_text("some text of no interest " * 14, encoding="utf-8")
    return TextFiles(folder / "a.txt", context=10, batch_rows=4)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["rows", "text"])
@pytest.mark.parametrize("world", [2, 3, 9])
def test_the_store_is_that_of_one_process_whatever_the_order(
    model: Model, tmp_path: Path, dtype: str, kind: str, world: int
) -> None:
    source: Source = _source() if kind == "rows" else _text(tmp_path)
    options = replace(SMALL, dtype=dtype)
    whole = harvest(model, source, [SITE], tmp_path / "whole", options=options)
    parts = []
    for rank in reversed(range(world)):
        with pytest.raises(MissingFileError):
            open_store(tmp_path / "s")
        parts.append(harvest(model, source, [SITE], tmp_path / "s", options=replace(options, rank=rank, world=world)))
    assert [part.manifest.done for part in parts] == [False] * (world - 1) + [True]
    assert parts[-1].rows == whole.rows > sum(part.rows for part in parts[:-1]) > 0
    assert _hashes(tmp_path / "s") == _hashes(tmp_path / "whole"), "nothing is left of the parts"


def test_a_rank_in_the_environment_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert HarvestOptions().place == (2, 3)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(InvalidInputError, match="RANK is 'x'"):
        HarvestOptions().place  # noqa: B018


def test_each_process_makes_its_own_shards_and_a_finished_one_makes_none(model: Model, tmp_path: Path) -> None:
    options = replace(SMALL, rank=1, world=2)
    part = harvest(model, _source(), [SITE], tmp_path / "s", options=options)
    assert [shard.file[6:11] for shard in part.manifest.shards] == ["00001", "00003"]
    before = _hashes(tmp_path / "s")
    twin = tiny_model()
    twin.hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    assert not harvest(twin, _source(), [SITE], tmp_path / "s", options=options).manifest.done
    assert _hashes(tmp_path / "s") == before
    harvest(model, _source(), [SITE], tmp_path / "s", options=replace(options, rank=0))
    assert harvest(twin, _source(), [SITE], tmp_path / "s", options=options).manifest.done


def test_a_rank_has_one_process_and_the_others_may_work_beside_it(model: Model, tmp_path: Path) -> None:
    class Watched(TokenRows):
        def batches(self, model: Any, start_row: int = 0) -> Any:
            if start_row:
                return super().batches(model, start_row)
            again, other = (replace(SMALL, rank=rank, world=2) for rank in (0, 1))
            with pytest.raises(InvalidInputError, match=r"Another process .*rank-0-of-2"):
                harvest(model, _source(), [SITE], tmp_path / "s", options=again)
            harvest(model, _source(), [SITE], tmp_path / "s", options=other)
            return super().batches(model, start_row)

    source = Watched(_rows(), batch_rows=4)
    store = harvest(model, source, [SITE], tmp_path / "s", options=replace(SMALL, rank=0, world=2))
    assert store.manifest.done
    harvest(model, _source(), [SITE], tmp_path / "whole", options=SMALL)
    assert _hashes(tmp_path / "s") == _hashes(tmp_path / "whole"), "no lock is left"


def test_the_environment_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert HarvestOptions().place == (2, 4)
    assert HarvestOptions(rank=0, world=1).place == (0, 1)
    with pytest.raises(InvalidInputError, match="rank 4 of 4"):
        HarvestOptions(rank=4)


def test_parts_that_do_not_belong_together_are_refused(model: Model, tmp_path: Path) -> None:
    def part(rank: int, source: Any) -> None:
        harvest(model, source, [SITE], tmp_path / "s", options=replace(SMALL, rank=rank, world=2))

    part(0, _source())
    with pytest.raises(MismatchError, match="manifest-00001-of-00002"):
        part(1, TokenRows(_rows().flip(0), batch_rows=4))
    for other in (1, 3):
        with pytest.raises(MismatchError, match="of 2 processes"):
            harvest(model, _source(), [SITE], tmp_path / "s", options=replace(SMALL, rank=0, world=other))
    with pytest.raises(MismatchError, match="one process"):
        unfinished = replace(open_part(tmp_path / "s"), done=False)
        unfinished.save(_folder(tmp_path / "s"))
        part(0, _source())


def _folder(path: Path) -> Any:
    from workbench.engine.folder import open_folder

    return open_folder(path)


def open_part(path: Path) -> Any:
    from workbench.activations.manifest import load_manifest

    return load_manifest(_folder(path), "manifest-00000-of-00002.json")
