"""One step of a study as a frozen value: its headline, its blocks, what was found, and the numbers to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict, overload

from workbench.core.display import OneLine
from workbench.core.records import to_jsonable
from workbench.core.stats import Estimate
from workbench.report.blocks import Block, Table, Text
from workbench.report.headline import Headline

Metric = Estimate | float | int | str


@dataclass(frozen=True)
class Section(OneLine):
    """One step of a study: its headline, what to show, what was found in plain words, and the numbers to keep.

    Attributes:
        headline: the result in one sentence; its numbers are those of a table among the blocks.
        findings: plain sentences, negative results included, each with its n and interval.
        metrics: flat; the names are unique within a run together with the step's name.
    """

    title: str
    blocks: tuple[Block, ...] = ()
    findings: tuple[str, ...] = ()
    metrics: dict[str, Metric] = field(default_factory=dict)
    headline: Headline | None = None

    def __post_init__(self) -> None:
        if self.headline is not None:
            tables = [block for block in self.blocks if isinstance(block, Table)]
            self.headline.require_in(tables)

    @property
    def picture(self) -> Block | None:
        """What is shown besides the headline: the first plot, or the first coloured or sampled text."""
        return next((block for block in self.blocks if is_picture(block)), None)


class MetricRow(TypedDict):
    """A metric in JSON types; what does not apply is null."""

    value: int | float | str | None
    low: float | None
    high: float | None
    n: int | None
    unit: str | None
    method: str | None
    level: NotRequired[float]


def flat_metrics(metrics: Mapping[str, Metric], prefix: str = "") -> dict[str, MetricRow]:
    """Metrics as rows of value, low, high, n, unit, method; what does not apply is null.

    >>> flat_metrics({"fvu": 0.25}, prefix="sae.")["sae.fvu"]["value"]
    0.25
    """
    rows: dict[str, MetricRow] = {}
    for name, metric in metrics.items():
        is_estimate = isinstance(metric, Estimate)
        row = MetricRow(
            value=null_if_not_finite(metric.value if is_estimate else metric),
            low=null_if_not_finite(metric.low) if is_estimate else None,
            high=null_if_not_finite(metric.high) if is_estimate else None,
            n=metric.n if is_estimate else None,
            unit=metric.unit if is_estimate else None,
            method=metric.method if is_estimate else None,
        )
        rows[prefix + name] = {**row, "level": metric.level} if is_estimate else row
    return rows


@overload
def null_if_not_finite(value: int | float) -> int | float | None: ...
@overload
def null_if_not_finite(value: int | float | str) -> int | float | str | None: ...
def null_if_not_finite(value: int | float | str) -> int | float | str | None:
    """The number (or text) as JSON has it, which has no infinities and no nan."""
    plain = to_jsonable(value)
    return plain if isinstance(plain, int | float | str) else None


def is_picture(block: Block) -> bool:
    """Whether a block shows a result at a glance: plots, coloured tokens, sampled texts."""
    return block.is_sample if isinstance(block, Table) else not isinstance(block, Text)
