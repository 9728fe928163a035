"""Checks that measure effects: do scores agree with them, and do they rank better than what needs no gradient?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.doctor.attribution import Attribution, Effect
from circuits.doctor.measures import averaged, mean_of, precision_at, sign_agreement, spearman
from circuits.doctor.report import Check, inapplicable, judged
from workbench.core import progress
from workbench.core.display import OneLine
from workbench.core.numbers import counted, number
from workbench.core.stats import SHARE, SIGNED_SHARE

SHARES = (0.1, 0.25, 0.5)
"""Shares of the items that are put to the baseline together."""
MIN_CORRELATION, MIN_SIGNS, MIN_PRECISION, BEST = 0.5, 0.8, 0.5, 10
"""Limits of agreement with measured effects, and how many of the largest items are compared."""
AFFORDABLE_SECONDS = 120.0
"""Below so much time for all of them, measured effects are to be shown instead."""


@dataclass(frozen=True)
class Sizes(OneLine):
    """How much is measured.

    Attributes:
        items: items per input whose effect is measured alone.
        draws: random rankings.
        steps: of the integral, at which sums are compared with the total.
        seed: of what is drawn.
    """

    items: int = 50
    steps: tuple[int, ...] = (8, 16, 32, 64)
    draws: int = 3
    seed: int = 0


def agreement(group: Sequence[Attribution], sizes: Sizes) -> list[Check]:
    """Check 3: scores against the measured effects of single items."""
    if all(one.is_direct for one in group):
        return [inapplicable(3, "the scores are the measured effects of single items")]
    if any(one.effect is None and one.singles is None for one in group):
        return [inapplicable(3, group[0].why.get(3, "no function that measures effects was given"))]
    found: list[np.ndarray] = []
    queries, began = 0, time.perf_counter()
    total = sum(one.n for one in group)
    with progress.task(total=total, description="direct effects", unit="inputs") as task:
        for one in group:
            rows = []
            for i in range(one.n):
                chosen, effects = _singles(one, i, sizes)
                k = max(1, min(BEST, len(chosen) // 2))
                scores = one.scores[i, chosen]
                rows.append(
                    (spearman(scores, effects), sign_agreement(scores, effects), precision_at(scores, effects, k))
                )
                queries += len(chosen)
                task.advance(1)
            found.append(np.array(rows))
    per_input = averaged(found)
    instead = "Measured effects say something else: rank by them (method='exact', exact_effects)."
    parts = (("Spearman", MIN_CORRELATION), ("sign agreement", MIN_SIGNS), (f"precision at {BEST}", MIN_PRECISION))
    checks = [
        judged(3, part, mean_of(per_input[:, c], within=SHARE if c else SIGNED_SHARE), limit, why=instead)
        for c, (part, limit) in enumerate(parts)
    ]
    return [*checks, *_afford(group, (time.perf_counter() - began) / max(queries, 1))]


def _afford(group: Sequence[Attribution], seconds: float) -> list[Check]:
    """What measuring the effect of every item would take."""
    if any(one.effect is None for one in group):
        return []
    whole = seconds * sum(int((one.scores != 0).sum()) for one in group)
    why = f"measuring every item of {counted(group[0].n, 'inputs')} takes about {number(whole)} s here"
    if whole <= AFFORDABLE_SECONDS:
        why += "; show the measured effects instead"
    return [Check(number=3, part="seconds for all direct effects", value=whole, why=why)]


def _singles(one: Attribution, i: int, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of some items of an input and their measured effects: half by the size of their score, half drawn."""
    if one.singles is not None:
        known = np.flatnonzero(np.isfinite(one.singles[i]))
        return known, one.singles[i, known]
    able = np.flatnonzero(one.scores[i]) if len(np.flatnonzero(one.scores[i])) > 1 else np.arange(one.scores.shape[1])
    best = able[np.argsort(-np.abs(one.scores[i, able]), kind="stable")]
    half = sizes.items // 2
    rest = np.random.default_rng((sizes.seed, i)).permutation(best[half:])[: sizes.items - half]
    chosen = np.sort(np.concatenate([best[:half], rest]))
    sets = np.zeros((len(chosen), one.scores.shape[1]), dtype=bool)
    sets[np.arange(len(chosen)), chosen] = True
    assert one.effect is not None
    return chosen, one.effect(i, sets)


