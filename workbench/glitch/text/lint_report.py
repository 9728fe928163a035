"""What a linter found, in words, tables and CSV."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from workbench.core.jsontext import Json
from workbench.core.numbers import counted, number
from workbench.core.records import to_jsonable
from workbench.core.stats import clopper_pearson
from workbench.glitch.reporting import TokenReport, measured, sentences, shown, write_csv
from workbench.report.base import Block, Cell, Headline, Metric, Says, Table, Text, beside

UNTRAINED = ("verified", "candidate", "reference", "no_row")
"""Kinds of tokens whose rows training hardly touched: fine-tuning on them can blow up or be wasted."""
_SHOWN = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One place.

    Attributes:
        document: number of the record in it, from 1 (empty lines of a .jsonl file are not counted).
        line: line in the document, from 1.
        column: character in the line, from 1.
        start: first character in the document, from 0.
        end: the one after the last.
        token_id: the token, or -1 where there is none.
    """

    file: str
    document: int
    line: int
    column: int
    start: int
    end: int
    kind: str
    token_id: int
    text: str
    context: str

    def __str__(self) -> str:
        token = "" if self.token_id < 0 else f"  token {self.token_id}"
        record = f":{self.document}" if self.document > 1 else ""
        place = f"{self.file}{record}:{self.line}:{self.column}"
        return f"{place}  {self.kind}{token}  '{shown(self.text)}'  in '{shown(self.context)}'"


@dataclass(frozen=True, slots=True)
class TokenCount:
    """How often a reported token occurs, and in how many documents; `part_of` is -1 but for a fragment."""

    token_id: int
    text: str
    kind: str
    count: int
    documents: int
    part_of: int = -1


@dataclass(frozen=True, slots=True)
class LostCharacter:
    """A character that the tokenizer loses, and how often it occurs."""

    code: int
    count: int

    @property
    def name(self) -> str:
        """Code and name."""
        return f"U+{self.code:04X} {unicodedata.name(chr(self.code), 'control or unassigned').lower()}"


@dataclass(frozen=True, eq=False, kw_only=True)
class LintReport(TokenReport):
    """Result of a `Linter`.

    Attributes:
        by_kind: findings per kind.
        counts: occurrences of each reported token, kinds in the order of `KINDS`, frequent ones first.
        places: the places, in order of reading; limited, `n_findings` counts all.
        looked_for: number of token ids that would have been reported.
    """

    _title = "Lint with {self.model}"

    model: str
    origin: str
    files: tuple[str, ...]
    documents: int
    characters: int
    tokens: int
    by_kind: dict[str, int]
    counts: tuple[TokenCount, ...]
    lost: tuple[LostCharacter, ...]
    places: tuple[Finding, ...]
    looked_for: int

    @property
    def n_findings(self) -> int:
        """All findings, also those whose place was not kept."""
        return sum(self.by_kind.values())

    @property
    def guard(self) -> tuple[int, ...]:
        """Hardly trained ids that occur here, in order: what fine-tuning on this text has to watch."""
        return tuple(sorted(row.token_id for row in self.counts if row.kind in UNTRAINED))

    @property
    def _n_untrained(self) -> int:
        return sum(row.count for row in self.counts if row.kind in UNTRAINED)

    def to_json(self) -> dict[str, Json]:
        """All fields, with the ids that fine-tuning has to watch."""
        more = {"guard": self.guard, "n_findings": self.n_findings, "said": self.findings()}
        return super().to_json() | to_jsonable(more)

    def headline(self) -> Headline:
        """Whether the text holds anything to look at."""
        fails = "The text holds tokens or characters that the model hardly knows or loses."
        return Headline.of(Says("The text holds nothing to look at.", "", fails), self._beside(), "at most")

    def _beside(self) -> Table:
        return beside("findings", ("this text", self.n_findings), ("a clean text", 0))

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences."""
        parts = ", ".join(f"{number(n)} {kind.replace('_', ' ')}" for kind, n in self.by_kind.items() if n)
        return sentences(
            f"{counted(self.documents, 'documents')}, {counted(self.characters, 'characters')}, "
            f"{counted(self.tokens, 'tokens')} read with the "
            f"tokenizer of {self.model}; {counted(self.looked_for, 'ids')} looked for ({self.origin}).",
            f"{counted(self.n_findings, 'findings')}: {parts}." if parts else "Nothing was found.",
            f"{number(len(self.guard))} hardly trained ids occur {number(self._n_untrained)} times. Fine-tuning on "
            "this text moves rows that training left alone: watch their gradients, or take the text out."
            if self.guard else "",
            f"The places of the first {number(len(self.places))} are listed."
            if len(self.places) < self.n_findings else "",
        )  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Counts, and the share of tokens that are flagged."""
        share = clopper_pearson(self._n_untrained, self.tokens, unit="tokens") if self.tokens else None
        counts = {"findings": self.n_findings, "guard_ids": len(self.guard), **self.by_kind}
        return measured(counts | {"flagged_share": share})

    def _blocks(self) -> Iterator[Block]:
        counts = [(r.token_id, r.text, r.kind, r.count, r.documents) for r in self.counts]
        lost = [(item.name, item.count) for item in self.lost]
        places = [(f.file, f.document, f.line, f.column, f.kind, shown(f.text), shown(f.context)) for f in self.places]
        columns = ("file", "document", "line", "column", "kind", "text", "context")
        tables: list[tuple[str, tuple[str, ...], Sequence[tuple[Cell, ...]]]] = [
            ("Tokens", ("id", "token", "kind", "count", "documents"), counts),
            ("Characters that are lost", ("character", "count"), lost), ("Places", columns, places),
        ]  # fmt: skip
        for what, names, rows in tables:
            more = f": first {_SHOWN} of {number(len(rows))}" if len(rows) > _SHOWN else ""
            if rows:
                yield Table(names, tuple(rows[:_SHOWN]), what + more)
        if not self.n_findings:
            yield Text("Nothing was found.")

    def to_csv(self, path: str | Path) -> Path:
        """Writes the places as CSV, control characters escaped, and returns the path."""
        columns = [field.name for field in fields(Finding)]
        return write_csv(path, columns, ([getattr(place, name) for name in columns] for place in self.places))
