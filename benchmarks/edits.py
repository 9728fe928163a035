"""Hooks and edits against what one would write or use instead, on the same model in the same run.

usage: python benchmarks/edits.py [--model embedded] [--layer 15] [--batch 128] [--features 64]

1. Activations of one layer: `Model.capture`, a hand-written truncated Hugging Face forward in the same dtype, and
   `TransformerBridge.run_with_cache` with a names filter and `stop_at_layer`.
2. Steered generation against unsteered `transformers.generate`.
3. 64 SAE features steered one at a time: rows of one resumed forward pass against 64 hooked forward passes.

Each part first shows that both sides compute the same thing, in fp32; without that no ratio is printed. The time is
taken in the dtype that `load_model` chooses: in bf16 another attention kernel alone moves activations by percents.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch

import workbench as wb
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

TEXT = "The old lighthouse keeper wrote down the weather every evening, and nobody knew for whom he did it."


def seconds(fn: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of some runs, after one that is not counted."""
    fn()
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        laps.append(time.perf_counter() - start)
    return min(laps)


def same(name: str, a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    """Stops the benchmark unless the two agree, by the relative L2 distance of all values."""
    a, b = a.float(), b.float()
    distance = float((a - b).norm() / b.norm())
    print(f"  {name}: relative distance {distance:.2g}")
    if not distance <= tolerance:
        raise SystemExit("  the two do not compute the same thing; no ratio is printed")


def table(rows: dict[str, float], unit: str, ours: str, work: float = 1.0) -> None:
    for name, value in rows.items():
        print(f"  {name:58s} {work / value:10.1f} {unit}   ours is {value / rows[ours]:.2f}x")


def readers(model: Model, layer: int, ids: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Three ways to the activations of one layer."""
    body = copy.copy(model.hf.model)
    body._modules = dict(body._modules)
    body.layers, body.norm = model.hf.model.layers[: layer + 1], torch.nn.Identity()
    bridge, site, name = model.to_transformer_lens(), f"resid_post.{layer}", f"blocks.{layer}.hook_resid_post"

    def by_hand() -> torch.Tensor:
        with torch.no_grad():
            return body(ids, use_cache=False).last_hidden_state

    def by_bridge() -> torch.Tensor:
        with torch.no_grad():
            return bridge.run_with_cache(ids, names_filter=name, stop_at_layer=layer + 1)[1][name]

    return {
        "capture": lambda: model.capture(ids, [site])[site],
        "truncated forward by hand": by_hand,
        "TransformerBridge": by_bridge,
    }


def reading(model: Model, exact: Model, layer: int, rows: int, width: int) -> None:
    print(f"1. activations of resid_post.{layer}, {rows} x {width} tokens, {model.dtype}")
    ids = torch.randint(0, model.d_vocab, (rows, width), generator=torch.Generator().manual_seed(0))
    checked, timed = readers(exact, layer, ids), readers(model, layer, ids)
    want = checked["capture"]()
    for name, tolerance in (("truncated forward by hand", 1e-6), ("TransformerBridge", 1e-4)):
        same(f"capture and {name}, in float32", want, checked[name](), tolerance)
    laps = {name: seconds(read) for name, read in timed.items()}
    laps["TransformerBridge in float32, in which it boots"] = seconds(checked["TransformerBridge"])
    table(laps, "tokens/s", "capture", rows * width)


def generating(model: Model, exact: Model, layer: int, batch: int, new: int, checked: int = 16) -> None:
    print(f"2. generation, batch {batch}, {new} new tokens; ours is steered, theirs is not")
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    iv = wb.Intervention.at(f"resid_post.{layer}", wb.Add(vector, 2.0))
    one = model.tokens([TEXT]).ids

    def theirs(model: Model, ids: torch.Tensor, **options: object) -> torch.Tensor:
        hf = TokenBatch.of_rows(ids).hf()
        return model.hf.generate(**hf, max_new_tokens=new, min_new_tokens=new, eos_token_id=None, **options)

    def steered(model: Model, ids: torch.Tensor, **options: object) -> torch.Tensor:
        with model.plan(iv):
            return model.sample(ids, new, **options)

    prefixes = torch.randint(100, model.d_vocab, (checked, one.shape[1]), generator=torch.Generator().manual_seed(1))
    prefixes[0] = one[0]
    with exact.plan(iv):
        want = theirs(exact, prefixes, do_sample=False)[:, prefixes.shape[1] :]
    equal = float((steered(exact, prefixes, temperature=0.0) == want).float().mean())
    print(f"  greedy steered tokens equal to those of transformers.generate under the same plan, float32: {equal:.1%}")
    if equal < 0.99:
        raise SystemExit("  the two do not compute the same thing; no ratio is printed")
    ids = one.expand(batch, -1).contiguous()
    laps = {
        "steered, ours": seconds(lambda: steered(model, ids), 2),
        "unsteered, transformers.generate": seconds(lambda: theirs(model, ids, do_sample=True, top_k=0), 2),
    }
    table(laps, "tokens/s", "steered, ours", batch * new)


class OneByOne:
    """Adding each of some SAE features at one site, in four ways that give the same logits."""

    def __init__(self, model: Model, sae: object, layer: int, scope: wb.Last | wb.All, features: int) -> None:
        self.model, self.sae, self.layer, self.scope, self.features = model, sae, layer, scope, features
        self.batch, self.site = model.tokens(TEXT), f"resid_post.{layer}"
        self.single = [wb.Intervention.at(self.site, wb.SAEAdd(sae, [f], 40.0), scope) for f in range(features)]
        self.rows = wb.Intervention.at(self.site, wb.SAEAdd(sae, torch.arange(features)[:, None], 40.0), scope)
        self.segment = model.segment(self.batch, self.site, last=isinstance(scope, wb.Last))

    @torch.no_grad()
    def resumed(self) -> torch.Tensor:
        with self.model.plan(self.rows) as plan:
            return self.segment.run(rows=self.features, plan=plan).logits()

    def variants(self) -> torch.Tensor:
        return self.model.variants(self.batch, self.single).logits[:, 0]

    def sequential(self) -> torch.Tensor:
        found = []
        for iv in self.single:
            with self.model.plan(iv):
                found.append(self.model.logits(self.batch))
        return torch.cat(found)

    @torch.no_grad()
    def plain_hooks(self) -> torch.Tensor:
        found = []
        block = self.model.hf.model.layers[self.layer]
        for f in range(self.features):
            vector = (40.0 * self.sae.W_dec[f]).to(self.model.dtype)

            def hook(_m: object, _a: object, out: torch.Tensor, vector: torch.Tensor = vector) -> torch.Tensor:
                if isinstance(self.scope, wb.All):
                    return out + vector
                out = out.clone()
                out[:, -1] += vector
                return out

            handle = block.register_forward_hook(hook)
            found.append(self.model.hf(self.batch.ids, use_cache=False, logits_to_keep=1).logits[:, -1].float())
            handle.remove()
        return torch.cat(found)


def comparing(model: Model, exact: Model, layer: int, features: int) -> None:
    sae = random_sae(model.d_model)
    for scope in (wb.Last(), wb.All()):
        print(f"3. {features} SAE features, one at a time, at resid_post.{layer} on {scope}")
        checked = OneByOne(exact, sae, layer, scope, features)
        want = checked.plain_hooks()
        same("rows, resumed, and plain hooks, in float32", checked.resumed(), want, 1e-4)
        same("variants and plain hooks, in float32", checked.variants(), want, 1e-4)
        same("one plan each and plain hooks, in float32", checked.sequential(), want, 1e-4)
        timed = OneByOne(model, sae, layer, scope, features)
        laps = {
            "one plan with rows, resumed": seconds(timed.resumed),
            "the same with all that comes before it (variants)": seconds(timed.variants),
            "one plan each": seconds(timed.sequential, 1),
            "one plain torch hook each": seconds(timed.plain_hooks, 1),
        }
        table(laps, "features/s", "one plan with rows, resumed", features)


def random_sae(d: int, d_sae: int = 4096) -> object:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=d_sae, k=32, apply_b_dec_to_input=True))
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128, help="rows of generation")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--features", type=int, default=64, help="features steered one at a time")
    parser.add_argument("--shapes", nargs="+", default=["1x16", "4x64", "16x128"], help="rows x tokens of part 1")
    options = parser.parse_args()
    model = wb.load_model(options.model, check=False)
    print(model)
    exact = wb.load_model(options.model, dtype="float32", check=False)
    for shape in options.shapes:
        rows, width = map(int, shape.split("x"))
        reading(model, exact, options.layer, rows, width)
    generating(model, exact, options.layer, options.batch, options.new_tokens)
    comparing(model, exact, options.layer, options.features)


if __name__ == "__main__":
    main()
