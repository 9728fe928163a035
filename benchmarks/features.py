"""Output scores of a whole SAE at several depths: the batched sweep beside one hooked forward pass per feature.

    python benchmarks/features.py --features 32 --layers 0 15 29
    python benchmarks/features.py --vocabulary 262144 --only-product

Both are timed in one process on the same features; their scores are compared before a ratio is printed.

Then what scores cost behind the last block, as a multiple of the product with the unembedding alone: for the model's
vocabulary, and for a random model of `--width` with `--vocabulary` tokens.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch

from workbench.features import OutputOptions, output_scores
from workbench.features.scores.last_token import LastToken
from workbench.features.scores.logit_lens import lens_tokens, slab_rows
from workbench.features.scores.output_score import score_hidden
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import Last
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.saes.formats.load import sae_lens_module

TOLERANCE = 1e-5
TARGET_RATIO = 20.0
PRODUCT_RATIO = 1.5
TARGET_SECONDS = 120.0


def made_up_sae(model: Model, d_sae: int, layer: int) -> object:
    """A TopK SAE whose decoder rows are unembedding rows and random directions in turn.

    The cost does not depend on what features mean. Unembedding rows give scores all over [0, 1], so that agreement is
    not that of zeros.
    """
    sae_lens = sae_lens_module()
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=model.d_model, d_sae=d_sae, k=32))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(d_sae, model.d_model, generator=generator)
    tokens = torch.randint(model.d_vocab, (len(rows[::2]),), generator=generator)
    rows[::2] = model.hf.get_output_embeddings().weight.detach()[tokens].float()
    with torch.no_grad():
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    return sae


def in_float64(logits: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """The score as its definition reads. torch's softmax in fp32 is off by 1.5e-5 over 49k tokens on some CPUs."""
    p = logits.double().softmax(0)
    best = lens[p[lens].argmax()]
    return (1 - int((p > p[best]).sum()) / len(p)) * p[best]


@torch.no_grad()
def per_feature(model: Model, sae: object, site: str, features: range, lens: torch.Tensor) -> torch.Tensor:
    """What a straightforward script does: hook, run the whole prompt, softmax, sort, read off."""
    scores = []
    for i, feature in enumerate(features):
        edit = Intervention.at(site, SAEAddMax(sae, sae.W_dec[feature], 10.0), Last())  # type: ignore[attr-defined]
        with model.plan(edit):
            scores.append(in_float64(model.logits(OutputOptions().prompt)[0], lens[i]))
    return torch.stack(scores).float().cpu()


@dataclass(frozen=True)
class Timed:
    """Seconds of both ways at one depth."""

    layer: int
    fast_each: float
    slow_each: float
    error: float
    range: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.slow_each / self.fast_each


def compare(model: Model, d_sae: int, layer: int, few: range) -> Timed:
    sae, site = made_up_sae(model, d_sae, layer), f"resid_post.{layer}"
    output_scores(model, sae, few, options=OutputOptions(rows=8))  # warm-up
    start = time.perf_counter()
    fast = output_scores(model, sae)
    fast_each = (time.perf_counter() - start) / d_sae
    start = time.perf_counter()
    slow = per_feature(model, sae, site, few, fast.lens.ids)
    slow_each = (time.perf_counter() - start) / len(few)
    error = float((fast.score[: len(few)] - slow).abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"layer {layer}: the two disagree by {error:.2e}; no ratio is printed")
    return Timed(layer, fast_each, slow_each, error, (float(slow.min()), float(slow.max())))


