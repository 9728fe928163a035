"""The model: the unmodified Hugging Face causal language model with its sites, tokens, reads and edits."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import DegenerateInputError, InvalidInputError, MismatchError, ShapeError
from workbench.hooks.capture import Activations, capture
from workbench.hooks.families import build_site_map
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import Plan, active_plans
from workbench.interventions.scopes import Scope
from workbench.models.choice import chosen_tokens, groups
from workbench.models.generation import Generation, Parts, generate, sample
from workbench.models.sampling import Filters, Sampling
from workbench.models.selfcheck import CheckReport, self_check
from workbench.models.session import Session
from workbench.models.sitetable import SiteTable
from workbench.progress import task
from workbench.tokens import Bos, Chat, TokenBatch, encode

Texts = str | Sequence[str] | Chat | Sequence[Chat]
Batch = TokenBatch | str | Sequence[str] | Int[Tensor, "batch pos"]


class Model:
    """A Hugging Face causal language model and its tokenizer, readable and editable at named sites.

    The model itself is not changed: attention, weights and modules are those of `hf`.

    Attributes:
        hf: the Hugging Face model.
        tokenizer: its tokenizer.
        name: a name for people.
        site_map: where its sites are.
    """

    def __init__(self, hf: Any, tokenizer: Any, name: str = "model") -> None:
        self.hf, self.tokenizer, self.name = hf, tokenizer, name
        self.site_map = build_site_map(hf)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.hf.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.hf.parameters()).device

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.site_map.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.hf.get_input_embeddings().weight.shape[1])

    @property
    def d_vocab(self) -> int:
        """Number of rows of the unembedding; may exceed the tokenizer's vocabulary."""
        return int(self.hf.get_output_embeddings().weight.shape[0])

    @property
    def n_ctx(self) -> int:
        """Longest sequence the model was made for."""
        return int(
            getattr(self.hf.config, "max_position_embeddings", 0) or getattr(self.hf.config, "n_positions", 2048)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that tell this model from others: its config and a sample of every weight."""
        digest = hashlib.sha256()
        config = self.hf.config.to_dict()
        kept = {
            k: config.get(k)
            for k in ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")
        }
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, parameter in sorted(self.hf.named_parameters()):
            flat = parameter.detach().flatten()
            # bfloat16, so that loading the same weights in another dtype gives the same fingerprint.
            taken = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).float().cpu()
            digest.update(name.encode() + str(tuple(parameter.shape)).encode() + taken.numpy().tobytes())
        return digest.hexdigest()[:12]

    def self_check(self) -> CheckReport:
        """Verifies identities, perturbations and gradients on this model; withdraws sites that break their identity."""
        report = self_check(self.hf, self.site_map)
        self.site_map = self.site_map.without(report.withdrawn)
        return report

    def sites(self) -> SiteTable:
        """The sites of this model, with shapes, and why others are missing."""
        return SiteTable.of(self.site_map)

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

    def tokens(self, value: Texts, bos: Bos = "auto") -> TokenBatch:
        """Token ids of text, texts or chat messages; the result says what was done about BOS and padding."""
        return encode(self.tokenizer, value, bos).to(self.device)

    def _batch(self, batch: Batch) -> TokenBatch:
        if isinstance(batch, TokenBatch):
            return batch.to(self.device)
        if isinstance(batch, Tensor):
            if batch.ndim != 2 or batch.dtype != torch.long:
                raise ShapeError(
                    f"Token ids have shape {tuple(batch.shape)} and {batch.dtype}; give (batch, pos) int64."
                )
            return TokenBatch.of_rows(batch.to(self.device))
        return self.tokens(batch)

    def capture(
        self, batch: Batch, sites: Sequence[str | Site], *, positions: Scope | None = None, grad: bool = False
    ) -> Activations:
        """Activations at named sites, in the model's dtype; the forward pass stops after the last site needed.

        Shapes are those of `model.sites()`; with `positions`, each is `(tokens, width)` in row order, heads side by
        side, and `acts.rows` and `acts.positions` say which token each line is.

        Args:
            batch: text, texts, tokens or ids.
            sites: where to read, such as `["resid_post.10", "z.3.h1"]`.
            positions: the tokens to keep, such as `Last()`; None keeps all, padding included.
            grad: keep the autograd graph.

        Raises:
            UnknownSiteError: for a site that this model does not have.
            DegenerateInputError: if no token is in `positions`.
        """
        self._refuse_unknown("capture", sites)
        tokens = self._batch(batch)
        if positions is None:
            return capture(self.hf, self.site_map, self._inputs(tokens), sites, grad=grad)
        chosen = chosen_tokens(tokens, positions, self._encode)
        acts = capture(self.hf, self.site_map, self._inputs(tokens), sites, grad=grad, chosen=chosen)
        acts.positions = tokens.positions[chosen]
        return acts

    def stream(
        self,
        texts: Iterable[str] | Iterable[Chat],
        sites: Sequence[str | Site],
        *,
        batch_size: int = 8,
        positions: Scope | None = None,
    ) -> Iterator[tuple[TokenBatch, Activations]]:
        """Tokens and activations of any number of texts, `batch_size` at a time, holding one batch in memory.

        Args:
            texts: texts or chats; may be a generator that never ends.
            sites: as for `capture`.
            batch_size: texts per forward pass.
            positions: as for `capture`.

        Raises:
            UnknownSiteError: for a site that this model does not have, before anything is read.
        """
        self._refuse_unknown("stream", sites)
        if isinstance(texts, str):
            raise InvalidInputError("stream(texts=...): give an iterable of texts, such as [text].")
        if batch_size < 1:
            raise InvalidInputError(f"stream(batch_size={batch_size}): it must be at least 1.")
        parts: Iterator[Any] = groups(texts, batch_size)
        batches = map(self.tokens, parts)
        return ((batch, self.capture(batch, sites, positions=positions)) for batch in batches)

    def _refuse_unknown(self, caller: str, sites: Sequence[str | Site]) -> None:
        """Raises for a site that does not exist, before anything is computed."""
        if isinstance(sites, str):
            raise InvalidInputError(f"{caller}(sites={sites!r}): give a list of sites, such as [{sites!r}].")
        if not sites:
            raise DegenerateInputError(f"{caller}(sites=[]): name at least one site, such as resid_post.0.")
        for site in sites:
            self.resolve(site)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def logits(self, batch: Batch, keep: str = "last") -> Float[Tensor, "batch *pos d_vocab"]:
        """Logits in fp32 at the last token of each row (`keep="last"`) or at all positions (`keep="all"`)."""
        tokens = self._batch(batch)
        if keep not in ("last", "all"):
            raise InvalidInputError(f"logits(keep={keep!r}): use 'last' or 'all'.")
        if keep == "last" and not bool(tokens.mask[:, -1].all()):
            raise InvalidInputError(
                "logits(keep='last') needs left padding; the last column of this batch holds padding."
            )
        out = self.hf(**self._inputs(tokens), use_cache=False, logits_to_keep=int(keep == "last")).logits.float()
        return out[:, -1] if keep == "last" else out

    def _inputs(self, tokens: TokenBatch) -> dict[str, Tensor]:
        inputs = tokens.hf()
        if bool(tokens.mask.all()):
            # Without padding no mask is needed, and attention takes its fast path.
            del inputs["attention_mask"]
        return inputs

    @torch.no_grad()
    def loss(self, batch: Batch) -> Float[Tensor, "batch targets"]:
        """Next-token cross-entropy in nats, one per target (`pos - 1` per row); nan where a target is padding."""
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
        return loss.masked_fill(~(tokens.mask[:, 1:] & tokens.mask[:, :-1]), float("nan"))

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
        resolved = intervention.resolve(lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Plan(self.hf, self.site_map, resolved)

    def active_edits(self) -> tuple[str, ...]:
        """The edits that are on at this moment, in words, outermost plan first."""
        return tuple(str(edit) for plan in active_plans(self.hf) for edit in plan.intervention.edits)

    def generate(
        self,
        prompts: TokenBatch | Texts,
        max_new_tokens: int = 40,
        *,
        intervention: Intervention | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        capture: Sequence[str | Site] = (),
        batch_size: int = 128,
        **filters: Unpack[Filters],
    ) -> Generation:
        """Continuations of the prompts; with an intervention, every forward pass is edited.

        Rows are sampled from the seed and the row number, so a row's draws do not depend on its batch. Where nothing
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
            InvalidInputError: for options that cannot be used, or a site that cannot be kept while generating.
        """
        batch = prompts.to(self.device) if isinstance(prompts, TokenBatch) else self.tokens(prompts)
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        options = Sampling(max_new_tokens, temperature, seed, self.stop_ids, strings, **filters)
        return generate(self._parts, batch, options, intervention=intervention, capture=capture, batch_size=batch_size)

    def session(
        self,
        system: str | None = None,
        *,
        intervention: Intervention | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 200,
    ) -> Session:
        """A conversation with this model, one `turn` at a time; the KV cache is kept between turns.

        Args:
            system: the system message; None leaves it to the chat template.
            intervention: what to edit, each token once, when it is first processed.
            seed: decides all draws.
            temperature: 0 takes the most probable token; otherwise logits are divided by it.
            max_new_tokens: longest reply, in tokens.

        Raises:
            InvalidInputError: if the tokenizer has no chat template.
        """
        options = Sampling(max_new_tokens, temperature, seed, self.stop_ids)
        return Session(self._parts, options, system=system, intervention=intervention)

    @property
    def _parts(self) -> Parts:
        return Parts(self.hf, self.site_map, self.tokenizer, self.plan)

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
        rows = torch.arange(first_row, first_row + len(prompt_ids))
        options = Sampling(new_tokens, temperature, seed)
        total = len(prompt_ids) * new_tokens
        with task(total=total, description="writing", unit="tokens") as running:
            return sample(self.hf, self._batch(prompt_ids), options, rows, running.advance)[0]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        eos = getattr(self.hf.generation_config, "eos_token_id", None)
        found = [eos] if isinstance(eos, int) else list(eos or [])
        return tuple(
            dict.fromkeys([*found, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])])
        )

    def _length(self, row: Int[Tensor, " new"]) -> int:
        hits = torch.isin(row, torch.tensor(self.stop_ids, device=row.device)).nonzero()
        return int(hits[0]) if hits.numel() else len(row)

    @functools.cached_property
    def _norm32(self) -> nn.Module:
        return copy.deepcopy(self.site_map["final_norm"].module).float()

    def final_norm(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The final normalisation, weight included, computed in fp32."""
        with torch.no_grad():
            return self._norm32(x.float())

    @functools.cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding in fp32; column t is the direction of token t."""
        return self.hf.get_output_embeddings().weight.detach().float().T

    def lens(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logit lens: unembedding of the final norm of `x`, fp32, without bias and soft cap."""
        return self.final_norm(x) @ self.W_U

    def to_transformer_lens(self) -> Any:
        """A TransformerLens `TransformerBridge` on a copy of the model; this model is left as it is."""
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        # TransformerLens re-reads the tokenizer from the path it was loaded from, so it gets one.
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            return TransformerBridge.boot_transformers(
                self.name,
                hf_model=copy.deepcopy(self.hf),
                tokenizer=tokenizer,
                device=str(self.device),
                dtype=self.dtype,
            )

    def __repr__(self) -> str:
        return (
            f"Model({self.name}: {type(self.hf).__name__}, {self.n_layers} layers, d_model {self.d_model}, "
            f"d_vocab {self.d_vocab}, {self.dtype} on {self.device}, fingerprint {self.fingerprint}"
            + ("".join(f"; edited: {edit}" for edit in self.active_edits()) + ")")
        )
