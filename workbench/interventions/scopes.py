"""Which tokens an edit touches: absolute positions, the same with and without padding and KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.registry import Registry
from workbench.core.wording import Marker, Wording
from workbench.interventions.step import Step, ends_of


class Scope(OneLine):
    """A set of tokens; combine with `&`, `|` and `~`. Padding is never part of it."""

    how_to_make: ClassVar[str] = "A scope is one such as Last() or Generated()."
    registry: ClassVar[Registry[type[Scope]]] = Registry("scope", "workbench.interventions")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__name__.startswith("_"):
            Scope.registry.add(cls.__name__, cls)

    @property
    def touches_prompt(self) -> bool:
        """Whether this scope may hold prompt tokens; False is certain, True is not."""
        return True

    @property
    def only_last(self) -> bool:
        """Whether this scope certainly holds no prompt token but the last of each row."""
        return False

    @property
    def needs_history(self) -> bool:
        """Whether this scope looks at the ids of the whole row."""
        return any(inner.needs_history for inner in self.inner_scopes())

    @property
    def n_rows(self) -> int | None:
        """Number of batch rows that this scope is for, or None for any."""
        sizes = {inner.n_rows for inner in self.inner_scopes()} - {None}
        if len(sizes) > 1:
            raise ShapeError(f"{self}: its parts are for {first_few(sorted(map(str, sizes)))} rows; they must agree.")
        return next(iter(sizes), None)

    def resolve(self, wording: Wording) -> Scope:
        """The same scope for one tokenizer: with what its texts stand for there."""
        return self._mapped(lambda inner: inner.resolve(wording))

    def inner_scopes(self) -> list[Scope]:
        """The scopes that this one is made of."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [value for value in values if isinstance(value, Scope)]

    def _mapped(self, change: Callable[[Scope], Scope]) -> Scope:
        parts = [change(inner) for inner in self.inner_scopes()]
        return type(self)(*parts) if parts else self

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        """True where this forward pass holds a token of the scope; padding may be included here."""
        raise NotImplementedError

    def mask(self, step: Step) -> Bool[Tensor, "batch pos"]:
        """True at the tokens to edit; padding excluded."""
        return self.tokens(step) & step.is_real

    @property
    def parts(self) -> tuple[Scope, ...]:
        """Single positions that were asked for by name; each of them has to exist in some row."""
        return ()

    def wanted_rows(self, step: Step) -> Bool[Tensor, " batch"] | None:  # noqa: ARG002
        """The rows that must hold a token, because their positions were asked for by name; None for no row."""
        return None

    def only_rows(self, step: Step) -> Bool[Tensor, " batch"] | None:  # noqa: ARG002
        """The rows of which this scope holds every token, if it chooses among rows only."""
        return None

    @property
    def is_empty(self) -> bool:
        """Whether this scope certainly holds no token, as where `take` chose other rows than it is about."""
        return False

    def take(self, rows: Int[Tensor, " chosen"]) -> Scope:
        """The same scope for a choice of batch rows."""
        return self._mapped(lambda inner: inner.take(rows))

    def __and__(self, other: Scope) -> Scope:
        return Both(self, other)

    def __or__(self, other: Scope) -> Scope:
        return Either(self, other)

    def __invert__(self) -> Scope:
        return Not(self)


