"""What a model is: the unmodified Hugging Face model with its tokenizer, sizes, tokens and unembedding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.arguments import checked, shown
from workbench.core.chats import Chat
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.tokenizer import NoTokenizer, TokenizerLike
from workbench.core.tokens import Bos, Column, TokenBatch, encode
from workbench.core.wording import Wording
from workbench.hooks.ends import embedding, unembedding
from workbench.hooks.families import build_site_map, position_tables
from workbench.hooks.sites import Site
from workbench.models.head import Head
from workbench.models.identity import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Texts = str | Sequence[str] | Chat | Sequence[Chat] | Column
Batch = TokenBatch | Texts | Int[Tensor, "batch pos"]


@checked
class Wrapped(Shown):
    """A Hugging Face causal language model and its tokenizer; `Model` adds what can be done with them."""

    def __init__(
        self,
        hf: PreTrainedModel | nn.Module,  # a wrapper is refused with the place of the model inside
        tokenizer: PreTrainedTokenizerBase | TokenizerLike | None,
        name: str = "model",
        source: str | None = None,
    ) -> None:
        self.site_map = build_site_map(hf)
        self.hf, self.name, self.source = cast("PreTrainedModel", hf), name, source
        # transformers makes attributes such as `bos_token_id` at run time, which its type does not declare
        self.tokenizer: TokenizerLike = NoTokenizer() if tokenizer is None else cast(TokenizerLike, tokenizer)
        self._unembedding: tuple[tuple[int, int], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.hf.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the inputs: that of the embeddings, where a model is on several."""
        return embedding(self.hf).weight.device

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.site_map.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(embedding(self.hf).weight.shape[1])

    @property
    def d_vocab(self) -> int:
        """Number of rows of the unembedding; may exceed the tokenizer's vocabulary."""
        return int(unembedding(self.hf).weight.shape[0])

    @property
    def n_ctx(self) -> int:
        """Longest sequence the model was made for; 2048 where its config does not say."""
        config = self.hf.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "seq_length")
        return int(next((value for name in names if (value := getattr(config, name, None))), 2048))

    def resolve(self, site: str | Site) -> Site:
        """The site of this name.

        Raises:
            UnknownSiteError: if this model does not have it.
        """
        return self.site_map[site].site

    def width(self, site: str | Site) -> int:
        """Size of one token's vector at a site, heads side by side.

        Raises:
            UnknownSiteError: if this model does not have it.
            InvalidInputError: if it depends on the input, as for pattern.
        """
        width = self.site_map[site].width
        if width is None:
            raise InvalidInputError(f"The width of {site} depends on the length of the input; capture it instead.")
        return width

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that tell this model from others: its config and a sample of every weight."""
        return fingerprint(self.hf)

    def tokens(self, value: Texts, bos: Bos = "auto", **template_options: object) -> TokenBatch:
        """Token ids of text, texts or chat messages; the result says what was done about BOS and padding.

        Args:
            value: a text, texts, a chat, chats, or a column of a pandas table, as `df["text"]`.
            bos: "auto" puts in front of a text what the tokenizer puts there, all of it; True adds BOS where that is
                nothing; False adds nothing.
            **template_options: for the chat template, such as `enable_thinking=False`.

        Raises:
            InvalidInputError: for a chat that the template can't or does not write, or an option that it does not have.
        """
        return encode(self.tokenizer, value, bos, **template_options).to(self.device)

    def _batch(self, batch: Batch) -> TokenBatch:
        if isinstance(batch, Tensor) and (batch.ndim != 2 or batch.dtype != torch.long):
            raise ShapeError(f"Token ids have shape {tuple(batch.shape)} and {batch.dtype}; give (batch, pos) int64.")
        if isinstance(batch, Tensor):
            batch = replace(TokenBatch.of_rows(batch), tokenizer=self.tokenizer)
        tokens = batch.to(self.device) if isinstance(batch, TokenBatch) else self.tokens(batch)
        low, high = (int(bound) for bound in tokens.ids.aminmax())
        rows = embedding(self.hf).weight.shape[0]
        if low < 0 or high >= rows:
            raise InvalidInputError(
                f"Token id {low if low < 0 else high}: this model has embeddings for ids 0 to {rows - 1}. Does the "
                "tokenizer belong to it, and was its embedding resized for added tokens?"
            )
        self.require_room(int(tokens.lengths.max()))
        return tokens

    @property
    def n_positions(self) -> int | None:
        """How many positions a stored table has; None where positions are computed."""
        for _, module in position_tables(self.hf):
            table, offset = getattr(module, "weight", getattr(module, "weights", None)), getattr(module, "offset", 0)
            if isinstance(table, Tensor):
                return table.shape[0] - (offset if isinstance(offset, int) else 0)
        return None

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that a row may have: positions of a stored table, or what the config declares; None if neither.

        A config that stretches rotary positions (linear, dynamic, yarn) declares its original length times the factor.
        """
        config = self.hf.config.get_text_config()
        declared = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if declared and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
            original = rope.get("original_max_position_embeddings") or declared
            declared = max(declared, int(original * float(rope.get("factor") or 1)))
        return min((n for n in (self.n_positions, declared) if n), default=None)

    def require_room(self, n_tokens: int) -> None:
        """Refuses a row that is longer than the model was made for.

        Args:
            n_tokens: of the row, new tokens included.

        Raises:
            InvalidInputError: if that is more than `max_tokens`.
        """
        room = self.max_tokens
        if room is not None and n_tokens > room:
            raise InvalidInputError(
                f"A row of {n_tokens} tokens, new ones included: {self.name} ({type(self.hf).__name__}) takes {room} "
                "positions. Give shorter texts, or fewer new tokens."
            )

    @property
    def _wording(self) -> Wording:
        return Wording(self.tokenizer)

    def _inputs(self, tokens: TokenBatch) -> dict[str, Tensor]:
        inputs = tokens.hf()
        if bool(tokens.mask.all()):
            # Without padding no mask is needed, and attention takes its fast path.
            del inputs["attention_mask"]
        return inputs

    @functools.cached_property
    def head(self) -> Head:
        """The unembedding, for chosen positions and tokens."""
        return Head(self.hf)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        eos = getattr(self.hf.generation_config, "eos_token_id", None)
        found = [eos] if isinstance(eos, int) else list(eos or [])
        own = None if isinstance(self.tokenizer, NoTokenizer) else self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*found, *([] if own is None else [own])]))

    def text_length(self, row: Int[Tensor, " new"]) -> int:
        """Number of new tokens of a row before its first stop token."""
        hits = torch.isin(row, torch.tensor(self.stop_ids, device=row.device)).nonzero()
        return int(hits[0]) if hits.numel() else len(row)

    def final_norm(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The final normalisation, weight included, computed in fp32."""
        if x.shape[-1:] != (self.d_model,):
            raise ShapeError(
                f"The final norm of {shown(x)}: give vectors of the residual stream, (..., {self.d_model})."
            )
        # A copy at every call, which costs a vector: the weights may change between calls.
        norm = copy.deepcopy(self.site_map["final_norm"].module).float()
        with torch.no_grad():
            return norm(x.to(next(norm.parameters(), x).device, torch.float32)).to(x.device)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding in fp32; column t is the direction of token t."""
        weight = unembedding(self.hf).weight
        # A conversion to fp32 is kept until the weights change.
        key = (weight.data_ptr(), weight._version)
        if self._unembedding is None or self._unembedding[0] != key:
            self._unembedding = key, weight.detach().float().T
        return self._unembedding[1]

    def lens(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logit lens: unembedding of the final norm of `x`, fp32, without bias and soft cap."""
        return (self.final_norm(x).to(self.W_U.device) @ self.W_U).to(x.device)

    def _shown_line(self) -> str:
        sizes = f"{self.n_layers} layers, d_model {self.d_model}, d_vocab {self.d_vocab}"
        return (
            f"{self.name}: {type(self.hf).__name__}, {sizes}, {self.dtype} on {self.device}, fingerprint "
            f"{self.fingerprint}" + ("" if self.tokenizer else ", no tokenizer")
        )

    def _shown_note(self) -> str:
        return self.name

    def _shown_facts(self) -> dict[str, object]:
        kinds = dict.fromkeys(site.kind for site in sorted(self.site_map.points, key=lambda site: site.order))
        return {
            "architecture": f"{type(self.hf).__name__}, {self.n_layers} layers, d_model {self.d_model}",
            "vocabulary": f"{self.d_vocab} tokens" + ("" if self.tokenizer else ", no tokenizer"),
            "weights": f"{self.dtype} on {self.device}, fingerprint {self.fingerprint}",
            "longest row": f"{self.n_ctx} tokens",
            "sites": ", ".join(kinds),
        }
