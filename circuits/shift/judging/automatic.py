"""The judge of automatic SHIFT: calls features spurious only where training texts and labels speak for a shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from circuits.shift.automatic.evidence import ShortcutEvidence, evidence_of
from circuits.shift.automatic.finding import AutomaticOptions, SearchRows
from circuits.shift.automatic.support import support
from circuits.shift.deciders import DECIDERS, FeatureDossier, Verdict
from circuits.shift.judging.prepare import Candidate, of_two_labels
from circuits.shift.task import ShiftStudy
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import MismatchError
from workbench.core.numbers import number


@DECIDERS.register("automatic")
@checked
@dataclass(frozen=True)
class AutomaticDecider(OneLine):
    """Nobody is asked: features that the probe follows into errors, tested on training texts that were held out.

    See `automatic_shift`, which also returns the evidence.

    Attributes:
        options: how it decides.
    """

    options: AutomaticOptions = field(default_factory=AutomaticOptions)

    name = "automatic"
    regime = "R3"
    information = (
        "training texts and their labels alone, half to search and half to test; it needs texts that break the "
        "correlation, but not which"
    )
    is_oracle = False

    def of_study(self, study: ShiftStudy, candidates: Sequence[Candidate]) -> AutomaticVerdicts:
        """The verdicts on these features."""
        of_two_labels(study, "automatic SHIFT")
        nodes = [node for node, _ in candidates]

        def ablated(chosen: Sequence[int]) -> Float[Tensor, "rows d"]:
            return study.ablated([nodes[i] for i in chosen], of="train")

        rows = SearchRows(np.array(study.task.train.label), support(study, candidates), ablated, study.options.probe)
        return AutomaticVerdicts(evidence_of(rows, nodes, self.options))

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """Refused: it decides on all features of a study together."""
        raise MismatchError(f"AutomaticDecider: {dossier.node} alone tells nothing. Pass the judge to circuits.shift.")


@dataclass(frozen=True, eq=False)
class AutomaticVerdicts(OneLine):
    """`AutomaticDecider` of one study.

    Attributes:
        evidence: for a shortcut, or that there is none.
    """

    evidence: ShortcutEvidence

    name = AutomaticDecider.name
    regime = AutomaticDecider.regime
    is_oracle = False

    @property
    def information(self) -> str:
        """What the judge uses, and what came out."""
        return f"{AutomaticDecider.information}. {self.evidence.why.rstrip('.')}"

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        """The verdict on one feature."""
        harm = dict(self.evidence.harm).get(str(dossier.node))
        if harm is None:
            return Verdict(dossier.node, "unsure", 0.0, "not among the features that were put to the test")
        where = f"where the probe errs, it supports the label by {number(harm)} logits on average"
        if not self.evidence.is_shortcut:
            return Verdict(dossier.node, "unsure", -harm, f"{where}; put to the test, without evidence")
        return Verdict(dossier.node, "spurious", -harm, f"{where}; confirmed with the others on texts held out")
