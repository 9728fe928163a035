"""What goes wrong on the way: full disks, little memory, NaN, damaged shards."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.activations.test_harvest import SITE, SMALL, _hashes, _rows, _source
from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.plan import estimate_harvest
from workbench.activations.sources import HubDataset, SelfText, Source, TextFiles, TokenRows
from workbench.activations.store import first_not_finite, open_store
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, MissingFileError, ResourceError
from workbench.core.locks import in_use
from workbench.engine import local as folder_module
from workbench.models.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@contextmanager
def _room_for(files: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk on which so many more files fit."""
    real, left = folder_module.write_parts, iter(range(files))

    def filling(path: Path, parts: Any) -> str:
        if next(left, None) is None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, parts)

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "write_parts", filling)
        yield


def test_too_little_disk_is_refused_with_the_estimate(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    need = 300 * (2 * 16 + 14)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage(need - 1))
    with pytest.raises(ResourceError, match=r"300 tokens.* of disk.*int8"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage(need))
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)


def test_too_little_memory_is_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1000, 2000))
    with pytest.raises(ResourceError, match=r"of memory.*shard_tokens"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)


def test_the_estimate_counts_bytes_and_measures_time(model: Model, tmp_path: Path) -> None:
    found = estimate_harvest(model, _source(), [SITE, "mlp_out.0"], tmp_path / "s", options=SMALL)
    assert found.tokens == 300
    assert found.disk_bytes == 300 * (2 * 32 + 14)
    small = HarvestOptions(shard_tokens=80, batch_tokens=40, dtype="int8")
    assert estimate_harvest(model, _source(), [SITE], tmp_path, options=small).disk_bytes == 300 * (16 + 2 + 14)
    assert found.seconds is not None and found.tokens_per_second is not None
    assert found.seconds == pytest.approx(300 / found.tokens_per_second)
    assert not (tmp_path / "s").exists()
    store = harvest(model, _source(), [SITE, "mlp_out.0"], tmp_path / "s", options=SMALL)
    on_disk = sum((tmp_path / "s" / shard.file).stat().st_size for shard in store.manifest.shards)
    headers = 1000 * len(store.manifest.shards)
    assert store.rows * (2 * 32 + 14) < on_disk < found.disk_bytes + headers


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_disk_that_fills_up_keeps_what_is_written_and_the_same_command_goes_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    options = HarvestOptions(shard_tokens=80, batch_tokens=40, dtype=dtype)
    with _room_for(2, monkeypatch), pytest.raises(ResourceError, match=r"shard-00001\.safetensors.*same command again"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=options)
    assert [file.name for file in sorted((tmp_path / "s").iterdir())] == ["manifest.json", "shard-00000.safetensors"]
    with _room_for(1, monkeypatch), pytest.raises(ResourceError, match=r"manifest\.json"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=options)
    harvest(model, _source(), [SITE], tmp_path / "s", options=options)
    harvest(model, _source(), [SITE], tmp_path / "whole", options=options)
    assert _hashes(tmp_path / "s") == _hashes(tmp_path / "whole")


class _Poisoned:
    """A source whose last row makes the model give NaN, through an embedding that is not a number."""

    def __init__(self, model: Model, row: int) -> None:
        ids = _rows().clone()
        ids[ids == 77] = 78
        ids[row, 4] = 77
        self.source = TokenRows(ids, batch_rows=4)
        with torch.no_grad():
            model.hf.get_input_embeddings().weight[77] = float("nan")


def test_nan_names_site_row_and_token_and_keeps_what_was_written(tmp_path: Path) -> None:
    poisoned = tiny_model()
    source = _Poisoned(poisoned, 21).source
    with pytest.raises(InvalidInputError, match=r"resid_pre.0 are not finite.*row 21 at position 4 \(token 77\)"):
        harvest(poisoned, source, ["resid_pre.0"], tmp_path / "s", options=SMALL)
    assert (tmp_path / "s" / "shard-00001.safetensors").is_file()
    assert not (tmp_path / "s" / "shard-00002.safetensors").is_file()


