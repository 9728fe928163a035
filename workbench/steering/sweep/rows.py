"""Many edits on many prompts, as rows: each prompt goes through the model once, and rows that have ended leave."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.progress import Task
from workbench.core.tokenizer import continuation
from workbench.core.tokens import TokenBatch
from workbench.features.scores.logit_lens import slab_rows
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.plan import Plan
from workbench.interventions.report import EditReport
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import NotPrefix
from workbench.models.decoding import ENDED, Decoder, Prefilled
from workbench.models.head import forward
from workbench.models.kvcache import keeps_columns, new_cache, select_rows
from workbench.models.model import Model
from workbench.models.sampling import Sampling
from workbench.models.stopping import StopStrings
from workbench.steering.sweep.measures import (
    continuation_nll,
    distinct_n,
    kl_divergence,
    lens_log_odds,
    repeated,
    text_losses,
)
from workbench.steering.sweep.options import SCOPES, SteerOptions

HARM_TOKENS = 4096
"""Tokens of plain text per forward pass."""

_Batch = tuple[list[Tensor], Tensor, tuple[EditReport, ...]]


@dataclass(frozen=True, eq=False)
class Pushes:
    """What is added, one push per row: `strength * size * vector`.

    Attributes:
        vectors: directions with their magnitude.
        strength: factor on all of them.
        sizes: factor of each; None takes the largest feature activation at each token that is steered.
    """

    vectors: Float[Tensor, "pushes d"]
    strength: float
    sizes: Float[Tensor, " pushes"] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def op(self, sae: Any, chosen: Int[Tensor, " rows"]) -> Add | SAEAddMax:
        """The edit in which row i gets push `chosen[i]`."""
        vectors = self.vectors[chosen]
        if self.sizes is None:
            return SAEAddMax(sae, vectors, self.strength)
        return Add(vectors, self.strength * self.sizes[chosen])


@dataclass(frozen=True, eq=False)
class Written:
    """Continuations, by push and prompt.

    Attributes:
        ids: new tokens of each row, push by push; the stop token is no part of them.
        texts: the same as text.
        nll: mean nats per token under the unsteered model after the plain prompt; nan for an empty one.
        log_odds: log-odds of the lens tokens right after the prompt, steered minus unsteered.
        kl: divergence of the steered from the unsteered distribution right after the prompt.
        edits: one report per batch; empty where nothing was edited.
    """

    ids: tuple[Int[Tensor, " _"], ...]
    texts: tuple[str, ...]
    nll: Float[Tensor, " rows"]
    log_odds: Float[Tensor, " rows"]
    kl: Float[Tensor, " rows"]
    edits: tuple[EditReport, ...] = ()

    def values(
        self, lens: Int[Tensor, "pushes k"], ks: Sequence[int]
    ) -> dict[str, Float[np.ndarray, "pushes prompts"]]:
        """Every measure of every text, with these lens tokens of each push."""
        shape = (len(lens), len(self.ids) // len(lens))
        owner = [i // shape[1] for i in range(len(self.ids))]
        hits = [torch.isin(ids, lens[i]) for ids, i in zip(self.ids, owner, strict=True)]
        found: dict[str, Sequence[float]] = {
            f"success@{k}": [int(torch.isin(ids, lens[i, :k]).sum()) for ids, i in zip(self.ids, owner, strict=True)]
            for k in ks
        }
        found["share"] = [float(hit.float().mean()) if len(hit) else 0.0 for hit in hits]
        found |= {"log_odds": self.log_odds.tolist(), "nll": self.nll.tolist(), "kl": self.kl.tolist()}
        found |= {f"distinct{n}": [distinct_n(ids, n) for ids in self.ids] for n in (1, 2)}
        found["repeated"] = [repeated(ids) for ids in self.ids]
        return {name: np.array(value, dtype=np.float64).reshape(shape) for name, value in found.items()}


class Sweep:
    """Writes and measures continuations of one set of prompts under many edits at one site.

    A row's text depends on the seed, its prompt and its edit alone, whatever rows share its batch. Where the edits
    spare all but the last prompt token, every prompt's other tokens go through the model once for all edits.
    """

    def __init__(self, model: Model, sae: Any, site: Site, prompts: TokenBatch, options: SteerOptions) -> None:
        self.model, self.sae, self.site, self.prompts, self.options = model, sae, site, prompts, options
        model.require_room(int(prompts.lengths.max()) + options.new_tokens)
        sampling = Sampling(options.new_tokens, options.temperature, options.seed, model.stop_ids, options.stop)
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
        if self.options.scope == "all" or not ids.shape[1] or not bool(mask.any(1).all()):
            return None
        cache = new_cache(self.model.hf.config, self.prompts.ids.shape[1] + self.options.new_tokens)
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

    def unsteered(self, progress: Task) -> Written:
        """Continuations of every prompt without an edit."""
        lens = torch.zeros(1, 1, dtype=torch.long)
        return self._collected(
            len(self.prompts), lens, lambda rows: (*self.continue_rows(rows, None), ()), self.prompts, progress
        )

    def write(self, pushes: Pushes, lens: Int[Tensor, "pushes k"], progress: Task) -> Written:
        """Continuations of every prompt under every push."""
        n = len(self.prompts)

        def steered(rows: Tensor) -> _Batch:
            op = pushes.op(self.sae, rows // n)
            with self.model.plan(Intervention.at(self.site, op, SCOPES[self.options.scope])) as plan:
                ids, logits = self.continue_rows(rows % n, plan)
            return ids, logits, plan.report

        return self._collected(n * len(pushes), lens, steered, self.prompts, progress)

    def instructed(self, prompts: TokenBatch, lens: Int[Tensor, "instructions k"], progress: Task) -> Written:
        """Continuations of prompts with an instruction before them, instruction by instruction; no edit.

        Fluency and divergence are those beside the plain prompt.
        """

        def unedited(rows: Tensor) -> _Batch:
            start = self._decoder.prefill(prompts[rows], share=True)
            return self._run(start, rows % len(self.prompts), None), start.logits, ()

        return self._collected(len(prompts), lens, unedited, prompts, progress)

    def _collected(
        self, total: int, lens: Tensor, make: Callable[[Tensor], _Batch], prompts: TokenBatch, progress: Task
    ) -> Written:
        """Rows `0 .. total` in even batches; row i continues prompt `i % prompts`."""
        n, lens = len(self.prompts), lens.to(self.model.device)
        every: list[Tensor] = []
        edits: list[EditReport] = []
        columns: list[tuple[Tensor, ...]] = []
        for rows in torch.arange(total).tensor_split(-(-total // self.options.batch_size)):
            ids, logits, report = make(rows)
            every += ids
            edits += report
            compared = self._compared(rows % n, logits, lens[(rows // n).to(lens.device)])
            columns.append((self._fluency(rows % n, ids), *compared))
            progress.advance(len(rows))
        before = [row.tolist() for row in prompts.rows()]
        texts = tuple(
            continuation(self.model.tokenizer, before[i % len(before)], row.tolist()) for i, row in enumerate(every)
        )
        nll, log_odds, kl = (torch.cat(column) for column in zip(*columns, strict=True))
        return Written(tuple(every), texts, nll, log_odds, kl, tuple(edits))

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
    def _compared(self, prompt_rows: Tensor, logits: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Change of the log-odds of the lens tokens, and the divergence, right after the prompt."""
        change, kl = [], []
        for some in torch.arange(len(logits), device=logits.device).split(max(1, slab_rows(logits.shape[1]) // 4)):
            base = self.base_logits[prompt_rows.to(logits.device)[some]]
            change.append(lens_log_odds(logits[some], lens[some]) - lens_log_odds(base, lens[some]))
            kl.append(kl_divergence(base, logits[some]))
        return torch.cat(change).cpu(), torch.cat(kl).cpu()

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
    """Loss of the edited model on ordinary text minus that of the unedited model, in nats per token.

    The edit is made at every token but the first of each text; the blocks before the site run once.
    """

    def __init__(self, model: Model, sae: Any, site: Site, texts: TokenBatch) -> None:
        self._model, self._sae, self._site, self._texts = model, sae, site, texts
        with torch.no_grad():
            self._segment = model.segment(texts, site)
            hidden, _ = forward(model.hf, texts.hf(), None, unembed=False)
            self._base = text_losses(model, texts, hidden)[:, 0]

    @torch.no_grad()
    def of(self, pushes: Pushes) -> Float[np.ndarray, "pushes texts"]:
        """The increase of the loss on each text under each push."""
        found = [self._some(pushes, which) for which in self._batches(len(pushes))]
        return torch.cat(found).double().numpy()

    def _batches(self, n: int) -> Iterator[Tensor]:
        yield from torch.arange(n).split(max(1, HARM_TOKENS // self._texts.ids.numel()))

    def _some(self, pushes: Pushes, which: Tensor) -> Tensor:
        op = pushes.op(self._sae, which.repeat_interleave(len(self._texts)))
        with self._model.plan(Intervention.at(self._site, op, NotPrefix())) as plan:
            hidden = self._segment.run(rows=len(which), plan=plan).hidden
        return (text_losses(self._model, self._texts, hidden) - self._base[:, None]).T
