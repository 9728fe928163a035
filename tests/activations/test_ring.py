from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from workbench.activations.ring import RingBuffer
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError


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


def _streams(epoch: int) -> Iterator[dict[str, Tensor]]:
    """The same rows at two sites of different width and dtype."""
    for block in _blocks(epoch):
        yield {"in": block, "out": (block * torch.tensor([2.0, 3.0])).double()}


@pytest.mark.parametrize("capacity", [2, 10, 64, 500])
def test_streams_that_belong_together_are_served_together(capacity: int) -> None:
    ring, alone = RingBuffer(_streams, capacity, seed=2), RingBuffer(_blocks, capacity, seed=2)
    served = []
    for _ in range(25):
        batch = ring.next(8)
        assert torch.equal(batch["out"], (batch["in"] * torch.tensor([2.0, 3.0])).double())
        assert torch.equal(batch["in"], alone.next(8)), "the order does not depend on how many streams there are"
        served.append(batch["in"])
    assert torch.equal(torch.cat(served).flatten()[:100].sort().values, torch.arange(100.0))
    again = RingBuffer(_streams, capacity, seed=2)
    again.load_state_dict(ring.state_dict())
    for _ in range(10):
        a, b = ring.next(7), again.next(7)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_buffer_restored_twice_goes_on_to_the_bit() -> None:
    ring, state = RingBuffer(_blocks, 32, seed=3), {}
    for n in (37, 21, 90):
        expected = ring.next(n)
        again = RingBuffer(_blocks, 32, seed=3)
        if state:
            again.load_state_dict(state)
        assert torch.equal(again.next(n), expected)
        state = again.state_dict()
        assert state == ring.state_dict()


def test_streams_must_fit_together() -> None:
    with pytest.raises(ShapeError, match="equally many rows"):
        RingBuffer(lambda epoch: [{"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)}], 10)
    blocks = [{"a": torch.zeros(3, 2)}, {"b": torch.zeros(3, 2)}]
    with pytest.raises(InvalidInputError, match=r"a block of b after blocks of a"):
        RingBuffer(lambda epoch: blocks, 10)
    ring = RingBuffer(_blocks, 10)
    with pytest.raises(InvalidInputError, match="holds 100"):
        ring.load_state_dict({"epoch": 0, "served": 101, "seed": 0, "capacity": 10})


def test_wrong_use_is_refused() -> None:
    with pytest.raises(DegenerateInputError, match="no rows"):
        RingBuffer(lambda epoch: iter(()), 10)
    with pytest.raises(InvalidInputError, match="seed 0"):
        RingBuffer(_blocks, 10).load_state_dict({"epoch": 0, "served": 0, "seed": 1, "capacity": 10})
