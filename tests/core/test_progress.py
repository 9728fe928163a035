from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from workbench.core import counts, progress, reporters
from workbench.core.counts import Count, bar_parts
from workbench.core.progress import Task, hidden, quiet_libraries, say, shown, task, track
from workbench.core.reporters import LineReporter


class Recorder:
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def start(self, description: str, total: int | None, unit: str) -> Task:
        self.said.append(("start", description, total, unit))
        return Recorded(self.said, description)

    def say(self, line: str) -> None:
        self.said.append(("say", line))


class Recorded(Task):
    def __init__(self, said: list[tuple[Any, ...]], description: str) -> None:
        self.said, self.description = said, description

    def advance(self, amount: int = 1) -> None:
        self.said.append(("advance", self.description, amount))

    def stop(self) -> None:
        self.said.append(("stop", self.description))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "_mode", "auto")
    progress._made.cache_clear()
    yield
    progress._made.cache_clear()


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


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (counts, reporters):
        monkeypatch.setattr(module, "time", made)
    return made


def test_a_log_gets_plain_lines(clock: Clock) -> None:
    file = io.StringIO()
    with shown(LineReporter(file)), task(total=400, description="[x] write", unit="tokens") as running:
        say("400 tokens, 1 GB on disk.")
        for loss in (0.5, 0.25, 0.125, 0.0625):
            clock.now += 6.0
            running.note(loss=loss)
            running.advance(100)
    assert file.getvalue().splitlines() == [
        "400 tokens, 1 GB on disk.",
        "[x] write: 200/400 tokens, 16.7 tokens/s, 12 s left, loss 0.250",
        "[x] write: 400/400 tokens, 16.7 tokens/s, 0 s left, loss 0.0625",
        "[x] write: 400 tokens in 24 s, loss 0.0625",
    ]


def test_what_was_done_before_says_nothing_about_the_pace(clock: Clock) -> None:
    file = io.StringIO()
    with shown(LineReporter(file)), task(total=1000, description="train", unit="steps") as running:
        running.skip(900)
        clock.now += 20.0
        running.advance(4)
    assert file.getvalue().splitlines()[0] == "train: 904/1000 steps, 5.0 s per step, 8 min 0 s left"


def test_on_shows_lines_where_nobody_watches_and_off_shows_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def long_work() -> str:
        with task(total=1, description="work", unit="texts") as running:
            clock.now += 60.0
            running.advance()
        return capsys.readouterr().err

    progress.on()
    assert long_work().splitlines() == [
        "work: 1/1 text, 1 min 0 s per text, 0 s left", "work: 1 text in 1 min 0 s",
    ]  # fmt: skip
    with hidden():
        assert long_work() == ""
    progress.off()
    assert long_work() == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(reporters, "SHOW_AFTER_SECONDS", 0.0)
    long_work()
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("description", ["train", "Harvesting resid_post.15", "verify " * 12])
@pytest.mark.parametrize("total", [2_000_000, None])
@pytest.mark.parametrize("numbers", [{}, {"loss": 0.123, "FVU": 0.213}])
def test_a_bar_fits_its_line(
    clock: Clock, width: int, description: str, total: int | None, numbers: dict[str, float]
) -> None:
    clock.now = 200.0
    count = Count(description, total, "tokens", done=840_000, numbers=numbers, started=0.0)
    head, (full, empty), tail = bar_parts(count, width)
    assert len(head) + 1 + full + empty + len(tail) < width
    assert (full + empty >= 10) == (total is not None)
    if total is not None:
        assert full == int(0.42 * (full + empty))
        assert "42%" in tail
        assert " left" in tail
    if width >= 80 and len(description) < 30:
        assert head == description
        assert all(name in tail for name in numbers) or len(description) > 20


