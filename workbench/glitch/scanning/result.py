"""What a glitch-token scan found, as values: one row per token, the groups behind the ranking, verdicts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workbench.glitch.ranking.indicators import Separation
from workbench.glitch.ranking.reference import Reference
from workbench.glitch.verification.contexts import Contexts
from workbench.glitch.verification.sides import Side, Sides
from workbench.glitch.verification.symptoms import Symptoms
from workbench.glitch.verification.verify import Tested, Verification
from workbench.glitch.vocabulary.taxonomy import Nature
from workbench.glitch.vocabulary.tokenizer import LossyByte

NO_TEXT = ("partial_utf8", "unreachable_special", "unreachable_single", "unreachable_multi", "dropped")
"""Categories of tokens that no text gives; they can be tested by their ids alone."""


@dataclass(frozen=True)
class TokenizerFacts:
    """Counts of the tokenizer's side.

    Attributes:
        style: how bytes are written: byte_level, byte_fallback, raw_bytes, none.
        counts: ids per category (keys of `workbench.glitch.vocabulary.tokenizer.CATEGORIES`); absent means zero.
        missing_bytes: bytes without such a token; in a byte-level vocabulary they cannot be written at all.
        lossy: bytes of valid text that encode and decode lose.
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


@dataclass(frozen=True, eq=False)
class TokenTable:
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

    @property
    def ordinary(self) -> np.ndarray:
        """Reachable text tokens that are neither special nor named as reserved."""
        return (np.asarray(self.category) == "ok") & ~self.reserved


