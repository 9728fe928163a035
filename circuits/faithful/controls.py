"""Circuits to compare a circuit with: as many features, chosen without the metric; the same error nodes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.decomposition import bases as checked_bases
from circuits.decomposition import places, reads_of
from circuits.graph.circuit import ERROR, Circuit, SiteNodes
from circuits.nodes.effects import NodeEffects
from circuits.pairs import Pairs
from workbench.bases.base import CHUNK_ENTRIES
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model


@checked
def random_circuit(effects: NodeEffects, circuit: Circuit, seed: int = 0) -> Circuit:
    """As many features as a circuit has, drawn from all that are active in either run, with the circuit's error nodes.

    Args:
        effects: where the features are active.
        circuit: what it is a control of.
        seed: decides the features.

    Raises:
        InvalidInputError: for a circuit of everything.
    """
    tables = {name: site.nodes() for name, site in effects.sites.items()}
    where = torch.cat([torch.full_like(table.feature, i) for i, table in enumerate(tables.values())]).cpu()
    pos, feature = (torch.cat([getattr(t, f) for t in tables.values()]).cpu() for f in ("pos", "feature"))
    real = (feature != ERROR).nonzero()[:, 0]
    n = min(_n_features(circuit), len(real))
    chosen = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]]
    picked = {name: chosen[where[chosen] == i] for i, name in enumerate(tables)}
    return _instead(circuit, {name: (pos[index], feature[index]) for name, index in picked.items()}, "random features")


@checked
def top_activation_circuit(model: Model, bases: Mapping[str, AnySAE], pairs: Pairs, circuit: Circuit) -> Circuit:
    """The features that write most on the clean prompts, as many as a circuit has, with the circuit's error nodes.

    Args:
        model: the model.
        bases: the bases that the circuit was made with.
        pairs: where activity is measured, as mean absolute coefficient times the norm of the feature's row.
        circuit: what it is a control of.

    Raises:
        InvalidInputError: for a circuit of everything.
    """
    sizes = written_sizes(model, bases, pairs)
    if circuit.n_tokens is None:
        sizes = {name: size.sum(0, keepdim=True) for name, size in sizes.items()}
    flat = torch.cat([size.flatten() for size in sizes.values()])
    # ties and what is never active are no features to choose
    top = flat.topk(min(_n_features(circuit), int((flat > 0).sum()))).indices.sort().values
    picked, start = {}, 0
    for name, size in sizes.items():
        own = top[(top >= start) & (top < start + size.numel())] - start
        pos = own // size.shape[1] if circuit.n_tokens is not None else torch.full_like(own, -1)
        picked[name], start = (pos.cpu(), (own % size.shape[1]).cpu()), start + size.numel()
    return _instead(circuit, picked, "the features that write most")


def written_sizes(
    model: Model, bases: Mapping[str, AnySAE], pairs: Pairs, batch_size: int = 64
) -> dict[str, Float[Tensor, "pos d_sae"]]:
    """Mean over clean prompts of each feature's absolute coefficient times the norm of its row, by column."""
    placed, clean = places(model, checked_bases(model, bases)), pairs.clean.to(model.device)
    sums = {p.site: torch.zeros(clean.ids.shape[1], p.basis.d_sae, device=model.device) for p in placed}
    for rows in torch.arange(len(clean), device=model.device).split(batch_size):
        batch = TokenBatch(clean.ids[rows], clean.mask[rows])
        acts = model.capture(batch, reads_of(placed))
        row, pos = batch.mask.nonzero(as_tuple=True)
        for place in placed:
            x = precise(acts.flat(place.read))[row, pos]
            for some in torch.arange(len(x), device=x.device).split(max(1, CHUNK_ENTRIES // place.basis.d_sae)):
                sums[place.site].index_add_(0, pos[some], place.basis.coefficients(x[some]).abs().float())
    norms = {place.site: place.basis.rows().norm(dim=1).to(model.device) for place in placed}
    return {site: total / len(clean) * norms[site] for site, total in sums.items()}


def _n_features(circuit: Circuit) -> int:
    return sum(feature != ERROR for _, _, feature in circuit.nodes())


def _instead(circuit: Circuit, picked: Mapping[str, tuple[Int[Tensor, " k"], Int[Tensor, " k"]]], how: str) -> Circuit:
    """The circuit's error nodes with other features."""
    sites = {}
    for name, site in circuit.sites.items():
        is_error = site.feature == ERROR
        pos, feature = picked.get(name, (site.pos[:0], site.feature[:0]))
        sites[name] = SiteNodes.of(
            site.d_sae, torch.cat([feature, site.feature[is_error]]), torch.cat([pos, site.pos[is_error]])
        )
    return Circuit(
        sites=sites, bases=circuit.bases, model_fingerprint=circuit.model_fingerprint, n_tokens=circuit.n_tokens,
        made=f"{how}, as many as in: {circuit.made}",
    )  # fmt: skip
