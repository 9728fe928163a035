"""The edits that the page asks for as interventions, and their control."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.directions import random_directions
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.saes import SAEAblate, SAEAddMax, SAEClamp, SAEScale
from workbench.interventions.scopes import Scope
from workbench.interventions.shapes import EqualNorm
from workbench.serve.ask import FeatureEdit


def steered(sae: AnySAE, site: Site, edits: Sequence[FeatureEdit], scope: Scope) -> Intervention:
    """The edits: additions first, so that a_max is that of the unedited token; clamps and ablations last."""
    return sum((Intervention.at(site, op, scope) for op in _ops(sae, edits)), Intervention())


def control(sae: AnySAE, site: Site, edits: Sequence[FeatureEdit], scope: Scope, seed: int) -> Intervention:
    """A random direction with, at every token, the norm that the edits would have changed it by."""
    direction = random_directions(torch.ones(1, as_basis(sae).d_out), seed=seed % 2**63)[0]
    return Intervention.at(site, EqualNorm(tuple(_ops(sae, edits)), direction), scope)


def words(edits: Sequence[FeatureEdit]) -> tuple[str, ...]:
    """Each edit of `steered` in words."""
    return tuple(", ".join(map(str, group)) for _, group in by_mode(edits))


def by_mode(edits: Sequence[FeatureEdit]) -> list[tuple[str, list[FeatureEdit]]]:
    """The edits of each mode that occurs, in the order in which they are made."""
    groups = [(mode, [edit for edit in edits if edit.mode == mode]) for mode in ("steer", "scale", "clamp", "ablate")]
    return [(mode, group) for mode, group in groups if group]


def _ops(sae: AnySAE, edits: Sequence[FeatureEdit]) -> list[Op]:
    ops: list[Op] = []
    for mode, group in by_mode(edits):
        features = [edit.feature for edit in group]
        amounts = torch.tensor([edit.strength for edit in group])
        if mode == "steer":
            rows = (basis := as_basis(sae)).rows(basis.features(features))
            ops.append(SAEAddMax(sae, amounts.to(rows) @ rows))
        elif mode == "scale":
            ops.append(SAEScale(sae, features, amounts))
        elif mode == "clamp":
            ops.append(SAEClamp(sae, features, amounts))
        else:
            ops.append(SAEAblate(sae, features))
    return ops
