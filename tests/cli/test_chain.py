"""Each command prints the next one, and that one runs as it is printed: from a model to the page of its features."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from experiments.score_features import FeaturesScore
from experiments.steering_features import Steer
from tests.tiny import tiny_model
from workbench.cli import main
from workbench.cli.commands import CommandEntry, commands
from workbench.cli.places import sae_folder
from workbench.cli.saes import OneSAE, SAECommand
from workbench.core.errors import CorruptFileError, MissingFileError
from workbench.core.records import save_json
from workbench.features.scores.table import FeatureTable
from workbench.runs.run import RunDir
from workbench.saes.formats.load import CONFIG_FILE
from workbench.saes.home import SAEHome

SMALL = {
    "capture": ["--overwrite"],
    "harvest": ["--tokens", "600", "--context", "12"],
    "sae train": ["--k", "4", "--tokens", "800", "--batch", "100"],
    "sae eval": ["--rows", "4"],
    "features score": ["--max-tokens", "400"],
    "steer": ["--n-features", "1", "--n-prompts", "4", "--new-tokens", "2", "--strengths", "2", "--features", "3"],
    "features cards": ["--no-explain", "--features", "3", "17"],
}
"""What makes each command take a moment instead of minutes."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("work")
    model = tiny_model()
    model.hf.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    return place


