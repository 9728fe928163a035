"""Which tokens count: the one policy of training, FVU, splices, probes and studies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError
from workbench.core.tokenizer import special_ids
from workbench.core.tokens import TokenBatch

SINK_FACTOR = 10.0
"""Norm of an attention sink, as a multiple of the median norm of ordinary tokens."""


@checked
@dataclass(frozen=True)
class TokenPolicy(OneLine):
    """Keeps a token unless it is padding, opens its row, is a special token, or has a norm beyond `max_norm`.

    Attention sinks carry norms a hundred times the median; with them in, an SAE explains almost all variance and
    nothing else, and a mean is theirs. The first token always is one, and now and then a later token. Special ids
    count as special wherever they stand, so the chat markers that a chat model writes in the middle of its own text
    are left out too.

    Attributes:
        max_norm: largest norm that is kept, in the units of the activations.
        special_ids: token ids that are dropped.
    """

    max_norm: float = math.inf
    special_ids: tuple[int, ...] = ()

    @classmethod
    def estimate(
        cls,
        x: Float[Tensor, "rows pos d"],
        ids: Int[Tensor, "rows pos"],
        special_ids: tuple[int, ...],
        factor: float = SINK_FACTOR,
    ) -> TokenPolicy:
        """The policy with `max_norm` at `factor` times the median norm of the ordinary tokens of rows without padding.

        Raises:
            DegenerateInputError: if every token is first or special.
        """
        return cls.from_norms(x.float().norm(dim=-1)[cls(special_ids=special_ids).ordinary(ids)], special_ids, factor)

    @classmethod
    def from_norms(
        cls, norms: Float[Tensor, " tokens"], special_ids: tuple[int, ...] = (), factor: float = SINK_FACTOR
    ) -> TokenPolicy:
        """The policy with `max_norm` at `factor` times the median of the norms of ordinary tokens.

        Raises:
            DegenerateInputError: if there is none.
        """
        if not len(norms):
            raise DegenerateInputError(
                "No token is neither first nor special, so sinks can't be told. Use longer rows."
            )
        return cls(factor * float(norms.median()), special_ids)

    @classmethod
    def of_batch(cls, batch: TokenBatch, x: Float[Tensor, "batch pos d"] | None = None) -> TokenPolicy:
        """The policy of a tokenized batch; without its activations no norm is too large."""
        policy = cls(special_ids=() if batch.tokenizer is None else special_ids(batch.tokenizer))
        if x is None:
            return policy
        return cls.from_norms(x.float().norm(dim=-1)[policy.kept(batch).to(x.device)], policy.special_ids)

    def ordinary(self, ids: Int[Tensor, "rows pos"]) -> Bool[Tensor, "rows pos"]:
        """True at the tokens of rows without padding that are neither first nor special, whatever their norm."""
        return self.reasons_by_norm(torch.zeros(ids.shape, device=ids.device), ids) == 0

    def mask(self, x: Float[Tensor, "rows pos d"], ids: Int[Tensor, "rows pos"]) -> Bool[Tensor, "rows pos"]:
        """True at the tokens that are kept, in rows without padding."""
        return self.reasons(x, ids) == 0

    def reasons(self, x: Float[Tensor, "rows pos d"], ids: Int[Tensor, "rows pos"]) -> Int[Tensor, "rows pos"]:
        """Why each token is dropped: 0 kept, 1 first of its row, 2 special token, 3 norm; the first that applies."""
        return self.reasons_by_norm(x.float().norm(dim=-1), ids)

    def reasons_by_norm(
        self, norms: Float[Tensor, "rows pos"], ids: Int[Tensor, "rows pos"]
    ) -> Int[Tensor, "rows pos"]:
        """The same from the norms alone."""
        reason = torch.zeros_like(ids)
        reason[~(norms <= self.max_norm)] = 3  # so that nan is dropped too, as in `kept`
        reason[self._special(ids)] = 2
        reason[:, 0] = 1
        return reason

    def kept(self, batch: TokenBatch, x: Float[Tensor, "batch pos d"] | None = None) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of a padded batch that are kept; without activations, whatever their norm.

        Raises:
            DegenerateInputError: if a row keeps no token.
        """
        keep = batch.mask & (batch.positions > 0) & ~self._special(batch.ids)
        if x is not None:
            keep &= (x.float().norm(dim=-1) <= self.max_norm).to(keep.device)
        if not bool(keep.any(dim=1).all()):
            short = int((~keep.any(dim=1)).nonzero()[0])
            raise DegenerateInputError(
                f"Row {short} has no token besides its first, special and sink ones, so there is nothing to pool. "
                "Give longer texts."
            )
        return keep

    def _special(self, ids: Tensor) -> Bool[Tensor, "rows pos"]:
        return torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype, device=ids.device))
