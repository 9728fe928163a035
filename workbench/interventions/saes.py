"""Edits of SAE features: `x' = x + sum_f (a'_f - a_f) W_dec[f]`, so what the SAE does not explain stays."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.interventions.op import Op, Where, floats, moves, same_width, set_numbers, vector

ErrorTerm = Literal["keep", "drop"]
ClampMode = Literal["set", "min", "max"]
When = Literal["always", "active"]


class _SAEOp(Op):
    """Shared by the SAE edits: an `sae` in the sae_lens form, or another basis, that reads the site."""

    sae: AnySAE

    @functools.cached_property
    def basis(self) -> Basis:
        """The SAE as a basis."""
        return as_basis(self.sae)

    @property
    def width(self) -> int | None:
        return self.basis.d_out


class _FeatureOp(_SAEOp):
    """Shared by the edits of chosen features: new activations from the old ones."""

    features: Sequence[int] | Int[Tensor, "*rows f"]
    error: ErrorTerm

    @property
    def _reads(self) -> bool:
        """Whether activations are read off the site that is edited."""
        return True

    def _new(self, acts: Tensor, where: Where) -> Tensor:
        """The new activations of the chosen features, `(n, f)`, from their activations."""
        raise NotImplementedError

    def _check(self, name: str | None = None) -> None:
        object.__setattr__(self, "features", self.basis.features(self.features, once=True))
        if self._reads:
            self.basis.refuse_transcoder(self.name)
        assert isinstance(self.features, Tensor)
        value = None if name is None else getattr(self, name)
        if name is not None and isinstance(value, Tensor):
            shapes = "a number, (f,), (rows,) or (rows, f)"
            object.__setattr__(self, name, floats(value, f"{self.name}.{name}", (1, 2), shapes))
            # (f,) for features (f,), (rows,) for features (rows, f), or (rows, f) for either.
            known = self.features.shape
            whole = value.ndim == 2 and value.shape[1] == known[-1] and (len(known) == 1 or len(value) == known[0])
            if not whole and value.shape != known[:1]:
                raise ShapeError(f"{self.name}: {name} {tuple(value.shape)} does not fit features {tuple(known)}.")
        elif value is not None and math.isinf(value):
            raise InvalidInputError(f"{self.name}({name}={value}): give a finite number.")
        if not self.features.numel() and self.error == "keep":
            raise DegenerateInputError(f"{self.name}: there is no feature, so nothing would be edited. Name one.")

    def _values(self, name: str, where: Where, acts: Tensor) -> Tensor:
        """A parameter as `(n, f)` or `(n, 1)`: a number, one per feature, one per row, or one per row and feature."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            return torch.full((1, 1), float(value), device=acts.device)
        value = value.to(acts)
        if value.ndim == 2:
            return value[where.rows]
        return value[None] if torch.as_tensor(self.features).ndim == 1 else value[where.rows, None]

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        features = torch.as_tensor(self.features, device=h.device)
        if self.error == "drop":
            return self._spliced(h, features, where)
        if features.shape[-1] == 0:
            return h
        acts = self._acts(h, features, where)
        change = self._new(acts, where) - acts
        # Below the rounding of the encoder: the activation is already what it is to be.
        change = change.masked_fill(change.abs() <= 1e-5 * acts.abs(), 0.0)
        return _changed(h, self.basis, change, features, where)

    def _acts(self, h: Tensor, features: Tensor, where: Where) -> Tensor:
        if features.ndim == 1:
            return self.basis.encode_some(h, features).to(h)
        used, place = features.unique(return_inverse=True)
        return self.basis.encode_some(h, used).to(h).gather(1, place[where.rows])

    def _spliced(self, h: Tensor, features: Tensor, where: Where) -> Tensor:
        """The reconstruction alone, with the chosen activations changed."""
        acts = self.basis.encode(h)
        at = features.expand(len(h), -1) if features.ndim == 1 else features[where.rows]
        if at.shape[1]:
            old = acts.gather(1, at)
            acts = acts.scatter(1, at, self._new(old, where).to(acts))
        return self.basis.decode(acts, h).to(h)


def _changed(h: Tensor, basis: Basis, change: Tensor, features: Tensor, where: Where) -> Tensor:
    """`h + sum_f change_f W_dec[f]`; tokens without a change stay bit-identical."""
    rows = basis.rows(features).to(h)
    written = change @ rows if features.ndim == 1 else torch.einsum("nf,nfd->nd", change, rows[where.rows])
    return torch.where((change != 0).any(1, keepdim=True), h + basis.rescaled(written, h), h)


