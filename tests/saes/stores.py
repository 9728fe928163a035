"""Small stores of a tiny model's activations, and ways to stop a run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore
from workbench.saes.training.member import Member

SITE, READ, WRITTEN = "resid_post.1", "mlp_post.1", "mlp_out.1"


def small_store(folder: Path, sites: tuple[str, ...] = (SITE,), rows: int = 80) -> ActivationStore:
    ids = torch.randint(2, 200, (rows, 12), generator=torch.Generator().manual_seed(0))
    options = HarvestOptions(shard_tokens=200, batch_tokens=200)
    return harvest(tiny_model(), TokenRows(ids, batch_rows=8), list(sites), folder, options=options)


def tensors(folder: Path, name: str = "sae_weights.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name)


def assert_same_tensors(a: Path, b: Path, name: str = "sae_weights.safetensors") -> None:
    first, second = tensors(a, name), tensors(b, name)
    assert first.keys() == second.keys()
    different = [key for key, tensor in first.items() if not torch.equal(tensor, second[key])]
    assert not different


def before_step(step: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> None:
    """`act` when a member (of this name) is about to make its step number `step`, counted from 0."""
    real = Member.train_step

    def acting(self: Member, *args: Any) -> None:
        if self.step == step and name in (None, self.name):
            act()
        real(self, *args)

    monkeypatch.setattr(Member, "train_step", acting)


def before_finish(act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> None:
    """`act` when a member (of this name) made its last step and is about to be saved."""
    real = Member.finish

    def acting(self: Member, *args: Any) -> Any:
        if name in (None, self.name):
            act()
        return real(self, *args)

    monkeypatch.setattr(Member, "finish", acting)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)
