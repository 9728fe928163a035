from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from tests.tiny import D_MODEL, n_hooks, tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.keep import KeepRule
from workbench.activations.sources import TokenRows
from workbench.errors import CorruptFileError, DegenerateInputError, InvalidInputError, MismatchError, MissingFileError
from workbench.models.model import Model
from workbench.saes.evaluate import EvalOptions, evaluate_sae
from workbench.saes.io import (
    check_sae_fits,
    load_sae,
    sae_keep_rule,
    sae_lens_module,
    sae_site,
)
from workbench.saes.kernels import decode_sparse, encode_sparse
from workbench.saes.save import Provenance, save_topk
from workbench.saes.weights import SAEWeights

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _rows(n: int = 12) -> torch.Tensor:
    return torch.randint(2, 200, (n, 10), generator=torch.Generator().manual_seed(0))


def _origin(model: Model, site: str = SITE) -> Provenance:
    return Provenance(
        model_name=model.name, model_fingerprint=model.fingerprint, site=site, context=10,
        keep=KeepRule(1e6, (0, 1)), training={"metrics": {}},
    )  # fmt: skip


def _weights(d_sae: int = 48, seed: int = 0) -> SAEWeights:
    g = torch.Generator().manual_seed(seed)
    return SAEWeights(
        torch.randn(d_sae, D_MODEL, generator=g), torch.randn(d_sae, generator=g),
        torch.randn(d_sae, D_MODEL, generator=g), torch.randn(D_MODEL, generator=g),
    )  # fmt: skip


def _identity_sae(model: Model, folder: Path) -> Path:
    """k = all features, half of them +e_i and half -e_i: reconstructs everything."""
    W = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    weights = SAEWeights(W.clone(), torch.zeros(len(W)), W, torch.zeros(D_MODEL))
    return save_topk(weights, len(W), folder, _origin(model))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_saved_sae_reads_raw_activations(model: Model, tmp_path: Path, scale: float) -> None:
    weights, x = _weights(), 3 * torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(1))
    sae = load_sae(save_topk(weights, 5, tmp_path, _origin(model), scale))
    inside = encode_sparse(weights, x * scale, 5)
    expected = (decode_sparse(inside, weights.W_dec) + weights.b_dec) / scale
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected, rtol=1e-4, atol=1e-4)
    acts = torch.zeros(20, 48).scatter(1, inside.indices, inside.values / scale)
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-4, atol=1e-4)
    back = SAEWeights(sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)
    torch.testing.assert_close(back.W_enc, weights.W_enc)
    assert sae_site(sae) == SITE
    assert sae_keep_rule(sae) == KeepRule(1e6, (0, 1))