@checked
@dataclass(frozen=True, eq=False)
class SAEClamp(_FeatureOp):
    """Sets or bounds feature activations: `x + sum_f (a'_f - a_f) W_dec[f]`.

    Attributes:
        sae: an SAE in the sae_lens form.
        features: feature indices, `(f,)`, or other ones for each batch row, `(rows, f)`.
        value: the activation to set, in the SAE's units: a number, one per feature `(f,)` (with features per row: one
            per row), or one per row and feature `(rows, f)`.
        error: "keep" what the SAE does not explain, or "drop" it and leave only the reconstruction.
        when: "always", or only where the feature is "active".
        mode: "set" a' = value; "min" a' = max(a, value), a floor; "max" a' = min(a, value), a ceiling.

    >>> from types import SimpleNamespace
    >>> d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> sae = SimpleNamespace(W_dec=d, encode=lambda x: (x @ d.T - 0.5).relu())  # activations of (2, 1): 1.5, 1.5
    >>> SAEClamp(sae, [0], 5.0)(torch.tensor([[2.0, 1.0]]))  # x + (5 - 1.5) (1, 0)
    tensor([[5.5000, 1.0000]])
    """

    sae: AnySAE
    features: Sequence[int] | Int[Tensor, "*rows f"]
    value: float | Float[Tensor, "*values"] = 0.0
    error: ErrorTerm = "keep"
    when: When = "always"
    mode: ClampMode = "set"
    per_row: ClassVar[Mapping[str, int]] = {"features": 1, "value": 1}

    def __post_init__(self) -> None:
        self._check("value")

    def _new(self, acts: Tensor, where: Where) -> Tensor:
        value = self._values("value", where, acts).expand_as(acts)
        new = {"set": value, "min": torch.maximum(acts, value), "max": torch.minimum(acts, value)}[self.mode]
        return torch.where(acts > 0, new, acts) if self.when == "active" else new

    def _row_values(self) -> dict[str, Tensor]:
        return _row_values(self, "value")


@checked
@dataclass(frozen=True, eq=False)
class SAEScale(_FeatureOp):
    """Multiplies feature activations: `x + sum_f (factor - 1) a_f W_dec[f]`. Inactive features change nothing.

    Attributes:
        sae: an SAE in the sae_lens form.
        features: feature indices, `(f,)`, or other ones for each batch row, `(rows, f)`.
        factor: a number, one per feature, per row, or both, as `SAEClamp.value`.
        error: "keep" what the SAE does not explain, or "drop" it.

    >>> from types import SimpleNamespace
    >>> d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> sae = SimpleNamespace(W_dec=d, encode=lambda x: (x @ d.T - 0.5).relu())  # activations of (2, 1): 1.5, 1.5
    >>> SAEScale(sae, [0], 2.0)(torch.tensor([[2.0, 1.0]]))  # x + 1.5 (1, 0)
    tensor([[3.5000, 1.0000]])
    """

    sae: AnySAE
    features: Sequence[int] | Int[Tensor, "*rows f"]
    factor: float | Float[Tensor, "*values"]
    error: ErrorTerm = "keep"
    per_row: ClassVar[Mapping[str, int]] = {"features": 1, "factor": 1}

    def __post_init__(self) -> None:
        self._check("factor")

    def _new(self, acts: Tensor, where: Where) -> Tensor:
        return acts * self._values("factor", where, acts)

    def _row_values(self) -> dict[str, Tensor]:
        return _row_values(self, "factor")


@checked
@dataclass(frozen=True, eq=False)
class SAEAblate(_FeatureOp):
    """Zeroes feature activations: `x - sum_f a_f W_dec[f]`. Inactive features change nothing.

    Attributes:
        sae: an SAE in the sae_lens form.
        features: feature indices, `(f,)`, or other ones for each batch row, `(rows, f)`.
        error: "keep" what the SAE does not explain, or "drop" it.

    >>> from types import SimpleNamespace
    >>> d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> sae = SimpleNamespace(W_dec=d, encode=lambda x: (x @ d.T - 0.5).relu())  # activations of (2, 1): 1.5, 1.5
    >>> SAEAblate(sae, [0])(torch.tensor([[2.0, 1.0]]))  # x - 1.5 (1, 0)
    tensor([[0.5000, 1.0000]])
    """

    sae: AnySAE
    features: Sequence[int] | Int[Tensor, "*rows f"]
    error: ErrorTerm = "keep"
    per_row: ClassVar[Mapping[str, int]] = {"features": 1}

    def __post_init__(self) -> None:
        self._check()

    def _new(self, acts: Tensor, where: Where) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(acts)


