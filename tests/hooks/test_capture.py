"""Chosen tokens, streams of texts, gradients, layers from the end; and every entry refuses a misspelt site."""

from __future__ import annotations

import gc
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import D_MODEL, N_LAYERS, n_hooks, tiny_hf, tiny_model, tiny_tokenizer
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, UnknownSiteError
from workbench.hooks.attach import attached
from workbench.hooks.sites import KINDS, LAYER_KINDS, Point, Site
from workbench.interventions.chosen import Mask
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import Last, Pos, TokenIs
from workbench.models.model import Model

IDS = torch.arange(10, 16)[None]
TEXTS = ["abcdef", "xy", "lmn"]
SITES = ["resid_post.1", "z.1", "pattern.0", "v.2.h0"]


def test_chosen_tokens_are_those_of_the_whole_capture_in_row_order() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    whole = model.capture(batch, SITES)
    acts = model.capture(batch, SITES, positions=Pos(0, -1))
    assert acts.rows is not None and acts.positions is not None
    assert acts.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert acts.positions.tolist() == [0, 5, 0, 1, 0, 2]
    columns = [0, 5, 4, 5, 3, 5]
    for site in SITES:
        assert torch.equal(acts[site], whole.flat(site)[acts.rows, columns])
        assert torch.equal(acts.flat(site), acts[site])
    assert not torch.equal(acts["resid_post.1"], whole["resid_post.1"][acts.rows, [c - 1 for c in columns]])
    assert acts["pattern.0"].shape == (6, 2 * 6) and whole.rows is None


def test_a_named_position_that_no_row_has_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(DegenerateInputError, match=r"no row has a token at Pos\(positions=\(20"):
        model.capture(model.tokens(TEXTS), SITES, positions=Pos(2, 20))
    assert len(model.capture(model.tokens(TEXTS), SITES, positions=Pos(2, 5)).rows) == 3  # type: ignore[arg-type]


def test_last_gives_one_line_per_row_also_without_padding_being_in_the_way() -> None:
    model = tiny_model()
    acts = model.capture(model.tokens(TEXTS), ["resid_post.-1"], positions=Last())
    assert acts.rows is not None and acts.rows.tolist() == [0, 1, 2]
    alone = torch.cat([model.capture(text, ["resid_post.-1"])["resid_post.-1"][:, -1] for text in TEXTS])
    torch.testing.assert_close(acts["resid_post.-1"], alone, atol=1e-5, rtol=1e-4)


def test_a_choice_of_no_token_raises() -> None:
    model = tiny_model()
    with pytest.raises(DegenerateInputError, match="no token of this batch"):
        model.capture(TEXTS, ["resid_post.1"], positions=TokenIs(0))


@pytest.mark.parametrize("site", ["resid_post.1", "q.1", "k.1.h0", "z.1", "mlp_pre.1"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "phi3"])
def test_the_model_depends_on_what_is_captured_with_gradients(site: str, family: str) -> None:
    model = tiny_model(family)
    model.hf.requires_grad_(True).double()
    ids = torch.arange(10, 22).view(2, 6)
    whole = model.capture(ids, [site, "resid_post.2"], grad=True)
    (slope,) = torch.autograd.grad(whole["resid_post.2"].square().sum(), whole[site])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 2:4] = True
    some = model.capture(ids, [site, "resid_post.2"], positions=Mask(mask, may_skip_rows=True), grad=True)
    everything = model.capture(ids, ["resid_post.2"], grad=True)["resid_post.2"]
    assert torch.equal(everything[1, 2:4], some["resid_post.2"])
    (part,) = torch.autograd.grad(some["resid_post.2"].square().sum(), some[site])
    assert part.shape == (2, slope.flatten(2).shape[2]) and bool((part != 0).any())
    step = 1e-4 * slope
    with torch.no_grad(), attached([(model.site_map[site], lambda x: x + step)]):
        after = model.capture(ids, ["resid_post.2"])["resid_post.2"].square().sum()
    predicted = float((slope * step).sum())
    measured = float(after - whole["resid_post.2"].detach().square().sum())
    assert measured == pytest.approx(predicted, rel=0.05)


def test_a_stream_reads_no_further_than_it_gives_and_keeps_nothing() -> None:
    model = tiny_model()
    taken = []

    def endless() -> Iterator[str]:
        for i in itertools.count():
            taken.append(i)
            yield "abc" * (1 + i % 3)

    got = list(itertools.islice(model.stream(endless(), ["resid_post.1"], batch_size=2, positions=Last()), 3))
    assert taken == list(range(6))
    for batch, acts in got:
        assert len(batch) == 2 and acts["resid_post.1"].shape == (2, D_MODEL)
        assert torch.equal(
            acts["resid_post.1"], model.capture(batch, ["resid_post.1"], positions=Last())["resid_post.1"]
        )
    short = list(model.stream(iter(TEXTS), ["embed"], batch_size=2))
    assert [len(batch) for batch, _ in short] == [2, 1]


