"""What a SHIFT study measures: rows of methods, comparisons, verdicts, and the checks behind them."""

from __future__ import annotations

from dataclasses import dataclass, field

from circuits.shift.deciders import Decision
from workbench.controls.methods import Role
from workbench.core.display import OneLine
from workbench.core.stats import Estimate


@dataclass(frozen=True, kw_only=True)
class OverDraws:
    """A method of several random draws, with intervals over the draws: how much depends on which set was drawn.

    Attributes:
        label: label accuracy over all test rows.
        spurious: agreement with the spurious attribute, None if that is not known.
        worst: label accuracy in the worst group.
    """

    label: Estimate
    spurious: Estimate | None
    worst: Estimate


@dataclass(frozen=True, kw_only=True)
class MethodRow(OneLine):
    """One method on the test set.

    Attributes:
        name: the method.
        information: what it was allowed to use, beyond the ambiguous training rows.
        role: what it is in the study.
        n_features: how many features were ablated.
        label: share of test rows whose label is predicted; higher is better.
        spurious: share of test rows where the prediction is the label that the row's attribute goes with in training;
            0.5 is best where the test set is balanced; None if the attribute is not known.
        worst: label accuracy in the worst group, over its own rows.
        worst_group: which one that is.
        over_draws: the same three with intervals over random draws, where the method is an average of them.
        regime: what it may see, of `REGIMES`; None if it does not say.
        cue_mcc: Matthews correlation of the attribute and the prediction; None if the attribute is not known.
        n_attribute_labels: rows whose attribute label it used.
        notes: cases in which it can't do what it is for, in words.
        seconds: that it took, without reading texts that other methods read too.
    """

    name: str
    information: str
    role: Role
    n_features: int
    label: Estimate
    spurious: Estimate | None
    worst: Estimate
    worst_group: str
    over_draws: OverDraws | None = None
    regime: str | None = None
    cue_mcc: Estimate | None = None
    n_attribute_labels: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Comparison:
    """Paired difference between two methods over the same test rows.

    Attributes:
        better: the method in front.
        other: the method that is subtracted.
        label: difference in label accuracy; positive means that `better` is better.
        conflict: the same over the rows in which label and attribute disagree with training; None without such rows.
        over_draws: `label` with an interval over the random draws of `other`, where it is an average of them.
    """

    better: str
    other: str
    label: Estimate
    conflict: Estimate | None
    over_draws: Estimate | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether neither other test rows nor other draws of the control are likely to turn the difference round."""
        return self.label.excludes(0.0) and (self.over_draws is None or self.over_draws.excludes(0.0))


@dataclass(frozen=True, kw_only=True)
class JudgedFeature:
    """A candidate feature with its verdict and the evidence behind it; None where the task has no such evidence."""

    feature: str
    effect: float
    decision: Decision
    oracle_decision: Decision | None
    why: str
    top_tokens: tuple[tuple[str, float], ...]
    spurious_share: float | None
    target_share: float | None


@dataclass(frozen=True)
class AttributionRow:
    """How the effects at one site were made.

    Attributes:
        site: the site.
        method: the estimator and its baseline.
        total: measured change of the metric when all features are patched, in logits.
        gap: `|sum - total| / |total|`.
        n_rows: rows that were averaged.
        n_positive: features that support the label.
    """

    site: str
    method: str
    total: float
    gap: float
    n_rows: int
    n_positive: int


@dataclass(frozen=True)
class Collateral:
    """Change of next-token loss on plain text under ablation, in nats per token.

    Attributes:
        shift: of the features that were judged spurious, over rows of text.
        random: of as many random features, mean over all draws, over rows of text.
        random_over_draws: the same mean with its interval over draws.
    """

    shift: Estimate
    random: Estimate
    random_over_draws: Estimate


@dataclass(frozen=True)
class EditCheck:
    """The ablation against one made by plain hooks with the SAE's own encode and decode.

    Attributes:
        difference: between the two, relative to the size of the edit.
        allowed: difference that rounding explains, relative to the size of the edit; a study beyond it raises.
        n_rows: texts on which both were made.
    """

    difference: float
    allowed: float
    n_rows: int
