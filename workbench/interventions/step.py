"""What is known about the tokens of a forward pass; scopes choose among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What is known about the tokens of one forward pass.

    Attributes:
        ids: token ids, or None when the model was given embeddings.
        column: column of each token in the whole sequence, padding counted.
        position: absolute position of each token in its row, padding not counted.
        prompt_length: number of real prompt tokens per row.
        is_real: False at padding.
        is_prompt: True where the token belongs to the prompt, False where it was generated.
        row: row of the intervention's parameters for each batch row.
        history: ids of the whole sequence up to now, cached part included; None if not known.
        history_real: False at padding of the history.
    """

    ids: Int[Tensor, "batch pos"] | None
    column: Int[Tensor, " pos"]
    position: Int[Tensor, "batch pos"]
    prompt_length: Int[Tensor, " batch"]
    is_real: Bool[Tensor, "batch pos"]
    is_prompt: Bool[Tensor, "batch pos"]
    row: Int[Tensor, " batch"]
    history: Int[Tensor, "batch columns"] | None = None
    history_real: Bool[Tensor, "batch columns"] | None = None

    def tail(self, n: int) -> Step:
        """The last `n` tokens of the pass."""
        ids = None if self.ids is None else self.ids[:, -n:]
        return dataclasses.replace(
            self, ids=ids, column=self.column[-n:], position=self.position[:, -n:], is_real=self.is_real[:, -n:],
            is_prompt=self.is_prompt[:, -n:],
        )  # fmt: skip


def ends_of(
    run: Sequence[int], history: Int[Tensor, "batch columns"], real: Bool[Tensor, "batch columns"]
) -> Bool[Tensor, "batch columns"]:
    """True at the tokens where this run of ids ends."""
    found, n = torch.zeros_like(real), len(run)
    if history.shape[1] >= n:
        same = history.unfold(1, n, 1) == torch.tensor(run, device=history.device)
        found[:, n - 1 :] = (same & real.unfold(1, n, 1)).all(2)
    return found
