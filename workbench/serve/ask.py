"""Requests of the page, checked before anything runs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted, number, setting
from workbench.core.records import from_jsonable
from workbench.steering.sweep.options import ScopeName

Mode = Literal["steer", "clamp", "scale", "ablate"]

MAX_NEW_TOKENS = 2000
"""Longest continuation; every token is measured under every model and drawn."""
MAX_PROMPT = 100_000
"""Characters of a prompt."""
MAX_PROMPT_TOKENS = 8192
"""Tokens of a prompt, which every model reads twice: once to write and once to measure."""
MAX_EDITS = 64
"""Features that one run edits."""
_NOTHING: dict[str, tuple[float, str]] = {
    "steer": (0.0, "adds nothing"),
    "scale": (1.0, "leaves the activation as it is"),
}


@dataclass(frozen=True, kw_only=True)
class FeatureEdit:
    """One feature and its edit.

    Attributes:
        feature: its index.
        mode: "steer" adds `strength * a_max * W_dec[f]`, a_max being the largest feature activation at the token;
            "clamp" sets the activation to `strength`; "scale" multiplies it by `strength`; "ablate" sets it to 0.
        strength: see `mode`; "ablate" has none.
    """

    feature: int
    mode: Mode = "steer"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise InvalidInputError(f"Feature {self.feature}: strength {self.strength} is no finite number. Give one.")
        useless, why = _NOTHING.get(self.mode, (math.nan, ""))
        if self.strength == useless:
            raise InvalidInputError(
                f"Feature {self.feature}: {self.mode} with strength {setting(self.strength)} {why}. Give another "
                "strength, or remove the feature; the unsteered text is always shown."
            )

    def __str__(self) -> str:
        amount = setting(self.strength)
        amounts = {"steer": f" {amount} × a_max", "clamp": f" at {amount}", "scale": f" × {amount}"}
        return f"{self.mode} #{self.feature}{amounts.get(self.mode, '')}"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One run of the playground.

    Attributes:
        prompt: what is continued.
        chat: the prompt is a user message and goes through the chat template.
        max_new_tokens: longest continuation.
        temperature: 0 takes the most probable token at every step.
        seed: of sampling, the same for all texts, and of the random direction.
        scope: which tokens are edited: "last+generated" or "all".
        control: whether a random direction of equal norm is run as well.
        edits: of features; without any, only the unsteered text is written.
    """

    prompt: str
    chat: bool = False
    max_new_tokens: int = 40
    temperature: float = 0.7
    seed: int = 0
    scope: ScopeName = "last+generated"
    control: bool = True
    edits: tuple[FeatureEdit, ...] = ()

    def __post_init__(self) -> None:
        if len(self.edits) > MAX_EDITS:
            raise InvalidInputError(
                f"{counted(len(self.edits), 'edits')}: at most {MAX_EDITS} are made at once. Remove some."
            )
        if not self.prompt:
            raise InvalidInputError("The prompt is empty. Write something to be continued.")
        if len(self.prompt) > MAX_PROMPT:
            raise InvalidInputError(
                f"The prompt has {counted(len(self.prompt), 'characters')}; the playground takes "
                f"{number(MAX_PROMPT)}. Shorten it."
            )
        if not 0 <= self.seed < 2**63:
            raise InvalidInputError(f"Seed {self.seed}: give 0 to {2**63 - 1}.")
        if any(0xD800 <= ord(char) <= 0xDFFF for char in self.prompt):
            raise InvalidInputError("The prompt holds half a character (a lone surrogate). Remove it.")
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise InvalidInputError(
                f"{self.max_new_tokens} new tokens: the playground writes 1 to {MAX_NEW_TOKENS}. Choose one of these."
            )
        if not 0 <= self.temperature < math.inf:
            raise InvalidInputError(f"Temperature {self.temperature}: give 0 (most probable token) or more.")
        counts = Counter(edit.feature for edit in self.edits)
        if twice := [feature for feature, n in counts.items() if n > 1]:
            raise InvalidInputError(f"Feature {min(twice)} is there twice. Give each feature one mode and strength.")

    @classmethod
    def read(cls, data: object) -> Ask:
        """The run that JSON describes.

        Raises:
            InvalidInputError: for a value that can't be used.
            UnknownConfigKeyError: for an unknown name.
        """
        return from_jsonable(cls, data)
