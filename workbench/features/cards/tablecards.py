"""Cards from a table of scores, and cards completed by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from workbench.core.jsontext import Record
from workbench.features.card import FeatureCard, LensToken, Window
from workbench.features.passes.contexts import MISSING, unmarked
from workbench.features.scores.table import FeatureTable

_NOT_SCORES = ("feature", "frequency", "max_act", "n_contexts")


def table_cards(table: FeatureTable) -> Iterator[FeatureCard]:
    """A card of each row: its scores, its lens tokens and its contexts as text.

    A table holds no logits and only the largest activation of the contexts, so the others are nan: not measured.
    """
    n_tokens = int(table.meta.get("n_tokens") or 0)
    return (_card(row, n_tokens) for row in table.df.to_dict("records"))


def complete_cards(cards: Iterable[FeatureCard], table: FeatureTable) -> Iterator[FeatureCard]:
    """The cards with the table's scores, and with its tokens and contexts where a card has none.

    Scores of the card win over those of the table. Rows of the table without a card follow as cards of their own.
    """
    rows = {card.feature: card for card in table_cards(table)}
    for card in cards:
        row = rows.pop(card.feature, card)
        yield dataclasses.replace(
            card, scores=(row.scores or {}) | (card.scores or {}) or card.scores,
            promoted=card.promoted or row.promoted, windows=card.windows or row.windows,
        )  # fmt: skip
    yield from rows.values()


def _card(row: Record, n_tokens: int) -> FeatureCard:
    frequency, max_act = float(row["frequency"]), float(row["max_act"])
    tokens = zip(row["top_tokens"], row["top_token_ids"], strict=True)
    return FeatureCard(
        feature=int(row["feature"]),
        frequency=frequency,
        max_act=max_act,
        n_tokens=n_tokens,
        flags=(f"dead: active on none of the {n_tokens} tokens read",) if frequency == 0 else (),
        windows=tuple(_window(text, max_act if place == 0 else math.nan) for place, text in enumerate(row["contexts"])),
        promoted=tuple(LensToken(str(token), int(i), math.nan) for token, i in tokens),
        scores={
            name: float(value)
            for name, value in row.items()
            if isinstance(value, float | int) and not isinstance(value, bool) and name not in _NOT_SCORES
        },
    )


def _window(text: str, peak: float) -> Window:
    before, token, after = unmarked(text)
    parts = [part for part in ((before, None), (token, peak), (after, None)) if part[0] or part[1] is not None]
    texts, values = zip(*parts, strict=True)
    return Window(texts, values, int(bool(before)), "top", MISSING, MISSING)
