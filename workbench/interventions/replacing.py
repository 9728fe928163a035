"""Edits that put something else in place of an activation: zero, a mean, another sample, another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import EditError, InvalidInputError, ShapeError, did_you_mean
from workbench.core.tokens import TokenBatch
from workbench.interventions.op import LowRankForm, Op, Where, basis, changed, floats, project, same_width

AblateKind = Literal["zero", "mean", "resample"]


@checked
@dataclass(frozen=True, eq=False)
class Ablate(Op):
    """Replaces the activation, or its part in a subspace, by zero, by a mean, or by that of another sample.

    Attributes:
        kind: "zero"; "mean" (the reference is the mean, `(d,)`); "resample" (the reference holds samples, `(N, d)`).
        reference: see `kind`.
        directions: only the part of the activation in their span is replaced; None replaces all of it.
        seed: for "resample": with row and position it decides which sample is taken, in any batch, cached or not.

    >>> h = torch.tensor([[1.0, 2.0]])
    >>> Ablate()(h), Ablate("mean", torch.tensor([5.0, 6.0]), directions=torch.tensor([0.0, 1.0]))(h)
    (tensor([[0., 0.]]), tensor([[1., 6.]]))
    """

    kind: AblateKind = "zero"
    reference: Float[Tensor, "*samples d"] | None = None
    directions: Float[Tensor, "*k d"] | None = None
    seed: int | Int[Tensor, " rows"] = 0
    per_row: ClassVar[Mapping[str, int]] = {"seed": 0}

    def __post_init__(self) -> None:
        ndim = {"zero": 0, "mean": 1, "resample": 2}.get(self.kind)
        if ndim is None:
            raise InvalidInputError(
                f"Ablate(kind={self.kind!r}): {did_you_mean(str(self.kind), ('zero', 'mean', 'resample'))}"
            )
        if (self.reference is None) != (ndim == 0):
            raise InvalidInputError(
                f"Ablate(kind={self.kind!r}): a reference is {'needed' if ndim else 'not used'}: nothing for 'zero', "
                "the mean (d,) for 'mean', samples (N, d) for 'resample'."
            )
        if self.reference is not None:
            shapes = "(d,)" if ndim == 1 else "(N, d)"
            object.__setattr__(self, "reference", floats(self.reference, f"Ablate({self.kind})", (ndim,), shapes))
        if self.directions is not None:
            object.__setattr__(self, "directions", basis(self.directions, "Ablate"))
        if isinstance(self.seed, Tensor) and self.seed.ndim != 1:
            raise ShapeError(f"Ablate: seed {tuple(self.seed.shape)}; give a number, or (rows,) for one per row.")
        if self.reference is not None and self.directions is not None:
            same_width("Ablate", reference=self.reference, directions=self.directions)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        target = torch.zeros_like(h) if self.reference is None else self.reference.to(h)
        if target.ndim == 2 and self.kind == "resample":
            target = target[self._choice(where, len(target))]
        if self.directions is None:
            return target.expand_as(h)
        return h + project(target - h, self.directions.to(h))

    def _choice(self, where: Where, n: int) -> Int[Tensor, " n"]:
        """A number below n from seed, row and position: an integer hash (splitmix), so that any batch agrees."""
        seed = self.seed if isinstance(self.seed, Tensor) else self._seeds(where.rows)
        seed = seed[where.rows.to(seed.device)] if isinstance(self.seed, Tensor) else seed
        x = seed.to(where.positions.device) * 0x100000001B3 + where.positions
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            x = (x ^ (x >> shift)) * factor
        return x.remainder(n)

    def _seeds(self, rows: Tensor) -> Tensor:
        # Modulo 2**64, as the product with the rows is.
        return rows * 0x2545F4914F6CDD1D + ((int(self.seed) * 7919 + 2**63) % 2**64 - 2**63)

    def take(self, rows: Int[Tensor, " chosen"]) -> Op:
        return changed(self, {"seed": self.seed[rows] if isinstance(self.seed, Tensor) else self._seeds(rows)})

    @property
    def n_rows(self) -> int | None:
        return len(self.seed) if isinstance(self.seed, Tensor) else None

    @property
    def width(self) -> int | None:
        known = self.reference if self.reference is not None else self.directions
        return None if known is None else known.shape[-1]

    def low_rank(self) -> LowRankForm | None:
        if self.directions is None or self.kind == "resample":
            return None
        bias = torch.zeros_like(self.directions[0]) if self.reference is None else self.reference
        return LowRankForm(-self.directions, self.directions, project(bias[None], self.directions)[0])


@checked
@dataclass(frozen=True, eq=False)
class Replace(Op):
    """Sets the activation to a given value.

    Attributes:
        value: the new activation; one for all rows or one per batch row.

    >>> Replace(torch.tensor([7.0, 8.0]))(torch.tensor([[1.0, 2.0]]))
    tensor([[7., 8.]])
    """

    value: Float[Tensor, "*rows d"]
    per_row: ClassVar[Mapping[str, int]] = {"value": 1}

    def __post_init__(self) -> None:
        shapes = "(d,) for all rows or (rows, d) for one per row"
        object.__setattr__(self, "value", floats(self.value, "Replace", (1, 2), shapes))

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        return self._per_token("value", where or Where.of(h), h).expand_as(h)

    @property
    def width(self) -> int | None:
        return self.value.shape[-1]


@checked
@dataclass(frozen=True, eq=False)
class Patch(Op):
    """Sets the activation, or its part in a subspace, to that of another run at the same row and position.

    Attributes:
        source: activations of the other run by absolute position, `(rows, pos, d)`; make it with `Patch.of_run`.
        known: True where the other run has a token.
        directions: only the part in their span is patched; None patches all of it.

    >>> Patch(torch.tensor([[[7.0, 8.0]]]))(torch.tensor([[1.0, 2.0]]))
    tensor([[7., 8.]])
    """

    source: Float[Tensor, "rows pos d"]
    known: Bool[Tensor, "rows pos"] | None = None
    directions: Float[Tensor, "*k d"] | None = None
    per_row: ClassVar[Mapping[str, int]] = {"source": 2, "known": 1}

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", floats(self.source, "Patch", (3,), "(rows, pos, d)"))
        if self.known is None:
            object.__setattr__(self, "known", torch.ones(self.source.shape[:2], dtype=torch.bool))
        elif self.known.shape != self.source.shape[:2]:
            raise ShapeError(f"Patch: known {tuple(self.known.shape)}; the source is {tuple(self.source.shape)}.")
        if self.directions is not None:
            object.__setattr__(self, "directions", basis(self.directions, "Patch"))
            same_width("Patch", source=self.source, directions=self.directions)

    @classmethod
    def of_run(
        cls,
        acts: Float[Tensor, "rows pos *d"],
        batch: TokenBatch | Int[Tensor, "rows pos"],
        directions: Tensor | None = None,
    ) -> Patch:
        """From captured activations and the batch or ids they were captured on; padding is shifted away.

        Raises:
            ShapeError: if the two do not fit.
        """
        batch = TokenBatch.of_rows(batch) if isinstance(batch, Tensor) else batch
        if acts.shape[:2] != batch.ids.shape:
            raise ShapeError(f"Patch.of_run: activations {tuple(acts.shape)}; the batch has {tuple(batch.ids.shape)}.")
        flat = acts.detach().flatten(2).float()
        source, known = torch.zeros_like(flat), torch.zeros_like(batch.mask)
        row, column = batch.mask.nonzero(as_tuple=True)
        position = batch.positions[row, column]
        source[row, position], known[row, position] = flat[row, column], True
        return cls(source, known, directions)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        assert self.known is not None
        inside = where.positions < self.source.shape[1]
        at = where.positions.clamp_max(self.source.shape[1] - 1)
        inside = inside & self.known.to(h.device)[where.rows, at]
        if not bool(inside.all()):
            i = int((~inside).nonzero()[0])
            raise EditError(
                f"Patch: row {int(where.rows[i])} has no source activation at position {int(where.positions[i])}; the "
                f"source has {int(self.known[where.rows[i]].sum())} tokens there. Narrow the scope, e.g. to Prompt()."
            )
        target = self.source.to(h)[where.rows, at]
        return target if self.directions is None else h + project(target - h, self.directions.to(h))

    @property
    def width(self) -> int | None:
        return self.source.shape[-1]
