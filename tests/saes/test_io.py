from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import D_MODEL, tiny_model
from workbench.bases.fits import placed_at, sae_site
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import CorruptFileError, MismatchError, MissingFileError
from workbench.models.model import Model
from workbench.saes.architectures import TopK
from workbench.saes.formats.load import load_sae, sae_keep_rule, sae_lens_module
from workbench.saes.formats.save import Provenance, save_topk
from workbench.saes.kernels.weights import SAEWeights

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _rows(n: int = 12) -> torch.Tensor:
    return torch.randint(2, 200, (n, 10), generator=torch.Generator().manual_seed(0))


def _origin(model: Model, site: str = SITE) -> Provenance:
    return Provenance(
        model_name=model.name, model_fingerprint=model.fingerprint, site=site, context=10,
        keep=TokenPolicy(1e6, (0, 1)), training={"metrics": {}},
    )  # fmt: skip


def _weights(d_sae: int = 48, seed: int = 0) -> SAEWeights:
    g = torch.Generator().manual_seed(seed)
    return SAEWeights(
        torch.randn(d_sae, D_MODEL, generator=g), torch.randn(d_sae, generator=g),
        torch.randn(d_sae, D_MODEL, generator=g), torch.randn(D_MODEL, generator=g),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_saved_sae_reads_raw_activations(model: Model, tmp_path: Path, scale: float) -> None:
    weights, x = _weights(), 3 * torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(1))
    sae = load_sae(save_topk(weights, 5, tmp_path, _origin(model), scale))
    inside = TopK(5).encode(weights, x * scale)
    expected = (inside.decode(weights.W_dec) + weights.b_dec) / scale
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(x), inside.dense() / scale, rtol=1e-4, atol=1e-4)
    back = SAEWeights(sae.W_enc.T.contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)
    torch.testing.assert_close(back.W_enc, weights.W_enc)
    assert sae_site(sae) == SITE
    assert sae_keep_rule(sae) == TokenPolicy(1e6, (0, 1))


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
    assert placed_at(sae, model).site == SITE
    with pytest.raises(MismatchError, match="trained on tiny-llama"):
        placed_at(sae, tiny_model(seed=3))
    narrow = SAEWeights(torch.ones(9, 4), torch.zeros(9), torch.ones(9, 4), torch.zeros(4))
    with pytest.raises(MismatchError, match="d_in=4"):
        placed_at(load_sae(save_topk(narrow, 2, tmp_path / "b", _origin(model))), model)


def _edited(folder: Path, **changes: object) -> Path:
    """A stock folder with some entries of its config changed; those of `metadata` are merged."""
    lens = sae_lens_module()
    lens.TopKSAE(lens.TopKSAEConfig(d_in=8, d_sae=16, k=3)).save_model(folder)
    config = json.loads((folder / "cfg.json").read_text())
    meta = changes.get("metadata")
    config |= changes | ({"metadata": config["metadata"] | meta} if isinstance(meta, dict) else {})
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("k", [0, 17, 2.5, "3", True])
def test_a_k_that_no_token_can_have_is_refused_when_loading(tmp_path: Path, k: object) -> None:
    with pytest.raises(CorruptFileError, match="1 <= k <= 16"):
        load_sae(_edited(tmp_path, k=k))


@pytest.mark.parametrize("metadata", [None, [1], "x", {"hook_name": 5}, {"hook_name_out": ["a"]}])
def test_metadata_of_another_kind_are_refused(tmp_path: Path, metadata: object) -> None:
    with pytest.raises(CorruptFileError, match=r"cfg.json: (metadata|hook_name)"):
        load_sae(_edited(tmp_path, metadata=metadata))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stock_folders_with_nan_or_infinity_are_refused(tmp_path: Path, value: float) -> None:
    tensors = load_file(_edited(tmp_path) / "sae_weights.safetensors")
    tensors["W_dec"][3, 2] = value
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CorruptFileError, match="W_dec holds NaN"):
        load_sae(tmp_path)


@pytest.mark.parametrize("ours", ["x", {"site": "resid_post.1"}])
def test_a_lost_keep_rule_is_named(tmp_path: Path, ours: object) -> None:
    sae = load_sae(_edited(tmp_path, metadata={"workbench": ours}))
    with pytest.raises(CorruptFileError, match="no keep rule"):
        sae_keep_rule(sae)


@pytest.mark.parametrize("text", ["[]", '{"scaling_factor": 0}', '{"scaling_factor": NaN}', '{"scaling_factor": "2"}'])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, text: str) -> None:
    folder = _edited(tmp_path, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(text)
    with pytest.raises(CorruptFileError, match="activation_scaler"):
        load_sae(folder)


def test_a_config_nested_without_end_is_refused(tmp_path: Path) -> None:
    (_edited(tmp_path) / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(CorruptFileError, match="nested"):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_tensors_that_are_no_plain_real_numbers_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = {"W_enc": torch.randn(8, 16), "b_enc": torch.zeros(16), "W_dec": torch.randn(16, 8)}
    odd = torch.ones(8, dtype=torch.complex64) if kind == "complex" else torch.ones(8).to_sparse()
    torch.save({**tensors, "b_dec": odd}, tmp_path / "sae.pt")
    with pytest.raises(CorruptFileError, match=f"b_dec.*{kind}"):
        load_sae(tmp_path / "sae.pt", k=3)


@pytest.mark.parametrize("change", [{"k": True}, {"num_latents": None, "expansion_factor": None}])
def test_a_config_of_sparsify_that_says_nothing_usable_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    tensors = {"encoder.weight": torch.randn(16, 8), "encoder.bias": torch.zeros(16), "W_dec": torch.randn(16, 8)}
    save_file({**tensors, "b_dec": torch.zeros(8)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 8, "num_latents": 16, "k": 3} | change))
    with pytest.raises(CorruptFileError, match=r"cfg.json"):
        load_sae(tmp_path)


@pytest.mark.parametrize("change", [torch.Tensor.int, lambda w: w[:-1].clone()])
def test_weights_of_another_type_or_shape_are_refused_in_one_line(tmp_path: Path, change: Any) -> None:
    tensors = load_file(_edited(tmp_path) / "sae_weights.safetensors")
    save_file({**tensors, "W_dec": change(tensors["W_dec"])}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CorruptFileError, match="W_dec is stored as I32|size mismatch for W_dec") as raised:
        load_sae(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_pickled_module_is_named_without_the_advice_of_torch(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(CorruptFileError, match=r"holds a pickled torch\.nn\.modules\.linear\.Linear") as raised:
        load_sae(tmp_path / "x.pth")
    assert "option" not in str(raised.value) and "\n" not in str(raised.value)
