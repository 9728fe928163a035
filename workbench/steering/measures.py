"""What is measured on continuations: the feature's tokens in them, fluency, repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import DegenerateInputError
from workbench.models.model import Model
from workbench.tokens import TokenBatch

DEGENERATE_COUNT = 3.0


@dataclass(frozen=True)
class TextMeasures:
    """Measures of one continuation per prompt, all in the order of the prompts.

    Attributes:
        count: tokens of the continuation that are lens tokens of the feature, each occurrence counted.
        share: the same divided by the length of the continuation; 0 for an empty one.
        nll: mean negative log-likelihood (nats per token) of the continuation under the unsteered model; nan if empty.
        distinct2: different pairs of neighbouring tokens divided by pairs; nan with fewer than two tokens.
    """

    count: tuple[int, ...]
    share: tuple[float, ...]
    nll: tuple[float, ...]
    distinct2: tuple[float, ...]

    @property
    def degenerate(self) -> tuple[bool, ...]:
        """Continuations with more than three of the feature's tokens: repetition rather than text."""
        return tuple(c > DEGENERATE_COUNT for c in self.count)


def lens_count(ids: Int[Tensor, " new"], lens_ids: Int[Tensor, " k"]) -> int:
    """How many tokens of a continuation are lens tokens, each occurrence counted; the prompt is no part of it.

    >>> lens_count(torch.tensor([7, 7, 3]), torch.tensor([7, 9]))
    2
    """
    return int(torch.isin(ids, lens_ids).sum())


def generation_success(continuations: Sequence[Int[Tensor, " _"]], lens_ids: Int[Tensor, " k"]) -> float:
    """Mean number of lens tokens per continuation, each occurrence counted, so it can exceed 1.

    Raises:
        DegenerateInputError: if there is no continuation.

    Source: Arad, Mueller, Belinkov 2025, generation success at k.

    >>> texts = [torch.tensor(t) for t in ([7, 7, 3], [9], [3])]
    >>> generation_success(texts, torch.tensor([7, 9]))  # (2 + 1 + 0) / 3
    1.0
    """
    if not continuations:
        raise DegenerateInputError("generation_success: there are no continuations.")
    return sum(lens_count(ids, lens_ids) for ids in continuations) / len(continuations)


def distinct_2(ids: Int[Tensor, " new"]) -> float:
    """Different pairs of neighbouring tokens divided by the number of pairs; nan with fewer than two tokens.

    >>> distinct_2(torch.tensor([1, 2, 1, 2]))  # pairs (1,2) (2,1) (1,2): 2 of 3 differ
    0.6666666666666666
    """
    pairs = list(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def measure(
    continuations: Sequence[Int[Tensor, " _"]], lens_ids: Int[Tensor, " k"], nll: Float[Tensor, " rows"]
) -> TextMeasures:
    """All measures of some continuations."""
    count = tuple(lens_count(ids, lens_ids) for ids in continuations)
    share = tuple(c / len(ids) if len(ids) else 0.0 for c, ids in zip(count, continuations, strict=True))
    return TextMeasures(count, share, tuple(nll.tolist()), tuple(distinct_2(ids) for ids in continuations))


@torch.no_grad()
def continuation_nll(
    model: Model, prompts: TokenBatch, continuations: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, " rows"]:
    """Mean negative log-likelihood per token (nats) of each continuation after its prompt; nan if it is empty.

    Call it outside of any plan: it is the fluency in the eyes of the unsteered model. Only the logits that predict the
    continuation are computed.
    """
    longest = max(len(ids) for ids in continuations)
    if longest == 0:
        return torch.full((len(continuations),), math.nan)
    new = torch.zeros(len(continuations), longest, dtype=torch.long)
    real = torch.zeros(len(continuations), longest, dtype=torch.bool)
    for i, ids in enumerate(continuations):
        new[i, : len(ids)], real[i, : len(ids)] = ids, True
    device = prompts.ids.device
    mask = torch.cat([prompts.mask, real.to(device)], dim=1)
    whole = TokenBatch(torch.cat([prompts.ids, new.to(device)], dim=1), mask)
    logits = model.hf(**whole.hf(), use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    losses = [
        nn.functional.cross_entropy(z.float(), t.to(device), reduction="none").cpu()
        for z, t in zip(logits, new, strict=True)
    ]
    total = (torch.stack(losses) * real).sum(1)
    return torch.where(real.any(1), total / real.sum(1).clamp_min(1), torch.tensor(math.nan))
