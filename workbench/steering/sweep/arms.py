"""The texts of a steering run: every feature at every strength on every prompt, with every measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from workbench.core.jsontext import Record
from workbench.interventions.proof import EditReport
from workbench.steering.sweep.measures import DEGENERATE_COUNT

ARM_WORDS = {
    "feature": "features", "unsteered": "unsteered", "random": "random directions of the same norm",
    "negated": "the same features, subtracted", "prompt": "instruction in the prompt, no edit",
    "matched": "random features, their own tokens", "control": "control features, their own tokens",
}  # fmt: skip
OWN_TOKENS = ("matched", "control")
"""Arms whose features are others than those that are steered, so that other tokens are counted."""


@dataclass(frozen=True)
class EditSummary:
    """What the edits of one arm at one strength did.

    Attributes:
        strength: factor on a_max.
        tokens: tokens edited.
        mean_norm: mean L2 norm that reached the model.
        share: of the norm of an edited activation, mean over the tokens.
    """

    strength: float
    tokens: int
    mean_norm: float
    share: float

    @classmethod
    def of(cls, strength: float, reports: Sequence[EditReport]) -> EditSummary:
        """The reports of several batches as one, weighted by their tokens."""
        tokens = sum(r.tokens for r in reports)
        norm, share = (sum(getattr(r, name) * r.tokens for r in reports) for name in ("mean_norm_applied", "share"))
        return cls(strength, tokens, norm / max(tokens, 1), share / max(tokens, 1))


@dataclass(frozen=True, eq=False, kw_only=True)
class ArmTexts:
    """The texts of the arms of one kind, at all strengths.

    Attributes:
        name: the kind: a key of `ARM_WORDS`, or the name of a method.
        features: what the rows of each measure are: features, or concepts.
        strengths: of the edits; (0,) for arms without one.
        values: by name of the measure.
        texts: continuations by feature, strength and prompt.
        harm: increase of the loss on plain texts, by feature and strength; None where nothing is edited.
        edits: one summary per strength.
    """

    name: str
    features: tuple[int | str, ...]
    strengths: tuple[float, ...]
    values: Mapping[str, Float[np.ndarray, "features strengths prompts"]]
    texts: tuple[tuple[tuple[str, ...], ...], ...]
    harm: Float[np.ndarray, "features strengths texts"] | None = None
    edits: tuple[EditSummary, ...] = field(default=())

    def at(self, name: str, chosen: Sequence[int], prompts: Sequence[int]) -> Float[np.ndarray, "features prompts"]:
        """One measure of each feature at the strength chosen for it, on some prompts."""
        return self.values[name][np.arange(len(self.features)), list(chosen)][:, list(prompts)]

    def rows(self, prompts: Sequence[str]) -> Iterator[Record]:
        """Every text with its measures, as plain rows."""
        for f, feature in enumerate(self.features):
            for s, strength in enumerate(self.strengths):
                for p, prompt in enumerate(prompts):
                    measured = {name: float(value[f, s, p]) for name, value in self.values.items()}
                    head = {"arm": self.name, "feature": feature, "strength": strength, "prompt": prompt}
                    yield {**head, "text": self.texts[f][s][p], **measured}


def degenerate(count: Float[np.ndarray, "features prompts"]) -> Float[np.ndarray, "features prompts"]:
    """1 where a text has more than three of the feature's tokens: repetition rather than text."""
    return (count > DEGENERATE_COUNT).astype(np.float64)
