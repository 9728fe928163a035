"""Accuracies while features are toggled: in Python, on a page, one feature left out at a time, and step by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from circuits.shift.deciders import Node
from circuits.shift.judging.prepare import of_two_labels
from circuits.shift.methods import Scorer, accuracy
from circuits.shift.rows import MethodRow
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import Prediction, ShiftStudy
from circuits.shift.toggling.page import TogglePage, toggle_html
from workbench.controls.methods import Method
from workbench.core.arguments import checked
from workbench.core.atomic import write_atomic
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, MismatchError, require_known
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.stats import SIGNED_SHARE, Estimate, paired_difference
from workbench.probes.linear import Probe

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True, kw_only=True)
class FeatureRole(OneLine):
    """What one feature adds to an ablation.

    Attributes:
        feature: its name.
        label: label accuracy with it ablated minus that with it kept, the others ablated; over test texts.
        conflict: the same over the texts in which label and attribute disagree with training; None without them.
    """

    feature: str
    label: Estimate
    conflict: Estimate | None


@checked
@dataclass(frozen=True, kw_only=True)
class LeftOut(Shown):
    """What each feature of an ablation adds to it, the largest first on texts that break the correlation.

    Attributes:
        roles: one per feature.
    """

    roles: tuple[FeatureRole, ...]

    def frame(self) -> pd.DataFrame:
        """One row per feature: what it adds, with the ends of the intervals."""
        import pandas as pd

        return pd.DataFrame({"feature": r.feature, **_ends("label", r.label), **_ends("conflict", r.conflict)}
                            for r in self.roles)  # fmt: skip


@checked
@dataclass(frozen=True, kw_only=True)
class BackwardStep(OneLine):
    """One step of a backward selection.

    Attributes:
        kept: the feature that is ablated no more; "" for the start.
        n_ablated: how many still are.
        label: label accuracy, over the half of the test texts that no step was chosen on.
        worst: that of the worst group.
        worst_group: which group that is.
    """

    kept: str
    n_ablated: int
    label: Estimate
    worst: Estimate
    worst_group: str


@checked
@dataclass(frozen=True, kw_only=True)
class Backward(Shown):
    """Features given back one by one, that which matters least first; the last ones matter most.

    Attributes:
        steps: from all features ablated to none.
    """

    steps: tuple[BackwardStep, ...]

    def frame(self) -> pd.DataFrame:
        """One row per step: accuracies with the ends of the intervals."""
        import pandas as pd

        return pd.DataFrame(
            {"kept": s.kept, "n_ablated": s.n_ablated, **_ends("label", s.label), **_ends("worst", s.worst),
             "worst_group": s.worst_group} for s in self.steps
        )  # fmt: skip


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class WhatIf(Shown):
    """Features of a study that can be ablated or kept; the probe stays as it is unless it is retrained.

    Accuracies are those of the study's table. They are of test texts: what looks best here was chosen on them.

    Attributes:
        study: the texts once read.
        nodes: features that can be toggled.
        ablated: those that are ablated to begin with.
    """

    study: ShiftStudy
    nodes: tuple[Node, ...]
    ablated: tuple[Node, ...]

    @checked
    def without(self, features: Iterable[str], *, retrain: bool = False) -> MethodRow:
        """Accuracies with these features ablated and all others kept.

        Exact on pooled activations where the only SAE is at the probe's site, else by running the model.

        Args:
            features: their names.
            retrain: fits the probe anew on training texts with the same ablation.

        Raises:
            UnknownNameError: for a feature that is none of these.
        """
        nodes = self._named(features)
        probe = self.study.refit(self.study.ablated(nodes, of="train")) if retrain else self.study.probe
        scorer = Scorer(self.study.task)
        prediction = Prediction((probe.predict(self.study.ablated(nodes, of="test")),), len(nodes))
        how = Method(name="what if", information="features that were chosen by hand", run=lambda _: prediction)
        scorer.add(how, prediction)
        return scorer.rows[0]

    def leave_one_out(self) -> LeftOut:
        """For each feature that is ablated to begin with what accuracy loses when it alone is kept.

        Raises:
            DegenerateInputError: if none is ablated.
        """
        if not self.ablated:
            raise DegenerateInputError("leave_one_out: no feature is ablated. Give what_if the features.")
        every = self._hits(self.ablated)
        conflict, roles = self._conflict(), []
        for node in self.ablated:
            kept = self._hits([other for other in self.ablated if other != node])
            of_conflict = None
            if conflict is not None and conflict.any():
                of_conflict = paired_difference(every[conflict], kept[conflict], unit="texts", within=SIGNED_SHARE)
            label = paired_difference(every, kept, unit="texts", within=SIGNED_SHARE)
            roles.append(FeatureRole(feature=str(node), label=label, conflict=of_conflict))
        return LeftOut(roles=tuple(sorted(roles, key=lambda role: -(role.conflict or role.label).value)))

    def backward(self) -> Backward:
        """Gives features back one by one: at each step the one without whose ablation the groups do best.

        Steps are chosen on half of the test texts of each group, by the mean accuracy of the groups, and measured on
        the other half.

        Raises:
            DegenerateInputError: if no feature is ablated, or a group has one text.
            MismatchError: if the probe does not read at the only SAE's site: every step would run the model.
        """
        if not self.ablated:
            raise DegenerateInputError("backward: no feature is ablated. Give what_if the features.")
        self._refuse_runs("backward")
        groups, chosen_on = self._groups(), self._half()
        measured = {name: rows & ~chosen_on for name, rows in groups.items()}
        left, steps = list(self.ablated), []

        def step(kept: str) -> BackwardStep:
            hits = self._hits(left)
            worst = min(measured, key=lambda name: float(hits[measured[name]].mean()))
            return BackwardStep(
                kept=kept, n_ablated=len(left), label=accuracy(hits[~chosen_on]), worst=accuracy(hits[measured[worst]]),
                worst_group=worst,
            )  # fmt: skip

        def goodness(node: Node) -> float:
            hits = self._hits([other for other in left if other != node])
            return float(np.mean([hits[rows & chosen_on].mean() for rows in groups.values()]))

        steps.append(step(""))
        while left:
            least = max(left, key=goodness)
            left.remove(least)
            steps.append(step(str(least)))
        return Backward(steps=tuple(steps))

    @checked
    def save_page(self, path: str | Path) -> Path:
        """Writes one HTML file that needs no network, on which features are toggled. Returns the path.

        Raises:
            MismatchError: if the probe does not read at the only SAE's site: the page can't run the model.
        """
        self._refuse_runs("save_page")
        task = self.study.task
        parts = self._parts(self.nodes)
        page = TogglePage(
            title=f"What if: {' or '.join(task.label_names)}", features=tuple(map(str, self.nodes)),
            ablated=tuple(map(str, self.ablated)), logits=self._logits().tolist(), parts=parts.tolist(),
            label=task.test.label, shortcut=task.expected(task.test) if task.spurious_names else None,
            groups=tuple(task.group_name(*group) for group in task.test.groups),
        )  # fmt: skip
        return write_atomic(path, toggle_html(page))

    def _named(self, features: Iterable[str]) -> list[Node]:
        names = {str(node): node for node in self.nodes}
        features = list(features)
        for name in features:
            require_known("feature that can be toggled:", name, list(names))
        return [node for name, node in names.items() if name in set(features)]

    def _refuse_runs(self, what: str) -> None:
        of_two_labels(self.study, what)
        if not self.study.reader.is_linear:
            raise MismatchError(
                f"{what}: the probe reads at {self.study.reader.probe_site} and the SAEs are at "
                f"{', '.join(self.study.reader.bases)}, so every choice of features needs a run of the model. Give one "
                "SAE at the probe's site, or call without(...) or leave_one_out()."
            )

    def _logits(self) -> np.ndarray:
        return of_two_labels(self.study, "what_if").logit(self.study.test.x).double().cpu().numpy()

    def _parts(self, nodes: Sequence[Node]) -> np.ndarray:
        """What each feature adds to the logit of each test text."""
        site, features = self.study.reader.probe_site, [node.feature for node in nodes]
        if not features:
            return np.zeros((len(self.study.test.texts), 0))
        basis, probe = self.study.reader.bases[site], of_two_labels(self.study, "what_if")
        acts = self.study.test.acts[site][:, features].double()
        writes = basis.rows(torch.tensor(features)).double().cpu() @ probe.w.double().cpu()
        return (acts.cpu() * writes).numpy()

    def _hits(self, nodes: Sequence[Node]) -> np.ndarray:
        """Whether each test text is classified rightly with these features ablated."""
        label = np.array(self.study.task.test.label)
        if self.study.reader.is_linear and isinstance(self.study.probe, Probe):
            return ((self._logits() - self._parts(nodes).sum(1)) > 0) == (label == 1)
        return self.study.probe.predict(self.study.ablated(list(nodes), of="test")).cpu().numpy() == label

    def _conflict(self) -> np.ndarray | None:
        task = self.study.task
        return np.array(task.expected(task.test)) != np.array(task.test.label) if task.spurious_names else None

    def _groups(self) -> dict[str, np.ndarray]:
        task = self.study.task
        names = np.array([task.group_name(*group) for group in task.test.groups])
        return {str(name): names == name for name in np.unique(names)}

    def _half(self) -> np.ndarray:
        """Every other text of each group.

        Raises:
            DegenerateInputError: if a group has one text.
        """
        half = np.zeros(len(self.study.task.test), dtype=bool)
        for name, rows in self._groups().items():
            if rows.sum() < 2:
                raise DegenerateInputError(f"backward: one test text of {name}, and two are needed. Give more texts.")
            half[np.flatnonzero(rows)[::2]] = True
        return half

    def _shown_facts(self) -> Mapping[str, object]:
        plain, now = self.without([]), self.without(map(str, self.ablated))
        return {
            "features": counted(len(self.nodes), "features"), "ablated to begin with": len(self.ablated),
            "label accuracy, nothing ablated": plain.label, "with them ablated": now.label,
            f"worst group, nothing ablated ({plain.worst_group})": plain.worst,
            f"with them ablated ({now.worst_group})": now.worst, "live": "without([...]), save_page(path)",
        }  # fmt: skip


@checked
def what_if(study: ShiftStudy, report: ShiftReport | Sequence[str]) -> WhatIf:
    """Accuracies while features are toggled.

    Args:
        study: the texts once read; see `read_study`.
        report: a study whose judged features can be toggled, those judged spurious being ablated to begin with; or the
            names of features, all ablated to begin with.

    Raises:
        MismatchError: if a feature is at a site of which the study has no SAE.
    """
    if isinstance(report, ShiftReport):
        names = [verdict.feature for verdict in report.verdicts]
        ablated = {verdict.feature for verdict in report.verdicts if verdict.decision == "spurious"}
    else:
        names, ablated = list(report), set(report)
    nodes = tuple(Node.of(name) for name in names)
    bases = study.reader.bases
    strange = [node for node in nodes if node.site not in bases or node.feature >= bases[node.site].d_sae]
    if strange:
        raise MismatchError(
            f"what_if: the study has no feature {strange[0]}; its SAEs are at {', '.join(bases)}. Give the study and "
            "the report of the same SAEs."
        )
    return WhatIf(study=study, nodes=nodes, ablated=tuple(node for node in nodes if str(node) in ablated))


def _ends(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
