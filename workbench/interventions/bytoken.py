"""Edits that know tokens by their ids: a value of its own for each, and logits made of other tokens' logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.interventions.op import Op, Where, floats


@checked
@dataclass(frozen=True, eq=False)
class ReplaceTokens(Op):
    """Sets the activation at each of these tokens to a value of its own; other tokens stay as they are.

    At `embed` this is a change of rows of the embedding.

    Attributes:
        ids: token ids, each once; kept in ascending order.
        values: the new activation of each.

    >>> op = ReplaceTokens(torch.tensor([7]), torch.tensor([[3.0, 4.0]]))
    >>> here = Where(torch.zeros(2, dtype=torch.long), torch.arange(2), torch.tensor([7, 8]))
    >>> op(torch.ones(2, 2), here)
    tensor([[3., 4.],
            [1., 1.]])
    """

    ids: Int[Tensor, " n"]
    values: Float[Tensor, "k d"]

    def __post_init__(self) -> None:
        values, ids = floats(self.values, "ReplaceTokens", (2,), "(k, d), one row per id"), _distinct(self.ids, self)
        if len(ids) != len(values):
            raise ShapeError(f"ReplaceTokens: {len(ids)} ids and values of shape {tuple(values.shape)}; give (k, d).")
        order = ids.argsort()
        object.__setattr__(self, "ids", ids[order])
        object.__setattr__(self, "values", values[order])

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        if where is None or where.ids is None:
            raise DegenerateInputError(
                "ReplaceTokens: the ids of the tokens are not known here. Give the model token ids, not embeddings."
            )
        ids = self.ids.to(where.ids.device)
        at = torch.searchsorted(ids, where.ids).clamp_max(len(ids) - 1)
        hit = ids[at] == where.ids
        return torch.where(hit[:, None], self.values.to(h)[at], h)

    @property
    def width(self) -> int | None:
        return self.values.shape[-1]


@checked
@dataclass(frozen=True, eq=False)
class MixEntries(Op):
    """Sets some entries of the activation to weighted sums of its entries, all read before any is set.

    `new[entries[i]] = sum_j weights[i, j] h[sources[i, j]] + mean_weight[i] mean(h) + bias[i]`. At `logits` this is a
    change of rows of the unembedding to combinations of its rows.

    Attributes:
        entries: which entries are set, each once.
        sources: the entries that each is made of.
        weights: by how much; zero where a row of `sources` has fewer.
        mean_weight: weight of the mean over all entries.
        bias: added last.

    >>> entries, sources = torch.tensor([2]), torch.tensor([[0, 1]])
    >>> op = MixEntries(entries, sources, torch.tensor([[0.5, 0.5]]), torch.tensor([1.0]), torch.tensor([10.0]))
    >>> op(torch.tensor([[1.0, 3.0, 5.0]]))  # (1 + 3) / 2 + (1 + 3 + 5) / 3 + 10
    tensor([[ 1.,  3., 15.]])
    """

    entries: Int[Tensor, " k"]
    sources: Int[Tensor, "k_sources m"]
    weights: Float[Tensor, "k_weights m_weights"]
    mean_weight: Float[Tensor, " k_mean"]
    bias: Float[Tensor, " k_bias"]

    def __post_init__(self) -> None:
        entries = _distinct(self.entries, self)
        weights = floats(self.weights, "MixEntries: weights", (2,), "(k, m)")
        mean_weight = floats(self.mean_weight, "MixEntries: mean_weight", (1,), "(k,)")
        bias = floats(self.bias, "MixEntries: bias", (1,), "(k,)")
        sizes = {len(entries), len(weights), len(mean_weight), len(bias)}
        if bool((self.sources < 0).any()):
            raise InvalidInputError(f"MixEntries: source {int(self.sources.min())}; entries are numbered from 0.")
        if self.sources.shape != weights.shape or len(sizes) > 1:
            raise ShapeError(
                f"MixEntries: {len(entries)} entries, sources {tuple(self.sources.shape)}, weights "
                f"{tuple(weights.shape)}, mean_weight {tuple(mean_weight.shape)}, bias {tuple(bias.shape)}; "
                "give (k,), (k, m), (k, m), (k,) and (k,)."
            )
        for name, value in (("weights", weights), ("mean_weight", mean_weight), ("bias", bias)):
            object.__setattr__(self, name, value)

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:  # noqa: ARG002
        top = int(max(self.entries.max(), self.sources.max() if self.sources.numel() else 0))
        if top >= h.shape[1]:
            raise ShapeError(f"MixEntries: entry {top} of activations that are {h.shape[1]} wide.")
        new = torch.einsum("nkm,km->nk", h[:, self.sources.to(h.device)], self.weights.to(h))
        new = new + h.mean(1, keepdim=True) * self.mean_weight.to(h) + self.bias.to(h)
        out = h.clone()
        out[:, self.entries.to(h.device)] = new
        return out


def _distinct(ids: Tensor, op: Op) -> Int[Tensor, " k"]:
    if ids.ndim != 1 or not len(ids) or ids.dtype != torch.long or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
        raise InvalidInputError(
            f"{op.name}: {ids.tolist()[:8]} ({ids.dtype}, shape {tuple(ids.shape)}); give distinct int64 ids, (k,)."
        )
    return ids
