"""Continuations of prompts in batches, steered or not, with what they did inside the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.display import brief
from workbench.core.html import Shown, frame_table
from workbench.core.numbers import counted
from workbench.core.progress import Task, task
from workbench.core.tokenizer import TokenizerLike, continuation, decoded
from workbench.core.tokens import TokenBatch, labelled
from workbench.hooks.handles import refuse_compiled
from workbench.hooks.sites import Site, SiteMap
from workbench.interventions.gates import When
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import Plan
from workbench.interventions.proof import EditReport, EditReports, require_met
from workbench.models.decoding import ENDED, Decoder, Recorder, Rows
from workbench.models.folderrules import left_aside
from workbench.models.sampling import Sampling
from workbench.models.stopping import StopStrings

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from transformers import PreTrainedModel


Record = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Generation(Shown):
    """Continuations of a batch of prompts.

    Attributes:
        texts: the continuations, without the prompts: what the new tokens add to the text of their prompt, a space in
            front included, special tokens left out.
        ids: new token ids of each row, without the stop token; the token that completes a stop string is there.
        logprobs: log-probability (nats) of each new token under the model that generated, at temperature 1 and
            without top_k, top_p and min_p.
        report: what each edit did; empty without an intervention.
        ended: why each row ended: "stop_token", "stop_string" or "length".
        prompt_lengths: number of prompt tokens of each row, padding not counted.
        activations: by site, one tensor `(tokens, ...)` per row: its prompt tokens, then its new tokens as far as they
            were fed back to the model. The last token that was sampled is not: of a row that ended with a stop token
            that is the stop token, of others the last of `ids`.
        note: settings of the model's generation config that were left aside, in words; the rules about which tokens
            may come, such as `suppress_tokens`, are always kept. For several rows in half precision, that rounding
            makes a row's tokens depend on its batch.
        prompts: the texts of the prompts, special tokens included.
        index: labels of the rows, where the prompts were a column of a table.
    """

    texts: tuple[str, ...]
    ids: tuple[Int[Tensor, " _"], ...]
    logprobs: tuple[Float[Tensor, " _"], ...]
    report: EditReports = EditReports()
    ended: tuple[str, ...] = ()
    prompt_lengths: tuple[int, ...] = ()
    activations: Mapping[str, tuple[Float[Tensor, ...], ...]] = field(default_factory=dict)
    note: str = ""
    prompts: tuple[str, ...] = ()
    index: pd.Index | None = None

    def frame(self) -> pd.DataFrame:
        """One row per prompt, labelled as the prompts were: continuation, tokens, mean log-probability, why it ended.

        The prompt is there too, unless the prompts were a column of a table, to which these columns can be joined.
        """
        means = [float(row.mean()) if len(row) else float("nan") for row in self.logprobs]
        columns = {
            **({"prompt": self.prompts} if self.index is None else {}), "continuation": self.texts,
            "prompt_tokens": self.prompt_lengths, "new_tokens": [len(row) for row in self.ids],
            "mean_logprob": means, "ended": self.ended,
        }  # fmt: skip
        return labelled(columns, self.index, range(len(self.texts)))

    def _shown_line(self) -> str:
        texts = brief(self.texts, 200)
        edits = f"; {counted(len(self.report), 'edits')}" if self.report else ""
        return f"{counted(len(self.texts), 'rows')}: {texts}{edits}" + (f"; {self.note}" if self.note else "")

    def _shown_note(self) -> str:
        return "; ".join(filter(None, [counted(len(self.texts), "rows"), self.note]))

    def _shown_parts(self) -> Iterable[Markup]:
        yield frame_table(self.frame())
        if self.report:
            yield self.report.shown_table("what each edit did")


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a model that generation needs.

    Attributes:
        hf: the Hugging Face model.
        site_map: where its sites are.
        tokenizer: its tokenizer.
        plan: binds an intervention to it.
        require_room: refuses a row of so many tokens if the model was not made for them.
    """

    hf: PreTrainedModel
    site_map: SiteMap
    tokenizer: TokenizerLike
    plan: Callable[[Intervention], Plan]
    require_room: Callable[[int], None]


def generate(
    parts: Parts,
    batch: TokenBatch,
    options: Sampling,
    *,
    intervention: Intervention | None = None,
    capture: Sequence[str | Site] = (),
    batch_size: int = 128,
) -> Generation:
    """Continuations of left-padded prompts, `batch_size` rows at a time; see `Model.generate`."""
    intervention = None if intervention is None else intervention.for_rows(len(batch))
    points = Recorder.points_of(parts.site_map, capture)
    refuse_compiled(parts.hf, points)
    stops = StopStrings.of(parts.hf, parts.tokenizer, options)
    found: list[tuple[Rows, TokenBatch, Record]] = []
    plans: list[Plan] = []
    longest = options.max_new_tokens
    with task(total=len(batch) * longest, description="generating", unit="tokens") as progress:
        for rows in torch.arange(len(batch)).split(batch_size):
            # Untrimmed where a prompt is edited, so that the columns of a Mask stay those of the whole batch.
            part = batch[rows] if _spares_prompt(intervention) else TokenBatch(batch.ids[rows], batch.mask[rows])
            plan = None if intervention is None else parts.plan(intervention.take(rows))
            if plan is not None:
                plan.proves_scope, plan.first_row = False, int(rows[0])
                plans.append(plan)
            recorder = Recorder(points, len(rows), part.ids.shape[1] + longest)
            decoder = Decoder(parts.hf, options, stops, recorder)
            steps = _Steps(progress, len(rows) * longest)
            new = _one_batch(decoder, part, rows, plan, recorder, steps.count)
            progress.skip(steps.ahead)  # of rows that ended early
            found.append((new, part, {str(site): _per_row(x, part, new) for site, x in recorder.found.items()}))
    require_met([plan.tallies for plan in plans])
    done = collected(parts.tokenizer, found, [plan.report for plan in plans])
    note = "; ".join(filter(None, (left_aside(parts.hf), _batch_note(parts.hf, batch))))
    return dataclasses.replace(done, note=note, index=batch.index)


