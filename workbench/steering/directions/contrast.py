"""Steering directions from contrasts of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

ROWS_PER_PASS = 32


@checked
def difference_of_means(
    positive: Float[Tensor, " n_positive ..."], negative: Float[Tensor, " n_negative ..."]
) -> Float[Tensor, "*shape"]:
    """Mean of the positive rows minus mean of the negative rows, summed in fp64, returned in fp32.

    Raises:
        DegenerateInputError: if one side has no row.
        ShapeError: if the rows have different shapes.

    >>> difference_of_means(torch.tensor([[3.0, 1.0], [5.0, 1.0]]), torch.tensor([[1.0, 1.0]]))  # (3 + 5) / 2 - 1
    tensor([3., 0.])
    """
    if positive.shape[1:] != negative.shape[1:]:
        raise ShapeError(
            f"difference_of_means: rows of shape {tuple(positive.shape[1:])} and {tuple(negative.shape[1:])}. "
            "Both sides must come from the same site."
        )
    if not len(positive) or not len(negative):
        raise DegenerateInputError(
            f"difference_of_means: {len(positive)} positive and {len(negative)} negative rows. Give at least "
            f"one of each."
        )
    return (positive.double().mean(0) - negative.double().mean(0)).float()


def cosine(a: Float[Tensor, "*rows d"], b: Float[Tensor, " d"]) -> Float[Tensor, "*rows"]:
    """Cosine of each row of `a` with `b`; 0 where one of them is zero.

    >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))  # 3 / 5
    tensor([0.6000, 0.0000])
    """
    return torch.nn.functional.cosine_similarity(a.float(), b.float().expand_as(a), dim=-1)


@torch.no_grad()
def mean_activations(
    model: Model, batch: TokenBatch, sites: Sequence[str], where: Bool[Tensor, "batch pos"]
) -> dict[str, Float[Tensor, "batch d"]]:
    """Mean activation of each row over its chosen tokens, per site, in fp32.

    Args:
        model: the model.
        batch: the rows.
        sites: where to read.
        where: True at the tokens to average; padding is left out anyway.

    Raises:
        DegenerateInputError: if a row has no chosen token.
    """
    chosen = where.to(batch.mask.device) & batch.mask
    empty = (~chosen.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise DegenerateInputError(f"mean_activations: rows {empty[:5]} have no chosen token. Choose one in every row.")
    means: dict[str, list[Tensor]] = {str(site): [] for site in sites}
    for start in range(0, len(batch), ROWS_PER_PASS):
        part = slice(start, start + ROWS_PER_PASS)
        rows = batch[part]
        acts = model.capture(rows, list(sites))
        weight = chosen[part][:, -rows.ids.shape[1] :].float()
        weight = weight / weight.sum(1, keepdim=True)
        for site, kept in means.items():
            kept.append(torch.einsum("bp,bpd->bd", weight, acts.flat(site).float().nan_to_num(0.0)))
    return {site: torch.cat(kept) for site, kept in means.items()}


@checked
@torch.no_grad()
def directions_by_position(
    model: Model, positive: TokenBatch, negative: TokenBatch, sites: Sequence[str], positions: Sequence[int] = (-1,)
) -> Mapping[str, Float[Tensor, "positions d"]]:
    """Difference of means at each site and at each position counted from the end of the row.

    Source: Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.3 (they read
    block inputs; any site can be read here).

    Raises:
        InvalidInputError: for a position that is not negative or lies before the start of a row.
    """
    shortest = int(torch.cat([positive.lengths, negative.lengths]).min())
    for position in positions:
        if not -shortest <= position <= -1:
            raise InvalidInputError(
                f"directions_by_position: position {position}; the shortest row has {shortest} tokens. "
                f"Count from the end: -1 to {-shortest}."
            )
    names = [str(site) for site in sites]
    rows: list[dict[str, list[Tensor]]] = [{name: [] for name in names} for _ in range(2)]
    for kept, batch in zip(rows, (positive, negative), strict=True):
        ends = batch.lengths[:, None] + torch.tensor(
            positions, device=batch.ids.device
        )  # absolute places of the tokens
        for start in range(0, len(batch), ROWS_PER_PASS):
            part = batch[slice(start, start + ROWS_PER_PASS)]
            place = part.positions.masked_fill(~part.mask, -1)
            column = (place[:, None] == ends[start : start + ROWS_PER_PASS, :, None]).float().argmax(2)
            acts = model.capture(part, list(sites))
            for name in names:
                x = acts.flat(name)
                kept[name].append(x[torch.arange(len(x), device=x.device)[:, None], column.to(x.device)].float())
    return {name: difference_of_means(*(torch.cat(kept[name]) for kept in rows)) for name in names}


@dataclass(frozen=True, eq=False)
class TwoByTwo(Shown):
    """What the kind of reply and the kind of prompt each do to the activations, told apart.

    Four cells: harmful and harmless prompts, each with a refusal and with a compliant reply.

    Attributes:
        reply: effect of refusing, averaged over both kinds of prompt: the refusal direction.
        prompt: effect of a harmful prompt, averaged over both kinds of reply: the topic.
        interaction: how much more refusing does after a harmful prompt than after a harmless one.
        simple: harmful with refusal minus harmless with compliance; equals `reply + prompt`.
    """

    reply: Float[Tensor, " d"]
    prompt: Float[Tensor, " d"]
    interaction: Float[Tensor, " d"]
    simple: Float[Tensor, " d"]

    @classmethod
    @checked
    def of(
        cls,
        harmful_refusal: Float[Tensor, "n d"],
        harmful_compliant: Float[Tensor, "n d"],
        harmless_refusal: Float[Tensor, "n d"],
        harmless_compliant: Float[Tensor, "n d"],
    ) -> TwoByTwo:
        """The effects from one mean activation per row.

        >>> cells = [torch.tensor([[x]]) for x in (7.0, 3.0, 5.0, 1.0)]
        >>> effects = TwoByTwo.of(*cells)  # reply ((7-3) + (5-1)) / 2, prompt ((7-5) + (3-1)) / 2
        >>> effects.reply.item(), effects.prompt.item(), effects.interaction.item(), effects.simple.item()
        (4.0, 2.0, 0.0, 6.0)
        """
        after_harmful = difference_of_means(harmful_refusal, harmful_compliant)
        after_harmless = difference_of_means(harmless_refusal, harmless_compliant)
        topic = difference_of_means(harmful_refusal, harmless_refusal) + difference_of_means(
            harmful_compliant, harmless_compliant
        )
        simple = difference_of_means(harmful_refusal, harmless_compliant)
        return cls((after_harmful + after_harmless) / 2, topic / 2, after_harmful - after_harmless, simple)
