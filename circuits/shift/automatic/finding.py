"""Looks for features that a probe follows where the rest of the text tells the label, and tests that on other rows.

Half of the training rows are for the search, the other half for the test, so that what was searched for does not count
as evidence. Without attribute labels a shortcut can't be told from a real but unreliable sign of the label by data
alone. What is found here are features that (1) support the label overall, (2) oppose it together where the probe errs,
and (3) that the probe follows on unseen rows where they oppose the label, (4) while a probe refitted without them is
right there, and (5) loses less elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.shift.automatic.heldout import held_out_logits
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.probes.linear import ProbeOptions, fit_probe

MIN_ERRORS = 5
"""Rows of the search on which the probe must err, and rows of the test that the features must mislead."""
MOST_RIGHT = 0.6
"""A probe that is right on a larger share of the rows whose label some features oppose weighs them as one sign of
several, as it should, and does not follow them."""
MIN_COHERENCE = 0.2
"""Correlation of the features of a set within a label: a shortcut that fails, fails in all its features at once, while
independent signs of the label fail one by one."""
COMPONENTS = 4
"""Principal components of what candidates do within a label, which sets are made of."""
MOST_PROPOSALS = 12
"""Sets that are ablated in the search."""


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
        probe: how probes are fitted.
    """

    y: Int[np.ndarray, " rows"]
    support: Float[np.ndarray, "rows candidates"]
    ablated: Callable[[Sequence[int]], Float[Tensor, "rows d"]]
    probe: ProbeOptions = field(default_factory=ProbeOptions)

    def predicted(
        self, x: Float[Tensor, "rows d"], fitted: Int[np.ndarray, " fitted"], new: Int[np.ndarray, " new"]
    ) -> Int[np.ndarray, " new"]:
        """Labels that a probe of some rows gives to others."""
        options = replace(self.probe, folds=0)
        probe = fit_probe(x[fitted], torch.from_numpy(self.y[fitted]), "", options=options)
        return probe.predict(x[new]).cpu().numpy()


@dataclass(frozen=True, eq=False, kw_only=True)
class Search:
    """What the search proposes.

    Attributes:
        errors: rows of the search on which the cross-validated probe errs.
        harm: mean support of each candidate on those rows.
        chosen: places of the candidates that are put to the test; () if there is none.
    """

    errors: Int[np.ndarray, " rows"]
    harm: Float[np.ndarray, " candidates"]
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
        """Whether the probe follows the candidates where they oppose the label, and does not without them."""
        return bool(self.right[self.opposed].mean() < MOST_RIGHT < self.right_without[self.opposed].mean())


def halves(y: Int[np.ndarray, " rows"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the search and of the test, half of each label."""
    random = np.random.default_rng(seed)
    order = [random.permutation(np.flatnonzero(y == label)) for label in (0, 1)]
    first = np.sort(np.concatenate([rows[: len(rows) // 2] for rows in order]))
    return first, np.setdiff1d(np.arange(len(y)), first)


def search(rows: SearchRows, among: Int[np.ndarray, " chosen"], options: AutomaticOptions) -> Search:
    """The set of candidates whose ablation helps most surely, of sets that the probe follows against the label."""
    y, support = rows.y[among], rows.support[among]
    right = _right(rows, [], among, options)
    harm = support[~right].mean(0) if (~right).any() else np.zeros(support.shape[1])
    gains: dict[tuple[int, ...], float] = {}
    if (~right).sum() >= MIN_ERRORS:
        for nodes in _followed(_proposals(support, y, harm), support, right):
            without = _right(rows, nodes, among, options)
            changes = _weights(y, support[:, list(nodes)].sum(1) < 0) * (without.astype(float) - right)
            gains[nodes] = float(changes.sum() / max(np.linalg.norm(changes), 1e-12))
    best = max(gains, key=lambda nodes: gains[nodes], default=())
    return Search(errors=among[~right], harm=harm, chosen=best if gains.get(best, 0.0) > 0 else ())


def _proposals(support: np.ndarray, y: np.ndarray, harm: np.ndarray) -> list[tuple[int, ...]]:
    """Sets that vary together: of candidates that oppose the label where the probe errs, or of one component."""
    orders = [np.argsort(harm, kind="stable")[: (harm < 0).sum()]]
    within = support - np.stack([support[y == label].mean(0) for label in (0, 1)])[y]
    loadings = np.linalg.svd(within, full_matrices=False)[2][:COMPONENTS]
    for loading in [side * one for one in loadings for side in (1, -1)]:
        orders.append(np.argsort(-loading, kind="stable")[: (loading > 0).sum()])
    sets = (tuple(sorted(order[:n].tolist())) for order in orders for n in _sizes(len(order)))
    return [nodes for nodes in dict.fromkeys(sets) if coherence(within[:, list(nodes)]) >= MIN_COHERENCE]


def coherence(within: Float[np.ndarray, "rows candidates"]) -> float:
    """Mean correlation of each two columns, weighted by their standard deviations; 1 for a single one.

    >>> x = np.array([[1.0, 2.0], [-1.0, -2.0]])
    >>> coherence(x), coherence(x * [1, -1]), coherence(x[:, :1])
    (1.0, -1.0, 1.0)
    """
    spread = within.std(0)
    most = spread.sum() ** 2 - (spread**2).sum()
    return 1.0 if within.shape[1] == 1 or not most else float((within.sum(1).var() - (spread**2).sum()) / most)


def _followed(proposals: Iterable[tuple[int, ...]], support: np.ndarray, right: np.ndarray) -> list[tuple[int, ...]]:
    """The sets that the probe follows where they oppose the label; those with most errors there first."""
    errors: dict[tuple[int, ...], int] = {}
    for nodes in proposals:
        opposed = support[:, list(nodes)].sum(1) < 0
        if opposed.sum() >= MIN_ERRORS and right[opposed].mean() < MOST_RIGHT:
            errors[nodes] = int((~right[opposed]).sum())
    return sorted(errors, key=lambda nodes: -errors[nodes])[:MOST_PROPOSALS]


def trial(
    rows: SearchRows,
    chosen: Sequence[int],
    fitted_on: Int[np.ndarray, " fitted"],
    tested_on: Int[np.ndarray, " tested"],
    options: AutomaticOptions,
) -> Trial | None:
    """Tests the chosen candidates on rows that neither they nor the probes have seen; None if they mislead too few."""
    y = rows.y[tested_on]
    opposed = rows.support[tested_on][:, list(chosen)].sum(1) < 0
    if opposed.sum() < MIN_ERRORS:
        return None
    right, without = (rows.predicted(rows.ablated(part), fitted_on, tested_on) == y for part in ([], chosen))
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


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return [] if not most else [*(2**i for i in range(20) if 2**i < most), most]


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


def _right(rows: SearchRows, without: Sequence[int], among: np.ndarray, options: AutomaticOptions) -> np.ndarray:
    """Whether each of some rows is classified rightly by a probe that was fitted without it."""
    y, probe = rows.y[among], replace(rows.probe, folds=options.folds, seed=options.seed)
    return (held_out_logits(rows.ablated(without)[among], y, probe) > 0) == (y == 1)
