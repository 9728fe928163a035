"""From arms to a report: strengths chosen on half of the prompts, everything else from the other half."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from workbench.core.jsontext import Record
from workbench.core.numbers import setting
from workbench.core.stats import Estimate
from workbench.steering.sweep.arms import ArmTexts, degenerate
from workbench.steering.sweep.choose import HELD_OUT_RULE, PAPER_RULE, best_strength, paper_strength, pareto_front
from workbench.steering.sweep.intervals import two_level, two_level_difference
from workbench.steering.sweep.steering_report import ArmResult, FeatureResult, Point, RuleResult, SteeringReport

ORDER = ("feature", "negated", "random", "matched", "control", "prompt")
PAIRED = {"unsteered": "unsteered", "random": "random directions", "negated": "the features subtracted",
          "prompt": "an instruction in the prompt"}  # fmt: skip
LIFTED = {"matched": "random features, both above unsteered", "control": "control features, both above unsteered"}
N_EXAMPLES = 6


def build_report(
    settings: Record,
    prompts: tuple[str, ...],
    words: tuple[str, ...],
    arms: Sequence[ArmTexts],
    bases: Mapping[str, ArmTexts],
) -> SteeringReport:
    """Chooses strengths on the even prompts and measures on the odd ones.

    Args:
        settings: what was run.
        prompts: the prompts.
        words: lens tokens of each feature, as text.
        arms: "feature", "random", "negated", and maybe others.
        bases: the unsteered texts measured with the tokens of "feature", and of each arm with tokens of its own.
    """
    selection, evaluation = list(range(0, len(prompts), 2)), list(range(1, len(prompts), 2))
    by_name = {arm.name: arm for arm in arms} | {"unsteered": bases["feature"]}
    steered, key = by_name["feature"], success_key(settings["k"])
    picks = choices(steered, key, selection)
    chosen = {
        name: [i for i, _ in (picks if name in ("feature", "random", "negated") else choices(arm, key, selection))]
        for name, arm in by_name.items()
    }
    order = [*(name for name in ORDER if name in by_name), "unsteered"]
    differences, concept = (
        _differences(by_name, bases, chosen, measure, evaluation) for measure in ("share", "log_odds")
    )
    points = [p for name in order for p in points_of(by_name[name], bases.get(name, bases["feature"]), evaluation)]
    examples, title = _examples(steered, bases["feature"], chosen["feature"], prompts, words)
    papers = [i for i, _ in choices(steered, key, range(len(prompts)), paper=True)]
    return SteeringReport(
        settings=settings, n_selection=len(selection), n_evaluation=len(evaluation),
        arms=tuple(arm_result(by_name[name], chosen[name], key, evaluation) for name in order),
        differences=differences, concept=concept,
        features=tuple(_feature_results(by_name, chosen, papers, words, evaluation)),
        curves={name: curve(by_name[name], evaluation) for name in order},
        points=with_front(points),
        rules=(
            _rule(HELD_OUT_RULE, "held-out prompts", steered, chosen["feature"], key, evaluation),
            _rule(PAPER_RULE, "the prompts that chose it", steered, papers, key, range(len(prompts))),
        ),
        edits={name: by_name[name].edits for name in order if by_name[name].edits},
        all_degenerate=tuple(f for f, (_, repeats) in zip(steered.features, picks, strict=True) if repeats),
        examples=examples, example_title=title, prompts=prompts, written=(*arms, *bases.values()),
    )  # fmt: skip


def success_key(k: int) -> str:
    """The measure that strengths are chosen by."""
    return f"success@{k}"


def choices(arm: ArmTexts, key: str, prompts: Sequence[int], *, paper: bool = False) -> list[tuple[int, bool]]:
    """The strength of each feature by one of the two rules, and whether every strength gave repetition."""
    rule, chosen = (paper_strength if paper else best_strength), list(prompts)
    return [rule(arm.values[key][f][:, chosen], arm.values["nll"][f][:, chosen]) for f in range(len(arm.features))]


def _differences(
    by_name: Mapping[str, ArmTexts], bases: Mapping[str, ArmTexts], chosen: Mapping[str, Sequence[int]], measure: str,
    prompts: Sequence[int],
) -> dict[str, Estimate]:  # fmt: skip
    steered = by_name["feature"].at(measure, chosen["feature"], prompts)
    differences = {
        words: two_level(steered - by_name[name].at(measure, chosen[name], prompts))
        for name, words in PAIRED.items()
        if name in by_name
    }
    lift = steered - bases["feature"].at(measure, [0] * len(steered), prompts)
    for name, words in LIFTED.items():
        if name in by_name:
            own = by_name[name].at(measure, chosen[name], prompts)
            differences[words] = two_level_difference(lift, own - bases[name].at(measure, [0] * len(own), prompts))
    return {words: value for words, value in differences.items() if value is not None}


def arm_result(arm: ArmTexts, chosen: Sequence[int], key: str, prompts: Sequence[int]) -> ArmResult:
    """Every measure of an arm at the chosen strengths."""
    count = arm.at(key, chosen, prompts)
    plain = {
        name: two_level(arm.at(name, chosen, prompts))
        for name in ("share", "log_odds", "distinct1", "distinct2", "repeated", "kl")
    }
    harm = None if arm.harm is None else two_level(arm.harm[np.arange(len(count)), list(chosen)], unit="plain texts")
    return ArmResult(
        name=arm.name, success=two_level(count), degenerate=two_level(degenerate(count)), harm=harm,
        perplexity=perplexity(arm.at("nll", chosen, prompts)), **plain,
    )  # fmt: skip


def perplexity(nll: np.ndarray) -> Estimate | None:
    """The exponential of the mean over texts, with the exponentials of its interval."""
    mean = two_level(nll)
    if mean is None:
        return None
    low, value, high = (math.exp(x) for x in (mean.low, mean.value, mean.high))
    return replace(mean, value=value, low=low, high=high, method=f"exp of the {mean.method}")


def curve(arm: ArmTexts, prompts: Sequence[int]) -> tuple[Estimate | None, ...]:
    """Mean share of lens tokens at each strength."""
    n = len(arm.features)
    return tuple(two_level(arm.at("share", [s] * n, prompts)) for s in range(len(arm.strengths)))


def points_of(arm: ArmTexts, base: ArmTexts, prompts: Sequence[int]) -> list[Point]:
    """Effect and cost of one arm at each strength."""
    n, points = len(arm.features), []
    for s, strength in enumerate(arm.strengths):
        effect = arm.at("share", [s] * n, prompts) - base.at("share", [0] * n, prompts)
        nll, plain = arm.at("nll", [s] * n, prompts), base.at("nll", [0] * n, prompts)
        known = np.isfinite(nll).any() and np.isfinite(plain).any()
        cost = float(np.nanmean(nll) - np.nanmean(plain)) if known else math.nan
        harm = None if arm.harm is None else float(arm.harm[:, s].mean())
        points.append(Point(arm.name, strength, float(effect.mean()), cost, harm, False))
    return points


def with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, with those marked that no other point dominates."""
    front = pareto_front([p.effect for p in points], [p.cost for p in points])
    return tuple(replace(p, on_front=i in front) for i, p in enumerate(points))


