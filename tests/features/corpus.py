"""A store over a small made-up text, and units whose activations are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore
from workbench.features.explain.examples import Examples, Windows
from workbench.features.passes.store_pass import Chunk
from workbench.features.token_classes import TokenTexts

SITE = "resid_post.1"
WORDS = (
    " dog", " cat", " the", " a", " runs", " running", " runner", " Paris", " London", " 1", " 42", " 7",
    ",", ".", " and", " sees", " big", " small", " house", " tree", " NASA", " UN", " blue", " red", " of",
    " in", " to", " walks", " walked", " slow",
)  # fmt: skip
FIRST = 2
VOCABULARY = TokenTexts.of_texts(["<bos>", "<eos>", *WORDS])


def word(text: str) -> int:
    return FIRST + WORDS.index(text)


def corpus(rows: int = 400, context: int = 24, seed: int = 3) -> Tensor:
    ids = torch.randint(FIRST, FIRST + len(WORDS), (rows, context), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def corpus_store(folder: Path, rows: int = 400, context: int = 24, shard_tokens: int = 2048) -> ActivationStore:
    options = HarvestOptions(shard_tokens=shard_tokens, batch_tokens=2048)
    return harvest(tiny_model(), TokenRows(corpus(rows, context), batch_rows=8), [SITE], folder, options=options)


def examples_from(windows: Windows, **changes: Any) -> Examples:
    """The same windows for every purpose."""
    kinds = ("shown", "shown_silent", "tested", "tested_silent", "held_silent")
    return Examples(**{"feature": 0, "top_tokens": ()} | dict.fromkeys(kinds, windows) | changes)


@dataclass(frozen=True, eq=False)
class Planted:
    """Units given by plain functions of (row of ids, position)."""

    functions: tuple[Callable[[list[int], int], float], ...]

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.functions))

    def acts(self, chunk: Chunk) -> Tensor:
        rows = (chunk.block.rows - chunk.first_row).tolist()
        ids = chunk.ids.tolist()
        at = zip(rows, chunk.block.positions.tolist(), strict=True)
        return torch.tensor([[f(ids[r], p) for f in self.functions] for r, p in at]).view(-1, len(self.functions))
