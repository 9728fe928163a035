"""Tiny models with every parameter random, and the tolerances that follow from the dtype."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from workbench.models.model import Model

FP32_LOGITS = 1e-4
FAMILIES = ("llama", "gpt2", "neox", "neox_sequential", "gemma2")
D_MODEL, N_LAYERS = 16, 3


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 256 bytes, a few words, BOS, EOS (also padding)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}<bos>assistant\n"
    )
    return tokenizer


def _config(family: str, vocab: int) -> Any:
    size = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
    common = {
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "llama":
        return LlamaConfig(**size, **common, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True)
    if family == "gpt2":
        return GPT2Config(
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=2,
            n_positions=128,
            **{k: v for k, v in common.items() if k != "max_position_embeddings"},
        )
    if family in ("neox", "neox_sequential"):
        return GPTNeoXConfig(**size, **common, use_parallel_residual=family == "neox", rotary_pct=0.5)
    if family == "gemma2":
        return Gemma2Config(
            **size, **common, num_key_value_heads=1, head_dim=8, sliding_window=64, query_pre_attn_scalar=8
        )
    raise ValueError(f"no tiny model of family {family}")


def tiny_hf(family: str = "llama", seed: int = 0) -> Any:
    """A random Hugging Face model: biases and norm weights included."""
    config = _config(family, len(tiny_tokenizer()))
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return hf.requires_grad_(False)


def tiny_model(family: str = "llama", seed: int = 0) -> Model:
    """A fresh tiny model; changing it does not change the next one."""
    return Model(tiny_hf(family, seed), tiny_tokenizer(), name=f"tiny-{family}")


def n_hooks(hf: torch.nn.Module) -> int:
    """Number of forward hooks and pre-hooks on the whole model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())
