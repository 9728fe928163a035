"""What changed between two scans: other flags, other ids, other categories, other verdicts, other lost bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from workbench.core.errors import MissingFileError
from workbench.core.jsontext import Json
from workbench.core.numbers import counted, number, p_value
from workbench.core.records import to_jsonable
from workbench.core.stats import clopper_pearson
from workbench.glitch.reporting import TokenReport, measured, sentences, shown, write_csv
from workbench.glitch.scanning.saved import SavedScan, TokenFact, load_scan, of_report, of_tokenizer
from workbench.glitch.scanning.scanner import codec_for, scan
from workbench.models.model import Model
from workbench.report.base import Block, Headline, Metric, Says, Table, Text, beside

CHANGES: dict[str, str] = {
    "flag_gone": "flagged in A, in B not",
    "flag_new": "flagged in B, in A not",
    "flag_lost_token": "flagged in A, and B has no such token",
    "flag_new_token": "flagged in B, and A has no such token",
    "grade": "flagged in both, on other grounds",
    "verdict": "tested in both, with another verdict",
    "category": "another category",
    "moved": "another id",
    "only_a": "a token of A that B does not have",
    "only_b": "a token of B that A does not have",
}
"""Every kind of change with its meaning, those that matter most first."""

_SHOWN = 40
_MIN_SAME_TEXTS = 20
"""So many ids with the same text in both tell that the tokenizers agree, where neither has a hash of its vocabulary."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: a key of `CHANGES`, the token on one line, its ids (-1 for none), what A and B say."""

    kind: str
    text: str
    id_a: int
    id_b: int
    before: str
    after: str


@dataclass(frozen=True, eq=False, kw_only=True)
class DiffReport(TokenReport):
    """Result of `diff`; `shared` tokens were matched by "id", or by "text" where the tokenizers differ.

    `lossy_a` are the bytes that only A loses. `partial` says what could not be compared; `evident` whether the files
    tell if both tokenizers are the same.
    """

    _title = "{self.a} and {self.b}"

    a: str
    b: str
    matched_by: str
    n_a: int
    n_b: int
    shared: int
    flagged_a: dict[str, int]
    flagged_b: dict[str, int]
    changes: tuple[Change, ...]
    lossy_a: tuple[int, ...]
    lossy_b: tuple[int, ...]
    partial: str
    evident: bool = True

    def counts(self) -> dict[str, int]:
        """Number of changes of each kind."""
        by_kind = Counter(change.kind for change in self.changes)
        return {kind: by_kind[kind] for kind in CHANGES}

    def headline(self) -> Headline:
        """How many tokens differ; there is nothing to compare the number with."""
        said = (
            "Some tokens differ between the two models." if self.changes else "No token differs between the two models."
        )
        return Headline.of(Says("", "", "", said), self._beside())

    def _beside(self) -> Table:
        return beside("tokens that differ", ("A and B", len(self.changes)), None)

    def findings(self) -> tuple[str, ...]:
        """What changed, in sentences."""
        matched = "Both have the same tokenizer: tokens are matched by id."
        if self.matched_by != "id":
            why = "DIFFERENT TOKENIZERS" if self.evident else "NOT KNOWN whether both have the same tokenizer"
            matched = (
                f"{why}: tokens are matched by their text; {number(self.shared)} texts are in both "
                f"(a share of {number(self.shared / max(1, self.n_a))} of A, "
                f"{number(self.shared / max(1, self.n_b))} of B)."
            )
        return sentences(
            f"A is {self.a}: {counted(self.n_a, 'tokens')}. B is {self.b}: {counted(self.n_b, 'tokens')}.",
            matched,
            *(f"{number(n)} x {CHANGES[kind]}." for kind, n in self.counts().items() if n),
            "" if self.changes else "No token differs.",
            *(f"Only {name} loses the bytes {' '.join(f'{byte:02X}' for byte in lost)} of valid text."
              for name, lost in (("A", self.lossy_a), ("B", self.lossy_b)) if lost),
            self.partial,
        )  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Counts of each change, and the share of A's flags that are gone among the tokens that B has too."""
        counts = self.counts()
        stay = sum(self.flagged_a.values()) - counts["flag_lost_token"]
        gone = clopper_pearson(counts["flag_gone"], stay, unit="flagged tokens") if stay else None
        return measured({"shared": self.shared, **counts, "flags_gone": gone})

    def to_json(self) -> dict[str, Json]:
        """All fields, with counts and sentences."""
        return super().to_json() | to_jsonable({"counts": self.counts(), "said": self.findings()})

    def _blocks(self) -> Iterator[Block]:
        grades = sorted(self.flagged_a.keys() | self.flagged_b.keys())
        rows = tuple((g, self.flagged_a.get(g, 0), self.flagged_b.get(g, 0)) for g in grades)
        yield Table(("grade", "flagged in A", "flagged in B"), rows, "Flagged tokens")
        for kind, n in self.counts().items():
            chosen = [change for change in self.changes if change.kind == kind][:_SHOWN]
            if chosen:
                cells = tuple((c.text, c.id_a, c.id_b, c.before, c.after) for c in chosen)
                caption = f"{CHANGES[kind]}: {len(chosen)} of {number(n)}"
                yield Table(("token", "id in A", "id in B", "A", "B"), cells, caption)
        if not self.changes:
            yield Text("No token differs.")

    def to_csv(self, path: str | Path) -> Path:
        """Writes every change as CSV and returns the path."""
        return write_csv(path, [field.name for field in fields(Change)], (astuple(change) for change in self.changes))


