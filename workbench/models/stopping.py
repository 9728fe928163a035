"""Stop strings: found in the bytes of the tokens, so that they may span tokens and parts of characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.core.codec import token_bytes
from workbench.core.tokenizer import NoTokenizer, TokenizerLike, require_unicode
from workbench.hooks.ends import unembedding
from workbench.models.folderrules import stop_strings
from workbench.models.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StopStrings:
    """Says after each new token whether a row's new text contains a stop string.

    Almost every token is settled by one look-up: it neither holds a stop string nor begins with the end of one. Only
    the others have the bytes of their row compared.
    """

    def __init__(self, tokenizer: TokenizerLike, strings: Sequence[str], d_vocab: int) -> None:
        for string in strings:
            require_unicode(string)
        self._wanted = [string.encode() for string in strings]
        if isinstance(tokenizer, NoTokenizer):
            tokenizer("")  # which says that stop strings need one
        self._bytes = token_bytes(tokenizer)
        self._reach = max(map(len, self._wanted)) - 1
        ends = {wanted[i:] for wanted in self._wanted for i in range(len(wanted))}
        prefixes = tuple(ends)
        # The matrix may have more rows than the tokenizer has tokens, or fewer.
        self._may_end = torch.zeros(max(d_vocab, len(self._bytes)), dtype=torch.bool)
        for i, token in enumerate(self._bytes):
            if token.startswith(prefixes) or any(wanted in token for wanted in self._wanted):
                self._may_end[i] = True

    @classmethod
    def of(cls, hf: PreTrainedModel, tokenizer: TokenizerLike, options: Sampling) -> StopStrings | None:
        """The finder of the stop strings of the options and of the model's generation settings; None without any."""
        strings = (*options.stop, *stop_strings(hf))
        return cls(tokenizer, strings, unembedding(hf).weight.shape[0]) if strings else None

    def may_end(self, chosen: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Whether a stop string may end inside each of these tokens."""
        if self._may_end.device != chosen.device:
            self._may_end = self._may_end.to(chosen.device)
        return self._may_end[chosen]

    def ends(self, row: Int[Tensor, " new"]) -> bool:
        """Whether a stop string ends inside the last token of these new tokens."""
        ids = row.tolist()
        tail = self._of(ids[-1])
        need = len(tail) + self._reach
        for i in reversed(ids[:-1]):
            if len(tail) >= need:
                break
            tail = self._of(i) + tail
        tail = tail[-need:] if need else b""
        return any(wanted in tail for wanted in self._wanted)

    def _of(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""
