from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits.decomposition import bases as checked_bases
from circuits.metrics import LossOfMargin
from circuits.nodes.attribute import node_effects
from circuits.nodes.exact import exact_effects, linear_effects
from circuits.nodes.runs import AttributionOptions
from tests.circuits.planted import PlantedSAE
from tests.interventions.builders import ARCHITECTURES, NORMALISATIONS, sae_lens_sae
from tests.tiny import D_MODEL, as_user, tiny_model
from workbench.bases.sae import as_basis
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ShapeError
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import attached
from workbench.models.model import Model
from workbench.probes.linear import Probe, mean_pool

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
    keep = TokenPolicy.of_batch(batch).kept(batch)
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


def _exact(
    model: Model, site: str, sae: Any, batch: TokenBatch, metric: Any, some: Sequence[int], keep: Tensor
) -> Tensor:
    found = exact_effects(model, {site: sae}, batch, metric, {site: list(some)}, keep=keep)
    return found[site].effect[list(some)]


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
    one_by_one = _exact(model, "resid_post.1", sae, batch, metric, range(24), keep)
    torch.testing.assert_close(truth.effect, one_by_one, atol=1e-5, rtol=1e-4)
    for options in (
        AttributionOptions(method="atp"),
        AttributionOptions(steps=1),
        AttributionOptions(steps=7, batch_size=2),
    ):
        found = node_effects(model, {"resid_post.1": sae}, batch, metric, keep=keep, **vars(options))["resid_post.1"]
        torch.testing.assert_close(found.effect, truth.effect, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.se, truth.se, atol=1e-5, rtol=1e-4)
        assert found.gap < 1e-3 and float(found.total.mean()) == pytest.approx(float(truth.total.mean()), abs=1e-5)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_sae_has_the_effects_that_zeroing_its_features_has(architecture: str, normalisation: str) -> None:
    model, batch, keep, metric = _setup("resid_post.1")
    sae = sae_lens_sae(architecture, normalisation)
    x = model.capture(batch, ["resid_post.1"])["resid_post.1"]
    pooled = torch.stack([as_basis(sae).coefficients(row[k]).mean(0) for row, k in zip(x, keep, strict=True)])
    linear = linear_effects(pooled, sae, metric.probe, metric.labels).effect
    options = AttributionOptions(steps=1)  # exact: the metric is linear
    estimated = node_effects(model, {"resid_post.1": sae}, batch, metric, keep=keep, **vars(options))["resid_post.1"]
    # sae_lens itself: one feature less, decoded in the state that encoding the same tokens leaves
    sign = torch.tensor([-1.0, 1.0, 1.0])
    some, truth = list(range(0, 40, 4)), torch.zeros(10)
    for i, f in enumerate(some):
        for row, k, s in zip(x, keep, sign, strict=True):
            kept = sae.decode(acts := sae.encode(row[k]))
            sae.encode(row[k])
            changed = sae.decode(acts.index_fill(1, torch.tensor([f]), 0.0))
            truth[i] -= s * ((changed - kept).mean(0) @ metric.probe.w) / 3
    one_by_one = _exact(model, "resid_post.1", sae, batch, metric, some[:4], keep)
    assert truth[:4].norm() > 0.01
    for found, wanted in ((linear[some], truth), (estimated.effect[some], truth), (one_by_one, truth[:4])):
        assert (found - wanted).norm() < 1e-5 * truth.norm()


