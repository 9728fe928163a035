"""Which model this is, and the same model in the terms of another library."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from typing import Any

import torch


def fingerprint(hf: Any) -> str:
    """Twelve hex digits that tell a model from others: its config and a sample of every weight."""
    digest = hashlib.sha256()
    config = hf.config.to_dict()
    names = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")
    digest.update(json.dumps({name: config.get(name) for name in names}, sort_keys=True, default=str).encode())
    for name, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().flatten()
        # bfloat16, so that loading the same weights in another dtype gives the same fingerprint.
        taken = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + str(tuple(parameter.shape)).encode() + taken.numpy().tobytes())
    return digest.hexdigest()[:12]


def transformer_lens_bridge(hf: Any, tokenizer: Any, name: str) -> Any:
    """A TransformerLens `TransformerBridge` on a copy of the model, which is left as it is."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    weight = next(hf.parameters())
    # TransformerLens re-reads the tokenizer from the path it was loaded from, so it gets one.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            name,
            hf_model=copy.deepcopy(hf),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=str(weight.device),
            dtype=weight.dtype,
        )
