"""Can a probe that learned a shortcut be repaired by ablating the SAE features that carry it?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import circuits
from circuits.decomposition import refuse_unreached
from circuits.shift.asked import decider_of
from circuits.shift.biographies import biographies
from circuits.shift.choosing import methods_for
from circuits.shift.deciders import Decider
from circuits.shift.reading import ShiftOptions, of_two_labels
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import ShiftTask
from experiments.shift_task import TaskOptions, read_saes, sae_model
from workbench.bases.sae import SAELike
from workbench.cli.base import read_passages, typed
from workbench.cli.study import Begin, SAEOptionStudy
from workbench.core.tokens import TokenBatch
from workbench.judges.protocol import Judge
from workbench.models.model import Model


def study(
    model: Model,
    sae: SAELike,
    plain_text: TokenBatch | None = None,
    *,
    site: str | None = None,
    task: ShiftTask | None = None,
    judge: Decider | Judge | None = None,
    options: ShiftOptions | None = None,
) -> ShiftReport:
    """SHIFT with one SAE, by default on biographies in which profession and gender go together.

    Args:
        model: the model.
        sae: an SAE of it.
        plain_text: held-out text, for the loss that the ablation costs.
        site: where the SAE reads; by default what its metadata says.
        task: labelled texts.
        judge: who decides, by default from statistics of swapped texts; a judge is asked about tokens.
        options: probe site, candidates, controls.
    """
    from workbench.bases.fits import sae_site

    placed = {site or sae_site(sae): sae}
    return circuits.shift(model, placed, task or biographies(), judge, options=options, plain_text=plain_text)


@dataclass(frozen=True, kw_only=True)
class Shift(TaskOptions, SAEOptionStudy[ShiftReport]):
    """Remove a shortcut from a classifier by ablating features.

    A judge decides on the SAE features with the strongest effect; random features are the control. Works on a table of
    texts, or on generated biographies in which profession and gender go together.

    Example: workbench shift data.csv --text bio --label profession --attribute gender --sae sae
    """

    run_name = step = "shift"
    keeps_json = True

    sae: tuple[Path, ...]
    """SAEs: each a folder, a run that holds one (folder, name or latest), or a folder of one SAE per site."""
    judge: str = "auto"
    """Who calls a feature spurious: statistics (of twins), lexicon (words), oracle (sees balanced labels: a bound, not
    a method) or another of circuits.DECIDERS; auto takes the first of the former two that the texts allow."""
    positive: str | None = None
    """Label that the probe tells from all others, where there are more than two."""
    methods: tuple[str, ...] = ("standard",)
    """What SHIFT is compared with: standard, all, or names of methods; what nothing can be said without is always
    there."""
    probe_site: str | None = None
    """Where the probe reads, such as resid_post.20; by default where the last SAE reads."""
    top_k: int = 64
    """How many features, strongest effect first, are judged."""
    random_draws: int = 10
    """Sets of random features to compare with."""
    plain_text: Path | None = None
    """Text file, one passage per line: measures what the ablation costs on plain text."""

    def measure(self, begin: Begin) -> ShiftReport:
        passages, saes = read_passages(self.plain_text), read_saes(self.sae, self.runs_folder())
        task = self.make_task(self.seed, self.positive)
        decider = decider_of(None if self.judge == "auto" else self.judge, task, self.seed)
        options = ShiftOptions(
            methods=self.chosen_methods(), probe_site=self.probe_site, top_k=self.top_k,
            random_draws=self.random_draws, seed=self.seed,
            positive=self.positive if self.positive in task.label_names else None,
        )  # fmt: skip
        methods_for(of_two_labels(task, options), decider, options)  # unknown names are met before a model is loaded
        model = self.load_model()
        bases = circuits.bases(model, saes)
        refuse_unreached(model, bases, str(model.resolve(self.probe_site or list(bases)[-1])), "The probe")
        plain_text = None if passages is None else model.tokens(passages)
        begin(model)
        return circuits.shift(model, bases, task, decider, options=options, plain_text=plain_text)

    def chosen_methods(self) -> str | tuple[str, ...]:
        """As `circuits.shift` takes them."""
        return self.methods[0] if self.methods in (("standard",), ("all",)) else self.methods

    def model_name(self) -> str:
        return self.model or sae_model(self.sae, self.runs_folder()) or "embedded"

    def following(self, report: ShiftReport, folder: Path) -> str:
        return typed("report", folder, "--open") if self.data else typed("refusal", "--sae", self.sae[0])

    def title(self, report: ShiftReport) -> str:
        return "SHIFT: " + report.task


if __name__ == "__main__":
    import tyro

    tyro.cli(Shift).run()
