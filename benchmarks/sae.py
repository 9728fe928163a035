"""Our training steps beside those of sae_lens and of sparsify: same data, initial weights and optimiser, one process.

    python benchmarks/sae.py [--d-sae 4608 9216] [--threads 1] [--batch 4096] [--repeats 3] [--kinds topk matryoshka]

Prints milliseconds per step (the fastest of the repeats, taken in turns), tokens per second, the ratio to each peer,
and the peak of memory beside parameters, gradients and optimiser; last the time of the encoder's dense product alone in
fp32, which every fp32 step needs, and so bounds its ratio. Losses of the first steps are compared first; exits
with 1 if those of fp32 differ. The peer "sparsify" is our own writing of its published algorithm (dense ReLU and top-k,
decoding by embedding_bag under autograd, encoder gradient by index_add of one row per entry), in fp32 as sparsify runs
on a CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from workbench.saes.architectures import Architecture, BatchTopK, Matryoshka, StepOptions, TopK
from workbench.saes.formats.load import sae_lens_module
from workbench.saes.kernels.weights import SAEWeights
from workbench.saes.training.optim import adam_step

LR, CHECKED_STEPS = 3e-4, 6
KINDS = ("topk", "batchtopk", "matryoshka")
PRODUCT = "product alone"
TOLERANCE, ANY = 1e-5, float("inf")
"""Largest relative difference of a loss in fp32; in lower precision it is printed and ends nothing."""

Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: as printed.
        step: trains on one batch and returns the loss.
        like: whose losses it must have.
        tolerance: largest relative difference of a loss.
        kept: bytes of the gradients that a step makes.
    """

    name: str
    step: Step
    like: str
    tolerance: float
    kept: int = 0


@dataclass(frozen=True)
class Shape:
    """Size of the task."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Levels of Matryoshka."""
        return (self.d_sae // 16, self.d_sae // 4, self.d_sae // 2, self.d_sae)


def lens_sae(kind: str, shape: Shape) -> Any:
    """The training SAE of sae_lens with its defaults."""
    lens = sae_lens_module()
    size: dict[str, Any] = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "device": "cpu"}
    if kind == "topk":
        return lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(**size))
    if kind == "batchtopk":
        return lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**size))
    config = lens.MatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=list(shape.widths), **size)
    return lens.MatryoshkaBatchTopKTrainingSAE(config)


def lens_step(sae: Any, batch: int, *, autocast: bool) -> Step:
    """The trainer of sae_lens; AuxK never starts, because no feature is dead yet."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=batch, lr=LR, lr_end=LR, lr_warm_up_steps=0,
            lr_decay_steps=0, lr_scheduler_name="constant", device="cpu", autocast=autocast, dead_feature_window=10**6,
            feature_sampling_window=10**6, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=1,
        ),
        sae=sae, data_provider=iter(()), evaluator=None, save_checkpoint_fn=None,
    )  # fmt: skip

    def step(x: Tensor) -> float:
        out = trainer._train_step(sae=sae, sae_in=x)
        trainer.n_training_steps += 1
        return float(out.loss.detach())

    return step


class _GatherEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = linear(x, W, b).relu().topk(k, sorted=False)
        ctx.save_for_backward(x, W, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        d_values, _ = grad_outputs
        x, W, indices = ctx.saved_tensors
        d_x = embedding_bag(indices, W, per_sample_weights=d_values, mode="sum")
        rows = (d_values[:, :, None] * x[:, None, :]).flatten(0, 1)
        d_W = torch.zeros_like(W).index_add_(0, indices.flatten(), rows)
        d_b = torch.zeros(len(W)).index_add_(0, indices.flatten(), d_values.flatten())
        return d_x, d_W, d_b, None


def sparsify_step(start: SAEWeights, k: int) -> Step:
    """The algorithm of sparsify with our optimiser."""
    W_enc, b_enc, W_dec, b_dec = parameters = [t.clone().requires_grad_() for t in start.tensors()]
    optimiser = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.999), fused=True)

    def step(x: Tensor) -> float:
        with torch.enable_grad():
            values, indices = _GatherEncoder.apply(x - b_dec, W_enc, b_enc, k)
            x_hat = embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
            loss = (x_hat - x).square().sum() / len(x)
            optimiser.zero_grad()
            loss.backward()
        adam_step(optimiser, LR, clip=1.0)
        return float(loss.detach())

    return step


def our_step(architecture: Architecture, start: SAEWeights, dtype: torch.dtype) -> Step:
    """Our step."""
    weights = SAEWeights(*(t.clone() for t in start.tensors()))
    optimiser = torch.optim.Adam(weights.tensors(), lr=LR, betas=(0.9, 0.999), fused=True)
    options = StepOptions(dtype)

    def step(x: Tensor) -> float:
        nonlocal options
        optimiser.zero_grad()
        result = architecture.step(weights, x, options=options)
        options = replace(options, threshold=float(result.threshold))
        for parameter, gradient in zip(weights.tensors(), result.gradients.tensors(), strict=True):
            parameter.grad = gradient
        adam_step(optimiser, LR, clip=1.0)
        return float(result.loss)

    return step


def contenders(kind: str, shape: Shape) -> Iterator[Contender]:
    """Peers and ours, from the same weights."""
    sae = lens_sae(kind, shape)
    start = SAEWeights(*(t.detach().clone().contiguous() for t in (sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)))
    other = lens_sae(kind, shape)
    other.load_state_dict(sae.state_dict())
    kept = sum(t.nbytes for t in start.tensors())
    yield Contender("sae_lens", lens_step(sae, shape.batch, autocast=False), "sae_lens", 0.0, kept)
    yield Contender("sae_lens autocast", lens_step(other, shape.batch, autocast=True), "sae_lens", ANY, kept)
    architectures: dict[str, Architecture] = {
        "topk": TopK(shape.k, True), "batchtopk": BatchTopK(shape.k, True),
        "matryoshka": Matryoshka(shape.k, shape.widths, True),
    }  # fmt: skip
    ours = architectures[kind]
    yield Contender("ours fp32", our_step(ours, start, torch.float32), "sae_lens", TOLERANCE, kept)
    yield Contender("ours bf16 ranking", our_step(ours, start, torch.bfloat16), "sae_lens", ANY, kept)
    if kind == "topk":
        plain = our_step(TopK(shape.k), start, torch.float32)
        yield Contender("ours fp32, plain", plain, "ours fp32, plain", 0.0, kept)
        yield Contender("sparsify", sparsify_step(start, shape.k), "ours fp32, plain", TOLERANCE, kept)


def peak_memory(step: Step, x: Tensor, kept: int) -> float:
    """Megabytes by which one step raises the resident set, gradients not counted. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = _status("VmRSS")
    step(x)
    return max(0.0, _status("VmHWM") - before - kept / 2**20)


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**10


