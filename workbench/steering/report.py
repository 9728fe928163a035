"""What a steering run found: strengths chosen on half of the prompts, effects measured on the other half."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.interventions.report import EditReport
from workbench.report import Bars, Block, Lines, Metric, Report, Section, Series, Table, Text
from workbench.stats import Estimate, bootstrap_mean
from workbench.steering.measures import DEGENERATE_COUNT, TextMeasures

ARM_WORDS = {
    "unsteered": "unsteered", "feature": "features", "random": "random directions of the same norm",
    "control": "control features, their own tokens",
}  # fmt: skip


@dataclass(frozen=True)
class EditSummary:
    """What the edits of one arm at one strength did.

    Attributes:
        strength: factor on a_max.
        tokens: tokens edited.
        mean_norm: mean L2 norm that reached the model.
        share: that norm relative to the mean norm of the edited activations.
    """

    strength: float
    tokens: int
    mean_norm: float
    share: float

    @classmethod
    def of(cls, strength: float, reports: Sequence[EditReport]) -> EditSummary:
        """The reports of several batches as one, weighted by their tokens."""
        tokens = sum(r.tokens for r in reports)
        norm = sum(r.mean_norm_applied * r.tokens for r in reports)
        before = sum(r.mean_norm_applied / r.share * r.tokens for r in reports if r.share)
        return cls(strength, tokens, norm / max(tokens, 1), norm / before if before else 0.0)


@dataclass(frozen=True)
class Arm:
    """One kind of run: every feature at every strength on every prompt.

    Attributes:
        name: "unsteered", "feature", "random" or "control".
        features: whose lens tokens are counted.
        strengths: of the edits.
        measures: by feature, then strength.
        texts: continuations by feature, then strength (flat), then prompt.
        edits: one summary per strength.
    """

    name: str
    features: tuple[int, ...]
    strengths: tuple[float, ...]
    measures: tuple[tuple[TextMeasures, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    edits: tuple[EditSummary, ...]


@dataclass(frozen=True)
class ArmResult:
    """One arm at the chosen strengths, on the evaluation prompts; intervals over prompts.

    Attributes:
        share: share of the tokens written that are lens tokens.
        count: lens tokens per continuation (generation success).
        perplexity: under the unsteered model.
        distinct2: different neighbouring pairs per pair.
        degenerate: share of continuations with more than three lens tokens.
    """

    name: str
    share: Estimate
    count: Estimate
    perplexity: Estimate | None
    distinct2: Estimate | None
    degenerate: Estimate


@dataclass(frozen=True)
class FeatureResult:
    """One feature at its chosen strength, means over the evaluation prompts."""

    feature: int
    tokens: str
    strength: float
    share: float
    unsteered: float
    random: float
    perplexity: float


@dataclass(frozen=True)
class SteeringReport(Report):
    """Effects of steering beside their controls.

    Attributes:
        settings: model, site, scope, strengths, sampling.
        n_selection: prompts on which strengths were chosen; `n_evaluation` others measured.
        arms: results per arm.
        differences: share of lens tokens, features minus each control, paired over prompts.
        features: results per feature.
        curves: per arm and strength the mean share and its interval on the evaluation prompts.
        edits: per arm and strength what was added.
        all_degenerate: features for which every strength gave repetition; they keep the smallest.
        examples: prompt, unsteered and steered text of the feature that did best on the selection prompts.
        example_title: which feature that is.
    """

    settings: dict[str, Any]
    n_selection: int
    n_evaluation: int
    arms: tuple[ArmResult, ...]
    differences: dict[str, Estimate]
    features: tuple[FeatureResult, ...]
    curves: dict[str, tuple[Estimate, ...]]
    edits: dict[str, tuple[EditSummary, ...]]
    all_degenerate: tuple[int, ...]
    examples: tuple[tuple[str, str, str], ...]
    example_title: str

    def findings(self) -> tuple[str, ...]:
        """Effects beside their controls, and the price in perplexity and repetition."""
        by_name = {arm.name: arm for arm in self.arms}
        steered, base = by_name["feature"], by_name["unsteered"]
        found = [
            f"Of what the model writes under {len(self.features)} steering features, "
            f"{100 * steered.share.value:.1f} % are lens tokens "
            f"of the feature; without steering {100 * base.share.value:.1f} % ({steered.share.n} prompts)."
        ]
        for name, difference in self.differences.items():
            clear = difference.low > 0
            verdict = "more than" if clear else ("less than" if difference.high < 0 else "no clear difference from")
            found.append(f"Share of lens tokens: {verdict} {name}, difference {difference}.")
        if steered.perplexity and base.perplexity:
            found.append(
                f"The price: perplexity under the unsteered model {steered.perplexity}, unsteered {base.perplexity}; "
                f"{100 * steered.degenerate.value:.0f} % of the steered texts repeat the tokens more than "
                f"{DEGENERATE_COUNT:g} times."
            )
        if self.all_degenerate:
            repeating = list(self.all_degenerate)
            found.append(f"Every strength gave repetition for features {repeating}; they were run at the smallest.")
        return tuple(found)

    def section(self) -> Section:
        """Arms, differences, strengths, edits and example texts."""
        metrics: dict[str, Metric] = {"n_evaluation_prompts": self.n_evaluation}
        for arm in self.arms:
            for key in ("share", "count", "perplexity", "distinct2", "degenerate"):
                value = getattr(arm, key)
                if value is not None:
                    metrics[f"{arm.name}.{key}"] = value
        metrics |= {f"difference.{_slug(name)}": value for name, value in self.differences.items()}
        return Section("Steering", tuple(self._blocks()), self.findings(), metrics)

    def _blocks(self) -> list[Block]:
        s = self.settings
        about = (
            f"{s['site']} of {s['model']}, steered at {s['scope']} with strength * a_max * W_dec[f]; "
            f"{s['new_tokens']} tokens at "
            f"temperature {s['temperature']}, seed {s['seed']}, the same random numbers for a prompt in every "
            "arm. Strengths were chosen "
            f"on {self.n_selection} prompts by (lens tokens per text) / perplexity, leaving out strengths with "
            "more than "
            f"{DEGENERATE_COUNT:g} lens tokens per text; everything below is from the other {self.n_evaluation} "
            "prompts. Random directions "
            "run at the strength of their feature. Perplexity is that of the unsteered model."
        )
        columns = ("arm", "share of lens tokens", "lens tokens per text", "perplexity", "distinct-2", "repetitive")
        rows = tuple(
            (ARM_WORDS.get(a.name, a.name), a.share, a.count, a.perplexity, a.distinct2, a.degenerate)
            for a in self.arms
        )
        per_feature = tuple(
            (f.feature, f.tokens, f.strength, f.share, f.unsteered, f.random, f.perplexity) for f in self.features
        )
        blocks: list[Block] = [
            Text(about),
            Table(columns, rows, "Means over features, intervals over prompts"),
            Bars(
                "Share of lens tokens: steered minus control",
                tuple(self.differences), tuple(self.differences.values()), y_label="difference", reference=0.0,
            ),
        ]  # fmt: skip
        if len(s["strengths"]) > 1:
            blocks.append(self._lines())
        blocks += [
            Table(("feature", "lens tokens", "strength", "share", "unsteered", "random", "perplexity"), per_feature,
                  "Each feature at the strength chosen for it"),
            self._edit_table(),
        ]  # fmt: skip
        if self.examples:
            blocks.append(Table(("prompt", "unsteered", "steered"), self.examples, self.example_title))
        return blocks

    def _lines(self) -> Lines:
        series = tuple(
            Series(ARM_WORDS.get(name, name), tuple(self.settings["strengths"]), tuple(e.value for e in curve),
                   tuple(e.low for e in curve), tuple(e.high for e in curve))
            for name, curve in self.curves.items()
        )  # fmt: skip
        return Lines(
            "Share of lens tokens by strength", series, x_label="strength (multiples of a_max)", y_label="share"
        )

    def _edit_table(self) -> Table:
        rows = tuple(
            (ARM_WORDS.get(name, name), e.strength, e.tokens, e.mean_norm, e.share)
            for name, edits in self.edits.items()
            for e in edits
        )
        columns = ("arm", "strength", "tokens edited", "mean norm added", "relative to the activations")
        return Table(columns, rows, "What the edits did")


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


def best_strength(measures: Sequence[TextMeasures], prompts: Sequence[int]) -> tuple[int, bool]:
    """Index of the strength with the largest (lens tokens per text) / perplexity, and whether all gave repetition.

    Only the given prompts are looked at. Strengths with more than three lens tokens per text are left out; if none is
    left, the first is taken. Of equal strengths the first wins.

    Source: Arad, Mueller, Belinkov 2025, section 4.1; their normalisation by the maxima does not change the choice.
    """
    scores = []
    for m in measures:
        count = float(np.mean([m.count[p] for p in prompts]))
        nll = [m.nll[p] for p in prompts if not math.isnan(m.nll[p])]
        usable = count <= DEGENERATE_COUNT
        scores.append((count / math.exp(float(np.mean(nll))) if nll else 0.0) if usable else -1.0)
    best = int(np.argmax(scores))
    return (0, True) if scores[best] < 0 else (best, False)


def build_report(
    settings: dict[str, Any], prompts: tuple[str, ...], words: tuple[str, ...], arms: Sequence[Arm], base: Sequence[Arm]
) -> SteeringReport:
    """Chooses strengths on the even prompts and measures on the odd ones.

    Args:
        settings: what was run.
        prompts: the prompts.
        words: lens tokens of each feature, as text.
        arms: "feature", "random" and maybe "control".
        base: the unsteered texts measured with the tokens of "feature", and of "control" if there is one.
    """
    selection, evaluation = list(range(0, len(prompts), 2)), list(range(1, len(prompts), 2))
    by_name = {arm.name: arm for arm in arms}
    steered, control = by_name["feature"], by_name.get("control")
    picks = [best_strength(m, selection) for m in steered.measures]
    chosen = {"feature": [i for i, _ in picks], "random": [i for i, _ in picks]}
    if control is not None:
        chosen["control"] = [best_strength(m, selection)[0] for m in control.measures]
    at: dict[str, list[TextMeasures]] = {
        name: [m[i] for m, i in zip(by_name[name].measures, indices, strict=True)] for name, indices in chosen.items()
    }
    at["unsteered"] = [m[0] for m in base[0].measures]
    order = [name for name in ("feature", "random", "control", "unsteered") if name in at]
    per_prompt = {name: _per_prompt(at[name], evaluation, _share) for name in order}
    differences = {
        "unsteered": _interval(per_prompt["feature"] - per_prompt["unsteered"]),
        "random directions": _interval(per_prompt["feature"] - per_prompt["random"]),
    }
    if control is not None:
        own_base = _per_prompt([m[0] for m in base[1].measures], evaluation, _share)
        lift = per_prompt["feature"] - per_prompt["unsteered"] - (per_prompt["control"] - own_base)
        differences["control features, both above unsteered"] = _interval(lift)
    examples, title = _examples(steered, base[0], chosen["feature"], prompts, words, selection, evaluation)
    return SteeringReport(
        settings=settings, n_selection=len(selection), n_evaluation=len(evaluation),
        arms=tuple(_arm_result(name, at[name], evaluation) for name in order), differences=differences,
        features=tuple(
            _feature_result(steered, i, words[i], chosen["feature"][i], at, evaluation) for i in range(len(words))
        ),
        curves={
            arm.name: tuple(
                _interval(_per_prompt([m[j] for m in arm.measures], evaluation, _share))
                for j in range(len(arm.strengths))
            )
            for arm in arms
        },
        edits={arm.name: arm.edits for arm in arms},
        all_degenerate=tuple(f for f, (_, repeats) in zip(steered.features, picks, strict=True) if repeats),
        examples=examples, example_title=title,
    )  # fmt: skip


def _share(m: TextMeasures) -> Sequence[float]:
    return m.share


def _per_prompt(
    measures: Sequence[TextMeasures], prompts: Sequence[int], what: Callable[[TextMeasures], Sequence[float]]
) -> np.ndarray:
    """Mean over features for each prompt, so that a prompt is one unit; nan where no feature has a value."""
    table = np.array([[float(what(m)[p]) for p in prompts] for m in measures])
    known = np.isfinite(table)
    total = np.where(known, table, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _interval(values: np.ndarray) -> Estimate:
    return bootstrap_mean(values, unit="prompts")


def _known_interval(values: np.ndarray) -> Estimate | None:
    known = values[np.isfinite(values)]
    return _interval(known) if len(known) else None


def _arm_result(name: str, measures: Sequence[TextMeasures], prompts: Sequence[int]) -> ArmResult:
    nll = _known_interval(_per_prompt(measures, prompts, lambda m: m.nll))
    perplexity = None
    if nll is not None:
        perplexity = Estimate(
            math.exp(nll.value),
            math.exp(nll.low),
            math.exp(nll.high),
            nll.n,
            "exp of the bootstrapped mean over prompts",
            "prompts",
        )
    return ArmResult(
        name, _interval(_per_prompt(measures, prompts, _share)), _interval(_per_prompt(measures, prompts, lambda m:
        m.count)),
        perplexity, _known_interval(_per_prompt(measures, prompts, lambda m: m.distinct2)),
        _interval(_per_prompt(measures, prompts, lambda m: m.degenerate)),
    )  # fmt: skip


def _feature_result(
    arm: Arm, i: int, tokens: str, strength: int, at: dict[str, list[TextMeasures]], prompts: Sequence[int]
) -> FeatureResult:
    shares = {
        name: float(_per_prompt([at[name][i]], prompts, _share).mean()) for name in ("feature", "unsteered", "random")
    }
    nll = np.array([at["feature"][i].nll[p] for p in prompts])
    known = nll[np.isfinite(nll)]
    perplexity = float(np.exp(known.mean())) if len(known) else math.nan
    return FeatureResult(
        arm.features[i],
        tokens,
        arm.strengths[strength],
        shares["feature"],
        shares["unsteered"],
        shares["random"],
        perplexity,
    )


def _examples(
    steered: Arm,
    base: Arm,
    chosen: Sequence[int],
    prompts: Sequence[str],
    words: Sequence[str],
    selection: Sequence[int],
    evaluation: Sequence[int],
    n: int = 6,
) -> tuple[tuple[tuple[str, str, str], ...], str]:
    """Texts of the feature with the most lens tokens on the selection prompts, shown on the evaluation prompts."""
    counts = [float(np.mean([m[j].share[p] for p in selection])) for m, j in zip(steered.measures, chosen, strict=True)]
    best = int(np.argmax(counts))
    texts = steered.texts[best * len(steered.strengths) + chosen[best]]
    rows = tuple((prompts[p], base.texts[best][p], texts[p]) for p in evaluation[:n])
    strength = steered.strengths[chosen[best]]
    title = f"Feature {steered.features[best]} ({words[best]}) at strength {strength:g}, beside unsteered"
    return rows, title
