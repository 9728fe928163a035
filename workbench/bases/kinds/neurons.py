"""The coordinates of a site as features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases.base import Basis, FeatureRows, Features
from workbench.bases.fits import ModelLike
from workbench.bases.registry import BASES
from workbench.core.precision import precise
from workbench.hooks.sites import Site


@dataclass(frozen=True, eq=False, kw_only=True)
class Neurons(Basis):
    """Every coordinate is a feature, its value the activation: nothing is left over, and the constant is zero."""

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """The activations themselves."""
        return precise(x)

    def decode(
        self,
        acts: Float[Tensor, "n d_sae"],
        x: Float[Tensor, "n d_in"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "n d_out"]:
        """The feature activations themselves."""
        return precise(acts)

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:
        """Rows of the identity."""
        chosen = torch.arange(self.d_sae) if features is None else torch.as_tensor(features)
        return torch.nn.functional.one_hot(chosen, self.d_out).float()

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """Zero."""
        return torch.zeros(self.d_out)

    def contribution(self, x: Float[Tensor, "n d_in"], features: Features | None = None) -> Float[Tensor, "n d_out"]:
        """The chosen coordinates, all others zero."""
        if features is None:
            return precise(x)
        return torch.zeros_like(precise(x)).index_copy(
            1, torch.as_tensor(features, device=x.device), self.encode_some(x, features)
        )


@BASES.register("neurons")
def neurons(model: ModelLike, site: Site) -> Neurons:
    """The coordinates of any site, such as the neurons of an MLP at `mlp_post` or dimensions of the stream."""
    width = model.width(site)
    return Neurons(name="neurons", architecture="neurons", d_in=width, d_sae=width, d_out=width)
