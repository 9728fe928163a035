"""What an export gives back, and the comparison that every one of them has to pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.errors import NotExactlyExportable
from workbench.core.html import Shown
from workbench.core.numbers import counted, number
from workbench.hooks.ends import embedding
from workbench.hooks.sites import SiteMap
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOLERANCE = 1e-3
_ROWS, _TOKENS = 2, 12


@dataclass(frozen=True, eq=False)
class Exported(Shown):
    """An exported intervention.

    Attributes:
        kind: "weights", "lora", "gguf", "lm_eval" or "hook".
        path: file or folder that was written, or None.
        max_difference: largest difference of a logit from the edited model, on probe tokens; None where nothing here
            can run the file.
        effect: largest change of a logit by the intervention itself, on the same tokens.
        hf: for "weights", the changed copy of the model.
        text: for "hook", the code.
        notes: what has to be known to use it.
    """

    kind: str
    path: Path | None = None
    max_difference: float | None = None
    effect: float | None = None
    hf: PreTrainedModel | None = field(default=None, repr=False)
    text: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        checked = "not run here"
        if self.max_difference is not None:
            moved = f"(the edit moves them {number(self.effect)})"
            checked = f"logits within {number(self.max_difference)} of the edited model {moved}"
        return f"{self.kind}: {where}; {checked}" + "".join(f"; {note}" for note in self.notes)


class EditedLogits:
    """Logits of the edited model on a few random tokens, to hold an export against."""

    def __init__(self, hf: nn.Module, sites: SiteMap, intervention: Intervention, tolerance: float) -> None:
        weight = embedding(hf).weight
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(weight), (_ROWS, _TOKENS), generator=generator)
        self.ids: Int[Tensor, "batch pos"] = ids.to(weight.device)
        self.tolerance = tolerance
        base = self.logits(hf)
        with Plan(hf, sites, intervention):
            self.wanted: Float[Tensor, "batch pos d_vocab"] = self.logits(hf)
        self.effect = float((self.wanted - base).abs().max())

    @torch.no_grad()
    def logits(self, hf: nn.Module) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a model on the probe tokens."""
        return hf(input_ids=self.ids, use_cache=False).logits.float()

    def check(self, hf: nn.Module, what: str) -> float:
        """Largest difference of a logit from the edited model.

        Rounding grows with what is edited, so the tolerance is for an intervention that moves no logit by more than 1,
        and in proportion above.

        Raises:
            NotExactlyExportable: if it is above the tolerance.
        """
        difference = float((self.logits(hf) - self.wanted).abs().max())
        allowed = self.tolerance * max(1.0, self.effect)
        if not difference <= allowed:
            raise NotExactlyExportable(
                f"{what}: its logits differ by {number(difference)} from those of the edited model on "
                f"{counted(self.ids.numel(), 'probe tokens')}; {number(allowed)} is allowed, and the intervention "
                f"itself moves them by {number(self.effect)}. "
                "Either this architecture rescales what the weights write, or rounding adds up to more than that: "
                "use the plan, or pass a larger tolerance."
            )
        return difference
