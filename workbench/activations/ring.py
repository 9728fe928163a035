"""A shuffle buffer of fixed size: half is served, then exactly those slots are filled again, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError


class RingBuffer:
    """Endless shuffled batches of rows; every row of an epoch is served exactly once.

    Args:
        epoch_blocks: gives the blocks of rows of an epoch, by its number.
        capacity: rows held in memory; shuffling reaches no further than this.
        seed: of all permutations.
    """

    def __init__(self, epoch_blocks: Callable[[int], Iterable[Tensor]], capacity: int, seed: int = 0) -> None:
        if capacity < 2:
            raise InvalidInputError(f"RingBuffer(capacity={capacity}) must hold at least 2 rows.")
        self._epoch_blocks, self._capacity, self._seed = epoch_blocks, capacity, seed
        self._buffer: Tensor | None = None
        self._start_epoch(0)

    def next(self, n: int) -> Float[Tensor, "n d"]:
        """The next `n` rows; an epoch that ends inside is followed by the next one."""
        parts, missing = [], n
        while missing:
            if self._cursor == len(self._order):
                self._start_epoch(self._epoch + 1)
            part = self._take(missing)
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is; small, because a restored buffer reads its epoch again up to here."""
        return {"epoch": self._epoch, "served": self._served, "seed": self._seed, "capacity": self._capacity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where another buffer over the same blocks was; what follows is the same to the bit.

        Raises:
            InvalidInputError: if that buffer had another seed or capacity.
        """
        if (state["seed"], state["capacity"]) != (self._seed, self._capacity):
            raise InvalidInputError(
                f"This buffer has seed {self._seed} and capacity {self._capacity}; the state is {state}."
            )
        self._start_epoch(state["epoch"])
        while self._served < state["served"]:
            self._take(state["served"] - self._served)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._served, self._cursor = epoch, 0, 0
        self._random = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        self._stream: Iterator[Tensor] = iter(self._epoch_blocks(epoch))
        self._tail: Tensor | None = None
        self._order = torch.arange(self._capacity)
        self._order = self._fill(self._order)
        if not len(self._order):
            raise DegenerateInputError("The shuffle buffer got no rows: the store has no tokens in this split.")
        self._shuffle()

    def _take(self, n: int) -> Tensor:
        """Up to `n` rows of this epoch, fewer where the buffer is due to be filled."""
        assert self._buffer is not None
        limit = len(self._order) if self._stream_ended else max(1, self._capacity // 2)
        chosen = self._order[self._cursor : min(self._cursor + n, limit)]
        rows = self._buffer[chosen]
        self._cursor += len(chosen)
        self._served += len(chosen)
        if self._cursor >= limit and not self._stream_ended:
            filled = self._fill(self._order[: self._cursor])
            self._order = torch.cat([filled, self._order[self._cursor :]])
            self._shuffle()
        return rows

    def _shuffle(self) -> None:
        self._order = self._order[torch.randperm(len(self._order), generator=self._random)]
        self._cursor = 0

    def _fill(self, slots: Tensor) -> Tensor:
        """Writes the next rows of the stream into `slots`; returns the slots that were filled."""
        done = 0
        while done < len(slots):
            block = self._tail if self._tail is not None else next(self._stream, None)
            self._tail = None
            if block is None:
                break
            if self._buffer is None:
                self._buffer = block.new_empty(self._capacity, block.shape[1])
            part, rest = block[: len(slots) - done], block[len(slots) - done :]
            self._buffer[slots[done : done + len(part)]] = part
            done += len(part)
            self._tail = rest if len(rest) else None
        self._stream_ended = done < len(slots)
        return slots[:done]
