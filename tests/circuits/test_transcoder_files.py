"""Sets of transcoders in files: what is loaded encodes and writes what the files say, at sites of the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import circuits
from tests.tiny import D_MODEL, tiny_hf, tiny_tokenizer
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, MissingFileError, WorkbenchError
from workbench.models.model import Model
from workbench.saes.formats.load import load_sae

F, LAYERS = 24, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def model_of(family: str) -> Model:
    """With gains that differ from norm to norm; shared, not to be changed."""
    hf = tiny_hf(family)
    with torch.no_grad():
        for seed, (name, part) in enumerate(hf.named_modules()):
            if isinstance(getattr(part, "weight", None), torch.nn.Parameter) and ("norm" in name or ".ln_" in name):
                part.weight.copy_(0.5 + random(D_MODEL, seed=seed).abs())
    return Model(hf, tiny_tokenizer(), name=f"tiny-{family}")


def config(folder: Path, **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**hooks, **said}), encoding="utf-8")
    return folder


def layer(seed: int, skip: bool = True) -> dict[str, Tensor]:
    found = {
        "W_enc": random(F, D_MODEL, seed=seed), "W_dec": random(F, D_MODEL, seed=seed + 1),
        "b_enc": random(F, seed=seed + 2), "b_dec": random(D_MODEL, seed=seed + 3),
    }  # fmt: skip
    return found | ({"W_skip": random(D_MODEL, D_MODEL, seed=seed + 4)} if skip else {})


def transcoder_set(folder: Path, layers: Any = (0, 2), more: dict[str, Tensor] | None = None, **said: Any) -> Path:
    config(folder, **said)
    for i in layers:
        save_file({**layer(10 * i), **(more or {})}, folder / f"layer_{i}.safetensors")
    return folder


X = random(5, D_MODEL, seed=99)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_a_transcoder_of_a_layer_computes_what_its_file_says(tmp_path: Path, activation: str) -> None:
    said = {"topk": {"activation": "topk", "k": 3}, "relu": {"activation": "relu"}, "jumprelu": {}}[activation]
    more = {"activation_function.threshold": torch.full((1,), 1.5)} if activation == "jumprelu" else None
    found = circuits.load_transcoders(model_of("gpt2"), transcoder_set(tmp_path, more=more, **said))
    assert isinstance(found, dict) and list(found) == ["mlp_out.0", "mlp_out.2"]
    basis, t = found["mlp_out.2"], layer(20)
    pre = X @ t["W_enc"].T + t["b_enc"]
    wanted = pre * (pre > 1.5) if activation == "jumprelu" else pre.relu()
    if activation == "topk":
        wanted = wanted * (pre >= pre.topk(3).values[:, -1:])
    torch.testing.assert_close(basis.encode(X), wanted)
    torch.testing.assert_close(basis.decode(basis.encode(X), X), wanted @ t["W_dec"] + t["b_dec"] + X @ t["W_skip"].T)
    assert (basis.site, basis.site_out) == ("mlp_in.2", "mlp_out.2")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_norm_without_its_gain_is_read_behind_it(tmp_path: Path, family: str) -> None:
    model = model_of(family)
    folder = transcoder_set(tmp_path, (1,), activation="relu", feature_input_hook="ln2.hook_normalized")
    found = circuits.load_transcoders(model, folder)
    assert isinstance(found, dict)
    basis, t = found["mlp_out.1"], layer(10)
    acts = model.capture(model.tokens("abXde"), ["resid_mid.1", "mlp_in.1"])
    mid, read = acts.flat("resid_mid.1")[0], acts.flat("mlp_in.1")[0]
    normalised = mid / mid.square().mean(-1, keepdim=True).sqrt()  # what RMSNorm of TransformerLens hands to its hook
    given = read if family == "gpt2" else normalised
    torch.testing.assert_close(basis.encode(read), (given @ t["W_enc"].T + t["b_enc"]).relu(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        basis.constant(read), (t["b_dec"] + given @ t["W_skip"].T).expand_as(read), rtol=1e-3, atol=1e-3
    )
    assert (read - normalised).norm() > 0.3 * read.norm(), "the gain is not nothing"


def test_gemma_scope_transcoders_read_the_norm_without_its_gain(tmp_path: Path) -> None:
    model, t = model_of("gemma2"), layer(10, skip=False)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_24"
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz", threshold=np.full(F, 0.5), W_enc=t["W_enc"].T.numpy(), W_dec=t["W_dec"].numpy(),
        b_enc=t["b_enc"].numpy(), b_dec=t["b_dec"].numpy(),
    )  # fmt: skip
    listed = [{"id": "a", "layer": 1, "filepath": str(folder.relative_to(tmp_path) / "params.npz")}]
    config(tmp_path, feature_input_hook="ln2.hook_normalized", transcoders=listed)
    found = circuits.load_transcoders(model, tmp_path)
    alone: Any = load_sae(folder, model=model, check=False)
    assert alone.cfg.metadata.hook_name == "blocks.1.mlp.hook_in"
    read = model.capture(model.tokens("abXde"), ["mlp_in.1"]).flat("mlp_in.1")[0]
    assert isinstance(found, dict)
    torch.testing.assert_close(found["mlp_out.1"].encode(read), alone.encode(read))
    plain: Any = load_sae(folder)
    assert not torch.allclose(plain.encode(read), alone.encode(read)), "without a model it reads what it was made for"


def across(folder: Path, n: int = LAYERS) -> tuple[Path, dict[str, Tensor]]:
    config(folder, model_kind="cross_layer_transcoder")
    every = {}
    for i in range(n):
        t = layer(10 * i)
        encoder = {f"{name}_{i}": t[name] for name in ("W_enc", "b_enc", "b_dec", "W_skip")}
        encoder[f"threshold_{i}"] = torch.full((F,), 0.25)
        decoder = {f"W_dec_{i}": random(F, n - i, D_MODEL, seed=100 + i)}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
        every |= encoder | decoder
    return folder, every


def test_one_across_layers_writes_at_all_later_layers(tmp_path: Path) -> None:
    model = model_of("gpt2")
    folder, t = across(tmp_path)
    found = circuits.load_transcoders(model, folder)
    assert isinstance(found, circuits.CrossLayerTranscoder)
    assert set(found.later) == {(0, 1), (0, 2), (1, 2)}, "the last layer is there, and each writes to the last one"
    for i in range(LAYERS):
        basis = found.layers[i]
        pre = X @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"]
        torch.testing.assert_close(basis.encode(X), pre * (pre > 0.25))
        torch.testing.assert_close(basis.rows(), t[f"W_dec_{i}"][:, 0])
        torch.testing.assert_close(basis.constant(X), t[f"b_dec_{i}"] + X @ t[f"W_skip_{i}"])
        for j in range(1, LAYERS - i):
            assert torch.equal(found.later[i, i + j], t[f"W_dec_{i}"][:, j])
    graph = circuits.attribution_graph(model, found, "abX", features=50)
    assert graph.gap < 1e-4, "links of features that write at later layers add up too"


def _two_kinds(folder: Path) -> Path:
    return config(folder, model_kind="clt")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda f: f, MissingFileError, "holds no config.yaml"),
        (lambda f: config(f, feature_input_hook=None), CorruptFileError, "does not say feature_input_hook"),
        (_two_kinds, CorruptFileError, "cross_layer_transcoder"),
        (lambda f: config(f), MissingFileError, "no layer_0.safetensors"),
        (lambda f: config(f, activation="topk"), CorruptFileError, "k=None"),
        (lambda f: transcoder_set(f), MismatchError, "Pass activation='relu'"),
        (lambda f: transcoder_set(f, activation="jumprelu"), CorruptFileError, "there is no threshold"),
        (lambda f: transcoder_set(f, activation="relu", feature_input_hook="hook_q"), MismatchError, "mlp.hook_in"),
        (lambda f: across(f, 2)[0], MismatchError, "across 2 layers; tiny-gemma2 has 3"),
        (lambda f: transcoder_set(f, activation="relu", feature_output_hook="mlp.hook_out"), MismatchError, "behind"),
    ],
)  # fmt: skip
def test_files_that_can_not_be_used(tmp_path: Path, make: Any, error: type[WorkbenchError], says: str) -> None:
    with pytest.raises(error, match=says):
        circuits.load_transcoders(model_of("gemma2"), make(tmp_path))


def test_what_is_asked_wrongly(tmp_path: Path) -> None:
    model = model_of("gpt2")
    with pytest.raises(MissingFileError, match="no such folder"):
        circuits.load_transcoders(model, tmp_path / "no")
    transcoder_set(tmp_path, activation="relu")
    with pytest.raises(WorkbenchError, match="layer '1'"):
        circuits.load_transcoders(model, tmp_path, layers=[1])
    across(tmp_path / "clt")
    with pytest.raises(InvalidInputError, match="Leave layers out"):
        circuits.load_transcoders(model, tmp_path / "clt", layers=[1])
    (tmp_path / "clt" / "W_enc_1.safetensors").unlink()
    with pytest.raises(MissingFileError, match="lacks W_enc_1"):
        circuits.load_transcoders(model, tmp_path / "clt")
