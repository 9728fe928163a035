"""Ctrl-C held back until what must not be cut in two is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_interrupt(*, every: bool = False) -> Iterator[threading.Event]:
    """Ctrl-C sets the event that is given, and nothing else; the block decides what follows.

    A second Ctrl-C stops the block, unless `every` one is held. Outside the main thread, where Ctrl-C does not arrive,
    nothing is done.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def hold(*_: object) -> None:
        event.set()
        if not every:
            signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
