"""Does selecting features by output score make steering work? Several depths, several ways to select, controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.features.lens import target_site
from workbench.features.table import FeatureTable
from workbench.models.model import Model
from workbench.progress import Task, task
from workbench.stats import Estimate
from workbench.steering.arms import Arm
from workbench.steering.build import choices, perplexity, success_key
from workbench.steering.intervals import two_level, two_level_ratio
from workbench.steering.options import SteerOptions
from workbench.steering.prompts import NEUTRAL_PROMPTS
from workbench.steering.steer import Bench, PushSet, check_prompts, random_like, sizes_of
from workbench.steering.study_report import Claim, DepthProfile, GroupResult, SelectionReport

UNFILTERED, SECOND, FILTERED = "unfiltered", "unfiltered, another draw", "output score above the threshold"
BEST = {"best output scores": "output_score", "best input scores": "input_score",
        "largest change of confidence": "confidence_delta"}  # fmt: skip
RANDOM = "random directions, tokens of the filtered features"
DRAWS = 2000


@dataclass(frozen=True)
class StudyOptions:
    """Sizes and cuts of the study.

    Attributes:
        n_features: features per group and depth.
        strengths: factors on a_max; the best of each feature is chosen on half of the prompts.
        threshold: output score from which a feature counts as an output feature.
        high: from which input and output scores count as high.
        prompts: neutral texts.
        steering: details of steering.
        seed: of the draws of features.
    """

    n_features: int = 10
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    threshold: float = 0.01
    high: float = 0.1
    prompts: tuple[str, ...] = NEUTRAL_PROMPTS[:12]
    steering: SteerOptions = field(default_factory=lambda: SteerOptions(plain_texts=()))
    seed: int = 0

    def __post_init__(self) -> None:
        check_prompts(self.prompts, self.strengths, "StudyOptions")
        if self.n_features < 2 or not 0 < self.threshold < 1 or not 0 < self.high < 1:
            raise InvalidInputError(
                f"StudyOptions(n_features={self.n_features}, threshold={self.threshold}, high={self.high}): take two "
                "features or more, and cuts between 0 and 1."
            )


@dataclass(frozen=True, eq=False)
class Depth:
    """An SAE at one depth and the scores of its features."""

    sae: Any
    table: FeatureTable


def selection_study(model: Model, depths: Sequence[Depth], options: StudyOptions | None = None) -> SelectionReport:
    """Steers with features selected in several ways at several depths, and tests three published claims.

    Groups at each depth: features drawn at random; drawn from those with an output score above the threshold; those
    with the best output scores, the best input scores, and the largest change of confidence. Success is the number of
    the feature's lens tokens per text, at the strength that half of the prompts choose, on the other half. Controls: a
    second random draw, random directions, and for the scores random directions and shuffled pairs.

    Args:
        model: the model.
        depths: SAEs with their feature tables, at least two depths.
        options: sizes and cuts.

    Raises:
        InvalidInputError: for fewer than two depths, or two SAEs at the same layer.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063); confidence after Wang et al. 2025 (arXiv 2510.03659).
    """
    options = options or StudyOptions()
    layers = [target_site(model, depth.sae).layer for depth in depths]
    if len(depths) < 2 or len(set(layers)) != len(layers) or None in layers:
        raise InvalidInputError(f"selection_study: SAEs at layers {layers}. Give two or more, each at another layer.")
    ordered = [depths[i] for i in np.argsort(np.array(layers, dtype=int))]
    groups = [groups_of(depth.table, options) for depth in ordered]
    rows = sum(len({f for group in found.values() for f in group}) + len(found.get(FILTERED, ())) for found in groups)
    with task(
        total=rows * len(options.strengths) * len(options.prompts), description="steering", unit="texts"
    ) as progress:
        steered = [
            _steered(model, depth, found, options, progress) for depth, found in zip(ordered, groups, strict=True)
        ]
    profile = tuple(profile_of(model, depth, options) for depth in ordered)
    results = _group_results(steered, [p.layer for p in profile])
    claims = (
        depth_claim(ordered, options),
        cooccurrence_claim(ordered, options),
        filter_claim(steered),
    )
    settings = {
        "model": model.name, "layers": [p.layer for p in profile], "threshold": options.threshold, "high": options.high,
        "n_features": options.n_features, "strengths": list(options.strengths), "prompts": len(options.prompts),
        "new_tokens": options.steering.new_tokens, "temperature": options.steering.temperature, "seed": options.seed,
        "k": options.steering.k,
    }  # fmt: skip
    return SelectionReport(settings, profile, results, _ratios(steered), claims)


def groups_of(table: FeatureTable, options: StudyOptions) -> dict[str, list[int]]:
    """The features of each group, fewer where there are not enough; groups without any are left out."""
    alive = table.alive().dropna(subset=["output_score"])
    if len(alive) < 2:
        raise DegenerateInputError(
            f"selection_study: {len(alive)} alive features with an output score at {table.meta.get('site')}. Score all."
        )
    random, n = np.random.default_rng(options.seed), options.n_features
    order = random.permutation(alive["feature"].tolist()).tolist()
    good = alive[alive["output_score"] >= options.threshold]["feature"]
    found = {
        UNFILTERED: order[:n],
        SECOND: order[n : 2 * n],
        FILTERED: [int(f) for f in random.permutation(good.tolist())[:n]],
    }
    for name, column in BEST.items():
        known = alive.dropna(subset=[column])
        size = known[column].abs().sort_values(ascending=False, kind="stable").index[:n]
        found[name] = [int(f) for f in known.loc[size, "feature"]]
    return {name: group for name, group in found.items() if group}


@dataclass(frozen=True, eq=False)
class _Steered:
    """Success and log-likelihood of the features of each group, on the evaluation prompts."""

    success: dict[str, Float[np.ndarray, "_ prompts"]]
    nll: dict[str, Float[np.ndarray, "_ prompts"]]


def _steered(
    model: Model, depth: Depth, groups: dict[str, list[int]], options: StudyOptions, progress: Task
) -> _Steered:
    bench = Bench(model, depth.sae, target_site(model, depth.sae), options.prompts, options.steering)
    every = sorted({f for group in groups.values() for f in group})
    rows = {feature: i for i, feature in enumerate(every)}
    arm = _arm(bench, every, options, progress)
    success, nll = _on_evaluation(arm, options)
    at = {name: [rows[f] for f in group] for name, group in groups.items()}
    found = _Steered({n: success[i] for n, i in at.items()}, {n: nll[i] for n, i in at.items()})
    if FILTERED in groups:
        control = _on_evaluation(_arm(bench, groups[FILTERED], options, progress, noise=True), options)
        found.success[RANDOM], found.nll[RANDOM] = control
    return found


def _arm(bench: Bench, features: list[int], options: StudyOptions, progress: Task, noise: bool = False) -> Arm:
    owners = torch.tensor(features)
    vectors = bench.sae.W_dec.detach()[owners].float()
    vectors = random_like(vectors, options.seed) if noise else vectors
    pushes = PushSet(owners, vectors, sizes_of(owners, options.steering))
    return bench.arm("random" if noise else "feature", pushes, options.strengths, progress)


def _on_evaluation(arm: Arm, options: StudyOptions) -> tuple[np.ndarray, np.ndarray]:
    key = success_key(options.steering.k)
    n = len(options.prompts)
    chosen = [i for i, _ in choices(arm, key, range(0, n, 2))]
    return arm.at(key, chosen, range(1, n, 2)), arm.at("nll", chosen, range(1, n, 2))


def _group_results(steered: Sequence[_Steered], layers: Sequence[int]) -> tuple[GroupResult, ...]:
    found = []
    for name in (UNFILTERED, SECOND, FILTERED, *BEST, RANDOM):
        for one, layer in zip(steered, layers, strict=True):
            if name in one.success:
                table = one.success[name]
                found.append(GroupResult(name, layer, len(table), two_level(table), perplexity(one.nll[name])))
        pooled = _pooled(steered, name)
        if pooled is not None:
            nll = np.concatenate([one.nll[name] for one in steered if name in one.nll])
            found.append(GroupResult(name, None, len(pooled[0]), two_level(pooled[0]), perplexity(nll)))
    return tuple(found)


def _pooled(steered: Sequence[_Steered], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Success of a group and of as many unfiltered features of each depth, so that depth makes no difference."""
    both = [
        (one.success[name], one.success[UNFILTERED][: len(one.success[name])]) for one in steered if name in one.success
    ]
    return (np.concatenate([a for a, _ in both]), np.concatenate([b for _, b in both])) if both else None


