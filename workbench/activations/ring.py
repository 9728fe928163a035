"""A shuffle buffer of fixed size: half is served, then exactly those slots are filled again, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError

Rows = TypeVar("Rows", Tensor, dict[str, Tensor])
"""Rows of one stream, or of several streams that belong together row by row."""

_ONLY = "rows"


class RingBuffer(Generic[Rows]):
    """Endless shuffled batches of rows; every row of an epoch is served exactly once.

    `epoch_blocks` gives the blocks of an epoch, by its number. `capacity` rows are held in memory; shuffling reaches no
    further than this.

    A block is a tensor, or a dict of tensors of equal length whose rows belong together: the sites of one token then
    stay on one row of every batch. `next` gives the kind that the blocks are.

    >>> ring = RingBuffer(lambda epoch: [{"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([[10.0], [20.0]])}], 2)
    >>> batch = ring.next(2)
    >>> torch.equal(batch["y"], 10 * batch["x"])
    True
    """

    def __init__(self, epoch_blocks: Callable[[int], Iterable[Rows]], capacity: int, seed: int = 0) -> None:
        if capacity < 2:
            raise InvalidInputError(f"RingBuffer(capacity={capacity}) must hold at least 2 rows.")
        self._epoch_blocks, self._capacity, self._seed = epoch_blocks, capacity, seed
        self._buffers: dict[str, Tensor] = {}
        self._single = True
        self._start_epoch(0)

    def next(self, n: int) -> Rows:
        """The next `n` rows; an epoch that ends inside is followed by the next one."""
        out = {name: buffer.new_empty(n, *buffer.shape[1:]) for name, buffer in self._buffers.items()}
        done = 0
        while done < n:
            if self._cursor == len(self._order):
                self._start_epoch(self._epoch + 1)
            slots = self._peek(n - done)
            for name, buffer in self._buffers.items():
                torch.index_select(buffer, 0, slots, out=out[name][done : done + len(slots)])
            self._advance(len(slots))
            done += len(slots)
        return out[_ONLY] if self._single else out  # type: ignore[return-value]  # the kind that the blocks are

    def state_dict(self) -> dict[str, int]:
        """Where the stream is; small, because a restored buffer reads its epoch again up to here."""
        return {"epoch": self._epoch, "served": self._served, "seed": self._seed, "capacity": self._capacity}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to where another buffer over the same blocks was; what follows is the same to the bit.

        Raises:
            InvalidInputError: if that buffer had another seed or capacity, or served more than this epoch holds.
        """
        if (state["seed"], state["capacity"]) != (self._seed, self._capacity):
            raise InvalidInputError(
                f"This buffer has seed {self._seed} and capacity {self._capacity}; the state is {state}. Make the "
                "buffer with those of the state."
            )
        self._start_epoch(state["epoch"])
        while self._served < state["served"]:
            slots = self._peek(state["served"] - self._served)
            if not len(slots):
                raise InvalidInputError(
                    f"The state has served {state['served']} rows of epoch {state['epoch']}, which holds "
                    f"{self._served}: it belongs to another store or split. Use that one."
                )
            self._advance(len(slots))

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._served, self._cursor = epoch, 0, 0
        self._random = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        self._stream: Iterator[Rows] = iter(self._epoch_blocks(epoch))
        self._tail: dict[str, Tensor] | None = None
        self._order = self._fill(torch.arange(self._capacity))
        if not len(self._order):
            raise DegenerateInputError("The shuffle buffer got no rows: the store has no tokens in this split.")
        self._shuffle()

    @property
    def _limit(self) -> int:
        """How far `order` is served before the served slots are filled again."""
        return len(self._order) if self._stream_ended else max(1, self._capacity // 2)

    def _peek(self, n: int) -> Tensor:
        """The slots of up to `n` next rows of this epoch, fewer where the buffer is due to be filled."""
        return self._order[self._cursor : min(self._cursor + n, self._limit)]

    def _advance(self, n: int) -> None:
        """Marks `n` rows as served, and fills their slots again once half the buffer has been."""
        self._cursor += n
        self._served += n
        if self._cursor >= self._limit and not self._stream_ended:
            filled = self._fill(self._order[: self._cursor])
            self._order = torch.cat([filled, self._order[self._cursor :]])
            self._shuffle()

    def _shuffle(self) -> None:
        self._order = self._order[torch.randperm(len(self._order), generator=self._random)]
        self._cursor = 0

    def _fill(self, slots: Tensor) -> Tensor:
        """Writes the next rows of the stream into `slots`; returns the slots that were filled."""
        done = 0
        while done < len(slots):
            block = self._tail if self._tail is not None else self._next_block()
            self._tail = None
            if block is None:
                break
            rows = len(next(iter(block.values())))
            taken = min(rows, len(slots) - done)
            for name, part in block.items():
                self._buffers[name].index_copy_(0, slots[done : done + taken], part[:taken])
            done += taken
            self._tail = {name: part[taken:] for name, part in block.items()} if taken < rows else None
        self._stream_ended = done < len(slots)
        return slots[:done]

    def _next_block(self) -> dict[str, Tensor] | None:
        block: Tensor | dict[str, Tensor] | None = next(self._stream, None)
        if block is None:
            return None
        self._single = not isinstance(block, Mapping)
        parts = dict(block) if isinstance(block, Mapping) else {_ONLY: block}
        if len({len(part) for part in parts.values()}) != 1:
            shapes = {name: tuple(part.shape) for name, part in parts.items()}
            raise ShapeError(f"RingBuffer: a block of {shapes}. Give one tensor, or several with equally many rows.")
        if not self._buffers:
            self._buffers = {name: part.new_empty(self._capacity, *part.shape[1:]) for name, part in parts.items()}
        if parts.keys() != self._buffers.keys():
            raise InvalidInputError(
                f"RingBuffer: a block of {first_few(sorted(parts))} after blocks of "
                f"{first_few(sorted(self._buffers))}. Every block must have the same streams."
            )
        return parts
