"""What ablated nodes are where prompts have several lengths: their mean over tokens, whatever the position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.decomposition import Place, places
from circuits.decomposition import bases as checked_bases
from circuits.faithful.ablation import Reference
from circuits.metrics import of_site
from circuits.nodes.setting import Setting, means_of
from workbench.bases.sae import AnySAE
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.errors import MismatchError
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMeans(Shown):
    """Means over tokens at every site, for `faithfulness(reference=)` on prompts of several lengths.

    Attributes:
        x: mean activation, by site.
        coefficients: mean coefficient of every feature, by site.
        bases: fingerprint of the basis of each site.
        n: tokens that they are over.
    """

    x: Mapping[str, Float[Tensor, " d"]]
    coefficients: Mapping[str, Float[Tensor, " d_sae"]]
    bases: Mapping[str, str]
    n: int

    def references(self, placed: Sequence[Place], fingerprints: Mapping[str, str]) -> dict[str, Reference]:
        """The reference of each place.

        Args:
            placed: the places.
            fingerprints: of their bases, by site.

        Raises:
            MismatchError: if they were taken with other bases.
        """
        found = {}
        for place in placed:
            if self.bases.get(place.site) != fingerprints[place.site]:
                raise MismatchError(
                    f"reference: these means were taken with bases at {', '.join(self.bases)} of other weights than "
                    f"those given at {place.site}. Take them again: circuits.token_means(model, bases, ...)."
                )
            mean = self.coefficients[place.site]
            written = mean @ place.basis.rows().to(mean)
            found[place.site] = Reference(self.x[place.site][None, None], written[None, None], None, mean)
        return found

    def _shown_line(self) -> str:
        return f"{counted(len(self.x), 'sites')}, {counted(self.n, 'tokens')}"


def counting(texts: TokenBatch) -> Bool[Tensor, "texts pos"]:
    """The tokens that means are over: all but the first and special ones."""
    return TokenPolicy.of_batch(texts).kept(texts)


@checked
def token_means(
    model: Model, bases: Mapping[str, AnySAE], texts: TokenBatch, *, batch_size: int = 64
) -> TokenMeans:  # fmt: skip
    """Mean activation and mean coefficients at every site, over all tokens but the first and special ones.

    Args:
        model: the model.
        bases: a basis per site.
        texts: what means are taken over, such as the contexts of samples.
        batch_size: rows per forward pass.
    """
    placed, texts = places(model, checked_bases(model, bases)), texts.to(model.device)
    keep = counting(texts)
    setting = Setting(
        model=model, places=placed, clean=texts, patch=None, keep=keep, baseline="mean", note="",
        metric=of_site("logits", lambda x, rows: x[rows].sum(-1)),
    )  # fmt: skip
    means = means_of(setting, batch_size)
    return TokenMeans(
        x={site: x for site, (x, _) in means.items()}, coefficients={site: c for site, (_, c) in means.items()},
        bases={place.site: place.basis.fingerprint for place in placed}, n=int(keep.sum()),
    )  # fmt: skip
