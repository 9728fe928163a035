"""How progress looks: bars on a terminal, one in a notebook cell, plain lines in a log."""

from __future__ import annotations

import contextvars
import html
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from workbench.core.counts import Count, bar_parts
from workbench.core.numbers import Number

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

SHOW_AFTER_SECONDS = 0.7
"""Tasks that end sooner are not shown at all: a flicker tells nobody anything."""
KEEP_AFTER_SECONDS = 5.0
"""Tasks that took this long leave one line with their duration."""
SECONDS_BETWEEN_LINES = 10.0
"""How often a log (no terminal) gets a line."""
SECONDS_BETWEEN_CELLS = 0.25
"""How often the output of a notebook cell changes, at most."""


class Task:
    """One running task; on its own it is silent."""

    def advance(self, amount: int = 1) -> None:
        """Counts `amount` more units (tokens, batches: what the task was started with)."""

    def skip(self, amount: int) -> None:
        """Counts units that an earlier call has done; the pace is measured without them."""

    def note(self, **numbers: Number) -> None:
        """Shows the latest values of some numbers beside the count, such as a loss."""

    def stop(self) -> None:
        """Ends the task, finished or not."""


@runtime_checkable
class Reporter(Protocol):
    """Where progress goes."""

    def start(self, description: str, total: int | None, unit: str) -> Task:
        """Begins a task."""
        ...

    def say(self, line: str) -> None:
        """Writes one line that stays, above the bars."""
        ...


class Counted(Task):
    """A task that keeps count and tells its reporter of each change."""

    def __init__(self, count: Count) -> None:
        self.count = count

    def advance(self, amount: int = 1) -> None:
        """Counts."""
        self.count.done += amount
        self.changed()

    def skip(self, amount: int) -> None:
        """Counts, but not for the pace."""
        self.count.done += amount
        self.count.skipped += amount
        self.changed()

    def note(self, **numbers: Number) -> None:
        """Keeps the numbers for the next picture."""
        self.count.numbers.update(numbers)

    def changed(self) -> None:
        """Called after every count."""


class Silent:
    """Shows nothing."""

    def start(self, description: str, total: int | None, unit: str) -> Task:  # noqa: ARG002 - nothing is shown
        """A task that nobody sees."""
        return Task()

    def say(self, line: str) -> None:
        """Nothing."""


@runtime_checkable
class Stream(Protocol):
    """Where lines are written."""

    def write(self, text: str, /) -> object:
        """Takes text."""
        ...

    def flush(self) -> None:
        """Passes it on."""
        ...


class LineReporter:
    """Plain lines for logs: at most one every ten seconds per task, and one at its end.

    Args:
        stream: where they go; by default stderr.
    """

    def __init__(self, stream: Stream | None = None) -> None:
        self._stream = stream

    def start(self, description: str, total: int | None, unit: str) -> Task:
        """Begins counting; nothing is written yet."""
        return _Lines(Count(description, total, unit), self)

    def say(self, line: str) -> None:
        """Writes it at once."""
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


class _Lines(Counted):
    def __init__(self, count: Count, reporter: LineReporter) -> None:
        super().__init__(count)
        self._reporter, self._written = reporter, count.started

    def changed(self) -> None:
        now = time.monotonic()
        if now - self._written >= SECONDS_BETWEEN_LINES:
            self._written = now
            self._reporter.say(self.count.line())

    def stop(self) -> None:
        if self.count.seconds >= KEEP_AFTER_SECONDS:
            self._reporter.say(self.count.closing())


class _Delayed:
    """Tasks that are shown from a moment after the first has begun, and no longer when the last has ended."""

    def __init__(self) -> None:
        self.running: list[_Shown] = []
        self.is_shown = False
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def start(self, description: str, total: int | None, unit: str) -> Task:
        """Begins a task; it is drawn when it has run for a moment."""
        task = _Shown(Count(description, total, unit), self)
        with self._lock:
            self.running.append(task)
            if self._timer is None and not self.is_shown:
                # a thread has no context of its own, and a notebook needs that of its cell
                context = contextvars.copy_context()
                self._timer = threading.Timer(SHOW_AFTER_SECONDS, context.run, (self._begin,))
                self._timer.daemon = True
                self._timer.start()
        return task

    def ended(self, task: _Shown) -> None:
        """Takes a task out; a long one leaves a line."""
        with self._lock:
            self.running.remove(task)
            if task.count.seconds >= KEEP_AFTER_SECONDS:
                self.say(task.count.closing())
            if self.running:
                return
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self.is_shown:
                self.is_shown = False
                self.hide()

    def drawn(self) -> list[Count]:
        """The tasks that have run long enough to be seen."""
        return [task.count for task in tuple(self.running) if task.count.seconds >= SHOW_AFTER_SECONDS]

    def say(self, line: str) -> None:
        """Writes a line that stays, not while a thread is just beginning to draw."""
        with self._lock:
            self.write(line)

    def write(self, line: str) -> None:
        """Writes a line above what is drawn."""

    def show(self) -> None:
        """Begins to draw."""

    def hide(self) -> None:
        """Stops drawing, and removes what is drawn."""

    def refresh(self) -> None:
        """Called after every change while the tasks are shown."""

    def _begin(self) -> None:
        with self._lock:
            self._timer = None
            if self.running and not self.is_shown:
                self.is_shown = True
                self.show()