def test_a_folder_of_sae_lens_loads(tmp_path: Path) -> None:
    lens = sae_lens_module()
    sae = lens.StandardSAE(lens.StandardSAEConfig(d_in=8, d_sae=16))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(8, 16))
    sae.save_model(tmp_path)
    loaded = load_sae(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert sae_keep_rule(loaded) is None
    with pytest.raises(MismatchError, match="which site"):
        sae_site(loaded)


def test_folders_that_hold_no_sae_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no SAE: cfg.json"):
        load_sae(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(MissingFileError, match="unfinished"):
        load_sae(tmp_path)
    folder = save_topk(_weights(), 5, tmp_path / "sae", _origin(model))
    raw = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(raw[:100])
    with pytest.raises(CorruptFileError, match="sae_lens can't load"):
        load_sae(folder)
    (folder / "cfg.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CorruptFileError, match="does not describe an SAE"):
        load_sae(folder)


def test_an_sae_of_another_model_or_width_is_refused(model: Model, tmp_path: Path) -> None:
    sae = load_sae(save_topk(_weights(), 5, tmp_path / "a", _origin(model)))
    assert check_sae_fits(model, sae) == SITE
    with pytest.raises(MismatchError, match="trained on tiny-llama"):
        check_sae_fits(tiny_model(seed=3), sae)
    narrow = SAEWeights(torch.ones(9, 4), torch.zeros(9), torch.ones(9, 4), torch.zeros(4))
    with pytest.raises(MismatchError, match="d_in=4"):
        check_sae_fits(model, load_sae(save_topk(narrow, 2, tmp_path / "b", _origin(model))))


def test_a_perfect_sae_recovers_everything_and_controls_stand_where_they_must(model: Model, tmp_path: Path) -> None:
    report = evaluate_sae(model, load_sae(_identity_sae(model, tmp_path)), _rows(), options=EvalOptions(batch_rows=5))
    assert report.fvu.value == pytest.approx(0, abs=1e-8)
    assert report.recovered["zero"].value == pytest.approx(1, abs=1e-4)
    assert report.recovered_controls["sae_sinks"].value == pytest.approx(1, abs=1e-4)
    assert report.kl.value == pytest.approx(0, abs=1e-5)
    assert report.ce_difference["identity"].value == 0
    assert report.recovered_controls["identity"].value == 1
    assert report.fvu_controls["mean"].value == pytest.approx(1)
    assert report.ce_difference["random"].value > 1e-3
    assert report.fvu_controls["random"].value > 0.05
    assert report.l0.value == D_MODEL, "of +e_i and -e_i exactly one is positive"
    assert report.n_tokens == 12 * 9
    assert report.kept_share == pytest.approx(0.9)
    assert n_hooks(model.hf) == 0


def test_losses_under_ablation_equal_a_hand_made_hook(model: Model, tmp_path: Path) -> None:
    rows = _rows()
    report = evaluate_sae(model, load_sae(_identity_sae(model, tmp_path)), rows, options=EvalOptions(batch_rows=5))

    def loss(first: int) -> float:
        def zero(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[:, first:] = 0
            return out

        handle = model.hf.model.layers[1].register_forward_hook(zero)
        try:
            logits = model.hf(rows).logits
        finally:
            handle.remove()
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))

    assert report.ce["zero"].value == pytest.approx(loss(1), rel=1e-5)
    assert report.ce["zero_all"].value == pytest.approx(loss(0), rel=1e-5)
    assert report.ce["zero"].value != pytest.approx(report.ce["zero_all"].value, rel=1e-3)
    assert report.ce_clean.value == pytest.approx(loss(99), rel=1e-5)


def test_sinks_do_not_enter_the_headline(model: Model, tmp_path: Path) -> None:
    """A bad SAE on tokens of which one per row dwarfs the rest looks perfect only if that token counts."""
    hf_layer = model.hf.model.layers[1]

    def sink(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 0] = 1e4
        return out

    x = model.capture(_rows(), [SITE])[SITE]
    limit = 10 * float(x[:, 1:].norm(dim=-1).median())
    W = torch.full((2, D_MODEL), D_MODEL**-0.5)
    weights = SAEWeights(W, torch.zeros(2), W.clone(), torch.zeros(D_MODEL))
    origin = _origin(model)
    folder = save_topk(weights, 1, tmp_path, Provenance(**{**origin.__dict__, "keep": KeepRule(limit, (0, 1))}))
    handle = hf_layer.register_forward_hook(sink)
    try:
        report = evaluate_sae(model, load_sae(folder), _rows())
    finally:
        handle.remove()
    assert report.fvu.value > 0.5


def test_stores_texts_and_rows_are_accepted(model: Model, tmp_path: Path) -> None:
    sae = load_sae(save_topk(_weights(), 5, tmp_path / "sae", _origin(model)))
    rows = _rows(60)
    store = harvest(model, TokenRows(rows), [SITE], tmp_path / "store", options=HarvestOptions(shard_tokens=100))
    by_store = evaluate_sae(model, sae, store)
    assert by_store.n_rows == 6
    assert by_store == evaluate_sae(model, sae, rows[9::10])
    by_text = evaluate_sae(model, sae, ["a short text", "another text, longer"], options=EvalOptions(batch_rows=1))
    together = evaluate_sae(model, sae, ["a short text", "another text, longer"])
    assert by_text.n_tokens == together.n_tokens == 11 + 19
    assert by_text.ce["sae"].value == pytest.approx(together.ce["sae"].value, rel=1e-4)


def test_wrong_input_is_refused(model: Model, tmp_path: Path) -> None:
    sae = load_sae(save_topk(_weights(), 5, tmp_path / "sae", _origin(model)))
    with pytest.raises(InvalidInputError, match="list of texts"):
        evaluate_sae(model, sae, "one text")
    with pytest.raises(DegenerateInputError, match="fewer than two rows"):
        evaluate_sae(model, sae, _rows(1))
    with pytest.raises(InvalidInputError):
        EvalOptions(max_rows=1)


def test_the_report_names_its_controls_and_is_json(model: Model, tmp_path: Path) -> None:
    sae = load_sae(save_topk(_weights(), 5, tmp_path / "sae", _origin(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate_sae(model, sae, _rows())
    section = report.section()
    shown = json.dumps(report.to_json()) + str(section)
    assert all(name in shown for name in ("random SAE", "identity", "mean predictor", "zero ablation, sinks kept"))
    assert {"fvu", "recovered_zero", "recovered_zero_all", "recovered_mean", "kept_share"} <= section.metrics.keys()
    assert len(report.findings()) == 4
