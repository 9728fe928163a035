"""How well a model does a behaviour: what a study of its circuit says first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.html import Shown
from workbench.core.stats import Estimate, sample_mean, wilson
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

ROWS_AT_ONCE = 64
CHANCE = 0.5
"""Share of a model that does not know which of the two answers is right."""


@dataclass(frozen=True, kw_only=True)
class Accuracy(Shown):
    """How often a model prefers the right one of the two answers, in prompts of each side; chance is 0.5.

    Attributes:
        clean: share of the clean prompts in which the clean answer has the higher logit.
        patch: share of the patch prompts in which the patch answer has the higher logit.
        clean_difference: mean logit of the clean answer minus that of the patch answer, in clean prompts.
        patch_difference: mean logit of the patch answer minus that of the clean answer, in patch prompts.
    """

    clean: Estimate
    patch: Estimate
    clean_difference: Estimate
    patch_difference: Estimate

    @property
    def is_above_chance(self) -> bool:
        """Whether both sides are clearly above chance; a circuit of what a model can't do explains nothing."""
        return min(self.clean.low, self.patch.low) > CHANCE

    def frame(self) -> pd.DataFrame:
        """One row per side: share right and mean logit difference, with intervals."""
        import pandas as pd

        sides = (("clean", self.clean, self.clean_difference), ("patch", self.patch, self.patch_difference))
        return pd.DataFrame(
            [
                {"prompts": side, "n": right.n, "accuracy": right.value, "accuracy_low": right.low,
                 "accuracy_high": right.high, "logit_difference": gap.value, "logit_difference_low": gap.low,
                 "logit_difference_high": gap.high}
                for side, right, gap in sides
            ]
        )  # fmt: skip

    def _shown_line(self) -> str:
        sides = (("clean", self.clean, self.clean_difference), ("patch", self.patch, self.patch_difference))
        said = (
            f"{side} prompts {right}, logit difference {' '.join(gap.shown(sign=True))}" for side, right, gap in sides
        )
        return f"Right answer preferred: {'; '.join(said)}. " + (
            "Above chance." if self.is_above_chance else "Not clearly above chance: a circuit would explain nothing."
        )


@checked
def accuracy(model: Model, pairs: Pairs) -> Accuracy:
    """How often the model prefers the right answer, and by how much, in clean and in patch prompts.

    Raises:
        InvalidInputError: if the prompts have no counterparts.
    """
    if pairs.patch is None:
        raise InvalidInputError(
            "accuracy: these prompts have no counterparts, so there are no two answers to compare. Make pairs with "
            "patch= and two answers each."
        )
    clean, patch = (_ahead(model, batch, pairs.answers) for batch in (pairs.clean, pairs.patch))
    return Accuracy(
        clean=_share(clean > 0), patch=_share(patch < 0),
        clean_difference=sample_mean(clean.numpy(), unit="pairs"),
        patch_difference=sample_mean((-patch).numpy(), unit="pairs"),
    )  # fmt: skip


def _ahead(model: Model, batch: TokenBatch, answers: Int[Tensor, "pairs 2"]) -> Float[Tensor, " pairs"]:
    """Logit of the clean answer minus that of the patch answer behind each prompt."""
    tokens, where = answers.cpu().unique(return_inverse=True)
    parts = [
        model.logits(batch[i : i + ROWS_AT_ONCE], tokens=tokens.tolist()) for i in range(0, len(batch), ROWS_AT_ONCE)
    ]
    both = torch.cat(parts).cpu().double().gather(1, where)
    return both[:, 0] - both[:, 1]


def _share(is_right: Tensor) -> Estimate:
    return wilson(int(is_right.sum()), len(is_right), unit="pairs")
