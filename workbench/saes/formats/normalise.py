"""The scale in which SAEs are trained, and its removal from the weights that are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import DegenerateInputError
from workbench.saes.kernels.weights import SAEWeights


@dataclass(frozen=True)
class SiteScale:
    """Mean of a site's activations, and the factor that scales their variance to 1 per dimension."""

    mean: Float[Tensor, " d"]
    scale: float


def site_scale(blocks: Iterable[Float[Tensor, "n d"]], what: str, at_least: int) -> SiteScale:
    """Mean and scale of the rows of all blocks; accumulated in fp64 around the mean of the first block.

    Args:
        blocks: activations.
        what: where they come from, for the error texts.
        at_least: rows that are needed.

    Raises:
        DegenerateInputError: if there are fewer rows, or all are the same.

    >>> found = site_scale([torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])], "x", 2)
    >>> found.mean, round(found.scale, 3)  # variance (1 + 1) / 2 over 2 dimensions: sqrt(2 / 1)
    (tensor([2., 0.]), 1.414)
    """
    n, squares = 0, 0.0
    centre, total = torch.zeros(0), torch.zeros(0)
    for block in blocks:
        if not len(block):
            continue
        x = block.double()
        if not n:
            centre, total = x.mean(0), torch.zeros_like(x[0])
        x -= centre
        n, total, squares = n + len(x), total + x.sum(0), squares + float(x.square().sum())
    if n < at_least or not n:
        raise DegenerateInputError(
            f"{what} has {n} training tokens; one batch needs {at_least}. Harvest more or lower batch."
        )
    variance = squares / n - float((total / n).square().sum())
    if variance <= 1e-12 * float(centre.square().sum()):
        raise DegenerateInputError(f"All activations of {what} are the same; nothing can be learnt. Check the site.")
    return SiteScale((centre + total / n).float(), math.sqrt(len(centre) / variance))


@dataclass(frozen=True)
class Normaliser:
    """How raw activations become what an SAE or transcoder is trained on.

    An SAE keeps the mean, which its `b_dec` takes up. A transcoder subtracts no `b_dec` from what it reads, so the
    mean is removed before.

    Attributes:
        source: of the site that is read.
        target: of the site that a transcoder reconstructs; None for an SAE.
    """

    source: SiteScale
    target: SiteScale | None = None

    def read_(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the encoder is given, written over raw activations in fp32."""
        if self.target is not None:
            x.sub_(self.source.mean.to(x.device))
        return x.mul_(self.source.scale)

    def reconstructed_(self, y: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """What the decoder is to give, written over raw activations in fp32."""
        return y.mul_(self.written.scale)

    @property
    def written(self) -> SiteScale:
        """Scale of the site that is reconstructed."""
        return self.source if self.target is None else self.target

    def fold(self, weights: SAEWeights) -> SAEWeights:
        """Weights that read and reconstruct raw activations; the rows of `W_dec` stay as they are.

        Activations of features are divided by the scale of the site that is reconstructed.
        """
        s_in, s_out = self.source.scale, self.written.scale
        W_enc = weights.W_enc * (s_in / s_out) if self.target is not None else weights.W_enc
        gain = torch.ones_like(weights.b_enc) if weights.r_mag is None else weights.r_mag.exp()
        offset = torch.zeros_like(weights.b_enc)
        if self.target is not None:
            offset = weights.W_enc @ self.source.mean.to(W_enc.device) * s_in
        return replace(
            weights,
            W_enc=W_enc,
            b_enc=(weights.b_enc - offset) / s_out,
            b_dec=weights.b_dec / s_out,
            threshold=None if weights.threshold is None else weights.threshold / s_out,
            b_mag=None if weights.b_mag is None else (weights.b_mag - gain * offset) / s_out,
        )


def fold_decoder_norm(weights: SAEWeights) -> SAEWeights:
    """The same function with decoder rows of unit norm: norms move into the encoder, biases and thresholds.

    Rows of norm zero stay as they are.
    """
    norms = weights.W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return replace(
        weights,
        W_enc=weights.W_enc * norms[:, None],
        b_enc=weights.b_enc * norms,
        W_dec=weights.W_dec / norms[:, None],
        threshold=None if weights.threshold is None else weights.threshold * norms,
        b_mag=None if weights.b_mag is None else weights.b_mag * norms,
    )
