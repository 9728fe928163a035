"""The command sae eval: the numbers of an SAE beside their controls; and what it shares with other measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli.base import read_passages, typed
from workbench.cli.study import Begin, R, SAEStudy
from workbench.core.errors import InvalidInputError

if TYPE_CHECKING:
    from workbench.activations.store import ActivationStore
    from workbench.saes.evaluation.evaluate import EvalOptions
    from workbench.saes.evaluation.quality import SAEReport


@dataclass(frozen=True, kw_only=True)
class SaeMeasurement(SAEStudy[R]):
    """A measurement of one SAE on rows of a store or of a text file."""

    store: Path | None = None
    """Store whose held-out rows are used; by default the one that the SAE was trained on."""
    texts: Path | None = None
    """Text file, one passage per line, instead of a store."""
    rows: int = 64
    """Rows that are run through the model, at most."""
    batch_rows: int = 16
    """Rows per forward pass; less memory, same numbers."""

    def read_rows(self) -> ActivationStore | list[str]:
        """The store, or the passages of the text file.

        Raises:
            InvalidInputError: if both were given, or neither, and the SAE's folder names no store.
        """
        from workbench.activations.store import open_store

        home = self.home()
        known = None if self.store or self.texts or home.store is None else home.require_store()
        if (self.store or known) is None and self.texts is None or self.store and self.texts:
            given = "both" if self.store else "neither"
            raise InvalidInputError(
                f"The rows to measure on: {given} given. Give --store FOLDER or --texts FILE, one of them."
            )
        if self.texts is None:
            return open_store(self.store or known or "")
        return read_passages(self.texts) or []

    def evaluation(self) -> EvalOptions:
        """How many rows, in which batches."""
        from workbench.saes.evaluation.evaluate import EvalOptions

        return EvalOptions(max_rows=self.rows, batch_rows=self.batch_rows, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SaeEval(SaeMeasurement["SAEReport"]):
    """Evaluate an SAE: FVU, L0, loss recovered, beside controls.

    Loss recovered is that of the model with the SAE spliced in.

    Example: workbench sae eval sae
    """

    run_name, step = "sae-eval", "sae"

    def measure(self, begin: Begin) -> SAEReport:
        from workbench.saes.evaluation.evaluate import evaluate_sae
        from workbench.saes.formats.load import load_sae

        rows, sae = self.read_rows(), load_sae(self.sae_path())
        model = self.load_model()
        begin(model)
        return evaluate_sae(model, sae, rows, options=self.evaluation())

    def title(self, report: SAEReport) -> str:
        return f"Evaluation of {self.sae}"

    def summary(self, report: SAEReport, folder: Path) -> Mapping[str, object]:
        return {"metrics": report.section().metrics}

    def following(self, report: SAEReport, folder: Path) -> str:
        return typed("features", "score", self.sae_path())
