"""Top activating contexts of every feature, from a store, in one pass whose memory does not grow with the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore, Block
from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.progress import task

MISSING = -1
_CHUNK = 2048


@dataclass(frozen=True)
class ContextOptions:
    """How contexts are collected.

    Attributes:
        per_feature: contexts kept per feature, those with the largest activation; each packed row gives at most one.
        max_tokens: kept tokens that are read, from the start of the store; None reads all.
        min_contexts: features with fewer contexts get no input score.
        shown: contexts per feature that are kept as text.
        before: tokens shown before the activating one.
        after: tokens shown after it.
    """

    per_feature: int = 100
    max_tokens: int | None = 200_000
    min_contexts: int = 10
    shown: int = 3
    before: int = 8
    after: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.min_contexts <= self.per_feature or self.shown < 0 or (self.max_tokens or 1) < 1:
            raise InvalidInputError(f"{self}: needs 1 <= min_contexts <= per_feature, shown >= 0, max_tokens >= 1.")


@dataclass(frozen=True, eq=False)
class TopContexts:
    """The contexts in which each feature is most active, strongest first; `MISSING` and 0 where there are fewer.

    Attributes:
        acts: largest activation of the feature in the packed row.
        tokens: id of the token on which it was reached.
        rows: packed row in the store.
        positions: position in the row.
        frequency: share of the read tokens on which the feature is active.
        max_act: largest activation.
        n_tokens: kept tokens that were read.
        texts: the strongest contexts as text, the activating token between « and ».
    """

    acts: Float[Tensor, "features k"]
    tokens: Int[Tensor, "features k"]
    rows: Int[Tensor, "features k"]
    positions: Int[Tensor, "features k"]
    frequency: Float[Tensor, " features"]
    max_act: Float[Tensor, " features"]
    n_tokens: int
    texts: tuple[tuple[str, ...], ...]

    @property
    def counts(self) -> Int[Tensor, " features"]:
        """Number of contexts found per feature."""
        return (self.tokens != MISSING).sum(1)


class _Running:
    """The strongest contexts so far; one packed row competes with its strongest token."""

    def __init__(self, features: Tensor, d_sae: int, keep: int) -> None:
        self.features, self.d_sae = features, d_sae
        self.acts = torch.zeros(keep, len(features))
        self.where = torch.full((3, keep, len(features)), MISSING)
        self.active = torch.zeros(len(features), dtype=torch.long)
        self.n_tokens = 0

    def add(self, sae: Any, block: Block) -> None:
        """Reads the kept tokens of some whole packed rows."""
        first_row = int(block.rows[0])
        n_rows = int(block.rows[-1]) - first_row + 1
        best = torch.zeros(n_rows, len(self.features))
        token = torch.full((n_rows, len(self.features)), len(block.acts))
        for start in range(0, len(block.acts), _CHUNK):
            part = block.acts[start : start + _CHUNK]
            acts = _encode(sae, part)
            if len(self.features) < self.d_sae:
                acts = acts[:, self.features]
            at, feature = acts.nonzero(as_tuple=True)
            values, row = acts[at, feature], block.rows[start + at] - first_row
            self.active += torch.bincount(feature[values > 0], minlength=len(self.features))
            before = best.clone()
            flat = row * len(self.features) + feature
            best.view(-1).scatter_reduce_(0, flat, values, "amax")
            token[best > before] = len(block.acts)
            won = values == best.view(-1)[flat]
            # Of equal activations in a row the first token counts.
            token.view(-1).scatter_reduce_(0, flat[won], start + at[won], "amin")
        self._merge(best, token, block)
        self.n_tokens += len(block.acts)

    def _merge(self, best: Tensor, token: Tensor, block: Block) -> None:
        found = best > 0
        index = token.clamp_max(len(block.acts) - 1)
        where = torch.stack([x[index] for x in (block.tokens, block.rows, block.positions)])
        where = torch.where(found, where, MISSING)
        acts, order = torch.cat([self.acts, best]).topk(len(self.acts), dim=0)
        self.where = torch.cat([self.where, where], dim=1).gather(1, order.expand(3, -1, -1))
        self.acts = acts


def _encode(sae: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return sae.encode(x.to(sae.W_dec)).float().cpu()


def top_contexts(
    store: ActivationStore,
    sae: Any,
    tokenizer: Any,
    features: Int[Tensor, " features"],
    site: str,
    options: ContextOptions | None = None,
) -> TopContexts:
    """The packed rows in which each feature is most active, with its frequency over the tokens that were read.

    Tokens that the store left out (attention sinks, special tokens) do not count.

    Raises:
        DegenerateInputError: if the store holds no tokens.
        UnknownSiteError: if the site is not stored.
    """
    options = options or ContextOptions()
    running = _Running(features, int(sae.W_dec.shape[0]), options.per_feature)
    limit = min(store.rows, options.max_tokens or store.rows)
    with task(total=limit, description="top contexts", unit="tokens") as progress:
        for block in store.blocks(site):
            if running.n_tokens + len(block.acts) > limit:
                block = _whole_rows(block, limit - running.n_tokens, at_least_one=running.n_tokens == 0)
            if len(block.acts):
                running.add(sae, block)
                progress.advance(len(block.acts))
            if running.n_tokens >= limit or not len(block.acts):
                break
    if running.n_tokens == 0:
        raise DegenerateInputError(
            f"{store} gave no token to read (max_tokens={options.max_tokens}). Allow at least one row."
        )
    tokens, rows, positions = (part.T.contiguous() for part in running.where)
    acts = running.acts.T.contiguous()
    texts = _texts(store, tokenizer, rows[:, : options.shown], positions[:, : options.shown], options)
    frequency = running.active.double() / running.n_tokens
    return TopContexts(acts, tokens, rows, positions, frequency.float(), acts[:, 0], running.n_tokens, texts)


def _whole_rows(block: Block, n: int, at_least_one: bool) -> Block:
    """The first rows of a block that together hold at most n tokens, n being less than the block has."""
    # The row of token n is not whole: token n is the first that is too many.
    cut = block.rows[max(n, 0)]
    inside = block.rows < cut
    return block[block.rows == cut] if at_least_one and not bool(inside.any()) else block[inside]


def _texts(
    store: ActivationStore, tokenizer: Any, rows: Tensor, positions: Tensor, options: ContextOptions
) -> tuple[tuple[str, ...], ...]:
    """The shown contexts as text; token rows are read shard by shard."""
    texts: list[list[str]] = [[""] * rows.shape[1] for _ in range(len(rows))]
    for shard in store.manifest.shards:
        inside = (rows >= shard.first_row) & (rows < shard.first_row + shard.n_rows)
        if not bool(inside.any()):
            continue
        ids = store._load(shard)["token_rows"].long()
        for feature, rank in inside.nonzero().tolist():
            row, at = ids[int(rows[feature, rank]) - shard.first_row], int(positions[feature, rank])
            before = tokenizer.decode(row[max(0, at - options.before) : at])
            after = tokenizer.decode(row[at + 1 : at + 1 + options.after])
            texts[feature][rank] = f"{before}«{tokenizer.decode(row[at : at + 1])}»{after}"
    return tuple(tuple(text for text in feature if text) for feature in texts)
