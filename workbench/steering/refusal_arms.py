"""Arms of a steering study: each an edit or none, all measured on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import EditError, InvalidInputError
from workbench.interventions.ops import Op
from workbench.interventions.plan import Intervention
from workbench.interventions.scopes import Scope
from workbench.steering.measures import continuation_nll, distinct_2
from workbench.tokens import TokenBatch

ROWS_PER_PASS = 32


@dataclass(frozen=True, eq=False)
class PerRow(Op):
    """A choice of edits, one for each batch row.

    Attributes:
        ops: the edits.
        owner: for each row the index of its edit; -1 leaves the row as it is.
    """

    ops: tuple[Op, ...]
    owner: Int[Tensor, " rows"]

    def __post_init__(self) -> None:
        if not -1 <= int(self.owner.min()) <= int(self.owner.max()) < len(self.ops):
            raise InvalidInputError(
                f"PerRow: owners {self.owner.tolist()} of {len(self.ops)} ops; use -1 to {len(self.ops) - 1}."
            )

    def __call__(self, h: Float[Tensor, "n d"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Every token edited by the edit of its row."""
        owner = self.owner.to(rows.device)[rows]
        edited = h.clone()
        for i in owner.unique().tolist():
            if i >= 0:
                mine = owner == i
                edited[mine] = self.ops[i](h[mine], rows[mine])
        return edited

    @property
    def width(self) -> int | None:
        """Width of the first edit that has one."""
        return next((op.width for op in self.ops if op.width is not None), None)

    @property
    def n_rows(self) -> int | None:
        """Number of owners."""
        return len(self.owner)

    @property
    def must_change(self) -> bool:
        """Whether an edit that owns a row has to change it."""
        return any(self.ops[i].must_change for i in self.owner.unique().tolist() if i >= 0)

    def take(self, rows: Int[Tensor, " chosen"]) -> Op:
        """The same edits for a choice of rows."""
        return PerRow(self.ops, self.owner[rows])


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
class Replies:
    """What the model said in one arm.

    Attributes:
        texts: one reply per prompt.
        nats: mean loss of each reply under the unsteered model, nats per token; nan for an empty reply.
        distinct: share of different bigrams of each reply; nan with fewer than two tokens.
    """

    texts: tuple[str, ...]
    nats: np.ndarray
    distinct: np.ndarray


@dataclass(frozen=True)
class Applied:
    """The edit that reached the model: mean norm per edited token, and its share of the residual norm there."""

    norm: float
    share: float


def logits_of(
    model: Any, arm: Arm, prompts: TokenBatch, site: str, scope: Scope
) -> tuple[Float[Tensor, "batch d_vocab"], Applied]:
    """Next-token logits after each prompt in this arm, and what was added.

    Raises:
        EditError: if the edit of a steered arm changed nothing.
    """
    if not arm.ops:
        return model.logits(prompts), Applied(0.0, 0.0)
    with model.plan(Intervention.at(site, arm.op(len(prompts)), scope)) as plan:
        logits = model.logits(prompts)
    done = plan.report[0]
    if done.mean_norm_applied == 0:
        raise EditError(
            f"Arm {arm.name!r} edited {done.tokens} tokens at {site} and changed none of them. Use a larger strength."
        )
    return logits, Applied(done.mean_norm_applied, done.share)


def text_loss(model: Any, arm: Arm, rows: TokenBatch, site: str, scope: Scope) -> np.ndarray:
    """Mean next-token loss of each row of plain text in this arm, nats per token."""
    if not arm.ops:
        loss = model.loss(rows)
    else:
        with model.plan(Intervention.at(site, arm.op(len(rows)), scope)):
            loss = model.loss(rows)
    return loss.double().nanmean(dim=1).cpu().numpy()


def replies_of(
    model: Any, arms: Sequence[Arm], prompts: TokenBatch, site: str, scope: Scope, max_new_tokens: int
) -> tuple[Replies, ...]:
    """Greedy replies of every arm to every prompt, generated together as rows of the same batches."""
    n, owners, ops = len(prompts), [], []
    for arm in arms:
        owners.append(arm.op(n).owner + len(ops) if arm.ops else torch.full((n,), -1))
        ops += arm.ops
    repeated = TokenBatch(prompts.ids.repeat(len(arms), 1), prompts.mask.repeat(len(arms), 1))
    edit = Intervention.at(site, PerRow(tuple(ops), torch.cat(owners)), scope) if ops else None
    said = model.generate(repeated, max_new_tokens=max_new_tokens, intervention=edit, temperature=0.0)
    nats = _reply_nats(model, repeated, said.ids)
    distinct = np.array([distinct_2(ids) for ids in said.ids])
    parts = [slice(i * n, (i + 1) * n) for i in range(len(arms))]
    return tuple(Replies(said.texts[part], nats[part], distinct[part]) for part in parts)


def _reply_nats(model: Any, prompts: TokenBatch, replies: Sequence[Int[Tensor, " new"]]) -> np.ndarray:
    parts = [slice(start, start + ROWS_PER_PASS) for start in range(0, len(replies), ROWS_PER_PASS)]
    return torch.cat([continuation_nll(model, prompts[part], replies[part]) for part in parts]).double().numpy()
