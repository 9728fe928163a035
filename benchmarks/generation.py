"""Self-text: tokens per second of our sampler and of `transformers.generate` on the same model, batch and length.

usage: python benchmarks/generation.py [--batch 256] [--context 64] [--model embedded]

Both are first shown to write the same greedy tokens in fp32; the time is taken in the dtype that `load_model` chooses.
The bound is what the matrix products alone would allow at the
measured speed of this machine.
"""

from __future__ import annotations

import argparse
import time

import torch

from workbench.core.tokens import TokenBatch
from workbench.features.scores.last_token import fp32_copy
from workbench.models.loading import load_model
from workbench.models.model import Model


def same_greedy(model: Model, new: int = 16) -> float:
    """Share of equal tokens in greedy continuations of the same prompts."""
    prompts = torch.randint(100, 10_000, (16, 8), generator=torch.Generator().manual_seed(0))
    ours = model.sample(prompts, new, temperature=0.0)
    theirs = model.hf.generate(
        **TokenBatch.of_rows(prompts).hf(), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
    )
    return float((ours == theirs[:, 8:]).float().mean())


STARTS = ("Once upon a time", "The city of", "In my opinion,", "She opened the door and")


def same_in_a_batch(model: Model, new: int = 32) -> str:
    """How far the sampled texts of 16 prompts agree between rows alone and batches of 8, with the same seed."""
    prompts = list(STARTS * 4)
    alone, together = (model.generate(prompts, new, seed=0, batch_size=n).ids for n in (1, 8))
    agree = []
    for a, b in zip(alone, together, strict=True):
        n = min(len(a), len(b))
        differ = (a[:n] != b[:n]).nonzero()
        agree.append(int(differ[0]) if len(differ) else n)
    equal = sum(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    mean = sum(agree) / len(agree)
    return f"{equal} of {len(prompts)} texts equal; they part after {mean:.1f} of {new} tokens on average"


def bound(model: Model, batch: int) -> float:
    """Tokens per second if nothing but the model's matrix products took time."""
    weights = [p for p in model.hf.parameters() if p.ndim == 2]
    a, b = torch.ones(batch, model.d_model, dtype=model.dtype), torch.ones(model.d_model, 2048, dtype=model.dtype)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(50):
        torch.mm(a, b)
    flops = 50 * 2 * batch * model.d_model * 2048 / (time.perf_counter() - start)
    print(f"matrix product {tuple(a.shape)} x {tuple(b.shape)}, {model.dtype}: {flops / 1e9:.0f} GFLOP/s")
    return flops / (2 * sum(p.numel() for p in weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args()
    model = load_model(options.model, check=False)
    print(model)
    equal = same_greedy(fp32_copy(model))
    print(f"greedy tokens equal to transformers.generate, in float32: {equal:.1%}")
    if equal < 0.99:
        raise SystemExit("the two do not compute the same thing; no ratio is printed")
    for dtype in ("float32", "bfloat16"):
        other = load_model(options.model, dtype=dtype, check=False)
        print(f"rows alone against batches of 8, in {dtype}: {same_in_a_batch(other)}")
    bos = torch.full((options.batch, 1), model.tokenizer.bos_token_id)
    new = options.context - 1
    model.sample(bos, 2)
    times = {"ours": [], "transformers.generate": []}
    for seed in range(2):
        start = time.perf_counter()
        model.sample(bos, new, seed=seed)
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        model.hf.generate(
            input_ids=bos, attention_mask=torch.ones_like(bos), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            top_k=0, eos_token_id=None,
        )  # fmt: skip
        times["transformers.generate"].append(time.perf_counter() - start)
    rates = {name: options.batch * new / min(laps) for name, laps in times.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} tokens/s")
    print(f"ratio: {rates['ours'] / rates['transformers.generate']:.2f}x")
    print(f"bound by matrix products alone: {bound(model, options.batch):.0f} tokens/s")


if __name__ == "__main__":
    main()
