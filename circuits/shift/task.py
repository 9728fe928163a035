"""What a SHIFT study is about: its texts, what is read off them, and the methods that a task brings along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.shift.deciders import Node
from circuits.shift.evidence import PooledTexts, Reader
from workbench.controls.methods import Method
from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import counted
from workbench.probes.linear import Probe, ProbeOptions, fit_probe

Pair = tuple[str, str]


@checked
@dataclass(frozen=True)
class LabelledTexts(OneLine):
    """Texts with the wanted label and the spurious attribute, both 0 or 1.

    Raises:
        ShapeError: if texts, labels and attributes do not pair up.
        InvalidInputError: for other values than 0 and 1.
    """

    texts: tuple[str, ...]
    label: tuple[int, ...]
    spurious: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.label) == len(self.spurious):
            raise ShapeError(
                f"LabelledTexts: {counted(len(self.texts), 'texts')}, {counted(len(self.label), 'labels')}, "
                f"{counted(len(self.spurious), 'attributes')}; these must pair up."
            )
        other = sorted((set(self.label) | set(self.spurious)) - {0, 1})
        if other:
            raise InvalidInputError(f"LabelledTexts: labels and attributes are 0 or 1; got {other}.")
        if set(self.label) != {0, 1}:
            raise DegenerateInputError(
                f"LabelledTexts: {len(self.texts)} texts with labels {first_few(sorted(set(self.label)))}; needs both."
            )

    def __len__(self) -> int:
        return len(self.texts)


@checked
@dataclass(frozen=True, kw_only=True)
class ShiftTask(OneLine):
    """Everything that a SHIFT study reads.

    Attributes:
        name: for people.
        label_names: names of label 0 and 1.
        spurious_names: names of the spurious attribute's values 0 and 1.
        train: the ambiguous set, in which attribute and label go together; the only labels that the method sees.
        swapped: each training text with the other value of the attribute and all else equal, in the same order.
        balanced: training rows in which the two are independent; only for oracles and skylines.
        test: held-out rows of all four groups; only for evaluation.
        spurious_words: words that give the attribute away.
        target_words: words that belong to the label.
        methods: other ways to the same end that this task allows, such as `words_deleted`.

    Raises:
        ShapeError: if `swapped` does not pair up with `train`.
        DegenerateInputError: if one of the four groups is missing from `balanced` or `test`.
    """

    name: str
    label_names: Pair
    spurious_names: Pair
    train: LabelledTexts
    swapped: tuple[str, ...]
    balanced: LabelledTexts
    test: LabelledTexts
    spurious_words: frozenset[str]
    target_words: frozenset[str]
    methods: tuple[ShiftMethod, ...] = ()

    def __post_init__(self) -> None:
        if len(self.swapped) != len(self.train):
            raise ShapeError(
                f"ShiftTask: {len(self.swapped)} swapped texts for {len(self.train)} training texts; must pair up."
            )
        for name, rows in (("balanced", self.balanced), ("test", self.test)):
            groups = set(zip(rows.label, rows.spurious, strict=True))
            if len(groups) < 4:
                missing = sorted({(a, b) for a in (0, 1) for b in (0, 1)} - groups)
                raise DegenerateInputError(
                    f"ShiftTask: {name} has no row with (label, attribute) in {missing}; needs all four."
                )

    def group_name(self, label: int, spurious: int) -> str:
        """Name of a group, such as "female professor"."""
        return f"{self.spurious_names[spurious]} {self.label_names[label]}"


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftStudy:
    """What every method of a SHIFT study may use: the texts once read, and the probe that is to be repaired.

    Attributes:
        task: labels and words.
        reader: model, bases, and the tokens that are pooled and edited.
        train: the ambiguous training texts.
        swapped: the same with the other value of the attribute.
        balanced: balanced training texts, for methods that say so.
        test: the balanced test texts.
        probe: fitted on `train`.
        probe_options: how probes are fitted.
    """

    task: ShiftTask
    reader: Reader
    train: PooledTexts
    swapped: PooledTexts
    balanced: PooledTexts
    test: PooledTexts
    probe: Probe
    probe_options: ProbeOptions
    _ablated: dict[tuple[str, tuple[Node, ...]], Tensor] = field(default_factory=dict, repr=False)

    def refit(self, x: Float[Tensor, "rows d"], labels: Sequence[int] | None = None) -> Probe:
        """A probe on other activations; with the labels of the ambiguous set by default."""
        labels = self.task.train.label if labels is None else labels
        return fit_probe(x, torch.tensor(labels), self.reader.probe_site, options=replace(self.probe_options, folds=0))

    def ablated(self, nodes: Sequence[Node], *, of: str) -> Float[Tensor, "rows d"]:
        """Activations of the `"train"` or `"test"` texts with features ablated; computed once."""
        key = (of, tuple(nodes))
        if key not in self._ablated:
            self._ablated[key] = self.reader.ablated(self.train if of == "train" else self.test, nodes)
        return self._ablated[key]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method predicts for the test texts.

    Attributes:
        draws: labels; several for a method that is random.
        n_features: how many features it ablates.
        is_random: whether other draws would predict something else.
    """

    draws: tuple[Int[Tensor, " rows"], ...]
    n_features: int = 0
    is_random: bool = False


ShiftMethod = Method[ShiftStudy, Prediction]