def test_the_first_row_that_is_not_finite() -> None:
    x = torch.full((5, 3), 3e38)
    assert first_not_finite(x) is None, "a sum that overflows is not a value that does"
    assert first_not_finite(x.bfloat16()) is None
    x[3, 1], x[4, 0] = float("-inf"), float("nan")
    assert first_not_finite(x) == 3
    assert first_not_finite(x.bfloat16()[4:]) == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_named_and_repaired_to_the_byte(model: Model, tmp_path: Path, damage: str) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    before = _hashes(tmp_path / "s")
    whole = (tmp_path / "s" / "shard-00000.safetensors").stat().st_mtime_ns
    _damage(tmp_path / "s" / "shard-00001.safetensors", damage)
    store = open_store(tmp_path / "s")
    error, words = (MissingFileError, "not on disk") if damage == "missing" else (CorruptFileError, "the manifest says")
    for read in (store.verify, lambda: list(store.read()), store.token_rows):
        with pytest.raises(error, match=rf"shard-00001.*{words}.*repair=True"):
            read()
    with pytest.raises(CorruptFileError, match=r"shard-00001\.safetensors is missing or damaged.*repair=True"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    store = harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL, repair=True)
    store.verify()
    assert _hashes(tmp_path / "s") == before
    assert (tmp_path / "s" / "shard-00000.safetensors").stat().st_mtime_ns == whole, (
        "only the damaged one is made again"
    )


def _damage(shard: Path, damage: str) -> None:
    raw = bytearray(shard.read_bytes())
    if damage == "truncated":
        del raw[-10:]
    raw[-1] ^= 1
    shard.write_bytes(raw)
    if damage == "missing":
        shard.unlink()


@pytest.mark.parametrize("kind", ["text", "own"])
def test_an_unfinished_harvest_is_repaired_and_finished(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "a.txt").write_text("some text of no interest " * 6, encoding="utf-8")
    source: Source = TextFiles(tmp_path / "a.txt", context=10, batch_rows=4)
    if kind == "own":
        source = SelfText(tokens=120, context=10, batch_size=4)
    options = HarvestOptions(shard_tokens=40, batch_tokens=40, dtype="int8")
    harvest(model, source, [SITE], tmp_path / "whole", options=options)
    with _room_for(4, monkeypatch), pytest.raises(ResourceError):
        harvest(model, source, [SITE], tmp_path / "s", options=options)
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
        _damage(tmp_path / "s" / name, "flipped")
    with pytest.raises(CorruptFileError, match=r"shard-00000\.safetensors, shard-00001\.safetensors are missing"):
        harvest(model, source, [SITE], tmp_path / "s", options=options)
    harvest(model, source, [SITE], tmp_path / "s", options=options, repair=True)
    assert _hashes(tmp_path / "s") == _hashes(tmp_path / "whole")


def test_a_repair_that_would_give_other_activations_is_refused(tmp_path: Path, model: Model) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    _damage(tmp_path / "s" / "shard-00001.safetensors", "flipped")
    damaged = _hashes(tmp_path / "s")
    other = tiny_model()
    fingerprint = other.fingerprint
    with torch.no_grad():
        other.hf.get_input_embeddings().weight += 0.5
    assert other.fingerprint == fingerprint, "as on another machine, the model is the same and its numbers are not"
    with pytest.raises(MismatchError, match=r"shard-00001.*differs"):
        harvest(other, _source(), [SITE], tmp_path / "s", options=SMALL, repair=True)
    assert _hashes(tmp_path / "s") == damaged


def test_manifests_that_are_damaged_or_too_new_are_named(model: Model, tmp_path: Path) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    file = tmp_path / "s" / "manifest.json"
    text = file.read_text("utf-8")
    for broken, words in (
        (text[:100], "not JSON"),
        (text.replace('"version": 2', '"version": 7'), "version 7"),
        (text.replace('"context": 10', '"context": "ten"'), "not a manifest"),
    ):
        file.write_text(broken, "utf-8")
        with pytest.raises(CorruptFileError, match=rf"manifest\.json.*{words}"):
            open_store(tmp_path / "s")


def test_hub_datasets_of_local_folders_take_part_in_resume(model: Model, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"text": "words that are the same"}\n' * 20, encoding="utf-8")
    source = HubDataset(str(tmp_path / "d"), tokens=300, context=10, batch_rows=4)
    store = harvest(model, source, [SITE], tmp_path / "s", options=SMALL)
    before = _hashes(tmp_path / "s")
    _damage(tmp_path / "s" / "shard-00002.safetensors", "missing")
    store = harvest(model, source, [SITE], tmp_path / "s", options=SMALL, repair=True)
    assert _hashes(tmp_path / "s") == before
    assert store.manifest.n_tokens == 300


