"""The rule that describes best where a feature is active, at the least length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from workbench.errors import DegenerateInputError
from workbench.features.rules import (
    REACH,
    After,
    At,
    BeginsWith,
    Both,
    InClass,
    Never,
    Ngram,
    Rule,
    TokenIn,
    TokenView,
)
from workbench.features.vocab import TOKEN_CLASSES, Vocabulary

LENGTH_WEIGHT = 1.0
"""What a rule loses that is as long as the list of all active tokens; shorter rules lose in proportion."""
MOST_TOKENS, MOST_STEMS, MOST_SEQUENCES, MOST_TRIGGERS = 64, 4, 16, 8
_BOUNDARIES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CANDIDATES = 40


@dataclass(frozen=True, eq=False)
class RuleData:
    """Tokens from which a rule is chosen, and on which of them the feature is active."""

    view: TokenView
    active: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> RuleData:
        return RuleData(self.view[chosen], self.active[chosen])


@dataclass(frozen=True)
class FittedRule:
    """A rule and how well it describes the tokens that it was chosen on.

    Attributes:
        rule: the rule.
        f1: harmonic mean of precision and recall over tokens.
        score: F1 less the penalty for the rule's length; what the choice maximises.
    """

    rule: Rule
    f1: float
    score: float


@dataclass(frozen=True, eq=False)
class _Task:
    """Some tokens of the data, and the price of a bit: a subset is scored as part of the whole."""

    data: RuleData
    vocabulary: Vocabulary
    n_active: int

    def score(self, hits: Any, fired: Any, bits: Any) -> Any:
        f1 = 2 * hits / np.maximum(fired + self.n_active, 1)
        return f1 - LENGTH_WEIGHT * bits / (self.n_active * self.vocabulary.bits)

    def fitted(self, rule: Rule) -> FittedRule:
        fires = rule.fires(self.data.view, self.vocabulary)
        hits, fired = int((fires & self.data.active).sum()), int(fires.sum())
        score = self.score(hits, fired, rule.bits(self.vocabulary))
        return FittedRule(rule, 2 * hits / max(fired + self.n_active, 1), float(score))


def fit_rule(data: RuleData, vocabulary: Vocabulary) -> FittedRule:
    """The rule with the largest F1 over tokens less a penalty for its length (minimum description length).

    The grammar: sets of tokens, beginnings of words, classes of tokens, sets of preceding tokens (directly, or within
    8), intervals of positions, sequences of two or three tokens, and each rule on the token together with a context.

    Raises:
        DegenerateInputError: if no token is active.
    """
    n_active = int(data.active.sum())
    if not n_active:
        raise DegenerateInputError(f"fit_rule: none of {len(data.active)} tokens is active. Give windows that are.")
    whole = _Task(data, vocabulary, n_active)
    alone = [whole.fitted(rule) for rule in (*_token_rules(whole), *_context_rules(whole))]
    best = sorted(alone, key=lambda found: -found.score)
    bases = [found for found in best if not isinstance(found.rule, After | At | Ngram)][:3]
    found = [*alone, *(whole.fitted(rule) for base in bases for rule in _refined(whole, base.rule))]
    found.append(whole.fitted(Never()))
    return max(found, key=lambda f: (round(f.score, 9), -f.rule.bits(vocabulary)))


def _refined(whole: _Task, base: Rule) -> Iterator[Rule]:
    """The rule in each context that suits it best."""
    inside = base.fires(whole.data.view, whole.vocabulary)
    if inside.any() and not inside.all():
        part = replace(whole, data=whole.data[inside])
        yield from (Both(base, context) for context in _context_rules(part))


def _token_rules(task: _Task) -> Iterator[Rule]:
    view, vocabulary = task.data.view, task.vocabulary
    tokens = _best_keys(task, view.ids, vocabulary.bits, MOST_TOKENS)
    yield TokenIn(tuple(tokens.tolist()))
    yield from (InClass(name) for name in TOKEN_CLASSES)
    for length in (3, 4, 5, 6):
        if prefixes := _best_prefixes(task, length):
            yield BeginsWith(prefixes)
    for length in (2, 3):
        if sequences := _best_sequences(task, length):
            yield Ngram(sequences)


def _context_rules(task: _Task) -> Iterator[Rule]:
    previous = _best_keys(task, task.data.view.before[:, 0], task.vocabulary.bits, MOST_TOKENS)
    if len(previous := previous[previous >= 0]):
        yield After(tuple(previous.tolist()), 1)
    if triggers := _best_triggers(task):
        yield After(triggers, REACH)
    yield from (InClass(name, back=1) for name in TOKEN_CLASSES)
    yield from _best_interval(task)


def _best_keys(task: _Task, keys: np.ndarray, bits: float, most: int) -> np.ndarray:
    """The set of keys with the best score; of all sets, one that takes keys in the order of their precision."""
    unique, inverse = np.unique(keys, return_inverse=True)
    total = np.bincount(inverse, minlength=len(unique))
    hits = np.bincount(inverse[task.data.active], minlength=len(unique))
    some = hits.nonzero()[0]
    order = some[np.lexsort((unique[some], -hits[some], -hits[some] / total[some]))][:most]
    if not len(order):
        return unique[:0]
    scores = task.score(hits[order].cumsum(), total[order].cumsum(), bits * np.arange(1, len(order) + 1))
    return np.sort(unique[order[: int(scores.argmax()) + 1]])


def _best_prefixes(task: _Task, length: int) -> tuple[str, ...]:
    stems = (*task.vocabulary.stems, "")
    tokens, inverse = task.data.view.distinct
    names = [stems[t][:length] if len(stems[t]) >= length else "" for t in tokens.tolist()]
    known = sorted(set(names) - {""})
    number = {name: i for i, name in enumerate(known)}
    keys = np.array([number.get(name, -1) for name in names])[inverse]
    found = _best_keys(task, keys, 5.0 * length, MOST_STEMS)
    return tuple(known[i] for i in found.tolist() if i >= 0)


def _best_sequences(task: _Task, length: int) -> tuple[tuple[int, ...], ...]:
    view, size = task.data.view, len(task.vocabulary) + 1
    keys = view.ids.astype(np.int64) + 1
    for back in range(length - 1):
        keys = keys + (view.before[:, back] + 1) * size ** (back + 1)
    found = _best_keys(task, keys, length * task.vocabulary.bits, MOST_SEQUENCES)
    unpacked = (tuple(int(key // size**back % size) - 1 for back in reversed(range(length))) for key in found.tolist())
    return tuple(sequence for sequence in unpacked if min(sequence) >= 0)


def _best_triggers(task: _Task) -> tuple[int, ...]:
    """Tokens of which one stands among the last `REACH`, added one by one while the score grows."""
    before, active = task.data.view.before, task.data.active
    inside, counts = np.unique(before[active], return_counts=True)
    overall, total = np.unique(before, return_counts=True)
    usual = total[np.searchsorted(overall, inside)]
    some = (inside >= 0).nonzero()[0]
    likely = some[np.lexsort((inside[some], -counts[some], -(counts[some] ** 1.5) / usual[some]))][:_CANDIDATES]
    present = {int(t): (before == t).any(1) for t in inside[likely]}
    chosen: tuple[int, ...] = ()
    fires, best = np.zeros(len(active), dtype=bool), -np.inf
    while len(chosen) < MOST_TRIGGERS and len(chosen) < len(present):
        scored = []
        for token, here in present.items():
            if token not in chosen:
                union = fires | here
                bits = 3 + (len(chosen) + 1) * task.vocabulary.bits
                score = task.score((union & active).sum(), union.sum(), bits)
                scored.append((float(score), -token))
        score, token = max(scored)
        if score <= best:
            break
        best, chosen, fires = score, (*chosen, -token), fires | present[-token]
    return tuple(sorted(chosen))


def _best_interval(task: _Task) -> Iterator[Rule]:
    positions, active = task.data.view.positions, task.data.active
    last = int(positions.max()) + 1
    edges = [b for b in _BOUNDARIES if b < last] + [last]
    total = np.histogram(positions, edges)[0]
    hits = np.histogram(positions[active], edges)[0]
    found = []
    for i in range(len(edges) - 1):
        for j in range(i + 1, len(edges)):
            score = task.score(hits[i:j].sum(), total[i:j].sum(), 8.0)
            found.append((float(score), -i, -j))
    _, i, j = max(found)
    if (-i, -j) != (0, len(edges) - 1):
        yield At(edges[-i], None if edges[-j] == last else edges[-j])
