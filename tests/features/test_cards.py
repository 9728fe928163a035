from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.features.test_input_score import SITE
from tests.features.toys import random_sae
from tests.tiny import tiny_model, tiny_tokenizer
from workbench.activations.store import ActivationStore
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, MissingFileError
from workbench.features import FeatureTable, lens_tokens
from workbench.features.card import FeatureCard
from workbench.features.cards import cardset
from workbench.features.cards.cardmaking import CardOptions, bars, feature_cards, flags_of
from workbench.features.cards.cardset import CARDS_FILE, CardSet
from workbench.features.explain import rule_explanations as explain
from workbench.features.explain.examples import ExampleOptions
from workbench.features.passes.windows import N_BINS, WindowOptions, bin_edges
from workbench.features.scores.logit_lens import lens_ends

OPTIONS = CardOptions(
    shown=4, lens_k=3, windows=WindowOptions(top=8, sample=60, before=5, after=4), examples=ExampleOptions(fewest=3)
)


@pytest.fixture(scope="module")
def cards(token_store: ActivationStore, table: FeatureTable) -> CardSet:
    return feature_cards(tiny_model(), random_sae(), token_store, table=table, options=OPTIONS)


def test_cards_say_what_the_sae_does(token_store: ActivationStore, cards: CardSet) -> None:
    sae = random_sae()
    blocks = list(token_store.blocks(SITE))
    acts = torch.cat([sae.encode(b.acts.float()) for b in blocks])
    rows, positions = (torch.cat([getattr(b, name) for b in blocks]) for name in ("rows", "positions"))
    ids = token_store.token_rows("all")
    for card in cards:
        values = acts[:, card.feature]
        assert card.frequency == pytest.approx(float((values > 0).double().mean()))
        assert card.max_act == pytest.approx(float(values.max()))
        assert sum(n for _, _, n in card.histogram) == int((values > 0).sum())
        for window in card.windows:
            at = (rows == window.row).nonzero().flatten()
            known = {int(p): float(v) for p, v in zip(positions[at], values[at], strict=True)}
            peak = max(known, key=lambda p: (known[p], -p))
            start = peak - window.peak
            assert len(window.tokens) == len(window.values) <= 10
            for i, (text, value) in enumerate(zip(window.tokens, window.values, strict=True)):
                assert value == (None if start + i not in known else pytest.approx(known[start + i]))
                if (decoded := tiny_tokenizer().decode(ids[window.row, start + i : start + i + 1])).isascii():
                    assert text == decoded
            assert window.values[window.peak] == max(v for v in window.values if v is not None)
    assert any(None in w.values for card in cards for w in card.windows), "left-out tokens are shown as unknown"


def test_windows_come_top_first_then_by_decile(cards: CardSet) -> None:
    card = max(cards, key=lambda c: c.frequency)
    strata = [w.stratum for w in card.windows]
    assert strata[:4] == ["top"] * 4
    deciles = [int(s.removeprefix("decile ")) for s in strata[4:]]
    assert deciles == sorted(set(deciles))
    assert len(deciles) >= 8
    peaks = [w.values[w.peak] or 0.0 for w in card.windows[4:]]
    assert peaks == sorted(peaks, reverse=True), "decile 1 is the strongest"
    assert len({w.row for w in card.windows}) == len(card.windows)


def test_both_ends_of_the_lens() -> None:
    model, rows = tiny_model(), random_sae().W_dec
    ends = lens_ends(model, rows, k=4)
    logits = model.lens(rows)
    assert torch.equal(ends.promoted.ids, lens_tokens(model, rows, 4).ids)
    torch.testing.assert_close(ends.suppressed.values, logits.sort(dim=1).values[:, :4])
    torch.testing.assert_close(logits.gather(1, ends.suppressed.ids), ends.suppressed.values)


def test_cards_hold_lens_scores_neighbours_and_explanations(cards: CardSet) -> None:
    card = max(cards, key=lambda c: c.frequency)
    model, sae = tiny_model(), random_sae()
    assert [t.token_id for t in card.promoted] == lens_tokens(model, sae.W_dec[[card.feature]], 3).ids[0].tolist()
    assert card.suppressed[0].logit < card.suppressed[1].logit < card.promoted[-1].logit
    assert card.scores is not None and 0 <= card.scores["output_score"] <= 1
    assert {n.kind for n in card.neighbours} == {"activation", "decoder"}
    assert all(n.feature != card.feature for n in card.neighbours)
    assert card.explanation is not None
    assert set(card.explanation.scores) >= {"detection", "fuzzing", "f1"}
    assert {"shuffled: detection", "empty: detection", "top tokens: detection"} <= set(card.explanation.controls)


def test_saved_cards_are_read_back_one_group_at_a_time(
    monkeypatch: pytest.MonkeyPatch, cards: CardSet, tmp_path: Path
) -> None:
    monkeypatch.setattr(cardset, "ROW_GROUP", 7)
    again = CardSet.load(cards.save(tmp_path / "c"))
    assert list(again) == list(cards)
    assert again[33] == cards[33]
    assert again.features == cards.features == tuple(range(40))
    assert again.meta == json.loads(json.dumps(cards.meta))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [CARDS_FILE]
    assert isinstance(iter(again), Iterator)
    assert all(len(vars(again._source)["_cards"]) <= 7 for _ in again)


