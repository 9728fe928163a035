from __future__ import annotations

import json
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.bases.fits import sae_site
from workbench.bases.sae import as_basis
from workbench.bases.sitenames import site_of
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ModelUnavailableError,
    ShapeError,
    UnknownNameError,
    UnknownSiteError,
    WorkbenchError,
)
from workbench.saes.formats.build import build
from workbench.saes.formats.load import load_sae, sae_lens_module
from workbench.saes.formats.names import GemmaScopeName
from workbench.saes.formats.raw import RawSAE, fold

D, M, OUT = 6, 16, 5


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape)))


def _x(n: int = 40) -> Tensor:
    return 2 * _random(n, D, seed=99) + 1


def _raw(activation: str = "relu", **changes: Any) -> RawSAE:
    d_out = OUT if changes.get("transcodes") else D
    extra: dict[str, Any] = {
        "topk": {"k": 4}, "groupmax": {"k": 4}, "jumprelu": {"threshold": _random(M, seed=5).abs() * 0.5},
        "gated": {"r_mag": 0.3 * _random(M, seed=6), "b_mag": _random(M, seed=8)},
    }.get(activation, {})  # fmt: skip
    if changes.get("transcodes"):
        extra["subtracts_b_dec"] = False
    return RawSAE(
        activation=activation, W_enc=_random(D, M), b_enc=_random(M, seed=1), W_dec=2 * _random(M, d_out, seed=2),
        b_dec=_random(d_out, seed=3), **{**extra, **changes},
    )  # fmt: skip


