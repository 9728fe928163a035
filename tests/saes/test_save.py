from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.saes.stores import READ, SITE, WRITTEN, small_store, tensors
from tests.tiny import tiny_model
from workbench.activations.harvest import harvest
from workbench.activations.sources import TextFiles, TokenRows
from workbench.activations.store import ActivationStore
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import InvalidInputError
from workbench.saes.architectures import Architecture, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import load_sae
from workbench.saes.formats.normalise import Normaliser, SiteScale, fold_decoder_norm
from workbench.saes.formats.save import Encoder, Provenance, save_sae, save_topk
from workbench.saes.kernels.weights import SAEWeights
from workbench.saes.training import threshold as threshold_module
from workbench.saes.training.threshold import RunningThreshold
from workbench.saes.training.train import train_sae

D_IN, D_OUT, D_SAE, THRESHOLD = 12, 7, 40, 0.7
KINDS: dict[str, tuple[Architecture, str]] = {
    "topk": (TopK(5, by_decoder_norm=True), "topk"),
    "batchtopk": (BatchTopK(5.0, by_decoder_norm=True), "jumprelu"),
    "matryoshka": (Matryoshka(5.0, by_decoder_norm=True, widths=(8, D_SAE)), "jumprelu"),
    "jumprelu": (JumpReLU(0.05, 0.3), "jumprelu"),
    "relu": (ReLU(), "standard"),
    "gated": (Gated(), "gated"),
}
TRANSCODERS = {"batchtopk": "jumprelu_transcoder", "matryoshka": "jumprelu_transcoder", "relu": "transcoder"}
TRANSCODERS["jumprelu"] = "jumprelu_transcoder"
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in TRANSCODERS]

PLAIN_SAE_LENS = """
import json, sys, torch, safetensors.torch
from pathlib import Path
from sae_lens import SAE
found = {}
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    sae, data = SAE.load_from_disk(folder), safetensors.torch.load_file(folder / "data.safetensors")
    acts = sae.encode(data["x"])
    found[folder.name] = [
        type(sae).__name__, float((acts - data["acts"]).abs().max()),
        float((sae.decode(acts) - data["x_hat"]).abs().max()),
    ]
assert not any(name.split(".")[0] == "workbench" for name in sys.modules)
print(json.dumps(found))
"""


def _origin(target: str | None = None) -> Provenance:
    return Provenance(
        model_name="m", model_fingerprint="f", site=SITE, target_site=target, context=10, keep=TokenPolicy(1e6, (0,)),
        training={"metrics": {}},
    )  # fmt: skip


def _weights(kind: Architecture, seed: int, transcoder: bool) -> SAEWeights:
    """Every parameter random, no decoder row of unit norm."""
    g = torch.Generator().manual_seed(seed)
    d_out = D_OUT if transcoder else D_IN
    shapes = ((D_SAE, D_IN), (D_SAE,), (D_SAE, d_out), (d_out,))
    weights = kind.start(SAEWeights(*(torch.randn(*shape, generator=g) / 2 for shape in shapes)))
    own = {"r_mag": 0.3, "b_mag": 0.5, "threshold": 0.4}
    extra = {name: torch.rand(D_SAE, generator=g) * own[name] for name in weights.named() if name in own}
    return replace(weights, **extra)


def _normaliser(transcoder: bool) -> Normaliser:
    g = torch.Generator().manual_seed(9)
    target = SiteScale(torch.randn(D_OUT, generator=g), 3.1) if transcoder else None
    return Normaliser(SiteScale(torch.randn(D_IN, generator=g), 1.7), target)


