"""What a graph takes before it is made: bytes, and what fits where it is too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from circuits.attribution_graphs.choice import ChoiceOptions
from circuits.attribution_graphs.coders import Placed
from circuits.attribution_graphs.outputs import MOST
from circuits.attribution_graphs.replacement import ROWS_AT_ONCE, MLPs, needed
from circuits.attribution_graphs.sublayers import WHO
from workbench.core.display import OneLine
from workbench.core.errors import ResourceError
from workbench.core.numbers import byte_size, counted, number, setting
from workbench.hooks.sites import Site
from workbench.models.model import Model

_FLOAT, _INDEX = 4, 4
_LEAST_BATCH = 1


@dataclass(frozen=True, kw_only=True)
class GraphEstimate(OneLine):
    """Memory of a graph above that of the model and its dictionaries, in bytes.

    Attributes:
        prompt: patterns, streams, gates and weights in full precision: grows with the tokens, patterns with their
            square.
        features: active features, with what is known of each.
        rows: the held entries of all rows.
        batch: one batch of rows while it is made.
        tokens: of the prompt.
        nodes: features that become nodes.
        active: active features.
    """

    prompt: int
    features: int
    rows: int
    batch: int
    tokens: int
    nodes: int
    active: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.prompt + self.features + self.rows + self.batch

    def words(self) -> str:
        """One line."""
        return (
            f"attribution graph of {counted(self.tokens, 'tokens')} and {counted(self.active, 'active features')}: "
            f"{byte_size(self.bytes)} (prompt {byte_size(self.prompt)}, rows of {counted(self.nodes, 'features')} "
            f"{byte_size(self.rows)}, a batch {byte_size(self.batch)})"
        )


def estimated(
    model: Model, given: Sequence[Placed], mlps: MLPs, options: ChoiceOptions, n_tokens: int, active: int
) -> GraphEstimate:
    """The memory of a graph.

    Args:
        model: the model.
        given: the coders.
        mlps: how MLPs without one are followed.
        options: features, batch and entries held.
        n_tokens: of the prompt.
        active: active features; 0 where it is not known yet.
    """
    maps, kept = needed(model, given, mlps), torch.empty(0, dtype=model.dtype).element_size()
    wide = max(_FLOAT, kept)
    heads = model.site_map[Site("z", 0)].heads or 1
    patterns = len(maps.attention) * heads * n_tokens**2 * kept
    streams = (3 * model.n_layers + 3 * len(given)) * n_tokens * model.d_model * wide
    gates = sum(4 * n_tokens * model.width(Site("mlp_post", i)) * wide for i in maps.mlp)
    weights = 0 if model.dtype in (torch.float32, torch.float64) else _weights(model, maps.attention, maps.mlp)
    columns = active + (len(given) + len(maps.leaves) + 1) * n_tokens
    held = min(options.cap, columns)
    nodes = min(options.features, active) if active else options.features
    widest = max([model.d_model, *(model.width(Site("z", i)) for i in maps.attention[:1]),
                  *(model.width(Site("mlp_post", i)) for i in maps.mlp[:1])])  # fmt: skip
    return GraphEstimate(
        prompt=patterns + streams + gates + weights, features=active * (8 + 8 + wide),
        rows=(nodes + MOST) * held * (_INDEX + wide),
        batch=options.batch_size * (3 * columns * wide + 6 * n_tokens * widest * wide)
        + ROWS_AT_ONCE * model.d_model * wide,
        tokens=n_tokens, nodes=nodes, active=active,
    )  # fmt: skip


def _weights(model: Model, attention: Sequence[int], mlps: Sequence[int]) -> int:
    """Copies of weights in fp32, of a model in half precision."""
    wide = model.width(Site("z", 0)) + model.width(Site("v", 0))
    return _FLOAT * model.d_model * (
        len(attention) * wide + sum(3 * model.width(Site("mlp_post", i)) for i in mlps)
    )  # fmt: skip


def fitting(
    model: Model, given: Sequence[Placed], mlps: MLPs, options: ChoiceOptions, n_tokens: int, active: int, budget: float
) -> tuple[GraphEstimate, ChoiceOptions]:
    """The estimate, and the options with the largest batch that fits.

    Raises:
        ResourceError: if it takes more than the budget, with the features or the tokens that fit.
    """

    def of(options: ChoiceOptions, tokens: int = n_tokens) -> GraphEstimate:
        return estimated(model, given, mlps, options, tokens, active * tokens // n_tokens)

    while (found := of(options)).bytes > budget and options.batch_size > _LEAST_BATCH:
        options = replace(options, batch_size=options.batch_size // 2)
    if found.bytes <= budget:
        return found, options
    fixed = found.bytes - found.rows
    features = int((budget - fixed) * (found.nodes + MOST) / found.rows) - MOST if found.rows else 0
    tokens = next((t for t in range(n_tokens - 1, 1, -max(1, n_tokens // 256)) if of(options, t).bytes <= budget), 0)
    ways = [
        *([f"take features={features}"] if features > 0 else []),
        *([f"shorten the prompt to {counted(tokens, 'tokens')}"] if tokens else []),
        f"raise budget_gb to {setting(round(found.bytes / 1e9 * 1.05, 3))}",
    ]
    raise ResourceError(
        f"{WHO}(features={number(options.features)}, budget_gb={setting(budget / 1e9)}): {found.words()}, above the "
        f"budget of {byte_size(budget)}. {' or '.join(ways).capitalize()}."
    )
