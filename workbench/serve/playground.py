"""Continues one prompt with and without edits of features, and measures every text under every model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.bases.sae import AnySAE, as_basis
from workbench.core.errors import InvalidInputError
from workbench.core.metrics import token_log_probabilities
from workbench.core.numbers import counted, number
from workbench.core.tokens import TokenBatch
from workbench.features.scores.logit_lens import lens_ends, lens_tokens, slab_rows, target_site
from workbench.features.token_classes import TokenTexts
from workbench.hooks.handles import Hooks
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.proof import EditReport
from workbench.models.generation import Generation
from workbench.models.head import forward
from workbench.models.model import Model
from workbench.report.features.encode import clip
from workbench.report.text import visible
from workbench.serve.ask import MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, Ask
from workbench.serve.edits import control, steered, words
from workbench.steering.sweep.measures import kl_divergence
from workbench.steering.sweep.options import SCOPES

K = 20
"""Lens tokens of each edited feature that are marked in the texts."""
UNSTEERED, STEERED, CONTROL = "unsteered", "steered", "control"

Event = Mapping[str, object]
Emit = Callable[[Event], None]


class Stopped(Exception):
    """The run was stopped by the user."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One text under every model.

    Attributes:
        logprobs: log-probability (nats) of each token, by model.
        kl: divergence (nats) of each edited model's next-token distribution from the unsteered one at each token, by
            model.
    """

    logprobs: dict[str, Float[Tensor, " new"]]
    kl: dict[str, Float[Tensor, " new"]]


class Playground:
    """A model, and an SAE whose features are edited.

    Attributes:
        model: the model.
        sae: an SAE of it, or None to write without edits only.
        basis: the SAE as a basis.
        site: where the SAE reads and the edits are made.
        sae_source: what `load_sae` takes to load the SAE again; None if it was not loaded from anywhere.

    Raises:
        MismatchError: for an SAE of another model, or one whose features can't be steered with (`target_site`).
        InvalidInputError: for a model whose logits can't be computed for chosen positions alone.
    """

    def __init__(self, model: Model, sae: AnySAE | None = None, sae_source: str | None = None) -> None:
        self.model, self.sae, self.sae_source = model, sae, sae_source
        self.basis = None if sae is None else as_basis(sae)
        self.site: Site | None = None if sae is None else target_site(model, sae)
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with torch.no_grad():
            hidden, logits = forward(model.hf, {"input_ids": ids}, None)
        assert logits is not None
        model.head.require(hidden.flatten(0, 1), logits.flatten(0, 1))

    @property
    def about(self) -> Mapping[str, object]:
        """The model, the SAE and the limits of a run, for the page."""
        model = self.model
        return {
            "model": visible(model.name), "layers": model.n_layers, "d_model": model.d_model,
            "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
            "chat": bool(getattr(model.tokenizer, "chat_template", None)),
            "site": None if self.site is None else str(self.site),
            "d_sae": None if self.basis is None else self.basis.d_sae,
            "max_new_tokens": MAX_NEW_TOKENS, "k": K,
        }  # fmt: skip

    def check(self, ask: Ask) -> None:
        """Refuses edits without an SAE or of features that it lacks, and a chat without a template.

        The length of the prompt is checked later, in the thread that runs the model and encodes it.

        Raises:
            InvalidInputError: for any of these.
        """
        if ask.edits:
            if self.basis is None:
                raise InvalidInputError(
                    f"{counted(len(ask.edits), 'edits')} asked for, but no SAE was given. Start again with --sae "
                    "FOLDER."
                )
            self.basis.features([edit.feature for edit in ask.edits])
        if ask.chat and not self.about["chat"]:
            raise InvalidInputError(f"{self.model.name} has no chat template. Give the prompt as plain text.")

    def lens(self, feature: int) -> Mapping[str, object]:
        """The tokens that a feature promotes and suppresses, through the final norm.

        Raises:
            InvalidInputError: if there is no such feature.
        """
        if self.basis is None:
            raise InvalidInputError(f"Feature {feature}: no SAE was given. Start again with --sae FOLDER.")
        row = self.basis.rows(self.basis.features([feature]))
        ends = lens_ends(self.model, row, min(10, self.model.d_vocab))
        sides = {name: getattr(ends, name).ids[0].tolist() for name in ("promoted", "suppressed")}
        return {"feature": feature} | {name: [self.shown(i) for i in ids] for name, ids in sides.items()}

    def prompt(self, ask: Ask) -> TokenBatch:
        """The tokens of a run's prompt.

        Raises:
            InvalidInputError: if there are too many, or for a chat without a template.
        """
        self.check(ask)
        batch = self.model.tokens([{"role": "user", "content": ask.prompt}] if ask.chat else ask.prompt)
        if batch.n_tokens > MAX_PROMPT_TOKENS:
            raise InvalidInputError(
                f"The prompt has {counted(batch.n_tokens, 'tokens')}; the playground takes "
                f"{number(MAX_PROMPT_TOKENS)}. Shorten it."
            )
        return batch

    def run(self, ask: Ask, emit: Emit, stopped: Callable[[], bool]) -> Mapping[str, object]:
        """Writes and measures all texts of a run; they are those of `Model.generate`.

        Args:
            ask: the run.
            emit: receives the progress, and each token that is written.
            stopped: called between tokens, and before each block of the model.

        Raises:
            Stopped: if `stopped` says so.
            EditError: if an edit did not happen.
        """
        with stoppable(self.model, stopped):
            return self._run(ask, emit, stopped)

    def _run(self, ask: Ask, emit: Emit, stopped: Callable[[], bool]) -> Mapping[str, object]:
        batch = self.prompt(ask)
        self.model.require_room(batch.n_tokens + ask.max_new_tokens)
        edits = self._interventions(ask)
        texts: dict[str, Generation] = {}
        for place, (arm, intervention) in enumerate(edits.items()):
            emit({"kind": "writing", "arm": arm, "place": place, "of": len(edits)})
            texts[arm] = self._write(arm, batch, ask, intervention, (emit, stopped))
        emit({"kind": "measuring"})
        lens = self._lens_ids(ask)
        rows = []
        for arm, text in texts.items():
            if stopped():
                raise Stopped
            rows.append(self._row(arm, text, self.measure(batch, text.ids[0], edits), lens))
        about = {STEERED: words(ask.edits), CONTROL: ("random direction, equal norm at each token",)}
        reports = [
            _report(arm, about[arm][i], report)
            for arm, text in texts.items() for i, report in enumerate(text.report)
        ]  # fmt: skip
        return {"note": batch.note, "prompt_tokens": batch.n_tokens, "rows": rows, "edits": reports}

    def _interventions(self, ask: Ask) -> dict[str, Intervention | None]:
        arms: dict[str, Intervention | None] = {UNSTEERED: None}
        if ask.edits and self.sae is not None and self.site is not None:
            arms[STEERED] = steered(self.sae, self.site, ask.edits, SCOPES[ask.scope])
            if ask.control:
                arms[CONTROL] = control(self.sae, self.site, ask.edits, SCOPES[ask.scope], ask.seed)
        return arms

    def _write(
        self, arm: str, batch: TokenBatch, ask: Ask, intervention: Intervention | None,
        caller: tuple[Emit, Callable[[], bool]],
    ) -> Generation:  # fmt: skip
        emit, stopped = caller

        def fed(ids: Tensor) -> None:
            if stopped():
                raise Stopped
            if ids.shape[1] == 1 and written:
                emit({"kind": "token", "arm": arm, "text": self.shown(int(ids[0, 0]))})
            written.append(True)

        written: list[bool] = []
        with watched(self.model.hf, fed):
            return self.model.generate(
                batch, ask.max_new_tokens, intervention=intervention, seed=ask.seed, temperature=ask.temperature
            )

    @torch.no_grad()
    def measure(
        self, prompt: TokenBatch, new: Int[Tensor, " new"], edits: Mapping[str, Intervention | None]
    ) -> Measured:
        """One continuation of a prompt under each model, read in one pass, a few positions unembedded at a time."""
        ids = torch.cat([prompt.ids[0], new.to(prompt.ids)])[None, :-1]
        if not len(new):
            return Measured(
                {arm: torch.zeros(0) for arm in edits}, {arm: torch.zeros(0) for arm in edits if edits[arm]}
            )
        first = prompt.n_tokens - 1
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        chosen[:, first:] = True
        hidden = {arm: self._hidden(ids, chosen, first, edit) for arm, edit in edits.items()}
        logprobs: dict[str, list[Tensor]] = {arm: [] for arm in edits}
        kl: dict[str, list[Tensor]] = {arm: [] for arm, edit in edits.items() if edit is not None}
        for some in torch.arange(len(new)).split(max(1, slab_rows(self.model.d_vocab) // 4)):
            target = new[some].to(ids)[:, None]
            logits = {arm: self.model.head.all(h[some.to(h.device)]) for arm, h in hidden.items()}
            for arm, z in logits.items():
                logprobs[arm].append(token_log_probabilities(z, target.to(z.device)).squeeze(1).cpu())
                if arm in kl:
                    # Rounding may put a divergence of nothing below zero.
                    kl[arm].append(kl_divergence(logits[UNSTEERED], z).clamp_min(0).cpu())
        return Measured(*({arm: torch.cat(parts) for arm, parts in found.items()} for found in (logprobs, kl)))

    def _hidden(
        self, ids: Int[Tensor, "1 pos"], chosen: Tensor, last: int, edit: Intervention | None
    ) -> Float[Tensor, "new d_model"]:
        """The unembedding's input where new tokens are predicted; the prompt ends at position `last`."""
        # Without roles a plan takes a whole row for the prompt.
        inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
        if edit is None:
            return forward(self.model.hf, inputs, chosen, unembed=False)[0]
        with self.model.plan(edit) as plan:
            plan.roles((torch.arange(ids.shape[1], device=ids.device) <= last)[None])
            return forward(self.model.hf, inputs, chosen, unembed=False)[0]

    def _lens_ids(self, ask: Ask) -> set[int]:
        if not ask.edits or self.basis is None:
            return set()
        rows = self.basis.rows(torch.tensor([edit.feature for edit in ask.edits]))
        rows = rows[rows.norm(dim=1) > 0]
        k = min(K, self.model.d_vocab)
        return set(lens_tokens(self.model, rows, k).ids.flatten().tolist()) if len(rows) else set()

    def _row(self, arm: str, text: Generation, measured: Measured, lens: set[int]) -> Mapping[str, object]:
        ids = text.ids[0].tolist()
        return {
            "arm": arm, "ended": text.ended[0].replace("_", " "),
            "tokens": [self.shown(i) for i in ids], "lens": [i in lens for i in ids],
            "logprobs": {name: _short(values) for name, values in measured.logprobs.items()},
            "kl": {name: _short(values) for name, values in measured.kl.items()},
        }  # fmt: skip

    def shown(self, token: int) -> str:
        """A token as the page shows it."""
        vocabulary = TokenTexts.of(self.model.tokenizer)
        return clip(vocabulary.text(token)) if token < len(vocabulary) else f"⟨{token}⟩"


def _short(values: Float[Tensor, " new"]) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _report(arm: str, what: str, report: EditReport) -> Mapping[str, object]:
    return {
        "arm": arm, "what": what, "edit": report.edit, "site": report.site, "passes": report.fired,
        "tokens": report.tokens, "norm": report.mean_norm_applied, "intended": report.mean_norm_intended,
        "share": report.share, "together": report.together,
    }  # fmt: skip


@contextlib.contextmanager
def watched(hf: nn.Module, fed: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block, `fed` gets the ids of each forward pass before it runs; what it raises ends the pass."""

    def tell(_module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, Tensor]) -> None:
        fed(kwargs["input_ids"])

    with Hooks() as on:
        on.add(hf, tell, before=True)
        yield


@contextlib.contextmanager
def stoppable(model: Model, stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, each layer of the model first checks `stopped`, because a long prompt is one long pass."""

    def ask(*_: object) -> None:
        if stopped():
            raise Stopped

    stacks = (m for m in model.hf.modules() if isinstance(m, nn.ModuleList) and len(m) == model.n_layers)
    with Hooks() as on:
        for block in next(stacks, ()):
            on.add(block, ask, before=True)
        yield
