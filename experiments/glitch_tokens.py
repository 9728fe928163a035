"""Which tokens has a model probably never been trained on, and can it say them?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from workbench.cli.base import Command
from workbench.glitch import GlitchReport, ScanOptions, VerifyOptions, scan


def study(model: Any, verify: Literal["top"] | None = None, *, options: ScanOptions | None = None) -> GlitchReport:
    """Scans a model; `verify="top"` also tests the most suspicious tokens beside random controls.

    Args:
        model: a loaded `Model`, or a name, folder or .gguf file, of which only two matrices are read.
        verify: None or "top".
        options: how many tokens, which reference, which prompts.
    """
    return scan(model, verify, options=options)


@dataclass(frozen=True, kw_only=True)
class GlitchScan(Command):
    """Find tokens that the model was probably never trained on.

    The list comes from the weights alone; --verify top tests the first of it beside random tokens.
    """

    model: Annotated[str, tyro.conf.Positional] = "embedded"
    """Model: "embedded", a folder, a .gguf file, or a Hugging Face id in the local cache."""
    verify: Literal["none", "top"] = "none"
    """none reads the weights only; top asks the model to say the most suspicious tokens and random controls."""
    top: int = 40
    """How many candidates to test."""
    controls: int | None = None
    """How many random ordinary tokens to test beside them; by default as many."""
    percentile: float = 2.0
    """Percent of the ordinary tokens that become candidates."""
    reference: tuple[int, ...] = ()
    """Ids known to be unused; by default they are found."""
    indicator: str | None = None
    """I_in, I_cos, I_centred or I_l2; by default the one that separates best."""
    prompts: Path | None = None
    """JSON file with other prompts: a list of {name, preamble, shown, answer, shots}."""
    exact: bool = False
    """Run every prompt and step for every token, also after it was said once."""

    def options(self) -> ScanOptions:
        """What the library is called with."""
        return ScanOptions(
            top=self.top, controls=self.controls, percentile=self.percentile, reference=self.reference or None,
            indicator=self.indicator, prompts=self.prompts, seed=self.seed,
            verification=VerifyOptions(stop_at=None) if self.exact else VerifyOptions(),
        )  # fmt: skip

    def run(self) -> None:
        """Scan, save the run folder with the table of all tokens, and say what was found."""
        from workbench.models.loading import load_model
        from workbench.records import save_json

        options = self.options()
        model: Any = load_model(self.model) if self.verify == "top" else self.model
        with self.start("glitch-scan") as run:
            if self.verify == "top":
                run.note_model(model)
            report = study(model, "top" if self.verify == "top" else None, options=options)
            run.artifacts.mkdir(parents=True, exist_ok=True)
            report.to_csv(run.artifacts / "tokens.csv")
            save_json(run.artifacts / "glitch.json", report.to_json())
            run.save_step("glitch", report.section())
            html = run.finish(f"Glitch tokens of {report.model}")
            summary = report.to_json() | {"run": run.path, "report": html, "metrics": report.metrics()}
            self.emit(summary, self._lines(report, run.path))

    def _lines(self, report: GlitchReport, folder: Path) -> Iterator[str]:
        yield from (f"- {finding}" for finding in report.findings())
        for i in report.candidates()[:20]:
            row = report.row(i)
            p = "" if row["max_prob"] is None else f"  p = {row['max_prob']:.4f}"
            yield f"{i:>8}  {row['indicator']:.4f}{p}  {row['verdict']:<16}  {row['token']!r}"
        yield f"All tokens: {folder / 'artifacts' / 'tokens.csv'}; report: {folder / 'report.html'}"


if __name__ == "__main__":
    tyro.cli(GlitchScan).run()
