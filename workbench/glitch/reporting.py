"""What reports about tokens are made of: texts of tokens, lists, rates, CSV, and the report itself."""

from __future__ import annotations

import abc
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from workbench.core.stats import Estimate, clopper_pearson
from workbench.report.base import Block, Cell, Metric, Report, Section, Table


class TokenReport(Report):
    """A report whose section is its title, blocks, findings and metrics."""

    _title: ClassVar[str]
    """With names of fields, such as "Census of {self.model}"."""

    @abc.abstractmethod
    def _blocks(self) -> Iterable[Block]: ...

    @abc.abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Flat numbers, and names of what was chosen."""

    def section(self) -> Section:
        """Tables and plots with the findings."""
        title = self._title.format(self=self)
        evidence = self._beside()
        blocks = (*self._blocks(), *(() if evidence is None else (evidence,)))
        return Section(title, blocks, self.findings(), self.metrics(), self.headline())

    def _beside(self) -> Table | None:
        """The table that the headline is read from, if it is in none of the others."""
        return None


def measured(metrics: Mapping[str, Metric | None]) -> dict[str, Metric]:
    """The metrics that have a value."""
    return {name: value for name, value in metrics.items() if value is not None}


def sentences(*said: str) -> tuple[str, ...]:
    """The sentences that are not empty."""
    return tuple(sentence for sentence in said if sentence)


def rate(flags: Iterable[bool], unit: str) -> Estimate | None:
    """Share of true flags with the Clopper-Pearson interval; None without flags.

    >>> str(rate([True, False], "tokens"))
    '0.500 [0.013, 0.987] (n = 2 tokens)'
    """
    counted = [bool(flag) for flag in flags]
    return clopper_pearson(sum(counted), len(counted), unit=unit) if counted else None


def meanings(names: Mapping[str, str]) -> str:
    """Names with what they mean, on one line."""
    return "; ".join(f"{name}: {means}" for name, means in names.items())


def finite(value: float) -> float | None:
    """The value as a cell of a table; None for nan and infinities."""
    return value if math.isfinite(value) else None


def shown(token: str) -> str:
    r"""A token on one line: control characters escaped, spaces kept.

    >>> shown(" a\n")
    ' a\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in token)


def harmless_cell(text: str) -> str:
    """A text on one line that no spreadsheet takes for a formula; `cell_text` gives it back.

    >>> harmless_cell("=1+1"), harmless_cell("a=1"), harmless_cell("'s"), harmless_cell("'=1")
    ("'=1+1", 'a=1', "'s", "''=1")
    """
    text = shown(text)
    return "'" + text if _is_formula(text) else text


def cell_text(cell: str) -> str:
    """The text of a cell that `harmless_cell` wrote.

    >>> [cell_text(harmless_cell(text)) for text in ("=1+1", "a=1", "'s", "'=1", "'+")]
    ['=1+1', 'a=1', "'s", "'=1", "'+"]
    """
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _is_formula(text: str) -> bool:
    return text.lstrip("' ")[:1] in tuple("=+-@") and len(text) > 1


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Path:
    """Writes rows as CSV that a spreadsheet can open, texts by `harmless_cell`, and returns the path."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([harmless_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return Path(path)
