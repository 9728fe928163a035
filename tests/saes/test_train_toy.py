"""Superposition with known ground truth: only a trainer that works finds the directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.saes.stores import tensors
from tests.saes.toy import SITE, Toy, ToyStore
from workbench.metrics import mean_max_cosine
from workbench.saes.batches import Pair
from workbench.saes.config import SAEConfig
from workbench.saes.member import Member
from workbench.saes.train import SAERun, train_saes

TOY = Toy(d=64, n_true=256, active=4)
SHORT = SAEConfig(
    d_sae=256, k=5, tokens=250 * 512, batch=512, lr=5e-3, decay=0.2, kernel="csr", buffer=16_384, aux_coefficient=0.0,
    site=SITE, dead_after=20_000,
)  # fmt: skip
LONG = replace(SHORT, tokens=1200 * 1024, batch=1024, lr=3e-3, warmup=100 / 1200)


def _mmcs(run: SAERun) -> float:
    return mean_max_cosine(TOY.directions(), tensors(run.path)["W_dec"])


def _freeze(monkeypatch: pytest.MonkeyPatch, frozen: dict[int, str]) -> None:
    """Members with these seeds never change these weights."""
    real, first = Member.train_step, {}

    def train_step(self: Member, pair: Pair) -> None:
        name = frozen.get(self.config.seed)
        weight: torch.Tensor | None = getattr(self.weights, name) if name else None
        if weight is not None:
            first.setdefault(self.config.seed, weight.clone())
        real(self, pair)
        if weight is not None:
            weight.copy_(first[self.config.seed])

    monkeypatch.setattr(Member, "train_step", train_step)


def test_topk_finds_the_true_directions_and_half_a_trainer_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _freeze(monkeypatch, {1: "W_enc", 2: "W_dec"})
    store = ToyStore(TOY, tmp_path, shards=2, shard_rows=20_000)
    runs = train_saes(store, [replace(SHORT, seed=seed, data_seed=0) for seed in (0, 1, 2)], tmp_path / "saes")
    right, frozen_encoder, untrained_decoder = map(_mmcs, runs)
    assert right > 0.95
    assert runs[0].metrics["fvu"] < 0.2
    assert frozen_encoder < 0.6
    assert untrained_decoder < 0.6


@pytest.mark.slow
def test_every_architecture_finds_the_true_directions(tmp_path: Path) -> None:
    store = ToyStore(TOY, tmp_path, shards=8, shard_rows=50_000)
    by_penalty = replace(LONG, k=None)
    configs = [
        *(replace(LONG, architecture=kind) for kind in ("topk", "batchtopk", "matryoshka")),
        *(replace(by_penalty, architecture=kind) for kind in ("relu", "jumprelu", "gated")),
        replace(LONG, k=50),
    ]
    runs = train_saes(store, configs, tmp_path / "saes")
    found = [_mmcs(run) for run in runs]
    assert min(found[:-1]) > 0.9 and found[0] > 0.95, found
    assert found[-1] < found[0] - 0.2, "ten times too many features at once"
