"""Patching is exact: it equals one hooked run per cell, adds up where it must, and has a control beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuits
from circuits.classics import head_scores, patch_grid
from circuits.classics.path_patch import Path
from circuits.classics.shared import third_prompts
from circuits.metrics import of_logits, of_site
from circuits.pairs import Pairs
from tests.tiny import n_hooks, tiny_hf, tiny_model, tiny_tokenizer
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.engine.keeper import Keeper
from workbench.hooks.attach import attached
from workbench.models.model import Model

CLEAN, PATCH = ["a dogs", "b cats", "c cows"], ["a cats", "b dogs", "c hens"]
ANSWERS = [("a", "b"), ("c", "d"), ("a", "b")]
CHANGED = 2
"""The first column in which a pair differs."""


def tiny(family: str = "llama") -> tuple[Model, Pairs]:
    """In fp64, so that a difference of 1e-6 means something."""
    model = tiny_model(family)
    model.hf.double()
    return model, Pairs.of(model, clean=CLEAN, patch=PATCH, answers=ANSWERS)


def hooked(model: Model, pairs: Pairs, site: str, edit: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The effect on the logit difference of one hooked run of the whole model, one per pair."""
    assert pairs.patch is not None
    other = model.capture(pairs.patch, [site])[site]
    with torch.no_grad():
        before = model.hf(pairs.clean.ids).logits[:, -1]
        with attached([(model.site_map[site], lambda x: edit(x.clone(), other))]):
            after = model.hf(pairs.clean.ids).logits[:, -1]
    change = (after - before).gather(1, pairs.answers)
    return change[:, 1] - change[:, 0]