@checked
@dataclass(frozen=True)
class All(Scope):
    """Every token, prompt and generated."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return step.is_real


@checked
@dataclass(frozen=True)
class Prompt(Scope):
    """Every prompt token."""

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return step.is_prompt


@checked
@dataclass(frozen=True)
class Generated(Scope):
    """Every generated token, from the first one that is fed back into the model."""

    @property
    def touches_prompt(self) -> bool:
        return False

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return ~step.is_prompt


@checked
@dataclass(frozen=True)
class Last(Scope):
    """The last prompt token of each row."""

    @property
    def only_last(self) -> bool:
        return True

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return step.is_prompt & (step.position == step.prompt_length[:, None] - 1)


@checked
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

    def wanted_rows(self, step: Step) -> Bool[Tensor, " batch"] | None:
        return torch.ones_like(step.row, dtype=torch.bool)

    @property
    def only_last(self) -> bool:
        return set(self.positions) == {-1}

    @property
    def parts(self) -> tuple[Scope, ...]:
        return tuple(Pos(position) for position in self.positions)


@checked
@dataclass(frozen=True)
class NotPrefix(Scope):
    """Every token but the first `n` of its row; `NotPrefix(1)` leaves out BOS, or the attention sink in its place.

    `NotPrefix()` leaves out all that the tokenizer puts in front of a text, and at least one token.
    """

    n: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 0:
            raise InvalidInputError(f"NotPrefix({self.n}): give the number of tokens to leave out, 0 or more.")

    def resolve(self, wording: Wording) -> Scope:
        return NotPrefix(max(1, wording.n_prefix)) if self.n is None else self

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        if self.n is None:
            raise InvalidInputError("NotPrefix(): its length is known when a Model makes the plan; give a number here.")
        return step.position >= self.n


@checked
@dataclass(frozen=True)
class TokenIs(Scope):
    """Every token whose id is one of these; a text stands for the single tokens that read so in running text.

    A space in front counts: " the" and "the" are two tokens where the vocabulary has both, also under tokenizers that
    put a space in front of every text.
    """

    ids: tuple[int | str, ...]

    def __init__(self, *ids: int | str) -> None:
        if not ids:
            raise DegenerateInputError("TokenIs(): no token id given, so nothing would be edited.")
        object.__setattr__(self, "ids", ids)

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        if step.ids is None:
            raise DegenerateInputError("TokenIs: the model was given embeddings, so there are no token ids to compare.")
        return torch.isin(step.ids, torch.tensor(_numbers(self, self.ids), device=step.ids.device))

    def resolve(self, wording: Wording) -> Scope:
        return TokenIs(*(i for part in self.ids for i in ([part] if isinstance(part, int) else wording.tokens(part))))


@checked
@dataclass(frozen=True)
class After(Scope):
    """Every token behind a marker: `After("[/INST]")`, `After("</think>")`, or token ids.

    Attributes:
        marker: the text, or its token ids. A text is found however the row cuts it into tokens; where it ends inside
            a token, the next token is the first one behind it.
        occurrence: "first" in the row, prompt or generated; or the "last" one in the prompt.
    """

    marker: str | tuple[int, ...]
    occurrence: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        if isinstance(self.marker, list):
            object.__setattr__(self, "marker", tuple(self.marker))
        if not self.marker:
            raise DegenerateInputError("After: the marker is empty, so nothing would be edited.")
        if self.occurrence not in ("first", "last"):
            raise InvalidInputError(f"After(occurrence={self.occurrence!r}): use 'first' or 'last'.")

    @property
    def needs_history(self) -> bool:
        return True

    def resolve(self, wording: Wording) -> Scope:
        if not isinstance(self.marker, str):
            return self
        out = After(self.marker, self.occurrence)
        object.__setattr__(out, "_text", wording.marker(self.marker))
        return out

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        if step.history is None or step.history_real is None:
            raise DegenerateInputError(
                "After: the token ids of the whole row are not known. Enter the plan before the prompt is run, and "
                "give the model input_ids, not embeddings."
            )
        text: Marker | None = getattr(self, "_text", None)
        if text is None:
            found = ends_of(_numbers(self, self.marker), step.history, step.history_real)
        else:
            found = text.ends(step.history, step.history_real)
        column = torch.arange(found.shape[1], device=found.device)
        if self.occurrence == "last":
            ends = step.history_real.long().cumsum(1) > step.prompt_length[:, None]
            found &= ~ends
        some = found.any(1)
        end = found.long().argmax(1) if self.occurrence == "first" else (found.long() * (column + 1)).argmax(1)
        return (step.column > end[:, None]) & some[:, None]


@checked
@dataclass(frozen=True)
class Both(Scope):
    """Tokens in both scopes; written `left & right`."""

    left: Scope
    right: Scope

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return self.left.tokens(step) & self.right.tokens(step)

    @property
    def touches_prompt(self) -> bool:
        return self.left.touches_prompt and self.right.touches_prompt

    @property
    def only_last(self) -> bool:
        return self.left.only_last or self.right.only_last

    def wanted_rows(self, step: Step) -> Bool[Tensor, " batch"] | None:
        wanted, rows = self.left.wanted_rows(step), self.right.only_rows(step)
        # Behind another scope than rows, a position may be left out on purpose.
        return None if wanted is None or rows is None else wanted & rows.to(wanted.device)

    @property
    def is_empty(self) -> bool:
        return self.left.is_empty or self.right.is_empty

    def __repr__(self) -> str:
        return f"({self.left} & {self.right})"


@checked
@dataclass(frozen=True)
class Either(Scope):
    """Tokens in one scope or the other; written `left | right`."""

    left: Scope
    right: Scope

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return self.left.tokens(step) | self.right.tokens(step)

    @property
    def touches_prompt(self) -> bool:
        return self.left.touches_prompt or self.right.touches_prompt

    @property
    def only_last(self) -> bool:
        return self.left.only_last and self.right.only_last

    @property
    def is_empty(self) -> bool:
        return self.left.is_empty and self.right.is_empty

    def __repr__(self) -> str:
        return f"({self.left} | {self.right})"


@checked
@dataclass(frozen=True)
class Not(Scope):
    """Tokens outside a scope; written `~scope`."""

    inner: Scope

    def tokens(self, step: Step) -> Bool[Tensor, "batch pos"]:
        return ~self.inner.tokens(step)

    @property
    def touches_prompt(self) -> bool:
        return not isinstance(self.inner, (Prompt, All))

    def __repr__(self) -> str:
        return f"~{self.inner}"


def _numbers(scope: Scope, ids: str | tuple[int | str, ...]) -> list[int]:
    if isinstance(ids, str) or any(isinstance(i, str) for i in ids):
        raise InvalidInputError(f"{scope}: texts become token ids when a Model makes the plan; give ids here.")
    return [int(i) for i in ids]
