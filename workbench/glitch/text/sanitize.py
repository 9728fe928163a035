"""The same text in other tokens: flagged ids are cut into pieces that decode to exactly what they decoded to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workbench.activations.files import text_files
from workbench.core.codec import Codec, bytes_of
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted, number
from workbench.core.progress import track
from workbench.core.records import load_json, save_json
from workbench.core.stats import Estimate, clopper_pearson, paired_difference
from workbench.core.tokens import TokenBatch
from workbench.engine.log import require_same_key
from workbench.glitch.reporting import TokenReport, measured, sentences, shown
from workbench.glitch.text.spans import numbered_texts, windows
from workbench.glitch.verification.prompts import PROMPTS, TokenPrompt, prompt_set
from workbench.glitch.vocabulary.segments import ByText, Pieces, segmentations
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model
from workbench.models.wrapped import Texts
from workbench.report.base import Block, Headline, Metric, Says, Table, Text, beside

_KEPT = 8
"""Alternative segmentations tried per token, shortest first."""
_AROUND = 6


@dataclass(frozen=True)
class Sanitized:
    """New ids that decode to the same text: position, old id and pieces of each cut, and where no cut is possible."""

    ids: tuple[int, ...]
    replaced: tuple[tuple[int, int, Pieces], ...]
    impossible: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sanitizer:
    """Cuts flagged tokens into others.

    Feed the ids to the model: text would be cut into the flagged tokens again.

    Attributes:
        pieces: the ids that may stand in for others, by what they write; those that are not whole text marked with 1.
    """

    codec: Codec
    flagged: frozenset[int]
    written: tuple[bytes, ...] = field(repr=False)
    pieces: ByText = field(repr=False)
    _known: dict[int, tuple[Pieces, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, codec: Codec, flagged: Iterable[int]) -> Sanitizer:
        """A sanitizer that uses ordinary tokens first and bytes or halves of characters only where it must."""
        avoid = frozenset(int(i) for i in flagged)
        vocabulary = analyse(codec)
        ids_of: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        every = bytes_of(codec)
        for i, written in enumerate(every):
            usable = vocabulary.category[i] in ("ok", "partial_utf8", "unreachable_single", "unreachable_multi")
            if written and usable and i not in avoid and i not in codec.special and not vocabulary.reserved[i]:
                ids_of[written].append((int(vocabulary.category[i] != "ok"), i))
        return cls(codec, avoid, every, {written: tuple(sorted(ids)[:2]) for written, ids in ids_of.items()})

    def __call__(self, ids: Sequence[int]) -> Sanitized:
        """The row without flagged tokens.

        Each replacement is checked by decoding it among its neighbours, and the whole row at the end.

        Raises:
            InvalidInputError: for an id that is not in the vocabulary.
        """
        row = [int(i) for i in ids]
        bad = [i for i in row if not 0 <= i < len(self.codec.raw)]
        if bad:
            raise InvalidInputError(
                f"{len(bad)} of {len(row)} ids, such as {bad[0]}, are not in the vocabulary (0 to "
                f"{len(self.codec.raw) - 1}). Use ids of this tokenizer."
            )
        places = [at for at, i in enumerate(row) if i in self.flagged]
        if not places:
            return Sanitized(tuple(row), (), ())
        chosen = {at: pieces for at in places if (pieces := self._fitting(row, at)) is not None}
        new = list(_filled(row, chosen))
        if self.codec.decode([new]) != self.codec.decode([row]):
            chosen = self._one_by_one(row, chosen)
            new = list(_filled(row, chosen))
        return Sanitized(
            tuple(new), tuple((at, row[at], pieces) for at, pieces in chosen.items()),
            tuple(at for at in places if at not in chosen),
        )  # fmt: skip

    def alternatives(self, token_id: int) -> tuple[Pieces, ...]:
        """Up to eight ways to write a token's bytes with tokens that are not flagged, shortest first; maybe none."""
        if token_id not in self._known:
            self._known[token_id] = segmentations(self.written[token_id], self.pieces, _KEPT, token_id)
        return self._known[token_id]

    def batch(self, model: Model, value: Texts) -> TokenBatch:
        """Tokens of texts or chats, as `model.tokens` takes them, with flagged ids cut; `model` has this tokenizer."""
        made = model.tokens(value)
        rows = [self(row.tolist()).ids for row in made.rows()]
        pad = model.tokenizer.pad_token_id
        return TokenBatch.pad(
            rows, 0 if pad is None else int(pad), note=f"{made.note}; flagged tokens cut".lstrip("; ")
        )

    def _fitting(self, row: list[int], at: int) -> Pieces | None:
        """The first alternative that decodes to the same among the neighbours."""
        left, right = row[max(0, at - _AROUND) : at], row[at + 1 : at + 1 + _AROUND]
        options = self.alternatives(row[at])
        rows = [[*left, *pieces, *right] for pieces in ((row[at],), *options)]
        wanted, *texts = self.codec.decode(rows)
        return next((pieces for pieces, text in zip(options, texts, strict=True) if text == wanted), None)

    def _one_by_one(self, row: list[int], chosen: dict[int, Pieces]) -> dict[int, Pieces]:
        """Only the replacements with which the whole row still decodes to its text."""
        (wanted,) = self.codec.decode([row])
        kept: dict[int, Pieces] = {}
        for at, pieces in chosen.items():
            if self.codec.decode([list(_filled(row, kept | {at: pieces}))]) == [wanted]:
                kept[at] = pieces
        return kept


