"""`workbench shift` on tables of every kind: the same task as in Python, and one line for what can't be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import circuits
from circuits.cues.kinds import FirstNoun, FirstVerb, Length, Punctuation, Token
from circuits.cues.named import cue_named
from circuits.saes.folder import SAEIndex, SiteSAE
from circuits.shift.sources import read_task
from circuits.shift.task import ShiftTask
from experiments.shift import Shift
from experiments.shift_bios import ShiftBios
from experiments.shift_cues import ShiftCues
from experiments.shift_grid import CellResult, ShiftGrid
from experiments.shift_task import read_saes
from tests.circuits.planted import (
    LABEL,
    LABEL_FEATURES,
    SITE,
    SPURIOUS,
    SPURIOUS_FEATURES,
    planted_model,
    planted_sae,
    planted_task,
)
from workbench.cli import main, parse
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import InvalidInputError, UnknownNameError
from workbench.core.records import from_jsonable, load_json
from workbench.core.stats import wilson
from workbench.runs.run import RunDir
from workbench.saes.architectures.base import SAEWeights
from workbench.saes.formats.save import Encoder, Provenance, save_sae

COLUMNS = ["--text", "words", "--label", "kind", "--attribute", "letter", "--split", "part"]


def _table(n: int = 40, n_test: int = 32) -> pd.DataFrame:
    """The planted task as a table, its balanced rows under "dev"."""
    task = planted_task(n, n_test)
    assert task.balanced is not None
    letters = {None: "", **dict(enumerate(SPURIOUS))}
    rows = [
        {"words": f"{text} {part[-1]}", "kind": LABEL[y], "letter": letters[a], "part": part}
        for part, texts in (("train", task.train), ("dev", task.balanced), ("test", task.test))
        for text, (y, a) in zip(texts.texts, texts.groups, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its SAE, a folder of one SAE per site, and the table in each kind of file."""
    place = tmp_path_factory.mktemp("work")
    model, sae = planted_model(), planted_sae()
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if not parameter.any():
                parameter.normal_(0, 1e-3)  # a model whose blocks write nothing fails the check of what is loaded
    model.hf.save_pretrained(str(place / "model"))
    model.tokenizer.save_pretrained(str(place / "model"))
    weights = SAEWeights(
        sae.W_enc.T.contiguous(), torch.zeros(len(sae.W_dec)), sae.W_dec, sae.b_dec,
        threshold=torch.full((len(sae.W_dec),), 0.5),
    )  # fmt: skip
    origin = Provenance(
        model_name="m", model_fingerprint=model.fingerprint, site=SITE, context=10, keep=TokenPolicy(1e6, (0,)),
        training={"metrics": {}},
    )  # fmt: skip
    for name in ("sae", "saes/one"):
        save_sae(weights, Encoder(architecture="jumprelu"), place / name, origin)
    share = wilson(1, 2, unit="rows")
    entry = SiteSAE(site=SITE, folder="one", fvu=share, pca=share, l0=1.0, dead=0.0, n_tokens=2, seconds=1.0)
    SAEIndex(str(place / "model"), 0.5, (entry,)).save(place / "saes")
    table = _table()
    table.to_csv(place / "t.csv", index=False)
    table.to_csv(place / "t.tsv", index=False, sep="\t")
    table.to_parquet(place / "t.parquet")
    table.to_json(place / "t.jsonl", orient="records", lines=True)
    table.to_json(place / "t.ndjson", orient="records", lines=True)
    return place


def _made(workplace: Path, words: list[str]) -> ShiftTask:
    command = parse(Shift, [str(workplace / words[0]), *words[1:], "--sae", str(workplace / "sae")], "workbench shift")
    assert isinstance(command, Shift)
    return command.make_task(0, command.positive)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet"])
def test_every_kind_of_file_gives_the_task_of_the_table(workplace: Path, name: str) -> None:
    expected = ShiftTask.from_frame(_table(), text="words", label="kind", attribute="letter", split="part")
    made = _made(workplace, [name, *COLUMNS])
    assert made.name == name
    assert made.sets() == expected.sets() and made.label_names == expected.label_names
    renamed = _made(workplace, [name, *COLUMNS, "--classes", "T=teacher", "N=nurse", "--attributes", "M", "F"])
    assert renamed.label_names == ("teacher", "nurse") and renamed.spurious_names == ("M", "F")
    assert len(_made(workplace, [name, *COLUMNS[:4], "--limit", "30"]).train) < 30


def test_cues_are_built_in_at_the_strength_that_is_asked_for(workplace: Path) -> None:
    cues = ["--cue", "token:(c)", "punctuation:...", "--rho", "0.75", "--train-rows", "16", "--test-rows", "8"]
    made = _made(workplace, ["t.csv", "--text", "words", "--label", "kind", *cues])
    assert [name for name, _ in made.train.cues] == ["token (c)", "final ..."]
    assert len(made.train) == 16 and len(made.test) == 8
    for _, values in made.train.cues:
        assert sum(a == b for a, b in zip(values, made.train.label, strict=True)) == 12
    assert cue_named("token:(c)") == Token("(c)") and cue_named("punctuation:...") == Punctuation("...")
    assert cue_named("token-end:F") == Token("F", "end") and cue_named("token-end") == Token("©", "end")
    assert [cue_named(name) for name in ("length", "tense", "number")] == [Length(), FirstVerb(), FirstNoun()]
    with pytest.raises(UnknownNameError, match="length"):
        cue_named("lenght")
    with pytest.raises(InvalidInputError, match="token:"):
        cue_named("length:3")


