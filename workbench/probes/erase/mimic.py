"""MiMiC and MiMiC+: rows of one class get the mean and the covariance of another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import number, setting
from workbench.probes.erase.eraser import Transport, transport_of
from workbench.probes.erase.moments import ClassMoments

PUBLISHED_ALPHA = 2.0
"""The `alpha` of MiMiC+."""


@checked
def fit_mimic(moments: ClassMoments, source: int, target: int, *, alpha: float = 0.0, ridge: float = 0.0) -> Transport:
    """The optimal transport between two classes taken as Gaussians.

    `x' = mu_t + A (x - mu_s) + alpha (mu_t - mu_s)` with `A = S_s^(-1/2) (S_s^(1/2) S_t S_s^(1/2))^(1/2) S_s^(-1/2)`.

    Args:
        moments: of the classes.
        source: class that is moved.
        target: class to which it is moved.
        alpha: 0 is MiMiC; above 0 MiMiC+, which goes past the target's mean (2 in the paper).
        ridge: added to the diagonal of both covariances. With 0 the moved rows have the target's mean and covariance
            exactly, which takes more rows of the source than dimensions.

    Raises:
        InvalidInputError: if source and target are not two of the classes, or for a negative ridge.
        DegenerateInputError: if one of them has no rows, or the source's covariance is singular and `ridge` is 0.

    Source: Singh et al. 2024 (arXiv 2402.09631); alpha and a ridge of 1e-7 as in the code of Avitan et al. (arXiv
    2402.11355). Departure: no ridge unless asked for.
    """
    n = moments.n.tolist()
    if source == target or not {source, target} <= set(range(len(n))):
        raise InvalidInputError(
            f"fit_mimic(source={source}, target={target}): give two different classes of 0 to {len(n) - 1}."
        )
    if ridge < 0:
        raise InvalidInputError(f"fit_mimic(ridge={setting(ridge)}): give 0 or more.")
    if min(n[source], n[target]) == 0:
        raise DegenerateInputError(
            f"fit_mimic: classes {source} and {target} have {n[source]} and {n[target]} rows; both need rows."
        )
    identity = torch.eye(moments.width).to(moments.means)
    s, t = (moments.covariance_of(label) + ridge * identity for label in (source, target))
    mu_s, mu_t = moments.means[source], moments.means[target]
    name = f"MiMiC+ with alpha {setting(alpha)}" if alpha else "MiMiC"
    return transport_of(name, moments, source, target, _optimal(s, t, n[source]), mu_t + alpha * (mu_t - mu_s))


def _optimal(s: Float[Tensor, "d d"], t: Float[Tensor, "d d"], n: int) -> Float[Tensor, "d d"]:
    variances, axes = torch.linalg.eigh(s)
    floor = variances[-1] * len(s) * torch.finfo(s.dtype).eps
    if not bool(variances[0] > floor):
        raise DegenerateInputError(
            f"fit_mimic: the source's covariance has {int((variances > floor).sum())} of {len(s)} dimensions with "
            f"variance ({n} rows; the largest is {number(float(variances[-1]))}), so its root has no inverse. Give "
            "more rows of the source than dimensions, or a ridge such as 1e-7 times that."
        )
    root, inverse = ((axes * power) @ axes.T for power in (variances.sqrt(), variances.rsqrt()))
    middle, turned = torch.linalg.eigh(_symmetric(root @ t @ root))
    return _symmetric(inverse @ ((turned * middle.clamp_min(0).sqrt()) @ turned.T) @ inverse)


def _symmetric(x: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return (x + x.T) / 2
