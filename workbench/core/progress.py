"""Progress of long calls: shown by itself on a terminal and in a notebook, silent elsewhere; `off()` silences it.

```
wb.progress.off()   # nothing any more
wb.progress.on()    # also where nobody watches: a line every ten seconds in a log
```
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

from workbench.core.counts import clock
from workbench.core.reporters import BarReporter, LineReporter, NotebookReporter, Reporter, Silent, Task, is_terminal

__all__ = ["Reporter", "Task", "clock", "hidden", "off", "on", "quiet_libraries", "say", "shown", "task", "track"]

T = TypeVar("T")

_reporter: ContextVar[Reporter | None] = ContextVar("workbench_progress", default=None)
_mode: Literal["auto", "on", "off"] = "auto"


def on() -> None:
    """Shows progress everywhere: bars on a terminal and in a notebook, a line every ten seconds in a log."""
    global _mode
    _mode = "on"


def off() -> None:
    """Shows no progress any more in this process."""
    global _mode
    _mode = "off"


@contextlib.contextmanager
def task(*, total: int | None, description: str, unit: str = "") -> Iterator[Task]:
    """A task whose units are counted by hand, for loops where one turn is many units.

    Args:
        total: units in all; None if that is not known.
        description: what is being done.
        unit: name of the units, in the plural; "" where there is nothing to count.

    >>> with task(total=10, description="read", unit="tokens") as reading:
    ...     reading.advance(10)
    """
    running = _current().start(description, total, unit)
    try:
        yield running
    finally:
        running.stop()


def track(iterable: Iterable[T], *, total: int | None = None, description: str, unit: str = "steps") -> Iterator[T]:
    """The same items, counted after each was worked on.

    `total` defaults to the length of `iterable` where it has one.

    >>> list(track([1, 2], description="add", unit="numbers"))
    [1, 2]
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]  # hasattr says so
    with task(total=total, description=description, unit=unit) as running:
        for item in iterable:
            yield item
            running.advance()


def say(line: str) -> None:
    """One line that stays, above the bars; nothing where progress is not shown."""
    _current().say(line)


@contextlib.contextmanager
def shown(reporter: Reporter | None = None) -> Iterator[None]:
    """Show the progress of everything inside, as `on()` does, or by `reporter`.

    Output goes to stderr, so that stdout stays for results. An inner `shown()` leaves the outer one in charge.
    """
    if _reporter.get() is not None and reporter is None:
        yield
        return
    token = _reporter.set(reporter or _watched() or _made(LineReporter))
    try:
        yield
    finally:
        _reporter.reset(token)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Show no progress of what is inside."""
    with shown(Silent()):
        yield


def _current() -> Reporter:
    found = _reporter.get()
    if found is not None:
        return found
    if _mode == "off":
        return _made(Silent)
    return _watched() or _made(LineReporter if _mode == "on" else Silent)


def _watched() -> Reporter | None:
    """Where somebody looks on: the cell of a notebook, or a terminal."""
    if _is_notebook():
        return _made(NotebookReporter)
    return _made(BarReporter) if is_terminal(sys.stderr) else None


@functools.cache
def _made(kind: Callable[[], Reporter]) -> Reporter:
    """One reporter of each kind in a process, so that nested tasks stand below each other."""
    return kind()


def _is_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


_quiet = threading.Lock()
_quiet_depth = 0
_restore: Callable[[], None] = lambda: None  # noqa: E731


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars of other libraries inside: transformers, datasets, the hub and sae_lens all draw with tqdm.

    Bars that are already drawn stay, and afterwards all is as before.
    """
    global _quiet_depth, _restore
    with _quiet:
        if _quiet_depth == 0:
            _restore = _without_tqdm()
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _restore()


def _without_tqdm() -> Callable[[], None]:
    """Switches new bars off; returns what switches them on again."""
    from tqdm.std import tqdm

    drawn = tqdm.__init__

    @functools.wraps(drawn)
    def silent(self: tqdm, *args: Any, **options: Any) -> None:  # as tqdm's own
        drawn(self, *args, **{**options, "disable": True})

    def restore() -> None:
        tqdm.__init__ = drawn

    tqdm.__init__ = silent
    return restore
