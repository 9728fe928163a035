from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore
from workbench.errors import CorruptFileError, DegenerateInputError, InvalidInputError, MismatchError, UnknownNameError
from workbench.metrics import mean_max_cosine
from workbench.saes import train as train_module
from workbench.saes.config import SAEConfig
from workbench.saes.io import load_sae
from workbench.saes.kernels import topk_step
from workbench.saes.train import adam_step, train_sae
from workbench.saes.weights import SAEWeights

CONFIG = SAEConfig(d_sae=64, k=4, tokens=4000, batch=100, dead_after=500, select="float32", buffer=300)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    ids = torch.randint(2, 200, (80, 12), generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("store")
    options = HarvestOptions(shard_tokens=200, batch_tokens=200)
    return harvest(tiny_model(), TokenRows(ids, batch_rows=8), ["resid_post.1"], folder, options=options)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "sae_weights.safetensors")


def test_training_explains_held_out_tokens_and_says_so(store: ActivationStore, tmp_path: Path) -> None:
    run = train_sae(store, CONFIG, tmp_path / "sae")
    lines = [json.loads(line) for line in (tmp_path / "sae" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == CONFIG.steps
    assert run.metrics["fvu"] == pytest.approx(lines[-1]["fvu"])
    assert run.metrics["fvu"] < 0.7 * lines[0]["fvu"] or run.metrics["fvu"] < 0.3
    sae = load_sae(tmp_path / "sae")
    x = torch.cat([acts.float() for acts in store.read(split="heldout")])
    x_hat = sae.decode(sae.encode(x))
    fvu = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(run.metrics["fvu"], rel=1e-3), "the saved SAE reads raw activations"
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    assert float((sae.encode(x) > 0).sum(1).double().mean()) == pytest.approx(run.metrics["l0"])


class _Stop(Exception):
    pass


def _interrupt_at(step: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_module._Trainer._train_step

    def stopping(self: Any) -> Any:
        if self.step == step:
            raise error
        return real(self)

    monkeypatch.setattr(train_module._Trainer, "_train_step", stopping)


def test_a_run_stopped_by_ctrl_c_goes_on_to_the_bit(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_sae(store, CONFIG, tmp_path / "whole")
    for step in (7, 23):
        with monkeypatch.context() as patch:
            _interrupt_at(step, KeyboardInterrupt, patch)
            with pytest.raises(KeyboardInterrupt):
                train_sae(store, CONFIG, tmp_path / "cut")
    assert not (tmp_path / "cut" / "cfg.json").exists()
    cut = train_sae(store, CONFIG, tmp_path / "cut")
    assert all(torch.equal(a, _tensors(whole.path)[name]) for name, a in _tensors(cut.path).items())
    assert (cut.path / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()
    assert {k: v for k, v in cut.metrics.items() if k != "seconds"} == {
        k: v for k, v in whole.metrics.items() if k != "seconds"
    }
    assert not (cut.path / "checkpoint.safetensors").exists()


def test_a_run_killed_after_a_checkpoint_goes_on_to_the_bit(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, checkpoint_seconds=0.0)
    whole = train_sae(store, config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _interrupt_at(17, _Stop, patch)
        with pytest.raises(_Stop):
            train_sae(store, config, tmp_path / "cut")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "half a li')
    cut = train_sae(store, config, tmp_path / "cut")
    assert all(torch.equal(a, _tensors(whole.path)[name]) for name, a in _tensors(cut.path).items())
    assert (cut.path / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()


def test_a_finished_run_is_returned_and_another_is_refused(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_sae(store, CONFIG, tmp_path / "sae")
    _interrupt_at(0, _Stop, monkeypatch)
    assert train_sae(store, CONFIG, tmp_path / "sae").metrics == run.metrics
    with pytest.raises(MismatchError, match=r"k=4 \(asked for 5\)"):
        train_sae(store, replace(CONFIG, k=5), tmp_path / "sae")


def test_a_broken_checkpoint_is_named(store: ActivationStore, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CorruptFileError, match="checkpoint.safetensors"):
        train_sae(store, CONFIG, tmp_path)


def test_seed_and_data_decide_the_result(store: ActivationStore, tmp_path: Path) -> None:
    runs = [
        train_sae(store, replace(CONFIG, seed=s, tokens=500), tmp_path / n) for s, n in ((0, "a"), (0, "b"), (1, "c"))
    ]
    first, again, other = (_tensors(run.path)["W_dec"] for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    part = train_sae(store, replace(CONFIG, tokens=500, distinct_tokens=240), tmp_path / "part")
    assert not torch.equal(_tensors(part.path)["W_dec"], first)


def test_held_out_tokens_are_not_trained_on(store: ActivationStore, tmp_path: Path) -> None:
    seen = []
    real = train_module.topk_step

    def spying(weights: SAEWeights, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(x.clone())
        return real(weights, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "topk_step", spying)
        train_sae(store, CONFIG, tmp_path / "sae")
    held_out = torch.cat([acts.float() for acts in store.read(split="heldout")])
    train = torch.cat([acts.float() for acts in store.read(split="train")])
    scale = float(torch.cat(seen).norm(dim=1).max() / train.norm(dim=1).max())
    distances = torch.cdist(torch.cat(seen) / scale, held_out)
    assert float(distances.min()) > 1e-2
    assert float(torch.cdist(torch.cat(seen)[:200] / scale, train).min(dim=1).values.max()) < 1e-2


def test_too_little_data_and_bad_settings_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(DegenerateInputError, match="one batch needs 2000"):
        train_sae(store, replace(CONFIG, batch=2000), tmp_path)
    with pytest.raises(UnknownNameError, match="topk"):
        SAEConfig(architecture="top-k")
    for wrong in (
        {"k": 0},
        {"k": 65},
        {"batch": 0},
        {"tokens": 1},
        {"lr": -1.0},
        {"warmup": 2.0},
        {"distinct_tokens": 0},
    ):
        with pytest.raises(InvalidInputError):
            replace(CONFIG, **wrong)


def test_clipping_bounds_the_step_that_adam_sees() -> None:
    parameters = [torch.zeros(3) for _ in range(2)]
    clipped, plain = (torch.optim.Adam([p], lr=0.1, fused=True) for p in parameters)
    for p in parameters:
        p.grad = torch.tensor([3.0, 4.0, 0.0])
    norm = adam_step(clipped, 0.1, clip=1.0)
    adam_step(plain, 0.1, clip=100.0)
    assert float(norm) == pytest.approx(5)
    first = clipped.state[parameters[0]]["exp_avg"]
    torch.testing.assert_close(first, 0.1 * torch.tensor([0.6, 0.8, 0.0]))
    torch.testing.assert_close(plain.state[parameters[1]]["exp_avg"], 0.1 * torch.tensor([3.0, 4.0, 0.0]))


def test_ground_truth_directions_are_found() -> None:
    d, n_true, k = 24, 48, 3
    random = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(n_true, d, generator=random), dim=1)
    W = torch.nn.functional.normalize(torch.randn(n_true * 2, d, generator=random), dim=1)
    weights = SAEWeights(W.clone(), torch.zeros(len(W)), W, torch.zeros(d))
    before = mean_max_cosine(truth, weights.W_dec)
    optimiser = torch.optim.Adam(weights.tensors(), lr=3e-3, fused=True)
    for step in range(1200):
        active = torch.rand(512, n_true, generator=random).topk(k, dim=1).indices
        size = 0.5 + torch.rand(512, k, generator=random)
        x = torch.zeros(512, n_true).scatter(1, active, size) @ truth
        gradients = topk_step(weights, x, k).gradients
        for parameter, gradient in zip(weights.tensors(), gradients.tensors(), strict=True):
            parameter.grad = gradient
        adam_step(optimiser, 3e-3 * min(1.0, (1200 - step) / 240), clip=1.0)
        weights.W_dec.div_(weights.W_dec.norm(dim=1, keepdim=True))
    assert before < 0.7
    assert mean_max_cosine(truth, weights.W_dec) > 0.95


PLAIN_SAE_LENS = """
import sys, torch, safetensors.torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
data = safetensors.torch.load_file(sys.argv[2])
assert not any(name.split(".")[0] == "workbench" for name in sys.modules)
assert type(sae).__name__ == "TopKSAE" and sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
acts = sae.encode(data["x"])
print(float((acts - data["acts"]).abs().max()), float((sae.decode(acts) - data["x_hat"]).abs().max()))
"""


def test_the_folder_loads_in_plain_sae_lens_with_the_same_output(store: ActivationStore, tmp_path: Path) -> None:
    run = train_sae(store, replace(CONFIG, tokens=1000), tmp_path / "sae")
    sae = load_sae(run.path)
    assert float(sae.b_enc.abs().max()) > 0
    x = next(store.read()).float()
    acts = sae.encode(x)
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": x, "acts": acts, "x_hat": sae.decode(acts)}, file)
    command = [sys.executable, "-c", PLAIN_SAE_LENS, str(run.path), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(float(difference) <= 1e-5 for difference in done.stdout.split()[-2:])