class _Shown(Counted):
    def __init__(self, count: Count, display: _Delayed) -> None:
        super().__init__(count)
        self._display = display

    def changed(self) -> None:
        if self._display.is_shown:
            self._display.refresh()

    def stop(self) -> None:
        self._display.ended(self)


class BarReporter(_Delayed):
    """A bar per task at the foot of the terminal that stderr is, redrawn eight times a second."""

    _live: Live | None = None

    def show(self) -> None:
        """Starts the thread that draws."""
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True, highlight=False)
        # what others write comes above the bars; stdout only where that is the same terminal
        self._live = Live(
            get_renderable=lambda: self._text(console.width, not console.options.ascii_only),
            console=console, transient=True, refresh_per_second=8, redirect_stdout=is_terminal(sys.stdout),
        )  # fmt: skip
        self._live.start(refresh=True)

    def hide(self) -> None:
        """Erases the bars."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def write(self, line: str) -> None:
        """Writes the line above the bars."""
        from rich.console import Console

        console = Console(stderr=True) if self._live is None else self._live.console
        console.print(line, markup=False, highlight=False, style="dim", soft_wrap=True)

    def _text(self, width: int, is_unicode: bool) -> Text:
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis", end="")
        for number, count in enumerate(self.drawn()):
            head, (full, empty), tail = bar_parts(count, width)
            dash = "━" if is_unicode else "="
            text.append("\n" * bool(number) + head + " ")
            text.append(dash * full, "green").append((dash if is_unicode else ".") * empty, "bright_black")
            text.append(tail, "cyan")
        return text


class NotebookReporter(_Delayed):
    """A bar per task in the output of the notebook cell; it goes when the cell has done its work."""

    def __init__(self) -> None:
        super().__init__()
        self._handle: NotebookOutput | None = None
        self._drawn = 0.0

    def show(self) -> None:
        """Adds an output to the cell."""
        from IPython.display import display

        self._handle = display(self._bundle(), raw=True, display_id=True)

    def hide(self) -> None:
        """Empties the output."""
        if self._handle is not None:
            self._handle.update({"text/plain": "", "text/html": ""}, raw=True)
            self._handle = None

    def refresh(self) -> None:
        """Draws it, at most four times a second."""
        now = time.monotonic()
        if self._handle is not None and now - self._drawn >= SECONDS_BETWEEN_CELLS:
            self._drawn = now
            self._handle.update(self._bundle(), raw=True)

    def write(self, line: str) -> None:
        """Writes the line into the output of the cell."""
        from IPython.display import display

        display({"text/plain": line, "text/html": f"<div>{html.escape(line)}</div>"}, raw=True)

    def _bundle(self) -> dict[str, str]:
        counts = self.drawn()
        return {"text/plain": "\n".join(count.line() for count in counts), "text/html": "".join(map(_cell, counts))}


@runtime_checkable
class NotebookOutput(Protocol):
    """What IPython gives to change an output."""

    def update(self, obj: object, *, raw: bool) -> None:
        """Replaces the output."""
        ...


def _cell(count: Count) -> str:
    """A bar as HTML."""
    bar = f'<progress max="{count.total}" value="{count.done}"></progress> ' if count.total else ""
    text = ", ".join(filter(None, (count.counted(), *count.times(), *count.values())))
    return f"<div>{html.escape(count.description)} {bar}{html.escape(text)}</div>"


def is_terminal(stream: object) -> bool:
    """Whether it is a terminal on which text can be redrawn, whatever the environment says."""
    is_tty = getattr(stream, "isatty", None)
    if is_tty is None or getattr(stream, "closed", False) or os.environ.get("TERM") == "dumb":
        return False
    return bool(is_tty())
