"""What a steering run found: strengths chosen on half of the prompts, effects measured on the other half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.core.jsontext import Record
from workbench.core.numbers import counted, number, setting
from workbench.core.records import to_jsonable
from workbench.core.stats import Estimate
from workbench.report.base import (
    Bars,
    Block,
    Headline,
    Lines,
    Metric,
    Report,
    Says,
    Scatter,
    Section,
    Series,
    Table,
    Text,
)
from workbench.steering.sweep.arms import ARM_WORDS, ArmTexts, EditSummary
from workbench.steering.sweep.measures import DEGENERATE_COUNT

MEASURES = (
    "share", "success", "log_odds", "perplexity", "distinct1", "distinct2", "repeated", "degenerate", "kl", "harm",
)  # fmt: skip
MEASURE_WORDS = {
    "share": "share of lens tokens", "success": "lens tokens per text", "log_odds": "log-odds of lens tokens (nats)",
    "perplexity": "perplexity", "distinct1": "distinct-1", "distinct2": "distinct-2", "repeated": "repeated tokens",
    "degenerate": "repetitive texts", "kl": "KL (nats)", "harm": "loss on plain text (nats/token)",
}  # fmt: skip

RANDOM = "random directions"
"""The control of the headline, as `SteeringReport.differences` calls it."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm at the chosen strengths, on the evaluation prompts; intervals over prompts and features.

    Attributes:
        name: of the arm.
        share: share of the tokens written that are lens tokens.
        success: lens tokens per continuation (generation success at k).
        log_odds: log-odds of the lens tokens right after the prompt, minus those of the unsteered model; nats.
        perplexity: of the continuation under the unsteered model.
        distinct1: different tokens per token.
        distinct2: different neighbouring pairs per pair.
        repeated: share of the tokens that occur among the sixteen before.
        degenerate: share of continuations with more than three lens tokens.
        kl: divergence of the steered from the unsteered next-token distribution after the prompt; nats.
        harm: loss on plain text, edited minus unedited; nats per token. None where nothing is edited.
    """

    name: str
    share: Estimate | None
    success: Estimate | None
    log_odds: Estimate | None
    perplexity: Estimate | None
    distinct1: Estimate | None
    distinct2: Estimate | None
    repeated: Estimate | None
    degenerate: Estimate | None
    kl: Estimate | None
    harm: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureResult:
    """One feature at the strength of the held-out rule, means over the evaluation prompts.

    `paper_strength` is what the paper's rule takes, from all prompts.
    """

    feature: int | str
    tokens: str
    strength: float
    paper_strength: float
    share: float
    unsteered: float
    random: float
    log_odds: float
    perplexity: float


@dataclass(frozen=True)
class RuleResult:
    """What the features do at the strengths that one rule chooses, and on which prompts that was measured."""

    rule: str
    prompts: str
    mean_strength: float
    success: Estimate | None
    share: Estimate | None
    perplexity: Estimate | None


@dataclass(frozen=True)
class Point:
    """One arm at one strength, mean over features and evaluation prompts.

    Attributes:
        arm: its name.
        strength: of the edit.
        effect: share of lens tokens, minus that of the unsteered model.
        cost: nats per token of the texts under the unsteered model, minus those of unsteered texts.
        harm: loss on plain text, edited minus unedited; None where nothing is edited.
        on_front: whether no other point has as much effect at no more cost.
    """

    arm: str
    strength: float
    effect: float
    cost: float
    harm: float | None
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class TextsReport(Report):
    """What reports of steered texts share.

    Attributes:
        arms: results per arm, method and control.
        prompts: all prompts.
        written: every text with every measure; not part of the JSON.
    """

    arms: tuple[ArmResult, ...]
    prompts: tuple[str, ...] = ()
    written: tuple[ArmTexts, ...] = field(default=(), repr=False, compare=False)

    def arm(self, name: str) -> ArmResult:
        """The results of one arm."""
        return next(arm for arm in self.arms if arm.name == name)

    def to_json(self) -> Record:
        """The result in JSON types, without the single texts; `frame` has those."""
        return to_jsonable(replace(self, written=()))

    def frame(self) -> Any:
        """A pandas table with one row per text: arm, feature or concept, strength, prompt, text and every measure."""
        import pandas as pd

        return pd.DataFrame([row for arm in self.written for row in arm.rows(self.prompts)])


@dataclass(frozen=True, kw_only=True)
class SteeringReport(TextsReport):
    """Effects of steering beside their controls.

    Attributes:
        settings: model, site, scope, strengths, sampling.
        n_selection: prompts on which strengths were chosen; `n_evaluation` others measured.
        differences: share of lens tokens, features minus each control, paired over prompts and features.
        concept: the same of the log-odds of the lens tokens.
        features: results per feature.
        curves: per arm and strength the mean share and its interval on the evaluation prompts.
        points: effect and cost of every arm and strength.
        rules: the features at the strengths of each rule.
        edits: per arm and strength what was added.
        all_degenerate: features for which every strength gave repetition; they keep the smallest.
        examples: prompt, unsteered and steered text of the feature that did best on the selection prompts.
        example_title: which feature that is.
    """

    settings: Record
    n_selection: int
    n_evaluation: int
    differences: dict[str, Estimate]
    concept: dict[str, Estimate]
    features: tuple[FeatureResult, ...]
    curves: dict[str, tuple[Estimate | None, ...]]
    points: tuple[Point, ...]
    rules: tuple[RuleResult, ...]
    edits: dict[str, tuple[EditSummary, ...]]
    all_degenerate: tuple[int | str, ...]
    examples: tuple[tuple[str, str, str], ...]
    example_title: str

    def findings(self) -> tuple[str, ...]:
        """Effects beside their controls, and the price in perplexity, repetition and plain text."""
        steered, base = self.arm("feature"), self.arm("unsteered")
        lines = [
            f"Of what the model writes under {counted(len(self.features), 'steering features')}, a share of "
            f"{steered.share} is lens tokens of the feature; without steering {base.share}."
        ]
        for name, difference in self.differences.items():
            lines.append(f"Share of lens tokens: {verdict(difference)} {name}, difference {difference.change()}.")
        if steered.perplexity and base.perplexity:
            lines.append(
                f"The price: perplexity under the unsteered model {steered.perplexity}, unsteered {base.perplexity}; "
                f"a share of {steered.degenerate} of the steered texts repeats the tokens more than "
                f"{setting(DEGENERATE_COUNT)} times."
            )
        if steered.harm is not None:
            random = self.arm("random").harm
            lines.append(
                f"On plain text the edit costs {steered.harm} nats per token; a random direction of the same norm "
                f"costs {random}."
            )
        front = [point_name(p) for p in self.points if p.on_front]
        lines.append(f"Effect against cost: of {len(self.points)} arms and strengths none beats {', '.join(front)}.")
        if self.all_degenerate:
            repeating = list(self.all_degenerate)
            lines.append(f"Every strength gave repetition for features {repeating}; they were run at the smallest.")
        return tuple(lines)

    def section(self) -> Section:
        """Arms, differences, strengths, rules, effect against cost, edits and example texts."""
        metrics: dict[str, Metric] = {"n_evaluation_prompts": self.n_evaluation}
        for arm in self.arms:
            metrics |= {f"{arm.name}.{key}": v for key in MEASURES if (v := getattr(arm, key)) is not None}
        metrics |= {f"difference.{slug(name)}": value for name, value in self.differences.items()}
        metrics |= {f"log_odds_difference.{slug(name)}": value for name, value in self.concept.items()}
        return Section("Steering", tuple(self._blocks()), self.findings(), metrics, self.headline())

    def headline(self) -> Headline:
        """Share of lens tokens beside that of random directions, by their paired difference."""
        share, arms, minus = MEASURE_WORDS["share"], self._arm_table(), self._difference_table()
        return Headline.read(
            Says(*(
                f"Steering with features makes the model write their tokens {more} often than random directions of the "
                "same norm do."
                for more in ("more", "no more", "less")
            )),
            value=(arms, ARM_WORDS["feature"], share), control=(arms, ARM_WORDS["random"], share),
            difference=(minus, RANDOM, share) if RANDOM in self.differences else None,
        )  # fmt: skip

    def _arm_table(self) -> Table:
        return arm_table(self.arms, "Means over features, intervals over prompts and features")

    def _difference_table(self) -> Table:
        names = tuple(dict.fromkeys((*self.differences, *self.concept)))
        rows = tuple((name, self.differences.get(name), self.concept.get(name)) for name in names)
        columns = ("control", MEASURE_WORDS["share"], MEASURE_WORDS["log_odds"])
        return Table(columns, rows, "Steered minus control, paired over prompts and features")

    def _blocks(self) -> list[Block]:
        blocks: list[Block] = [
            Text(self._about()),
            self._arm_table(),
            self._difference_table(),
            Bars(
                "Share of lens tokens: steered minus control",
                tuple(self.differences), tuple(self.differences.values()), y_label="difference", reference=0.0,
            ),
            Bars(
                "Log-odds of the lens tokens right after the prompt: steered minus control",
                tuple(self.concept), tuple(self.concept.values()), y_label="nats", reference=0.0,
            ),
            self._rule_table(),
            *pareto_blocks(self.points),
        ]  # fmt: skip
        if len(self.settings["strengths"]) > 1:
            blocks.append(curve_lines(self.curves, self.settings["strengths"]))
        columns = (
            "feature", "lens tokens", "strength", "paper's strength", "share", "unsteered", "random", "log-odds",
            "perplexity",
        )  # fmt: skip
        rows = tuple(tuple(getattr(f, name) for name in f.__dataclass_fields__) for f in self.features)
        blocks += [Table(columns, rows, "Each feature at the strength chosen for it"), edit_table(self.edits)]
        if self.examples:
            blocks.append(Table(("prompt", "unsteered", "steered"), self.examples, self.example_title))
        return blocks

    def _about(self) -> str:
        s = self.settings
        size = "a_max" if s["a_max"] == "token" else "(largest activation of f in the data)"
        matched = "norm and frequency" if s["matched_on_frequency"] else "the norm alone (no frequency is known)"
        if (ratio := s.get("matched_ratio")) is not None:
            matched += f" (frequencies are a factor of {number(ratio)} apart)"
        return (
            f"{s['site']} of {s['model']}, steered at {s['scope']} with strength * {size} * W_dec[f]; "
            f"{s['new_tokens']} tokens at temperature {s['temperature']}, seed {s['seed']}, the same random numbers "
            f"for a prompt in every arm. Strengths were chosen on {counted(self.n_selection, 'prompts')} by (lens "
            "tokens per text) "
            f"/ perplexity, leaving out strengths with more than {setting(DEGENERATE_COUNT)} lens tokens per text; "
            f"everything below is from the other {counted(self.n_evaluation, 'prompts')} unless it says otherwise. "
            "Random and "
            f"negated directions run at the strength of their feature; random features are matched on {matched}. "
            "Perplexity is that of the unsteered model. Log-odds and KL are those of the next token right after the "
            "prompt, before anything is sampled. Loss on plain text is that of the edited model minus that of the "
            "unedited one."
        )

    def _rule_table(self) -> Table:
        rows = tuple((r.rule, r.prompts, r.mean_strength, r.success, r.share, r.perplexity) for r in self.rules)
        columns = ("rule", "measured on", "mean strength", "lens tokens per text", "share", "perplexity")
        return Table(columns, rows, "Two rules for the strength; the paper's chooses and measures on the same prompts")


def point_name(point: Point) -> str:
    """What a point is called in sentences and in the plot: its arm as in the tables, and its strength."""
    arm = ARM_WORDS.get(point.arm, point.arm)
    return f"{arm} at {setting(point.strength)}" if point.strength else arm


def verdict(difference: Estimate) -> str:
    """What a difference says, in words."""
    return "more than" if difference.low > 0 else ("less than" if difference.high < 0 else "no clear difference from")


def slug(name: str) -> str:
    """A name as part of a metric's name."""
    return name.replace(" ", "_").replace(",", "")


