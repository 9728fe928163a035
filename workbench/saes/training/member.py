"""One SAE while it is trained: weights, optimiser, dead features, threshold, and their way into files and back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.core.metrics import squared_error
from workbench.core.numbers import setting
from workbench.core.records import to_jsonable
from workbench.saes.architectures.base import Architecture, AuxTask, StepOptions, StepResult
from workbench.saes.config import SAEConfig
from workbench.saes.formats.normalise import Normaliser, fold_decoder_norm
from workbench.saes.formats.save import Encoder, Provenance, save_sae
from workbench.saes.kernels.weights import SAEWeights
from workbench.saes.training.batches import Pair
from workbench.saes.training.build import KernelChoice
from workbench.saes.training.checkpoint import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    check_same,
    read_checkpoint,
    store_id,
    truncate_metrics,
    write_checkpoint,
)
from workbench.saes.training.optim import adam_step
from workbench.saes.training.threshold import RunningThreshold

EVALUATIONS_PER_RUN = 10
MAX_DEAD_PER_STEP = 1024
MAX_STEPS_BETWEEN_CHECKS = 100
MEASURED_ROWS_PER_CHUNK = 2048
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")

Log = Callable[[str, dict[str, int | float]], None]
"""Takes the name of an SAE and one line of its training metrics."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a member is trained with, apart from its own state.

    Attributes:
        store: the activations.
        config: what to train, with its site.
        architecture: what computes a step, with its kernel.
        normaliser: the scale of training.
        held_out: what it is measured on, raw; the second is None for an SAE.
        device: where.
        kernel: the kernel, and how it was chosen.
    """

    store: ActivationStore
    config: SAEConfig
    architecture: Architecture
    normaliser: Normaliser
    held_out: tuple[Tensor, Tensor | None]
    device: torch.device
    kernel: KernelChoice


class Member:
    """One SAE in training. `step` counts the batches it has seen."""

    def __init__(self, setting: Setting, folder: Path, log: Log | None = None) -> None:
        self.setting, self.config, self.folder, self.log = setting, setting.config, folder, log
        self.architecture, self.device = setting.architecture, setting.device
        self.weights = _initial_weights(setting)
        self.optimiser = torch.optim.Adam(
            self.weights.tensors(), lr=self.config.peak_lr, betas=self.config.betas, fused=True
        )
        self.since_fired = torch.zeros(self.config.d_sae, dtype=torch.long, device=self.device)
        self.dead = torch.zeros(0, dtype=torch.long, device=self.device)
        self.threshold = RunningThreshold(self.device)
        self.recent: float | None = None
        self.step, self.seconds = 0, 0.0
        self.problem: str | None = None
        self._latest: StepResult | None = None
        self.latest: dict[str, float] = {}
        """Loss and held-out FVU when they were last measured."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def is_done(self) -> bool:
        """Whether all steps were made, or none can be made any more."""
        return self.step >= self.config.steps or self.problem is not None

    @property
    def keeps_threshold(self) -> bool:
        """Whether it is saved with one threshold for all features."""
        return self.architecture.keeps_threshold

    def train_step(self, batch: Pair) -> None:
        """One step; measures and writes a line of metrics where it is due."""
        started = time.perf_counter()
        result = self.architecture.step(self.weights, batch.x, batch.target, self._options())
        gradients, W_dec = result.gradients, self.weights.W_dec
        is_unit = self.config.decoder_norm == "unit"
        if is_unit:
            # The part of the gradient along a row would only be undone by the renormalisation.
            along = torch.einsum("fd,fd->f", gradients.W_dec, W_dec)
            gradients.W_dec.addcmul_(along[:, None], W_dec, value=-1)
        for parameter, gradient in zip(self.weights.tensors(), gradients.tensors(), strict=True):
            parameter.grad = gradient
        adam_step(self.optimiser, self.config.lr_at(self.step), self.config.clip)
        if is_unit:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        self.architecture.after_step(self.weights)
        self.since_fired.add_(self.config.batch).masked_fill_(result.fired > 0, 0)
        if self.keeps_threshold:
            self.threshold.add(result.threshold)
        self.step += 1
        self._latest = result
        if self.step % self._check_every == 0 or self.step == self.config.steps:
            self._check()
        self.seconds += time.perf_counter() - started
        if self._is_due() and self.problem is None:
            self._record(result)

    @property
    def _check_every(self) -> int:
        """Steps between looks at the state of the device; the list of dead features is never much out of date."""
        return max(1, min(MAX_STEPS_BETWEEN_CHECKS, self.config.dead_after // (4 * self.config.batch)))

    def _check(self) -> None:
        """Looks for dead features and for a loss that is not finite."""
        assert self._latest is not None
        loss = float(self._latest.loss)
        if not math.isfinite(loss):
            self.problem = (
                f"{self.folder}: the loss is {loss} at step {self.step} with lr={setting(self.config.peak_lr)}. "
                f"{self._kept()} Lower lr."
            )
            return
        self.recent = self.threshold.value()
        dead = (self.since_fired >= self.config.dead_after).nonzero().squeeze(1)
        if len(dead) > MAX_DEAD_PER_STEP:
            random = torch.Generator().manual_seed(self.config.seed + self.step)
            dead = dead[torch.randperm(len(dead), generator=random)[:MAX_DEAD_PER_STEP].to(self.device)]
        self.dead = dead

    def _kept(self) -> str:
        has_one = (self.folder / CHECKPOINT_FILE).is_file()
        return "The last checkpoint before it is kept." if has_one else "There was no checkpoint yet."

    def _options(self) -> StepOptions:
        config, aux = self.config, None
        if config.aux_coefficient and self.architecture.revives and len(self.dead):
            # The main loss of the mean predictor is d_out here; the auxiliary loss is relative to the variance.
            d_out = self.weights.b_dec.numel()
            aux = AuxTask(self.dead, config.aux_k or max(1, d_out // 2), config.aux_coefficient * d_out)
        recent = self.recent if self.device.type != "cpu" or not self.keeps_threshold else self.threshold.value()
        return StepOptions(
            aux=aux, sparsity=config.sparsity_at(self.step, self.weights.b_dec.numel()), threshold=recent
        )

    def _is_due(self) -> bool:
        every = max(1, self.config.steps // EVALUATIONS_PER_RUN)
        return self.step % every == 0 or self.step == self.config.steps

    def _record(self, result: StepResult) -> None:
        losses = {"loss": result.loss, "aux_loss": result.aux_loss, "sparsity_loss": result.sparsity_loss}
        shown = {name: float(value) for name, value in losses.items() if name == "loss" or float(value)}
        line = {"step": self.step, "tokens": self.step * self.config.batch, **shown, **self.measure()}
        if not math.isfinite(line["loss"]):
            return
        self.latest = {"loss": line["loss"], "FVU": line["fvu"]}
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_jsonable(line), allow_nan=False) + "\n")
        if self.log is not None:
            self.log(self.name, dict(line))

    @torch.no_grad()
    def measure(self, threshold: float | None = None, exact: bool = False) -> dict[str, float]:
        """Held-out FVU and L0, and the share of features that are dead; ranked as in training unless `exact`."""
        is_fp32 = exact or self.setting.kernel.name in ("csr", "reference")
        if threshold is None and self.keeps_threshold:
            threshold = self.threshold.value() or 0.0
        raw_x, raw_target = self.setting.held_out
        raw = raw_x if raw_target is None else raw_target
        error, active = 0.0, 0
        for start in range(0, len(raw_x), MEASURED_ROWS_PER_CHUNK):
            pair = self._held_out(slice(start, start + MEASURED_ROWS_PER_CHUNK))
            acts = self.architecture.encode(
                self.weights, pair.x, centred=raw_target is None, threshold=threshold,
                dtype=torch.float32 if is_fp32 else torch.bfloat16,
            )  # fmt: skip
            x_hat = acts.decode(self.weights.W_dec) + self.weights.b_dec
            error += float(squared_error(pair.x if pair.target is None else pair.target, x_hat).sum())
            active += int((acts.values > 0).sum())
        variance = float(squared_error(raw, raw.mean(0).expand(raw.shape)).sum())
        variance *= self.setting.normaliser.written.scale**2
        dead = self.since_fired >= self.config.dead_after
        return {"fvu": error / variance, "l0": active / len(raw_x), "dead": float(dead.double().mean())}

    def _held_out(self, rows: slice) -> Pair:
        raw_x, raw_target = self.setting.held_out
        normaliser = self.setting.normaliser
        x = normaliser.read_(raw_x[rows].clone().to(self.device))
        if raw_target is None:
            return Pair(x, None)
        return Pair(x, normaliser.reconstructed_(raw_target[rows].clone().to(self.device)))

    def save(self, stream: dict[str, int]) -> bool:
        """Writes a checkpoint, unless what there is can't be used; returns whether it did."""
        if self.problem is not None or not all(bool(t.isfinite().all()) for t in self.weights.tensors()):
            return False
        named = self.weights.named()
        tensors = {f"weight.{name}": tensor for name, tensor in named.items()}
        for name, parameter in named.items():
            state = self.optimiser.state.get(parameter, {})
            tensors |= {f"{key}.{name}": value for key, value in state.items()}
        tensors |= {"since_fired": self.since_fired, "dead": self.dead, "threshold": self.threshold.state}
        state = {
            "config": to_jsonable(self.config), "store": store_id(self.setting.store), "step": self.step,
            "stream": stream, "kernel": self.setting.kernel.name, "seconds": self.seconds, "recent": self.recent,
        }  # fmt: skip
        write_checkpoint(self.folder, {name: t.cpu().contiguous() for name, t in tensors.items()}, state)
        return True

    def restore(self) -> dict[str, int] | None:
        """Goes to its checkpoint; returns where the stream was then, or None if there is no checkpoint."""
        checkpoint = read_checkpoint(self.folder)
        if checkpoint is None:
            truncate_metrics(self.folder, 0)
            return None
        tensors, state = checkpoint
        check_same(self.folder / CHECKPOINT_FILE, state["config"], state["store"], self.config, self.setting.store)
        for name, parameter in self.weights.named().items():
            parameter.copy_(tensors[f"weight.{name}"])
            keys = [key for key in ADAM_STATE if f"{key}.{name}" in tensors]
            self.optimiser.state[parameter] = {key: tensors[f"{key}.{name}"].to(self.device) for key in keys}
        self.since_fired.copy_(tensors["since_fired"])
        self.threshold.state.copy_(tensors["threshold"])
        self.dead = tensors["dead"].to(self.device)
        self.step, self.seconds, self.recent = state["step"], state["seconds"], state["recent"]
        truncate_metrics(self.folder, self.step)
        return state["stream"]

    @torch.no_grad()
    def finish(self, calibration: Tensor | None) -> dict[str, float] | None:
        """Saves the SAE and removes the checkpoint; returns the final metrics, or None if it can't be used."""
        config, normaliser = self.config, self.setting.normaliser
        # Features are ranked by activation times decoder norm, which is the activation once the norm is folded.
        weights = fold_decoder_norm(self.weights) if config.decoder_norm == "free" else self.weights
        threshold = None
        if self.keeps_threshold and calibration is not None:
            x = normaliser.read_(calibration.to(self.device, torch.float32, copy=True))
            start = self.threshold.value() or 1.0
            threshold = self.architecture.calibrate(weights, x, start=start, centred=config.target_site is None)
        metrics = {**self.measure(threshold, exact=True), "steps": float(self.step), "seconds": round(self.seconds, 2)}
        if not math.isfinite(metrics["fvu"]):
            self.problem = f"{self.folder}: the held-out FVU is {metrics['fvu']} at the end. {self._kept()} Lower lr."
            return None
        encoder = Encoder(
            architecture=config.architecture,
            k=config.active,
            threshold=None if threshold is None else threshold / normaliser.written.scale,
        )
        save_sae(normaliser.fold(weights), encoder, self.folder, self._origin(metrics))
        (self.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return metrics

    def _origin(self, metrics: dict[str, float]) -> Provenance:
        store, config = self.setting.store, self.config
        manifest, site = store.manifest, str(config.site)
        return Provenance(
            model_name=manifest.model_name, model_fingerprint=manifest.model_fingerprint, site=site,
            target_site=config.target_site, context=manifest.context, keep=store.keep_rule(site),
            starts_with_bos=manifest.packing is None or manifest.packing.starts_with_bos is not False,
            training={
                "config": config, "store": store_id(store), "metrics": metrics, "kernel": self.setting.kernel,
                "kept_share": manifest.kept_share,
            },
        )  # fmt: skip


def _initial_weights(setting: Setting) -> SAEWeights:
    """Random unit decoder rows, the encoder their transpose where it can be, `b_dec` at the mean."""
    config, normaliser = setting.config, setting.normaliser
    random = torch.Generator().manual_seed(config.seed)
    written = normaliser.written
    W_dec = _unit_rows(config.d_sae, len(written.mean), random)
    if setting.normaliser.target is None:
        W_enc = W_dec.clone()
    else:
        W_enc = _unit_rows(config.d_sae, len(normaliser.source.mean), random)
    weights = SAEWeights(W_enc, torch.zeros(config.d_sae), W_dec, written.mean * written.scale)
    on_device = SAEWeights(**{name: tensor.to(setting.device) for name, tensor in weights.named().items()})
    return setting.architecture.start(on_device)


def _unit_rows(rows: int, width: int, random: torch.Generator) -> Tensor:
    W = torch.randn(rows, width, generator=random)
    return W / W.norm(dim=1, keepdim=True)
