"""Checks that compare scores with scores made in another way: steps, settings, random models, the same function."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from circuits.doctor.attribution import Attribution, Make
from circuits.doctor.measures import averaged, mean_of, median_of, quartiles, row_correlations
from circuits.doctor.report import Check, inapplicable, judged
from workbench.core import progress
from workbench.core.stats import SIGNED_SHARE

MAX_GAP, MAX_RANDOM, MIN_STABLE, MAX_CHANGE = 0.05, 0.3, 0.8, 1e-4
"""Limits of the gap, of the correlation with scores of a random model, of that between settings, and of a change where
the function is the same."""
_SMALLEST_TOTAL = 1e-3


def completeness(group: Sequence[Attribution], steps: Sequence[int]) -> list[Check]:
    """Check 1: `|sum of scores - total| / max(|total|, 1e-3)`, as given, and with rising steps."""
    if not all(one.adds_up for one in group):
        return [inapplicable(1, group[0].why.get(1, "the method does not claim that its scores add up"))]
    totals = [one.total() for one in group]
    if any(total is None for total in totals):
        return [inapplicable(1, "the total effect was not measured")]

    def gaps(scores: Sequence[np.ndarray]) -> np.ndarray:
        rows = []
        for made, total in zip(scores, totals, strict=True):
            assert total is not None
            rows.append(np.abs(made.sum(1) - total) / np.maximum(np.abs(total), _SMALLEST_TOTAL))
        return averaged(rows)

    own = gaps([one.scores for one in group])
    why = "Effects do not add up: use more steps, or another baseline."
    checks = [judged(1, "gap as given", median_of(own), MAX_GAP, "at most", why, quartiles(own))]
    if not steps or any(one.steps is None for one in group):
        return checks
    by_steps = [gaps([one.steps(n) for one in group if one.steps]) for n in progress.track(steps, description="steps")]
    last, first = by_steps[-1], by_steps[0]
    checks += [
        Check(number=1, part=f"gap at {n} steps", value=median_of(g)) for n, g in zip(steps, by_steps, strict=True)
    ]
    rise = float(np.median(last)) - float(np.median(first))
    steps_why = "The gap does not fall with steps: the path is not smooth, or the implementation is wrong."
    return [
        *checks, judged(1, f"gap at {steps[-1]} steps, limit", median_of(last), MAX_GAP, "at most", why),
        judged(1, f"rise of the gap from {steps[0]} to {steps[-1]} steps", rise, 1e-6, "at most", steps_why),
    ]  # fmt: skip


def _change(group: Sequence[Attribution], makes: Sequence[Make]) -> float:
    """Largest change of a score, relative to the largest score of its site."""
    own = [one.scores if one.again is None else one.again() for one in group]  # batches of other sizes round otherwise
    return max(
        float(np.abs(make() - scores).max() / max(np.abs(scores).max(), 1e-30))
        for scores, make in zip(own, makes, strict=True)
    )


def same_function(group: Sequence[Attribution]) -> list[Check]:
    """Check 2, last part: scores of another implementation of the same function."""
    makes = [one.folded for one in group if one.folded is not None]
    part = "change with folded weights"
    if len(makes) < len(group):
        why = "no other implementation of the same function was given"
        return [inapplicable(2, group[0].why.get(2, why), part)]
    why = "Scores depend on how the function is written down."
    return [judged(2, part, _change(group, makes), MAX_CHANGE, "at most", why)]


def gauge(group: Sequence[Attribution]) -> list[Check]:
    """Check 11: scores under a rescaling of weights by powers of two, which changes no activation that is read."""
    makes = [one.rescaled for one in group if one.rescaled is not None]
    if len(makes) < len(group):
        return [inapplicable(11, group[0].why.get(11, "no function-preserving rescaling was given"))]
    why = "Scores depend on a scale that the function does not depend on."
    return [judged(11, "change under rescaled norm gains", _change(group, makes), 0.0, "at most", why)]


def randomisation(group: Sequence[Attribution]) -> list[Check]:
    """Check 5: correlation with scores of a model with random layers from the top down, and on shuffled labels."""
    stages = {len(one.randomised) for one in group}
    checks = []
    if stages == {0}:
        checks.append(inapplicable(5, group[0].why.get(5, "no model with random layers was given"), "random layers"))
    else:
        (n,) = stages
        for k in progress.track(range(n), description="random layers"):
            values = averaged([row_correlations(one.scores, one.randomised[k]()) for one in group])
            value, part = mean_of(values, within=SIGNED_SHARE), f"Spearman with {k + 1} of {n} parts random"
            why = "Scores do not depend on what the model has learned."
            last = k == n - 1
            checks.append(
                judged(5, part, value, MAX_RANDOM, "at most", why) if last else Check(number=5, part=part, value=value)
            )
    if any(one.shuffled is None for one in group):
        return [*checks, inapplicable(5, "no shuffled labels were given", "shuffled labels")]
    found = [
        row_correlations(one.scores.mean(0, keepdims=True), one.shuffled().mean(0, keepdims=True))
        for one in group
        if one.shuffled is not None
    ]
    why = "Scores do not depend on the labels."
    return [*checks, judged(5, "Spearman with shuffled labels", float(np.mean(found)), MAX_RANDOM, "at most", why)]


def settings(group: Sequence[Attribution]) -> list[Check]:
    """Check 6: per input the correlation between scores under the values of a setting; the median has to be high."""
    names = list(dict.fromkeys(name for one in group for name in one.settings))
    if not names:
        return [inapplicable(6, group[0].why.get(6, "no other settings were given"))]
    checks = []
    for name in progress.track(names, description="settings"):
        rows = []
        for one in group:
            every = [one.scores, *(make() for make in one.settings.get(name, ()))]
            pairs = [row_correlations(a, b) for a, b in combinations(every, 2)]
            rows.append(averaged(pairs))
        values = averaged(rows)
        why = f"Unstable to {name}."
        checks.append(judged(6, name, median_of(values), MIN_STABLE, why=why, spread=quartiles(values)))
    return checks