def test_a_stream_refuses_before_it_reads_anything() -> None:
    model = tiny_model()

    def never() -> Iterator[str]:
        raise AssertionError("read")
        yield ""

    with pytest.raises(UnknownSiteError, match="Did you mean"):
        model.stream(never(), ["resid_pots.1"])
    for texts, sites, size, says in (
        (never(), "resid_post.1", 8, "give a list"),
        ("abc", ["resid_post.1"], 8, "got one text; give a list"),
        (never(), ["resid_post.1"], 0, "at least 1"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            model.stream(texts, sites, batch_size=size)
    with pytest.raises(DegenerateInputError, match="at least one site"):
        model.stream(never(), [])


def test_layers_count_from_the_end_and_names_stay_usable() -> None:
    model = tiny_model()
    last = f"resid_post.{N_LAYERS - 1}"
    assert str(model.resolve("resid_post.-1")) == last
    assert model.resolve(f"z.{-N_LAYERS}.h1") == Site("z", 0, 1)
    acts = model.capture("abc", ["resid_post.-1"])
    assert list(acts) == [last]
    assert acts["resid_post.-1"] is acts[last]
    assert "resid_post.-1" in acts and "resid_post.-2" not in acts
    for asked in (f"resid_post.{N_LAYERS}", f"resid_post.{-N_LAYERS - 1}"):
        with pytest.raises(UnknownSiteError, match=r"layers 0 to 2 \(or -3 to -1, from the end\)"):
            model.resolve(asked)


@pytest.mark.parametrize("kind", KINDS)
def test_names_survive_both_text_forms(kind: str) -> None:
    site = Site(kind, 2 if kind in LAYER_KINDS else None)
    assert Site.parse(str(site)) == site == Site.parse(site.tl_name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Site("resid_pst", 1), "resid_post"),
        (lambda: Site("resid_post"), "layer number"),
        (lambda: Site("embed", 0), "no layer"),
        (lambda: Site("mlp_pre", 0, 1), "has no heads"),
        (lambda: Site.parse("ln_final.hook_normalized"), "final_norm is the norm's output"),
        (lambda: Site.parse("blocks.-1.hook_resid_post"), "no site"),
    ],
)
def test_a_site_that_cannot_exist_cannot_be_made(make: Callable[[], Site], says: str) -> None:
    with pytest.raises(UnknownSiteError, match=says):
        make()


def _harvest(model: Model, site: str, folder: Path) -> Any:
    from workbench.activations.harvest import harvest
    from workbench.activations.sources import TokenRows

    return harvest(model, TokenRows(torch.arange(10, 22).view(2, 6)), [site], folder)


def _score(model: Model, site: str, _folder: Path) -> Any:
    from tests.features.toys import random_sae
    from workbench.features.scores.score_features import score_features

    return score_features(model, random_sae(), site=site, scores=("output",))


ENTRIES: dict[str, Callable[[Model, str, Path], Any]] = {
    "capture": lambda model, site, _: model.capture("abc", [site]),
    "capture at positions": lambda model, site, _: model.capture("abc", [site], positions=Last()),
    "stream": lambda model, site, _: model.stream(["abc"], [site]),
    "plan": lambda model, site, _: model.plan(Intervention.at(site, Add(torch.ones(D_MODEL)))),
    "resolve": lambda model, site, _: model.resolve(site),
    "width": lambda model, site, _: model.width(site),
    "site_map": lambda model, site, _: model.site_map[site],
    "harvest": _harvest,
    "score_features": _score,
    "generate": lambda model, site, _: model.generate("abc", 1, capture=[site]),
}


KINDS_TOO = ("capture", "capture at positions", "stream", "generate")
"""Entries that take a kind alone for all of its layers."""


@pytest.mark.parametrize(
    "asked", ["resid_pst.1", "resid_post.99", "resid_post.-9", "attn_out", "z.1.h9", "resid_post.1.h0"]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_refuses_a_site_that_does_not_exist(entry: str, asked: str, tmp_path: Path) -> None:
    model = tiny_model()
    if entry in KINDS_TOO and asked == "attn_out":
        asked = "attn_out.*.h1"
    calls = []
    handle = model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UnknownSiteError):
        ENTRIES[entry](model, asked, tmp_path / "out")
    handle.remove()
    assert not calls, "the model ran before the name was looked at"
    assert n_hooks(model.hf) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["resid_post", "q", "z", "pattern", "mlp_pre"])
