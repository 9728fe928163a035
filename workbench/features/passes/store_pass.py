"""One pass over a store: whole packed rows at a time, the same groups of rows however the store is cut into shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore, Block
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError
from workbench.core.progress import task

CHUNK_TOKENS = 2048
"""Tokens, dropped ones included, whose activations are dense at any time; results do not depend on shards."""
_FIELDS = ("acts", "tokens", "positions", "rows", "documents")


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some whole packed rows: their kept tokens, and all their token ids, dropped tokens included."""

    block: Block
    ids: Int[Tensor, "rows context"]
    first_row: int

    def split(self, rows: int) -> tuple[Chunk, Chunk]:
        """The first `rows` rows, and the rest."""
        cut = int(torch.searchsorted(self.block.rows, self.first_row + rows))
        # Slices are views: however large a shard is, its activations are not copied for each group of rows.
        head, tail = (
            Block(*(getattr(self.block, name)[part] for name in _FIELDS)) for part in (slice(cut), slice(cut, None))
        )
        return Chunk(head, self.ids[:rows], self.first_row), Chunk(tail, self.ids[rows:], self.first_row + rows)

    def documents(self) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
        """First and last position of each kept token's document in its row.

        Dropped tokens have no document: those at the ends of a row count to the nearest, those between two documents
        to neither.
        """
        block = self.block
        if not len(block.rows):
            return block.positions, block.positions
        new_row = torch.ones(len(block.rows) + 1, dtype=torch.bool)
        new_row[1:-1] = block.rows[1:] != block.rows[:-1]
        new = new_row.clone()
        new[1:-1] |= block.documents[1:] != block.documents[:-1]
        run = new[:-1].long().cumsum(0) - 1
        starts, ends = new[:-1].nonzero().squeeze(1), new[1:].nonzero().squeeze(1)
        low = torch.where(new_row[:-1][starts], 0, block.positions[starts])
        high = torch.where(new_row[1:][ends], self.ids.shape[1] - 1, block.positions[ends])
        return low[run], high[run]


@runtime_checkable
class Units(Protocol):
    """Things with activations on tokens: features of an SAE, or units whose meaning is known."""

    @property
    def ids(self) -> Int[Tensor, " n"]:
        """Their numbers; draws depend on them, so a unit gets the same windows whichever others are read with it."""
        ...

    def acts(self, chunk: Chunk) -> Float[Tensor, "tokens n"]:
        """Activations at the kept tokens of a chunk, not negative."""
        ...


@checked
@dataclass(frozen=True, eq=False)
class SAEFeatures(OneLine):
    """Features of an SAE; only the encoder columns that are asked for are used, where features do not compete."""

    sae: AnySAE
    ids: Int[Tensor, " n"]

    def acts(self, chunk: Chunk) -> Float[Tensor, "tokens n"]:
        """The SAE's activations of these features."""
        basis = as_basis(self.sae)
        x = chunk.block.acts.to(basis.device).float()
        whole = torch.equal(self.ids, torch.arange(basis.d_sae))
        return (basis.encode(x) if whole else basis.encode_some(x, self.ids)).cpu()


def chunks(store: ActivationStore, site: str | None, max_tokens: int | None = None) -> Iterator[Chunk]:
    """The store in groups of whole packed rows that together hold at most `max_tokens` kept tokens, at least one row.

    Raises:
        DegenerateInputError: if there is no token to read.
        UnknownSiteError: if the site is not stored.
    """
    limit = min(store.rows, max_tokens or store.rows)
    read = 0
    with task(total=limit, description="contexts", unit="tokens") as progress:
        for chunk in _groups(store, site):
            n = len(chunk.block.rows)
            if read + n > limit:
                chunk = _at_most(chunk, limit - read, at_least_one=read == 0)
                n = len(chunk.block.rows)
            if n:
                read += n
                yield chunk
                progress.advance(n)
            if read >= limit or (not n and read):
                break
    if read == 0:
        raise DegenerateInputError(f"{store} gave no token to read (max_tokens={max_tokens}). Allow at least one row.")


def _groups(store: ActivationStore, site: str | None) -> Iterator[Chunk]:
    rows = max(1, CHUNK_TOKENS // store.context)
    held: Chunk | None = None
    for index, shard in enumerate(store.manifest.shards):
        new = Chunk(store.block(index, site), store.packed_rows(index), shard.first_row)
        held = new if held is None else _joined(held, new)
        while len(held.ids) >= rows:
            head, held = held.split(rows)
            if len(head.block.rows):
                yield head
    if held is not None and len(held.block.rows):
        yield held


def _joined(a: Chunk, b: Chunk) -> Chunk:
    if not len(a.ids):
        return b
    block = Block(*(torch.cat([getattr(a.block, name), getattr(b.block, name)]) for name in _FIELDS))
    return Chunk(block, torch.cat([a.ids, b.ids]), a.first_row)


def _at_most(chunk: Chunk, n: int, at_least_one: bool) -> Chunk:
    """The first rows of a chunk that together hold at most n tokens, n being less than the chunk has."""
    # The row of token n is not whole: token n is the first that is too many.
    rows = int(chunk.block.rows[max(n, 0)]) - chunk.first_row
    inside = bool((chunk.block.rows < chunk.first_row + rows).any())
    return chunk.split(rows + 1 if at_least_one and not inside else rows)[0]
