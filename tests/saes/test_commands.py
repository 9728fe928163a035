from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import self_text_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.activations.store import open_store
from workbench.cli import main
from workbench.core.progress import Task, shown
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions
from workbench.saes.formats.load import load_sae

SMALL = self_text_sae.Options(
    tokens=1200, context=12, sae=SAEConfig(d_sae=48, k=4, tokens=2000, batch=100, kernel="csr"),
    evaluation=EvalOptions(max_rows=8), shares=(0.5,),
)  # fmt: skip


def test_the_study_goes_from_own_text_to_an_evaluated_sae(tmp_path: Path) -> None:
    report = self_text_sae.study(tiny_model(), "resid_post.1", tmp_path / "store", tmp_path / "sae", SMALL)
    assert [n for n, _ in report.curve] == [600, 1200]
    assert report.kept + sum(report.dropped.values()) == 1200
    assert report.steps[-1][1] == pytest.approx(report.curve[-1][1])
    section = report.section()
    assert {"fvu", "recovered_zero", "train_seconds", "train_fvu_heldout"} <= section.metrics.keys()
    assert any("1200" in finding for finding in section.findings)
    json.dumps(report.to_json())
    again = self_text_sae.study(tiny_model(), "resid_post.1", tmp_path / "store", tmp_path / "sae", SMALL)
    assert again == report
    assert len(replace(report, curve=report.curve[-1:]).section().blocks) == len(section.blocks) - 1


class Progress(Task):
    """Keeps what is said while something runs."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.titles: list[str] = []
        self.numbers: dict[str, float] = {}

    def start(self, description: str, total: int | None, unit: str) -> Task:
        self.titles.append(description)
        return self

    def say(self, line: str) -> None:
        self.said.append(line)

    def note(self, **numbers: float) -> None:
        self.numbers.update(numbers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_harvest_train_and_evaluate_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(folder / "model")]
    acts, sae = str(folder / "acts"), str(folder / "sae")
    sizes, steps = ["--tokens", "600", "--context", "12"], ["--k", "4", "--tokens", "800", "--batch", "100"]
    with shown(progress := Progress()):
        assert main(["harvest", *model, "--sites", "resid_post.1", *sizes, "--out", acts]) == 0
        assert "Kept" in capsys.readouterr().out
        assert main(["sae", "train", acts, "--out", sae, *steps, "--json"]) == 0
    (estimate,) = [line for line in progress.said if "on disk" in line]
    assert estimate.startswith("600 tokens, ") and "on disk" not in " ".join(progress.titles)
    assert "Harvesting resid_post.1" in progress.titles
    assert set(progress.numbers) == {"loss", "FVU"} and all(value > 0 for value in progress.numbers.values())
    assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"fvu", "l0", "dead", "steps", "seconds"}
    assert load_sae(sae).cfg.d_sae == 8 * D_MODEL
    runs = ["--out", str(folder / "runs")]
    assert main(["sae", "eval", sae, *model, "--store", acts, "--rows", "4", *runs, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["metrics"]["n_tokens"] > 0
    assert Path(out["report"]).is_file()
    text = folder / "text.txt"
    text.write_text("some text that is long enough for a row\n" * 40, encoding="utf-8")
    files = ["--files", str(text), "--context", "16", "--tokens", "320", "--out", str(folder / "other")]
    assert main(["harvest", *model, *files]) == 0
    assert open_store(folder / "other").sites == ("resid_post.1",), "the middle layer of three"


def test_wrong_input_gives_one_line_and_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(folder / "model")]
    cases = {
        "No activation store": ["sae", "train", str(folder / "nothing")],
        "holds no SAE": ["sae", "eval", str(folder), *model, "--texts", str(folder / "model" / "config.json")],
        "one of them": ["sae", "eval", str(folder), *model],
        "layer 7": ["harvest", *model, "--sites", "resid_post.7", "--out", str(folder / "x")],
        "Choose one": ["harvest", *model, "--files", "a.txt", "--dataset", "b"],
        "no file": ["harvest", *model, "--files", str(folder / "a.txt")],
    }
    for message, words in cases.items():
        assert main(words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
