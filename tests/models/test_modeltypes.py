"""Model types beyond the tested families: heads with rules of their own, nested configs, activations, no gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import FP32_LOGITS, tiny_hf, tiny_model, tiny_tokenizer
from workbench.core.errors import UnknownSiteError
from workbench.models.head import Head, finisher
from workbench.models.model import Model
from workbench.models.tinyfamilies import tiny_of

IDS = torch.arange(10, 22).view(2, 6)


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("falcon_h1", lambda z: 0.5 * z),
        ("granite", lambda z: z / 3),
        ("cohere", lambda z: 0.0625 * z),
        ("gemma2", lambda z: 30 * torch.tanh(z / 30)),
        ("gemma3", lambda z: z),  # the config names a cap, which this class does not apply
        ("opt", lambda z: z),
    ],
)
def test_chosen_logits_are_the_full_ones_whatever_the_config_calls_the_rule(model_type: str, rule: Any) -> None:
    model = Model(tiny_of(model_type), None)
    z = torch.linspace(-40, 40, 64)
    torch.testing.assert_close(finisher(model.hf)(z), rule(z))
    full = model.logits(IDS, keep="all")
    torch.testing.assert_close(model.logits(IDS, keep="all", tokens=[3, 5]), full[..., [3, 5]], atol=1e-5, rtol=1e-5)
    hidden = model.capture(IDS, ["final_norm"])["final_norm"].flatten(0, 1)
    torch.testing.assert_close(model.head.all(hidden), full.flatten(0, 1), atol=FP32_LOGITS, rtol=1e-4)


class _Rescaled(type(tiny_hf())):
    """Divides the logits of a token by their spread, which the logits of a few tokens do not show."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / out.logits.std(-1, keepdim=True)
        return out


def test_chosen_logits_of_an_unknown_head_are_computed_by_the_model() -> None:
    model = tiny_model()
    model.hf.__class__ = _Rescaled
    full = model.logits(IDS, keep="all")
    for _ in range(2):
        assert torch.equal(model.logits(IDS, keep="all", tokens=[3, 5]), full[..., [3, 5]])


def test_the_rule_of_a_head_is_found_without_running_the_model() -> None:
    model = tiny_model()
    model.hf.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    model.hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    Head(model.hf)


def test_a_nested_model_has_the_context_and_the_positions_of_its_text_part() -> None:
    hf = tiny_of("gemma3")
    assert hf.config.vision_config.hidden_size == hf.config.text_config.hidden_size  # a table of the same width
    model = Model(hf, None)
    assert (model.n_ctx, model.n_positions) == (128, None)
    assert model.logits(IDS).shape == (2, 64)
    assert Model(tiny_of("mpt"), None).n_ctx == 128
    assert Model(tiny_of("opt"), None).n_positions == 128


def test_any_activation_makes_mlp_post() -> None:
    model = Model(tiny_of("apertus"), None)
    assert not model.self_check().withdrawn
    for activation in (nn.Tanh(), nn.LeakyReLU(), nn.Softsign()):
        hf = tiny_hf()
        for layer in hf.model.layers:
            layer.mlp.act_fn = activation
        assert not Model(hf, tiny_tokenizer()).self_check().withdrawn


@pytest.mark.parametrize(
    ("model_type", "says"), [("bert", "no token sees a later one"), ("modernbert-decoder", None), ("deepseek_v4", None)]
)
def test_what_does_not_hold_is_refused_and_not_the_rest(model_type: str, says: str | None) -> None:
    model = Model(tiny_of(model_type), None)
    report = model.self_check()
    assert [check.name for check in report.checks if not check.ok] == ([says] if says else [])
    assert {site.kind for site in report.withdrawn} >= (
        {"resid_pre", "resid_post"} if model_type == "deepseek_v4" else {"final_norm"}
    )
    if model_type == "modernbert-decoder":
        with pytest.raises(UnknownSiteError, match=r"unembed\(final_norm"):
            model.lens(torch.zeros(16))


def test_a_model_without_one_stack_of_blocks_is_refused_in_words() -> None:
    with pytest.raises(UnknownSiteError, match="maps no stack of blocks"):
        Model(tiny_of("hrm_text"), None)


class _NoBackward(nn.Module):
    """A projection whose gradient is not computed, as in some quantised formats."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.detach())


def test_sites_without_gradients_are_kept_for_reading_and_editing() -> None:
    hf = tiny_hf()
    for layer in hf.model.layers:
        layer.self_attn.o_proj = _NoBackward(layer.self_attn.o_proj)
        layer.mlp.down_proj = _NoBackward(layer.mlp.down_proj)
    model = Model(hf, tiny_tokenizer())
    report = model.self_check()
    assert report.ok and not report.withdrawn, str(report)
    inside = {"q", "k", "v", "z", "pattern", "mlp_in", "mlp_pre", "mlp_post"}
    assert {site.kind for site in report.no_gradient} == inside
    assert model.capture(IDS, ["z.1.h0"])["z.1.h0"].shape == (2, 6, 8)
    assert model.capture(IDS, ["attn_out.1"], grad=True)
    with pytest.raises(UnknownSiteError, match=r"z\.1\.h0 has no gradient.*grad=True"):
        model.capture(IDS, ["z.1.h0"], grad=True)


def test_a_token_that_is_ruled_out_breaks_no_check() -> None:
    hf = tiny_hf()
    hf.lm_head.bias = nn.Parameter(torch.zeros(hf.config.vocab_size).index_fill(0, torch.tensor([7]), -torch.inf))
    model = Model(hf, tiny_tokenizer())
    report = model.self_check()
    assert report.ok, str(report)
    assert model.logits(IDS, tokens=[7, 8])[0].tolist()[0] == -torch.inf
