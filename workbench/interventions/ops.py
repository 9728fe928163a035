"""Edits as pure functions: `h -> h'` on the chosen tokens, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError, ShapeError

Rows = Int[Tensor, " n"]


class Op:
    """An edit of hidden states. `rows` says to which batch row each token belongs."""

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:
        """The edited hidden states."""
        raise NotImplementedError

    @property
    def width(self) -> int | None:
        """Size of the hidden states that this edit fits, or None for any."""
        return None

    @property
    def n_rows(self) -> int | None:
        """Number of batch rows that the per-row parameters are for, or None if every row gets the same edit."""
        return None

    @property
    def must_change(self) -> bool:
        """Whether an edit that changes nothing is an error."""
        return False

    def take(self, rows: Int[Tensor, " chosen"]) -> Op:  # noqa: ARG002
        """The same edit for a choice of batch rows."""
        return self


def _vector(value: Tensor, name: str) -> Tensor:
    if value.ndim not in (1, 2):
        raise ShapeError(f"{name}: shape {tuple(value.shape)}; give (d,) for all rows or (rows, d) for one per row.")
    value = value.detach().float()
    if not bool(torch.isfinite(value).all()):
        raise InvalidInputError(f"{name}: the vector of shape {tuple(value.shape)} holds non-finite values.")
    if not bool((value != 0).any()):
        raise DegenerateInputError(
            f"{name}: the vector of shape {tuple(value.shape)} is zero, so nothing would be edited."
        )
    return value


def _of_row(value: Tensor, rows: Rows, per_row_ndim: int) -> Tensor:
    return value[rows] if value.ndim == per_row_ndim else value


@dataclass(frozen=True, eq=False)
class Add(Op):
    """`h + strength * vector`.

    Attributes:
        vector: the steering vector, with magnitude; one for all rows or one per batch row.
        strength: factor on it; a number or one per batch row.

    >>> Add(torch.tensor([0.0, 2.0]), strength=3.0)(torch.tensor([[1.0, 1.0]]), torch.tensor([0]))  # 1 + 3 * 2
    tensor([[1., 7.]])
    """

    vector: Float[Tensor, "*rows d"]
    strength: float | Float[Tensor, " rows"] = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _vector(self.vector, "Add"))

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:
        vector = _of_row(self.vector.to(h.device), rows, 2)
        if isinstance(self.strength, Tensor):
            return h + self.strength.to(h)[rows, None] * vector
        return h + self.strength * vector

    @property
    def width(self) -> int | None:
        return self.vector.shape[-1]

    @property
    def n_rows(self) -> int | None:
        if self.vector.ndim == 2:
            return self.vector.shape[0]
        return len(self.strength) if isinstance(self.strength, Tensor) else None

    @property
    def must_change(self) -> bool:
        return bool((torch.as_tensor(self.strength) != 0).any())

    def take(self, rows: Int[Tensor, " chosen"]) -> Op:
        strength = self.strength[rows] if isinstance(self.strength, Tensor) else self.strength
        return Add(self.vector[rows] if self.vector.ndim == 2 else self.vector, strength)


@dataclass(frozen=True, eq=False)
class ProjectOut(Op):
    """`h - (h . r) r` for the unit direction r: removes one direction. The same for r, -r and 5 r.

    >>> ProjectOut(torch.tensor([0.0, 5.0]))(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    tensor([[1., 0.]])
    """

    direction: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        vector = _vector(self.direction, "ProjectOut")
        if vector.ndim != 1:
            raise ShapeError(f"ProjectOut: shape {tuple(vector.shape)}; give one direction (d,).")
        object.__setattr__(self, "direction", vector / vector.norm())

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:  # noqa: ARG002
        r = self.direction.to(h.device)
        return h - (h @ r)[:, None] * r

    @property
    def width(self) -> int | None:
        return self.direction.shape[0]


@dataclass(frozen=True, eq=False)
class Map(Op):
    """Any function of the hidden states, `(n, d) -> (n, d)` in fp32.

    >>> Map(lambda h: 2 * h)(torch.ones(1, 2), torch.tensor([0]))
    tensor([[2., 2.]])
    """

    fn: Callable[[Tensor], Tensor]

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:  # noqa: ARG002
        return self.fn(h)


def _features(sae: Any, features: Sequence[int] | Tensor) -> Tensor:
    ids = torch.as_tensor(features, dtype=torch.long)
    d_sae = sae.W_dec.shape[0]
    if ids.numel() == 0:
        raise DegenerateInputError("No SAE feature given, so nothing would be edited.")
    bad = ids[(ids < 0) | (ids >= d_sae)]
    if bad.numel():
        raise InvalidInputError(f"Feature {int(bad[0])} does not exist; this SAE has features 0 to {d_sae - 1}.")
    return ids


class _SAEOp(Op):
    """Shared by the SAE edits: `x + sum_f (a'_f - a_f) W_dec[f]`, so the SAE's error is kept."""

    sae: Any

    @property
    def width(self) -> int | None:
        return int(self.sae.W_dec.shape[1])

    def _acts(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return self.sae.encode(h.to(self.sae.W_dec)).to(h)

    def _write(self, h: Tensor, change: Tensor, features: Tensor) -> Tensor:
        return h + change @ self.sae.W_dec.detach()[features].to(h)


@dataclass(frozen=True, eq=False)
class SAEClamp(_SAEOp):
    """Sets feature activations to a value: `x + sum_f (value - a_f) W_dec[f]`, error kept.

    Attributes:
        sae: an SAE in the sae_lens form.
        features: feature indices.
        value: the activation to set, in the SAE's units; one number or one per feature.
    """

    sae: Any
    features: Sequence[int] | Int[Tensor, " f"]
    value: float | Float[Tensor, " f"] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", _features(self.sae, self.features))

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:  # noqa: ARG002
        features = torch.as_tensor(self.features)
        value = self.value.to(h) if isinstance(self.value, Tensor) else self.value
        return self._write(h, value - self._acts(h)[:, features], features)


@dataclass(frozen=True, eq=False)
class SAEAblate(_SAEOp):
    """Zeroes feature activations: `x - sum_f a_f W_dec[f]`, error kept. Inactive features change nothing."""

    sae: Any
    features: Sequence[int] | Int[Tensor, " f"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", _features(self.sae, self.features))

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:  # noqa: ARG002
        features = torch.as_tensor(self.features)
        return self._write(h, -self._acts(h)[:, features], features)


@dataclass(frozen=True, eq=False)
class SAEAddMax(_SAEOp):
    """Adds `strength * a_max * direction`, a_max being the largest feature activation at the token.

    With `direction = W_dec[f]` this is the steering of Arad et al. 2025 (their equation 6 with the error kept); a_max
    is taken per token, so rows do not depend on each other (the reference code takes it over the batch).

    Attributes:
        sae: an SAE in the sae_lens form.
        direction: what to add; one for all rows or one per batch row.
        strength: factor; a number or one per batch row.
    """

    sae: Any
    direction: Float[Tensor, "*rows d"]
    strength: float | Float[Tensor, " rows"] = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _vector(self.direction, "SAEAddMax"))

    @classmethod
    def of_features(cls, sae: Any, features: Sequence[int], strength: float | Tensor = 1.0) -> SAEAddMax:
        """One feature per batch row."""
        return cls(sae, sae.W_dec.detach()[_features(sae, features)], strength)

    def __call__(self, h: Float[Tensor, "n d"], rows: Rows) -> Float[Tensor, "n d"]:
        a_max = self._acts(h).amax(dim=1, keepdim=True)
        return Add(self.direction, self.strength)(torch.zeros_like(h), rows) * a_max + h

    @property
    def n_rows(self) -> int | None:
        return Add(self.direction, self.strength).n_rows

    @property
    def must_change(self) -> bool:
        return Add(self.direction, self.strength).must_change

    def take(self, rows: Int[Tensor, " chosen"]) -> Op:
        part = Add(self.direction, self.strength).take(rows)
        assert isinstance(part, Add)
        return replace(self, direction=part.vector, strength=part.strength)