def _filled(row: Sequence[int], chosen: dict[int, Pieces]) -> Iterator[int]:
    for at, i in enumerate(row):
        yield from chosen.get(at, (i,))


@dataclass(frozen=True)
class Copied:
    """One token before and after.

    Attributes:
        before: log-probability (nats) that the model copies the text when the prompt shows the token: as the token or
            as the pieces, whichever is likelier.
        after: log-probability that it copies the pieces when the prompt shows these.
    """

    token_id: int
    pieces: tuple[int, ...]
    control: bool
    before: float
    after: float


@dataclass(frozen=True)
class CopyCheck:
    """Mean of after - before over flagged tokens (nats; above zero means that cutting helps), and over ordinary ones.

    `not_cut` are ids that have no other segmentation.
    """

    tokens: tuple[Copied, ...]
    not_cut: tuple[int, ...]
    gain: Estimate
    control_gain: Estimate | None


def copy_check(
    model: Model, sanitizer: Sanitizer, tokens: Sequence[int], controls: Sequence[int] = (), *,
    prompt: TokenPrompt = PROMPTS[0], batch_size: int = 16,
) -> CopyCheck:  # fmt: skip
    """Probability of copying each token's text, spliced into a prompt as the token and as its pieces.

    Controls are ordinary tokens, cut as if they were flagged.

    Raises:
        DegenerateInputError: if none of the tokens can be cut, or the prompt can't be built for this tokenizer.
    """
    (made,) = prompt_set(model, analyse(sanitizer.codec), [prompt], "raw", strict=True).templates
    cut = {i: options[0] for i in (*tokens, *controls) if (options := sanitizer.alternatives(int(i)))}
    if not any(i in cut for i in tokens):
        raise DegenerateInputError(
            f"copy_check: none of the {len(tokens)} tokens has another segmentation. Try others."
        )
    asked = [pair for i, pieces in cut.items() for pair in (((i,), (i,)), ((i,), pieces), (pieces, pieces))]
    rows, targets = [made.spelled(seen) for seen, _ in asked], [wanted for _, wanted in asked]
    scores = _log_probabilities(model, rows, targets, batch_size)
    copied = tuple(
        Copied(int(i), pieces, i not in set(tokens), max(scores[3 * k], scores[3 * k + 1]), scores[3 * k + 2])
        for k, (i, pieces) in enumerate(cut.items())
    )
    gain, control_gain = (
        paired_difference([c.after for c in part], [c.before for c in part], unit="tokens") if part else None
        for part in ([c for c in copied if not c.control], [c for c in copied if c.control])
    )
    assert gain is not None, "a token can be cut"
    return CopyCheck(copied, tuple(int(i) for i in tokens if i not in cut), gain, control_gain)


