"""Random directions: what any push of that size does."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import number


@checked
def random_directions(
    like: Float[Tensor, "*rows d"], n: int | None = None, *, seed: int = 0, orthogonal: bool = False
) -> Float[Tensor, "n d"]:
    """Directions drawn uniformly from the sphere, with the norms of given ones.

    Drawn on the CPU from one generator with this seed, so they are the same on every device; orthogonal ones are drawn
    and projected in fp64. Returned in fp32 on the device of `like`.

    Args:
        like: directions, or a single one. A random direction has the norm of its row.
        n: how many; by default one per row of `like`. With n, rows are drawn at random, as many times as needed.
        seed: of the directions, and of the rows if n is given.
        orthogonal: whether each direction is orthogonal to its row.

    Raises:
        InvalidInputError: for n below 0.
        DegenerateInputError: for a row that is zero or not finite, or a width of 1 where nothing is orthogonal.

    >>> random_directions(torch.tensor([0.0, 2.0]), 1, orthogonal=True).abs()
    tensor([[2., 0.]])
    """
    rows = like[None] if like.ndim == 1 else like
    norms = rows.double().norm(dim=1).cpu()
    if n is not None and n < 0:
        raise InvalidInputError(f"random_directions(n={n}): give 0 or more.")
    if not len(rows) or not bool((norms.isfinite() & (norms > 0)).all()) or (orthogonal and rows.shape[1] < 2):
        raise DegenerateInputError(
            f"random_directions: `like` has shape {tuple(like.shape)} and norms from "
            f"{' to '.join(number(float(norm)) for norm in norms.sort().values[[0, -1]]) if len(norms) else 0}. Give "
            "finite, non-zero rows, of two components or more if the directions are to be orthogonal to them."
        )
    generator, count = torch.Generator().manual_seed(seed), len(rows) if n is None else n
    dtype = torch.float64 if orthogonal else torch.float32
    noise = torch.randn(count, rows.shape[1], generator=generator, dtype=dtype)
    owner = torch.arange(count) if n is None else torch.randint(len(rows), (n,), generator=generator)
    if orthogonal:
        unit = (rows.double().cpu() / norms[:, None])[owner]
        # Twice: one pass leaves a rounding residue where the noise was nearly parallel.
        for _ in range(2):
            noise = noise - (noise * unit).sum(1, keepdim=True) * unit
        return (noise / noise.norm(dim=1, keepdim=True) * norms[owner, None]).float().to(like.device)
    noise = noise.to(like.device)
    return noise / noise.norm(dim=1, keepdim=True) * rows.float().norm(dim=1)[owner.to(like.device), None]
