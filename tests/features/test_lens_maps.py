"""Lenses with a map per site: Jacobians are exact, regressions optimal, controls at chance, files say what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.features.lenstoys import exact, linear_model, mixed_rows, random_linear, token_rows
from tests.tiny import D_MODEL, n_hooks, tiny_hf, tiny_model, tiny_tokenizer
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.tokens import TokenBatch
from workbench.features import TunedOptions
from workbench.features.lenses import fitting
from workbench.features.lenses import jacobian as jacobians
from workbench.features.lenses import tuned as tuning
from workbench.features.lenses.products import ColumnProducts, RowProducts
from workbench.features.lenses.regression import fit_regression
from workbench.models.model import Model

EYE = torch.eye(D_MODEL, dtype=torch.double)
SITES = ("resid_post.0", "resid_post.1")


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# The Jacobian.


def test_without_attention_it_is_the_product_of_the_blocks() -> None:
    model, (_, a1, a2) = random_linear()
    lens = wb.fit_lens(model, "jacobian", mixed_rows(), skip_first=2)
    assert worst(lens.weights["resid_post.1"], EYE + a2) < 1e-12
    assert worst(lens.weights["resid_post.0"], (EYE + a2) @ (EYE + a1)) < 1e-12
    assert worst((EYE + a2) @ (EYE + a1), (EYE + a1) @ (EYE + a2)) > 0.1, "the order of the product can be seen"
    assert n_hooks(model.hf) == 0


def test_where_blocks_write_nothing_it_is_the_logit_lens_bit_for_bit() -> None:
    model = linear_model(*torch.zeros(3, D_MODEL, D_MODEL))
    lens = wb.fit_lens(model, "jacobian", mixed_rows(), skip_first=2)
    read = lens.read(model, "a dog", positions=None)
    assert all(torch.equal(weight, EYE) for weight in lens.weights.values())
    for name in ("logprobs", "ids", "entropy", "kl"):
        assert torch.equal(getattr(read.readings["jacobian"], name), getattr(read.readings["logit"], name))


def _by_hand(model: Model, row: Tensor, skip: int) -> Tensor:
    """d h_L[target] / d h_0[source] from one Jacobian of the upper blocks: (target, d, source, d)."""
    segment = model.segment(row[None], "resid_post.0", "resid_post.2")
    run = lambda x: segment.run(x[None]).acts["resid_post.2"][0]  # noqa: E731
    return torch.autograd.functional.jacobian(run, segment.x[0])


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_rows_and_columns_are_those_of_the_definition(family: str) -> None:
    model, row, skip = exact(family), mixed_rows().rows()[1], 2
    whole = _by_hand(model, row, skip)
    counted = range(skip, len(row) - 1)
    wanted = sum(whole[t, :, s] for s in counted for t in counted) / len(counted)
    future = max(float(whole[t, :, s].abs().max()) for s in range(len(row)) for t in range(s))
    assert future == 0, "no activation depends on a later token"
    batch = TokenBatch.of_rows(row[None])
    rows = RowProducts(model, batch, ["resid_post.0"], "resid_post.2", skip)
    columns = ColumnProducts(model, batch, "resid_post.0", "resid_post.2", skip)
    assert worst(torch.cat([rows.of(u[None])["resid_post.0"] for u in EYE]), wanted) < 1e-12
    assert worst(torch.cat(list(columns.of(EYE, "forward"))).T, wanted) < 1e-12
    off = worst(torch.cat(list(columns.of(EYE, "difference"))).T, wanted)
    assert 1e-9 < off < 2e-3 * float(wanted.norm())
    counted = range(len(row) - 1)
    assert worst(sum(whole[t, :, s] for s in counted for t in counted) / len(counted), wanted) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
def test_rows_products_and_the_whole_fit_agree_in_every_family(family: str) -> None:
    model = tiny_model(family)
    lens = wb.jacobian_lens(model, mixed_rows(), skip_first=2)
    whole, h = lens.fit(dim_batch=16), torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0))
    directions, wanted = lens.rows(["x", 7]), whole.rows(model, ["x", 7])
    for site in SITES:
        torch.testing.assert_close(directions.vectors[site], wanted.vectors[site], atol=2e-5, rtol=2e-5)
        product, halves = lens.apply(site, h)
        torch.testing.assert_close(product, whole.apply(site, h), atol=2e-4, rtol=2e-4)
        assert halves is not None and directions.halves is not None and whole.halves is not None
        for i in (0, 1):
            torch.testing.assert_close(halves[i], whole.halves[i].apply(site, h), atol=2e-4, rtol=2e-4)
            half = whole.halves[i].rows(model, ["x", 7]).vectors[site]
            torch.testing.assert_close(directions.halves[i][site], half, atol=2e-5, rtol=2e-5)
    unembedding = model.hf.get_output_embeddings().weight[[89, 7]]
    torch.testing.assert_close(wanted.vectors[SITES[0]], unembedding @ whole.weights[SITES[0]])


def test_batches_padding_and_halves_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact()
    lens = wb.jacobian_lens(model, mixed_rows(), skip_first=2)
    whole = lens.fit(dim_batch=16)
    other = lens.fit(dim_batch=3)
    alone = [wb.fit_lens(model, "jacobian", TokenBatch.of_rows(row[None]), skip_first=2) for row in mixed_rows().rows()]
    assert whole.halves is not None and [half.n_fit for half in whole.halves] == [2, 2]
    for site in SITES:
        each = torch.stack([one.weights[site] for one in alone])
        assert worst(other.weights[site], whole.weights[site]) < 1e-12
        assert worst(each.mean(0), whole.weights[site]) < 1e-12, "the mean is over prompts, not over tokens"
        assert worst(each[::2].mean(0), whole.halves[0].weights[site]) < 1e-12
        assert worst(each[1::2].mean(0), whole.halves[1].weights[site]) < 1e-12
    directions = lens.rows(["x"])
    monkeypatch.setattr(jacobians, "_ROWS", 3)  # odd, so that halves must be counted over batches
    again = lens.rows(["x"])
    assert directions.halves is not None and again.halves is not None
    for i in (0, 1):
        assert worst(directions.halves[i][SITES[0]], again.halves[i][SITES[0]]) < 1e-12
    h = torch.randn(1, D_MODEL, dtype=torch.double)
    _, halves = lens.apply(SITES[0], h)
    assert halves is not None and worst(halves[1], whole.halves[1].apply(SITES[0], h)) < 1e-12


def test_at_the_last_block_of_an_rms_model_the_prompts_own_map_returns_the_activation() -> None:
    """The map from behind attention to the output is homogeneous there, so its derivative at x along x is x's image."""
    model = tiny_model("llama")
    batch = TokenBatch.of_rows(mixed_rows().rows()[0][None, :2])
    acts = model.capture(batch, ["resid_mid.2", "mlp_out.2", "resid_post.2", "resid_pre.2"])

    def image(site: str) -> tuple[Tensor, Tensor]:
        x = acts[site][:, 0]
        (found,) = ColumnProducts(model, batch, site, "resid_post.2", 0).of(x, "forward")
        return x, found

    x, found = image("resid_mid.2")
    # an RMS norm forgets the length of x, so that the MLP's output does not change along it
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)
    assert worst(found, acts["resid_post.2"][:, 0]) > 0.1
    x, found = image("resid_pre.2")
    assert worst(found, x) > 0.05, "attention reads it too"


