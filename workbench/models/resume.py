"""Resuming a model behind a site: the blocks before the edit run once, however many edits are tried."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import attach
from workbench.hooks.handles import Hooks, refuse_compiled
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.interventions.gates import When
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import Plan
from workbench.models.head import Head, agree, edits_logits, forward
from workbench.models.kvcache import can_crop, crop, holds, new_cache, select_rows, takes_cache
from workbench.models.numbers import has_nan


class Resume:
    """A batch of prompts at one site, continued from there as often as wanted.

    The residual stream in front of the first block that an edit at the site can reach is kept, and the blocks behind
    it are called with the very arguments that the model gave them. With `last=True` only the last token of each row is
    continued, over the cached keys and values of the others: right for edits that touch no other token, by causality.
    That this reproduces the model is checked on the unedited prompts; where it does not (an architecture that does
    more between its blocks) the whole model runs instead.

    Attributes:
        x: activations at the site: `(batch, pos, d)`, or `(batch, 1, d)` with `last`.
        logits: the model's logits at the last token of each row without an edit, fp32, `(batch, d_vocab)`.
        skips_blocks: whether the blocks before the site are skipped.
        first_block: the first block that is run again.
    """

    def __init__(
        self, hf: Any, sites: SiteMap, head: Head, batch: TokenBatch, site: Site, *, last: bool = False
    ) -> None:
        if last and not bool(batch.mask[:, -1].all()):
            raise InvalidInputError(
                "Resume(last=True): the batch must be left-padded, so that each row ends in a token."
            )
        if edits_logits(hf):
            raise InvalidInputError("A plan that edits the logits is active; make a Resume outside of its block.")
        self._hf, self._sites, self._batch, self._last = hf, sites, batch, last
        self._point = sites[site]
        self._head = head
        self.first_block = _first_block(self._point, sites.n_layers)
        self._blocks = [sites[Site("resid_post", i)].module for i in range(self.first_block, sites.n_layers)]
        self._norm = sites["final_norm"].module
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = []
        self._expanded: tuple[int, Any, list[Any]] | None = None
        with torch.no_grad():
            self._prefix = self._prefill() if last else None
            self._last = self._prefix is not None
            self._record()
            self.skips_blocks = self._reproduces(1) and self._reproduces(2)

    def _prefill(self) -> Any:
        """Keys and values of every token but the last of each row; None where they can't be kept, or there are none."""
        width = self._batch.ids.shape[1]
        if width == 1 or not takes_cache(self._hf):
            return None
        cache = new_cache(self._hf.config, width)
        if not can_crop(cache, width):
            return None
        inputs = {name: value[:, :-1] for name, value in self._batch.hf().items()}
        self._hf(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache if holds(cache, width - 1) else None

    def _inputs(self, repeats: int, cache: Any) -> dict[str, Any]:
        inputs = self._batch.hf()
        if bool(self._batch.mask.all()):
            del inputs["attention_mask"]
        inputs = {name: value.repeat(repeats, 1) for name, value in inputs.items()}
        if not self._last:
            return inputs
        keep = ("input_ids", "position_ids")
        inputs = {name: value[:, -1:] if name in keep else value for name, value in inputs.items()}
        return {**inputs, "past_key_values": cache, "use_cache": True}

    def _record(self) -> None:
        """One run of the model: notes the stream in front of the blocks, their other arguments, and the logits."""
        hidden: list[Tensor] = []

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}, bool(args)))
            hidden.append(args[0] if args else kwargs["hidden_states"])

        seen: list[Tensor] = []
        refuse_compiled(self._hf, [self._point, self._sites["final_norm"]])
        with Hooks() as on:
            for block in self._blocks:
                on.add(block, note, before=True)
            on.add(self._norm, lambda _module, args, _kwargs: hidden.append(args[0]), before=True)
            attach(on, [(self._point, seen.append)])
            width = 1 if self._last else self._batch.ids.shape[1]
            at_end = torch.zeros(len(self._batch), width, dtype=torch.bool, device=self._batch.ids.device)
            at_end[torch.arange(len(self._batch)), self._ends()] = True
            out, logits = forward(self._hf, self._inputs(1, self._prefix), at_end)
        if has_nan(_present(logits)):
            row = int(_present(logits).amax(-1).isnan().nonzero()[0])
            raise InvalidInputError(
                f"{self._point.site}: the logits after the last token of row {row} are NaN without any edit. Load the "
                "model with dtype='float32', or look for where it begins with Model.capture(..., allow_nan=True)."
            )
        self._head.require(out, _present(logits))
        self._start, self.x, self.logits, self._hidden = hidden[0], seen[0].to(out.device), _present(logits), out
        self._crop(self._prefix)

    def _ends(self) -> Int[Tensor, " batch"]:
        """Column of the last real token of each row."""
        if self._last:
            return torch.zeros(len(self._batch), dtype=torch.long, device=self._batch.ids.device)
        mask = self._batch.mask.long()
        return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)

    def _crop(self, cache: Any) -> None:
        if cache is not None:
            crop(cache, self._batch.ids.shape[1] - 1)

    def _reproduces(self, repeats: int) -> bool:
        if len(self._calls) != len(self._blocks) or self._point.site.kind == "embed":
            return False
        try:
            end = self._through(self._start.repeat(repeats, 1, 1), repeats)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # arguments of its blocks that can't be repeated like a batch
        rows = torch.arange(len(end), device=end.device)
        return agree(end[rows, self._ends().repeat(repeats)], self._hidden.repeat(repeats, 1), end.dtype)

    # Running on.

    def _arguments(self, repeats: int) -> tuple[Any, list[Any]]:
        """The cache and the blocks' arguments for `repeats` copies of the batch."""
        if self._expanded is not None and self._expanded[0] == repeats:
            return self._expanded[1:]
        cache = None if self._prefix is None else _repeated_cache(self._prefix, len(self._batch), repeats)
        calls = [
            (
                tuple(self._repeated(value, repeats, cache) for value in args),
                {name: self._repeated(value, repeats, cache) for name, value in kwargs.items()},
                positional,
            )
            for args, kwargs, positional in self._calls
        ]
        self._expanded = (repeats, cache, calls)
        return cache, calls

    def _repeated(self, value: Any, repeats: int, cache: Any) -> Any:
        if value is self._prefix and cache is not None:
            return cache
        if isinstance(value, tuple):
            return tuple(self._repeated(part, repeats, cache) for part in value)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == len(self._batch) > 1:
            return value.repeat(repeats, *(1 for _ in value.shape[1:]))
        return value

    def _through(self, start: Tensor, repeats: int, *, plan: Plan | None = None) -> Tensor:
        """From the stream in front of the blocks to the unembedding's input."""
        cache, calls = self._arguments(repeats)
        h: Any = start
        if plan is not None and self.first_block:
            # The block that ends here does not run, so neither does its hook.
            written = plan.at(self._sites[Site("resid_post", self.first_block - 1)])(h)
            h = h if written is None else written
        try:
            for block, (args, kwargs, positional) in zip(self._blocks, calls, strict=True):
                out = block(h, *args, **kwargs) if positional else block(*args, **{**kwargs, "hidden_states": h})
                h = out if isinstance(out, Tensor) else out[0]
        finally:
            self._crop(cache)
        return self._norm(h).to(self._batch.ids.device)

    def hidden_from(self, x: Float[Tensor, "rows pos d_model"], repeats: int) -> Float[Tensor, "rows pos d_model"]:
        """The unembedding's input when the residual stream at the site is `x`, without any plan.

        Raises:
            InvalidInputError: at a site inside a block, or where the blocks can't be skipped.
        """
        if not self.skips_blocks or self._point.site.kind not in ("resid_pre", "resid_post"):
            raise InvalidInputError(f"hidden_from: can't continue from {self._point.site} without running the model.")
        return self._through(x, repeats)

    def hidden(self, plan: Plan, repeats: int) -> Float[Tensor, "rows pos d_model"]:
        """The unembedding's input under an active plan for `repeats` copies of the batch, copy by copy.

        Raises:
            InvalidInputError: if the plan edits or reads something that is computed before the site.
        """
        self._require_behind(plan)
        if not self.skips_blocks:
            cache, _ = self._arguments(repeats)
            out, _ = forward(self._hf, self._inputs(repeats, cache), None, unembed=False)
            self._crop(cache)
            return out
        mask = self._batch.mask.repeat(repeats, 1)
        ids = self._batch.ids.repeat(repeats, 1)
        with plan.stepping(ids, mask, ids.shape[1] - 1 if self._last else 0):
            return self._through(self._start.repeat(repeats, 1, 1), repeats, plan=plan)

    def whole_logits(self, repeats: int) -> Float[Tensor, "rows d_vocab"]:
        """Logits at the last token of each row from a run of the whole model."""
        at_end = torch.zeros_like(self._batch.mask)
        at_end[torch.arange(len(self._batch)), self._ends()] = True
        return _present(forward(self._hf, self._inputs(repeats, None), at_end.repeat(repeats, 1))[1])

    @property
    def last(self) -> bool:
        """Whether the last tokens are run alone; not where a cache can't take a token back."""
        return self._last or self._batch.ids.shape[1] == 1

    @property
    def how(self) -> str:
        """What is run for each edit, in words."""
        if not self.skips_blocks:
            return f"the whole model{' on the last tokens, over the cached prompts' if self._last else ''}"
        tokens = "the last token of each prompt, over cached keys and values" if self._last else "all tokens"
        n = self._sites.n_layers
        blocks = f"blocks {self.first_block} to {n - 1}" if self.first_block < n else "no block"
        return f"{blocks} of {n}, on {tokens}"

    def _require_behind(self, plan: Plan) -> None:
        before = [point for point in plan.points if point.site.order < self._point.site.order]
        edits = plan.intervention.edits
        if self._last and not all(edit.scope.only_last and not edit.op.gated for edit in edits):
            raise InvalidInputError(
                "Resume(last=True) runs the last token of each row alone: every scope must be Last() or Pos(-1), "
                f"without gates; the plan has {'; '.join(map(str, edits))}."
            )
        if any(point.site.kind == "logits" for point in plan.points):
            raise InvalidInputError("Resuming computes chosen logits only; edit final_norm, or the logits yourself.")
        if before:
            raise InvalidInputError(
                f"Resuming at {self._point.site}: the plan also uses {', '.join(str(p.site) for p in before)}, which "
                "is computed before it. Resume at the earliest site that is edited or read."
            )

    def logits_of(
        self, hidden: Float[Tensor, "rows pos d_model"], repeats: int, tokens: Int[Tensor, " k"] | None = None
    ) -> Float[Tensor, "rows k"]:
        """Logits at the last token of each row, of all tokens or of a few."""
        rows = torch.arange(len(hidden), device=hidden.device)
        last = hidden[rows, self._ends().repeat(repeats)]
        return self._head.all(last) if tokens is None else self._head.shared(last, tokens)


def earliest(sites: SiteMap, interventions: Sequence[Intervention]) -> Site | None:
    """The first site that any of the interventions edits or reads; None if none edits anything."""
    points = []
    for intervention in interventions:
        for edit in intervention.edits:
            points.append(sites[edit.site])
            if isinstance(edit.op, When) and edit.op.gate.site is not None:
                points.append(sites[edit.op.gate.site])
    return min((point.site for point in points), key=lambda site: site.order, default=None)


def _first_block(point: Point, n_layers: int) -> int:
    if point.site.layer is None:
        return 0 if point.site.kind == "embed" else n_layers
    return point.site.layer + (point.site.kind == "resid_post")


def _repeated_cache(cache: Any, batch: int, repeats: int) -> Any:
    repeated = copy.deepcopy(cache)
    select_rows(repeated, torch.arange(batch * repeats) % batch)
    return repeated


def _present(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits
