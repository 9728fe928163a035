"""Every command answers wrong input with one line and exit code 2, and right input with its result."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_letters

import pytest
import torch

import workbench as wb
from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("models") / "tiny"
    tiny_hf().save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return str(where)


@pytest.mark.parametrize(
    "words",
    [
        "sites --model no-such-model",
        "check --model no-such-folder/",
        "tokens hello --model MODEL --bos maybe",
        "tokens hello --model MODEL --chat --template-option enable_thinking=false",
        "generate hello --model MODEL --chat --template-option enable_thinking",
        "capture hello --model MODEL --sites resid_pst.1",
        "capture hello --model MODEL --sites resid_post.99",
        "generate hello --model MODEL --temperature -1",
        "generate hello --model MODEL --top-p 0",
        "generate hello --model MODEL --intervention nowhere",
        "generate hello --model MODEL --dtype float61",
        "generate hello --model MODEL --no-such-option",
        "generate",
        "harvest --model MODEL --files no-such-file.txt --out OUT",
        "harvest --model MODEL --sites mlp_uot.1 --out OUT",
        "sae train no-such-store",
        "sae eval no-such-sae --store no-such-store",
        "features score no-such-sae",
        "steer no-such-sae",
        "shift --sae no-such-sae",
        "refusal --sae no-such-sae",
        "glitch scan no-such-model",
        "glitch scan MODEL --out s3://bucket/runs",
        "features show no-such-folder",
        "report no-such-run",
        "runs no-such-folder",
        "runs",
        "features cards no-such-sae",
        "features show latest",
        "glitch lint no-such-file --scan no-such-run",
        "glitch export latest",
        "glitch search MODEL --census latest",
        "demonstrate",
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(
    words: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([{"MODEL": folder, "OUT": str(tmp_path / "out")}.get(word, word) for word in words.split()])
    said = capsys.readouterr()
    assert code == 2, said
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1 and len(said.err) > 30
    assert "Traceback" not in said.err


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_model_commands_say_what_the_library_says(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", folder]
    assert run(["check", *model], capsys)["ok"]
    assert any(row["name"] == "resid_post.{layer}" for row in run(["sites", *model], capsys)["sites"])
    assert run(["tokens", "ab", *model], capsys)["tokens"] == ["a", "b"]
    assert len(run(["generate", "ab", *model, "--max-new-tokens", "3"], capsys)["ids"]) <= 3
    filters = ["--top-k", "90", "--top-p", "0.9", "--min-p", "0.001"]
    assert run(["generate", "ab", *model, *filters], capsys)["ended"] in ("length", "stop_token")
    assert run(["generate", "ab", *model, *filters, "--stop", *ascii_letters], capsys)["ended"] == "stop_string"
    saved = wb.Intervention.at("resid_post.1", wb.Add(torch.ones(16), 9.0)).save(tmp_path / "iv")
    steered = run(["generate", "ab", *model, "--intervention", str(saved), "--temperature", "0"], capsys)
    assert steered["text"] != steered["unedited"] and steered["edits"][0]["tokens"] >= 2
    done = run(["capture", "abc", *model, "--sites", "resid_post.1", "embed", "--out", str(tmp_path)], capsys)
    assert done["sites"]["embed"]["shape"] == [1, 3, 16]
    assert Path(done["file"]).is_file()