def side(what: object, tokenizer_only: bool = False) -> SavedScan:
    """One side of a comparison: a saved scan, a model (its weights are scanned now), or a tokenizer alone.

    A scan is named by its run folder or glitch.json, a model as for `scan`.

    Raises:
        MissingFileError: if it is none of these.
    """
    if isinstance(what, Model):
        return of_tokenizer(codec_for(what), what.name) if tokenizer_only else of_report(scan(what))
    path = Path(str(what)).expanduser()
    is_file = path.is_file() and path.suffix in (".json", ".csv")
    if is_file or any((path / name).is_file() for name in ("artifacts/glitch.json", "glitch.json")):
        return load_scan(path)
    is_bare = path.is_dir() and not (path / "config.json").is_file()
    if is_bare and not (path / "tokenizer.json").is_file():
        raise MissingFileError(
            f"{path} is neither a scan nor a model: it has no glitch.json, config.json or tokenizer."
        )
    alone = tokenizer_only or is_bare
    return of_tokenizer(codec_for(what), str(what)) if alone else of_report(scan(what))


def between(a: SavedScan, b: SavedScan) -> DiffReport:
    """Compares two scans token by token: by id if both are known to have the same tokenizer, by text otherwise."""
    same = _same_tokenizer(a, b)
    by_id = same is True
    if by_id:
        a, b = _completed(a, b), _completed(b, a)
    pairs = [(i, i) for i in sorted(a.tokens.keys() & b.tokens.keys())] if by_id else _by_text(a, b)
    changes = [*_compare(a, b, pairs), *_unmatched(a, b, pairs)]
    order = {kind: k for k, kind in enumerate(CHANGES)}
    changes.sort(key=lambda change: (order[change.kind], change.id_a if change.id_a >= 0 else change.id_b))
    lossy_a, lossy_b = {item.byte for item in a.lossy}, {item.byte for item in b.lossy}
    name_a, name_b = (f"{shown(scan.model)} ({shown(scan.origin)})" for scan in (a, b))
    return DiffReport(
        a=name_a, b=name_b, matched_by="id" if by_id else "text", n_a=len(_texts(a)), n_b=len(_texts(b)),
        shared=len(pairs),
        flagged_a=a.counts(), flagged_b=b.counts(), changes=tuple(changes),
        lossy_a=tuple(sorted(lossy_a - lossy_b)), lossy_b=tuple(sorted(lossy_b - lossy_a)), partial=_partial(a, b),
        evident=same is not None,
    )  # fmt: skip


