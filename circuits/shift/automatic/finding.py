"""Looks for features that a probe follows where the rest of the text tells the label, and tests that on other rows.

Half of the training rows are for the search, the other half for the test, so that what was searched for does not count
as evidence. Without attribute labels a shortcut can't be told from a real but unreliable sign of the label by data
alone; what is found here are features that (1) support the label overall, (2) oppose it where the probe errs, (3) are
followed by the probe on unseen rows where they oppose the label, although (4) a probe refitted without them is right
there more often than not, and (5) without losing as much elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.probes.linear import ProbeOptions, fit_probe

MIN_ERRORS = 5
"""Rows of the search on which the probe must err, and rows of the test that the features must mislead."""


@checked
@dataclass(frozen=True, kw_only=True)
class AutomaticOptions(OneLine):
    """How automatic SHIFT decides.

    Attributes:
        alpha: chance of ablating something although ablation does not help where the features oppose the label.
        permutations: draws of each permutation test.
        folds: of the cross-validation that finds these rows.
        seed: decides the halves, the folds and the permutations.
    """

    alpha: float = 0.05
    permutations: int = 999
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InvalidInputError(f"AutomaticOptions(alpha={self.alpha}): give a value between 0 and 1.")
        if self.folds < 2 or self.permutations < 1 / self.alpha:
            raise InvalidInputError(
                f"AutomaticOptions(folds={self.folds}, permutations={self.permutations}): give 2 folds or more, and at "
                "least 1 / alpha permutations."
            )


@dataclass(frozen=True, eq=False)
class SearchRows:
    """Training rows as the search sees them.

    Attributes:
        y: label, 0 or 1.
        support: by how much each candidate supports the row's label, in logits of the probe; negative opposes it.
        ablated: activations at the probe's site without some of the candidates.
    """

    y: Int[np.ndarray, " rows"]
    support: Float[np.ndarray, "rows candidates"]
    ablated: Callable[[Sequence[int]], Float[Tensor, "rows d"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Search:
    """What the search proposes.

    Attributes:
        errors: rows of the search on which the cross-validated probe errs.
        harm: mean support of each candidate on those rows.
        z: its distance from 0 in standard errors.
        chosen: places of the candidates that are put to the test; () if there is none.
    """

    errors: Int[np.ndarray, " rows"]
    harm: Float[np.ndarray, " candidates"]
    z: Float[np.ndarray, " candidates"]
    chosen: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Trial:
    """What the chosen candidates do on rows that the search did not see.

    Attributes:
        opposed: whether the candidates together oppose the row's label.
        right: whether the probe is right on each row.
        right_without: whether one fitted without the candidates is.
        gain: mean over label and `opposed` of the change in accuracy, each group counting equally.
        p_ablation: chance of such a gain if ablation changes nothing (signs of the changes drawn).
        p_environment: chance of it if it has nothing to do with `opposed` (drawn anew within each label).
    """

    opposed: Bool[np.ndarray, " rows"]
    right: Bool[np.ndarray, " rows"]
    right_without: Bool[np.ndarray, " rows"]
    gain: float
    p_ablation: float
    p_environment: float

    @property
    def p(self) -> float:
        """The larger of both: each of the two alone must be refuted."""
        return max(self.p_ablation, self.p_environment)

    @property
    def is_followed(self) -> bool:
        """Whether the probe is mostly wrong where the candidates oppose the label, and mostly right without them."""
        return bool(self.right[self.opposed].mean() < 0.5 < self.right_without[self.opposed].mean())


def halves(y: Int[np.ndarray, " rows"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the search and of the test, half of each label."""
    random = np.random.default_rng(seed)
    order = [random.permutation(np.flatnonzero(y == label)) for label in (0, 1)]
    first = np.sort(np.concatenate([rows[: len(rows) // 2] for rows in order]))
    return first, np.setdiff1d(np.arange(len(y)), first)


def search(rows: SearchRows, among: Int[np.ndarray, " chosen"], options: AutomaticOptions) -> Search:
    """The candidates that oppose the label where the probe errs, as many of them as help most, over some of the rows."""
    y = rows.y[among]
    folds = _folds(y, options)
    right = _right(rows.ablated([])[among], y, folds)
    errors = among[~right]
    harm, z = _harm(rows.support[errors])
    suspects = [int(i) for i in np.argsort(harm, kind="stable") if harm[i] < 0]
    if len(errors) < MIN_ERRORS or not suspects:
        return Search(errors=errors, harm=harm, z=z, chosen=())
    gains = {}
    for n in _sizes(len(suspects)):
        without = _right(rows.ablated(suspects[:n])[among], y, folds)
        opposed = rows.support[among][:, suspects[:n]].sum(1) < 0
        gains[n] = _gain(_weights(y, opposed), right, without)
    best = max(gains, key=lambda n: gains[n])
    return Search(errors=errors, harm=harm, z=z, chosen=tuple(suspects[:best]) if gains[best] > 0 else ())


def trial(
    rows: SearchRows, chosen: Sequence[int], fitted_on: Int[np.ndarray, " fitted"], tested_on: Int[np.ndarray, " tested"],
    options: AutomaticOptions,
) -> Trial | None:  # fmt: skip
    """Tests the chosen candidates on rows that neither they nor the probes have seen; None if they mislead too few."""
    y, fitted = rows.y[tested_on], torch.from_numpy(rows.y[fitted_on])
    opposed = rows.support[tested_on][:, list(chosen)].sum(1) < 0
    if opposed.sum() < MIN_ERRORS:
        return None
    right, without = (
        _predicted(x[fitted_on], fitted, x[tested_on]) == y for x in (rows.ablated([]), rows.ablated(chosen))
    )
    gain = _gain(_weights(y, opposed), right, without)
    random = np.random.default_rng(options.seed)
    change = without.astype(float) - right
    signs = random.choice([-1.0, 1.0], size=(options.permutations, len(y)))
    flipped = signs @ (change * _weights(y, opposed))
    drawn = [_gain(_weights(y, _within(y, opposed, random)), right, without) for _ in range(options.permutations)]
    return Trial(
        opposed=opposed, right=right, right_without=without, gain=gain, p_ablation=_p(gain, flipped),
        p_environment=_p(gain, drawn),
    )  # fmt: skip


def _harm(support: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean support of each candidate over the rows of errors, and the same in standard errors."""
    if len(support) < 2:
        return np.zeros(support.shape[1]), np.zeros(support.shape[1])
    mean, spread = support.mean(0), support.std(0, ddof=1) / np.sqrt(len(support))
    return mean, np.divide(mean, spread, out=np.where(mean < 0, -np.inf, 0.0), where=spread > 0)


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return [*(2**i for i in range(20) if 2**i < most), most]


def _weights(y: np.ndarray, opposed: np.ndarray) -> np.ndarray:
    """Equal weight for each label with each value of `opposed` that has rows; they sum to 1."""
    group = 2 * y + opposed
    counts = np.bincount(group, minlength=4)
    return 1 / (counts[group] * (counts > 0).sum())


def _gain(weights: np.ndarray, right: np.ndarray, without: np.ndarray) -> float:
    return float(weights @ (without.astype(float) - right))


def _within(y: np.ndarray, opposed: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """`opposed`, drawn anew among the rows of each label."""
    drawn = opposed.copy()
    for label in (0, 1):
        drawn[y == label] = random.permutation(opposed[y == label])
    return drawn


def _p(value: float, drawn: Iterable[float]) -> float:
    draws = np.asarray(list(drawn))
    return float((1 + (draws >= value - 1e-12).sum()) / (1 + len(draws)))


def _folds(y: np.ndarray, options: AutomaticOptions) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedKFold

    return list(StratifiedKFold(options.folds, shuffle=True, random_state=options.seed).split(y, y))


def _right(x: Tensor, y: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Whether each row is classified rightly by a probe that was fitted without it."""
    right = np.zeros(len(y), dtype=bool)
    for fitted, held in folds:
        right[held] = _predicted(x[fitted], torch.from_numpy(y[fitted]), x[held]) == y[held]
    return right


def _predicted(x: Tensor, y: Tensor, new: Tensor) -> np.ndarray:
    return fit_probe(x, y, "", options=ProbeOptions(folds=0)).predict(new).cpu().numpy()
