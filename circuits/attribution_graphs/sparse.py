"""Rows of sources, of which only the largest entries are held; what is dropped is held as sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution_graphs.replacement import Rows, Targets
from workbench.core.display import OneLine

MASS, CAP = 0.999, 4096
"""Share of a row's absolute sum that its held entries have, and how many there are at most."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseRows(OneLine):
    """Rows of some targets.

    Attributes:
        node: number of each target: of a feature its place among all active ones, of an output what follows on them.
        count: entries held of each row.
        column: of each entry, row after row.
        entry: signed.
        total: sum of all entries of each row, dropped ones included.
        size: sum of their absolute values.
        constant: what biases add.
        value: of the target, as its activation gives it; `total + constant` but for rounding.
    """

    node: Int[Tensor, " rows"]
    count: Int[Tensor, " rows"]
    column: Int[Tensor, " entries"]
    entry: Float[Tensor, " entries"]
    total: Float[Tensor, " rows"]
    size: Float[Tensor, " rows"]
    constant: Float[Tensor, " rows"]
    value: Float[Tensor, " rows"]

    @classmethod
    def of(
        cls, node: Int[Tensor, " rows"], targets: Targets, rows: Rows, mass: float = MASS, cap: int = CAP
    ) -> SparseRows:
        """The fewest largest entries of each row that hold a share of its absolute sum, at most `cap`."""
        sizes = rows.sources.abs()
        size = sizes.double().sum(1)
        top = sizes.topk(min(cap, sizes.shape[1]), dim=1)
        before = top.values.double().cumsum(1) - top.values
        held = (before < mass * size[:, None]) & (top.values > 0)
        return cls(
            node=node.cpu(), count=held.sum(1).int().cpu(), column=top.indices[held].int().cpu(),
            entry=rows.sources.gather(1, top.indices)[held].cpu(), total=rows.sources.double().sum(1).cpu(),
            size=size.cpu(), constant=rows.constant.double().cpu(), value=targets.value.double().cpu(),
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def row(self) -> Int[Tensor, " entries"]:
        """Which row each entry is of."""
        return torch.repeat_interleave(torch.arange(len(self.node)), self.count.long())

    def __len__(self) -> int:
        return len(self.node)


def joined(parts: Sequence[SparseRows]) -> SparseRows:
    """The rows of several parts, one after the other."""
    return SparseRows(**{field.name: torch.cat([getattr(part, field.name) for part in parts])
                         for field in fields(SparseRows)})  # fmt: skip
