"""Values worked out by hand, and settings that must change nothing, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from tests.interventions.builders import bad_sae, golden, sae_lens_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.interventions.gates import CASTGate, CosineGate
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import Add, AddScaled, Affine, LowRank, Map, PerRow, ProjectOut
from workbench.interventions.replacing import Ablate, Patch, Replace
from workbench.interventions.saes import SAEAblate, SAEAdd, SAEAddMax, SAEClamp, SAEScale
from workbench.interventions.shapes import Cap, ClampProjection, NormPreserve, Rotate, Threshold

X = torch.tensor([[2.0, 1.0]])
E0, E1 = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
BELOW = torch.tensor([[-2.0, 1.0]])


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        # encoder clamp, error kept: x + (5 - 1.5) d0
        (SAEClamp(golden(), [0], 5.0), (5.5, 1.0)),
        # error dropped: dec(5, 1.5) = (5 + .9, 1.2)
        (SAEClamp(golden(), [0], 5.0, error="drop"), (5.9, 1.2)),
        # dense projection clamp: x + (5 - x.d) d
        (ClampProjection(E0, 5.0), (5.0, 1.0)),
        # AxBench: x - relu(x.d) d + 5 d
        (ClampProjection(E0, 5.0, "subspace"), (5.0, 1.0)),
        # a floor of 1 leaves 1.5 alone, where setting it to 1 does not
        (SAEClamp(golden(), [0], 1.0, mode="min"), (2.0, 1.0)),
        (SAEClamp(golden(), [0], 1.0), (1.5, 1.0)),
        (SAEClamp(golden(), [0], 1.0, mode="max"), (1.5, 1.0)),
        (SAEClamp(golden(), [0], 9.0, mode="max"), (2.0, 1.0)),
        # both at once: x + 3.5 d0 + 0 d1
        (SAEClamp(golden(), [0, 1], torch.tensor([5.0, 1.5])), (5.5, 1.0)),
        # scale: x + (3 - 1) 1.5 d1
        (SAEScale(golden(), [1], 3.0), (2 + 3 * 0.6, 1 + 3 * 0.8)),
        (SAEScale(golden(), [1], 3.0, error="drop"), (1.5 + 4.5 * 0.6, 4.5 * 0.8)),
        # ablate = scale 0
        (SAEAblate(golden(), [1]), (2 - 0.9, 1 - 1.2)),
        (SAEScale(golden(), [1], 0.0), (2 - 0.9, 1 - 1.2)),
        (SAEAdd(golden(), [0, 1], torch.tensor([1.0, 2.0])), (2 + 1 + 1.2, 1 + 1.6)),
        (SAEAdd(golden(), [0], 1.0, error="drop"), (3.4, 1.2)),
        # cap: x - relu(x.d - 1.5) d
        (Cap(E0, 1.5), (1.5, 1.0)),
        # x . d1 = 2, so 7 - 2 is missing
        (ClampProjection(E1, 7.0), (2 + 5 * 0.6, 1 + 5 * 0.8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Op) else "",
)
def test_clamps_scales_and_caps_give_the_values_worked_out_by_hand(op: Op, wanted: tuple[float, float]) -> None:
    torch.testing.assert_close(op(X), torch.tensor([wanted]))


def test_the_subspace_clamp_leaves_a_negative_projection_and_the_dense_one_does_not() -> None:
    torch.testing.assert_close(ClampProjection(E0, 5.0)(BELOW), torch.tensor([[5.0, 1.0]]))
    torch.testing.assert_close(ClampProjection(E0, 5.0, "subspace")(BELOW), torch.tensor([[3.0, 1.0]]))


def test_a_conditional_clamp_touches_only_tokens_where_the_feature_is_active() -> None:
    h = torch.tensor([[2.0, 1.0], [0.4, 0.9], [-1.0, 0.0]])  # activations of feature 0: 1.5, 0, 0
    out = SAEClamp(golden(), [0], 5.0, when="active")(h)
    torch.testing.assert_close(out[0], torch.tensor([5.5, 1.0]))
    assert torch.equal(out[1:], h[1:])
    torch.testing.assert_close(SAEClamp(golden(), [0], 5.0)(h)[1:], h[1:] + torch.tensor([5.0, 0.0]))


def test_scaling_and_ablating_do_nothing_where_the_feature_is_silent_but_a_floor_does() -> None:
    silent = torch.tensor([[0.4, 0.1], [-7.0, 3.0]])
    for op in (SAEScale(golden(), [0], 8.0), SAEAblate(golden(), [0]), SAEClamp(golden(), [0], 3.0, mode="max")):
        assert torch.equal(op(silent), silent)
    assert not torch.equal(SAEClamp(golden(), [0], 3.0, mode="min")(silent), silent)


def test_a_vector_of_any_length_gives_the_same_clamp_and_a_flipped_one_another() -> None:
    for op in (ClampProjection, Cap):
        torch.testing.assert_close(op(9 * E1, 1.0)(X), op(E1, 1.0)(X))
        assert not torch.allclose(op(-E1, 0.1)(BELOW), op(E1, 0.1)(BELOW))


def _neutral() -> list[Op]:
    v = torch.linspace(-1, 1, D_MODEL)
    sae = bad_sae()
    ops: list[Op] = [
        Add(v, 0.0), AddScaled(v, 0.0), Cap(v, 1e9), Threshold(v, -1e9, 5.0), Threshold(v, 1e9, 0.0),
        ClampProjection(v, -1e9, "min"), ClampProjection(v, 1e9, "max"), Rotate(v, 0.0),
        Rotate(None, 0.0, plane=torch.stack([v, v.flip(0) + 1])), NormPreserve(Add(v, 0.0)),
        Affine(torch.eye(D_MODEL)), Map(lambda h: h), PerRow((Add(v),), torch.tensor([-1, -1])),
        LowRank(torch.eye(D_MODEL)[:2], torch.eye(D_MODEL)[:2]),
        SAEScale(sae, [0, 4], 1.0), SAEAdd(sae, [0, 4], 0.0), SAEAddMax(sae, v, 0.0),
        SAEClamp(sae, [0, 4], -1.0, mode="min"), SAEClamp(sae, [0, 4], 1e9, mode="max"),
    ]  # fmt: skip
    for architecture in ("jumprelu", "gated", "topk_rescaled"):
        real = sae_lens_sae(architecture, "layer_norm")
        ops += [SAEScale(real, [1, 5], 1.0), SAEAdd(real, [1, 5], 0.0)]
    return ops


@pytest.mark.parametrize("op", _neutral(), ids=lambda op: op.name)
def test_a_neutral_setting_is_bit_identical_to_no_edit_even_with_an_sae_that_explains_nothing(op: Op) -> None:
    model = tiny_model()
    ids = torch.arange(10, 22).view(2, 6)
    clean = model.logits(ids, "all")
    with model.plan(Intervention.at("resid_post.1", op)):
        assert torch.equal(model.logits(ids, "all"), clean)


def test_an_empty_intervention_changes_nothing_and_puts_no_hook_on_a_block() -> None:
    model = tiny_model()
    ids = torch.arange(10, 22).view(2, 6)
    clean = model.logits(ids)
    with model.plan(Intervention()) as plan:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.model.layers.modules())
        assert torch.equal(model.logits(ids), clean)
    assert plan.report == ()
    assert plan.explain() == "no edits"


def test_clamping_to_the_current_value_is_bit_identical_for_a_real_sae() -> None:
    h = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))
    for architecture in ("standard", "jumprelu", "gated", "topk", "topk_rescaled"):
        sae = sae_lens_sae(architecture)
        acts = sae.encode(h)
        features = torch.arange(40)
        for i in range(5):
            out = SAEClamp(sae, features, acts[i])(h[i : i + 1])
            assert torch.equal(out, h[i : i + 1]), architecture
            assert not torch.equal(SAEClamp(sae, features, acts[i], error="drop")(h[i : i + 1]), h[i : i + 1])


def test_dropping_the_error_gives_the_reconstruction_even_without_a_feature() -> None:
    sae = sae_lens_sae("jumprelu")
    h = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(SAEAblate(sae, [], error="drop")(h), sae.decode(sae.encode(h)), atol=1e-5, rtol=1e-5)


# Projection and order.


def test_projecting_out_is_idempotent_even_in_sign_and_blind_to_length() -> None:
    g = torch.Generator().manual_seed(0)
    h, r = 50 * torch.randn(7, D_MODEL, generator=g), torch.randn(D_MODEL, generator=g)
    once = ProjectOut(r)(h)
    assert float((once @ (r / r.norm())).abs().max()) < 1e-5 * float(h.norm(dim=1).max())
    for same in (ProjectOut(r)(once), ProjectOut(-r)(h), ProjectOut(5 * r)(h), ProjectOut(torch.stack([r, 2 * r]))(h)):
        torch.testing.assert_close(same, once, atol=1e-4, rtol=1e-5)


def test_projecting_out_a_subspace_uses_its_span_and_not_its_vectors_one_after_another() -> None:
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    h = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(ProjectOut(torch.stack([a, b]))(h), torch.tensor([[0.0, 0.0, 3.0]]))
    one_by_one = h - (h @ a) * a - (h @ (b / b.norm())) * (b / b.norm())
    assert not torch.allclose(one_by_one, torch.tensor([[0.0, 0.0, 3.0]]))


def test_zero_directions_are_refused_and_never_become_nan() -> None:
    zero = torch.zeros(2)
    for make in (
        ProjectOut,
        AddScaled,
        lambda v: Rotate(v, 1.0),
        lambda v: Cap(v, 1.0),
        lambda v: Ablate(directions=v),
    ):
        with pytest.raises(DegenerateInputError):
            make(zero)


def test_the_component_is_gone_at_every_site_when_it_is_projected_out_everywhere() -> None:
    model = tiny_model("gemma2")
    r = torch.linspace(-1, 2, D_MODEL)
    ids = torch.arange(10, 22).view(2, 6)
    sites = ["resid_pre.0", "attn_out.0", "mlp_out.0", "attn_out.1", "mlp_out.1", "attn_out.2", "mlp_out.2"]
    everywhere = sum((Intervention.at(site, ProjectOut(r)) for site in sites), Intervention())
    with model.plan(everywhere):
        found = model.capture(ids, [f"resid_post.{layer}" for layer in range(3)])
    for x in found.values():
        assert float((x @ (r / r.norm())).abs().max()) < 1e-5 * float(x.norm(dim=-1).max())


# Ablation, replacement, patches.


def test_mean_ablation_in_a_subspace_moves_only_that_part_to_the_mean() -> None:
    mean = torch.tensor([10.0, 20.0, 30.0])
    h = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(Ablate("mean", mean)(h), mean[None])
    torch.testing.assert_close(Ablate("mean", mean, E0.new_tensor([0, 0, 4.0]))(h), torch.tensor([[1.0, 2.0, 30.0]]))
    torch.testing.assert_close(Ablate(directions=E0.new_tensor([0, 3.0, 0]))(h), torch.tensor([[1.0, 0.0, 3.0]]))


def test_a_subspace_for_each_row_is_refused_where_it_would_be_mixed_up_with_tokens() -> None:
    three = torch.randn(3, 1, 4)
    with pytest.raises(ShapeError, match=r"\(d,\) or \(k, d\)"):
        Ablate(directions=three)
    with pytest.raises(ShapeError, match=r"\(d,\) or \(k, d\)"):
        Patch(torch.randn(3, 2, 4), directions=three)
    assert ProjectOut(three).n_rows == 3


def test_replace_and_patch_take_the_given_value() -> None:
    assert torch.equal(Replace(torch.tensor([7.0, 8.0]))(X), torch.tensor([[7.0, 8.0]]))
    along = Patch(torch.tensor([[[7.0, 8.0]]]), directions=E0)(X)
    torch.testing.assert_close(along, torch.tensor([[7.0, 1.0]]))


def test_a_feature_named_twice_is_refused_because_its_change_would_count_twice() -> None:
    for op in (SAEAblate, lambda s, f: SAEClamp(s, f, 5.0), lambda s, f: SAEAdd(s, f, 5.0)):
        with pytest.raises(InvalidInputError, match="named twice"):
            op(golden(), [1, 0, 1])
    SAEAblate(golden(), torch.tensor([[0, 1], [1, 0]]))  # the same one in other rows is fine


# Norms and angles.


def _angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # atan2 of the two sides: exact also near 0, where acos is not.
    a, b = a.double(), b.double()
    across = a - (a * b).sum(-1, keepdim=True) / (b * b).sum(-1, keepdim=True) * b
    return torch.atan2(across.norm(dim=-1), (a * b).sum(-1) / b.norm(dim=-1))


@pytest.mark.parametrize("theta", [1e-3, 0.3, math.pi / 2, 2.5, -0.3])
def test_rotation_moves_the_angle_by_exactly_theta_in_the_plane_of_the_two_and_keeps_the_norm(theta: float) -> None:
    g = torch.Generator().manual_seed(0)
    h, v = 40 * torch.randn(6, D_MODEL, generator=g), torch.randn(D_MODEL, generator=g)
    out = Rotate(v, theta)(h)
    torch.testing.assert_close(out.norm(dim=1), h.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(_angle(out, h).float(), torch.full((6,), abs(theta)), atol=1e-5, rtol=1e-5)
    before = _angle(h, v.expand_as(h))
    turned = (before - theta).abs()
    torch.testing.assert_close(
        _angle(out, v.expand_as(h)), torch.where(turned > math.pi, 2 * math.pi - turned, turned), atol=1e-5, rtol=1e-5
    )
    basis = torch.linalg.qr(torch.stack([h[0], v], 1)).Q
    torch.testing.assert_close(basis @ (basis.T @ out[0]), out[0], atol=1e-4, rtol=1e-5)


def test_rotation_by_zero_or_of_something_parallel_is_bit_identical() -> None:
    g = torch.Generator().manual_seed(0)
    h, v = torch.randn(6, D_MODEL, generator=g), torch.randn(D_MODEL, generator=g)
    assert torch.equal(Rotate(v, 0.0)(h), h)
    parallel = torch.stack([3 * v, -2 * v, 0 * v])
    assert torch.equal(Rotate(v, 1.0)(parallel), parallel)


def test_rotation_in_a_plane_turns_only_the_part_in_it_from_the_first_to_the_second() -> None:
    h = torch.tensor([[2.0, 0.0, 5.0]])
    plane = torch.tensor([[3.0, 0.0, 0.0], [1.0, 4.0, 0.0]])
    torch.testing.assert_close(Rotate(None, math.pi / 2, plane)(h), torch.tensor([[0.0, 2.0, 5.0]]))
    torch.testing.assert_close(Rotate(None, -math.pi / 2, plane)(h), torch.tensor([[0.0, -2.0, 5.0]]))
    for bad in (torch.ones(2, 3), torch.eye(3), torch.stack([torch.eye(3), torch.eye(3)])):
        with pytest.raises(Exception, match="plane|axes|shape|Rotate"):
            Rotate(None, 1.0, bad)


def test_a_norm_preserving_edit_keeps_the_norm_of_every_token_and_the_direction_of_the_inner_edit() -> None:
    g = torch.Generator().manual_seed(0)
    h, v = 30 * torch.randn(6, D_MODEL, generator=g), torch.randn(D_MODEL, generator=g)
    out, inner = NormPreserve(Add(v, 20.0))(h), Add(v, 20.0)(h)
    torch.testing.assert_close(out.norm(dim=1), h.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(out, inner), torch.ones(6))
    assert not torch.allclose(inner.norm(dim=1), h.norm(dim=1), rtol=1e-2)
    assert torch.isfinite(NormPreserve(Ablate())(h)).all()


# Gates.


def test_the_cast_score_has_its_published_values_and_no_direction_made_of_rounding() -> None:
    gate = CASTGate(torch.tensor([1.2, 1.6]))  # normalised to (.6, .8)
    h = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [4.0, 3.0], [0.03, 0.04], [4.0, -3.0], [0.0, 0.0], [0.4, -0.3]])
    wanted = torch.tensor([0.9902503, 0.9902503, 0.9895657, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(gate.score(h), wanted, atol=1e-5, rtol=0)
    assert torch.equal(gate.score(h)[4:], torch.zeros(3))
    torch.testing.assert_close(gate.score(h), gate.score(-h))
    # The cosine is signed and does not depend on length.
    torch.testing.assert_close(CosineGate(torch.tensor([0.6, 0.8])).score(h)[:4], torch.tensor([1.0, -1.0, 0.96, 1.0]))


def test_the_cast_score_of_an_orthogonal_activation_is_nothing_in_a_wide_model_too() -> None:
    g = torch.Generator().manual_seed(0)
    c, h = torch.randn(576, generator=g), torch.randn(20, 576, generator=g)
    orthogonal = (h.double() - (h.double() @ c.double())[:, None] / c.double().norm() ** 2 * c.double()).float()
    assert float(CASTGate(c).score(orthogonal).max()) < 1e-5
