"""The method of the library as a method on any function: `node_effects` itself, on a tiny model that adds nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from circuits.decomposition import neurons
from circuits.doctor.attribution import Method
from circuits.metrics import of_site
from circuits.nodes.attribute import node_effects
from circuits.nodes.runs import Method as Estimator
from circuits.nodes.runs import Rule
from circuits.pairs import Pairs
from workbench.core import progress
from workbench.core.tokens import TokenBatch
from workbench.hooks.ends import embedding
from workbench.models.model import Model
from workbench.models.tiny import D_MODEL, N_LAYERS, tiny_hf

_CLEAN, _PATCH, _VOCABULARY = 2, 3, 8


@functools.cache
def _silent_model() -> Model:
    """A tiny model whose blocks write nothing, so its stream holds at every layer what its embedding holds."""
    model = Model(tiny_hf("llama", _VOCABULARY).double(), None, name="silent")
    with torch.no_grad():
        for layer in range(N_LAYERS):
            for kind in ("attn_out", "mlp_out"):
                for parameter in model.site_map[f"{kind}.{layer}"].module.parameters():
                    parameter.zero_()
    return model


def method_of(method: Estimator, steps: int, rule: Rule) -> Method:
    """`node_effects` with these settings, as a method on functions of at most `D_MODEL` items.

    The items are coordinates of the embedding of a tiny model; the function reads them behind its last block, through
    the same segments, steps and bases that effects on any model go through.
    """

    def of(f: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> Tensor:
        model = _silent_model()
        k, table = len(x), embedding(model.hf).weight
        with torch.no_grad():
            for token, values in ((_CLEAN, x), (_PATCH, baseline)):
                table[token] = torch.nn.functional.pad(values.to(table), (0, D_MODEL - k))
        rows = [TokenBatch.of_rows(torch.tensor([[token]])) for token in (_CLEAN, _PATCH)]
        pairs = Pairs(rows[0], rows[1], torch.tensor([[4, 5]]))
        metric = of_site(f"resid_post.{N_LAYERS - 1}", lambda acts, _: f(acts[:, -1, :k]))
        with progress.hidden():
            effects = node_effects(
                model, neurons(model, ["embed"]), pairs, metric, method=method, steps=steps, rule=rule, measured=False
            )
        return effects["embed"].effect[:k]

    return of
