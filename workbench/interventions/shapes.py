"""Edits that bound, turn or rescale: clamps of a projection, caps, thresholds, rotations, kept norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.interventions.op import Op, Where, basis, set_numbers, unit

ProjectionMode = Literal["set", "min", "max", "subspace"]


@checked
@dataclass(frozen=True, eq=False)
class ClampProjection(Op):
    """Sets or bounds the projection on a direction: `h + (p' - p) v` with `p = h . v`, v of unit length.

    Attributes:
        vector: only its direction counts; one for all rows or one per batch row.
        value: target of the projection, in the units of the activation; a number or one per batch row.
        mode: "set": p' = value. "min": p' = max(p, value), value is a floor. "max": p' = min(p, value), a ceiling.
            "subspace": `h - relu(p) v + value v`, the clamp of AxBench, which leaves a negative p in place.

    >>> d = torch.tensor([1.0, 0.0])
    >>> ClampProjection(d, 5.0)(torch.tensor([[2.0, 1.0]])), ClampProjection(d, 1.0, "min")(torch.tensor([[2.0, 1.0]]))
    (tensor([[5., 1.]]), tensor([[2., 1.]]))
    """

    vector: Float[Tensor, "*rows d"]
    value: float | Float[Tensor, " rows"]
    mode: ProjectionMode = "set"
    per_row: ClassVar[Mapping[str, int]] = {"vector": 1, "value": 0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", unit(self.vector, "ClampProjection"))
        set_numbers(self, "value")

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        v, value = self._per_token("vector", where, h), self._per_token("value", where, h).to(h)
        p = (h * v).sum(1)
        if self.mode == "subspace":
            change = value - p.relu()
        else:
            bounded = {"set": value.expand_as(p), "min": torch.maximum(p, value), "max": torch.minimum(p, value)}
            change = bounded[self.mode] - p
        return h + change[:, None] * v

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]


@checked
@dataclass(frozen=True, eq=False)
class Cap(Op):
    """Limits the projection on a direction from above: `h - relu(h . v - tau) v`, v of unit length.

    Unlike projecting out, it depends on the sign of the vector.

    Attributes:
        vector: only its direction counts; one for all rows or one per batch row.
        tau: largest projection that is left alone; a number or one per batch row.

    >>> Cap(torch.tensor([2.0, 0.0]), 1.5)(torch.tensor([[2.0, 1.0], [-9.0, 1.0]]))
    tensor([[ 1.5000,  1.0000],
            [-9.0000,  1.0000]])
    """

    vector: Float[Tensor, "*rows d"]
    tau: float | Float[Tensor, " rows"]
    per_row: ClassVar[Mapping[str, int]] = {"vector": 1, "tau": 0}

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", unit(self.vector, "Cap"))
        set_numbers(self, "tau", infinite=True)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        v, tau = self._per_token("vector", where, h), self._per_token("tau", where, h).to(h)
        return h - ((h * v).sum(1) - tau).relu()[:, None] * v

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]


@checked
@dataclass(frozen=True, eq=False)
class Threshold(Op):
    """Adds only where there is little of the direction yet: `h + amount * v` if `h . v < tau`, v of unit length.

    Attributes:
        vector: only its direction counts; one for all rows or one per batch row.
        tau: tokens with a projection of at least this are left alone; a number or one per batch row.
        amount: how much is added, in the units of the activation; a number or one per batch row.

    >>> Threshold(torch.tensor([1.0, 0.0]), tau=1.0, amount=5.0)(torch.tensor([[0.5, 0.0], [1.5, 0.0]]))
    tensor([[5.5000, 0.0000],
            [1.5000, 0.0000]])
    """

    vector: Float[Tensor, "*rows d"]
    tau: float | Float[Tensor, " rows"]
    amount: float | Float[Tensor, " rows"]
    per_row: ClassVar[Mapping[str, int]] = {"vector": 1, "tau": 0, "amount": 0}
    strength_name: ClassVar[str | None] = "amount"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", unit(self.vector, "Threshold"))
        set_numbers(self, "tau", infinite=True)
        set_numbers(self, "amount")

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        v, tau = self._per_token("vector", where, h), self._per_token("tau", where, h)
        added = self._per_token("amount", where, h).to(h) * ((h * v).sum(1) < tau)
        return h + added[:, None] * v

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]


@checked
@dataclass(frozen=True, eq=False)
class Rotate(Op):
    """Turns the activation by an angle and keeps its norm.

    Attributes:
        vector: the activation is turned towards it, in the plane of the two; one for all rows or one per batch row.
            An activation parallel to it has no such plane and is left alone.
        theta: angle in radians; negative turns away. A number or one per batch row.
        plane: two vectors: only the part of the activation in their plane is turned, from the first to the second.
            `vector` is then not used.

    >>> Rotate(torch.tensor([0.0, 1.0]), torch.pi / 2)(torch.tensor([[3.0, 0.0]])).round(decimals=4)
    tensor([[0., 3.]])
    """

    vector: Float[Tensor, "*rows d"] | None
    theta: float | Float[Tensor, " rows"]
    plane: Float[Tensor, "2 d"] | None = None
    per_row: ClassVar[Mapping[str, int]] = {"vector": 1, "theta": 0}
    strength_name: ClassVar[str | None] = "theta"

    def __post_init__(self) -> None:
        if (self.vector is None) == (self.plane is None):
            raise InvalidInputError("Rotate: give either the vector to turn towards or the plane to turn in.")
        if self.vector is not None:
            object.__setattr__(self, "vector", unit(self.vector, "Rotate"))
        set_numbers(self, "theta")
        if self.plane is None:
            return
        if self.plane.ndim != 2 or self.plane.shape[0] != 2 or basis(self.plane, "Rotate").shape[0] != 2:
            raise InvalidInputError(f"Rotate: plane {tuple(self.plane.shape)} must be two independent vectors (2, d).")
        first = unit(self.plane[0], "Rotate")
        second = unit(self.plane[1].float() - (self.plane[1].float() @ first) * first, "Rotate")
        object.__setattr__(self, "plane", torch.stack([first, second]))

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        theta = self._per_token("theta", where, h).to(h)
        less, sin = (theta.cos() - 1)[..., None], theta.sin()[..., None]
        if self.plane is not None:
            plane = self.plane.to(h)
            a, b = (h @ plane.T).unbind(1)
            less, sin = less.squeeze(-1), sin.squeeze(-1)
            return h + (less * a - sin * b)[:, None] * plane[0] + (less * b + sin * a)[:, None] * plane[1]
        v = self._per_token("vector", where, h).expand_as(h)
        size = h.norm(dim=1, keepdim=True)
        hat = h / size.clamp_min(torch.finfo(h.dtype).tiny)
        across = v - (hat * v).sum(1, keepdim=True) * hat
        length = across.norm(dim=1, keepdim=True)
        parallel = length < 1e-6
        turned = less * h + sin * size * across / length.clamp_min(1e-6)
        return h + turned.masked_fill(parallel, 0.0)

    @property
    def width(self) -> int | None:
        known = self.vector if self.vector is not None else self.plane
        return None if known is None else known.shape[-1]

    @property
    def must_change(self) -> bool:
        return False


@checked
@dataclass(frozen=True, eq=False)
class NormPreserve(Op):
    """Another edit, after which every activation is rescaled to the norm that it had.

    >>> from workbench.interventions.ops import Add
    >>> NormPreserve(Add(torch.tensor([0.0, 4.0])))(torch.tensor([[3.0, 0.0]]))  # (3, 4) has norm 5; it had 3
    tensor([[1.8000, 2.4000]])
    """

    op: Op

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        out = self.op(h, where)
        size = out.norm(dim=1, keepdim=True)
        ratio = h.norm(dim=1, keepdim=True) / size.clamp_min(torch.finfo(h.dtype).tiny)
        return torch.where((out == h).all(1, keepdim=True) | (size == 0), out, out * ratio)

    @property
    def width(self) -> int | None:
        return self.op.width

    @property
    def must_change(self) -> bool:
        return self.op.must_change

    @property
    def name(self) -> str:
        return f"NormPreserve({self.op.name})"


@checked
@dataclass(frozen=True, eq=False)
class EqualNorm(Op):
    """The control of other edits: the norm of their change at each token, along one random direction.

    Attributes:
        ops: the edits, made one after the other to find the norm of their change.
        direction: where the change goes; only its direction counts.

    >>> from workbench.interventions.ops import Add
    >>> control = EqualNorm((Add(torch.tensor([3.0, 0.0])), Add(torch.tensor([0.0, 4.0]))), torch.tensor([0.0, -2.0]))
    >>> control(torch.tensor([[1.0, 1.0]]))  # the change (3, 4) has norm 5
    tensor([[ 1., -4.]])
    """

    ops: tuple[Op, ...]
    direction: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        direction = unit(self.direction, "EqualNorm")
        if direction.ndim != 1 or not self.ops or {op.width for op in self.ops} - {None, len(direction)}:
            raise ShapeError(
                f"EqualNorm: {len(self.ops)} ops of widths {[op.width for op in self.ops]}, direction "
                f"{tuple(direction.shape)}; give ops and one direction (d,) of their width."
            )
        object.__setattr__(self, "direction", direction)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        """The hidden states with a change of equal norm along the direction."""
        where, edited = where or Where.of(h), h
        for op in self.ops:
            edited = op(edited, where)
        return h + (edited - h).norm(dim=1, keepdim=True) * self.direction.to(h)

    @property
    def width(self) -> int | None:
        """Size of the hidden states that this edit fits."""
        return len(self.direction)

    @property
    def must_change(self) -> bool:
        """Whether an edit that changes nothing is an error."""
        return any(op.must_change for op in self.ops)
