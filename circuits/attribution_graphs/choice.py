"""Which features become nodes: those with the most influence, found best first; their rows, kept as they are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution_graphs.coders import Coder
from circuits.attribution_graphs.replacement import Replacement, Targets
from circuits.attribution_graphs.sparse import CAP, MASS, SparseRows, joined
from circuits.graph.influence import Links, influences
from workbench.core import progress
from workbench.engine.job import Made
from workbench.engine.keeper import Keeper

RANKED_AFTER = 4
"""Batches between two rankings."""


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """How rows are made.

    Attributes:
        features: how many features become nodes, at most.
        batch_size: rows that are made together.
        mass: share of a row's absolute sum that its held entries have.
        cap: entries held per row, at most.
    """

    features: int = 1000
    batch_size: int = 64
    mass: float = MASS
    cap: int = CAP


class Choice:
    """Rows of the outputs, then of the features with the most influence on them, batch by batch."""

    def __init__(self, run: Replacement, options: ChoiceOptions, keep: Keeper | None = None) -> None:
        self._run, self._o, self._keep = run, options, keep
        self.parts: list[SparseRows] = []
        self._coder = np.repeat(np.arange(len(run.coders)), [len(coder) for coder in run.coders])
        order = {key: i for i, key in enumerate(sorted({(c.read.order, c.site.order) for c in run.coders}))}
        levels = [order[coder.read.order, coder.site.order] for coder in run.coders]
        self.level = np.array(levels, dtype=np.int64)[self._coder] if levels else np.zeros(0, dtype=np.int64)

    @property
    def n_active(self) -> int:
        """Number of active features."""
        return len(self._coder)

    def made(self, outputs: Targets, weights: Float[Tensor, " outputs"]) -> SparseRows:
        """All rows."""
        n_outputs = len(weights)
        numbers = torch.arange(n_outputs) + self.n_active
        with progress.task(total=self._o.features + n_outputs, description="rows", unit="rows") as task:
            for part in torch.arange(n_outputs).split(self._o.batch_size):
                self._add(numbers[part], functools.partial(outputs.some, part))
                task.advance(len(part))
            left = min(self._o.features, self.n_active)
            while left and len(best := self._best(weights, min(left, RANKED_AFTER * self._o.batch_size))):
                for coder, index in self._batches(best):
                    self._add(index + coder.start, functools.partial(self._run.features, coder, index))
                    task.advance(len(index))
                left -= len(best)
        return joined(self.parts)

    def _add(self, node: Tensor, targets: Callable[[], Targets]) -> None:
        """A part: read if it is kept, otherwise made and kept."""
        name = "rows-" + str(len(self.parts)).zfill(6)
        if self._keep is not None and self._keep.has(name):
            self.parts.append(SparseRows(**self._keep.tensors(name)))
            return
        these = targets()
        rows = SparseRows.of(node, these, self._run.rows(these), self._o.mass, self._o.cap)
        if self._keep is not None:
            self._keep.put(name, Made(None, rows.tensors(), units=len(rows)))
        self.parts.append(rows)

    def _batches(self, best: np.ndarray) -> Iterator[tuple[Coder, Tensor]]:
        """The chosen features coder by coder, by position, so that a batch ends early in the prompt."""
        for number in np.unique(self._coder[best]):
            coder = self._run.coders[number]
            index = torch.from_numpy(np.sort(best[self._coder[best] == number]) - coder.start)
            yield from ((coder, part) for part in index.split(self._o.batch_size))

    def _best(self, weights: Tensor, n: int) -> np.ndarray:
        """The features without a row that have the most influence."""
        found = self.influence(self.parts, weights)[: self.n_active]
        done = torch.cat([part.node for part in self.parts]).numpy()
        found[done[done < self.n_active]] = 0
        best = np.argsort(-found, kind="stable")[:n]
        return best[found[best] > 0]

    def influence(self, parts: Sequence[SparseRows], weights: Tensor) -> np.ndarray:
        """Influence of every source on the outputs, through the rows that there are."""
        rows, n = joined(parts), self._run.columns.n
        shift = n - self.n_active  # outputs stand behind all sources
        node = rows.node.numpy() + np.where(rows.node.numpy() >= self.n_active, shift, 0)
        level = np.full(n + len(weights), -1, dtype=np.int64)
        level[: self.n_active], level[n:] = self.level, len(self._run.coders)
        own, total = np.zeros(len(level)), np.zeros(len(level))
        own[n:] = weights.double().cpu().numpy()
        total[node] = (rows.size + rows.constant.abs()).numpy()
        links = Links(
            source=rows.column.long().numpy(), target=node[rows.row.numpy()],
            size=rows.entry.abs().double().numpy(), level=level,
        )  # fmt: skip
        return influences(links, links.shares(total), own)[:n]
