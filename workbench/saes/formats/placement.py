"""Whether an SAE belongs where it says: it is run on real activations, there and at the places it is mistaken for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.bases.base import Basis
from workbench.bases.fits import sae_site
from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError
from workbench.core.metrics import fvu
from workbench.core.numbers import rounded, setting
from workbench.core.tokenizer import special_ids
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.saes.formats.fit_report import FEWEST_TEXTS, FVU_LIMIT, USELESS, Fit, FitReport, clearly_less

SUSPICIOUS = 0.1
"""If FVU and its mean over dimensions are below this, nothing else is considered; the SAE does what it should."""
MUCH_LOWER = 0.5
"""Another place is named if the FVU there is at most this share of the FVU at the place claimed."""
CONVINCING = 0.7
"""And at most this: a place with a higher FVU is no explanation."""
TOKENS_ELSEWHERE = 256
"""Tokens on which other places and scales are tried, as many of each text."""
_SCALES = tuple(2.0**power for power in range(-12, 13) if power)
_NEIGHBOURS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")

TEXTS = (
    "The ferry leaves the harbour at seven in the morning and returns before dark, unless the wind turns north.",
    "To solve the equation, subtract three from both sides and divide by two; the answer is x = 4.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 5))",
    "My grandmother kept bees behind the house. Every August she gave each neighbour a jar of honey.",
    "In 1869 a chemist arranged the known elements by weight and left gaps for those that had not been found.",
    "Dear Sir or Madam, I am writing to complain about the heating in flat 12, which has been off since Monday.",
    "The committee rejected the proposal by nine votes to four, citing the cost of maintenance and the lack of data.",
    "First wash the rice until the water runs clear. Then add salt, cover the pot and wait for twenty minutes.",
    "She opened the letter, read it twice, and put it in the drawer without saying a word to anyone.",
    "Rivers carry sediment to the sea, where it settles in layers that turn to stone over millions of years.",
    "Error: connection refused. Check that the server is running and that port 8080 is not in use.",
    "The goalkeeper dived to the left, but the ball had already crossed the line; the crowd fell silent.",
)
"""What is run through the model if no text is given."""


Batch = Sequence[str] | Int[Tensor, "rows pos"] | TokenBatch | ActivationStore


@checked
def check_sae(model: Model, sae: AnySAE, batch: Batch | None = None) -> FitReport:
    """Runs an SAE on real activations at its site, and where that is not good elsewhere and at other scales.

    Elsewhere is the same layer and those beside it; all layers, if the means of the dimensions do better than the SAE.

    Args:
        model: a `Model`.
        sae: an SAE or transcoder from `load_sae`.
        batch: texts, token ids, tokens or a store, whose held-out rows are taken; None takes a dozen built-in
            sentences.

    Raises:
        MismatchError: if the SAE names no site.
        UnknownSiteError: if the model does not have its site.
        DegenerateInputError: if fewer than two tokens are kept.
    """
    basis = as_basis(sae)
    site = model.resolve(sae_site(basis))
    target = model.resolve(basis.site_out) if basis.transcodes and basis.site_out is not None else None
    tokens = _tokens(model, batch)
    claimed = _Trial(model, basis, tokens, (site,), target).at(site)
    if claimed.fvu <= SUSPICIOUS and claimed.standardised <= SUSPICIOUS:
        return FitReport(claimed, (), None)
    sites = tuple(_neighbours(model, site))
    if not claimed.standardised < USELESS:
        sites = tuple({_same(other): other for other in (*sites, *_layers(model, site))}.values())
    trial = _Trial(model, basis, _beginnings(tokens), (site, *sites), target)
    here, others = trial.at(site), (*(trial.at(other) for other in sites), *trial.treated(site))
    named = _right_site(here, others) or _looks_like(claimed, others) or _clearly_better(here, others)
    return FitReport(claimed, others, named)


def _right_site(here: Fit, others: Sequence[Fit]) -> Fit | None:
    """The site at which most of the dimensions is explained, for an SAE that explains less than nothing of them here.

    FVU does not decide: it is low in any layer with outlier dimensions, as long as the SAE reproduces their mean.
    """
    best = min(others, key=lambda fit: fit.standardised, default=None)
    if here.standardised < USELESS or best is None or best.how:
        return None
    if not (best.standardised < USELESS and best.fvu <= FVU_LIMIT):
        return None
    return best if clearly_less(best.standardised_by_text, here.standardised_by_text) else None


def _looks_like(claimed: Fit, others: Sequence[Fit]) -> Fit | None:
    """The best of the others, if it is so much better that it explains what is wrong."""
    # a place whose dimensions are explained less well is no better, however low its FVU
    others = [fit for fit in others if not fit.standardised >= claimed.standardised]
    best = min(others, key=lambda fit: fit.fvu, default=None)
    if best is None or not best.fvu <= min(CONVINCING, MUCH_LOWER * claimed.fvu):
        return None
    return best


def _clearly_better(here: Fit, others: Sequence[Fit]) -> Fit | None:
    """The site at which most is explained, if that is clearly more than here; `here` was run on the same tokens.

    Neither measure decides alone: an SAE of a layer without outlier dimensions has a lower FVU in a layer with them,
    and an SAE that has hardly been trained is off by more than the variance in most dimensions.
    """
    better = (fit for fit in others if not fit.how and fit.standardised < 1 and fit.clearly_below(here))
    return min(better, key=lambda fit: fit.standardised, default=None)


def _tokens(model: Model, batch: Batch | None) -> TokenBatch:
    if isinstance(batch, TokenBatch):
        return batch.to(model.device)
    if isinstance(batch, ActivationStore):
        batch = batch.token_rows("heldout")[: len(TEXTS)]
    if isinstance(batch, Tensor):
        return TokenBatch.of_rows(batch).to(model.device)
    return model.tokens(list(TEXTS if batch is None else batch)).to(model.device)


def _beginnings(tokens: TokenBatch) -> TokenBatch:
    """The first tokens of some rows: more texts say more than longer ones."""
    rows = tokens.rows()[: 2 * FEWEST_TEXTS]
    size = max(2, TOKENS_ELSEWHERE // max(1, len(rows)))
    return TokenBatch.pad([row[:size].tolist() for row in rows], 0).to(tokens.ids.device)


def _neighbours(model: Model, site: Site) -> Iterator[Site]:
    """Sites of the same width in this layer and those beside it; the same place is not given twice."""
    if site.layer is None:
        return
    seen, width = {_same(site)}, model.width(str(site))
    for layer in (site.layer, site.layer - 1, site.layer + 1):
        for kind in _NEIGHBOURS:
            other = Site(kind, layer)
            if _same(other) not in seen and other in model.site_map.points and model.width(str(other)) == width:
                seen.add(_same(other))
                yield other


def _layers(model: Model, site: Site) -> Iterator[Site]:
    """The same place in every other layer, where it has the same width."""
    if site.layer is None:
        return
    width = model.width(str(site))
    for other in (replace(site, layer=layer) for layer in range(model.n_layers)):
        if other != site and replace(other, head=None) in model.site_map.points and model.width(str(other)) == width:
            yield other


def _same(site: Site) -> Site:
    """`resid_pre` of a block is `resid_post` of the one before."""
    if site.kind == "resid_pre" and site.layer:
        return Site("resid_post", site.layer - 1)
    return site


Read = tuple[Tensor, Tensor | None, Tensor]


class _Trial:
    """The SAE on the same tokens at any site."""

    def __init__(
        self, model: Model, basis: Basis, tokens: TokenBatch, sites: tuple[Site, ...], target: Site | None
    ) -> None:
        self.basis, self.tokens, self.target = basis, tokens, target
        special = torch.tensor(special_ids(model.tokenizer), device=tokens.ids.device)
        self.ordinary = tokens.mask & (tokens.positions > 0) & ~torch.isin(tokens.ids, special)
        names = dict.fromkeys(map(str, sites if target is None else (*sites, target)))
        with torch.no_grad():
            self.acts = model.capture(tokens, list(names))

    def at(self, site: Site) -> Fit:
        """At a site, on activations as they are."""
        x, y, texts = self._read(site)
        return self._fit(str(site), "", (x, y, texts))

    def treated(self, site: Site) -> Iterator[Fit]:
        """At a site, on activations that are treated in the ways that SAEs are trained with."""
        x, y, texts = self._read(site)
        normed = _layer_normed(x)
        yield self._fit(str(site), "with layer-normed input", (normed, normed if y is None else y, texts))
        unit = x * math.sqrt(x.shape[1]) / x.norm(dim=1, keepdim=True)
        yield self._fit(str(site), "with every token at norm sqrt(d_in)", (unit, unit if y is None else y, texts))
        usual = math.sqrt(x.shape[1]) / float(x.norm(dim=1).mean())
        for scale in (usual, *_SCALES):
            at = f"at scale {setting(rounded(scale))}"  # read again by people who pass it as `scale`
            yield self._fit(str(site), at, (x * scale, None if y is None else y * scale, texts))
            if y is not None:
                yield self._fit(str(site), f"with its input alone {at}", (x * scale, y, texts))

    def _read(self, site: Site) -> Read:
        """What the SAE reads, what it should give if that is something else, and the text of each token."""
        x = self.acts.flat(str(site)).float()
        norms = x.norm(dim=-1)
        keep = self.ordinary.clone()
        if bool(keep.any()):
            keep &= norms <= TokenPolicy.from_norms(norms[keep]).max_norm
        if int(keep.sum()) < 2:
            raise DegenerateInputError(
                f"check_sae: fewer than two of {self.tokens.n_tokens} tokens are neither first, special nor sinks. "
                "Give longer texts."
            )
        target = None if self.target is None else self.acts.flat(str(self.target)).float()[keep]
        return x[keep], target, keep.nonzero()[:, 0]

    def _fit(self, site: str, how: str, read: Read) -> Fit:
        x, y, texts = (None if part is None else part.to(self.basis.device) for part in read)
        assert x is not None and texts is not None
        active, parts = 0.0, []
        for rows, acts in self.basis.chunks(x):
            active += float((acts != 0).sum())
            parts.append(self.basis.decode(acts, x[rows]))
        target, x_hat = x if y is None else y, torch.cat(parts)
        unexplained = fvu(target, x_hat)
        unexplained = unexplained if math.isfinite(unexplained) else math.inf
        error, variance = (target - x_hat).square().double(), (target - target.mean(0)).square().double()
        varies = variance.sum(0) > 0
        shares = (error.sum(1) / variance.sum(), (error / variance.sum(0))[:, varies].mean(1))
        by_text = (torch.zeros(len(self.tokens)).to(share).index_add_(0, texts, share).tolist() for share in shares)
        return Fit(site, how, unexplained, active / len(x), len(x), *map(tuple, by_text))


def _layer_normed(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True)
