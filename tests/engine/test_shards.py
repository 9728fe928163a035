from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from workbench.core import progress
from workbench.core.errors import InvalidInputError, MissingFileError, ResourceError, ShardsFailed, UnknownNameError
from workbench.engine.job import Job, Made, Shard, job_from_json, job_to_json, register_job
from workbench.engine.keeper import Keeper
from workbench.engine.shards import Local, Outcome, map_shards


@register_job("test-squares")
@dataclass(frozen=True, kw_only=True)
class Squares:
    power: int = 2
    raises: dict[str, Exception] = field(default_factory=dict, metadata={"config": False}, compare=False)
    calls: list[str] = field(default_factory=list, metadata={"config": False}, compare=False)

    def open(self) -> Callable[[Shard], Made]:
        self.calls.append("open")

        def work(shard: Shard) -> Made:
            self.calls.append(shard.name)
            if shard.name in self.raises:
                raise self.raises[shard.name]
            assert isinstance(shard.spec, int)
            return Made(shard.spec**self.power, units=shard.spec)

        return work


class Backwards:
    """An engine that finishes the last shard first."""

    def run(self, job: Job, shards: Sequence[Shard], keep: Keeper) -> Iterator[tuple[Shard, Outcome]]:
        yield from Local().run(job, shards[::-1], keep)


SHARDS = [Shard(f"n-{i}", i) for i in (3, 1, 2)]


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper.open(tmp_path / "kept", {"power": 2}) as keeper:
        yield keeper


@pytest.mark.parametrize("engine", [None, Local(), Backwards()])
def test_receipts_come_in_the_order_of_the_shards(keep: Keeper, engine: Local | Backwards | None) -> None:
    receipts = list(map_shards(Squares(), SHARDS, keep, engine=engine))
    assert [(r.name, r.value) for r in receipts] == [("n-3", 9), ("n-1", 1), ("n-2", 4)]


def test_only_what_is_not_kept_is_made_and_a_finished_job_is_not_opened(keep: Keeper) -> None:
    keep.put("n-1", Made(1))
    keep.put("of-another-call", Made(5))
    job = Squares()
    assert [r.value for r in map_shards(job, SHARDS, keep)] == [9, 1, 4]
    assert job.calls == ["open", "n-3", "n-2"]
    again = Squares()
    assert [r.value for r in map_shards(again, SHARDS, keep)] == [9, 1, 4] and again.calls == []


@pytest.mark.parametrize("missing", [InvalidInputError("too odd"), MissingFileError("too odd")])
def test_failed_shards_are_named_together_and_the_others_are_kept(keep: Keeper, missing: Exception) -> None:
    errors = {"n-3": missing, "n-2": ZeroDivisionError("by nothing")}
    job = Squares(raises=errors)
    seen = []
    with pytest.raises(ShardsFailed, match=r"2 of 3 shards failed \(n-3: .*too odd; n-2: ZeroDivision") as caught:
        for receipt in map_shards(job, SHARDS, keep):
            seen.append(receipt.name)
    assert caught.value.__cause__ is errors["n-2"], "what may be a defect is the cause"
    assert job.calls == ["open", "n-3", "n-1", "n-2"], "none is tried twice"
    assert seen == ["n-1"] and keep.done().keys() == {"n-1"}


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), ResourceError("the disk is full"), MemoryError(), OSError("no such device")]
)
def test_what_stops_the_work_stops_at_once_and_keeps_what_is_finished(keep: Keeper, stop: BaseException) -> None:
    job = Squares(raises={"n-1": stop})  # type: ignore[dict-item]
    with pytest.raises(type(stop)):
        list(map_shards(job, SHARDS, keep))
    assert job.calls == ["open", "n-3", "n-1"] and keep.done().keys() == {"n-3"}
    again = Squares()
    assert [r.value for r in map_shards(again, SHARDS, keep)] == [9, 1, 4] and again.calls == ["open", "n-1", "n-2"]


@pytest.mark.parametrize(("unit", "total"), [("shards", 3), ("tokens", 6)])
def test_the_bar_counts_kept_parts_too(keep: Keeper, unit: str, total: int) -> None:
    class Counts(progress.Task):
        done = skipped = 0

        def start(self, description: str, total: int | None, unit: str) -> progress.Task:
            assert description == "squares" and total == (3 if unit == "shards" else None)
            return self

        def say(self, line: str) -> None:
            raise AssertionError(line)

        def advance(self, amount: int = 1) -> None:
            self.done += amount

        def skip(self, amount: int) -> None:
            self.done, self.skipped = self.done + amount, self.skipped + amount

    keep.put("n-1", Made(1, units=1))
    counts = Counts()
    with progress.shown(counts):
        list(map_shards(Squares(), SHARDS, keep, label="squares", unit=unit))
    assert (counts.done, counts.skipped) == (total, 1), "what was kept says nothing about the pace"


def test_names_are_given_once(keep: Keeper) -> None:
    with pytest.raises(InvalidInputError, match="'n-3'"):
        next(map_shards(Squares(), [*SHARDS, SHARDS[0]], keep))
    with pytest.raises(InvalidInputError, match="at most 65536"):
        Shard("large", "x" * 65_536)


def test_a_job_travels_as_its_name_and_its_configuration() -> None:
    job = Squares(power=3, calls=["here only"])
    described = job_to_json(job)
    assert described == {"job": "test-squares", "config": {"power": 3}}
    assert job_from_json(described) == job
    with pytest.raises(UnknownNameError, match="Did you mean test-squares"):
        job_from_json({"job": "test-square"})


def test_the_registry_refuses_a_name_twice_and_what_is_no_job() -> None:
    other = dataclasses.make_dataclass("Other", [], frozen=True, namespace={"open": Squares.open})
    with pytest.raises(InvalidInputError, match=r"'test-squares' is already the name of a job: .*Squares"):
        register_job("test-squares")(other)
    with pytest.raises(InvalidInputError, match="frozen dataclass"):
        register_job("test-squares")(type("Squares", (), {"__module__": __name__}))
    assert job_from_json(job_to_json(Squares())) == Squares(), "what was refused has replaced nothing"
    with pytest.raises(InvalidInputError, match="frozen dataclass"):
        register_job("test-nothing")(dict)
    with pytest.raises(UnknownNameError, match="register_job"):
        job_to_json(dataclasses.make_dataclass("Unknown", [], bases=(Squares,), frozen=True, kw_only=True)())
