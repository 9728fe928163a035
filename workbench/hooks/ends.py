"""The two ends of a language model, whatever module of its class they are: token embeddings and unembedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedding(hf: nn.Module) -> nn.Embedding:
    """The token embeddings; `weight` is `(d_vocab, d_model)`."""
    return cast(nn.Embedding, cast("PreTrainedModel", hf).get_input_embeddings())


def unembedding(hf: nn.Module) -> nn.Linear:
    """The unembedding; `weight` is `(d_vocab, d_model)`."""
    return cast(nn.Linear, cast("PreTrainedModel", hf).get_output_embeddings())
