"""Which tokens does each feature of an SAE read, and which does it write?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from workbench.activations.store import ActivationStore, open_store
from workbench.bases.sae import SAELike
from workbench.cli.base import typed
from workbench.cli.study import Begin, SAEStudy
from workbench.core.errors import MissingFileError
from workbench.core.numbers import number
from workbench.features import ContextOptions, FeatureScoreReport, FeatureTable, ScoreOptions, score_features
from workbench.features.scores.table import IN_RUN
from workbench.models.model import Model


def study(
    model: Model,
    sae: SAELike,
    store: ActivationStore | None = None,
    prompt: str | Sequence[str] = "From my experience,",
    strength: float = 10.0,
    options: ScoreOptions | None = None,
) -> FeatureTable:
    """Scores every feature; `study(...).report()` is the report.

    Args:
        model: the model that the SAE was trained on.
        sae: the SAE.
        store: activations to find contexts in; without one there are output scores only.
        prompt: neutral text whose last token is steered, or several.
        strength: factor on the largest activation there.
        options: details.
    """
    scores = ("output",) if store is None else ("input", "output")
    return score_features(model, sae, store, scores=scores, prompt=prompt, strength=strength, options=options)


@dataclass(frozen=True, kw_only=True)
class FeaturesScore(SAEStudy[FeatureScoreReport]):
    """Score features of an SAE by what they read and write.

    Example: workbench features score sae
    """

    run_name, step = "features-score", "features"

    store: Path | None = None
    """Folder of stored activations, for input scores and contexts; by default what the SAE was trained on."""
    output_only: bool = False
    """Read no store: output scores only."""
    table: Path | None = None
    """Folder for the table; by default features/ in the SAE's folder, where the other commands look for it."""
    prompt: tuple[str, ...] = ("From my experience,",)
    """Neutral texts whose last token is steered; of several the mean score is taken."""
    strength: float = 10.0
    """Factor on the largest feature activation at that token."""
    k: int = 20
    """Logit-lens tokens per feature."""
    max_tokens: int = 200_000
    """Stored tokens that are read for contexts."""
    precision: Literal["float32", "model"] = "float32"
    """float32 scores on a copy in fp32; model uses the model's own precision."""
    threshold: float = 0.01
    """Output score from which a feature counts as an output feature."""

    def options(self) -> ScoreOptions:
        """What the library is called with."""
        return ScoreOptions(
            k=self.k, precision=self.precision, contexts=ContextOptions(max_tokens=self.max_tokens), seed=self.seed
        )

    def measure(self, begin: Begin) -> FeatureScoreReport:
        from workbench.engine.folder import require_local
        from workbench.saes.formats.load import load_sae

        require_local(self.table_folder())
        sae = load_sae(self.sae_path())
        store = None if self.output_only else open_store(self.store or self.home().require_store())
        model = self.load_model()
        run = begin(model)
        table = study(model, sae, store, self.prompt, self.strength, self.options())
        table.save(run.path / IN_RUN)  # what this run found, also after another run has replaced the SAE's table
        table.save(self.table_folder())
        return table.report(self.threshold)

    def title(self, report: FeatureScoreReport) -> str:
        return f"Features of {self.sae.name}"

    def summary(self, report: FeatureScoreReport, folder: Path) -> Mapping[str, object]:
        return {
            "table": self.table_folder(),
            "run_table": folder / IN_RUN,
            "findings": report.findings(),
            "best": report.best,
        }

    def details(self, report: FeatureScoreReport, folder: Path) -> Iterator[str]:
        for feature, output, read, _, tokens in report.best:
            yield f"{feature:>6}  output {number(output)}  input {number(read)}  {tokens}"

    def places(self, report: FeatureScoreReport, folder: Path) -> str:
        return f"Table: {self.table_folder()}, copied to {folder / IN_RUN}; report: {folder / 'report.html'}"

    def following(self, report: FeatureScoreReport, folder: Path) -> str:
        return typed("steer", self.sae_path(), *(["--table", self.table] if self.table else []))

    def table_folder(self) -> Path:
        """Where the table goes.

        Raises:
            MissingFileError: if the SAE is no folder on this machine, and no other place is named.
        """
        if self.table is None and not self.home().folder.is_dir():
            raise MissingFileError(f"{self.sae} is no folder, so the table has no place in it. Give --table FOLDER.")
        return self.table or self.home().table


if __name__ == "__main__":
    tyro.cli(FeaturesScore).run()