def _log_probabilities(
    model: Model, rows: Sequence[list[int]], targets: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Log-probability of each target after its row, nats: the sum over its tokens, each given those before."""
    steps = [(k, n) for k, target in enumerate(targets) for n in range(len(target))]
    steps.sort(key=lambda step: len(rows[step[0]]) + step[1])
    total = [0.0] * len(rows)
    for start in track(range(0, len(steps), batch_size), description="copy before and after", unit="batches"):
        part = steps[start : start + batch_size]
        batch = TokenBatch.pad([[*rows[k], *targets[k][:n]] for k, n in part], 0)
        scores = model.logits(batch, keep="last").float().log_softmax(-1)
        for row, (k, n) in enumerate(part):
            total[k] += float(scores[row, targets[k][n]])
    return total


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

    _title = "Text without flagged tokens"

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

    def headline(self) -> Headline:
        """Whether cutting helps copying, more than on ordinary tokens; or that the text was changed."""
        if self.changed:
            says = Says("", "", "Some documents do not decode to the text of their file.")
            return Headline.of(says, self._beside(), "at most")
        return Headline.of(
            Says(
                "Flagged tokens are copied better once they are cut, more so than ordinary ones.",
                "Cutting helps flagged tokens no more than ordinary ones.",
                "Cutting helps flagged tokens less than ordinary ones.",
                "Flagged tokens were cut into others; whether they are copied better was not tested.",
            ),
            self._beside(),
        )  # fmt: skip

    def _beside(self) -> Table:
        if self.changed:
            return beside("changed documents", ("these files", self.changed), ("allowed", 0))
        gain, control = (None, None) if self.check is None else (self.check.gain, self.check.control_gain)
        measure = "log-probability of the copy gained (nats)"
        return beside(measure, ("flagged tokens", gain), ("ordinary tokens", control))

    def findings(self) -> tuple[str, ...]:
        """What was done, in sentences."""
        (replaced, left), check = self._occurrences, self.check
        control = None if check is None else check.control_gain
        n_cut = sum(cut.replaced > 0 for cut in self.cuts)
        return sentences(
            f"{counted(self.documents, 'documents')}, {counted(self.tokens, 'tokens')}: {number(replaced)} "
            f"occurrences of {counted(n_cut, 'flagged tokens')} were cut into others. "
            f"{counted(self.tokens_after, 'tokens')} after.",
            "Checked: every document decodes to the text of its file." if not self.changed else
            f"CHANGED: {number(self.changed)} documents do not decode to the text of their file, first "
            f"{self.first_changed}. {number(self.changed - self.by_cuts)} of them do not without the cuts either: the "
            "tokenizer changes case, spaces or characters, or the file is not UTF-8.",
            f"IMPOSSIBLE: {number(left)} occurrences stay, since no other tokens give their text." if left else "",
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
    key, noted = _key(sanitizer, files, column), file.with_name(f"{file.name}.key.json")
    if file.is_file() and file.stat().st_size:
        require_same_key(file, load_json(noted, dict) if noted.is_file() else {}, key)
    else:
        save_json(noted, key)
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
    file.touch()
    lines = end = 0
    with file.open("rb+") as opened:
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
    text = [shown(written.decode("utf-8", errors="replace")) for written in sanitizer.written]
    cuts = [
        Cut(i, text[i], tuple(text[j] for j in pieces.get(i, ())), replaced[i], left[i])
        for i in sorted(replaced.keys() | left.keys(), key=lambda i: -(replaced[i] + left[i]))
    ]
    return SanitizeReport(
        file=str(file), documents=documents, tokens=before, tokens_after=after, cuts=tuple(cuts),
        changed=len(changed), first_changed=changed[0] if changed else "", by_cuts=by_cuts,
    )  # fmt: skip
