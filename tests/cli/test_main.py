from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from workbench import cli
from workbench.cli import commands as commands_module
from workbench.cli.base import Command, read_passages
from workbench.cli.commands import CommandEntry
from workbench.cli.page import GROUPS, help_page
from workbench.cli.study import Begin, Study
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MissingFileError,
    ShardsFailed,
    UnknownSiteError,
)
from workbench.report.base import Report, Section

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Study something, and say so.

    More about it.
    """

    features: int = 20
    """How many features to ablate at most."""
    what: str = ""
    """What to do."""
    out: Path | None = None
    """Folder for the results."""

    def __post_init__(self) -> None:
        if self.features < 1:
            raise InvalidInputError(f"features={self.features} is too few. Give at least 1.")

    def run(self) -> None:
        """Do it."""
        ERRORS.get(self.what, lambda: None)()
        sys.stdout.write("noise of another library\n")
        self.emit({"features": self.features, "out": self.out}, [f"{self.features} [bold]features[/] :smile: \x1b[2J"])


@dataclass(frozen=True, kw_only=True)
class Interrupted(Study[Report]):
    """Write one step, then wait."""

    run_name = "waiting"

    def measure(self, begin: Begin) -> Report:
        """Do it."""
        begin().save_step("one", Section("One"))
        raise KeyboardInterrupt


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


def _raise(error: BaseException) -> None:
    raise error


def _raise_from(error: BaseException, cause: BaseException) -> None:
    raise error from cause


ERRORS = {
    "site": lambda: _raise(UnknownSiteError("No site 'resid_pst.1'.\nDid you mean resid_post.1?")),
    "file": lambda: Path("/nowhere/at/all").read_text(),
    "folder": lambda: os.listdir(__file__),
    "disk": lambda: _raise(OSError(28, "No space left on device")),
    "memory": lambda: _raise(MemoryError()),
    "torch": lambda: _raise(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")),
    "cpu": lambda: _raise(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")),
    "defect": lambda: _raise(ZeroDivisionError("ours")),
    "shards": lambda: _raise_from(ShardsFailed("2 of 9 shards failed (a: no; b: no)."), InvalidInputError("no")),
    "shard": lambda: _raise_from(ShardsFailed("1 of 9 shards failed (a: ours)."), ZeroDivisionError("ours")),
    "stop": lambda: _raise(KeyboardInterrupt()),
}


@pytest.fixture(autouse=True)
def _commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own = {
        "study": CommandEntry("study", __name__, "Sample"),
        "wait": CommandEntry("wait", __name__, "Interrupted"),
        "sae train": CommandEntry("sae train", __name__, "Sample"),
        "gone": CommandEntry("gone", "experiments.no_such_module", "Gone"),
        "half": CommandEntry("half", __name__, "NoSuchClass"),
    }
    monkeypatch.setattr(commands_module, "commands", lambda: own)
    monkeypatch.setattr("workbench.cli.page.commands", lambda: own)
    monkeypatch.delenv("WORKBENCH_DEBUG", raising=False)
    yield


def _failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("site", "error: No site 'resid_pst.1'. Did you mean resid_post.1?\n"),
        ("file", "error: no such file or folder: /nowhere/at/all. Check the path.\n"),
        ("folder", f"error: Not a directory: {__file__}.\n"),
        ("disk", "error: No space left on device.\n"),
        ("memory", "error: out of memory. Use a smaller model, batch or number of tokens.\n"),
        ("torch", "error: out of memory: CUDA out of memory. Tried to allocate 2 GiB."),
        ("cpu", "error: out of memory: DefaultCPUAllocator"),
        ("shards", "error: 2 of 9 shards failed (a: no; b: no)."),
    ],
)
def test_what_a_user_can_do_wrong_is_one_line(capsys: pytest.CaptureFixture[str], what: str, said: str) -> None:
    assert _failed(capsys, "study", "--what", what).startswith(said)


def test_a_defect_keeps_its_traceback_and_debug_shows_all() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["study", "--what", "defect"])
    with pytest.raises(ShardsFailed):
        cli.main(["study", "--what", "shard"])
    with pytest.raises(UnknownSiteError):
        cli.main(["study", "--what", "site", "--debug"])


def test_debug_can_be_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_DEBUG", "1")
    with pytest.raises(UnknownSiteError):
        cli.main(["study", "--what", "site"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stduy"], "There is no command 'stduy'. Did you mean study?"),
        (["sae", "trian"], "There is no command 'sae trian'. Did you mean sae train?"),
        (["xyzzy"], "Known: study, wait"),
        (["study", "--features", "x"], "invalid literal for int"),
        (["study", "--featurs", "3"], "Unrecognized options: --featurs"),
        (["study", "--features", "0"], "error: features=0 is too few. Give at least 1. See `workbench study --help`."),
        (["--json", "study"], "Options come after it"),
        (["gone"], "needs the module experiments.no_such_module"),
        (["half"], "NoSuchClass, which does not exist"),
        (["sae", "--json"], "is a group of commands"),
    ],
)
def test_wrong_words_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in _failed(capsys, *arguments)


@pytest.mark.parametrize(("encoding", "module"), [("utf-8", "workbench.cli"), ("ascii", "workbench")])
def test_the_line_is_the_same_in_any_terminal(encoding: str, module: str) -> None:
    command = [sys.executable, "-m", module, "runs", "--limit", "x"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=_env() | {"PYTHONIOENCODING": encoding}, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: Error parsing --limit: invalid literal for int() with base 10: 'x'. See `workbench runs --help`.\n"
    )


def test_people_get_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "--features", "3"]) == 0
    assert capsys.readouterr().out == "noise of another library\n3 [bold]features[/] :smile: ␛[2J\n"


def test_scripts_get_one_json_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sae", "train", "--features", "3", "--json", "--out", "a/b"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"features": 3, "out": "a/b"}
    assert captured.out.count("\n") == 1
    assert "noise" in captured.err


def test_help_of_a_command_shows_every_field_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "--help"]) == 0
    shown = " ".join(re.sub("[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    for text in (
        "workbench study",
        "--features INT",
        "How many features to ablate at most.",
        "--model",
        "--seed",
        "--out",
        "--json",
        "Seed of everything random",
    ):
        assert text in shown


def test_interrupting_says_what_was_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["wait", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said.startswith(f"Interrupted. Kept in {tmp_path}")
    assert "steps one. The same command continues from there.\n" in said
    assert cli.main(["study", "--what", "stop"]) == 130
    assert capsys.readouterr().err == "Interrupted. No run folder was open; files already written stay.\n"


def test_where_results_go_is_no_part_of_the_recorded_configuration(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Interrupted(out=tmp_path, json=True).run()
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())
    assert config == {"model": "embedded", "seed": 0, "dtype": "auto", "device": "auto"}


def test_the_page_shows_summaries_and_survives_missing_modules(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    page = capsys.readouterr().out
    assert re.search(r"^  sae train +Study something, and say so\.$", page, flags=re.MULTILINE)
    assert re.search(r"^  gone +\(not installed\)$", page, flags=re.MULTILINE)
    assert re.search(r"^  half +\(not installed\)$", page, flags=re.MULTILINE)
    assert page.index("Sparse autoencoders") < page.index("More:")
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == page
    assert max(map(len, help_page(80).splitlines())) <= 92


def test_a_group_alone_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sae"]) == 0
    assert "  sae train  Study something, and say so." in capsys.readouterr().out


def test_every_registered_command_has_a_place_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    grouped = [words for _, group in GROUPS for words in group]
    assert len(grouped) == len(set(grouped))
    assert set(commands_module.commands()) <= set(grouped)
    assert "runs" in commands_module.commands()


def test_the_page_is_quick_and_imports_nothing_heavy() -> None:
    code = """
