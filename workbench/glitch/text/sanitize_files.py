"""Files as token ids without flagged tokens: one JSON line per document, which says whether it decodes to its text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.activations.files import text_files
from workbench.core.progress import track
from workbench.core.records import load_json, save_json
from workbench.core.stats import clopper_pearson
from workbench.engine.log import require_same_key
from workbench.glitch.reporting import TokenReport, measured, sentences, shown
from workbench.glitch.text.copying import CopyCheck
from workbench.glitch.text.sanitize import Sanitizer
from workbench.glitch.text.spans import numbered_texts, windows
from workbench.report.base import Block, Metric, Table, Text

_LINES = "2"
"""Changes with what a line holds."""


@dataclass(frozen=True)
class Cut:
    """What was done with a flagged token: what it was cut into most often, and how many of its places stay."""

    token_id: int
    text: str
    pieces: tuple[str, ...]
    replaced: int
    left: int


@dataclass(frozen=True, eq=False, kw_only=True)
class SanitizeReport(TokenReport):
    """Result of `sanitize_files`; `changed` documents decode to another text than the file, `by_cuts` by cuts only."""

    file: str
    documents: int
    tokens: int
    tokens_after: int
    cuts: tuple[Cut, ...]
    changed: int
    first_changed: str
    by_cuts: int
    check: CopyCheck | None = None

    @property
    def _occurrences(self) -> tuple[int, int]:
        return sum(cut.replaced for cut in self.cuts), sum(cut.left for cut in self.cuts)

    def findings(self) -> tuple[str, ...]:
        """What was done, in sentences."""
        (replaced, left), check = self._occurrences, self.check
        control = None if check is None else check.control_gain
        return sentences(
            f"{self.documents:,} documents, {self.tokens:,} tokens: {replaced:,} occurrences of "
            f"{sum(cut.replaced > 0 for cut in self.cuts):,} flagged tokens were cut into others. "
            f"{self.tokens_after:,} tokens after.",
            "Checked: every document decodes to the text of its file." if not self.changed else
            f"CHANGED: {self.changed:,} documents do not decode to the text of their file, first "
            f"{self.first_changed}. {self.changed - self.by_cuts:,} of them do not without the cuts either: the "
            "tokenizer changes case, spaces or characters, or the file is not UTF-8.",
            f"IMPOSSIBLE: {left:,} occurrences stay, since no other tokens give their text." if left else "",
            f"Copying, log-probability gained by cutting flagged tokens: {check.gain} nats." if check else "",
            f"The same cut on ordinary tokens: {control} nats." if control else "",
        )  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Counts, and the share of flagged occurrences that could be cut."""
        replaced, left = self._occurrences
        share = clopper_pearson(replaced, replaced + left, unit="occurrences") if replaced + left else None
        return measured({
            "documents": self.documents, "replaced": replaced, "left": left, "changed_documents": self.changed,
            "cut_share": share, "copy_gain": self.check and self.check.gain,
        })  # fmt: skip

    @property
    def _title(self) -> str:
        return "Text without flagged tokens"

    def _blocks(self) -> tuple[Block, ...]:
        rows = tuple((c.token_id, c.text, "|".join(c.pieces), c.replaced, c.left) for c in self.cuts[:60])
        columns = ("id", "token", "cut into", "replaced", "left")
        return (Table(columns, rows, "Flagged tokens") if rows else Text("No flagged token."),)


def sanitize_files(
    sanitizer: Sanitizer, paths: Iterable[str | Path], target: str | Path, column: str = "text"
) -> SanitizeReport:
    """Writes the ids of every document to `target`, flagged tokens cut; a stopped run continues where it was.

    A line holds file, document, ids, tokens_before, `replaced` (old position, old id, new ids), `impossible` (old
    position, id) and `decodes_to`: "text" if the ids decode to the text of the file, "other" if the tokenizer's own ids
    do not either, "other_by_cuts" if they do. Beside it `<name>.key.json` says what the lines depend on.

    Raises:
        MismatchError: if `target` was written with other flags, for another tokenizer, or from other files.
    """
    file, files = Path(target), text_files(paths)
    _claim(file, _key(sanitizer, files, column))
    done = _whole_lines(file)
    every = ((path, number, parts) for path in files for number, parts in numbered_texts(path, column))
    with file.open("a", encoding="utf-8") as out:
        for k, (path, number, parts) in enumerate(track(every, description="sanitize", unit="documents")):
            if k >= done:
                out.write(json.dumps({"file": str(path), "document": number} | _document(sanitizer, parts)) + "\n")
                out.flush()
    return _summary(sanitizer, file)


