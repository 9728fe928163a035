"""Choosing the next token: by noise that belongs to the row, so that a row's draws are the same in any batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError

_BLOCK = 256
_FIRST_TOP = 64
MAX_NEW_TOKENS = 10**7
"""More than any model's context."""
_GREEDY = 1e-5
"""Temperature below which differences of the size of rounding errors in fp32 (1e-6) would decide."""
_HOT = 1e30
"""Temperature that stands for all above it: every token is as likely, and -inf stays impossible."""


class Filters(TypedDict, total=False):
    """Which tokens may be sampled; see `Sampling`."""

    top_k: int
    top_p: float
    min_p: float


@checked
@dataclass(frozen=True)
class Sampling:
    """How to choose the next token, and when to stop.

    Attributes:
        max_new_tokens: longest continuation, in tokens.
        temperature: logits are divided by it; 0, and anything below 1e-5, where rounding would decide, takes the most
            probable token.
        seed: with the row number it decides every draw of a row, whatever batch the row is in.
        stop_at: token ids that end a row.
        stop: strings that end a row at the first token after which its new text contains one of them.
        top_k: only the k most probable tokens; 0 for all.
        top_p: only the most probable tokens that together reach this share of the probability; 1 for all.
        min_p: only tokens with at least this share of the probability of the most probable one; 0 for all.

    The filters apply after the temperature and in this order. A token as probable as the last one kept is kept too,
    so that the choice does not depend on how a sort breaks ties.
    """

    max_new_tokens: int = 40
    temperature: float = 1.0
    seed: int = 0
    stop_at: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS or not 0 <= self.temperature < math.inf:
            raise InvalidInputError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}: give 1 to {MAX_NEW_TOKENS} "
                "tokens and a temperature of 0 or more."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise InvalidInputError(
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k must be >= 0 (0 is off), "
                "top_p above 0 and at most 1 (1 is off), min_p from 0 (off) to 1."
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise InvalidInputError(f"stop={self.stop!r}: give a tuple of strings that are not empty, such as ('.',).")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < _GREEDY

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens may not be sampled."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Noise:
    """Exponential noise of each row and step, from the seed and the row number alone.

    Args:
        rows: number of each row in the whole job.
        seed: of the job.
    """

    def __init__(self, rows: Int[Tensor, " batch"], seed: int) -> None:
        # Odd multiplier: distinct (seed, row) give distinct generator seeds.
        self._generators = [
            torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row * 0xD1342543DE82EF95) % 2**63)
            for row in rows.tolist()
        ]

    def keep(self, index: Int[Tensor, " kept"]) -> None:
        """From here on only these rows, in this order."""
        self._generators = [self._generators[i] for i in index.tolist()]

    def next(self, vocab: int) -> Float[Tensor, "batch noise"]:
        """The next step's noise for `race` over a vocabulary of this size."""
        drawn = torch.empty(len(self._generators), -(-vocab // _BLOCK) + _BLOCK, dtype=torch.float64)
        for row, generator in zip(drawn, self._generators, strict=True):
            row.exponential_(generator=generator)
        return drawn.clamp_min_(torch.finfo(torch.float64).tiny)


def race(
    weights: Float[Tensor, "batch vocab"], noise: Float[Tensor, "batch noise"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The token with the largest weight / noise, which falls on each in proportion to its weight; and the total weight.

    Each token keeps its noise, whatever the others weigh, so small changes of the weights seldom change the choice; one
    uniform number in the cumulative weights would move with the sum of all changes before it. Two levels, blocks first
    and then the tokens of one block, need 256 + vocab / 256 numbers per row, and read the vocabulary once.

    Source: the exponential form of the Gumbel-max trick (Maddison et al. 2014).

    >>> race(torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[1.0, 4.0, 4.0, 1.0] + 253 * [1.0]]))[0]  # 1/4, 2/4, 1/1
    tensor([2])
    """
    batch, vocab = weights.shape
    padded = (nn.functional.pad(weights, (0, -vocab % _BLOCK)) if vocab % _BLOCK else weights).view(batch, -1, _BLOCK)
    sums = padded.sum(2).double()
    block = (sums / noise[:, : sums.shape[1]]).argmax(1)
    inside = padded[torch.arange(batch, device=weights.device), block]
    place = (inside / noise[:, -_BLOCK:]).argmax(1)
    return (block * _BLOCK + place).clamp_max(vocab - 1), sums.sum(1).to(weights)


def smallest_kept(scores: Float[Tensor, "batch vocab"], options: Sampling) -> Float[Tensor, "batch 1"]:
    """The score of the least probable token that top_k, top_p and min_p leave, applied in this order.

    Reads the vocabulary once per filter and never sorts it: top_p asks for the largest 64 scores, then for twice as
    many until they hold enough probability.

    Args:
        scores: logits after the temperature, shifted so that the largest of each row is 0.
        options: the filters.

    >>> scores = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    >>> smallest_kept(scores - scores.max(), Sampling(top_p=0.7)).exp() * 0.5  # 0.5 < 0.7 <= 0.5 + 0.25
    tensor([[0.2500]])
    """
    vocab = scores.shape[1]
    kept = scores.new_full((len(scores), 1), -math.inf)
    top = min(options.top_k or vocab, vocab)
    if options.top_k:
        kept = scores.topk(top).values[:, -1:]
    if options.top_p < 1:
        weights = scores.exp()
        allowed = weights.where(scores >= kept, 0) if options.top_k else weights
        wanted = options.top_p * allowed.sum(1, keepdim=True, dtype=torch.float64)
        size = min(_FIRST_TOP, top)
        while True:
            largest = scores.topk(size).values
            mass = largest.double().exp()
            before = mass.cumsum(1) - mass
            if size == top or bool((before[:, -1:] + mass[:, -1:] >= wanted).all()):
                break
            size = min(2 * size, top)
        last = ((before < wanted).sum(1, keepdim=True) - 1).clamp_min(0)
        kept = torch.maximum(kept, largest.gather(1, last))
    if options.min_p:
        kept = kept.clamp_min(math.log(options.min_p))
    return kept


def choose(
    logits: Float[Tensor, "batch vocab"],
    noise: Float[Tensor, "batch noise"] | None,
    options: Sampling,
    allowed: Float[Tensor, "batch vocab"] | None = None,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Next token of each row and its log-probability (nats, temperature 1, no filter); nan where there is none.

    Args:
        logits: of the model, overwritten; the log-probability is by them.
        noise: of this step; None where the most probable token is taken.
        options: temperature and filters.
        allowed: logits to choose by, where some tokens may not come; overwritten.
    """
    logits -= logits.amax(1, keepdim=True)
    if allowed is not None:
        allowed -= allowed.amax(1, keepdim=True)
    by = logits if allowed is None else allowed
    if noise is None:
        chosen, total = by.argmax(1), logits.exp().sum(1)
    elif options.temperature == 1 and not options.is_filtered and allowed is None:
        chosen, total = race(logits.exp(), noise)
    else:
        scores = by / min(options.temperature, _HOT)
        weights = scores.exp()
        if options.is_filtered:
            weights = weights.where(scores >= smallest_kept(scores, options), 0)
        chosen, _ = race(weights, noise)
        total = logits.exp().sum(1)
    logprob = logits.gather(1, chosen[:, None]).squeeze(1) - total.log()
    # a row of which every token is ruled out is nan after the shift
    return chosen, logprob if allowed is None else logprob + 0 * allowed.gather(1, chosen[:, None]).squeeze(1)
