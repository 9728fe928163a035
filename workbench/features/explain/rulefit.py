"""Fits a rule to where a feature is active: the best description for its length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError
from workbench.features.explain.rules import (
    REACH,
    After,
    AnyRule,
    At,
    Before,
    BeginsWith,
    Both,
    InClass,
    Never,
    Ngram,
    TokenIn,
    TokenView,
)
from workbench.features.token_classes import TOKEN_CLASSES, TokenTexts

LENGTH_WEIGHT = 1.0
"""Penalty, in F1, of a rule as long as the list of all active tokens; shorter rules lose in proportion."""
MOST_TOKENS, MOST_STEMS, MOST_SEQUENCES, MOST_TRIGGERS = 64, 4, 16, 8
Numbers = np.ndarray | np.number | float | int
_BOUNDARIES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MOST_CANDIDATES = 40


@dataclass(frozen=True, eq=False)
class RuleData(OneLine):
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

    rule: AnyRule
    f1: float
    score: float


@dataclass(frozen=True, eq=False)
class _Task:
    """Some tokens of the data, and the price of a bit: a subset is scored as part of the whole."""

    data: RuleData
    vocabulary: TokenTexts
    n_active: int

    def score(self, hits: Numbers, fired: Numbers, bits: Numbers) -> np.ndarray:
        f1 = 2 * hits / np.maximum(fired + self.n_active, 1)
        return np.asarray(f1 - LENGTH_WEIGHT * bits / (self.n_active * self.vocabulary.bits))

    def fitted(self, rule: AnyRule) -> FittedRule:
        fires = rule.fires(self.data.view, self.vocabulary)
        hits, fired = int((fires & self.data.active).sum()), int(fires.sum())
        score = self.score(hits, fired, rule.bits(self.vocabulary))
        return FittedRule(rule, 2 * hits / max(fired + self.n_active, 1), float(score))


def fit_rule(data: RuleData, vocabulary: TokenTexts) -> FittedRule:
    """The rule with the largest F1 over tokens less a penalty for its length (minimum description length).

    The grammar: sets of tokens, beginnings of words, classes of tokens, sets of preceding tokens (directly, or within
    8) and of next tokens, classes of both, intervals of positions, sequences of two or three tokens, and each rule on
    the token combined with a context.

    Raises:
        DegenerateInputError: if no token is active.
    """
    n_active = int(data.active.sum())
    if not n_active:
        raise DegenerateInputError(f"fit_rule: none of {len(data.active)} tokens is active. Give windows that are.")
    whole = _Task(data, vocabulary, n_active)
    alone = [whole.fitted(rule) for rule in (*_token_rules(whole), *_context_rules(whole))]
    on_token = [fit for fit in alone if not isinstance(fit.rule, After | At | Before | Ngram)]
    best = sorted(on_token, key=lambda fit: -fit.score)[:3]
    refined = [whole.fitted(rule) for fit in best for rule in _refined(whole, fit.rule)]
    return max(*alone, *refined, whole.fitted(Never()), key=lambda f: (round(f.score, 9), -f.rule.bits(vocabulary)))


def _refined(whole: _Task, base: AnyRule) -> Iterator[AnyRule]:
    """The rule in each context, fitted to the tokens where the rule fires."""
    inside = base.fires(whole.data.view, whole.vocabulary)
    if inside.any() and not inside.all():
        part = replace(whole, data=whole.data[inside])
        yield from (Both(base, context) for context in _context_rules(part))


def _token_rules(task: _Task) -> Iterator[AnyRule]:
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


def _context_rules(task: _Task) -> Iterator[AnyRule]:
    previous = _best_keys(task, task.data.view.before[:, 0], task.vocabulary.bits, MOST_TOKENS)
    if len(previous := previous[previous >= 0]):
        yield After(tuple(previous.tolist()), 1)
    if triggers := _best_triggers(task):
        yield After(triggers, REACH)
    yield from (InClass(name, back=1) for name in TOKEN_CLASSES)
    yield from _best_interval(task)
    following = _best_keys(task, task.data.view.after, task.vocabulary.bits, MOST_TOKENS)
    if len(following := following[following >= 0]):
        yield Before(tuple(following.tolist()))
    yield from (InClass(name, back=-1) for name in TOKEN_CLASSES)


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
    number, of_token = task.vocabulary.beginnings(length)
    best, prefixes = _best_keys(task, of_token[task.data.view.ids], 5.0 * length, MOST_STEMS), tuple(number)
    return tuple(prefixes[i] for i in best.tolist() if i >= 0)


def _best_sequences(task: _Task, length: int) -> tuple[tuple[int, ...], ...]:
    view, size = task.data.view, len(task.vocabulary) + 1
    keys = view.ids.astype(np.int64) + 1
    for back in range(length - 1):
        keys = keys + (view.before[:, back] + 1) * size ** (back + 1)
    best = _best_keys(task, keys, length * task.vocabulary.bits, MOST_SEQUENCES).tolist()
    unpacked = (tuple(int(key // size**back % size) - 1 for back in reversed(range(length))) for key in best)
    return tuple(sequence for sequence in unpacked if min(sequence) >= 0)


def _best_triggers(task: _Task) -> tuple[int, ...]:
    """Tokens of which one stands among the last `REACH`, added one by one while the score grows."""
    before, active = task.data.view.before, task.data.active
    inside, counts = np.unique(before[active], return_counts=True)
    overall, total = np.unique(before, return_counts=True)
    usual = total[np.searchsorted(overall, inside)]
    some = (inside >= 0).nonzero()[0]
    likely = some[np.lexsort((inside[some], -counts[some], -(counts[some] ** 1.5) / usual[some]))][:_MOST_CANDIDATES]
    tokens = np.sort(inside[likely])
    place_of = np.full(len(task.vocabulary) + 1, -1)
    place_of[tokens] = np.arange(len(tokens))
    places = place_of[before]
    # one product counts for all tokens; counts of less than 2^24 are exact
    present = np.zeros((len(tokens), len(active)), dtype=np.float32)
    present[places[places >= 0], (places >= 0).nonzero()[0]] = 1
    chosen: list[int] = []
    left, hits, fired, best = np.ones(len(active), dtype=np.float32), 0.0, 0.0, -np.inf
    while len(chosen) < min(MOST_TRIGGERS, len(tokens)):
        new_hits, new_fired = (present @ np.stack([left * active, left], 1)).T.astype(float)
        scores = task.score(hits + new_hits, fired + new_fired, 3 + (len(chosen) + 1) * task.vocabulary.bits)
        place = int(scores.argmax())  # of equal ones the smallest id; one that is chosen already gains nothing
        if scores[place] <= best:
            break
        best, hits, fired = float(scores[place]), hits + float(new_hits[place]), fired + float(new_fired[place])
        left *= 1 - present[place]
        chosen.append(place)
    return tuple(sorted(tokens[chosen].tolist()))


def _best_interval(task: _Task) -> Iterator[AnyRule]:
    positions, active = task.data.view.positions, task.data.active
    last = int(positions.max()) + 1
    edges = [b for b in _BOUNDARIES if b < last] + [last]
    total = np.histogram(positions, edges)[0]
    hits = np.histogram(positions[active], edges)[0]
    intervals = itertools.combinations(range(len(edges)), 2)
    # of equal ones the first
    i, j = max(intervals, key=lambda ij: float(task.score(hits[slice(*ij)].sum(), total[slice(*ij)].sum(), 8.0)))
    if (i, j) != (0, len(edges) - 1):
        yield At(edges[i], None if edges[j] == last else edges[j])