import sys
from workbench.cli import main
assert main(["--help"]) == 0
heavy = {"torch", "numpy", "transformers", "tyro", "rich", "experiments.demo"} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=_env(), timeout=60)


def test_ctrl_c_reaches_a_real_process_as_exit_code_130(tmp_path: Path) -> None:
    # as typed in a terminal: the signal comes while the command works
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would start with Ctrl-C ignored
from dataclasses import dataclass
from workbench import cli
from workbench.cli import commands
from workbench.cli.study import Study
from workbench.report.base import Section
@dataclass(frozen=True, kw_only=True)
class Wait(Study):
    run_name = "waiting"
    def measure(self, begin):
        begin().save_step("one", Section("One"))
        sys.stderr.write("ready\\n"); sys.stderr.flush()
        time.sleep(60)
commands.CommandEntry.load = lambda self: Wait
sys.exit(cli.main(["runs", "--out", {str(tmp_path)!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=_env()) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert "Kept in" in process.stderr.read()
        assert process.wait() == 130
    assert next(tmp_path.glob("*/report.html")).exists()


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "utf-8"])
def test_streams_of_any_encoding_take_any_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    assert cli.main(["study", "--features", "7", "--what", ""]) == 0
    sys.stdout.write("日本 …")
    sys.stdout.flush()
    assert (
        raw.getvalue()
        .decode(encoding)
        .endswith(
            "日本 …" if encoding == "utf-8" else ("\\u65e5\\u672c " + ("…" if encoding == "cp1252" else "\\u2026"))
        )
    )


@pytest.mark.parametrize(("columns", "bounded"), [("1", "40"), ("0", "40"), ("1000000000", "500"), ("80", "80")])
def test_terminals_of_any_width_get_a_page(
    columns: str, bounded: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((1, 1)))
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["study", "--help"]) == 0
    assert os.environ["COLUMNS"] == bounded
    assert "--features" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["reader that has gone", "/dev/full", "closed"])
def test_output_that_can_not_be_written_ends_in_no_traceback(target: str) -> None:
    code = "import sys; from workbench import cli; sys.exit(cli.main(['--help']))"
    if target == "closed":
        done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" >&-'], stderr=subprocess.PIPE, env=_env())
    elif target == "/dev/full":
        with open(target, "wb") as full:
            done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=_env())
    else:
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, env=_env())
        os.close(writer)
    full = target == "/dev/full"
    assert (done.returncode, done.stderr) == ((2, b"error: No space left on device.\n") if full else (0, b""))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--what", "caf\udce9"], "Argument 3 ('caf\\udce9') is no text"),
        (["--what", "a\0b"], "is no text"),
        (["--seed", "-1"], "--seed -1: give 0 to"),
        (["--seed", "9" * 400], "--seed a number of about 400 digits"),
        (["--features", str(2**31)], "--features 2147483648"),
        (["--out", "s3://bucket/x"], "is an address"),
        (["--out", __file__ + "/x"], "is a file"),
    ],
)
def test_what_no_option_may_be_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert said in _failed(capsys, "study", *words)


def test_passages_are_the_lines_that_hold_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\ufeffone\r\n\n  \ntwo\n", encoding="utf-8")
    assert read_passages(file) == ["one", "two"] and read_passages(None) is None
    file.write_text("\n ", encoding="utf-8")
    with pytest.raises(DegenerateInputError, match="holds no text"):
        read_passages(file)
    file.write_text("one", encoding="utf-16")
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        read_passages(file)
    with pytest.raises(MissingFileError, match="no text file"):
        read_passages(tmp_path / "none")