def arm_table(arms: Sequence[ArmResult], caption: str) -> Table:
    """Every measure of every arm."""
    rows = tuple((ARM_WORDS.get(a.name, a.name), *(getattr(a, key) for key in MEASURES)) for a in arms)
    return Table(("arm", *(MEASURE_WORDS[key] for key in MEASURES)), rows, caption)


def pareto_blocks(points: Sequence[Point]) -> list[Block]:
    """Effect against cost, as a plot and as a table."""
    labels = tuple(point_name(p) if p.on_front else "" for p in points)
    plot = Scatter(
        "Effect against cost", tuple(p.cost for p in points), tuple(p.effect for p in points), labels,
        "nats per token of the text above unsteered", "share of lens tokens above unsteered",
        caption="One point per arm and strength; named are those that no other point beats.",
    )  # fmt: skip
    rows = tuple(
        (ARM_WORDS.get(p.arm, p.arm), p.strength, p.effect, p.cost, p.harm, "yes" if p.on_front else "")
        for p in sorted(points, key=lambda p: (not p.on_front, p.cost))
    )
    columns = ("arm", "strength", "effect (share)", "cost (nats/token)", "loss on plain text", "on the front")
    return [plot, Table(columns, rows, "Every arm and strength; the front has the most effect for its cost")]


def curve_lines(curves: dict[str, tuple[Estimate | None, ...]], strengths: Sequence[float]) -> Lines:
    """Mean share by strength, one line per arm that has strengths."""
    series = tuple(
        Series(
            ARM_WORDS.get(name, name), tuple(strengths), *zip(*((e.value, e.low, e.high) for e in known), strict=True)
        )
        for name, curve in curves.items()
        if len(known := [e for e in curve if e is not None]) == len(strengths)
    )
    return Lines("Share of lens tokens by strength", series, x_label="strength", y_label="share")


def edit_table(edits: dict[str, tuple[EditSummary, ...]]) -> Table:
    """What was added, per arm and strength."""
    rows = tuple(
        (ARM_WORDS.get(name, name), e.strength, e.tokens, e.mean_norm, e.share)
        for name, es in edits.items()
        for e in es
    )
    columns = ("arm", "strength", "tokens edited", "mean norm added", "relative to the activations")
    return Table(columns, rows, "What the edits did")
