"""`workbench glitch repair`: new rows for glitch tokens, judged before and after, as an edit and as weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from workbench.cli.base import model_words, read_passages, typed
from workbench.cli.places import SCANS, named_run
from workbench.cli.study import Begin, Study
from workbench.core.numbers import number

if TYPE_CHECKING:
    from workbench.glitch.repairing.repair import Repair, RepairOptions
    from workbench.glitch.repairing.repair_check import RepairCheckOptions, RepairReport
    from workbench.glitch.repairing.repaired_copy import CopyReport
    from workbench.models.model import Model

SAVED = "saved-model"
"""Step of the report on the saved copy."""


@dataclass(frozen=True, kw_only=True)
class GlitchRepair(Study["RepairReport"]):
    """Give glitch tokens new rows, and measure whether that helps.

    The rows are made from the tokens that spell them. The model itself is never changed: the repair is saved as an
    intervention, and with --save-model as a new folder.

    Example: workbench glitch repair embedded --scan latest
    """

    run_name, step = "glitch-repair", "repair"

    model: Annotated[str, tyro.conf.Positional] = "embedded"
    """Model: "embedded", a folder, a .gguf file, or a Hugging Face id in the local cache."""
    tokens: tuple[int, ...] = ()
    """Ids of the tokens to repair."""
    scan: Path | None = None
    """Run of `workbench glitch scan --verify top` (folder, name or latest): repairs the tokens that it verified."""
    sources: Literal["subtokens", "neighbours"] = "subtokens"
    """What the new rows are made of: the tokens that spell the text, or the ordinary tokens with the closest rows."""
    reading: Literal["mean", "keep"] = "mean"
    """mean gives new input rows; keep leaves them."""
    writing: Literal["mean", "block", "keep"] = "mean"
    """mean gives new output rows, block makes the tokens impossible to write, keep leaves them."""
    text: Path | None = None
    """Text file, one passage per line, whose loss must not rise; by default twelve short passages."""
    tolerance: float = 0.01
    """Rise of that loss, in nats per token, above which the repair is no success."""
    controls: int = 16
    """Random ordinary tokens that must be copied as before."""
    save_model: Path | None = None
    """New folder for a copy of the model with the new rows; loaded and tested after it is written."""
    untie: bool = False
    """Allow that copy to have an output matrix of its own where the model has one for both."""
    force: bool = False
    """Save the copy even if the repair is no success."""

    def measure(self, begin: Begin) -> RepairReport:
        from workbench.glitch.repairing.repair import repair
        from workbench.glitch.repairing.repair_check import check_repair

        tokens, avoid = named_tokens(self.tokens, self.scan, self.out)
        self._require_possible()
        model = self.load_model()
        made = repair(model, tokens, self._options(), avoid=avoid)
        run = begin(model)
        made.intervention(required=False).save(run.artifacts / "intervention")
        report = check_repair(model, made, self._check())
        run.save_step(self.step, report.section())
        if (saved := self._saved(model, made, report)) is not None:
            run.save_step(SAVED, saved.section())
        return report

    def following(self, report: RepairReport, folder: Path) -> str:
        edit = folder / "artifacts" / "intervention"
        return typed("generate", "Hello", *model_words(self.model), "--intervention", edit)

    def title(self, report: RepairReport) -> str:
        return f"Repair of glitch tokens of {report.model}"

    def summary(self, report: RepairReport, folder: Path) -> Mapping[str, object]:
        return report.to_json() | {"metrics": report.metrics()}

    def details(self, report: RepairReport, folder: Path) -> Iterator[str]:
        from workbench.runs.run import RunDir

        for k, (i, text, pieces) in enumerate(zip(report.ids, report.texts, report.sources, strict=True)):
            p = f"p {number(report.copied['before'][k])} -> {number(report.copied['repaired'][k])}"
            yield f"{i:>8}  {p}  {text!r} = {' + '.join(map(repr, pieces))}"
        run = RunDir.open(folder)
        if run.has(SAVED):
            yield from (f"- {finding}" for finding in run.load_step(SAVED).findings)
        elif self.save_model is not None:
            yield f"The model was not saved: the repair is no success. --force writes {self.save_model} nevertheless."

    def places(self, report: RepairReport, folder: Path) -> str:
        return f"Intervention: {folder / 'artifacts' / 'intervention'}; report: {folder / 'report.html'}"

    def _options(self) -> RepairOptions:
        from workbench.glitch.repairing.repair import RepairOptions

        return RepairOptions(sources=self.sources, reading=self.reading, writing=self.writing)

    def _check(self) -> RepairCheckOptions:
        from workbench.glitch.repairing.repair_check import TEXTS, RepairCheckOptions

        texts = read_passages(self.text) or TEXTS
        return RepairCheckOptions(
            controls=self.controls, tolerance=self.tolerance, seed=self.seed, texts=tuple(texts)
        )  # fmt: skip

    def _require_possible(self) -> None:
        """Refuses a folder that can't be written before anything is computed."""
        from workbench.core.errors import InvalidInputError

        place = self.save_model
        if place is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise InvalidInputError(f"{place} exists and is not an empty folder; name a new one for the copy.")

    def _saved(self, model: Model, made: Repair, report: RepairReport) -> CopyReport | None:
        """The report on the saved copy, loaded again; None if none was asked for or the repair is no success."""
        from workbench.glitch.repairing.repaired_copy import compare_copy, save_repaired, source_folder

        if self.save_model is None or not (report.success or self.force):
            return None
        save_repaired(made, source_folder(model), self.save_model, untie=self.untie)
        return compare_copy(model, made, self.save_model)


def named_tokens(tokens: tuple[int, ...], scan: Path | None, runs: Path) -> tuple[list[int], list[int]]:
    """The tokens that were named, or those that a scan verified; and all that it suspects.

    Raises:
        InvalidInputError: unless they are named in exactly one way.
        DegenerateInputError: if the scan verified none.
    """
    from workbench.core.errors import DegenerateInputError, InvalidInputError

    if bool(tokens) == (scan is not None):
        raise InvalidInputError("Name the tokens by --tokens ID ID … or by --scan RUN_FOLDER, one of the two.")
    if scan is None:
        return list(tokens), []
    from workbench.glitch.scanning.saved import load_scan

    found = load_scan(named_run(scan, SCANS, runs))
    verified = list(found.flags(("verified",)))
    if not verified:
        raise DegenerateInputError(
            f"{scan} has no verified token ({found.counts() or 'nothing is flagged'}). Scan with --verify top, or name "
            "tokens by --tokens."
        )
    return verified, list(found.flags())
