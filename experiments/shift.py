"""Can a probe that learned a shortcut be repaired by ablating the SAE features that carry it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import circuits
from circuits.shift.biographies import BiographyOptions, biographies
from circuits.shift.deciders import Decider, LexiconDecider, OracleDecider, StatisticsDecider
from circuits.shift.reading import ShiftOptions
from circuits.shift.shift_report import ShiftReport
from workbench.bases.sae import SAELike
from workbench.cli.base import read_passages, typed
from workbench.cli.places import sae_folder
from workbench.cli.study import Begin, SAEOptionStudy
from workbench.core.tokens import TokenBatch
from workbench.judges.protocol import Judge
from workbench.models.model import Model

DeciderName = Literal["statistics", "lexicon", "oracle"]
_DECIDERS: dict[DeciderName, Callable[[], Decider]] = {
    "statistics": StatisticsDecider, "lexicon": LexiconDecider, "oracle": OracleDecider,
}  # fmt: skip


def study(
    model: Model,
    sae: SAELike,
    plain_text: TokenBatch | None = None,
    *,
    site: str | None = None,
    task: BiographyOptions | None = None,
    judge: Decider | Judge | None = None,
    options: ShiftOptions | None = None,
) -> ShiftReport:
    """SHIFT on biographies in which profession and gender go together.

    Args:
        model: the model.
        sae: an SAE of it.
        plain_text: held-out text, for the loss that the ablation costs.
        site: where the SAE reads; by default what its metadata says.
        task: which biographies.
        judge: who decides, by default from statistics of swapped texts; a judge is asked about tokens.
        options: probe site, candidates, controls.
    """
    from workbench.bases.fits import sae_site

    return circuits.shift(
        model, {site or sae_site(sae): sae}, biographies(task), judge, options=options, plain_text=plain_text
    )


@dataclass(frozen=True, kw_only=True)
class Shift(SAEOptionStudy[ShiftReport]):
    """Remove gender from a profession probe by ablating features.

    A decider judges the SAE features with the strongest effect; random features are the control.

    Example: workbench shift --sae sae
    """

    run_name = step = "shift"
    keeps_json = True

    sae: Path
    """SAE: its folder, or a run that holds one (folder, name or latest)."""
    professions: tuple[str, str] = ("professor", "nurse")
    """Label 0 and label 1: two of professor, nurse, attorney, journalist, dentist, architect, painter, chef, teacher,
    photographer."""
    judge: DeciderName = "statistics"
    """Who calls a feature spurious; the oracle sees balanced labels and is a bound, not a method."""
    probe_site: str | None = None
    """Where the probe reads, such as resid_post.20; by default where the SAE reads, where effects are exact."""
    top_k: int = 64
    """How many features, strongest effect first, are judged."""
    random_draws: int = 10
    """Sets of random features to compare with."""
    train_rows: int = 240
    """Biographies in the ambiguous training set, and in the balanced one that oracles use."""
    test_rows: int = 400
    """Biographies in the balanced test set."""
    texts: Path | None = None
    """Text file, one passage per line: measures what the ablation costs on plain text."""

    def measure(self, begin: Begin) -> ShiftReport:
        from workbench.saes.formats.load import load_sae

        passages, sae = read_passages(self.texts), load_sae(self.sae_path())
        task = BiographyOptions(
            professions=self.professions, n_train=self.train_rows, n_test=self.test_rows, seed=self.seed
        )
        options = ShiftOptions(
            probe_site=self.probe_site, top_k=self.top_k, random_draws=self.random_draws, seed=self.seed
        )
        model = self.load_model()
        plain_text = None if passages is None else model.tokens(passages)
        begin(model)
        return study(model, sae, plain_text, task=task, judge=_DECIDERS[self.judge](), options=options)

    def sae_path(self) -> Path:
        return sae_folder(self.sae, self.runs_folder())

    def following(self, report: ShiftReport, folder: Path) -> str:
        return typed("refusal", "--sae", self.sae_path())

    def title(self, report: ShiftReport) -> str:
        return "SHIFT: " + report.task


if __name__ == "__main__":
    import tyro

    tyro.cli(Shift).run()
