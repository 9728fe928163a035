"""One worker for one model: runs wait in line, report their progress, and can be stopped between tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from workbench.core.errors import InvalidInputError, WorkbenchError
from workbench.core.progress import hidden
from workbench.serve.playground import Emit, Event, Stopped

_LOG = logging.getLogger(__name__)

LAST = ("done", "stopped", "error")
"""Kinds of event that end a run."""

T = TypeVar("T")
Work = Callable[[Emit, Callable[[], bool]], Mapping[str, object]]


class Desk:
    """Takes runs from any number of pages and does them one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="playground")
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    async def call(self, work: Callable[[], T]) -> T:
        """The result of something short, when its turn comes."""
        return await asyncio.wrap_future(self._worker.submit(work))

    async def events(self, name: str, work: Work) -> AsyncGenerator[Event, None]:
        """Runs something under a name and yields its events, the last one of `LAST`; to stop iterating stops the run.

        Raises:
            InvalidInputError: if there is a run of this name already.
        """
        stop, ahead = self._enter(name)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            # The loop is closed when the server was interrupted twice.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, event)

        try:
            future = self._worker.submit(self._make, name, work, emit, stop.is_set)
            future.add_done_callback(lambda done: self._log_outcome(name, done, emit))
            yield {"kind": "waiting", "ahead": ahead}
            while True:
                event = await queue.get()
                yield event
                if event["kind"] in LAST:
                    break
        finally:
            stop.set()

    def stop(self, name: str) -> bool:
        """Stops a run at its next token; False if there is none of this name."""
        with self._lock:
            stop = self._stops.get(name)
        if stop is not None:
            stop.set()
        return stop is not None

    def stop_all(self) -> None:
        """Stops every run, also those that wait."""
        with self._lock:
            for stop in self._stops.values():
                stop.set()

    def close(self) -> None:
        """Stops every run and ends the worker."""
        self.stop_all()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _enter(self, name: str) -> tuple[threading.Event, int]:
        with self._lock:
            if name in self._stops:
                raise InvalidInputError(f"A run named {name!r} is there already. Stop it, or use another name.")
            stop, ahead = threading.Event(), len(self._stops)
            self._stops[name] = stop
            return stop, ahead

    def _make(self, name: str, work: Work, emit: Emit, stopped: Callable[[], bool]) -> None:
        """Runs the job and sends its last event; an unexpected error is sent and re-raised."""
        try:
            if stopped():
                raise Stopped
            with hidden():  # the page shows how far it is
                last = {"kind": "done", "result": work(emit, stopped)}
        except Stopped:
            last = {"kind": "stopped"}
        except WorkbenchError as error:
            last = {"kind": "error", "message": str(error)}
        except Exception as error:
            what = f"{type(error).__name__}: {error}. This was not expected; the terminal shows where it happened."
            self._leave(name, emit, {"kind": "error", "message": what})
            raise
        self._leave(name, emit, last)

    def _leave(self, name: str, emit: Emit, last: Event) -> None:
        # The name is free before the last event is sent: whoever receives it may use the name again.
        with self._lock:
            del self._stops[name]
        emit(last)

    def _log_outcome(self, name: str, done: Future[None], emit: Emit) -> None:
        if done.cancelled():
            self._leave(name, emit, {"kind": "stopped"})
        elif (error := done.exception()) is not None:
            _LOG.error("a run of the playground failed", exc_info=error)
