"""Attention and MLPs as the linear maps that they are at one prompt: patterns, norms and gates held fast.

Each map takes gradients of what it writes back to what it reads, `(batch, pos, width)`, and says what its biases add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.bases.written import Written, affine, written_by
from workbench.core.errors import MismatchError
from workbench.core.numbers import rounding_error
from workbench.core.precision import precise
from workbench.hooks.sites import Site
from workbench.models.frozennorm import Beside, FrozenAt, FrozenNorm, columns_of, norms_before
from workbench.models.model import Model

WHO = "attribution_graph"
_TOLERANCE = 1e-3
"""How exactly a map must give what the sublayer wrote, relative to its norm; 30 times more in half precision."""

Acts: TypeAlias = Mapping[Site, Tensor]
"""Activations of one prompt by site, a row per token, heads side by side; of a pattern `(heads, q_pos, k_pos)`."""
Back: TypeAlias = tuple[Float[Tensor, "batch pos width"], Float[Tensor, " batch"]]
"""Gradients of what is read, and what the biases on the way add."""


@dataclass(frozen=True, eq=False)
class Output:
    """The end of a sublayer: `scale * (x @ weight + bias)`; the scale is that of a norm behind the projection.

    Attributes:
        weight: of the projection, with the gain of the norm behind it.
        bias: likewise.
        scale: of that norm, one per token; 1 without one.
        gain: of that norm.
        norm: whether there is one; it gives what the sublayer writes.
    """

    weight: Float[Tensor, "d_in d_model"]
    bias: Float[Tensor, " d_model"]
    scale: Float[Tensor, "pos 1"]
    gain: Float[Tensor, " d_model"]
    norm: bool

    @classmethod
    def of(cls, written: Written, x: Float[Tensor, "pos d_in"]) -> Output:
        """From the basis of what the projection writes, at the tokens of a prompt."""
        weight, bias, scale = written.weight * written.gain, written.b_out * written.gain, precise(written.scale(x))
        return cls(weight, bias, scale, written.gain, written.norm is not None)

    def write(self, x: Float[Tensor, "*b pos d_in"]) -> Float[Tensor, "*b pos d_model"]:
        """What is written."""
        return self.scale * (x @ self.weight + self.bias)

    def back(self, g: Float[Tensor, "batch pos d_model"]) -> Back:
        """From the stream to the input of the projection."""
        g = g * self.scale[: g.shape[1]]
        return g @ self.weight.T, (g @ self.bias).sum(1)


@dataclass(frozen=True, eq=False)
class Input:
    """The start of a sublayer: a norm with its scales, and a projection.

    Attributes:
        norm: with the scale of each token.
        weight: of the projection.
        bias: likewise.
    """

    norm: FrozenAt
    weight: Float[Tensor, "d_model d_out"]
    bias: Float[Tensor, " d_out"]

    def read(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_out"]:
        """What the projection gives."""
        return self.norm.sum_of(x) @ self.weight + self.bias

    def back(self, g: Float[Tensor, "batch pos d_out"]) -> Back:
        """From the output of the projection to the stream."""
        read = g @ self.weight.T
        added = (g @ self.bias).sum(1) + (read @ self.norm.of.bias).sum(1)
        return self.norm.first(g.shape[1]).back(read), added


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one layer with its pattern held fast: `attn_out = output(pattern @ values(stream))`.

    Attributes:
        values: from the stream to the values of all key-value heads.
        pattern: in the precision of the model.
        output: from the heads to the stream.
    """

    values: Input
    pattern: Float[Tensor, "heads q_pos k_pos"]
    output: Output

    @classmethod
    def of(cls, model: Model, layer: int, acts: Acts, norm: FrozenNorm) -> Attention:
        """Of a layer with the norm before it, checked against what it wrote.

        Raises:
            MismatchError: if its output is not the pattern times plain values.
        """
        z, v, stream = Site("z", layer), model.site_map[Site("v", layer)], Site("resid_pre", layer)
        values = Input(norm.at(acts[stream]), *(part.to(norm.gain) for part in columns_of(v, WHO)))
        found = cls(
            values,
            acts[Site("pattern", layer)],
            Output.of(written_by(model, z, ("z", "attn_out"), "heads", proven=False), acts[z]),
        )
        written = found.output.write(found.mixed(values.read(precise(acts[stream]))))
        _require_same(model, Site("attn_out", layer), written, acts, "Give a basis there, which replaces attention.")
        return found

    @property
    def _groups(self) -> tuple[int, int]:
        """Width of a head, and heads per key-value head."""
        n_heads, width = len(self.pattern), self.output.weight.shape[0]
        d_head = width // n_heads
        return d_head, n_heads * d_head // self.values.weight.shape[1]

    def mixed(self, v: Float[Tensor, "pos kv_width"]) -> Float[Tensor, "pos width"]:
        """What the heads take from the values."""
        d_head, group = self._groups
        each = v.unflatten(-1, (-1, d_head)).repeat_interleave(group, dim=-2)
        return torch.einsum("hqk,khd->qhd", self.pattern.to(v), each).flatten(-2)

    def back(self, g: Float[Tensor, "batch pos width"]) -> Back:
        """From the heads to the stream."""
        d_head, group = self._groups
        n = g.shape[1]
        each = g.unflatten(-1, (-1, d_head))
        pattern = self.pattern[:, :n, :n].to(g)
        mixed = torch.einsum("hqk,bqhd->bkhd", pattern, each).unflatten(2, (-1, group)).sum(3)
        return self.values.back(mixed.flatten(2))


