"""What a finished scan says about each token, read back from its files, for everything that uses a scan later."""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.core.codec import Codec
from workbench.core.errors import CorruptFileError, MissingFileError, require_known
from workbench.core.jsontext import content_of
from workbench.core.records import load_json
from workbench.glitch.reporting import cell_text, shown
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.vocabulary.tokenizer import LossyByte, analyse

GRADES: dict[str, str] = {
    "verified": "tested: the model could not say it in any prompt (p < 0.01, or no number at all)",
    "borderline": "tested: 0.01 <= p < 0.1 at best",
    "candidate": "suspicious by its weights, not tested",
    "reference": "known to be unused: a reserved name, an impossible byte, a member of the reference",
    "no_row": "an id beyond the matrix: the model can't read it at all",
}
"""Why a token is flagged, strongest evidence first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFact:
    """One token of a scan.

    Attributes:
        category: a key of `workbench.glitch.vocabulary.tokenizer.CATEGORIES`; empty where the files do not tell.
        indicator: of the weights, lower is more suspicious; nan where there is none.
        max_prob: highest probability that the model gave it; nan where it was not tested.
        reference: whether it is known to be unused: in the reference, or named as reserved.
    """

    token_id: int
    text: str
    category: str
    indicator: float = math.nan
    max_prob: float = math.nan
    verdict: str = "untested"
    candidate: bool = False
    reference: bool = False
    is_byte: bool = False

    @property
    def grade(self) -> str | None:
        """A key of `GRADES`; None for a token that nothing speaks against, or that the model was seen to say."""
        if self.verdict.endswith("rejected"):
            return None
        if "verified" in self.verdict or self.verdict in ("not_encodable", "not_finite"):
            return "verified"
        if self.verdict != "untested":
            return "borderline"
        if self.category == "no_row":
            return "no_row"
        if self.candidate:
            return "candidate"
        return "reference" if self.reference and self.category != "special" else None


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedScan:
    """A scan as far as its users need it: facts by token id.

    Where it is not `complete`, only suspicious and tested tokens are here; where it is not `ranked`, no indicator was
    trusted and there are no candidates. `vocabulary` is a hash; empty where the files do not tell.
    """

    model: str
    origin: str
    tokens: Mapping[int, TokenFact]
    complete: bool
    lossy: tuple[LossyByte, ...]
    ranked: bool
    vocabulary: str = ""

    def flags(self, grades: Iterable[str] = tuple(GRADES)) -> dict[int, str]:
        """Grade of every flagged token id, limited to `grades`.

        Raises:
            UnknownNameError: for a grade that does not exist.
        """
        wanted = check_grades(grades)
        return {i: fact.grade for i, fact in sorted(self.tokens.items()) if fact.grade in wanted}

    def counts(self) -> dict[str, int]:
        """Flagged tokens per grade."""
        return dict(Counter(self.flags().values()))

    def text(self, token_id: int) -> str:
        """Text of a token on one line; empty if the scan does not know it."""
        fact = self.tokens.get(token_id)
        return "" if fact is None else fact.text


def check_grades(grades: Iterable[str]) -> tuple[str, ...]:
    """The grades without repetitions.

    Raises:
        UnknownNameError: for a grade that does not exist.
    """
    wanted = tuple(dict.fromkeys(grades))
    for grade in wanted:
        require_known("grade", grade, GRADES)
    return wanted


def of_report(report: GlitchReport, origin: str = "scanned now") -> SavedScan:
    """The facts of a scan that was just made."""
    rows = report.frame().sort_values("token_id").to_dict("records")
    facts = {row["token_id"]: _fact(row, shown(row["token"]), row["candidate"]) for row in rows}
    return SavedScan(
        model=report.model, origin=origin, tokens=facts, complete=True, lossy=report.tokenizer.lossy,
        ranked=report.indicator is not None, vocabulary=report.tokenizer.vocabulary,
    )  # fmt: skip


def of_tokenizer(codec: Codec, name: str) -> SavedScan:
    """What the tokenizer alone tells: texts, categories and lossy bytes; no indicators and no verdicts."""
    vocabulary = analyse(codec)
    facts = {
        i: TokenFact(
            token_id=i, text=shown(text), category=category, reference=bool(vocabulary.reserved[i]),
            is_byte=bool(vocabulary.byte[i] >= 0),
        )
        for i, (text, category) in enumerate(zip(vocabulary.text, vocabulary.category, strict=True))
        if category != "no_token"
    }  # fmt: skip
    return SavedScan(
        model=name, origin="tokenizer alone", tokens=facts, complete=True, lossy=vocabulary.lossy, ranked=False,
        vocabulary=vocabulary.digest,
    )  # fmt: skip


def load_scan(path: str | Path) -> SavedScan:
    """A saved scan: the run folder of `workbench glitch scan`, or its glitch.json.

    With tokens.csv beside glitch.json every token is known, otherwise only the suspicious and tested ones.

    Raises:
        MissingFileError: if there is no scan.
        CorruptFileError: if a file is not what a scan writes.
    """
    file = _scan_file(Path(path).expanduser())
    facts = load_json(file, dict)
    if not {"model", "candidates", "tokenizer"} <= facts.keys():
        raise CorruptFileError(
            f"{file} is not the glitch.json of a scan. Name a run folder of `workbench glitch scan`."
        )
    table = file.with_name("tokens.csv")
    with content_of(file.parent, "Scan the model again.", csv.Error):
        rows = _from_csv(table) if table.is_file() else _from_json(facts)
        tokens = {fact.token_id: fact for fact in rows}  # later rows say more
        lossy = tuple(LossyByte(int(x["byte"]), x["text"], x["back"]) for x in facts["tokenizer"].get("lossy", []))
        return SavedScan(
            model=str(facts["model"]), origin=str(path), tokens=tokens, complete=table.is_file(), lossy=lossy,
            ranked=facts.get("indicator") is not None, vocabulary=str(facts["tokenizer"].get("vocabulary", "")),
        )  # fmt: skip


def _scan_file(path: Path) -> Path:
    if path.is_file():
        return path.with_name("glitch.json") if path.name == "tokens.csv" else path
    for place in (path / "artifacts" / "glitch.json", path / "glitch.json"):
        if place.is_file():
            return place
    raise MissingFileError(
        f"{path} holds no saved scan (no artifacts/glitch.json). Make one with `workbench glitch scan MODEL`, and name "
        "its run folder."
    )


def _from_csv(path: Path) -> Iterator[TokenFact]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield _fact(row, cell_text(row["token"]), _truth(row["candidate"]))


def _from_json(scan: Mapping[str, Any]) -> Iterator[TokenFact]:  # Any: JSON
    for i in (scan.get("reference") or {}).get("members", []):
        yield TokenFact(token_id=int(i), text="", category="", reference=True)
    for test in (scan.get("verification") or {}).get("tested", []):
        yield _fact(test | {"category": ""}, "", not test["control"])
    for kind in ("controls", "unwritable", "candidates"):
        for row in scan.get(kind, []):
            yield _fact(row, shown(row["token"]), kind == "candidates")


def _fact(row: Mapping[str, Any], text: str, candidate: bool) -> TokenFact:
    return TokenFact(
        token_id=int(row["token_id"]), text=text, category=row["category"], indicator=_number(row.get("indicator")),
        max_prob=_number(row["max_prob"]), verdict=row["verdict"], candidate=candidate,
        reference=_truth(row.get("is_reference")) or _truth(row.get("reserved")), is_byte=_truth(row.get("is_byte")),
    )  # fmt: skip


def _number(value: str | float | None) -> float:
    return math.nan if value in (None, "") else float(value)


def _truth(value: object) -> bool:
    return value in (True, "True")
