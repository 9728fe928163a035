"""How far a task is, how fast and how long still, in words that fit a line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.core.numbers import Number, counted, number, singular

MIN_BAR, MAX_BAR = 12, 40
"""Width of a bar in characters."""


@dataclass
class Count:
    """How far a task is.

    Attributes:
        description: what is being done.
        total: units in all; None if that is not known.
        unit: name of the units, in the plural; "" where there are none to count.
        done: units so far.
        skipped: those of them that were done before.
        numbers: latest values beside the count.
        started: monotonic time in seconds.
    """

    description: str
    total: int | None
    unit: str
    done: int = 0
    skipped: int = 0
    numbers: dict[str, Number] = field(default_factory=dict)
    started: float = field(default_factory=lambda: time.monotonic())

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units per second, without those that were done before; 0 before the first."""
        seconds = self.seconds
        return (self.done - self.skipped) / seconds if seconds > 0 else 0.0

    def counted(self) -> str:
        """Such as `50/200 tokens`."""
        if not self.unit:
            return ""
        return (
            counted(self.done, self.unit)
            if self.total is None
            else f"{number(self.done)}/{counted(self.total, self.unit)}"
        )

    def times(self) -> list[str]:
        """Pace and time left; the time since the start where one of them is not known."""
        if not self.unit or self.rate <= 0:
            return [clock(self.seconds)]
        left = None if self.total is None else max(0, self.total - self.done) / self.rate
        return [pace(self.rate, self.unit), clock(self.seconds) if left is None else f"{clock(left)} left"]

    def values(self) -> list[str]:
        """Such as `loss 0.21`."""
        return [f"{name} {number(value)}" for name, value in self.numbers.items()]

    def line(self) -> str:
        """All of it, for a log."""
        return f"{self.description}: " + ", ".join(filter(None, (self.counted(), *self.times(), *self.values())))

    def closing(self) -> str:
        """What is left when the task has ended."""
        done = f"{counted(self.done, self.unit)} in " if self.unit else ""
        return ", ".join((f"{self.description}: {done}{clock(self.seconds)}", *self.values()))


def bar_parts(count: Count, width: int) -> tuple[str, tuple[int, int], str]:
    """What stands before a bar, its full and empty characters, and what stands behind it; one line of `width`.

    What does not fit is left out, the least important first: the count, then the pace, then the numbers.

    >>> bar_parts(Count("read", 4, "rows", done=1, started=time.monotonic() - 2), 50)
    ('read', (3, 12), ' 25%, 2.0 s per row, 6 s left')
    """
    room = width - 1  # a full line would make some terminals begin another
    share = None if not count.total else min(1.0, count.done / count.total)
    percent = [] if share is None else [f"{number(100 * share, 0)}%"]
    times, values, done = count.times(), count.values(), list(filter(None, [count.counted()]))
    least, tails = (min(MIN_BAR, width // 4) if share is not None else 0), _tails(percent, times, values, done)
    head = count.description
    tail = next((tail for tail in tails if room - len(head) - 1 - len(tail) >= least), tails[-1])
    head = _shortened(head, max(1, room - least - 1 - len(tail)))
    bar = 0 if share is None else max(0, min(room - len(head) - 1 - len(tail), MAX_BAR))
    full = int(bar * (share or 0.0))
    return head, (full, bar - full), tail if bar else tail.lstrip()


def _tails(percent: list[str], times: list[str], values: list[str], done: list[str]) -> Sequence[str]:
    """What may stand behind a bar, the longest first."""
    shorter = times[-1:]
    choices = (
        [*percent, *done, *times, *values], [*percent, *times, *values], [*percent, *shorter, *values],
        [*percent, *times], [*percent, *shorter],
    )  # fmt: skip
    return [" " + ", ".join(parts) for parts in choices]


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(1, room - 1)] + "…"


def pace(rate: float, unit: str) -> str:
    """How fast; seconds per unit where one takes longer than a second.

    >>> pace(1234.0, "tokens"), pace(2.5, "batches"), pace(0.1, "batches"), pace(0.01, "replies")
    ('1,234 tokens/s', '2.5 batches/s', '10.0 s per batch', '1 min 40 s per reply')
    """
    if rate >= 100:
        return f"{number(rate, 0)} {unit}/s"
    if rate >= 1:
        return f"{number(rate, 1)} {unit}/s"
    seconds = 1 / rate
    return f"{f'{number(seconds, 1)} s' if seconds < 60 else clock(seconds)} per {singular(unit)}"


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
