"""Making the next thing while a thread writes the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from workbench.activations.interrupts import held_interrupt

State = TypeVar("State")
Item = TypeVar("Item")


def write_behind(items: Iterator[Item], write: Callable[[State, Item], State], state: State) -> State:
    """Folds `write` over the items, in their order and one at a time, in a thread that runs while the next is made.

    At most two items are alive, the one being made and the one being written, so two buffers in turn suffice. What
    `write` raises is raised here, before anything else is written. When making fails or is interrupted, the write under
    way ends first, however often Ctrl-C is pressed: an item is written or not, and the caller's locks outlive it. If
    that write failed as well, the error of making says so in a note.

    >>> write_behind(iter("abc"), lambda text, letter: text + letter, "")
    'abc'
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
    writing: Future[State] | None = None
    try:
        for item in items:
            if writing is not None:
                state = writing.result()
            writing = thread.submit(write, state, item)
        return state if writing is None else writing.result()
    except BaseException as error:
        with held_interrupt(every=True) as stop:
            thread.shutdown()
        lost = None if writing is None else writing.exception()
        if lost is not None and lost is not error:
            error.add_note(f"Writing what was made before failed too: {lost!r}")
        if stop.is_set() and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        thread.shutdown()
