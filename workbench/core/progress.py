"""Progress of long loops: silent in a library, shown with rate and time left where somebody watches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

T = TypeVar("T")
Number = int | float

SECONDS_BETWEEN_LINES = 10.0
"""How often a log (no terminal) gets a line."""


class Task:
    """One running task; on its own it is silent."""

    def advance(self, amount: int = 1) -> None:
        """Counts `amount` more units (tokens, batches: what the task was started with)."""

    def stop(self) -> None:
        """Ends the task, finished or not."""


@runtime_checkable
class Reporter(Protocol):
    """Where progress goes."""

    def start(self, description: str, total: int | None, unit: str) -> Task:
        """Begins a task."""
        ...


_reporter: ContextVar[Reporter | None] = ContextVar("workbench_progress", default=None)


@contextlib.contextmanager
def task(*, total: int | None, description: str, unit: str) -> Iterator[Task]:
    """A task whose units are counted by hand, for loops where one turn is many units.

    >>> with task(total=10, description="read", unit="tokens") as reading:
    ...     reading.advance(10)
    """
    reporter = _reporter.get()
    running = Task() if reporter is None else reporter.start(description, total, unit)
    try:
        yield running
    finally:
        running.stop()


def track(iterable: Iterable[T], *, total: int | None = None, description: str, unit: str = "steps") -> Iterator[T]:
    """The same items; inside `shown()` with a bar that counts them.

    `total` defaults to the length of `iterable` where it has one.

    >>> list(track([1, 2], description="add", unit="numbers"))
    [1, 2]
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]  # hasattr says so
    if _reporter.get() is None:
        yield from iterable
        return
    with task(total=total, description=description, unit=unit) as running:
        for item in iterable:
            yield item
            running.advance()


@contextlib.contextmanager
def shown(reporter: Reporter | None = None, console: Console | None = None) -> Iterator[None]:
    """Show the progress of everything inside: bars on a terminal, a line every ten seconds in a log.

    Output goes to stderr, so that stdout stays for results. An inner `shown()` leaves the outer one in charge.
    """
    if _reporter.get() is not None and reporter is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        token = _reporter.set(reporter or stack.enter_context(_default_reporter(console)))
        try:
            yield
        finally:
            _reporter.reset(token)


@contextlib.contextmanager
def _default_reporter(console: Console | None) -> Iterator[Reporter]:
    from rich.console import Console as RichConsole

    console = console or RichConsole(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield LineReporter(console)
    else:
        with contextlib.closing(BarReporter(console)) as bars:
            yield bars


class BarReporter:
    """Rich bars: percentage, rate in the task's unit, time gone and time left."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskProgressColumn, TextColumn
        from rich.progress import Task as RichTask
        from rich.text import Text

        class Pace(ProgressColumn):
            """Rate and time left, in words."""

            def render(self, task: RichTask) -> Text:
                """One cell."""
                text = _pace(task.completed, task.total, task.elapsed or 0.0, str(task.fields["unit"]))
                return Text(text, style="cyan")

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            Pace(),
            console=console,
            transient=True,
        )

    def start(self, description: str, total: int | None, unit: str) -> Task:
        """Adds a bar, and begins drawing with the first."""
        self._progress.start()
        return _Bar(self._progress, self._progress.add_task(description, total=total, unit=unit))

    def close(self) -> None:
        """Stops drawing."""
        self._progress.stop()


class _Bar(Task):
    def __init__(self, progress: Progress, task_id: TaskID) -> None:
        self._progress, self._id = progress, task_id

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(self._id, amount)

    def stop(self) -> None:
        """Removes the bar and leaves one line that says how long it took."""
        done = next(task for task in self._progress.tasks if task.id == self._id)
        line = _closing_line(done.description, done.completed, done.elapsed or 0.0, str(done.fields["unit"]))
        self._progress.remove_task(self._id)
        if (done.elapsed or 0.0) >= 1.0:
            self._progress.console.print(line, markup=False, highlight=False, style="dim")
        if not self._progress.tasks:
            self._progress.stop()


@dataclass(frozen=True)
class LineReporter:
    """Plain lines for logs, at most one every ten seconds per task and one at its end."""

    console: Console

    def start(self, description: str, total: int | None, unit: str) -> Task:
        """Begins counting; nothing is written yet."""
        return _Lines(self.console, description, total, unit)


class _Lines(Task):
    def __init__(self, console: Console, description: str, total: int | None, unit: str) -> None:
        self._console, self._description, self._total, self._unit = console, description, total, unit
        self._done = 0
        self._started = self._written = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._written >= SECONDS_BETWEEN_LINES:
            self._written = now
            self._print(f"{self._description}: {_pace(self._done, self._total, now - self._started, self._unit)}")

    def stop(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds >= 1.0:
            self._print(_closing_line(self._description, self._done, seconds, self._unit))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _pace(done: Number, total: Number | None, seconds: Number, unit: str) -> str:
    """How far, how fast, how long still.

    >>> _pace(50, 200, 10.0, "tokens")  # 5 a second, 150 to go
    '50/200 tokens, 5.0 tokens/s, 30 s left'
    """
    rate = done / seconds if seconds > 0 else 0.0
    parts = [f"{done:,.0f}/{total:,.0f} {unit}" if total is not None else f"{done:,.0f} {unit}"]
    if rate > 0:
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.1f} {unit}/s")
        if total is not None:
            parts.append(f"{clock(max(0.0, total - done) / rate)} left")
    return ", ".join(parts)


def _closing_line(description: str, done: Number, seconds: Number, unit: str) -> str:
    return f"{description}: {done:,.0f} {unit} in {clock(seconds)}"


def clock(seconds: Number) -> str:
    """A duration that people read.

    >>> clock(4.2), clock(75), clock(3700)
    ('4 s', '1 min 15 s', '1 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
