"""What a SHIFT study is about: its texts, what is read off them, and the methods that a task brings along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from torch import Tensor

from circuits.shift.columns import HUB_COLUMNS, SPLIT_COLUMN, Choice, Columns, csv_frame, read_table, records_frame
from circuits.shift.deciders import Decider, Node
from circuits.shift.evidence import PooledTexts, Reader
from circuits.shift.groups import going_together, require_names, shortcut_of, usual_value
from circuits.shift.multiclass import AnyProbe, probe_of
from circuits.shift.needs import NEEDS, Need
from circuits.shift.options import ShiftOptions
from circuits.shift.splits import split_table
from circuits.shift.strength import SplitOptions
from circuits.shift.texts import Group, LabelledTexts
from workbench.activations.sources import HubDataset
from workbench.controls.methods import Method
from workbench.core.arguments import checked
from workbench.core.display import OneLine, clipped, first_few
from workbench.core.errors import DegenerateInputError, MismatchError, ShapeError, require_known
from workbench.core.html import Shown, frame_table
from workbench.core.numbers import number
from workbench.core.records import json_lines

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True, kw_only=True)
class ShiftTask(Shown):
    """Everything that a SHIFT study reads.

    Attributes:
        name: for people.
        label_names: names of label 0, 1, ...
        spurious_names: names of the spurious attribute's values 0, 1, ...; () if the attribute is not known.
        train: the training texts, in which attribute and label go together; the only labels that the method sees.
        swapped: each training text with the other value of the attribute and all else equal, in the same order.
        balanced: training rows in which the two are independent; only for oracles and skylines.
        test: held-out rows of all groups; only for evaluation.
        spurious_words: words that give the attribute away.
        target_words: words that belong to the label.
        methods: other ways to the same end that this task allows, such as `words_deleted`.
        notes: how the task was made, in sentences; a report repeats them.

    Raises:
        ShapeError: if `swapped` does not pair up with `train`.
        MismatchError: if labels or attributes have no name, or only some of the sets have the attribute.
        DegenerateInputError: if one of the groups is missing from `balanced` or `test`.
    """

    name: str
    label_names: tuple[str, ...]
    spurious_names: tuple[str, ...] = ()
    train: LabelledTexts
    swapped: tuple[str, ...] | None = None
    balanced: LabelledTexts | None = None
    test: LabelledTexts
    spurious_words: frozenset[str] = frozenset()
    target_words: frozenset[str] = frozenset()
    methods: tuple[ShiftMethod, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.swapped is not None and len(self.swapped) != len(self.train):
            raise ShapeError(
                f"ShiftTask: {len(self.swapped)} swapped texts for {len(self.train)} training texts; must pair up."
            )
        for name, rows in self.sets().items():
            require_names(name, rows, self.label_names, self.spurious_names)
            missing = sorted(set(self.groups()) - set(rows.groups)) if name != "train" else []
            if missing:
                raise DegenerateInputError(
                    f"ShiftTask: {name} has no row with (label, attribute) in {missing}; needs all "
                    f"{len(self.groups())}: give rows of {first_few(self.group_name(*group) for group in missing)}."
                )

    @classmethod
    def from_frame(
        cls,
        df: pd.DataFrame,
        *,
        text: str,
        label: str,
        attribute: str | None = None,
        split: str | None = None,
        twin: str | None = None,
        classes: Choice = None,
        attributes: Choice = None,
        spurious_words: Iterable[str] = (),
        target_words: Iterable[str] = (),
        name: str = "table",
        options: SplitOptions | None = None,
    ) -> ShiftTask:
        """A task from a table with one row per text.

        Texts that are equal but for case and white space, and texts with their twins, are never in two splits.

        Args:
            df: the table.
            text: column of the texts.
            label: column of the labels, two or more.
            attribute: column of the spurious attribute, if it is known.
            split: column that says "train", "test" or "dev"; rows of "dev" are for oracles. By default rows are split
                here, stratified by group.
            twin: column with each text after the attribute was swapped, all else equal; "" outside of training.
            classes: labels that are used, in their order; with names if it is a mapping. Other rows are left out.
            attributes: the same for the attribute.
            spurious_words: words that give the attribute away.
            target_words: words that belong to the label.
            name: for people.
            options: how rows are split, and which are used.

        Raises:
            UnknownNameError: if a column, a class or a split does not exist.
            InvalidInputError: if a value is missing, a text is empty, or a text is in two splits.
            DegenerateInputError: if there is one class, or a group is empty.
        """
        table = read_table(
            df, text=text, label=label, attribute=attribute, split=split, twin=twin, classes=classes,
            attributes=attributes,
        )  # fmt: skip
        parts = split_table(table, options or SplitOptions())
        return cls(
            name=name, label_names=table.label.names,
            spurious_names=() if table.attribute is None else table.attribute.names,
            train=parts.train, swapped=parts.swapped, balanced=parts.balanced, test=parts.test, notes=parts.notes,
            spurious_words=frozenset(spurious_words), target_words=frozenset(target_words),
        )  # fmt: skip

    @classmethod
    def from_csv(cls, path: str | Path, **columns: Unpack[Columns]) -> ShiftTask:
        """A task from a file with a header, separated by commas (by tabs if its name ends in .tsv); see `from_frame`.

        Raises:
            MissingFileError: if there is no such file.
            CorruptFileError: if a quote is not closed, or a row has more values than the header.
        """
        return _named(cls, csv_frame(path), Path(path).name, columns)

    @classmethod
    def from_jsonl(cls, path: str | Path, **columns: Unpack[Columns]) -> ShiftTask:
        """A task from a file with one JSON object per line; see `from_frame`.

        Raises:
            MissingFileError: if there is no such file.
            CorruptFileError: naming the first line that is not a JSON object.
        """
        return _named(cls, records_frame(json_lines(path)), Path(path).name, columns)

    @classmethod
    def from_hub(
        cls,
        dataset: str,
        *,
        splits: Sequence[str] = ("train", "test"),
        limit: int | None = None,
        revision: str | None = None,
        **columns: Unpack[Columns],
    ) -> ShiftTask:
        """A task from a data set of the Hugging Face hub, or from a folder of one; see `from_frame`.

        Only data is read, never code of the data set. What `HUB_COLUMNS` holds for a data set need not be given:
        `ShiftTask.from_hub("LabHC/bias_in_bios", options=SplitOptions(rho=1.0))` is professor or nurse with gender.

        Args:
            dataset: id on the hub, or a folder.
            splits: splits that are read, each with a name that `from_frame` knows.
            limit: only the first rows of each split.
            revision: version of the data set; name one for a result that can be made again.
            columns: columns and options as in `from_frame`, but `split`.

        Raises:
            InvalidInputError: if the data set can't be read, or the hub can't be reached.
        """
        rows = [
            {**record, SPLIT_COLUMN: split}
            for split in splits
            for record in islice(HubDataset(dataset, split, revision=revision).records(), limit)
        ]
        known = HUB_COLUMNS.get("/".join(Path(dataset).parts[-2:]), {})
        return _named(cls, records_frame(rows), dataset, {**known, **columns, "split": SPLIT_COLUMN})

    def sets(self) -> dict[str, LabelledTexts]:
        """The sets of texts by name; without `balanced` if there is none."""
        sets = {"train": self.train, "balanced": self.balanced, "test": self.test}
        return {name: rows for name, rows in sets.items() if rows is not None}

    def groups(self) -> tuple[Group, ...]:
        """Every label with every value of the attribute."""
        values = range(len(self.spurious_names)) if self.spurious_names else (None,)
        return tuple((label, value) for label in range(len(self.label_names)) for value in values)

    def group_name(self, label: int, spurious: int | None = None) -> str:
        """Name of a group, such as "female professor"."""
        attribute = "" if spurious is None else f"{self.spurious_names[spurious]} "
        return f"{attribute}{self.label_names[label]}"

    def missing(self) -> dict[str, str]:
        """What methods may need and the task does not have, with the reason in words."""
        has: dict[Need, bool] = {
            "twins": self.swapped is not None and bool(self.spurious_names),
            "words": bool(self.spurious_words) and bool(self.target_words),
            "attribute": bool(self.spurious_names),
            "balanced": self.balanced is not None and bool(self.spurious_names),
        }
        return {need: NEEDS[need] for need, there in has.items() if not there}

    def shortcut(self) -> tuple[int, ...]:
        """The label that each value of the attribute goes with in training: the one that it makes most likelier.

        Where attribute and label are independent, value 0 goes with label 0, value 1 with label 1, and so on.
        """
        return shortcut_of(self.train, len(self.label_names), len(self.spurious_names))

    def together(self) -> Bool[np.ndarray, "labels values"]:
        """Which labels each value of the attribute makes likelier in training."""
        return going_together(self.train, len(self.label_names), len(self.spurious_names))

    def usual(self) -> Int[np.ndarray, " labels"]:
        """For each label the value of the attribute that goes with it in training."""
        return usual_value(self.train, len(self.label_names), len(self.spurious_names))

    def expected(self, rows: LabelledTexts) -> tuple[int, ...]:
        """For each text the label that its attribute goes with in training.

        Raises:
            MismatchError: if the attribute is not known.
        """
        if rows.spurious is None:
            raise MismatchError(f"expected: {NEEDS['attribute']}. Give a task that has it.")
        shortcut = self.shortcut()
        return tuple(shortcut[value] for value in rows.spurious)

    def one_against_rest(self, positive: str) -> ShiftTask:
        """The task of two labels: this one is label 1, all others are label 0.

        Raises:
            UnknownNameError: if there is no such label.
        """
        require_known("label", positive, self.label_names)
        chosen = self.label_names.index(positive)

        def against(rows: LabelledTexts) -> LabelledTexts:
            return replace(rows, label=tuple(int(label == chosen) for label in rows.label))

        return replace(
            self, label_names=(f"not {positive}", positive), train=against(self.train), test=against(self.test),
            balanced=None if self.balanced is None else against(self.balanced),
        )  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """The sizes: one row per set and group."""
        import pandas as pd

        rows = [
            {"set": name, "label": self.label_names[label],
             "attribute": None if value is None else self.spurious_names[value], "n": n}
            for name, texts in self.sets().items() for (label, value), n in texts.counts().items()
        ]  # fmt: skip
        return pd.DataFrame(rows) if self.spurious_names else pd.DataFrame(rows).drop(columns="attribute")

    def _shown_line(self) -> str:
        attribute = f", attribute {first_few(self.spurious_names, 3)}" if self.spurious_names else ""
        sizes = ", ".join(f"{name} {number(len(rows))}" for name, rows in self.sets().items())
        extras = [name for name, there in (("twins", self.swapped), ("words", self.spurious_words)) if there]
        return clipped(
            f"{clipped(self.name, 80)}: labels {first_few(self.label_names, 3)}{attribute}; {sizes}"
            + "".join(f", {name}" for name in extras),
            220,
        )

    def _shown_parts(self) -> Iterable[Markup]:
        yield frame_table(self.frame(), caption=clipped(" ".join(self.notes), 1_000))


def _named(cls: type[ShiftTask], df: pd.DataFrame, name: str, columns: Columns) -> ShiftTask:
    return cls.from_frame(df, **{"name": name, **columns})


T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """What was chosen for ablation.

    Attributes:
        by: the judge.
        chosen: features that the judge calls spurious.
        oracle: those that the oracle judge calls spurious; none without balanced rows.
        draws: sets of random features, matched to `chosen`.
    """

    by: Decider
    chosen: tuple[Node, ...]
    oracle: tuple[Node, ...]
    draws: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftStudy(OneLine):
    """What every method of a SHIFT study may use: the texts once read, and the probe that is to be repaired.

    Attributes:
        task: labels and words.
        options: of the study.
        reader: model, bases, and the tokens that are pooled and edited.
        train: the ambiguous training texts.
        test: the test texts.
        others: the twins of the training texts, and balanced training texts, where the task has them.
        probe: fitted on `train`.
        judged: what was chosen for ablation; None until it is.
    """

    task: ShiftTask
    options: ShiftOptions
    reader: Reader
    train: PooledTexts
    test: PooledTexts
    others: Mapping[Need, PooledTexts]
    probe: AnyProbe
    judged: Judged | None = None
    _once: dict[object, object] = field(default_factory=dict, repr=False)

    @property
    def swapped(self) -> PooledTexts:
        """The training texts with the other value of the attribute, for methods that need "twins"."""
        return self._other("twins")

    @property
    def balanced(self) -> PooledTexts:
        """Balanced training texts, for methods that need "balanced"."""
        return self._other("balanced")

    def _other(self, need: Need) -> PooledTexts:
        if need not in self.others:
            raise MismatchError(f"ShiftStudy: {NEEDS[need]}. Give a method that reads it needs=({need!r},).")
        return self.others[need]

    def along(self, need: Need) -> ShiftStudy:
        """The same study with the bases that were read along, such as "neurons", in place of the SAEs."""
        return replace(
            self, reader=replace(self.reader, bases=self.reader.along[need], along={}), train=self.train.along(need),
            test=self.test.along(need), others={name: texts.along(need) for name, texts in self.others.items()},
            judged=None, _once={},
        )  # fmt: skip

    def refit(self, x: Float[Tensor, "rows d"], labels: Sequence[int] | None = None) -> AnyProbe:
        """A probe on other activations; with the labels of the ambiguous set by default."""
        labels = self.task.train.label if labels is None else labels
        return probe_of(x, labels, self.reader.probe_site, replace(self.options.probe, folds=0))

    def ablated(self, nodes: Sequence[Node], *, of: str) -> Float[Tensor, "rows d"]:
        """Activations of the `"train"` or `"test"` texts with features ablated; computed once."""
        pooled = self.train if of == "train" else self.test
        return self.once((of, tuple(nodes)), lambda: self.reader.ablated(pooled, nodes))

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, made once per study, for methods that share it."""
        if key not in self._once:
            self._once[key] = make()
        return cast(T, self._once[key])


@dataclass(frozen=True, eq=False)
class Prediction(OneLine):
    """What a method predicts for the test texts.

    Attributes:
        draws: labels; several for a method that is random.
        n_features: how many features it ablates.
        is_random: whether other draws would predict something else.
        regime: what it saw, if that depends on the task; else that of the method.
        n_attribute_labels: rows whose attribute label it used.
        notes: cases in which the method can't do what it is for, in words.
    """

    draws: tuple[Int[Tensor, " rows"], ...]
    n_features: int = 0
    is_random: bool = False
    regime: str | None = None
    n_attribute_labels: int = 0
    notes: tuple[str, ...] = ()


ShiftMethod = Method[ShiftStudy, Prediction]