@dataclass(frozen=True, eq=False)
class ScanResult:
    """Everything that `scan` measured.

    Attributes:
        stored: the type of number it is stored in.
        reference: the ids taken as known to be unused, and why.
        indicator: the indicator that ranks, or None: no ranking can be trusted.
        threshold: candidates lie at or below it; nan without a ranking.
        percentile: share of ordinary tokens at or below it, in percent.
        identical: ids of each set of bit-identical rows (and equal output bias).
        same_text: ids of each set of tokens that share their text though no text gives some of them.
        bad_rows: rows with NaN or infinity.
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
        table = self.table
        plain, zero = table.ordinary, np.zeros(len(table), dtype=bool)
        zero[list(self.zero_rows)] = True
        low = np.flatnonzero(plain & ~zero & (np.nan_to_num(table.indicator, nan=np.inf) <= self.threshold))
        ranked = low[np.argsort(table.indicator[low], kind="stable")]
        return [*np.flatnonzero(plain & zero).tolist(), *ranked.tolist()]

    def unwritable(self) -> list[int]:
        """Ids of suspicious tokens that no text gives, the most suspicious first; they are never candidates.

        These are parts of characters and unreachable tokens; members of the reference and reserved names are left out.
        """
        if self.indicator is None:
            return []
        table = self.table
        hidden = np.isin(np.asarray(table.category), NO_TEXT) & ~table.reserved & ~table.is_reference
        low = np.flatnonzero(hidden & (np.nan_to_num(table.indicator, nan=np.inf) <= self.threshold))
        return low[np.argsort(table.indicator[low], kind="stable")].tolist()

    def spare(self) -> list[int]:
        """Ids that are free for tokens of one's own, such as new turn marks: reserved, writable, never trained.

        Text gives them, they have a row, and it lies with the reference or as low as the candidates; empty without a
        ranking.
        """
        if self.indicator is None:
            return []
        table = self.table
        writable = np.isin(np.asarray(table.category), ("ok", "special"))
        unused = table.is_reference | (np.nan_to_num(table.indicator, nan=np.inf) <= self.threshold)
        return np.flatnonzero(table.reserved & writable & unused & np.isfinite(table.norm)).tolist()

    @property
    def df(self) -> Any:
        """One row per id, the most suspicious first, as a pandas table.

        `max_prob` is nan where a token was not run. `p_bound` is the certificate 1/k of k identical rows: whatever the
        prompt, the token's probability cannot exceed it.
        """
        import pandas as pd

        table, n = self.table, len(self.table)
        flagged = np.zeros(n, dtype=bool)
        flagged[self.candidates()] = True
        max_prob, verdict, role = np.full(n, np.nan), np.full(n, "untested", dtype=object), np.full(n, "", dtype=object)
        p_value, form = np.full(n, np.nan), np.full(n, "", dtype=object)
        for t in self.verification.tested if self.verification else ():
            max_prob[t.token_id], verdict[t.token_id], form[t.token_id] = t.max_prob, t.verdict, t.form
            role[t.token_id] = "control" if t.control else "spliced" if t.spliced else "candidate"
            p_value[t.token_id] = np.nan if t.p_value is None else t.p_value
        kind, broken = np.full(n, "", dtype=object), np.full(n, "", dtype=object)
        for i, nature in self.natures.items():
            kind[i] = nature.kind
        for side in self.sides.tested if self.sides else ():
            broken[side.token_id] = side.broken
        context_p = np.full(n, np.nan)
        for found in self.contexts.tested if self.contexts else ():
            context_p[found.token_id] = found.median
        columns = {
            "token_id": np.arange(n), "token": table.token, "category": table.category, "indicator": table.indicator,
            "max_prob": max_prob, "verdict": verdict, "is_reference": table.is_reference, "group": table.group,
            "candidate": flagged, "role": role, "copies": table.copies,
            "p_bound": np.where(table.copies > 1, 1 / table.copies, np.nan),
            "is_byte": table.is_byte, "reserved": table.reserved, "norm": table.norm, **table.indicators,
            "form": form, "p_value": p_value, "kind": kind, "broken": broken,
            "context_p": context_p,
        }  # fmt: skip
        return pd.DataFrame(columns).sort_values("indicator", kind="stable", ignore_index=True)

    def to_csv(self, path: str | Path) -> Path:
        """Writes `df` as CSV that a spreadsheet can open, and returns the path."""
        return write_table(self.df, Path(path))

    def row(self, i: int) -> dict[str, Any]:
        """One token as plain values."""
        table = self.table
        found = {"token_id": i, "token": table.token[i], "category": table.category[i],
                 "indicator": float(table.indicator[i]), "group": table.group[i],
                 "is_reference": bool(table.is_reference[i]), "is_byte": bool(table.is_byte[i]),
                 "copies": int(table.copies[i])}  # fmt: skip
        tested, nature, side = self.tested(i), self.natures.get(i), self.side(i)
        max_prob, verdict = (tested.max_prob, tested.verdict) if tested else (None, "untested")
        found |= {"max_prob": max_prob, "verdict": verdict, "form": tested.form if tested else None,
                  "p_value": tested.p_value if tested else None, "p_bound": self.p_bound(i)}  # fmt: skip
        if nature is not None:
            found |= {"kind": nature.kind, "script": nature.script, "words": nature.words, "part_of": nature.part_of}
        if side is not None:
            found |= {"broken": side.broken, "read_kl": side.read_kl, "write_logp": side.write_logp}
        if self.contexts is not None and (among := self.contexts.of(i)):
            found["context_p"] = among.median
        if self.symptoms is not None and (said := self.symptoms.of(i)):
            found["symptoms"] = {task: symptom.label for task, symptom in said.items()}
        return found

    def p_bound(self, i: int) -> float | None:
        """The certificate 1/k where k rows (and their biases) are bit-identical: no prompt can give the token more."""
        copies = int(self.table.copies[i])
        return 1 / copies if copies > 1 else None

    def side(self, i: int) -> Side | None:
        """Reading and writing of one token, or None if it was not examined."""
        return self._sides.get(i)

    @functools.cached_property
    def _sides(self) -> dict[int, Side]:
        return {side.token_id: side for side in (self.sides.tested if self.sides else ())}

    @functools.cached_property
    def _tests(self) -> dict[int, Tested]:
        return {t.token_id: t for t in (self.verification.tested if self.verification else ())}

    def tested(self, i: int) -> Tested | None:
        """The test of one token, or None if it was not run."""
        return self._tests.get(i)


def write_table(frame: Any, path: Path) -> Path:
    """Writes a table with one token per row as CSV that a spreadsheet can open, and returns the path.

    Control characters of tokens are escaped, and a token that a spreadsheet would take for a formula gets an apostrophe
    in front; `cell_text` removes it.
    """
    cells = [harmless_cell(shown(token)) for token in frame["token"]]
    frame.assign(token=cells).to_csv(path, index=False, encoding="utf-8", lineterminator="\n")
    return path


def shown(token: str) -> str:
    r"""A token on one line: control characters escaped, spaces kept.

    >>> shown(" a\n")
    ' a\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in token)


def harmless_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula; `cell_text` gives the text back.

    >>> harmless_cell("=1+1"), harmless_cell("a=1"), harmless_cell("'s"), harmless_cell("'=1")
    ("'=1+1", 'a=1', "'s", "''=1")
    """
    return "'" + text if _is_formula(text) else text


def cell_text(cell: str) -> str:
    """The text of a cell that `harmless_cell` wrote.

    >>> [cell_text(harmless_cell(text)) for text in ("=1+1", "a=1", "'s", "'=1", "'+")]
    ['=1+1', 'a=1', "'s", "'=1", "'+"]
    """
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _is_formula(text: str) -> bool:
    return text.lstrip("' ")[:1] in tuple("=+-@") and len(text) > 1
