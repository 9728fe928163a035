"""Rows with a label and, where known, an attribute; the groups that the two make; draws of equal size from each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import counted


@checked
@dataclass(frozen=True, eq=False)
class HeadRows(OneLine):
    """Features of texts with what is to be predicted, and the attribute that should not matter.

    Attributes:
        x: frozen features, such as mean activations at a site.
        label: class of each row, counted from 0.
        attribute: value of the attribute, counted from 0; None where nobody has labelled it.

    Raises:
        ShapeError: if they do not pair up.
        InvalidInputError: for negative labels or attributes, or non-finite features.
        DegenerateInputError: if fewer than two labels occur.
    """

    x: Float[Tensor, "rows d"]
    label: Int[Tensor, " labels"]
    attribute: Int[Tensor, " attributes"] | None = None

    def __post_init__(self) -> None:
        n_attributes = len(self) if self.attribute is None else len(self.attribute)
        if not len(self) == self.x.shape[0] == n_attributes:
            raise ShapeError(
                f"HeadRows: {counted(self.x.shape[0], 'rows')}, {counted(len(self), 'labels')}, "
                f"{counted(n_attributes, 'attributes')}; these must pair up."
            )
        for what, values in (("labels", self.label), ("attributes", self.attribute)):
            if values is not None and len(values) and int(values.min()) < 0:
                raise InvalidInputError(f"HeadRows: {what} down to {int(values.min())}; count them from 0.")
        if not bool(self.x.isfinite().all()):
            raise InvalidInputError(
                f"HeadRows: features of shape {tuple(self.x.shape)} hold non-finite values. Leave those rows out."
            )
        labels = self.label.unique().tolist()
        if len(labels) < 2:
            raise DegenerateInputError(
                f"HeadRows: {counted(len(self), 'rows')} with labels {first_few(labels) or 'none'}; a head needs two "
                "labels or more."
            )

    def __len__(self) -> int:
        return len(self.label)

    @property
    def n_labels(self) -> int:
        """How many classes there are, counted by the largest label."""
        return int(self.label.max()) + 1

    def take(self, rows: Int[np.ndarray, " chosen"]) -> HeadRows:
        """Some of the rows."""
        return HeadRows(self.x[rows], self.label[rows], None if self.attribute is None else self.attribute[rows])

    def arrays(self) -> tuple[Float[np.ndarray, "rows d"], Int[np.ndarray, " rows"]]:
        """Features in fp64 and labels, on the CPU."""
        return self.x.detach().double().cpu().numpy(), self.label.cpu().numpy()

    def groups(self, what: str) -> Groups:
        """The groups of these rows.

        Raises:
            InvalidInputError: if they have no attribute labels.
        """
        if self.attribute is None:
            raise InvalidInputError(
                f"{what} needs attribute labels, and these {len(self)} rows have none. Give attribute=..., or take a "
                "method that needs none, such as JTT."
            )
        return Groups(self.label.cpu().numpy(), self.attribute.cpu().numpy())


class Groups:
    """Rows by label and attribute: group `label * n_attributes + attribute`.

    Attributes:
        id: group of each row.
        n: rows of each group.
        label: label of each row.
        attribute: attribute of each row.
    """

    def __init__(self, label: Int[np.ndarray, " rows"], attribute: Int[np.ndarray, " rows"]) -> None:
        self.label, self.attribute = label, attribute
        self.n_attributes = int(attribute.max()) + 1
        self.id = label * self.n_attributes + attribute
        self.n = np.bincount(self.id, minlength=(int(label.max()) + 1) * self.n_attributes)

    @property
    def present(self) -> Int[np.ndarray, " groups"]:
        """Groups that have rows."""
        return np.flatnonzero(self.n)

    @property
    def is_minority(self) -> Bool[np.ndarray, " rows"]:
        """Rows whose attribute is not the most frequent one of their label."""
        by_label = self.n.reshape(-1, self.n_attributes)
        return self.attribute != by_label.argmax(axis=1)[self.label]

    @property
    def coincide(self) -> bool:
        """Whether each label has one attribute and each attribute one label (rho = 1)."""
        table = self.n.reshape(-1, self.n_attributes) > 0
        return bool((table.sum(0) <= 1).all() and (table.sum(1) <= 1).all())

    def weights(self) -> Float[np.ndarray, " rows"]:
        """`n / (G n_g)` for each row, G being the groups that have rows; their sum is n.

        >>> Groups(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])).weights()  # 4 / (3 * 2), 4 / (3 * 1)
        array([0.66666667, 0.66666667, 1.33333333, 1.33333333])
        """
        return len(self.id) / (len(self.present) * self.n[self.id])

    def balanced(self, random: np.random.Generator) -> Int[np.ndarray, " drawn"]:
        """Rows of a draw without replacement of as many rows from each group as the smallest one has."""
        size = int(self.n[self.present].min())
        drawn = [random.choice(np.flatnonzero(self.id == group), size, replace=False) for group in self.present]
        return np.sort(np.concatenate(drawn))

    def worst(self, hits: Bool[np.ndarray, " rows"]) -> float:
        """Smallest accuracy of a group."""
        return float(min(hits[self.id == group].mean() for group in self.present))

    def notes(self, of: str) -> tuple[str, ...]:
        """What keeps these groups from helping, in words; `of` says which rows they are."""
        if self.coincide:
            return (
                f"label and attribute determine each other in the {of} rows (rho = 1): the groups are the classes, and "
                "attribute labels add nothing",
            )
        empty = [divmod(int(group), self.n_attributes) for group in np.flatnonzero(self.n == 0)]
        if not empty:
            return ()
        listed = first_few((f"label {label} with attribute {attribute}" for label, attribute in empty), 4)
        return (f"a group has no member among the {of} rows ({listed}): it gets no weight",)
