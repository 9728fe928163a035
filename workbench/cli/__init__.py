"""The command `workbench`: finds a command, parses its options, turns errors into one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from workbench.core.errors import ShardsFailed, WorkbenchError

if TYPE_CHECKING:
    from workbench.cli.base import BaseCommand

C = TypeVar("C")

USER_ERROR = 2
"""Exit code for wrong input."""

MIN_COLUMNS, MAX_COLUMNS = 40, 500
"""Width of what is printed; help texts of a few columns are laid out for ever."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class UsageError(WorkbenchError, ValueError):
    """Options that a command does not understand."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Everything that a user can do wrong gives one line on stderr and exit code 2. A traceback means a defect, or that
    `--debug` (or WORKBENCH_DEBUG=1) asked for it.
    """
    return _guarded(_dispatch, arguments)


def main_of(cls: type[BaseCommand], prog: str, arguments: list[str] | None = None) -> int:
    """`python -m` of a command that `workbench` does not list: the same lines, progress and exit codes as of others."""

    def dispatch(words: list[str]) -> int:
        return _run_parsed(parse(cls, words, prog))

    return _guarded(dispatch, arguments)


def _guarded(dispatch: Callable[[list[str]], int], arguments: list[str] | None) -> int:
    prepare_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("WORKBENCH_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        code = dispatch(words)
        sys.stdout.flush()  # what is wrong with the place that it goes to is met here and not at exit
        return code
    except KeyboardInterrupt as error:
        if debug:
            raise
        notes = getattr(error, "__notes__", None) or ["No run folder was open; files already written stay."]
        return _fail("Interrupted. " + " ".join(notes), INTERRUPTED, label="")
    except BrokenPipeError:
        _drop_output()  # the reader (head, less) has gone
        return 0
    except Exception as error:
        message = None if debug else explain(error)
        if message is None:
            raise
        if isinstance(error, OSError):
            _drop_output()
        return _fail(message, USER_ERROR)


def prepare_streams() -> None:
    """Makes both streams take any text and any width: no encoding and no terminal may stop a result."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed (>&-): None
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    columns = shutil.get_terminal_size((100, 24)).columns
    if not MIN_COLUMNS <= columns <= MAX_COLUMNS:
        os.environ["COLUMNS"] = str(min(max(columns, MIN_COLUMNS), MAX_COLUMNS))


def _drop_output() -> None:
    """Sends what is still buffered nowhere, if it can't be written: it would raise again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> str | None:
    """One line for an error that the user can do something about; None for a defect of ours."""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        detail = str(error).split("\n", 1)[0]
        return f"out of memory{': ' + detail if detail else ''}. Use a smaller model, batch or number of tokens."
    if isinstance(error, ShardsFailed) and error.__cause__ is not None and explain(error.__cause__) is None:
        return None
    if isinstance(error, WorkbenchError):
        return " ".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, FileNotFoundError):
        return f"no such file or folder: {error.filename or error}. Check the path."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror or type(error).__name__}: {error.filename}."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror or error}."
    return None


def _dispatch(words: list[str]) -> int:
    from workbench.cli import commands, page
    from workbench.cli.limits import check_text

    check_text(words)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(page.help_page())
        return 0
    if words[0] in ("-V", "--version"):
        sys.stdout.write(f"{_version()}\n")
        return 0
    if words[0].startswith("-"):
        raise UsageError(f"{words[0]!r} stands before the command. Options come after it: workbench COMMAND {words[0]}")
    entry, rest = commands.find(words)
    if entry is None:
        if not set(rest) <= {"-h", "--help"}:
            raise UsageError(f"{words[0]!r} is a group of commands and has no options. See `workbench {words[0]}`.")
        sys.stdout.write(page.group_page(words[0]))
        return 0
    return _run_parsed(parse(entry.load(), rest, f"workbench {entry.words}"))


def _run_parsed(command: BaseCommand | None) -> int:
    """Checks and runs a command; nothing after `--help`."""
    from workbench.cli.limits import check_numbers, check_places

    if command is None:
        return 0
    check_numbers(command)
    check_places(command)
    return run(command)


def parse(cls: type[C], arguments: list[str], prog: str) -> C | None:
    """The command with its options; None after `--help`.

    Raises:
        UsageError: with one line that says what is wrong.
    """
    import tyro

    from workbench.cli.options import STYLE, quiet_defaults

    if {"-h", "--help"} & set(arguments):
        with contextlib.suppress(SystemExit):
            tyro.cli(cls, args=arguments, prog=prog, config=STYLE, registry=quiet_defaults())
        return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=arguments, prog=prog, config=STYLE, registry=quiet_defaults())
    except SystemExit as error:
        if error.code in (0, None):
            return None
        line = _one_line(said.getvalue()).removeprefix(f"Error parsing {cls.__name__}: ")
        raise UsageError(f"{line} See `{prog} --help`.") from None


def run(command: BaseCommand) -> int:
    """Run a parsed command, progress on stderr; with `json` only its result reaches stdout. Returns the exit code."""
    from workbench.cli.base import only_results_on_stdout
    from workbench.core import progress

    with only_results_on_stdout() if command.json else contextlib.nullcontext(), progress.shown():
        return command.run() or 0


def _one_line(box: str) -> str:
    """What tyro says in a box, as a sentence.

    >>> _one_line(chr(10).join(["╭─ Parsing error ─╮", "│ Unrecognized │", "│ options: --x │", "│ ──── │", "│ more │"]))
    'Unrecognized options: --x.'
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts: list[list[str]] = [[]]
    for line in plain.splitlines():
        inner = line.strip().strip("│").strip()
        if line.lstrip().startswith(("╭", "╰")) or not inner:
            continue
        if not inner.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(inner)
    # without UTF-8 the box has no sides, and its title is a part of its own
    said = parts[0] if "╭" in plain or len(parts) == 1 else parts[1]
    text = " ".join(" ".join(said).split()) or "The options are wrong"
    return text if text.endswith((".", "?", "!")) else text + "."


def _is_out_of_memory(error: BaseException) -> bool:
    # torch is not imported for this: an error of its can only come when it is loaded
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"can't allocate memory|not enough memory|out of memory", str(error))
    )


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("interp-workbench")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _fail(message: str, code: int, label: str = "error: ") -> int:
    sys.stderr.write(label + " ".join(message.split()) + "\n")
    return code
