"""Models whose Jacobians are known, and random rows of tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tests.tiny import D_MODEL, tiny_hf, tiny_tokenizer
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model


@functools.cache
def exact(family: str = "gpt2") -> Model:
    """In float64, shared between tests: none may change it."""
    return Model(tiny_hf(family).double(), tiny_tokenizer(), name=f"tiny-{family}")


def token_rows(*lengths: int, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 250, (n,), generator=generator).tolist() for n in lengths]
    return TokenBatch.pad(rows, 1)


@functools.cache
def mixed_rows() -> TokenBatch:
    """Four rows of several lengths."""
    return token_rows(6, 8, 5, 7)


class _Linear(torch.nn.Module):
    """An MLP that is a matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def linear_model(*maps: Tensor) -> Model:
    """Blocks that add `A_k h` and nothing else: no attention, no norm in front of the MLP."""
    hf = tiny_hf("gpt2").double()
    for block, weight in zip(hf.transformer.h, maps, strict=True):
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.attn.c_proj.bias)
        block.ln_2 = torch.nn.Identity()
        block.mlp = _Linear(weight.double())
    return Model(hf, tiny_tokenizer(), name="linear")


@functools.cache
def random_linear() -> tuple[Model, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    maps = tuple(0.3 * torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.double) for _ in range(3))
    return linear_model(*maps), maps


@functools.cache
def planted() -> Model:
    """Says p behind a and q behind b: block 1 writes a concept for each letter, block 2 turns it into the answer."""
    eye = torch.eye(D_MODEL, dtype=torch.double)
    concepts = torch.outer(eye[2], eye[0]) + torch.outer(eye[3], eye[1])
    answers = 20 * (torch.outer(eye[4], eye[2]) + torch.outer(eye[5], eye[3]))
    model = linear_model(torch.zeros_like(eye), concepts, answers)
    table = model.hf.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.hf.transformer.wpe.weight.zero_()
        model.hf.transformer.ln_f.weight.fill_(1.0)
        model.hf.transformer.ln_f.bias.zero_()
        table.copy_(0.3 * torch.randn(table.shape, generator=generator, dtype=torch.double))
        table[:, :6] = 0
        for i, letter in zip((0, 1, 4, 5), "abpq", strict=True):
            table[model.tokens(letter, bos=False).ids[0, 0]] = 3 * eye[i]
    return model