def compare(kind: str, shape: Shape, threads: int, repeats: int) -> bool:
    """Prints one table; whether the losses agree."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    entries = list(contenders(kind, shape))
    data = [torch.randn(shape.batch, shape.d_in) for _ in range(CHECKED_STEPS)]
    losses = {entry.name: [entry.step(x) for x in data] for entry in entries}
    memory = {entry.name: peak_memory(entry.step, data[0], entry.kept) for entry in entries}
    W = torch.randn(shape.d_in, shape.d_sae)
    jobs: dict[str, Step] = {entry.name: entry.step for entry in entries} | {PRODUCT: lambda x: float((x @ W)[0, 0])}
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job(data[0])
            best[name] = min(best[name], time.perf_counter() - start)
    product = best.pop(PRODUCT)
    peers = [name for name in best if not name.startswith("ours")]
    print(f"\n{kind}: d_in {shape.d_in}, d_sae {shape.d_sae}, k {shape.k}, batch {shape.batch}, {threads} threads")
    print(
        f"{'':18s} {'ms':>8s} {'tokens/s':>9s} {'extra MB':>8s} {'loss off':>8s}  " + "  ".join(f"x {p}" for p in peers)
    )
    ok = True
    for entry in entries:
        pairs = zip(losses[entry.name], losses[entry.like], strict=True)
        off, seconds = max(abs(a - b) / b for a, b in pairs), best[entry.name]
        ok &= off <= entry.tolerance
        ratios = "  ".join(f"{best[peer] / seconds:{len(peer) + 2}.2f}" for peer in peers)
        print(
            f"{entry.name:18s} {1e3 * seconds:8.1f} {shape.batch / seconds:9.0f} {memory[entry.name]:8.1f} {off:8.0e}  "
            f"{ratios}{'' if off <= entry.tolerance else '  LOSSES DIFFER'}"
        )
    bounds = "  ".join(f"{best[peer] / product:{len(peer) + 2}.2f}" for peer in peers)
    print(f"{PRODUCT:18s} {1e3 * product:8.1f} {shape.batch / product:9.0f} {'':8s} {'':8s}  {bounds}")
    return ok


def main() -> int:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("d-in", 576), ("k", 32), ("batch", 4096), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[4608, 9216])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results = [
        compare(kind, Shape(args.d_in, d_sae, args.k, args.batch), threads, args.repeats)
        for threads in args.threads
        for d_sae in args.d_sae
        for kind in args.kinds
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
