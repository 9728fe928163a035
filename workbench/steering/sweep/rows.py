"""Arms on many prompts, as rows: each prompt goes through the model once, and rows that have ended leave."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.bases.sae import AnySAE
from workbench.controls.arms import Arm, RowEdits
from workbench.core.display import OneLine
from workbench.core.errors import EditError
from workbench.core.progress import Task
from workbench.core.tokenizer import continuation
from workbench.core.tokens import TokenBatch
from workbench.features.scores.logit_lens import slab_rows
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.plan import Plan
from workbench.interventions.proof import EditReport
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import NotPrefix, Scope
from workbench.models.decoding import ENDED, Decoder, Prefilled
from workbench.models.head import forward
from workbench.models.kvcache import keeps_columns, new_cache, select_rows
from workbench.models.model import Model
from workbench.models.sampling import Sampling
from workbench.models.stopping import StopStrings
from workbench.steering.sweep.measures import continuation_nll, distinct_n, repeated, text_losses

HARM_TOKENS = 4096
"""Tokens of plain text per forward pass."""

_Batch = tuple[list[Tensor], Tensor, tuple[EditReport, ...]]


FirstToken = Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]
"""Measures of the distribution right after the prompt: of the edited logits, the unedited ones of the same prompts, and
the numbers of the rows; one value per row each."""


@dataclass(frozen=True, eq=False)
class Pushes:
    """What is added, one push per edit: `strength * size * vector`.

    Attributes:
        vectors: directions with their magnitude.
        strength: factor on all of them.
        sizes: factor of each; None takes the largest activation of the SAE at each token that is steered.
        sae: the SAE that `sizes` None needs.
    """

    vectors: Float[Tensor, "pushes d"]
    strength: float
    sizes: Float[Tensor, " pushes"] | None = None
    sae: AnySAE | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def op(self, rows: Int[Tensor, " rows"], n_prompts: int) -> Add | SAEAddMax:
        """The edit in which row r gets push `r // n_prompts`."""
        chosen = rows // n_prompts
        vectors = self.vectors[chosen]
        if self.sizes is None:
            assert self.sae is not None
            return SAEAddMax(self.sae, vectors, self.strength)
        return Add(vectors, self.strength * self.sizes[chosen])


@dataclass(frozen=True, eq=False)
class Written:
    """Continuations, by edit and prompt.

    Attributes:
        ids: new tokens of each row, edit by edit; the stop token is no part of them.
        texts: the same as text.
        nll: mean nats per token under the unedited model after the plain prompt; nan for an empty one.
        first: measures of the distribution right after the prompt.
        reports: one per batch; empty where nothing was edited.
    """

    ids: tuple[Int[Tensor, " _"], ...]
    texts: tuple[str, ...]
    nll: Float[Tensor, " rows"]
    first: Mapping[str, Float[Tensor, " rows ..."]]
    reports: tuple[EditReport, ...] = ()

    def values(self, lens: Int[Tensor, "edits k"], ks: Sequence[int]) -> dict[str, Float[np.ndarray, "edits prompts"]]:
        """Every measure of every text, with these lens tokens of each edit."""
        shape = (len(lens), len(self.ids) // len(lens))
        owner = [i // shape[1] for i in range(len(self.ids))]
        hits = [torch.isin(ids, lens[i]) for ids, i in zip(self.ids, owner, strict=True)]
        measures: dict[str, Sequence[float]] = {
            f"success@{k}": [int(torch.isin(ids, lens[i, :k]).sum()) for ids, i in zip(self.ids, owner, strict=True)]
            for k in ks
        }
        measures["share"] = [float(hit.float().mean()) if len(hit) else 0.0 for hit in hits]
        measures |= {name: value.tolist() for name, value in self.first.items()} | {"nll": self.nll.tolist()}
        measures |= {f"distinct{n}": [distinct_n(ids, n) for ids in self.ids] for n in (1, 2)}
        measures["repeated"] = [repeated(ids) for ids in self.ids]
        return {name: np.array(value, dtype=np.float64).reshape(shape) for name, value in measures.items()}


@dataclass(frozen=True, kw_only=True)
class Writing(OneLine):
    """How continuations are written.

    Attributes:
        new_tokens: longest continuation.
        scope: the tokens that are edited.
        edits_prompt: whether the scope may hold other tokens of the prompt than the last one.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling.
        stop: strings that end a continuation.
        batch_size: rows per forward pass.
    """

    new_tokens: int
    scope: Scope
    edits_prompt: bool
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch_size: int = 128


class ArmRunner:
    """Writes and measures continuations of one set of prompts in any arm, at one site.

    A row's text depends on the seed, its prompt and its edit alone, whatever rows share its batch. Where the edits
    spare all but the last prompt token, every prompt's other tokens go through the model once for all edits.
    """

    def __init__(self, model: Model, site: str | Site, prompts: TokenBatch, writing: Writing) -> None:
        self.model, self.site, self.prompts, self.writing = model, model.resolve(site), prompts, writing
        model.require_room(int(prompts.lengths.max()) + writing.new_tokens)
        sampling = Sampling(writing.new_tokens, writing.temperature, writing.seed, model.stop_ids, writing.stop)
        self._decoder = Decoder(model.hf, sampling, StopStrings.of(model.hf, model.tokenizer, sampling))
        self.base_logits = self._base_logits()
        self._prefix = self._shared_prefix()

    @torch.no_grad()
    def _base_logits(self) -> Float[Tensor, "prompts d_vocab"]:
        at_end = torch.zeros_like(self.prompts.mask)
        at_end[:, -1] = True
        hidden, logits = forward(self.model.hf, self.prompts.hf(), at_end)
        assert logits is not None
        self.model.head.require(hidden, logits)
        return logits

    @torch.no_grad()
    def _shared_prefix(self) -> Any:
        """Keys and values of all but the last token of every prompt; None where an edit may touch them."""
        ids, mask = self.prompts.ids[:, :-1], self.prompts.mask[:, :-1]
        if self.writing.edits_prompt or not ids.shape[1] or not bool(mask.any(1).all()):
            return None
        cache = new_cache(self.model.hf.config, self.prompts.ids.shape[1] + self.writing.new_tokens)
        if not keeps_columns(cache):
            return None
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": self.prompts.positions[:, :-1]}
        self.model.hf(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @property
    def shares_prefix(self) -> bool:
        """Whether every prompt went through the model once for all edits, up to its last token."""
        return self._prefix is not None

    def _prefix_of(self, prompt_rows: Int[Tensor, " rows"]) -> Any:
        """The prefix with these prompts as its rows; the shared one stays as it is."""
        cache = copy.copy(self._prefix)
        cache.layers = [copy.copy(layer) for layer in self._prefix.layers]
        select_rows(cache, prompt_rows)
        return cache

    def _batch(self, prompt_rows: Int[Tensor, " rows"]) -> TokenBatch:
        # Untrimmed, so that a row sees the same columns in any batch.
        return TokenBatch(self.prompts.ids[prompt_rows], self.prompts.mask[prompt_rows])

    def write(self, arm: Arm, first: FirstToken, progress: Task) -> Written:
        """Continuations of every prompt in an arm: edits times prompts, edit by edit.

        Raises:
            EditError: if the edits changed nothing.
        """
        n, edits = len(self.prompts), arm.edits
        if edits is None:
            return self._collected(n, first, lambda rows: (*self.continue_rows(rows, None), ()), self.prompts, progress)

        def edited(rows: Tensor) -> _Batch:
            with self.model.plan(Intervention.at(self.site, edits.op(rows, n), self.writing.scope)) as plan:
                ids, logits = self.continue_rows(rows % n, plan)
            return ids, logits, plan.report

        written = self._collected(n * len(edits), first, edited, self.prompts, progress)
        if not any(report.mean_norm_applied for report in written.reports):
            raise EditError(
                f"Arm {arm.name!r} edited {sum(report.tokens for report in written.reports)} tokens at {self.site} and "
                "changed none of them. Use a larger strength."
            )
        return written

    def instructed(self, prompts: TokenBatch, first: FirstToken, progress: Task) -> Written:
        """Continuations of prompts with an instruction before them, instruction by instruction; no edit.

        Fluency and the first token are compared with the plain prompt.
        """

        def unedited(rows: Tensor) -> _Batch:
            start = self._decoder.prefill(prompts[rows], share=True)
            return self._run(start, rows % len(self.prompts), None), start.logits, ()

        return self._collected(len(prompts), first, unedited, prompts, progress)

    def _collected(
        self, total: int, first: FirstToken, make: Callable[[Tensor], _Batch], prompts: TokenBatch, progress: Task
    ) -> Written:
        """Rows `0 .. total` in even batches; row i continues prompt `i % prompts`."""
        n = len(self.prompts)
        every: list[Tensor] = []
        reports: list[EditReport] = []
        nll: list[Tensor] = []
        measured: dict[str, list[Tensor]] = {}
        for rows in torch.arange(total).tensor_split(-(-total // self.writing.batch_size)):
            ids, logits, report = make(rows)
            every += ids
            reports += report
            nll.append(self._fluency(rows % n, ids))
            for name, value in self._first(first, rows, logits).items():
                measured.setdefault(name, []).append(value)
            progress.advance(len(rows))
        before = [row.tolist() for row in prompts.rows()]
        texts = tuple(
            continuation(self.model.tokenizer, before[i % len(before)], row.tolist()) for i, row in enumerate(every)
        )
        means = {name: torch.cat(parts) for name, parts in measured.items()}
        return Written(tuple(every), texts, torch.cat(nll), means, tuple(reports))

    @torch.no_grad()
    def _first(self, first: FirstToken, rows: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The measures right after the prompt, some rows at a time: they make copies of the logits."""
        base = rows.to(logits.device) % len(self.prompts)
        parts: dict[str, list[Tensor]] = {}
        for some in torch.arange(len(logits)).split(max(1, slab_rows(logits.shape[1]) // 4)):
            at = some.to(logits.device)
            for name, value in first(logits[at], self.base_logits[base[at]], rows[some]).items():
                parts.setdefault(name, []).append(value.cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.no_grad()
    def continue_rows(self, prompt_rows: Tensor, plan: Plan | None) -> tuple[list[Tensor], Tensor]:
        """New tokens of each row, and its logits right after the prompt."""
        batch = self._batch(prompt_rows)
        if self._prefix is None:
            start = self._decoder.prefill(batch)
        else:
            cache = self._prefix_of(prompt_rows)
            if plan is not None:
                plan.roles(torch.ones_like(batch.mask))
            padded = {} if bool(batch.mask.all()) else {"attention_mask": batch.mask.long()}
            logits = self.model.hf(
                input_ids=batch.ids[:, -1:], position_ids=batch.positions[:, -1:], past_key_values=cache,
                use_cache=True, logits_to_keep=1, **padded,
            ).logits[:, -1].float()  # fmt: skip
            start = Prefilled(cache, logits, batch.ids, batch.mask)
        return self._run(start, prompt_rows, plan), start.logits

    def _run(self, start: Prefilled, prompt_rows: Tensor, plan: Plan | None) -> list[Tensor]:
        on_select = (lambda _: None) if plan is None else plan.select_rows
        # Choosing a token overwrites the logits, which are still to be compared.
        own = dataclasses.replace(start, logits=start.logits.clone())
        new = self._decoder.run(
            own, prompt_rows, on_select=on_select, on_ended=None if plan is None else plan.ignore_rows
        )
        stopped = [ENDED[code] == "stop_token" for code in new.why.tolist()]
        lengths = [n - gone for n, gone in zip(new.sampled.tolist(), stopped, strict=True)]
        return [row[:n].cpu() for row, n in zip(new.ids, lengths, strict=True)]

    @torch.no_grad()
    def _fluency(self, prompt_rows: Tensor, ids: Sequence[Tensor]) -> Float[Tensor, " rows"]:
        """Mean nats per token of the continuations under the unsteered model."""
        if self._prefix is None:
            return continuation_nll(self.model, self._batch(prompt_rows), ids)
        lengths = torch.tensor([len(row) for row in ids])
        longest = int(lengths.max())
        if longest == 0:
            return torch.full((len(ids),), torch.nan)
        device = self.prompts.ids.device
        new = nn.utils.rnn.pad_sequence([row.long() for row in ids], batch_first=True).to(device)
        real = (torch.arange(longest) < lengths[:, None]).to(device)
        batch = self._batch(prompt_rows)
        # What stands right of a row's end is never seen by what stands left of it.
        seen = torch.cat([batch.mask.long(), torch.ones_like(new[:, 1:])], dim=1)
        hidden, _ = forward(self.model.hf, {
            "input_ids": torch.cat([batch.ids[:, -1:], new[:, :-1]], dim=1),
            "position_ids": batch.positions[:, -1:] + torch.arange(longest, device=device),
            "attention_mask": seen, "past_key_values": self._prefix_of(prompt_rows), "use_cache": True,
        }, real, unembed=False)  # fmt: skip
        target = new[real]
        loss = torch.zeros_like(real, dtype=torch.float32)
        loss[real] = torch.cat([
            nn.functional.cross_entropy(self.model.head.all(h), t, reduction="none")
            for h, t in zip(hidden.split(slab_rows(self.model.d_vocab)), target.split(slab_rows(self.model.d_vocab)),
                            strict=True)
        ])  # fmt: skip
        mean = loss.sum(1).cpu() / lengths.clamp_min(1)
        return torch.where(lengths > 0, mean, torch.tensor(torch.nan))


class Harm:
    """Loss of the edited model on ordinary text, in nats per token; the blocks before the site run once.

    By default the edit is made at every token but the first of each text.
    """

    def __init__(self, model: Model, site: str | Site, texts: TokenBatch, scope: Scope | None = None) -> None:
        self._model, self._site, self._texts = model, model.resolve(site), texts
        self._scope = NotPrefix() if scope is None else scope
        with torch.no_grad():
            self._segment = model.segment(texts, self._site)
            hidden, _ = forward(model.hf, texts.hf(), None, unembed=False)
            self.base: Float[np.ndarray, " texts"] = text_losses(model, texts, hidden)[:, 0].double().numpy()

    @torch.no_grad()
    def losses(self, edits: RowEdits) -> Float[np.ndarray, "edits texts"]:
        """The loss on each text under each edit."""
        step = max(1, HARM_TOKENS // self._texts.ids.numel())
        parts = [self._some(edits, which) for which in torch.arange(len(edits)).split(step)]
        return torch.cat(parts).double().numpy()

    def of(self, edits: RowEdits) -> Float[np.ndarray, "edits texts"]:
        """The increase of the loss on each text under each edit."""
        return self.losses(edits) - self.base

    def _some(self, edits: RowEdits, which: Tensor) -> Tensor:
        n = len(self._texts)
        rows = (which[:, None] * n + torch.arange(n)).flatten()
        with self._model.plan(Intervention.at(self._site, edits.op(rows, n), self._scope)) as plan:
            hidden = self._segment.run(rows=len(which), plan=plan).hidden
        return text_losses(self._model, self._texts, hidden).T
