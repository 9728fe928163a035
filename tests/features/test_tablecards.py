from __future__ import annotations

import dataclasses
import math
from typing import Any

from workbench.features.card import FeatureCard, LensToken
from workbench.features.cards.tablecards import complete_cards, table_cards
from workbench.features.scores.table import COLUMNS, FeatureTable


def make_table(**changes: Any) -> FeatureTable:
    """Two features: 4 with contexts and scores, 9 dead and without."""
    import pandas as pd

    columns = {
        "feature": [4, 9], "input_score": [0.5, math.nan], "output_score": [0.02, math.nan],
        "output_score_delta": [0.01, math.nan], "frequency": [0.1, 0.0], "max_act": [7.5, math.nan], "n_contexts": [2, 0],
        "best_token": [" dog", ""], "top_tokens": [[" dog", "<b>"], []], "top_token_ids": [[11, 12], []],
        "contexts": [["a nice« dog»", "«cat» sat « on"], []], "context_token_ids": [[11, 3], []],
    }  # fmt: skip
    columns = {name: [math.nan, math.nan] for name in COLUMNS} | columns
    meta = {"n_tokens": 1000, "site": "resid_post.1", "model": "tiny"}
    return FeatureTable(pd.DataFrame(columns | changes), meta, {})


def test_rows_become_cards_that_claim_nothing_that_was_not_measured() -> None:
    live, dead = table_cards(make_table())
    assert (live.feature, live.frequency, live.max_act, live.n_tokens, live.flags) == (4, 0.1, 7.5, 1000, ())
    assert live.scores is not None
    known = {name: value for name, value in live.scores.items() if not math.isnan(value)}
    assert known == {"input_score": 0.5, "output_score": 0.02, "output_score_delta": 0.01}
    assert [(t.token, t.token_id) for t in live.promoted] == [(" dog", 11), ("<b>", 12)]
    assert all(math.isnan(t.logit) for t in live.promoted)
    first, second = live.windows
    assert (first.tokens, first.values, first.peak) == (("a nice", " dog"), (None, 7.5), 1)
    assert (second.tokens, second.peak) == (("cat", " sat « on"), 0)
    assert second.values[0] is not None
    assert math.isnan(second.values[0])
    assert dead.flags == ("dead: active on none of the 1000 tokens read",)
    assert dead.windows == dead.promoted == ()
    assert dead.scores is not None
    assert all(math.isnan(score) for score in dead.scores.values())


def test_cards_are_completed_and_keep_what_they_have() -> None:
    logit = LensToken("own", 1, 2.0)
    alone = FeatureCard(feature=2, frequency=0.3, max_act=8.0, n_tokens=5000)
    given = dataclasses.replace(alone, feature=4, promoted=(logit,), scores={"output_score": 0.9})
    cards = list(complete_cards([alone, given], make_table()))
    assert [card.feature for card in cards] == [2, 4, 9]
    assert cards[0] == alone
    assert cards[1].promoted == (logit,)
    assert cards[1].scores is not None
    assert cards[1].scores["output_score"] == 0.9
    assert cards[1].scores["output_score_delta"] == 0.01
    assert (cards[1].frequency, cards[1].max_act, cards[1].n_tokens) == (0.3, 8.0, 5000)
    assert len(cards[1].windows) == 2


def test_a_card_shows_itself_in_a_notebook() -> None:
    (live, _) = table_cards(make_table())
    shown = live._repr_html_()
    assert "Feature 4" in shown
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown.replace("<b>7.50", "")
    assert 'title="7.50"' in shown
    assert "not measured" in shown
