"""Map a job over shards: kept parts come from disk, the others from an engine, all in the order of the shards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from workbench.core.errors import InvalidInputError, ResourceError, ShardsFailed, WorkbenchError
from workbench.core.progress import Task, task
from workbench.engine.job import Job, Receipt, Shard, Work
from workbench.engine.keeper import Keeper

Outcome: TypeAlias = Receipt | Exception

SHARDS = "shards"
"""The unit of a progress bar that counts shards instead of what is in them."""


@runtime_checkable
class Engine(Protocol):
    """Where the shards of a job are worked on."""

    def run(self, job: Job, shards: Sequence[Shard], keep: Keeper) -> Iterator[tuple[Shard, Outcome]]:
        """Each shard with its receipt, or with the error that its work raised, in the order in which they finish.

        A part is in the keeper before its receipt is yielded. What stops the engine itself is raised.
        """
        ...


@dataclass(frozen=True)
class Local:
    """This process, one shard after the other."""

    def run(self, job: Job, shards: Sequence[Shard], keep: Keeper) -> Iterator[tuple[Shard, Outcome]]:
        """Each shard with its receipt or error; the job is opened once, before the first."""
        work = job.open()
        for shard in shards:
            yield shard, _worked(work, shard, keep)


def _worked(work: Work, shard: Shard, keep: Keeper) -> Outcome:
    start = time.perf_counter()
    try:
        made = work(shard)
    except Exception as error:
        # of ours some are OSErrors too, such as a missing file
        from_outside = isinstance(error, MemoryError | OSError) and not isinstance(error, WorkbenchError)
        if from_outside or isinstance(error, ResourceError):
            raise  # the next shard meets the same
        return error
    return keep.put(shard.name, made, seconds=round(time.perf_counter() - start, 3))


def map_shards(
    job: Job, shards: Sequence[Shard], keep: Keeper, *, engine: Engine | None = None, label: str = "",
    unit: str = SHARDS, progress: Task | None = None,
) -> Iterator[Receipt]:  # fmt: skip
    """Receipts of all shards, in the order of `shards`, whatever the order in which an engine finishes them.

    Shards whose parts are kept are not worked on again, and a job of which all are kept is not even opened. Whatever
    ends the loop early, such as Ctrl-C, leaves the finished parts in the keeper.

    Args:
        job: what to do.
        shards: its pieces, each with a name of its own.
        keep: gets the parts, under a key that holds all that they depend on. Results that are put together from several
            parts are read from here in the order of `shards`, so that they have the same bits under any engine.
        engine: where the work is done; by default `Local()`.
        label: of the progress bar.
        unit: what the bar counts: "shards", or what `Made.units` counts.
        progress: a bar of the caller's that is advanced instead.

    Raises:
        ShardsFailed: at the end, if the work on some shards raised, naming each; the others are kept.
        InvalidInputError: for two shards of one name.
    """
    names = [shard.name for shard in shards]
    wanted = set(names)
    if len(wanted) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInputError(f"map_shards: two shards are called {twice!r}. Give each a name of its own.")
    outcomes: dict[str, Outcome] = {name: receipt for name, receipt in keep.done().items() if name in wanted}
    todo = [shard for shard in shards if shard.name not in outcomes]
    total = len(shards) if unit == SHARDS else None
    with contextlib.ExitStack() as bar:
        progress = progress or bar.enter_context(task(total=total, description=label or unit, unit=unit))
        for outcome in outcomes.values():
            progress.skip(_units(outcome, unit))
        finished = (engine or Local()).run(job, todo, keep) if todo else iter(())
        for name in names:
            while name not in outcomes:
                shard, outcome = next(finished)
                outcomes[shard.name] = outcome
                progress.advance(_units(outcome, unit))
            if isinstance(receipt := outcomes[name], Receipt):
                yield receipt
    failed = {name: outcome for name in names if isinstance(outcome := outcomes[name], Exception)}
    if failed:
        defects = [error for error in failed.values() if not isinstance(error, WorkbenchError)]
        raise _failure(failed, len(shards), keep) from (defects or list(failed.values()))[0]


def _units(outcome: Outcome, unit: str) -> int:
    if unit == SHARDS:
        return 1
    return outcome.units if isinstance(outcome, Receipt) else 0


def _failure(failed: Mapping[str, Exception], n: int, keep: Keeper) -> ShardsFailed:
    each = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in failed.items())
    return ShardsFailed(
        f"{len(failed)} of {n} shards failed ({each}). The others are kept in {keep.where}; remove the cause, and the "
        "same call makes the missing ones."
    )
