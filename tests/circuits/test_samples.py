"""Samples of confident predictions: which tokens count, with which context, and what is left out for which reason."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator

import pytest
import torch

import circuits
from circuits.discovery.samples import OTHER, REASONS, REPEAT, SHORT, SPECIAL, UNSURE
from tests.tiny import prefixed_tokenizer, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf

EVERY = circuits.SampleOptions(
    loss_max=math.inf,
    context=16,
    min_context=1,
    drop_induction=False,
    one_per_document=False,
    windows_per_document=None,
    limit=None,
    batch_size=4,
)
DOCUMENTS = ["the quick brown fox jumps over the lazy dog", "aaaa", "abcabcabc", "x", "", "one two three"]


def _with(**changes: object) -> circuits.SampleOptions:
    from dataclasses import replace

    return replace(EVERY, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def test_the_filter_drops_exactly_the_bigrams_that_the_context_has_shown(model: Model) -> None:
    # letters that come once, with a bigram shown again at two places, and one letter repeated in a new bigram
    plain = string.ascii_letters[:20]
    texts = [plain, plain[:10] + "de" + plain[10:] + "mn", plain + "dz"]
    found = circuits.find_samples(model, texts, options=_with(context=64, drop_induction=True))
    every = circuits.find_samples(model, texts, options=_with(context=64))
    kept, all_of_them = (
        {(d, p) for d, p in zip(s.documents.tolist(), s.positions.tolist(), strict=True)} for s in (found, every)
    )
    assert all_of_them - kept == {(1, 11), (1, 23)} and found.dropped[REPEAT] == 2 and every.dropped[REPEAT] == 0


def test_a_bigram_that_overlaps_itself_is_a_repetition_and_another_window_is_not(model: Model) -> None:
    found = circuits.find_samples(model, ["aaaa", "abcdabcd"], options=_with(context=3, drop_induction=True))
    kept = [(d, p) for d, p in zip(found.documents.tolist(), found.positions.tolist(), strict=True)]
    assert kept == [(0, 1), (1, 1), (1, 2), (1, 3), (1, 5), (1, 6), (1, 7)]


def test_a_loss_is_that_given_exactly_the_context(model: Model) -> None:
    found = circuits.find_samples(model, DOCUMENTS, options=EVERY)
    for row, answer, loss in zip(found.contexts.rows(), found.answers, found.losses, strict=True):
        alone = model.loss(torch.cat([row, answer[None]])[None])[0, -1]
        assert float(loss) == pytest.approx(float(alone), abs=1e-5)
    assert found.losses.std() > 0.1, "a loss of another token would be seen"


def test_every_token_of_a_document_is_asked_for_once_and_contexts_fit(model: Model) -> None:
    found = circuits.find_samples(model, DOCUMENTS, options=_with(context=7))
    lengths = [len(text) for text in DOCUMENTS]
    assert found.n_tokens == sum(lengths) == len(found) + sum(found.dropped.values())
    assert found.dropped == {reason: found.dropped[SHORT] if reason == SHORT else 0 for reason in REASONS}
    assert found.dropped[SHORT] == sum(-(-n // 8) for n in lengths), "the first token of each window of 8"
    assert found.n_documents == 5, "the empty one has no token"
    for row, answer, document, position in zip(
        found.contexts.rows(), found.answers.tolist(), found.documents.tolist(), found.positions.tolist(), strict=True
    ):
        start = position // 8 * 8
        assert model.tokenizer.decode([*row.tolist(), answer]) == DOCUMENTS[document][start : position + 1]
    assert int(found.contexts.lengths.max()) == 7


def test_some_windows_of_a_document_are_looked_at(model: Model) -> None:
    letters, seen = string.ascii_letters, set()
    for seed in range(12):
        found = circuits.find_samples(
            model, [letters, "abc"], options=_with(context=7, windows_per_document=2, seed=seed)
        )
        windows = {position // 8 for position in found.positions[found.documents == 0].tolist()}
        assert len(windows) == 2 and len(found) == len(windows) * 7 - (4 if 6 in windows else 0) + 2
        seen |= windows
    assert seen == set(range(7)), "any of them"


def test_every_window_begins_with_what_the_tokenizer_puts_in_front() -> None:
    tokenizer = prefixed_tokenizer()
    model = Model(tiny_hf("llama", len(tokenizer), 0), tokenizer, name="prefixed")
    prefix = model.tokens("a").ids[0, :-1].tolist()
    found = circuits.find_samples(model, [string.ascii_letters], options=_with(context=9))
    assert len(prefix) == 2 and found.n_tokens == 52
    assert all(row[:2].tolist() == prefix for row in found.contexts.rows())
    assert found.dropped[SPECIAL] == 7, "behind the prefix of each window of 8 the last token of the context is special"
    shown = {p: model.tokenizer.decode([int(a)]) for p, a in zip(found.positions.tolist(), found.answers, strict=True)}
    assert all(letter == string.ascii_letters[place] for place, letter in shown.items()) and len(shown) == 45


def test_unsure_and_special_tokens_are_left_out_for_the_first_reason_that_applies(model: Model) -> None:
    texts = ["abcdefgh<eos>ijklmnop"]
    every = circuits.find_samples(model, texts, options=EVERY)
    limit = float(every.losses.median())
    some = circuits.find_samples(model, texts, options=_with(loss_max=limit, min_context=3))
    assert every.dropped[SPECIAL] == 2, "the special token, and the one behind it"
    assert (some.losses < limit).all() and some.dropped[SHORT] > every.dropped[SHORT]
    short_or_special = set(every.positions[every.contexts.lengths < 3].tolist())
    kept = {p for p, loss in zip(every.positions.tolist(), every.losses.tolist(), strict=True) if loss < limit}
    assert set(some.positions.tolist()) == kept - short_or_special
    assert some.dropped[UNSURE] == len(set(every.positions.tolist()) - kept - short_or_special)


def test_one_sample_per_document_any_of_them(model: Model) -> None:
    texts = ["abcdefghijklmnopqrstuvw", "x", "vwxyz"]
    every = circuits.find_samples(model, texts, options=_with(context=7, min_context=3))
    first = every.positions[every.documents == 0].tolist()
    chosen = set()
    for seed in range(60):
        one = circuits.find_samples(
            model, texts, options=_with(context=7, min_context=3, one_per_document=True, seed=seed)
        )
        assert one.documents.tolist() == [0, 2] and one.dropped[OTHER] == len(every) - 2
        assert one.n_tokens == every.n_tokens == len(one) + sum(one.dropped.values())
        chosen.add(int(one.positions[0]))
    assert chosen == set(first) and len(first) > 8, "each can be the one, over the borders of windows"


@pytest.mark.parametrize("one", [True, False])
def test_the_batch_size_changes_nothing(one: bool, model: Model) -> None:
    parts = [
        circuits.find_samples(model, DOCUMENTS, options=_with(one_per_document=one, batch_size=size, limit=5, context=7, min_context=2))
        for size in (1, 3)
    ]  # fmt: skip
    first, other = (part.frame().drop(columns="loss") for part in parts)
    assert first.equals(other) and (parts[0].n_tokens, parts[0].dropped) == (parts[1].n_tokens, parts[1].dropped)
    torch.testing.assert_close(parts[0].losses, parts[1].losses, rtol=0, atol=1e-5)


def test_a_limit_stops_reading(model: Model) -> None:
    read = []

    def endless() -> Iterator[str]:
        for i in itertools.count():
            read.append(i)
            yield "abcdefg"

    found = circuits.find_samples(model, endless(), options=_with(one_per_document=True, limit=5))
    assert len(found) == 5 and found.documents.tolist() == [0, 1, 2, 3, 4] and found.n_documents == 5
    assert len(read) <= 5 + EVERY.batch_size


def test_samples_are_prompts_with_one_answer(model: Model) -> None:
    found = circuits.find_samples(model, DOCUMENTS, options=EVERY)
    pairs = found.pairs([0, 3])
    assert len(pairs) == 2 and pairs.patch is None
    assert pairs.answers[:, 0].tolist() == [int(found.answers[0]), int(found.answers[3])]
    assert "left out: 7 context too short" in str(found)


def test_what_gives_no_sample_is_refused(model: Model) -> None:
    with pytest.raises(
        DegenerateInputError, match=r"none of 3 tokens is a sample: 3 context too short.*lower min_context"
    ):
        circuits.find_samples(model, ["abc"], options=_with(min_context=5))
    with pytest.raises(DegenerateInputError, match="there is no text"):
        circuits.find_samples(model, [])
    with pytest.raises(InvalidInputError, match="Lower context"):
        circuits.find_samples(model, ["abc"], options=_with(context=100_000))
    for wrong in ({"loss_max": 0.0}, {"min_context": 17}, {"limit": 0}, {"windows_per_document": 0}, {"batch_size": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            _with(**wrong)
