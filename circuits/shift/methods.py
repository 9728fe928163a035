"""The methods of a SHIFT study, and their scores over the same balanced test rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from circuits.shift.deciders import Node
from circuits.shift.group_scores import cue_correlation
from circuits.shift.heads.base import Regime
from circuits.shift.needs import Need
from circuits.shift.rows import Comparison, MethodRow, OverDraws
from circuits.shift.task import Prediction, ShiftMethod, ShiftStudy, ShiftTask
from circuits.shift.words import delete_words
from workbench.controls.methods import Method, Role
from workbench.core.errors import DegenerateInputError
from workbench.core.stats import SHARE, SIGNED_SHARE, Estimate, paired_difference, sample_mean, wilson

Sets = Sequence[Sequence[Node]]


def ablation(
    name: str,
    information: str,
    sets: Callable[[ShiftStudy], Sets],
    roles: tuple[Role, Role],
    compared_with: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    *,
    is_random: bool = False,
    needs: tuple[Need, ...] = (),
    regime: Regime = "R0",
) -> tuple[ShiftMethod, ShiftMethod]:
    """Two methods: sets of features ablated with the probe as it is, and with the probe retrained.

    Args:
        name: of the first one.
        information: what the sets were chosen by.
        sets: features to ablate; several sets are averaged.
        roles: of both.
        compared_with: methods that each is compared with.
        is_random: whether the sets were drawn.
        needs: what the task must have.
        regime: what the choice of the sets may see.
    """

    def kept(study: ShiftStudy) -> Prediction:
        chosen = sets(study)
        draws = tuple(study.probe.predict(study.ablated(nodes, of="test")) for nodes in chosen)
        return Prediction(draws, len(chosen[0]), is_random)

    def retrained(study: ShiftStudy) -> Prediction:
        chosen = sets(study)
        draws = tuple(
            study.refit(study.ablated(nodes, of="train")).predict(study.ablated(nodes, of="test")) for nodes in chosen
        )
        return Prediction(draws, len(chosen[0]), is_random)

    return (
        Method(
            name=name, information=information, run=kept, role=roles[0], compared_with=compared_with[0], needs=needs,
            regime=regime,
        ),
        Method(
            name=f"{name} + retrain", information=information, run=retrained, role=roles[1],
            compared_with=compared_with[1], needs=needs, regime=regime,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class WithoutWords:
    """Deletes words; a value and no closure, so that equal tasks have equal methods."""

    words: frozenset[str]

    def __call__(self, study: ShiftStudy) -> Prediction:
        """The labels that a probe gives to texts without these words."""
        train, test = (
            study.reader.pooled([delete_words(text, self.words) for text in part.texts], "reading without words")
            for part in (study.train, study.test)
        )
        return Prediction((study.refit(train).predict(test),))


def words_deleted(name: str, words: Iterable[str]) -> ShiftMethod:
    """Deletes words from all texts, for tasks whose attribute can be listed."""
    information = "the word list; the probe is trained and tested on the shorter texts"
    return Method(name=name, information=information, run=WithoutWords(frozenset(words)), role="rival", regime="R0")


def _original(study: ShiftStudy) -> Prediction:
    return Prediction((study.probe.predict(study.test.x),))


def _swap_direction_removed(study: ShiftStudy) -> Prediction:
    """The mean difference between values of the attribute that go with label 0 and 1, projected out.

    Over training texts and their swapped versions.
    """
    task = study.task
    if len(task.label_names) > 2 and len(task.spurious_names) > 2:
        raise DegenerateInputError(
            f"of {len(task.spurious_names)} values of the attribute and {len(task.label_names)} labels none are "
            "opposite. Give two labels, or two values."
        )
    sides = task.expected(task.train) if len(task.label_names) == 2 else task.train.spurious or ()
    sign = 2.0 * torch.tensor(sides).to(study.train.x) - 1.0
    direction = (sign[:, None] * (study.train.x - study.swapped.x)).mean(0)
    if not bool(direction.norm() > 0):
        raise DegenerateInputError(
            "shift: the swapped texts equal the training texts at the probe's site. Swap the attribute's words."
        )
    unit = direction / direction.norm()
    train, test = (x - (x @ unit)[:, None] * unit for x in (study.train.x, study.test.x))
    return Prediction((study.refit(train).predict(test),))


def _oracle_probe(study: ShiftStudy) -> Prediction:
    assert study.task.balanced is not None
    return Prediction((study.refit(study.balanced.x, study.task.balanced.label).predict(study.test.x),))


ORIGINAL: ShiftMethod = Method(name="original", information="nothing else", run=_original, role="start", regime="R0")
SWAP_DIRECTION_REMOVED: ShiftMethod = Method(
    name="swap direction removed", run=_swap_direction_removed, role="rival",
    information="the swapped texts: their mean difference, projected out; probe retrained", needs=("twins",),
    regime="R0",
)  # fmt: skip
ORACLE_PROBE: ShiftMethod = Method(
    name="oracle probe", information="label of balanced training rows", run=_oracle_probe, role="bound",
    needs=("balanced",), regime="R1",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Cue:
    """The attribute of the test rows, and which labels it goes with in training."""

    value: np.ndarray
    expected: np.ndarray
    together: np.ndarray
    usual: np.ndarray

    @classmethod
    def of(cls, task: ShiftTask) -> _Cue:
        expected = np.array(task.expected(task.test))
        return cls(np.array(task.test.spurious), expected, task.together(), task.usual())

    def agrees(self, labels: np.ndarray) -> np.ndarray:
        """Whether each row's label goes with its attribute."""
        return labels == self.expected if len(self.usual) == 2 else self.together[labels, self.value]

    def pair(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attribute and labels in the same terms, of which the correlation is taken."""
        is_few = len(self.usual) == 2 or self.together.shape[1] > len(self.usual)
        return (self.expected, labels) if is_few else (self.value, self.usual[labels])


class Scorer:
    """Collects predictions per method and turns them into accuracies with intervals.

    Attributes:
        rows: one per method, in order.
        predicted: labels that each predicts, by its name; several draws of a random one.
    """

    def __init__(self, task: ShiftTask) -> None:
        self._label = np.array(task.test.label)
        self._cue = _Cue.of(task) if task.spurious_names else None
        groups = np.array([task.groups().index(group) for group in task.test.groups])
        self._groups = {task.group_name(*group): groups == i for i, group in enumerate(task.groups())}
        self._hits: dict[str, np.ndarray] = {}
        self._by_draw: dict[str, np.ndarray] = {}
        self.rows: list[MethodRow] = []
        self.predicted: dict[str, np.ndarray] = {}

    def add(self, method: ShiftMethod, prediction: Prediction, seconds: float = 0.0) -> None:
        """One method. Draws of a random one are averaged per row, and per draw for another interval."""
        drawn = self.predicted[method.name] = np.stack([np.asarray(p.cpu()) for p in prediction.draws])
        every_hit, every_agreement = drawn == self._label, self._agreement(drawn)
        hits = every_hit.mean(axis=0)
        self._hits[method.name] = hits
        groups = self._groups
        worst = min(groups, key=lambda group: float(hits[groups[group]].mean()))
        over_draws = None
        if prediction.is_random:
            self._by_draw[method.name] = every_hit.mean(axis=1)
            over_draws = OverDraws(
                label=_over_draws(every_hit), worst=_over_draws(every_hit[:, groups[worst]]),
                spurious=None if every_agreement is None else _over_draws(every_agreement),
            )  # fmt: skip
        self.rows.append(
            MethodRow(
                name=method.name, information=method.information, role=method.role, n_features=prediction.n_features,
                label=accuracy(hits), worst=accuracy(hits[groups[worst]]), worst_group=worst, over_draws=over_draws,
                spurious=None if every_agreement is None else accuracy(every_agreement.mean(axis=0)),
                regime=prediction.regime or method.regime, cue_mcc=self._correlation(drawn),
                n_attribute_labels=prediction.n_attribute_labels, notes=prediction.notes, seconds=seconds,
            )
        )  # fmt: skip

    def compare(self, better: str, other: str) -> Comparison:
        """Paired difference in label accuracy, over all rows, over those that break the correlation, and over draws."""
        conflict = None if self._cue is None else ~self._cue.agrees(self._label)
        a, b, draws = self._hits[better], self._hits[other], self._by_draw.get(other)
        has_conflict = conflict is not None and conflict.any()
        return Comparison(
            better,
            other,
            paired_difference(a, b, unit="texts", within=SIGNED_SHARE),
            paired_difference(a[conflict], b[conflict], unit="texts", within=SIGNED_SHARE) if has_conflict else None,
            None if draws is None else sample_mean(a.mean() - draws, unit="draws", within=SIGNED_SHARE),
        )

    def _correlation(self, drawn: np.ndarray) -> Estimate | None:
        """Of the label that the attribute goes with and the prediction; over draws where there are several."""
        if self._cue is None:
            return None
        if len(drawn) == 1:
            return cue_correlation(*self._cue.pair(drawn[0]))
        values = [cue_correlation(*self._cue.pair(one)).value for one in drawn]
        return sample_mean(np.array(values), unit="draws", within=SIGNED_SHARE)

    def _agreement(self, drawn: np.ndarray) -> np.ndarray | None:
        """Whether each prediction is a label that goes with the row's attribute in training."""
        return None if self._cue is None else np.stack([self._cue.agrees(one) for one in drawn])


def _over_draws(drawn: np.ndarray) -> Estimate:
    """The share of rows, over draws."""
    return sample_mean(drawn.mean(axis=1), unit="draws", within=SHARE)


def accuracy(hits: np.ndarray) -> Estimate:
    """Share of hits: Wilson for single draws, `sample_mean` for averages of several.

    >>> accuracy(np.array([1.0, 0.0])).value, accuracy(np.array([0.5, 0.5])).method
    (0.5, "Student's t")
    """
    if np.isin(hits, (0.0, 1.0)).all():
        return wilson(int(hits.sum()), len(hits), unit="texts")
    return sample_mean(hits, unit="texts", within=SHARE)
