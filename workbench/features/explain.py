"""Explanations by rules, and what they are worth on documents that they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.features.cards import Explanation
from workbench.features.examples import ExampleOptions, Examples, examples_of
from workbench.features.rulefit import FittedRule, fit_rule
from workbench.features.rules import Never, Rule, TokenIn
from workbench.features.testing import Items, answer_scores, detection_items, fuzzing_items
from workbench.features.vocab import Vocabulary
from workbench.features.windows import FeatureWindows
from workbench.progress import track
from workbench.stats import Estimate

DETECTION = {"balanced_accuracy": "detection", "precision": "precision", "recall": "recall", "f1": "f1"}
"""What the ratios of a detection test are called in an explanation; fuzzing shows its balanced accuracy alone."""


@dataclass(frozen=True, eq=False)
class RuleExplanation:
    """A rule for one feature, with the windows it is tested on.

    Attributes:
        feature: its number.
        fitted: the rule with its score on the windows it was made from; None where there were too few windows.
        lacking: why there is none; "" otherwise.
        examples: the windows.
    """

    feature: int
    fitted: FittedRule | None
    lacking: str
    examples: Examples = field(repr=False)


def explain_by_rules(
    found: FeatureWindows, features: Int[Tensor, " features"], tokenizer: Any, options: ExampleOptions | None = None
) -> tuple[RuleExplanation, ...]:
    """The best rule of each feature, chosen on documents that are not used for its test."""
    options, vocabulary = options or ExampleOptions(), Vocabulary.of(tokenizer)
    made = []
    for slot, feature in track(list(enumerate(features.tolist())), description="rules", unit="features"):
        examples = examples_of(found, slot, feature, options)
        lacking = examples.lacking(options.fewest)
        fitted = None if lacking else fit_rule(examples.data(), vocabulary)
        made.append(RuleExplanation(feature, fitted, lacking, examples))
    return tuple(made)


def score_rules(explained: Sequence[RuleExplanation], tokenizer: Any, *, seed: int = 0) -> dict[int, Explanation]:
    """Each rule's detection and fuzzing scores on held-out documents, beside those of its controls.

    Controls: "shuffled", the rule of another feature (if there is another); "empty", a rule that never fires; "top
    tokens", the list of the tokens that the strongest windows peak on. Features without a rule say why in their text.
    """
    vocabulary = Vocabulary.of(tokenizer)
    with_rule = [e for e in explained if e.fitted is not None]
    others = _others(with_rule, seed)
    results = {}
    for entry in track(explained, description="tests of rules", unit="features"):
        if entry.fitted is None:
            results[entry.feature] = Explanation(f"no explanation: {entry.lacking}", "rule", {}, {}, 0)
            continue
        rules: dict[str, Rule] = {"empty": Never(), "top tokens": TokenIn(tuple(sorted(entry.examples.top_tokens)))}
        if entry.feature in others:
            rules["shuffled"] = others[entry.feature]
        results[entry.feature] = _tested(entry, rules, vocabulary, seed)
    return results


def _others(with_rule: Sequence[RuleExplanation], seed: int) -> dict[int, Rule]:
    """For each feature the rule of another one."""
    if len(with_rule) < 2:
        return {}
    shift = 1 + int(torch.randint(len(with_rule) - 1, (1,), generator=torch.Generator().manual_seed(seed)))
    rolled = [*with_rule[shift:], *with_rule[:shift]]
    return {a.feature: b.fitted.rule for a, b in zip(with_rule, rolled, strict=True) if b.fitted is not None}


def _tested(entry: RuleExplanation, others: dict[str, Rule], vocabulary: Vocabulary, seed: int) -> Explanation:
    assert entry.fitted is not None
    detection, fuzzing = detection_items(entry.examples), fuzzing_items(entry.examples, seed)
    scores = rule_scores(entry.fitted.rule, detection, fuzzing, vocabulary, seed)
    controls = {}
    for name, rule in others.items():
        for score, value in rule_scores(rule, detection, fuzzing, vocabulary, seed).items():
            if score in ("detection", "fuzzing"):
                controls[f"{name}: {score}"] = value
    text = entry.fitted.rule.text(vocabulary) or "no rule describes it better than none"
    return Explanation(text, "rule", scores, controls, len(detection))


def rule_scores(
    rule: Rule, detection: Items, fuzzing: Items, vocabulary: Vocabulary, seed: int = 0
) -> dict[str, Estimate]:
    """What a rule scores when it is executed.

    Detection says yes where the rule fires anywhere in the window, fuzzing where it fires on at least half of the
    marks. Fuzzing is left out if no window gives both right and wrong marks.
    """
    fires = rule.fires(detection.windows.view, vocabulary) & detection.windows.inside
    ratios = answer_scores(detection.labels, np.asarray(fires.any(1)), detection.windows.documents, seed)
    scores = {DETECTION[name]: value for name, value in ratios.items()}
    if len(fuzzing):
        assert fuzzing.marks is not None
        fires = rule.fires(fuzzing.windows.view, vocabulary)
        yes = (fires & fuzzing.marks).sum(1) >= 0.5 * fuzzing.marks.sum(1)
        ratios = answer_scores(fuzzing.labels, np.asarray(yes), fuzzing.windows.documents, seed)
        scores["fuzzing"] = ratios["balanced_accuracy"]
    return scores
