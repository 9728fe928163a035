"""`workbench circuit lens | patch | heads`: a run folder with table, picture and report; wrong input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.cli import main

PAIRS = [
    {"clean_prefix": "a dog", "patch_prefix": "a cat", "clean_answer": "x", "patch_answer": "y"},
    {"clean_prefix": "b cat", "patch_prefix": "b dog", "clean_answer": "y", "patch_answer": "x"},
    {"clean_prefix": "c", "patch_prefix": "d", "clean_answer": "x", "patch_answer": "y"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("circuits")
    tiny_hf().save_pretrained(where / "tiny")
    tiny_tokenizer().save_pretrained(where / "tiny")
    (where / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    return where


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        ("patch --pairs PAIRS --sites resid_pre z.1", 3 * 5 + 2 * 5, "Activation patching"),
        ("patch --pairs PAIRS --sites mlp_out --align end", 3 * 5, "Effect of patching"),
        ("lens abcd --target x --k 2", 3 * 4 * 2, "What each layer would say"),
        ("lens --pairs PAIRS --k 2", 3 * 3 * 2, "Logit lens"),
        ("heads --repeated 20 --sequences 2 --tokens 40", 3 * 2 * 9, "Scores of heads"),
    ],
)
def test_a_command_keeps_its_table_and_shows_a_picture(
    folder: Path, tmp_path: Path, words: str, rows: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / "pairs.jsonl") if word == "PAIRS" else word for word in words.split()]
    assert main(["circuit", *given, "--model", str(folder / "tiny"), "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = Path(result["run"])
    assert (run / "DONE").exists() and len(pd.read_csv(run / "artifacts" / "table.csv")) == rows
    page = (run / "report.html").read_text(encoding="utf-8")
    assert said in page and 'class="heat"' in page and "class=warm" in page
    assert result["findings"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("patch", "neither given"),
        ("patch --pairs PAIRS --task sva_simple", "both given"),
        ("patch --pairs no-such-file.jsonl", "no-such-file"),
        ("patch --pairs PAIRS --sites mlp_uot", "mlp_uot"),
        ("patch --task no_such_task", "no_such_task"),
        ("patch --pairs PAIRS --by head", "--by"),
        ("lens", "Give a text"),
        ("lens abc --target xyz", "3 tokens"),
        ("lens abc --sites z", "z.0"),
        ("heads --repeated 1", "repeated=1"),
    ],
)
def test_wrong_input_is_one_line(
    folder: Path, tmp_path: Path, words: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / "pairs.jsonl") if word == "PAIRS" else word for word in words.split()]
    assert main(["circuit", *given, "--model", str(folder / "tiny"), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert error in said.err and len(said.err.strip().splitlines()) == 1 and "Traceback" not in said.err
