"""The end of the model: from the last norm's output to logits, for the positions and tokens that are asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.errors import InvalidInputError
from workbench.interventions.plan import active_plans

_ROWS = 16_384


class Head:
    """The unembedding of a model and what it does to its output: a scale or a soft cap.

    All results are in fp32 and follow autograd's present mode.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        config = hf.config
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._checked = False

    @property
    def _unembed(self) -> Any:
        return self._hf.get_output_embeddings()

    def all(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The logits of every token; hooks on the unembedding do not run."""
        head = self._unembed
        return self.finish(nn.functional.linear(hidden, head.weight, head.bias))

    def exact(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The logits of every token with products in fp32, whatever the model's dtype, as `some` and `shared` have."""
        head = self._unembed
        if head.weight.dtype == torch.float32:
            return self.all(hidden.float())
        # block by block: a copy of the whole matrix in fp32 is twice the size of that of the model
        z = torch.cat([hidden.float() @ rows.float().T for rows in head.weight.split(_ROWS)], dim=-1)
        return self.finish(z if head.bias is None else z + head.bias.float())

    def some(self, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The logits of a few tokens, other ones for each row."""
        head = self._unembed
        z = torch.einsum("nd,nkd->nk", hidden.float(), head.weight.detach()[ids].float())
        return self.finish(z if head.bias is None else z + head.bias.detach()[ids].float())

    def shared(self, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
        """The logits of a few tokens, the same ones for all rows."""
        head = self._unembed
        z = hidden.float() @ head.weight.detach()[ids].float().T
        return self.finish(z if head.bias is None else z + head.bias.detach()[ids].float())

    def finish(self, logits: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What the model does to the output of its unembedding, in fp32; monotone, token by token."""
        logits = logits.float() * self._scale if self._scale != 1.0 else logits.float()
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def require(self, hidden: Float[Tensor, "n d_model"], logits: Float[Tensor, "n d_vocab"]) -> None:
        """Checks on a real forward pass that nothing else happens between unembedding and logits.

        Raises:
            InvalidInputError: if the logits are not reproduced.
        """
        if not agree(self.all(hidden), logits, hidden.dtype):
            raise InvalidInputError(
                f"{type(self._hf).__name__} does more between its unembedding and its logits than a soft cap or a "
                "scale, so the logits of chosen tokens can't be computed alone. Ask for all of them (tokens=None)."
            )
        self._checked = True

    def logits(
        self, inputs: dict[str, Any], chosen: Bool[Tensor, "batch pos"] | None, ids: Int[Tensor, " k"] | None
    ) -> Float[Tensor, "*rows k"]:
        """Logits of a forward pass at the chosen positions, of some tokens or (`ids=None`) of all."""
        edited = edits_logits(self._hf)
        hidden, logits = forward(self._hf, inputs, chosen, unembed=edited or ids is None or not self._checked)
        if edited or ids is None:
            assert logits is not None
            return logits if ids is None else logits[..., ids]
        flat = hidden.flatten(0, -2)
        if logits is not None and not self._checked:
            self.require(flat[-1:], logits.flatten(0, -2)[-1:])
        return self.shared(flat, ids).unflatten(0, hidden.shape[:-1])


def edits_logits(hf: Any) -> bool:
    """Whether an active plan edits the logits, which then have to be computed with batch and position."""
    return any(edit.site.kind == "logits" for plan in active_plans(hf) for edit in plan.intervention.edits)


def agree(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], computed_in: torch.dtype) -> bool:
    """Whether two results of the same computation differ by rounding only: each row by its relative L2 distance."""
    if a.shape != b.shape:
        return False
    tolerance = 3e-2 if computed_in in (torch.bfloat16, torch.float16) else 1e-3
    a, b = a.float(), b.float()
    distance = (a - b).norm(dim=1) / (b - b.mean(1, keepdim=True)).norm(dim=1).clamp_min(1e-12)
    return float(distance.max()) <= tolerance


def vocabulary_ids(tokens: Sequence[int], d_vocab: int, device: torch.device) -> Int[Tensor, " k"]:
    """Checked token ids.

    Raises:
        InvalidInputError: for none, or for one outside the vocabulary.
    """
    try:
        ids = torch.as_tensor(tokens, dtype=torch.long, device=device)
    except (TypeError, ValueError):
        ids = torch.empty(0)
    if ids.ndim != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
        raise InvalidInputError(f"tokens={tokens}: give a list of token ids from 0 to {d_vocab - 1}.")
    return ids


class _Caught(Exception):
    """Raised when the input of the unembedding is known and no logits are wanted."""


def forward(
    hf: Any, inputs: dict[str, Any], chosen: Bool[Tensor, "batch pos"] | None, *, unembed: bool = True
) -> tuple[Tensor, Tensor | None]:
    """One forward pass that unembeds the chosen positions only.

    Returns:
        The unembedding's input and the logits (None unless `unembed`) at the chosen tokens in row order, `(n, ...)`;
        with `chosen=None` at all positions, `(batch, pos, ...)`.
    """
    caught: list[Tensor] = []
    edited = edits_logits(hf)

    thread = threading.get_ident()

    def choose(_module: Any, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != thread:
            return None  # another thread's use of the same model
        # An edit of the logits needs them with their batch and position.
        caught.append(args[0] if chosen is None or edited else args[0][chosen.to(args[0].device)])
        if not unembed and not edited:
            raise _Caught
        return (caught[0], *args[1:])

    handle = hf.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        logits = hf(**{"use_cache": False, **inputs}).logits.float()
    except _Caught:
        return caught[0], None
    finally:
        handle.remove()
    if edited and chosen is not None:
        return caught[0][chosen], logits[chosen]
    return caught[0], logits
