"""Logit lens of feature directions: the tokens that a direction writes when it reaches the end of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.hooks.sites import Site
from workbench.models.model import Model

_SLAB_VALUES = 2**24


@dataclass(frozen=True, eq=False)
class LensTokens:
    """The top tokens of some directions under the logit lens, best first."""

    ids: Int[Tensor, "directions k"]
    values: Float[Tensor, "directions k"]


def slab_rows(d_vocab: int) -> int:
    """How many rows of logits are held at once: 64 MiB of fp32, whatever the vocabulary."""
    return max(1, _SLAB_VALUES // d_vocab)


@torch.no_grad()
def lens_tokens(model: Model, directions: Float[Tensor, "directions d_model"], k: int = 20) -> LensTokens:
    """The k tokens with the largest `W_U^T . final_norm(direction)`, norm weight included, `b_dec` not added.

    Computed in fp32. With an RMS norm the length of a direction does not matter.

    Raises:
        InvalidInputError: if k is not between 1 and the vocabulary size.
        DegenerateInputError: for a direction that is zero or not finite.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), logit lens of decoder rows.
    """
    if not 1 <= k <= model.d_vocab:
        raise InvalidInputError(f"lens_tokens(k={k}): the vocabulary has {model.d_vocab} tokens. Choose 1 <= k <= that.")
    directions = directions.detach().to(model.device).float()
    norms = directions.norm(dim=1)
    bad = (~torch.isfinite(norms) | (norms == 0)).nonzero().flatten()
    if bad.numel():
        raise DegenerateInputError(
            f"lens_tokens: {bad.numel()} of {len(directions)} directions are zero or not finite (first: row {int(bad[0])}). "
            "Leave them out."
        )
    tops = [model.lens(part).topk(k, dim=1) for part in directions.split(slab_rows(model.d_vocab))]
    return LensTokens(torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


def sae_site(model: Model, sae: Any, site: str | Site | None = None) -> Site:
    """Where the features of an SAE live in this model; by default the SAE's own site.

    Raises:
        MismatchError: if the SAE was trained on another model, or its width is not that of the site.
        InvalidInputError: if the SAE does not say where it belongs and no site is given.
    """
    metadata = getattr(sae.cfg, "metadata", None)
    trained_on = getattr(metadata, "model_fingerprint", None)
    if trained_on is not None and trained_on != model.fingerprint:
        raise MismatchError(
            f"This SAE was trained on model {trained_on}; the model here is {model.name} ({model.fingerprint}). "
            "Load the model that the SAE belongs to."
        )
    named = site if site is not None else getattr(metadata, "hook_name", None)
    if named is None:
        raise InvalidInputError("This SAE does not say at which site it was trained. Give site=, such as 'resid_post.15'.")
    resolved = model.resolve(named)
    d_in, width = int(sae.W_dec.shape[1]), model.width(resolved)
    if d_in != width:
        raise MismatchError(f"This SAE reads {d_in} values; site {resolved} of {model.name} has {width}.")
    return resolved


def feature_ids(sae: Any, features: Any = None) -> Int[Tensor, " features"]:
    """Feature indices as a tensor; all of the SAE's by default.

    Raises:
        InvalidInputError: for an index that the SAE does not have, or one given twice.
        DegenerateInputError: for an empty choice.
    """
    d_sae = int(sae.W_dec.shape[0])
    if features is None:
        return torch.arange(d_sae)
    ids = torch.as_tensor([int(f) for f in features], dtype=torch.long)
    if ids.numel() == 0:
        raise DegenerateInputError("features=[] chooses no feature. Name at least one, or leave it out for all.")
    if int(ids.min()) < 0 or int(ids.max()) >= d_sae:
        wrong = next(f for f in ids.tolist() if not 0 <= f < d_sae)
        raise InvalidInputError(f"Feature {wrong} does not exist; this SAE has features 0 to {d_sae - 1}.")
    if len(ids.unique()) != len(ids):
        raise InvalidInputError(f"features: {len(ids) - len(ids.unique())} of {len(ids)} are given twice. Name each once.")
    return ids
