"""Training: batches from the store, the sparse step, fused Adam, checkpoints that continue to the bit."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.activations.ring import RingBuffer
from workbench.activations.store import ActivationStore, open_store
from workbench.errors import CorruptFileError, DegenerateInputError, InvalidInputError, MismatchError
from workbench.metrics import squared_error
from workbench.progress import task
from workbench.records import load_json, to_jsonable, write_atomic
from workbench.saes.config import SAEConfig
from workbench.saes.io import CONFIG_FILE, WEIGHTS_FILE
from workbench.saes.kernels import (
    AuxTask,
    StepResult,
    decode_sparse,
    encode_sparse,
    probe_select_dtype,
    topk_step,
)
from workbench.saes.save import Provenance, save_topk
from workbench.saes.weights import SAEWeights

CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
HELD_OUT_ROWS = 4096
STATISTICS_ROWS = 262_144
EVALUATIONS = 10
MAX_DEAD_PER_STEP = 1024


@dataclass(frozen=True)
class SAERun:
    """A finished training run.

    Attributes:
        path: the SAE folder.
        metrics: held-out FVU, L0, share of dead features (over the last `dead_after` tokens), steps, seconds.
    """

    path: Path
    metrics: dict[str, float]


def train_sae(store: ActivationStore | str | Path, config: SAEConfig, out: str | Path) -> SAERun:
    """Trains an SAE on a store and saves it as a sae_lens folder.

    A run that was interrupted goes on from its last checkpoint when it is started again, with the same result to the
    bit on the same machine and number of threads. A finished run is returned as it is.

    Args:
        store: the activations, or their folder. One packed row in ten is held out for the FVU.
        config: what to train.
        out: folder of the SAE; also gets `metrics.jsonl`.

    Raises:
        MismatchError: if `out` holds an SAE or a checkpoint of another configuration or store.
        DegenerateInputError: if there are too few tokens.
    """
    store = open_store(store)
    config = replace(config, site=store.site(config.site))
    folder = Path(out)
    finished = _finished(folder, config, store)
    if finished is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    return _Trainer(store, config, folder).run()


class _Trainer:
    """State of one run: weights, optimiser, stream position, dead counters."""

    def __init__(self, store: ActivationStore, config: SAEConfig, folder: Path) -> None:
        self.store, self.config, self.folder = store, config, folder
        self.mean, self.scale = _statistics(store, config)
        self.weights = _initial_weights(config, self.mean * self.scale)
        parameters = self.weights.tensors()
        self.optimiser = torch.optim.Adam(parameters, lr=config.peak_lr, fused=True)
        self.since_fired = torch.zeros(config.d_sae, dtype=torch.long)
        self.held_out = _held_out(store, config) * self.scale
        self.stream = RingBuffer(self._epoch, min(config.buffer, max(2, store.rows)), config.seed)
        self.step, self.seconds = 0, 0.0
        self.select = self._select_dtype()

    def run(self) -> SAERun:
        self._restore()
        started = saved = time.monotonic()
        with task(
            total=self.config.steps * self.config.batch, description="Training the SAE", unit="tokens"
        ) as running:
            running.advance(self.step * self.config.batch)
            try:
                while self.step < self.config.steps:
                    result = self._train_step()
                    running.advance(self.config.batch)
                    if self._is_due():
                        self._record(result)
                    if time.monotonic() - saved > self.config.checkpoint_seconds:
                        self._save(time.monotonic() - started)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                self._save(time.monotonic() - started)
                raise
        return self._finish(self.seconds + time.monotonic() - started)

    def _epoch(self, epoch: int) -> Iterator[Tensor]:
        """Training tokens of the shards, in an order of their own per epoch."""
        order = torch.randperm(
            len(self.store.manifest.shards), generator=torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
        )
        for index in order.tolist():
            yield from _training_acts(self.store, self.config, index)

    def _train_step(self) -> StepResult:
        x = self.stream.next(self.config.batch).float() * self.scale
        result = topk_step(self.weights, x, self.config.k, dtype=self.select, aux=self._aux_task())
        gradients = result.gradients
        # Unit-norm rows: the part of the gradient along a row would only be undone by the renormalisation.
        along = (gradients.W_dec * self.weights.W_dec).sum(1, keepdim=True)
        gradients.W_dec.sub_(along * self.weights.W_dec)
        for parameter, gradient in zip(self.weights.tensors(), gradients.tensors(), strict=True):
            parameter.grad = gradient
        adam_step(self.optimiser, self.config.lr_at(self.step), self.config.clip)
        self.weights.W_dec.div_(self.weights.W_dec.norm(dim=1, keepdim=True))
        self.since_fired += self.config.batch
        self.since_fired[result.fired > 0] = 0
        self.step += 1
        return result

    def _aux_task(self) -> AuxTask | None:
        if not self.config.aux_coefficient:
            return None
        dead = (self.since_fired >= self.config.dead_after).nonzero().squeeze(1)
        if len(dead) > MAX_DEAD_PER_STEP:
            random = torch.Generator().manual_seed(self.config.seed + self.step)
            dead = dead[torch.randperm(len(dead), generator=random)[:MAX_DEAD_PER_STEP]]
        # The main loss of the mean predictor is d_in here; the auxiliary loss is relative to the variance.
        d_in = self.weights.b_dec.numel()
        return AuxTask(dead, max(1, d_in // 2), self.config.aux_coefficient * d_in)

    def _is_due(self) -> bool:
        every = max(1, self.config.steps // EVALUATIONS)
        return self.step % every == 0 or self.step == self.config.steps

    def _record(self, result: StepResult) -> None:
        if not math.isfinite(float(result.loss)):
            raise InvalidInputError(
                f"The loss is {float(result.loss)} at step {self.step} with lr={self.config.peak_lr:.2g}. Lower lr."
            )
        line = {
            "step": self.step,
            "tokens": self.step * self.config.batch,
            "loss": float(result.loss),
            **self._measure(),
        }
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _measure(self) -> dict[str, float]:
        acts = encode_sparse(self.weights, self.held_out, self.config.k, dtype=self.select)
        x_hat = decode_sparse(acts, self.weights.W_dec) + self.weights.b_dec
        variance = squared_error(self.held_out, self.held_out.mean(0).expand(self.held_out.shape)).sum()
        dead = self.since_fired >= self.config.dead_after
        return {
            "fvu": float(squared_error(self.held_out, x_hat).sum() / variance),
            "l0": float((acts.values > 0).sum(1).double().mean()),
            "dead": float(dead.double().mean()),
        }

    def _select_dtype(self) -> torch.dtype:
        if self.config.select == "auto":
            return probe_select_dtype(self.weights.b_dec.numel(), self.config.d_sae)
        return torch.float32 if self.config.select == "float32" else torch.bfloat16

    def _save(self, seconds: float) -> None:
        tensors = dict(zip(_names("weight"), self.weights.tensors(), strict=True)) | {"since_fired": self.since_fired}
        for parameter, name in zip(self.weights.tensors(), _names(""), strict=True):
            state = self.optimiser.state.get(parameter, {})
            tensors |= {f"{key}{name}": value for key, value in state.items()}
        state = {
            "config": to_jsonable(self.config), "store": _store_id(self.store), "step": self.step,
            "stream": self.stream.state_dict(), "select": str(self.select), "seconds": self.seconds + seconds,
        }  # fmt: skip
        raw = safetensors.torch.save(tensors, metadata={"state": json.dumps(state)})
        write_atomic(self.folder / CHECKPOINT_FILE, raw)

    def _restore(self) -> None:
        path = self.folder / CHECKPOINT_FILE
        if not path.is_file():
            (self.folder / METRICS_FILE).unlink(missing_ok=True)
            return
        tensors, state = _read_checkpoint(path)
        _check_same(path, state["config"], state["store"], self.config, self.store)
        for parameter, name in zip(self.weights.tensors(), _names(""), strict=True):
            parameter.copy_(tensors[f"weight{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}{name}" in tensors]
            self.optimiser.state[parameter] = {key: tensors[f"{key}{name}"].clone() for key in keys}
        self.since_fired = tensors["since_fired"].clone()
        self.stream.load_state_dict(state["stream"])
        self.step, self.seconds = state["step"], state["seconds"]
        # A new measurement could choose otherwise, and the run would no longer continue to the bit.
        self.select = torch.float32 if state["select"] == "torch.float32" else torch.bfloat16
        _truncate_metrics(self.folder / METRICS_FILE, self.step)

    def _finish(self, seconds: float) -> SAERun:
        metrics = {**self._measure(), "steps": float(self.step), "seconds": round(seconds, 2)}
        manifest, site = self.store.manifest, str(self.config.site)
        origin = Provenance(
            model_name=manifest.model_name, model_fingerprint=manifest.model_fingerprint, site=site,
            context=manifest.context, keep=self.store.keep_rule(site),
            training={
                "config": self.config, "store": _store_id(self.store), "metrics": metrics,
                "select": str(self.select), "kept_share": manifest.kept_share,
            },
        )  # fmt: skip
        save_topk(self.weights, self.config.k, self.folder, origin, self.scale)
        (self.folder / CHECKPOINT_FILE).unlink(missing_ok=True)
        return SAERun(self.folder, metrics)


def adam_step(optimiser: torch.optim.Adam, lr: float, clip: float) -> Float[Tensor, ""]:
    """One step of fused Adam on clipped gradients; returns the norm before clipping.

    The clipping rides in the `grad_scale` of the fused kernel and costs no pass over the gradients.
    """
    parameters = optimiser.param_groups[0]["params"]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    scaled: Any = optimiser
    scaled.grad_scale, scaled.found_inf = (norm / clip).clamp_min(1.0), torch.zeros(())
    optimiser.param_groups[0]["lr"] = lr
    optimiser.step()
    return norm


def _names(prefix: str) -> list[str]:
    return [f"{prefix}.{name}" for name in ("W_enc", "b_enc", "W_dec", "b_dec")]


def _initial_weights(config: SAEConfig, centre: Tensor) -> SAEWeights:
    """Random unit decoder rows, the encoder their transpose, `b_dec` at the mean."""
    random = torch.Generator().manual_seed(config.seed)
    W = torch.randn(config.d_sae, len(centre), generator=random)
    W /= W.norm(dim=1, keepdim=True)
    return SAEWeights(W.clone(), torch.zeros(config.d_sae), W, centre.clone())


def _training_acts(store: ActivationStore, config: SAEConfig, index: int) -> Iterator[Float[Tensor, "n d"]]:
    """The activations of one shard that this run may train on; none if it lies beyond `distinct_tokens`."""
    tokens = config.distinct_tokens
    end_row = None if tokens is None else -(-tokens // store.context)
    if end_row is not None and store.manifest.shards[index].first_row >= end_row:
        return
    block = store.block(index, config.site, "train")
    yield block.acts if end_row is None else block.acts[block.rows < end_row]


def _statistics(store: ActivationStore, config: SAEConfig) -> tuple[Float[Tensor, " d"], float]:
    """Mean of the training activations, and the factor that scales their variance to 1 per dimension."""
    blocks: list[Tensor] = []
    for index in range(len(store.manifest.shards)):
        blocks += [acts.float() for acts in _training_acts(store, config, index)]
        if sum(map(len, blocks)) >= STATISTICS_ROWS:
            break
    x = torch.cat(blocks)
    if len(x) < config.batch:
        raise DegenerateInputError(
            f"{store.path} has {len(x)} training tokens; one batch needs {config.batch}. Harvest more or lower batch."
        )
    mean = x.mean(0)
    variance = float((x - mean).square().sum(1).mean())
    if variance == 0:
        raise DegenerateInputError(
            f"All activations of {config.site} in {store.path} are the same; nothing can be learnt."
        )
    return mean, math.sqrt(x.shape[1] / variance)


def _held_out(store: ActivationStore, config: SAEConfig) -> Float[Tensor, "rows d"]:
    x = torch.cat([block.float() for block in store.read(config.site, "heldout")])
    if len(x) < 2:
        raise DegenerateInputError(
            f"{store.path} has {store.manifest.n_tokens // store.context} packed rows, too few to hold one in ten "
            "out. Harvest more."
        )
    return x[:HELD_OUT_ROWS]


def _store_id(store: ActivationStore) -> str:
    return hashlib.sha256(" ".join(shard.sha256 for shard in store.manifest.shards).encode()).hexdigest()[:16]


def _check_same(path: Path, config: Any, store_id: str, wanted: SAEConfig, store: ActivationStore) -> None:
    mine = to_jsonable(wanted)
    differ = [key for key in mine if key != "checkpoint_seconds" and config.get(key) != mine[key]]
    if differ:
        shown = ", ".join(f"{key}={config.get(key)!r} (asked for {mine[key]!r})" for key in differ)
        raise MismatchError(f"{path} belongs to another run: {shown}. Use another folder, or delete it.")
    if store_id != _store_id(store):
        raise MismatchError(f"{path} was made from another store than {store.path}. Use another folder, or delete it.")


def _finished(folder: Path, config: SAEConfig, store: ActivationStore) -> SAERun | None:
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return None
    ours = load_json(folder / CONFIG_FILE).get("metadata", {}).get("workbench")
    if not ours:
        raise MismatchError(f"{folder} holds an SAE that was not trained here. Use another folder.")
    _check_same(folder / CONFIG_FILE, ours["config"], ours["store"], config, store)
    return SAERun(folder, ours["metrics"])


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return {key: file.get_tensor(key) for key in file.keys()}, state  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CorruptFileError(f"{path} can't be read ({error}). Delete it to train from the start.") from None


def _truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after the checkpoint: the steps are made again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomic(path, "".join(line + "\n" for line in kept))
