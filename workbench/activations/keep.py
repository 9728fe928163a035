"""Which tokens count: attention sinks and special tokens are left out of training, FVU and splices alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError

SINK_FACTOR = 10.0


@dataclass(frozen=True)
class KeepRule:
    """Keeps a token unless it opens its row, is a special token, or has a norm beyond `max_norm`.

    Attention sinks carry norms a hundred times the median; with them in, an SAE explains almost all variance and
    nothing else. Special ids count as special wherever they stand, so the chat markers that a chat model writes in the
    middle of its own text are left out too.

    Attributes:
        max_norm: largest norm that is kept, in the units of the activations.
        special_ids: token ids that are dropped.
    """

    max_norm: float
    special_ids: tuple[int, ...] = ()

    @classmethod
    def estimate(
        cls,
        x: Float[Tensor, "rows pos d"],
        ids: Int[Tensor, "rows pos"],
        special_ids: tuple[int, ...],
        factor: float = SINK_FACTOR,
    ) -> KeepRule:
        """The rule with `max_norm` at `factor` times the median norm of the tokens that are neither first nor special.

        Raises:
            DegenerateInputError: if no such token exists.
        """
        ordinary = ~_special(ids, special_ids)
        ordinary[:, 0] = False
        if not ordinary.any():
            raise DegenerateInputError(
                f"No token of shape {tuple(ids.shape)} is neither first nor special; use longer rows."
            )
        return cls(factor * float(x.float().norm(dim=-1)[ordinary].median()), special_ids)

    def mask(self, x: Float[Tensor, "rows pos d"], ids: Int[Tensor, "rows pos"]) -> Bool[Tensor, "rows pos"]:
        """True at the tokens that are kept."""
        return self.reasons(x, ids) == 0

    def reasons(self, x: Float[Tensor, "rows pos d"], ids: Int[Tensor, "rows pos"]) -> Int[Tensor, "rows pos"]:
        """Why each token is dropped: 0 kept, 1 first of its row, 2 special token, 3 norm; the first that applies."""
        return self.reasons_by_norm(x.float().norm(dim=-1), ids)

    def reasons_by_norm(
        self, norms: Float[Tensor, "rows pos"], ids: Int[Tensor, "rows pos"]
    ) -> Int[Tensor, "rows pos"]:
        """The same from the norms alone."""
        reason = torch.zeros_like(ids)
        reason[norms > self.max_norm] = 3
        reason[_special(ids, self.special_ids)] = 2
        reason[:, 0] = 1
        return reason


def _special(ids: Tensor, special_ids: tuple[int, ...]) -> Tensor:
    return torch.isin(ids, torch.tensor(special_ids, dtype=ids.dtype, device=ids.device))
