"""Which token is what: prompt or generated, real or padding, at which position, in every forward pass of a model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from workbench.core.errors import EditError, ShapeError
from workbench.core.numbers import counted
from workbench.hooks.sites import Point
from workbench.interventions.intervention import Intervention
from workbench.interventions.jobs import Job
from workbench.interventions.scopes import Scope
from workbench.interventions.step import Step


class Tracker:
    """Follows the tokens of a model from prompt to generation, and chooses those of a scope.

    Attributes:
        job: the call of `hf.generate` that is running, if any.
    """

    def __init__(self, intervention: Intervention) -> None:
        self._n_rows = intervention.n_rows
        self._has_masks = any(edit.scope.n_rows is not None for edit in intervention.edits)
        self._wants_history = any(edit.scope.needs_history for edit in intervention.edits)
        self.forget()

    def forget(self) -> None:
        """Forgets the tokens; what follows is another prompt."""
        self.job: Job | None = None
        self._step: Step | None = None
        self._began: nn.Module | None = None
        self._prompt_width = 0
        self._roles: Tensor | None = None
        self._row: Tensor | None = None
        self._history: Tensor | None = None
        self._ignored: Tensor | None = None
        self._selected: dict[tuple[Scope, int], tuple[Tensor, Tensor]] = {}

    # What is told from outside.

    def set_roles(self, is_prompt: Bool[Tensor, "batch columns"] | None, ids: Tensor | None) -> None:
        """Which columns are prompt, and the tokens, where some are cached already; see `Plan.roles`."""
        self._roles = is_prompt
        if ids is not None and self._wants_history:
            self._history = ids

    def select_rows(self, index: Int[Tensor, " kept"]) -> None:
        """From the next forward pass on, the batch consists of these rows of the present one."""
        self._roles, self._row, self._history = (
            None if value is None else value[index.to(value.device)]
            for value in (self._roles, self._row, self._history)
        )

    def ignore_rows(self, ended: Bool[Tensor, " batch"]) -> None:
        """These rows of the batch only keep their place."""
        self._ignored = ended

    # A forward pass.

    def begin(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Notes the tokens of a call of the model; True if other prompts begin with it.

        Raises:
            EditError: for a call that does not tell positions or padding.
            ShapeError: for a batch that does not fit parameters per row.
        """
        # The base model inside the language model; but a second begin of one module follows a pass that was cut short.
        if self._step is not None and module is not self._began:
            return False
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)
        ids = given.get("input_ids")
        source = ids if ids is not None else given.get("inputs_embeds")
        if not isinstance(source, Tensor):
            raise EditError("The edited model was called without input_ids or inputs_embeds.")
        past = cached_columns(given)
        mask = self._real(given.get("attention_mask"), source, past)
        is_new = self._note(ids if isinstance(ids, Tensor) else None, source, mask, past)
        self._began = module
        return is_new

    def end(self, module: nn.Module) -> None:
        """The call of this module is over."""
        if module is self._began:
            self._step = self._began = None

    def prefill(self, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], past: int) -> bool:
        """Notes whole prompts of which `past` columns are cached; True if other prompts begin with it."""
        self.forget()
        self._prompt_width = ids.shape[1]
        self._history = ids[:, :past] if past else None
        return self._note(ids[:, past:], ids[:, past:], mask, past)

    def _real(self, mask: object, source: Tensor, past: int) -> Bool[Tensor, "batch columns"]:
        """True at real tokens of the whole sequence."""
        batch, width = source.shape[:2]
        plain = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if mask is not None and plain is None and self.job is None:
            what = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            raise EditError(f"attention_mask {what}; edits need the (batch, pos) mask to know padding.")
        if self.job is None:
            return torch.ones(batch, past + width, dtype=torch.bool, device=source.device) if plain is None else plain
        prompt = self.job.prompt_mask(plain, batch, source.device)
        if plain is not None:
            return plain
        return nn.functional.pad(prompt, (0, max(0, past + width - self.job.width)), value=True)[:, : past + width]

    def _note(self, ids: Tensor | None, source: Tensor, mask: Tensor, past: int) -> bool:
        batch, width = source.shape[:2]
        mask, job = mask[:, : past + width], self.job
        is_new = past == 0 if job is None else job.fresh
        if is_new:
            self._prompt_width, self._row, self._ignored = width if job is None else job.width, None, None
            if job is not None:
                job.fresh, self._roles, self._history = False, None, None
        elif self._prompt_width == 0:
            self._prompt_width = past + width
        if self._row is None or len(self._row) != batch:
            self._row = self._rows_of(source, mask.device)
        if self._wants_history:
            self._remember(ids, past)
        roles = self._roles
        if roles is None:
            roles = torch.ones(1, self._prompt_width, dtype=torch.bool, device=mask.device)
        roles = nn.functional.pad(roles, (0, max(0, past + width - roles.shape[1])))[:, : past + width]
        roles = roles.expand(batch, -1)
        position = (mask.long().cumsum(1) - 1).clamp_min(0)
        # One more than the position of the last real prompt token.
        length = (position + 1).masked_fill(~(roles & mask), 0).amax(1)
        if job is not None:
            length = job.prompt_mask(mask, batch, mask.device).sum(1)
        real = mask[:, past:]
        if self._ignored is not None and len(self._ignored) == batch:
            real = real & ~self._ignored[:, None]
        self._step = Step(
            ids=ids, column=torch.arange(past, past + width, device=mask.device), position=position[:, past:],
            prompt_length=length, is_real=real, is_prompt=roles[:, past:], row=self._row, history=self._history,
            history_real=None if self._history is None else mask[:, : self._history.shape[1]],
        )  # fmt: skip
        self._selected.clear()
        return is_new

    def _remember(self, ids: Tensor | None, past: int) -> None:
        if ids is None or (past and (self._history is None or self._history.shape[1] < past)):
            self._history = None
        else:
            self._history = torch.cat([self._history[:, :past], ids], 1) if past and self._history is not None else ids

    def _rows_of(self, source: Tensor, device: torch.device) -> Int[Tensor, " batch"]:
        """The row of per-row parameters for each batch row; beams and returned sequences repeat each row.

        `source` holds the ids or the embeddings of the pass.
        """
        n, batch = self._n_rows, len(source)
        if n is None:
            return torch.arange(batch, device=device)
        if batch % n:
            raise ShapeError(
                f"The intervention has parameters for {counted(n, 'rows')}; the batch has {counted(batch, 'rows')}."
            )
        repeats = batch // n
        if repeats > 1 and (n > 1 or self._has_masks):
            groups = source.reshape(n, repeats, -1)
            if not bool((groups == groups[:, :1]).all()):
                raise ShapeError(
                    f"The intervention has parameters for {counted(n, 'rows')}; the batch has "
                    f"{counted(batch, 'rows')}, and they are not each "
                    f"row repeated {repeats} times (as beams or returned sequences are). Give parameters for {batch}."
                )
        return torch.arange(n, device=device).repeat_interleave(repeats)

    # What the writer asks.

    def step_at(self, point: Point, shape: torch.Size) -> Step:
        """The tokens that a site holds, whose activations have this shape.

        Raises:
            EditError: if no call of the model is running, or the shape does not fit it.
        """
        step = self._step
        if step is None:
            raise EditError(
                f"Site {point.site} was reached without a call of the model itself; call model.hf(...), "
                f"not one of its blocks."
            )
        if shape[0] != step.is_real.shape[0] or shape[1] > step.is_real.shape[1]:
            raise EditError(
                f"Site {point.site} has shape {tuple(shape)}; the batch says (batch, pos) = "
                f"{tuple(step.is_real.shape)}."
            )
        # Behind `logits_to_keep` only the last positions are left.
        return step if shape[1] == step.is_real.shape[1] else step.tail(shape[1])

    def select(self, scope: Scope, step: Step, device: torch.device) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Row and column of each token in the scope."""
        key = (scope, step.is_real.shape[1])
        if key not in self._selected:
            row, column = scope.mask(step).nonzero(as_tuple=True)
            self._selected[key] = row.to(device), column.to(device)
        row, column = self._selected[key]
        return row.to(device), column.to(device)


def cached_columns(given: Mapping[str, object]) -> int:
    """How many columns the cache among a model's arguments holds.

    Raises:
        EditError: for a recurrent state, or a cache that does not tell: positions can't be known then.
    """
    for name in ("cache_params", "state"):
        if given.get(name) is not None:
            raise EditError(
                f"The edited model was called with a recurrent state ({name}), from which the position of a token "
                "can't be told. Run the whole text at once, with use_cache=False."
            )
    cache = given.get("past_key_values")
    if cache is None:
        return 0
    for part in (cache, *getattr(cache, "layers", ())):
        length = getattr(part, "get_seq_length", None)
        with contextlib.suppress(ValueError, AttributeError, NotImplementedError):
            columns = length() if callable(length) else None
            if isinstance(columns, int | Tensor):
                return int(columns)
    raise EditError(f"A {type(cache).__name__} does not say how many tokens it holds. Use use_cache=False.")
