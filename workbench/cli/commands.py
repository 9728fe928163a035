"""Which commands exist, found without importing one of them."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.core.errors import UnknownNameError, WorkbenchError, did_you_mean

if TYPE_CHECKING:
    from workbench.cli.base import BaseCommand

GROUP = "workbench.commands"
"""Entry-point group; another distribution may add commands to it."""


class BrokenCommandError(WorkbenchError, ImportError):
    """A command that is registered but can't be imported."""


@dataclass(frozen=True)
class CommandEntry:
    """A registered command.

    Attributes:
        words: what is typed, such as "sae train".
        module: where its class is.
        attribute: name of the class.
    """

    words: str
    module: str
    attribute: str

    def load(self) -> type[BaseCommand]:
        """The command's class.

        Raises:
            BrokenCommandError: if its module or class is missing.
        """
        try:
            return getattr(importlib.import_module(self.module), self.attribute)
        except ModuleNotFoundError as error:
            raise BrokenCommandError(
                f"The command {self.words!r} needs the module {error.name}, which is not installed. "
                "Install the package again with its dependencies: pip install -e ."
            ) from error
        except AttributeError as error:
            if self.attribute not in str(error):
                raise
            raise BrokenCommandError(
                f"The command {self.words!r} is registered as {self.module}:{self.attribute}, which does not exist. "
                "Mend the entry point, or install the package again."
            ) from error

    def summary(self) -> str:
        """First line of the class docstring, read from the source; says so if there is no such class."""
        file = _source(self.module)
        if file is None:
            return "(not installed)"
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == self.attribute:
                text = ast.get_docstring(node) or ""
                return text.split("\n", 1)[0].strip()
        return "(not installed)"


@functools.cache
def commands() -> dict[str, CommandEntry]:
    """All registered commands by their words, in the order of the alphabet."""
    found: dict[str, CommandEntry] = {}
    for name, target in _from_checkout() + _from_metadata():
        module, _, attribute = target.partition(":")
        words = name.replace(".", " ")
        found.setdefault(words, CommandEntry(words, module, attribute))
    return dict(sorted(found.items()))


def find(arguments: list[str]) -> tuple[CommandEntry | None, list[str]]:
    """The command that the arguments begin with, and the arguments that are left.

    None if they stop at a group, such as `sae`.

    Raises:
        UnknownNameError: if there is no such command.
    """
    known = commands()
    words: list[str] = []
    for argument in arguments:
        if argument.startswith("-"):
            break
        words.append(argument)
    for length in range(len(words), 0, -1):
        if (entry := known.get(" ".join(words[:length]))) is not None:
            return entry, arguments[length:]
    if len(words) == 1 and members(words[0]):
        return None, arguments[1:]
    asked = " ".join(words[:2]) if words and members(words[0]) else words[0]
    hint = did_you_mean(asked, members(words[0]) or known)
    raise UnknownNameError(f"There is no command {asked!r}. {hint} See `workbench --help`.")


def members(group: str) -> list[str]:
    """Commands of a group such as "sae"; none if it is not a group."""
    return [words for words in commands() if words.startswith(group + " ")]


def _from_checkout() -> list[tuple[str, str]]:
    """Entry points of the source tree that this file is in: right also before, or without, an installation."""
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        return []
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    ours = project.get("name") == "interp-workbench"
    return list(project.get("entry-points", {}).get(GROUP, {}).items()) if ours else []


def _from_metadata() -> list[tuple[str, str]]:
    return [(point.name, point.value) for point in importlib.metadata.entry_points(group=GROUP)]


def _source(module: str) -> Path | None:
    """Source file of a module; only its top package is looked up, so nothing is imported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    if not rest:
        return Path(spec.origin) if spec.origin else None
    candidates = [
        path
        for root in roots
        for path in (root.joinpath(*rest).with_suffix(".py"), root.joinpath(*rest, "__init__.py"))
    ]
    return next((path for path in candidates if path.is_file()), None)
