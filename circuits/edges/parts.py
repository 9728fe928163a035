"""Edges that are made some pairs at a time, so that a stopped run loses one part at most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from circuits.edges.tables import Edges, EdgeTable
from workbench.core.errors import MismatchError
from workbench.core.records import load_json
from workbench.engine.job import Made
from workbench.engine.keeper import KEY_FILE, Keeper

_ARRAYS = ("upstream", "downstream", "effect", "se")


@dataclass(frozen=True, kw_only=True)
class _Header:
    tables: list[tuple[str, str]]
    n: int
    metric: str
    has_positions: bool
    made: str


def keep_edges(keep: Keeper, name: str, edges: Edges) -> None:
    """Keeps edges as a part."""
    header = _Header(
        tables=list(edges.tables), n=edges.n, metric=edges.metric, has_positions=edges.has_positions, made=edges.made
    )
    tensors = {
        f"{i}/{array}": getattr(table, array) for i, table in enumerate(edges.tables.values()) for array in _ARRAYS
    }
    keep.put(name, Made(header, tensors))


def kept_edges(keep: Keeper, name: str) -> Edges:
    """The edges that `keep_edges` kept.

    Raises:
        MissingFileError: if there is no such part.
    """
    header, tensors = keep.value(name, _Header), keep.tensors(name)
    tables = {
        key: EdgeTable(**{array: tensors[f"{i}/{array}"] for array in _ARRAYS}) for i, key in enumerate(header.tables)
    }
    return Edges(tables=tables, n=header.n, metric=header.metric, has_positions=header.has_positions, made=header.made)


def all_edges(keep: Keeper) -> Edges:
    """The edges of all parts together: means over all pairs, and their standard errors."""
    return reduce(merged, (kept_edges(keep, name) for name in keep.done()))


def edges_in(folder: Path) -> Edges:
    """The edges that a finished run keeps in this folder.

    Raises:
        MissingFileError: if there are none.
    """
    with Keeper.open(folder, load_json(folder / KEY_FILE, dict)["key"], alone=False) as keep:
        return all_edges(keep)


def merged(a: Edges, b: Edges) -> Edges:
    """The edges over the pairs of both.

    Raises:
        MismatchError: if they are not between the same nodes.
    """
    if a.tables.keys() != b.tables.keys() or (a.metric, a.has_positions) != (b.metric, b.has_positions):
        raise MismatchError("merged: the edges are of other sites or metrics. Merge edges of one circuit.")
    tables = {key: _merged(table, b.tables[key], a.n, b.n) for key, table in a.tables.items()}
    return dataclasses.replace(a, tables=tables, n=a.n + b.n)


def _merged(a: EdgeTable, b: EdgeTable, n_a: int, n_b: int) -> EdgeTable:
    if not (torch.equal(a.upstream, b.upstream) and torch.equal(a.downstream, b.downstream)):
        raise MismatchError("merged: the edges are between other nodes. Merge edges of one circuit.")
    n = n_a + n_b
    mean = (n_a * a.effect + n_b * b.effect) / n
    squares = _deviations(a, n_a) + _deviations(b, n_b) + n_a * n_b / n * (a.effect - b.effect) ** 2
    return dataclasses.replace(a, effect=mean, se=(squares / (n - 1) / n).sqrt())


def _deviations(table: EdgeTable, n: int) -> Tensor:
    """Sum of squared deviations from the mean; that of one pair is 0."""
    return torch.zeros_like(table.se) if n == 1 else table.se.square() * n * (n - 1)
