from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny import D_MODEL, tiny_model
from workbench.activations.store import open_store
from workbench.cli import main
from workbench.core.records import load_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model()
    model.hf.save_pretrained(str(tmp_path / "model"))
    model.tokenizer.save_pretrained(str(tmp_path / "model"))
    return tmp_path


def test_parquet_int8_estimate_and_repair_from_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [" ".join(f"{i} times {j}" for j in range(50)) for i in range(30)]
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), folder / "a.parquet")
    words = [
        "harvest", "--model", str(folder / "model"), "--files", str(folder / "*.parquet"), "--column", "body",
        "--tokens", "1600", "--context", "16", "--stored", "int8", "--out", str(folder / "acts"),
    ]  # fmt: skip
    assert main([*words, "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disk_bytes"] == 1600 * (D_MODEL + 2 + 14)
    assert found["seconds"] > 0 and not (folder / "acts").exists()
    assert main([*words, "--estimate"]) == 0
    assert "1600 tokens" in capsys.readouterr().out
    assert main(words) == 0
    assert "Kept" in capsys.readouterr().out
    shard = folder / "acts" / "shard-00000.safetensors"
    before = shard.read_bytes()
    shard.unlink()
    assert main(words) == 2
    assert "--repair" in capsys.readouterr().err
    assert main([*words, "--repair", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["dtype"], summary["tokens"], summary["unique_share"]) == ("int8", 1600, 1.0)
    assert shard.read_bytes() == before
    assert open_store(folder / "acts").sites == ("resid_post.1",)


def test_a_source_that_ends_early_and_another_number_of_tokens_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.txt").write_text(" ".join(f"{i} plus" for i in range(100)))
    words = [
        "harvest", "--model", str(folder / "model"), "--files", str(folder / "a.txt"), "--context", "16",
        "--out", str(folder / "acts"), "--tokens",
    ]  # fmt: skip
    assert main([*words, "64"]) == 0
    assert "ended" not in capsys.readouterr().out
    assert main([*words, "640000"]) == 2
    error = capsys.readouterr().err
    assert "source is {'tokens': 64}, asked for {'tokens': 640000}" in error, "only what differs"
    words[-2] = str(folder / "more")
    assert main([*words, "640000"]) == 0
    made = open_store(folder / "more").manifest.n_tokens
    assert f"ended after {made} of the 640000 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["manifest.json", "manifest-00000-of-00002.json"])
def test_a_harvest_is_continued_in_its_own_precision_whatever_the_machine_measures_now(
    folder: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.txt").write_text(" ".join(f"{i} plus" for i in range(100)))
    words = [
        "harvest", "--model", str(folder / "model"), "--files", str(folder / "a.txt"), "--context", "16",
        "--tokens", "64", "--out", str(folder / "acts"),
    ]  # fmt: skip
    if kept != "manifest.json":
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("workbench.models.loading._pick_device", lambda _: "cpu")
    for measured in (2.0, 0.5):
        monkeypatch.setattr("workbench.models.loading.bf16_speedup", lambda measured=measured: measured)
        assert main(words) == 0
    assert load_json(folder / "acts" / kept, dict)["model_dtype"] == "bfloat16"
    shutil.rmtree(folder / "acts")
    assert main(words) == 0
    assert load_json(folder / "acts" / kept, dict)["model_dtype"] == "float32", "a new one is measured"


@pytest.mark.parametrize("words", [["sae", "train", "STORE"], ["geometry"]])
def test_a_file_where_a_folder_should_come_is_refused(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "taken").write_text("precious")
    model = [] if "sae" in words else ["--model", str(folder / "model")]
    assert main([*words, *model, "--out", str(folder / "taken")]) == 2
    assert "taken is a file. Name another folder" in capsys.readouterr().err
    assert (folder / "taken").read_text() == "precious"