def test_a_table_is_studied_and_the_folder_holds_its_report(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shift", str(workplace / "t.csv"), *COLUMNS, "--sae", str(workplace / "saes"), "--judge", "oracle"]
    small = ["--random-draws", "2", "--top-k", "6", "--dtype", "float32", "--out", str(tmp_path / "runs")]
    assert main([*words, *small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["next"].startswith("workbench report ") and Path(result["report"]).is_file()
    kept = json.loads((Path(result["run"]) / "artifacts" / "shift.json").read_text())
    spurious = {row["feature"] for row in kept["verdicts"] if row["decision"] == "spurious"}
    assert kept["task"] == "t.csv" and {f"{SITE}/{f}" for f in SPURIOUS_FEATURES} <= spurious
    assert not spurious & {f"{SITE}/{f}" for f in LABEL_FEATURES}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("none.csv --text words --label kind", "none.csv"),
        ("t.csv", "words, kind, letter, part"),
        ("t.csv --text word --label kind", "Did you mean words"),
        ("t.csv --text words --label kind --classes T", "one value"),
        ("t.csv --text words --label kind --classes T=t N", "Name all"),
        ("t.csv --text words --label kind --rho 0.9", "needs an attribute"),
        ("t.csv --text words --label kind --train-rows 8", "--train-rows"),
        ("t.csv --text words --label kind --cue smell", "cue 'smell'"),
        ("t.csv --text words --label kind", "judge of your own"),
        ("t.csv --text words --label kind --judge lexikon", "Did you mean lexicon"),
        ("t.csv --text words --label kind --judge oracle", "oracle judge can't decide"),
        ("t.csv --text words --label kind --spurious-words M F --target-words T N --methods ER", "Did you mean ERM"),
        ("model --text words --label kind", "can't be read"),
        ("sae/cfg.json --text words --label kind", "'.json'"),
        ("broken.parquet --text words --label kind", "broken.parquet"),
    ],
)
def test_a_bad_table_gets_one_line_and_nothing_is_written(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    (workplace / "broken.parquet").write_bytes(b"PAR1 no more")
    data, *others = words.split()
    saes = ["--sae", str(workplace / "saes"), "--out", str(tmp_path / "runs")]
    assert main(["shift", str(workplace / data), *others, *saes]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.iterdir())


def test_options_of_a_table_need_one(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saes = ["--sae", str(workplace / "saes"), "--out", str(tmp_path / "runs")]
    for words, said in ((["--label", "kind"], "--label is for a table"), (["--rho", "0.9"], "--rho")):
        assert main(["shift", *words, *saes]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidInputError, match="already"):
        read_saes((workplace / "sae", workplace / "saes"), tmp_path)
    assert list(read_saes((workplace / "sae",), tmp_path)) == [SITE]
    with pytest.raises(InvalidInputError, match="at least 1"):
        read_task(workplace / "t.csv", limit=0, text="words", label="kind")


def test_a_grid_of_studies_keeps_each_one_and_continues(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studied: list[str] = []
    original = circuits.shift

    def shift(*args: Any, **options: Any) -> Any:
        if len(studied) == 1:
            studied.append("stopped")
            raise KeyboardInterrupt
        studied.append(args[2].name)
        return original(*args, **options)

    monkeypatch.setattr(circuits, "shift", shift)
    command = ShiftCues(
        sae=(workplace / "sae",), cues=("token:F",), rhos=(0.75, 1.0), train_rows=16, test_rows=16,
        balanced_rows=16, methods=("standard",), random_draws=2, top_k=4, out=tmp_path, dtype="float32", json=True,
        judge="oracle", model=str(workplace / "model"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        command.run()
    (run,) = tmp_path.iterdir()
    assert not (run / "DONE").exists()
    command.run()
    assert studied == ["token F at 0.75", "stopped", "token F at 1"], "the first is not run again"
    assert (run / "DONE").exists() and list(tmp_path.iterdir()) == [run]
    page = (run / "report.html").read_text("utf-8")
    assert page.index("SHIFT on cues of known strength") < page.index("token F, rho 0.75")
    grid = from_jsonable(CellResult, load_json(run / "artifacts" / "cue0-rho1.json", dict))
    assert {row.cue for row in grid.reliance} == {"token F"} and grid.row("oracle probe") is not None
    assert "worst-group accuracy original" in grid.told()
    cells = [from_jsonable(CellResult, load_json(run / "artifacts" / f"cue0-rho{rho}.json", dict)) for rho in (0.75, 1)]
    headline = ShiftGrid(title="", about="", cells=tuple(cells)).headline()
    least = min(cells, key=lambda cell: cell.difference.low)
    assert (
        headline.difference == least.difference
        and headline.verdict != "not measured"
        and least.title in str(headline.measure)
    )
    assert "cue0-rho1" in RunDir.open(run).steps()
    with pytest.raises(InvalidInputError, match="no SAE at resid_post.9"):
        replace(_bios(workplace, tmp_path), sites=("resid_post.9",)).measure(lambda *_: RunDir.open(run))


def _bios(workplace: Path, out: Path) -> ShiftBios:
    return ShiftBios(sae=(workplace / "sae",), pairs=("chef/nurse",), train_rows=16, test_rows=16, out=out)


def test_the_studies_of_biographies_are_of_each_site_and_of_all(workplace: Path, tmp_path: Path) -> None:
    bios = replace(_bios(workplace, tmp_path), sites=("resid_post.1", "resid_post.2"), each=True)
    assert [cell.sites for cell in bios.cells()] == [("resid_post.1",), ("resid_post.2",), bios.sites]
    assert [cell.sites for cell in replace(bios, each=False).cells()] == [("resid_post.2",), bios.sites]
    assert [len(cell.task.train) for cell in bios.cells()] == [16] * 3
