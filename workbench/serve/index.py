"""The features that the page can search: those of cards, or every feature by its lens tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

from workbench.core.progress import track
from workbench.core.records import to_jsonable
from workbench.features.card import FeatureCard, LensToken
from workbench.features.scores.logit_lens import LensTokens, lens_ends, slab_rows
from workbench.features.token_classes import TokenTexts
from workbench.report.features import PackOptions
from workbench.report.features.encode import pack_cards
from workbench.serve.playground import Playground

MAX_PRODUCTS = 2**40
"""Most multiplications for the logit lens of all features at the start: seconds to a minute."""
N_TOKENS = 10
_UNMEASURED = FeatureCard(feature=-1, frequency=math.nan, max_act=math.nan, n_tokens=0)


def feature_index(playground: Playground, cards: Iterable[FeatureCard] | None = None) -> Mapping[str, object] | None:
    """The index that the page searches; None without cards if the SAE is missing or too large to read all features."""
    if cards is None:
        if not can_read_all(playground):
            return None
        cards = lens_cards(playground)
    return pack_cards(map(to_jsonable, cards), PackOptions(windows=0)).index


def can_read_all(playground: Playground) -> bool:
    """Whether the lens tokens of all features are computed at the start."""
    if playground.basis is None:
        return False
    return playground.basis.d_sae * playground.model.d_model * playground.model.d_vocab <= MAX_PRODUCTS


def lens_cards(playground: Playground) -> Iterator[FeatureCard]:
    """A card of every feature with only the tokens that its decoder row promotes and suppresses."""
    assert playground.basis is not None
    model, rows = playground.model, playground.basis.rows()
    vocabulary, alive = TokenTexts.of(model.tokenizer), rows.norm(dim=1) > 0
    features = alive.nonzero().flatten()
    parts = features.split(slab_rows(model.d_vocab))

    def tokens(lens: LensTokens, row: int) -> tuple[LensToken, ...]:
        both = zip(lens.ids[row].tolist(), lens.values[row].tolist(), strict=True)
        # A model may have more rows in its unembedding than the tokenizer has tokens.
        return tuple(LensToken(vocabulary.text(i), i, value) for i, value in both if i < len(vocabulary))

    for part in track(parts, description="reading features", unit="parts"):
        ends = lens_ends(model, rows[part], min(N_TOKENS, model.d_vocab))
        for row, feature in enumerate(part.tolist()):
            yield dataclasses.replace(
                _UNMEASURED, feature=feature, promoted=tokens(ends.promoted, row),
                suppressed=tokens(ends.suppressed, row),
            )  # fmt: skip
    for feature in (~alive).nonzero().flatten().tolist():
        yield dataclasses.replace(_UNMEASURED, feature=feature, flags=("dead: its decoder row is zero",))