@torch.no_grad()
def against_product(model: Model, rows: int, repeats: int) -> None:
    """Scores from hidden states against the product that they need, in turns; first against a softmax in float64."""
    layer = model.n_layers - 1
    sae, options = made_up_sae(model, rows, layer), OutputOptions(rows=rows)
    run = LastToken(model, model.tokens("From my experience,").ids, model.resolve(f"resid_post.{layer}"), rows)
    hidden = run.hidden(10.0 * float(run.x.norm()) * sae.W_dec.detach())  # type: ignore[attr-defined]
    lens = lens_tokens(model, sae.W_dec.detach()).ids  # type: ignore[attr-defined]

    def product() -> None:
        for part in hidden.split(slab_rows(model.d_vocab)):
            run.head.all(part)

    def scores() -> torch.Tensor:
        return score_hidden(run, hidden, lens, options)[0]

    found, error = scores(), 0.0
    for rows_of in torch.arange(rows).split(slab_rows(model.d_vocab)):
        logits = run.head.exact(hidden[rows_of])  # the same product: another number of rows rounds differently
        for i in range(0, len(rows_of), 16):
            slow = in_float64(logits[i], lens[rows_of[i]])
            error = max(error, float((found[rows_of[i]] - slow).abs()))
    if error > TOLERANCE:
        raise SystemExit(f"{model.d_vocab} tokens: scores are {error:.2e} off; no ratio is printed")
    laps: dict[str, list[float]] = {"product": [], "scores": []}
    for _ in range(repeats):
        for name, fn in (("product", product), ("scores", scores)):
            start = time.perf_counter()
            fn()
            laps[name].append(time.perf_counter() - start)
    each, alone = (min(laps[name]) / rows for name in ("scores", "product"))
    ratio = each / alone
    print(
        f"{model.d_vocab} tokens, width {model.d_model}: scores {1e3 * each:.2f} ms, the product alone "
        f"{1e3 * alone:.2f} ms a feature; ratio {ratio:.2f}, {'' if ratio <= PRODUCT_RATIO else 'ABOVE '}target "
        f"{PRODUCT_RATIO:g}; largest difference {error:.1e}, scores {float(found.min()):.1e} to "
        f"{float(found.max()):.3f}"
    )


def random_model(like: Model, vocabulary: int, width: int) -> Model:
    """A llama of one block with a random unembedding; its tokenizer is that of `like`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, num_attention_heads=width // 64,
        intermediate_size=2 * width, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config).eval().requires_grad_(False), like.tokenizer, "random")


def main() -> None:
    """Time all and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--features", type=int, default=32, help="features for the slow way")
    parser.add_argument("--d-sae", type=int, default=4608, help="features for the fast way")
    parser.add_argument("--layers", type=int, nargs="+", help="by default the first, the middle and the last")
    parser.add_argument("--vocabulary", type=int, default=262_144, help="tokens of the random model")
    parser.add_argument("--width", type=int, default=640, help="d_model of the random model")
    parser.add_argument("--rows", type=int, default=256, help="features for the ratio to the product")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the shortest counts")
    parser.add_argument("--only-product", action="store_true", help="leave out the sweep over the SAE")
    options = parser.parse_args()
    model = load_model(options.model, dtype="float32", check=False)
    if not options.only_product:
        sweep(model, options)
    for one in (model, random_model(model, options.vocabulary, options.width)):
        against_product(one, options.rows, options.repeats)


def sweep(model: Model, options: argparse.Namespace) -> None:
    """The batched sweep and one forward pass per feature, at each layer."""
    layers = options.layers or [0, model.n_layers // 2, model.n_layers - 1]
    print(f"{model.name}, {torch.get_num_threads()} threads, fp32; {options.d_sae} features, the slow way on")
    print(f"{options.features} of them, its lens not counted")
    print("layer   one by one    batched      ratio   whole SAE   largest difference   scores")
    timed = []
    for layer in layers:
        t = compare(model, options.d_sae, layer, range(options.features))
        timed.append(t)
        low, high = t.range
        print(
            f"{layer:>5}   {1e3 * t.slow_each:7.1f} ms   {1e3 * t.fast_each:7.2f} ms   {t.ratio:6.1f}   "
            f"{t.fast_each * options.d_sae:7.1f} s   {t.error:18.1e}   {low:.1e} to {high:.3f}"
        )
    least, longest = min(t.ratio for t in timed), max(t.fast_each for t in timed) * options.d_sae
    print(f"ratio: {least:.1f} or more, {'' if least >= TARGET_RATIO else 'BELOW '}target {TARGET_RATIO:g}")
    print(
        f"whole SAE: at most {longest:.0f} s, {'' if longest < TARGET_SECONDS else 'ABOVE '}target {TARGET_SECONDS:g} s"
    )


if __name__ == "__main__":
    main()
