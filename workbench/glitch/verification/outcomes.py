"""What a test found out about each token, beside random controls."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(frozen=True)
class Outcome:
    """The result of one token, which is under suspicion or a random control."""

    token_id: int
    control: bool

    @property
    def role(self) -> str:
        """Why it was tested."""
        return "control" if self.control else "candidate"


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class Outcomes(Generic[T]):
    """Results of tokens and controls, tested alike; controls come after candidates."""

    tested: tuple[T, ...]

    @property
    def candidates(self) -> tuple[T, ...]:
        """The tokens under suspicion."""
        return tuple(one for one in self.tested if one.role == "candidate")

    @property
    def controls(self) -> tuple[T, ...]:
        """The random ordinary tokens."""
        return tuple(one for one in self.tested if one.control)

    def of(self, token_id: int) -> T | None:
        """The result of one token, or None if it was not tested."""
        return self._by_token.get(token_id)

    @functools.cached_property
    def _by_token(self) -> dict[int, T]:
        return {one.token_id: one for one in self.tested}