def test_a_fit_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact()
    lens = wb.jacobian_lens(model, mixed_rows(), skip_first=2)
    wanted = lens.fit(tmp_path / "whole")
    calls, real = [0], jacobians.RowProducts.of

    def stops(self: RowProducts, u: Tensor) -> dict[str, Tensor]:
        calls[0] += 1
        if calls[0] == 6:  # in the middle of the third prompt
            raise KeyboardInterrupt
        return real(self, u)

    monkeypatch.setattr(jacobians.RowProducts, "of", stops)
    with pytest.raises(KeyboardInterrupt):
        lens.fit(tmp_path / "part")
    calls[0] = 100
    found = lens.fit(tmp_path / "part")
    assert calls[0] == 104, "two prompts of two passes each were left"
    assert all(torch.equal(found.weights[s], wanted.weights[s]) and found.norms[s] == wanted.norms[s] for s in SITES)
    fewer = wb.jacobian_lens(model, mixed_rows()[:3], skip_first=2).fit(tmp_path / "grows")
    more = lens.fit(tmp_path / "grows")
    assert calls[0] == 104 + 6 + 2 and fewer.n_fit == 3
    assert all(torch.equal(more.weights[s], wanted.weights[s]) for s in SITES)
    with pytest.raises(MismatchError, match="not the first of these"):
        wb.jacobian_lens(model, token_rows(6, 6, 6, 6, seed=5), skip_first=2).fit(tmp_path / "grows")
    with pytest.raises(MismatchError, match="skip"):
        wb.jacobian_lens(model, mixed_rows(), skip_first=3).fit(tmp_path / "grows")


