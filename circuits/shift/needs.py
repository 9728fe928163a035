"""What methods and judges may need of a SHIFT task, or of what is read along with its texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Need = Literal["twins", "words", "attribute", "balanced", "neurons", "tokens"]
NEEDS: Mapping[Need, str] = {
    "twins": "the task has no twins (training texts with the attribute swapped)",
    "words": "the task has no lists of words for both attribute and label",
    "attribute": "the attribute of the texts is not known",
    "balanced": "the task has no training rows in which label and attribute are balanced",
    "neurons": "neurons at the sites of the SAEs were not read",
    "tokens": "token embeddings were not read",
}
"""What a method or a judge may need of a task, and what is said where it is not there.

"neurons" and "tokens" are bases that are read in the same pass as the SAEs, if a method needs them."""
