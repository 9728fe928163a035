"""The command sae eval: the numbers of an SAE beside their controls; and what it shares with other measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from workbench.cli.base import read_passages
from workbench.cli.study import Begin, R, Study
from workbench.core.errors import InvalidInputError

if TYPE_CHECKING:
    from workbench.activations.store import ActivationStore
    from workbench.saes.evaluation.evaluate import EvalOptions
    from workbench.saes.evaluation.quality import SAEReport


@dataclass(frozen=True, kw_only=True)
class SaeMeasurement(Study[R]):
    """A measurement of one SAE on rows of a store or of a text file."""

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

    def read_rows(self) -> ActivationStore | list[str]:
        """The store, or the passages of the text file.

        Raises:
            InvalidInputError: unless exactly one of them was given.
        """
        from workbench.activations.store import open_store

        if (self.store is None) == (self.texts is None):
            given = "neither" if self.store is None else "both"
            raise InvalidInputError(
                f"The rows to measure on: {given} given. Give --store FOLDER or --texts FILE, one of them."
            )
        if self.store is not None:
            return open_store(self.store)
        return read_passages(self.texts) or []

    def evaluation(self) -> EvalOptions:
        """How many rows, in which batches."""
        from workbench.saes.evaluation.evaluate import EvalOptions

        return EvalOptions(max_rows=self.rows, batch_rows=self.batch_rows, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SaeEval(SaeMeasurement["SAEReport"]):
    """Evaluate an SAE: FVU, L0, loss recovered when it is spliced in, beside controls."""

    run_name, step = "sae-eval", "sae"

    def measure(self, begin: Begin) -> SAEReport:
        from workbench.saes.evaluation.evaluate import evaluate_sae
        from workbench.saes.formats.load import load_sae

        rows, sae = self.read_rows(), load_sae(self.sae)
        model = self.load_model()
        begin(model)
        return evaluate_sae(model, sae, rows, options=self.evaluation())

    def title(self, report: SAEReport) -> str:
        return f"Evaluation of {self.sae}"

    def summary(self, report: SAEReport, folder: Path) -> Mapping[str, object]:
        return {"metrics": report.section().metrics}
