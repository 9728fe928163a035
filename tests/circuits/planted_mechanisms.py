"""A tiny model in which three mechanisms lead to the same two answers, and samples of them."""

from __future__ import annotations

import functools
import random

import numpy as np
import torch

import circuits
from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

MECHANISMS = ("abc", "def", "ghi")
"""The letters that end a context of each mechanism; those of one share two coordinates of the stream."""
ANSWERS, NOISE = "pq", "klmnorstuvw"
SITES = ("resid_post.0", "resid_post.1")


@functools.cache
def mechanism_model() -> Model:
    """Blocks write next to nothing; both answers read the six coordinates of the mechanisms alike."""
    hf = tiny_hf()
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.clone(), requires_grad=False)
    model = Model(hf, tiny_tokenizer(), name="planted mechanisms")
    g = torch.Generator().manual_seed(0)
    table, head = model.hf.get_input_embeddings().weight, model.hf.get_output_embeddings().weight
    ids = model.tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.02)
        table.copy_(0.1 * torch.randn(table.shape, generator=g))
        head.zero_()
        for m, letters in enumerate(MECHANISMS):
            for i, letter in enumerate(letters):
                table[ids(letter), 2 * m : 2 * m + 2] = 1.0
                table[ids(letter), 6 + (3 * m + i) % 6] = 0.5
                # what an RMS norm divides by is much the same for all, so each coordinate has an effect of its own
                table[ids(letter), 12:] = 2.0
        for i, letter in enumerate(NOISE):
            table[ids(letter), :] = 0.0
            table[ids(letter), 6 + i % 6] = 3.0
        for letter in ANSWERS:
            head[ids(letter), :6] = 1.0
    assert head.data_ptr() != table.data_ptr()
    return model


@functools.cache
def mechanism_samples(n: int = 60, seed: int = 0) -> tuple[circuits.Samples, np.ndarray]:
    """Samples whose mechanism depends on the last letter alone, with the number of the mechanism of each."""
    model, rng = mechanism_model(), random.Random(seed)
    truth = [i % 3 for i in range(n)]
    texts = [
        "".join(rng.choices(NOISE, k=rng.randint(3, 9))) + rng.choice(MECHANISMS[mechanism]) for mechanism in truth
    ]
    rows = [model.tokens(text).ids[0].tolist() for text in texts]
    contexts = TokenBatch(*_padded(rows), tokenizer=model.tokenizer)
    answers = model.tokenizer.convert_tokens_to_ids(list(rng.choices(ANSWERS, k=n)))
    where = torch.arange(n)
    samples = circuits.Samples(
        contexts=contexts,
        answers=torch.tensor(answers),
        losses=torch.zeros(n),
        documents=where // 2,
        positions=where,
        n_tokens=n,
        n_documents=n // 2,
        dropped={},
    )
    return samples, np.array(truth)


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = TokenBatch.pad(rows, 0)
    return batch.ids, batch.mask
