"""A tiny model of every causal language model that transformers builds and TransformerLens adapts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.core.jsontext import Record
from workbench.models.tiny import randomised

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

D_VOCAB = 64
_WIDTH, _MLP, _HEAD, _CONTEXT = 16, 24, 8, 128
_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 1),
    **dict.fromkeys(
        ("intermediate_size", "ffn_hidden_size", "ffn_dim", "intermediate_size_mlp", "moe_intermediate_size",
         "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
         "block_ff_dim"), _MLP),
    **dict.fromkeys(
        ("head_dim", "kv_channels", "query_pre_attn_scalar", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
         "index_head_dim", "hidden_size_per_layer_input", "laurel_rank", "rotary_dim", "linear_key_head_dim",
         "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_d_state", "state_size", "ssm_state_size",
         "mamba_chunk_size", "chunk_size", "block_multiple_of", "q_lora_rank", "kv_lora_rank", "o_lora_rank",
         "adapter_rank"), _HEAD),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads", "mamba_num_heads",
         "time_step_rank", "mamba_dt_rank", "expert_layer_period"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_k", "num_experts_per_token", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "o_groups", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"), _CONTEXT),
    **dict.fromkeys(
        ("sliding_window", "local_attention", "attention_window_size", "window_size", "index_topk",
         "attention_chunk_size"), 64),
    "mamba_d_ssm": 32, "vocab_size": D_VOCAB, "vocab_size_per_layer_input": D_VOCAB, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
"""What makes a config tiny, by the names that its class has for it."""

_BOTH = ["linear_attention", "full_attention"]
_LATENT = {"num_key_value_heads": 2, "head_dim": _HEAD}
_VISION = {
    "hidden_size": _WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": _MLP, "image_size": 28, "patch_size": 14, "head_dim": _HEAD,
}  # fmt: skip
_MORE: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"num_attention_heads": 4, "hidden_size": 32, "rotary_dim": 4},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "glm4_moe_lite": _LATENT, "glm_moe_dsa": _LATENT, "youtu": _LATENT,
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma3": {"final_logit_softcapping": 7.0},
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified"), {"per_layer_config": {}}),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0},
    "granitemoehybrid": {"layer_types": _BOTH},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]},
    "olmo_hybrid": {"layer_types": _BOTH},
    "qwen3_5": {"layer_types": _BOTH}, "qwen3_5_text": {"layer_types": _BOTH},
    "qwen3_5_moe": {"layer_types": _BOTH}, "qwen3_5_moe_text": {"layer_types": _BOTH},
    "qwen3_next": {"layer_types": _BOTH},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "n_mamba_heads": 4,
               "mamba_headdim": 8, "num_key_value_heads": 2, "attention_head_dim": 16, "attention_hidden_size": 32},
}  # fmt: skip
"""What one kind of model needs besides, by model type."""


def model_types() -> dict[str, str]:
    """The class of each model type that `AutoModelForCausalLM` builds and TransformerLens has an adapter for."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        kind: name for kind, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
        if isinstance(name, str) and name in SUPPORTED_ARCHITECTURES
    }  # fmt: skip


def tiny_of(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of this type with every parameter random, two layers of each kind that it has.

    Raises:
        ImportError: if the class needs a package that is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    text = config.get_text_config()
    more = _MORE.get(model_type, {})
    renamed = {text.attribute_map.get(name, name) for name in more}
    sizes = {name: value for name, value in _known(text).items() if text.attribute_map.get(name, name) not in renamed}
    sizes |= more
    if text is config:
        config = AutoConfig.for_model(model_type, **sizes)
    else:
        parts = {name: dict(_VISION) for name in ("vision_config",) if getattr(config, name, None) is not None}
        parts |= {name: None for name in ("audio_config",) if hasattr(config, name)}
        config = AutoConfig.for_model(model_type, text_config=type(text)(**sizes).to_dict(), **parts)
    return randomised(lambda: AutoModelForCausalLM.from_config(config), seed)


def _known(config: PreTrainedConfig) -> Record:
    """The sizes that a config has a name for."""
    names = {*config.to_dict(), *(config.attribute_map or {}), *config.__dataclass_fields__}
    return {name: value for name, value in _SIZES.items() if name in names}
