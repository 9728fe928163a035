"""`workbench circuit lens | patch | paths | attribution | heads`: a run folder with table, picture and report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest

from tests.circuits.test_transcoder_files import transcoder_set
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
    texts = [{"text": f"{'abcdefgh'[i % 8]} dog and {'xyz'[i % 3]} cat, {i}"} for i in range(24)]
    (where / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    return where


def in_folder(folder: Path, words: str) -> list[str]:
    places = {"PAIRS": "pairs.jsonl", "TEXTS": "texts.jsonl"}
    return [str(folder / places[word]) if word in places else word for word in words.split()]


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        ("patch --pairs PAIRS --sites resid_pre z.1", 3 * 5 + 2 * 5, "Activation patching"),
        ("patch --pairs PAIRS --sites mlp_out --align end", 3 * 5, "Effect of patching"),
        ("lens abcd --target x --k 2", 3 * 4 * 2, "What each layer would say"),
        ("lens --pairs PAIRS --k 2", 3 * 3 * 2, "Logit lens"),
        ("heads --repeated 20 --sequences 2 --tokens 40", 3 * 2 * 9, "Scores of heads"),
        ("paths --pairs PAIRS --senders z.*.h* mlp_out.0 --receivers logits q.2.h1", 7 + 5, "Path patching"),
        ("attribution --pairs PAIRS --by head --no-ablation", 3 * 4 + 2, "Direct logit attribution"),
        ("lens --pairs PAIRS --kind regression --fit TEXTS --k 2", 5 * 3 * 3 * 2, "Reading by the regression lens"),
        ("lenses --fit TEXTS --kinds jacobian tuned --held-out 4 --prompts 2 --steps 2 --per-text 3", 2 * 7,
         "Lenses on held-out text"),
    ],
)  # fmt: skip
def test_a_command_keeps_its_table_and_shows_a_picture(
    folder: Path, tmp_path: Path, words: str, rows: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = in_folder(folder, words)
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
        ("paths --pairs PAIRS --receivers logitz", "logitz"),
        ("attribution --pairs PAIRS --rows 0", "--rows 0"),
        ("lens abc --kind tuned", "neither given"),
        ("lens abc --fit TEXTS", "--kind logit reads"),
        ("lens abc --kind tuned --from no-such-folder", "holds no lens"),
        ("lens abc --kind tuned --fit TEXTS --estimate", "Give both"),
        ("lenses", "Give --fit"),
        ("lenses --fit TEXTS --held-out 30", "leaves too few"),
    ],
)
def test_wrong_input_is_one_line(
    folder: Path, tmp_path: Path, words: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = in_folder(folder, words)
    assert main(["circuit", *given, "--model", str(folder / "tiny"), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert error in said.err and len(said.err.strip().splitlines()) == 1 and "Traceback" not in said.err


def test_a_lens_is_fitted_once_and_read_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(folder / "tiny"), "--out", str(tmp_path), "--json"]
    own = in_folder(folder, "lens abc --kind jacobian --fit TEXTS --prompts 2 --sites resid_post.1")
    assert main(["circuit", *own, "--estimate", *common]) == 0
    assert json.loads(capsys.readouterr().out)["disk_bytes"] > 0 and not list(tmp_path.iterdir())
    assert main(["circuit", *own, *common]) == 0
    first = json.loads(capsys.readouterr().out)
    words = shlex.split(first["next"])
    assert words[:5] == ["workbench", "circuit", "lens", "abc", "--kind"] and "--from" in words
    assert main([*words[1:], "--out", str(tmp_path), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    tables = [pd.read_csv(Path(result["run"]) / "artifacts" / "table.csv") for result in (first, second)]
    own_lens = [table[table.lens == "jacobian"].reset_index(drop=True) for table in tables]
    pd.testing.assert_frame_equal(*own_lens)
    assert set(tables[0].lens) - set(tables[1].lens) == {"regression"}, "there is no text to fit it on"
    assert main(["circuit", "lens", "abc", "--kind", "tuned", *words[words.index("--from") :], *common]) == 2


def test_the_graph_of_a_prompt_is_kept_with_its_page_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["circuit", "graph", "--model", str(folder / "tiny"), "--out", str(tmp_path), "--json"]
    assert main([*words, "--pairs", str(folder / "pairs.jsonl"), "--features", "40", "--validate", "8"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("page", "graph", "nodes", "edges"):
        assert Path(result[name]).exists()
    nodes = pd.read_csv(result["nodes"])
    assert (nodes.kind == "feature").sum() == 40 and (nodes.kind == "logit").sum() == 1
    assert set(nodes[nodes.kind == "logit"].label) == {"x −y"}
    assert "Attribution graph" in (Path(result["run"]) / "report.html").read_text(encoding="utf-8")
    assert main([*words, "abc", "--pairs", "x.jsonl"]) == 2 and "one of them" in capsys.readouterr().err
    assert main([*words, "abc", "--budget-gb", "0.0001"]) != 0 and "above the budget" in capsys.readouterr().err
    (tmp_path / "coders").mkdir()
    for bases, says in ((tmp_path / "coders" / "gone", "no such folder"), ("nobody/nothing", "not in the local cache")):
        assert main([*words, "abc", "--bases", str(bases)]) == 2 and says in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([*words, "abc", "--bases", "coders/gone"]) == 2 and "no such folder" in capsys.readouterr().err


def test_the_graph_of_transcoders_in_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transcoder_set(tmp_path / "set", layers=(0, 2), activation="relu")
    words = ["circuit", "graph", "abc", "--model", str(folder / "tiny"), "--out", str(tmp_path), "--json"]
    assert main([*words, "--bases", str(tmp_path / "set"), "--features", "20", "--validate", "0", "--no-control"]) == 0
    nodes = pd.read_csv(json.loads(capsys.readouterr().out)["nodes"])
    assert set(nodes[nodes.kind == "feature"].site) == {"mlp_out.0", "mlp_out.2"}
