"""A steering sweep as rows of few batches, against generating one row at a time.

usage: python benchmarks/steering.py [--features 8] [--strengths 5] [--prompts 50] [--new-tokens 20] [--single 16]

Both are first shown to write the same texts in fp32, on `--single` rows. The time is taken in the dtype that
`load_model` chooses. In lower precision a matrix product rounds differently in a batch of one row, so that texts part
sooner or later; the share of equal ones is printed. Only generation is timed, on both sides with the same plan, sampler
and stop rule, and without measures of the texts. One row at a time is run on a random choice of `--single` rows and its
time per row is multiplied by the number of rows: an extrapolation, printed as such.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from workbench.features.scores.last_token import fp32_copy
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.models.sampling import Sampling
from workbench.steering.sweep.options import SteerOptions
from workbench.steering.sweep.prompts import NEUTRAL_PROMPTS
from workbench.steering.sweep.rows import ArmRunner, Pushes

ENDINGS = ("", " Then,", " And so")


def prompts_of(n: int) -> list[str]:
    """`n` different openings of about the same length."""
    every = [ending.strip() + " " + prompt if ending else prompt for ending in ENDINGS for prompt in NEUTRAL_PROMPTS]
    if n > len(every):
        raise SystemExit(f"--prompts {n}: there are {len(every)} openings")
    return every[:n]


def sae_of(model: Model, site: str, d_sae: int) -> Any:
    """A TopK SAE with random unit features: its texts mean nothing, its cost is that of a trained one."""
    from workbench.saes.formats.load import sae_lens_module

    sae_lens = sae_lens_module()
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=model.width(site), d_sae=d_sae, k=32))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(d_sae, model.width(site), generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


def in_batches(runner: ArmRunner, pushes: list[Pushes]) -> tuple[list[list[Tensor]], float]:
    """New tokens by strength and row, and the seconds; generation alone, with the batches of `ArmRunner.write`."""
    n, found = len(runner.prompts), []
    start = time.perf_counter()
    for push in pushes:
        ids: list[Tensor] = []
        total = n * len(push)
        for rows in torch.arange(total).tensor_split(-(-total // runner.writing.batch_size)):
            edit = Intervention.at(runner.site, push.op(rows, n), runner.writing.scope)
            with runner.model.plan(edit) as plan:
                ids += runner.continue_rows(rows % n, plan)[0]
        found.append(ids)
    return found, time.perf_counter() - start


def one_by_one(
    model: Model, runner: ArmRunner, pushes: list[Pushes], chosen: list[tuple[int, int]]
) -> tuple[list[Tensor], float]:
    """The same rows with `Model`'s own generation, a batch of one row each; (strength, row) says which."""
    from workbench.models.decoding import Decoder

    n, how = len(runner.prompts), runner.writing
    sampling = Sampling(how.new_tokens, how.temperature, how.seed, model.stop_ids)
    found = []
    start = time.perf_counter()
    for strength, row in chosen:
        prompt = runner.prompts[torch.tensor([row % n])]
        op = pushes[strength].op(torch.tensor([row]), n)
        with model.plan(Intervention.at(runner.site, op, how.scope)):
            decoder = Decoder(model.hf, sampling)
            new = decoder.run(decoder.prefill(prompt), torch.tensor([row % n]))
        found.append(new.ids[0, : model.text_length(new.ids[0])])
    return found, time.perf_counter() - start


def swept(model: Model, sae: Any, site: str, o: argparse.Namespace, prompts: int) -> tuple[ArmRunner, list[Pushes]]:
    options = SteerOptions(new_tokens=o.new_tokens, batch_size=o.batch)
    sizes = torch.full((o.features,), 20.0) if o.a_max == "dataset" else None
    pushes = [Pushes(sae.W_dec.detach()[: o.features], 0.5 * (i + 1), sizes, sae) for i in range(o.strengths)]
    assert sizes is None or isinstance(pushes[0].op(torch.tensor([0]), 1), Add)
    return ArmRunner(model, site, model.tokens(prompts_of(prompts)), options.writing), pushes


def both(
    model: Model, runner: ArmRunner, pushes: list[Pushes], single: int
) -> tuple[list[list[Tensor]], float, list[tuple[int, int]], float, int]:
    """Texts and seconds of the batches; the rows also run alone, their seconds, and how many texts are equal."""
    ours, seconds = in_batches(runner, pushes)
    each = len(ours[0])
    picks = torch.randperm(len(pushes) * each, generator=torch.Generator().manual_seed(1))[:single].tolist()
    chosen = [(i // each, i % each) for i in picks]
    theirs, alone = one_by_one(model, runner, pushes, chosen)
    equal = sum(torch.equal(a, ours[s][r]) for a, (s, r) in zip(theirs, chosen, strict=True))
    return ours, seconds, chosen, alone, equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--layer", type=int)
    for name, default in (
        ("features", 8), ("strengths", 5), ("prompts", 50), ("new-tokens", 20), ("single", 16), ("d-sae", 4608),
        ("batch", 256),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--a-max", choices=("token", "dataset"), default="token")
    o = parser.parse_args()
    model = load_model(o.model, check=False)
    site = str(model.resolve(f"resid_post.{o.layer if o.layer is not None else model.n_layers // 2}"))
    print(f"{model}, {torch.get_num_threads()} threads, {site}")
    sae = sae_of(model, site, o.d_sae)

    exact = fp32_copy(model)
    chosen, _, equal = both(exact, sae, *swept(exact, sae, site, o, min(o.prompts, 4)), o.single)[2:]
    print(f"texts equal in float32: {equal} of {len(chosen)}")
    if equal < 0.9 * len(chosen):
        raise SystemExit("the two do not write the same; no ratio is printed")

    start = time.perf_counter()
    runner, pushes = swept(model, sae, site, o, o.prompts)
    prefill = time.perf_counter() - start
    one_by_one(model, runner, pushes, [(0, 0)])
    ours, seconds, chosen, alone, equal = both(model, runner, pushes, o.single)
    seconds += prefill
    rows = o.features * o.strengths * o.prompts
    tokens = sum(len(ids) for part in ours for ids in part)
    print(f"{model.dtype}: texts equal: {equal} of {len(chosen)}")
    print(f"{rows} rows, {tokens} tokens, in batches of at most {o.batch}: {seconds:.1f} s")
    print(f"one row at a time: {len(chosen)} rows in {alone:.1f} s, extrapolated to {rows} rows: "
          f"{alone / len(chosen) * rows:.0f} s")  # fmt: skip
    print(f"ratio: {alone / len(chosen) * rows / seconds:.1f}x")


if __name__ == "__main__":
    main()
