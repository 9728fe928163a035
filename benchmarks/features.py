"""Output scores of a whole SAE at several depths: the batched sweep beside one hooked forward pass per feature.

    python benchmarks/features.py --features 32 --layers 0 15 29

Both are timed in one process on the same features; their scores are compared before a ratio is printed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch

from workbench.features import OutputOptions, output_scores
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import Last
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.saes.io import sae_lens_module

TOLERANCE = 1e-5
TARGET_RATIO = 20.0
TARGET_SECONDS = 120.0


def made_up_sae(model: Model, d_sae: int, layer: int) -> object:
    """A TopK SAE whose decoder rows are unembedding rows and random directions in turn.

    The cost does not depend on what features mean. Unembedding rows give scores all over [0, 1], so that agreement is
    not that of zeros.
    """
    sae_lens = sae_lens_module()
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=model.d_model, d_sae=d_sae, k=32))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(d_sae, model.d_model, generator=generator)
    tokens = torch.randint(model.d_vocab, (len(rows[::2]),), generator=generator)
    rows[::2] = model.hf.get_output_embeddings().weight.detach()[tokens].float()
    with torch.no_grad():
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    return sae


@torch.no_grad()
def per_feature(model: Model, sae: object, site: str, features: range, lens: torch.Tensor) -> torch.Tensor:
    """What a straightforward script does: hook, run the whole prompt, softmax, sort, read off."""
    scores = []
    for i, feature in enumerate(features):
        edit = Intervention.at(site, SAEAddMax(sae, sae.W_dec[feature], 10.0), Last())  # type: ignore[attr-defined]
        with model.plan(edit):
            # torch's softmax in fp32 is off by 1.5e-5 over 49k tokens on some CPUs
            p = model.logits(OutputOptions().prompt).double().softmax(1)[0]
        best = lens[i][p[lens[i]].argmax()]
        rank = int((p > p[best]).sum())
        scores.append((1 - rank / len(p)) * p[best])
    return torch.stack(scores).float().cpu()


@dataclass(frozen=True)
class Timed:
    """Seconds of both ways at one depth."""

    layer: int
    fast_each: float
    slow_each: float
    error: float
    range: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.slow_each / self.fast_each


def compare(model: Model, d_sae: int, layer: int, few: range) -> Timed:
    sae, site = made_up_sae(model, d_sae, layer), f"resid_post.{layer}"
    output_scores(model, sae, few, options=OutputOptions(rows=8))  # warm-up
    start = time.perf_counter()
    fast = output_scores(model, sae)
    fast_each = (time.perf_counter() - start) / d_sae
    start = time.perf_counter()
    slow = per_feature(model, sae, site, few, fast.lens.ids)
    slow_each = (time.perf_counter() - start) / len(few)
    error = float((fast.score[: len(few)] - slow).abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"layer {layer}: the two disagree by {error:.2e}; no ratio is printed")
    return Timed(layer, fast_each, slow_each, error, (float(slow.min()), float(slow.max())))


def main() -> None:
    """Time both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--features", type=int, default=32, help="features for the slow way")
    parser.add_argument("--d-sae", type=int, default=4608, help="features for the fast way")
    parser.add_argument("--layers", type=int, nargs="+", help="by default the first, the middle and the last")
    options = parser.parse_args()
    model = load_model(options.model, dtype="float32", check=False)
    layers = options.layers or [0, model.n_layers // 2, model.n_layers - 1]
    print(f"{model.name}, {torch.get_num_threads()} threads, fp32; {options.d_sae} features, the slow way on")
    print(f"{options.features} of them, its lens not counted")
    print("layer   one by one    batched      ratio   whole SAE   largest difference   scores")
    timed = []
    for layer in layers:
        t = compare(model, options.d_sae, layer, range(options.features))
        timed.append(t)
        low, high = t.range
        print(
            f"{layer:>5}   {1e3 * t.slow_each:7.1f} ms   {1e3 * t.fast_each:7.2f} ms   {t.ratio:6.1f}   "
            f"{t.fast_each * options.d_sae:7.1f} s   {t.error:18.1e}   {low:.1e} to {high:.3f}"
        )
    least, longest = min(t.ratio for t in timed), max(t.fast_each for t in timed) * options.d_sae
    print(f"ratio: {least:.1f} or more, {'' if least >= TARGET_RATIO else 'BELOW '}target {TARGET_RATIO:g}")
    print(
        f"whole SAE: at most {longest:.0f} s, {'' if longest < TARGET_SECONDS else 'ABOVE '}target {TARGET_SECONDS:g} s"
    )


if __name__ == "__main__":
    main()
