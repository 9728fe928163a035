"""Principal components of activations as features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases.base import Dictionary
from workbench.bases.fits import ModelLike
from workbench.bases.registry import BASES
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.hooks.sites import Site


@BASES.register("pca")
def pca(
    model: ModelLike, site: Site, x: Float[Tensor, "n d"] | Iterable[Float[Tensor, "n d"]], k: int | None = None
) -> Dictionary:
    """Principal components, largest variance first; an activation is the centred token along a component.

    Moments are summed in fp64. The constant is the mean; the error is what the left-out components hold, rounding alone
    if all are kept. The largest entry of each component is positive.

    Args:
        model: the model.
        site: the site.
        x: activations to fit, or parts of them, as `store.read(site)` gives.
        k: how many components; None takes all.

    Raises:
        DegenerateInputError: for fewer than two activations.
        ShapeError: for activations of another width than the site.
        InvalidInputError: for k out of range.
    """
    d = model.width(site)
    n, total, moments = 0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for part in [x] if isinstance(x, Tensor) else x:
        if part.ndim != 2 or part.shape[1] != d:
            raise ShapeError(f"basis('pca', x={tuple(part.shape)}): {site} has width {d}. Give activations (n, {d}).")
        part = part.detach().double().cpu()
        n, total, moments = n + len(part), total + part.sum(0), moments + part.T @ part
    if n < 2:
        raise DegenerateInputError(
            f"basis('pca'): {n} activations have no variance. Give more, at best many times {d}."
        )
    if not 1 <= (k := d if k is None else k) <= d:
        raise InvalidInputError(f"basis('pca', k={k}): {site} has width {d}. Choose 1 <= k <= {d}.")
    mean = total / n
    components = torch.linalg.eigh(moments / n - torch.outer(mean, mean)).eigenvectors.T.flip(0)[:k]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    W_dec, b_dec = (components * largest.sign()).float(), mean.float()
    return Dictionary.of(lambda x: (x - b_dec) @ W_dec.T, W_dec, b_dec, name="pca")
