"""Making the next thing while a thread writes the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

State = TypeVar("State")
Item = TypeVar("Item")


def write_behind(items: Iterator[Item], write: Callable[[State, Item], State], state: State) -> State:
    """Folds `write` over the items, in their order and one at a time, in a thread that runs while the next is made.

    At most two items are alive, the one being made and the one being written, so two buffers in turn suffice. What
    `write` raises is raised here, before anything else is written. When making fails or is interrupted, the write under
    way ends first: an item is written or not, and the caller's locks outlive it.

    >>> write_behind(iter("abc"), lambda text, letter: text + letter, "")
    'abc'
    """
    with ThreadPoolExecutor(1, thread_name_prefix="write-behind") as thread:
        writing: Future[State] | None = None
        for item in items:
            if writing is not None:
                state = writing.result()
            writing = thread.submit(write, state, item)
        return state if writing is None else writing.result()
