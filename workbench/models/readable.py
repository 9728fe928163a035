"""What can be read off a model that nothing edits: activations at sites, logits and losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.chats import Chat
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.tokens import Bos, TokenBatch
from workbench.hooks.capture import Activations, capture
from workbench.hooks.sites import Site
from workbench.interventions.scopes import All, Last, Scope
from workbench.models.choice import chosen_tokens, groups
from workbench.models.head import vocabulary_ids
from workbench.models.numbers import require_activations, without_nan
from workbench.models.wrapped import Batch, Wrapped


@checked
class Readable(Wrapped):
    """A model with its activations, logits and losses; `Model` adds edits and continuations."""

    def capture(
        self,
        batch: Batch,
        sites: Sequence[str | Site],
        *,
        positions: Scope | None = None,
        grad: bool = False,
        allow_nan: bool = False,
    ) -> Activations:
        """Activations at named sites, in the model's dtype; the forward pass stops after the last site needed.

        They are on `model.device`, where the ids are, also if the model is on several; with `grad` each is where its
        block is.

        Shapes are those of `model.sites()`; with `positions`, each is `(tokens, width)` in row order, heads side by
        side, and `acts.rows` and `acts.positions` say which token each line is.

        Args:
            batch: text, texts, tokens or ids.
            sites: where to read, such as `["resid_post.10", "z.3.h1"]`; `"resid_post"` is every layer, and `*` stands
                for anything, as in `"z.*.h1"`.
            positions: the tokens to keep, such as `Last()`; None keeps all, padding included.
            grad: keep the autograd graph.
            allow_nan: return NaN too, to look for where it begins.

        Raises:
            UnknownSiteError: for a site that this model does not have.
            DegenerateInputError: if no token is in `positions`.
            InvalidInputError: if an activation of a real token is NaN.
        """
        self._refuse_unknown("capture", sites)
        tokens = self._batch(batch)
        chosen = None if positions is None else chosen_tokens(tokens, positions, self._wording)
        acts = capture(self.hf, self.site_map, self._inputs(tokens), sites, grad=grad, chosen=chosen)
        acts.belong_to(self, tokens, chosen)
        if not allow_nan:
            require_activations(acts, tokens.mask, tokens.mask if chosen is None else chosen)
        return acts

    def stream(
        self,
        texts: Iterable[str] | Iterable[Chat],
        sites: Sequence[str | Site],
        *,
        batch_size: int = 8,
        positions: Scope | None = None,
        bos: Bos = "auto",
    ) -> Iterator[tuple[TokenBatch, Activations]]:
        """Tokens and activations of any number of texts, `batch_size` at a time, holding one batch in memory.

        Args:
            texts: texts or chats; may be a generator that never ends.
            sites: as for `capture`.
            batch_size: texts per forward pass.
            positions: as for `capture`.
            bos: as for `tokens`.

        Raises:
            UnknownSiteError: for a site that this model does not have, before anything is read.
        """
        self._refuse_unknown("stream", sites)
        if batch_size < 1:
            raise InvalidInputError(f"stream(batch_size={batch_size}): it must be at least 1.")
        parts: Iterator[Any] = groups(texts, batch_size)
        batches = (self.tokens(part, bos) for part in parts)
        return ((batch, self.capture(batch, sites, positions=positions)) for batch in batches)

    def mean(
        self,
        texts: Iterable[str] | Iterable[Chat],
        site: str | Site,
        *,
        positions: Scope | None = None,
        batch_size: int = 8,
        bos: Bos = "auto",
    ) -> Float[Tensor, " width"]:
        """Mean activation at a site over all real tokens of the texts, or over those in a scope; fp32.

        Summed in fp64, one batch in memory at a time; what `Ablate("mean", ...)` takes. `NotPrefix()` leaves out
        the tokenizer's prefix, or the first token of each text, whose activation can be hundreds of times as large.

        Raises:
            DegenerateInputError: if there is no text, or no token in the scope.
        """
        total, n = None, 0
        for _, acts in self.stream(texts, [site], positions=positions or All(), batch_size=batch_size, bos=bos):
            part = acts[site].double()
            total, n = part.sum(0) if total is None else total + part.sum(0), n + len(part)
        if total is None:
            raise DegenerateInputError("mean: there is no text to take a mean over. Give at least one.")
        return (total / n).float()

    def _refuse_unknown(self, caller: str, sites: Sequence[str | Site]) -> None:
        """Raises for a site that does not exist, before anything is computed."""
        if not sites:
            raise DegenerateInputError(f"{caller}(sites=[]): name at least one site, such as resid_post.0.")
        self.site_map.named(sites)

    @torch.no_grad()
    def logits(
        self, batch: Batch, keep: Literal["last", "all"] | Scope = "last", *, tokens: Sequence[int] | None = None
    ) -> Float[Tensor, "*rows k"]:
        """Logits in fp32; only the positions and tokens that are asked for are unembedded.

        Args:
            batch: text, texts, tokens or ids.
            keep: "last" for the last token of each row, `(batch, k)`; "all" for all positions, padding included,
                `(batch, pos, k)`; or a scope, `(chosen tokens, k)` in row order.
            tokens: ids of the tokens whose logits are wanted; None for the whole vocabulary.

        Raises:
            DegenerateInputError: if no token is in the scope.
            InvalidInputError: if a logit is NaN.
        """
        part = self._batch(batch)
        ids = None if tokens is None else vocabulary_ids(tokens, self.d_vocab, self.device)
        chosen = None if keep == "all" else chosen_tokens(part, Last() if keep == "last" else keep, self._wording)
        logits = self.head.logits(self._inputs(part), chosen, ids)
        return without_nan("logits", logits, part.mask, part.mask if chosen is None else chosen)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Float[Tensor, "batch targets"]:
        """Next-token cross-entropy in nats, one per target (`pos - 1` per row); nan where a target is padding.

        Raises:
            InvalidInputError: if the loss of a real token is NaN.
        """
        tokens = self._batch(batch)
        if tokens.ids.shape[1] < 2:
            raise DegenerateInputError("loss: rows of one token have no next token to predict.")
        logits = self.hf(**self._inputs(tokens), use_cache=False).logits
        target = tokens.ids[:, 1:]
        loss = torch.stack(
            [
                nn.functional.cross_entropy(z[:-1].float(), t, reduction="none")
                for z, t in zip(logits, target, strict=True)
            ]
        )
        real = tokens.mask[:, 1:] & tokens.mask[:, :-1]
        without_nan("loss", loss[..., None], tokens.mask[:, :-1], real)
        return loss.masked_fill(~real, float("nan"))
