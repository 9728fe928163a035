"""Arms of a steering study: each an edit or none, all measured on the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.errors import EditError
from workbench.core.tokens import TokenBatch
from workbench.hooks.handles import Hooks
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import PerRow
from workbench.interventions.report import EditReport
from workbench.interventions.scopes import Scope
from workbench.steering.sweep.measures import continuation_nll, distinct_2


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to steer.

    Attributes:
        name: unique within the study.
        family: what kind of edit, such as "refusal direction".
        strength: how strong, in the family's own unit.
        ops: the edit; a control has many random ones, and prompt i gets number i, in turn. Empty: unsteered.
        control: name of the arm that it is compared with.
    """

    name: str
    family: str
    strength: float
    ops: tuple[Op, ...] = ()
    control: str | None = None

    def op(self, n_rows: int) -> PerRow:
        """The edit of a batch of `n_rows` prompts."""
        return PerRow(self.ops, torch.arange(n_rows) % len(self.ops))


@dataclass(frozen=True, eq=False)
class Applied:
    """The edit that reached the model: mean norm per edited token, and its share of the residual norm there."""

    norm: float
    share: float


@dataclass(frozen=True, eq=False)
class Replies:
    """What the model said in one arm.

    Attributes:
        texts: one greedy reply per prompt.
        ids: the new tokens of each.
        logits: of the first token of each reply, fp32.
        applied: what was added, over prompts and replies.
    """

    texts: tuple[str, ...]
    ids: tuple[Int[Tensor, " _"], ...]
    logits: Float[Tensor, "batch d_vocab"]
    applied: Applied


def replies_of(model: Any, arm: Arm, prompts: TokenBatch, site: str, scope: Scope, max_new_tokens: int) -> Replies:
    """Greedy replies to the prompts in this arm, and the logits of their first tokens from the same pass.

    Raises:
        EditError: if the edit of a steered arm changed nothing.
    """
    n = len(prompts)
    edit = Intervention.at(site, arm.op(n), scope) if arm.ops else None
    with _first_logits(model.hf) as kept:
        said = model.generate(prompts, max_new_tokens, intervention=edit, temperature=0.0, batch_size=n)
    return Replies(said.texts, said.ids, kept[0], _applied(arm, said.report))


def _applied(arm: Arm, report: Sequence[EditReport]) -> Applied:
    if not arm.ops:
        return Applied(0.0, 0.0)
    done = report[0]
    if done.mean_norm_applied == 0:
        raise EditError(
            f"Arm {arm.name!r} edited {done.tokens} tokens at {done.site} and changed none of them. "
            "Use a larger strength."
        )
    return Applied(done.mean_norm_applied, done.share)


@contextlib.contextmanager
def _first_logits(hf: Any) -> Iterator[list[Tensor]]:
    """Keeps the last position's logits of the first forward pass inside, so that no second prefill is needed."""
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        if not kept:
            # A copy: choosing the next token overwrites the logits.
            kept.append(out.logits[:, -1].detach().to(torch.float32, copy=True))

    with Hooks() as on:
        on.add(hf, keep)
        yield kept


def text_loss(model: Any, arm: Arm, rows: TokenBatch, site: str, scope: Scope) -> np.ndarray:
    """Mean next-token loss of each row of plain text in this arm, nats per token."""
    if not arm.ops:
        loss = model.loss(rows)
    else:
        with model.plan(Intervention.at(site, arm.op(len(rows)), scope)):
            loss = model.loss(rows)
    return loss.double().nanmean(dim=1).cpu().numpy()


def reply_nats(model: Any, prompts: TokenBatch, replies: Sequence[Int[Tensor, " _"]]) -> np.ndarray:
    """Mean loss (nats per token) of each reply after its prompt under the unsteered model; nan for an empty reply."""
    return continuation_nll(model, prompts, replies).double().cpu().numpy()


def distinct_bigrams(replies: Sequence[Int[Tensor, " _"]]) -> np.ndarray:
    """Share of different bigrams of each reply; nan with fewer than two tokens."""
    return np.array([distinct_2(ids) for ids in replies])