def _key(sanitizer: Sanitizer, paths: Sequence[Path], column: str) -> dict[str, str]:
    """Hashes of what the lines depend on; a file counts as changed if its size or time of change differs."""
    stats = [(str(path), status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),)]
    parts = {"flagged": sorted(sanitizer.flagged), "files": stats, "column": column}
    hashes = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12] for name, part in parts.items()}
    return {"tokenizer": sanitizer.codec.digest(), "lines": _LINES} | hashes


def _claim(file: Path, key: dict[str, str]) -> None:
    """Notes what a new file depends on, and refuses one that depends on something else or says nothing about it."""
    noted = file.with_name(f"{file.name}.key.json")
    if file.is_file() and file.stat().st_size:
        require_same_key(file, load_json(noted, dict) if noted.is_file() else {}, key)
    else:
        save_json(noted, key)


def _document(sanitizer: Sanitizer, parts: Iterable[str]) -> dict[str, object]:
    ids: list[int] = []
    before: list[int] = []
    texts, replaced, impossible = list(parts), [], []
    for piece in windows(sanitizer.codec, texts):
        made = sanitizer(piece.ids)
        ids += made.ids
        replaced += [(len(before) + at, old, new) for at, old, new in made.replaced]
        impossible += [(len(before) + at, piece.ids[at]) for at in made.impossible]
        before += piece.ids
    text = "".join(texts)
    after, plain = sanitizer.codec.decode([ids, before if replaced else []])
    decodes_to = "text" if after == text else "other_by_cuts" if replaced and plain == text else "other"
    return {
        "ids": ids, "tokens_before": len(before), "replaced": replaced, "impossible": impossible,
        "decodes_to": decodes_to,
    }  # fmt: skip


def _whole_lines(file: Path) -> int:
    """Number of complete lines; what a kill left behind the last of them is cut off."""
    if not file.is_file():
        return 0
    with file.open("rb+") as opened:
        lines, end = 0, 0
        for line in opened:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
        opened.truncate(end)
    return lines


def _summary(sanitizer: Sanitizer, file: Path) -> SanitizeReport:
    replaced: Counter[int] = Counter()
    left: Counter[int] = Counter()
    pieces: dict[int, Sequence[int]] = {}
    documents = before = after = 0
    changed: list[str] = []
    by_cuts = 0
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            documents, before, after = documents + 1, before + row["tokens_before"], after + len(row["ids"])
            replaced.update(old for _, old, _ in row["replaced"])
            pieces |= {old: new for _, old, new in row["replaced"]}
            left.update(old for _, old in row["impossible"])
            by_cuts += row["decodes_to"] == "other_by_cuts"
            if row["decodes_to"] != "text":
                changed.append(f"{row['file']} document {row['document']}")
    cuts = [
        Cut(i, _text(sanitizer, i), tuple(_text(sanitizer, j) for j in pieces.get(i, ())), replaced[i], left[i])
        for i in sorted(replaced.keys() | left.keys(), key=lambda i: -(replaced[i] + left[i]))
    ]
    return SanitizeReport(
        file=str(file), documents=documents, tokens=before, tokens_after=after, cuts=tuple(cuts),
        changed=len(changed), first_changed=changed[0] if changed else "", by_cuts=by_cuts,
    )  # fmt: skip


def _text(sanitizer: Sanitizer, i: int) -> str:
    return shown(sanitizer.written[i].decode("utf-8", errors="replace"))
