"""Which runs there are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.errors import CorruptFileError, MissingFileError, did_you_mean
from workbench.records import load_json
from workbench.rundir.lock import locked_elsewhere


@dataclass(frozen=True)
class RunInfo:
    """One run folder, as far as a list shows it.

    Attributes:
        path: the folder.
        name: what was run.
        started: UTC time in ISO form.
        status: "finished", "running" (another process works in it) or "unfinished" (will be continued).
        metrics: the flat metrics of result.json; empty until the run is finished.
    """

    path: Path
    name: str
    started: str
    status: Literal["finished", "running", "unfinished"]
    metrics: dict[str, Any]


def list_runs(root: str | os.PathLike[str] = "runs") -> tuple[RunInfo, ...]:
    """The run folders directly inside `root`, newest first; none if there is no such folder."""
    folder = Path(root)
    paths = [path for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    infos = [info for path in paths if (info := _info(path)) is not None]
    return tuple(sorted(infos, key=lambda info: info.started, reverse=True))


def find_run(asked: str | os.PathLike[str], root: str | os.PathLike[str] = "runs") -> Path:
    """The folder of a run given by path, folder name, unique part of it, or "latest".

    Raises:
        MissingFileError: if none fits, or more than one.
    """
    text = os.fspath(asked)
    if _is_run(Path(text)):
        return Path(text)
    runs = list_runs(root)
    if text == "latest" and runs:
        return runs[0].path
    names = [info.path.name for info in runs]
    fitting = [info.path for info in runs if text and text in info.path.name]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        shown = ", ".join(path.name for path in fitting[:5])
        raise MissingFileError(f"{text!r} fits {len(fitting)} runs in {root}: {shown}. Give more of the name.")
    hint = did_you_mean(text, names) if names else f"There are no runs in {root}."
    raise MissingFileError(f"No run {text!r}. {hint}")


def _is_run(path: Path) -> bool:
    return not path.name.startswith(".") and (path / "config.json").is_file() and (path / "env.json").is_file()


def _info(path: Path) -> RunInfo | None:
    try:
        env = load_json(path / "env.json")
        result = load_json(path / "result.json") if (path / "result.json").is_file() else {}
    except (CorruptFileError, MissingFileError):
        return None
    status = _status(path)
    metrics = result.get("metrics", {}) if status == "finished" else {}
    return RunInfo(path, str(env.get("name", path.name)), str(env.get("started", "")), status, metrics)


def _status(path: Path) -> Literal["finished", "running", "unfinished"]:
    if (path / "DONE").exists():
        return "finished"
    return "running" if locked_elsewhere(path) else "unfinished"
