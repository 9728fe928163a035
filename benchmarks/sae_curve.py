"""From nothing to an SAE of the embedded model, and FVU against wall time beside sae_lens on the same store.

    python benchmarks/sae_curve.py [--tokens 65536] [--train-tokens 600000] [--out FOLDER]

Writes own text, harvests, trains a TopK SAE of eight times the width, and evaluates it; the time counts from loading
the model to the evaluation. Then sae_lens' own trainer gets the same batches in the same scale, the same learning
rates, k and width, from its own initial weights. Both times hold ten evaluations on held-out rows. Exits with 1 if the
two end more than 10 % apart in FVU, for then the times compare different things.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from workbench.activations.harvest import harvest
from workbench.activations.sources import SelfText
from workbench.activations.store import ActivationStore
from workbench.core.progress import shown
from workbench.models.loading import load_model
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions, evaluate_sae
from workbench.saes.formats.load import load_sae, sae_lens_module
from workbench.saes.training.batches import Batches, OrderKey
from workbench.saes.training.train import train_sae

Curve = list[tuple[float, float]]
FAR = 0.10


def ours(store: ActivationStore, config: SAEConfig, out: Path) -> Curve:
    """Trains with our trainer; (seconds, held-out FVU)."""
    curve: Curve = []
    start = time.perf_counter()
    train_sae(store, config, out, log=lambda _name, line: curve.append((time.perf_counter() - start, line["fvu"])))
    return curve


def theirs(store: ActivationStore, config: SAEConfig, out: Path) -> Curve:
    """Trains with sae_lens' trainer on the same batches."""
    lens = sae_lens_module()
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    site = str(config.site)
    batches = Batches(store, [site], OrderKey.of(config))
    scale = batches.scales()[site].scale
    held_out = batches.held_out()[site] * scale
    settings = lens.TopKTrainingSAEConfig(d_in=held_out.shape[1], d_sae=config.d_sae, k=config.active, device="cpu")
    torch.manual_seed(config.seed)
    sae = lens.TopKTrainingSAE(settings)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=config.tokens, train_batch_size_samples=config.batch, lr=config.peak_lr,
            lr_end=config.peak_lr, lr_warm_up_steps=0, lr_decay_steps=0, lr_scheduler_name="constant", device="cpu",
            autocast=False, dead_feature_window=max(1, config.dead_after // config.batch),
            feature_sampling_window=10**6, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=1,
        ),
        sae=sae, data_provider=iter(()), evaluator=None, save_checkpoint_fn=None,
    )  # fmt: skip
    curve: Curve = []
    every, start = max(1, config.steps // 10), time.perf_counter()
    for step in range(config.steps):
        x = batches.next()[site].float() * scale
        for group in trainer.optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        trainer._train_step(sae=sae, sae_in=x)
        trainer.n_training_steps += 1
        if (step + 1) % every == 0 or step + 1 == config.steps:
            curve.append((time.perf_counter() - start, held_out_fvu(sae, held_out)))
    sae.fold_activation_norm_scaling_factor(scale)
    sae.cfg.metadata.hook_name = load_sae(out).cfg.metadata.hook_name
    sae.save_inference_model(str(out.with_name("sae_lens")))
    return curve


@torch.no_grad()
def held_out_fvu(sae, x: torch.Tensor) -> float:
    error = sum(float((part - sae(part)).double().square().sum()) for part in x.split(1024))
    return error / float((x - x.mean(0)).double().square().sum())


def reached(curve: Curve, fvu: float) -> float:
    """Seconds until the FVU was reached; infinity if it never was."""
    return next((seconds for seconds, value in curve if value <= fvu), float("inf"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of own text")
    parser.add_argument("--train-tokens", type=int, default=600_000, help="token-steps of training")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, help="folder to keep; a temporary one by default")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch, shown():
        out = args.out or Path(scratch)
        start = time.perf_counter()
        model = load_model(args.model)
        site = str(model.resolve(f"resid_post.{model.n_layers // 2}"))
        store = harvest(model, SelfText(tokens=args.tokens), [site], out / "store")
        stored = time.perf_counter() - start
        config = SAEConfig(d_sae=8 * model.width(site), k=args.k, tokens=args.train_tokens, site=site)
        mine = ours(store, config, out / "ours")
        trained = time.perf_counter() - start
        report = evaluate_sae(model, load_sae(out / "ours"), store, options=EvalOptions(max_rows=64))
        total = time.perf_counter() - start
        print(f"{model.name} {site}: {stored:.0f} s to the store, {trained:.0f} s to the SAE, {total:.0f} s in all")
        print(f"loss recovered {report.recovered['zero']}, FVU {report.fvu}")
        peers = theirs(store, config, out / "ours")
        peer = evaluate_sae(model, load_sae(out / "sae_lens"), store, options=EvalOptions(max_rows=64))
        print(f"sae_lens: loss recovered {peer.recovered['zero']}, FVU {peer.fvu}")
    print(f"{'seconds':>9} {'ours':>7}   {'seconds':>9} {'sae_lens':>8}")
    for (a, b), (c, d) in zip(mine, peers, strict=True):
        print(f"{a:9.1f} {b:7.3f}   {c:9.1f} {d:8.3f}")
    goal = peers[-1][1]
    print(f"to the last FVU of sae_lens ({goal:.3f}): {reached(mine, goal):.1f} s against {peers[-1][0]:.1f} s")
    print(f"all {config.steps} steps: {mine[-1][0]:.1f} s against {peers[-1][0]:.1f} s "
          f"({peers[-1][0] / mine[-1][0]:.1f}x)")  # fmt: skip
    return 0 if abs(mine[-1][1] - goal) <= FAR * goal else 1


if __name__ == "__main__":
    sys.exit(main())