def _spliced(
    model: Model, batch: TokenBatch, keep: Tensor, sae: Any, metric: LossOfMargin, baseline: str, steps: int
) -> Tensor:
    """Integrated gradients the slow way: the SAE in the graph, features and error interpolated as leaves."""
    point = model.site_map["resid_post.0"]
    clean = model.capture(batch, ["resid_post.0"])["resid_post.0"][keep]
    f = sae.encode(clean)
    eps = clean - sae.decode(f)
    effect = torch.zeros(f.shape)
    error = 0.0
    for k in range(steps):
        a = 1 - (k + 0.5) / steps
        leaf = (a * f).requires_grad_(True)
        rest = (eps if baseline == "zero_keep_error" else a * eps).detach().requires_grad_(True)

        def write(x: Tensor, leaf: Tensor = leaf, rest: Tensor = rest) -> Tensor:
            out = x.clone()
            sae.encode(clean)  # a normalising SAE decodes in the scale of what it encoded last
            out[keep] = sae.decode(leaf) + rest
            return out

        with attached([(point, write)]):
            read = model.capture(batch, [metric.site], grad=True)[metric.site]
        grads = torch.autograd.grad(metric(read, torch.arange(3)).sum(), (leaf, rest))
        effect += grads[0] * -f / steps
        error += 0.0 if baseline == "zero_keep_error" else float((grads[1] * -eps).sum()) / steps
    return torch.cat([effect.sum(0) / 3, torch.tensor([error / 3])])


@pytest.mark.parametrize("baseline", ["zero", "zero_keep_error"])
@pytest.mark.parametrize("kind", ["planted", *NORMALISATIONS])
def test_gradients_in_activation_space_equal_those_through_the_spliced_sae(baseline: str, kind: str) -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    sae, steps = _sae() if kind == "planted" else sae_lens_sae("topk_rescaled", kind), 4
    options = AttributionOptions(steps=steps, baseline=baseline, batch_size=2)  # type: ignore[arg-type]
    found = node_effects(model, {"resid_post.0": sae}, batch, metric, keep=keep, **vars(options))["resid_post.0"]
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
        found = node_effects(model, {"resid_post.1": _sae()}, batch, metric, keep=keep, **vars(options))["resid_post.1"]
        return abs(float(found.effect.sum()) + found.error - float(found.total.mean()))

    assert miss(1) / miss(2) == pytest.approx(4.0, rel=0.02)
    assert miss(2) / miss(4) == pytest.approx(4.0, rel=0.05)


def test_zero_ends_at_the_decoder_bias_and_without_the_error_the_sum_is_wrong() -> None:
    model, batch, keep, metric = _setup("resid_post.1")
    sae = _sae()
    options = AttributionOptions(baseline="zero")
    found = node_effects(model, {"resid_post.1": sae}, batch, metric, keep=keep, **vars(options))["resid_post.1"]
    x = model.capture(batch, ["resid_post.1"])["resid_post.1"].clone()
    before = metric(x, torch.arange(3))
    x[keep] = sae.b_dec
    assert float(found.total.mean()) == pytest.approx(float((metric(x, torch.arange(3)) - before).mean()), abs=1e-4)
    assert float(found.effect.sum()) + found.error == pytest.approx(float(found.total.mean()), abs=1e-4)
    assert abs(found.error) > 0.01


def test_integrated_gradients_are_complete_where_one_gradient_is_not() -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    gaps = {
        method: node_effects(model, {"resid_post.0": _sae()}, batch, metric, keep=keep, method=method, steps=20)[
            "resid_post.0"
        ].gap
        for method in ("ig", "atp")
    }
    assert gaps["ig"] < 0.05 < gaps["atp"]


def test_a_row_does_not_depend_on_its_batch_and_masks_are_left_alone() -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    before = keep.clone()

    def run(size: int) -> Tensor:
        options = AttributionOptions(steps=3, batch_size=size)
        return node_effects(model, {"resid_post.0": _sae()}, batch, metric, keep=keep, **vars(options))[
            "resid_post.0"
        ].effect

    torch.testing.assert_close(run(1), run(3), atol=1e-5, rtol=1e-4)
    assert torch.equal(keep, before)


