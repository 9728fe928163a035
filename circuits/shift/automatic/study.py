"""`automatic_shift`: SHIFT without a person and without attribute labels, beside methods that need more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from circuits.shift.automatic.evidence import ShortcutEvidence
from circuits.shift.automatic.finding import AutomaticOptions
from circuits.shift.deciders import Decider, FeatureDossier, Verdict
from circuits.shift.judging.automatic import AutomaticDecider, AutomaticVerdicts
from circuits.shift.judging.prepare import Candidate
from circuits.shift.options import ShiftOptions
from circuits.shift.shift_report import ShiftReport
from circuits.shift.study import shift
from circuits.shift.task import ShiftStudy, ShiftTask
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.html import Shown, frame_table
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

BESIDE = ("ERM", "JTT", "oracle probe")
"""Methods that automatic SHIFT is compared with by default."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class AutomaticShift(Shown):
    """Result of `automatic_shift`.

    Attributes:
        evidence: for a shortcut, or that there is none.
        report: the study, with SHIFT as far as there is evidence, and other methods.
    """

    evidence: ShortcutEvidence
    report: ShiftReport

    def frame(self) -> pd.DataFrame:
        """The table of methods, as `ShiftReport.frame`."""
        return self.report.frame()

    def _shown_line(self) -> str:
        return self.evidence.why

    def _shown_parts(self) -> Iterable[Markup]:
        yield from self.evidence._shown_parts()
        yield frame_table(self.frame(), caption="methods on the test texts")


@checked
def automatic_shift(
    model: Model,
    bases: Mapping[str, AnySAE],
    task: ShiftTask,
    *,
    search: AutomaticOptions | None = None,
    options: ShiftOptions | None = None,
) -> AutomaticShift:
    """Ablates features only if training texts and their labels alone speak for a shortcut.

    Half of the training texts are searched, among the features with the strongest effect on the label's margin: for
    sets that oppose the label on texts on which a cross-validated probe errs, and that fail together. On the other
    half, the texts whose label these features oppose are an environment of their own. There is evidence if (1) the gain
    in accuracy by ablation, all labels and both environments counting equally, is larger than in permutations of "with"
    and "without", and larger than in permutations of the environments within a label; and (2) where the features oppose
    the label, the probe follows them (it is right on less than 60 %) and without them is right on more. Otherwise
    nothing is ablated. Attribute labels of the task are used to evaluate, never to decide.

    Where no training text breaks the correlation, no method without further knowledge can find it, and this one says
    that there is no evidence.

    Args:
        model: the model.
        bases: an SAE per site.
        task: labelled texts.
        search: how it decides.
        options: as for `shift`; by default its methods are ERM, JTT and the oracle probe.

    Raises:
        DegenerateInputError: if there are too few training texts to hold half of them out.
    """
    options = options or ShiftOptions(methods=BESIDE)
    decider = _Kept(AutomaticDecider(search or AutomaticOptions(seed=options.seed)))
    report = shift(model, bases, task, decider, options=options)
    (verdicts,) = decider.made
    return AutomaticShift(evidence=verdicts.evidence, report=report)


class _Kept(Decider):
    """The automatic decider, which keeps what it made of the study."""

    regime = AutomaticDecider.regime

    def __init__(self, decider: AutomaticDecider) -> None:
        self.decider = decider
        self.made: list[AutomaticVerdicts] = []

    @property
    def name(self) -> str:
        return self.decider.name

    @property
    def information(self) -> str:
        return self.decider.information

    @property
    def is_oracle(self) -> bool:
        return False

    def of_study(self, study: ShiftStudy, candidates: list[Candidate]) -> AutomaticVerdicts:
        self.made.append(self.decider.of_study(study, candidates))
        return self.made[-1]

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        return self.decider(dossier)
