"""What every command shares: its common options and how it prints."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

if TYPE_CHECKING:
    from workbench.models.model import Model

_results: ContextVar[TextIO | None] = ContextVar("workbench_results", default=None)


@contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send everything that is written to stdout to stderr, except what `emit` prints: other libraries print too."""
    token = _results.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


@dataclass(frozen=True, kw_only=True)
class BaseCommand:
    """A command that needs no model."""

    takes_addresses: ClassVar[bool] = False
    """Whether `out` may be an address such as s3://bucket/name."""
    writes_a_file: ClassVar[bool] = False
    """Whether `out` is a file; otherwise it is a folder."""

    json: bool = dataclasses.field(default=False, metadata={"config": False})
    """Print one JSON object on stdout and nothing else there, for scripts."""

    def run(self) -> int | None:
        """Do what the command is for; returns the exit code where success is not enough to say."""
        raise NotImplementedError(f"{type(self).__name__} has no run(). Define it.")

    def emit(self, summary: Mapping[str, object], lines: Iterable[object] = (), following: str | None = None) -> None:
        """Print the result: `lines` (text or rich tables) for people, or `summary` as one JSON object with `--json`.

        Args:
            summary: for programs.
            lines: for people.
            following: the command that comes next, ready to be typed.
        """
        if following is not None:
            summary, lines = {**summary, "next": following}, [*lines, f"Next: {following}"]
        stdout = _results.get() or sys.stdout
        if self.json:
            from workbench.core.records import to_jsonable

            stdout.write(json.dumps(to_jsonable(summary), allow_nan=False) + "\n")
            stdout.flush()
            return
        from rich.console import Console as RichConsole

        class Console(RichConsole):
            """Leaves a closed pipe to `main`; rich ends the program with exit code 1."""

            def on_broken_pipe(self) -> None:
                raise

        console = Console(file=stdout, soft_wrap=True)
        for line in lines:
            shown = _harmless(line) if isinstance(line, str) else line
            console.print(shown, markup=False, highlight=False, emoji=False)


@dataclass(frozen=True, kw_only=True)
class LoadsModel(BaseCommand):
    """A command that loads a model."""

    dtype: str = "auto"
    """Data type of the weights: auto, float32, bfloat16 or float16; auto takes the faster one here."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1 or mps; auto takes a GPU if there is one."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same result."""

    def model_name(self) -> str:
        """Of the model, as `load_model` takes it."""
        raise NotImplementedError(f"{type(self).__name__} has no model_name(). Define it.")

    def load(self, *, dtype: str | None = None, check: bool = False) -> Model:
        """The model that was asked for, in the dtype that was asked for unless another is given."""
        from workbench.models.loading import load_model

        return load_model(self.model_name(), dtype=dtype or self.dtype, device=self.device, check=check)


@dataclass(frozen=True, kw_only=True)
class Command(LoadsModel):
    """A command that works with a model."""

    model: str = "embedded"
    """Model: "embedded", a Hugging Face id, a folder or a .gguf file."""

    def model_name(self) -> str:
        """What `--model` says."""
        return self.model


def typed(*words: object) -> str:
    """A command as it is typed.

    >>> typed("generate", "Hello world")
    "workbench generate 'Hello world'"
    """
    return shlex.join(["workbench", *map(str, words)])


def model_words(model: str) -> list[str]:
    """The option that names a model; none for the embedded one, which is the default."""
    return [] if model == "embedded" else ["--model", model]


def read_passages(path: Path | None) -> list[str] | None:
    """The non-empty lines of a text file, one passage each; None for None.

    Raises:
        MissingFileError: if there is no such file.
        DegenerateInputError: if it holds no text.
        CorruptFileError: if it is not UTF-8.
    """
    from workbench.core.errors import DegenerateInputError, MissingFileError
    from workbench.core.records import read_text

    if path is None:
        return None
    if not path.is_file():
        raise MissingFileError(f"There is no text file {path}. Give one with a passage per line.")
    passages = [line for line in read_text(path).splitlines() if line.strip()]
    if not passages:
        raise DegenerateInputError(f"{path} holds no text. Give one passage per line.")
    return passages


def _harmless(line: str) -> str:
    """Escape codes and halves of characters made visible: a token must not drive the terminal or stop the output.

    >>> _harmless("a" + chr(27) + "[2J" + chr(0xdc80))
    'a␛[2J�'
    """
    shown = (chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else char for char in line)
    return "".join("�" if 0xD800 <= ord(char) <= 0xDFFF else char for char in shown).replace("\x7f", "␡")
