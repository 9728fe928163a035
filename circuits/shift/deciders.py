"""Who decides which features carry the spurious attribute, and from what information."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import number
from workbench.core.registry import Registry

Decision = Literal["spurious", "intended", "unsure"]
Rows = Float[np.ndarray, " rows"]


@checked
@dataclass(frozen=True)
class Node(OneLine):
    """One SAE feature at one site."""

    site: str
    feature: int

    def __str__(self) -> str:
        return f"{self.site}/{self.feature}"

    @classmethod
    def of(cls, name: str) -> Node:
        """The node of a name such as "resid_post.15/3036".

        Raises:
            InvalidInputError: if it is none.
        """
        site, _, feature = name.rpartition("/")
        if not site or not feature.isdecimal():
            raise InvalidInputError(f"{name!r} is no feature. A name is written resid_post.15/3036: site, then number.")
        return cls(site, int(feature))


@checked
@dataclass(frozen=True)
class TokenContext(OneLine):
    """A token on which a feature is active, with the text around it."""

    before: str
    token: str
    after: str


@dataclass(frozen=True, eq=False)
class BalancedEvidence:
    """What only an oracle may see: pooled activations on balanced training rows, with both labels.

    Attributes:
        acts: pooled activation per row.
        label: 0 or 1 per row.
        spurious: the label that the row's attribute goes with in training.
    """

    acts: Rows
    label: Rows
    spurious: Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureDossier(OneLine):
    """The evidence on one feature.

    Attributes:
        node: the feature.
        effect: how much it supports the label on the ambiguous set, in logits.
        acts: pooled activation on each ambiguous training text.
        swapped: the same after the spurious attribute of the text was swapped, all else equal; None without twins.
        label: ambiguous label, 0 or 1 per row.
        top_tokens: tokens with the largest activation, with it.
        spurious_share: share of its activation that falls on words of the spurious lexicon; None without one.
        target_share: share that falls on words of the label; None without a list of them.
        n_tokens: tokens on which it is active.
        balanced: given to oracles only.
        contexts: the texts around its largest activations, one per text.
    """

    node: Node
    effect: float
    acts: Rows
    swapped: Rows | None
    label: Rows
    top_tokens: tuple[tuple[str, float], ...]
    spurious_share: float | None
    target_share: float | None
    n_tokens: int
    balanced: BalancedEvidence | None = None
    contexts: tuple[TokenContext, ...] = ()


@checked
@dataclass(frozen=True)
class Verdict(OneLine):
    """A judge's decision on one feature.

    Attributes:
        node: the feature.
        decision: "spurious" features are ablated; the others stay.
        score: the judge's statistic; its meaning is in `why`.
        why: the reason in words.
    """

    node: Node
    decision: Decision
    score: float
    why: str


@runtime_checkable
class Decider(Protocol):
    """Decides feature by feature. `information` says what it looks at; only oracles get balanced labels."""

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def information(self) -> str:
        """What the judge uses, in words."""
        ...

    @property
    def is_oracle(self) -> bool:
        """Whether it is given balanced labels."""
        ...

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        ...


DECIDERS: Registry[Callable[[], Decider]] = Registry("judge of features", package="circuits.shift.judging")
"""Judges by the name that `circuits.shift(judge=...)` takes; a file in `circuits.shift.judging` registers its own."""


@DECIDERS.register("statistics")
@checked
@dataclass(frozen=True)
class StatisticsDecider(OneLine):
    """Spurious if swapping the attribute in the text undoes more than half of the feature's difference between labels.

    With y = -1, +1 the ambiguous label, a the pooled activation, a' the one after the swap and s the side on which the
    feature fires more: `D = 2 mean(s y (a - mean a))` is the difference between labels and `G = mean(s y (a - a'))` the
    part that goes with the attribute. The score is the z statistic of `G - D/2` over training texts: above `z` the
    feature is spurious, below `-z` it belongs to the label, between the two it is left alone.

    Attributes:
        z: how many standard errors a decision needs.
        min_tokens: features active on fewer tokens are not judged.
    """

    z: float = 2.0
    min_tokens: int = 5

    def __post_init__(self) -> None:
        if self.z < 0 or self.min_tokens < 0:
            raise InvalidInputError(
                f"StatisticsDecider(z={self.z}, min_tokens={self.min_tokens}): both must be 0 or more."
            )

    name = "statistics"
    information = (
        "ambiguous training texts with their labels, and each text with its gendered words swapped (no label, "
        "no test row); "
        "so it is told what the spurious attribute is, but not which training row would be right"
    )
    is_oracle = False

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        if dossier.swapped is None:
            raise MismatchError("StatisticsDecider: the dossier holds no swapped texts. Give the task twins.")
        if dossier.n_tokens < self.min_tokens:
            return Verdict(dossier.node, "unsure", 0.0, f"active on {dossier.n_tokens} tokens only")
        between, swapped, score = swap_statistics(dossier.acts, dossier.swapped, dossier.label)
        decision: Decision = "spurious" if score > self.z else "intended" if score < -self.z else "unsure"
        share = swapped / between if between else float("nan")
        why = (
            f"swapping the attribute undoes a share of {number(share)} of its difference between labels "
            f"(z = {number(score)}){_on_words(dossier, '; ')}"
        )
        return Verdict(dossier.node, decision, score, why)


def swap_statistics(acts: Rows, swapped: Rows, label: Rows) -> tuple[float, float, float]:
    """Difference between labels `D`, the part `G` of it that goes with the swap, and z of `G - D/2`.

    >>> swap_statistics(np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0, 0.0]))
    (1.0, 1.0, inf)
    """
    y = 2.0 * label - 1.0
    centred = acts - acts.mean()
    side = 1.0 if float((y * centred).mean()) >= 0 else -1.0
    half, moved = side * y * centred, side * y * (acts - swapped)
    excess = moved - half
    spread = float(excess.std(ddof=1)) / math.sqrt(len(excess))
    centre = float(excess.mean())
    score = centre / spread if spread > 0 else math.copysign(math.inf, centre) if centre else 0.0
    return 2 * float(half.mean()), float(moved.mean()), score


@DECIDERS.register("lexicon")
@checked
@dataclass(frozen=True)
class LexiconDecider(OneLine):
    """Spurious if most of the feature's activation falls on words of the spurious lexicon, more than on label words.

    Attributes:
        share: the share of activation that a decision needs.
    """

    share: float = 0.5

    name = "lexicon"
    information = (
        "which words of the ambiguous training texts the feature fires on, against two declared word lists; no label"
    )
    is_oracle = False

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        ours, theirs = dossier.spurious_share, dossier.target_share
        if ours is None or theirs is None:
            raise MismatchError("LexiconDecider: the dossier holds no shares of words. Give the task both word lists.")
        spurious, intended = ours >= self.share and ours > theirs, theirs >= self.share and theirs > ours
        why = _on_words(dossier)
        return Verdict(
            dossier.node, "spurious" if spurious else "intended" if intended else "unsure", ours - theirs, why
        )


@DECIDERS.register("oracle")
@dataclass(frozen=True)
class OracleDecider(OneLine):
    """Spurious if, on balanced training rows, the activation differs more with the attribute than with the label.

    The score is the difference of the two standardised mean differences.
    """

    name = "oracle"
    information = "balanced training rows with both labels, which a user with a spurious correlation does not have"
    is_oracle = True

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        if dossier.balanced is None:
            raise MismatchError(
                "OracleDecider: the dossier holds no balanced evidence. Pass it through circuits.shift, which adds it."
            )
        seen = dossier.balanced
        by_label, by_spurious = (_standardised(seen.acts, part) for part in (seen.label, seen.spurious))
        score = abs(by_spurious) - abs(by_label)
        why = (
            f"on balanced rows differs by {number(by_spurious)} sd with the attribute, {number(by_label)} sd with the "
            "label"
        )
        return Verdict(dossier.node, "spurious" if score > 0 else "intended", score, why)


def _on_words(dossier: FeatureDossier, before: str = "") -> str:
    """The shares of words in a sentence, nothing without word lists."""
    if dossier.spurious_share is None or dossier.target_share is None:
        return ""
    return (
        f"{before}a share of {number(dossier.spurious_share)} of its activation is on spurious words, "
        f"{number(dossier.target_share)} on label words"
    )


def _standardised(acts: np.ndarray, part: np.ndarray) -> float:
    spread = float(acts.std())
    return float(acts[part == 1].mean() - acts[part == 0].mean()) / spread if spread else 0.0
