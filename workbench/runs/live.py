"""Curves in Weights & Biases while they are made: from a queue, never waited for, never fatal."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from workbench.core.numbers import setting
from workbench.core.records import to_jsonable
from workbench.runs.mirror import PROJECT, Mode, wandb_mode

if TYPE_CHECKING:
    from wandb import Run

SECONDS_TO_FINISH = 30.0
MAX_WAITING = 10_000

Line = tuple[str, Mapping[str, int | float]]


class WandbLog:
    """Sends lines of metrics to W&B, one W&B run per name; offline unless WANDB_MODE says otherwise.

    ```
    with WandbLog("saes", configs) as log:
        train_saes(store, configs, "saes", log=log)
    ```
    Nothing is only in W&B, so a failure of it is kept in `problem` and stops nothing.

    Args:
        folder: where W&B writes its files, in a folder `wandb`; its name is the group of the runs.
        configs: configuration of each run, by name.

    Attributes:
        problem: why nothing, or not all, was sent; None if all is well.
    """

    def __init__(self, folder: str | os.PathLike[str], configs: Mapping[str, object] | None = None) -> None:
        self.folder, self.configs = Path(folder), dict(configs or {})
        self.problem: str | None = None
        self._queue: queue.Queue[Line | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._mode: Mode
        self._mode, notes = wandb_mode()
        self.problem = notes.get("reason")

    def __call__(self, name: str, line: Mapping[str, int | float]) -> None:
        """Takes one line; returns at once."""
        if self._mode == "disabled":
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name="wandb-log", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((name, line))
        except queue.Full:
            self.problem = f"W&B was too slow: lines were left out after {MAX_WAITING} waited."

    def close(self) -> None:
        """Sends what waits and ends the runs, for at most half a minute."""
        if self._thread is None:
            return
        try:
            self._queue.put(None, timeout=SECONDS_TO_FINISH)
        except queue.Full:
            self.problem = f"W&B took nothing for {setting(SECONDS_TO_FINISH)} s; the rest was left out."
            return
        self._thread.join(SECONDS_TO_FINISH)
        if self._thread.is_alive():
            self.problem = f"W&B had not finished after {setting(SECONDS_TO_FINISH)} s."

    def __enter__(self) -> WandbLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self) -> None:
        try:
            import wandb
        except ImportError as error:
            self.problem = f"wandb can't be imported ({error})"
            self._drain()
            return
        runs: dict[str, Run] = {}
        is_open = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while (item := self._queue.get()) is not None:
                name, line = item
                if name not in runs:
                    runs[name] = self._start(name)
                runs[name].log({key: value for key, value in line.items() if key != "step"}, step=int(line["step"]))
            is_open = False
            for run in runs.values():
                run.finish()
        except (wandb.Error, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            self.problem = f"{type(error).__name__}: {error}"
            if is_open:
                self._drain()

    def _drain(self) -> None:
        while self._queue.get() is not None:
            pass

    def _start(self, name: str) -> Run:
        import wandb

        config = to_jsonable(self.configs.get(name, {}))
        assert isinstance(config, dict)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, disable_job_creation=True,
            x_disable_stats=True, x_disable_meta=True, init_timeout=20,
        )  # fmt: skip
        return wandb.init(
            mode=self._mode, dir=str(self.folder), project=os.environ.get("WANDB_PROJECT", PROJECT), name=name,
            group=self.folder.resolve().name, config=config, reinit="create_new",
            settings=settings,
        )  # fmt: skip
