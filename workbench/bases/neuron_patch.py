"""A few features of a basis as neurons: what they read, how they are activated, what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.bases.base import Basis
from workbench.bases.kinds.neurons import Neurons
from workbench.bases.sae import SAEBasis
from workbench.core.display import OneLine
from workbench.core.errors import NotExactlyExportable

Rule = Literal["linear", "relu", "jumprelu", "gated", "topk"]
_EXPORTED = ("standard", "jumprelu", "gated", "topk")


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronPatch(OneLine):
    """Everything that is needed to compute some features of activations `x (n, d)` and what they write.

    Attributes:
        rule: how a neuron is activated.
        normalisation: what is done to each token first, in the words of sae_lens.
        weights: "read" (d, neurons) and "write" (k, d); "bias", "before" (taken off the token), "threshold", "gate",
            "magnitude", "magnitude_bias", "norms" (of decoder rows), and "chosen" (the k of the neurons that write),
            where the rule needs them.
        k: active neurons per token of the rule "topk"; else None.
    """

    rule: Rule
    normalisation: str
    weights: Mapping[str, Float[Tensor, "*"] | Tensor]
    k: int | None = None


def neuron_patch(basis: Basis, features: Sequence[int]) -> NeuronPatch:
    """Some features of a basis as neurons.

    Where features compete (top-k), which of them are active depends on all, so the whole encoder is part of the patch.

    Raises:
        NotExactlyExportable: for a basis whose encoder is only known as code, or whose features compete in another way.
    """
    chosen = torch.tensor(list(features), dtype=torch.long)
    write = basis.rows(chosen).detach().cpu().float()
    if isinstance(basis, Neurons):
        read = torch.eye(basis.d_in)[:, chosen]
        return NeuronPatch(rule="linear", normalisation="none", weights={"read": read, "write": write})
    if not isinstance(basis, SAEBasis) or basis.architecture not in _EXPORTED:
        raise NotExactlyExportable(
            f"{basis.name} ({basis.architecture}) can't be written as a few neurons: its encoder is only known as "
            "code, or which of its features are active depends on other tokens. Exact are SAEs of the kinds "
            f"{', '.join(_EXPORTED)}, and neurons. Ablate features of one of these."
        )
    sae = basis.sae
    columns = slice(None) if basis.architecture == "topk" else chosen.to(sae.W_dec.device)

    def of(name: str) -> Tensor:
        return getattr(sae, name).detach()[..., columns].cpu().contiguous()

    weights = {"read": of("W_enc"), "write": write}
    if sae.cfg.apply_b_dec_to_input:
        weights["before"] = sae.b_dec.detach().cpu()
    if basis.architecture == "gated":
        weights |= {"gate": of("b_gate"), "magnitude": of("r_mag"), "magnitude_bias": of("b_mag")}
        return NeuronPatch(rule="gated", normalisation=basis.normalisation, weights=weights)
    weights["bias"] = of("b_enc")
    if basis.architecture == "jumprelu":
        weights["threshold"] = of("threshold")
    if basis.architecture == "topk":
        weights["chosen"] = chosen
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            weights["norms"] = sae.W_dec.detach().norm(dim=-1).cpu()
        return NeuronPatch(rule="topk", normalisation=basis.normalisation, weights=weights, k=int(sae.cfg.k))
    if basis.architecture == "standard" and not isinstance(sae.activation_fn, nn.ReLU):
        raise NotExactlyExportable(
            f"{basis.name} activates its features by {type(sae.activation_fn).__name__}, which the loader does not "
            "have. Give an SAE with ReLU."
        )
    rule: Rule = "relu" if basis.architecture == "standard" else "jumprelu"
    return NeuronPatch(rule=rule, normalisation=basis.normalisation, weights=weights)
