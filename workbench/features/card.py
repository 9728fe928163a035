"""The card of one feature: all that is known about it, as plain values for the page and the notebook."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.display import OneLine
from workbench.core.stats import Estimate
from workbench.judges.protocol import Cost


@dataclass(frozen=True)
class Window(OneLine):
    """A stretch of text with the activations of one feature.

    Attributes:
        tokens: text of each token; a piece of a character as `<0xNN>`.
        values: activation of the feature at each token, 0 where it is silent, None where the token was left out.
        peak: index of the token with the largest activation.
        stratum: "top", or the decile of the peak among those of the feature's packed rows, "decile 1" the strongest.
        row: packed row in the store.
        document: document in the source.
    """

    tokens: tuple[str, ...]
    values: tuple[float | None, ...]
    peak: int
    stratum: str
    row: int
    document: int


@dataclass(frozen=True)
class LensToken(OneLine):
    """A token that a feature's decoder row promotes (positive logit) or suppresses, through the final norm."""

    token: str
    token_id: int
    logit: float


@dataclass(frozen=True)
class Neighbour(OneLine):
    """Another feature that is close.

    Attributes:
        kind: "activation" (correlation of activations on the same tokens) or "decoder" (cosine of decoder rows).
        value: the correlation or cosine.
        jaccard: share of the tokens on which either is active that both are active on; None where not measured.
        null: value that a random feature reaches (95th percentile); a neighbour must exceed it.
    """

    feature: int
    kind: str
    value: float
    jaccard: float | None
    null: float


@dataclass(frozen=True)
class Explanation(OneLine):
    """The meaning of a feature in words, and how well the words predict it on held-out documents.

    Attributes:
        text: the explanation, such as "token is one of ' dog', ' cat'".
        method: "rule" or the name of the judge.
        scores: by name ("detection", "fuzzing", ...): balanced accuracy, 0.5 is chance.
        controls: the same scores of another feature's explanation ("shuffled").
        n_windows: held-out windows that were used.
        cost: of the judge's answers.
    """

    text: str
    method: str
    scores: dict[str, Estimate]
    controls: dict[str, Estimate]
    n_windows: int
    cost: Cost = Cost()


@dataclass(frozen=True)
class SteeringExample(OneLine):
    """One prompt continued with the feature added, and its controls.

    Attributes:
        strength: multiple of the largest activation.
        steered: continuation with the feature.
        unsteered: continuation without.
        random: continuation with a random direction of equal norm.
    """

    prompt: str
    strength: float
    steered: str
    unsteered: str
    random: str


@dataclass(frozen=True, kw_only=True)
class FeatureCard(OneLine):
    """Everything that is shown of one feature; an empty tuple or None means that it was not measured.

    Attributes:
        frequency: share of the read tokens on which it is active.
        n_tokens: tokens that were read.
        flags: any of "dead", "dense", "outlier", with the reason after a colon.
        histogram: (lower edge, upper edge, tokens) of its positive activations.
        windows: top windows first, then one or more of each decile.
        promoted: tokens that its decoder row makes likelier, best first.
        suppressed: tokens that it makes less likely, strongest first.
        scores: "input_score", "output_score", ... by name.
    """

    feature: int
    frequency: float
    max_act: float
    n_tokens: int
    flags: tuple[str, ...] = ()
    histogram: tuple[tuple[float, float, int], ...] = ()
    windows: tuple[Window, ...] = ()
    promoted: tuple[LensToken, ...] = ()
    suppressed: tuple[LensToken, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    explanation: Explanation | None = None
    scores: dict[str, float] | None = None
    steering: tuple[SteeringExample, ...] = ()

    def _repr_html_(self) -> str:
        from workbench.core.records import to_jsonable
        from workbench.report.features import card_html

        return card_html(to_jsonable(self))
