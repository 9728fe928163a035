"""Three published claims about output features, each tested with an interval and a control."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

from workbench.core.numbers import setting
from workbench.core.stats import Estimate
from workbench.steering.selection.groups import FILTERED, GROUPS, SECOND, UNFILTERED, Depth, StudyOptions
from workbench.steering.selection.selection_report import Claim, Verdict
from workbench.steering.selection.steer_groups import Steered
from workbench.steering.sweep.intervals import two_level_difference, two_level_ratio

DRAWS = 2000


def depth_claim(depths: Sequence[Depth], options: StudyOptions) -> Claim:
    """Output features lie deep: their share at the deepest site minus that at the shallowest, less that of noise."""
    first, last = depths[0].table, depths[-1].table
    shares = [t.alive()["output_score"].dropna().to_numpy(dtype=float) >= options.threshold for t in (last, first)]
    noise = [np.array(t.controls.get("random_output_score", ())) >= options.threshold for t in (last, first)]
    gap = difference_of_shares(*shares, seed=options.seed)
    claim = "Output features lie deep"
    measured = (
        f"share of features with an output score of {setting(options.threshold)} or more, deepest minus shallowest site"
    )
    if not all(len(part) for part in noise):
        return Claim(claim, measured, gap, None, "not clear", "no random directions were scored")
    control = difference_of_shares(*noise, seed=options.seed)
    above = difference_of_shares(*shares, *noise, seed=options.seed)
    verdict = "holds" if above.low > 0 and gap.low > 0 else ("does not hold" if gap.high < 0 else "not clear")
    return Claim(claim, measured, gap, control, verdict, f"beyond the random directions {above}")


def difference_of_shares(*parts: Bool[np.ndarray, " _"], seed: int = 0) -> Estimate:
    """Share of the first set minus that of the second, and less the same of a third and fourth; parametric bootstrap.

    >>> difference_of_shares(np.array([True, True, False, False]), np.array([False, False])).value
    0.5
    """
    random = np.random.default_rng(seed)
    signs = (1, -1, -1, 1)[: len(parts)]
    # Half a success more on each side, so that a share of 0 or 1 is not taken to be certain.
    smoothed = [(part.sum() + 0.5) / (len(part) + 1) for part in parts]
    draws = sum(
        sign * random.binomial(len(part), p, DRAWS) / len(part)
        for sign, part, p in zip(signs, parts, smoothed, strict=True)
    )
    value = sum(sign * part.mean() for sign, part in zip(signs, parts, strict=True))
    low, high = np.quantile(draws, [0.025, 0.975])
    n = sum(len(part) for part in parts)
    return Estimate(float(value), float(low), float(high), n, "parametric bootstrap of shares", "features")


def cooccurrence_claim(depths: Sequence[Depth], options: StudyOptions) -> Claim:
    """High input and output scores rarely co-occur: how often they do, against independence within each depth.

    The ratio is the exponential of the pointwise mutual information of the two. Over all depths together it exceeds 1
    wherever both scores rise with depth, whatever happens within one; it is told, and decides nothing. The control
    deals the input scores out anew among the features of each depth.
    """
    tables = [d.table.alive().dropna(subset=["output_score", "input_score"]) for d in depths]
    cells = [
        (
            df["input_score"].to_numpy(dtype=float) >= options.high,
            df["output_score"].to_numpy(dtype=float) >= options.high,
        )
        for df in tables
    ]
    read, write = (np.concatenate([cell[i] for cell in cells]) for i in (0, 1))
    both = int((read & write).sum())
    claim = "High input and output scores rarely co-occur"
    measured = f"features with both scores at {setting(options.high)} or more, divided by the number under independence"
    pooled = observed_over_expected(both, float(read.mean() * write.sum()) if len(read) else 0.0)
    ratio = observed_over_expected(both, expected_within(cells))
    if ratio is None:
        return Claim(claim, measured, None, None, "not clear", "no feature is high in one of the two scores")
    verdict = "holds" if ratio.high < 1 else ("does not hold" if ratio.low > 1 else "not clear")
    note = f"{both} of {len(read)} features, {read.sum()} high in input, {write.sum()} in output; all depths as one"
    return Claim(claim, measured, ratio, shuffled_pairs(cells, options.seed), verdict, f"{note} {pooled}")


Cells = Sequence[tuple[Bool[np.ndarray, " _"], Bool[np.ndarray, " _"]]]
"""Per depth, which features are high in the input score and which in the output score."""


def expected_within(cells: Cells) -> float:
    """How many features would be high in both if the two were independent within each depth.

    >>> expected_within([(np.array([True, False]), np.array([True, True]))])  # half of two
    1.0
    """
    return float(sum(read.mean() * write.sum() for read, write in cells if len(read)))


def shuffled_pairs(cells: Cells, seed: int = 0) -> Estimate:
    """Co-occurrence over independence with one side dealt out anew in each depth, and the middle 95 % of the deals.

    >>> shuffled_pairs([(np.array([True, False]), np.array([True, True]))]).value  # 1 of 2 high, both high: always 1
    1.0
    """
    random = np.random.default_rng(seed)
    # Dealing out without replacement makes the count hypergeometric.
    counts = [
        random.hypergeometric(int(write.sum()), int((~write).sum()), int(read.sum()), DRAWS) for read, write in cells
    ]
    ratio = np.sum(counts, axis=0) / expected_within(cells)
    low, high = np.quantile(ratio, [0.025, 0.975])
    n = sum(len(read) for read, _ in cells)
    return Estimate(float(ratio.mean()), float(low), float(high), n, "shuffled pairs", "features")


def observed_over_expected(observed: int, expected: float) -> Estimate | None:
    """A count divided by what was expected, with the exact Poisson interval of the count; None if none was expected.

    >>> observed_over_expected(0, 3.689).high  # 3.689 is the upper limit of a count of 0
    1.0
    """
    from scipy.stats import chi2

    if expected <= 0:
        return None
    low = float(chi2.ppf(0.025, 2 * observed) / 2) if observed else 0.0
    high = float(chi2.ppf(0.975, 2 * observed + 2) / 2)
    return Estimate(
        observed / expected, round(low / expected, 4), round(high / expected, 4), observed, "exact Poisson",
        "features high in both",
    )  # fmt: skip


def filter_claim(steered: Sequence[Steered]) -> Claim:
    """Filtering multiplies steering success: filtered against unfiltered features, beside a second random draw.

    It holds only if the filtered features also gain more over random directions with the same tokens: tokens that any
    push writes are no success of the feature.
    """
    claim = "Filtering by output score multiplies steering success"
    measured = "lens tokens per text, filtered features divided by unfiltered ones"
    ratio, control = ratio_to_unfiltered(steered, FILTERED), ratio_to_unfiltered(steered, SECOND)
    gain = difference_of_gains(steered, FILTERED)
    if ratio is None or gain is None:
        why = "no feature passes, or the unfiltered ones write none"
        return Claim(claim, measured, ratio, control, "not clear", why)
    verdict: Verdict = "not clear"
    if ratio.low > 1 and gain.low > 0:
        verdict = "holds"
    elif ratio.high < 1 or gain.high < 0:
        verdict = "does not hold"
    return Claim(claim, measured, ratio, control, verdict, f"gain over random directions, filtered - unfiltered {gain}")


def ratio_to_unfiltered(steered: Sequence[Steered], group: str) -> Estimate | None:
    """Success of a group divided by that of as many unfiltered features of each depth, so that depth plays no part."""
    both = paired_with_unfiltered(steered, group, lambda one: {n: m.success for n, m in one.feature.items()})
    return None if both is None else two_level_ratio(*both)


def difference_of_gains(steered: Sequence[Steered], group: str) -> Estimate | None:
    """Gain over random directions of a group minus that of as many unfiltered features of each depth."""
    both = paired_with_unfiltered(steered, group, lambda one: {n: gain_of(one, n) for n in one.feature})
    return None if both is None else two_level_difference(*both)


def gain_of(steered: Steered, group: str) -> np.ndarray:
    """Lens tokens per text under each feature less those under a random direction of its norm."""
    return steered.feature[group].success - steered.random[group].success


def paired_with_unfiltered(
    steered: Sequence[Steered], group: str, values: Callable[[Steered], dict[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Values of a group and of as many unfiltered features of each depth; None where the group is empty."""
    both = [(one[group], one[UNFILTERED][: len(one[group])]) for one in map(values, steered) if group in one]
    return (np.concatenate([a for a, _ in both]), np.concatenate([b for _, b in both])) if both else None


def ratios_of(steered: Sequence[Steered]) -> dict[str, Estimate]:
    """Success of each group divided by that of the unfiltered features at the same depths."""
    ratios = {name: ratio_to_unfiltered(steered, name) for name in GROUPS if name != UNFILTERED}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}
