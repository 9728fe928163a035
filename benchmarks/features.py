"""Output scores of many features: the batched sweep beside one hooked forward pass per feature, on the same model.

    python -m benchmarks.features --features 32 --layer 15

Both are timed in one process on the same features, their scores are compared, and the ratio is printed.
"""

from __future__ import annotations

import argparse
import time

import torch

from workbench.features import OutputOptions, output_scores
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import Last
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.saes.io import sae_lens_module

TOLERANCE = 1e-5


def random_sae(d_in: int, d_sae: int, site: str) -> object:
    """A TopK SAE with random unit decoder rows: the cost does not depend on what the features mean."""
    sae_lens = sae_lens_module()
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=32))
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.cfg.metadata.hook_name = f"blocks.{site.split('.')[1]}.hook_resid_post"
    return sae


@torch.no_grad()
def per_feature(model: Model, sae: object, site: str, features: range, lens: torch.Tensor) -> torch.Tensor:
    """What a straightforward script does: hook, run the whole prompt, softmax, sort, read off."""
    scores = []
    for i, feature in enumerate(features):
        edit = Intervention.at(site, SAEAddMax(sae, sae.W_dec[feature], 10.0), Last())  # type: ignore[attr-defined]
        with model.plan(edit):
            p = model.logits(OutputOptions().prompt).softmax(1)[0]
        best = lens[i][p[lens[i]].argmax()]
        rank = int((p > p[best]).sum())
        scores.append((1 - rank / len(p)) * p[best])
    return torch.stack(scores).cpu()


def main() -> None:
    """Time both and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--features", type=int, default=32, help="features for the slow way")
    parser.add_argument("--d-sae", type=int, default=4608, help="features for the fast way")
    parser.add_argument("--layer", type=int, default=15)
    options = parser.parse_args()
    model = load_model(options.model, dtype="float32", check=False)
    site = f"resid_post.{options.layer}"
    sae = random_sae(model.d_model, options.d_sae, site)
    few = range(options.features)
    output_scores(model, sae, few, options=OutputOptions(rows=8))  # warm-up
    start = time.perf_counter()
    fast = output_scores(model, sae)
    fast_each = (time.perf_counter() - start) / options.d_sae
    start = time.perf_counter()
    slow = per_feature(model, sae, site, few, fast.lens.ids)
    slow_each = (time.perf_counter() - start) / len(few)
    error = float((fast.score[: len(few)] - slow).abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"the two disagree by {error:.2e}; no ratio is printed")
    print(f"{model.name}, {site}, {torch.get_num_threads()} threads, fp32; largest difference of scores {error:.1e}")
    print(f"hooked forward per feature: {1e3 * slow_each:8.2f} ms per feature ({len(few)} features, lens not counted)")
    print(f"batched sweep:              {1e3 * fast_each:8.2f} ms per feature ({options.d_sae} features, lens counted)")
    print(f"ratio: {slow_each / fast_each:.1f}")


if __name__ == "__main__":
    main()
