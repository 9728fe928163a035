"""How good is an SAE by every measurement that needs no download: core metrics, probes, absorption, with controls."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from workbench.cli.sae_eval import SaeMeasurement
from workbench.cli.study import Begin
from workbench.report.base import Section
from workbench.saes.evaluation.absorption import AbsorptionOptions
from workbench.saes.evaluation.sparse_probing import ProbingOptions
from workbench.saes.evaluation.suite import SuiteOptions, SuiteReport, run_suite
from workbench.saes.evaluation.synthetic_training import SyntheticTraining


@dataclass(frozen=True, kw_only=True)
class SaeSuite(SaeMeasurement[SuiteReport]):
    """Measure an SAE in every way that needs no download.

    Core metrics, k-sparse probing, absorption, and its training on known features, each with its controls.

    Example: workbench sae suite sae
    """

    run_name = "sae-suite"

    no_text_sets: bool = False
    """Leave out the probes of texts: code and docstrings of the standard library of this Python."""
    per_class: int = 200
    """Texts or tokens of each class in a labelled set, at most."""
    words: int = 2000
    """Words of the vocabulary for absorption; 0 leaves it out."""
    synthetic_steps: int = 1200
    """Steps of training an SAE of the same architecture where the true features are known; 0 leaves it out."""

    def measure(self, begin: Begin) -> SuiteReport:
        from workbench.saes.evaluation.labelled import local_text_sets
        from workbench.saes.formats.load import load_sae

        rows, sae = self.read_rows(), load_sae(self.sae_path())
        model = self.load_model()
        sets = local_text_sets(self.per_class) if not self.no_text_sets else ()
        begin(model)
        return run_suite(model, sae, rows, texts=sets, options=self.options())

    def sections(self, report: SuiteReport) -> dict[str, Section]:
        return {name: part.section() for name, part in report.parts.items()}

    def title(self, report: SuiteReport) -> str:
        return f"Suite of {self.sae}"

    def options(self) -> SuiteOptions:
        """What is measured."""
        steps, seed = self.synthetic_steps, self.seed
        return SuiteOptions(
            evaluation=self.evaluation(),
            probing=ProbingOptions(per_class=self.per_class, seed=seed),
            absorption=AbsorptionOptions(max_words=self.words, seed=seed) if self.words else None,
            synthetic=SyntheticTraining(steps=steps, seed=seed) if steps else None,
        )


if __name__ == "__main__":
    tyro.cli(SaeSuite).run()
