"""Edits as affine maps of one token's vector, which can be composed and folded into weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import NotExactlyExportable
from workbench.hooks.sites import Point
from workbench.interventions.gates import When
from workbench.interventions.intervention import Edit
from workbench.interventions.op import LowRankForm, Op
from workbench.interventions.ops import AddScaled, Affine
from workbench.interventions.replacing import Ablate, Replace
from workbench.interventions.scopes import All
from workbench.interventions.shapes import ClampProjection

# Two orthonormal bases of one subspace, each rounded to fp32, differ by less.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Fold:
    """`h -> A h + c` in float64, with `A = I + write^T read`, or any A if `dense` is given.

    Attributes:
        read: one direction per row that is read; none for a constant.
        write: what is written for each of them.
        bias: c.
        dense: A, if it is not near the identity; `read` and `write` are then empty.
    """

    read: Float[Tensor, "k d"]
    write: Float[Tensor, "k d"]
    bias: Float[Tensor, " d"]
    dense: Float[Tensor, "d d"] | None = None

    @classmethod
    def constant(cls, bias: Float[Tensor, " d"]) -> Fold:
        """Adds `bias` and leaves the rest."""
        nothing = torch.zeros(0, len(bias), dtype=torch.float64, device=bias.device)
        return cls(nothing, nothing, bias.double())

    @property
    def is_constant(self) -> bool:
        """Whether A is the identity."""
        return self.dense is None and len(self.read) == 0

    @property
    def linear(self) -> Fold:
        """The same A without the constant."""
        return replace(self, bias=torch.zeros_like(self.bias))

    def to(self, device: torch.device) -> Fold:
        """The same map on a device."""
        dense = None if self.dense is None else self.dense.to(device)
        return Fold(self.read.to(device), self.write.to(device), self.bias.to(device), dense)

    def rows(self, u: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`u A`."""
        return u @ self.dense if self.dense is not None else u + (u @ self.write.T) @ self.read

    def columns(self, w: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """`A w`."""
        return self.dense @ w if self.dense is not None else w + self.write.T @ (self.read @ w)

    def then(self, after: Fold) -> Fold:
        """This map, and `after` on its result.

        >>> twice = Fold.constant(torch.ones(1)).then(Fold.constant(torch.tensor([2.0])))
        >>> twice.bias
        tensor([3.], dtype=torch.float64)
        """
        bias = after.columns(self.bias[:, None])[:, 0] + after.bias
        if after.dense is not None:
            return Fold(after.read, after.write, bias, after.dense @ self._matrix())
        if self.dense is not None:
            return Fold(self.read, self.write, bias, after.columns(self.dense))
        read = torch.cat([self.read, self.rows(after.read)])
        return Fold(read, torch.cat([self.write, after.write]), bias)

    def changes_nothing_after(self, before: Fold) -> bool:
        """Whether the outputs of `before`, its constant aside, stay as they are: `(A - I) A_before = 0`."""
        if self.dense is not None:
            rest = before.rows(self.dense - torch.eye(len(self.dense), dtype=torch.float64, device=self.dense.device))
            return bool(rest.abs().max() <= _ROUNDING * self.dense.abs().max())
        if not len(self.read):
            return True
        return bool(before.rows(self.read).abs().max() <= _ROUNDING * self.read.abs().max())

    def _matrix(self) -> Float[Tensor, "d d"]:
        if self.dense is not None:
            return self.dense
        return self.columns(torch.eye(len(self.bias), dtype=torch.float64, device=self.bias.device))


def fold_of(edit: Edit, point: Point) -> Fold:
    """The affine map of an edit at a point, on the device of its module.

    Raises:
        NotExactlyExportable: if it is not one affine map on every token.
    """
    op = edit.op
    if isinstance(op, When):
        raise refused(edit, f"its gate ({type(op.gate).__name__}) decides while the model runs")
    if edit.scope != All():
        raise refused(edit, f"it edits the tokens of {edit.scope} only; outside this program every token is edited")
    if op.n_rows is not None:
        raise refused(edit, f"it has parameters for {op.n_rows} batch rows; outside this program rows are alike")
    with torch.no_grad():
        found = _fold(op, point.width or 0)
    if found is None:
        raise refused(edit, f"{op.name} is not an affine map `A h + c` of the activation")
    return found.to(next(point.module.parameters()).device)


def refused(edit: Edit, reason: str) -> NotExactlyExportable:
    """The error for an edit that has no exact form."""
    return NotExactlyExportable(
        f"{edit} can't be exported exactly: {reason}. Keep it as a plan, saved with Intervention.save."
    )


def _fold(op: Op, width: int) -> Fold | None:
    form = op.low_rank()
    if form is None and isinstance(op, ClampProjection) and op.mode == "set":
        form = LowRankForm(-op.vector[None], op.vector[None], op.value * op.vector)
    if form is not None:
        return Fold(form.read.double(), form.write.double(), form.bias.double())
    if isinstance(op, AddScaled) and not isinstance(op.size, str):
        return Fold.constant(op.strength * op.size * op.vector.double())
    if isinstance(op, Affine):
        bias = op.weight.new_zeros(len(op.weight)) if op.bias is None else op.bias
        return replace(Fold.constant(bias), dense=op.weight.double())
    target = _replacement(op, width)
    if target is None:
        return None
    return replace(Fold.constant(target), dense=torch.zeros(width, width, dtype=torch.float64, device=target.device))


def _replacement(op: Op, width: int) -> Tensor | None:
    """What every activation becomes, for the ops that forget the old one."""
    if isinstance(op, Replace):
        return op.value
    if isinstance(op, Ablate) and op.kind != "resample" and op.directions is None:
        return torch.zeros(width) if op.reference is None else op.reference
    return None
