"""The end of a harvest: totals over all shards, and the shards of several processes joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from workbench.activations.manifest import DROP_REASONS, Manifest, ShardFile, SiteStats, load_manifest
from workbench.activations.store import ActivationStore
from workbench.core.errors import DegenerateInputError, MismatchError, MissingFileError
from workbench.engine.local import Folder


def finish(folder: Folder, manifest: Manifest) -> None:
    """Adds the totals and the norms of the kept tokens, and marks the store as done.

    Raises:
        DegenerateInputError: if fewer than two tokens were kept.
    """
    store, kept = ActivationStore(folder, manifest), sum(shard.kept for shard in manifest.shards)
    if kept < 2:
        raise DegenerateInputError(
            f"Only {kept} tokens of {', '.join(manifest.sites)} are kept; there is nothing to train on. Harvest more, "
            "or longer rows."
        )
    n_tokens = sum(shard.n_rows for shard in manifest.shards) * manifest.context
    replace(
        manifest,
        sites={site: _with_norms(stats, site, store, kept) for site, stats in manifest.sites.items()},
        n_tokens=n_tokens,
        kept=kept,
        kept_share=kept / n_tokens,
        dropped={reason: sum(s.dropped[reason] for s in manifest.shards) for reason in DROP_REASONS[1:]},
        unique_rows=store.unique_rows(),
        done=True,
    ).save(folder)


def _with_norms(stats: SiteStats, site: str, store: ActivationStore, kept: int) -> SiteStats:
    totals, squares = zip(*(shard.norm_sums[site] for shard in store.manifest.shards), strict=True)
    mean, square = sum(totals) / kept, sum(squares) / kept
    index = next(i for i, shard in enumerate(store.manifest.shards) if shard.kept)
    norms = store.aligned_block(index, [site])[site].float().norm(dim=1)
    return replace(
        stats,
        mean_norm=mean,
        median_norm=float(torch.median(norms)),
        std_norm=math.sqrt(max(0.0, square - mean * mean) * kept / (kept - 1)),
        mean_square_norm=square,
    )


def join_parts(folder: Folder, names: Sequence[str]) -> Manifest | None:
    """The manifest of a store that several processes filled; None while one of them has not finished.

    Raises:
        MismatchError: if the processes did not do the same harvest, or a shard is missing.
    """
    if not all(folder.has(name) for name in names):
        return None
    parts = []
    for name in names:
        try:
            parts.append(load_manifest(folder, name))
        except MissingFileError:  # another process has joined them just now
            return None
    if not all(part.done for part in parts):
        return None
    first, *others = (replace(part, shards=()) for part in parts)
    for name, other in zip(names[1:], others, strict=True):
        if other != first:
            raise MismatchError(
                f"{folder.where}: {name} belongs to another harvest than {names[0]}, or was measured on another kind "
                "of machine. Delete it and run its process again."
            )
    shards = sorted((shard for part in parts for shard in part.shards), key=lambda shard: shard.first_row)
    _check_complete(shards, first.shard_rows, folder)
    return replace(first, shards=tuple(shards), done=False)


def _check_complete(shards: Sequence[ShardFile], shard_rows: int, folder: Folder) -> None:
    for index, shard in enumerate(shards):
        last = index == len(shards) - 1
        if shard.first_row != index * shard_rows or (shard.n_rows != shard_rows and not last):
            raise MismatchError(
                f"{folder.where}: shard {index} is missing; the next one is {shard.file}. Run the harvest of its "
                "process again."
            )
