"""Verdicts on features as a file: one JSON object per line, with the reason, who judged, and when."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args

from circuits.shift.deciders import Decision, Node
from circuits.shift.shift_report import ShiftReport
from workbench.core.arguments import checked
from workbench.core.atomic import write_atomic
from workbench.core.display import OneLine
from workbench.core.errors import CorruptFileError, InvalidInputError
from workbench.core.records import json_lines

DECISIONS: tuple[str, ...] = get_args(Decision)
SCORES = {"spurious": 1.0, "intended": -1.0, "unsure": 0.0}


@checked
@dataclass(frozen=True, kw_only=True)
class Annotation(OneLine):
    """One verdict on one feature, as it stands in a file.

    Attributes:
        feature: name of the feature, such as "resid_post.15/3036".
        verdict: "spurious", "intended" or "unsure".
        rationale: the reason in words.
        judge: who judged.
        timestamp: UTC time in ISO form.

    Raises:
        InvalidInputError: if the feature has no such name, or the judge has none.
    """

    feature: str
    verdict: Decision
    rationale: str
    judge: str
    timestamp: str

    def __post_init__(self) -> None:
        Node.of(self.feature)
        if not self.judge.strip():
            raise InvalidInputError("Annotation(judge=''): say who judged, so that two can be compared.")

    @property
    def node(self) -> Node:
        """The feature."""
        return Node.of(self.feature)


@checked
def verdicts_of(report: ShiftReport) -> tuple[Annotation, ...]:
    """The verdicts of a study with their reasons, in the form that files hold and `AnnotatedDecider` reads."""
    now = timestamp()
    return tuple(
        Annotation(feature=v.feature, verdict=v.decision, rationale=v.why, judge=report.judge, timestamp=now)
        for v in report.verdicts
    )


@checked
def read_annotations(path: str | Path) -> tuple[Annotation, ...]:
    """The verdicts in a file; of several of one judge on one feature the last.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: naming the first entry that is no verdict.
    """
    last: dict[tuple[str, str], Annotation] = {}
    for number, record in enumerate(json_lines(path), 1):
        one = _of_record(record, f"{path}, entry {number}")
        last[one.judge, one.feature] = one
    return tuple(last.values())


@checked
def save_annotations(path: str | Path, given: Sequence[Annotation]) -> Path:
    """Writes verdicts, one JSON object per line, in one step: a crash leaves the old file or the new one."""
    return write_atomic(path, "".join(json.dumps(asdict(one)) + "\n" for one in given))


def timestamp() -> str:
    """The time of now."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _of_record(record: dict[str, object], where: str) -> Annotation:
    names = [field.name for field in fields(Annotation)]
    texts = {name: record.get(name) for name in names}
    wrong = next((name for name, text in texts.items() if not isinstance(text, str)), None)
    if wrong is not None:
        raise CorruptFileError(f"{where}: there is no text under {wrong!r}. A verdict has {', '.join(names)}.")
    if texts["verdict"] not in DECISIONS:
        raise CorruptFileError(
            f"{where}: the verdict is {texts['verdict']!r}; it must be one of {', '.join(DECISIONS)}."
        )
    try:
        return Annotation(**texts)  # type: ignore[arg-type]
    except InvalidInputError as error:
        raise CorruptFileError(f"{where}: {error}") from error