@pytest.mark.parametrize(
    ("family", "site", "read", "where"),
    [
        ("llama", "resid_post.1", "resid_post.0", "below"),
        ("llama", "mlp_out.1", "resid_mid.1", "below"),
        ("llama", "q.1", "k.1", "beside"),
        ("neox", "attn_out.1", "mlp_out.1", "beside"),
        ("neox", "mlp_out.1", "attn_out.1", "below"),
    ],
)
def test_a_metric_that_no_feature_reaches_is_refused(family: str, site: str, read: str, where: str) -> None:
    model = tiny_model(family)
    batch = model.tokens(TEXTS)
    metric = Power(torch.ones(model.width(read)), TokenPolicy.of_batch(batch).kept(batch), 1, read)
    sae = sae_lens_sae(d_in=model.width(site))
    for effects in (
        lambda: node_effects(model, {site: sae}, batch, metric, keep=metric.keep),
        lambda: _exact(model, site, sae, batch, metric, [0], metric.keep),
    ):
        with pytest.raises(MismatchError, match=f"The metric reads {read}, {where} the SAE at {site}: no feature"):
            effects()


def test_a_metric_that_does_not_depend_on_what_it_reads_is_refused_in_words() -> None:
    model, batch, keep, _ = _setup("resid_post.2")

    class Detached(Power):
        def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
            return super().__call__(x.detach(), rows)

    with pytest.raises(MismatchError, match=r"does not depend on resid_post\.1"):
        node_effects(
            model, {"resid_post.1": _sae()}, batch, Detached(torch.ones(D_MODEL), keep, 1, "resid_post.2"), keep=keep
        )


def test_saes_of_another_kind_site_or_width_are_refused() -> None:
    model, batch, keep, metric = _setup("resid_post.2")
    transcoder, moved = sae_lens_sae(), sae_lens_sae()
    transcoder.cfg.metadata.hook_name, transcoder.cfg.metadata.hook_name_out = "resid_mid.1", "mlp_out.1"
    assert list(checked_bases(model, {"resid_mid.1": transcoder})) == ["mlp_out.1"], "its nodes are where it writes"
    moved.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"resid_post.1": transcoder}, MismatchError, "reads resid_mid.1 and writes mlp_out.1"),
        ({"resid_post.1": moved}, MismatchError, "trained at resid_post.0"),
        ({"resid_post.1": sae_lens_sae(d_in=D_MODEL + 1)}, ShapeError, "width 17"),
        ({"resid_post.1": _sae(), "resid_post.-2": _sae()}, MismatchError, "has an SAE already"),
        ({"resid_post.1": torch.nn.Linear(2, 2)}, InvalidInputError, "'resid_post.1' is Linear; give .* an SAE"),
        ({}, DegenerateInputError, "no SAE was given"),
    )
    for bases, error, words in cases:
        with as_user(), pytest.raises(error, match=words):
            node_effects(model, bases, batch, metric, keep=keep)


def test_an_empty_mask_and_features_that_do_not_exist_are_refused_and_one_row_has_no_error() -> None:
    model, batch, keep, metric = _setup("resid_post.1")
    sae = _sae()
    for baseline in ("zero", "zero_keep_error", "mean"):
        options = AttributionOptions(baseline=baseline)  # type: ignore[arg-type]
        with pytest.raises(DegenerateInputError, match="node_effects: the mask keeps no token"):
            node_effects(model, {"resid_post.1": sae}, batch, metric, keep=keep & False, **vars(options))
    for features, mask, error, words in (
        ([-1], keep, InvalidInputError, "Feature -1 does not exist"),
        ([24], keep, InvalidInputError, "Feature 24 does not exist"),
        ([0], keep & False, DegenerateInputError, "exact_effects: the mask keeps no token"),
        ([0], keep[:, 1:], ShapeError, "exact_effects: keep .* must be alike"),
    ):
        with as_user(), pytest.raises(error, match=words):
            _exact(model, "resid_post.1", sae, batch, metric, features, mask)
    for labels in (metric.labels[:1], metric.labels[:2]):
        with as_user(), pytest.raises(ShapeError, match=f"{len(labels)} labels for 3 rows"):
            linear_effects(torch.ones(3, 24), sae, metric.probe, labels)
    one = linear_effects(torch.ones(1, 24), sae, metric.probe, torch.tensor([1]))
    assert bool(one.se.isnan().all()) and bool(one.effect.isfinite().all())
