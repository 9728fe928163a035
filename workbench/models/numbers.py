"""No NaN passes as an answer: logits and activations are looked at once before they are handed out."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.hooks.capture import Activations

_CAUSE = "The model computes no number there: its weights are damaged, or its dtype overflows; try dtype='float32'."


def without_nan(
    what: str, values: Float[Tensor, "*rows k"], mask: Bool[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "*rows k"]:
    """The values, none of which is NaN at a chosen token; padding does not count.

    Args:
        what: the call, for the message.
        values: logits or losses, `(chosen tokens, k)` in row order, or `(batch, pos, k)`.
        mask: True at real tokens.
        chosen: the tokens that were asked for.

    Raises:
        InvalidInputError: if one is NaN.
    """
    if has_nan(values):
        tokens = (values[chosen.to(values.device)] if values.ndim == 3 else values).isnan()
        _refuse(f"{what}: NaN", tokens, mask, chosen, "")
    return values


def has_nan(values: Float[Tensor, "*rows k"]) -> bool:
    """Whether a value is NaN, without a tensor of booleans over the vocabulary."""
    return bool(values.amax(-1).isnan().any())


def require_activations(acts: Activations, mask: Bool[Tensor, "batch pos"], chosen: Bool[Tensor, "batch pos"]) -> None:
    """Raises InvalidInputError if an activation of a chosen token is NaN; padding does not count.

    Args:
        acts: what was captured, at all columns or at the chosen tokens only.
        mask: True at real tokens.
        chosen: the tokens that were asked for.
    """
    for site in acts:
        x = acts[site].detach()
        if not bool(x.isnan().any()):
            continue
        tokens = acts.flat(site).detach().isnan()
        if acts.rows is None:
            tokens = tokens[chosen.to(tokens.device)]
        _refuse(
            f"capture: NaN at {site}", tokens, mask, chosen,
            " To see where it begins, capture earlier sites with allow_nan=True.",
        )  # fmt: skip


def _refuse(what: str, is_nan: Tensor, mask: Tensor, chosen: Tensor, more: str) -> None:
    bad = is_nan.any(-1).nonzero()
    if not len(bad):
        return
    first = int(bad[0])
    row, column = chosen.nonzero()[first].tolist()
    position = int(mask[row, : column + 1].sum()) - 1
    raise InvalidInputError(
        f"{what}, first in row {row} at position {position}: {int(is_nan[first].sum())} of {is_nan.shape[-1]} values. "
        f"{_CAUSE}{more}"
    )
