"""Reports that are tables: rows for pandas and JSON, a picture for people."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuits.doctor.report import Examinable
from workbench.core.jsontext import Json
from workbench.report.base import Cell, Report

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class TableReport(Report):
    """A report whose content is one tidy table."""

    @abc.abstractmethod
    def frame(self) -> pd.DataFrame:
        """The table."""

    def to_json(self) -> dict[str, Json]:
        """The rows of the table; what is not a number is null."""
        rows = self.frame().to_dict("records")
        return {"rows": [{str(name): _json(value) for name, value in row.items()} for row in rows]}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttributionTable(Examinable, TableReport):
    """A table of attributions, which carries the verdict of the attribution doctor."""

    def to_json(self) -> dict[str, Json]:
        """The rows of the table, and what the doctor found."""
        return {**super().to_json(), "doctor": None if self.doctor is None else self.doctor.to_json()}


def plain(value: object) -> Cell:
    """A cell of a pandas table as a cell of a report."""
    item = getattr(value, "item", None)
    value = value if item is None else item()
    return value if isinstance(value, str | int | float) else None


def _json(value: object) -> Json:
    cell = plain(value)
    return None if cell is None or isinstance(cell, float) and not math.isfinite(cell) else cell  # type: ignore[return-value]
