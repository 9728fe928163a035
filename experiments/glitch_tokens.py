"""Which tokens has a model probably never been trained on, and can it say them?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from workbench.cli.base import typed
from workbench.cli.study import Begin, Study
from workbench.core.errors import WorkbenchError
from workbench.core.numbers import number
from workbench.glitch import GlitchReport, ScanOptions, VerifyOptions, examine, scan
from workbench.glitch.verification.prompts import prompts_from
from workbench.glitch.verification.scoring import VERIFIED
from workbench.models.model import Model
from workbench.runs.run import RunDir


def study(
    model: Model | str | Path, verify: Literal["top"] | None = None, *, options: ScanOptions | None = None
) -> GlitchReport:
    """Scans a model; `verify="top"` also tests the most suspicious tokens beside random controls.

    Args:
        model: a model, or a name, folder or .gguf file, of which only two matrices are read.
        verify: None or "top".
        options: how many tokens, which reference, which prompts.
    """
    return scan(model, verify, options=options)


def brief(folder: Path) -> ScanOptions:
    """Options of a scan that is one part of a longer run: few tokens, each until it is said; `folder` keeps it."""
    return ScanOptions(top=24, journal=folder / "glitch_tested.jsonl", verification=VerifyOptions(stop_at=VERIFIED))


@dataclass(frozen=True, kw_only=True)
class GlitchScan(Study[GlitchReport]):
    """Find tokens that the model was probably never trained on.

    The list comes from the weights alone; --verify top tests the first of it beside random tokens. The run folder gets
    the report as HTML, the facts as JSON and a table of all tokens as CSV. An interrupted test continues where it was.

    Example: workbench glitch scan embedded --verify top
    """

    run_name, step = "glitch-scan", "glitch"

    model: Annotated[str, tyro.conf.Positional] = "embedded"
    """Model: "embedded", a folder, a .gguf file, or a Hugging Face id in the local cache."""
    verify: Literal["none", "top"] = "none"
    """none reads the weights only; top asks the model to say the most suspicious tokens and random controls."""
    top: int = 40
    """How many candidates to test."""
    controls: int | None = None
    """How many random ordinary tokens to test beside them; by default as many."""
    percentile: float | None = None
    """Percent of the ordinary tokens that become candidates; by default those that the bulk does not explain."""
    reference: tuple[int, ...] = ()
    """Ids known to be unused; by default they are found."""
    indicator: str | None = None
    """I_in, I_cos, I_centred, I_l2 or I_1pc; by default the one that separates best (I_1pc only if asked for)."""
    prompts: Path | None = None
    """JSON file with other prompts: a list of {name, preamble, shown, answer, shots, request, reply}."""
    forms: Literal["auto", "raw", "chat", "both"] = "auto"
    """Prompts as raw text, through the chat template, or both; auto is both where the model has a template."""
    quick: bool = False
    """Stop testing a token once it was said: the same verdicts, but p of rejected tokens is a lower bound."""
    spliced: int = 16
    """How many suspicious tokens that no text gives to test by their ids, in a table of their own."""
    no_sides: bool = False
    """Do not find out whether each tested token can be read, and whether it can be written."""
    context: int = 0
    """Also ask for each tested token in so many lines of random ordinary tokens, where more may fail."""
    symptoms: bool = False
    """Also ask the model to repeat, spell and measure each tested token, and name what goes wrong."""
    batch_size: int = 32
    """Prompts per forward pass."""

    def options(self) -> ScanOptions:
        """What the library is called with."""
        return ScanOptions(
            top=self.top, controls=self.controls, percentile=self.percentile, reference=self.reference or None,
            indicator=self.indicator, prompts=self.prompts, seed=self.seed, forms=self.forms, spliced=self.spliced,
            sides=not self.no_sides, contexts=self.context, symptoms=self.symptoms,
            verification=VerifyOptions(batch_size=self.batch_size, stop_at=VERIFIED if self.quick else None),
        )  # fmt: skip

    def measure(self, begin: Begin) -> GlitchReport:
        options = self.options()
        if self.prompts is not None:
            prompts_from(self.prompts)  # refused before the weights are read
        run = begin()
        try:
            report, model = study(self.model, options=options), None
        except WorkbenchError:  # a model may have to be downloaded, or be laid out as only its own code knows
            if self.verify != "top":
                raise
            model = self.load_model()
            report = study(model, options=options)
        self._save(run, report)  # kept even if the model can't be loaded or tested
        if self.verify != "top":
            return report
        model = model or self.load_model()
        run.note_model(model)
        # In the run folder, so that the same command, given again after an interruption, continues from it.
        options = dataclasses.replace(options, journal=run.artifacts / "tested.jsonl")
        report = examine(model, report, options=options)
        self._save(run, report)
        return report

    def _save(self, run: RunDir, report: GlitchReport) -> None:
        from workbench.core.records import save_json

        report.to_csv(run.artifacts / "tokens.csv")
        save_json(run.artifacts / f"{self.step}.json", report.to_json())
        run.save_step(self.step, report.section())

    def following(self, report: GlitchReport, folder: Path) -> str:
        if self.verify != "top":
            return typed("glitch", "scan", self.model, "--verify", "top")
        if any("verified" in (report.row(i)["verdict"] or "") for i in report.candidates()):
            return typed("glitch", "repair", self.model, "--scan", folder)
        return typed("report", folder, "--open")

    def title(self, report: GlitchReport) -> str:
        return f"Glitch tokens of {report.model}"

    def summary(self, report: GlitchReport, folder: Path) -> Mapping[str, object]:
        return report.to_json() | {"metrics": report.metrics()}

    def details(self, report: GlitchReport, folder: Path) -> Iterator[str]:
        for i in report.candidates()[:20]:
            row = report.row(i)
            p = "" if row["max_prob"] is None else f"  p = {number(row['max_prob'])}"
            yield f"{i:>8}  {number(row['indicator']):>8}{p}  {row['verdict']:<16}  {row['token']!r}"

    def places(self, report: GlitchReport, folder: Path) -> str:
        files = folder / "artifacts"
        return f"Report: {folder / 'report.html'}; all tokens: {files / 'tokens.csv'}; as JSON: {files / 'glitch.json'}"


if __name__ == "__main__":
    tyro.cli(GlitchScan).run()
