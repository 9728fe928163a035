"""Any arguments and any damage to files: exit code 0 or 2, one line on stderr, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import D_MODEL, tiny_hf, tiny_tokenizer
from workbench import cli
from workbench.activations.harvest import harvest
from workbench.activations.sources import TokenRows
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.models.loading import load_model
from workbench.report.base import Section
from workbench.runs.run import RunDir
from workbench.saes.config import SAEConfig
from workbench.saes.training.train import train_sae

FEW = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SAE_OF = ["--d-sae", "16", "--k", "2", "--tokens", "64", "--batch", "32"]
READERS: dict[str, list[list[str]]] = {
    "edit/intervention.json": [["generate", "Hi", "--model", "m", "--max-new-tokens", "1", "--intervention", "edit"]],
    "edit/tensors.safetensors": [["generate", "Hi", "--model", "m", "--max-new-tokens", "1", "--intervention", "edit"]],
    "runs/one/env.json": [["runs"], ["report"]],
    "runs/one/result.json": [["runs"]],
    "runs/one/steps/a.json": [["report"]],
    "acts/manifest.json": [["sae", "train", "acts", *SAE_OF]],
    "acts/shard-00000.safetensors": [["sae", "train", "acts", *SAE_OF]],
    "sae/cfg.json": [["sae", "eval", "sae", "--model", "m", "--store", "acts", "--rows", "2"]],
    "sae/sae_weights.safetensors": [["sae", "eval", "sae", "--model", "m", "--store", "acts", "--rows", "2"]],
    "texts.jsonl": [
        ["harvest", "--model", "m", "--files", "texts.jsonl", "--tokens", "64", "--context", "8", "--out", "n"]
    ],
    "prompts.json": [["glitch", "scan", "m", "--prompts", "prompts.json"]],
    "scan.json": [["glitch", "export", "scan.json"]],
}
"""Files, and commands that read them."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each kind, which commands can use as it is."""
    root = tmp_path_factory.mktemp("fuzz") / "whole"
    tiny_hf().save_pretrained(root / "m")
    tiny_tokenizer().save_pretrained(root / "m")
    Intervention.at("resid_post.0", Add(torch.ones(D_MODEL))).save(root / "edit")
    run = RunDir.create("one", {"seed": 0}, root / "made")
    run.save_step("a", Section("A", (), ("Found.",), {"x": 1.5}))
    run.finish()
    shutil.rmtree(run.path / "wandb", ignore_errors=True)  # its links lead to where the run was
    shutil.move(run.path, root / "runs" / "one")
    rows = torch.randint(2, 200, (48, 8), generator=torch.Generator().manual_seed(0))
    store = harvest(load_model(root / "m", check=False), TokenRows(rows), sites=["resid_post.1"], out=root / "acts")
    train_sae(store, SAEConfig(d_sae=16, k=2, tokens=64, batch=32), root / "sae")
    (root / "texts.jsonl").write_text('{"text": "Hello there, said the cat."}\n' * 20)
    probe = {"name": "a", "preamble": "Say it.", "shown": "\nIn: {token}\nOut:", "answer": " {token}", "shots": 1}
    (root / "prompts.json").write_text(json.dumps([probe]))
    (root / "scan.json").write_text(json.dumps({"model": "m", "candidates": [], "tokenizer": {}}))
    shutil.rmtree(root / "made")
    return root


