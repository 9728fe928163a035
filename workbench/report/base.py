"""`Report`, the base of every study's result, and the blocks that it is shown with."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.core.display import OneLine
from workbench.core.jsontext import Json
from workbench.core.numbers import Number
from workbench.core.records import to_jsonable
from workbench.report.blocks import (
    Bars,
    Block,
    Cell,
    Grid,
    Heat,
    Histogram,
    Lines,
    Scatter,
    Series,
    Table,
    Text,
    Tokens,
)
from workbench.report.headline import Headline, Says, beside
from workbench.report.section import Metric, Section, flat_metrics

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Bars",
    "Block",
    "Cell",
    "Grid",
    "Headline",
    "Heat",
    "Histogram",
    "Lines",
    "Metric",
    "Number",
    "Report",
    "Says",
    "Scatter",
    "Section",
    "Series",
    "Table",
    "Text",
    "Tokens",
    "beside",
    "flat_metrics",
]


@dataclass(frozen=True, eq=False, repr=False)
class Report(OneLine, abc.ABC):
    """Base of every study's frozen result: it shows itself in a notebook, in a run folder and as JSON."""

    @abc.abstractmethod
    def section(self) -> Section:
        """The whole result as a section of a report."""

    @abc.abstractmethod
    def headline(self) -> Headline:
        """The result in one sentence, with a number that stands in a table of the section beside its control."""

    @abc.abstractmethod
    def findings(self) -> tuple[str, ...]:
        """What was found, in plain sentences, negative results included, each with its n and interval."""

    def to_json(self) -> dict[str, Json]:
        """The result in JSON types, ready for `json.dumps`."""
        return to_jsonable(self)

    def frame(self) -> pd.DataFrame:
        """One row per number that is kept: its name, value, interval, n and unit."""
        import pandas as pd

        rows = flat_metrics(self.section().metrics)
        return pd.DataFrame([{"metric": name, **row} for name, row in rows.items()])

    def _shown_line(self) -> str:
        return next(iter(self.findings()), super()._shown_line())

    def _repr_html_(self) -> str:
        from workbench.report.page import section_html

        return section_html(self.section())
