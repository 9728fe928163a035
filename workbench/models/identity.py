"""Which model this is, and the same model in the terms of another library."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from typing import TYPE_CHECKING

import torch

from workbench.core.progress import quiet_libraries
from workbench.core.tokenizer import TokenizerLike

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


_COMPUTED = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "query_pre_attn_scalar",
    "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_dim",
    "rotary_emb_base",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps",
    "hidden_act", "hidden_activation", "activation_function", "use_parallel_residual", "parallel_attn",
    "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "attention_multiplier", "embedding_multiplier",
    "residual_multiplier", "logit_scale", "logits_scaling", "num_experts_per_tok", "norm_topk_prob",
)  # fmt: skip
"""What changes the computation and leaves no trace in the weights."""


def fingerprint(hf: PreTrainedModel) -> str:
    """Twelve hex digits that tell a model from others: its config as far as it computes, a sample of every weight."""
    digest = hashlib.sha256()
    config = hf.config.get_text_config().to_dict()  # itself, where it is not nested
    said = {name: config[name] for name in _COMPUTED if config.get(name) is not None}
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for name, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().flatten()
        # bfloat16, so that loading the same weights in another dtype gives the same fingerprint.
        taken = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + taken.numpy().tobytes())
    return digest.hexdigest()[:12]


def transformer_lens_bridge(hf: PreTrainedModel, tokenizer: TokenizerLike, name: str) -> TransformerBridge:
    """A TransformerLens `TransformerBridge` on a copy of the model, which is left as it is."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    weight = next(hf.parameters())
    # TransformerLens re-reads the tokenizer from the path it was loaded from, so it gets one.
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            name,
            hf_model=copy.deepcopy(hf),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=str(weight.device),
            dtype=weight.dtype,
        )
