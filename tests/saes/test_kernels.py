from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.core.errors import UnknownNameError
from workbench.saes.architectures import (
    Architecture,
    AuxTask,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
    StepOptions,
    StepResult,
    TopK,
)
from workbench.saes.formats.load import sae_lens_module
from workbench.saes.kernels.weights import SAEWeights
from workbench.saes.training import kernel_choice as kernels
from workbench.saes.training.kernel_choice import available_kernels, choose_kernel, measure_kernels, with_kernel
from workbench.saes.training.optim import adam_step

from .test_select import make_weights, make_x

D, M, K, N = 16, 128, 4, 300
COEFFICIENT = 0.3
RENAMED = {"b_gate": "b_enc"}


def imported(name: str) -> ModuleType:
    """A module of sae_lens; what it imports is partly deprecated, which is not our concern."""
    sae_lens_module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def lens_kinds() -> dict[str, tuple[Architecture, Any]]:
    """Each architecture beside the training SAE of sae_lens with the same settings."""
    lens = sae_lens_module()
    size: dict[str, Any] = {"d_in": D, "d_sae": M, "dtype": "float64"}
    jump = {"jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.4}
    tanh, widths = {"jumprelu_sparsity_loss_mode": "tanh"}, (16, 50, M)
    return {
        "topk": (TopK(K, True), lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(k=K, **size))),
        "topk, norms ignored": (
            TopK(K), lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(k=K, rescale_acts_by_decoder_norm=False, **size)),
        ),
        "batchtopk": (BatchTopK(K, True), lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(k=K, **size))),
        "matryoshka": (
            Matryoshka(K, widths, True),
            lens.MatryoshkaBatchTopKTrainingSAE(
                lens.MatryoshkaBatchTopKTrainingSAEConfig(k=K, matryoshka_widths=list(widths), **size)
            ),
        ),
        "relu": (ReLU(), lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(**size))),
        "jumprelu": (
            JumpReLU(0.5, 0.4), lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**jump, **size)),
        ),
        "jumprelu tanh": (
            JumpReLU(0.5, 0.4, "tanh"), lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**jump, **tanh, **size)),
        ),
        "gated": (Gated(), lens.GatedTrainingSAE(lens.GatedTrainingSAEConfig(**size))),
    }  # fmt: skip


def copy_of(sae: Any) -> SAEWeights:
    """The parameters of a sae_lens SAE, each made random first."""
    values = make_weights(D, M)
    noise = torch.randn(2, M, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    random = {
        "W_enc": values.W_enc.T, "b_enc": values.b_enc, "b_gate": values.b_enc, "W_dec": values.W_dec,
        "b_dec": values.b_dec, "threshold": 0.4 + 0.1 * noise[0].abs(), "r_mag": 0.2 * noise[0], "b_mag": 0.2 * noise[1],
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(random[name])
    return ours(dict(sae.named_parameters()))


def ours(tensors: dict[str, Tensor]) -> SAEWeights:
    named = {RENAMED.get(name, name): t.detach().clone() for name, t in tensors.items()}
    named["W_enc"] = named["W_enc"].T.contiguous()
    return SAEWeights(**named)


@pytest.mark.parametrize(
    "name", ["topk", "topk, norms ignored", "batchtopk", "matryoshka", "relu", "jumprelu", "jumprelu tanh", "gated"]
)
def test_losses_and_gradients_are_those_of_sae_lens(name: str) -> None:
    kind, sae = lens_kinds()[name]
    weights, x = copy_of(sae), make_x(N, D)
    coefficients = dict.fromkeys(("l0", "l1"), COEFFICIENT)
    out = sae.training_forward_pass(
        imported("sae_lens.saes.sae").TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
    )
    out.loss.backward()
    expected = ours({name: p.grad for name, p in sae.named_parameters()})
    if weights.threshold is not None:
        weights.threshold = weights.threshold.double()
    found = kind.step(weights, x, options=StepOptions(torch.float64, sparsity=COEFFICIENT))
    total = found.loss + found.aux_loss + found.sparsity_loss
    torch.testing.assert_close(total, out.loss.detach(), rtol=1e-6, atol=0)
    for key, gradient in expected.named().items():
        mine = found.gradients.named()[key]
        assert float((mine - gradient).norm() / gradient.norm()) < 1e-6, key


def lens_trainer(sae: Any, lr: float) -> Any:
    """The trainer of sae_lens, without warm-up and logging."""
    config, trainer = imported("sae_lens.config"), imported("sae_lens.training.sae_trainer")
    return trainer.SAETrainer(
        cfg=config.SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=N, lr=lr, lr_end=lr, lr_warm_up_steps=0,
            lr_decay_steps=0, lr_scheduler_name="constant", device="cpu", autocast=False, dead_feature_window=10**6,
            feature_sampling_window=10**6, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            logger=config.LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=1,
        ),
        sae=sae, data_provider=iter(()), evaluator=None, save_checkpoint_fn=None,
    )  # fmt: skip


def train(
    kind: Architecture, weights: SAEWeights, batches: list[Tensor], dtype: torch.dtype = torch.float32, lr: float = 3e-4
) -> float:
    """Adam with clipping on these batches; the last loss."""
    optimiser = torch.optim.Adam(weights.tensors(), lr=lr, betas=(0.9, 0.999), fused=True)
    result: StepResult | None = None
    for x in batches:
        result = kind.step(weights, x, options=StepOptions(dtype))
        for parameter, gradient in zip(weights.tensors(), result.gradients.tensors(), strict=True):
            parameter.grad = gradient
        adam_step(optimiser, lr, clip=1.0)
    assert result is not None
    return float(result.loss)


# Raised inside the trainer of sae_lens, which turns losses into numbers for its log.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
@pytest.mark.parametrize(("steps", "tolerance"), [(6, 5e-6), (30, 1e-4)])
def test_training_follows_the_trainer_of_sae_lens(steps: int, tolerance: float) -> None:
    lens = sae_lens_module()
    sae = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K))
    weights = copy_of(sae)
    x = make_x(N * steps, D, torch.float32).split(N)
    trainer = lens_trainer(sae, 3e-4)
    expected_loss = 0.0
    for batch in x:
        expected_loss = float(trainer._train_step(sae=sae, sae_in=batch).loss.detach())
        trainer.n_training_steps += 1
    start = copy_of(lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(d_in=D, d_sae=M, k=K)))
    loss = train(TopK(K, by_decoder_norm=True), weights, list(x))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    expected = ours(dict(sae.named_parameters()))
    for mine, theirs, first in zip(weights.tensors(), expected.tensors(), start.tensors(), strict=True):
        assert float((mine - theirs).abs().max()) <= tolerance
        assert float((mine - first).abs().max()) > 10 * tolerance, "the comparison must not be of parameters that rest"


