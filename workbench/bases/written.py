"""What a linear map at the end of a sublayer writes to the stream: the ground of the bases of MLP neurons and heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.bases.base import Basis, FeatureRows
from workbench.bases.fits import ModelLike
from workbench.core.errors import MismatchError
from workbench.core.numbers import rounding_error
from workbench.core.precision import precise
from workbench.hooks.capture import capture
from workbench.hooks.sites import Site

_LARGE = 1e4
"""A size of vectors at which the epsilon of a norm does not count."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Written(Basis):
    """Reads the input of a projection, writes the output of its sublayer.

    A norm behind the projection, as in Gemma 2, multiplies each token by a number and each coordinate by a gain: the
    gain is in the rows, the number is `scale`.

    Attributes:
        weight: of the projection, a row per input.
        b_out: its bias.
        gain: of the norm behind it; ones without a norm.
        norm: the norm behind it, in the precision of the projection.
    """

    weight: Float[Tensor, "d_in d_out"]
    b_out: Float[Tensor, " d_out"]
    gain: Float[Tensor, " d_out"]
    norm: nn.Module | None = None

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """The activations themselves."""
        return precise(x)

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:
        """The rows of the projection times the gain, where the projection is."""
        weight = self.weight
        return (weight if features is None else weight[torch.as_tensor(features, device=weight.device)]) * self.gain

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """The bias of the projection times the gain."""
        return self.b_out * self.gain

    @property
    def device(self) -> torch.device:
        """Where the projection is."""
        return self.weight.device

    @property
    def normalises(self) -> bool:
        """Whether a norm is behind the projection."""
        return self.norm is not None

    def scale(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n 1"]:
        """By what the norm behind the projection multiplies each token."""
        if self.norm is None:
            return super().scale(x)
        projected = x.to(self.weight) @ self.weight + self.b_out
        after, written = self.norm(projected), projected * self.gain
        return ((after * written).sum(-1, keepdim=True) / written.square().sum(-1, keepdim=True)).to(x.device)


def written_by(model: ModelLike, site: Site, kinds: tuple[str, str], name: str, *, proven: bool = True) -> Written:
    """The basis of single inputs of the projection behind a site.

    Args:
        model: the model.
        site: either end, such as `mlp_post.3` or `mlp_out.3`.
        kinds: of the site that is read and of the one that is written.
        name: of the basis, for errors.
        proven: whether it is compared with what the model computes on a few tokens; without, whoever asks does that.

    Raises:
        MismatchError: for a site of another kind, or a model whose sublayer is no projection with at most a norm.
    """
    if site.kind not in kinds or site.head is not None:
        raise MismatchError(
            f"basis({name!r}, site={str(site)!r}): it reads {kinds[0]} and writes {kinds[1]}. Give one of the two, "
            f"such as {replace(site, kind=kinds[0], layer=site.layer or 0, head=None)}."
        )
    read, out = (model.site_map[replace(site, kind=kind)] for kind in kinds)
    weight, bias = affine(read.module, f"basis({name!r})")
    norm = None if read.path.startswith(f"{out.path}.") else copy.deepcopy(out.module).to(weight.dtype)
    gain = torch.ones_like(weight[0])
    with torch.no_grad():
        gain = gain if norm is None else norm(_LARGE * gain)
    basis = Written(
        name=name, architecture=name, d_in=weight.shape[0], d_sae=weight.shape[0], d_out=weight.shape[1],
        site=str(read.site), site_out=str(out.site), model_fingerprint=model.fingerprint, transcodes=True,
        normalisation="none" if norm is None else "norm behind the projection",
        weight=weight, b_out=bias, gain=gain, norm=norm,
    )  # fmt: skip
    if proven:
        _require_that_it_writes(model, basis)
    return basis


def affine(module: Any, who: str) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Weight, a row per input, and bias of a `Linear` or of the `Conv1D` of GPT-2, in fp32 or fp64.

    Args:
        module: the projection.
        who: asks for it, to begin the message.

    Raises:
        MismatchError: if it has no matrix of real numbers.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise MismatchError(
            f"{who}: the projection is a {type(module).__name__} without a matrix of real numbers. Load the "
            "model without quantisation."
        )
    weight = precise(weight.detach())
    weight = weight if hasattr(module, "nx") else weight.T
    bias = getattr(module, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else precise(bias.detach())


@torch.no_grad()
def _require_that_it_writes(model: ModelLike, basis: Written) -> None:
    """Compares with what the model itself computes on a few tokens; multipliers and other norms show there."""
    vocab = model.hf.get_input_embeddings().weight
    ids = torch.randint(0, len(vocab), (1, 6), generator=torch.Generator().manual_seed(0)).to(vocab.device)
    sites = [str(basis.site), str(basis.site_out)]
    acts = capture(model.hf, model.site_map, {"input_ids": ids}, sites)
    x, wanted = (precise(acts.flat(site).flatten(0, 1)) for site in sites)
    off = float((basis.reconstruct(x) - wanted).norm() / wanted.norm())
    # a norm computes in fp32 in a model in fp64 too
    eps = max(torch.finfo(vocab.dtype).eps, torch.finfo(torch.float32).eps)
    if not off <= min(0.1, 100 * eps):
        raise MismatchError(
            f"basis({basis.name!r}): in {model.name} {sites[1]} is not the projection of {sites[0]}, with or without a "
            f"norm behind it; they differ by {rounding_error(off)} (relative). Use 'neurons' at {sites[1]} instead."
        )
