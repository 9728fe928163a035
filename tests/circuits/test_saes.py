"""One SAE per site: the same as trained alone, measured beside PCA and a limit, found again by `circuits.bases`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch

import circuits
from circuits.saes import training
from circuits.saes.folder import INDEX_FILE
from circuits.saes.report import TrainedSAEs
from experiments.circuit_saes import CircuitSAEs
from tests.saes.stores import assert_same_tensors, before_step, ctrl_c
from tests.tiny import tiny_model
from workbench.activations.sources import TokenRows
from workbench.activations.store import open_store
from workbench.cli import main
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ResourceError,
    UnknownSiteError,
)
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import load_sae
from workbench.saes.training.train import train_sae

SITES = ("attn_out.1", "resid_post.1", "resid_post.2")
OPTIONS = circuits.SAETrainingOptions(
    sae=SAEConfig(tokens=2000, batch=100, k=4, buffer=500, kernel="csr"), expansion=4, max_fvu=0.3
)


def _source() -> TokenRows:
    return TokenRows(torch.randint(2, 200, (100, 12), generator=torch.Generator().manual_seed(0)))


def _trained(folder: Path, options: circuits.SAETrainingOptions = OPTIONS) -> TrainedSAEs:
    return circuits.train_saes(
        tiny_model(), ["resid_post.2", "resid_post.1", "attn_out.1"], folder, source=_source(), options=options
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedSAEs:
    return _trained(tmp_path_factory.mktemp("saes"))


def test_there_is_one_sae_per_site_as_if_it_were_trained_alone(trained: TrainedSAEs, tmp_path: Path) -> None:
    assert tuple(sae.site for sae in trained.saes) == SITES, "in the order of a forward pass"
    store = open_store(trained.folder / "store")
    assert set(store.sites) == set(SITES)
    alone = train_sae(store, OPTIONS.config(tiny_model(), SITES[1]), tmp_path / "alone")
    assert_same_tensors(trained.folder / trained.saes[1].folder, alone.path)


def test_what_each_leaves_out_is_measured_on_held_out_rows(trained: TrainedSAEs) -> None:
    store, sae = open_store(trained.folder / "store"), load_sae(trained.folder / trained.saes[2].folder)
    x, train = (torch.cat(list(store.read(SITES[2], split))).float() for split in ("heldout", "train"))
    total = (x - x.mean(0)).pow(2).sum()
    with torch.no_grad():
        acts = sae.encode(x)
        error = (x - sae.decode(acts)).pow(2).sum()
    found = trained.saes[2]
    assert found.fvu.value == pytest.approx(float(error / total), rel=1e-4) and found.n_tokens == len(x)
    assert found.fvu.low < found.fvu.value < found.fvu.high and found.fvu.n == 10 and found.fvu.unit == "rows"
    assert found.l0 == pytest.approx(float((acts > 0).sum() / len(x))) and 3.5 < found.l0 <= 4
    mean = train.mean(0)
    directions = torch.linalg.svd(train - mean, full_matrices=False).Vh[:4]
    left = (x - mean) - (x - mean) @ directions.T @ directions
    assert found.pca.value == pytest.approx(float(left.pow(2).sum() / total), rel=1e-3)


def test_sites_that_are_not_below_the_limit_are_named(trained: TrainedSAEs, tmp_path: Path) -> None:
    by_fvu = sorted(trained.saes, key=lambda sae: sae.fvu.value)
    between = (by_fvu[0].fvu.high + by_fvu[-1].fvu.high) / 2
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    strict, mild = (
        _trained(folder, circuits.SAETrainingOptions(sae=OPTIONS.sae, expansion=4, max_fvu=limit))
        for limit in (between, 0.99)
    )
    assert by_fvu[-1].site in strict.above and by_fvu[0].site not in strict.above
    assert strict.headline().verdict == "fails" and "picture of the errors" in strict.headline().sentence
    assert strict.headline().value == max(trained.saes, key=lambda sae: sae.fvu.high).fvu
    assert any(by_fvu[-1].site in said and "Not below the limit" in said for said in strict.findings())
    assert mild.above == () and mild.headline().verdict == "works"
    assert strict.saes == mild.saes == trained.saes, "nothing is trained or measured again"
    named = [row["site"] for row in strict.frame().to_dict("records") if row["is_above_limit"]]
    assert named == list(strict.above) and strict.section().metrics["sites_above_limit"] == len(named)


def test_several_passes_give_the_same_saes(
    trained: TrainedSAEs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[list[str]] = []
    real = training.train_together

    def noted(store: object, configs: list[SAEConfig], out: Path) -> object:
        groups.append([str(config.site) for config in configs])
        return real(store, configs, out)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(training, "train_together", noted)
    monkeypatch.setattr(training, "MEMORY_SHARE", 0.0)
    again = _trained(tmp_path / "saes")
    assert groups == [[site] for site in SITES]
    for one, other in zip(trained.saes, again.saes, strict=True):
        assert (one.site, one.folder, one.fvu) == (other.site, other.folder, other.fvu)
        assert_same_tensors(trained.folder / one.folder, again.folder / other.folder)


def test_a_stopped_call_continues_and_makes_no_sae_twice(
    trained: TrainedSAEs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MEMORY_SHARE", 0.0)
    folders = [sae.folder for sae in trained.saes]
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        before_step(7, ctrl_c, stopping, folders[1])
        _trained(tmp_path / "saes")
    assert not (tmp_path / "saes" / INDEX_FILE).exists()
    steps: list[str] = []
    with monkeypatch.context() as noting:
        for folder in folders:
            for step in (0, 10):
                before_step(step, lambda folder=folder, step=step: steps.append(f"{folder} {step}"), noting, folder)
        again = _trained(tmp_path / "saes")
    assert steps == [f"{folders[1]} 10", f"{folders[2]} 0", f"{folders[2]} 10"]
    for one, other in zip(trained.saes, again.saes, strict=True):
        assert_same_tensors(trained.folder / one.folder, again.folder / other.folder)


def test_the_folder_is_a_set_of_bases(trained: TrainedSAEs) -> None:
    model = tiny_model()
    placed, named = (
        circuits.bases(model, given)
        for given in (trained.folder, {sae.site: trained.folder / sae.folder for sae in trained.saes})
    )
    assert tuple(placed) == SITES
    assert [one.fingerprint for one in placed.values()] == [one.fingerprint for one in named.values()]
    assert tuple(circuits.bases(model, str(trained.folder))) == SITES


def test_a_folder_that_can_not_be_used_is_refused(trained: TrainedSAEs, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(MissingFileError, match=r"holds no saes\.json.*circuit saes"):
        circuits.bases(model, tmp_path)
    with pytest.raises(MismatchError):
        circuits.bases(tiny_model(seed=1), trained.folder)
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    shutil.rmtree(folder / trained.saes[0].folder)
    with pytest.raises(MissingFileError, match=r"attn_out\.1.*Restore it"):
        circuits.bases(model, folder)
    (folder / INDEX_FILE).write_text('{"model": null, "max_fvu": "much", "saes": []}')
    with pytest.raises(CorruptFileError, match="max_fvu"):
        circuits.bases(model, folder)


def test_the_estimate_counts_what_is_left_and_writes_nothing(trained: TrainedSAEs, tmp_path: Path) -> None:
    model, place = tiny_model(), tmp_path / "none"
    asked = circuits.estimate_saes(model, ["resid_post", "attn_out.1"], place, source=_source(), options=OPTIONS)
    assert (asked.sites, asked.passes) == (4, 1) and asked.harvest is not None and asked.harvest.tokens == 1200
    assert asked.seconds > 0 and asked.disk_bytes > 4 * 4 * 2 * 64 * 16 and not place.exists()
    left = circuits.estimate_saes(model, SITES, trained.folder, source=_source(), options=OPTIONS)
    assert (left.sites, left.harvest, str(left)) == (0, None, "All SAEs are trained")


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=1000))
    with pytest.raises(ResourceError, match="64 features needs .* Lower expansion"):
        _trained(tmp_path / "saes")
    assert not (tmp_path / "saes").exists()
    with pytest.raises(UnknownSiteError):
        circuits.train_saes(tiny_model(), ["resid_post.9"], tmp_path / "saes")
    with pytest.raises(InvalidInputError, match="at least one site"):
        circuits.train_saes(tiny_model(), [], tmp_path / "saes")
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        circuits.SAETrainingOptions(max_fvu=1.5)


def test_the_command_keeps_a_run_folder_and_says_what_is_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(str(tmp_path / "model"))
    command = ["circuit", "saes", "--model", str(tmp_path / "model"), "--dtype", "float32", "--out", str(tmp_path / "runs"), "--json",
               "--layers", "-1", "--kinds", "attn_out", "resid_post", "--tokens", "3200", "--context", "16", "--expansion", "2", "--k", "4",
               "--training-tokens", "4096", "--max-fvu", "0.01"]  # fmt: skip
    assert main([*command, "--estimate"]) == 0
    assert json.loads(capsys.readouterr().out)["saes"] == 2 and not (tmp_path / "runs").exists()
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["above_limit"] == ["attn_out.2", "resid_post.2"] == [row["site"] for row in said["sites"]]
    assert (Path(said["run"]) / "report.html").is_file()
    assert tuple(circuits.bases(model, said["saes"])) == ("attn_out.2", "resid_post.2")
    assert main([*command, "--layers", "7"]) == 2 and "layers 0 to 2" in capsys.readouterr().err


def test_the_command_names_sites_by_layer_or_one_by_one() -> None:
    model = tiny_model()
    assert CircuitSAEs(kinds=("attn_out",)).named_sites(model) == ["attn_out.0", "attn_out.1", "attn_out.2"]
    assert CircuitSAEs(layers=(-1, 0), kinds=("z",)).named_sites(model) == ["z.2", "z.0"]
    assert CircuitSAEs(sites=("embed", "z.1")).named_sites(model) == ["embed", "z.1"]
    with pytest.raises(InvalidInputError, match="Leave out --layers"):
        CircuitSAEs(sites=("embed",), layers=(1,)).named_sites(model)
