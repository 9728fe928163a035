from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from circuits.attribution import AttributionOptions, LossOfMargin, exact_effects, linear_effects, node_effects
from tests.circuits.planted import PlantedSAE
from tests.tiny import D_MODEL, tiny_model
from workbench.errors import MismatchError
from workbench.hooks.attach import attached
from workbench.models.model import Model
from workbench.probes.linear import Probe, mean_pool, readable_tokens
from workbench.tokens import TokenBatch

TEXTS = ["abcdefgh", "ijk", "lmnopq"]


def _sae(seed: int = 0, d_sae: int = 24) -> PlantedSAE:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_sae, D_MODEL, generator=generator)
    return PlantedSAE(
        decoder.T * 0.3, decoder / decoder.norm(dim=1, keepdim=True), 0.1 * torch.randn(D_MODEL, generator=generator)
    )


def _setup(read: str) -> tuple[Model, TokenBatch, Tensor, LossOfMargin]:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    keep = readable_tokens(batch)
    probe = Probe(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)), 0.3, read)
    return model, batch, keep, LossOfMargin(probe, torch.tensor([0, 1, 1]), keep)


@dataclass(frozen=True, eq=False)
class Power:
    """Mean over tokens of the p-th power of a projection: curved, with a known integral."""

    w: Tensor
    keep: Tensor
    p: int
    site: str

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        return mean_pool((x @ self.w)[..., None] ** self.p, self.keep[rows])[:, 0]


def test_linear_metric_makes_every_method_exact() -> None:
    model, batch, keep, metric = _setup("resid_post.1")
    sae = _sae()
    acts = torch.stack(
        [
            sae.encode(x[k]).mean(0)
            for x, k in zip(model.capture(batch, ["resid_post.1"])["resid_post.1"], keep, strict=True)
        ]
    )
    truth = linear_effects(acts, sae, metric.probe, metric.labels)
    one_by_one = exact_effects(model, "resid_post.1", sae, batch, metric, range(24), keep=keep)
    torch.testing.assert_close(truth.effect, one_by_one, atol=1e-5, rtol=1e-4)
    for options in (
        AttributionOptions(method="atp"),
        AttributionOptions(steps=1),
        AttributionOptions(steps=7, batch_size=2),
    ):
        found = node_effects(model, {"resid_post.1": sae}, batch, metric, keep=keep, options=options)["resid_post.1"]
        torch.testing.assert_close(found.effect, truth.effect, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.se, truth.se, atol=1e-5, rtol=1e-4)
        assert found.gap < 1e-3 and found.total == pytest.approx(truth.total, abs=1e-5)


def _spliced(
    model: Model, batch: TokenBatch, keep: Tensor, sae: PlantedSAE, metric: LossOfMargin, baseline: str, steps: int
) -> Tensor:
    """Integrated gradients the slow way: the SAE in the graph, features and error interpolated as leaves."""
    point = model.site_map["resid_post.0"]
    clean = model.capture(batch, ["resid_post.0"])["resid_post.0"][keep]
    f = sae.encode(clean)
    eps = clean - f @ sae.W_dec - sae.b_dec
    effect = torch.zeros(f.shape)
    error = 0.0
    for k in range(steps):
        a = 1 - (k + 0.5) / steps
        leaf = (a * f).requires_grad_(True)
        rest = (eps if baseline == "zero_keep_error" else a * eps).detach().requires_grad_(True)

        def write(x: Tensor, leaf: Tensor = leaf, rest: Tensor = rest) -> Tensor:
            out = x.clone()
            out[keep] = leaf @ sae.W_dec + sae.b_dec + rest
            return out

        with attached([(point, write)]):
            read = model.capture(batch, [metric.site], grad=True)[metric.site]
        grads = torch.autograd.grad(metric(read, torch.arange(3)).sum(), (leaf, rest))
        effect += grads[0] * -f / steps
        error += 0.0 if baseline == "zero_keep_error" else float((grads[1] * -eps).sum()) / steps
    return torch.cat([effect.sum(0) / 3, torch.tensor([error / 3])])


@pytest.mark.parametrize("baseline", ["zero", "zero_keep_error"])
def test_gradients_in_activation_space_equal_those_through_the_spliced_sae(baseline: str) -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    sae, steps = _sae(), 4
    options = AttributionOptions(steps=steps, baseline=baseline, batch_size=2)  # type: ignore[arg-type]
    found = node_effects(model, {"resid_post.0": sae}, batch, metric, keep=keep, options=options)["resid_post.0"]
    expected = _spliced(model, batch, keep, sae, metric, baseline, steps)
    torch.testing.assert_close(torch.cat([found.effect, torch.tensor([found.error])]), expected, atol=2e-5, rtol=1e-3)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("baseline", ["zero", "zero_keep_error", "mean"])
def test_the_gap_closes_with_the_square_of_the_steps(baseline: str) -> None:
    # The midpoint rule on a cubic is off by a constant over N squared; a one-sided rule would only halve.
    model, batch, keep, _ = _setup("resid_post.1")
    metric = Power(torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5)), keep, 3, "resid_post.1")

    def miss(steps: int) -> float:
        options = AttributionOptions(steps=steps, baseline=baseline)  # type: ignore[arg-type]
        found = node_effects(model, {"resid_post.1": _sae()}, batch, metric, keep=keep, options=options)["resid_post.1"]
        return abs(float(found.effect.sum()) + found.error - found.total)

    assert miss(1) / miss(2) == pytest.approx(4.0, rel=0.02)
    assert miss(2) / miss(4) == pytest.approx(4.0, rel=0.05)


def test_zero_ends_at_the_decoder_bias_and_without_the_error_the_sum_is_wrong() -> None:
    model, batch, keep, metric = _setup("resid_post.1")
    sae = _sae()
    options = AttributionOptions(baseline="zero")
    found = node_effects(model, {"resid_post.1": sae}, batch, metric, keep=keep, options=options)["resid_post.1"]
    x = model.capture(batch, ["resid_post.1"])["resid_post.1"].clone()
    before = metric(x, torch.arange(3))
    x[keep] = sae.b_dec
    assert found.total == pytest.approx(float((metric(x, torch.arange(3)) - before).mean()), abs=1e-4)
    assert float(found.effect.sum()) + found.error == pytest.approx(found.total, abs=1e-4)
    assert abs(found.error) > 0.01


def test_integrated_gradients_are_complete_where_one_gradient_is_not() -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    gaps = {
        method: node_effects(
            model,
            {"resid_post.0": _sae()},
            batch,
            metric,
            keep=keep,
            options=AttributionOptions(method=method, steps=20),
        )["resid_post.0"].gap
        for method in ("ig", "atp")
    }
    assert gaps["ig"] < 0.05 < gaps["atp"]


def test_a_row_does_not_depend_on_its_batch_and_masks_are_left_alone() -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    before = keep.clone()

    def run(size: int) -> Tensor:
        options = AttributionOptions(steps=3, batch_size=size)
        return node_effects(model, {"resid_post.0": _sae()}, batch, metric, keep=keep, options=options)[
            "resid_post.0"
        ].effect

    torch.testing.assert_close(run(1), run(3), atol=1e-5, rtol=1e-4)
    assert torch.equal(keep, before)


def test_a_metric_below_the_sae_is_refused() -> None:
    model, batch, keep, metric = _setup("resid_post.0")
    with pytest.raises(MismatchError, match="below the SAE"):
        node_effects(model, {"resid_post.1": _sae()}, batch, metric, keep=keep)