@dataclass
class _Steps:
    """Counts the tokens of a batch on a progress bar.

    Attributes:
        progress: the bar.
        ahead: tokens that are still to come, at most.
    """

    progress: Task
    ahead: int

    def count(self, n: int) -> None:
        """One token of each of `n` rows."""
        self.ahead -= n
        self.progress.advance(n)


def _batch_note(hf: nn.Module, batch: TokenBatch) -> str:
    """What the precision of a model means for rows that are generated together."""
    dtype = next(hf.parameters()).dtype
    if len(batch) == 1 or dtype.itemsize >= torch.float32.itemsize:
        return ""
    return f"in {str(dtype).removeprefix('torch.')}, the tokens of a row may depend on the rows beside it"


def _spares_prompt(intervention: Intervention | None) -> bool:
    """Whether the prompts can go through the model without the plan: it neither edits them nor decides by them."""
    if intervention is None:
        return True
    decides = any(
        edit.scope.needs_history or any(isinstance(op, When) for op in edit.op.walk()) for edit in intervention.edits
    )
    return not decides and not intervention.edits_prompt


def _one_batch(
    decoder: Decoder, batch: TokenBatch, rows: Int[Tensor, " batch"], plan: Plan | None, recorder: Recorder,
    on_step: Callable[[int], None],
) -> Rows:  # fmt: skip
    spared = _spares_prompt(plan.intervention if plan else None)
    # Hooks that are there already may count on every row and every prompt token, so nothing is shared or dropped.
    alone = not _has_hooks(decoder.hf)
    on_select: Callable[[Tensor], object] | None = None
    if alone:
        on_select = plan.select_rows if plan else lambda _: None
    with contextlib.ExitStack() as stack:
        if plan and not spared:
            stack.enter_context(plan)
        with recorder.reading():
            start = decoder.prefill(batch, share=spared and alone)
        if plan and spared:
            stack.enter_context(plan)
            plan.roles(torch.ones_like(start.mask))
        with recorder.reading():
            on_ended = plan.ignore_rows if plan else None
            return decoder.run(start, rows, on_select=on_select, on_step=on_step, on_ended=on_ended)


def _has_hooks(hf: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def _per_row(x: Float[Tensor, "batch columns ..."], batch: TokenBatch, new: Rows) -> tuple[Float[Tensor, ...], ...]:
    width = batch.ids.shape[1]
    ends = (width + new.sampled - 1).tolist()
    # cloned, so that one row does not keep the memory of all
    return tuple(
        row[pad:end].cpu().clone() for row, pad, end in zip(x, (width - batch.lengths).tolist(), ends, strict=True)
    )


def collected(
    tokenizer: TokenizerLike, found: Sequence[tuple[Rows, TokenBatch, Record]], reports: Sequence[Sequence[EditReport]]
) -> Generation:
    """One generation of several batches, with the edit reports of each batch."""
    ids, logprobs, ended, lengths, prompts = [], [], [], [], []
    for new, batch, _ in found:
        why = [ENDED[code] for code in new.why.tolist()]
        # The stop token is not part of a row.
        counts = [n - (code == "stop_token") for n, code in zip(new.sampled.tolist(), why, strict=True)]
        ids += [row[:n].cpu() for row, n in zip(new.ids, counts, strict=True)]
        logprobs += [row[:n].cpu() for row, n in zip(new.logprobs, counts, strict=True)]
        ended += why
        lengths += batch.lengths.tolist()
        prompts += batch.rows()
    return Generation(
        texts=tuple(continuation(tokenizer, p.tolist(), row.tolist()) for p, row in zip(prompts, ids, strict=True)),
        ids=tuple(ids),
        logprobs=tuple(logprobs),
        report=EditReports(EditReport.merged(same) for same in zip(*reports, strict=True)),
        ended=tuple(ended),
        prompt_lengths=tuple(lengths),
        activations={site: tuple(row for _, _, record in found for row in record[site]) for site in found[0][2]},
        prompts=tuple(decoded(tokenizer, prompt.tolist()) for prompt in prompts),
    )


def sample(
    hf: PreTrainedModel,
    batch: TokenBatch,
    options: Sampling,
    rows: Int[Tensor, " batch"],
    on_step: Callable[[int], None] | None = None,
) -> tuple[Int[Tensor, "batch new"], Float[Tensor, "batch new"]]:
    """New token ids and their log-probabilities; rows that have stopped are filled with the first stop token.

    Every row stays in the batch to the end, so any hooks may be on the model.

    Args:
        hf: the Hugging Face model.
        batch: left-padded prompts.
        options: how to choose; `stop` is not used.
        rows: number of each row in the whole job, which seeds its draws.
        on_step: called with the number of rows after each new token.
    """
    decoder = Decoder(hf, options)
    new = decoder.run(decoder.prefill(batch), rows, on_step=on_step)
    return new.ids, new.logprobs