def _by_definition(raw: RawSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of `RawSAE`, written out without folding anything."""
    x = x.double()
    r = raw.W_dec.double().norm(dim=1) if raw.rescales else torch.ones(M, dtype=torch.float64)
    seen = (x - (0 if raw.mean is None else raw.mean)) * raw.scale
    inside = seen - (raw.b_dec if raw.subtracts_b_dec else 0) - (0 if raw.shift is None else raw.shift)
    pre = inside @ raw.W_enc.double()
    if raw.activation == "gated":
        acts = (pre * raw.r_mag.double().exp() + raw.b_mag).relu() * (pre + raw.b_enc > 0)
    else:
        pre = pre + raw.b_enc
        acts = pre.relu()
    if raw.activation == "topk":
        kept = (pre * r).topk(raw.k, dim=1).indices
        acts = torch.zeros_like(acts).scatter(1, kept, acts.gather(1, kept))
    if raw.activation == "groupmax":
        groups = (acts * r).view(len(x), raw.k, -1)
        acts = (groups * (groups == groups.max(-1, keepdim=True).values)).flatten(1) / r
    if raw.activation == "jumprelu":
        acts = acts * (pre > raw.threshold)
    out = acts @ raw.W_dec.double() + raw.b_dec
    if raw.W_skip is not None:
        out = out + seen @ raw.W_skip.double().T
    scale = raw.scale_out if raw.scale_out is not None else (1.0 if raw.transcodes else raw.scale)
    mean = raw.mean_out if raw.transcodes else raw.mean
    return acts * r, out / scale + (0 if mean is None else mean)


CONVENTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"scale": 0.3},
    "mean": {"mean": _random(D, seed=11)},
    "shift": {"shift": _random(D, seed=12)},
    "norms": {"rescales": True},
    "not centred": {"subtracts_b_dec": False, "mean": _random(D, seed=11), "scale": 1.7},
    "all": {"scale": 0.3, "mean": _random(D, seed=11), "shift": _random(D, seed=12), "rescales": True},
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("activation", ["relu", "topk", "groupmax", "jumprelu", "gated"])
def test_folding_keeps_activations_and_output_and_happens_once(activation: str, convention: str) -> None:
    raw = _raw(activation, **CONVENTIONS[convention])
    acts, out = _by_definition(raw, _x())
    done = fold(raw)
    sae = build(raw)
    torch.testing.assert_close(sae.encode(_x()).double(), acts, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae(_x()).double(), out, atol=2e-5, rtol=1e-5)
    again = fold(done)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in done.tensors().items())
    assert (done.scale, done.mean, done.shift, done.rescales) == (1.0, None, None, False)
    assert bool((acts > 0).any()) and bool((acts == 0).any()), "the comparison sees both kinds of feature"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "topk", "groupmax", "jumprelu"])
def test_transcoders_fold_both_sides(activation: str, skip: bool) -> None:
    raw = _raw(
        activation, transcodes=True, scale=0.4, mean=_random(D, seed=11), scale_out=3.0, mean_out=_random(OUT, seed=13),
        W_skip=_random(OUT, D, seed=14) if skip else None,
    )  # fmt: skip
    acts, out = _by_definition(raw, _x())
    sae = build(raw)
    torch.testing.assert_close(sae.encode(_x()).double(), acts, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae(_x()).double(), out, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(sae(_x()).double(), _by_definition(replace(raw, mean=None), _x())[1], atol=1e-2)


def test_an_sae_with_a_linear_path_is_still_centred() -> None:
    raw = _raw("topk", W_skip=_random(D, D, seed=14), scale=0.4, mean=_random(D, seed=11))
    torch.testing.assert_close(build(raw)(_x()).double(), _by_definition(raw, _x())[1], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_norms_per_token_stay(norm: str) -> None:
    sae = build(_raw("relu", norm=norm))
    assert sae.cfg.normalize_activations == norm
    first = sae(_x())
    torch.testing.assert_close(sae(10 * _x()), 10 * first, rtol=1e-3, atol=1e-3)


def test_weights_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ShapeError, match="b_enc has shape"):
        replace(_raw(), b_enc=torch.zeros(3))
    with pytest.raises(CorruptFileError, match="NaN"):
        replace(_raw(), b_enc=torch.full((M,), float("nan")))
    with pytest.raises(InvalidInputError, match="needs threshold"):
        RawSAE(**{**vars(_raw()), "activation": "jumprelu"})
    with pytest.raises(InvalidInputError, match="k=99"):
        _raw("topk", k=99)


def test_thresholds_are_not_rounded() -> None:
    raw = _raw("jumprelu")
    sae = build(raw, dtype=torch.bfloat16)
    assert torch.equal(sae.threshold, raw.threshold) and sae.W_enc.dtype == torch.bfloat16


# sparsify


def _sparsify(folder: Path, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": _random(M, D), "encoder.bias": _random(M, seed=1), "W_dec": _random(M, D, seed=2),
        "b_dec": _random(D, seed=3),
    }  # fmt: skip
    if config.get("skip_connection"):
        tensors["W_skip"] = _random(D, D, seed=4)
    save_file(tensors, folder / "sae.safetensors")
    known = {"activation": "topk", "expansion_factor": 32, "num_latents": M, "k": 4, "d_in": D, "signed": False}
    (folder / "cfg.json").write_text(json.dumps({**known, **config}))
    (folder.parent / "config.json").write_text(json.dumps({"model": "some/model", "ctx_len": 128}))
    return folder, tensors


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify_folders(tmp_path: Path, activation: str, transcode: bool, skip: bool) -> None:
    folder, t = _sparsify(
        tmp_path / "run" / "layers.3", activation=activation, transcode=transcode, skip_connection=skip
    )
    x = _x()
    pre = ((x if transcode else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    acts = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        if activation == "topk":
            kept = values.topk(4).indices.tolist()
        else:
            kept = [group * 4 + int(values[group * 4 : group * 4 + 4].argmax()) for group in range(4)]
        acts[row, kept] = values[kept]
    out = acts @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)
    sae = load_sae(folder)
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), out, atol=1e-5, rtol=1e-5)
    assert sae.cfg.metadata.model_name == "some/model"
    if not transcode:
        assert sae_site(sae) == "resid_post.3"
        assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def test_sparsify_folders_that_contradict_themselves(tmp_path: Path) -> None:
    folder, _ = _sparsify(tmp_path / "a" / "layers.3", num_latents=M + 1)
    with pytest.raises(CorruptFileError, match="cfg.json says 17 features"):
        load_sae(folder)
    folder, _ = _sparsify(tmp_path / "b" / "layers.3", k=None)
    with pytest.raises(CorruptFileError, match="k=None"):
        load_sae(folder)


# dictionary_learning


def _dictionary(name: str) -> tuple[dict[str, Tensor], Any]:
    """State dict in the names of that library, and its forward pass written out."""
    E, be, W, b = _random(M, D), _random(M, seed=1), 2 * _random(D, M, seed=2), _random(D, seed=3)
    threshold = _random(M, seed=5).abs()
    linear = {"encoder.weight": E, "encoder.bias": be, "decoder.weight": W}
    if name == "AutoEncoder":
        return {**linear, "bias": b}, lambda x: (((x - b) @ E.T + be).relu(), lambda f: f @ W.T + b)
    if name == "AutoEncoderNew":
        return {**linear, "decoder.bias": b}, lambda x: ((x @ E.T + be).relu(), lambda f: f @ W.T + b)
    if name == "GatedAutoEncoder":
        r, mag = 0.3 * _random(M, seed=6), _random(M, seed=8)
        norms = W.norm(dim=0)
        state = {
            "encoder.weight": E, "decoder.weight": W, "decoder_bias": b, "gate_bias": be, "r_mag": r, "mag_bias": mag,
        }  # fmt: skip

        def gated(x: Tensor) -> Any:
            pre = (x - b) @ E.T
            f = (pre + be > 0) * (r.exp() * pre + mag).relu() * norms
            return f, lambda f: (f / norms) @ W.T + b

        return state, gated
    if name == "JumpReluAutoEncoder":
        state = {"W_enc": E.T, "b_enc": be, "W_dec": W.T, "b_dec": b, "threshold": threshold}
        norms = W.norm(dim=0)

        def jump(x: Tensor) -> Any:
            pre = x @ E.T + be
            return (pre * (pre > threshold)).relu() * norms, lambda f: (f / norms) @ W.T + b

        return state, jump
    one = torch.tensor(0.7)
    if name == "MatryoshkaBatchTopKSAE":
        state = {"W_enc": E.T, "b_enc": be, "W_dec": W.T, "b_dec": b, "threshold": one, "k": torch.tensor(4)}
    else:
        state = {**linear, "b_dec": b, "threshold": one, "k": torch.tensor(4)}

    def top(x: Tensor) -> Any:
        f = ((x - b) @ E.T + be).relu()
        if name == "AutoEncoderTopK":
            kept = f.topk(4, dim=1).indices
            return torch.zeros_like(f).scatter(1, kept, f.gather(1, kept)), lambda f: f @ W.T + b
        return f * (f > 0.7), lambda f: f @ W.T + b

    return state, top


def _save_dictionary(folder: Path, name: str, state: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save({key: value.clone() for key, value in state.items()}, folder / "ae.pt")
    about = {"dict_class": name, "activation_dim": D, "dict_size": M, "layer": 8, "lm_name": "some/model", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": about, "buffer": {"ctx_len": 128}}))
    return folder


DICTIONARIES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionaries(tmp_path: Path, name: str) -> None:
    state, forward = _dictionary(name)
    sae = load_sae(_save_dictionary(tmp_path / "d", name, state, submodule_name="mlp_out_layer_8"))
    acts, decode = forward(_x())
    torch.testing.assert_close(sae.encode(_x()), acts, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(sae(_x()), decode(acts), atol=5e-5, rtol=1e-5)
    assert sae_site(sae) == "mlp_out.8"
    assert sae.cfg.metadata.context_size == 128


def test_square_dictionaries_keep_their_orientation(tmp_path: Path) -> None:
    E, W = _random(D, D), _random(D, D, seed=2)
    state = {"encoder.weight": E, "encoder.bias": torch.ones(D), "decoder.weight": W, "bias": torch.ones(D)}
    sae = load_sae(_save_dictionary(tmp_path / "d", "AutoEncoder", state, dict_size=D))
    torch.testing.assert_close(sae(_x()), ((_x() - 1) @ E.T + 1).relu() @ W.T + 1)
    assert sae_site(sae) == "resid_post.8"


def test_a_batchtopk_without_threshold_asks(tmp_path: Path) -> None:
    state, _ = _dictionary("BatchTopKSAE")
    folder = _save_dictionary(tmp_path / "d", "BatchTopKSAE", {**state, "threshold": torch.tensor(-1.0)})
    with pytest.raises(MismatchError, match="never set"):
        load_sae(folder)
    assert torch.equal(load_sae(folder, threshold=0.7).threshold, torch.full((M,), 0.7))
    assert load_sae(folder, k=3).encode(_x()).count_nonzero(dim=1).max() == 3
    with pytest.raises(UnknownNameError, match="Did you mean BatchTopKSAE"):
        load_sae(_save_dictionary(tmp_path / "e", "BatchTopSAE", state))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    folder = _save_dictionary(tmp_path / "d", "AutoEncoder", _dictionary("AutoEncoder")[0])
    torch.save({"encoder.weight": Path("x")}, folder / "ae.pt")
    with pytest.raises(CorruptFileError, match="safetensors"):
        load_sae(folder)


# Gemma Scope and bare tensors


def _gemma(folder: Path) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    tensors = {
        "W_enc": _random(D, M), "b_enc": _random(M, seed=1), "W_dec": _random(M, D, seed=2), "b_dec": _random(D, seed=3),
        "threshold": _random(M, seed=5).abs(),
    }  # fmt: skip
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return tensors


def test_gemma_scope(tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_12" / "width_16k" / "average_l0_82"
    t = _gemma(folder)
    pre = _x() @ t["W_enc"] + t["b_enc"]
    sae = load_sae(folder)
    torch.testing.assert_close(sae(_x()), (pre.relu() * (pre > t["threshold"])) @ t["W_dec"] + t["b_dec"])
    assert sae_site(sae) == "mlp_out.12"
    assert torch.equal(load_sae(folder / "params.npz")(_x()), sae(_x())), "the file alone would be centred"


@pytest.mark.parametrize(
    ("path", "kind", "site"),
    [
        ("layer_12/width_16k/average_l0_82", "resid_post", "resid_post.12"),
        ("/data/mlp_out/layer_12_width_16k_l0_medium", "mlp_out", "mlp_out.12"),
        ("/data/layer_1_study/gemma-scope-2b-pt-res/layer_12/width_16k", "resid_post", "resid_post.12"),
        ("/data/gpt-mlp/gemma-scope-2b-pt-res/layer_12/width_16k", "resid_post", "resid_post.12"),
        ("/data/transcoders/gemma-scope-2b-pt-att/layer_12/width_16k", "z", "z.12"),
        ("/data/transcoders/x/layer_12/width_16k", "resid_post", "resid_post.12"),
        ("models--google--gemma-scope-2b-pt-transcoders/snapshots/0a/layer_3/width_16k", "transcoder", "None"),
        ("gemma-scope-2-1b-pt/transcoder/layer_3_width_16k_l0_small", "transcoder", "None"),
        ("gemma-scope-2-1b-pt/attn_out/layer_3_width_16k_l0_small", "z", "z.3"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "resid_post", "None"),
    ],
)
def test_gemma_scope_is_named_by_its_release_and_not_by_the_folders_above(path: str, kind: str, site: str) -> None:
    named = GemmaScopeName.of(Path(path))
    assert (named.kind, str(named.site)) == (kind, site)


def test_an_sae_of_gemma_scope_in_a_folder_called_transcoder_is_an_sae(tmp_path: Path) -> None:
    folder = tmp_path / "layer_1-transcoder" / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k"
    _gemma(folder)
    sae = load_sae(folder)
    assert sae.cfg.architecture() == "jumprelu" and sae_site(sae) == "resid_post.12"


def test_archives_that_promise_too_much_or_hold_objects(tmp_path: Path) -> None:
    folder = tmp_path / "layer_1"
    _gemma(folder)
    np.savez(folder / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CorruptFileError, match="which it does not hold|object"):
        load_sae(folder)
    with zipfile.ZipFile(folder / "params.npz", "w") as archive, archive.open("W_enc.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)})
    with pytest.raises(CorruptFileError, match="claims"):
        load_sae(folder)
    (folder / "params.npz").write_bytes(b"no archive")
    with pytest.raises(CorruptFileError, match="can't be read"):
        load_sae(folder)


def test_bare_tensors_need_their_activation(tmp_path: Path) -> None:
    E, be, W, b = _random(M, D), _random(M, seed=1), _random(D, M, seed=2), _random(D, seed=3)
    state = {
        "encoder_linear.weight": E, "encoder_linear.bias": be, "decoder_linear.weight": W, "decoder_linear.bias": b,
    }  # fmt: skip
    torch.save(state, tmp_path / "sae.pt")
    with pytest.raises(MismatchError, match="ReLU, a TopK and a JumpReLU"):
        load_sae(tmp_path / "sae.pt")
    sae = load_sae(tmp_path / "sae.pt", activation="relu", subtracts_b_dec=False, site="model.layers.4")
    torch.testing.assert_close(sae(_x()), (_x() @ E.T + be).relu() @ W.T + b)
    assert sae_site(sae) == "resid_post.4"
    assert load_sae(tmp_path / "sae.pt", k=2).encode(_x()).count_nonzero(dim=1).max() == 2
    save_file({"weights": E}, tmp_path / "odd.safetensors")
    with pytest.raises(CorruptFileError, match="lacks W_enc, W_dec, b_dec; it holds weights"):
        load_sae(tmp_path / "odd.safetensors", k=2)


# sae_lens


def _filled(sae: Any) -> Any:
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(sae.named_parameters())):
            value.copy_(_random(*value.shape, seed=i) * (0.3 if name == "r_mag" else 1.0))
            if name == "threshold":
                value.abs_()
    return sae


@pytest.mark.parametrize("name", ["Standard", "TopK", "JumpReLU", "Gated", "Transcoder", "JumpReLUTranscoder"])
def test_what_sae_lens_saves_is_the_same_here(tmp_path: Path, name: str) -> None:
    from sae_lens.saes import transcoder

    lens = sae_lens_module()
    if "Transcoder" in name:
        config = getattr(transcoder, f"{name}Config")(d_in=D, d_sae=M, d_out=OUT, apply_b_dec_to_input=False)
        sae = _filled(getattr(transcoder, name)(config))
    else:
        extra = {"k": 4, "rescale_acts_by_decoder_norm": True} if name == "TopK" else {}
        sae = _filled(getattr(lens, f"{name}SAE")(getattr(lens, f"{name}SAEConfig")(d_in=D, d_sae=M, **extra)))
    sae.save_model(tmp_path)
    loaded = load_sae(tmp_path, site="blocks.2.hook_resid_pre")
    torch.testing.assert_close(loaded.encode(_x()), sae.encode(_x()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(_x()), sae(_x()), atol=1e-5, rtol=1e-5)
    assert sae_site(loaded) == "resid_pre.2"
    if name == "TopK":
        torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(M))
        assert not loaded.cfg.rescale_acts_by_decoder_norm
    with pytest.raises(InvalidInputError, match="has its own"):
        load_sae(tmp_path, threshold=0.3)


def test_scales_beside_a_checkpoint_are_folded_once(tmp_path: Path) -> None:
    lens = sae_lens_module()
    config = lens.StandardSAEConfig(d_in=D, d_sae=M, normalize_activations="expected_average_only_in")
    sae = _filled(lens.StandardSAE(config))
    sae.save_model(tmp_path)
    with pytest.raises(MismatchError, match="scale="):
        load_sae(tmp_path)
    expected = sae(_x() * 0.25) / 0.25
    torch.testing.assert_close(load_sae(tmp_path, scale=0.25)(_x()), expected, atol=1e-4, rtol=1e-4)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    first = load_sae(tmp_path)
    torch.testing.assert_close(first(_x()), expected, atol=1e-4, rtol=1e-4)
    first.save_model(tmp_path / "again")
    assert torch.equal(load_sae(tmp_path / "again")(_x()), first(_x()))


def test_a_batchtopk_checkpoint_is_not_taken_for_an_sae(tmp_path: Path) -> None:
    lens = sae_lens_module()
    sae = _filled(lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=4)))
    sae.topk_threshold.fill_(0.6)
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "saved")
    with pytest.raises(MismatchError, match="training checkpoint"):
        load_sae(tmp_path / "checkpoint")
    here, there = load_sae(tmp_path / "checkpoint", threshold=0.6), load_sae(tmp_path / "saved")
    torch.testing.assert_close(here.encode(_x()), there.encode(_x()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(here(_x()), there(_x()), atol=1e-5, rtol=1e-5)


PLAIN = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
assert not any(name.startswith("workbench") for name in sys.modules)
torch.save(sae(torch.load(sys.argv[2], weights_only=True)).detach(), sys.argv[3])
"""


def test_a_foreign_sae_saved_from_here_loads_without_this_package(tmp_path: Path) -> None:
    folder, _ = _sparsify(tmp_path / "run" / "layers.3")
    sae = load_sae(folder)
    sae.save_model(tmp_path / "saved")
    torch.save(_x(), tmp_path / "x.pt")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "saved"), str(tmp_path / "x.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(out, sae(_x()), atol=1e-6, rtol=1e-6)


def test_kinds_that_sae_lens_lacks_are_refused_by_it_and_read_here(tmp_path: Path) -> None:
    folder, _ = _sparsify(tmp_path / "run" / "layers.3", activation="groupmax")
    sae = load_sae(folder)
    sae.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "cfg.json").read_text())["architecture"] == "workbench_groupmax"
    assert torch.equal(load_sae(tmp_path / "saved")(_x()), sae(_x()))


