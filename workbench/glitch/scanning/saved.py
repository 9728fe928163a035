"""What a finished scan says about each token, read back from its files, for everything that uses a scan later."""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.core.codec import Codec
from workbench.core.errors import CorruptFileError, MissingFileError, UnknownNameError, did_you_mean
from workbench.core.jsontext import content_of
from workbench.core.records import load_json
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.result import cell_text, shown
from workbench.glitch.vocabulary.tokenizer import LossyByte, analyse

GRADES: dict[str, str] = {
    "verified": "tested: the model could not say it in any prompt (p < 0.01, or no number at all)",
    "borderline": "tested: 0.01 <= p < 0.1 at best",
    "candidate": "suspicious by its weights, not tested",
    "reference": "known to be unused: a reserved name, an impossible byte, a member of the reference",
    "no_row": "an id beyond the matrix: the model can't read it at all",
}
"""Why a token is flagged, strongest evidence first."""


@dataclass(frozen=True, slots=True)
class TokenFact:
    """One token of a scan.

    Attributes:
        text: its text on one line, control characters escaped.
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
        if self.verdict != "untested":
            return _grade_of(self.verdict)
        if self.category == "no_row":
            return "no_row"
        if self.candidate:
            return "candidate"
        return "reference" if self.reference and self.category != "special" else None


@dataclass(frozen=True, eq=False)
class SavedScan:
    """A scan as far as its users need it.

    Attributes:
        complete: whether every id is here, or only the suspicious and tested ones.
        ranked: whether the scan had an indicator that it trusted; without one there are no candidates.
        vocabulary: hash of the vocabulary strings; empty where the files do not tell.
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
        found = {i: fact.grade for i, fact in sorted(self.tokens.items())}
        return {i: grade for i, grade in found.items() if grade in wanted}

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
        if grade not in GRADES:
            raise UnknownNameError(f"There is no grade {grade!r}. {did_you_mean(grade, GRADES)}")
    return wanted


def of_report(report: GlitchReport, origin: str = "scanned now") -> SavedScan:
    """The facts of a scan that was just made."""
    table, candidates = report.table, set(report.candidates())
    tested = {t.token_id: t for t in report.verification.tested} if report.verification else {}
    facts = {}
    for i, text in enumerate(table.token):
        test = tested.get(i)
        facts[i] = TokenFact(
            i, shown(text), table.category[i], float(table.indicator[i]),
            math.nan if test is None else test.max_prob, "untested" if test is None else test.verdict,
            i in candidates, bool(table.is_reference[i] or table.reserved[i]), bool(table.is_byte[i]),
        )  # fmt: skip
    return SavedScan(
        report.model, origin, facts, True, report.tokenizer.lossy, report.indicator is not None,
        report.tokenizer.vocabulary,
    )  # fmt: skip


def of_tokenizer(codec: Codec, name: str) -> SavedScan:
    """What the tokenizer alone tells: texts, categories and lossy bytes; no indicators and no verdicts."""
    vocabulary = analyse(codec)
    facts = {
        i: TokenFact(
            i, shown(text), category, reference=bool(vocabulary.reserved[i]), is_byte=bool(vocabulary.byte[i] >= 0)
        )
        for i, (text, category) in enumerate(zip(vocabulary.text, vocabulary.category, strict=True))
        if category != "no_token"
    }  # fmt: skip
    return SavedScan(name, "tokenizer alone", facts, True, vocabulary.lossy, False, vocabulary.digest)


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
        tokens = _from_csv(table) if table.is_file() else _from_json(facts)
        lossy = tuple(LossyByte(int(x["byte"]), x["text"], x["back"]) for x in facts["tokenizer"].get("lossy", []))
        return SavedScan(
            str(facts["model"]), str(path), tokens, table.is_file(), lossy, facts.get("indicator") is not None,
            str(facts["tokenizer"].get("vocabulary", "")),
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


def _from_csv(path: Path) -> dict[int, TokenFact]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    found = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            i = int(row["token_id"])
            found[i] = TokenFact(
                i, cell_text(row["token"]), row["category"], _number(row["indicator"]), _number(row["max_prob"]),
                row["verdict"],
                _truth(row["candidate"]), _truth(row["is_reference"]) or _truth(row.get("reserved", "")),
                _truth(row.get("is_byte", "")),
            )  # fmt: skip
    return found


def _from_json(facts: Mapping[str, Any]) -> dict[int, TokenFact]:
    found: dict[int, TokenFact] = {}
    members = {int(i) for i in (facts.get("reference") or {}).get("members", [])}
    for i in members:
        found[i] = TokenFact(i, "", "", reference=True)
    verification = facts.get("verification") or {}
    for test in verification.get("tested", []):
        i = int(test["token_id"])
        found[i] = TokenFact(
            i, "", "", max_prob=_number(test["max_prob"]), verdict=test["verdict"], candidate=not test["control"]
        )
    for kind in ("controls", "unwritable", "candidates"):
        found |= {int(row["token_id"]): _of_row(row, kind == "candidates") for row in facts.get(kind, [])}
    return found


def _of_row(row: Mapping[str, Any], candidate: bool) -> TokenFact:
    return TokenFact(
        int(row["token_id"]), shown(row["token"]), row["category"], _number(row["indicator"]),
        _number(row["max_prob"]), row["verdict"], candidate, bool(row.get("is_reference")), bool(row.get("is_byte")),
    )  # fmt: skip


def _grade_of(verdict: str) -> str | None:
    """What a verdict means for the use of a token.

    >>> _grade_of("weak_verified"), _grade_of("strong_rejected"), _grade_of("borderline")
    ('verified', None, 'borderline')
    """
    if verdict.endswith("rejected"):
        return None
    unsayable = "verified" in verdict or verdict in ("not_encodable", "not_finite")
    return "verified" if unsayable else "borderline"


def _number(value: Any) -> float:
    return math.nan if value in (None, "") else float(value)


def _truth(value: str) -> bool:
    return value == "True"