def _partial(a: SavedScan, b: SavedScan) -> str:
    rest, scans = "tokens that it neither suspects nor tested are taken as not flagged", (("A", a), ("B", b))
    said = [f"{name} has no tokens.csv: {rest}." for name, scan in scans if not scan.complete]
    bare = [f"{name} has no ranking of its tokens, so it has no candidates." for name, scan in scans if not scan.ranked]
    return " ".join((*said, *bare))


def _same_tokenizer(a: SavedScan, b: SavedScan) -> bool | None:
    """Whether both have the same tokenizer; None where the files do not tell."""
    if a.complete and b.complete:
        return _texts(a) == _texts(b)
    if a.vocabulary and b.vocabulary:
        return a.vocabulary == b.vocabulary
    both = [(x, y) for i in a.tokens.keys() & b.tokens.keys() if (x := a.text(i)) and (y := b.text(i))]
    if any(x != y for x, y in both):
        return False
    return True if len(both) >= _MIN_SAME_TEXTS else None


def _completed(scan: SavedScan, other: SavedScan) -> SavedScan:
    """With the tokens that only the other lists, where this scan kept no more than its flagged ones."""
    if scan.complete:
        return scan
    more = {
        i: TokenFact(token_id=i, text=fact.text, category=fact.category) for i, fact in other.tokens.items()
        if i not in scan.tokens
    }  # fmt: skip
    return replace(scan, tokens={**scan.tokens, **more})


def _texts(scan: SavedScan) -> dict[int, str]:
    return {i: fact.text for i, fact in scan.tokens.items() if fact.category != "no_token"}


def _by_text(a: SavedScan, b: SavedScan) -> list[tuple[int, int]]:
    """Ids with the same text; of several the same category first, then the same id, then the lower one."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, text in _texts(b).items():
        places[text].append(i)
    pairs, taken = [], set()
    for i, text in _texts(a).items():
        left = [j for j in places.get(text, ()) if j not in taken]
        if left and text:
            kind = a.tokens[i].category
            best = min(left, key=lambda j: (b.tokens[j].category != kind, j != i, j))
            taken.add(best)
            pairs.append((i, best))
    return pairs


def _compare(a: SavedScan, b: SavedScan, pairs: list[tuple[int, int]]) -> Iterator[Change]:
    for i, j in pairs:
        left, right = a.tokens[i], b.tokens[j]
        text = left.text or right.text
        old, new = left.grade, right.grade
        if old != new:
            kind = "flag_gone" if not new else "flag_new" if not old else "grade"
            yield Change(kind, text, i, j, _say(left), _say(right))
        if "untested" not in (left.verdict, right.verdict) and left.verdict != right.verdict:
            yield Change("verdict", text, i, j, _say(left), _say(right))
        if left.category != right.category and left.text and right.text:
            yield Change("category", text, i, j, left.category, right.category)
        if i != j:
            yield Change("moved", text, i, j, str(i), str(j))


def _unmatched(a: SavedScan, b: SavedScan, pairs: list[tuple[int, int]]) -> Iterator[Change]:
    left, right = {i for i, _ in pairs}, {j for _, j in pairs}
    for i, fact in a.tokens.items():
        if i not in left and fact.category != "no_token":
            yield Change("flag_lost_token" if fact.grade else "only_a", fact.text, i, -1, _say(fact), "absent")
    for j, fact in b.tokens.items():
        if j not in right and fact.category != "no_token":
            yield Change("flag_new_token" if fact.grade else "only_b", fact.text, -1, j, "absent", _say(fact))


def _say(fact: TokenFact) -> str:
    tested = "" if fact.verdict == "untested" else f", {fact.verdict} (p {p_value(fact.max_prob)})"
    return f"{fact.grade or 'not flagged'}{tested}"