def _ratios(steered: Sequence[_Steered]) -> dict[str, Estimate]:
    """Success of each group divided by that of the unfiltered features at the same depths."""
    found = {}
    for name in (SECOND, FILTERED, *BEST, RANDOM):
        pooled = _pooled(steered, name)
        ratio = None if pooled is None else two_level_ratio(*pooled)
        if ratio is not None:
            found[name] = ratio
    return found


def profile_of(model: Model, depth: Depth, options: StudyOptions) -> DepthProfile:
    """Scores of all alive features at one depth, beside random directions."""
    site, df = target_site(model, depth.sae), depth.table.alive()
    output, read = (df[name].dropna().to_numpy(dtype=float) for name in ("output_score", "input_score"))
    control = np.array(depth.table.controls.get("random_output_score", ()), dtype=float)
    both = df.dropna(subset=["output_score", "input_score"])
    high = (both["output_score"] >= options.high) & (both["input_score"] >= options.high)
    return DepthProfile(
        layer=int(site.layer or 0), depth=(int(site.layer or 0) + 1) / model.n_layers, n=len(df),
        output=_mean(output), input=_mean(read), share=float((output >= options.threshold).mean()),
        random_share=float((control >= options.threshold).mean()) if len(control) else float("nan"),
        confidence=_mean(df["confidence_delta"].dropna().abs().to_numpy(dtype=float)),
        both=int(high.sum()),
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def depth_claim(depths: Sequence[Depth], options: StudyOptions) -> Claim:
    """Output features lie deep: their share at the deepest site minus that at the shallowest, less that of noise."""
    first, last = depths[0].table, depths[-1].table
    shares = [t.alive()["output_score"].dropna().to_numpy(dtype=float) >= options.threshold for t in (last, first)]
    noise = [np.array(t.controls.get("random_output_score", ())) >= options.threshold for t in (last, first)]
    found = difference_of_shares(*shares, seed=options.seed)
    claim = "Output features lie deep"
    measured = f"share of features with an output score of {options.threshold:g} or more, deepest minus shallowest site"
    if not all(len(part) for part in noise):
        verdict = "not clear"
        return Claim(claim, measured, found, None, verdict, "no random directions were scored")
    control = difference_of_shares(*noise, seed=options.seed)
    above = difference_of_shares(*shares, *noise, seed=options.seed)
    verdict = "holds" if above.low > 0 and found.low > 0 else ("does not hold" if found.high < 0 else "not clear")
    return Claim(claim, measured, found, control, verdict, f"beyond the random directions {above}")


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
    """High input and output scores rarely co-occur: how often they do, against independence."""
    tables = [d.table.alive().dropna(subset=["output_score", "input_score"]) for d in depths]
    cells = [
        (
            df["input_score"].to_numpy(dtype=float) >= options.high,
            df["output_score"].to_numpy(dtype=float) >= options.high,
        )
        for df in tables
    ]
    read, write = (np.concatenate([cell[i] for cell in cells]) for i in (0, 1))
    claim = "High input and output scores rarely co-occur"
    measured = f"features with both scores at {options.high:g} or more, divided by the number under independence"
    found = observed_over_expected(int((read & write).sum()), float(read.mean() * write.sum()) if len(read) else 0.0)
    within = observed_over_expected(
        int((read & write).sum()), float(sum(a.mean() * b.sum() for a, b in cells if len(a)))
    )
    if found is None:
        return Claim(claim, measured, None, None, "not clear", "no feature is high in one of the two scores")
    verdict = "holds" if found.high < 1 else ("does not hold" if found.low > 1 else "not clear")
    return Claim(claim, measured, found, None, verdict, f"against independence within each depth {within}")


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


def filter_claim(steered: Sequence[_Steered]) -> Claim:
    """Filtering multiplies steering success: filtered against unfiltered features, beside a second random draw."""
    claim = "Filtering by output score multiplies steering success"
    measured = "lens tokens per text, filtered features divided by unfiltered ones"
    ratios = _ratios(steered)
    found, control = ratios.get(FILTERED), ratios.get(SECOND)
    if found is None:
        return Claim(
            claim, measured, None, control, "not clear", "no feature passes, or the unfiltered ones write none"
        )
    verdict = "holds" if found.low > 1 else ("does not hold" if found.high < 1 else "not clear")
    noise = ratios.get(RANDOM)
    note = "random directions write none" if noise is None else f"random directions against unfiltered features {noise}"
    return Claim(claim, measured, found, control, verdict, note)
