"""Writes the pages that are made from the code: `errors.md` and `commands.md`. A test checks that they are current."""

from __future__ import annotations

import inspect
from pathlib import Path

from workbench import errors
from workbench.cli.page import help_page

HERE = Path(__file__).parent


def errors_page() -> str:
    """Every error with its meaning and its builtin parent."""
    rows = []
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, errors.WorkbenchError):
            parents = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
            rows.append(f"| `{name}` | {parents} | {(inspect.getdoc(cls) or '').splitlines()[0]} |")
    about = "All errors that are raised on purpose. Each text says what was asked, what exists and what to do."
    return f"# Errors\n\n{about}\n\n" + "| error | also a | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def commands_page() -> str:
    """The page of `workbench --help`."""
    return f"# Commands\n\nWhat `workbench --help` prints.\n\n```\n{help_page(width=100).rstrip()}\n```\n"


PAGES = {"errors.md": errors_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
