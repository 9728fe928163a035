"""Harvest: runs the model over a source and writes the activations of the tokens that count to a store."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from workbench.activations.keep import KeepRule
from workbench.activations.sources import PackedRows, Source
from workbench.activations.store import (
    DROP_REASONS,
    MANIFEST,
    ActivationStore,
    Manifest,
    Shard,
    SiteStats,
    file_sha256,
    load_manifest,
    open_store,
)
from workbench.errors import DegenerateInputError, InvalidInputError, MismatchError, ResourceError
from workbench.progress import Task, task
from workbench.records import to_jsonable, write_atomic

BYTES_PER_TOKEN = 14  # token, row and document ids as int32, position as int16


@dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """How a harvest is cut into pieces; the activations don't depend on it beyond bf16 rounding.

    Attributes:
        shard_tokens: tokens per shard, rounded up to whole batches of the source. A killed harvest loses at most one.
        batch_tokens: tokens per forward pass, rounded up to whole rows.
    """

    shard_tokens: int = 16_384
    batch_tokens: int = 2_048

    def __post_init__(self) -> None:
        if self.shard_tokens < 1 or self.batch_tokens < 1:
            raise InvalidInputError(f"HarvestOptions: {self}; both must be at least 1.")


def harvest(
    model: Any, source: Source, sites: Sequence[str], out: str | Path, *, options: HarvestOptions | None = None
) -> ActivationStore:
    """Runs `source` through the model and stores bf16 activations at `sites`, without attention sinks.

    A token is kept if it is not the first of its row, not a special token, and its norm is at most ten times the
    median (of the first forward pass) at every site. Finished shards are kept when a killed harvest is started again,
    and the result is the same to the byte. A finished harvest is opened, not repeated.

    Args:
        model: a `Model`.
        source: `SelfText`, `TextFiles`, `HubDataset` or `TokenRows`.
        sites: where to read.
        out: folder of the store.
        options: sizes of shards and batches.

    Raises:
        UnknownSiteError: for a site that the model does not have.
        MismatchError: if `out` holds another harvest.
        ResourceError: if the disk is too small for it.
        InvalidInputError: if an activation is not finite.
    """
    if isinstance(sites, str) or not sites:
        raise InvalidInputError(f"harvest(sites={sites!r}): give a list of sites, such as ['resid_post.10'].")
    folder, options = Path(out), options or HarvestOptions()
    names = tuple(str(model.resolve(site)) for site in sites)
    plan = _plan(model, source, names, options)
    if (folder / MANIFEST).is_file():
        plan = _resumed(load_manifest(folder), plan, folder)
    if plan.done:
        return open_store(folder)
    _check_disk(plan, source, folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = source.n_rows()
    total = None if rows is None else rows * source.context
    with task(total=total, description=f"Harvesting {', '.join(names)}", unit="tokens") as running:
        manifest = _Harvest(model, source, folder, options, running).run(plan)
    _finish(folder, manifest)
    return open_store(folder)


def _plan(model: Any, source: Source, sites: tuple[str, ...], options: HarvestOptions) -> Manifest:
    rows = -(-options.shard_tokens // source.context)
    shard_rows = -(-rows // source.batch_rows) * source.batch_rows
    return Manifest(
        model_name=model.name,
        model_fingerprint=model.fingerprint,
        source=to_jsonable(source.describe()),
        sites={site: SiteStats(d=model.width(site), max_norm=0.0) for site in sites},
        context=source.context,
        special_ids=tuple(sorted(int(i) for i in model.tokenizer.all_special_ids)),
        shard_rows=shard_rows,
        batch_rows=-(-options.batch_tokens // source.context),
    )


def _resumed(found: Manifest, plan: Manifest, folder: Path) -> Manifest:
    """The manifest on disk, if it belongs to the harvest that is asked for."""
    for name in ("model_fingerprint", "source", "context", "special_ids", "shard_rows", "batch_rows"):
        old, new = getattr(found, name), getattr(plan, name)
        if old != new:
            raise MismatchError(
                f"{folder} holds another harvest: {name} is {old!r}, asked for {new!r}. Use another folder."
            )
    if tuple(found.sites) != tuple(plan.sites):
        raise MismatchError(
            f"{folder} holds the sites {tuple(found.sites)}, asked for {tuple(plan.sites)}. Use another folder."
        )
    for shard in found.shards:
        path = folder / shard.file
        if not path.is_file() or file_sha256(path) != shard.sha256:
            raise MismatchError(f"{path} is missing or damaged. Delete {folder} and harvest again.")
    return found


def _check_disk(plan: Manifest, source: Source, folder: Path) -> None:
    rows = source.n_rows()
    if rows is None:
        return
    width = sum(stats.d for stats in plan.sites.values())
    done = sum(shard.n_rows for shard in plan.shards)
    needed = max(0, rows - done) * plan.context * (2 * width + BYTES_PER_TOKEN)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ResourceError(
            f"Harvesting {rows * plan.context:,} tokens at {len(plan.sites)} sites needs about {needed / 1e9:.1f} "
            f"GB in {folder}; "
            f"{free / 1e9:.1f} GB are free. Use fewer tokens or sites, or another disk."
        )


class _Harvest:
    """One run of a harvest: the model, where it writes, and the rows that wait for their shard to fill."""

    def __init__(self, model: Any, source: Source, folder: Path, options: HarvestOptions, running: Task) -> None:
        self.model, self.source, self.folder, self.running = model, source, folder, running
        self.options = options

    def run(self, manifest: Manifest) -> Manifest:
        done = sum(shard.n_rows for shard in manifest.shards)
        self.running.advance(done * manifest.context)
        for first_row, rows in _shards(self.source.batches(self.model, done), manifest.shard_rows, done):
            if not manifest.shards:
                manifest = self._with_limits(manifest, rows)
            manifest = self._write(manifest, first_row, rows)
        if not manifest.shards:
            raise DegenerateInputError(f"The source gave no rows: {manifest.source}. Give it more text.")
        return manifest

    def _with_limits(self, manifest: Manifest, rows: PackedRows) -> Manifest:
        """The sink limit of each site, from the first forward pass alone, so that it never depends on a resume."""
        ids = rows.ids[: manifest.batch_rows]
        acts = self.model.capture(ids, list(manifest.sites))
        rules = {site: KeepRule.estimate(acts.flat(site).cpu(), ids, manifest.special_ids) for site in manifest.sites}
        sites = {site: replace(stats, max_norm=rules[site].max_norm) for site, stats in manifest.sites.items()}
        return replace(manifest, sites=sites)

    def _write(self, manifest: Manifest, first_row: int, rows: PackedRows) -> Manifest:
        acts, reasons = self._run_model(manifest, rows.ids)
        keep = reasons == 0
        row, position = keep.nonzero(as_tuple=True)
        tensors = {site: x for site, x in acts.items()} | {
            "token": rows.ids[keep].int(),
            "position": position.short(),
            "row": (row + first_row).int(),
            "document": rows.documents[keep].int(),
            "token_rows": rows.ids.int(),
            "document_rows": rows.documents.int(),
        }
        raw = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
        dropped = {DROP_REASONS[i]: int((reasons == i).sum()) for i in range(1, len(DROP_REASONS))}
        file = f"shard-{len(manifest.shards):05d}.safetensors"
        write_atomic(self.folder / file, raw)
        shard = Shard(file, hashlib.sha256(raw).hexdigest(), first_row, len(rows.ids), int(keep.sum()), dropped)
        manifest = replace(manifest, shards=(*manifest.shards, shard))
        manifest.save(self.folder)
        return manifest

    def _run_model(self, manifest: Manifest, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Kept activations per site, and why each token was dropped."""
        kept: dict[str, list[Tensor]] = {site: [] for site in manifest.sites}
        reasons = []
        for part in ids.split(manifest.batch_rows):
            acts = self.model.capture(part, list(manifest.sites))
            on_cpu = {site: acts.flat(site).cpu() for site in manifest.sites}
            reason = torch.zeros_like(part)
            for site, x in on_cpu.items():
                _check_finite(x, site)
                rule = KeepRule(manifest.sites[site].max_norm, manifest.special_ids)
                reason = torch.where(reason == 0, rule.reasons(x, part), reason)
            for site, x in on_cpu.items():
                kept[site].append(x[reason == 0].to(torch.bfloat16))
            reasons.append(reason)
            self.running.advance(part.numel())
        return {site: torch.cat(parts) for site, parts in kept.items()}, torch.cat(reasons)


