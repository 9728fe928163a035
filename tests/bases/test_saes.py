"""SAEs as bases against sae_lens itself: every architecture and normalisation, all parameters random."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from beartype.door import is_bearable

from tests.bases.every import D_MODEL, D_OUT, D_SAE, NORMALISATIONS, SAES, TRANSCODERS, hidden, made
from tests.tiny import as_user, tiny_model
from workbench.bases.base import Basis, Features
from workbench.bases.registry import build_basis
from workbench.bases.sae import SAEBasis, as_basis
from workbench.core.errors import InvalidInputError, MismatchError, ShapeError
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEAblate

TINY = functools.cache(tiny_model)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
SOME = torch.tensor([7, 0, 23])
EVERY = pytest.mark.parametrize(
    ("kind", "normalisation", "more"),
    [(k, n, {}) for k in (*SAES, *TRANSCODERS) for n in NORMALISATIONS]
    + [(k, "layer_norm", {"apply_b_dec_to_input": False}) for k in ("standard", "gated", "matching_pursuit")]
    + [("topk", "layer_norm", {"reshape_activations": "hook_z"})],
)


def written(sae: Any, x: torch.Tensor, acts: torch.Tensor | None = None) -> torch.Tensor:
    """What sae_lens reconstructs from `x`, or from changed activations of `x`, skip connection included."""
    heads = x[:, None] if sae.cfg.reshape_activations == "hook_z" else x
    own = sae.encode(heads)  # sae_lens decodes with what its last encode left behind
    out = sae.decode(own if acts is None else acts).flatten(1)
    return out + x @ sae.W_skip.T if hasattr(sae, "W_skip") else out


def state(sae: Any) -> dict[str, Any]:
    return dict(vars(sae))


@EVERY
def test_a_basis_encodes_decodes_and_ablates_like_sae_lens(kind: str, normalisation: str, more: dict[str, Any]) -> None:
    sae, x = made(kind, normalisation, **more), hidden()
    basis, heads = as_basis(sae), hidden()[:, None] if more.get("reshape_activations") else hidden()
    acts = sae.encode(heads).to_dense()
    assert 0 < int((acts != 0).sum()) < acts.numel()
    wanted = written(sae, x)
    torch.testing.assert_close(basis.encode(x), acts, **CLOSE)
    torch.testing.assert_close(basis.encode_some(x, SOME), acts[:, SOME], **CLOSE)
    torch.testing.assert_close(basis.decode(basis.encode(x), x), wanted, **CLOSE)
    skip = x @ sae.W_skip.T if hasattr(sae, "W_skip") else 0.0
    torch.testing.assert_close(basis.decode(basis.encode(x)), wanted - skip, **CLOSE)
    torch.testing.assert_close(basis.reconstruct(x), wanted, **CLOSE)
    assert basis.reconstruct(x).dtype == torch.float32 and not basis.encode(x).requires_grad

    without = acts.clone()
    without[:, SOME] = 0.0
    target = torch.randn(len(x), basis.d_out, generator=torch.Generator().manual_seed(5)) if kind in TRANSCODERS else x
    edit = written(sae, x, without) - wanted
    ablated = basis.ablate(x, SOME, None if target is x else target)
    assert float(edit.norm()) > 0.1
    assert float((ablated - target - edit).norm()) < 1e-5 * float(edit.norm() + target.norm())
    torch.testing.assert_close(basis.contribution(x, SOME), -edit, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(basis.constant(x), written(sae, x, torch.zeros_like(acts)), **CLOSE)
    total = basis.contribution(x) + basis.constant(x) + basis.error(x, None if target is x else target)
    torch.testing.assert_close(total, target, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(basis.coefficients(x, SOME) @ basis.rows(SOME), basis.contribution(x, SOME), **CLOSE)
    assert basis.scale(x).shape == (len(x), 1) and (basis.d_in, basis.d_out, basis.d_sae) == (
        x.shape[1], target.shape[1], D_SAE,
    )  # fmt: skip

    folded, several = x.view(2, 3, -1), target.view(2, 3, -1)
    assert torch.equal(basis.encode(folded).flatten(0, 1), basis.encode(x))
    assert torch.equal(basis.decode(basis.encode(folded)).flatten(0, 1), basis.decode(basis.encode(x)))
    assert torch.equal(basis.ablate(folded, SOME.tolist(), several).flatten(0, 1), basis.ablate(x, SOME, target))
    assert basis.contribution(x[0], 7).shape == (basis.d_out,) and basis.scale(folded).shape == (2, 3, 1)
    torch.testing.assert_close(basis.constant(folded).flatten(0, 1), basis.constant(x), **CLOSE)

    before = state(sae)
    own = basis.encode(x)
    basis.encode(9 * hidden(seed=2))
    assert torch.equal(basis.decode(own), basis.decode(own)), "what is encoded later does not matter"
    assert state(sae).keys() == before.keys() and all(state(sae)[name] is value for name, value in before.items())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("kind", SAES)
def test_an_ablation_is_the_one_run_through_the_model(kind: str, normalisation: str) -> None:
    model, sae, ids = TINY(), made(kind, normalisation), torch.tensor([[5, 9, 2, 40, 8]])
    x = model.capture(ids, ["resid_post.1"])["resid_post.1"][0]

    def by_sae_lens(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        kept, acts = sae.decode(sae.encode(output[0])), sae.encode(output[0]).to_dense()
        acts[:, SOME] = 0.0
        return output + sae.decode(acts) - kept

    with model.plan(Intervention.at("resid_post.1", SAEAblate(sae, SOME))):
        by_op = model.capture(ids, ["resid_pre.2"])["resid_pre.2"][0]
    handle = model.site_map["resid_post.1"].module.register_forward_hook(by_sae_lens)
    by_hook = model.capture(ids, ["resid_pre.2"])["resid_pre.2"][0]
    handle.remove()
    ablated, size = as_basis(sae).ablate(x, SOME), float((by_hook - x).norm())
    assert size > 0.01 * float(x.norm())
    assert float((ablated - by_op).norm()) < 1e-5 * size
    assert float((ablated - by_hook).norm()) < 1e-5 * (size + float(x.norm()))


@EVERY
def test_activations_in_bfloat16_are_normalised_in_fp32(kind: str, normalisation: str, more: dict[str, Any]) -> None:
    if kind == "matching_pursuit" or "training" in kind or more:
        return  # their own code encodes in its own dtype
    basis, x = as_basis(made(kind, normalisation)), hidden().bfloat16()
    acts = basis.encode(x)
    torch.testing.assert_close(acts, basis.encode(x.float()), **CLOSE)
    torch.testing.assert_close(basis.decode(acts, x), basis.decode(acts, x.float()), **CLOSE)
    assert basis.contribution(x, SOME).dtype == basis.ablate(x, SOME, torch.zeros(len(x), basis.d_out)).dtype


@EVERY
def test_gradients_reach_the_activations_and_never_the_weights(
    kind: str, normalisation: str, more: dict[str, Any]
) -> None:
    sae, basis = (made(kind, normalisation, **more) for _ in range(2))
    basis = as_basis(basis.requires_grad_(True))
    pull = torch.randn(6, basis.d_out, generator=torch.Generator().manual_seed(1))
    slopes = []
    for reconstruct in (lambda x: written(sae, x), basis.reconstruct):
        x = hidden().clone().requires_grad_(True)
        slopes.append(torch.autograd.grad((reconstruct(x) * pull).sum(), x)[0])
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-4, rtol=1e-4)
    assert float(slopes[0].abs().max()) > 0.01
    assert not basis.reconstruct(hidden()).requires_grad and not basis.contribution(hidden(), SOME).requires_grad


def test_a_bias_a_scale_or_an_error_that_is_left_out_shows() -> None:
    """Every identity above, broken by one plausible slip each."""

    class NoScale(SAEBasis):
        def scale(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(x), 1)

    class NoBias(SAEBasis):
        @property
        def bias(self) -> torch.Tensor:
            return torch.zeros(self.d_out)

    class NoMean(SAEBasis):
        def _mean(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 1)

    sae, x = made("jumprelu", "layer_norm"), hidden()
    wanted = written(sae, x)
    for broken in (NoScale, NoBias, NoMean):
        basis = broken.of(sae)
        assert not torch.allclose(basis.reconstruct(x), wanted, atol=0.05)
        assert not torch.allclose(basis.coefficients(x) @ basis.rows() + basis.constant(x), wanted, atol=0.05)
    right = SAEBasis.of(sae)
    assert float(right.error(x).norm()) > 0.1 * float(x.norm()), "or an error that is left out would not show"


def test_activations_that_were_copied_need_what_they_were_encoded_from() -> None:
    basis, x = as_basis(made("standard", "layer_norm")), hidden()
    acts = basis.encode(x)
    acts[:, 3] = 0.0  # changed in place, they are still those of x
    torch.testing.assert_close(basis.decode(acts), basis.decode(acts, x))
    for copied in (acts.clone(), acts[:3], acts + 0.0):
        with pytest.raises(InvalidInputError, match=r"decode\(acts, x\)"):
            basis.decode(copied)
    plain = as_basis(made("standard"))
    torch.testing.assert_close(plain.decode(acts.clone()), plain.decode(acts, x))


def test_pooled_coefficients_are_exact_and_pooled_activations_are_not() -> None:
    for normalisation in ("none", "layer_norm", "constant_norm_rescale"):
        sae, x = made("standard", normalisation), hidden()
        basis = as_basis(sae)
        gone = (written(sae, x) - basis.constant(x)).mean(0)
        torch.testing.assert_close(basis.coefficients(x).mean(0) @ basis.rows(), gone, **CLOSE)
        assert (normalisation == "none") == torch.allclose(basis.encode(x).mean(0) @ basis.rows(), gone, atol=1e-3)


def test_a_threshold_is_compared_in_fp32_where_bfloat16_would_round_it_to_the_activation() -> None:
    sae = made("jumprelu", d_in=2, apply_b_dec_to_input=False)
    for parameter in sae.parameters():
        parameter.zero_()
    sae.W_enc[0, 3] = 1.0
    sae.threshold[3] = 1.001
    x = torch.tensor([[1.0, 0.0], [1.0078125, 0.0]])  # 1.001 rounds to 1.0 in bfloat16: then neither 1.0 nor it passes
    assert float(torch.tensor(1.001).bfloat16()) == 1.0
    assert as_basis(sae).encode(x)[:, 3].tolist() == [0.0, 1.0078125]
    sae.threshold.data[3] = 0.999  # rounds to 1.0: compared in bfloat16, an activation of 1.0 would not pass
    assert as_basis(sae).encode_some(x.bfloat16(), torch.tensor([3]))[:, 0].tolist() == [1.0, 1.0078125]


def test_one_feature_of_a_per_feature_architecture_reads_its_own_column_alone() -> None:
    for kind in ("standard", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder"):
        sae = made(kind)
        wanted = as_basis(sae).encode_some(hidden(), SOME)
        others = [f for f in range(D_SAE) if f not in SOME.tolist()]
        sae.W_enc[:, others] = float("nan")
        assert torch.equal(as_basis(sae).encode_some(hidden(), SOME), wanted), kind


def test_provenance_and_identity() -> None:
    sae = made("topk", "layer_norm")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_fingerprint = "blocks.1.hook_resid_post", "0123456789ab"
    basis = as_basis(sae)
    assert as_basis(basis) is basis
    assert (basis.site, basis.site_out, basis.model_fingerprint) == ("resid_post.1", "resid_post.1", "0123456789ab")
    assert (basis.architecture, basis.normalisation, basis.transcodes) == ("topk", "layer_norm", False)
    before = basis.fingerprint
    sae.W_enc[0, 0] += 1.0
    assert basis.fingerprint != before and len(before) == 12
    jump = made("jumprelu")
    seen = {as_basis(jump).fingerprint, as_basis(jump.to(torch.bfloat16).float()).fingerprint}
    assert len(seen) == 1, "rounding to bfloat16 is none of another SAE"
    for change in (
        lambda: jump.threshold.data.add_(0.5),
        lambda: jump.b_enc.data.add_(0.5),
        lambda: jump.b_dec.data.add_(0.5),
        lambda: setattr(jump.cfg, "normalize_activations", "layer_norm"),
        lambda: setattr(jump.cfg, "apply_b_dec_to_input", not jump.cfg.apply_b_dec_to_input),
    ):
        change()
        seen.add(as_basis(jump).fingerprint)
    assert len(seen) == 6, "what the encoder does is part of the SAE"
    with pytest.raises(AttributeError):
        basis.site = "resid_post.2"  # type: ignore[misc]
    assert isinstance(replace(basis, site="resid_post.2"), Basis)
    sae.cfg.metadata.hook_head_index = 2
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    assert as_basis(sae).site == "z.1.h2"
    sae.cfg.metadata.hook_head_index = None
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    assert (as_basis(sae).site_out, as_basis(sae).transcodes) == ("mlp_out.1", True)
    sae.cfg.metadata.hook_name_out = sae.cfg.metadata.hook_name
    assert not as_basis(sae).transcodes


def test_a_transcoder_needs_its_target_and_is_not_edited_where_it_reads() -> None:
    sae = made("skip_transcoder")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    basis, target = as_basis(sae), torch.ones(6, D_OUT)
    assert basis.transcodes and basis.error(hidden(), target).shape == (6, D_OUT)
    for call in (lambda: basis.error(hidden()), lambda: basis.ablate(hidden(), SOME)):
        with pytest.raises(MismatchError, match=r"reads resid_mid\.1 and writes mlp_out\.1.*target="):
            call()
    with pytest.raises(MismatchError, match=r"An edit needs an SAE and got a transcoder: it reads resid_mid\.1"):
        basis.refuse_transcoder("An edit")


def test_wrong_widths_and_features_are_refused_in_words() -> None:
    basis, x = as_basis(made("standard")), hidden()
    with pytest.raises(ShapeError, match=rf"encode: standard reads d_in={D_MODEL}, and got shape \(6, 3\)"):
        basis.encode(x[:, :3])
    with pytest.raises(ShapeError, match=rf"decode: standard takes activations of d_sae={D_SAE}"):
        basis.decode(x)
    for use in (lambda: basis.ablate(x, [D_SAE]), lambda: basis.rows([-1]), lambda: basis.encode_some(x, D_SAE)):
        with pytest.raises(
            InvalidInputError, match=f"does not exist; this standard basis has features 0 to {D_SAE - 1}"
        ):
            use()


@pytest.mark.parametrize("kind", ["standard", "topk", "transcoder", "neurons", "mlp_hidden", "heads"])
def test_numbers_and_targets_that_a_basis_would_misread_are_refused(kind: str) -> None:
    named = kind in ("neurons", "mlp_hidden", "heads")
    basis: Any = (
        build_basis(kind, TINY(), "mlp_post.1" if kind == "mlp_hidden" else "z.1") if named else as_basis(made(kind))
    )
    x, some, d = hidden(6, width=basis.d_in), torch.tensor([0, 1]), basis.d_out
    target = torch.ones(6, d)
    for wrong in ([-1], torch.tensor([-1]), torch.tensor([basis.d_sae]), torch.arange(basis.d_sae) < 2, [1, 0, 1]):
        for use in (basis.ablate, basis.contribution):
            with pytest.raises(
                InvalidInputError, match=f"this {kind} basis has features|no feature numbers|Feature 1 is named twice"
            ):
                use(x, wrong, target) if use == basis.ablate else use(x, wrong)
    for given in (1, [1], (1,), torch.tensor([1])):  # what type checkers and editors accept is what the code does
        assert is_bearable(given, Features)
        assert torch.equal(basis.contribution(x, given), basis.contribution(x, some[1:]))
    torch.testing.assert_close(basis.encode_some(x, [1, 1]), basis.encode(x)[:, [1, 1]])  # columns may be repeated
    for wrong in (target[0], target[:1], target[:, :1], target.view(2, 3, d)):
        for use in (lambda y: basis.error(x, y), lambda y: basis.ablate(x, some, target=y)):
            with pytest.raises(ShapeError, match=rf"writes d_out={d}, and got shape .* Give \(6, {d}\)"):
                use(wrong)
    with pytest.raises(ShapeError, match=rf"decode: .* reads d_in={basis.d_in}, and got shape \(1, "):
        basis.decode(basis.encode(x), x[:1])
    for wrong in (some[None], torch.tensor(1)):
        with pytest.raises(ShapeError, match=r"Give \(f,\)|give \(f,\)"):
            basis.contribution(x, wrong)
    for rows in (x.view(2, 3, -1), x[0]):
        with as_user(), pytest.raises(ShapeError, match=rf"a row per token: \(n, {basis.d_in}\)"):
            basis.sparse(rows)
    whole = torch.arange(6 * d).view(2, 3, d)  # a target of integers is no list of features
    with as_user():
        error = basis.error(x.view(2, 3, -1), whole)
    torch.testing.assert_close(error.flatten(0, 1), basis.error(x, whole.view(6, d).float()))


def test_what_is_no_sae_of_single_tokens_is_refused() -> None:
    from sae_lens.saes.temporal_sae import TemporalSAEConfig

    config = TemporalSAEConfig(d_in=D_MODEL, d_sae=D_SAE)
    with pytest.raises(InvalidInputError, match="temporal SAE of sae_lens predicts each token from those before it"):
        as_basis(SimpleNamespace(W_dec=torch.ones(D_SAE, D_MODEL), encode=lambda x: x, cfg=config))
    for wrong in (torch.nn.Linear(2, 2), SimpleNamespace(W_dec=torch.ones(3), encode=lambda x: x)):
        with pytest.raises(InvalidInputError, match="is not an SAE: it needs encode and W_dec"):
            SAEBasis.of(wrong)
    bare = SimpleNamespace(W_dec=torch.eye(2), encode=lambda x: x.relu())
    assert as_basis(bare).ablate(torch.tensor([[2.0, 3.0]]), torch.tensor([1])).tolist() == [[2.0, 0.0]]
    with pytest.raises(InvalidInputError, match="no b_dec"):
        as_basis(bare).reconstruct(torch.ones(1, 2))
