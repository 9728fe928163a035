"""What every edit is: a pure function `h -> h'` of hidden states, with parameters for all rows or one per row."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import shown
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import setting
from workbench.core.registry import Registry


@dataclass(frozen=True, eq=False)
class Where:
    """Which tokens the hidden states belong to.

    Attributes:
        rows: the row of the intervention's per-row parameters, one per token.
        positions: absolute position of the token in its row, padding not counted.
        ids: the token's id, or None where the model was given embeddings.
    """

    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    ids: Int[Tensor, " n"] | None = None

    @classmethod
    def of(cls, h: Tensor) -> Where:
        """Every hidden state is position 0 of a row of its own."""
        return cls(torch.arange(len(h), device=h.device), torch.zeros(len(h), dtype=torch.long, device=h.device))

    def of_tokens(self, chosen: Bool[Tensor, " n"]) -> Where:
        """The same for some of the tokens."""
        return Where(self.rows[chosen], self.positions[chosen], None if self.ids is None else self.ids[chosen])


@dataclass(frozen=True, eq=False)
class LowRankForm(OneLine):
    """An edit of the form `h + (h U^T) V + b`, which merges with others of that form.

    Attributes:
        read: U, one direction per row that is read.
        write: V, what is written for each of them.
        bias: b, added whatever was read; one for all rows or one per batch row.
    """

    read: Float[Tensor, "k d"]
    write: Float[Tensor, "k d"]
    bias: Float[Tensor, "*rows d"]


class Op(OneLine):
    """An edit of hidden states, computed in fp32.

    Subclasses are frozen dataclasses. `per_row` names the parameters that may be given once or once per batch row,
    with the number of axes that the single form has; `strength_name` the one that `Intervention * factor` scales.
    """

    how_to_make: ClassVar[str] = "An op is one such as Add(vector)."
    per_row: ClassVar[Mapping[str, int]] = {}
    strength_name: ClassVar[str | None] = None
    registry: ClassVar[Registry[type[Op]]] = Registry("op", "workbench.interventions")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__name__.startswith("_"):
            Op.registry.add(cls.__name__, cls)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        """The edited hidden states. Without `where`, each of them is a row of its own."""
        raise NotImplementedError

    @property
    def width(self) -> int | None:
        """Size of the hidden states that this edit fits, or None for any."""
        return None

    @property
    def must_change(self) -> bool:
        """Whether an edit that changes nothing is an error."""
        return False

    @property
    def n_rows(self) -> int | None:
        """Number of batch rows that the per-row parameters are for, or None if every row gets the same edit."""
        sizes = {len(value) for value in self._row_values().values()}
        sizes |= {inner.n_rows for inner in self._inner() if inner.n_rows is not None}
        if len(sizes) > 1:
            raise ShapeError(f"{self.name}: parameters for {first_few(sorted(sizes))} rows; they must agree.")
        return next(iter(sizes), None)

    @property
    def gated(self) -> bool:
        """Whether a gate decides where this edit is made."""
        return False

    @property
    def name(self) -> str:
        """For reports: what kind of edit this is."""
        return type(self).__name__

    def low_rank(self) -> LowRankForm | None:
        """This edit as `h + (h U^T) V + b`, or None if it is not of that form."""
        return None

    def take(self, rows: Int[Tensor, " chosen"]) -> Op:
        """The same edit for a choice of batch rows."""
        changes = {name: value[rows.to(value.device)] for name, value in self._row_values().items()}
        return self.replaced(lambda op: op.take(rows), changes)

    def scaled(self, factor: float) -> Op:
        """The same edit with `factor` times the strength.

        Raises:
            InvalidInputError: if this kind of edit has no strength.
        """
        if self.strength_name is not None:
            return changed(self, {self.strength_name: getattr(self, self.strength_name) * factor})
        if not any(True for _ in self._inner()):
            raise InvalidInputError(
                f"{self.name} * {setting(factor)}: this edit has no strength to scale. "
                "Scale the edits that have one: Add, AddScaled, Threshold, Rotate, SAEAdd, SAEAddMax."
            )
        return self.replaced(lambda op: op.scaled(factor), {})

    def to(self, device: torch.device) -> Op:
        """The same edit with its tensors on a device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), Tensor) and value.device != device
        }
        return self.replaced(lambda op: op.to(device), moved)

    def replaced(self, inner: Callable[[Op], Op], changes: Mapping[str, object]) -> Op:
        """A copy with changed fields; edits inside this one go through `inner`."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Op):
                changes = {**changes, field.name: inner(value)}
            elif isinstance(value, tuple) and any(isinstance(part, Op) for part in value):
                changes = {**changes, field.name: tuple(inner(part) for part in value)}
        return changed(self, changes)

    def parameters(self) -> Iterator[Tensor]:
        """Tensors of this edit that are being trained: those that an optimizer accepts.

        Edits that keep only a direction or an orthonormal basis hold a result computed from your tensor; to train it,
        make such an edit anew in every step.
        """
        for op in self.walk():
            for field in dataclasses.fields(op):  # type: ignore[arg-type]
                value = getattr(op, field.name)
                if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                    yield value

    def walk(self) -> Iterator[Op]:
        """This edit and every edit inside it."""
        yield self
        for op in self._inner():
            yield from op.walk()

    def _inner(self) -> Iterator[Op]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Op):
                    yield part

    def _row_values(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in self.per_row}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and value.ndim > self.per_row[name]
        }

    def _per_token(self, name: str, where: Where, h: Tensor) -> Tensor:
        """The parameter for each token: its row's, or the one for all."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            return torch.full((), value, dtype=h.dtype, device=h.device)
        value = value.to(h) if value.is_floating_point() else value.to(h.device)
        return value[where.rows] if value.ndim > self.per_row[name] else value


