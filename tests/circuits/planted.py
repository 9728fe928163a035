"""A tiny model and SAE for which the truth is known: one letter gives the label, one gives the spurious attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from tests.tiny import D_MODEL, tiny_model
from workbench.models.model import Model

LABEL, SPURIOUS = ("T", "N"), ("M", "F")
DIMS = {"T": (0,), "N": (1,), "M": (2, 4), "F": (3, 5)}
"""The attribute is written twice as broadly as the label, so that an L2 probe prefers it."""
LABEL_FEATURES, SPURIOUS_FEATURES, OPPOSING = {0, 1}, {2, 3}, 4
SITE = "resid_post.1"


@dataclass
class PlantedSAE:
    """JumpReLU SAE with given weights, so that an active feature is ablated whole; the rest is its error."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    cfg: Any = field(default_factory=lambda: SimpleNamespace(metadata=SimpleNamespace()))

    def encode(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc
        return pre * (pre > 0.5)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec + self.b_dec


def planted_task(n: int = 80, n_test: int = 200) -> ShiftTask:
    """Texts such as "x a M k T": every fourth repeats the label's letter, so that the label outweighs the attribute there."""

    def text(label: int, spurious: int, i: int) -> str:
        repeats = 4 if i % 4 == 0 else 1
        return f"x {'abcdefgh'[i % 8]} {SPURIOUS[spurious]} {'klmnopqr'[i // 8 % 8]}" + f" {LABEL[label]}" * repeats

    def rows(count: int, groups: Sequence[tuple[int, int]]) -> LabelledTexts:
        made = [(text(a, b, i), a, b) for i in range(count // len(groups)) for a, b in groups]
        texts, label, spurious = zip(*made, strict=True)
        return LabelledTexts(texts, label, spurious)

    every = [(0, 0), (0, 1), (1, 0), (1, 1)]
    train = rows(n, [(0, 0), (1, 1)])
    swapped = tuple(text(y, 1 - y, i // 2) for i, y in enumerate(train.label))
    return ShiftTask(
        name="planted",
        label_names=LABEL,
        spurious_names=SPURIOUS,
        train=train,
        swapped=swapped,
        balanced=rows(n, every),
        test=rows(n_test, every),
        spurious_words=frozenset(SPURIOUS),
        target_words=frozenset(LABEL),
    )


def planted_model() -> Model:
    """A tiny model whose stream holds each letter's own dimensions, and a little noise.

    The blocks up to the SAE write nothing, so that the letters' features hold all of the attribute; the block above it
    writes more than half of the stream's norm.
    """
    model = tiny_model()
    table = model.hf.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.1 if ".2." in name else 0.0)
        table.copy_(0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(3)))
        for letter, dims in DIMS.items():
            row = table[model.tokenizer.convert_tokens_to_ids(letter)]
            row.zero_()
            row[list(dims)] = 2.0
        # ten dimensions of letters, which give the random features something to do
        for i, letter in enumerate("abcdefghklmnopqr"):
            table[model.tokenizer.convert_tokens_to_ids(letter), 6 + i % 10] = 1.5
    return model


def planted_sae() -> PlantedSAE:
    """Features 0 to 3 read one letter each; 4 reads F and writes against it; 5 to 14 read letters that say nothing."""
    eye = torch.eye(D_MODEL)
    reads = [eye[list(dims)].mean(0) for dims in DIMS.values()]
    writes = [eye[list(dims)].sum(0) for dims in DIMS.values()]
    reads += [reads[3], *eye[6:]]
    writes += [-0.2 * writes[3], *eye[6:]]
    return PlantedSAE(torch.stack(reads, dim=1), torch.stack(writes), torch.zeros(D_MODEL))
