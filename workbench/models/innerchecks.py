"""Checks of the sites inside attention and MLP, on a few layers of the real model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import EditError
from workbench.core.numbers import rounding_error
from workbench.hooks.attach import Fn, attached
from workbench.hooks.capture import capture
from workbench.hooks.sites import Site, SiteMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ON, _OFF = 1.0, -2.0
"""Two inputs of an activation; none in use but the identity has them in this ratio."""


@dataclass(frozen=True)
class Check:
    """One verified statement.

    Attributes:
        name: the statement.
        ok: whether it holds.
        detail: the measured figure.
    """

    name: str
    ok: bool
    detail: str


def relative_error(left: Float[Tensor, "... d"], right: Float[Tensor, "... d"]) -> float:
    """Largest difference, relative to the largest entry of the vector of `right`."""
    left, right = left.float(), right.float()
    # a logit of -inf, of a token that is ruled out, equals itself
    same = left == right
    scale = right.abs().masked_fill(~right.isfinite(), 0).amax(-1, keepdim=True).clamp_min(1e-6)
    return float((torch.where(same, 0, left - right).abs() / scale).max())


def weighted_values(
    pattern: Float[Tensor, "batch n_heads q_pos k_pos"], v: Float[Tensor, "batch k_pos n_kv_heads d_head"]
) -> Float[Tensor, "batch q_pos n_heads d_head"]:
    """`pattern @ v` per head; heads in a row share a head of v where there are fewer of these."""
    repeated = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2).transpose(1, 2)
    return (pattern @ repeated).transpose(1, 2)


def _layers(sites: SiteMap) -> list[int]:
    last = sites.n_layers - 1
    return sorted({0, last // 2, last})


def sublayer_checks(
    hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], tolerance: float
) -> tuple[list[Check], dict[Site, str]]:
    """Checks inside the blocks, and the sites to withdraw on all layers because a checked layer breaks its identity.

    `pattern @ v == z`; with q = 0 the pattern is what it is with k = 0, and not what it was; with the mlp_in of one
    token everywhere, mlp_out is what it was at that token; mlp_post with mlp_pre at one number is a multiple of
    mlp_post with mlp_pre at another, by the factor of an activation.
    """
    withdrawn: dict[Site, str] = {}
    checks = []
    for kinds, blamed, statement, measure in (
        (("pattern", "v", "z"), ("pattern", "z"), "pattern @ v == z", _values),
        (("q", "k", "pattern"), ("q", "k"), "q = 0 and k = 0 give the same pattern", _scores),
        (("mlp_in", "mlp_out"), ("mlp_in",), "mlp_in alone makes mlp_out, token by token", _tokenwise),
        (("mlp_pre", "mlp_post"), ("mlp_pre",), "mlp_post is an activation of mlp_pre, gating or alone", _gate),
    ):
        there = [site for site in sites.points if site not in withdrawn]
        layers = [n for n in _layers(sites) if all(Site(kind, n) in there for kind in kinds)]
        if not layers:
            continue
        try:
            error = measure(hf, sites, inputs, layers)
            why = f"{statement} fails by {rounding_error(error)} (relative)" if error > tolerance else ""
        except EditError as failure:
            error, why, blamed = float("inf"), str(failure), blamed[:1]
        if why:
            withdrawn |= {site: why for site in there if site.kind in blamed}
        else:
            checks.append(Check(statement, True, f"largest relative error {rounding_error(error)} on layers {layers}"))
    return checks, withdrawn


def _values(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> float:
    acts = capture(hf, sites, inputs, [Site(kind, n) for n in layers for kind in ("pattern", "v", "z")])
    return max(relative_error(weighted_values(acts[f"pattern.{n}"], acts[f"v.{n}"]), acts[f"z.{n}"]) for n in layers)


def _scores(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> float:
    """How much the patterns differ between q = 0 and k = 0; infinite if these leave a pattern as it was."""
    wanted = [Site("pattern", n) for n in layers]

    def patterns(zeroed: str) -> list[Tensor]:
        with attached([(sites[Site(zeroed, n)], torch.zeros_like) for n in layers] if zeroed else []):
            acts = capture(hf, sites, inputs, wanted)
        return [acts[site] for site in wanted]

    clean, no_q, no_k = patterns(""), patterns("q"), patterns("k")
    if any(torch.equal(a, b) for a, b in zip(clean, no_q, strict=True)):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(no_q, no_k, strict=True))


def _tokenwise(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> float:
    """How far mlp_out is from what it was at one token, when every token has that token's mlp_in."""
    read, written = ([Site(kind, n) for n in layers] for kind in ("mlp_in", "mlp_out"))
    clean = capture(hf, sites, inputs, [*read, *written])

    def hold(site: Site) -> Fn:
        return lambda x: clean[site][:1, -1:].expand_as(x)

    with attached([(sites[site], hold(site)) for site in read]):
        held = capture(hf, sites, inputs, written)
    return max(relative_error(held[site], clean[site][:1, -1:].expand_as(held[site])) for site in written)


def _gate(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], layers: Sequence[int]) -> float:
    """How far mlp_post is from `activation(mlp_pre) * gated`, whatever the activation; infinite if it is not at all.

    With mlp_pre at the same number everywhere, the activation is one factor. Where it gates another projection that
    factor must not be the number itself: what is gated is linear in mlp_post too, and would pass.
    """
    ids = inputs["input_ids"][:1].expand(3, -1)  # as it is, on, off

    def hold(x: Tensor) -> Tensor:
        x = x.clone()
        x[1], x[2] = _ON, _OFF
        return x

    # layer by layer: what is gated would differ between the rows behind an edited layer
    return max(_factor_error(hf, sites, {"input_ids": ids}, layer, hold) for layer in layers)


def _factor_error(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], layer: int, hold: Fn) -> float:
    post = Site("mlp_post", layer)
    with attached([(sites[Site("mlp_pre", layer)], hold)]):
        clean, on, off = capture(hf, sites, inputs, [post])[post].double()
    factor = float((on * off).sum() / (on * on).sum().clamp_min(1e-30))
    alone = bool((on - on.flatten()[0]).abs().max() <= 1e-2 * on.abs().max())
    linear = not alone and abs(factor - _OFF / _ON) < 1e-2
    if linear or torch.equal(on, clean):
        return float("inf")
    return float((off - factor * on).abs().max() / clean.abs().max().clamp_min(1e-6))
