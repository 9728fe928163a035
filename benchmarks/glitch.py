"""Glitch tokens: a scan of the weights alone against the clock, and verification beside one `generate` per prompt.

    python -m benchmarks.glitch [--candidates 1000] [--generate 8] [--skip-verification]

Scan: the embedded model (49k tokens) and a synthetic 260k x 640 file, each read once before it is timed, with the
memory that the scan takes on top. Verification: all raw prompts and steps for every candidate, batched, and the loop
that a script would write (batch 1, transformers' `generate` with its scores) on a few of the same candidates; its time
is scaled to all of them. That both compute the same is shown in float64, where rounding can't hide a difference;
without that no ratio is printed. In fp32 and bf16 each way's own distance from float64 is printed beside their
difference, which batch sizes alone cause, and whether it meets its goal.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from workbench.core.codec import codec_of
from workbench.glitch import scan
from workbench.glitch.counting.plan import ranking
from workbench.glitch.verification.prompts import Template, prompt_set
from workbench.glitch.verification.scoring import VERIFIED, Scores, VerifyOptions, score
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.loading import load_model
from workbench.models.model import Model

LIMITS = {"embedded": 5.0, "260k": 15.0}
GOAL = {"float32": 1e-5, "bfloat16": 1e-3}
SAME = 1e-5
"""Largest difference of probabilities in float64; logits are rounded to fp32, which is worth some 1e-6."""
N_ROWS, WIDTH, N_UNUSED = 260_000, 640, 3000

SCAN = """
import sys, threading, time
from workbench.glitch import scan
import torch, gguf, tokenizers, safetensors
peak, done = [0], threading.Event()
def taken():
    # not the pages of the mapped file, which the system can drop
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], taken())
scan(sys.argv[1])
before = taken()
threading.Thread(target=watch, daemon=True).start()
start, used = time.perf_counter(), time.process_time()
report = scan(sys.argv[1])
seconds, used = time.perf_counter() - start, time.process_time() - used
done.set()
print(seconds, used, (peak[0] - before) / 2**10, len(report.table), report.d_model, report.indicator)
"""
"""Run in a process of its own, so that nothing else is in its memory; the first scan fills the file cache."""


def synthetic(folder: Path) -> Path:
    """A tied model folder of 260k x 640 in bf16 with reserved names, as far as a weights-only scan reads it."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N_ROWS, WIDTH, generator=generator)
    rows[:N_UNUSED] = torch.randn(WIDTH, generator=generator) + 0.02 * torch.randn(N_UNUSED, WIDTH, generator=generator)
    save_file({"model.embed_tokens.weight": rows.bfloat16()}, folder / "model.safetensors")
    names = [f"<unused{k}>" for k in range(N_UNUSED)] + sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("".join(letters) for letters in itertools.product("etaoinshrdlu", repeat=6))
    names += [f"Ġ{word}" if k % 2 else word for k, word in zip(range(N_ROWS - len(names)), words, strict=False)]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    return folder


def time_scan(name: str, where: str) -> None:
    """Seconds and extra memory of one scan in a fresh process."""
    done = subprocess.run([sys.executable, "-c", SCAN, where], capture_output=True, text=True, check=True)
    seconds, used, extra, n, width, indicator = done.stdout.split()[-6:]
    matrix = int(n) * int(width) * 4 / 2**20
    print(
        f"scan {name}: {float(seconds):.2f} s (limit {LIMITS[name]:g}; {float(used):.2f} s of CPU), {n} x {width}, by "
        f"{indicator}; {float(extra):.0f} MiB on top at the peak, the matrix alone has {matrix:.0f} MiB in fp32"
    )