def test_stores_of_version_1_are_read_and_not_gone_on_with(model: Model, tmp_path: Path) -> None:
    store = harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    file = tmp_path / "s" / "manifest.json"
    old = json.loads(file.read_text("utf-8")) | {"version": 1}
    for key in ("tokenizer_sha256", "packing", "sink_factor", "unique_rows"):
        del old[key]
    old["shards"] = [{k: v for k, v in shard.items() if k not in ("xxh3", "norm_sums")} for shard in old["shards"]]
    keys = ("d", "max_norm", "mean_norm", "median_norm", "std_norm")
    old["sites"] = {site: {key: stats[key] for key in keys} for site, stats in old["sites"].items()}
    file.write_text(json.dumps(old), "utf-8")
    found = harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    assert torch.equal(torch.cat(list(found.read())), torch.cat(list(store.read())))
    assert found.manifest.unique_share is None
    _damage(tmp_path / "s" / "shard-00001.safetensors", "flipped")
    with pytest.raises(CorruptFileError, match=r"shard-00001.*sha256"):
        list(open_store(tmp_path / "s").read())
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL, repair=True).verify()
    file.write_text(json.dumps(old | {"done": False}), "utf-8")
    with pytest.raises(MismatchError, match="version 1"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kept", 10**15),
        ("n_tokens", 0),
        ("held_out_every", 0),
        ("context", 0),
        ("shards", "twice"),
        ("first_row", 10**9),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    model: Model, tmp_path: Path, field: str, value: int | str
) -> None:
    harvest(model, _source(), [SITE], tmp_path, options=SMALL)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    if field == "shards":
        raw["shards"].append(raw["shards"][0])
    elif field == "first_row":
        raw["shards"][0]["first_row"] = value
    else:
        raw[field] = value
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CorruptFileError, match="contradicts itself"):
        open_store(tmp_path)


def test_a_harvest_that_another_process_is_making_is_refused(model: Model, tmp_path: Path) -> None:
    with in_use(tmp_path), pytest.raises(InvalidInputError, match="Another process"):
        harvest(model, _source(), [SITE], tmp_path, options=SMALL)
    harvest(model, _source(), [SITE], tmp_path, options=SMALL)


def test_a_store_that_another_process_finished_meanwhile_is_not_overwritten(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def late(path: Path, shared: bool = False) -> Iterator[None]:
        monkeypatch.undo()
        harvest(model, _source(), [SITE], path, options=SMALL)
        with in_use(path, shared):
            yield

    monkeypatch.setattr("workbench.activations.harvest.in_use", late)
    with pytest.raises(MismatchError, match="other"):
        harvest(model, TokenRows(_rows().flip(0)), [SITE], tmp_path, options=SMALL)
    store = open_store(tmp_path)
    store.verify()
    monkeypatch.setattr("workbench.activations.harvest.in_use", late)
    assert harvest(model, _source(), [SITE], tmp_path, options=SMALL).manifest == store.manifest


def test_a_folder_is_locked_from_the_first_look_at_it_and_for_repairs(model: Model, tmp_path: Path) -> None:
    class Watched(TokenRows):
        def batches(self, model: Any, start_row: int = 0) -> Any:
            with pytest.raises(InvalidInputError, match="Another process"), in_use(tmp_path / "s"):
                pass
            return super().batches(model, start_row)

    harvest(model, Watched(_rows(), batch_rows=4), [SITE], tmp_path / "s", options=SMALL)
    harvest(model, _source(), [SITE], tmp_path / "t", options=SMALL)
    with in_use(tmp_path / "t"):
        harvest(model, _source(), [SITE], tmp_path / "t", options=SMALL)  # only opened
        _damage(tmp_path / "t" / "shard-00001.safetensors", "flipped")
        with pytest.raises(InvalidInputError, match="Another process"):
            harvest(model, _source(), [SITE], tmp_path / "t", options=SMALL, repair=True)


def test_a_batch_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    for make in (
        lambda: TokenRows(_rows(), batch_rows=0),
        lambda: TextFiles(tmp_path / "a.txt", batch_rows=0),
        lambda: HubDataset("any", batch_rows=0),
    ):
        with pytest.raises(InvalidInputError, match="batch_rows=0"):
            make()


def test_the_next_shard_is_checked_while_one_is_in_use(model: Model, tmp_path: Path) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    store = open_store(tmp_path / "s")
    files = [shard.file for shard in store.manifest.shards]
    assert len(files) >= 3
    reading = store.read()
    next(reading)
    deadline = time.monotonic() + 10
    while files[1] not in store._verified and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store._verified == set(files[:2]), "one shard ahead, and no further"
    reading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("workbench-shards")]
    path = tmp_path / "s" / files[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    reading = open_store(tmp_path / "s").read()
    next(reading)
    with pytest.raises(CorruptFileError, match=files[1]):
        next(reading)