def rankings(group: Sequence[Attribution], sizes: Sizes) -> list[Check]:
    """Check 4: what the highest minus what the lowest items do, against three rankings that need no gradient."""
    if any(one.effect is None and one.singles is None for one in group):
        return [inapplicable(4, group[0].why.get(4, "no function that measures effects was given"))]
    if all(one.is_direct for one in group):
        return [inapplicable(4, "the scores are the measured effects of single items")]
    found: dict[str, list[np.ndarray]] = {}
    with progress.task(total=sum(one.n for one in group), description="rankings", unit="inputs") as task:
        for one in group:
            rows: dict[str, list[float]] = {}
            for i in range(one.n):
                for name, value in _spread(one, i, sizes).items():
                    rows.setdefault(name, []).append(value)
                task.advance(1)
            for name, values in rows.items():
                found.setdefault(name, []).append(np.array(values))
    ours = averaged(found.pop("ours"))
    unit = "metric, highest minus lowest items"
    checks = [Check(number=4, part=unit, value=mean_of(ours))]
    for name in ("random", "|activation|", "position"):
        if name in found and len(found[name]) == len(group):
            why = f"Not better than a ranking by {name}."
            checks.append(judged(4, f"gain over {name}", mean_of(ours - averaged(found[name])), 0.0, "above", why))
        else:
            checks.append(inapplicable(4, f"nothing to rank by {name} was given", f"gain over {name}"))
    return checks


def _spread(one: Attribution, i: int, sizes: Sizes) -> Mapping[str, float]:
    """Of each ranking of one input: mean over shares of what the first items do minus what the last do."""
    items = _able(one, i)
    draw = np.random.default_rng((sizes.seed, i, 4))
    orders = {"ours": items[np.argsort(-one.scores[i, items], kind="stable")]}
    if one.values is not None:
        orders["|activation|"] = items[np.argsort(-np.abs(one.values[i, items]), kind="stable")]
    if one.prior is not None:
        orders["position"] = items[np.argsort(-one.prior[items], kind="stable")]
    drawn = {f"random {d}": draw.permutation(items) for d in range(sizes.draws)}
    counts = [max(1, round(share * len(items))) for share in SHARES]
    sets = [order[part] for order in (*orders.values(), *drawn.values()) for k in counts for part in (
        slice(None, k), slice(len(items) - k, None)
    )]  # fmt: skip
    effects = _of_sets(one, i, sets).reshape(-1, len(counts), 2)
    means = (effects[..., 0] - effects[..., 1]).mean(1)
    named = dict(zip((*orders, *drawn), means.tolist(), strict=True))
    random = [named.pop(name) for name in drawn]
    return {**named, "random": float(np.mean(random))}


def _able(one: Attribution, i: int) -> np.ndarray:
    """The items that are ranked: those with a score, or whose effect is known."""
    if one.singles is not None:
        return np.flatnonzero(np.isfinite(one.singles[i]))
    scored = np.flatnonzero(one.scores[i])
    return scored if len(scored) > 1 else np.arange(one.scores.shape[1])


def _of_sets(one: Attribution, i: int, sets: Sequence[np.ndarray], effect: Effect | None = None) -> np.ndarray:
    effect = effect or one.effect
    if effect is None:
        assert one.singles is not None
        return np.array([float(one.singles[i, items].sum()) for items in sets])
    masks = np.zeros((len(sets), one.scores.shape[1]), dtype=bool)
    for mask, items in zip(masks, sets, strict=True):
        mask[items] = True
    return effect(i, masks)


def deletion(group: Sequence[Attribution], sizes: Sizes) -> list[Check]:
    """Check 10: the largest scores resampled, and all others resampled, beside random items."""
    if any(one.resampled is None for one in group):
        why = "no function that measures the effect of values of another input was given"
        return [inapplicable(10, group[0].why.get(10, why))]
    found: list[np.ndarray] = []
    with progress.task(total=sum(one.n for one in group), description="deletion, insertion", unit="inputs") as task:
        for one in group:
            rows = []
            for i in range(one.n):
                rows.append(_changes(one, i, sizes))
                task.advance(1)
            found.append(np.array(rows))
    drop, random_drop, left, random_left = averaged(found).T
    why = "Random items do as much."
    return [
        Check(number=10, part="change by deleting the largest (comprehensiveness)", value=mean_of(drop)),
        Check(number=10, part="change by deleting random items (band)", value=mean_of(random_drop)),
        judged(10, "deletion: gain over random", mean_of(drop - random_drop), 0.0, "above", why),
        Check(number=10, part="change with only the largest kept (sufficiency)", value=mean_of(left)),
        Check(number=10, part="change with only random items kept (band)", value=mean_of(random_left)),
        judged(10, "insertion: gain over random", mean_of(random_left - left), 0.0, "above", why),
    ]


def _changes(one: Attribution, i: int, sizes: Sizes) -> tuple[float, float, float, float]:
    items = _able(one, i)
    draw = np.random.default_rng((sizes.seed, i, 10))
    orders = [items[np.argsort(-np.abs(one.scores[i, items]), kind="stable")]]
    orders += [draw.permutation(items) for _ in range(sizes.draws)]
    counts = [max(1, round(share * len(items))) for share in SHARES]
    sets = [part for order in orders for k in counts for part in (order[:k], order[k:])]
    changes = np.abs(_of_sets(one, i, sets, one.resampled)).reshape(len(orders), len(counts), 2).mean(1)
    return changes[0, 0], changes[1:, 0].mean(), changes[0, 1], changes[1:, 1].mean()
