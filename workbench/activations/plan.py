"""What a harvest will be: its options, the manifest it starts from, and what it will cost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from workbench.activations.manifest import MANIFEST, Dtype, Manifest, SiteStats, load_manifest
from workbench.activations.packing import PackedRows, Source, packing_of
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.counts import pace
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ResourceError, told_apart
from workbench.core.html import Shown
from workbench.core.numbers import byte_size, counted
from workbench.core.progress import clock
from workbench.core.records import to_jsonable
from workbench.core.tokenizer import NoTokenizer, TokenizerLike, special_ids
from workbench.engine.folder import open_folder
from workbench.engine.local import Folder
from workbench.models.model import Model

BYTES_PER_TOKEN = 14
"""Token, row and document ids as int32, position as int16 (int32 in rows of more than `MOST_INT16` tokens)."""
MOST_INT16 = 2**15

PART_NAME = re.compile(r"manifest-\d+-of-(\d+)\.json")
"""Names that `HarvestOptions.manifest_name` gives where several processes fill a store, with their number."""

WORKING_WIDTHS = 64
"""Memory of a forward pass, in fp32 values per token and unit of width, generously."""


@checked
@dataclass(frozen=True, kw_only=True)
class HarvestOptions(OneLine):
    """How a harvest is cut into pieces and stored; the activations don't depend on it beyond rounding.

    Attributes:
        shard_tokens: tokens per shard, rounded up to whole batches of the source. A killed harvest loses at
            most two, the one being made and the one being written.
        batch_tokens: tokens per forward pass, rounded up to whole rows.
        dtype: "bfloat16", or "int8" for half the size: channels standardised, then one scale per token.
        rank: number of this process among those that fill the store together; by default the variable RANK, else 0.
        world: how many processes they are; by default the variable WORLD_SIZE, else 1. Process `rank` makes every
            `world`-th shard, and the last one to finish joins them.
    """

    shard_tokens: int = 16_384
    batch_tokens: int = 2_048
    dtype: str = "bfloat16"
    rank: int | None = None
    world: int | None = None

    def __post_init__(self) -> None:
        if self.shard_tokens < 1 or self.batch_tokens < 1:
            raise InvalidInputError(f"HarvestOptions: {self}; shard_tokens and batch_tokens must be at least 1.")
        if self.dtype not in ("bfloat16", "int8"):
            raise InvalidInputError(f"HarvestOptions(dtype={self.dtype!r}): choose 'bfloat16' or 'int8'.")
        rank, world = self.place
        if not 0 <= rank < world:
            raise InvalidInputError(f"HarvestOptions: rank {rank} of {world} processes; ranks go from 0 to world - 1.")

    @property
    def place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return _from_environment("RANK", 0, self.rank), _from_environment("WORLD_SIZE", 1, self.world)

    @property
    def manifest_name(self) -> str:
        """Where this process notes its shards: a file of its own while there are several."""
        rank, world = self.place
        return MANIFEST if world == 1 else f"manifest-{rank:05d}-of-{world:05d}.json"


def _from_environment(name: str, default: int, given: int | None) -> int:
    value = os.environ.get(name) or str(default)
    if given is None and not value.isdecimal():
        raise InvalidInputError(f"The environment variable {name} is {value!r}; it has to be a whole number.")
    return int(value) if given is None else given


@dataclass(frozen=True)
class HarvestEstimate(Shown):
    """What a harvest will take; sizes as if every token were kept.

    Attributes:
        tokens: to run through the model; None if the source can't say.
        free_disk_bytes: None where it can't be known.
        tokens_per_second: measured on the first batch, making the text included.
    """

    tokens: int | None
    disk_bytes: int | None
    free_disk_bytes: int | None
    memory_bytes: int
    free_memory_bytes: int
    tokens_per_second: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it will take on this machine."""
        if self.tokens is None or self.tokens_per_second is None:
            return None
        return self.tokens / self.tokens_per_second

    def __str__(self) -> str:
        """One line.

        >>> str(HarvestEstimate(2_000_000, 3 * 10**9, None, 10**8, 10**10, 1000.0))
        '2,000,000 tokens, 3.00 GB on disk, 100 MB of memory, about 33 min 20 s at 1,000 tokens/s'
        """
        parts = ["tokens unknown" if self.tokens is None else counted(self.tokens, "tokens")]
        if self.disk_bytes is not None:
            parts.append(f"{byte_size(self.disk_bytes)} on disk")
        parts.append(f"{byte_size(self.memory_bytes)} of memory")
        if self.seconds is not None and self.tokens_per_second is not None:
            parts.append(f"about {clock(self.seconds)} at {pace(self.tokens_per_second, 'tokens')}")
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class FirstLook:
    """The first batch of a source, and what one forward pass over its start says.

    Attributes:
        max_norms: sink limit of each site.
        tokens_per_second: of making the rows and reading the activations together.
    """

    rows: PackedRows
    max_norms: dict[str, float]
    tokens_per_second: float


