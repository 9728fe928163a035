"""Superposition with known ground truth: only a trainer that works finds the directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.saes.stores import tensors
from workbench.core.metrics import matched_cosine, mean_max_cosine
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.synthetic import SyntheticOptions, SyntheticTruth
from workbench.saes.evaluation.synthetic_training import (
    SITE,
    SyntheticStore,
    SyntheticTraining,
    train_on_synthetic,
    trained_as,
)
from workbench.saes.formats.load import sae_lens_module
from workbench.saes.training.batches import Pair
from workbench.saes.training.member import Member
from workbench.saes.training.train import SAERun, train_saes

TRUTH = SyntheticTruth.make(SyntheticOptions(n_features=256, d_in=64, mean_active=4.0))
SHORT = SAEConfig(
    d_sae=256, k=5, tokens=250 * 512, batch=512, lr=5e-3, decay=0.2, kernel="csr", buffer=16_384, aux_coefficient=0.0,
    site=SITE, dead_after=20_000,
)  # fmt: skip
LONG = replace(SHORT, tokens=1200 * 1024, batch=1024, lr=3e-3, warmup=100 / 1200)


def _mmcs(run: SAERun) -> float:
    return mean_max_cosine(TRUTH.directions, tensors(run.path)["W_dec"])


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
    store = SyntheticStore(TRUTH, shards=2, shard_rows=20_000)
    runs = train_saes(store, [replace(SHORT, seed=seed, data_seed=0) for seed in (0, 1, 2)], tmp_path / "saes")
    right, frozen_encoder, untrained_decoder = map(_mmcs, runs)
    assert right > 0.95
    assert matched_cosine(TRUTH.directions, tensors(runs[0].path)["W_dec"]) > 0.95, "one to one"
    assert runs[0].metrics["fvu"] < 0.15
    assert frozen_encoder < 0.6
    assert untrained_decoder < 0.6


@pytest.mark.slow
def test_every_architecture_finds_the_true_directions(tmp_path: Path) -> None:
    store = SyntheticStore(TRUTH)
    by_penalty = replace(LONG, k=None)
    configs = [
        *(replace(LONG, architecture=kind) for kind in ("topk", "batchtopk", "matryoshka")),
        *(replace(by_penalty, architecture=kind) for kind in ("relu", "jumprelu", "gated")),
        replace(LONG, k=50),
    ]
    runs = train_saes(store, configs, tmp_path / "saes")
    found = [_mmcs(run) for run in runs]
    assert min(found[:-1]) > 0.9 and found[0] > 0.95, found
    # Measured at 0.70 with k ten times too large: a bound on the number alone would be too loose to tell much.
    assert found[-1] < found[0] - 0.2, "ten times too many features at once"


def test_the_method_of_an_sae_is_tried_where_the_features_are_known() -> None:
    world = SyntheticOptions(n_features=48, d_in=24, mean_active=2.0)
    report = train_on_synthetic("matryoshka_batchtopk", SyntheticTraining(world=world, steps=300, batch=256))
    assert report.trained == "matryoshka"
    assert report.scores.mmcs.low > report.controls["random SAE"].mmcs.high + 0.2
    assert report.scores.l0 < 6
    assert report.findings()[0].startswith("A matryoshka SAE, trained for this on data of known features, reaches MMCS")
    first = SyntheticStore(SyntheticTruth.make(world), shards=1, shard_rows=50)
    blocks = {split: first.aligned_block(0, [SITE], split)[SITE] for split in ("all", "train", "heldout")}
    assert torch.equal(torch.cat([blocks["heldout"], blocks["train"]]), blocks["all"])
    judged = first.truth.tokens(50, seed=0)
    assert not torch.equal(judged, blocks["all"]), "tokens to judge on are not trained on"


@pytest.mark.parametrize(
    ("name", "training", "expected"),
    [
        ("StandardSAE", None, "relu"),
        ("JumpReLUSAE", "batchtopk", "batchtopk"),
        ("JumpReLUSAE", "matryoshka_batchtopk", "matryoshka"),
        ("SkipTranscoder", None, "relu"),
        ("TemporalSAE", None, None),
    ],
)
def test_an_sae_says_how_it_was_trained(name: str, training: str | None, expected: str | None) -> None:
    lens = sae_lens_module()
    kind = getattr(lens, f"{name}Config")
    sizes = {"d_out": 8, "apply_b_dec_to_input": False} if "Transcoder" in name else {}
    config = kind(d_in=8, d_sae=12, **sizes)
    config.metadata.training_architecture = training
    assert trained_as(SimpleNamespace(cfg=config, W_dec=torch.zeros(12, 8), encode=len)) == expected
