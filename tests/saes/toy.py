"""Superposition with known ground truth, as a store that makes its activations when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench.activations.manifest import Manifest, Shard, SiteStats
from workbench.activations.store import ActivationStore, Split

SITE = "resid_post.0"


@dataclass(frozen=True)
class Toy:
    """`n_true` unit directions in `d` dimensions, each active with probability `active / n_true`, size U(0.5, 1.5)."""

    d: int
    n_true: int
    active: int
    seed: int = 0

    def directions(self) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed)
        return torch.nn.functional.normalize(torch.randn(self.n_true, self.d, generator=random), dim=1)

    def sample(self, rows: int, seed: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(1000 + seed)
        on = torch.rand(rows, self.n_true, generator=random) < self.active / self.n_true
        size = torch.rand(rows, self.n_true, generator=random).add_(0.5).mul_(on)
        return size @ self.directions()


class ToyStore(ActivationStore):
    def __init__(self, toy: Toy, folder: Path, shards: int, shard_rows: int) -> None:
        self.toy, self.shard_rows = toy, shard_rows
        listed = tuple(Shard(f"{i}", f"toy{i}", i * shard_rows, shard_rows, shard_rows, {}) for i in range(shards))
        manifest = Manifest(
            model_name="toy", model_fingerprint="toy", source={}, sites={SITE: SiteStats(toy.d, 1e6)}, context=1,
            special_ids=(), shard_rows=shard_rows, batch_rows=shard_rows, n_tokens=shards * shard_rows,
            kept=shards * shard_rows, kept_share=1.0, shards=listed, done=True,
        )  # fmt: skip
        super().__init__(folder, manifest)
        self._made: dict[int, torch.Tensor] = {}

    def aligned_block(self, index: int, sites: Sequence[str], split: Split = "all") -> dict[str, torch.Tensor]:
        if index not in self._made:
            self._made[index] = self.toy.sample(self.shard_rows, index)
        x = self._made[index]
        return {
            site: x[: self.shard_rows // 10] if split == "heldout" else x[self.shard_rows // 10 :] for site in sites
        }
