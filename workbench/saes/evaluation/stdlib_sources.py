"""The source files of Python's standard library, which every machine has; they are parsed and never run."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages", "__pycache__")
"""Folders of the library whose texts are tests or tables."""


def library_root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files() -> list[Path]:
    """The source files that are read, by name; none if this Python came without them."""
    root = library_root()
    files = (f for f in root.rglob("*.py") if not set(f.relative_to(root).parts) & set(LEFT_OUT))
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def parsed(file: Path) -> ast.Module | None:
    """The syntax tree of a source file; None if this Python can't parse it."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None
