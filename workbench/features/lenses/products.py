"""Products with the Jacobian of the last block's output with respect to an earlier activation, prompt by prompt."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.core.errors import UnknownSiteError
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.hooks.capture import Activations
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.models.segment import Segment

How = Literal["forward", "difference"]
STEP = 1e-2
"""Of the central difference, as a share of the median norm of an activation."""


def counted_tokens(batch: TokenBatch, skip_first: int) -> Bool[Tensor, "batch pos"]:
    """True at the tokens over which a Jacobian is averaged: all but the first few and the last of each row."""
    inner = (batch.positions >= skip_first) & (batch.positions < batch.lengths[:, None] - 1)
    return inner & batch.mask


class RowProducts:
    """`J^T u` at several sites at once, from one forward pass of a batch that keeps its graph.

    `J` is the sum over counted target tokens of the derivative with respect to a counted source token, averaged over
    source tokens; targets before the source contribute exactly nothing.
    """

    def __init__(self, model: Model, batch: TokenBatch, sites: Sequence[str], target: str, skip_first: int) -> None:
        self._counted = counted_tokens(batch, skip_first)
        self._sites, self._target = sites, target
        self._acts: Activations = model.capture(batch, [*sites, target], grad=True)

    def of(self, u: Float[Tensor, "batch d"]) -> dict[str, Float[Tensor, "batch d"]]:
        """One product per row of the batch, each with its own u."""
        out = self._acts[self._target]
        weights = self._counted.to(out.device)[..., None] * u.to(out)[:, None]
        grads = torch.autograd.grad(out, [self._acts[s] for s in self._sites], weights, retain_graph=True)
        return {site: self._mean(grad) for site, grad in zip(self._sites, grads, strict=True)}

    def _mean(self, grad: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch d"]:
        counted = self._counted.to(grad.device)
        return (precise(grad) * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)

    def norms(self) -> dict[str, Float[Tensor, " tokens"]]:
        """Norms of the counted activations at each site."""
        return {site: precise(self._acts[site].detach())[self._counted].norm(dim=-1) for site in self._sites}


class ColumnProducts:
    """`J u` from one site, for a batch that ran once: a forward derivative, or a central difference."""

    def __init__(self, model: Model, batch: TokenBatch, site: str, target: str, skip_first: int) -> None:
        self._counted = counted_tokens(batch, skip_first)
        self._target = target
        self._segment: Segment = model.segment(batch, site, target)

    @torch.no_grad()
    def of(self, u: Float[Tensor, "n d"], how: How) -> Iterator[Float[Tensor, "batch d"]]:
        """For each u the product with the Jacobian of each row of the batch."""
        for one in u:
            tangent = self._counted[..., None] * one.to(self._segment.x)
            run = self._forward if how == "forward" else self._difference
            change = precise(run(tangent)) * self._counted[..., None]
            yield change.sum(1) / self._counted.sum(1, keepdim=True)

    def _forward(self, tangent: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        # the fused attention kernels have no forward derivative
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            # torch 2.13 compiles its forward derivatives by torch.jit.script, which it deprecates
            warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
            out = self._segment.run(forward_ad.make_dual(self._segment.x, tangent)).acts[self._target]
            found = forward_ad.unpack_dual(out).tangent
            return torch.zeros_like(tangent) if found is None else found.clone()

    def _difference(self, tangent: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        size = tangent.norm(dim=-1).max()
        if size == 0:
            return torch.zeros_like(tangent)
        step = STEP * precise(self._segment.x)[self._counted].norm(dim=-1).median() / size
        up, down = (self._segment.run(self._segment.x + side * step * tangent).acts[self._target] for side in (1, -1))
        return (precise(up) - precise(down)) / (2 * step)


def supports_forward(model: Model, batch: TokenBatch, site: str, target: str) -> bool:
    """Whether every operation between two sites of this model has a forward derivative."""
    try:
        products = ColumnProducts(model, batch[:1], site, target, 0)
        next(products.of(torch.ones(1, model.d_model), "forward"))
    except (NotImplementedError, RuntimeError):
        return False
    return True


def first_of(sites: Mapping[str, object] | Sequence[str]) -> str:
    """The earliest site.

    Raises:
        UnknownSiteError: for none.
    """
    if not sites:
        raise UnknownSiteError("There is no site. Name at least one, such as resid_post.0.")
    return min(sites, key=lambda site: Site.parse(site).order)
