"""How a steering run is done: lengths, sampling, scope, and what else is known about the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, did_you_mean
from workbench.features.scores.table import FeatureTable
from workbench.hooks.sites import Site
from workbench.interventions.scopes import All, Generated, Last, Scope
from workbench.steering.sweep.prompts import PLAIN_TEXTS
from workbench.steering.sweep.rows import Writing

ScopeName = Literal["last+generated", "all"]
Size = Literal["token", "dataset"]
SCOPES: dict[str, Scope] = {"last+generated": Last() | Generated(), "all": All()}
SUCCESS_KS = (1, 5, 20)


@checked
@dataclass(frozen=True, kw_only=True)
class SteerOptions(OneLine):
    """Details of a steering run.

    Attributes:
        new_tokens: longest continuation.
        seed: of sampling and of the random directions. Rows of the same prompt share their random numbers in all arms.
        temperature: of sampling.
        scope: "last+generated" steers the last prompt token and every generated one, "all" the whole prompt as well.
        k: logit-lens tokens that count as the feature's.
        batch_size: rows per forward pass.
        stop: strings that end a continuation; the paper's code stops at ".".
        a_max: what strengths multiply: "token" is the largest feature activation at the token that is steered, as in
            the paper; "dataset" each feature's own largest activation in `table`, which needs no encoder.
        table: scores of the features; gives frequencies, to match random features on, and largest activations.
        site: where to steer; the SAE's own site by default.
        plain_texts: ordinary texts on which the harm of the edits is measured; none leaves it out.
    """

    new_tokens: int = 20
    seed: int = 0
    temperature: float = 0.7
    scope: ScopeName = "last+generated"
    k: int = 20
    batch_size: int = 128
    stop: tuple[str, ...] = ()
    a_max: Size = "token"
    table: FeatureTable | None = None
    site: str | Site | None = None
    plain_texts: Sequence[str] = PLAIN_TEXTS

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InvalidInputError(f"SteerOptions(scope={self.scope!r}): {did_you_mean(self.scope, tuple(SCOPES))}")
        if self.new_tokens < 2 or self.batch_size < 1 or self.k < 1:
            raise InvalidInputError(
                f"SteerOptions(new_tokens={self.new_tokens}, batch_size={self.batch_size}, k={self.k}): new_tokens "
                "must be at least 2, batch_size and k at least 1."
            )
        if self.a_max not in ("token", "dataset"):
            raise InvalidInputError(
                f"SteerOptions(a_max={self.a_max!r}): {did_you_mean(self.a_max, ('token', 'dataset'))}"
            )
        if self.a_max == "dataset" and self.table is None:
            raise InvalidInputError(
                "SteerOptions(a_max='dataset'): the largest activations come from a feature table. Give table=..."
            )

    @property
    def writing(self) -> Writing:
        """How continuations are written."""
        return Writing(
            new_tokens=self.new_tokens, scope=SCOPES[self.scope], edits_prompt=self.scope == "all",
            temperature=self.temperature, seed=self.seed, stop=self.stop, batch_size=self.batch_size,
        )  # fmt: skip

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of generation success at k that are counted."""
        return tuple(sorted({*(k for k in SUCCESS_KS if k < self.k), self.k}))
