"""What a run of a segment reached: activations at its ends, and logits of chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.hooks.capture import Activations
from workbench.models.head import Head

NO_LOGITS = "This segment ends before the logits. Make it with to='logits', or add 'logits' to the list."


@dataclass(frozen=True, eq=False)
class Reached(OneLine):
    """What one run of a segment reached.

    Attributes:
        acts: activations at the sites that the segment leads to, in their canonical shapes.
    """

    acts: Activations
    _hidden: Tensor | None
    _at_end: Tensor
    _head: Head

    @property
    def hidden(self) -> Float[Tensor, "rows pos d_model"]:
        """The unembedding's input.

        Raises:
            InvalidInputError: if the segment does not lead to the logits.
        """
        if self._hidden is None:
            raise InvalidInputError(NO_LOGITS)
        return self._hidden

    def logits(
        self, tokens: Int[Tensor, "*n k"] | None = None, *, at: Bool[Tensor, "rows pos"] | None = None
    ) -> Float[Tensor, "n k"]:
        """Logits in fp32 (fp64 of a model in fp64), at the last token of each row or where `at` is True.

        Args:
            tokens: of which tokens: `(k,)` for all rows, `(n, k)` for each its own; None takes all.
            at: True at the tokens that predict.
        """
        chosen = self.hidden[self._at_end if at is None else at]
        if tokens is None:
            return self._head.all(chosen)
        return self._head.shared(chosen, tokens) if tokens.ndim == 1 else self._head.some(chosen, tokens)