def changed(op: Op, changes: Mapping[str, object]) -> Op:
    """A copy with changed fields that need no new check: nothing is normalised again, and rows may be all zero."""
    if not changes:
        return op
    out = copy.copy(op)
    for name, value in changes.items():
        object.__setattr__(out, name, value)
    return out


def floats(
    value: Tensor, name: str, ndims: tuple[int, ...], shapes: str, *, infinite: bool = False
) -> Float[Tensor, ...]:
    """A parameter in fp32, checked to be finite and of one of the expected numbers of axes.

    Raises:
        ShapeError: for another number of axes.
        DegenerateInputError: for a tensor without numbers.
        InvalidInputError: for tensors that are sparse, complex, boolean or have no memory, and for non-finite values;
            infinity is allowed where it has a meaning.
    """
    usable = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not usable or value.is_quantized or value.is_complex() or value.dtype == torch.bool:
        raise InvalidInputError(f"{name}: got {shown(value)}; give a dense torch tensor of real numbers, {shapes}.")
    if value.ndim not in ndims:
        raise ShapeError(f"{name}: shape {tuple(value.shape)}; give {shapes}.")
    if not value.numel():
        raise DegenerateInputError(f"{name}: shape {tuple(value.shape)} holds no number; give {shapes}.")
    if not value.requires_grad:
        value = value.detach().float()
    if bool((value.isnan() if infinite else ~torch.isfinite(value)).any()):
        raise InvalidInputError(f"{name}: the tensor of shape {tuple(value.shape)} holds non-finite values.")
    return value


def set_numbers(op: Op, *names: str, infinite: bool = False) -> None:
    """Checks parameters that are a number, or one per batch row, and that all parameters are for the same rows.

    Raises:
        ShapeError: for another number of axes, or other rows than those of the other parameters.
        InvalidInputError: for non-finite numbers; infinity is allowed where it has a meaning.
    """
    for name in names:
        value = getattr(op, name)
        if isinstance(value, Tensor):
            shapes = "a number, or (rows,) for one per row"
            object.__setattr__(op, name, floats(value, f"{op.name}.{name}", (0, 1), shapes, infinite=infinite))
        elif not infinite and math.isinf(value):
            raise InvalidInputError(f"{op.name}({name}={value}): give a finite number.")
    _ = op.n_rows


def vector(value: Tensor, name: str) -> Float[Tensor, "*rows d"]:
    """A vector for all rows or one per row; not all of them zero."""
    value = floats(value, name, (1, 2), "(d,) for all rows or (rows, d) for one per row")
    if not bool((value != 0).any()):
        raise DegenerateInputError(
            f"{name}: the vector of shape {tuple(value.shape)} is zero, so nothing would be edited."
        )
    return value


def moves(strength: float | Tensor, direction: Float[Tensor, "*rows d"]) -> bool:
    """Whether `strength * direction` is other than zero in some row."""
    return bool(((torch.as_tensor(strength, device=direction.device) != 0) & (direction != 0).any(-1)).any())


def unit(value: Tensor, name: str) -> Float[Tensor, "*rows d"]:
    """The direction of a vector; none of them may be zero."""
    value = vector(value, name)
    norm = value.norm(dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise DegenerateInputError(f"{name}: {int((norm == 0).sum())} of the vectors are zero and have no direction.")
    return value / norm


def basis(value: Tensor, name: str, *, per_row: bool = False) -> Float[Tensor, "*rows k d"]:
    """An orthonormal basis of the span of `(d,)` or `(k, d)`; `per_row`: or of each batch row's `(rows, k, d)`."""
    shapes = "(d,), (k, d) or, one subspace per row, (rows, k, d)" if per_row else "(d,) or (k, d)"
    value = floats(value, name, (1, 2, 3) if per_row else (1, 2), shapes)
    value = value[None] if value.ndim == 1 else value
    if not bool((value != 0).any()):
        raise DegenerateInputError(f"{name}: the directions of shape {tuple(value.shape)} are zero; they span nothing.")
    if value.requires_grad:
        return torch.linalg.qr(value.transpose(-1, -2)).Q.transpose(-1, -2)
    _, s, vh = torch.linalg.svd(value.double(), full_matrices=False)
    rank = (s > s[..., :1] * max(value.shape[-2:]) * torch.finfo(torch.float32).eps).sum(-1)
    if bool((rank != rank.flatten()[0]).any()):
        raise DegenerateInputError(f"{name}: the rows' subspaces have ranks {first_few(rank.unique().tolist())}.")
    # Contiguous, as it is when it comes from a file: the memory layout decides the last bit of a product.
    return vh[..., : int(rank.flatten()[0]), :].float().contiguous()


def project(h: Float[Tensor, "n d"], rows: Float[Tensor, "*n k d"]) -> Float[Tensor, "n d"]:
    """The part of each hidden state in the span of an orthonormal basis, one for all or one per hidden state."""
    if rows.ndim == 2:
        return (h @ rows.T) @ rows
    return torch.einsum("nk,nkd->nd", torch.einsum("nd,nkd->nk", h, rows), rows)


def same_width(what: str, **tensors: Tensor) -> None:
    """Raises ShapeError unless the last axes agree."""
    if len({t.shape[-1] for t in tensors.values()}) > 1:
        shown = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ShapeError(f"{what}: {shown}; the last axes must agree.")
