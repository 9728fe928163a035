"""SAEs made by hand, as stock sae_lens objects, and tokenizers of given words."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from workbench.models.model import Model
from workbench.saes.formats.load import sae_lens_module


def relu_sae(model: Model, W: Tensor, b_enc: Tensor, site: str = "resid_post.1", tied: bool = True) -> Any:
    """ReLU features with decoder rows `W` and the transpose as encoder; `tied=False` leaves the encoder at zero."""
    lens = sae_lens_module()
    layer = int(site.rsplit(".", 1)[1])
    meta = lens.saes.sae.SAEMetadata(
        hook_name=f"blocks.{layer}.hook_resid_post", model_fingerprint=model.fingerprint, model_name=model.name
    )
    config = lens.StandardSAEConfig(d_in=W.shape[1], d_sae=len(W), apply_b_dec_to_input=False, metadata=meta)
    sae = lens.StandardSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(W)
        sae.W_enc.copy_(W.T if tied else torch.zeros_like(W.T))
        sae.b_enc.copy_(b_enc)
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


def word_tokenizer(words: list[str], kind: str = "sentencepiece") -> PreTrainedTokenizerFast:
    """A vocabulary of letters and of these words behind a space, in the two ways that models write the space."""
    space = "Ġ" if kind == "byte_level" else "▁"
    letters = [space, *"abcdefghijklmnopqrstuvwxyz"]
    pieces = dict.fromkeys(["<s>", "</s>", "<unk>", *letters])
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word) + 1):
            merges.append((space + word[: end - 1], word[end - 1]))
            pieces[space + word[:end]] = None
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(dict.fromkeys(merges)), unk_token="<unk>"
        )
    )
    if kind == "byte_level":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:  # as Llama 2 and Mistral decode: a space in front of all is dropped
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