def resolved(model: Model, sites: Sequence[str]) -> tuple[str, ...]:
    """The sites by their full names.

    Raises:
        UnknownSiteError: for a site that the model does not have.
        InvalidInputError: if there are none, or one is named twice.
    """
    if not sites:
        raise InvalidInputError(f"harvest(sites={sites!r}): give a list of sites, such as ['resid_post.10'].")
    names = tuple(str(model.resolve(site)) for site in sites)
    if len(set(names)) < len(names):
        raise InvalidInputError(f"harvest(sites={list(sites)}): these are {first_few(names)}. Name each site once.")
    return names


def make_plan(model: Model, source: Source, sites: tuple[str, ...], options: HarvestOptions) -> Manifest:
    """The manifest that a harvest starts from.

    Raises:
        InvalidInputError: if the model has too few positions for a row.
    """
    room = getattr(model, "max_tokens", None)
    if room is not None and source.context > room:
        raise InvalidInputError(
            f"Rows of {source.context} tokens (context) don't fit into the {room} positions of {model.name}. "
            "Lower context."
        )
    rows = -(-options.shard_tokens // source.context)
    return Manifest(
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        source=to_jsonable(source.describe()),
        sites={site: SiteStats(d=model.width(site), max_norm=0.0) for site in sites},
        context=source.context,
        special_ids=special_ids(model.tokenizer),
        shard_rows=-(-rows // source.batch_rows) * source.batch_rows,
        batch_rows=-(-options.batch_tokens // source.context),
        dtype=cast(Dtype, options.dtype),
        tokenizer_sha256=_vocabulary_hash(model.tokenizer),
        packing=packing_of(source, model.tokenizer),
        model_dtype=str(model.dtype).removeprefix("torch."),
        model_source=model.source,
    )


def _vocabulary_hash(tokenizer: TokenizerLike) -> str | None:
    if isinstance(tokenizer, NoTokenizer):
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode(errors="backslashreplace")).hexdigest()


def check_same(found: Manifest, plan: Manifest, folder: Folder) -> None:
    """Refuses to go on with another harvest.

    Raises:
        MismatchError: naming what differs.
    """
    if found.model_fingerprint != plan.model_fingerprint:
        theirs, ours = told_apart(*((one.model_name, one.model_fingerprint) for one in (found, plan)))
        raise MismatchError(f"{folder.where} holds a harvest of {theirs}, asked for {ours}. Use another folder.")
    optional = ("tokenizer_sha256", "packing", "model_dtype")  # older stores have none
    needed = ("source", "context", "special_ids", "shard_rows", "batch_rows", "dtype")
    for name in (*optional, *needed):
        old, new = getattr(found, name), getattr(plan, name)
        if old != new and not (old is None and name in optional):
            raise MismatchError(
                f"{folder.where} holds another harvest: {_difference(name, old, new)}. Use another folder."
            )
    if tuple(found.sites) != tuple(plan.sites):
        raise MismatchError(
            f"{folder.where} holds the sites {first_few(found.sites)}, asked for {first_few(plan.sites)}. Use another "
            "folder."
        )
    if found.version != plan.version and not found.done:
        raise MismatchError(
            f"The unfinished harvest in {folder.where} has format version {found.version}; this version writes "
            f"{plan.version}. Use another folder, or delete it."
        )


def harvested_dtype(out: str | Path) -> str:
    """The precision in which to load a model for a harvest into `out`: that of the harvest it holds, else "auto".

    "auto" is decided by a measurement of speed, which another load of the machine may turn the other way.

    Raises:
        CorruptFileError: if the manifest there is not one.
    """
    folder = open_folder(out)
    begun = (name for name in folder.names() if name == MANIFEST or PART_NAME.fullmatch(name))
    return next((load_manifest(folder, name).model_dtype for name in begun), None) or "auto"


def _difference(name: str, old: object, new: object) -> str:
    """What differs; of two descriptions of a source, only the fields that do."""
    if isinstance(old, dict) and isinstance(new, dict):
        differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        old, new = ({key: fields.get(key) for key in differ} for fields in (old, new))
    return f"{name} is {old!r}, asked for {new!r}"


@checked
def estimate_harvest(
    model: Model, source: Source, sites: Sequence[str], out: str | Path = ".", *, options: HarvestOptions | None = None
) -> HarvestEstimate:
    """What a harvest would take in disk, memory and time; its first batch is made and run, and nothing is written.

    Raises:
        UnknownSiteError: for a site that the model does not have.
        DegenerateInputError: if the source gives no rows.
    """
    plan = make_plan(model, source, resolved(model, sites), options or HarvestOptions())
    speed = first_look(model, source, plan).tokens_per_second
    return expected(plan, source, open_folder(out), speed)


def first_look(model: Model, source: Source, plan: Manifest) -> FirstLook:
    """Makes the first batch and runs its start through the model.

    Raises:
        DegenerateInputError: if there is none.
    """
    start = time.perf_counter()
    rows = next(source.batches(model, 0), None)
    if rows is None or not len(rows.ids):
        raise DegenerateInputError(f"The source gave no rows: {plan.source}. Give it more text.")
    made = time.perf_counter()
    # the sink limit must not depend on where a harvest was resumed, so it is that of the first forward pass alone
    ids = rows.ids[: plan.batch_rows]
    acts = model.capture(ids, list(plan.sites))
    on_cpu = {site: acts.flat(site).cpu() for site in plan.sites}
    per_token = (made - start) / rows.ids.numel() + (time.perf_counter() - made) / ids.numel()
    rules = {site: TokenPolicy.estimate(x, ids, plan.special_ids) for site, x in on_cpu.items()}
    return FirstLook(rows, {site: rule.max_norm for site, rule in rules.items()}, 1 / per_token)


def expected(plan: Manifest, source: Source, folder: Folder, speed: float | None = None) -> HarvestEstimate:
    """Disk and memory for what is left of a harvest."""
    import psutil

    rows = source.n_rows()
    left = None if rows is None else max(0, rows - sum(shard.n_rows for shard in plan.shards)) * plan.context
    width = sum(stats.d for stats in plan.sites.values())
    stored = BYTES_PER_TOKEN + (2 * width if plan.dtype == "bfloat16" else width + 2 * len(plan.sites))
    buffered = BYTES_PER_TOKEN + (2 * width if plan.dtype == "bfloat16" else 3 * width)
    widest = max(stats.d for stats in plan.sites.values())
    forward = plan.batch_rows * plan.context * 4 * (width + WORKING_WIDTHS * widest)
    return HarvestEstimate(
        tokens=left,
        disk_bytes=None if left is None else left * stored,
        free_disk_bytes=folder.free_bytes(),
        memory_bytes=2 * plan.shard_rows * plan.context * buffered + forward,  # one made while one is written
        free_memory_bytes=psutil.virtual_memory().available,
        tokens_per_second=speed,
    )


def check_room(estimate: HarvestEstimate, plan: Manifest, folder: Folder) -> None:
    """Refuses a harvest that can't be finished here.

    Raises:
        ResourceError: if disk or memory do not suffice.
    """
    asked = f"Harvesting {estimate} at {counted(len(plan.sites), 'sites')} in {folder.where}"
    need, free = estimate.disk_bytes, estimate.free_disk_bytes
    if need is not None and free is not None and need > free:
        smaller = ", dtype='int8'" if plan.dtype == "bfloat16" else ""
        raise ResourceError(
            f"{asked} needs {byte_size(need)} of disk; {byte_size(free)} are free. Use fewer tokens or "
            f"sites{smaller}, or another disk."
        )
    if estimate.memory_bytes > estimate.free_memory_bytes:
        raise ResourceError(
            f"{asked} needs {byte_size(estimate.memory_bytes)} of memory; "
            f"{byte_size(estimate.free_memory_bytes)} are free. "
            "Lower shard_tokens and batch_tokens, or read fewer sites at once."
        )


def joined(batches: Iterator[PackedRows], shard_rows: int) -> Iterator[PackedRows]:
    """Batches joined to shards of `shard_rows` rows; the last one may be shorter."""
    waiting: list[PackedRows] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(b.ids) for b in waiting) >= shard_rows:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _join(parts: list[PackedRows]) -> PackedRows:
    return PackedRows(torch.cat([p.ids for p in parts]), torch.cat([p.documents for p in parts]))
