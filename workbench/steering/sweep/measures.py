"""What is measured on steered texts and distributions: the feature's tokens, fluency, repetition, divergence, harm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.metrics import kl_divergence as kl_of_logits
from workbench.core.tokens import TokenBatch
from workbench.features.scores.logit_lens import slab_rows
from workbench.models.model import Model

DEGENERATE_COUNT = 3.0
REPEAT_WINDOW = 16
NLL_ROWS = 16
"""Rows per forward pass when texts are judged; their logits are the larger part of the memory."""


@checked
def lens_count(ids: Int[Tensor, " new"], lens_ids: Int[Tensor, " k"]) -> int:
    """How many tokens of a continuation are lens tokens, each occurrence counted; the prompt is no part of it.

    >>> lens_count(torch.tensor([7, 7, 3]), torch.tensor([7, 9]))
    2
    """
    return int(torch.isin(ids, lens_ids).sum())


@checked
def generation_success(continuations: Sequence[Int[Tensor, " _"]], lens_ids: Int[Tensor, " k"]) -> float:
    """Mean number of lens tokens per continuation, each occurrence counted, so it can exceed 1.

    The k tokens given make it generation success at k; the ids that were generated are compared, not their text.

    Raises:
        DegenerateInputError: if there is no continuation.

    Source: Arad, Mueller, Belinkov 2025, generation success at k. Their code tokenises the text again.

    >>> texts = [torch.tensor(t) for t in ([7, 7, 3], [9], [3])]
    >>> generation_success(texts, torch.tensor([7, 9]))  # (2 + 1 + 0) / 3
    1.0
    """
    if not continuations:
        raise DegenerateInputError("generation_success: there are no continuations. Generate at least one.")
    return sum(lens_count(ids, lens_ids) for ids in continuations) / len(continuations)


@checked
def distinct_n(ids: Int[Tensor, " new"], n: int) -> float:
    """Different runs of n neighbouring tokens divided by the number of such runs; nan with fewer than n tokens.

    Raises:
        InvalidInputError: for n below 1.

    >>> distinct_n(torch.tensor([1, 2, 1, 2]), 1)  # 2 of 4 tokens differ
    0.5
    """
    if n < 1:
        raise InvalidInputError(f"distinct_n(n={n}): runs have at least one token. Give n >= 1.")
    row = ids.tolist()
    runs = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return len(set(runs)) / len(runs) if runs else math.nan


@checked
def distinct_2(ids: Int[Tensor, " new"]) -> float:
    """Different pairs of neighbouring tokens divided by the number of pairs; nan with fewer than two tokens.

    >>> distinct_2(torch.tensor([1, 2, 1, 2]))  # pairs (1,2) (2,1) (1,2): 2 of 3 differ
    0.6666666666666666
    """
    return distinct_n(ids, 2)


@checked
def repeated(ids: Int[Tensor, " new"], window: int = REPEAT_WINDOW) -> float:
    """Share of the tokens that already occurred among the `window` tokens before; nan for an empty text.

    Source: rep/l of Welleck et al. 2019 (arXiv 1908.04319), on sampled tokens.

    >>> repeated(torch.tensor([5, 5, 6, 5]))  # the second and the last 5, of 4 tokens
    0.5
    """
    row = ids.tolist()
    return sum(token in row[max(0, i - window) : i] for i, token in enumerate(row)) / len(row) if row else math.nan


@checked
def lens_log_odds(logits: Float[Tensor, "rows d_vocab"], lens_ids: Int[Tensor, "_ k"]) -> Float[Tensor, " rows"]:
    """`log P - log(1 - P)` of each row, P being the probability of all its lens tokens together; nats.

    The concept score is this value of the steered model minus that of the unsteered one at the same token. It sees
    the whole next-token distribution, so it moves long before a lens token is sampled.

    Raises:
        ShapeError: if the rows do not pair up.

    >>> lens_log_odds(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[1, 2]]))  # P = 1/2
    tensor([0.])
    """
    if len(logits) != len(lens_ids):
        raise ShapeError(f"lens_log_odds: {len(logits)} rows of logits and {len(lens_ids)} of tokens must pair up.")
    inside = logits.float().gather(1, lens_ids).logsumexp(1)
    # Outside by its own sum: 1 - P would be zero in fp32 where P is close to 1.
    outside = logits.float().scatter(1, lens_ids, -math.inf).logsumexp(1)
    return inside - outside


@checked
def kl_divergence(base: Float[Tensor, "rows d_vocab"], steered: Float[Tensor, "_ _"]) -> Float[Tensor, " rows"]:
    """`sum p_base (log p_base - log p_steered)` of each row, in nats: how much of the model's prediction is lost.

    Raises:
        ShapeError: if the shapes differ.

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    if base.shape != steered.shape:
        raise ShapeError(
            f"kl_divergence: logits of shape {tuple(base.shape)} and {tuple(steered.shape)} must be alike."
        )
    return kl_of_logits(base.float(), steered.float())


@checked
@torch.no_grad()
def continuation_nll(
    model: Model, prompts: TokenBatch, continuations: Sequence[Int[Tensor, " _"]]
) -> Float[Tensor, " rows"]:
    """Mean negative log-likelihood per token (nats) of each continuation after its prompt; nan if it is empty.

    Call it outside of any plan: it is the fluency in the eyes of the unsteered model. Only the logits that predict the
    continuation are computed, a few rows at a time.
    """
    parts = [
        _nll(model, prompts[slice(start, start + NLL_ROWS)], continuations[start : start + NLL_ROWS])
        for start in range(0, len(continuations), NLL_ROWS)
    ]
    return torch.cat(parts)


def _nll(model: Model, prompts: TokenBatch, continuations: Sequence[Tensor]) -> Float[Tensor, " rows"]:
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


@torch.no_grad()
def text_losses(
    model: Model, batch: TokenBatch, hidden: Float[Tensor, "rows pos d_model"]
) -> Float[Tensor, "texts copies"]:
    """Mean next-token loss (nats) of each text under each copy, from the unembedding's input.

    Args:
        model: the model.
        batch: the texts; with padding, targets that are padding or follow it are left out.
        hidden: the unembedding's input of one or more copies of the batch, copy by copy.
    """
    copies = len(hidden) // len(batch)
    ids, real = batch.ids[:, 1:], batch.mask[:, 1:] & batch.mask[:, :-1]
    ids, real = ids.repeat(copies, 1), real.repeat(copies, 1)
    flat, target, keep = hidden[:, :-1].flatten(0, 1), ids.flatten(), real.flatten().nonzero().squeeze(1)
    loss = torch.zeros(len(target), device=hidden.device)
    for some in keep.split(max(1, slab_rows(model.d_vocab))):
        loss[some] = nn.functional.cross_entropy(model.head.all(flat[some]), target[some], reduction="none")
    mean = loss.view(len(hidden), -1).sum(1) / real.sum(1)
    return mean.view(copies, len(batch)).T.cpu()
