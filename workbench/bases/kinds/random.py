"""Random directions as features: the control of an SAE."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases.base import Basis, Dictionary
from workbench.bases.fits import ModelLike
from workbench.bases.registry import BASES
from workbench.core.errors import InvalidInputError
from workbench.hooks.sites import Site


@BASES.register("random")
def random(
    model: ModelLike, site: Site, d_sae: int, k: int, seed: int = 0, b_dec: Float[Tensor, " d"] | None = None
) -> Dictionary:
    """Unit directions, of which each token uses the k that it is most along.

    Args:
        model: the model.
        site: the site.
        d_sae: number of directions.
        k: how many are active per token, at most.
        seed: decides the directions.
        b_dec: what is taken off before encoding and added again; zero by default.

    Raises:
        InvalidInputError: for k out of range.
    """
    if not 1 <= k <= d_sae:
        raise InvalidInputError(f"basis('random', d_sae={d_sae}, k={k}): choose 1 <= k <= d_sae.")
    width = model.width(site)
    return _random(d_sae, width, k, seed, torch.zeros(width) if b_dec is None else b_dec.float(), width, False)


def random_like(basis: Basis, k: int, seed: int = 0) -> Dictionary:
    """The control of a basis: same shape and bias, random unit directions, k features per token by TopK.

    The encoder is the decoder transposed and reads `x - b_dec`; a transcoder gets an encoder of its own.

    Args:
        basis: what it is a control of.
        k: features per token, brought between 1 and `d_sae`.
        seed: decides the directions.
    """
    k = max(1, min(k, basis.d_sae))
    return _random(basis.d_sae, basis.d_out, k, seed, basis.bias, basis.d_in, basis.transcodes)


def _random(d_sae: int, d_out: int, k: int, seed: int, b_dec: Tensor, d_in: int, transcodes: bool) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    W_dec = _unit_rows(d_sae, d_out, generator).to(b_dec.device)
    W_enc = _unit_rows(d_sae, d_in, generator).to(b_dec.device) if transcodes else W_dec

    def encode(x: Tensor) -> Tensor:
        top = ((x if transcodes else x - b_dec) @ W_enc.T).topk(k, dim=1)
        return x.new_zeros(len(x), d_sae).scatter(1, top.indices, top.values.relu())

    return Dictionary(
        name="random SAE", architecture="random", d_in=d_in, d_sae=d_sae, d_out=d_out, transcodes=transcodes,
        encoder=encode, W_dec=W_dec, b_dec=b_dec,
    )  # fmt: skip


def _unit_rows(n: int, width: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n, width, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)
