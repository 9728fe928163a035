"""What automatic SHIFT found: evidence for a shortcut, or none and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from circuits.shift.automatic.finding import (
    MIN_ERRORS,
    MOST_RIGHT,
    AutomaticOptions,
    Search,
    SearchRows,
    Trial,
    halves,
    search,
    trial,
)
from circuits.shift.deciders import Node
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted, number, percent, setting
from workbench.core.stats import Estimate, wilson

UNKNOWABLE = (
    "Where attribute and label always go together, nothing in the training texts can tell them apart; and without "
    "attribute labels a real but unreliable sign of the label looks like a shortcut."
)


@checked
@dataclass(frozen=True, kw_only=True)
class ShortcutEvidence(Shown):
    """Whether training texts and their labels alone speak for a shortcut.

    Attributes:
        is_shortcut: whether they do; only then is anything ablated.
        why: the reason in a sentence.
        features: the features that were put to the test; () if none was proposed.
        harm: by feature, mean support of the label on texts on which the probe errs, in logits.
        n_search: texts of the search.
        n_errors: texts of the search on which the cross-validated probe errs.
        opposed: on texts of the test whose label the features oppose: accuracy of the probe.
        opposed_without: there, accuracy of a probe fitted without the features.
        others: accuracy of the probe on the other texts of the test.
        others_without: there, without the features.
        gain: change in accuracy, each label with each of the two kinds of texts counting equally.
        p_ablation: chance of such a gain if ablation changes nothing.
        p_environment: chance of it if it has nothing to do with which texts the features oppose.
        alpha: largest chance that counts as evidence.
    """

    is_shortcut: bool
    why: str
    features: tuple[str, ...] = ()
    harm: tuple[tuple[str, float], ...] = ()
    n_search: int
    n_errors: int
    opposed: Estimate | None = None
    opposed_without: Estimate | None = None
    others: Estimate | None = None
    others_without: Estimate | None = None
    gain: float | None = None
    p_ablation: float | None = None
    p_environment: float | None = None
    alpha: float

    def _shown_facts(self) -> Mapping[str, object]:
        return {
            "outcome": self.why, "features": ", ".join(self.features), "texts of the search": self.n_search,
            "errors among them": self.n_errors, "accuracy where the features oppose the label": self.opposed,
            "there, without them": self.opposed_without, "accuracy elsewhere": self.others,
            "elsewhere, without them": self.others_without, "gain, all kinds of texts alike": self.gain,
            "p if ablation changes nothing": self.p_ablation, "p if it does not matter where": self.p_environment,
            "alpha": self.alpha,
        }  # fmt: skip

    def _shown_line(self) -> str:
        return self.why


def evidence_of(rows: SearchRows, candidates: Sequence[Node], options: AutomaticOptions) -> ShortcutEvidence:
    """Searches half of the rows, and tests on the other half.

    Raises:
        DegenerateInputError: if a half has fewer rows of a label than the cross-validation has folds.
    """
    searched, tested = halves(rows.y, options.seed)
    smallest = int(np.bincount(rows.y[searched], minlength=2).min())
    if smallest < options.folds:
        raise DegenerateInputError(
            f"automatic_shift: half of the training texts are for the search, {counted(smallest, 'texts')} of one "
            f"label among them, and {options.folds} are needed. Give more texts."
        )
    found = search(rows, searched, options)
    tried = trial(rows, found.chosen, searched, tested, options) if found.chosen else None
    names = tuple(str(candidates[i]) for i in found.chosen)
    harm = {str(node): float(value) for node, value in zip(candidates, found.harm, strict=True)}
    is_shortcut, why = _outcome(found, tried, len(searched), options)
    found_so_far = ShortcutEvidence(
        is_shortcut=is_shortcut, why=why, features=names, harm=tuple((name, harm[name]) for name in names),
        n_search=len(searched), n_errors=len(found.errors), alpha=options.alpha,
    )  # fmt: skip
    return found_so_far if tried is None else _measured(found_so_far, tried)


def _measured(evidence: ShortcutEvidence, tried: Trial) -> ShortcutEvidence:
    """The evidence with what the test measured."""

    def share(hits: np.ndarray) -> Estimate | None:
        return wilson(int(hits.sum()), len(hits), unit="texts") if len(hits) else None

    on, off = tried.opposed, ~tried.opposed
    return replace(
        evidence, opposed=share(tried.right[on]), opposed_without=share(tried.right_without[on]),
        others=share(tried.right[off]), others_without=share(tried.right_without[off]), gain=tried.gain,
        p_ablation=tried.p_ablation, p_environment=tried.p_environment,
    )  # fmt: skip


def _outcome(found: Search, tried: Trial | None, n: int, options: AutomaticOptions) -> tuple[bool, str]:
    none = "No evidence for a shortcut, so nothing is ablated: "
    if len(found.errors) < MIN_ERRORS:
        errors = f"the cross-validated probe errs on {len(found.errors)} of {counted(n, 'texts')}"
        return False, f"{none}{errors}, and {MIN_ERRORS} errors are needed. {UNKNOWABLE}"
    if not found.chosen:
        return False, f"{none}no features fail together where the probe errs, and help when they are ablated."
    features = counted(len(found.chosen), "features")
    if tried is None:
        return False, f"{none}{features} were proposed, and on other texts they oppose fewer than {MIN_ERRORS} labels."
    chance = f"p = {number(tried.p)}, alpha = {setting(options.alpha)}"
    if tried.p > options.alpha:
        return False, f"{none}on other texts, ablating {features} helps no more than chance allows ({chance})."
    if not tried.is_followed:
        return False, (
            f"{none}ablating {features} helps on other texts ({chance}), but there the probe does not follow them: "
            f"where they oppose the label, it is not below {percent(MOST_RIGHT)} right with them and above without."
        )
    return True, (
        f"Evidence for a shortcut: on other texts the probe follows {features} where they oppose the label, and "
        f"without them it is right there more often ({chance}). {UNKNOWABLE}"
    )
