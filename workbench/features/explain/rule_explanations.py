"""Explanations by rules, and their scores on held-out documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.html import Shown
from workbench.core.progress import task
from workbench.core.stats import Estimate
from workbench.engine.keeper import Keeper
from workbench.features.card import Explanation
from workbench.features.explain.examples import ExampleOptions, Examples, examples_of
from workbench.features.explain.rulefit import FittedRule, fit_rule
from workbench.features.explain.rules import Never, Rule, TokenIn
from workbench.features.explain.testing import Items, answer_scores, detection_items, fuzzing_items, hard_items
from workbench.features.passes.windows import FeatureWindows
from workbench.features.token_classes import TokenSource, TokenTexts

DETECTION = {"balanced_accuracy": "detection", "precision": "precision", "recall": "recall", "f1": "f1"}
"""What the ratios of a detection test are called in an explanation; the other tests show balanced accuracy alone."""
COMPARED = ("detection", "hard detection", "fuzzing")
"""Scores that are shown of the controls as well."""
BLOCK = 128
"""Features per kept part."""

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class RuleExplanation(Shown):
    """A rule for one feature.

    Attributes:
        feature: its number.
        fitted: the rule with its score on the windows it was made from; None where there were too few windows.
        lacking: why there is none; "" otherwise.
        windows: the pass over a store that its windows are from.
        slot: place of the feature in it.
        options: how windows are divided.
    """

    feature: int
    fitted: FittedRule | None
    lacking: str
    windows: FeatureWindows = field(repr=False)
    slot: int
    options: ExampleOptions

    @property
    def examples(self) -> Examples:
        """The windows it was made from and is tested on; not kept, because those of a whole SAE are gigabytes."""
        return examples_of(self.windows, self.slot, self.feature, self.options)


@dataclass(frozen=True)
class _Fit:
    fitted: FittedRule | None
    lacking: str


@checked
def explain_by_rules(
    windows: FeatureWindows, features: Int[Tensor, " features"], tokenizer: TokenSource,
    options: ExampleOptions | None = None, keep: Keeper | None = None,
) -> tuple[RuleExplanation, ...]:  # fmt: skip
    """The best rule of each feature, chosen on documents that are not used for its test.

    Args:
        windows: result of a pass over a store.
        features: their numbers, in the order of the pass.
        tokenizer: of the model, or a `TokenTexts`.
        options: how windows are divided.
        keep: holds finished rules, so that a repeated call makes only the missing ones.
    """
    options, vocabulary = options or ExampleOptions(), TokenTexts.of(tokenizer)

    def fit(entry: tuple[int, int]) -> _Fit:
        examples = examples_of(windows, *entry, options)
        lacking = examples.lacking(options.fewest)
        return _Fit(None if lacking else fit_rule(examples.data(), vocabulary), lacking)

    slots = list(enumerate(features.tolist()))
    fits = _kept(slots, fit, _Fit, keep, "rules")
    return tuple(
        RuleExplanation(feature, made.fitted, made.lacking, windows, slot, options)
        for (slot, feature), made in zip(slots, fits, strict=True)
    )


def _kept(
    items: Sequence[Item], make: Callable[[Item], Made], kind: type[Made], keep: Keeper | None, name: str
) -> list[Made]:
    """The results for all items; finished blocks of them are kept."""
    made: list[Made] = []
    with task(total=len(items), description=name, unit="features") as running:

        def results(part: Sequence[Item]) -> Iterator[Made]:
            for item in part:
                yield make(item)
                running.advance()

        for start in range(0, len(items), BLOCK):
            block = functools.partial(list, results(items[start : start + BLOCK]))
            made += block() if keep is None else keep.once(f"{name.replace(' ', '-')}-{start}", list[kind], block)
    return made


@checked
def score_rules(
    explained: Sequence[RuleExplanation], tokenizer: TokenSource, *, seed: int = 0, keep: Keeper | None = None
) -> dict[int, Explanation]:
    """Each rule's scores in detection, hard detection and fuzzing on held-out documents, with those of its controls.

    Controls: "shuffled", the rule of another feature (if there is another); "empty", a rule that never fires; "top
    tokens", the list of the tokens that the strongest windows peak on. Features without a rule say why in their text.
    """
    vocabulary = TokenTexts.of(tokenizer)
    others = _others([e for e in explained if e.fitted is not None], seed)

    def test(entry: RuleExplanation) -> Explanation:
        if entry.fitted is None:
            return Explanation(f"no explanation: {entry.lacking}", "rule", {}, {}, 0)
        examples = entry.examples
        rules: dict[str, Rule] = {"empty": Never(), "top tokens": TokenIn(tuple(sorted(examples.top_tokens)))}
        if entry.feature in others:
            rules["shuffled"] = others[entry.feature]
        return _tested(entry.fitted.rule, rules, examples, vocabulary, seed)

    tested = _kept(explained, test, Explanation, keep, "tests of rules")
    return dict(zip((e.feature for e in explained), tested, strict=True))


def _others(with_rule: Sequence[RuleExplanation], seed: int) -> dict[int, Rule]:
    """For each feature the rule of another one."""
    if len(with_rule) < 2:
        return {}
    shift = 1 + int(torch.randint(len(with_rule) - 1, (1,), generator=torch.Generator().manual_seed(seed)))
    rolled = [*with_rule[shift:], *with_rule[:shift]]
    return {a.feature: b.fitted.rule for a, b in zip(with_rule, rolled, strict=True) if b.fitted is not None}


def _tested(rule: Rule, others: dict[str, Rule], examples: Examples, vocabulary: TokenTexts, seed: int) -> Explanation:
    tests = RuleTests(detection_items(examples), hard_items(examples), fuzzing_items(examples, seed))
    scores = rule_scores(rule, tests, vocabulary, seed)
    by_control = {name: rule_scores(other, tests, vocabulary, seed) for name, other in others.items()}
    controls = {
        f"{name}: {score}": value for name, of in by_control.items() for score, value in of.items() if score in COMPARED
    }
    text = rule.text(vocabulary) or "no rule describes it better than none"
    return Explanation(text, "rule", scores, controls, len(tests.detection))


@dataclass(frozen=True, eq=False)
class RuleTests:
    """The windows of the three tests of one feature."""

    detection: Items
    hard: Items
    fuzzing: Items


def rule_scores(rule: Rule, tests: RuleTests, vocabulary: TokenTexts, seed: int = 0) -> dict[str, Estimate]:
    """Scores of a rule as a detector.

    Detection says yes where the rule fires anywhere in the window on a token of known activation, fuzzing where it
    fires on at least half of the marks. Fuzzing is left out if no window gives both right and wrong marks.
    """
    ratios = _detected(rule, tests.detection, vocabulary, seed)
    scores = {DETECTION[name]: value for name, value in ratios.items()}
    scores["hard detection"] = _detected(rule, tests.hard, vocabulary, seed)["balanced_accuracy"]
    if len(tests.fuzzing):
        assert tests.fuzzing.marks is not None
        fires = rule.fires(tests.fuzzing.windows.view, vocabulary)
        yes = (fires & tests.fuzzing.marks).sum(1) >= 0.5 * tests.fuzzing.marks.sum(1)
        ratios = answer_scores(tests.fuzzing.labels, np.asarray(yes), tests.fuzzing.windows.documents, seed)
        scores["fuzzing"] = ratios["balanced_accuracy"]
    return scores


def _detected(rule: Rule, items: Items, vocabulary: TokenTexts, seed: int) -> dict[str, Estimate]:
    fires = rule.fires(items.windows.view, vocabulary) & items.windows.known
    return answer_scores(items.labels, np.asarray(fires.any(1)), items.windows.documents, seed)
