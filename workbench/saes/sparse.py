"""Feature activations in sparse form (CSR): rows of any length, no tensor of shape `[rows, d_sae]`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SparseActs:
    """Feature activations of some tokens; an entry may be zero where fewer than k pre-activations were positive.

    Attributes:
        offsets: where the entries of each token begin, and where the last ends.
        indices: feature of each entry.
        values: its activation, not negative.
        d_sae: number of features.
    """

    offsets: Int[Tensor, " rows_plus_1"]
    indices: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    d_sae: int

    def __len__(self) -> int:
        return len(self.offsets) - 1
