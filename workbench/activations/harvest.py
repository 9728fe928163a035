"""Harvest: runs the model over a source and writes the activations of the tokens that count to a store."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.activations.finish import finish, join_parts
from workbench.activations.manifest import DROP_REASONS, MANIFEST, Manifest, ShardFile, load_manifest
from workbench.activations.packing import PackedRows, Source
from workbench.activations.plan import (
    MOST_INT16,
    PART_NAME,
    FirstLook,
    HarvestOptions,
    check_room,
    check_same,
    expected,
    first_look,
    joined,
    make_plan,
    resolved,
)
from workbench.activations.quant import Int8Code
from workbench.activations.shardfile import safetensors_parts
from workbench.activations.sources import SelfText, TokenRows
from workbench.activations.store import SCALE, ActivationStore, first_not_finite, open_store
from workbench.activations.write_behind import write_behind
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError
from workbench.core.locks import in_use
from workbench.core.progress import Task, say, task
from workbench.engine.folder import check_writable, open_folder
from workbench.engine.local import Folder, LocalFolder, Part
from workbench.models.model import Model

STATISTICS_TOKENS = 100_000
"""Kept tokens of the first shard from which the channels are standardised for int8, at most."""


@checked
def harvest(
    model: Model,
    source: Source,
    sites: Sequence[str],
    out: str | Path,
    *,
    options: HarvestOptions | None = None,
    repair: bool = False,
) -> ActivationStore:
    """Runs `source` through the model and stores the activations at `sites`, without attention sinks.

    The store is in the folder `out`, or at an address that fsspec knows, such as s3://bucket/acts. With `repair`
    damaged and missing shards are made again; each is the same to the byte or is refused.

    A token is kept if it is not the first of its row, not a special token, and its norm is at most ten times the
    median (of the first forward pass) at every site. Finished shards are kept when a killed harvest is started again,
    and the result is the same to the byte. A finished harvest is opened, not repeated.

    Returns:
        The store. Where several processes fill it, only the last one to finish gets the whole; the others get what they
        wrote themselves.

    Raises:
        UnknownSiteError: for a site that the model does not have.
        MismatchError: if `out` holds another harvest, or a repaired shard would differ from before.
        CorruptFileError: if a shard is damaged or missing and `repair` is not set.
        ResourceError: if disk or memory are too small for it, or the disk fills up on the way.
        InvalidInputError: if an activation is not finite, or `out` can't be written.
    """
    options, folder = options or HarvestOptions(), open_folder(out)
    plan = make_plan(model, source, resolved(model, sites), options)
    begun = _begun(folder, plan, options)
    if begun.done and folder.has(MANIFEST) and not _damaged(folder, begun, repair):
        return open_store(folder)
    check_writable(folder)
    with _alone(folder, options):
        return _Harvest(model, source, folder, options).completed(plan, repair)


def _begun(folder: Folder, plan: Manifest, options: HarvestOptions) -> Manifest:
    """What this process, or a finished harvest, has left in the folder; else the plan."""
    own = options.manifest_name
    for name in dict.fromkeys((MANIFEST, own)):
        if folder.has(name):
            begun = load_manifest(folder, name)
            check_same(begun, plan, folder)
            if name != own and not begun.done:
                raise MismatchError(
                    f"{folder.where} holds the unfinished harvest of one process. Finish it with world=1, or use "
                    "another folder."
                )
            return begun
    worlds = {int(part[1]) for name in folder.names() if (part := PART_NAME.fullmatch(name))} - {options.place[1]}
    if worlds:
        raise MismatchError(
            f"{folder.where} holds the unfinished harvest of {worlds.pop()} processes. Finish it with as many, or use "
            "another folder."
        )
    return plan


def _damaged(folder: Folder, manifest: Manifest, repair: bool) -> tuple[int, ...]:
    """The shards that are not what was written, which only a repair may make again."""
    damaged = ActivationStore(folder, manifest).damaged()
    if damaged and not repair:
        names = ", ".join(manifest.shards[i].file for i in damaged)
        raise CorruptFileError(
            f"{folder.where}: {names} {'is' if len(damaged) == 1 else 'are'} missing or damaged. Run the same harvest "
            "with repair=True (--repair), which makes only what is damaged again."
        )
    return damaged


def _title(manifest: Manifest) -> str:
    """Of the progress bar."""
    first, *others = manifest.sites
    return f"Harvesting {first}" if not others else f"Harvesting {1 + len(others)} sites"


def _finished(folder: Folder, manifest: Manifest, options: HarvestOptions) -> ActivationStore:
    """The whole store if this process was the last one, else what it wrote."""
    _, world = options.place
    if world > 1:
        replace(manifest, done=True).save(folder, options.manifest_name)
        names = [replace(options, rank=rank, world=world).manifest_name for rank in range(world)]
        whole = join_parts(folder, names)
        if whole is None:
            n_tokens = sum(shard.n_rows for shard in manifest.shards) * manifest.context
            kept = sum(shard.kept for shard in manifest.shards)
            return ActivationStore(folder, replace(manifest, n_tokens=n_tokens, kept=kept, done=False))
        manifest = whole
        finish(folder, manifest)
        for name in names:
            folder.remove(name)
    else:
        finish(folder, manifest)
    return open_store(folder)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What one shard holds: bf16 activations of the kept tokens, and why each token was dropped."""

    acts: dict[str, Tensor]
    reasons: Tensor
    norm_sums: dict[str, tuple[float, float]]


