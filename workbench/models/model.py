"""The model: the unmodified Hugging Face causal language model with its sites, tokens, reads and edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.progress import quiet_libraries, task
from workbench.hooks.sites import Site
from workbench.interventions.export.api import export
from workbench.interventions.export.result import TOLERANCE, Exported
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import Plan, active_plans
from workbench.models.compare import VariantLogits, compare
from workbench.models.generation import Generation, Parts, generate, sample
from workbench.models.head import vocabulary_ids
from workbench.models.identity import transformer_lens_bridge
from workbench.models.readable import Readable
from workbench.models.sampling import Filters, Sampling
from workbench.models.segment import Segment
from workbench.models.selfcheck import CheckReport, self_check
from workbench.models.session import Session
from workbench.models.sitetable import SiteTable
from workbench.models.wrapped import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@checked
class Model(Readable):
    """A Hugging Face causal language model and its tokenizer, readable and editable at named sites.

    The model itself is not changed: attention, weights and modules are those of `hf`.

    Attributes:
        hf: the Hugging Face model.
        tokenizer: its tokenizer; one that refuses every use where the model has none.
        name: a name for people.
        source: what `load_model` takes to load it again; None if it was made in memory.
        site_map: where its sites are.
    """

    how_to_make = "load_model(...) gives a model."

    def self_check(self) -> CheckReport:
        """Verifies identities, perturbations and gradients on this model; withdraws sites that break their identity."""
        report = self_check(self.hf, self.site_map)
        self.site_map = self.site_map.without(report.withdrawn).without_gradient(report.no_gradient)
        return report

    def sites(self) -> SiteTable:
        """The sites of this model, with shapes, and why others are missing."""
        return SiteTable.of(self.site_map)

    def segment(
        self,
        batch: Batch,
        site: str | Site,
        to: str | Site | Sequence[str | Site] = "logits",
        *,
        last: bool | int = False,
        hold: Sequence[str | Site] = (),
    ) -> Segment:
        """The batch, run once, to be continued from a site with other activations or under any number of plans.

        Args:
            batch: text, texts, tokens or ids.
            site: where it starts: the site whose activations are replaced, or the earliest that the plans edit or read.
            to: where it leads: later sites, "logits", or both; the model stops behind the last of them.
            last: only the last token of each row (or so many last tokens) changes; the others are kept as cached keys
                and values.
            hold: sites between the two that stay as in the recorded run, without gradient.

        Raises:
            UnknownSiteError: for a site that this model does not have.
            InvalidInputError: if the one does not reach the other, or the logits of the batch are NaN.
        """
        return Segment(self, self._batch(batch), site, to, last=last, hold=hold)

    def variants(
        self, batch: Batch, interventions: Sequence[Intervention], *, tokens: Sequence[int] | None = None
    ) -> VariantLogits:
        """Next-token logits of the same prompts under several interventions, as rows of few forward passes.

        The result is that of one run per intervention; blocks before the earliest edit run once, and if only last
        tokens are edited the others are read from the cache.

        Args:
            batch: text, texts, tokens or ids.
            interventions: an empty one is the unedited model.
            tokens: ids of the tokens whose logits are wanted; None for the whole vocabulary.

        Raises:
            EditError: if an edit did not happen.
        """
        ids = None if tokens is None else vocabulary_ids(tokens, self.d_vocab, self.device)
        part = self._batch(batch)
        return compare(self, part, interventions, self.plan, ids)

    def plan(self, intervention: Intervention, *, any_model: bool = False) -> Plan:
        """The intervention bound to this model: a context manager in which every use of the model is edited.

        Args:
            intervention: what to edit. Texts in its scopes become token ids of this model's tokenizer.
            any_model: accept an intervention that was made for another model.

        Raises:
            UnknownSiteError: for a site that this model does not have.
            ShapeError: for an op of the wrong width.
            MismatchError: for an intervention that was made for another model.
        """
        if intervention.made_for not in (None, self.fingerprint) and not any_model:
            raise MismatchError(
                f"The intervention was made for the model {intervention.made_for}; this is {self.name} "
                f"({self.fingerprint}). Its vectors mean nothing here; pass any_model=True if they do."
            )
        return Plan(self.hf, self.site_map, intervention.resolve(self._wording))

    def active_edits(self) -> tuple[str, ...]:
        """The edits that are on at this moment, in words, outermost plan first."""
        return tuple(str(edit) for plan in active_plans(self.hf) for edit in plan.intervention.edits)

    def generate(
        self,
        prompts: Batch,
        max_new_tokens: int = 40,
        *,
        intervention: Intervention | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        stop: str | Sequence[str] = (),
        capture: Sequence[str | Site] = (),
        batch_size: int = 128,
        **filters: Unpack[Filters],
    ) -> Generation:
        """Continuations of the prompts; with an intervention, every forward pass is edited.

        A row's noise depends on the seed and the row number alone. In fp32 its text does too; in bf16 and fp16 rounding
        depends on the batch, and texts part where two tokens are nearly as good. Rules of the model's generation config
        about which tokens may come are kept, and other settings of it are named in `Generation.note`. Where nothing
        edits the prompts, what they have in common goes through the model once; rows that have ended leave the batch.

        Args:
            prompts: text, texts, chats or tokens.
            max_new_tokens: longest continuation, in tokens.
            intervention: what to edit.
            seed: decides all draws.
            temperature: 0 takes the most probable token; otherwise logits are divided by it.
            stop: strings that end a row at the first token after which its new text contains one of them; a row also
                ends at a stop token of the model.
            capture: sites whose activations are kept in `Generation.activations`; under an intervention they are as
                edited.
            batch_size: rows at a time.
            **filters: `top_k`, `top_p`, `min_p`; which tokens may be sampled, see `Sampling`.

        Raises:
            EditError: if an edit did not happen.
            InvalidInputError: for options that cannot be used, a site that cannot be kept while generating, a prompt
                that with its new tokens is longer than the model was made for, or logits that are NaN.
        """
        if batch_size < 1:
            raise InvalidInputError(f"generate(batch_size={batch_size}): it must be at least 1.")
        batch = self._batch(prompts)
        self.require_room(int(batch.lengths.max()) + max_new_tokens)
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        options = Sampling(max_new_tokens, temperature, seed, self.stop_ids, strings, **filters)
        parts = Parts(self.hf, self.site_map, self.tokenizer, self.plan, self.require_room)
        return generate(parts, batch, options, intervention=intervention, capture=capture, batch_size=batch_size)

    def session(
        self,
        system: str | None = None,
        *,
        intervention: Intervention | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 200,
        **template_options: object,
    ) -> Session:
        """A conversation with this model, one `turn` at a time; the KV cache is kept between turns.

        Args:
            system: the system message; None leaves it to the chat template.
            intervention: what to edit, each token once, when it is first processed.
            seed: decides all draws.
            temperature: 0 takes the most probable token; otherwise logits are divided by it.
            max_new_tokens: longest reply, in tokens.
            **template_options: for the chat template, such as `enable_thinking=False`.

        Raises:
            InvalidInputError: if the tokenizer has no chat template, or the template has no such option.
        """
        options = Sampling(max_new_tokens, temperature, seed, self.stop_ids)
        parts = Parts(self.hf, self.site_map, self.tokenizer, self.plan, self.require_room)
        return Session(parts, options, system=system, intervention=intervention, template_options=template_options)

    def sample(
        self,
        prompt_ids: Int[Tensor, "rows pos"],
        new_tokens: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        first_row: int = 0,
    ) -> Int[Tensor, "rows new"]:
        """Exactly `new_tokens` sampled ids per row, going on after stop tokens; rows are numbered from `first_row`."""
        self.require_room(prompt_ids.shape[-1] + new_tokens)
        rows = torch.arange(first_row, first_row + len(prompt_ids))
        options = Sampling(new_tokens, temperature, seed)
        with task(total=len(prompt_ids) * new_tokens, description="writing", unit="tokens") as running:
            return sample(self.hf, self._batch(prompt_ids), options, rows, running.advance)[0]

    def export(
        self, intervention: Intervention, kind: str, out: str | Path | None = None, *, tolerance: float = TOLERANCE
    ) -> Exported:
        """The intervention as changed weights or as a file for another program; this model is not changed.

        Args:
            intervention: what to export.
            kind: "weights", a changed copy of the model; "lora", a PEFT adapter; "gguf", a control vector of llama.cpp
                and repeng; "lm_eval", a steering file of lm-evaluation-harness; "hook", a few lines of Python and a
                file of vectors.
            out: file or folder to write; only "weights" can do without. The tokenizer is saved beside changed weights.
            tolerance: largest difference of a logit from the edited model, on probe tokens.

        Raises:
            NotExactlyExportable: if this kind can't express the intervention, with the edit and the reason.
        """
        with quiet_libraries():
            done = export(self.hf, self.site_map, self.plan(intervention).intervention, kind, out, tolerance)
        if kind == "weights" and done.path is not None and self.tokenizer:
            self.tokenizer.save_pretrained(str(done.path))
        return done

    def to_transformer_lens(self) -> TransformerBridge:
        """A TransformerLens `TransformerBridge` on a copy of the model; this model is left as it is."""
        return transformer_lens_bridge(self.hf, self.tokenizer, self.name)

    def _shown_line(self) -> str:
        return super()._shown_line() + "".join(f"; edited: {edit}" for edit in self.active_edits())

    def _shown_facts(self) -> dict[str, object]:
        return {**super()._shown_facts(), "edited": "; ".join(self.active_edits()) or "by nothing"}
