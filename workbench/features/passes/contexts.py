"""Top activating contexts of every feature of a store, as text; a pass over windows that keeps only peaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.codec import token_bytes
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.html import Shown
from workbench.core.tokenizer import TokenizerLike
from workbench.features.passes.sampling import MISSING as MISSING
from workbench.features.passes.store_pass import SAEFeatures
from workbench.features.passes.windows import WindowOptions, collect_windows

if TYPE_CHECKING:
    import pandas as pd

_MARK = "\u2063"


@checked
@dataclass(frozen=True)
class ContextOptions(OneLine):
    """How contexts are collected.

    Attributes:
        per_feature: contexts kept per feature, those with the largest activation; each packed row gives at most one.
        max_tokens: kept tokens that are read, from the start of the store; None reads all.
        min_contexts: features with fewer contexts get no input score.
        shown: contexts per feature that are kept as text.
        before: tokens shown before the activating one.
        after: tokens shown after it.
    """

    per_feature: int = 100
    max_tokens: int | None = 200_000
    min_contexts: int = 10
    shown: int = 3
    before: int = 8
    after: int = 4

    def __post_init__(self) -> None:
        limits_fit = 1 <= self.min_contexts <= self.per_feature and (self.max_tokens is None or self.max_tokens >= 1)
        if not limits_fit or self.shown < 0:
            raise InvalidInputError(f"{self}: needs 1 <= min_contexts <= per_feature, shown >= 0, max_tokens >= 1.")


@dataclass(frozen=True, eq=False, kw_only=True)
class TopContexts(Shown):
    """The contexts in which each feature is most active, strongest first; `MISSING` and 0 where there are fewer.

    Attributes:
        acts: largest activation of the feature in the packed row.
        tokens: id of the token on which it was reached.
        rows: packed row in the store.
        positions: position in the row.
        frequency: share of the read tokens on which the feature is active.
        n_tokens: kept tokens that were read.
        texts: the strongest contexts as text, the activating token between « and ».
    """

    acts: Float[Tensor, "features k"]
    tokens: Int[Tensor, "features k"]
    rows: Int[Tensor, "features k"]
    positions: Int[Tensor, "features k"]
    frequency: Float[Tensor, " features"]
    max_act: Float[Tensor, " features"]
    n_tokens: int
    texts: tuple[tuple[str, ...], ...]

    def frame(self) -> pd.DataFrame:
        """One row per context, by feature in the order asked for: rank, activation, token id, place, text."""
        import pandas as pd

        feature, rank = (self.tokens != MISSING).nonzero(as_tuple=True)
        at = {
            name: getattr(self, name)[feature, rank].cpu().numpy() for name in ("acts", "tokens", "rows", "positions")
        }
        texts = [self.texts[f][r] if r < len(self.texts[f]) else "" for f, r in zip(feature, rank, strict=True)]
        return pd.DataFrame({"feature": feature.cpu().numpy(), "rank": rank.cpu().numpy(), **at, "text": texts})

    @property
    def counts(self) -> Int[Tensor, " features"]:
        """Number of contexts per feature."""
        return (self.tokens != MISSING).sum(1)


@checked
def top_contexts(
    store: ActivationStore,
    sae: AnySAE,
    tokenizer: TokenizerLike,
    features: Int[Tensor, " features"],
    site: str,
    options: ContextOptions | None = None,
) -> TopContexts:
    """The packed rows in which each feature is most active, with its frequency over the tokens that were read.

    Tokens that the store left out (attention sinks, special tokens) do not count.

    Raises:
        DegenerateInputError: if the store holds no tokens.
        UnknownSiteError: if the site is not stored.
    """
    options = options or ContextOptions()
    only_peaks = WindowOptions(
        top=options.per_feature, sample=0, before=0, after=0, background=0, co_entries=0, max_tokens=options.max_tokens
    )
    windows = collect_windows(store, site, SAEFeatures(sae, features), only_peaks)
    tokens, rows, positions, starts = (
        column.long() for column in (windows.top.token, windows.top.row, windows.top.position, windows.top.start)
    )
    shown, at, start = (column[:, : options.shown] for column in (rows, positions, starts))
    ends = frozenset(store.manifest.special_ids)
    return TopContexts(
        acts=windows.top.peaks, tokens=tokens, rows=rows, positions=positions, frequency=windows.frequency,
        max_act=windows.max_act, n_tokens=windows.n_tokens,
        texts=_texts(windows.ids, token_bytes(tokenizer), ends, shown, at, start, options),
    )  # fmt: skip


def marked(before: str, token: str, after: str) -> str:
    """A context with its token between « and », and inside them U+2063 (invisible) if the text has such marks itself.

    >>> marked("a ", "b", " c"), unmarked(marked("«x» ", "b", " »"))
    ('a «b» c', ('«x» ', 'b', ' »'))
    """
    before, token, after = (part.replace(_MARK, "") for part in (before, token, after))
    mark = _MARK if "«" in before or "»" in token else ""
    return f"{before}«{mark}{token}{mark}»{after}"


def unmarked(context: str) -> tuple[str, str, str]:
    """The text before the token of a context, the token, and the text after it."""
    mark = _MARK if f"«{_MARK}" in context else ""
    before, _, rest = context.partition(f"«{mark}")
    token, _, after = rest.partition(f"{mark}»")
    return before, token, after


def _texts(
    ids_of: Callable[[int], list[int]], parts: Sequence[bytes], ends: frozenset[int], rows: Tensor, positions: Tensor,
    starts: Tensor, options: ContextOptions,
) -> tuple[tuple[str, ...], ...]:  # fmt: skip
    """The shown contexts as text, which ends where their document does."""

    def text(ids: Sequence[int]) -> str:
        # bytes are joined before they are read: a character may be cut into several tokens
        known = (parts[i] if i < len(parts) and parts[i] else f"⟨{i}⟩".encode() for i in ids)
        return b"".join(known).decode("utf-8", errors="replace")

    texts: list[list[str]] = [[] for _ in range(len(rows))]
    for feature, rank in (rows != MISSING).nonzero().tolist():
        row, at = ids_of(int(rows[feature, rank])), int(positions[feature, rank])
        before = row[max(int(starts[feature, rank]), at - options.before) : at]
        after = itertools.takewhile(lambda i: i not in ends, row[at + 1 : at + 1 + options.after])
        texts[feature].append(marked(text(before), text(row[at : at + 1]), text(list(after))))
    return tuple(tuple(feature) for feature in texts)
