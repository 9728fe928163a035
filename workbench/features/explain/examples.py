"""Windows that a feature is explained from, and windows of other documents that the explanation is tested on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted
from workbench.features.explain.rulefit import RuleData
from workbench.features.explain.rules import REACH, TokenView
from workbench.features.passes.sampling import MISSING, uniform
from workbench.features.passes.windows import OUTSIDE, FeatureWindows, WindowTable

_SPLIT, _SILENT = 0x5911, 0x511E


@checked
@dataclass(frozen=True, kw_only=True)
class ExampleOptions(OneLine):
    """How windows are divided.

    Attributes:
        held_out: share of the documents that explanations are tested on and never made from.
        silent: most windows without the feature that an explanation is made from.
        tested: most windows with the feature that it is tested on; as many without.
        fewest: windows of each kind that a test needs; with fewer there is no score.
        seed: of the division.
    """

    held_out: float = 0.5
    silent: int = 128
    tested: int = 50
    fewest: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or min(self.silent, self.tested, self.fewest) < 1:
            raise InvalidInputError(f"{self}: held_out lies between 0 and 1; the counts are at least 1.")


@dataclass(frozen=True, eq=False)
class Windows:
    """Some windows of one feature.

    Attributes:
        view: token ids with what precedes and follows them, `(n, width)`.
        values: activation at each token; nan where it was left out of the store.
        inside: False beyond the row or document.
        documents: document of each window.
        rows: packed row of each window.
    """

    view: TokenView
    values: np.ndarray
    inside: np.ndarray
    documents: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, chosen: np.ndarray | slice) -> Windows:
        parts = (self.values, self.inside, self.documents, self.rows)
        return Windows(self.view[chosen], *(part[chosen] for part in parts))

    @property
    def known(self) -> np.ndarray:
        """Tokens of which the activation is known."""
        return self.inside & ~np.isnan(self.values)

    @property
    def active(self) -> np.ndarray:
        """Tokens on which the feature is active."""
        return np.nan_to_num(self.values) > 0


def joined(parts: Sequence[Windows]) -> Windows:
    """Windows one after the other."""
    view = [np.concatenate([getattr(p.view, name) for p in parts]) for name in ("ids", "before", "positions", "after")]
    others = [np.concatenate([getattr(p, name) for p in parts]) for name in ("values", "inside", "documents", "rows")]
    return Windows(TokenView(*view), *others)


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples(OneLine):
    """The windows that one feature is explained from and tested on; no document is in both.

    Attributes:
        feature: its number.
        shown: windows with the feature, strongest and sampled ones.
        shown_silent: windows without it.
        tested: other windows with the feature, drawn evenly from the rows in which it is active.
        tested_silent: as many windows without it.
        top_tokens: ids of the tokens that the strongest shown windows peak on, most frequent first.
        held_silent: all windows without it that no explanation is made from; `tested_silent` are the first of them.
    """

    feature: int
    shown: Windows
    shown_silent: Windows
    tested: Windows
    tested_silent: Windows
    top_tokens: tuple[int, ...]
    held_silent: Windows

    def data(self) -> RuleData:
        """The tokens of known activation among those that are shown."""
        both = joined([self.shown, self.shown_silent])
        return RuleData(both.view[both.known], both.active[both.known])

    def lacking(self, fewest: int) -> str:
        """Why there can be no explanation or no test; "" if there can."""
        counts = {
            "windows to explain it from": len(self.shown),
            "held-out windows with the feature": len(self.tested),
            "held-out windows without it": len(self.tested_silent),
        }
        short = [counted(n, what) for what, n in counts.items() if n < fewest]
        if not short:
            return ""
        parts = (self.shown, self.shown_silent, self.tested, self.held_silent)
        if len(np.unique(np.concatenate([part.documents for part in parts]))) == 1:
            return (
                "all text is one document, and rules are tested on documents that they were not made from (a .txt file "
                "is one document, each line of a .jsonl file another)"
            )
        return f"{', '.join(short)} ({fewest} needed)"


def is_held_out(documents: torch.Tensor, options: ExampleOptions) -> torch.Tensor:
    """Which documents explanations are tested on: chosen by a hash of the document, the same for every feature."""
    return uniform(documents, _SPLIT, options.seed) < options.held_out


@checked
def examples_of(windows: FeatureWindows, slot: int, feature: int, options: ExampleOptions) -> Examples:
    """The windows of feature number `feature`, at place `slot` of a pass over a store, divided by document."""
    top, sample = (_of_table(windows, table, slot) for table in (windows.top, windows.sample))
    # Documents may share passages; a passage is shown once, and no passage that was shown is tested.
    seen: set[bytes] = set()
    strongest = _unseen(top[~_held(top, options)], seen)
    shown_sample = sample[~_held(sample, options) & ~np.isin(sample.rows, strongest.rows)]
    shown = joined([strongest, _unseen(shown_sample, seen)])
    tested = _unseen(sample[_held(sample, options)], seen)[: options.tested]
    silent = _silent(windows, slot, feature, options)
    held, seen = _held(silent, options), set()
    shown_silent = _unseen(silent[~held], seen)[: options.silent]
    held_silent = _unseen(silent[held], seen)
    tested_silent = held_silent[: max(len(tested), 1)]
    tokens, counts = np.unique(strongest.view.ids[:, windows.options.before], return_counts=True)
    top_tokens = tokens[np.lexsort((tokens, -counts))[:10]]
    explained = {*shown.documents.tolist(), *shown_silent.documents.tolist()}
    assert explained.isdisjoint({*tested.documents.tolist(), *tested_silent.documents.tolist()})
    return Examples(
        feature=feature, shown=shown, shown_silent=shown_silent, tested=tested, tested_silent=tested_silent,
        top_tokens=tuple(top_tokens.tolist()), held_silent=held_silent,
    )  # fmt: skip


def _held(windows: Windows, options: ExampleOptions) -> np.ndarray:
    return is_held_out(torch.from_numpy(windows.documents), options).numpy()


def _unseen(windows: Windows, seen: set[bytes]) -> Windows:
    """The windows whose tokens are new, in order; `seen` grows by them."""
    fresh = []
    for i, ids in enumerate(windows.view.ids):
        if (key := ids.tobytes()) not in seen:
            seen.add(key)
            fresh.append(i)
    return windows[np.array(fresh, dtype=int)]


def _of_table(windows: FeatureWindows, table: WindowTable, slot: int) -> Windows:
    n = int((table.row[slot] != MISSING).sum())
    columns = (table.row, table.position, table.document, table.start, table.end)
    where = (column[slot, :n].numpy().astype(np.int64) for column in columns)
    return _looked_up(windows, table.values[slot, :n].numpy().copy(), *where)


def _silent(windows: FeatureWindows, slot: int, feature: int, options: ExampleOptions) -> Windows:
    """Background windows without the feature, in an order of its own."""
    background = windows.background
    chosen = (~background.active[:, slot]).nonzero().squeeze(1)
    chosen = chosen[uniform(background.where[chosen, 0].long(), _SILENT + feature, options.seed).argsort()]
    row, position, _, document, low, high, start, end = background.where[chosen].numpy().astype(np.int64).T
    at = position[:, None] + np.arange(-windows.options.before, windows.options.after + 1)
    inside = (at >= low[:, None]) & (at < high[:, None])
    values = np.where(background.kept[chosen].numpy(), 0.0, np.nan)
    return _looked_up(windows, np.where(inside, values, OUTSIDE), row, position, document, start, end)


def _looked_up(
    windows: FeatureWindows, values: np.ndarray, row: np.ndarray, position: np.ndarray, document: np.ndarray,
    start: np.ndarray, end: np.ndarray,
) -> Windows:  # fmt: skip
    """The windows with their token ids and what precedes and follows them in their documents."""
    ids = windows.row_ids.numpy()[np.searchsorted(windows.row_numbers.numpy(), row)].astype(np.int64)
    inside = values != OUTSIDE
    at = position[:, None] + np.arange(-windows.options.before, windows.options.after + 1)
    width = ids.shape[1] if ids.ndim == 2 else 1

    def look(places: np.ndarray) -> np.ndarray:
        flat = np.clip(places, 0, width - 1).reshape(len(places), math.prod(places.shape[1:]))
        return np.take_along_axis(ids, flat, 1).reshape(places.shape)

    back = at[:, :, None] - np.arange(1, REACH + 1)
    before = np.where(back >= start[:, None, None], look(back), MISSING)
    after = np.where(inside & (at < end[:, None]), look(at + 1), MISSING)
    view = TokenView(np.where(inside, look(at), MISSING), before, at, after)
    return Windows(view, values, inside, document, row)
