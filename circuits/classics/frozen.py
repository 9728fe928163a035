"""A norm as the linear map that it is at one token: RMS and layer norms with their scale held fast."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.errors import MismatchError
from workbench.core.numbers import number
from workbench.core.precision import precise

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
    """

    gain: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    centres: bool
    norm: nn.Module | None

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
        frozen = cls(gain, bias, bool(moved.abs().max() <= _TOLERANCE * gain.abs().max()), norm)
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

    def part(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """What one part of the tokens' vectors contributes; parts that add up to them add up to the norm's output."""
        return self.scale * self.of.gain * self.of.centred(precise(x))

    def sum_of(self, *parts: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """The norm's output, from all parts and its bias."""
        return sum((self.part(x) for x in parts), self.of.bias)
