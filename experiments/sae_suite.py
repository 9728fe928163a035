"""How good is an SAE by every measurement that needs no download: core metrics, probes, absorption, with controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from workbench.cli.base import Command, read_passages
from workbench.errors import InvalidInputError
from workbench.saes.absorption import AbsorptionOptions
from workbench.saes.evaluate import EvalOptions
from workbench.saes.sparse_probing import ProbingOptions
from workbench.saes.suite import SuiteOptions


@dataclass(frozen=True, kw_only=True)
class SaeSuite(Command):
    """Measure an SAE: core metrics, k-sparse probing, absorption; each beside its controls."""

    sae: tyro.conf.Positional[Path]
    """Folder of the SAE."""
    store: Path | None = None
    """Store whose held-out rows are used."""
    texts: Path | None = None
    """Text file, one passage per line, instead of a store."""
    rows: int = 64
    """Rows that are run through the model, at most."""
    batch_rows: int = 16
    """Rows per forward pass; less memory, same numbers."""
    text_sets: bool = True
    """Also probe texts: code and docstrings of the standard library of this Python."""
    per_class: int = 200
    """Texts or tokens of each class in a labelled set, at most."""
    words: int = 2000
    """Words of the vocabulary for absorption; 0 leaves it out."""

    def run(self) -> None:
        """Measures, writes the run folder, and says what was found."""
        from workbench.models.loading import load_model
        from workbench.saes.io import load_sae
        from workbench.saes.labelled import local_text_sets
        from workbench.saes.suite import run_suite

        rows, sae = self._rows(), load_sae(self.sae)
        model = load_model(self.model)
        sets = local_text_sets(self.per_class) if self.text_sets else ()
        with self.start("sae-suite") as run:
            run.note_model(model)
            report = run_suite(model, sae, rows, texts=sets, options=self.options())
            for name, part in report.parts.items():
                run.save_step(name, part.section())
            html = run.finish(f"Suite of {self.sae}")
        metrics = report.section().metrics
        lines = [*(f"- {finding}" for finding in report.findings()), f"Report: {html}"]
        self.emit({"run": run.path, "report": html, "metrics": metrics, "findings": report.findings()}, lines)

    def options(self) -> SuiteOptions:
        """What is measured."""
        return SuiteOptions(
            evaluation=EvalOptions(max_rows=self.rows, batch_rows=self.batch_rows, seed=self.seed),
            probing=ProbingOptions(per_class=self.per_class, seed=self.seed),
            absorption=AbsorptionOptions(max_words=self.words, seed=self.seed) if self.words else None,
        )

    def _rows(self) -> Any:
        from workbench.activations.store import open_store

        if (self.store is None) == (self.texts is None):
            raise InvalidInputError("sae suite: give --store FOLDER or --texts FILE, one of them.")
        if self.store is not None:
            return open_store(self.store)
        return read_passages(self.texts)


if __name__ == "__main__":
    tyro.cli(SaeSuite).run()
