"""A conversation whose KV cache is kept from turn to turn, steered or not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, did_you_mean
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch, encode
from workbench.interventions.intervention import Intervention
from workbench.interventions.proof import EditReports
from workbench.models.decoding import Decoder, Prefilled
from workbench.models.generation import Generation, Parts, collected
from workbench.models.kvcache import crop, length, new_cache
from workbench.models.sampling import Sampling
from workbench.models.stopping import StopStrings

if TYPE_CHECKING:
    import pandas as pd
    from transformers import Cache


_OPTIONS = ("max_new_tokens", "temperature", "seed", "stop", "top_k", "top_p", "min_p")


@checked
class Session(Shown):
    """A conversation with a chat model; each turn feeds only what the model has not seen yet.

    The whole history is put through the chat template at every turn, and the cache is kept as far as its tokens agree.
    So an intervention acts on each token once, when it is first processed, and never again while the token stays in
    the cache. `Generated()` is every token that the model sampled, in this turn or an earlier one; `Prompt()` is the
    rest; `Last()` is the last prompt token of each turn; `Pos(i)` counts from the start of the conversation. A gate
    that decides per prompt decides anew in each turn, from what that turn adds. Where the template or the tokenizer
    writes a reply with other tokens than were sampled, the reply is processed again, as prompt. Caches that can't
    be cut back (sliding windows that have filled up, recurrent and convolutional states) are computed again.

    The edits are made during `turn` and `logits` only. Inside `with session:` they stay on, for any use of the model,
    and are proven at the end of the block instead of after every turn.

    Attributes:
        last: the generation of the last turn, or None before the first.
    """

    def __init__(
        self,
        parts: Parts,
        sampling: Sampling,
        *,
        system: str | None = None,
        intervention: Intervention | None = None,
        template_options: Mapping[str, object] | None = None,
    ) -> None:
        if not getattr(parts.tokenizer, "chat_template", None):
            raise InvalidInputError(
                f"session: the tokenizer of {type(parts.hf).__name__} has no chat template, so it is not known how a "
                "conversation is written. Use a chat model, set tokenizer.chat_template, or use Model.generate."
            )
        self._parts, self._sampling, self._template_options = parts, sampling, dict(template_options or {})
        self._messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._start = len(self._messages)
        self._plan = None if intervention is None else parts.plan(intervention)
        if self._plan is not None:
            self._plan.keeps_counts = True
        self._is_entered = False
        self._n_taken = 0
        self.last: Generation | None = None
        self._forget()

    def _forget(self) -> None:
        self._cache: Cache | None = None
        self._ids: list[int] = []
        self._is_generated: list[bool] = []

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The conversation up to now, system message included; replies without a space that the template writes."""
        return tuple(dict(message) for message in self._messages)

    @property
    def n_exchanges(self) -> int:
        """Number of questions that have an answer in the conversation."""
        return (len(self._messages) - self._start) // 2

    @property
    def report(self) -> EditReports:
        """What each edit did up to now; empty without an intervention."""
        return EditReports() if self._plan is None else self._plan.report

    def turn(self, text: str, **options: Any) -> str:
        """Says `text` and returns the model's reply; both become part of the conversation.

        Each turn has random draws of its own, also after a backtrack. If it fails or is interrupted, the conversation
        is as it was before.

        Args:
            text: what the user says.
            **options: `max_new_tokens`, `temperature`, `seed`, `stop`, `top_k`, `top_p`, `min_p` for this turn only.

        Raises:
            EditError: if an edit has not happened in any turn up to now.
            InvalidInputError: for an unknown option, or one that cannot be used; or if the conversation and
                `max_new_tokens` are more than the model was made for. Then `backtrack`, or ask for fewer.
        """
        sampling = self._sampling_with(options)
        messages = [*self._messages, {"role": "user", "content": text}]
        stops = StopStrings.of(self._parts.hf, self._parts.tokenizer, sampling)
        decoder = Decoder(self._parts.hf, sampling, stops)
        with self._editing():
            batch, start = self._fed(decoder, messages, sampling.max_new_tokens)
            new = decoder.run(start, torch.tensor([self._n_taken]))
        self._n_taken += 1
        sampled = new.ids[0, : int(new.sampled[0])].tolist()
        self._ids += sampled
        self._is_generated += [True] * len(sampled)
        self.last = collected(self._parts.tokenizer, [(new, batch, {})], [self.report] if self._plan else [])
        self._messages = [*messages, {"role": "assistant", "content": self._content(messages, self.last.texts[0])}]
        return self.last.texts[0]

    def _content(self, messages: Sequence[dict[str, str]], reply: str) -> str:
        """The reply as the template wants it: without its first space where the template or tokenizer writes one."""
        if not reply.startswith(" ") or not reply.strip():
            return reply
        for content in (reply, reply.removeprefix(" ")):
            next_turn = [*messages, {"role": "assistant", "content": content}, {"role": "user", "content": "a"}]
            batch = encode(self._parts.tokenizer, next_turn, "auto", **self._template_options)
            if batch.ids[0, : len(self._ids)].tolist() == self._ids:
                return content
        return reply

    def logits(self) -> Float[Tensor, " d_vocab"]:
        """Logits (fp32) of the first token of a reply to the conversation as it is now."""
        if not self._messages:
            raise DegenerateInputError("logits: nothing has been said yet. Take a turn, or give a system message.")
        with self._editing():
            return self._fed(Decoder(self._parts.hf, self._sampling), self._messages)[1].logits[0]

    def backtrack(self, n: int = 1) -> None:
        """Takes back the last `n` exchanges, questions and replies.

        Raises:
            InvalidInputError: if there are not so many.
        """
        if not 1 <= n <= self.n_exchanges:
            raise InvalidInputError(
                f"backtrack({n}): the conversation has {self.n_exchanges} exchanges; give a number from 1 to that."
            )
        # The cache is cropped when the next turn shows how much of it still holds.
        del self._messages[-2 * n :]

    def _sampling_with(self, options: dict[str, object]) -> Sampling:
        for name in options:
            if name not in _OPTIONS:
                raise InvalidInputError(f"turn: there is no option {name!r}. {did_you_mean(name, _OPTIONS)}")
        if isinstance(options.get("stop"), str):
            options["stop"] = (options["stop"],)
        return dataclasses.replace(self._sampling, **options)

    def _fed(
        self, decoder: Decoder, messages: Sequence[dict[str, str]], n_new: int = 0
    ) -> tuple[TokenBatch, Prefilled]:
        """Brings the cache to these messages: what it shares with them stays, the rest is fed."""
        batch = encode(self._parts.tokenizer, messages, "auto", **self._template_options).to(self._parts.hf.device)
        ids: list[int] = batch.ids[0].tolist()
        self._parts.require_room(len(ids) + n_new)
        known = next((i for i, (a, b) in enumerate(zip(ids, self._ids, strict=False)) if a != b), None)
        known = min(len(ids), len(self._ids)) if known is None else known
        cached = 0 if self._cache is None else length(self._cache)
        # The last column is always fed, because its logits are needed.
        keep = min(known, cached, len(ids) - 1)
        if self._cache is None or not crop(self._cache, keep):
            self._cache, keep = new_cache(self._parts.hf.config, len(ids)), 0
        self._ids, self._is_generated = ids, self._is_generated[:known] + [False] * (len(ids) - known)
        if self._plan is not None:
            self._plan.roles(~torch.tensor([self._is_generated], device=batch.ids.device), batch.ids)
        return batch, decoder.extend(self._cache, batch.ids, keep)

    @contextlib.contextmanager
    def _editing(self) -> Any:
        try:
            if self._is_entered or self._plan is None:
                yield
                return
            # A reply of one token feeds nothing back, so an edit of generated tokens may have to wait.
            self._plan.proves_scope = self._plan.intervention.edits_prompt
            with self._plan:
                yield
        except BaseException:
            # The cache may hold half of a turn.
            self._forget()
            raise

    def __enter__(self) -> Session:
        if self._plan is not None:
            self._plan.proves_scope = True
            self._plan.__enter__()
            self._is_entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._plan is not None:
            self._is_entered = False
            self._plan.__exit__(kind, error, trace)

    def frame(self) -> pd.DataFrame:
        """One row per message: role and content."""
        import pandas as pd

        return pd.DataFrame(self._messages, columns=["role", "content"])

    def _shown_line(self) -> str:
        return f"{counted(self.n_exchanges, 'exchanges')}, {counted(len(self._ids), 'tokens')} known"
