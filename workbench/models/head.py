"""The end of the model: from the last norm's output to logits, for the positions and tokens that are asked for."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.core.errors import InvalidInputError
from workbench.core.precision import precise
from workbench.hooks.ends import embedding, unembedding
from workbench.hooks.handles import Hooks
from workbench.interventions.plan import active_plans
from workbench.models.numbers import has_nan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ROWS = 16_384


class Head:
    """The unembedding of a model and what it does to its output: a scale or a soft cap.

    All results are in fp32 (fp64 of a model in fp64), on the device of what is given, and follow autograd's present
    mode.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        self._hf = hf
        self._finish = finisher(hf)
        self._known: bool | None = None  # whether a forward pass confirmed it

    def all(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The logits of every token; hooks on the unembedding do not run."""
        head = unembedding(self._hf)
        logits = nn.functional.linear(hidden.to(head.weight.device), head.weight, head.bias)
        return self.finish(logits).to(hidden.device)

    def exact(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """The logits of every token with products in fp32, whatever the model's dtype, as `some` and `shared` have."""
        head = unembedding(self._hf)
        if head.weight.dtype in (torch.float32, torch.float64):
            return self.all(hidden.to(head.weight.dtype))
        # block by block: a copy of the whole matrix in fp32 is twice the size of that of the model
        near = hidden.to(head.weight.device, torch.float32)
        z = torch.cat([near @ rows.float().T for rows in head.weight.split(_ROWS)], dim=-1)
        return self.finish(z if head.bias is None else z + head.bias.float()).to(hidden.device)

    def some(self, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """The logits of a few tokens, other ones for each row."""
        head, near, ids = self._near(hidden, ids)
        z = torch.einsum("nd,nkd->nk", near, head.weight.detach()[ids].to(near.dtype))
        return self.finish(z if head.bias is None else z + head.bias.detach()[ids].to(near.dtype)).to(hidden.device)

    def shared(self, hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, " k"]) -> Float[Tensor, "n k"]:
        """The logits of a few tokens, the same ones for all rows."""
        head, near, ids = self._near(hidden, ids)
        z = near @ head.weight.detach()[ids].to(near.dtype).T
        return self.finish(z if head.bias is None else z + head.bias.detach()[ids].to(near.dtype)).to(hidden.device)

    def _near(self, hidden: Tensor, ids: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
        """The unembedding, and both tensors on its device, which differs in a model over several."""
        head = unembedding(self._hf)
        return head, precise(hidden.to(head.weight.device)), ids.to(head.weight.device)

    def finish(self, logits: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What the model does to the output of its unembedding, in fp32; monotone, token by token."""
        return self._finish(precise(logits))

    def require(self, hidden: Float[Tensor, "n d_model"], logits: Float[Tensor, "n d_vocab"]) -> None:
        """Checks on a real forward pass that `all` gives the logits of the model.

        Raises:
            InvalidInputError: if the logits are not reproduced.
        """
        # NaN leaves nothing to compare; whoever hands the logits out refuses it
        if not self._gives(hidden, logits) and not has_nan(logits):
            raise InvalidInputError(
                f"{type(self._hf).__name__} does more between its unembedding and its logits than can be followed "
                "token by token, so those of chosen tokens can't be computed alone. Ask for all of them (tokens=None)."
            )

    def _gives(self, hidden: Float[Tensor, "n d_model"], logits: Float[Tensor, "n d_vocab"]) -> bool:
        if not self._known:
            self._known = agree(self.all(hidden), logits, hidden.dtype)
        return self._known

    def logits(
        self, inputs: Mapping[str, object], chosen: Bool[Tensor, "batch pos"] | None, ids: Int[Tensor, " k"] | None
    ) -> Float[Tensor, "*rows k"]:
        """Logits of a forward pass at the chosen positions, of some tokens or (`ids=None`) of all.

        Where `all` does not give the logits of this model, the model computes those of every token itself.
        """
        edited = edits_logits(self._hf)
        hidden, logits = forward(self._hf, inputs, chosen, unembed=edited or ids is None or not self._known)
        if ids is None or edited:
            assert logits is not None
            return logits if ids is None else logits[..., ids]
        flat = hidden.flatten(0, -2)
        if logits is not None and not self._gives(flat[-1:], logits.flatten(0, -2)[-1:]):
            return logits[..., ids]
        return self.shared(flat, ids).unflatten(0, hidden.shape[:-1])


Finish = Callable[[Tensor], Tensor]


def finisher(hf: PreTrainedModel) -> Finish:
    """What the model's own code does between its unembedding and its logits, as a function of fp32 logits.

    A scale and a soft cap are recognised by what they do to a few numbers, whatever the config calls them; anything
    else is left to the model's code. Where that can't be run alone, or mixes tokens, the logits are taken as they are:
    `Head.require` finds out whether they are right.
    """
    own = _own_code(hf)
    if own is None:
        return _unchanged
    probe = torch.tensor([-1e30, -300.0, -7.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 7.0, 300.0, 1e30])
    with torch.no_grad():
        after, alone = own(probe), own(probe[6:])
    if not torch.equal(after[6:], alone) or bool((after.diff() < 0).any()):
        return _unchanged  # not token by token, or not monotone
    if torch.equal(after, probe):
        return _unchanged
    scale, cap = float(after[7]), float(after[-1])
    if torch.allclose(after, probe * scale, rtol=1e-6):
        return lambda logits: logits * scale
    if torch.allclose(after, cap * torch.tanh(probe / cap), rtol=1e-6):
        return lambda logits: cap * torch.tanh(logits / cap)
    return own


def _unchanged(logits: Tensor) -> Tensor:
    return logits


class _Given(nn.Module):
    """Gives one value, whatever it is called with; everything else about it is the module that it replaces."""

    def __init__(self, value: object, replaced: nn.Module) -> None:
        super().__init__()
        self.value = value
        object.__setattr__(self, "replaced", replaced)  # not registered as a part

    def forward(self, *_args: object, **_kwargs: object) -> object:
        return self.value

    def __getattr__(self, name: str) -> Any:
        there = getattr(self.__dict__["replaced"], name)
        return _Given(self.value, there) if isinstance(there, nn.Module) else there


class _Outputs(tuple[Tensor]):
    """The outputs of a body that has its last hidden state to give, and None for whatever else is asked of it."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _own_code(hf: PreTrainedModel) -> Finish | None:
    """The model's forward pass without its body and its unembedding, or None where the latter is not a direct part.

    It runs on a copy that shares weights but neither parts nor hooks, so an active plan does not see it.
    """
    unembed = unembedding(hf)
    if all(part is not unembed for part in hf.children()):
        return None
    ids = torch.zeros(1, 1, dtype=torch.long, device=embedding(hf).weight.device)

    def run(logits: Tensor) -> Tensor:
        rows = logits.reshape(1, -1, logits.shape[-1])
        outputs = _Outputs((rows.new_zeros(*rows.shape[:2], unembed.weight.shape[1]),))
        copied = copy.copy(hf)
        copied._modules = {
            name: _Given(rows if part is unembed else outputs, part) for name, part in hf.named_children()
        }
        # by its class: hooks, a compiled call and whatever else was put on the model belong to the whole of it
        return type(hf).forward(copied, input_ids=ids, use_cache=False).logits.float().reshape(logits.shape)

    try:
        run(torch.zeros(3))
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        return None  # a body with outputs of its own kind
    return run


def edits_logits(hf: PreTrainedModel) -> bool:
    """Whether an active plan edits the logits, which then have to be computed with batch and position."""
    return any(edit.site.kind == "logits" for plan in active_plans(hf) for edit in plan.intervention.edits)


def agree(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], computed_in: torch.dtype) -> bool:
    """Whether two results of the same computation differ by rounding only: each row by its relative L2 distance."""
    if a.shape != b.shape:
        return False
    tolerance = 3e-2 if computed_in in (torch.bfloat16, torch.float16) else 1e-3
    # a logit of -inf, of a token that is ruled out, equals itself
    ruled_out = (a == b) & b.isinf()
    a, b = a.float().masked_fill(ruled_out, 0), b.float().masked_fill(ruled_out, 0)
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
    hf: PreTrainedModel, inputs: Mapping[str, object], chosen: Bool[Tensor, "batch pos"] | None, *, unembed: bool = True
) -> tuple[Tensor, Tensor | None]:
    """One forward pass that unembeds the chosen positions only.

    Returns:
        The unembedding's input and the logits (None unless `unembed`) at the chosen tokens in row order, `(n, ...)`;
        with `chosen=None` at all positions, `(batch, pos, ...)`. Both on the device of the inputs.
    """
    caught: list[Tensor] = []
    ids = inputs["input_ids"]
    assert isinstance(ids, Tensor)
    edited, device = edits_logits(hf), ids.device

    thread = threading.get_ident()

    def choose(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
        if threading.get_ident() != thread:
            return None  # another thread's use of the same model
        # An edit of the logits needs them with their batch and position.
        hidden = args[0].to(device)
        caught.append(hidden if chosen is None or edited else hidden[chosen.to(device)])
        if not unembed and not edited:
            raise _Caught
        return (caught[0], *args[1:]), kwargs

    with Hooks() as on:
        on.add(unembedding(hf), choose, before=True)
        try:
            logits = precise(hf(**{"use_cache": False, **inputs}).logits)
        except _Caught:
            return caught[0], None
    if edited and chosen is not None:
        return caught[0][chosen], logits[chosen]
    return caught[0], logits
