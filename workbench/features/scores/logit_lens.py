"""Logit lens of feature directions: the tokens that a direction writes when it reaches the end of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, WidthError
from workbench.core.html import Shown
from workbench.hooks.sites import Site
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

_SLAB_VALUES, _LEAST_ROWS = 2**24, 128
"""Logits held at once; fewest rows at which a product with the unembedding is efficient."""

IN_RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Kinds of sites whose activations are in the coordinates of the residual stream, which the lens reads."""


@dataclass(frozen=True, eq=False)
class LensTokens(Shown):
    """The top tokens of some directions under the logit lens, best first."""

    ids: Int[Tensor, "directions k"]
    values: Float[Tensor, "directions k"]

    def frame(self) -> pd.DataFrame:
        """One row per direction and token: direction, rank, token id, value."""
        import pandas as pd

        direction, rank = (part.numpy() for part in torch.ones(self.ids.shape).nonzero(as_tuple=True))
        ids, values = self.ids.flatten().cpu().numpy(), self.values.detach().float().flatten().cpu().numpy()
        return pd.DataFrame({"direction": direction, "rank": rank, "token_id": ids, "value": values})


def slab_rows(d_vocab: int) -> int:
    """How many rows of logits are held at once: 64 MiB of fp32, or as many as a product needs to be efficient."""
    return max(_LEAST_ROWS, _SLAB_VALUES // d_vocab)


@dataclass(frozen=True, eq=False)
class LensEnds(Shown):
    """Both ends of the logit lens: what some directions promote, and what they suppress, strongest first."""

    promoted: LensTokens
    suppressed: LensTokens

    def frame(self) -> pd.DataFrame:
        """The rows of both ends; the column `end` says which."""
        import pandas as pd

        ends = {"promoted": self.promoted, "suppressed": self.suppressed}
        return pd.concat([tokens.frame().assign(end=end) for end, tokens in ends.items()], ignore_index=True)


@checked
def lens_tokens(model: Model, directions: Float[Tensor, "directions d_model"], k: int = 20) -> LensTokens:
    """The k tokens with the largest `W_U^T . final_norm(direction)`, norm weight included, `b_dec` not added.

    Computed in fp32. With an RMS norm the length of a direction does not matter.

    Raises:
        InvalidInputError: if k is not between 1 and the vocabulary size.
        DegenerateInputError: for a direction that is zero or not finite.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), logit lens of decoder rows.
    """
    (promoted,) = _lens(model, directions, k, (True,))
    return promoted


@checked
def lens_ends(model: Model, directions: Float[Tensor, "directions d_model"], k: int = 20) -> LensEnds:
    """The k tokens with the largest and the k with the smallest logits of `lens_tokens`, in one product.

    Raises:
        InvalidInputError: if k is not between 1 and the vocabulary size.
        DegenerateInputError: for a direction that is zero or not finite.
    """
    return LensEnds(*_lens(model, directions, k, (True, False)))


@torch.no_grad()
def _lens(model: Model, directions: Tensor, k: int, ends: tuple[bool, ...]) -> list[LensTokens]:
    if not 1 <= k <= model.d_vocab:
        raise InvalidInputError(
            f"lens_tokens(k={k}): the vocabulary has {model.d_vocab} tokens. Choose 1 <= k <= that."
        )
    directions = directions.detach().to(model.device).float()
    norms = directions.norm(dim=1)
    bad = (~torch.isfinite(norms) | (norms == 0)).nonzero().flatten()
    if bad.numel():
        raise DegenerateInputError(
            f"lens_tokens: {bad.numel()} of {len(directions)} directions are zero or not finite (first: row "
            f"{int(bad[0])}). Leave them out."
        )
    tops: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ends]
    for part in directions.split(slab_rows(model.d_vocab)):
        logits = model.lens(part)
        for of_end, largest in zip(tops, ends, strict=True):
            top = logits.topk(k, dim=1, largest=largest)
            of_end.append((top.indices, top.values))
    return [LensTokens(*(torch.cat(column) for column in zip(*of_end, strict=True))) for of_end in tops]


def target_site(model: Model, sae: AnySAE, site: str | Site | None = None) -> Site:
    """Where the features of an SAE are read and written: the SAE's own site, or the one that is named.

    Raises:
        MismatchError: if the SAE belongs to another model, has another width than the site, writes elsewhere than it
            reads (a transcoder), or writes in other coordinates than those of the residual stream, so that its decoder
            rows promote no tokens.
        UnknownSiteError: if the model does not have the site.
    """
    basis = as_basis(sae)
    basis.refuse_transcoder("A score or an edit of features")
    resolved = model.resolve(placed_at(basis, model).site or "" if site is None else site)
    if basis.d_out != (width := model.width(resolved)):
        raise WidthError(f"This SAE writes {basis.d_out} values; site {resolved} of {model.name} has width {width}.")
    if not in_residual(resolved):
        raise MismatchError(
            f"Decoder rows at {resolved} are not in the coordinates of the residual stream, so no tokens can be read "
            f"off them. Output scores and steering need an SAE at one of {', '.join(IN_RESIDUAL)}; for others use "
            "SAEClamp, SAEScale or SAEAblate in an Intervention."
        )
    return resolved


def in_residual(site: Site) -> bool:
    """Whether activations there are in the coordinates of the residual stream."""
    return site.head is None and site.kind in IN_RESIDUAL


def feature_ids(sae: AnySAE, features: Iterable[int | float] | None = None) -> Int[Tensor, " features"]:
    """Feature indices as a tensor; all of the SAE's by default.

    Raises:
        InvalidInputError: for an index that the SAE does not have, or one given twice.
        DegenerateInputError: for an empty choice.
    """
    basis = as_basis(sae)
    if features is None:
        return torch.arange(basis.d_sae)
    if broken := [f for f in features if not float(f).is_integer()]:
        raise InvalidInputError(
            f"Feature {broken[0]} is no whole number. Features are numbered 0 to {basis.d_sae - 1}."
        )
    ids = basis.features([int(f) for f in features])
    if ids.numel() == 0:
        raise DegenerateInputError("features=[] chooses no feature. Name at least one, or leave it out for all.")
    if len(ids.unique()) != len(ids):
        raise InvalidInputError(
            f"features: {len(ids) - len(ids.unique())} of {len(ids)} are given twice. Name each once."
        )
    return ids
