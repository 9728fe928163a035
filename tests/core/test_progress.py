from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from workbench.core import progress
from workbench.core.progress import BarReporter, Task, shown, task, track


class Recorder:
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def start(self, description: str, total: int | None, unit: str) -> Task:
        self.said.append(("start", description, total, unit))
        return Recorded(self.said, description)


class Recorded(Task):
    def __init__(self, said: list[tuple[Any, ...]], description: str) -> None:
        self.said, self.description = said, description

    def advance(self, amount: int = 1) -> None:
        self.said.append(("advance", self.description, amount))

    def stop(self) -> None:
        self.said.append(("stop", self.description))


def test_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(3), description="loop", unit="steps")) == [0, 1, 2]
    with task(total=3, description="loop", unit="steps") as running:
        running.advance(3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_items_are_counted_after_they_are_done() -> None:
    recorder = Recorder()
    with shown(recorder):
        items = track([10, 20], description="loop", unit="rows")
        assert next(items) == 10
        assert recorder.said == [("start", "loop", 2, "rows")]
        assert list(items) == [20]
    assert recorder.said[1:] == [("advance", "loop", 1), ("advance", "loop", 1), ("stop", "loop")]


def test_a_task_ends_when_the_loop_is_left_by_an_error() -> None:
    recorder = Recorder()
    with shown(recorder), pytest.raises(ZeroDivisionError), task(total=None, description="t", unit="tokens") as running:
        running.advance(512)
        raise ZeroDivisionError
    assert recorder.said == [("start", "t", None, "tokens"), ("advance", "t", 512), ("stop", "t")]


def test_outside_shown_it_is_silent_again() -> None:
    recorder = Recorder()
    with shown(recorder):
        pass
    list(track([1], description="loop", unit="steps"))
    assert recorder.said == []


def test_the_outer_reporter_stays_in_charge() -> None:
    recorder = Recorder()
    with shown(recorder):
        with shown():
            list(track([1], description="inner", unit="steps"))
        list(track([1], description="outer", unit="steps"))
    assert [line[1] for line in recorder.said if line[0] == "start"] == ["inner", "outer"]


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with (
        shown(console=Console(file=file, width=40)),
        task(total=400, description="[x] write", unit="tokens") as running,
    ):
        for _ in range(4):
            now[0] += 6.0
            running.advance(100)
    assert file.getvalue().splitlines() == [
        "[x] write: 200/400 tokens, 16.7 tokens/s, 12 s left",
        "[x] write: 400/400 tokens, 16.7 tokens/s, 0 s left",
        "[x] write: 400 tokens in 24 s",
    ]


def test_a_terminal_gets_bars_with_rate_and_time_left() -> None:
    file = io.StringIO()
    bars = BarReporter(Console(file=file, force_terminal=True, width=120, force_interactive=True))
    with shown(bars), task(total=4, description="[x] train", unit="steps") as running:
        running.advance(1)
        bars._progress.refresh()  # otherwise drawn ten times a second
    assert "[x] train" in file.getvalue()
    assert "1/4 steps, " in file.getvalue()
    assert " left" in file.getvalue()
