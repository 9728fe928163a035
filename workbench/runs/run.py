"""Run folders: everything that a study was given, did and found; a kill costs at most the step in progress."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import cast

from workbench.core.arguments import checked
from workbench.core.atomic import refuse_address
from workbench.core.display import OneLine
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError, WorkbenchError, did_you_mean
from workbench.core.jsontext import content_of
from workbench.core.locks import lock_folder, lock_moved, remove_dead, unlock_folder
from workbench.core.records import from_jsonable, json_lines, load_json, save_json, sync_folder, write_atomic
from workbench.report.section import MetricRow, Section, flat_metrics, null_if_not_finite
from workbench.runs.content import Environment, Finding, HeadlineRow, Point, Result, StepRecord, headline_rows
from workbench.runs.environment import environment, git_state, read_environment
from workbench.runs.listing import RunInfo, find_run, list_runs
from workbench.runs.settings import Config, arguments_of, settings_of

__all__ = ["SCHEMA", "RunDir", "RunInfo", "find_run", "list_runs"]

SCHEMA = 1
"""Version of result.json and of the step files."""

FEATURE_PAGE = "features.html"
"""Page of a run folder with the cards of its SAE's features, if there is one; its report links to it."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@checked
class RunDir(OneLine):
    """The folder of one run: `runs/<utc time>-<name>-<short id>/`.

    ```
    with RunDir.resume_or_create("shift", config) as run:
        if not run.has("probe"):
            run.save_step("probe", study.section())
        run.finish("SHIFT on biographies")
    ```
    Leaving the block by an error or Ctrl-C writes the report of what is done and keeps the folder for the next start.

    Attributes:
        path: the folder.
        name: what was run.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._made: tuple[Path, ...] = ()  # folders around it that are its own

    def _shown_line(self) -> str:
        return f"{str(self.path)!r}, steps={list(self.steps())}, finished={self.finished}"

    @classmethod
    def create(cls, name: str, config: Config, root: str | os.PathLike[str] = "runs") -> RunDir:
        """A new run folder with its config.json and env.json.

        `config` is a dataclass or a mapping; dataclass fields whose metadata has `config=False` are not recorded.

        Raises:
            InvalidInputError: if the name can't be part of a folder name.
        """
        _check_name("run", name)
        refuse_address(root)
        settings, folder = settings_of(config), Path(root)
        seed = settings.get("seed")
        for left in folder.glob(".*.partial"):  # of processes that were killed here
            remove_dead(left)
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        now = datetime.datetime.now(datetime.UTC)
        # made under another name first: a folder that can be seen is complete
        partial, path = _locked_partial(folder, f"{now:%Y%m%dT%H%M%SZ}-{name}")
        for sub in ("steps", "artifacts", "plots"):
            (partial / sub).mkdir()
        save_json(partial / "config.json", settings)
        save_json(
            partial / "env.json",
            {"name": name, "started": now.isoformat(), "arguments": arguments_of(config)}
            | environment(seed if isinstance(seed, int) else None),
        )
        os.replace(partial, path)
        lock_moved(partial, path)
        sync_folder(path.parent)
        run = cls(path, name)
        run._made = tuple(made)
        return run

    @classmethod
    def resume_or_create(
        cls, name: str, config: Config, root: str | os.PathLike[str] = "runs", fresh: bool = False
    ) -> RunDir:
        """The newest unfinished run of this name with an equal configuration, or a new one.

        A run that another live process is working on is left alone. `fresh` always makes a new one.
        """
        _check_name("run", name)
        for path in () if fresh else interrupted_runs(name, config, root):
            if lock_folder(path):
                run = cls(path, name)
                run._mend()
                return run
        return cls.create(name, config, root)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDir:
        """An existing run folder, to be read or rendered again.

        Raises:
            MissingFileError: if the path is no run folder.
        """
        folder = Path(path)
        if not (folder / "env.json").is_file() or not (folder / "config.json").is_file():
            raise MissingFileError(
                f"{folder} is no run folder (no config.json and env.json). `workbench runs` lists those that exist."
            )
        return cls(folder, read_environment(folder).get("name", folder.name))

    @property
    def artifacts(self) -> Path:
        """Folder for tensors and tables."""
        folder = self.path / "artifacts"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def finished(self) -> bool:
        """Whether the run was completed."""
        return (self.path / "DONE").exists()

    @property
    def config(self) -> dict[str, object]:
        """The recorded configuration in JSON types."""
        return load_json(self.path / "config.json", dict)

    @property
    def env(self) -> Environment:
        """The recorded environment."""
        return read_environment(self.path)

    def steps(self) -> tuple[str, ...]:
        """Names of the saved steps, in the order in which they were first saved."""
        files = [file for file in (self.path / "steps").glob("*.json") if not file.name.startswith(".")]
        orders = {file.stem: self._record(file.stem)["order"] for file in files}
        return tuple(sorted(orders, key=lambda name: orders[name]))

    def has(self, step: str) -> bool:
        """Whether the step was saved, by this process or by one before it."""
        return (self.path / "steps" / f"{step}.json").is_file()

    def save_step(self, step: str, section: Section) -> None:
        """Keep the result of a step; from here on a kill does not lose it. Saving again replaces it."""
        _check_name("step", step)
        done = self.steps()
        order = self._record(step)["order"] if step in done else len(done)
        record = {"schema": SCHEMA, "name": step, "order": order, "saved": _now(), "section": section}
        save_json(self._step_file(step), record)

    def load_step(self, step: str) -> Section:
        """The saved result of a step.

        Raises:
            MissingFileError: if there is none.
        """
        if not self.has(step):
            raise MissingFileError(f"{self.path} has no step {step!r}. {did_you_mean(step, self.steps())}")
        return from_jsonable(Section, self._record(step)["section"])

    def metrics(self, name: str, value: int | float, step: int) -> None:
        """Append one point of a curve to metrics.jsonl; null if not finite."""
        row = json.dumps({"name": name, "step": step, "value": null_if_not_finite(value), "time": _now()})
        with open(self.path / "metrics.jsonl", "ab", buffering=0) as file:
            file.write(row.encode() + b"\n")

    def read_metrics(self) -> list[Point]:
        """All points; of points written twice (a step done again after a kill) the last, in order of writing."""
        file = self.path / "metrics.jsonl"
        rows: dict[tuple[str, int], Point] = {}
        with content_of(file):
            for row in json_lines(file, only_whole=True) if file.exists() else ():
                rows[row["name"], row["step"]] = cast("Point", row)
        return list(rows.values())

    def note_model(self, model: object) -> None:
        """Record a model's name, fingerprint, dtype, device and revision in env.json."""
        noted = {key: getattr(model, key, None) for key in ("name", "fingerprint", "revision", "dtype", "device")}
        known = {key: str(value) for key, value in noted.items() if value is not None}
        env = self.env
        env["models"] = [other for other in env.get("models", []) if other != known] + [known]
        # torch was imported to make the model, so its thread count is known from here on
        env["threads"] = environment()["threads"]
        save_json(self.path / "env.json", env)

    def finish(self, title: str = "") -> Path:
        """Write result.json, plots, report.html and the W&B mirror, then DONE. Returns the path of the report."""
        from workbench.runs.mirror import mirror

        env = self.env
        save_json(self.path / "env.json", env | {"title": title or self.name})
        result = self._write_result()
        (self.path / "mirror.json").unlink(missing_ok=True)
        report = self.write_report()
        outcome = mirror(self.path, self.config, self.read_metrics(), result)
        save_json(self.path / "mirror.json", outcome)
        if outcome["status"] == "failed":
            self.write_report()
        write_atomic(self.path / "DONE", _now() + "\n")
        unlock_folder(self.path)
        return report

    def write_report(self, notice: str = "") -> Path:
        """Render plots/ and report.html from the step files. Returns the path of report.html."""
        from workbench.report.page import Page, page_html
        from workbench.report.plots import drawn_once, standalone_svgs

        sections = {step: self.load_step(step) for step in self.steps()}
        env = self.env
        mirrored = load_json(self.path / "mirror.json", dict) if (self.path / "mirror.json").exists() else {}
        page = Page(
            title=env.get("title") or self.name,
            run=self.path.name,
            started=env.get("started", ""),
            sections=sections,
            config=self.config,
            notice=notice,
            feature_page=FEATURE_PAGE if (self.path / FEATURE_PAGE).is_file() else "",
            environment=env | ({"wandb": mirrored} if mirrored.get("status") == "failed" else {}),
        )
        with drawn_once():
            for step, section in sections.items():
                for name, svg in standalone_svgs(section).items():
                    write_atomic(self.path / "plots" / f"{step}-{name}.svg", svg)
            return write_atomic(self.path / "report.html", page_html(page))

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.finished:
            return
        if isinstance(error, WorkbenchError) and not self._has_results():  # wrong input leaves no folder behind
            shutil.rmtree(self.path, ignore_errors=True)  # while no other process can take it up
            unlock_folder(self.path)
            with contextlib.suppress(OSError):  # unless somebody has put something there
                for folder in self._made:
                    folder.rmdir()
            return
        reason = "the program ended before the run was finished" if kind is None else f"stopped by {kind.__name__}"
        done = ", ".join(self.steps()) or "none"
        try:
            self.write_report(f"Unfinished: {reason}. Finished steps: {done}. The same command continues from here.")
        except (OSError, ValueError, WorkbenchError) as problem:
            if error is None:
                raise
            error.add_note(f"The report of the unfinished run could not be written: {problem}")
        finally:
            unlock_folder(self.path)
        if error is not None and (self.steps() or not isinstance(error, WorkbenchError)):
            error.add_note(f"Kept in {self.path}: steps {done}. The same command continues from there.")

    def _has_results(self) -> bool:
        made = (self.path / sub for sub in ("artifacts", "plots"))
        kept = bool(self.steps()) or (self.path / "metrics.jsonl").is_file()
        return kept or any(file.is_file() for folder in made for file in folder.rglob("*"))

    def _step_file(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"

    def _record(self, step: str) -> StepRecord:
        record = load_json(self._step_file(step), dict)
        if type(record.get("order")) is not int or "section" not in record:
            raise CorruptFileError(
                f"{self._step_file(step)} is not the record of a step (order and section). Delete it, and the same "
                "command does the step again."
            )
        return cast("StepRecord", record)

    def _write_result(self) -> Result:
        env = self.env
        metrics: dict[str, MetricRow] = {}
        findings: list[Finding] = []
        headlines: list[HeadlineRow] = []
        for step in self.steps():
            section = self.load_step(step)
            metrics |= flat_metrics(section.metrics, prefix=f"{step}.")
            headlines += headline_rows(step, section)
            findings += [Finding(step=step, text=text) for text in section.findings]
        result: Result = {
            "schema": SCHEMA,
            "name": self.name,
            "title": env.get("title", self.name),
            "started": env.get("started", ""),
            "finished": _now(),
            "steps": self.steps(),
            "headlines": headlines,
            "findings": findings,
            "metrics": metrics,
        }
        save_json(self.path / "result.json", result)
        return result

    def _mend(self) -> None:
        """Remove what a killed process left half written, and note that the run was resumed."""
        for partial in self.path.rglob(".*.tmp"):
            partial.unlink(missing_ok=True)
        shutil.rmtree(self.path / "wandb", ignore_errors=True)
        curve = self.path / "metrics.jsonl"
        if curve.exists() and not (raw := curve.read_bytes()).endswith(b"\n"):
            with contextlib.suppress(ValueError):
                os.truncate(curve, raw.rfind(b"\n") + 1)
        env = self.env
        again = {"time": _now(), "git": git_state()}
        save_json(self.path / "env.json", env | {"resumed": [*env.get("resumed", []), again]})


def interrupted_runs(name: str, config: Config, root: str | os.PathLike[str] = "runs") -> Iterator[Path]:
    """Folders of the unfinished runs of this name with an equal configuration, newest first."""
    settings = settings_of(config)
    for info in list_runs(root):
        if info.name == name and info.status == "unfinished" and load_json(info.path / "config.json") == settings:
            yield info.path


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} can't name a {what}. Use letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )


def _locked_partial(root: Path, stem: str) -> tuple[Path, Path]:
    """A new hidden folder that this process holds, and the name that it gets when it is complete."""
    while True:
        path = root / f"{stem}-{secrets.token_hex(3)}"
        partial = path.with_name(f".{path.name}.partial")
        partial.mkdir(parents=True)
        if lock_folder(partial):
            return partial, path


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
