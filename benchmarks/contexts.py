"""Contexts of all features in one sparse pass, beside the way of dashboards: dense activations, a few features at once.

    python benchmarks/contexts.py --tokens 20000 --d-sae 4608 --architecture topk

The dashboards' way (SAEDashboard, sae_vis) is written out here: for each batch of features it reads the cached
activations again, encodes them (all features for TopK, where features compete; else the columns of the batch), holds
the dense activations of the batch for all tokens, and takes frequency, histogram, top rows and examples from ten
intervals of the activation from them. Its correlations, the text of its examples and its HTML are left out, in its
favour. Both read the same store in one process;
frequencies and top activations are compared before a ratio is printed. What this pass collects besides (sampled
windows, background windows, activations for neighbours) is counted against it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from workbench.activations.harvest import harvest
from workbench.activations.sources import TextFiles
from workbench.activations.store import ActivationStore
from workbench.features.passes.store_pass import SAEFeatures
from workbench.features.passes.windows import FeatureWindows, WindowOptions, collect_windows
from workbench.models.loading import load_model
from workbench.saes.formats.load import sae_lens_module

TEXTS = sorted(str(path) for path in (Path(__file__).parents[1] / "docs").glob("*.md"))
TOLERANCE = 1e-4


def random_sae(d_in: int, d_sae: int, architecture: str) -> Any:
    """An SAE with random unit directions: the cost does not depend on what features mean."""
    lens = sae_lens_module()
    if architecture == "topk":
        sae = lens.TopKSAE(lens.TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=32))
    else:
        sae = lens.StandardSAE(lens.StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
    return sae


@torch.no_grad()
def centred(sae: Any, store: ActivationStore, share: float = 0.01) -> None:
    """Puts `b_dec` at the mean of the first shard; a ReLU bias leaves `share` of the activations."""
    x = store.block(0).acts.float()
    sae.b_dec.copy_(x.mean(0))
    if sae.cfg.architecture() == "standard":
        pre = (x[:256] - sae.b_dec) @ sae.W_enc
        sae.b_enc.copy_(-pre.quantile(1 - share, dim=0))


@torch.no_grad()
def dense_batches(store: ActivationStore, sae: Any, at_once: int, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequency and top row activations of every feature, a batch of features at a time."""
    tops, active = [], []
    topk = sae.cfg.architecture() == "topk"
    for features in torch.arange(sae.W_dec.shape[0]).split(at_once):
        parts, rows = [], []
        for block in store.blocks():
            x = block.acts.float()
            if topk:
                parts.append(sae.encode(x)[:, features])
            else:
                parts.append(((x - sae.b_dec) @ sae.W_enc[:, features] + sae.b_enc[features]).relu())
            rows.append(block.rows)
        acts, row = torch.cat(parts), torch.cat(rows)
        active.append((acts > 0).sum(0))
        for column in acts.T.contiguous():
            torch.histc(column[column > 0], 50)
            in_groups(column)
        best = torch.zeros(int(row.max()) + 1, len(features))
        best.scatter_reduce_(0, row[:, None].expand_as(acts), acts, "amax")
        tops.append(best.topk(min(top, len(best)), dim=0).values.T)
    return torch.cat(active), torch.cat(tops)


def in_groups(column: torch.Tensor, groups: int = 10, each: int = 10) -> list[torch.Tensor]:
    """Tokens drawn from ten intervals of the activation, as dashboards draw their groups of examples."""
    edges = torch.linspace(0, float(column.max()), groups + 1).tolist()
    found = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = ((column > low) & (column <= high)).nonzero().squeeze(1)
        found.append(inside[torch.randperm(len(inside))[:each]])
    return found


def compare(ours: FeatureWindows, active: torch.Tensor, tops: torch.Tensor) -> float:
    """Largest difference of top activations; frequencies may differ where a pre-activation rounds to either side."""
    off = float((ours.active - active).abs().sum()) / float(active.sum())
    if off > 1e-4:
        raise SystemExit(f"the two disagree on {off:.2%} of the activations; no ratio is printed")
    peaks = ours.top.peaks[:, : tops.shape[1]]  # a small store has fewer rows than are kept
    return float((peaks - tops).abs().max() / tops.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--at-once", type=int, default=256, help="features per batch of the dense way")
    parser.add_argument("--architecture", choices=("topk", "standard"), default="topk")
    options = parser.parse_args()
    model = load_model(options.model, check=False)
    site = f"resid_post.{options.layer}"
    with tempfile.TemporaryDirectory() as folder:
        source = TextFiles(TEXTS, tokens=options.tokens)
        store = harvest(model, source, [site], Path(folder) / "acts")
        sae = random_sae(model.d_model, options.d_sae, options.architecture)
        centred(sae, store)
        collect = WindowOptions(top=20)
        ids = torch.arange(options.d_sae)
        collect_windows(store, site, SAEFeatures(sae, ids), WindowOptions(top=20, max_tokens=1000))  # warm-up
        start = time.perf_counter()
        ours = collect_windows(store, site, SAEFeatures(sae, ids), collect)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        active, tops = dense_batches(store, sae, options.at_once, collect.top)
        dense_seconds = time.perf_counter() - start
    error = compare(ours, active, tops)
    if error > TOLERANCE:
        raise SystemExit(f"top activations differ by {error:.1e} of the largest; no ratio is printed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{model.name}, {site}, {options.architecture}, {options.d_sae} features, {ours.n_tokens} tokens, "
          f"{torch.get_num_threads()} threads; largest relative difference of top activations {error:.1e}")  # fmt: skip
    print(f"dense, {options.at_once} features at a time: {dense_seconds:8.1f} s")
    print(f"one sparse pass:               {seconds:8.1f} s ({ours.n_tokens / seconds:,.0f} tokens/s)")
    print(f"ratio: {dense_seconds / seconds:.1f}; peak memory of the process {peak:.1f} GB, of which the pass keeps at "
          f"most {collect.memory(options.d_sae) / 2**30:.2f} GB whatever the tokens")  # fmt: skip


if __name__ == "__main__":
    main()
