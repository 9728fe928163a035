"""What the JSON files of a run folder hold."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from workbench.core.jsontext import Json
from workbench.report.section import MetricRow, Section, flat_metrics


class Point(TypedDict):
    """A line of metrics.jsonl; the value is null if it was not finite."""

    name: str
    step: int
    value: float | None
    time: str


class StepRecord(TypedDict):
    """A file in steps/: a section of the report, and the place of its step among the others."""

    schema: int
    name: str
    order: int
    saved: str
    section: object


class GitState(TypedDict):
    """Commit of the running code, and whether its files differ from it."""

    commit: str
    dirty: bool


class Resumed(TypedDict):
    """When an interrupted run was continued, and by which code."""

    time: str
    git: GitState | None


class Environment(TypedDict):
    """env.json: what a result depends on besides its configuration."""

    name: NotRequired[str]
    title: NotRequired[str]
    started: NotRequired[str]
    resumed: NotRequired[list[Resumed]]
    models: NotRequired[list[dict[str, str]]]
    arguments: NotRequired[dict[str, Json]]
    git: GitState | None
    command: list[str]
    seed: int | None
    python: str
    packages: dict[str, str | None]
    platform: str
    cpu: str
    cores: int | None
    threads: int | None
    memory_gib: float


class Finding(TypedDict):
    """A sentence, and the step that found it."""

    step: str
    text: str


class HeadlineRow(TypedDict):
    """The headline of a step in JSON types; a number without an interval has null ends."""

    step: str
    verdict: str
    sentence: str
    measure: str
    value: MetricRow | None
    control: MetricRow | None
    control_name: str
    difference: MetricRow | None


def headline_rows(step: str, section: Section) -> list[HeadlineRow]:
    """The headline of a section as a row, or no row."""
    told = section.headline
    if told is None:
        return []
    named = {"value": told.value, "control": told.control, "difference": told.difference}
    rows = flat_metrics({name: number for name, number in named.items() if number is not None})
    row = HeadlineRow(
        step=step, verdict=told.verdict, sentence=told.sentence, measure=told.measure, value=rows.get("value"),
        control=rows.get("control"), control_name=told.control_name, difference=rows.get("difference"),
    )  # fmt: skip
    return [row]


class Result(TypedDict):
    """result.json."""

    schema: int
    name: str
    title: str
    started: str
    finished: str
    steps: tuple[str, ...]
    headlines: list[HeadlineRow]
    findings: list[Finding]
    metrics: dict[str, MetricRow]
