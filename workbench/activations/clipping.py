"""What it costs a model if dimensions of its activations are set to 0 during the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError
from workbench.core.stats import Estimate, paired_difference
from workbench.core.tokens import TokenBatch
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Map
from workbench.interventions.scopes import All
from workbench.models.model import Model


@dataclass(frozen=True)
class ClippingCost:
    """What it costs the model if dimensions of a site are set to 0 during the forward pass.

    Attributes:
        outliers: loss minus clean loss, in nats per token.
        random: the same for as many random other dimensions.
    """

    site: str
    dims: tuple[int, ...]
    outliers: Estimate
    random: Estimate


def clipping_cost(
    model: Model, rows: Int[Tensor, "rows pos"], site: str, dims: Sequence[int], *, seed: int = 0
) -> ClippingCost:
    """The loss with these dimensions set to 0 at all tokens, against the clean loss and random dimensions.

    Clipping for a measurement touches copies of activations. This touches the forward pass, which can destroy a model
    whose attention rests on those dimensions.

    Raises:
        DegenerateInputError: without a dimension, or without another one to compare with.
    """
    width = model.width(site)
    others = [i for i in range(width) if i not in set(dims)]
    if not dims or len(others) < len(dims):
        raise DegenerateInputError(f"clipping_cost: {len(dims)} of {width} dimensions; name some, at most half.")
    shuffled = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: len(dims)]
    chosen = {"outliers": tuple(dims), "random": tuple(others[i] for i in shuffled.tolist())}
    batch = TokenBatch.of_rows(rows)
    clean = _row_losses(model, batch)
    costs = {name: paired_difference(_clipped(model, batch, site, some), clean) for name, some in chosen.items()}
    return ClippingCost(str(model.resolve(site)), tuple(dims), costs["outliers"], costs["random"])


def _row_losses(model: Model, batch: TokenBatch) -> np.ndarray:
    return model.loss(batch).double().nanmean(1).cpu().numpy()


def _clipped(model: Model, batch: TokenBatch, site: str, dims: Iterable[int]) -> np.ndarray:
    index = torch.tensor(sorted(dims))
    zeroed = Map(lambda x: x.index_fill(-1, index.to(x.device), 0.0))
    with model.plan(Intervention.at(site, zeroed, scope=All())):
        return _row_losses(model, batch)