@checked
@dataclass(frozen=True, eq=False)
class SAEAdd(_FeatureOp):
    """Adds to feature activations, without encoding: `x + sum_f amount_f W_dec[f]`.

    Attributes:
        sae: an SAE in the sae_lens form; at the site that it writes also a transcoder, with error="keep".
        features: feature indices, `(f,)`, or other ones for each batch row, `(rows, f)`.
        amount: in the SAE's units: a number, one per feature, per row, or both, as `SAEClamp.value`.
        error: "keep" what the SAE does not explain, or "drop" it.

    >>> from types import SimpleNamespace
    >>> d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> sae = SimpleNamespace(W_dec=d, encode=lambda x: (x @ d.T - 0.5).relu())  # activations of (2, 1): 1.5, 1.5
    >>> SAEAdd(sae, [0], 3.0)(torch.tensor([[2.0, 1.0]]))  # x + 3 (1, 0)
    tensor([[5., 1.]])
    """

    sae: AnySAE
    features: Sequence[int] | Int[Tensor, "*rows f"]
    amount: float | Float[Tensor, "*values"]
    error: ErrorTerm = "keep"
    per_row: ClassVar[Mapping[str, int]] = {"features": 1, "amount": 1}
    strength_name: ClassVar[str | None] = "amount"

    def __post_init__(self) -> None:
        self._check("amount")

    @property
    def _reads(self) -> bool:
        return self.error == "drop"

    def _acts(self, h: Tensor, features: Tensor, where: Where) -> Tensor:  # noqa: ARG002
        return h.new_zeros(len(h), features.shape[-1])

    def _new(self, acts: Tensor, where: Where) -> Tensor:
        return acts + self._values("amount", where, acts)

    def _row_values(self) -> dict[str, Tensor]:
        return _row_values(self, "amount")

    @property
    def must_change(self) -> bool:
        some = torch.as_tensor(self.features).shape[-1] > 0
        return some and bool((torch.as_tensor(self.amount) != 0).any())


def _row_values(op: _FeatureOp, name: str) -> dict[str, Tensor]:
    """Parameters that are per row; a single axis of values means features or rows, as the features say."""
    features, value = op.features, getattr(op, name)
    assert isinstance(features, Tensor)
    found = {"features": features} if features.ndim == 2 else {}
    if isinstance(value, Tensor) and (value.ndim == 2 or (value.ndim == 1 and features.ndim == 2)):
        found[name] = value
    return found


@checked
@dataclass(frozen=True, eq=False)
class SAEAddMax(_SAEOp):
    """Adds `strength * a_max * direction`, a_max being the largest feature activation at the token.

    With `direction = W_dec[f]` this is the steering of Arad et al. 2025 (their equation 6 with the error kept); a_max
    is taken per token, so rows do not depend on each other (the reference code takes it over the batch).

    Attributes:
        sae: an SAE in the sae_lens form.
        direction: what to add; one for all rows or one per batch row.
        strength: factor; a number or one per batch row.

    >>> from types import SimpleNamespace
    >>> d = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> sae = SimpleNamespace(W_dec=d, encode=lambda x: (x @ d.T - 0.5).relu())  # activations of (2, 1): 1.5, 1.5
    >>> SAEAddMax(sae, d[0], 2.0)(torch.tensor([[2.0, 1.0]]))  # x + 2 * 1.5 (1, 0)
    tensor([[5., 1.]])
    """

    sae: AnySAE
    direction: Float[Tensor, "*rows d"]
    strength: float | Float[Tensor, " rows"] = 1.0
    per_row: ClassVar[Mapping[str, int]] = {"direction": 1, "strength": 0}
    strength_name: ClassVar[str | None] = "strength"

    def __post_init__(self) -> None:
        self.basis.refuse_transcoder(self.name)
        object.__setattr__(self, "direction", vector(self.direction, self.name))
        same_width(self.name, direction=self.direction, W_dec=self.basis.rows(torch.zeros(1, dtype=torch.long)))
        set_numbers(self, "strength")

    @classmethod
    def of_features(cls, sae: AnySAE, features: Sequence[int], strength: float | Tensor = 1.0) -> SAEAddMax:
        """One feature for all rows, or one feature per batch row."""
        rows = (basis := as_basis(sae)).rows(basis.features(features))
        return cls(sae, rows[0] if len(rows) == 1 else rows, strength)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        a_max = self.basis.rescaled(self.basis.encode(h).to(h).amax(dim=1, keepdim=True), h)
        direction, strength = self._per_token("direction", where, h), self._per_token("strength", where, h)
        return h + strength[..., None].to(h) * a_max * direction

    @property
    def must_change(self) -> bool:
        return moves(self.strength, self.direction)