def test_missing_and_damaged_cards_are_refused(cards: CardSet, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=CARDS_FILE):
        CardSet.load(tmp_path)
    folder = cards.save(tmp_path / "c")
    with pytest.raises(InvalidInputError, match="no card of feature 99"):
        cards[99]
    rows = pq.read_table(folder / CARDS_FILE)
    pq.write_table(rows.replace_schema_metadata(None), folder / CARDS_FILE)
    with pytest.raises(CorruptFileError, match="has no header"):
        CardSet.load(folder)
    pq.write_table(rows.drop_columns(["feature"]), folder / CARDS_FILE)
    with pytest.raises(CorruptFileError, match="can't be read"):
        CardSet.load(folder)
    (folder / CARDS_FILE).write_bytes(b"PAR1 no")
    with pytest.raises(CorruptFileError, match="can't be read"):
        CardSet.load(folder)


def test_a_writer_that_is_stopped_leaves_the_old_cards(
    cards: CardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cards.save(tmp_path / "c")
    other = CardSet(cards.features[:2], {**cards.meta, "n_tokens": 1}, cards._source)
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        other.save(folder)
    assert [p.name for p in folder.iterdir()] == [CARDS_FILE]
    again = CardSet.load(folder)
    assert (again.features, again.meta) == (cards.features, json.loads(json.dumps(cards.meta)))


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_some_features_and_another_model(token_store: ActivationStore, cards: CardSet) -> None:
    options = dataclasses.replace(OPTIONS, explain=False)
    some = feature_cards(tiny_model(), random_sae(), token_store, features=[9, 2], options=options)
    assert some.features == (9, 2)
    same = ("frequency", "max_act", "histogram", "windows")
    assert all(getattr(some[9], name) == getattr(cards[9], name) for name in same)
    assert some[9].explanation is None
    near = [[n.feature for n in c.neighbours if n.kind == "decoder"] for c in (some[9], cards[9])]
    assert near[0] == near[1], "decoder neighbours are sought among all features"
    with pytest.raises(MismatchError):
        feature_cards(tiny_model(seed=5), random_sae(), token_store)
    with pytest.raises(InvalidInputError, match="shown"):
        CardOptions(shown=50)


def test_a_dead_feature_has_an_empty_card(token_store: ActivationStore) -> None:
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc[3] = -1e6
        sae.W_dec[3] = 0.0
    card = feature_cards(tiny_model(), sae, token_store, features=[3, 4], options=OPTIONS)[3]
    assert card.flags == (f"dead: active on none of {card.n_tokens} tokens",)
    assert (card.windows, card.histogram, card.promoted, card.max_act) == ((), (), (), 0.0)
    assert card.explanation is not None and card.explanation.text.startswith("no explanation")
    assert isinstance(card, FeatureCard)


def test_flags_by_hand() -> None:
    active = torch.tensor([0, 11, 10, 5, 5, 5])
    max_act = torch.tensor([0.0, 1.0, 1.0, 1.0, 10.5, 1.0])
    norms = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.05])
    flags = flags_of(active, 100, max_act, norms)
    assert [[f.split(":")[0] for f in found] for found in flags] == [
        ["dead"],
        ["dense"],
        [],
        [],
        ["outlier"],
        ["outlier"],
    ]
    assert "a share of 0.110 of 100" in flags[1][0]
    assert "decoder norm" in flags[5][0]
    assert flags_of(torch.zeros(1, dtype=torch.long), 5, torch.zeros(1), torch.ones(1)) == [
        ("dead: active on none of 5 tokens",)
    ]


def test_bars_keep_every_count() -> None:
    counts = torch.zeros(N_BINS, dtype=torch.int32)
    counts[100:157] = torch.arange(57, dtype=torch.int32)
    found = bars(counts)
    assert sum(n for _, _, n in found) == int(counts.sum())
    assert len(found) <= 24
    assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))
    assert found[0][0] == float(bin_edges()[101]), "an empty bin at the end is left out"
    assert bars(torch.zeros(N_BINS, dtype=torch.int32)) == ()


def test_rules_of_an_interrupted_set_are_kept(
    token_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "BLOCK", 4)
    make = functools.partial(feature_cards, tiny_model(), random_sae(), token_store, features=range(16))
    whole = make(options=OPTIONS)
    fit, calls = explain.fit_rule, []

    def counted(*args: Any, stop: int = 10**9) -> Any:
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(explain, "fit_rule", functools.partial(counted, stop=10))
    with pytest.raises(KeyboardInterrupt):
        make(options=OPTIONS, keep=tmp_path)
    n_rules = sum(card.explanation is not None and bool(card.explanation.scores) for card in whole)
    calls.clear()
    monkeypatch.setattr(explain, "fit_rule", counted)
    again = make(options=OPTIONS, keep=tmp_path)
    assert 0 < len(calls) <= n_rules - 7, "at most a block is lost"
    assert [card.explanation for card in again] == [card.explanation for card in whole]
    calls.clear()
    monkeypatch.setattr(explain, "_tested", lambda *_: pytest.fail("tests are kept as well"))
    third = make(options=OPTIONS, keep=tmp_path)
    assert not calls and [card.explanation for card in third] == [card.explanation for card in whole]
    monkeypatch.undo()
    other = CardOptions(**{**vars(OPTIONS), "examples": ExampleOptions(fewest=3, seed=1)})
    fresh, kept = (make(options=other, keep=keep) for keep in (None, tmp_path))
    assert [card.explanation for card in kept] == [card.explanation for card in fresh], "another key"
