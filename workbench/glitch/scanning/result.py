"""What a glitch-token scan found, as values: one row per token, the groups behind the ranking, verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.core.display import OneLine
from workbench.core.html import Shown
from workbench.core.jsontext import Record
from workbench.glitch.ranking.indicators import Separation
from workbench.glitch.ranking.reference import Reference
from workbench.glitch.reporting import harmless_cell
from workbench.glitch.verification.contexts import Contexts
from workbench.glitch.verification.sides import Sides
from workbench.glitch.verification.symptoms import Symptoms
from workbench.glitch.verification.verify import Tested, Verification
from workbench.glitch.vocabulary.taxonomy import Nature
from workbench.glitch.vocabulary.tokenizer import LossyByte

if TYPE_CHECKING:
    import pandas as pd

NO_TEXT = ("partial_utf8", "unreachable_special", "unreachable_single", "unreachable_multi", "dropped")
"""Categories of tokens that no text gives; they can be tested by their ids alone."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts(OneLine):
    """Counts of the tokenizer's side.

    Attributes:
        counts: ids per category (keys of `workbench.glitch.vocabulary.tokenizer.CATEGORIES`); absent means zero.
        missing_bytes: bytes without such a token; in a byte-level vocabulary they cannot be written at all.
        vocabulary: hash of the vocabulary strings, by which two scans tell whether their tokenizers agree.
    """

    n_tokens: int
    style: str
    adds_space: bool
    counts: dict[str, int]
    n_byte_tokens: int
    missing_bytes: tuple[int, ...]
    lossy: tuple[LossyByte, ...]
    vocabulary: str


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenTable(Shown):
    """Columns of the result; index = token id = row of the matrix.

    Attributes:
        token: text of each token in context; stray bytes as <0xNN>.
        group: the reference groups that hold the id, separated by "; ".
        reserved: named as unused or reserved.
        copies: number of rows that are bit-identical to this one, itself included.
        indicators: every indicator that could be measured.
        indicator: the one that ranks; nan where there is none.
    """

    token: tuple[str, ...]
    category: tuple[str, ...]
    group: tuple[str, ...]
    is_reference: np.ndarray
    is_byte: np.ndarray
    reserved: np.ndarray
    copies: np.ndarray
    norm: np.ndarray
    indicators: dict[str, np.ndarray]
    indicator: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    def frame(self) -> pd.DataFrame:
        """One row per token id."""
        import pandas as pd

        columns = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "indicators"}
        return pd.DataFrame({**columns, **self.indicators})

    @property
    def ordinary(self) -> np.ndarray:
        """Reachable text tokens that are neither special nor named as reserved."""
        return (np.asarray(self.category) == "ok") & ~self.reserved


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanResult(OneLine):
    """Everything that `scan` measured.

    Attributes:
        indicator: the indicator that ranks, or None: no ranking can be trusted.
        threshold: candidates lie at or below it; nan without a ranking.
        percentile: share of ordinary tokens at or below it, in percent.
        identical: ids of each set of bit-identical rows (and equal output bias).
        same_text: ids of each set of tokens that share their text though no text gives some of them.
        notes: what was asked for and could not be done, in sentences.
    """

    model: str
    tied: bool
    tied_why: str
    n_rows: int
    d_model: int
    stored: str
    has_bias: bool
    tokenizer: TokenizerFacts
    reference: Reference
    separations: tuple[Separation, ...]
    indicator: str | None
    indicator_why: str
    threshold: float
    percentile: float
    identical: tuple[tuple[int, ...], ...]
    same_text: tuple[tuple[int, ...], ...]
    zero_rows: tuple[int, ...]
    bad_rows: tuple[int, ...]
    table: TokenTable
    verification: Verification | None
    seed: int
    natures: Mapping[int, Nature] = field(default_factory=dict)
    sides: Sides | None = None
    contexts: Contexts | None = None
    symptoms: Symptoms | None = None
    notes: tuple[str, ...] = ()
    threshold_why: str = ""

    def candidates(self) -> list[int]:
        """Ids of suspicious ordinary tokens, the most suspicious first; empty without a ranking.

        Those with a zero row come first (the indicator cannot see them), then those at or below the threshold.
        Specials, reserved names, incomplete characters, unreachable tokens and padding rows are never candidates.
        """
        if self.indicator is None:
            return []
        plain, zero = self.table.ordinary, np.isin(np.arange(len(self.table)), self.zero_rows)
        return [*np.flatnonzero(plain & zero).tolist(), *self._ranked(plain & ~zero & self._is_low)]

    def unwritable(self) -> list[int]:
        """Ids of suspicious tokens that no text gives, the most suspicious first; they are never candidates.

        These are parts of characters and unreachable tokens; members of the reference and reserved names are left out.
        """
        hidden = np.isin(self.table.category, NO_TEXT) & ~self.table.reserved & ~self.table.is_reference
        return self._ranked(hidden & self._is_low)

    def spare(self) -> list[int]:
        """Ids that are free for tokens of one's own, such as new turn marks: reserved, writable, never trained.

        Text gives them, they have a row, and it lies with the reference or as low as the candidates; empty without a
        ranking.
        """
        if self.indicator is None:
            return []
        table, unused = self.table, self.table.is_reference | self._is_low
        writable = np.isin(table.category, ("ok", "special"))
        return np.flatnonzero(table.reserved & writable & unused & np.isfinite(table.norm)).tolist()

    @property
    def _is_low(self) -> np.ndarray:
        # without a ranking the threshold is nan, and nothing is low
        return np.nan_to_num(self.table.indicator, nan=np.inf) <= self.threshold

    def _ranked(self, chosen: np.ndarray) -> list[int]:
        ids = np.flatnonzero(chosen)
        return ids[np.argsort(self.table.indicator[ids], kind="stable")].tolist()

    def frame(self) -> pd.DataFrame:
        """One row per id, the most suspicious first, as a pandas table.

        `max_prob` is nan where a token was not run. `p_bound` is the certificate 1/k of k identical rows: whatever the
        prompt, the token's probability cannot exceed it.
        """
        import pandas as pd

        table, n = self.table, len(self.table)
        tests = self.verification.tested if self.verification else ()
        sides, contexts = self.sides.tested if self.sides else (), self.contexts.tested if self.contexts else ()
        columns = {
            "token_id": np.arange(n), "token": table.token, "category": table.category, "indicator": table.indicator,
            "max_prob": _column(n, np.nan, ((t.token_id, t.max_prob) for t in tests)),
            "verdict": _column(n, "untested", ((t.token_id, t.verdict) for t in tests)),
            "is_reference": table.is_reference, "group": table.group,
            "candidate": np.isin(np.arange(n), self.candidates()),
            "role": _column(n, "", ((t.token_id, t.role) for t in tests)), "copies": table.copies,
            "p_bound": np.where(table.copies > 1, 1 / table.copies, np.nan),
            "is_byte": table.is_byte, "reserved": table.reserved, "norm": table.norm, **table.indicators,
            "form": _column(n, "", ((t.token_id, t.form) for t in tests)),
            "p_value": _column(n, np.nan, ((t.token_id, t.p_value) for t in tests if t.p_value is not None)),
            "kind": _column(n, "", ((i, nature.kind) for i, nature in self.natures.items())),
            "broken": _column(n, "", ((side.token_id, side.broken) for side in sides)),
            "context_p": _column(n, np.nan, ((among.token_id, among.median) for among in contexts)),
        }  # fmt: skip
        return pd.DataFrame(columns).sort_values("indicator", kind="stable", ignore_index=True)

    def to_csv(self, path: str | Path) -> Path:
        """Writes `frame` as CSV that a spreadsheet can open, and returns the path."""
        return write_table(self.frame(), Path(path))

    def row(self, i: int) -> Record:
        """One token as plain values."""
        table, tested = self.table, self.tested(i)
        row: Record = {
            "token_id": i, "token": table.token[i], "category": table.category[i],
            "indicator": float(table.indicator[i]), "group": table.group[i],
            "is_reference": bool(table.is_reference[i]), "is_byte": bool(table.is_byte[i]),
            "copies": int(table.copies[i]), "max_prob": tested and tested.max_prob,
            "verdict": tested.verdict if tested else "untested", "form": tested and tested.form,
            "p_value": tested and tested.p_value, "p_bound": self.p_bound(i),
        }  # fmt: skip
        if nature := self.natures.get(i):
            row |= {"kind": nature.kind, "script": nature.script, "words": nature.words, "part_of": nature.part_of}
        if self.sides is not None and (side := self.sides.of(i)):
            row |= {"broken": side.broken, "read_kl": side.read_kl, "write_logp": side.write_logp}
        if self.contexts is not None and (among := self.contexts.of(i)):
            row["context_p"] = among.median
        if self.symptoms is not None and (replies := self.symptoms.of(i)):
            row["symptoms"] = {task: symptom.label for task, symptom in replies.items()}
        return row

    def p_bound(self, i: int) -> float | None:
        """The certificate 1/k where k rows (and their biases) are bit-identical: no prompt can give the token more."""
        copies = int(self.table.copies[i])
        return 1 / copies if copies > 1 else None

    def tested(self, i: int) -> Tested | None:
        """The test of one token, or None if it was not run."""
        return self.verification.of(i) if self.verification else None


def _column(n: int, fill: float | str, values: Iterable[tuple[int, float | str]]) -> np.ndarray:
    column = np.full(n, fill, dtype=object if isinstance(fill, str) else np.float64)
    for i, value in values:
        column[i] = value
    return column


def write_table(frame: Any, path: Path) -> Path:  # pandas has no types here
    """Writes a pandas table with one token per row as CSV that a spreadsheet can open, and returns the path."""
    cells = [harmless_cell(token) for token in frame["token"]]
    frame.assign(token=cells).to_csv(path, index=False, encoding="utf-8", lineterminator="\n")
    return path
