"""Edits along given vectors: additions, projections, affine maps; any function; a choice of edits per row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import EditError, InvalidInputError, ShapeError
from workbench.interventions.op import (
    LowRankForm,
    Op,
    Where,
    basis,
    floats,
    moves,
    project,
    same_width,
    set_numbers,
    unit,
    vector,
)


@checked
@dataclass(frozen=True, eq=False)
class Add(Op):
    """`h + strength * vector`.

    Attributes:
        vector: the steering vector, with magnitude; one for all rows or one per batch row.
        strength: factor on it; a number or one per batch row.

    >>> Add(torch.tensor([0.0, 2.0]), strength=3.0)(torch.tensor([[1.0, 1.0]]))  # 1 + 3 * 2
    tensor([[1., 7.]])
    """

    vector: Float[Tensor, "*rows d"]
    strength: float | Float[Tensor, " rows"] = 1.0
    per_row: ClassVar[Mapping[str, int]] = {"vector": 1, "strength": 0}
    strength_name: ClassVar[str | None] = "strength"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", vector(self.vector, "Add"))
        set_numbers(self, "strength")

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        strength, v = self._per_token("strength", where, h), self._per_token("vector", where, h)
        return h + strength[..., None] * v

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]

    @property
    def must_change(self) -> bool:
        return moves(self.strength, self.vector)

    def low_rank(self) -> LowRankForm | None:
        bias = torch.as_tensor(self.strength).to(self.vector)[..., None] * self.vector
        nothing = self.vector.new_zeros(0, self.vector.shape[-1])
        return LowRankForm(nothing, nothing, bias)


@checked
@dataclass(frozen=True, eq=False)
class AddScaled(Op):
    """`h + strength * size * direction`: an addition whose size follows the residual stream.

    Attributes:
        vector: only its direction counts; one for all rows or one per batch row.
        strength: factor; a number or one per batch row.
        size: "norm" for the norm of each token's own activation, or a number such as the mean norm of a data set.

    >>> AddScaled(torch.tensor([0.0, 9.0]), strength=0.5)(torch.tensor([[3.0, 4.0]]))  # norm 5, so 2.5 is added
    tensor([[3.0000, 6.5000]])
    """

    vector: Float[Tensor, "*rows d"]
    strength: float | Float[Tensor, " rows"] = 1.0
    size: Literal["norm"] | float = "norm"
    per_row: ClassVar[Mapping[str, int]] = {"vector": 1, "strength": 0}
    strength_name: ClassVar[str | None] = "strength"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", unit(self.vector, "AddScaled"))
        set_numbers(self, "strength")
        if not isinstance(self.size, str) and not 0 < self.size < math.inf:
            raise InvalidInputError(f"AddScaled(size={self.size}): give 'norm' or a finite number above 0.")

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        size = h.norm(dim=1, keepdim=True) if isinstance(self.size, str) else self.size
        strength, v = self._per_token("strength", where, h), self._per_token("vector", where, h)
        return h + strength[..., None] * size * v

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]

    @property
    def must_change(self) -> bool:
        return bool((torch.as_tensor(self.strength) != 0).any())


@checked
@dataclass(frozen=True, eq=False)
class ProjectOut(Op):
    """Removes a direction or a subspace: `h - sum_i (h . r_i) r_i` over an orthonormal basis.

    The result does not depend on sign, length and order of the directions.

    Attributes:
        directions: one direction `(d,)`, several `(k, d)`, or one set per batch row `(rows, k, d)`; kept as an
            orthonormal basis.

    >>> ProjectOut(torch.tensor([0.0, 5.0]))(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 0.]])
    """

    directions: Float[Tensor, "*rows d"]
    per_row: ClassVar[Mapping[str, int]] = {"directions": 2}

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", basis(self.directions, "ProjectOut", per_row=True))

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        return h - project(h, self._per_token("directions", where or Where.of(h), h))

    @property
    def width(self) -> int | None:
        return self.directions.shape[-1]

    def low_rank(self) -> LowRankForm | None:
        if self.directions.ndim == 3:
            return None
        return LowRankForm(-self.directions, self.directions, self.directions.new_zeros(self.directions.shape[-1]))


@checked
@dataclass(frozen=True, eq=False)
class Affine(Op):
    """`h W^T + b`, with W as in `torch.nn.Linear`.

    Attributes:
        weight: W.
        bias: b, or None.

    >>> Affine(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([10.0, 0.0]))(torch.tensor([[1.0, 2.0]]))
    tensor([[12.,  1.]])
    """

    weight: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", floats(self.weight, "Affine", (2,), "(d, d)"))
        if self.weight.shape[0] != self.weight.shape[1]:
            raise ShapeError(f"Affine: weight {tuple(self.weight.shape)}; it must be square.")
        if self.bias is not None:
            object.__setattr__(self, "bias", floats(self.bias, "Affine", (1,), "(d,)"))
            same_width("Affine", weight=self.weight, bias=self.bias)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:  # noqa: ARG002
        out = h @ self.weight.to(h).T
        return out if self.bias is None else out + self.bias.to(h)

    @property
    def width(self) -> int | None:
        return self.weight.shape[0]


@checked
@dataclass(frozen=True, eq=False)
class LowRank(Op):
    """`h + R^T (W h + b - R h)`: the intervention of LoReFT (Wu et al. 2024, equation 1).

    Attributes:
        R: directions that are read and written; orthonormal rows give the published form.
        W: what their coordinates become.
        b: constant added to them, or None.

    >>> one = torch.tensor([[0.0, 1.0]])
    >>> LowRank(R=one, W=0 * one, b=torch.tensor([9.0]))(torch.tensor([[1.0, 2.0]]))  # coordinate 2 becomes 9
    tensor([[1., 9.]])
    """

    R: Float[Tensor, "k d"]
    W: Float[Tensor, "k d"]
    b: Float[Tensor, " k"] | None = None

    def __post_init__(self) -> None:
        for name in ("R", "W"):
            object.__setattr__(self, name, floats(getattr(self, name), f"LowRank.{name}", (2,), "(k, d)"))
        if self.R.shape != self.W.shape:
            raise ShapeError(f"LowRank: R {tuple(self.R.shape)} and W {tuple(self.W.shape)} must have one shape.")
        if self.b is not None:
            object.__setattr__(self, "b", floats(self.b, "LowRank.b", (1,), "(k,)"))
            if len(self.b) != len(self.R):
                raise ShapeError(f"LowRank: b {tuple(self.b.shape)}; R has {len(self.R)} directions.")

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:  # noqa: ARG002
        change = h @ (self.W - self.R).to(h).T
        return h + (change if self.b is None else change + self.b.to(h)) @ self.R.to(h)

    @property
    def width(self) -> int | None:
        return self.R.shape[1]

    def low_rank(self) -> LowRankForm | None:
        bias = self.R.new_zeros(self.R.shape[1]) if self.b is None else self.b @ self.R
        return LowRankForm(self.W - self.R, self.R, bias)


@checked
@dataclass(frozen=True, eq=False)
class Map(Op):
    """Any function of the hidden states, `(n, d) -> (n, d)` in fp32.

    >>> Map(lambda h: 2 * h)(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    fn: Callable[[Tensor], Tensor]

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:  # noqa: ARG002
        out = self.fn(h.clone())  # a function that works in place must not reach the model's own tensor
        if not isinstance(out, Tensor) or out.shape != h.shape:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise EditError(f"Map: the function returned {shape} for shape {tuple(h.shape)}; it must keep the shape.")
        return out


@checked
@dataclass(frozen=True, eq=False)
class PerRow(Op):
    """A choice of edits, one for each batch row.

    Attributes:
        ops: the edits.
        owner: for each row the index of its edit; -1 leaves the row as it is.
    """

    ops: tuple[Op, ...]
    owner: Int[Tensor, " rows"]
    per_row: ClassVar[Mapping[str, int]] = {"owner": 0}

    def __post_init__(self) -> None:
        if self.owner.ndim != 1 or not self.owner.numel() or not self.ops:
            raise ShapeError(f"PerRow: {len(self.ops)} ops, owner {tuple(self.owner.shape)}; give ops and (rows,).")
        if not -1 <= int(self.owner.min()) <= int(self.owner.max()) < len(self.ops):
            raise InvalidInputError(
                f"PerRow: owners {self.owner.tolist()} of {len(self.ops)} ops; use -1 to {len(self.ops) - 1}."
            )

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        owner = self._per_token("owner", where, h)
        edited = h.clone()
        for i in owner.unique().tolist():
            if i >= 0:
                mine = owner == i
                edited[mine] = self.ops[i](h[mine], where.of_tokens(mine))
        return edited

    @property
    def width(self) -> int | None:
        return next((op.width for op in self.ops if op.width is not None), None)

    @property
    def must_change(self) -> bool:
        return any(self.ops[i].must_change for i in self.owner.unique().tolist() if i >= 0)
