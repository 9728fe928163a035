"""Batched generation with a KV cache, sampling by inverse CDF, the same for a row in any batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import InvalidInputError
from workbench.interventions.plan import EditReport
from workbench.tokens import TokenBatch

_BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        max_new_tokens: longest continuation, in tokens.
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        seed: with the row number it decides every draw of a row, whatever batch the row is in.
        stop_at: token ids that end a row.
    """

    max_new_tokens: int = 40
    temperature: float = 1.0
    seed: int = 0
    stop_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise InvalidInputError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}: they must be >= 1 and >= 0."
            )


@dataclass(frozen=True, eq=False)
class Generation:
    """Continuations of a batch of prompts.

    Attributes:
        texts: the continuations, without the prompts.
        ids: new token ids of each row, up to and without the stop token.
        logprobs: log-probability (nats) of each new token under the model that generated, at temperature 1.
        report: what each edit did; empty without an intervention.
    """

    texts: tuple[str, ...]
    ids: tuple[Int[Tensor, " _"], ...]
    logprobs: tuple[Float[Tensor, " _"], ...]
    report: tuple[EditReport, ...] = ()


def uniforms(rows: Int[Tensor, " batch"], n: int, seed: int) -> Float[Tensor, "batch n"]:
    """One uniform number per row and step, from the seed and the row number alone."""
    draws = torch.empty(len(rows), n, dtype=torch.float64)
    for i, row in enumerate(rows.tolist()):
        # Odd multiplier: distinct (seed, row) give distinct generator seeds.
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row * 0xD1342543DE82EF95) % 2**63)
        draws[i] = torch.rand(n, generator=generator, dtype=torch.float64)
    return draws


def inverse_cdf(
    weights: Float[Tensor, "batch vocab"], u: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The token at which the cumulative weight passes `u` times the total, and the total.

    Two levels: sums of blocks first, then one block per row, so the vocabulary is read once.

    >>> inverse_cdf(torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([0.5]))[0]  # 0.5 * 4 = 2 lies in the second
    tensor([1])
    """
    batch, vocab = weights.shape
    padded = (nn.functional.pad(weights, (0, -vocab % _BLOCK)) if vocab % _BLOCK else weights).view(batch, -1, _BLOCK)
    sums = padded.sum(2).double()
    upto = sums.cumsum(1)
    target = u.to(upto) * upto[:, -1]
    block = torch.searchsorted(upto, target[:, None], right=True).squeeze(1).clamp_max(sums.shape[1] - 1)
    row = torch.arange(batch, device=weights.device)
    # Rounding may put the target past the last positive block.
    last_block = (sums > 0).long().mul(torch.arange(1, sums.shape[1] + 1, device=weights.device)).amax(1) - 1
    block = torch.minimum(block, last_block.clamp_min(0))
    inside = padded[row, block].double().cumsum(1)
    left = target - (upto[row, block] - sums[row, block])
    place = torch.searchsorted(inside, left[:, None], right=True).squeeze(1)
    last = (padded[row, block] > 0).long().mul(torch.arange(1, _BLOCK + 1, device=weights.device)).amax(1) - 1
    return (block * _BLOCK + torch.minimum(place, last)).clamp(0, vocab - 1), upto[:, -1].to(weights)


def choose(
    logits: Float[Tensor, "batch vocab"], u: Float[Tensor, " batch"], temperature: float
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Next token of each row and its log-probability (nats, temperature 1). `logits` is overwritten."""
    logits -= logits.amax(1, keepdim=True)
    if temperature == 0:
        chosen, total = logits.argmax(1), logits.exp().sum(1)
    elif temperature == 1:
        chosen, total = inverse_cdf(logits.exp(), u)
    else:
        chosen, _ = inverse_cdf((logits / temperature).exp(), u)
        total = logits.exp().sum(1)
    return chosen, logits.gather(1, chosen[:, None]).squeeze(1) - total.log()


def preallocated_cache(config: Any, width: int) -> Any:
    """A KV cache whose plain layers are allocated once for `width` tokens instead of growing at every step."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Preallocated(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._used = 0
                self._k, self._v = (
                    x.new_empty(x.shape[0], x.shape[1], width, x.shape[3]) for x in (key_states, value_states)
                )
            end = self._used + key_states.shape[2]
            self._k[:, :, self._used : end], self._v[:, :, self._used : end] = key_states, value_states
            self._used = end
            self.keys, self.values = self._k[:, :, :end], self._v[:, :, :end]
            return self.keys, self.values

    cache = DynamicCache(config=config)
    if cache.layers:
        cache.layers = [Preallocated() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def sample(
    hf: Any,
    batch: TokenBatch,
    options: Sampling,
    rows: Int[Tensor, " batch"],
    on_step: Callable[[int], None] | None = None,
) -> tuple[Int[Tensor, "batch new"], Float[Tensor, "batch new"]]:
    """New token ids and their log-probabilities; rows that have stopped are filled with the last stop token.

    Args:
        hf: the Hugging Face model.
        batch: left-padded prompts.
        options: how to choose.
        rows: number of each row in the whole job, which seeds its draws.
        on_step: called with the number of rows after each new token.
    """
    device = batch.ids.device
    n, width = options.max_new_tokens, batch.ids.shape[1]
    draws = uniforms(rows, n, options.seed).to(device) if options.temperature else torch.zeros(len(batch), n)
    cache = preallocated_cache(hf.config, width + n)
    stop = torch.tensor(options.stop_at, device=device, dtype=torch.long)
    new_ids = torch.full((len(batch), n), options.stop_at[0] if options.stop_at else 0, device=device)
    logprobs = torch.zeros(len(batch), n, device=device)
    done = torch.zeros(len(batch), dtype=torch.bool, device=device)
    padded = not bool(batch.mask.all())
    mask, position, ids = batch.mask, batch.positions, batch.ids
    for step in range(n):
        # Without padding the model needs no mask, and attention takes its fast path.
        extra = {"attention_mask": mask.long()} if padded else {}
        out = hf(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
        chosen, logprob = choose(out.logits[:, -1].float(), draws[:, step].to(device), options.temperature)
        new_ids[:, step] = torch.where(done, new_ids[:, step], chosen)
        logprobs[:, step] = torch.where(done, logprobs[:, step], logprob)
        if on_step is not None:
            on_step(len(batch))
        if options.stop_at:
            done |= torch.isin(chosen, stop)
            if bool(done.all()):
                break
        ids, position = chosen[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return new_ids, logprobs
