"""Toys for the scores: a model whose blocks do nothing, and SAEs with known weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import D_MODEL, tiny_tokenizer
from workbench.models.model import Model
from workbench.saes.formats.load import sae_lens_module

SITE = "resid_post.0"


def identity_model(last: Tensor, norm_weight: Tensor | None = None) -> Model:
    """One block that adds nothing, unembedding I_4; every token embeds to `last`."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=4,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=0,
    )
    hf = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        hf.model.embed_tokens.weight.copy_(last.expand(4, 4))
        hf.lm_head.weight.copy_(torch.eye(4))
        hf.model.norm.weight.copy_(torch.ones(4) if norm_weight is None else norm_weight)
        for norm in (hf.model.layers[0].input_layernorm, hf.model.layers[0].post_attention_layernorm):
            norm.weight.fill_(1.0)
    return Model(hf.requires_grad_(False), _FourTokens(), "identity")


class _FourTokens:
    """Every text is the tokens 2, 3."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 1
    all_special_ids = (0, 1)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2, 3]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "abcd"[int(ids[0])] if len(ids) else ""


def sae_of(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor | None = None, k: int = 1, site: str = SITE) -> Any:
    """A TopK SAE with these weights and a `b_dec` of zero; W_enc is (d_in, d_sae)."""
    sae_lens = sae_lens_module()
    d_sae, d_in = W_dec.shape
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
        sae.b_enc.copy_(torch.zeros(d_sae) if b_enc is None else b_enc)
        sae.b_dec.zero_()
    sae.cfg.metadata.hook_name = f"blocks.{site.split('.')[1]}.hook_{site.split('.')[0]}"
    return sae.eval().requires_grad_(False)


def constant_sae(direction: Tensor, a_max: float) -> Any:
    """One feature that is always active at `a_max` and writes `direction`."""
    return sae_of(torch.zeros(4, 1), direction[None], torch.tensor([a_max]))


def random_sae(d_in: int = D_MODEL, d_sae: int = 40, k: int = 4, site: str = "resid_post.1", seed: int = 0) -> Any:
    """Unit decoder rows, tied encoder, non-zero biases."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_sae, d_in, generator=generator)
    W = W / W.norm(dim=1, keepdim=True)
    sae = sae_of(W.T, W, 0.1 * torch.randn(d_sae, generator=generator), k, site)
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(d_in, generator=generator))
    return sae


def byte_ids(text: str) -> list[int]:
    """Token ids of a text in the tiny byte tokenizer."""
    return tiny_tokenizer()(text)["input_ids"]
