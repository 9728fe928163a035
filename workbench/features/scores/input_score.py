"""Input score: whether the tokens that activate a feature are the tokens that it writes."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import ShapeError
from workbench.features.passes.contexts import MISSING


@checked
def input_score(
    max_tokens: Int[Tensor, "features contexts"], lens_ids: Int[Tensor, "scored k"], min_contexts: int = 10
) -> Float[Tensor, " features"]:
    """Share of a feature's top contexts whose most activating token is among its lens tokens.

    Compared by token id; a token that tops several contexts counts each time. nan where a feature has fewer than
    `min_contexts` contexts (`MISSING` marks contexts that do not exist).

    Raises:
        ShapeError: if the two are for different numbers of features.

    Source: Arad, Mueller, Belinkov 2025, at most 100 contexts and at least 10 (their code). Their code compares
    re-tokenised strings, which misses tokens with spaces or underscores.

    >>> import torch
    >>> input_score(torch.tensor([[7, 7, 9, 3]]), torch.tensor([[7, 9]]), min_contexts=4)  # 7, 7 and 9 of four
    tensor([0.7500])
    """
    if len(max_tokens) != len(lens_ids):
        raise ShapeError(
            f"input_score: contexts of {len(max_tokens)} features, lens tokens of {len(lens_ids)}; they pair up."
        )
    exists = max_tokens != MISSING
    hit = (max_tokens[:, :, None] == lens_ids[:, None, :]).any(dim=2) & exists
    n = exists.sum(1)
    return (hit.sum(1) / n).masked_fill(n < min_contexts, float("nan"))