def test_nothing_is_left_after_an_exception_in_registration(kind: str) -> None:
    model = tiny_model("gpt2")
    fired = []
    foreign = model.hf.transformer.h[1].register_forward_hook(lambda *_: fired.append(1))
    point = model.site_map[f"{kind}.1"]

    class Broken(torch.nn.Module):
        def register_forward_hook(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

        register_forward_pre_hook = register_forward_hook

    for side in ("in", "out", "inside"):
        broken = Point(point.site, "broken", Broken(), side, 16, configs=point.configs, heads=2)
        with pytest.raises(ZeroDivisionError), attached([(point, lambda x: x), (broken, lambda x: x)]):
            pass
        assert n_hooks(model.hf) == 1
        assert model.hf.config._attn_implementation == "sdpa"
    model.hf(torch.arange(10, 14)[None])
    assert fired == [1]
    foreign.remove()


@pytest.mark.parametrize("kind", ["q", "pattern", "mlp_pre"])
@pytest.mark.parametrize("bad", [lambda x: x.double(), lambda x: x * float("nan"), lambda x: x[:1, :1]])
def test_a_bad_edit_is_refused_inside_the_block_too(kind: str, bad: Any) -> None:
    model = tiny_model("neox")
    with pytest.raises(EditError), attached([(model.site_map[f"{kind}.1"], bad)]):
        model.logits(["abc", "abd"])
    assert n_hooks(model.hf) == 0


@pytest.mark.parametrize(
    ("path", "inside"), [("", "resid_post.1"), ("model", "resid_post.1"), ("model.layers.1", "mlp_out.1")]
)
def test_sites_inside_a_compiled_module_are_refused_before_anything_runs(path: str, inside: str) -> None:
    model = tiny_model()
    module = model.hf.get_submodule(path)
    module._compiled_call_impl = module._call_impl  # what nn.Module.compile sets, without a compiler
    iv = Intervention.at(inside, Add(torch.ones(D_MODEL)))
    for use in (
        lambda: model.capture(IDS, [inside]),
        lambda: model.plan(iv).__enter__(),
        lambda: model.variants(IDS, [iv]),
        lambda: model.segment(IDS, inside),
        lambda: model.generate(IDS, 2, intervention=iv),
        lambda: model.generate(IDS, 2, capture=[inside]),
    ):
        with pytest.raises(EditError, match=rf"Site {inside}.* inside a compiled"):
            use()
    assert n_hooks(model.hf) == 0
    assert model.generate(IDS, 2).ids[0].shape == (2,)
    if path == "model.layers.1":
        model.capture(IDS, ["resid_post.1"])


def test_a_wrapper_is_refused_with_the_place_of_the_model_inside() -> None:
    wrapper = torch.nn.Module()
    wrapper.base_model = torch.nn.Module()
    wrapper.base_model.model = tiny_hf()
    wrapper.config = wrapper.base_model.model.config
    with pytest.raises(InvalidInputError, match=r"wrapper\.base_model\.model"):
        Model(wrapper, tiny_tokenizer())


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["resid_post"], ["resid_post.0", "resid_post.1", "resid_post.2"]),
        (["z.*"], ["z.0", "z.1", "z.2"]),
        (["z.*.h1"], ["z.0.h1", "z.1.h1", "z.2.h1"]),
        (["z.1.h*", "embed"], ["z.1.h0", "z.1.h1", "embed"]),
        (["blocks.*.hook_mlp_out"], ["mlp_out.0", "mlp_out.1", "mlp_out.2"]),
        (["resid_m*.1", "resid_mid.-2", "resid_post.1"], ["resid_mid.1", "resid_post.1"]),
        (["k"], ["k.0", "k.1", "k.2"]),
    ],
)
def test_a_kind_is_all_its_layers_and_a_star_anything(wanted: list[str], found: list[str]) -> None:
    model = tiny_model()
    assert list(model.capture(IDS, wanted)) == found
    assert [list(acts) for _, acts in model.stream(["ab"], wanted)] == [found]


def test_patterns_are_kept_while_generating_and_fit_something() -> None:
    model = tiny_model()
    assert set(model.generate("ab", 2, capture=["resid_post"]).activations) == {f"resid_post.{i}" for i in range(3)}
    with pytest.raises(UnknownSiteError, match=r"'resid_pots.\*'.*Did you mean resid_post"):
        model.capture(IDS, ["resid_pots.*"])
    with pytest.raises(UnknownSiteError, match="parallel"):
        tiny_model("neox").capture(IDS, ["resid_mid"])
    with pytest.raises(InvalidInputError, match="longer with every token"):
        model.generate("ab", 2, capture=["pattern"])


def test_activations_in_fp32_and_as_arrays() -> None:
    model = tiny_model()
    model.hf.bfloat16()
    acts = model.capture(["abc", "d"], ["resid_post", "pattern.1"], positions=None)
    wide = acts.float()
    assert wide["resid_post.1"].dtype == torch.float32 and torch.equal(
        wide["resid_post.1"].bfloat16(), acts["resid_post.1"]
    )
    assert wide.tokens is acts.tokens and wide.model is model and wide.note == acts.note != ""
    arrays = acts.numpy()
    assert list(arrays) == list(acts) and torch.equal(torch.from_numpy(arrays["resid_post.2"]), wide["resid_post.2"])


def test_activations_know_their_model_and_a_file_of_them_holds_none() -> None:
    model = tiny_model()
    acts = model.capture("ab", ["z"])
    assert acts.model is model
    again = pickle.loads(pickle.dumps(acts))
    assert again.model is None and torch.equal(again["z.1"], acts["z.1"])
    del model
    gc.collect()
    assert acts.model is None
