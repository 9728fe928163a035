"""Which tokens does each feature of an SAE read, and which does it write?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from workbench.activations.store import ActivationStore, open_store
from workbench.bases.sae import SAELike
from workbench.cli.study import Begin, Study
from workbench.features import ContextOptions, FeatureScoreReport, FeatureTable, ScoreOptions, score_features
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
class FeaturesScore(Study[FeatureScoreReport]):
    """Score every feature of an SAE by what it reads and what it writes."""

    run_name, step = "features-score", "features"

    sae: tyro.conf.Positional[Path]
    """Folder of the SAE."""
    store: Path | None = None
    """Folder of stored activations, for input scores and contexts; without it there are output scores only."""
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
        from workbench.saes.formats.load import load_sae

        sae, store = load_sae(self.sae), open_store(self.store) if self.store else None
        model = self.load_model()
        run = begin(model)
        table = study(model, sae, store, self.prompt, self.strength, self.options())
        table.save(table_folder(run.path))
        return table.report(self.threshold)

    def title(self, report: FeatureScoreReport) -> str:
        return f"Features of {self.sae.name}"

    def summary(self, report: FeatureScoreReport, folder: Path) -> Mapping[str, object]:
        return {"table": table_folder(folder), "findings": report.findings(), "best": report.best}

    def details(self, report: FeatureScoreReport, folder: Path) -> Iterator[str]:
        for feature, output, read, _, tokens in report.best:
            yield f"{feature:>6}  output {output:.3f}  input {read:.3f}  {tokens}"

    def places(self, report: FeatureScoreReport, folder: Path) -> str:
        return f"Table: {table_folder(folder)}; report: {folder / 'report.html'}"


def table_folder(run: Path) -> Path:
    """Where a run keeps the table."""
    return run / "artifacts" / "features"


if __name__ == "__main__":
    tyro.cli(FeaturesScore).run()