class _Made(NamedTuple):
    """A shard in memory, before it is written; `entry` lacks the checksums."""

    tensors: dict[str, Tensor]
    entry: ShardFile


class _Harvest:
    """One run of a harvest: the model, what it reads and where it writes."""

    def __init__(self, model: Model, source: Source, folder: Folder, options: HarvestOptions) -> None:
        self.model, self.source, self.folder, self.options = model, source, folder, options
        self._running = Task()
        self._buffers: Iterator[dict[str, Tensor]] | None = None
        self._first: _Kept | None = None

    def completed(self, plan: Manifest, repair: bool) -> ActivationStore:
        """The store, after what is missing of it was made; no other process may write to the folder meanwhile."""
        manifest = _begun(self.folder, plan, self.options)
        damaged = _damaged(self.folder, manifest, repair)
        if not manifest.done:
            try:
                return _finished(self.folder, self.go_on(manifest, damaged), self.options)
            except KeyboardInterrupt as error:
                error.add_note(f"Finished shards are kept in {self.folder.where}. The same command goes on from there.")
                raise
        if damaged:
            self.repair(manifest, damaged)
        whole = self.folder.has(MANIFEST)
        return open_store(self.folder) if whole else _finished(self.folder, manifest, self.options)

    def go_on(self, manifest: Manifest, damaged: tuple[int, ...]) -> Manifest:
        """Makes the shards of this process that are missing or damaged."""
        rank, world = self.options.place
        look = None if manifest.shards else first_look(self.model, self.source, manifest)
        estimate = expected(manifest, self.source, self.folder, look.tokens_per_second if look else None)
        check_room(estimate, manifest, self.folder)
        lost = {manifest.shards[i].first_row // manifest.shard_rows for i in damaged}
        whole = {shard.first_row // manifest.shard_rows for shard in manifest.shards} - lost
        todo = (i for i in itertools.count() if i % world == rank and i not in whole)
        total = None if estimate.tokens is None else estimate.tokens // world
        say(f"{estimate}.")
        with task(total=total, description=_title(manifest), unit="tokens") as bar:
            self._running = bar
            if look is not None:
                manifest = self._measured(manifest, look)
            return write_behind(self._all_made(manifest, todo, look), self._write, manifest)

    def repair(self, manifest: Manifest, damaged: tuple[int, ...]) -> None:
        """Makes the damaged shards of a finished store again; the manifest stays as it is."""
        rank, world = self.options.place
        todo = [i for i in damaged if i % world == rank]
        total = sum(manifest.shards[i].n_rows for i in todo) * manifest.context
        with task(total=total, description=f"Making damaged shards again: {len(todo)}", unit="tokens") as bar:
            self._running = bar
            write_behind(self._all_made(manifest, iter(todo)), self._write, manifest)

    def _shards(
        self, shard_rows: int, todo: Iterator[int], look: FirstLook | None = None
    ) -> Iterator[tuple[int, PackedRows]]:
        """The rows of the shards in `todo`, which rises, up to the end of the source."""
        if isinstance(self.source, SelfText | TokenRows):  # any row can be had without those before it
            for index in todo:
                rows = next(joined(self._batches(index * shard_rows, look), shard_rows), None)
                if rows is None:
                    return
                yield index, rows
            return
        wanted = next(todo, None)
        if wanted is None:
            return
        shards = joined(self._batches(wanted * shard_rows, look), shard_rows)
        for index, rows in enumerate(shards, start=wanted):
            if index == wanted:
                yield index, rows
                wanted = next(todo, None)
                if wanted is None:
                    return

    def _batches(self, start_row: int, look: FirstLook | None) -> Iterator[PackedRows]:
        if start_row or look is None:
            return self.source.batches(self.model, start_row)
        # the first batch is already there; writing text of one's own takes long
        return itertools.chain([look.rows], self.source.batches(self.model, len(look.rows.ids)))

    def _measured(self, manifest: Manifest, look: FirstLook) -> Manifest:
        """Sink limits, and for int8 the statistics of channels, from the start of the source alone."""
        sites = {site: replace(stats, max_norm=look.max_norms[site]) for site, stats in manifest.sites.items()}
        manifest = replace(manifest, sites=sites)
        if manifest.dtype != "int8":
            return manifest
        _, rows = next(self._shards(manifest.shard_rows, iter([0]), look))
        kept = self._run_model(manifest, rows.ids, 0)
        for site, x in kept.acts.items():
            sample = x[:STATISTICS_TOKENS]
            code = Int8Code.estimate(sample)
            mean, std = tuple(code.mean.tolist()), tuple(code.std.tolist())
            fvu = code.fvu(sample)
            sites[site] = replace(sites[site], channel_mean=mean, channel_std=std, int8_fvu=fvu)
        self._first = kept if self.options.place[0] == 0 else None
        return replace(manifest, sites=sites)

    def _write(self, manifest: Manifest, made: _Made) -> Manifest:
        """Writes a shard, then the manifest that names it; a shard that is there already must come out the same."""
        tensors, entry = made
        before = next((shard for shard in manifest.shards if shard.first_row == entry.first_row), None)
        if before is not None:
            self._rewrite(before, tensors)
            return manifest
        import xxhash

        quick = xxhash.xxh3_128()

        def hashed(part: Part) -> Part:
            quick.update(part)
            return part

        sha256 = self.folder.write(entry.file, map(hashed, safetensors_parts(tensors)))
        entry = replace(entry, sha256=str(sha256), xxh3=quick.hexdigest())
        manifest = replace(manifest, shards=(*manifest.shards, entry))
        manifest.save(self.folder, self.options.manifest_name)
        return manifest

    def _rewrite(self, shard: ShardFile, tensors: dict[str, Tensor]) -> None:
        if self.folder.write(shard.file, safetensors_parts(tensors), shard.sha256) is None:
            raise MismatchError(
                f"{self.folder.where}/{shard.file} was made again and differs from what the manifest says, as happens "
                "on another machine, number of threads or library version. It was left as it is. Repair it where it "
                "was made, or harvest into another folder."
            )

    def _all_made(self, manifest: Manifest, todo: Iterator[int], look: FirstLook | None = None) -> Iterator[_Made]:
        for index, rows in self._shards(manifest.shard_rows, todo, look):
            yield self._made(manifest, index, rows)

    def _made(self, manifest: Manifest, index: int, rows: PackedRows) -> _Made:
        first_row = index * manifest.shard_rows
        kept, self._first = self._first or self._run_model(manifest, rows.ids, first_row), None
        keep = kept.reasons == 0
        row, position = keep.nonzero(as_tuple=True)
        tensors = {
            "token": rows.ids[keep].int(),
            "position": position.short() if manifest.context <= MOST_INT16 else position.int(),
            "row": (row + first_row).int(),
            "document": rows.documents[keep].int(),
            "token_rows": rows.ids.int(),
            "document_rows": rows.documents.int(),
        }
        for site, x in kept.acts.items():
            if manifest.dtype == "int8":
                tensors[site], tensors[site + SCALE] = manifest.sites[site].code().encode(x)
            else:
                tensors[site] = x
        dropped = {DROP_REASONS[i]: int((kept.reasons == i).sum()) for i in range(1, len(DROP_REASONS))}
        file = f"shard-{index:05d}.safetensors"
        shard = ShardFile(
            file=file, sha256="", first_row=first_row, n_rows=len(rows.ids), kept=int(keep.sum()), dropped=dropped,
            norm_sums=kept.norm_sums,
        )  # fmt: skip
        return _Made(tensors, shard)

    def _run_model(self, manifest: Manifest, ids: Tensor, first_row: int) -> _Kept:
        """Runs a shard through the model; the activations lie in buffers that the next shard but one uses again."""
        buffers = self._next_buffers(manifest)
        sums = dict.fromkeys(manifest.sites, (0.0, 0.0))
        reasons, n = [], 0
        for start in range(0, len(ids), manifest.batch_rows):
            part = ids[start : start + manifest.batch_rows]
            acts = self.model.capture(part, list(manifest.sites), allow_nan=True)  # refused below, with its row
            on_cpu = {site: acts.flat(site).cpu() for site in manifest.sites}
            reason = torch.zeros_like(part)
            for site, x in on_cpu.items():
                norms = x.float().norm(dim=-1)
                _check_finite(x, norms, site, part, first_row + start)
                rule = TokenPolicy(manifest.sites[site].max_norm, manifest.special_ids)
                reason = torch.where(reason == 0, rule.reasons_by_norm(norms, part), reason)
            chosen = (reason == 0).flatten().nonzero().squeeze(1)
            for site, x in on_cpu.items():
                kept = buffers[site][n : n + len(chosen)]
                torch.index_select(x.flatten(0, 1).bfloat16(), 0, chosen, out=kept)
                norms = kept.float().norm(dim=1).double()
                total, square = sums[site]
                sums[site] = (total + float(norms.sum()), square + float(norms.square().sum()))
            n += len(chosen)
            reasons.append(reason)
            self._running.advance(part.numel())
        return _Kept({site: x[:n] for site, x in buffers.items()}, torch.cat(reasons), sums)

    def _next_buffers(self, manifest: Manifest) -> dict[str, Tensor]:
        """Two sets in turn, one being filled while the other is written."""
        if self._buffers is None:
            size = manifest.shard_rows * manifest.context
            widths = {site: stats.d for site, stats in manifest.sites.items()}
            sets = [{s: torch.empty(size, d, dtype=torch.bfloat16) for s, d in widths.items()} for _ in range(2)]
            self._buffers = itertools.cycle(sets)
        return next(self._buffers)


@contextlib.contextmanager
def _alone(folder: Folder, options: HarvestOptions) -> Iterator[None]:
    """Two processes at the same shards would delete each other's half-written files."""
    rank, world = options.place
    with contextlib.ExitStack() as locks:
        if isinstance(folder, LocalFolder):
            locks.enter_context(in_use(folder.path, shared=world > 1))
            if world > 1:
                locks.enter_context(in_use(folder.path / f".rank-{rank}-of-{world}", temporary=True))
        yield


def _check_finite(x: Tensor, norms: Tensor, site: str, ids: Tensor, first_row: int) -> None:
    # a norm is finite only if all values are, save for overflow, which the exact look settles
    bad = None if bool(torch.isfinite(norms).all()) else first_not_finite(x.flatten(0, 1))
    if bad is not None:
        row, position = divmod(bad, ids.shape[1])
        raise InvalidInputError(
            f"The activations at {site} are not finite, first in row {first_row + row} at position {position} (token "
            f"{int(ids[row, position])}). Shards written before are kept. Load the model in float32, or leave this "
            "text out."
        )
