"""Many edits of one prompt's last token, as rows behind a site that the prompt reaches once."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.core.numbers import number
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.models.numbers import has_nan


class LastToken:
    """The last token of one prompt, edited in many ways at one site: a batch of rows through what lies behind the site.

    Attributes:
        x: the last token's activation at the site, fp32.
        logits: the model's logits there without an edit, fp32.
        skips_blocks: whether the blocks before the site are skipped.
        head: from the unembedding's input to logits.
    """

    def __init__(self, model: Model, ids: Int[Tensor, "1 pos"], site: Site, rows: int = 256) -> None:
        if ids.shape[0] != 1:
            raise InvalidInputError(f"LastToken: ids have shape {tuple(ids.shape)}; give one prompt, (1, pos).")
        self._site, self._rows = site, rows
        self._segment = model.segment(ids, site, last=True)
        self.x: Float[Tensor, " d_model"] = self._segment.x[0, -1].float()
        self.logits: Float[Tensor, " d_vocab"] = self._segment.logits[0]
        self.skips_blocks = self._segment.skips_blocks and self._segment.last
        self.head = model.head

    @torch.no_grad()
    def hidden(self, change: Float[Tensor, "edits d_model"]) -> Float[Tensor, "edits d_model"]:
        """What reaches the unembedding when `change[i]` is added at the site; one row per edit."""
        parts = []
        for part in change.split(self._rows):
            full = torch.cat([part, part[-1:].expand(self._rows - len(part), -1)]) if len(part) < self._rows else part
            parts.append(self._edited(full)[: len(part), -1])
        hidden = torch.cat(parts)
        if has_nan(hidden):
            edit = int(hidden.amax(-1).isnan().nonzero()[0])
            raise InvalidInputError(
                f"{self._site}: what reaches the unembedding is NaN under edit {edit} of {len(change)}, whose norm is "
                f"{number(float(change[edit].float().norm()))}. Make it weaker, or load the model with dtype='float32'."
            )
        return hidden

    def _edited(self, change: Tensor) -> Tensor:
        keep = torch.zeros(self._rows, self._segment.x.shape[1], dtype=torch.bool, device=change.device)
        keep[:, -1] = True
        return self._segment.run(self.x + change.float(), rows=self._rows, keep=keep).hidden


def fp32_copy(model: Model) -> Model:
    """The model itself if it is in fp32, else a copy in fp32 (4 bytes per parameter)."""
    if model.dtype == torch.float32:
        return model
    return Model(copy.deepcopy(model.hf).float(), model.tokenizer, model.name)