# names, releases, nothing


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.15.hook_resid_post", "resid_post.15"),
        ("resid_mid.3", "resid_mid.3"),
        ("model.layers.15", "resid_post.15"),
        ("layers.15", "resid_post.15"),
        ("transformer.h.3.attn", "attn_out.3"),
        ("model.layers.12.self_attn.o_proj.input", "z.12"),
        ("model.layers.12.output", "resid_post.12"),
        ("model.layers.12.input", "resid_pre.12"),
        ("gpt_neox.layers.4.mlp", "mlp_out.4"),
        ("attn_out_layer8", "attn_out.8"),
        ("model.embed_tokens", "embed"),
    ],
)
def test_names_of_sites(name: str, site: str) -> None:
    assert str(site_of(name)) == site


@pytest.mark.parametrize("name", ["model.layers.15.post_attention_layernorm", "layers", "hook_resid_post", "15"])
def test_names_that_are_no_site(name: str) -> None:
    with pytest.raises(UnknownSiteError, match="site"):
        site_of(name)


def test_folders_of_no_known_format_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "layers.3").mkdir()
    with pytest.raises(MissingFileError, match=r"It holds layers.3/, weights.bin. Formats that are read: sae_lens"):
        load_sae(tmp_path)
    with pytest.raises(UnknownNameError, match="Did you mean sparsify"):
        load_sae(tmp_path, format="sparsfy")
    with pytest.raises(InvalidInputError, match="Did you mean threshold"):
        load_sae(tmp_path, treshold=1.0)
    with pytest.raises(MissingFileError):
        load_sae(tmp_path, format="sparsify")