def _check_finite(x: Tensor, site: str) -> None:
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x).all(dim=-1)).sum()
        raise InvalidInputError(
            f"{int(bad)} tokens have activations at {site} that are not finite. Load the model in float32."
        )


def _shards(batches: Iterator[PackedRows], shard_rows: int, first_row: int) -> Iterator[tuple[int, PackedRows]]:
    """Batches joined to shards of `shard_rows` rows; the last one may be shorter."""
    waiting: list[PackedRows] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(b.ids) for b in waiting) >= shard_rows:
            joined = _join(waiting)
            yield first_row, joined
            first_row += len(joined.ids)
            waiting = []
    if waiting:
        yield first_row, _join(waiting)


def _join(parts: list[PackedRows]) -> PackedRows:
    return PackedRows(torch.cat([p.ids for p in parts]), torch.cat([p.documents for p in parts]))


def _finish(folder: Path, manifest: Manifest) -> None:
    """Adds the totals and norms of the kept tokens, and marks the store as done."""
    store = ActivationStore(folder, manifest)
    sites = {}
    for site, stats in manifest.sites.items():
        norms = torch.cat([block.float().norm(dim=1) for block in store.read(site)]).double()
        if norms.numel() < 2:
            raise DegenerateInputError(f"Only {norms.numel()} tokens of {site} are kept; there is nothing to train on.")
        sites[site] = replace(
            stats, mean_norm=float(norms.mean()), median_norm=float(norms.median()), std_norm=float(norms.std())
        )
    n_tokens = sum(shard.n_rows for shard in manifest.shards) * manifest.context
    kept = sum(shard.kept for shard in manifest.shards)
    dropped = {reason: sum(s.dropped[reason] for s in manifest.shards) for reason in DROP_REASONS[1:]}
    replace(
        manifest, sites=sites, n_tokens=n_tokens, kept=kept, kept_share=kept / n_tokens, dropped=dropped, done=True
    ).save(folder)
