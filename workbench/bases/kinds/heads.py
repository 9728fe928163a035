"""Attention heads, with what each writes to the stream."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases.base import FeatureRows, Features
from workbench.bases.fits import ModelLike
from workbench.bases.registry import BASES
from workbench.bases.written import Written, written_by
from workbench.core.errors import InvalidInputError
from workbench.hooks.sites import Site


@dataclass(frozen=True, eq=False, kw_only=True)
class Heads(Written):
    """A head is a group: it writes `z_h W_O[h]`, another direction for each token, so it has no row.

    Its activation is the length of what it writes, before the norm behind the projection; `coefficients` are in the
    units of the stream. `contribution`, `ablate` and `decode(acts, x)` are exact.
    """

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """The length of what each head writes."""
        return self._writes(x, torch.arange(self.d_sae)).norm(dim=-1)

    def encode_some(self, x: Float[Tensor, "n d_in"], features: Features) -> Float[Tensor, "n f"]:
        """The length of what some heads write."""
        return self._writes(x, features).norm(dim=-1)

    def decode(
        self, acts: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """Each head's direction at these tokens, at the given lengths.

        Raises:
            InvalidInputError: without `x`: the lengths alone do not say what the heads write.
        """
        if x is None:
            raise InvalidInputError(
                "decode(acts): a head writes another direction for each token, which its activation does not say. Give "
                "what was encoded: decode(acts, x)."
            )
        directions = torch.nn.functional.normalize(self._writes(x, torch.arange(self.d_sae)), dim=-1)
        return (acts[..., None] * directions).sum(1) * self.scale(x) + self.constant(x)

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:  # noqa: ARG002
        """Refused.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(
            "rows(features): a head writes another direction for each token, so it has no row. Use contribution(x, "
            "heads) or ablate(x, heads, target), or 'neurons' at z with the head's coordinates."
        )

    def contribution(self, x: Float[Tensor, "n d_in"], features: Features | None = None) -> Float[Tensor, "n d_out"]:
        """The sum of what some heads write."""
        return self._writes(x, torch.arange(self.d_sae) if features is None else features).sum(1) * self.scale(x)

    def writing(self) -> Tensor:
        """Which heads write anything."""
        return (self.weight.unflatten(0, (self.d_sae, -1)) != 0).flatten(1).any(dim=1)

    def _writes(self, x: Tensor, heads: Features) -> Float[Tensor, "n f d_out"]:
        heads = torch.as_tensor(heads, device=self.weight.device)
        z, W_O = x.to(self.weight).unflatten(1, (self.d_sae, -1)), self.weight.unflatten(0, (self.d_sae, -1))
        return torch.einsum("nfh,fhd->nfd", z[:, heads], W_O[heads] * self.gain).to(x.device)


@BASES.register("heads")
def heads(model: ModelLike, site: Site) -> Heads:
    """Reads `z`, writes `attn_out`; the error is rounding.

    Args:
        model: the model.
        site: `z` or `attn_out` of a layer.
    """
    single = written_by(model, site, ("z", "attn_out"), "heads")
    known = {field.name: getattr(single, field.name) for field in fields(single)}
    return Heads(**{**known, "d_sae": model.site_map[str(single.site)].heads})
