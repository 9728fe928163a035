"""Counts, histograms, strongest and sampled windows of features, in one pass over a store with constant memory.

Dense activations exist for a few packed rows at a time. Of them only entries are kept that are among a feature's
strongest, or that a hash of feature and row draws into its sample. The result depends neither on how the store is cut
into shards nor on how many tokens are read at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.features.passes.coactivation import CoActivationSample, CoSample
from workbench.features.passes.repeats import repeated_documents
from workbench.features.passes.sampling import MISSING, BestEntries, uniform
from workbench.features.passes.store_pass import Chunk, Units, chunks

OCTAVES, BINS_PER_OCTAVE = 16, 8
N_BINS = 2 * OCTAVES * BINS_PER_OCTAVE
"""Histogram bins: eight to a doubling, from 2**-16 to 2**16; what lies beyond counts in the outermost bin."""
OUTSIDE = -1.0
"""Value of a place of the window that lies beyond its row or document."""
_COLUMNS = ("row", "position", "token", "document", "low", "high", "start", "end")
_BACKGROUND = 0x0BAC


@checked
@dataclass(frozen=True, kw_only=True)
class WindowOptions(OneLine):
    """What is kept of each feature.

    Attributes:
        top: strongest windows; each packed row gives at most one, around its strongest token.
        sample: windows drawn evenly from the packed rows in which the feature is active.
        before: tokens before the peak of a window.
        after: tokens after it. A window ends where its row or document ends.
        background: windows drawn from all packed rows, which show where features are silent.
        max_tokens: kept tokens that are read, from the start of the store; None reads all.
        co_entries: activations kept for neighbours; beyond that, half of the packed rows are left out, and so on.
        seed: of the draws.
    """

    top: int = 20
    sample: int = 100
    before: int = 20
    after: int = 11
    background: int = 512
    max_tokens: int | None = 1_000_000
    co_entries: int = 2**22
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = min(self.top, self.sample, self.before, self.after, self.background, self.co_entries)
        if smallest < 0 or (self.max_tokens is not None and self.max_tokens < 1):
            raise InvalidInputError(f"{self}: nothing may be negative, and max_tokens must be at least 1.")

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return self.before + 1 + self.after

    def memory(self, n_features: int) -> int:
        """Bytes that the pass keeps, whatever the number of tokens; twice that while the best entries are chosen.

        The dense activations of the chunk that is read take another 4 bytes per token and feature.
        """
        entry = 8 + 4 * len(_COLUMNS) + 4 * self.width
        return n_features * ((self.top + self.sample) * entry + 2 * 4 * N_BINS + self.background) + 24 * self.co_entries


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowTable:
    """Windows of each feature; the last places are empty (`MISSING`) where a feature has fewer.

    Attributes:
        values: activation at each token of the window; nan where the token was left out of the store, `OUTSIDE` beyond
            the row or document.
        row: packed row in the store.
        position: of the peak in the row.
        token: id of the peak.
        low: first position of the window.
        high: position behind its last.
        start: first position of the document in the row.
        end: its last position there.
        peaks: activation at the peak; 0 where there is no window.
    """

    values: Float[Tensor, "features n width"]
    row: Int[Tensor, "features n"]
    position: Int[Tensor, "features n"]
    token: Int[Tensor, "features n"]
    document: Int[Tensor, "features n"]
    low: Int[Tensor, "features n"]
    high: Int[Tensor, "features n"]
    start: Int[Tensor, "features n"]
    end: Int[Tensor, "features n"]
    peaks: Float[Tensor, "features n"]

    @functools.cached_property
    def counts(self) -> Int[Tensor, " features"]:
        """Number of windows per feature."""
        return (self.row != MISSING).sum(1)


@dataclass(frozen=True, eq=False)
class Background:
    """Windows drawn from all packed rows.

    Attributes:
        where: row, position of the middle, its token, document, first position, position behind the last, first and
            last position of the document.
        kept: False where a token was left out of the store.
        active: whether each feature is active anywhere in each window.
    """

    where: Int[Tensor, "n columns"]
    kept: Bool[Tensor, "n width"]
    active: Bool[Tensor, "n features"]


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureWindows(OneLine):
    """Result of one pass.

    Attributes:
        n_tokens: kept tokens that were read.
        active: number of tokens on which each feature is active.
        histogram: tokens by activation, see `bin_edges`.
        peak_histogram: packed rows by their largest positive activation in documents that repeat no earlier one.
        top: strongest windows, strongest first; of equal ones the earlier row.
        sample: windows drawn evenly from the rows in which the feature is active.
        background: windows drawn from all rows.
        co: activations for neighbours.
        row_numbers: the packed rows of which `row_ids` holds the tokens, in order.
        row_ids: token ids of those rows, dropped tokens included.
    """

    options: WindowOptions
    n_tokens: int
    active: Int[Tensor, " features"]
    max_act: Float[Tensor, " features"]
    histogram: Int[Tensor, "features bins"]
    peak_histogram: Int[Tensor, "features bins"]
    top: WindowTable
    sample: WindowTable
    background: Background
    co: CoSample
    row_numbers: Int[Tensor, " rows"]
    row_ids: Int[Tensor, "rows context"]

    @functools.cached_property
    def frequency(self) -> Float[Tensor, " features"]:
        """Share of the read tokens on which each feature is active."""
        return (self.active.double() / self.n_tokens).float()

    @checked
    def ids(self, row: int) -> list[int]:
        """Token ids of a packed row that a window comes from."""
        at = int(torch.searchsorted(self.row_numbers, row))
        return self.row_ids[at].tolist()

    @checked
    def decile_edges(self, feature: int) -> Float[Tensor, " 9"]:
        """Peaks that 90 %, 80 %, ... 10 % of the feature's active rows stay below, largest first; from the histogram.

        Raises:
            DegenerateInputError: if the feature was never active.
        """
        counts = self.peak_histogram[feature].double()
        if not counts.sum():
            raise DegenerateInputError(f"Feature {feature} of this pass was never active, so it has no deciles.")
        edges, cumulated = bin_edges().double(), torch.cat([torch.zeros(1).double(), counts.cumsum(0)])
        below = torch.arange(0.9, 0.05, -0.1, dtype=torch.float64) * counts.sum()
        at = (torch.searchsorted(cumulated, below, right=True) - 1).clamp_max(N_BINS - 1)
        inside = (below - cumulated[at]) / counts[at].clamp_min(1.0)
        return (edges[at] + inside * (edges[at + 1] - edges[at])).float()


def bin_edges() -> Float[Tensor, " edges"]:
    """The edges of the histogram bins, 2**-16 to 2**16; a bin holds its lower edge.

    >>> len(bin_edges()) - 1, bin_edges()[0].item(), bin_edges()[-9].item()
    (256, 1.52587890625e-05, 32768.0)
    """
    return 2.0 ** (torch.arange(N_BINS + 1) / BINS_PER_OCTAVE - OCTAVES)


@checked
def collect_windows(
    store: ActivationStore, site: str | None, units: Units, options: WindowOptions | None = None
) -> FeatureWindows:
    """Counts, histograms and windows of some units over the kept tokens of a store, in one pass.

    A document that repeats an earlier one counts as tokens but gives no windows: it would fill the list of the
    strongest, and explanations would be tested on text that they are made from.

    Raises:
        DegenerateInputError: if the store holds no tokens.
        UnknownSiteError: if the site is not stored.
    """
    options = options or WindowOptions()
    running = _Running(units.ids, options, repeated_documents(store, options.max_tokens))
    with torch.no_grad():
        for chunk in chunks(store, site, options.max_tokens):
            running.add(chunk, units.acts(chunk))
    return running.result(store)


class _Running:
    def __init__(self, ids: Tensor, options: WindowOptions, repeated: Tensor) -> None:
        self.ids, self.n, self.options, self.repeated = ids, len(ids), options, repeated
        self.n_tokens, n = 0, self.n
        self.active = torch.zeros(n, dtype=torch.long)
        self.max_act = torch.zeros(n)
        self.histogram, self.peaks = (torch.zeros(n, N_BINS, dtype=torch.int32) for _ in range(2))
        self.top = BestEntries(n, options.top, len(_COLUMNS), options.width)
        self.sample = BestEntries(n, options.sample, len(_COLUMNS), options.width)
        self.background: list[tuple[Tensor, ...]] = []
        self.background_below = 1.0
        self.co = CoActivationSample(n, options.co_entries, options.seed)

    def add(self, chunk: Chunk, acts: Float[Tensor, "tokens n"]) -> None:
        at, feature = (acts > 0).nonzero(as_tuple=True)
        values = acts[at, feature]
        self.n_tokens += len(acts)
        self.active += torch.bincount(feature, minlength=self.n)
        if len(acts):
            self.max_act = torch.maximum(self.max_act, acts.amax(0))
        _count(self.histogram, feature, values)
        self.co.add(chunk.block.rows[at], chunk.block.rows[at] * chunk.ids.shape[1] + chunk.block.positions[at],
                    feature, values, chunk.block.rows)  # fmt: skip
        is_new = ~torch.isin(chunk.block.documents, self.repeated)
        at, feature, values = (x[is_new[at]] for x in (at, feature, values))
        row = chunk.block.rows[at] - chunk.first_row
        flat = row * self.n + feature
        best = torch.zeros(len(chunk.ids) * self.n).scatter_reduce_(0, flat, values, "amax")
        won = values == best[flat]
        # Of equal activations in a row the first token counts.
        first = torch.full((len(best),), len(acts)).scatter_reduce_(0, flat[won], at[won], "amin")
        cells = (best > 0).nonzero().squeeze(1)
        peak_feature, peak_at, peak = cells % self.n, first[cells], best[cells]
        _count(self.peaks, peak_feature, peak)
        layout = _Layout(chunk, self.options)
        self._offer(self.top, peak_feature, peak.double(), peak_at, layout, acts)
        drawn = uniform(self.ids[peak_feature], chunk.block.rows[peak_at], self.options.seed)
        self._offer(self.sample, peak_feature, drawn, peak_at, layout, acts)
        self._draw_background(chunk, layout, acts, is_new.nonzero().squeeze(1))

    def _offer(
        self, table: BestEntries, feature: Tensor, key: Tensor, at: Tensor, layout: _Layout, acts: Tensor
    ) -> None:
        wanted = table.wants(feature, key).nonzero().squeeze(1)
        if len(wanted):
            feature, at = feature[wanted], at[wanted]
            table.add(feature, key[wanted], layout.where(at), layout.values(at, feature, acts))

    def _draw_background(self, chunk: Chunk, layout: _Layout, acts: Tensor, new: Int[Tensor, " new"]) -> None:
        n, block = self.options.background, chunk.block
        if not n:
            return
        rows, counts = block.rows[new].unique_consecutive(return_counts=True)
        key = uniform(rows, _BACKGROUND, self.options.seed)
        middle = uniform(rows, _BACKGROUND + 1, self.options.seed)
        at = new[counts.cumsum(0) - counts + (middle * counts).long()]
        chosen = (key < self.background_below).nonzero().squeeze(1)
        for i in chosen.tolist():
            slots, inside = layout.slots(at[i : i + 1])
            kept = (slots >= 0) & inside
            active = (acts[slots[kept]] > 0).any(0)
            self.background.append((key[i], layout.where(at[i : i + 1])[0], kept[0], active))
        if len(self.background) >= 2 * n:
            self._trim_background()

    def _trim_background(self) -> None:
        self.background.sort(key=lambda entry: float(entry[0]))
        del self.background[self.options.background :]
        if self.background and len(self.background) == self.options.background:
            self.background_below = float(self.background[-1][0])

    def result(self, store: ActivationStore) -> FeatureWindows:
        self.top.flush()
        self.sample.flush()
        self._trim_background()
        top, sample = (_table(table, self.options.before) for table in (self.top, self.sample))
        background = self._background()
        rows = torch.cat([top.row.flatten(), sample.row.flatten(), background.where[:, 0]]).unique()
        rows = rows[rows != MISSING].long()
        return FeatureWindows(
            options=self.options, n_tokens=self.n_tokens, active=self.active, max_act=self.max_act,
            histogram=self.histogram, peak_histogram=self.peaks, top=top, sample=sample, background=background,
            co=self.co.result(), row_numbers=rows, row_ids=_ids_of_rows(store, rows),
        )  # fmt: skip

    def _background(self) -> Background:
        if not self.background:
            where, kept, active = (torch.zeros(0, n) for n in (len(_COLUMNS), self.options.width, self.n))
            return Background(where.int(), kept.bool(), active.bool())
        _, where, kept, active = zip(*self.background, strict=True)
        return Background(torch.stack(where).int(), torch.stack(kept), torch.stack(active))


def _count(histogram: Tensor, feature: Tensor, values: Tensor) -> None:
    index = ((values.log2() + OCTAVES) * BINS_PER_OCTAVE).floor().clamp_(0, N_BINS - 1).long()
    histogram.view(-1).index_add_(0, feature * N_BINS + index, torch.ones_like(index, dtype=torch.int32))


class _Layout:
    """Places of a chunk's tokens in their rows and documents."""

    def __init__(self, chunk: Chunk, options: WindowOptions) -> None:
        block, (n_rows, self.context) = chunk.block, chunk.ids.shape
        self.block, self.options = block, options
        self.row = block.rows - chunk.first_row
        self.slot = torch.full((n_rows, self.context), -1)
        self.slot[self.row, block.positions] = torch.arange(len(block.rows))
        self.low, self.high = chunk.documents()

    def where(self, at: Int[Tensor, " n"]) -> Int[Tensor, "n columns"]:
        """The columns of `WindowTable` for windows around some tokens."""
        block, position = self.block, self.block.positions[at]
        low = torch.maximum(position - self.options.before, self.low[at])
        high = torch.minimum(position + self.options.after, self.high[at]) + 1
        token, document = block.tokens[at], block.documents[at]
        columns = (block.rows[at], position, token, document, low, high, self.low[at], self.high[at])
        return torch.stack(columns, 1).int()

    def slots(self, at: Int[Tensor, " n"]) -> tuple[Int[Tensor, "n width"], Bool[Tensor, "n width"]]:
        """Index of each token of the windows, -1 where it was left out, and which places the windows have."""
        position = self.block.positions[at][:, None] + torch.arange(-self.options.before, self.options.after + 1)
        inside = (position >= self.low[at][:, None]) & (position <= self.high[at][:, None])
        return self.slot[self.row[at][:, None], position.clamp(0, self.context - 1)], inside

    def values(self, at: Int[Tensor, " n"], feature: Int[Tensor, " n"], acts: Tensor) -> Float[Tensor, "n width"]:
        """Activations of one feature for each window."""
        slots, inside = self.slots(at)
        values = acts[slots.clamp_min(0), feature[:, None]].masked_fill(slots < 0, float("nan"))
        return values.masked_fill(~inside, OUTSIDE)


def _table(entries: BestEntries, before: int) -> WindowTable:
    columns = dict(zip(_COLUMNS, entries.where.unbind(2), strict=True))
    peaks = entries.values[:, :, before].masked_fill(columns["row"] == MISSING, 0.0)
    return WindowTable(values=entries.values, peaks=peaks, **columns)


def _ids_of_rows(store: ActivationStore, rows: Int[Tensor, " rows"]) -> Int[Tensor, "rows context"]:
    """Token ids of some packed rows, read shard by shard."""
    ids = torch.full((len(rows), store.context), MISSING, dtype=torch.int32)
    for index, shard in enumerate(store.manifest.shards):
        inside = ((rows >= shard.first_row) & (rows < shard.first_row + shard.n_rows)).nonzero().squeeze(1)
        if len(inside):
            ids[inside] = store.packed_rows(index)[rows[inside] - shard.first_row].int()
    return ids
