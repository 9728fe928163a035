"""INLP: projects out one linear classifier after another until none is better than the majority."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import counted, number, setting
from workbench.probes.erase.eraser import Eraser, eraser_of
from workbench.probes.erase.moments import ClassMoments


@checked
@dataclass(frozen=True, kw_only=True)
class INLPOptions(OneLine):
    """How INLP is fitted.

    Attributes:
        margin: it stops once the accuracy of a new classifier is at most the majority's share and this.
        max_rounds: it gives up after so many classifiers.
        ridge: added to the covariance within the classes, as a share of its mean variance.
    """

    margin: float = 0.0
    max_rounds: int = 100
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.margin < 0 or self.ridge <= 0 or self.max_rounds < 1:
            raise InvalidInputError(
                f"INLPOptions(margin={setting(self.margin)}, max_rounds={self.max_rounds}, "
                f"ridge={setting(self.ridge)}): give a margin of 0 or more, 1 round or more, a ridge above 0."
            )


@checked
def fit_inlp(
    moments: ClassMoments,
    x: Float[Tensor, "rows d"],
    labels: Int[Tensor, " labels"],
    options: INLPOptions | None = None,
) -> Eraser:
    """The orthogonal projection that leaves linear classifiers of a concept at the majority.

    Each round fits a linear discriminant to the classes in what is left of the space, from the moments alone, and
    removes the directions that it reads: one less than there are classes. The name of the result says how many rounds
    it took; `rank` how many dimensions.

    Args:
        moments: of the classes, which the classifiers are fitted on.
        x: held-out rows that decide when to stop.
        labels: their classes.
        options: when to stop.

    Raises:
        ShapeError: if rows, labels and moments do not fit each other.
        DegenerateInputError: if a class has no rows, no classifier beats the majority to begin with, or the majority
            is not reached.

    Source: Ravfogel et al. 2020 (arXiv 2004.07667). Departure: the classifier is a ridge discriminant, which needs
    covariances and no rows; the paper trains an SVM or a logistic regression.
    """
    options = options or INLPOptions()
    moments.require_classes("fit_inlp")
    if len(x) != len(labels) or x.shape[1] != moments.width or not len(labels):
        raise ShapeError(
            f"fit_inlp: held-out rows {tuple(x.shape)} and {counted(len(labels), 'labels')} for moments of width "
            f"{moments.width}; give at least one row, a label for each, of the same width."
        )
    rows, labels = x.to(moments.means), labels.to(moments.n.device)
    majority = float(torch.bincount(labels).max()) / len(labels)
    removed, hit = rows.new_zeros(0, moments.width), 1.0
    for done in range(options.max_rounds + 1):
        weight, bias = _discriminant(moments, removed, options.ridge)
        hit = float(((rows @ weight.T + bias).argmax(1) == labels).double().mean())
        if hit <= majority + options.margin:
            return _eraser(moments, removed, done, hit, majority)
        new = torch.linalg.svd(weight[1:] - weight[0], full_matrices=False)
        directions = new.Vh[new.S[0] * 1e-10 < new.S]
        if done == options.max_rounds or len(removed) + len(directions) >= moments.width:
            break
        removed = torch.cat([removed, directions])
    raise DegenerateInputError(
        f"fit_inlp: after removing {len(removed)} of {moments.width} dimensions a classifier still has accuracy "
        f"{number(hit)} on the held-out rows; the majority has {number(majority)}. Allow a larger margin or more "
        "rounds."
    )


def _eraser(moments: ClassMoments, removed: Tensor, rounds: int, accuracy: float, majority: float) -> Eraser:
    if not rounds:
        raise DegenerateInputError(
            f"fit_inlp: a linear classifier has accuracy {number(accuracy)} on the held-out rows and the majority "
            f"{number(majority)}, so there is nothing to remove. Check the labels."
        )
    basis = torch.linalg.qr(removed.T).Q.T.contiguous()
    name = f"INLP after {counted(rounds, 'classifiers')}"
    return eraser_of(name, moments, basis, basis)


def _discriminant(moments: ClassMoments, removed: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weights and biases of the linear discriminant of the classes in the complement of the removed directions."""
    identity = torch.eye(moments.width).to(removed)
    left = identity - removed.T @ removed
    within = left @ moments.within @ left
    size = within.trace() / moments.width
    means = moments.means @ left
    weight = torch.linalg.solve(within + ridge * size * identity, means.T).T @ left
    return weight, moments.shares.log() - 0.5 * (weight * means).sum(1)