def follow(line: str, capsys: pytest.CaptureFixture[str]) -> dict:
    """Runs a printed command, made small, and returns what it says."""
    name, *words = shlex.split(line)
    assert name == "workbench"
    length = 2 if " ".join(words[:2]) in (*SMALL, "features show") else 1
    code = main([*words, *SMALL.get(" ".join(words[:length]), []), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def test_the_printed_commands_lead_from_the_model_to_the_page(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    line, taken = "workbench check --model model", []
    while "serve" not in line:
        taken.append(" ".join(word for word in shlex.split(line)[1:3] if word.isalpha()))
        line = follow(line, capsys)["next"]
    assert taken == [
        "check", "sites", "capture", "harvest", "sae train", "sae eval", "features score", "steer sae",
        "features cards", "features show",
    ]  # fmt: skip
    assert line == "workbench serve --sae sae"
    home = SAEHome(Path("sae"))
    assert home.model == str((workplace / "model").resolve()), "the model is found without --model"
    assert home.store == Path("acts"), "so is the store"
    assert len(table := FeatureTable.load(home.table)) == 8 * 16
    (run,) = Path("runs").glob("*-features-score-*")
    table.df["output_score"] = 0.0
    table.save(home.table)  # as a later run does, with other options
    assert FeatureTable.load(run).df["output_score"].any(), "the run keeps the table that its report is about"
    assert (home.cards / "cards.parquet").is_file()
    assert Path("features.html").is_file()
    assert main(["runs"]) == 0
    listed = capsys.readouterr().out
    assert "    model sae=sae max_tokens=400" in listed, listed
    assert "    steering: " in listed
    assert listed.splitlines()[-1].startswith("Next: workbench report runs/")


def test_a_moved_sae_keeps_its_store_and_a_lost_store_is_said(tmp_path: Path) -> None:
    (tmp_path / "work" / "acts").mkdir(parents=True)
    (tmp_path / "work" / "sae").mkdir()
    SAEHome(tmp_path / "work" / "sae").note("embedded", tmp_path / "work" / "acts")
    (tmp_path / "work").rename(tmp_path / "moved")
    home = SAEHome(tmp_path / "moved" / "sae")
    assert home.require_store() == tmp_path / "moved" / "acts"
    (tmp_path / "moved" / "acts").rmdir()
    with pytest.raises(MissingFileError, match="no longer at .*--store"):
        home.require_store()
    with pytest.raises(MissingFileError, match="does not say"):
        SAEHome(tmp_path).require_store()
    home.note(None, "s3://bucket/acts")
    assert (home.model, home.store) == (None, "s3://bucket/acts")


@pytest.mark.parametrize(
    ("named", "model"), [("org/name", "org/name"), ("gpt2-small", None), ("/data/org/name", None), (3, None)]
)
def test_an_sae_from_elsewhere_names_its_model_if_that_is_an_id_of_the_hub(
    named: object, model: str | None, tmp_path: Path
) -> None:
    save_json(tmp_path / CONFIG_FILE, {"metadata": {"model_name": named}})
    assert SAEHome(tmp_path).model == model
    SAEHome(tmp_path).note("embedded", tmp_path)
    assert SAEHome(tmp_path).model == "embedded", "what training wrote down comes first"
    save_json(tmp_path / "home.json", {"store": 3})
    with pytest.raises(CorruptFileError, match="store is no text"):
        _ = SAEHome(tmp_path).model


def test_an_sae_is_found_in_a_run_by_its_name_or_as_the_latest(tmp_path: Path, run_with_sae: Path) -> None:
    root, name = run_with_sae.parent, run_with_sae.name
    for asked in (str(run_with_sae), name, name.rpartition("-")[2], "demo", "latest"):
        assert sae_folder(Path(asked), root) == run_with_sae / "artifacts" / "sae"
    for asked in ("dem", name[:-1], "steer"):
        with pytest.raises(MissingFileError, match=f"neither a folder {asked} nor .*(Did you mean|Known:) {name}"):
            sae_folder(Path(asked), root)
    with pytest.raises(MissingFileError, match="No run in .* holds an SAE"):
        sae_folder(Path("latest"), tmp_path)
    with RunDir.create("demo", {}, root) as another:
        (another.artifacts / "sae").mkdir()
    with pytest.raises(MissingFileError, match="name of 2 runs"):
        sae_folder(Path("demo"), root)
    assert Steer(sae=Path(name), out=root).sae_path() == run_with_sae / "artifacts" / "sae", (
        "a study looks in its --out"
    )
    assert sae_folder(Path("gpt2-small-res-jb/blocks.0"), root) == Path("gpt2-small-res-jb/blocks.0")
    assert sae_folder(tmp_path, root) == tmp_path


def _takes_an_sae(entry: CommandEntry) -> list[str]:
    """The words of a command for an SAE that does not exist; none if it takes no SAE."""
    more = {"glitch features": ["--tokens", "1"]}.get(entry.words, [])
    if not (issubclass(entry.load(), SAECommand) or entry.words == "features show"):
        return []
    has_option = entry.words != "features show" and not issubclass(entry.load(), OneSAE)
    return [*entry.words.split(), *(["--sae", "sae1"] if has_option else ["sae1"]), *more]


def test_every_command_says_that_an_sae_does_not_exist_and_which_do(
    tmp_path: Path, run_with_sae: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workbench.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    SAEHome(tmp_path / "sae").note("embedded", tmp_path / "acts")
    calls = [words for entry in commands().values() if (words := _takes_an_sae(entry))]
    assert len(calls) >= 10
    for words in calls:
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert "There is no SAE sae1: neither a folder sae1 nor a run in runs" in said, (words, said)
        assert "Did you mean sae?" in said and "`workbench sae train STORE` makes one" in said
    with pytest.raises(MissingFileError, match="There is no SAE none/such"):
        sae_folder(Path("none/such"))
    (run_with_sae / "artifacts" / "sae").rmdir()
    (tmp_path / "sae" / "home.json").unlink()
    with pytest.raises(MissingFileError, match="There is no SAE latest.*No run in runs holds an SAE"):
        sae_folder(Path("latest"))


@pytest.fixture
def run_with_sae(tmp_path: Path) -> Path:
    RunDir.create("steer", {}, tmp_path / "runs")
    with RunDir.create("demo", {}, tmp_path / "runs") as run:
        (run.artifacts / "sae").mkdir()
        return run.path


def test_a_table_of_an_sae_that_is_no_folder_needs_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="--table FOLDER"):
        FeaturesScore(sae=Path("gpt2-small-res-jb/blocks.8.hook_resid_pre")).measure(lambda _: None)
    assert not list(tmp_path.iterdir())
