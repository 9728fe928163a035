"""Which tokens of a batch a scope chooses, and batches over any stream of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.tokens import TokenBatch
from workbench.core.wording import Wording
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step

T = TypeVar("T")


def chosen_tokens(batch: TokenBatch, scope: Scope, wording: Wording) -> Bool[Tensor, "rows width"]:
    """True at the tokens of the batch that are in the scope; every token counts as prompt, padding never counts.

    Raises:
        DegenerateInputError: if no token is in it.
    """
    rows, width = batch.ids.shape
    if scope.n_rows not in (None, rows):
        raise ShapeError(
            f"positions={scope} is for {scope.n_rows} rows; the batch has {rows}. Give one for these rows."
        )
    step = Step(
        ids=batch.ids,
        column=torch.arange(width, device=batch.ids.device),
        position=batch.positions,
        prompt_length=batch.lengths,
        is_real=batch.mask,
        is_prompt=torch.ones_like(batch.mask),
        row=torch.arange(rows, device=batch.ids.device),
        history=batch.ids,
        history_real=batch.mask,
    )
    mask = scope.resolve(wording).mask(step)
    missing = [part for part in scope.parts if not bool(part.mask(step).any())]
    if len(missing) not in (0, len(scope.parts)):
        raise DegenerateInputError(f"positions={scope}: no row has a token at {', '.join(map(str, missing))}.")
    if not bool(mask.any()):
        raise DegenerateInputError(
            f"positions={scope}: no token of this batch ({rows} rows, {batch.n_tokens} tokens) is in it."
        )
    return mask


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive lists of `size` items, the last one shorter; reads no further than the list it gives.

    >>> list(groups("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