DEMO = """
import sys, time, warnings
from workbench.core import counts, progress, reporters
reporters.SHOW_AFTER_SECONDS = 0.02
with progress.task(total=200, description="Training the SAE", unit="tokens") as running:
    progress.say("200 tokens, 3.00 GB on disk, 0.10 GB of memory, about 3 min 20 s at 1,000 tokens/s.")
    running.advance(100)
    running.note(loss=0.123, FVU=0.213)
    time.sleep(0.3)
    print("something else", file=sys.stderr)
    reporters.KEEP_AFTER_SECONDS = 0.1
with progress.task(total=None, description="too short to be seen", unit="rows") as running:
    running.advance(1)
print("the end")
"""


def in_terminal(width: int) -> tuple[list[str], str]:
    """The lines of every picture that a terminal of this width shows, and stdout, which is a file."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    known = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "TERM")}
    environment = known | {"PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm-256color"}
    command = [sys.executable, "-c", DEMO]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                drawn += (part := os.read(ours, 65536))
            except OSError:  # the terminal is closed when the process has ended
                break
            if not part:
                break
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0, drawn.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()], out


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_bar_of_its_width(width: int) -> None:
    lines, out = in_terminal(width)
    assert out == "the end\n"
    bars = [line for line in lines if "━" in line]
    assert bars
    assert all(len(line) < width for line in bars), bars
    assert all(line.count("━") >= 12 for line in bars), "the bar itself is to be seen"
    last = bars[-1]
    assert last.startswith("Training the SAE ━")
    assert "50%, " in last
    assert " left, loss 0.123, FVU 0.213" in last
    assert ("100/200 tokens" in last) == (width == 120)
    others = [line for line in lines if "━" not in line]
    assert len([line for line in others if "3.00 GB on disk" in line]) == 1, "the estimate stands once, above the bar"
    assert "something else" in others
    assert others[-1].startswith("Training the SAE: 100 tokens in 0 s, loss")
    assert not any("too short" in line for line in lines)


class Cell:
    """The output of a notebook cell, as far as IPython fills it."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool = False) -> Any:
        assert raw
        self.outputs.append(data)
        place = len(self.outputs) - 1
        return types.SimpleNamespace(update=lambda data, *, raw: self.outputs.__setitem__(place, data))


def test_a_notebook_gets_a_bar_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, seen = Cell(), []
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=cell.display))  # type: ignore[arg-type]
    monkeypatch.setattr(reporters, "SHOW_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(reporters, "SECONDS_BETWEEN_CELLS", 0.0)
    monkeypatch.setattr(reporters.threading, "Timer", AtOnce)
    with task(total=4, description="<b>train</b>", unit="steps") as running:
        running.note(loss=0.5)
        running.advance(1)
        seen.append(dict(cell.outputs[0]))
        say("a < b")
    (first,) = seen
    assert '<progress max="4" value="1"></progress>' in first["text/html"]
    assert "&lt;b&gt;train" in first["text/html"]
    assert "<b>" not in first["text/html"]
    assert "loss 0.5" in first["text/html"]
    assert first["text/plain"].startswith("<b>train</b>: 1/4 steps")
    assert [output["text/html"] for output in cell.outputs] == ["", "<div>a &lt; b</div>"], (
        "the bar goes, the line stays"
    )


class AtOnce:
    """A timer that does not wait."""

    daemon = True

    def __init__(self, seconds: float, function: Any, args: tuple[Any, ...]) -> None:
        self.start = lambda: function(*args)

    def cancel(self) -> None:
        pass


def test_other_libraries_draw_no_bars_and_draw_them_again_afterwards() -> None:
    def bar_of_a_library() -> str:
        file = io.StringIO()
        list(tqdm(range(3), file=file, mininterval=0, disable=False))  # which libraries say too
        return file.getvalue()

    with quiet_libraries():
        with pytest.raises(ZeroDivisionError), quiet_libraries():
            raise ZeroDivisionError
        assert bar_of_a_library() == ""
    assert "3/3" in bar_of_a_library()
