"""Verdicts that stand in files already: of a person, of several, or of anyone who writes the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from circuits.shift.deciders import FeatureDossier, Verdict
from circuits.shift.judging.agreement import Agreement, agreement
from circuits.shift.judging.annotations import SCORES, Annotation, read_annotations
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError


@checked
@dataclass(frozen=True, eq=False)
class AnnotatedDecider(OneLine):
    """Gives the verdicts of annotation files. A feature that two judges see differently, or one has not seen, is left.

    Attributes:
        by_judge: for each judge its verdicts by the name of the feature.
    """

    by_judge: Mapping[str, Mapping[str, Annotation]]

    is_oracle = False

    @classmethod
    def of(cls, *paths: str | Path) -> AnnotatedDecider:
        """The verdicts of one file or several, one judge or more.

        Raises:
            MissingFileError: if there is no such file.
            CorruptFileError: naming the first entry that is no verdict.
            DegenerateInputError: if there is no verdict.
        """
        by_judge: dict[str, dict[str, Annotation]] = {}
        for path in paths:
            for one in read_annotations(path):
                by_judge.setdefault(one.judge, {})[one.feature] = one
        if not by_judge:
            raise DegenerateInputError(
                f"AnnotatedDecider: no verdict in {', '.join(map(str, paths)) or 'no file'}. Judge a queue "
                "(circuits.judging_queue) first."
            )
        return cls(by_judge)

    @property
    def name(self) -> str:
        """The judges."""
        return " and ".join(self.by_judge)

    @property
    def information(self) -> str:
        """What the judges saw, and how far they agree."""
        seen = "what they were shown of each feature, without its effect" if len(self.by_judge) > 1 else (
            "what was shown of each feature, without its effect"
        )  # fmt: skip
        agreed = "".join(f"; {one._shown_line()}" for one in self.agreements())
        left = "; features on which they differ are unsure and stay" if len(self.by_judge) > 1 else ""
        return f"{seen}{agreed}{left}"

    def agreements(self) -> tuple[Agreement, ...]:
        """Kappa of each two judges who judged a common feature."""
        pairs = combinations([tuple(of.values()) for of in self.by_judge.values()], 2)
        return tuple(agreement(a, b) for a, b in pairs if {x.feature for x in a} & {x.feature for x in b})

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict that all judges gave, or "unsure"."""
        name = str(dossier.node)
        missing = [judge for judge, of in self.by_judge.items() if name not in of]
        if missing:
            return Verdict(dossier.node, "unsure", 0.0, f"not judged by {' and '.join(missing)}")
        given = [of[name] for of in self.by_judge.values()]
        if len({one.verdict for one in given}) > 1:
            return Verdict(dossier.node, "unsure", 0.0, f"the judges differ: {_reasons(given, named=True)}")
        return Verdict(dossier.node, given[0].verdict, SCORES[given[0].verdict], _reasons(given))


def _reasons(given: Sequence[Annotation], *, named: bool = False) -> str:
    if named or len(given) > 1:
        return "; ".join(f"{one.judge}: {one.verdict}{f' ({one.rationale})' if one.rationale else ''}" for one in given)
    return given[0].rationale or "no reason given"
