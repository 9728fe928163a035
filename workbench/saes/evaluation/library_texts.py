"""Text that every machine has: the documentation strings of Python's standard library, read from its source files."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workbench.core.errors import CorruptFileError, DegenerateInputError, MissingFileError
from workbench.core.jsontext import parse_json
from workbench.core.records import read_text, write_atomic
from workbench.saes.evaluation.stdlib_sources import library_files, library_root, parsed

WEB = ("http", "urllib", "email", "ftplib", "smtplib", "imaplib", "poplib", "xmlrpc", "socketserver", "ssl", "mailbox")
NUMBERS = (
    "decimal", "_pydecimal", "fractions", "statistics", "random", "datetime", "_pydatetime", "calendar", "numbers",
    "colorsys", "heapq", "bisect", "_pylong",
)  # fmt: skip
TOPICS = {"web and mail": WEB, "numbers and dates": NUMBERS}
MIN_CHARACTERS = 60


@dataclass(frozen=True)
class Labelled:
    """Texts of two classes.

    Attributes:
        texts: one per row.
        labels: 0 or 1 per row.
        names: of the classes.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, str]


def docstrings(file: Path) -> Iterator[str]:
    """The documentation strings of a source file, in order."""
    tree = parsed(file)
    for node in () if tree is None else ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_CHARACTERS:
                yield inspect.cleandoc(text)


@functools.cache
def _library() -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """The documentation strings of each file, about a megabyte in all; parsing them takes seconds."""
    return tuple((file, tuple(docstrings(file))) for file in library_files())


def _topic(file: Path) -> str | None:
    name = file.relative_to(library_root()).parts[0].removesuffix(".py")
    return next((topic for topic, names in TOPICS.items() if name in names), None)


def library_documents(seed: int = 0) -> list[str]:
    """The documentation strings, one document per module in an order of the seed.

    The modules that `library_topics` classifies are left out, so that a probe meets texts that no SAE was trained on.

    Raises:
        DegenerateInputError: if this Python has no source files of its library.
    """
    texts = [text for file, strings in _library() if _topic(file) is None and (text := "\n\n".join(strings))]
    if not texts:
        raise DegenerateInputError(
            "This Python has no source files of its standard library. Give a corpus of your own."
        )
    random.Random(seed).shuffle(texts)
    return texts


def write_corpus(out: Path, seed: int = 0) -> Path:
    """Writes the documents of `library_documents` as JSON lines."""
    write_atomic(out, ("\n".join(json.dumps({"text": text}) for text in library_documents(seed)) + "\n").encode())
    return out


def library_topics(per_class: int = 200, seed: int = 0) -> Labelled:
    """Documentation strings of modules about web and mail (0) and about numbers and dates (1), as many of each."""
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for file, strings in _library():
        if (topic := _topic(file)) is not None:
            found[topic] += strings
    chooser, texts, labels = random.Random(seed), [], []
    n = min(per_class, *(len(set(some)) for some in found.values()))
    if n < 10:
        raise DegenerateInputError(f"The standard library here gives {n} texts of a class. Give labelled texts.")
    for label, some in enumerate(found.values()):
        texts += chooser.sample(sorted(set(some)), n)
        labels += [label] * n
    first, second = TOPICS
    return Labelled(tuple(texts), tuple(labels), (first, second))


def read_labelled(path: Path) -> Labelled:
    """Labelled texts from a file of JSON lines with `text` and `label`, of two labels.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: for a line without text and label, other than two labels, or a file that is not UTF-8.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no file {path}. Give JSON lines with text and label.")
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            row = parse_json(line, where, dict, foreign=True, remedy="Correct the line.")
            if not isinstance(row.get("text"), str) or "label" not in row:
                raise CorruptFileError(f"{where} lacks text and label. Correct the line.")
            rows.append((row["text"], str(row["label"])))
    names = sorted({label for _, label in rows})
    if len(names) != 2:
        raise CorruptFileError(f"{path} holds the labels {names[:5]}; a probe needs two. Correct the file.")
    texts, labels = tuple(text for text, _ in rows), tuple(names.index(label) for _, label in rows)
    return Labelled(texts, labels, (names[0], names[1]))
