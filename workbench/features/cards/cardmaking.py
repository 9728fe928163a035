"""Makes feature cards from one pass over a store."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted, number
from workbench.engine.keeper import Keeper
from workbench.features.card import Explanation, FeatureCard, LensToken, Neighbour, Window
from workbench.features.cards.cardset import CardSet
from workbench.features.cards.neighbours import NeighbourOptions, activation_neighbours, decoder_neighbours
from workbench.features.explain.examples import ExampleOptions
from workbench.features.explain.rule_explanations import explain_by_rules, score_rules
from workbench.features.passes.sampling import MISSING
from workbench.features.passes.store_pass import SAEFeatures
from workbench.features.passes.windows import FeatureWindows, WindowOptions, WindowTable, bin_edges, collect_windows
from workbench.features.scores.logit_lens import LensEnds, LensTokens, feature_ids, in_residual, lens_ends
from workbench.features.scores.origin import origin
from workbench.features.scores.table import FeatureTable
from workbench.features.token_classes import TokenTexts
from workbench.models.model import Model

DENSE_SHARE = 0.1
"""A feature that is active on more than this share of the tokens is dense."""
OUTLIER_FACTOR = 10.0
"""A feature is an outlier if its largest activation times the norm of its decoder row, or the norm alone, is this many
times that of the median live feature; the norm also if it is this many times less."""
MAX_BARS = 24
_SCORES = ("input_score", "output_score", "output_score_delta")


@checked
@dataclass(frozen=True, kw_only=True)
class CardOptions(OneLine):
    """Contents of cards.

    Attributes:
        shown: strongest windows on a card.
        per_decile: further windows of each decile of the feature's peaks.
        lens_k: tokens promoted and suppressed.
        explain: whether rules are made and tested; the slowest part.
    """

    shown: int = 10
    per_decile: int = 1
    lens_k: int = 10
    explain: bool = True
    windows: WindowOptions = field(default_factory=WindowOptions)
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    neighbours: NeighbourOptions = field(default_factory=NeighbourOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.shown <= self.windows.top or self.per_decile < 0 or self.lens_k < 1:
            raise InvalidInputError(f"{self}: needs 0 <= shown <= windows.top, per_decile >= 0, lens_k >= 1.")


@checked
def feature_cards(
    model: Model,
    sae: AnySAE,
    store: ActivationStore,
    features: Sequence[int] | None = None,
    table: FeatureTable | None = None,
    options: CardOptions | None = None,
    keep: str | Path | None = None,
) -> CardSet:
    """Cards of an SAE's features from one pass over a store, with tested explanations.

    Args:
        model: the model that the SAE was trained on.
        sae: an SAE in the sae_lens form.
        store: activations at the SAE's site.
        features: which; all by default. Neighbours by activation are found among these.
        table: input and output scores to show.
        options: contents of cards.
        keep: folder for finished rules and tests, so that a repeated call makes only the missing ones. It can be
            deleted when the cards are saved.

    Raises:
        MismatchError: if the SAE or the store belongs to another model.
        UnknownSiteError: if the site is not stored.
    """
    options = options or CardOptions()
    basis = placed_at(sae, model)
    where, ids = model.resolve(str(basis.site)), feature_ids(basis, features)
    store.check_model(model)
    if table is not None:
        table.check(model, sae)
    windows = collect_windows(store, str(where), SAEFeatures(sae, ids), options.windows)
    rows = basis.rows(ids).cpu()
    ends = _lens(model, rows, options.lens_k) if in_residual(model.resolve(basis.site_out or where)) else None
    vocabulary = TokenTexts.of(model.tokenizer).padded(model.d_vocab)
    meta = {
        **origin(model, sae, where), "store": str(store.path), "n_tokens": windows.n_tokens, "options": asdict(options),
        "neighbour_tokens": windows.co.n_tokens, "neighbour_share": windows.co.share,
    }  # fmt: skip
    explanations: dict[int, Explanation] = {}
    if options.explain:
        shards = [shard.sha256 for shard in store.manifest.shards]
        parts = None if keep is None else Keeper.of_key(keep, {**meta, "features": ids.tolist(), "shards": shards})
        rules = explain_by_rules(windows, ids, vocabulary, options.examples, parts)
        explanations = score_rules(rules, vocabulary, seed=options.examples.seed, keep=parts)
    every = basis.rows()
    made = _Made(
        ids=ids, windows=windows, vocabulary=vocabulary, ends=ends, norms=rows.norm(dim=1),
        by_activation=activation_neighbours(windows.co, ids, options.neighbours),
        by_decoder=decoder_neighbours(every, ids, options.neighbours),
        explanations=explanations, scores=_scores(table, ids), options=options,
    )  # fmt: skip
    return CardSet(tuple(ids.tolist()), meta, made)


def flags_of(
    active: Int[Tensor, " features"], n_tokens: int, max_act: Float[Tensor, " features"],
    decoder_norms: Float[Tensor, " features"],
) -> list[tuple[str, ...]]:  # fmt: skip
    """Which features are dead, dense or outliers, with the reason behind a colon.

    Dead: active on none of the tokens read. Dense: active on more than 10 % of them. Outlier: largest activation times
    decoder norm more than 10 times the median of the live features, or decoder norm more than 10 times the median or
    less than a tenth of it.

    >>> ones = torch.ones(3)
    >>> flags_of(torch.tensor([0, 2, 1]), 10, torch.tensor([0.0, 1.0, 1.0]), ones)[:2]
    [('dead: active on none of 10 tokens',), ('dense: active on a share of 0.200 of 10 tokens',)]
    """
    live = active > 0
    effect = max_act * decoder_norms
    usual_effect = float(effect[live].median()) if bool(live.any()) else math.nan
    usual_norm = float(decoder_norms[live].median()) if bool(live.any()) else math.nan
    flags: list[tuple[str, ...]] = []
    for n, strength, norm in zip(active.tolist(), effect.tolist(), decoder_norms.tolist(), strict=True):
        own = []
        if n == 0:
            own.append(f"dead: active on none of {counted(n_tokens, 'tokens')}")
        if n > DENSE_SHARE * n_tokens:
            own.append(f"dense: active on a share of {number(n / n_tokens)} of {counted(n_tokens, 'tokens')}")
        if n and strength > OUTLIER_FACTOR * usual_effect:
            own.append(f"outlier: writes up to {number(strength)}, the median live feature {number(usual_effect)}")
        if n and not usual_norm / OUTLIER_FACTOR <= norm <= OUTLIER_FACTOR * usual_norm:
            own.append(f"outlier: decoder norm {number(norm)}, the median {number(usual_norm)}")
        flags.append(tuple(own))
    return flags


def bars(counts: Int[Tensor, " bins"]) -> tuple[tuple[float, float, int], ...]:
    """A histogram of at most `MAX_BARS` bars from fixed bins: lower edge, upper edge, tokens."""
    used = counts.nonzero().flatten()
    if not len(used):
        return ()
    first, last = int(used[0]), int(used[-1]) + 1
    step, edges = -(-(last - first) // MAX_BARS), bin_edges().tolist()
    ends = [(i, min(i + step, last)) for i in range(first, last, step)]
    return tuple((edges[i], edges[j], int(counts[i:j].sum())) for i, j in ends)


def _lens(model: Model, rows: Float[Tensor, "features d_model"], k: int) -> LensEnds:
    # A zero row promotes nothing; any direction keeps the table in shape, its tokens are not shown.
    return lens_ends(model, torch.where(rows.norm(dim=1, keepdim=True) == 0, torch.ones_like(rows), rows), k)


def _scores(table: FeatureTable | None, ids: Int[Tensor, " features"]) -> dict[int, dict[str, float]]:
    if table is None:
        return {}
    df = table.df.set_index("feature")
    return {
        feature: {name: float(df.at[feature, name]) for name in _SCORES if not math.isnan(df.at[feature, name])}
        for feature in ids.tolist() if feature in df.index
    }  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class _Made:
    """Cards made from arrays, one at a time."""

    ids: Tensor
    windows: FeatureWindows
    vocabulary: TokenTexts
    ends: LensEnds | None
    norms: Tensor
    by_activation: list[tuple[Neighbour, ...]]
    by_decoder: list[tuple[Neighbour, ...]]
    explanations: dict[int, Explanation]
    scores: dict[int, dict[str, float]]
    options: CardOptions

    @functools.cached_property
    def _flags(self) -> list[tuple[str, ...]]:
        return flags_of(self.windows.active, self.windows.n_tokens, self.windows.max_act, self.norms)

    def card(self, place: int) -> FeatureCard:
        windows, feature = self.windows, int(self.ids[place])
        return FeatureCard(
            feature=feature, frequency=float(windows.frequency[place]), max_act=float(windows.max_act[place]),
            n_tokens=windows.n_tokens, flags=self._flags[place], histogram=bars(windows.histogram[place]),
            windows=self._windows(place), promoted=self._lens_tokens(place, "promoted"),
            suppressed=self._lens_tokens(place, "suppressed"),
            neighbours=(*self.by_activation[place], *self.by_decoder[place]),
            explanation=self.explanations.get(feature), scores=self.scores.get(feature),
        )  # fmt: skip

    def _lens_tokens(self, place: int, end: str) -> tuple[LensToken, ...]:
        if self.ends is None or not float(self.norms[place]):
            return ()
        lens: LensTokens = getattr(self.ends, end)
        pairs = zip(lens.ids[place].tolist(), lens.values[place].tolist(), strict=True)
        return tuple(LensToken(self.vocabulary.text(token), token, logit) for token, logit in pairs)

    def _windows(self, place: int) -> tuple[Window, ...]:
        if not int(self.windows.active[place]):
            return ()
        shown, sample, edges = self._strongest(place), self.windows.sample, self.windows.decile_edges(place)
        rows = {window.row for window in shown}
        by_decile: dict[int, list[int]] = {}
        for i in range(int(sample.counts[place])):
            if int(sample.row[place, i]) not in rows:
                by_decile.setdefault(1 + int((edges > sample.peaks[place, i]).sum()), []).append(i)
        for decile in sorted(by_decile):
            chosen = by_decile[decile][: self.options.per_decile]
            shown += [self._window(sample, place, i, f"decile {decile}") for i in chosen]
        return tuple(shown)

    def _strongest(self, place: int) -> list[Window]:
        """The strongest windows with different tokens."""
        distinct: dict[tuple[object, ...], Window] = {}
        for i in range(int(self.windows.top.counts[place])):
            if len(distinct) < self.options.shown:
                window = self._window(self.windows.top, place, i, "top")
                distinct.setdefault((window.tokens, window.peak), window)
        return list(distinct.values())

    def _window(self, table: WindowTable, place: int, i: int, stratum: str) -> Window:
        row, position = int(table.row[place, i]), int(table.position[place, i])
        low, high = int(table.low[place, i]), int(table.high[place, i])
        ids = self.windows.ids(row)[low:high]
        first = low - position + self.windows.options.before
        values = table.values[place, i, first : first + len(ids)].tolist()
        texts = tuple(self.vocabulary.text(token) if token != MISSING else "" for token in ids)
        known = tuple(None if math.isnan(value) else value for value in values)
        return Window(texts, known, position - low, stratum, row, int(table.document[place, i]))
