"""Small transformers trained here on ids of which some never occur: the truth about every token is known."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.core.codec import BYTE_OF_CHAR
from workbench.models.model import Model

D_VOCAB, N_PADDING, WIDTH = 1024, 64, 128
SPECIAL = "<|end|>"
STEPS, ROWS, LENGTH, PEAK = 320, 8, 48, 1e-2
SYLLABLES = tuple(c + v for c in "bdfgklmnpt" for v in "aeiou")


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 960 tokens: a special, 256 bytes, 50 syllables, words of two syllables, the same with a space."""
    vocab = {SPECIAL: 0} | {char: k for k, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
    vocab |= {syllable: len(vocab) + k for k, syllable in enumerate(SYLLABLES)}
    n_words = (D_VOCAB - N_PADDING - len(vocab)) // 2
    picked = np.random.default_rng(0).permutation(len(SYLLABLES) ** 2)[: n_words + 1]
    pairs = [(SYLLABLES[k // len(SYLLABLES)], SYLLABLES[k % len(SYLLABLES)]) for k in picked.tolist()]
    words = ["".join(pair) for pair in pairs]
    names = [*words[:n_words], *("Ġ" + word for word in words)][: D_VOCAB - N_PADDING - len(vocab)]
    vocab |= {name: len(vocab) + k for k, name in enumerate(names)}
    merges = [*(tuple(syllable) for syllable in SYLLABLES), *pairs[:n_words]]
    merges += [("Ġ", name[1:]) for name in names if name[0] == "Ġ" and name[1:] in vocab]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return backend


@dataclass(frozen=True)
class Truth:
    """What training did with each id.

    Attributes:
        never: text tokens in no input and no target.
        copies: three of `never` that start with the same row.
        input_only: seen as input, never as target.
        rare: hits as target of each rare id, 1 to 5.
        partial: bytes of half a character that never occur.
        impossible: bytes that no text holds.
        trained: everything else that has a token.
    """

    never: tuple[int, ...]
    copies: tuple[int, ...]
    input_only: tuple[int, ...]
    rare: dict[int, int]
    partial: tuple[int, ...]
    impossible: tuple[int, ...]
    trained: tuple[int, ...]

    @property
    def unseen(self) -> list[int]:
        """Every id in no input and no target, padding rows included."""
        return [*self.never, *self.partial, *self.impossible, *range(D_VOCAB - N_PADDING, D_VOCAB)]


@functools.cache
def truth() -> Truth:
    """The plan, drawn once: 32 never, 16 as input only, 16 rare, 16 halves of characters."""
    # get_vocab comes in another order in each process, and the draws below take ids by their place
    raw = {i: text for text, i in sorted(tokenizer().get_vocab().items(), key=lambda entry: entry[1])}
    byte_of = {i: BYTE_OF_CHAR[text] for i, text in raw.items() if len(text) == 1}
    rng = np.random.default_rng(1)
    words = rng.permutation([i for i, text in raw.items() if len(text) >= 4 and i > 256]).tolist()
    halves = rng.permutation([i for i, b in byte_of.items() if 0x80 <= b < 0xF5 and b not in (0xC0, 0xC1)]).tolist()
    never, input_only, rare = words[:32], words[32:48], words[48:64]
    impossible = [i for i, b in byte_of.items() if b in (0xC0, 0xC1) or b >= 0xF5]
    out = {*words[:64], *halves[:16], *impossible}
    return Truth(
        tuple(never), tuple(never[:3]), tuple(input_only), {i: 1 + k % 5 for k, i in enumerate(rare)},
        tuple(halves[:16]), tuple(impossible), tuple(i for i in raw if i not in out),
    )  # fmt: skip


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets: a bigram text, segments that come again and again, every token four times."""
    plan, rng = truth(), np.random.default_rng(seed)
    trained = np.asarray(plan.trained)
    follows = rng.choice(trained, (D_VOCAB, 4))
    hits = rng.permutation([i for i, n in plan.rare.items() for _ in range(n)])
    when = rng.choice(STEPS, len(hits), replace=False)
    for step in range(STEPS):
        rows = np.empty((ROWS, LENGTH + 1), dtype=np.int64)
        for r in range(ROWS):
            segment = rng.choice(trained, LENGTH + 1)
            if r == 0:
                for t in range(1, LENGTH + 1):
                    segment[t] = follows[segment[t - 1], rng.integers(4)]
            rows[r] = np.repeat(segment, rng.choice([3, 6]))[: LENGTH + 1] if r >= 2 else segment
            if r == 1:
                rows[r] = np.resize(segment[: rng.integers(3, 13)], LENGTH + 1)
        targets = rows[:, 1:].copy()
        place = rng.integers(0, ROWS, 2), rng.integers(1, LENGTH, 2)
        for r, t in zip(*place, strict=True):
            rows[r, t] = rng.choice(plan.input_only)
            targets[r, t - 1] = -100
        for i in hits[when == step]:
            targets[0, 20], rows[0, 21] = i, i
        yield torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)


@dataclass(frozen=True, eq=False)
class Planted:
    """A trained model, the rows it started from, and by how much weight decay alone shrank a row."""

    hf: Any
    init: Tensor
    shrunk: float

    @property
    def model(self) -> Model:
        """The model with its tokenizer."""
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=SPECIAL, pad_token=SPECIAL)
        return Model(self.hf, fast, name="planted")


SHARED: list[Path] = []
"""A folder in which the workers of one run keep what they trained, so that each model is trained once."""


def share(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps models where the other workers of this run find them."""
    if "PYTEST_XDIST_WORKER" in os.environ and not SHARED:
        SHARED.append(tmp_path_factory.getbasetemp().parent)


@functools.cache
def planted(tied: bool, decay: float, std: float = 0.02, seed: int = 0) -> Planted:
    """The model trained by `_trained`, or one that another worker of this run has trained."""
    if not SHARED:
        return _trained(tied, decay, std, seed)
    file = SHARED[0] / f"planted-{tied}-{decay}-{std}-{seed}.safetensors"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            made = _trained(tied, decay, std, seed)
            # clones, since tied matrices share their memory
            weights = {f"hf.{name}": tensor.clone() for name, tensor in made.hf.state_dict().items()}
            shrunk = torch.tensor(made.shrunk, dtype=torch.float64)
            save_file(weights | {"init": made.init, "shrunk": shrunk}, file)
            return made
        tensors, hf = load_file(file), _untrained(tied)
    hf.load_state_dict({name[3:]: tensor for name, tensor in tensors.items() if name.startswith("hf.")})
    return Planted(hf.eval().requires_grad_(False), tensors["init"], tensors["shrunk"].item())


def _untrained(tied: bool) -> Any:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=D_VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    ))  # fmt: skip


def _trained(tied: bool, decay: float, std: float, seed: int) -> Planted:
    """Trains two layers of width 128 with AdamW for some seconds; `std` is that of the input rows at the start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    hf = _untrained(tied)
    E = hf.get_input_embeddings().weight
    with torch.no_grad():
        E.normal_(std=std)
        E[list(truth().copies)] = E[truth().copies[0]].clone()
    init, shrunk = E.detach().clone(), 1.0
    optimizer = torch.optim.AdamW(hf.parameters(), lr=PEAK, weight_decay=decay)
    for step, (ids, targets) in enumerate(batches(seed)):
        lr = PEAK * min(1.0, (step + 1) / 10, (STEPS - step) / (STEPS / 2))
        optimizer.param_groups[0]["lr"] = lr
        loss = torch.nn.functional.cross_entropy(hf(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shrunk *= float(np.float32(1 - lr * decay))
    torch.set_num_threads(threads)
    return Planted(hf.eval().requires_grad_(False), init, shrunk)