def test_training_with_bf16_ranking_ends_at_the_same_loss() -> None:
    random, d, m = torch.Generator().manual_seed(1), 32, 256
    basis = torch.nn.functional.normalize(torch.randn(128, d, generator=random), dim=1)
    codes = torch.rand(8192, 128, generator=random) * (torch.rand(8192, 128, generator=random) < 0.05)
    x = codes @ basis
    rows = torch.nn.functional.normalize(torch.randn(m, d, generator=random), dim=1)
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = SAEWeights(rows.clone(), torch.zeros(m), rows.clone(), x.mean(0))
        train(TopK(K), weights, list(x.split(512)) * 20, dtype, lr=3e-3)
        ends.append(float(TopK(K).step(weights, x).loss))
    assert ends[1] == pytest.approx(ends[0], rel=5e-3)
    assert ends[0] < 0.5 * float((x - x.mean(0)).square().sum(1).mean())


def test_the_fastest_kernel_is_chosen_and_lower_precision_must_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for csr, bf16, expected in ((1.0, 0.95, "csr"), (1.0, 0.5, "csr_bf16"), (0.5, 1.0, "csr")):
        monkeypatch.setattr(kernels, "_measured", lambda *_, a=csr, b=bf16: {"csr": a, "csr_bf16": b})
        assert choose_kernel("cpu", 8, 16, 2) == expected


def test_measured_kernels_are_those_of_the_device() -> None:
    seconds = measure_kernels("cpu", D, M, K)
    assert tuple(seconds) == available_kernels("cpu") == ("csr", "csr_bf16")
    assert all(0 < s < 10 for s in seconds.values())
    assert "dense" in available_kernels("cuda")


@pytest.mark.parametrize("name", [name for name in kernels.KERNELS if name != "triton"])
def test_every_kernel_computes_the_same_step(name: str) -> None:
    weights, x = make_weights(D, M), make_x(N, D)
    options = StepOptions(torch.float64, AuxTask(torch.arange(0, M, 5), 3, 1.0))
    expected = TopK(K).step(weights, x, options=options)
    found = with_kernel(TopK(K), name).step(weights, x, options=options)
    # bf16 ranks a few features otherwise.
    tolerance = 1e-12 if name in ("csr", "reference") else 0.01
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=tolerance)
    assert with_kernel(TopK(K), name).revives


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="csr_bf16"):
        with_kernel(TopK(K), "csr_bf61")
