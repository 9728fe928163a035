"""Circuits made by hand for tests of their picture, files and page."""

from __future__ import annotations

import torch

import circuits
from circuits.graph.circuit import SiteNodes
from circuits.graph.names import ERROR

SITES = ("attn_out.0", "mlp_out.0", "resid_post.0", "resid_post.1")
HOSTILE = "<script>document.title='owned'</script>\u202ex"


def drawn_circuit(
    per_site: int = 5, *, positions: bool = False, sites: tuple[str, ...] = SITES, n: int = 20
) -> circuits.Circuit:
    """`per_site` nodes at each site, the last one an error; effects of both signs, all different."""
    made = {}
    for s, site in enumerate(sites):
        feature = torch.arange(per_site) * 3 + s
        feature[-1] = ERROR
        pos = torch.arange(per_site) % 4 if positions else torch.full((per_site,), -1)
        effect = torch.tensor([(-1.0) ** (i + s) * (1 + 7 * i + s) / 37 for i in range(per_site)], dtype=torch.float64)
        made[site] = SiteNodes(
            d_sae=10_000, pos=pos, feature=feature, effect=effect, se=effect.abs() / 8, n=torch.full_like(feature, n)
        )
    return circuits.Circuit(
        sites=made, bases=dict.fromkeys(sites, "b"), model_fingerprint="m", n_tokens=4 if positions else None,
        made="the nodes of a test",
    )  # fmt: skip


def drawn_edges(circuit: circuits.Circuit, *, every: int = 1, n: int = 20) -> circuits.Edges:
    """Edges between the nodes of each site and the next one; only each `every`-th is not zero."""
    tables, names = {}, list(circuit.sites)
    for k, (up, down) in enumerate(zip(names, names[1:], strict=False)):
        ends = [torch.stack([circuit.sites[name].pos, circuit.sites[name].feature], 1) for name in (up, down)]
        shape = (len(ends[0]), len(ends[1]))
        number = torch.arange(shape[0] * shape[1], dtype=torch.float64).reshape(shape)
        effect = torch.where(number % every == 0, (number + 1 + k / 10) / 1000 * (-1) ** number, 0.0)
        tables[up, down] = circuits.EdgeTable(
            upstream=ends[0], downstream=ends[1], effect=effect, se=effect.abs() / 4 + 0.001
        )
    return circuits.Edges(
        tables=tables, n=n, metric="logit difference", has_positions=circuit.n_tokens is not None, made="by hand"
    )
