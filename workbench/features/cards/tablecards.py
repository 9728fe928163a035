"""Cards from a table of scores, and cards completed by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from workbench.features.card import FeatureCard, LensToken, Window
from workbench.features.passes.contexts import MISSING, unmarked
from workbench.features.scores.table import FeatureTable

_NOT_SCORES = ("feature", "frequency", "max_act", "n_contexts")


def table_cards(table: FeatureTable) -> Iterator[FeatureCard]:
    """A card of each row: its scores, its lens tokens and its contexts as text.

    A table keeps no logits and of the contexts' activations only the largest, so the others are nan: not measured.
    """
    n_tokens = int(table.meta.get("n_tokens") or 0)
    for row in table.df.to_dict("records"):
        yield _card(row, n_tokens)


def complete_cards(cards: Iterable[FeatureCard], table: FeatureTable) -> Iterator[FeatureCard]:
    """The cards with the table's scores, and with its tokens and contexts where a card has none.

    Scores that a card already has stay. Rows of the table without a card follow as cards of their own.
    """
    rows = {card.feature: card for card in table_cards(table)}
    for card in cards:
        other = rows.pop(card.feature, None)
        yield card if other is None else _completed(card, other)
    yield from rows.values()


def _completed(card: FeatureCard, other: FeatureCard) -> FeatureCard:
    return dataclasses.replace(
        card,
        scores=(other.scores or {}) | (card.scores or {}),
        promoted=card.promoted or other.promoted,
        windows=card.windows or other.windows,
    )


def _card(row: dict[str, Any], n_tokens: int) -> FeatureCard:
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
    parts: list[tuple[str, float | None]] = [(before, None)] if before else []
    place = len(parts)
    parts += [(token, peak), (after, None)] if after else [(token, peak)]
    texts, values = zip(*parts, strict=True)
    return Window(texts, values, place, "top", MISSING, MISSING)