def test_what_a_jacobian_lens_can_not_do_is_refused() -> None:
    model = exact()
    with pytest.raises(DegenerateInputError, match="needs rows of 18 tokens"):
        wb.jacobian_lens(model, mixed_rows())
    assert wb.jacobian_lens(model, token_rows(9, 20)).dropped == 1
    with pytest.raises(InvalidInputError, match="leads to"):
        wb.jacobian_lens(model, mixed_rows(), sites=["resid_post"], skip_first=2)
    with pytest.raises(MismatchError, match="residual stream"):
        wb.fit_lens(model, "regression", mixed_rows(), sites=["z.0"])
    with pytest.raises(InvalidInputError, match="fitted on text"):
        wb.fit_lens(model, "tuned")
    half = Model(tiny_hf("gpt2").bfloat16(), tiny_tokenizer())
    with pytest.raises(InvalidInputError, match="mostly rounding"):
        wb.jacobian_lens(half, mixed_rows(), skip_first=2).apply(SITES[0], torch.ones(1, D_MODEL), "difference")
    estimate = wb.jacobian_lens(model, mixed_rows(), skip_first=2).estimate()
    assert estimate.disk_bytes == 5 * 2 * D_MODEL**2 * 4 and estimate.seconds > 0


# Regression and tuned lenses.


def test_a_regression_finds_the_map_of_a_linear_model_and_else_the_least_squares_one() -> None:
    model, (_, a1, a2) = random_linear()
    rows = token_rows(*[12] * 12)
    lens = wb.fit_lens(model, "regression", rows)
    assert worst(lens.weights["resid_post.0"], (EYE + a2) @ (EYE + a1)) < 1e-8
    assert worst(lens.biases["resid_post.0"], torch.zeros(D_MODEL)) < 1e-7
    model = exact()
    acts = model.capture(rows, ["resid_post"])
    keep = torch.ones_like(rows.ids, dtype=torch.bool)
    keep[:, 0] = False
    x, y = (acts[site][keep] for site in ("resid_post.0", "resid_post.2"))
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], 1), y).solution
    lens = fit_regression(model, rows, SITES, ridge=0.0)
    assert lens.n_fit == len(x)
    assert worst(lens.weights["resid_post.0"], wanted[:-1].T) < 1e-6 > worst(lens.biases["resid_post.0"], wanted[-1])
    with pytest.raises(DegenerateInputError, match="more tokens"):
        wb.fit_lens(model, "regression", token_rows(9))


def test_with_few_tokens_held_out_rows_choose_a_penalty() -> None:
    lens = wb.fit_lens(exact(), "regression", token_rows(*[5] * 6))
    assert all(ridge > 0 for ridge in lens.recipe["ridge"].values())
    assert all(0 < fvu < 1.5 for fvu in lens.recipe["fvu"].values())


