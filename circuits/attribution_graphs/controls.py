"""Random dictionaries in the place of coders, as active as they are: what a graph of them explains is chance."""

from __future__ import annotations

from dataclasses import replace

import torch

from circuits.attribution_graphs.coders import Coders, CrossLayerTranscoder, placed
from workbench.bases.base import Basis
from workbench.bases.kinds.random import random_like
from workbench.core.arguments import checked
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.model import Model


@checked
@torch.no_grad()
def random_coders(model: Model, coders: Coders, text: str | TokenBatch, seed: int = 0) -> Coders:
    """For each coder a dictionary of the same shape with random unit directions, as many active per token.

    Args:
        model: the model.
        coders: what they are a control of.
        text: the prompt on which active features are counted, its first token left out.
        seed: decides the directions.
    """
    given = placed(model, coders)
    acts = model.capture(text, list(dict.fromkeys(place.read for place in given)))
    found: dict[Site, Basis] = {}
    for i, place in enumerate(given):
        x = precise(acts.flat(place.read)[0, 1:])
        active = sum(int((part != 0).sum()) for _, part in place.basis.chunks(x))
        basis = random_like(place.basis, round(active / len(x)), seed + i)
        found[place.site] = replace(basis, site=str(place.read), site_out=str(place.site))
    if not isinstance(coders, CrossLayerTranscoder):
        return {str(site): basis for site, basis in found.items()}
    g = torch.Generator().manual_seed(seed)
    later = {}
    for key, rows in coders.later.items():
        drawn = torch.randn(rows.shape, generator=g).to(rows)
        later[key] = drawn / drawn.norm(dim=1, keepdim=True) * rows.norm(dim=1, keepdim=True)
    return CrossLayerTranscoder(layers={site.layer or 0: basis for site, basis in found.items()}, later=later)
