"""Which tokens of a text is a model likely to stumble over? Places and counts, for prompts and for whole data sets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from workbench.activations.files import text_files
from workbench.core.codec import Codec, FastCodec, bytes_of
from workbench.core.errors import InvalidInputError, MismatchError, require_known
from workbench.core.progress import Task, task
from workbench.glitch.reporting import shown
from workbench.glitch.scanning.saved import GRADES, SavedScan, load_scan, of_report
from workbench.glitch.scanning.scanner import codec_for, scan
from workbench.glitch.text.lint_report import Finding, LintReport, LostCharacter, TokenCount
from workbench.glitch.text.spans import WINDOW, Piece, numbered_texts, windows
from workbench.glitch.vocabulary.tokenizer import Survival, is_half

KINDS: dict[str, str] = GRADES | {
    "lost": "text that the tokenizer drops or replaces",
    "not_utf8": "bytes that are no UTF-8, or half a character: no tokenizer can take them",
    "special": "a special token typed as text",
    "fragment": "a token that the vocabulary has only as part of flagged tokens, standing alone",
}
"""What is looked for; the grades of flagged tokens first."""

SUSPECT = ("verified", "borderline", "candidate")
"""Grades of tokens that the weights or a test speak against."""
FRAGMENT_SHARE = 0.1
"""A fragment is reported if its own indicator is among this share of the lowest of ordinary tokens."""
_AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class Linter:
    """What is looked for in texts, ready to be used on many: the kind of each token id that is reported."""

    model: str
    origin: str
    codec: Codec
    kinds: Mapping[int, str]
    names: Mapping[int, str]
    part_of: Mapping[int, int]
    wanted: frozenset[str]
    survival: Survival = field(repr=False)

    @classmethod
    def of(cls, scan: SavedScan, codec: Codec, kinds: Iterable[str] = tuple(KINDS)) -> Linter:
        """A linter for the flags of a scan.

        Raises:
            UnknownNameError: for a kind that does not exist.
            MismatchError: if the tokenizer is not that of the scan.
        """
        wanted = tuple(dict.fromkeys(kinds))
        for kind in wanted:
            require_known("kind", kind, KINDS)
        check_belongs(scan, codec)
        flags = scan.flags()
        parts = _rare(scan, fragments(codec, {i for i, grade in flags.items() if grade in SUSPECT}))
        every = dict.fromkeys(parts, "fragment") | flags | dict.fromkeys(codec.special, "special")
        names = {i: scan.text(i) or shown(_raw(codec, i)) for i in every}
        return cls(scan.model, scan.origin, codec, every, names, parts, frozenset(wanted), Survival(codec))

    def text(self, text: str, limit: int = 10_000) -> LintReport:
        """Everything found in one text."""
        tally = _Tally(self, limit)
        tally.document("", 1, (text,))
        return tally.report(("",))

    def files(self, paths: Iterable[str | Path], column: str = "text", limit: int = 10_000) -> LintReport:
        """Everything found in files, folders or patterns, with the places of the first `limit` findings.

        .jsonl and .parquet files hold a document per record, in `column`; any other file is one text.

        Raises:
            MissingFileError: if there is no such file.
            CorruptFileError: for a file that is not what its name says.
            InvalidInputError: where `column` is missing or holds no text.
        """
        files = text_files(paths)
        size = sum(path.stat().st_size for path in files)
        with task(total=size, description="lint", unit="bytes") as running:
            tally = _Tally(self, limit, running)
            for path in files:
                for number, parts in numbered_texts(path, column):
                    tally.document(str(path), number, parts)
                tally.flush()
        return tally.report(tuple(map(str, files)))


def linter_for(model: object, saved: str | Path | None = None, kinds: Iterable[str] = tuple(KINDS)) -> Linter:
    """A linter for a model: a `Model`, a folder, a .gguf file, "embedded" or a hub id in the local cache.

    `saved` is a run folder or glitch.json of a scan; without it the weights are scanned now, which gives candidates
    without a test.
    """
    return Linter.of(*scan_for(model, saved), kinds)


def scan_for(model: object, saved: str | Path | None = None) -> tuple[SavedScan, Codec]:
    """The flags of a model, saved or scanned now, and its tokenizer.

    Raises:
        MismatchError: if the saved scan is of another tokenizer.
    """
    codec = codec_for(model)
    if saved is None:
        return of_report(scan(model), "weights, scanned now"), codec
    flags = load_scan(saved)
    check_belongs(flags, codec)
    return flags, codec


def check_belongs(scan: SavedScan, codec: Codec) -> None:
    """Refuses a scan of another tokenizer.

    Raises:
        MismatchError: if fewer than nine in ten of the flagged texts are those of the tokenizer.
    """
    named = [i for i in scan.flags() if scan.text(i) and scan.tokens[i].category in ("ok", "no_row")]
    listed = named or [i for i, fact in scan.tokens.items() if fact.text and fact.category == "ok"]
    listed = listed[:: -(-len(listed) // 512)] if listed else []
    pieces = bytes_of(codec)
    texts = [shown(pieces[i].decode("utf-8", errors="replace")) if i < len(pieces) else None for i in listed]
    same = [text.strip() == scan.text(i).strip() for i, text in zip(listed, texts, strict=True) if text is not None]
    if listed and sum(same) < 0.9 * len(listed):
        raise MismatchError(
            f"The scan of {scan.model} ({scan.origin}) is of another tokenizer: {sum(same)} of {len(listed)} of its "
            f"tokens have the same text in this one ({len(pieces)} ids). Scan this model first."
        )


def fragments(codec: Codec, flagged: set[int]) -> dict[int, int]:
    """Tokens that merges use only to build flagged tokens, each with one of these; empty without a list of merges.

    Training text that held such a token held the flagged one instead, so alone it is as rare.
    """
    if not isinstance(codec, FastCodec):
        return {}
    merges = json.loads(codec.backend.to_str())["model"].get("merges") or []
    ids = {raw: i for i, raw in enumerate(codec.raw) if raw is not None}
    builds: dict[int, set[int]] = {}
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        for part in (left, right):
            if part in ids and left + right in ids:
                builds.setdefault(ids[part], set()).add(ids[left + right])
    return {
        i: min(built) for i, built in builds.items()
        if built <= flagged and i not in flagged and len(codec.raw[i] or "") > 1
    }  # fmt: skip


def _rare(scan: SavedScan, parts: dict[int, int]) -> dict[int, int]:
    """The fragments whose own row looks little trained too; all of them where the scan has no indicator of each token.

    Being part of flagged tokens alone is weak evidence: many whole words are, and are common without their ending.
    """
    known = {i: fact.indicator for i, fact in scan.tokens.items() if fact.category == "ok"}
    values = np.array([value for value in known.values() if value == value])
    if not scan.complete or not len(values):
        return parts
    threshold = float(np.quantile(values, FRAGMENT_SHARE))
    return {i: whole for i, whole in parts.items() if known.get(i, np.inf) <= threshold}


def _raw(codec: Codec, i: int) -> str:
    return (codec.raw[i] if i < len(codec.raw) else None) or ""


class _Tally:
    """Counts over documents, and the places of the first findings."""

    def __init__(self, linter: Linter, limit: int, running: Task | None = None) -> None:
        if limit < 0:
            raise InvalidInputError(f"limit={limit}: the number of places kept can't be negative. Give 0 or more.")
        self.linter, self.limit, self.running = linter, limit, running
        self.counts: Counter[tuple[int, str]] = Counter()
        self.spread: Counter[tuple[int, str]] = Counter()
        self.lost: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.findings: list[Finding] = []
        self.n_documents = self.n_characters = self.n_tokens = 0
        self._waiting: list[tuple[str, int, str]] = []
        self._waiting_size = 0
        self._of_document: set[tuple[int, str]] = set()

    def document(self, file: str, number: int, parts: Iterable[str]) -> None:
        """One document; short ones wait until there are enough to be encoded together."""
        self.n_documents += 1
        whole = parts[0] if isinstance(parts, tuple) else None
        if whole is None or len(whole) > WINDOW:
            self.flush()
            self._walk(file, number, parts)
            return
        self._waiting.append((file, number, whole))
        self._waiting_size += len(whole)
        if self._waiting_size >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Looks at the documents that wait; only those with something in them are encoded with places."""
        waiting, self._waiting, self._waiting_size = self._waiting, [], 0
        clean = [not any(map(is_half, set(text))) for _, _, text in waiting]
        quick = [text if ok else "" for (_, _, text), ok in zip(waiting, clean, strict=True)]
        reported = self.linter.kinds.keys()
        for (file, number, text), ok, ids in zip(waiting, clean, self.linter.codec.encode(quick), strict=True):
            if not ok or not reported.isdisjoint(ids) or self.linter.survival.lost(text):
                self._walk(file, number, (text,))
            else:
                self._count(text, len(ids))

    def _walk(self, file: str, number: int, parts: Iterable[str]) -> None:
        self._of_document = set()
        line, line_start = 1, 0
        for piece in windows(self.linter.codec, parts):
            own = piece.text[piece.begin - piece.start : piece.end - piece.start]
            self._count(own, len(piece.ids))
            for start, end, kind, token_id in sorted(self._found(piece)):
                if len(self.findings) < self.limit:
                    upto = piece.text[piece.begin - piece.start : start - piece.start]
                    begins = piece.begin + upto.rfind("\n") + 1 if "\n" in upto else line_start
                    self.findings.append(Finding(
                        file=file, document=number, line=line + upto.count("\n"), column=start - begins + 1,
                        start=start, end=end, kind=kind, token_id=token_id,
                        text=piece.text[start - piece.start : end - piece.start], context=piece.around(start, end),
                    ))  # fmt: skip
            if "\n" in own:
                line, line_start = line + own.count("\n"), piece.begin + own.rfind("\n") + 1
        self.spread.update(self._of_document)

    def _count(self, text: str, n_tokens: int) -> None:
        self.n_characters += len(text)
        self.n_tokens += n_tokens
        if self.running is not None:
            self.running.advance(len(text.encode("utf-8", errors="replace")))

    def _found(self, piece: Piece) -> list[tuple[int, int, str, int]]:
        """Start, end, kind and token id (-1 for none) of everything in a piece, counted."""
        places = list(self._tokens(piece))
        covered = {at for start, end, kind, _ in places if kind == "lost" for at in range(start, end)}
        own = piece.text[piece.begin - piece.start : piece.end - piece.start]
        bad = self.linter.survival.lost(own) if "lost" in self.linter.wanted else set()
        halves = any(map(is_half, set(own))) and "not_utf8" in self.linter.wanted
        if bad or halves:
            for at, char in enumerate(own, piece.begin):
                if halves and is_half(char):
                    places.append((at, at + 1, "not_utf8", -1))
                elif char in bad and at not in covered:
                    self.lost[char] += 1
                    places.append((at, at + 1, "lost", -1))
        self.by_kind.update(kind for _, _, kind, _ in places)
        return places

    def _tokens(self, piece: Piece) -> Iterator[tuple[int, int, str, int]]:
        kinds = self.linter.kinds
        if kinds.keys().isdisjoint(piece.ids):
            return
        for i, (start, end) in zip(piece.ids, piece.spans, strict=True):
            kind = kinds.get(i)
            if kind is None:
                continue
            written = piece.text[start - piece.start : end - piece.start]
            if kind == "special" and written.strip().casefold() != _raw(self.linter.codec, i).strip().casefold():
                kind = "lost"
            if kind in self.linter.wanted and not (kind == "lost" and all(map(is_half, written))):
                self.counts[i, kind] += 1
                self._of_document.add((i, kind))
                yield start, end, kind, i

    def report(self, files: tuple[str, ...]) -> LintReport:
        """The result."""
        self.flush()
        linter = self.linter
        rows = [
            TokenCount(i, linter.names[i], kind, n, self.spread[i, kind], linter.part_of.get(i, -1))
            for (i, kind), n in self.counts.items()
        ]
        order = list(KINDS).index
        lost = sorted(self.lost.items(), key=lambda item: (-item[1], item[0]))
        return LintReport(
            model=linter.model, origin=linter.origin, files=files, documents=self.n_documents,
            characters=self.n_characters, tokens=self.n_tokens,
            by_kind={kind: self.by_kind[kind] for kind in KINDS if kind in linter.wanted},
            counts=tuple(sorted(rows, key=lambda row: (order(row.kind), -row.count, row.token_id))),
            lost=tuple(LostCharacter(ord(char), n) for char, n in lost),
            places=tuple(self.findings), looked_for=len(linter.kinds),
        )  # fmt: skip
