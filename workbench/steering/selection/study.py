"""Does selecting features by output score make steering work? Several depths, several ways to select, controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.progress import task
from workbench.core.stats import Estimate
from workbench.features.scores.logit_lens import target_site
from workbench.models.model import Model
from workbench.steering.selection.claims import cooccurrence_claim, depth_claim, filter_claim, gain_of, ratios_of
from workbench.steering.selection.groups import GROUPS, Depth, StudyOptions, groups_of
from workbench.steering.selection.selection_report import DepthProfile, GroupResult, SelectionReport
from workbench.steering.selection.steer_groups import Steered, n_texts, steer_groups
from workbench.steering.sweep.build import perplexity
from workbench.steering.sweep.intervals import two_level


@checked
def selection_study(
    model: Model, depths: Sequence[Depth], options: StudyOptions | None = None, folder: Path | None = None
) -> SelectionReport:
    """Steers with features selected in several ways at several depths, and tests three published claims.

    Groups at each depth: features drawn at random; drawn from those with an output score above the threshold; as
    frequent as these; those with the best output scores, the best input scores, and the largest change of confidence.
    Success is the number of the feature's lens tokens per text, at the strength that half of the prompts choose, on
    the other half. Controls, with the same tokens: the unsteered model and a random direction of equal norm for every
    feature; beyond that a second random draw, and for the scores random directions and shuffled pairs.

    Args:
        model: the model.
        depths: SAEs with their feature tables, at least two depths.
        options: sizes and cuts.
        folder: gets the texts as they are written; an interrupted study goes on from them.

    Raises:
        InvalidInputError: for fewer than two depths, or two SAEs at the same layer.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063); confidence after Wang et al. 2025 (arXiv 2510.03659).
    """
    options = options or StudyOptions()
    layers = [target_site(model, depth.sae).layer for depth in depths]
    if len(depths) < 2 or len(set(layers)) != len(layers) or None in layers:
        raise InvalidInputError(f"selection_study: SAEs at layers {layers}. Give two or more, each at another layer.")
    ordered = [depths[i] for i in np.argsort(np.array(layers, dtype=int))]
    groups = [groups_of(depth, options) for depth in ordered]
    total = sum(n_texts(found, options) for found in groups)
    with task(total=total, description="steering", unit="texts") as progress:
        steered = [
            steer_groups(model, depth, found, options, folder, progress)
            for depth, found in zip(ordered, groups, strict=True)
        ]
    profile = tuple(profile_of(model, depth, options) for depth in ordered)
    claims = (depth_claim(ordered, options), cooccurrence_claim(ordered, options), filter_claim(steered))
    settings = {
        "model": model.name, "layers": [p.layer for p in profile], "threshold": options.threshold, "high": options.high,
        "n_features": options.n_features, "strengths": list(options.strengths), "prompts": len(options.prompts),
        "new_tokens": options.steering.new_tokens, "temperature": options.steering.temperature, "seed": options.seed,
        "k": options.steering.k, "texts": total,
    }  # fmt: skip
    results = _group_results(steered, [p.layer for p in profile])
    return SelectionReport(settings, profile, results, ratios_of(steered), claims)


def _group_results(steered: Sequence[Steered], layers: Sequence[int]) -> tuple[GroupResult, ...]:
    results = []
    for group in GROUPS:
        having = [(one, layer) for one, layer in zip(steered, layers, strict=True) if group in one.feature]
        results += [_group_result(group, [one], layer) for one, layer in having]
        if having:
            results.append(_group_result(group, [one for one, _ in having], None))
    return tuple(results)


def _group_result(group: str, depths: Sequence[Steered], layer: int | None) -> GroupResult:
    """One group at one layer, or over all that have it."""

    def mean(tables: list[np.ndarray]) -> Estimate | None:
        return two_level(np.concatenate(tables))

    return GroupResult(
        group=group, layer=layer, n=sum(len(one.feature[group].success) for one in depths),
        success=mean([one.feature[group].success for one in depths]),
        unsteered=mean([one.unsteered[group].success for one in depths]),
        random=mean([one.random[group].success for one in depths]),
        gain=mean([gain_of(one, group) for one in depths]),
        by_paper=mean([one.feature[group].by_paper for one in depths]),
        perplexity=perplexity(np.concatenate([one.feature[group].nll for one in depths])),
        unsteered_perplexity=perplexity(np.concatenate([one.unsteered[group].nll for one in depths])),
    )  # fmt: skip


def profile_of(model: Model, depth: Depth, options: StudyOptions) -> DepthProfile:
    """Scores of all alive features at one depth, beside random directions."""
    site, df = target_site(model, depth.sae), depth.table.alive()
    output, read = (df[name].dropna().to_numpy(dtype=float) for name in ("output_score", "input_score"))
    controls = depth.table.controls
    control, shuffled = (
        np.array(controls.get(name, ()), dtype=float) for name in ("random_output_score", "shuffled_input_score")
    )
    both = df.dropna(subset=["output_score", "input_score"])
    high = (both["output_score"] >= options.high) & (both["input_score"] >= options.high)
    return DepthProfile(
        layer=int(site.layer or 0), depth=(int(site.layer or 0) + 1) / model.n_layers, n=len(df),
        output=_mean(output), random_output=_mean(control), input=_mean(read), shuffled_input=_mean(shuffled),
        share=float((output >= options.threshold).mean()),
        random_share=float((control >= options.threshold).mean()) if len(control) else float("nan"),
        confidence=_mean(df["confidence_delta"].dropna().abs().to_numpy(dtype=float)),
        both=int(high.sum()),
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