@dataclass(frozen=True, eq=False)
class Branch:
    """One projection into the hidden neurons of an MLP.

    Attributes:
        into: from the stream.
        factor: by what its output is multiplied to be its share of the neurons.
        module: the projection itself.
        columns: of the module's output.
    """

    into: Input
    factor: Float[Tensor, "pos d_mlp"]
    module: nn.Module
    columns: slice | Tensor | None = None


@dataclass(frozen=True, eq=False)
class MLP:
    """An MLP as a linear map that gives its own output at this prompt: the half rule.

    With a gate, `post = act(gate) * up = 1/2 (act(gate) * up) + 1/2 (act(gate) / gate * up) * gate`: half of each
    hidden neuron is attributed to either projection, the other one held fast. Without, `post = (act(pre) / pre) * pre`.

    Attributes:
        branches: the projections.
        output: from the hidden neurons to the stream.
    """

    branches: tuple[Branch, ...]
    output: Output

    @classmethod
    def of(cls, model: Model, layer: int, acts: Acts, norm: FrozenNorm, beside: Sequence[Beside]) -> MLP:
        """Of a layer with the norm before it and the other parts that read it, checked against what it wrote.

        Raises:
            MismatchError: if its hidden neurons are not one or two projections and a function.
        """
        stream = mlp_stream(model, layer)
        pre, post = (precise(acts[Site(kind, layer)]) for kind in ("mlp_pre", "mlp_post"))
        point = model.site_map[Site("mlp_pre", layer)]
        at = norm.at(acts[stream])
        first = Input(at, *(part.to(post) for part in columns_of(point, WHO)))
        output = Output.of(
            written_by(model, Site("mlp_post", layer), ("mlp_post", "mlp_out"), "mlp_hidden", proven=False), post
        )
        gate = Branch(first, _ratio(post, pre), point.module, point.columns)
        second = _second(gate, beside)
        if second is None:
            branches = (gate,)
        else:
            weight, bias = (part.to(post) for part in second.weights())
            other = Input(at, weight, bias)
            factor = _ratio(post, other.read(precise(acts[stream]))) / 2
            branches = (replace(gate, factor=gate.factor / 2), Branch(other, factor, second.module, second.columns))
        found = cls(branches, output)
        remedy = "Give a basis there, or mlps='leaf'."
        _require_same(model, Site("mlp_out", layer), found.write(precise(acts[stream])), acts, remedy)
        return found

    def write(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What the map writes; of the prompt's own stream, what the MLP wrote."""
        return self.output.write(sum((b.factor * b.into.read(x) for b in self.branches), torch.zeros(())))

    def back(self, g: Float[Tensor, "batch pos d_mlp"]) -> Back:
        """From the hidden neurons to the stream."""
        parts = [branch.into.back(g * branch.factor[: g.shape[1]]) for branch in self.branches]
        return sum((part[0] for part in parts[1:]), parts[0][0]), sum((part[1] for part in parts[1:]), parts[0][1])


def followed(
    model: Model, attention: Sequence[int], mlps: Sequence[int], inputs: Sequence[int], acts: Acts
) -> tuple[dict[int, Attention], dict[int, MLP], dict[int, FrozenAt]]:
    """The maps of some layers' attention, of some layers' MLPs, and of the norm before some layers' MLPs.

    Raises:
        MismatchError: if one computes more than can be followed.
    """
    sites = model.site_map
    before = [(sites[Site("v", i)], Site("resid_pre", i)) for i in attention]
    before += [(sites[Site("mlp_pre", i)], mlp_stream(model, i)) for i in mlps]
    before += [(sites[Site("mlp_in", i)], mlp_stream(model, i)) for i in inputs]
    norms = iter(norms_before(model, before, WHO) if before else [])
    return (
        {i: Attention.of(model, i, acts, next(norms)[0]) for i in attention},
        {i: MLP.of(model, i, acts, *next(norms)) for i in mlps},
        {i: next(norms)[0].at(acts[mlp_stream(model, i)]) for i in inputs},
    )


def mlp_stream(model: Model, layer: int) -> Site:
    """The site of the stream that the MLP of a layer reads."""
    return Site("resid_pre" if model.site_map.is_parallel else "resid_mid", layer)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`; a neuron whose input is 0 gives nothing to attribute."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


@dataclass(frozen=True, eq=False)
class _Projection:
    module: nn.Module
    columns: slice | None

    def weights(self) -> tuple[Tensor, Tensor]:
        weight, bias = affine(self.module, WHO)
        return (weight, bias) if self.columns is None else (weight[:, self.columns], bias[self.columns])


def _second(gate: Branch, beside: Sequence[Beside]) -> _Projection | None:
    """The projection beside the gate: the other half of the same module, or another one."""
    d_mlp = gate.factor.shape[-1]
    if isinstance(gate.columns, slice):
        return _Projection(gate.module, slice(gate.columns.stop, gate.columns.stop + d_mlp))
    others = (module for module, output in beside if module is not gate.module and output.shape[-1] == d_mlp)
    return next((_Projection(module, None) for module in others), None)


def _require_same(model: Model, site: Site, found: Tensor, acts: Acts, remedy: str) -> None:
    wanted = precise(acts[site])
    off = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    exact = model.dtype in (torch.float32, torch.float64)
    if not off <= _TOLERANCE * (1 if exact else 30):
        raise MismatchError(
            f"{WHO}: with patterns, norms and gates held fast, {site} of {model.name} is off by {rounding_error(off)} "
            f"(relative), so it computes more than can be followed. {remedy}"
        )
