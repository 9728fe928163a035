"""A norm as the linear map that it is at one token: RMS and layer norms with their scale held fast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.bases.written import affine
from workbench.core.errors import MismatchError
from workbench.core.numbers import number
from workbench.core.precision import precise
from workbench.hooks.handles import Hooks
from workbench.hooks.sites import Point, Site
from workbench.models.model import Model

_LARGE = 1e4
"""A size of vectors at which the epsilon of a norm does not count."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """`norm(x) = scale(x) * gain * centred(x) + bias`; with the scale of one token fixed, a linear map of its parts.

    Attributes:
        gain: per coordinate.
        bias: what is added.
        centres: whether the mean over coordinates is taken off, as layer norms do.
        norm: a copy in the precision of the result; None for the identity.
        module: the norm itself.
    """

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    centres: bool
    norm: nn.Module | None
    module: nn.Module | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module | None, like: Float[Tensor, "rows d"], name: str = "the final norm") -> FrozenNorm:
        """The norm, read from its own answers to a few vectors.

        Args:
            module: the norm; None is the identity.
            like: activations that it is given, on which the form is checked.
            name: for the error.

        Raises:
            MismatchError: if it is neither an RMS norm nor a layer norm.
        """
        like = precise(like)
        ones, zeros = torch.ones_like(like[0]), torch.zeros_like(like[0])
        if module is None:
            return cls(ones, zeros, False, None)
        norm = copy.deepcopy(module).to(device=like.device, dtype=like.dtype)
        norm._forward_hooks.clear()
        norm._forward_pre_hooks.clear()
        signs = ones.clone()
        signs[1::2] = -1  # mean 0 and mean square 1: every norm leaves it as it is
        bias = norm(zeros[None])[0]
        gain = (norm(_LARGE * signs[None])[0] - bias) * signs
        moved = norm(_LARGE * (signs + ones)[None])[0] - norm(_LARGE * signs[None])[0]
        frozen = cls(gain, bias, bool(moved.abs().max() <= _TOLERANCE * gain.abs().max()), norm, module)
        off = float((frozen.at(like).sum_of(like) - norm(like)).norm() / norm(like).norm().clamp_min(1e-30))
        if not off <= _TOLERANCE:
            raise MismatchError(
                f"{name} ({type(module).__name__}) is neither an RMS norm nor a layer norm: with a fixed scale it is "
                f"off by {number(off)} (relative), so what single components write can't be read through it."
            )
        return frozen

    def centred(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Without the mean over coordinates, where the norm takes it off."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def at(self, x: Float[Tensor, "rows d"]) -> FrozenAt:
        """The linear map at some tokens."""
        x = precise(x)
        if self.norm is None:
            return FrozenAt(self, torch.ones_like(x[:, :1]))
        written = self.centred(x) * self.gain
        after = self.norm(x) - self.bias
        return FrozenAt(self, (after * written).sum(-1, keepdim=True) / written.square().sum(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class FrozenAt:
    """The norm with the scales of some tokens.

    Attributes:
        of: the norm.
        scale: one per token.
    """

    of: FrozenNorm
    scale: Float[Tensor, "rows 1"]

    def part(self, x: Float[Tensor, "*b rows d"]) -> Float[Tensor, "*b rows d"]:
        """What one part of the tokens' vectors contributes; parts that add up to them add up to the norm's output."""
        return self.scale * self.of.gain * self.of.centred(precise(x))

    def back(self, g: Float[Tensor, "batch rows d"]) -> Float[Tensor, "batch rows d"]:
        """Gradients of what is read behind the norm, taken before it: the transpose of `part`."""
        return self.of.centred(self.scale * self.of.gain * g)

    def first(self, n: int) -> FrozenAt:
        """The norm at the first tokens alone."""
        return replace(self, scale=self.scale[:n])

    def sum_of(self, *parts: Float[Tensor, "*b rows d"]) -> Float[Tensor, "*b rows d"]:
        """The norm's output, from all parts and its bias."""
        return sum((self.part(x) for x in parts), self.of.bias)


def columns_of(point: Point, who: str) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Weight, a row per input, and bias of the projection that a site is the output of, its own columns alone."""
    weight, bias = affine(point.module, f"{who}: {point.site}")
    return (weight, bias) if point.columns is None else (weight[:, point.columns], bias[point.columns])


Beside = tuple[nn.Module, Tensor]
"""A projection, and what it gave."""


def norm_before(model: Model, point: Point, stream: Site, who: str) -> FrozenNorm:
    """The norm between the stream and a projection; see `norms_before`."""
    return norms_before(model, [(point, stream)], who)[0][0]


@torch.no_grad()
def norms_before(
    model: Model, wanted: Sequence[tuple[Point, Site]], who: str
) -> list[tuple[FrozenNorm, Sequence[Beside]]]:
    """The norms between the stream and projections, found among the parts of the blocks by what they compute.

    Args:
        model: the model, which runs once.
        wanted: for each a site that is the output of the projection, or the input of the MLP, and the site of the
            stream that the norm reads.
        who: asks for it, to begin the message.

    Returns:
        Each norm, the identity where there is none, and the other parts of the block that read what the projection
        reads.

    Raises:
        MismatchError: if one is not found.
    """
    ids = torch.randint(0, model.d_vocab, (1, 6), generator=torch.Generator().manual_seed(0)).to(model.device)
    layers = {stream.layer or 0 for _, stream in wanted}
    seen: dict[int, list[tuple[nn.Module, Tensor, Tensor]]] = {layer: [] for layer in layers}
    named = {point.module for point, _ in wanted}

    def note(layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if args and isinstance(first, Tensor):
            seen[layer].append((module, args[0], first))

    with Hooks() as on:
        for layer in layers:
            for part in model.site_map[Site("resid_pre", layer)].module.modules():
                if part in named or not list(part.children()):
                    on.add(part, functools.partial(note, layer))
        streams = [stream for _, stream in wanted]
        acts = model.capture(ids, [*dict.fromkeys(streams), Site("resid_post", max(layers))])
    return [_found(model, point, stream, acts[stream].flatten(0, 1), seen[stream.layer or 0], who)
            for point, stream in wanted]  # fmt: skip


def _found(
    model: Model, point: Point, stream: Site, x: Tensor, seen: Sequence[tuple[nn.Module, Tensor, Tensor]], who: str
) -> tuple[FrozenNorm, Sequence[Beside]]:
    read = next(before.flatten(0, 1) for module, before, _ in seen if module is point.module)
    beside = [(module, output) for module, before, output in seen if module is not point.module and _same(before, read)]
    if torch.equal(read, x):
        return FrozenNorm.of(None, x), beside
    for module, before, after in seen:
        if module is not point.module and _same(after, read) and _same(before, x):
            return FrozenNorm.of(module, x, f"the norm before {point.site}"), beside
    raise MismatchError(
        f"{who}: in layer {stream.layer} of {model.name} there is no norm between {stream} and {point.site} that "
        "could be followed. Ask for what needs no weights: head_scores of patterns, elsewhere sites with bases."
    )


def _same(x: Tensor, rows: Tensor) -> bool:
    return x.shape[-1] == rows.shape[-1] and torch.equal(x.flatten(0, -2), rows)
