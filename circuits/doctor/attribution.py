"""An attribution of any origin, in the plain form that the doctor examines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.numbers import counted

Scores = Float[np.ndarray, "inputs items"]
Make = Callable[[], Scores]
Effect = Callable[[int, Bool[np.ndarray, "sets items"]], Float[np.ndarray, " sets"]]
Method = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""From a function of rows of items, the items of one input and those of its baseline, to a score per item."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledScores(OneLine):
    """Items of many inputs with a class per input, for the checks that retrain a light head.

    Attributes:
        scores: as `Attribution.scores`.
        values: as `Attribution.values`.
        labels: class of each input.
    """

    scores: Scores
    values: Scores
    labels: Int[np.ndarray, " inputs"]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(OneLine):
    """Scores of items over inputs, with whatever is needed to check them; a check whose part is missing is not run.

    A score is an estimate of `f(item put to its baseline) - f(input)`, as the effects of the library are: above zero,
    putting the item to its baseline raises f.

    Attributes:
        name: for people.
        scores: one per input and item.
        values: activation of each item; rankings by `|activation|` take it.
        effect: measured effect of putting sets of items of one input to the baseline, all items of a set together.
        resampled: the same, with the values that the items have in another input.
        singles: measured effects of single items, where sets can't be measured; nan where it is not known.
        totals: measured effect of all items; by default that of `effect`.
        prior: a score per item that knows its position alone.
        adds_up: whether the method claims that scores add up to the total.
        is_direct: whether the scores are themselves measured effects of single items.
        again: the scores made again in the way of `folded` and `rescaled`, whose rounding is that of these; by default
            `scores`.
        steps: scores at so many steps of an integral.
        settings: by the name of a setting, the scores under each of its values.
        randomised: scores on the model with more and more layers random, from the top down; the last one is all random.
        shuffled: scores on shuffled labels.
        folded: scores on another implementation of the same function.
        rescaled: scores on a function-preserving rescaling.
        method: the method itself, which is run on functions whose truth is known.
        labelled: items and classes of more inputs; by default `values` and `labels`.
        labels: class of each input.
        why: by the number of a check, why it can't be run.
    """

    name: str
    scores: Scores
    values: Scores | None = None
    effect: Effect | None = None
    resampled: Effect | None = None
    singles: Scores | None = None
    totals: Float[np.ndarray, " inputs"] | None = None
    prior: Float[np.ndarray, " items"] | None = None
    adds_up: bool = False
    is_direct: bool = False
    again: Make | None = None
    steps: Callable[[int], Scores] | None = None
    settings: Mapping[str, Sequence[Make]] = field(default_factory=dict)
    randomised: Sequence[Make] = ()
    shuffled: Make | None = None
    folded: Make | None = None
    rescaled: Make | None = None
    method: Method | None = None
    labelled: LabelledScores | None = None
    labels: Int[np.ndarray, " inputs"] | None = None
    why: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or 0 in self.scores.shape:
            raise ShapeError(
                f"Attribution: scores have shape {self.scores.shape}; give (inputs, items), none of them 0."
            )
        if self.values is not None and self.values.shape != self.scores.shape:
            raise ShapeError(
                f"Attribution: values have shape {self.values.shape}, scores {self.scores.shape}. Give one per score."
            )
        if not np.isfinite(self.scores).all():
            raise InvalidInputError(
                f"Attribution: {counted(int((~np.isfinite(self.scores)).sum()), 'scores')} are not finite. Leave these "
                "items out."
            )

    @property
    def n(self) -> int:
        """Number of inputs."""
        return self.scores.shape[0]

    def total(self) -> Float[np.ndarray, " inputs"] | None:
        """Measured effect of all items together."""
        if self.totals is not None or self.effect is None:
            return self.totals
        every = np.ones((1, self.scores.shape[1]), dtype=bool)
        return np.array([float(self.effect(i, every)[0]) for i in range(self.n)])

    def labelled_rows(self) -> LabelledScores | None:
        """What a light head is retrained on."""
        if self.labelled is None and self.labels is not None and self.values is not None:
            return LabelledScores(scores=self.scores, values=self.values, labels=self.labels)
        return self.labelled
