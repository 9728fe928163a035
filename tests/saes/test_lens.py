from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.formats.load import load_sae, sae_lens_module
from workbench.saes.training.sae_lens_trainer import register_with_sae_lens

D, M, BATCH = 12, 48, 64
STOCK = {
    "relu": "StandardTrainingSAE", "topk": "TopKTrainingSAE", "batchtopk": "BatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE", "gated": "GatedTrainingSAE", "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"l1_coefficient": 0.3}, "topk": {"k": 5}, "batchtopk": {"k": 5.0}, "gated": {"l1_coefficient": 0.3},
    "jumprelu": {"l0_coefficient": 0.02, "l0_warm_up_steps": 3, "jumprelu_init_threshold": 0.1},
    "matryoshka": {"k": 5.0, "matryoshka_widths": [12, 24, 48]},
}  # fmt: skip
INFERENCE = {"relu": "standard", "topk": "topk", "gated": "gated"}


def _batches(seed: int = 0) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=g)
    while True:
        yield torch.randn(BATCH, D, generator=g) @ mixing / 3 + 0.5


def _pair(name: str, **more: Any) -> tuple[Any, Any]:
    """Ours and the stock training SAE with the same weights, none of them zero."""
    lens = sae_lens_module()
    cls, config = register_with_sae_lens()[f"workbench_{name}"]
    options = {**OPTIONS[name], **more}
    ours = cls(config(d_in=D, d_sae=M, **copy.deepcopy(options)))
    stock = getattr(lens, STOCK[name])(getattr(lens, f"{STOCK[name]}Config")(d_in=D, d_sae=M, **options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in sorted(ours.named_parameters()):
            if key != "threshold":
                value.add_(0.1 * torch.randn(value.shape, generator=g))
        for key, value in stock.named_parameters():
            value.copy_(dict(ours.named_parameters())[key])
    return ours, stock


def _train(sae: Any, steps: int = 6) -> tuple[list[float], Any]:
    lens = sae_lens_module()
    from sae_lens.config import SAETrainerConfig

    config = SAETrainerConfig(
        total_training_samples=BATCH * steps, train_batch_size_samples=BATCH, lr=3e-3, lr_end=3e-4, lr_warm_up_steps=0,
        lr_decay_steps=0, lr_scheduler_name="constant", device="cpu", autocast=False, dead_feature_window=1000,
        feature_sampling_window=2000, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        logger=lens.LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=2,
    )  # fmt: skip
    trainer = lens.SAETrainer(cfg=config, sae=sae, data_provider=_batches(), evaluator=None, save_checkpoint_fn=None)
    losses, batches = [], _batches()
    for _ in range(steps):
        losses.append(float(trainer.step(next(batches)).loss.detach()))
        trainer.n_training_steps += 1
    return losses, trainer


@pytest.mark.parametrize("name", STOCK)
def test_the_trainer_of_sae_lens_gets_the_same_losses_and_parameters(name: str) -> None:
    ours, stock = _pair(name)
    before = {key: value.detach().clone() for key, value in ours.named_parameters()}
    mine, trainer = _train(ours)
    theirs, other = _train(stock)
    assert mine == pytest.approx(theirs, rel=1e-5)
    for key, value in stock.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[key], value, atol=5e-6, rtol=0)
        assert not torch.equal(before[key], value), f"{key} was trained"
    assert torch.equal(trainer.act_freq_scores, other.act_freq_scores)
    assert torch.equal(trainer.n_forward_passes_since_fired, other.n_forward_passes_since_fired)


@pytest.mark.parametrize("name", STOCK)
def test_what_is_trained_is_saved_as_a_stock_folder(name: str, tmp_path: Path) -> None:
    ours, _ = _pair(name)
    _train(ours, 8)
    ours.save_inference_model(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == INFERENCE.get(name, "jumprelu")
    x = next(_batches(seed=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = sae_lens_module().SAE.load_from_disk(tmp_path)
    assert type(stock).__module__.startswith("sae_lens")
    torch.testing.assert_close(load_sae(tmp_path)(x), stock(x))
    if name in ("batchtopk", "matryoshka"):
        l0 = float((stock.encode(x) > 0).sum(1).float().mean())
        assert l0 == pytest.approx(5.0, rel=0.5), "without the correction every positive feature would be kept"
    else:
        torch.testing.assert_close(stock(x), ours(x), atol=1e-5, rtol=1e-5)


def test_the_running_threshold_does_not_start_at_zero(tmp_path: Path) -> None:
    ours, stock = _pair("batchtopk")
    _train(ours, 4)
    _train(stock, 4)
    assert float(ours.topk_threshold) == pytest.approx(float(stock.topk_threshold), rel=1e-5), "the same average"
    ours.save_inference_model(tmp_path)
    corrected = float(load_sae(tmp_path).threshold[0])
    assert corrected == pytest.approx(float(stock.topk_threshold) / (1 - 0.99**4), rel=1e-5)


def test_dead_features_are_revived() -> None:
    ours, stock = _pair("topk", aux_loss_coefficient=0.5)
    found = _step(ours, torch.arange(M) < 8).losses["auxiliary_reconstruction_loss"].detach()
    with torch.no_grad():
        x = next(_batches(seed=5))
        residual = x - _step(stock, None, logging=True).sae_out
        pre = ((x - ours.b_dec) @ ours.W_enc + ours.b_enc)[:, :8] * ours.W_dec[:8].norm(dim=1)
        acts = (pre * (pre >= pre.topk(6).values[:, -1:])).relu() / ours.W_dec[:8].norm(dim=1)  # 6 = D / 2
        variance = (residual - residual.mean(0)).square().sum()
        torch.testing.assert_close(found, 0.5 * (acts @ ours.W_dec[:8] - residual).square().sum() / variance)
    _step(ours, dead=None).loss.backward()
    quiet = ours.W_dec.grad[:8].clone()
    ours.zero_grad()
    _step(ours, dead=torch.arange(M) < 8).loss.backward()
    assert not torch.allclose(ours.W_dec.grad[:8], quiet)
    torch.testing.assert_close(ours.W_dec.grad[8:], _grad_without(ours)[8:])


def _grad_without(sae: Any) -> Tensor:
    sae.zero_grad()
    _step(sae, dead=None).loss.backward()
    return sae.W_dec.grad


def _step(sae: Any, dead: Tensor | None, logging: bool = False) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    x = next(_batches(seed=5))
    return sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, logging))


def test_logging_steps_show_the_tensors() -> None:
    ours, stock = _pair("topk")
    mine, theirs = _step(ours, None, logging=True), _step(stock, None, logging=True)
    torch.testing.assert_close(mine.sae_out, theirs.sae_out)
    torch.testing.assert_close(mine.feature_acts, theirs.feature_acts)
    counted = _step(ours, None).feature_acts.bool().float()
    assert float(counted.sum(-1).mean()) == pytest.approx(float((theirs.feature_acts > 0).float().sum(-1).mean()))


def test_the_gradient_is_scaled_as_any_other() -> None:
    ours, _ = _pair("topk")
    _step(ours, None).loss.backward()
    once = ours.W_enc.grad.clone()
    ours.zero_grad()
    (3 * _step(ours, None).loss).backward()
    torch.testing.assert_close(ours.W_enc.grad, 3 * once)


def test_registering_twice_and_what_the_step_does_not_know() -> None:
    assert register_with_sae_lens() == register_with_sae_lens()
    with pytest.raises(InvalidInputError, match="normalize_activations='layer_norm'"):
        _pair("topk", normalize_activations="layer_norm")
    with pytest.raises(InvalidInputError, match="lp_norm=2"):
        _pair("relu", lp_norm=2.0)
    with pytest.raises(InvalidInputError, match="not offered"):
        _pair("jumprelu", jumprelu_ste_to_input=True)
