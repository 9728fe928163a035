"""The report of a glitch-token scan: its result with words, tables and plots."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from workbench.core.jsontext import Json
from workbench.core.records import to_jsonable
from workbench.glitch.reporting import TokenReport
from workbench.glitch.scanning.narrate import describe, say, summarise
from workbench.glitch.scanning.result import ScanResult
from workbench.report.base import Block, Metric


@dataclass(frozen=True, eq=False)
class GlitchReport(ScanResult, TokenReport):
    """Result of `scan`. `df` has every token; `to_json` the facts, the suspicious tokens and everything tested."""

    def to_json(self) -> dict[str, Json]:
        """Everything except the table of all tokens, which `to_csv` writes: its suspicious and tested rows are here."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("table", "natures")]
        return to_jsonable({name: getattr(self, name) for name in names} | {
            "candidates": [self.row(i) for i in self.candidates()],
            "unwritable": [self.row(i) for i in self.unwritable()],
            "spare": self.spare(),
            "controls": [self.row(t.token_id) for t in (self.verification.controls if self.verification else ())],
            "findings": list(self.findings()),
        })  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers; those of verification only if it ran."""
        return summarise(self)

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences, with what is not known."""
        return say(self)

    @property
    def _title(self) -> str:
        return f"Glitch tokens of {self.model}"

    def _blocks(self) -> tuple[Block, ...]:
        return describe(self)