def _rule(rule: str, where: str, arm: ArmTexts, chosen: Sequence[int], key: str, prompts: Sequence[int]) -> RuleResult:
    strength = float(np.mean([arm.strengths[i] for i in chosen]))
    result = arm_result(arm, chosen, key, prompts)
    return RuleResult(rule, where, strength, result.success, result.share, result.perplexity)


def _feature_results(
    by_name: Mapping[str, ArmTexts], chosen: Mapping[str, Sequence[int]], papers: Sequence[int], words: Sequence[str],
    prompts: Sequence[int],
) -> list[FeatureResult]:  # fmt: skip
    steered = by_name["feature"]
    share = {
        name: by_name[name].at("share", chosen[name], prompts).mean(1) for name in ("feature", "unsteered", "random")
    }
    nll, odds = steered.at("nll", chosen["feature"], prompts), steered.at("log_odds", chosen["feature"], prompts)
    results = []
    for i, feature in enumerate(steered.features):
        known = nll[i][np.isfinite(nll[i])]
        feature_share, unsteered, random = (float(share[name][i]) for name in ("feature", "unsteered", "random"))
        results.append(
            FeatureResult(
                feature=feature, tokens=words[i], strength=steered.strengths[chosen["feature"][i]],
                paper_strength=steered.strengths[papers[i]],
                share=feature_share, unsteered=unsteered, random=random, log_odds=float(odds[i].mean()),
                perplexity=float(np.exp(known.mean())) if len(known) else math.nan,
            )
        )  # fmt: skip
    return results


def _examples(
    steered: ArmTexts, base: ArmTexts, chosen: Sequence[int], prompts: Sequence[str], words: Sequence[str]
) -> tuple[tuple[tuple[str, str, str], ...], str]:
    """Texts of the feature with the most lens tokens on the selection prompts, shown on the evaluation prompts."""
    best = int(steered.at("share", chosen, range(0, len(prompts), 2)).mean(1).argmax())
    texts = steered.texts[best][chosen[best]]
    rows = tuple((prompts[p], base.texts[best][0][p], texts[p]) for p in range(1, len(prompts), 2)[:N_EXAMPLES])
    strength = steered.strengths[chosen[best]]
    return rows, f"Feature {steered.features[best]} ({words[best]}) at strength {setting(strength)}, beside unsteered"
