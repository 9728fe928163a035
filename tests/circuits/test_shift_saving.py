"""The repaired classifier as files: equal to the study's, without SAE, and refused where it would not be."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import circuits
from circuits.shift.deciders import Node, OracleDecider
from circuits.shift.export import loader
from circuits.shift.export.saving import save_classifier
from circuits.shift.options import ShiftOptions
from circuits.shift.reading import read_study
from circuits.shift.task import Judged, ShiftStudy
from tests.circuits.planted import SITE, planted_model, planted_sae, planted_task
from tests.interventions.builders import ARCHITECTURES, NORMALISATIONS, sae_lens_sae
from tests.tiny import n_hooks, tiny_model
from workbench.core.errors import CorruptFileError, EditError, MismatchError, MissingFileError, NotExactlyExportable
from workbench.models.loading import load_model
from workbench.models.model import Model

TASK = planted_task(24, 16)
ALONE = replace(TASK, swapped=None, balanced=None)
SITES = ("attn_out.0", "resid_mid.1", "mlp_out.1", "resid_post.1", "resid_pre.2")


def _study(model: Model, bases: dict[str, Any]) -> ShiftStudy:
    """A study in which the four most frequent features of every SAE were judged spurious."""
    study = read_study(model, bases, ALONE, ShiftOptions(probe_site="resid_post.2"))
    shares = study.train.frequency
    chosen = tuple(Node(site, feature) for site in shares for feature in shares[site].topk(4).indices.tolist())
    assert min(shares[node.site][node.feature] for node in chosen) > 0.05, "each of them is active"
    return replace(study, judged=Judged(by=OracleDecider(), chosen=chosen, oracle=(), draws=()))


def _logits(study: ShiftStudy) -> torch.Tensor:
    assert study.judged is not None
    train, test = (study.ablated(study.judged.chosen, of=of) for of in ("train", "test"))
    return study.refit(train).logit(test).double()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_what_is_loaded_equals_the_study_for_every_architecture_and_normalisation(
    normalisation: str, tmp_path: Path
) -> None:
    model = tiny_model()
    saes = {
        site: sae_lens_sae(kind, normalisation, b_dec_in=kind != "gated")
        for site, kind in zip(SITES, ARCHITECTURES, strict=True)
    }
    study = _study(model, saes)
    expected = _logits(study)
    assert (expected - study.probe.logit(study.test.x)).abs().max() > 0.1, "the patch does something"
    save_classifier(study, tmp_path)
    loaded = circuits.load_classifier(tmp_path, model)
    found = loaded._classifier.logits(TASK.test.texts)
    torch.testing.assert_close(found[:, 1], expected, atol=1e-4, rtol=1e-4)
    few = TASK.test.texts[:3]
    assert loaded(few) == tuple(TASK.label_names[int(logit > 0)] for logit in expected[:3])
    torch.testing.assert_close(loaded.probabilities(few)[:, 1], expected[:3].sigmoid(), atol=1e-4, rtol=0)
    read = {name: tuple(w.shape) for name, w in load_file(tmp_path / "classifier.safetensors").items()}
    # which features of a top-k SAE are active depends on all of them; of the others only what is ablated is saved
    assert [read[f"patch.{i}.read"][1] for i in range(5)] == [4, 4, 4, 40, 40]
    assert n_hooks(model.hf) == 0


def test_the_loader_needs_neither_the_sae_nor_this_package(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    study = _study(
        model, {"z.1": sae_lens_sae("jumprelu", d_in=model.width("z.1")), **circuits.neurons(model, ["mlp_post.2"])}
    )
    save_classifier(study, tmp_path)
    tree = ast.parse((tmp_path / "classifier.py").read_text())
    imported = {
        name.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names
    }  # fmt: skip
    assert {name.partition(".")[0] for name in imported if name} <= {
        "__future__", "contextlib", "hashlib", "json", "collections", "pathlib", "typing", "torch", "safetensors",
    }  # fmt: skip
    spec = importlib.util.spec_from_file_location("classifier", tmp_path / "classifier.py")
    assert spec is not None and spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    found = alone.load(tmp_path, model.hf, model.tokenizer).logits(TASK.test.texts)[:, 1]
    torch.testing.assert_close(found, _logits(study), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="Load the model that it was made for"):
        alone.load(tmp_path, tiny_model("neox").hf, model.tokenizer)


def test_a_classifier_that_says_anything_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study(tiny_model(), {"resid_post.1": sae_lens_sae("jumprelu")})
    right = loader.neurons

    def half(x: torch.Tensor, patch: Any, weights: Any) -> torch.Tensor:
        return 0.9 * right(x, patch, weights)

    monkeypatch.setattr(loader, "neurons", half)
    with pytest.raises(EditError, match="Nothing was written"):
        save_classifier(study, tmp_path / "clf")
    assert not (tmp_path / "clf").exists()
    with pytest.raises(NotExactlyExportable, match="unknown.*can't be written as a few neurons"):
        save_classifier(_study(planted_model(), {SITE: planted_sae()}), tmp_path / "clf")


def test_by_itself_a_classifier_loads_the_model_that_it_was_made_with(tmp_path: Path) -> None:
    tiny_model().hf.save_pretrained(tmp_path / "model")
    tiny_model().tokenizer.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype="float32")
    assert model.name != model.source
    save_classifier(_study(model, dict(circuits.neurons(model, ["resid_post.1"]))), tmp_path / "clf")
    alone = circuits.load_classifier(tmp_path / "clf")
    texts = TASK.test.texts[:4]
    assert alone(texts) == circuits.load_classifier(tmp_path / "clf", model)(texts)


def test_a_report_saves_what_it_found_and_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    model, saes = planted_model(), circuits.neurons(planted_model(), [SITE])
    report = circuits.shift(model, saes, TASK, options=ShiftOptions(top_k=10, random_draws=2))
    assert report.save(tmp_path / "clf") == tmp_path / "clf"
    labels = circuits.load_classifier(tmp_path / "clf", model)(TASK.test.texts)
    hits = sum(label == TASK.label_names[truth] for label, truth in zip(labels, TASK.test.label, strict=True))
    assert hits / len(labels) == report.method("SHIFT + retrain").label.value == 1.0
    assert "study" not in report.to_json() and report == replace(report, study=None)
    with pytest.raises(MismatchError, match="Give that model"):
        circuits.load_classifier(tmp_path / "clf", tiny_model("gpt2"))
    with pytest.raises(MismatchError, match=r"made in memory\. Give it"):
        circuits.load_classifier(tmp_path / "clf")
    with pytest.raises(MissingFileError, match=r"no classifier\.json"):
        circuits.load_classifier(tmp_path, model)
    (tmp_path / "clf" / "classifier.json").write_text('{"format": "other"}')
    with pytest.raises(CorruptFileError, match="this loader reads"):
        circuits.load_classifier(tmp_path / "clf", model)
