"""Which tokens an edit touches: absolute positions, the same with and without padding and KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import DegenerateInputError, ShapeError


@dataclass(frozen=True, eq=False)
class Step:
    """What is known about the tokens of one forward pass.

    Attributes:
        ids: token ids, or None when the model was given embeddings.
        column: column of each token in the whole sequence, padding counted.
        position: absolute position of each token in its row, padding not counted.
        prompt_length: number of real prompt tokens per row.
        is_real: False at padding.
        is_prompt: True where the token belongs to the prompt, False where it was generated.
    """

    ids: Int[Tensor, "batch pos"] | None
    column: Int[Tensor, " pos"]
    position: Int[Tensor, "batch pos"]
    prompt_length: Int[Tensor, " batch"]
    is_real: Bool[Tensor, "batch pos"]
    is_prompt: Bool[Tensor, "batch pos"]


class Scope:
    """A set of tokens; combine with `&`, `|` and `~`. Padding is never part of it."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        """True where this forward pass holds a token of the scope; padding may be included here."""
        raise NotImplementedError

    def mask(self, step: Step) -> Bool[Tensor, "batch pos"]:
        """True at the tokens to edit; padding excluded."""
        return self.tokens(step) & step.is_real

    def take(self, rows: Int[Tensor, " chosen"]) -> Scope:  # noqa: ARG002
        """The same scope for a choice of batch rows."""
        return self

    def __and__(self, other: Scope) -> Scope:
        return _Combined(self, other, torch.logical_and, "&")

    def __or__(self, other: Scope) -> Scope:
        return _Combined(self, other, torch.logical_or, "|")

    def __invert__(self) -> Scope:
        return _Not(self)


@dataclass(frozen=True)
class All(Scope):
    """Every token, prompt and generated."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return step.is_real


@dataclass(frozen=True)
class Prompt(Scope):
    """Every prompt token."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return step.is_prompt


@dataclass(frozen=True)
class Generated(Scope):
    """Every generated token, from the first one that is fed back into the model."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return ~step.is_prompt


@dataclass(frozen=True)
class Last(Scope):
    """The last prompt token of each row."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return step.is_prompt & (step.position == step.prompt_length[:, None] - 1)


@dataclass(frozen=True)
class Pos(Scope):
    """Absolute positions in the row; negative ones count from the end of the prompt."""

    positions: tuple[int, ...]

    def __init__(self, *positions: int) -> None:
        if not positions:
            raise DegenerateInputError("Pos(): no position given, so nothing would be edited. Write Pos(0) or Pos(-1).")
        object.__setattr__(self, "positions", positions)

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        hit = torch.zeros_like(step.is_real)
        for position in self.positions:
            wanted = position if position >= 0 else step.prompt_length[:, None] + position
            hit |= step.position == wanted
        return hit


@dataclass(frozen=True)
class TokenIs(Scope):
    """Every token whose id is one of these."""

    ids: tuple[int, ...]

    def __init__(self, *ids: int) -> None:
        if not ids:
            raise DegenerateInputError("TokenIs(): no token id given, so nothing would be edited.")
        object.__setattr__(self, "ids", ids)

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        if step.ids is None:
            raise DegenerateInputError("TokenIs: the model was given embeddings, so there are no token ids to compare.")
        return torch.isin(step.ids, torch.tensor(self.ids, device=step.ids.device))


@dataclass(frozen=True, eq=False)
class Mask(Scope):
    """An explicit choice of prompt tokens: True where the batch column is to be edited."""

    chosen: Bool[Tensor, "batch pos"]

    def __post_init__(self) -> None:
        if self.chosen.ndim != 2 or not bool(self.chosen.any()):
            raise DegenerateInputError(
                f"Mask of shape {tuple(self.chosen.shape)} chooses no token; nothing would be edited."
            )

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        if self.chosen.shape[0] != step.is_real.shape[0]:
            raise ShapeError(f"Mask has {self.chosen.shape[0]} rows; the batch has {step.is_real.shape[0]}.")
        chosen = self.chosen.to(step.column.device)
        inside = step.column < chosen.shape[1]
        return chosen[:, step.column.clamp_max(chosen.shape[1] - 1)] & inside

    def take(self, rows: Int[Tensor, " chosen"]) -> Scope:
        return Mask(self.chosen[rows])


@dataclass(frozen=True)
class _Combined(Scope):
    left: Scope
    right: Scope
    combine: Callable[[Tensor, Tensor], Tensor]
    sign: str

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return self.combine(self.left.tokens(step), self.right.tokens(step))

    def take(self, rows: Int[Tensor, " chosen"]) -> Scope:
        return _Combined(self.left.take(rows), self.right.take(rows), self.combine, self.sign)

    def __repr__(self) -> str:
        return f"({self.left} {self.sign} {self.right})"


@dataclass(frozen=True)
class _Not(Scope):
    inner: Scope

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return ~self.inner.tokens(step)

    def take(self, rows: Int[Tensor, " chosen"]) -> Scope:
        return _Not(self.inner.take(rows))

    def __repr__(self) -> str:
        return f"~{self.inner}"