def _raw(normaliser: Normaliser, kind: Architecture, weights: SAEWeights, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What training computes, in raw units: activations times decoder norm, and the reconstruction."""
    is_sae, out = normaliser.target is None, normaliser.written.scale
    acts = kind.encode(weights, normaliser.read_(x.clone()), centred=is_sae, threshold=THRESHOLD).dense()
    x_hat = (acts @ weights.W_dec + weights.b_dec) / out
    return {"x": x, "acts": acts * weights.W_dec.norm(dim=1) / out, "x_hat": x_hat}


def _save(folder: Path, name: str, transcoder: bool) -> dict[str, torch.Tensor]:
    kind = KINDS[name][0]
    weights, normaliser = _weights(kind, 3, transcoder), _normaliser(transcoder)
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(5))
    expected = _raw(normaliser, kind, weights, x)
    needs_threshold = name in ("batchtopk", "matryoshka")
    encoder = Encoder(
        architecture=name, k=5, threshold=THRESHOLD / normaliser.written.scale if needs_threshold else None
    )
    folded = normaliser.fold(fold_decoder_norm(weights))
    save_sae(folded, encoder, folder, _origin(WRITTEN if transcoder else None))
    return expected


def test_every_kind_loads_in_plain_sae_lens_with_the_same_output(tmp_path: Path) -> None:
    for name, transcoder in CASES:
        folder = tmp_path / f"{name}-{transcoder}"
        expected = _save(folder, name, transcoder)
        share = float((expected["acts"] > 0).double().mean())
        assert 0.02 < share < 0.9, (name, share)
        safetensors.torch.save_file({k: t.contiguous() for k, t in expected.items()}, folder / "data.safetensors")
    words = [sys.executable, "-W", "ignore", "-c", PLAIN_SAE_LENS, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(CASES)
    for name, transcoder in CASES:
        loaded, in_acts, in_x_hat = found[f"{name}-{transcoder}"]
        stock = TRANSCODERS[name] if transcoder else KINDS[name][1]
        assert loaded.lower() == stock.replace("_", "") + ("" if transcoder else "sae")
        assert max(in_acts, in_x_hat) <= 1e-5, (name, transcoder, in_acts, in_x_hat)


@pytest.mark.parametrize(("name", "transcoder"), CASES)
def test_what_is_folded_matters(tmp_path: Path, name: str, transcoder: bool) -> None:
    """The comparison above would notice a fold that was left out."""
    kind = KINDS[name][0]
    expected = _save(tmp_path / "right", name, transcoder)
    weights, normaliser = _weights(kind, 3, transcoder), _normaliser(transcoder)
    encoder = Encoder(architecture=name, k=5, threshold=THRESHOLD)
    origin = _origin(WRITTEN if transcoder else None)
    wrong = {"scale": fold_decoder_norm(weights), "norm": normaliser.fold(weights)}
    for what, weights in wrong.items():
        sae = load_sae(save_sae(weights, encoder, tmp_path / what, origin))
        assert float((sae.encode(expected["x"]) - expected["acts"]).abs().max()) > 0.01, what


def test_metadata_says_what_it_is(tmp_path: Path) -> None:
    _save(tmp_path, "batchtopk", True)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (D_IN, D_OUT, False)
    meta = config["metadata"]
    assert meta["hook_name_out"] == "blocks.1.hook_mlp_out" and meta["training_architecture"] == "batchtopk"
    assert meta["workbench"]["target_site"] == WRITTEN and meta["workbench"]["architecture"] == "batchtopk"
    assert meta["workbench"]["threshold"] == pytest.approx(THRESHOLD / 3.1)
    assert "sae_lens_version" in meta


def test_what_sae_lens_can_not_hold_is_refused(tmp_path: Path) -> None:
    weights = _weights(TopK(5), 0, True)
    for name in ("topk", "gated"):
        with pytest.raises(
            InvalidInputError, match=f"no transcoder .*'{name}'.*Known: batchtopk, jumprelu, matryoshka, relu"
        ):
            save_sae(weights, Encoder(architecture=name, k=5), tmp_path, _origin(WRITTEN))
    with pytest.raises(InvalidInputError, match="with a threshold"):
        save_sae(_weights(TopK(5), 0, False), Encoder(architecture="batchtopk"), tmp_path, _origin())
    with pytest.raises(InvalidInputError, match="with its k"):
        save_sae(_weights(TopK(5), 0, False), Encoder(architecture="topk"), tmp_path, _origin())
    with pytest.raises(InvalidInputError, match="r_mag"):
        save_sae(_weights(TopK(5), 0, False), Encoder(architecture="gated"), tmp_path, _origin())
    assert not list(tmp_path.iterdir())


def test_folding_the_decoder_norm_leaves_empty_rows_alone() -> None:
    weights = _weights(ReLU(), 0, False)
    weights.W_dec[0] = 0
    folded = fold_decoder_norm(weights)
    assert all(bool(tensor.isfinite().all()) for tensor in folded.tensors())
    torch.testing.assert_close(folded.W_dec.norm(dim=1)[1:], torch.ones(D_SAE - 1))


def test_a_topk_sae_is_saved_without_folding_its_decoder(tmp_path: Path) -> None:
    weights = _weights(TopK(5), 1, False)
    sae = load_sae(save_topk(weights, 5, tmp_path, _origin(), scale=2.0))
    assert torch.equal(sae.W_dec, weights.W_dec) and torch.equal(sae.W_enc, weights.W_enc.T)
    assert torch.equal(sae.b_enc, weights.b_enc / 2)


def test_the_running_threshold_is_right_from_the_first_batch() -> None:
    running = RunningThreshold(torch.device("cpu"))
    assert running.value() is None
    for _ in range(8):
        running.add(torch.tensor(3.0))
        running.add(torch.tensor(float("nan")))
    assert running.value() == pytest.approx(3.0), "without correction 8 batches give 0.23"
    for _ in range(500):
        running.add(torch.tensor(1.0))
    assert running.value() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("start", [1e-6, 0.5, 50.0])
def test_the_calibrated_threshold_keeps_k_features(start: float) -> None:
    kind = BatchTopK(3.0)
    weights = _weights(kind, 1, False)
    x = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(0))
    found = kind.calibrate(weights, x, start=start, centred=True)
    assert len(kind.encode(weights, x, threshold=found).values) == 1500
    weights.b_enc.sub_(100)
    assert kind.calibrate(weights, x, start=start, centred=True) == 0.0, "fewer are positive than are wanted"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return small_store(tmp_path_factory.mktemp("store"), (SITE, READ, WRITTEN), rows=400)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_a_short_run_is_saved_with_k_features_per_token(
    store: ActivationStore, tmp_path: Path, architecture: str, norm: str
) -> None:
    config = SAEConfig(
        architecture=architecture, d_sae=64, k=6, tokens=8 * 400, batch=400, site=SITE, kernel="csr",
        decoder_norm=norm,  # type: ignore[arg-type]
    )  # fmt: skip
    run = train_sae(store, config, tmp_path)
    x = torch.cat([acts.float() for acts in store.read(SITE, "train")])
    l0 = float((load_sae(tmp_path).encode(x) > 0).sum(1).double().mean())
    assert l0 == pytest.approx(6, rel=0.05)
    assert run.metrics["l0"] == pytest.approx(6, rel=0.1), "held out"


def test_the_check_of_l0_notices_an_average_that_starts_at_zero(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncorrected(self: RunningThreshold) -> float:
        return float(self.state[0])

    monkeypatch.setattr(RunningThreshold, "value", uncorrected)
    monkeypatch.setattr(BatchTopK, "calibrate", lambda *args, start, **kwargs: start)
    assert threshold_module.RATE == 0.01
    config = SAEConfig(architecture="batchtopk", d_sae=64, k=6, tokens=8 * 400, batch=400, site=SITE, kernel="csr")
    train_sae(store, config, tmp_path)
    x = torch.cat([acts.float() for acts in store.read(SITE, "train")])
    assert float((load_sae(tmp_path).encode(x) > 0).sum(1).double().mean()) > 1.5 * 6


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated"])
def test_norms_that_are_free_change_in_training_and_are_folded(
    store: ActivationStore, tmp_path: Path, architecture: str
) -> None:
    k = 6 if architecture == "topk" else None
    config = SAEConfig(
        architecture=architecture, d_sae=48, k=k, tokens=4000, batch=400, site=SITE, kernel="csr", lr=1e-2,
        decoder_norm="free",
    )  # fmt: skip
    run = train_sae(store, config, tmp_path)
    torch.testing.assert_close(tensors(tmp_path)["W_dec"].norm(dim=1), torch.ones(48))
    sae, x = load_sae(tmp_path), torch.cat([acts.float() for acts in store.read(SITE, "heldout")])
    x_hat = sae.decode(sae.encode(x))
    fvu = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(run.metrics["fvu"], rel=1e-3)


def test_the_head_and_the_start_of_rows_are_named_for_sae_lens(tmp_path: Path) -> None:
    ids = torch.randint(2, 200, (40, 8), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "a.txt"
    text.write_text("some text " * 100, encoding="utf-8")
    config = SAEConfig(d_sae=8, k=2, tokens=40, batch=20)
    for name, source, starts in (("rows", TokenRows(ids), True), ("text", TextFiles(text, context=8), False)):
        store = harvest(tiny_model(), source, ["z.1.h1"], tmp_path / f"store-{name}")
        train_sae(store, config, tmp_path / name)
        found = json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]
        assert (found["hook_name"], found["hook_head_index"]) == ("blocks.1.attn.hook_z", 1)
        assert found["prepend_bos"] is starts
