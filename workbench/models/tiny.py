"""Models of a few thousand random weights, one per family: for tests, documentation and trying things out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from workbench.core.errors import InvalidInputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

D_MODEL, N_LAYERS = 16, 3
_SIZE = {
    "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 512,
}  # fmt: skip
_GROUPED = {**_SIZE, "num_key_value_heads": 1}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8}

TINY: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama": ("llama", {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True}),
    "gpt2": ("gpt2", {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 2, "n_positions": 128}),
    "neox": ("gpt_neox", {**_SIZE, "use_parallel_residual": True, "rotary_pct": 0.5}),
    "neox_sequential": ("gpt_neox", {**_SIZE, "use_parallel_residual": False, "rotary_pct": 0.5}),
    "gemma2": ("gemma2", _GEMMA),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 64}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 3}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}),
}
"""Model type and sizes by name of the family."""


def tiny_hf(family: str, d_vocab: int, seed: int = 0) -> PreTrainedModel:
    """A Hugging Face model of this family with every parameter random, biases and norm weights included.

    Raises:
        InvalidInputError: for a family that is not in `TINY`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in TINY:
        raise InvalidInputError(f"There is no tiny model of family {family!r}. {did_you_mean(family, TINY)}")
    model_type, sizes = TINY[family]
    ids = {"vocab_size": d_vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return randomised(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **ids)), seed)


def randomised(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """What `build` makes, with every parameter random: norm weights around 1, all others around 0."""
    torch.manual_seed(seed)
    hf = build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return hf.requires_grad_(False)
