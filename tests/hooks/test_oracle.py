"""TransformerLens' bridge on a copy of the model gives the same activations at every site that both have."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.tiny import FAMILIES, MIXTURES, tiny_model
from workbench.hooks.sites import KINDS, LAYER_KINDS, Site
from workbench.models.model import Model


def _cache(model: Model, ids: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    # A model that was made from a config alone does not name its class, and the bridge asks for it.
    model.hf.config.architectures = [type(model.hf).__name__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = model.to_transformer_lens()
    return dict(bridge.run_with_cache(ids, names_filter=names)[1])


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_a_tiny_model_of_each_family_gives_what_the_bridge_gives(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(10, 22).view(2, 6)
    sites = [site for site in model.site_map.points if site.layer in (None, 1)]
    expected = _cache(model, ids, [site.tl_name for site in sites])
    acts = model.capture(ids, sites)
    for site in sites:
        torch.testing.assert_close(acts[site], expected[site.tl_name], atol=1e-5, rtol=1e-5, msg=str(site))


@pytest.mark.embedded
def test_the_embedded_model_gives_what_the_bridge_gives(embedded: Model) -> None:
    ids = embedded.tokens("The quick brown fox jumps over the lazy dog.").ids
    layer = embedded.n_layers // 2
    sites = [Site(kind, layer if kind in LAYER_KINDS else None) for kind in KINDS]
    expected = _cache(embedded, ids, [*(site.tl_name for site in sites), "ln_final.hook_normalized"])
    acts = embedded.capture(ids, sites)
    for site in sites:
        scale = float(expected[site.tl_name].abs().max())
        torch.testing.assert_close(acts[site], expected[site.tl_name], atol=1e-6 * scale, rtol=1e-5, msg=str(site))
    # The bridge's hook_normalized is before the norm's weight, so it is another tensor than our final_norm.
    weight = embedded.site_map["final_norm"].module.weight
    before = expected["ln_final.hook_normalized"]
    torch.testing.assert_close(before * weight, acts["final_norm"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, acts["final_norm"], atol=1e-1)
