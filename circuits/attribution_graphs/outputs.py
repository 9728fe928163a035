"""What an attribution graph explains: the logits of likely tokens, differences of two, or any directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution_graphs.sublayers import WHO
from circuits.classics.shared import single_token
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.hooks.ends import unembedding
from workbench.models.model import Model

SHARE, MOST = 0.95, 10
"""The likeliest tokens that hold this share of the probability are explained, at most so many."""
Wanted = Sequence[str | tuple[str, str]] | Mapping[str, Tensor] | None
"""Tokens, pairs of tokens whose difference is meant, or directions behind the final norm by name."""


@dataclass(frozen=True, kw_only=True)
class Output(OneLine):
    """One thing that is explained.

    Attributes:
        label: a token, two with a minus sign, or the name of a direction.
        token: id of the token; for what is no token a number from the size of the vocabulary on.
        weight: its share of what the graph explains.
        probability: of the token; None for what is none.
    """

    label: str
    token: int
    weight: float
    probability: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Outputs(OneLine):
    """All that is explained: directions behind the final norm, and what the unembedding adds to each."""

    each: tuple[Output, ...]
    directions: Float[Tensor, "n d_model"]
    added: Float[Tensor, " n"]

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """Share of each."""
        return torch.tensor([output.weight for output in self.each], dtype=torch.float64)


@torch.no_grad()
def outputs_of(model: Model, batch: TokenBatch, wanted: Wanted) -> Outputs:
    """What is explained behind a prompt: a token is its logit minus the mean logit, before a soft cap.

    Raises:
        InvalidInputError: for a text that is not one token.
        ShapeError: for a direction of another width than the stream.
        DegenerateInputError: if nothing is asked for, or a direction is zero.
    """
    if wanted is not None and not len(wanted):
        raise DegenerateInputError(f"{WHO}(targets={wanted!r}): nothing is asked for. Give tokens, or leave it out.")
    if isinstance(wanted, Mapping):
        return _directions(model, wanted)
    chances = precise(model.logits(batch)[0]).softmax(-1)
    ends = _Unembedding(model)
    if wanted is None:
        top = chances.topk(min(MOST, len(chances)))
        n = int((top.values.cumsum(0) - top.values < SHARE).sum())
        ids = top.indices[:n].tolist()
        total = float(chances[ids].sum())
        each = tuple(
            Output(label=_text(model, i), token=i, weight=float(chances[i]) / total, probability=float(chances[i]))
            for i in ids
        )
        return Outputs(each=each, directions=torch.stack([ends.centred(i)[0] for i in ids]),
                       added=torch.stack([ends.centred(i)[1] for i in ids]))  # fmt: skip
    found, rows, added = [], [], []
    for number, one in enumerate(wanted):
        ids = [single_token(f"{WHO}(targets=[{text!r}])", model, text)
               for text in ([one] if isinstance(one, str) else one)]  # fmt: skip
        if isinstance(one, str):
            row, more = ends.centred(ids[0])
            output = Output(label=one, token=ids[0], weight=1 / len(wanted), probability=float(chances[ids[0]]))
        else:
            row, more = (a - b for a, b in zip(ends.row(ids[0]), ends.row(ids[1]), strict=True))
            output = Output(label=f"{one[0]} −{one[1]}", token=model.d_vocab + number, weight=1 / len(wanted))
        found.append(output)
        rows.append(row)
        added.append(more)
    return Outputs(each=tuple(found), directions=_not_zero(torch.stack(rows), found), added=torch.stack(added))


class _Unembedding:
    """Rows of the unembedding with their biases, and their means over the vocabulary."""

    def __init__(self, model: Model) -> None:
        self._head = unembedding(model.hf)
        weight = self._head.weight.detach()
        total = sum((precise(part).double().sum(0) for part in weight.split(8192)), torch.zeros(()).to(weight.device))
        self._mean = (total / len(weight)).to(precise(weight[:1]).dtype)

    def row(self, token: int) -> tuple[Tensor, Tensor]:
        """The direction and the bias of a token."""
        direction = precise(self._head.weight.detach()[token])
        bias = self._head.bias
        return direction, direction.new_zeros(()) if bias is None else precise(bias.detach()[token])

    def centred(self, token: int) -> tuple[Tensor, Tensor]:
        """The same minus their means."""
        direction, bias = self.row(token)
        return direction - self._mean, bias if self._head.bias is None else bias - precise(self._head.bias).mean()


def _directions(model: Model, wanted: Mapping[str, Tensor]) -> Outputs:
    for name, direction in wanted.items():
        if tuple(direction.shape) != (model.d_model,):
            raise ShapeError(
                f"{WHO}(targets={{{name!r}: ...}}): it has shape {tuple(direction.shape)}; give ({model.d_model},), a "
                "direction behind the final norm."
            )
    each = tuple(Output(label=name, token=model.d_vocab + i, weight=1 / len(wanted)) for i, name in enumerate(wanted))
    rows = torch.stack([precise(direction) for direction in wanted.values()]).to(model.device)
    return Outputs(each=each, directions=_not_zero(rows, each), added=rows.new_zeros(len(rows)))


def _not_zero(rows: Tensor, each: Sequence[Output]) -> Tensor:
    for row, output in zip(rows, each, strict=True):
        if not bool(row.any()):
            raise DegenerateInputError(f"{WHO}: the direction of {output.label!r} is zero. Give two different tokens.")
    return rows


def _text(model: Model, token: int) -> str:
    return model.tokenizer.decode([token]) if model.tokenizer else str(token)
