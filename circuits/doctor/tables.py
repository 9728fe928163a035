"""Edges, direct logit attributions, patch grids and SHIFT's exact effects in the form that the doctor examines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.classics.direct import DirectAttribution, direct_logit_attribution
from circuits.classics.patch_grid import By, PatchGrid, patch_grid
from circuits.classics.shared import Align
from circuits.decomposition import bases as checked_bases
from circuits.doctor import models
from circuits.doctor.attribution import Attribution, Make
from circuits.edges.attribute import edge_effects
from circuits.edges.tables import Edges
from circuits.graph.circuit import Circuit
from circuits.metrics import AnyMetric
from circuits.nodes.effects import SiteEffects
from circuits.pairs import Pairs
from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import counted
from workbench.models.model import Model


@dataclass(frozen=True, eq=False, kw_only=True)
class TableCase:
    """What a table was made of.

    Attributes:
        model: the model.
        pairs: the pairs.
        bases: a basis per site, for edges.
        metric: what it is on, for edges and patch grids.
        circuit: the nodes, for edges.
    """

    model: Model
    pairs: Pairs
    bases: Mapping[str, AnySAE] | None = None
    metric: AnyMetric | None = None
    circuit: Circuit | None = None


Again = Callable[[Model, Pairs], np.ndarray]


def attribution_of(table: DirectAttribution | PatchGrid | Edges, case: TableCase) -> Attribution:
    """The table in the form that the doctor examines.

    Raises:
        MismatchError: if it was made on another number of pairs.
        InvalidInputError: if something is missing.
    """
    if isinstance(table, DirectAttribution):
        return _of_direct(table, case)
    if isinstance(table, PatchGrid):
        return _of_grid(table, case)
    return _of_edges(table, case)


def _varied(one: Attribution, case: TableCase, again: Again) -> Attribution:
    """With the scores of random models, shuffled labels and models that compute the same."""
    model, pairs = case.model, case.pairs
    swapped = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: len(pairs) // 2]
    answers = pairs.answers.clone()
    answers[swapped.to(answers.device)] = answers[swapped.to(answers.device)].flip(1)

    def same(how: Callable[..., Model | None]) -> Make | None:
        made = how(model, pairs.clean)
        return None if made is None else lambda: again(made, pairs)

    return replace(
        one, randomised=[lambda k=k: again(models.randomised(model, k + 1), pairs) for k in range(models.PARTS)],
        shuffled=lambda: again(model, replace(pairs, answers=answers)), folded=same(models.folded),
        rescaled=same(models.rescaled),
    )  # fmt: skip


def _require_pairs(n: int, case: TableCase) -> None:
    if n != len(case.pairs):
        raise MismatchError(
            f"attribution_doctor: the table is of {counted(n, 'pairs')}, and {len(case.pairs)} were given. Give those "
            "that it was made on."
        )


def _of_direct(table: DirectAttribution, case: TableCase) -> Attribution:
    _require_pairs(len(table.logits), case)

    def scores(of: DirectAttribution) -> np.ndarray:
        return torch.stack([part.diff for part in of.parts], 1).double().cpu().numpy()

    def again(model: Model, pairs: Pairs) -> np.ndarray:
        return scores(direct_logit_attribution(model, pairs, by=table.by, ablate=False))

    singles = torch.stack([part.ablation for part in table.parts], 1).double().cpu().numpy()
    is_known = bool(np.isfinite(singles).any())
    one = Attribution(
        name=f"direct logit attribution by {table.by}, {counted(len(table.logits), 'pairs')}", scores=scores(table),
        singles=singles if is_known else None, adds_up=True,
        totals=(table.logits[:, 0] - table.logits[:, 1]).double().cpu().numpy(),
        prior=np.array([-1.0 if part.layer is None else float(part.layer) for part in table.parts]),
        why={
            3: "no component was ablated: direct_logit_attribution(ablate=True) measures it",
            4: "no component was ablated: direct_logit_attribution(ablate=True) measures it",
            6: "it has no setting", 9: "it explains the last layer of a model, and runs on no other function",
            10: "its components are not resampled", **_NO_METHOD,
        },
    )  # fmt: skip
    return _varied(one, case, again)


def _of_grid(table: PatchGrid, case: TableCase) -> Attribution:
    _require_pairs(table.effects.shape[1], case)
    if case.metric is None:
        raise InvalidInputError("attribution_doctor: a patch grid is on a metric. Give metric= as patch_grid had it.")
    known = ~table.effects.isnan().any(1)
    sites = list(dict.fromkeys(str(cell.site) for cell in table.cells))
    by: By = "all" if all(cell.column is None for cell in table.cells) else "position"
    align: Align = "end" if min(table.positions) < 0 else "start"

    def again(model: Model, pairs: Pairs) -> np.ndarray:
        made = patch_grid(model, pairs, case.metric, sites=sites, by=by, align=align)
        place = {cell: i for i, cell in enumerate(made.cells)}
        return made.effects[[place[cell] for cell in table.cells]][known].T.double().cpu().numpy()

    has_control = not bool(table.control[known].isnan().any())
    control = table.control[known].T.double().cpu().numpy()
    one = Attribution(
        name=f"patch grid on {table.metric}, {counted(table.effects.shape[1], 'pairs')}",
        scores=table.effects[known].T.double().cpu().numpy(), is_direct=True,
        settings={"baseline": [lambda: control]} if has_control else {},
        why={1: "effects of cells patched alone need not add up", 6: "no third prompts, so no other baseline",
             9: "its numbers are measured effects", 10: "its cells are not resampled", **_NO_METHOD},
    )  # fmt: skip
    return _varied(one, case, again)


def _of_edges(edges: Edges, case: TableCase) -> Attribution:
    _require_pairs(edges.n, case)
    if case.bases is None or case.metric is None or case.circuit is None:
        raise InvalidInputError(
            "attribution_doctor: edges are examined on what they were made of. Give bases, metric and circuit as "
            "edge_effects had them."
        )
    circuit, metric, bases = case.circuit, case.metric, checked_bases(case.model, case.bases)

    def scores(of: Edges) -> np.ndarray:
        flat = [of.tables[key].effect.double().cpu().flatten() for key in edges.tables]
        return torch.cat(flat)[None].numpy()

    def made(model: Model, own: Mapping[str, Basis], pairs: Pairs, **options: str) -> np.ndarray:
        fingerprints = {site: basis.fingerprint for site, basis in own.items()}
        nodes = replace(circuit, model_fingerprint=model.fingerprint, bases=fingerprints)
        return scores(edge_effects(model, own, pairs, metric, nodes, **options))  # type: ignore[arg-type]

    one = Attribution(
        name=f"edges on {edges.metric}, {counted(edges.n, 'pairs')}", scores=scores(edges),
        settings={"gradient at the later node": [
            lambda left=left: made(case.model, bases, case.pairs, left=left) for left in ("clean", "ig")
        ]},
        why={1: "edges skip paths through other nodes, so they need not add up", **_NO_EDGE, **_NO_METHOD},
    )  # fmt: skip
    return _varied(one, case, lambda model, pairs: made(model, models.rebound(bases, model), pairs))


def linear_attribution(effects: SiteEffects, acts: Float[Tensor, "inputs d_sae"], labels: np.ndarray) -> Attribution:
    """Effects of `linear_effects` in the form that the doctor examines.

    Args:
        effects: the effects.
        acts: pooled activation of every feature.
        labels: 0 or 1 per input.
    """
    items = effects.feature.unique()
    scores = torch.zeros(effects.n, len(items), dtype=torch.float64)
    scores[effects.example.cpu(), torch.searchsorted(items, effects.feature).cpu()] = effects.value.double().cpu()
    return Attribution(
        name=f"{effects.method}, {counted(effects.n, 'inputs')}", scores=scores.numpy(),
        values=acts[:, items.to(acts.device)].double().cpu().numpy(), is_direct=True, adds_up=True,
        totals=effects.total.double().cpu().numpy(), labels=labels,
        why={
            2: "its numbers are measured effects of a linear probe", 5: "no model runs above the probe's own site",
            6: "it has no setting", 9: "its numbers are measured effects", 11: "no norm lies behind that site",
            10: "other values of an item are not drawn",
        },
    )  # fmt: skip


_NO_METHOD = {7: "it scores no items of an input that a head could read", 8: "it scores no items"}
_NO_EDGE = dict.fromkeys((3, 4, 10), "edges are measured as sets: circuits.edge_faithfulness") | {
    9: "edges need a network of nodes, and planted functions have none"
}