def test_releases_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match="Did you mean gpt2-small-res-jb"):
        load_sae("gpt2-small-res-jbb/blocks.8.hook_resid_pre")
    with pytest.raises(UnknownNameError, match="Did you mean blocks.8.hook_resid_pre"):
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pr")
    with pytest.raises(UnknownNameError, match="Did you mean gpt2-small-res-jb"):
        load_sae("blocks.8.hook_resid_pre", release="gpt2-small-res-jbb")

    def offline(*_args: Any, **_more: Any) -> Any:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("workbench.saes.formats.releases.unreachable", lambda _: None)
    monkeypatch.setattr(sae_lens_module().SAE, "from_pretrained", offline)
    with pytest.raises(ModelUnavailableError, match=r"can't be fetched.*match:.*gpt2-small"):
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")

    def broken(*_args: Any, **_more: Any) -> Any:
        raise RuntimeError("size mismatch for W_dec")

    monkeypatch.setattr(sae_lens_module().SAE, "from_pretrained", broken)
    with pytest.raises(CorruptFileError, match=r"size mismatch.*give that folder"):
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")


def test_a_release_is_folded_like_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = sae_lens_module()
    config = lens.TopKSAEConfig(d_in=D, d_sae=M, k=4, rescale_acts_by_decoder_norm=True)
    config.metadata.hook_name = "blocks.8.hook_resid_pre"
    sae = _filled(lens.TopKSAE(config))
    asked = []

    def there(release: str, sae_id: str, **_more: Any) -> Any:
        asked.append((release, sae_id))
        return sae

    monkeypatch.setattr("workbench.saes.formats.releases.unreachable", lambda _: None)
    monkeypatch.setattr(lens.SAE, "from_pretrained", there)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert asked == [("gpt2-small-res-jb", "blocks.8.hook_resid_pre")]
    assert sae_site(loaded) == "resid_pre.8"
    torch.testing.assert_close(loaded(_x()), sae(_x()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(M))


@pytest.mark.parametrize("damage", ["cut", "list", "text"])
@pytest.mark.parametrize("kind", ["sparsify", "dictionary"])
def test_damaged_files_give_one_kind_of_error(tmp_path: Path, kind: str, damage: str) -> None:
    if kind == "sparsify":
        folder, _ = _sparsify(tmp_path / "run" / "layers.3")
        weights, config = folder / "sae.safetensors", folder / "cfg.json"
    else:
        folder = _save_dictionary(tmp_path / "d", "AutoEncoder", _dictionary("AutoEncoder")[0])
        weights, config = folder / "ae.pt", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:200])
    else:
        config.write_text("[1]" if damage == "list" else "{")
    with pytest.raises(WorkbenchError, match=weights.name if damage == "cut" else config.name):
        load_sae(folder)


