"""Texts that lenses are fitted on: rows of tokens, of texts or of a store of activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

Source = ActivationStore | TokenBatch | Sequence[str]
CONTEXT = 128
"""Tokens of a text that are used: its first."""


def rows_of(model: Model, source: Source, context: int = CONTEXT, limit: int | None = None) -> TokenBatch:
    """The rows, each cut to its first `context` tokens, left-padded; of a store, the packed rows of its train split.

    Raises:
        DegenerateInputError: if there is none.
        MismatchError: for a store of another model.
    """
    if context < 2:
        raise InvalidInputError(f"context={context}: a row needs at least two tokens.")
    if isinstance(source, ActivationStore):
        source.check_model(model)
        rows = [row[:context].tolist() for row in source.token_rows("train")]
    else:
        batch = source if isinstance(source, TokenBatch) else model.tokens(list(source))
        rows = [row[:context].tolist() for row in batch.rows()]
    rows = rows[:limit]
    if not rows:
        raise DegenerateInputError("There is no text to fit a lens on. Give texts, tokens or a store of activations.")
    pad = model.tokenizer.pad_token_id if model.tokenizer else 0
    return replace(TokenBatch.pad(rows, pad or 0), tokenizer=model.tokenizer).to(model.device)


def longer_than(batch: TokenBatch, least: int, what: str) -> tuple[TokenBatch, int]:
    """The rows of at least so many tokens, and how many were left out.

    Raises:
        DegenerateInputError: if none is left.
    """
    there = (batch.lengths >= least).nonzero()[:, 0]
    if not len(there):
        raise DegenerateInputError(
            f"{what} needs rows of {least} tokens; the longest of {counted(len(batch), 'rows')} has "
            f"{int(batch.lengths.max())}. Give longer texts, or a smaller skip_first."
        )
    return batch[there], len(batch) - len(there)


def policy_of(model: Model, batch: TokenBatch, site: str) -> TokenPolicy:
    """Which tokens count at a site: neither first, special nor a sink; decided on a few rows."""
    some = batch[:8]
    return TokenPolicy.of_batch(some, model.capture(some, [site])[site])


def kept_tokens(policy: TokenPolicy, batch: TokenBatch, x: Tensor) -> Bool[Tensor, "batch pos"]:
    """True at the tokens that count; a row without any is allowed."""
    special = torch.tensor(policy.special_ids, dtype=batch.ids.dtype, device=batch.ids.device)
    ordinary = batch.mask & (batch.positions > 0) & ~torch.isin(batch.ids, special)
    return ordinary & (x.float().norm(dim=-1) <= policy.max_norm).to(ordinary.device)


def batches_of(batch: TokenBatch, size: int) -> Iterator[TokenBatch]:
    """The rows, so many at a time."""
    return (batch[start : start + size] for start in range(0, len(batch), size))


def middle(sites: Sequence[str]) -> str:
    """The site at which sinks are told from other tokens."""
    return sites[len(sites) // 2]
