"""What an engine runs: a job, the shards of its work, and what is made of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

from workbench.core.errors import InvalidInputError, UnknownNameError, did_you_mean
from workbench.core.numbers import counted, number
from workbench.core.records import from_jsonable, to_jsonable
from workbench.core.registry import Registry

MAX_SPEC_BYTES = 65_536
"""Of a shard's description: a range, ids or a config, never data."""


@dataclass(frozen=True)
class Shard:
    """A piece of a job's work.

    Attributes:
        name: of its part in the keeper: letters, digits, ".", "_" and "-".
        spec: what the piece is, in JSON types.

    Raises:
        InvalidInputError: if `spec` takes more than 64 KiB.
    """

    name: str
    spec: object = None

    def __post_init__(self) -> None:
        size = len(json.dumps(to_jsonable(self.spec)))
        if size > MAX_SPEC_BYTES:
            raise InvalidInputError(
                f"Shard {self.name!r}: its spec has {counted(size, 'bytes')}; at most {number(MAX_SPEC_BYTES)} "
                "travel to a worker. Put data into a kept part and name that."
            )


@dataclass(frozen=True, eq=False)
class Made:
    """What a worker makes of a shard.

    Attributes:
        value: small results in JSON types; they are kept in the receipt.
        tensors: kept as one safetensors file.
        files: contents by file ending, such as {"parquet": [raw]}.
        units: how much work it was, in the unit of the progress bar.
    """

    value: object = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, Iterable[bytes]] = field(default_factory=dict)
    units: int = 0


@dataclass(frozen=True)
class FileRecord:
    """Checksums and size of a kept file."""

    sha256: str
    xxh3: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Says that a part is finished, and holds or names what it is.

    Attributes:
        name: of the part.
        files: what is kept besides the value, by file ending; tensors are under "safetensors".
        value: of `Made`, in JSON types.
        units: of `Made`.
        seconds: that the worker took; 0 where it was not measured.
        made_by: host, process, threads and versions of the worker.
    """

    name: str
    files: dict[str, FileRecord]
    value: object
    units: int
    seconds: float
    made_by: dict[str, object]

    def same_content(self, other: Receipt) -> bool:
        """Whether both hold the same value and the same bytes, whoever made them."""
        return (to_jsonable(self.value), self.files) == (to_jsonable(other.value), other.files)


Work: TypeAlias = Callable[[Shard], Made]


@runtime_checkable
class Job(Protocol):
    """A frozen dataclass of JSON types that holds all that results depend on; registered under a name.

    A field with `metadata={"config": False}` is no part of it, such as a model that is loaded already. Such a job runs
    in this process only.
    """

    def open(self) -> Work:
        """In the worker, once: loads what shards need. The function that it returns depends on its argument alone."""
        ...


JOBS: Registry[type] = Registry("job")
"""Every job by the name by which it travels to workers."""
_JobClass = TypeVar("_JobClass", bound=type)


def register_job(name: str) -> Callable[[_JobClass], _JobClass]:
    """Makes a dataclass known under a name, by which it travels to workers.

    Raises:
        InvalidInputError: if the name is taken by another class, or the class is no frozen dataclass with `open`.
    """

    def registered(cls: _JobClass) -> _JobClass:
        parameters = getattr(cls, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen or not callable(getattr(cls, "open", None)):
            raise InvalidInputError(
                f"register_job({name!r}): {cls.__qualname__} must be a frozen dataclass with open()."
            )
        JOBS.add(name, cls)
        return cls

    return registered


def job_to_json(job: Job) -> dict[str, object]:
    """The job as registered name and configuration.

    Raises:
        UnknownNameError: if its class is not registered.
    """
    name = next((name for name, cls in JOBS.items() if cls is type(job)), None)
    if name is None:
        raise UnknownNameError(
            f"{type(job).__qualname__} is no registered job. Put @register_job(NAME) on it. "
            f"{did_you_mean(type(job).__qualname__, JOBS)}"
        )
    return {"job": name, "config": {f.name: to_jsonable(getattr(job, f.name)) for f in _config_fields(type(job))}}


def job_from_json(data: Mapping[str, object]) -> Job:
    """The job that `job_to_json` described.

    Raises:
        UnknownNameError: if no job of that name is registered here.
        InvalidInputError: if it has another form.
    """
    return from_jsonable(JOBS[str(data.get("job"))], data.get("config"))


def _config_fields(cls: type) -> list[dataclasses.Field[object]]:
    return [f for f in dataclasses.fields(cls) if f.metadata.get("config", True)]