@pytest.mark.parametrize("rescales", [False, True])
def test_an_sae_with_negative_activations_counts_them(rescales: bool, tmp_path: Path) -> None:
    lens = sae_lens_module()
    torch.manual_seed(0)
    config = lens.AbsTopKSAEConfig(d_in=D, d_sae=M, k=4, rescale_acts_by_decoder_norm=rescales)
    stock = lens.AbsTopKSAE(config)
    stock.save_model(tmp_path)
    basis, x = as_basis(load_sae(tmp_path)), torch.randn(6, D)
    acts = torch.cat([part for _, part in basis.chunks(x)])
    torch.testing.assert_close(acts, stock.encode(x).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(basis.reconstruct(x), stock(x).detach(), rtol=1e-4, atol=1e-5)
    assert ((acts != 0).sum(1) == 4).all() and (acts < 0).any()


def test_the_temporal_sae_is_refused_in_words() -> None:
    class Temporal:
        W_dec, b_dec = torch.zeros(2, 3), torch.zeros(3)
        cfg = SimpleNamespace(architecture=lambda: "temporal")

        def encode(self, x: Any) -> Any: ...

        def decode(self, x: Any) -> Any: ...

    with pytest.raises(InvalidInputError, match="temporal SAE of sae_lens predicts each token"):
        as_basis(Temporal())