def one_by_one(model: Model, templates: tuple[Template, ...], tokens: torch.Tensor, steps: int) -> np.ndarray:
    """Probabilities by token, prompt and step, each prompt generated alone by transformers."""
    p = np.zeros((len(tokens), len(templates), steps))
    for k, token in enumerate(tokens):
        for t, made in enumerate(templates):
            row = made.fill(token[None])
            out = model.hf.generate(
                input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=steps, min_new_tokens=steps,
                do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            p[k, t] = [float(z[0].double().softmax(0)[token]) for z in out.logits]
    return p


def mixed(ranked: np.ndarray, n: int) -> torch.Tensor:
    """The most suspicious tokens and as many random ones in turn: probabilities near 0 alone would agree anyhow."""
    random = np.random.default_rng(0).permutation(ranked[n:])[: n // 2]
    return torch.from_numpy(np.stack([ranked[: n // 2], random], 1).ravel())


def cast(model: Model, dtype: torch.dtype) -> Model:
    """A copy of the model in another type of number."""
    return Model(copy.deepcopy(model.hf).to(dtype), model.tokenizer, model.name)


def same(model: Model, templates: tuple[Template, ...], tokens: torch.Tensor) -> np.ndarray | None:
    """The probabilities in float64 if both ways give them, else None."""
    exact = cast(model, torch.float64)
    theirs = one_by_one(exact, templates, tokens, VerifyOptions().steps)
    error = float(np.abs(score(exact, templates, tokens, VerifyOptions()).p - theirs).max())
    print(
        f"verification float64: largest difference {error:.1e} of {theirs.size} probabilities up to "
        f"{theirs.max():.2f} (allowed {SAME:g}){'' if error <= SAME else '; NOT EQUAL, no ratio is printed'}"
    )
    return theirs if error <= SAME else None


def compare(model: Model, templates: tuple[Template, ...], tokens: torch.Tensor, exact: np.ndarray) -> None:
    """Times both ways on a model for which `same` gave `exact` for the first tokens, and prints the ratios."""
    dtype, options, few = str(model.dtype).removeprefix("torch."), VerifyOptions(), len(exact)
    score(model, templates, tokens[:few], options)
    start = time.perf_counter()
    ours: Scores = score(model, templates, tokens, options)
    fast = time.perf_counter() - start
    start = time.perf_counter()
    quick: Scores = score(model, templates, tokens, VerifyOptions(stop_at=VERIFIED))
    cascade = time.perf_counter() - start
    one_by_one(model, templates[:1], tokens[:1], 1)
    start = time.perf_counter()
    theirs = one_by_one(model, templates, tokens[:few], options.steps)
    slow = (time.perf_counter() - start) / few * len(tokens)
    error = float(np.abs(ours.p[:few] - theirs).max())
    failed = ours.best < VERIFIED
    changed = int(((quick.best < VERIFIED) != failed).sum())
    changed += int(((theirs.max((1, 2)) < VERIFIED) != failed[:few]).sum())
    said = (
        f"verification {dtype}: largest difference {error:.1e} (goal {GOAL[dtype]:g}: "
        f"{'met' if error <= GOAL[dtype] else 'MISSED'}); from float64 "
        f"{np.abs(ours.p[:few] - exact).max():.1e} batched, {np.abs(theirs - exact).max():.1e} one by one; {changed} "
        "other verdicts"
    )
    if changed and model.dtype == torch.float32:  # in bf16 a verdict near the threshold depends on the batch
        print(f"{said}; NOT EQUAL, no ratio is printed")
        return
    print(
        f"{said}; {len(tokens)} candidates x {len(templates)} prompts x {options.steps} steps: {fast:.1f} s, stopping "
        f"at the first success {cascade:.1f} s, one by one {slow:.0f} s (scaled from {few} of them): ratios "
        f"{slow / fast:.1f} and {slow / cascade:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=1000, help="for the batched way")
    parser.add_argument("--generate", type=int, default=8, help="of these, for one by one")
    parser.add_argument("--skip-verification", action="store_true")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores")
    time_scan("embedded", "embedded")
    with tempfile.TemporaryDirectory() as folder:
        time_scan("260k", str(synthetic(Path(folder))))
    if options.skip_verification:
        return
    model = load_model("embedded", dtype="float32", check=False)
    tokens = mixed(ranking(scan(model)), options.candidates)
    templates = prompt_set(model, analyse(codec_of(model.tokenizer)), forms="raw").templates
    exact = same(model, templates, tokens[: options.generate])
    if exact is not None:
        compare(model, templates, tokens, exact)
        compare(cast(model, torch.bfloat16), templates, tokens[: 4 * options.generate], exact)


if __name__ == "__main__":
    main()