@pytest.fixture
def here(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def call(words: list[str]) -> int:
    """Runs a command; a traceback, another exit code and more than one line are failures."""
    out, err = io.StringIO(), io.StringIO()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    assert code in (0, 2), (words, err.getvalue())
    if code == 2:
        said = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and len(said[0]) < 4000, (words, err.getvalue())
        made = {str(path) for path in Path().rglob("*") if path not in before}
        assert not made, (words, made, said)
    return code


def renew(whole: Path) -> None:
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(whole, Path(), dirs_exist_ok=True)


def test_whole_files_are_read(whole: Path, here: Path) -> None:
    for file, commands in READERS.items():
        renew(whole)
        shutil.rmtree("sae") if "train" in commands[0] else None
        assert [call(words) for words in commands] == [2 if file == "scan.json" else 0] * len(commands), file


_scalars = st.sampled_from([None, True, -1, 2**62, 1e300, "", "x", "../x", "a\0", "\ud800", [], {}, [[1]], {"a": 1}])
_texts = st.sampled_from(["", "{", "[]", "null", "[" * 9000, '{"a":' * 999, "9" * 5000, "[NaN]", '{"a":1,"a":1}', "\0"])
_bytes = st.binary(max_size=64) | st.just(b"\xff\xfe") | st.just(b"PAR1") | st.just(b"\x80" + b"\0" * 40)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Any]:
    """A file, and what is done to it: other bytes, or another value somewhere in its JSON."""
    file = draw(st.sampled_from(sorted(READERS)))
    kinds = [_bytes.map(lambda raw: ("bytes", raw)), st.integers(0, 4000).map(lambda n: ("cut", n))]
    if not file.endswith(".safetensors"):
        kinds += [_texts.map(lambda text: ("bytes", text.encode()))]
        kinds += [st.tuples(st.just("value"), st.integers(0, 200), _scalars)] * 3
    return file, draw(st.one_of(kinds))


def _damage(file: Path, what: tuple[Any, ...]) -> None:
    raw = file.read_bytes()
    if what[0] == "bytes":
        file.write_bytes(what[1])
    elif what[0] == "cut":
        file.write_bytes(raw[: what[1] % len(raw)])
    else:
        value = json.loads(raw.split(b"\n")[0] if file.suffix == ".jsonl" else raw)
        places = list(_places(value))
        holder, key = places[what[1] % len(places)]
        holder[key] = what[2]
        file.write_text(json.dumps(value), encoding="utf-8")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@FEW
@given(damage=damages())
def test_damaged_files_are_refused_or_read(whole: Path, here: Path, damage: tuple[str, Any]) -> None:
    file, what = damage
    renew(whole)
    _damage(Path(file), what)
    for words in READERS[file]:
        call([*words, "--out", "new"] if "train" in words else words)


_COMMANDS = (
    ["generate", "Hi", "--model", "m"], ["tokens", "Hi", "--model", "m"], ["capture", "Hi", "--model", "m"],
    ["harvest", "--model", "m"], ["sae", "train", "acts"], ["sae", "eval", "sae", "--model", "m", "--store", "acts"],
    ["features", "score", "sae", "--model", "m"], ["features", "show", "m"], ["glitch", "scan", "m"],
    ["glitch", "lint", "texts.jsonl", "--model", "m"], ["glitch", "export", "scan.json"], ["glitch", "census", "m"],
    ["demo", "--model", "m"], ["runs"], ["report"], ["steer", "sae", "--model", "m"], ["refusal", "--model", "m"],
)  # fmt: skip
_OPTIONS = (
    "--seed", "--tokens", "--context", "--k", "--layer", "--out", "--batch-size", "--device", "--dtype", "--sites",
    "--temperature", "--max-new-tokens", "--store", "--top", "--rows", "--limit", "--model", "--strength", "--d-sae",
)  # fmt: skip
_VALUES = (
    "-1", str(2**70), "9" * 400, "1.5", "nan", "-inf", "1e999", "", "x", "cuda:99", "float7", "s3://bucket/x", "texts.jsonl/x",
    "/proc/x", "nothing", "\udcff", "a\0b", "resid_post.99", "z.0.h99", "m",
)  # fmt: skip


@FEW
@given(
    words=st.sampled_from(_COMMANDS),
    options=st.lists(st.tuples(st.sampled_from(_OPTIONS), st.sampled_from(_VALUES)), min_size=1, max_size=2),
)
def test_wrong_options_are_refused_before_any_work(
    whole: Path, here: Path, words: list[str], options: list[tuple[str, str]]
) -> None:
    if not os.listdir():
        renew(whole)
    # "nothing" names no file; a command that can do without the option would only do its work
    wrong = [*(word for option in options for word in option), "--seed", "-7"]
    assert call([*words, *wrong]) == 2
