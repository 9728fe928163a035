"""A lens: an affine map per site into the coordinates of the last block's output, which the model's own end reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import MismatchError, UnknownSiteError, WidthError
from workbench.core.html import Shown
from workbench.core.jsontext import Json
from workbench.core.numbers import counted
from workbench.core.precision import precise
from workbench.features.lenses.files import FORMAT, About, LensKind, save
from workbench.features.lenses.places import distant_sites, lens_sites, target_of
from workbench.features.lenses.reading import HALF_A, HALF_B, LOGIT, LensReading, read_with
from workbench.features.lenses.vectors import TokenVectors, named_ids
from workbench.hooks.ends import unembedding
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.models.wrapped import Batch

if TYPE_CHECKING:
    import pandas as pd

PERMUTED, RANDOM, DISTANT, BIAS = "rows permuted", "random map", "distant layer", "bias alone"
"""Names of controls."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class LinearLens(Shown):
    """A lens `read(M h + b)` with one M and b per site; `read` is the model's own final norm and unembedding.

    Attributes:
        kind: how the maps were made.
        target: the site into whose coordinates they lead: the output of the last block.
        sites: where the lens reads, in the order of a forward pass.
        weights: M by site, `M @ h`; a site without one is read as it is.
        biases: b by site, where there is one.
        n_fit: tokens or prompts that the maps were fitted on.
        unit: what `n_fit` counts.
        halves: the lens of either half of the prompts, where it was fitted so.
        norms: median norm of an activation at each site.
        model_name: of the model that it belongs to.
        fingerprint: of that model; "" for a published file, which names none.
        recipe: how it was fitted.
    """

    how_to_make = "wb.fit_lens(model, 'regression', texts) makes a lens, wb.load_lens(folder, model) loads one."
    kind: LensKind
    target: str
    sites: tuple[str, ...]
    weights: dict[str, Float[Tensor, "d d"]]
    biases: dict[str, Float[Tensor, " d"]] = field(default_factory=dict)
    n_fit: int = 0
    unit: str = "tokens"
    halves: tuple[LinearLens, LinearLens] | None = None
    norms: dict[str, float] = field(default_factory=dict)
    model_name: str = ""
    fingerprint: str = ""
    recipe: dict[str, Json] = field(default_factory=dict)

    @classmethod
    def logit(cls, model: Model, sites: Sequence[str] | None = None) -> LinearLens:
        """The logit lens: every site is read as it is."""
        return cls(
            kind="logit", target=target_of(model), sites=lens_sites(model, sites), weights={}, model_name=model.name,
            fingerprint=model.fingerprint,
        )  # fmt: skip

    @property
    def d_model(self) -> int | None:
        """Width of the maps; None for the logit lens."""
        return next((len(weight) for weight in self.weights.values()), None)

    def apply(self, site: str, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`M h + b`, in fp32 (fp64 of fp64).

        Raises:
            UnknownSiteError: for a site at which the lens has no map.
        """
        name = self._named(site)
        if name not in self.weights and name not in self.biases:
            return h
        h = precise(h)
        x = h @ self.weights[name].to(h).T if name in self.weights else h
        return x + self.biases[name].to(h) if name in self.biases else x

    def _named(self, site: str) -> str:
        name = str(Site.parse(site))
        if name not in self.sites:
            raise UnknownSiteError(
                f"This {self.kind} lens has no map at {name}. It reads {first_few(self.sites)}; fit it there."
            )
        return name

    def require(self, model: Model) -> None:
        """Refuses a model that the lens was not made for.

        Raises:
            MismatchError: for another fingerprint, or another target than the output of the model's last block.
            WidthError: for another width.
        """
        if self.d_model not in (None, model.d_model):
            raise WidthError(
                f"This {self.kind} lens maps {self.d_model} values; {model.name} has a width of {model.d_model}. Fit "
                "one for this model."
            )
        if self.fingerprint and self.fingerprint != model.fingerprint:
            raise MismatchError(
                f"This {self.kind} lens was made for {self.model_name} ({self.fingerprint}), not for {model.name} "
                f"({model.fingerprint}). Fit one for this model."
            )
        if self.target != target_of(model):
            raise MismatchError(
                f"This {self.kind} lens leads to {self.target}; the end of {model.name} reads {target_of(model)}. Use "
                "a lens that was fitted to that site."
            )
        lens_sites(model, self.sites)

    @torch.no_grad()
    def rows(self, model: Model, tokens: Sequence[str | int]) -> TokenVectors:
        """The direction of each token at each site: `M^T W_U[:, token]`, without the gain of the norm.

        Raises:
            InvalidInputError: for a text that is not one token.
        """
        self.require(model)
        ids = named_ids(model, tokens)
        read = precise(unembedding(model.hf).weight.detach()[torch.tensor(list(ids), device=model.device)])
        halves = None if self.halves is None else tuple(half.rows(model, tokens).vectors for half in self.halves)
        vectors = {site: read @ self.weights[site].to(read) if site in self.weights else read for site in self.sites}
        return TokenVectors(
            tokens=ids, vectors=vectors, halves=halves, norms=self.norms, n_fit=self.n_fit, lens=self.kind,
            fingerprint=model.fingerprint,
        )  # fmt: skip

    def read(
        self,
        model: Model,
        text: Batch,
        *,
        positions: Sequence[int] | None = (-1,),
        sites: Sequence[str] | None = None,
        k: int = 10,
        target: str | Int[Tensor, " rows"] | None = None,
        beside: Mapping[str, LinearLens] | None = None,
        seed: int = 0,
    ) -> LensReading:
        """What the lens reads at each site, beside its controls: see `LensReading`.

        Args:
            model: the model that the lens was made for.
            text: a text, texts or tokens.
            positions: which tokens, from the end if negative; None for all.
            sites: some of those of the lens; None for all.
            k: tokens that are kept for each reading.
            target: a single token that is looked for behind the texts, or the id of one for each; else the token that
                follows there.
            beside: further lenses to read with, by name, such as a regression lens.
            seed: of the permutation and of the random map.

        Raises:
            MismatchError: for another model.
            InvalidInputError: for a target that is not one token.
        """
        self.require(model)
        for other in (beside or {}).values():
            other.require(model)
        chosen = self.sites if sites is None else tuple(self._named(site) for site in sites)
        others = {LOGIT: LinearLens.logit(model, chosen), **(beside or {}), **controls_of(self, seed)}
        lenses: dict[str, LinearLens] = {self.kind: self}
        lenses |= {name: lens for name, lens in others.items() if name != self.kind}
        maps = {name: lens.apply for name, lens in lenses.items()}
        n_fit = {name: lens.n_fit for name, lens in lenses.items()}
        return read_with(model, text, chosen, maps, positions=positions, k=k, target=target, n_fit=n_fit)

    def save(self, folder: str | Path) -> Path:
        """Writes `lens.json` and `lens.safetensors`; `wb.load_lens` reads them."""
        about = About(
            format=FORMAT, lens=self.kind, target=self.target, sites=self.sites, n_fit=self.n_fit, unit=self.unit,
            norms=self.norms, model_name=self.model_name, fingerprint=self.fingerprint, recipe=self.recipe,
            n_halves=tuple(half.n_fit for half in self.halves or ()),
        )  # fmt: skip
        parts = [self, *(self.halves or ())]
        return save(Path(folder), about, [(part.weights, part.biases) for part in parts])

    def frame(self) -> pd.DataFrame:
        """One row per site: distance of the map from the identity, its size, and what the halves differ by.

        `from_identity` is `|M - I| / |I|`, `size` is `|M| / |I|` and `half_difference` `|A - B| / |M|`, all Frobenius;
        the error of M itself is about half of the last.
        """
        import pandas as pd

        return pd.DataFrame([self._row(site) for site in self.sites])

    def _row(self, site: str) -> dict[str, object]:
        weight = self.weights.get(site)
        row: dict[str, object] = {"site": site, "layer": Site.parse(site).layer, "n_fit": self.n_fit}
        if weight is None:
            return {**row, "from_identity": 0.0, "size": 1.0}
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        row |= {"from_identity": float((weight - eye).norm() / eye.norm()), "size": float(weight.norm() / eye.norm())}
        if self.halves is not None:
            a, b = (half.weights[site] for half in self.halves)
            row["half_difference"] = float((a - b).norm() / weight.norm())
        return row

    def _shown_line(self) -> str:
        fitted = f", fitted on {counted(self.n_fit, self.unit)}" if self.n_fit else ""
        return f"{self.kind} lens of {self.model_name or 'a model'} at {counted(len(self.sites), 'sites')}{fitted}"

    def with_maps(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor] | None = None) -> LinearLens:
        """The same lens with other maps and no halves."""
        biases = self.biases if biases is None else biases
        return replace(self, weights=dict(weights), biases=dict(biases), halves=None)


def controls_of(lens: LinearLens, seed: int = 0) -> dict[str, LinearLens]:
    """The controls that a lens has by itself, by name; none for the logit lens, which has no maps.

    The map of an adjacent layer is no control: it reads nearly as well.
    """
    if not lens.weights:
        return {}
    found = {PERMUTED: permuted(lens, seed), RANDOM: random_map(lens, seed)}
    if len(lens.weights) > 2:
        found[DISTANT] = distant(lens)
    if lens.biases:
        found[BIAS] = bias_alone(lens)
    if lens.halves is not None:
        found |= {HALF_A: lens.halves[0], HALF_B: lens.halves[1]}
    return found


def permuted(lens: LinearLens, seed: int = 0) -> LinearLens:
    """The coordinates that the maps lead to, exchanged at random; one permutation for all sites."""
    order = torch.randperm(lens.d_model or 0, generator=torch.Generator().manual_seed(seed))
    return lens.with_maps(
        {site: weight[order.to(weight.device)] for site, weight in lens.weights.items()},
        {site: bias[order.to(bias.device)] for site, bias in lens.biases.items()},
    )


def random_map(lens: LinearLens, seed: int = 0) -> LinearLens:
    """Gaussian maps, each of the size (Frobenius) of the one that it stands for; biases stay."""
    generator = torch.Generator().manual_seed(seed)

    def like(weight: Tensor) -> Tensor:
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        return drawn * (weight.norm() / drawn.norm())

    return lens.with_maps({site: like(weight) for site, weight in lens.weights.items()})


def distant(lens: LinearLens) -> LinearLens:
    """At each site the map of the site half the model away."""
    return lens.with_maps(
        {site: lens.weights[other] for site, other in distant_sites(list(lens.weights)).items()},
        {site: lens.biases[other] for site, other in distant_sites(list(lens.biases)).items()},
    )


def bias_alone(lens: LinearLens) -> LinearLens:
    """What the maps say of any activation: frequent tokens rank high without reading anything."""
    return lens.with_maps({site: torch.zeros_like(weight) for site, weight in lens.weights.items()})
