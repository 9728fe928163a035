"""The command sae eval: the numbers of an SAE beside their controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from workbench.cli.base import Command, read_passages
from workbench.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class SaeEval(Command):
    """Evaluate an SAE: FVU, L0, loss recovered when it is spliced in, beside controls."""

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

    def run(self) -> None:
        """Evaluates, writes the run folder, and says what was found."""
        from workbench.models.loading import load_model
        from workbench.saes.evaluate import EvalOptions, evaluate_sae
        from workbench.saes.io import load_sae

        rows, sae = self._rows(), load_sae(self.sae)
        model = load_model(self.model)
        options = EvalOptions(max_rows=self.rows, batch_rows=self.batch_rows, seed=self.seed)
        with self.start("sae-eval") as run:
            run.note_model(model)
            report = evaluate_sae(model, sae, rows, options=options)
            run.save_step("sae", report.section())
            html = run.finish(f"Evaluation of {self.sae}")
        lines = [*(f"- {finding}" for finding in report.findings()), f"Report: {html}"]
        self.emit({"run": run.path, "report": html, "metrics": report.section().metrics}, lines)

    def _rows(self) -> Any:
        from workbench.activations.store import open_store

        if (self.store is None) == (self.texts is None):
            raise InvalidInputError("sae eval: give --store FOLDER or --texts FILE, one of them.")
        if self.store is not None:
            return open_store(self.store)
        return read_passages(self.texts)
