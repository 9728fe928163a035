"""What the study of feature selection found: three claims with their verdicts, groups, and scores by depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from workbench.core.jsontext import Record
from workbench.core.numbers import counted
from workbench.core.stats import Estimate
from workbench.report.base import (
    Bars,
    Block,
    Cell,
    Headline,
    Lines,
    Metric,
    Report,
    Says,
    Section,
    Series,
    Table,
    Text,
    beside,
)

Verdict = Literal["holds", "does not hold", "not clear"]


@dataclass(frozen=True)
class Claim:
    """A published claim, tested.

    Attributes:
        claim: what is claimed.
        measured: by which number, and what it compares.
        value: the number with its interval.
        control: the same number where the claim should not hold.
        verdict: what the interval says.
        note: a further comparison, or why there is none.
    """

    claim: str
    measured: str
    value: Estimate | None
    control: Estimate | None
    verdict: Verdict
    note: str


@dataclass(frozen=True, kw_only=True)
class DepthProfile:
    """Scores of the alive features at one depth.

    Attributes:
        layer: of the SAE.
        depth: share of the blocks up to and with it.
        n: alive features.
        output: mean output score.
        random_output: the same of random directions.
        input: mean input score.
        shuffled_input: the same of each feature's contexts against another feature's tokens.
        share: share with an output score above the threshold.
        random_share: the same of random directions.
        confidence: mean size of the change of confidence.
        both: number of features high in both scores.
    """

    layer: int
    depth: float
    n: int
    output: float
    random_output: float
    input: float
    shuffled_input: float
    share: float
    random_share: float
    confidence: float
    both: int


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """One group of features at one layer, or over all layers (`layer` None).

    Attributes:
        group: how its features were selected.
        layer: of the SAE.
        n: features.
        success: lens tokens per text, on the prompts that did not choose the strength.
        unsteered: the same tokens in unsteered texts.
        random: the same tokens under random directions of the features' norms, at strengths of their own.
        gain: success less that of the random directions, by feature and prompt.
        by_paper: success under the paper's rule, which chooses and measures on the same prompts.
        perplexity: of the steered texts under the unsteered model.
        unsteered_perplexity: of the unsteered texts.
    """

    group: str
    layer: int | None
    n: int
    success: Estimate | None
    unsteered: Estimate | None
    random: Estimate | None
    gain: Estimate | None
    by_paper: Estimate | None
    perplexity: Estimate | None
    unsteered_perplexity: Estimate | None


CLAIM = ("claim", "verdict", "measured", "value", "control")
GROUP: dict[str, str | Callable[[GroupResult], Cell]] = {
    "features": "group", "layer": lambda group: "all" if group.layer is None else group.layer, "n": "n",
    "lens tokens per text": "success", "unsteered": "unsteered", "random directions": "random",
    "above random directions": "gain", "by the paper's rule": "by_paper", "perplexity": "perplexity",
    "unsteered perplexity": "unsteered_perplexity",
}  # fmt: skip
PROFILE = {
    "layer": "layer", "depth": "depth", "alive": "n", "input score": "input",
    "contexts of other features": "shuffled_input", "output score": "output", "of random directions": "random_output",
    "output features": "share", "among random directions": "random_share", "change of confidence": "confidence",
    "high in both": "both",
}  # fmt: skip
"""Columns of the tables."""


@dataclass(frozen=True)
class SelectionReport(Report):
    """Does selecting features make steering work?

    Attributes:
        settings: model, layers, cuts, sizes.
        profile: scores at each depth, shallowest first.
        groups: success of each way to select.
        ratios: success of each group divided by that of unfiltered features at the same depths.
        claims: the published claims and their verdicts.
    """

    settings: Record
    profile: tuple[DepthProfile, ...]
    groups: tuple[GroupResult, ...]
    ratios: dict[str, Estimate]
    claims: tuple[Claim, ...]

    def findings(self) -> tuple[str, ...]:
        """One sentence per claim, and the ratios of the other ways to select."""
        lines = [
            f"{c.claim}: {c.verdict}. {c.measured.capitalize()}: {'not known' if c.value is None else c.value}"
            + (f"; control {c.control}" if c.control is not None else "")
            + f"; {c.note}."
            for c in self.claims
        ]
        lines += [f"Success of {name}, divided by that of unfiltered features: {r}." for name, r in self.ratios.items()]
        return tuple(lines)

    def headline(self) -> Headline:
        """Success of the first way to select that was measured, relative to unfiltered features."""
        if not self.ratios:
            return Headline(sentence="No way to select features was compared with unfiltered ones.")
        return Headline.of(
            Says(*(
                f"Features selected as {next(iter(self.ratios))} steer {how} unfiltered ones."
                for how in ("better than", "no better than", "worse than")
            )),
            self._beside()[0],
        )  # fmt: skip

    def _beside(self) -> tuple[Table, ...]:
        rows = list(self.ratios.items())[:1]
        return tuple(beside("success relative to unfiltered features", row, ("unfiltered", 1.0)) for row in rows)

    def section(self) -> Section:
        """Claims, groups and the profile over depth."""
        metrics: dict[str, Metric] = {f"claim{i}.value": c.value for i, c in enumerate(self.claims, 1) if c.value}
        metrics |= {f"claim{i}.verdict": c.verdict for i, c in enumerate(self.claims, 1)}
        metrics |= {f"ratio.{_key(name)}": r for name, r in self.ratios.items()}
        for g in self.groups:
            known = {"success": g.success, "gain": g.gain} if g.layer is None else {}
            metrics |= {f"{name}.{_key(g.group)}": value for name, value in known.items() if value is not None}
        for p in self.profile:
            metrics |= {f"layer{p.layer}.output_share": p.share, f"layer{p.layer}.input_mean": p.input}
        blocks = (*self._blocks(), *self._beside())
        return Section("Which features steer", blocks, self.findings(), metrics, self.headline())

    def _blocks(self) -> list[Block]:
        depth = tuple(p.depth for p in self.profile)
        lines = (
            Series("mean input score", depth, tuple(p.input for p in self.profile)),
            Series("mean output score", depth, tuple(p.output for p in self.profile)),
            Series("share of output features", depth, tuple(p.share for p in self.profile)),
            Series("the same of random directions", depth, tuple(p.random_share for p in self.profile)),
        )
        return [
            Text(self._about()),
            Table.of(self.claims, {name: name for name in CLAIM} | {"also": "note"}, "Three claims of the paper"),
            Bars(
                "Success relative to unfiltered features", tuple(self.ratios), tuple(self.ratios.values()),
                y_label="ratio", reference=1.0,
            ),
            Table.of(self.groups, GROUP, "Ways to select features"),
            Lines("Scores over depth", lines, x_label="share of the blocks", y_label="score"),
            Table.of(self.profile, PROFILE, "Means over all alive features"),
        ]  # fmt: skip

    def _about(self) -> str:
        s = self.settings
        return (
            f"SAEs after layers {s['layers']} of {s['model']}; {s['n_features']} features per group and layer, "
            f"strengths {s['strengths']}, {s['prompts']} prompts, {s['new_tokens']} tokens at temperature "
            f"{s['temperature']}, seed {s['seed']}; {counted(s['texts'], 'texts')}. Success is the number of the "
            f"feature's {s['k']} lens tokens per text; each feature's strength was chosen on half of the prompts and "
            "success measured on the other half. Beside it stand the same tokens in unsteered texts and under random "
            "directions of the features' norms. Ratios compare a group with as many unfiltered features of each layer. "
            "Intervals are over prompts and features, those of shares over features. 'Holds' and 'does not hold' need "
            "the whole interval on one side."
        )


def _key(group: str) -> str:
    return group.replace(" ", "_").replace(",", "")
