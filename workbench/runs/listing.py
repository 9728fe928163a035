"""Which runs there are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from workbench.core.errors import CorruptFileError, MissingFileError, did_you_mean
from workbench.core.jsontext import Json, content_of
from workbench.core.locks import locked_elsewhere
from workbench.core.records import load_json
from workbench.report.section import MetricRow
from workbench.runs.content import HeadlineRow
from workbench.runs.environment import read_environment

Status = Literal["finished", "running", "unfinished", "unreadable"]


@dataclass(frozen=True)
class RunInfo:
    """One run folder, as far as a list shows it.

    Attributes:
        path: the folder.
        name: what was run.
        started: UTC time in ISO form.
        model: name of the model; "" if none was loaded.
        arguments: configuration, as far as it differs from the defaults.
        headlines: what each step found, in JSON types; empty until the run is finished.
        status: "finished", "running" (another process works in it), "unfinished" (will be continued) or "unreadable".
        metrics: the flat metrics of result.json; empty until the run is finished.
        problem: why an unreadable run can't be read.
    """

    path: Path
    name: str
    started: str
    status: Status
    metrics: dict[str, MetricRow]
    problem: str = ""
    model: str = ""
    arguments: dict[str, Json] = field(default_factory=dict)
    headlines: tuple[HeadlineRow, ...] = ()


def list_runs(root: str | os.PathLike[str] = "runs") -> tuple[RunInfo, ...]:
    """The run folders directly inside `root`, newest first, then the unreadable; none if there is no such folder."""
    folder = Path(root)
    paths = sorted(path for path in folder.iterdir() if _is_run(path)) if folder.is_dir() else []
    return tuple(sorted(map(_info, paths), key=lambda info: info.started, reverse=True))


def find_run(asked: str | os.PathLike[str], root: str | os.PathLike[str] = "runs", made_by: str | None = None) -> Path:
    """The folder of a run given by path, folder name, unique part of it, or "latest".

    Args:
        asked: what was typed.
        root: where to look for a name.
        made_by: only runs of this name, such as "glitch-scan".

    Raises:
        MissingFileError: if none fits, or more than one.
    """
    text = os.fspath(asked)
    if _is_run(Path(text)):
        return Path(text)
    runs = [info for info in list_runs(root) if info.status != "unreadable" and made_by in (None, info.name)]
    if text == "latest" and runs:
        return runs[0].path
    names = [info.path.name for info in runs]
    fitting = [info.path for info in runs if text and text in info.path.name]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        shown = ", ".join(path.name for path in fitting[:5])
        raise MissingFileError(f"{text!r} fits {len(fitting)} runs in {root}: {shown}. Give more of the name.")
    hint = (
        did_you_mean(text, names)
        if names
        else f"There are no runs{'' if made_by is None else ' of ' + made_by} in {root}."
    )
    raise MissingFileError(f"No run {text!r}. {hint}")


def _is_run(path: Path) -> bool:
    return not path.name.startswith(".") and (path / "config.json").is_file() and (path / "env.json").is_file()


def _info(path: Path) -> RunInfo:
    try:
        env = read_environment(path)
        load_json(path / "config.json")
        result = load_json(path / "result.json", dict) if (path / "result.json").is_file() else {}
        with content_of(path / "result.json"):
            headlines = tuple(cast("HeadlineRow", dict(row)) for row in result.get("headlines", ()))
            metrics = {str(name): cast("MetricRow", dict(metric)) for name, metric in result.get("metrics", {}).items()}
    except (CorruptFileError, MissingFileError) as error:
        return RunInfo(path, path.name, "", "unreadable", {}, str(error))
    status = _status(path)
    models, is_done = env.get("models") or [{}], status == "finished"
    return RunInfo(
        path, env.get("name", path.name), env.get("started", ""), status, metrics if is_done else {},
        model=models[0].get("name", ""), arguments=env.get("arguments", {}), headlines=headlines if is_done else (),
    )  # fmt: skip


def _status(path: Path) -> Status:
    if (path / "DONE").exists():
        return "finished"
    return "running" if locked_elsewhere(path) else "unfinished"
