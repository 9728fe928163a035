"""The tensors of an SAE or transcoder while it is trained, feature-major: gathering a feature reads contiguous rows."""

from __future__ import annotations

from dataclasses import dataclass, fields

from jaxtyping import Float
from torch import Tensor

from workbench.core.display import OneLine


@dataclass
class SAEWeights(OneLine):
    """Parameters, or their gradients; mutable, because the optimiser writes them in place.

    Attributes:
        W_enc: encoder, one row per feature; `W_enc.T` in the orientation of SAELens.
        b_enc: encoder bias; of a gated SAE the bias of the gate.
        W_dec: decoder.
        b_dec: decoder bias.
        threshold: JumpReLU threshold of each feature, in the units of the pre-activation.
        r_mag: log scale of the magnitude path of a gated SAE.
        b_mag: bias of the magnitude path of a gated SAE.
    """

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None
    b_mag: Float[Tensor, " d_sae"] | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that this architecture has, by name, in the order of the fields."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def tensors(self) -> list[Tensor]:
        """The same without their names."""
        return list(self.named().values())
