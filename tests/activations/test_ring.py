from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from workbench.activations.ring import RingBuffer
from workbench.errors import DegenerateInputError, InvalidInputError


def _blocks(epoch: int) -> Iterator[Tensor]:
    """100 numbered rows in blocks of uneven length."""
    rows = torch.arange(100.0)[:, None] + 1000 * epoch
    yield from rows.split([7, 31, 1, 40, 21])


@pytest.mark.parametrize("capacity", [2, 3, 10, 64, 99, 100, 101, 500])
@pytest.mark.parametrize("batch", [1, 8, 33, 100])
def test_every_row_of_an_epoch_is_served_exactly_once(capacity: int, batch: int) -> None:
    ring = RingBuffer(_blocks, capacity)
    served = torch.cat([ring.next(batch) for _ in range(-(-200 // batch))]).flatten()[:200]
    assert torch.equal(served[:100].sort().values, torch.arange(100.0))
    assert torch.equal(served[100:].sort().values, torch.arange(100.0) + 1000)


def test_rows_are_shuffled_within_the_capacity_and_differently_in_each_epoch() -> None:
    ring = RingBuffer(_blocks, 64, seed=1)
    first, second = ring.next(100).flatten(), ring.next(100).flatten() - 1000
    assert not torch.equal(first, torch.arange(100.0))
    assert not torch.equal(first, second)
    assert float(first[:20].max()) < 64, "rows beyond the buffer can't come first"


@pytest.mark.parametrize("served", [0, 5, 50, 99, 100, 130])
@pytest.mark.parametrize("capacity", [16, 300])
def test_a_restored_buffer_goes_on_to_the_bit(served: int, capacity: int) -> None:
    ring = RingBuffer(_blocks, capacity, seed=3)
    for _ in range(served):
        ring.next(1)
    again = RingBuffer(_blocks, capacity, seed=3)
    again.load_state_dict(ring.state_dict())
    for _ in range(12):
        assert torch.equal(ring.next(9), again.next(9))


def test_batches_do_not_share_memory_with_the_buffer() -> None:
    ring = RingBuffer(_blocks, 100)
    batch = ring.next(100)
    kept = batch.clone()
    ring.next(100)
    assert torch.equal(batch, kept)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(DegenerateInputError, match="no rows"):
        RingBuffer(lambda epoch: iter(()), 10)
    with pytest.raises(InvalidInputError, match="seed 0"):
        RingBuffer(_blocks, 10).load_state_dict({"epoch": 0, "served": 0, "seed": 1, "capacity": 10})
