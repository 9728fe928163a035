"""Resuming the model behind a site: many edits of one prompt's last token without running the prompt again."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.errors import InvalidInputError
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import Last
from workbench.models.model import Model

_AGREEMENT = 1e-3


class LastToken:
    """The last token of one prompt, edited in many ways at one site: a batch of rows through what lies behind the site.

    Only the last token is edited, so by causality the keys and values of the earlier tokens are the same in every row:
    they are computed once. Blocks before a residual site are not run again either: the remaining blocks are called with
    the very arguments that the model gave them. That this reproduces the model is checked on the unedited token; where
    it does not (an architecture that does more between its blocks), and at sites inside a block, the whole model
    runs on
    the last token with the cached prefix.

    Attributes:
        x: the last token's activation at the site, fp32.
        logits: the model's logits there without an edit, fp32.
        skips_blocks: whether the blocks before the site are skipped.
    """

    def __init__(self, model: Model, ids: Int[Tensor, "1 pos"], site: Site, rows: int = 256) -> None:
        if ids.shape[0] != 1:
            raise InvalidInputError(f"LastToken: ids have shape {tuple(ids.shape)}; give one prompt, (1, pos).")
        self._model, self._site, self._rows = model, site, rows
        self._last = ids[:, -1:].expand(rows, 1)
        self._position = torch.full((rows, 1), ids.shape[1] - 1, device=ids.device)
        self.x: Float[Tensor, " d_model"] = model.capture(ids, [site])[site][0, -1].float()
        self._blocks = _blocks_after(model, site)
        with torch.no_grad():
            self._cache = _prefix_cache(model.hf, ids[:, :-1], rows)
            self._calls: list[tuple[tuple[Any, ...], dict[str, Any], str | None]] = []
            with _recorded(self._blocks or [], self._calls):
                hidden, logits = self._whole_model()
            self.logits: Float[Tensor, " d_vocab"] = logits[0]
            self._require_head(hidden, logits)
            self.skips_blocks = self._blocks is not None and self._reproduces(hidden)

    def _whole_model(self) -> tuple[Tensor, Tensor]:
        """Input of the unembedding and logits of the last token, `rows` times; the cache is as before afterwards."""
        caught: list[Tensor] = []
        head = self._model.hf.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
        try:
            out = self._model.hf(
                input_ids=self._last, position_ids=self._position, past_key_values=self._cache, use_cache=True
            )
        finally:
            handle.remove()
        self._cache.crop(-1)
        return caught[0][:, -1], out.logits[:, -1].float()

    def _require_head(self, hidden: Tensor, logits: Tensor) -> None:
        if not _close(self.head(hidden[:1]), logits[:1]):
            raise InvalidInputError(
                f"{type(self._model.hf).__name__} does more between its unembedding and its logits than a soft "
                "cap or a scale; "
                "output scores are not defined for it here."
            )

    def _reproduces(self, hidden: Tensor) -> bool:
        if not self._calls and self._blocks:
            return False
        return _close(self._through_blocks(self.x.to(self._model.dtype).expand(self._rows, -1)), hidden)

    def _through_blocks(self, x: Tensor) -> Tensor:
        h: Any = x[:, None]
        for block, (args, kwargs, name) in zip(self._blocks or (), self._calls, strict=True):
            out = block(h, *args, **kwargs) if name is None else block(*args, **{**kwargs, name: h})
            h = out if isinstance(out, Tensor) else out[0]
        if self._blocks:
            self._cache.crop(-1)
        return self._model.site_map["final_norm"].module(h)[:, 0]

    @torch.no_grad()
    def hidden(self, change: Float[Tensor, "edits d_model"]) -> Float[Tensor, "edits d_model"]:
        """What reaches the unembedding when `change[i]` is added at the site; one row per edit."""
        parts = []
        for part in change.split(self._rows):
            full = torch.cat([part, part[-1:].expand(self._rows - len(part), -1)]) if len(part) < self._rows else part
            parts.append(self._edited(full)[: len(part)])
        return torch.cat(parts)

    def _edited(self, change: Tensor) -> Tensor:
        if self.skips_blocks:
            return self._through_blocks((self.x + change.float()).to(self._model.dtype))
        # Rows without a change would be refused by an Add; the sum of all is what has to differ from zero.
        with self._model.plan(Intervention.at(self._site, Add(change), Last())):
            return self._whole_model()[0]

    @torch.no_grad()
    def head(self, hidden: Float[Tensor, "edits d_model"]) -> Float[Tensor, "edits d_vocab"]:
        """Logits in fp32, soft cap and scale of the model included."""
        return self.finish(self._model.hf.get_output_embeddings()(hidden).float())

    def some_logits(
        self, hidden: Float[Tensor, "edits d_model"], ids: Int[Tensor, "edits k"]
    ) -> Float[Tensor, "edits k"]:
        """The logits of a few tokens, other ones for each row."""
        head = self._model.hf.get_output_embeddings()
        z = torch.einsum("ed,ekd->ek", hidden.float(), head.weight.detach()[ids].float())
        return self.finish(z if head.bias is None else z + head.bias.detach().float()[ids])

    def shared_logits(self, hidden: Float[Tensor, "edits d_model"], ids: Int[Tensor, " k"]) -> Float[Tensor, "edits k"]:
        """The logits of a few tokens, the same ones for all rows."""
        head = self._model.hf.get_output_embeddings()
        z = hidden.float() @ head.weight.detach()[ids].float().T
        return self.finish(z if head.bias is None else z + head.bias.detach().float()[ids])

    def finish(self, logits: Tensor) -> Tensor:
        """What the model does to the output of its unembedding: a scale or a soft cap, both monotone."""
        config = self._model.hf.config
        logits = (
            logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        )
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


def fp32_copy(model: Model) -> Model:
    """The model itself if it is in fp32, else a copy in fp32 (4 bytes per parameter)."""
    if model.dtype == torch.float32:
        return model
    return Model(copy.deepcopy(model.hf).float(), model.tokenizer, model.name)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.float().std()) + 1e-12
    return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= _AGREEMENT * scale


def _blocks_after(model: Model, site: Site) -> list[nn.Module] | None:
    """The blocks that run after a residual site, or None for a site inside a block."""
    if site.layer is None or site.kind not in ("resid_pre", "resid_post"):
        return None
    first = site.layer + (site.kind == "resid_post")
    return [model.site_map[Site("resid_post", layer)].module for layer in range(first, model.n_layers)]


def _prefix_cache(hf: Any, prefix: Tensor, rows: int) -> Any:
    """Keys and values of the prompt without its last token, computed once and repeated for every row."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=hf.config)
    if prefix.shape[1]:
        hf(input_ids=prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(rows)
    return cache


@contextlib.contextmanager
def _recorded(blocks: list[nn.Module], calls: list[tuple[tuple[Any, ...], dict[str, Any], str | None]]) -> Any:
    """Notes with which arguments, the hidden states aside, the model calls each block."""

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = None if args else "hidden_states"
        calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}, name))

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield
