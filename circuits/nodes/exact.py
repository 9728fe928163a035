"""Exact effects: every node patched alone, or in closed form where the metric is linear in the site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.graph.circuit import ERROR, Circuit, SiteNodes
from circuits.metrics import AnyMetric, named, sign_of
from circuits.nodes.effects import NodeEffects, SiteEffects
from circuits.nodes.runs import AttributionOptions, runs_of
from circuits.nodes.setting import Baseline, Setting, SiteState, States, setting_of
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE, as_basis
from workbench.core import progress
from workbench.core.arguments import checked
from workbench.core.errors import ShapeError
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.probes.linear import Probe


@checked
def exact_effects(
    model: Model,
    bases: Mapping[str, AnySAE],
    pairs: Pairs | TokenBatch,
    metric: AnyMetric,
    circuit: Circuit | Mapping[str, list[int]],
    *,
    baseline: Baseline | None = None,
    keep: Bool[Tensor, "batch pos"] | None = None,
    batch_size: int = 64,
) -> NodeEffects:
    """Effect of patching each node of a circuit alone, at all its positions, each one run from the site on.

    The reference that an estimate has to agree with; slow.

    Args:
        model: the model.
        bases: a basis per site.
        pairs: as for `node_effects`.
        metric: as for `node_effects`.
        circuit: the nodes; or feature numbers per site.
        baseline: as for `node_effects`.
        keep: as for `node_effects`.
        batch_size: rows per forward pass.

    Raises:
        MismatchError: as `node_effects`.
        ShapeError: as `node_effects`.
        DegenerateInputError: if the mask keeps no token.
        InvalidInputError: if a feature does not exist, or the circuit is everything.
    """
    paired = isinstance(pairs, Pairs) and pairs.patch is not None
    chosen: Baseline = baseline or ("patch" if paired else "zero_keep_error")
    setting = setting_of(model, bases, pairs, metric, chosen, keep, "exact_effects")
    nodes = _nodes(setting, circuit)
    options = AttributionOptions(method="exact", baseline=chosen, batch_size=batch_size)
    states = States(setting, batch_size)
    found: dict[str, list[Tensor]] = {place.site: [] for place in setting.places}
    chunks = setting.chunks(batch_size)
    n_nodes = sum(map(len, nodes.values()))
    with progress.task(total=len(chunks) * n_nodes, description="exact effects", unit="nodes") as task:
        for rows in chunks:
            at = states.of(rows)
            for place, run in runs_of(setting, setting.places, rows, options):
                base = run.values([run.clean])[0]
                changes = _changes(setting, place.site, rows, at[place.site], nodes[place.site])
                effects = [run.values([run.clean + change])[0] - base for change in changes]
                found[place.site].append(torch.stack(effects, 1) if effects else base.new_zeros(len(rows), 0))
                task.advance(len(effects))
    sites = {site: _collected(setting, site, nodes[site], torch.cat(made), options) for site, made in found.items()}
    positions = isinstance(circuit, Circuit) and circuit.n_tokens is not None
    return NodeEffects(
        sites=sites, metric=named(setting.metric), baseline=chosen, aggregation="none" if positions else "sum",
        n_tokens=setting.keep.shape[1] if positions else None, model_fingerprint=model.fingerprint,
        bases={p.site: p.basis.fingerprint for p in setting.places}, note=setting.note,
    )  # fmt: skip


def _nodes(setting: Setting, circuit: Circuit | Mapping[str, list[int]]) -> dict[str, SiteNodes]:
    bases = {place.site: place.basis for place in setting.places}
    if isinstance(circuit, Circuit):
        list(circuit.nodes())  # refuses a circuit of everything
        return {site: circuit.sites[site] for site in bases}
    given = {str(setting.model.resolve(site)): features for site, features in circuit.items()}
    return {site: SiteNodes.of(basis.d_sae, basis.features(given.get(site, []))) for site, basis in bases.items()}


def _changes(setting: Setting, site: str, rows: Tensor, state: SiteState, nodes: SiteNodes) -> list[Tensor]:
    """By what the kept tokens change when each node is patched."""
    basis = next(place.basis for place in setting.places if place.site == site)
    pos = setting.keep[rows].nonzero(as_tuple=True)[1].to(state.x.device)
    moves = state.moves(basis, slice(None))
    error = state.change - moves @ basis.rows().to(moves)
    made = []
    for where, feature in zip(nodes.pos.tolist(), nodes.feature.tolist(), strict=True):
        change = error if feature == ERROR else moves[:, feature, None] * basis.rows([feature]).to(moves)
        made.append(change if where < 0 else change * (pos == where)[:, None])
    return made


def _collected(
    setting: Setting, site: str, nodes: SiteNodes, effects: Float[Tensor, "rows nodes"], options: AttributionOptions
) -> SiteEffects:
    example, node = effects.nonzero(as_tuple=True)
    pos, feature = (values.to(effects.device)[node] for values in (nodes.pos, nodes.feature))
    return SiteEffects(
        site=site, d_sae=nodes.d_sae, n=len(setting.clean), example=example, pos=pos, feature=feature,
        value=effects[example, node], added=effects.sum(1), total=torch.full_like(effects[:, 0], float("nan"))
        if effects.shape[1] else effects.sum(1), method=options.words,
    )  # fmt: skip


@checked
def linear_effects(
    contributions: Float[Tensor, "rows d_sae"], sae: AnySAE, probe: Probe, labels: Int[Tensor, " rows"]
) -> SiteEffects:
    """Exact effects of zeroing each feature (error kept) on a linear probe at the SAE's own site.

    Pooling and probe are linear, so the effect is `sign(label) * pooled contribution * (w . row of f)`: no gradient, no
    model run, no error of approximation, and effects of sets add up.

    Args:
        contributions: those of `Basis.coefficients` (activations, if the SAE does not normalise its input), mean over
            the tokens that the probe pools.
        sae: the SAE.
        probe: the probe; its site is the SAE's.
        labels: 0 or 1 per row.

    Raises:
        ShapeError: if the numbers of labels and rows differ.
    """
    n, d_sae = contributions.shape
    if len(labels) != n:
        raise ShapeError(f"linear_effects: {len(labels)} labels for {n} rows of contributions. Give one per row.")
    writes = as_basis(sae).rows().to(contributions) @ probe.w.to(contributions)
    per_row = sign_of(labels).to(contributions)[:, None] * contributions * writes
    example, feature = per_row.nonzero(as_tuple=True)
    total = per_row.sum(dim=1)
    return SiteEffects(
        site=probe.site, d_sae=d_sae, n=n, example=example, pos=torch.full_like(feature, -1), feature=feature,
        value=per_row[example, feature], added=total, total=total,
        method="exact (linear probe at the SAE's own site; zero, error kept)",
    )  # fmt: skip
