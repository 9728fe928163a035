"""Effects of nodes that are made some pairs at a time, so that a stopped run loses one part at most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from circuits.nodes.effects import Aggregation, NodeEffects, SiteEffects
from workbench.core.records import load_json
from workbench.engine.job import Made
from workbench.engine.keeper import KEY_FILE, Keeper

_ARRAYS = ("example", "pos", "feature", "value", "added", "total")


@dataclass(frozen=True, kw_only=True)
class _Site:
    d_sae: int
    n: int
    method: str


@dataclass(frozen=True, kw_only=True)
class _Header:
    sites: dict[str, _Site]
    metric: str
    baseline: str
    aggregation: Aggregation
    n_tokens: int | None
    model_fingerprint: str
    bases: dict[str, str]
    note: str


def keep_effects(keep: Keeper, name: str, effects: NodeEffects) -> None:
    """Keeps effects as a part."""
    header = _Header(
        sites={k: _Site(d_sae=site.d_sae, n=site.n, method=site.method) for k, site in effects.sites.items()},
        metric=effects.metric, baseline=effects.baseline, aggregation=effects.aggregation, n_tokens=effects.n_tokens,
        model_fingerprint=effects.model_fingerprint, bases=dict(effects.bases), note=effects.note,
    )  # fmt: skip
    tensors = {f"{k}/{array}": getattr(site, array) for k, site in effects.sites.items() for array in _ARRAYS}
    keep.put(name, Made(header, tensors))


def kept_effects(keep: Keeper, name: str) -> NodeEffects:
    """The effects that `keep_effects` kept.

    Raises:
        MissingFileError: if there is no such part.
    """
    header, tensors = keep.value(name, _Header), keep.tensors(name)
    sites = {
        k: SiteEffects(
            site=k, d_sae=site.d_sae, n=site.n, method=site.method,
            **{array: tensors[f"{k}/{array}"] for array in _ARRAYS},
        )
        for k, site in header.sites.items()
    }  # fmt: skip
    return NodeEffects(
        sites=sites, metric=header.metric, baseline=header.baseline, aggregation=header.aggregation,
        n_tokens=header.n_tokens, model_fingerprint=header.model_fingerprint, bases=header.bases, note=header.note,
    )  # fmt: skip


def all_effects(keep: Keeper) -> NodeEffects:
    """The effects of all parts together, in the order of their names."""
    return reduce(NodeEffects.merged, (kept_effects(keep, name) for name in keep.done()))


def effects_in(folder: Path) -> NodeEffects:
    """The effects that a finished run keeps in this folder.

    Raises:
        MissingFileError: if there are none.
    """
    key = load_json(folder / KEY_FILE, dict)["key"]
    with Keeper.open(folder, key, alone=False) as keep:
        return all_effects(keep)
