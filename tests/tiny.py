"""Tiny models with every parameter random, and the tolerances that follow from the dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from workbench.models import tiny
from workbench.models.model import Model
from workbench.models.tiny import D_MODEL as D_MODEL
from workbench.models.tiny import N_LAYERS as N_LAYERS

FP32_LOGITS = 1e-4
FAMILIES = (
    "llama", "gpt2", "neox", "neox_sequential", "gemma2",
    "qwen2", "qwen3", "gemma3", "phi3", "olmo2", "mistral",
)  # fmt: skip
MIXTURES = ("mixtral", "gpt_oss")
"""Mixtures of experts, which lack the sites inside the MLP."""

_STATE = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
CACHES: dict[str, dict[str, Any]] = {
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 24,
             "block_multiple_of": 8},
    "falcon_h1": {**_STATE, "mamba_d_ssm": 32, "head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
              "num_experts_per_tok": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "qwen3_next": {"num_hidden_layers": 4, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
                   "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
}  # fmt: skip
"""Families whose caches hold other things than keys and values of every token, and sizes that show it."""


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


_WORDS = "▁ ▁the ▁dog . ▁ran t h e d o g r a n th the do dog ra ran"
_MERGES = "t h,th e,d o,do g,r a,ra n,▁ the,▁ dog,▁ ran"


@functools.cache
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of SentencePiece's kind: a ▁ in front of every text, pieces for bytes, BOS in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS.split(" ")]
    merges = [tuple(pair.split()) for pair in _MERGES.split(",")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@functools.cache
def prefixed_tokenizer(kind: str = "template") -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a post-processor: [gMASK]<sop> in front, or [CLS] and [SEP] around a text."""
    backend = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(["[gMASK]", "<sop>", "[CLS]", "[SEP]"])
    mask, sop, cls, sep = ((name, backend.token_to_id(name)) for name in ("[gMASK]", "<sop>", "[CLS]", "[SEP]"))
    template = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B", special_tokens=[mask, sop]
    )
    backend.post_processor = {
        "template": template,
        "sequence": processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        "bert": processors.BertProcessing(sep, cls),
        "roberta": processors.RobertaProcessing(sep, cls, add_prefix_space=False),
    }[kind]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def tiny_hf(family: str = "llama", seed: int = 0) -> Any:
    """A random Hugging Face model: biases and norm weights included."""
    return tiny.tiny_hf(family, len(tiny_tokenizer()), seed)


def tiny_model(family: str = "llama", seed: int = 0) -> Model:
    """A fresh tiny model; changing it does not change the next one."""
    return Model(tiny_hf(family, seed), tiny_tokenizer(), name=f"tiny-{family}")


@contextmanager
def as_user() -> Iterator[None]:
    """Without the types that are checked at run time in tests, so that what a user's wrong argument meets is tested."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", was)


def cached_model(kind: str) -> Model:
    """A random model of a family with an unusual cache, from `CACHES`."""
    size = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 24, "vocab_size": len(tiny_tokenizer()), "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**size, **CACHES[kind]})).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return Model(hf.requires_grad_(False), tiny_tokenizer(), name=kind)


def n_hooks(hf: torch.nn.Module) -> int:
    """Number of forward hooks and pre-hooks on the whole model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())
