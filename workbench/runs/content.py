"""What the JSON files of a run folder hold."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from workbench.report.blocks import MetricRow


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


class Result(TypedDict):
    """result.json."""

    schema: int
    name: str
    title: str
    started: str
    finished: str
    steps: tuple[str, ...]
    findings: list[Finding]
    metrics: dict[str, MetricRow]