def test_a_tuned_lens_lowers_the_divergence_it_is_tuned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("gemma2"), token_rows(*[16] * 20)
    options = TunedOptions(steps=14, tokens=96, rate=0.1)
    lens = wb.fit_lens(model, "tuned", rows, options=options, out=tmp_path / "whole")
    before, after = (lens.recipe[name] for name in ("kl_before", "kl_after"))
    assert sum(after.values()) < sum(before.values())
    start = wb.fit_lens(model, "regression", rows[(torch.arange(20) % 10 != 9).nonzero()[:, 0]])
    for site in SITES:
        assert torch.equal(lens.weights[site], start.weights[site]) != (site in lens.recipe["refined"])
    far = wb.fit_lens(model, "tuned", rows, options=TunedOptions(steps=2, tokens=96, rate=50.0))
    assert all(far.recipe["kl_after"][site] > far.recipe["kl_before"][site] for site in SITES)
    assert far.recipe["refined"] == [] and all(torch.equal(far.weights[s], start.weights[s]) for s in SITES)
    real, steps = tuning._Refinement._step, [0]

    def stops(self: tuning._Refinement, state: tuning._State) -> tuple[tuning._State, float]:
        steps[0] += 1
        if steps[0] == 13:
            raise KeyboardInterrupt
        return real(self, state)

    monkeypatch.setattr(tuning._Refinement, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        wb.fit_lens(model, "tuned", rows, options=options, out=tmp_path / "part")
    monkeypatch.setattr(fitting, "fit_regression", None)  # the regression is kept too
    steps[0] = 100
    again = wb.fit_lens(model, "tuned", rows, options=options, out=tmp_path / "part")
    assert steps[0] == 104, "the first ten of 14 steps were kept"
    assert all(torch.equal(again.weights[s], lens.weights[s]) for s in SITES) and again.recipe == lens.recipe
    with pytest.raises(MismatchError, match="options"):
        wb.fit_lens(model, "tuned", rows, options=replace(options, steps=9), out=tmp_path / "part")


def test_a_step_is_that_of_torch() -> None:
    model, rows = exact(), token_rows(*[12] * 6)
    start = wb.fit_lens(model, "regression", rows)
    options = TunedOptions(steps=3, tokens=24, rate=0.05, clip=1e9)
    refine = tuning._Refinement(model, rows, options, wb.controls.TokenPolicy())
    site, state = SITES[0], tuning._State.start(start)
    values = [x.clone().requires_grad_(True) for x in state.values[site]]
    sgd = torch.optim.SGD(values, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 - step / 3)
    for step in range(3):
        acts, output = refine._tokens(refine._rows_of(step), SITES)
        sgd.zero_grad()
        mapped = acts[site] + acts[site] @ values[0].T + values[1]
        read = model.head.all(model.site_map["final_norm"].module(mapped))
        torch.nn.functional.kl_div(read.log_softmax(-1), output, log_target=True, reduction="batchmean").backward()
        sgd.step()
        schedule.step()
        state, _ = refine._step(state)
    assert worst(state.values[site][0], values[0].detach()) < 1e-9 > worst(state.values[site][1], values[1].detach())
    assert worst(state.values[site][0], start.weights[site] - EYE) > 1e-4


def test_a_store_of_activations_is_read_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    rows, sites = token_rows(*[16] * 20), [*SITES, "resid_post.2"]
    store = wb.harvest(model, wb.TokenRows(rows.ids), sites=sites, out=tmp_path)
    from_rows = wb.fit_lens(model, "regression", rows)
    with pytest.raises(MismatchError, match="was harvested from"):
        wb.fit_lens(exact("neox"), "regression", store)
    monkeypatch.setattr(Model, "capture", None)
    lens = wb.fit_lens(model, "regression", store)
    assert lens.n_fit == store.rows == from_rows.n_fit
    for site in SITES:
        x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0))
        near, far = lens.apply(site, x), x
        torch.testing.assert_close(from_rows.apply(site, x), near, atol=0.05, rtol=0.05)  # stored in bfloat16
        assert worst(near, far) > 0.3
