"""TPP and SCR, legacy: kept for comparison with published tables, no headline anywhere.

An audit of SAE benchmarks (arXiv 2605.18229) finds that TPP falls while an SAE improves, and that SCR with many
ablated features is anti-correlated with ground truth. Don't choose between SAEs by them.

Activations are in the units of what the SAE reads, as `Basis.contributions` gives them; those of an SAE that normalises
its input are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.core.errors import DegenerateInputError
from workbench.saes.evaluation.sparse_probing import Columns, Examples, class_difference, dense, logistic

MIN_ROOM = 0.001
"""SCR is 0 where the oracle is not better than the biased probe by at least this accuracy."""


@dataclass(frozen=True)
class LegacyScore:
    """TPP or SCR, by the number of features that were ablated."""

    name: str
    n_features: int
    value: float
    status: str = "legacy"


def effects(acts: Columns, labels: np.ndarray, probe: np.ndarray, W_dec: np.ndarray) -> np.ndarray:
    """Effect of each feature on a probe: `(mean_1 a_j - mean_0 a_j) * (w . W_dec_j)`.

    Positive where the feature moves the probe towards class 1, also by being active on class 0 and writing against it.

    >>> effects(np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([0, 1]), np.array([3.0]), np.array([[1.0], [1.0]]))
    array([ 6., -3.])
    """
    return class_difference(acts, labels) * (W_dec @ probe)


def positive_effects(acts: Columns, labels: np.ndarray, probe: np.ndarray, W_dec: np.ndarray) -> np.ndarray:
    """TPP's effect: `max(0, mean_1 a_j - mean_0 a_j) * (w . W_dec_j)`; features of class 0 have none.

    >>> positive_effects(np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([0, 1]), np.array([3.0]), np.ones((2, 1)))
    array([6., 0.])
    """
    return np.maximum(0.0, class_difference(acts, labels)) * (W_dec @ probe)


def ablated(x: np.ndarray, acts: Columns, W_dec: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`x` without what some features add to it; the error of the SAE stays."""
    return x - dense(acts[:, features]) @ W_dec[features]


def tpp(train: Sequence[Examples], test: Sequence[Examples], W_dec: np.ndarray, n_features: int) -> LegacyScore:
    """Targeted probe perturbation: how much ablating a class's features hurts its own probe more than the others.

    Each class has one set of `train`, from which probe and features come, and one of `test`: the class against the
    rest.

    Raises:
        DegenerateInputError: for fewer than two classes.
    """
    if len(train) < 2 or len(train) != len(test):
        raise DegenerateInputError(f"tpp: {len(train)} training and {len(test)} test sets; give two or more of each.")
    probes = [logistic(s.x, s.labels) for s in train]
    clean = np.array([p.accuracy(s.x, s.labels) for p, s in zip(probes, test, strict=True)])
    drops = np.zeros((len(train), len(train)))
    for i, (probe, seen) in enumerate(zip(probes, train, strict=True)):
        effect = positive_effects(seen.acts["SAE"], seen.labels, probe.direction, W_dec)
        top = np.argsort(-effect, kind="stable")[:n_features]
        for j, (other, held) in enumerate(zip(probes, test, strict=True)):
            x = ablated(held.x, held.acts["SAE"], W_dec, top)
            drops[i, j] = clean[j] - other.accuracy(x, held.labels)
    own = np.diag(drops)
    others = (drops.sum(1) - own) / (len(train) - 1)
    return LegacyScore("TPP", n_features, float((own - others).mean()))


def scr(biased: Examples, balanced: Examples, spurious: np.ndarray, W_dec: np.ndarray, n_features: int) -> LegacyScore:
    """Spurious correlation removal: accuracy won back by ablating the features of the spurious concept.

    In `biased` the label and the spurious concept coincide. In `balanced` they are independent; half of its examples
    make the oracle and the spurious probe, the others test. `spurious` is the concept of `balanced`, 0 or 1.
    """
    even = np.arange(len(balanced.labels)) % 4 < 2
    probe = logistic(biased.x, biased.labels)
    oracle = logistic(balanced.x[even], balanced.labels[even])
    concept = logistic(balanced.x[even], spurious[even])
    acts, labels, x = balanced.acts["SAE"], balanced.labels, balanced.x
    effect = np.abs(effects(acts[even], spurious[even], concept.direction, W_dec))
    top = np.argsort(-effect, kind="stable")[:n_features]
    before = probe.accuracy(x[~even], labels[~even])
    after = probe.accuracy(ablated(x[~even], acts[~even], W_dec, top), labels[~even])
    room = oracle.accuracy(x[~even], labels[~even]) - before
    return LegacyScore("SCR", n_features, (after - before) / room if room >= MIN_ROOM else 0.0)
