"""Our TopK training step beside that of sae_lens: same data, initial weights and optimiser, in one process.

    python benchmarks/sae.py [--batch 4096] [--d-sae 4608] [--threads 1] [--repeats 5]

Prints milliseconds per step (the fastest of the repeats, taken in turns) and the ratio, after checking that the losses
of the first steps agree. Exits with 1 if they do not.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import torch

from workbench.saes.io import sae_lens_module
from workbench.saes.kernels import topk_step
from workbench.saes.train import adam_step
from workbench.saes.weights import SAEWeights

LR, CHECKED_STEPS, TOLERANCE = 3e-4, 6, {torch.float32: 1e-5, torch.bfloat16: 1e-4}


def peer(d_in: int, d_sae: int, k: int, batch: int):
    """sae_lens' own trainer with its defaults for TopK; AuxK never starts, because no feature is dead yet."""
    lens = sae_lens_module()
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = lens.TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device="cpu")
    sae = lens.TopKTrainingSAE(config)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=batch, lr=LR, lr_end=LR, lr_warm_up_steps=0,
            lr_decay_steps=0, lr_scheduler_name="constant", device="cpu", autocast=False, dead_feature_window=10**6,
            feature_sampling_window=10**6, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=1,
        ),
        sae=sae, data_provider=iter(()), evaluator=None, save_checkpoint_fn=None,
    )  # fmt: skip

    def step(x: torch.Tensor) -> float:
        out = trainer._train_step(sae=sae, sae_in=x)
        trainer.n_training_steps += 1
        return float(out.loss)

    return sae, step


def ours(sae, k: int, dtype: torch.dtype):
    """Our step from the same weights."""
    weights = SAEWeights(*(t.detach().clone().contiguous() for t in (sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)))
    optimiser = torch.optim.Adam(weights.tensors(), lr=LR, betas=(0.9, 0.999), fused=True)

    def step(x: torch.Tensor) -> float:
        result = topk_step(weights, x, k, dtype=dtype, by_decoder_norm=True)
        for parameter, gradient in zip(weights.tensors(), result.gradients.tensors(), strict=True):
            parameter.grad = gradient
        adam_step(optimiser, LR, clip=1.0)
        return float(result.loss)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("d-in", 576), ("d-sae", 4608), ("k", 32), ("batch", 4096), ("threads", 1), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    sae, theirs = peer(args.d_in, args.d_sae, args.k, args.batch)
    steps = {
        "sae_lens": theirs,
        "ours fp32": ours(sae, args.k, torch.float32),
        "ours bf16 selection": ours(sae, args.k, torch.bfloat16),
    }
    data = [torch.randn(args.batch, args.d_in) for _ in range(CHECKED_STEPS)]
    losses = {name: [step(x) for x in data] for name, step in steps.items()}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step(data[0])
            best[name] = min(best[name], time.perf_counter() - start)
    print(
        f"d_in {args.d_in}, d_sae {args.d_sae}, k {args.k}, batch {args.batch}, {args.threads} threads, sae_lens "
        "TopK defaults"
    )
    ok = True
    for name, dtype in (("ours fp32", torch.float32), ("ours bf16 selection", torch.bfloat16)):
        off = max(abs(a - b) / b for a, b in zip(losses[name], losses["sae_lens"], strict=True))
        ok &= off <= TOLERANCE[dtype]
        print(
            f"largest relative difference of the loss in {CHECKED_STEPS} steps, {name}: {off:.1e} (at most "
            f"{TOLERANCE[dtype]:.0e})"
        )
    for name, seconds in best.items():
        print(
            f"{name:20s} {1e3 * seconds:8.1f} ms  {args.batch / seconds:9.0f} tokens/s  "
            f"{best['sae_lens'] / seconds:5.2f}x"
        )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