def at(column: int, head: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    def edit(x: Tensor, other: Tensor) -> Tensor:
        where = (slice(None), column) if head is None else (slice(None), column, head)
        x[where] = other[where]
        return x

    return edit


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_each_cell_is_a_hooked_run_and_all_positions_are_the_whole_run(family: str) -> None:
    model, pairs = tiny(family)
    grid = circuits.patch_grid(model, pairs, sites=["resid_pre.1", "attn_out.0", "z.1", "z.2.h1"])
    found = {(cell.site, cell.column): grid.effects[i] for i, cell in enumerate(grid.cells)}
    for site, column in (("resid_pre.1", 3), ("attn_out.0", CHANGED), ("z.2.h1", 5), ("z.1.h0", 4)):
        where = model.resolve(site)
        want = hooked(model, pairs, str(replace(where, head=None)), at(column, where.head))
        torch.testing.assert_close(found[where, column], want, atol=1e-6, rtol=1e-6)
        assert float(want.abs().max()) > 1e-5 and not torch.allclose(found[where, column - 1], want, atol=1e-6)
    before = [effect for (_, column), effect in found.items() if column is not None and column < CHANGED]
    assert before and all(bool((effect == 0).all()) for effect in before)
    whole = circuits.patch_grid(model, pairs, sites=["resid_pre", "z.0"], by="all")
    streams = [whole.effects[i] for i, cell in enumerate(whole.cells) if cell.site.kind == "resid_pre"]
    assert len(streams) == model.n_layers and float(grid.totals.abs().max()) > 1e-3
    for effect in streams:  # what the whole run differs by, whatever the layer
        torch.testing.assert_close(effect, whole.totals, atol=1e-6, rtol=1e-6)
    assert n_hooks(model.hf) == 0


def test_tokens_before_the_first_change_are_not_computed_and_batches_do_not_matter() -> None:
    model, pairs = tiny()
    few = circuits.patch_grid(model, pairs, sites=["mlp_out.0"], rows=2)
    many = circuits.patch_grid(model, pairs, sites=["mlp_out.0"], rows=500)
    torch.testing.assert_close(few.effects, many.effects, atol=1e-9, rtol=0)
    widths: list[int] = []
    handle = model.hf.model.layers[2].register_forward_hook(lambda _m, _a, out: widths.append(out.shape[1]))
    circuits.patch_grid(model, pairs, sites=["resid_pre.2"])
    handle.remove()
    width = pairs.clean.ids.shape[1]
    # whole rows; what is cached of the tokens before; from the first change on, and from later tokens on
    assert sorted(set(widths))[-2:] == [width - CHANGED, width]


def test_in_sixteen_bits_what_has_no_effect_is_exactly_zero() -> None:
    model, pairs = tiny()
    model.hf.bfloat16()
    last = pairs.clean.ids.shape[1] - 1
    grid = circuits.patch_grid(model, pairs, sites=["mlp_out.2"])
    effects = {cell.column: grid.effects[i] for i, cell in enumerate(grid.cells)}
    assert all(bool((effects[column] == 0).all()) for column in range(last)) and bool((effects[last] != 0).any())


def test_the_table_says_position_token_share_and_control() -> None:
    model, pairs = tiny()
    grid = circuits.patch_grid(
        model, pairs, of_logits(lambda x, _: x[:, 7] * 0 + x.sum(1), "sum"), sites=["z.1", "mlp_out.1"]
    )
    frame = grid.frame()
    width = len(CLEAN[0])
    assert len(frame) == (2 + 1) * width and set(frame.columns) >= {"site", "layer", "head", "pos", "token"}
    row = frame[(frame.site == "z.1") & (frame["head"] == 1) & (frame.pos == CHANGED)].iloc[0]
    i = next(i for i, c in enumerate(grid.cells) if str(c.site) == "z.1.h1" and c.column == CHANGED)
    assert row.effect == pytest.approx(float(grid.effects[i].mean())) and row.n == 3
    assert row.se == pytest.approx(float(grid.effects[i].std()) / 3**0.5)
    assert row.token == "d→c | c→d …"
    assert frame[frame.site == "mlp_out.1"]["head"].isna().all()
    whole = grid.total()
    assert whole is not None
    if whole.excludes(0.0):
        assert row.normalised == pytest.approx(row.effect / whole.value)
    else:
        assert frame.normalised.isna().all() and any("within noise" in text for text in grid.findings())
    assert "<script" not in grid._repr_html_() and "class=warm" in grid._repr_html_()
    assert grid.to_json()["rows"]


def test_shares_are_refused_in_words_where_the_whole_run_is_noise() -> None:
    model, pairs = tiny()
    noise = of_logits(lambda x, rows: x[:, 5] * torch.tensor([1.0, -1.0, 0.1], dtype=x.dtype)[rows], "signs")
    grid = circuits.patch_grid(model, pairs, noise, sites=["mlp_out.2"])
    grid = replace(grid, totals=torch.tensor([1.0, -1.0, 0.1]))
    assert grid.frame().normalised.isna().all() and any("within noise" in text for text in grid.findings())
    clear = replace(grid, totals=torch.tensor([1.0, 1.1, 0.9]))
    torch.testing.assert_close(torch.tensor(clear.frame().normalised), torch.tensor(clear.frame().effect))
    single = replace(grid, totals=torch.tensor([2.0]), effects=grid.effects[:, :1], control=grid.control[:, :1])
    assert not single.frame().normalised.isna().any(), "one pair has no spread, and a difference that is no rounding"


def test_the_control_is_a_third_prompt_and_patches_with_it() -> None:
    model, pairs = tiny()
    third, there = third_prompts(pairs)
    assert there.all()
    texts = [model.tokenizer.decode(row.tolist()) for row in third.ids]
    # pairs 0 and 2 share the clean answer: the clean prompt of the other; pair 1 has no such: any other patch prompt
    assert texts[0] == CLEAN[2] and texts[2] == CLEAN[0] and texts[1] in (PATCH[0], PATCH[2])
    grid = circuits.patch_grid(model, pairs, sites=["mlp_out.1"])
    swapped = circuits.patch_grid(model, replace(pairs, patch=third), sites=["mlp_out.1"])
    i = next(i for i, cell in enumerate(grid.cells) if cell.column == 3)
    torch.testing.assert_close(grid.control[i], swapped.effects[i], atol=1e-6, rtol=1e-6)
    alone = circuits.patch_grid(model, pairs[:1], sites=["mlp_out.1"])
    assert alone.control.isnan().all() and "without control" in alone.note and alone.headline().control is None


def test_pairs_of_several_lengths_are_refused_or_aligned_at_the_end() -> None:
    model, _ = tiny()
    pairs = Pairs.of(model, clean=["the dog", "a cat"], patch=["the cat", "a cow"], answers=ANSWERS[:2])
    with pytest.raises(InvalidInputError, match=r"of_one_length\(\).*align='end'"):
        circuits.patch_grid(model, pairs, sites=["mlp_out"])
    grid = circuits.patch_grid(model, pairs, sites=["mlp_out.1"], align="end")
    frame = grid.frame()
    assert frame.pos.tolist() == list(range(-7, 0)) and frame.n.tolist() == [1, 1, 2, 2, 2, 2, 2]
    single = circuits.patch_grid(model, pairs[:1], sites=["mlp_out.1"])
    torch.testing.assert_close(grid.effects[-2:, 0], single.effects[-2:, 0], atol=1e-6, rtol=1e-5)


def test_what_can_not_be_patched_is_refused() -> None:
    model, pairs = tiny()
    low = of_site("resid_post.0", lambda x, _: x.sum((1, 2)), "sum")
    with pytest.raises(MismatchError, match=r"mlp_out\.2.*does not reach|reads at resid_post\.0"):
        circuits.patch_grid(model, pairs, low, sites=["mlp_out.2"])
    some = circuits.patch_grid(model, pairs, low, sites=["mlp_out"])
    assert {str(cell.site) for cell in some.cells} == {"mlp_out.0"} and "mlp_out.1, mlp_out.2" in some.note
    one_sided = Pairs.of(model, clean=["the dog"], answers=["a"])
    with pytest.raises(InvalidInputError, match="no counterparts"):
        circuits.patch_grid(model, one_sided)
    with pytest.raises(InvalidInputError, match="no vector per token"):
        circuits.patch_grid(model, pairs, sites=["pattern.0"])
    with pytest.raises(DegenerateInputError, match="at least one site"):
        circuits.patch_grid(model, pairs, sites=[])


def linear() -> Model:
    """A GPT-2 without norms, with uniform attention and linear MLPs: everything it does to the stream is linear."""
    hf = tiny_hf("gpt2").double()
    for block in hf.transformer.h:
        block.ln_1, block.ln_2, block.mlp.act = nn.Identity(), nn.Identity(), nn.Identity()
        block.attn.c_attn.weight[:, :32] = 0
        block.attn.c_attn.bias[:32] = 0
        for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            part.weight.mul_(0.5)
    hf.transformer.ln_f = nn.Identity()
    return Model(hf, tiny_tokenizer(), name="linear")


def test_direct_paths_of_all_senders_of_a_linear_net_add_to_the_total() -> None:
    model = linear()
    pairs = Pairs.of(model, clean=CLEAN, patch=PATCH, answers=ANSWERS)
    senders = ["resid_pre.0", "z.*.h*", "mlp_out"]
    direct = circuits.path_patch(model, pairs, senders=senders, freeze_mlps=True)
    total = sum(path.effect for path in direct.paths)
    torch.testing.assert_close(total, direct.totals, atol=1e-9, rtol=1e-9)
    for path in direct.paths:
        torch.testing.assert_close(path.linear, path.effect, atol=1e-9, rtol=1e-9)
    through = circuits.path_patch(model, pairs, senders=senders)  # what goes through MLPs is counted twice
    assert float((sum(path.effect for path in through.paths) - through.totals).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_path_is_two_runs_written_out(family: str) -> None:
    model, pairs = tiny(family)
    assert pairs.patch is not None
    sites = model.site_map
    found = circuits.path_patch(model, pairs, senders=["z.0.h1"], receivers=["q.2.h1", "k.2.h0", "mlp_out.1", "logits"])
    clean = {site: model.capture(pairs.clean, [site])[site] for site in ("z.0", "z.1", "z.2")}
    other = model.capture(pairs.patch, ["z.0"])["z.0"]

    def sends(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 1] = torch.where(pairs.changed()[..., None], other[:, :, 1], x[:, :, 1])
        return x

    ends = {"q.2.h1": "q.2", "k.2.h0": "k.2", "mlp_out.1": "mlp_out.1", "logits": "resid_post.2"}
    for path in found.paths:
        read: list[Tensor] = []
        first = [
            (sites[ends[path.receiver]], lambda x, read=read: read.append(x.clone())),
            (sites["z.0"], sends), (sites["z.1"], lambda _: clean["z.1"]), (sites["z.2"], lambda _: clean["z.2"]),
        ]  # fmt: skip
        with torch.no_grad(), attached(first):
            model.hf(pairs.clean.ids)

        def second(x: Tensor, _: Tensor, path: Path = path, read: list[Tensor] = read) -> Tensor:
            head = model.resolve(path.receiver).head if path.receiver != "logits" else None
            if head is None:
                return read[0]
            x[:, :, head] = read[0][:, :, head]
            return x

        want = hooked(model, pairs, ends[path.receiver], second)
        torch.testing.assert_close(path.effect, want, atol=1e-6, rtol=1e-5)
        assert float(want.abs().max()) > 1e-6
    frame = found.frame()
    assert frame.input.tolist() == ["key", "residual stream", "MLP input", "query"]
    assert {"sender", "receiver", "effect", "linear_estimate", "ci_low", "ci_high", "control", "n"} <= set(frame)
    assert "class=" in found._repr_html_() and n_hooks(model.hf) == 0


def test_paths_that_go_nowhere_are_left_out_and_said() -> None:
    model, pairs = tiny()
    found = circuits.path_patch(model, pairs, senders=["z.1.h0"], receivers=["q.0.h0", "logits"])
    assert [path.receiver for path in found.paths] == ["logits"] and "1 path left out" in found.note
    with pytest.raises(DegenerateInputError, match="behind a sender"):
        circuits.path_patch(model, pairs, senders=["z.1.h0"], receivers=["q.0.h0"])
    with pytest.raises(InvalidInputError, match="not at the logits"):
        circuits.path_patch(model, pairs, of_site("resid_post.1", lambda x, _: x.sum((1, 2))), senders=["z.0.h0"])


# A stopped call.


def test_a_grid_that_was_stopped_continues_at_the_site_that_is_missing(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pairs = tiny("gpt2")
    sites = ["resid_pre.1", "resid_pre.2", "z.1"]
    wanted = circuits.patch_grid(model, pairs, sites=sites, align="end")
    calls, real = [0], patch_grid._Runs._fill

    def stops(self: patch_grid._Runs, *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(patch_grid._Runs, "_fill", stops)
    with Keeper.open(tmp_path, {}) as keep:
        with pytest.raises(KeyboardInterrupt):
            circuits.patch_grid(model, pairs, sites=sites, align="end", keep=keep)
        n_kept = len(keep.done())
        found = circuits.patch_grid(model, pairs, sites=sites, align="end", keep=keep)
        n_all = len(keep.done())
        again = circuits.patch_grid(model, pairs, sites=sites, align="end", keep=keep)
    assert n_kept == 1 and calls[0] == 1 + n_all, "no part was made twice, but for the one that was stopped"
    for grid in (found, again):
        assert torch.equal(grid.effects, wanted.effects) and torch.equal(
            grid.control.nan_to_num(), wanted.control.nan_to_num()
        )


def test_scores_of_heads_that_were_stopped_continue_at_the_layer_that_is_missing(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    options: dict[str, Any] = {"repeated": 9, "sequences": 1, "tokens": 20}
    wanted = circuits.head_scores(model, **options)
    torch.manual_seed(1)
    assert circuits.head_scores(model, **options).scores == wanted.scores, "its seed alone decides"
    layers, real = list[int](), head_scores._of_layer

    def stops(layer: int, *args: Any) -> Any:
        layers.append(layer)
        if len(layers) == 2:
            raise KeyboardInterrupt
        return real(layer, *args)

    monkeypatch.setattr(head_scores, "_of_layer", stops)
    with Keeper.open(tmp_path, {}) as keep:
        with pytest.raises(KeyboardInterrupt):
            circuits.head_scores(model, **options, keep=keep)
        found = circuits.head_scores(model, **options, keep=keep)
    assert layers == [0, 1, 1, 2] and found.scores == wanted.scores
