"""The attention pattern is read and written in eager mode, which leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from tests.tiny import FAMILIES, FP32_LOGITS, MIXTURES, n_hooks, tiny_model
from workbench.core.errors import EditError
from workbench.hooks.attach import attached
from workbench.hooks.handles import Hooks
from workbench.hooks.pattern import make_eager
from workbench.models.model import Model

IDS = torch.arange(10, 22).view(2, 6)


def _state(model: Model) -> tuple[Any, ...]:
    configs = [m.config for m in model.hf.modules() if hasattr(m, "config")]
    return n_hooks(model.hf), [c._attn_implementation for c in configs], len(_get_current_function_mode_stack())


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """A model that computes attention with sdpa, and does so afterwards."""
    model = tiny_model(request.param)
    before = _state(model)
    assert set(before[1]) == {"sdpa"}
    yield model
    assert _state(model) == before


def test_the_activations_say_that_attention_ran_in_eager_mode(model: Model) -> None:
    acts = model.capture(IDS, ["pattern.1", "resid_post.1"])
    assert "eager" in acts.note and "eager" in repr(acts)
    assert model.capture(IDS, ["z.1"]).note == ""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_pattern_is_what_hugging_face_reports(family: str) -> None:
    # Its own model: Hugging Face leaves hooks on a model that was asked for attentions.
    model = tiny_model(family)
    configs = {id(m.config): m.config for m in model.hf.modules() if hasattr(m, "config")}.values()
    with Hooks() as on:
        make_eager(on, tuple(configs))
        reported = model.hf(IDS, output_attentions=True, use_cache=False).attentions
    acts = model.capture(IDS, ["pattern.0", "pattern.2"])
    for layer in (0, 2):
        assert torch.equal(acts[f"pattern.{layer}"], reported[layer])
    assert not torch.allclose(acts["pattern.0"], reported[2], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_a_written_pattern_moves_z_and_the_logits(family: str) -> None:
    model = tiny_model(family)
    clean = model.hf(IDS, use_cache=False).logits

    def to_self(x: Tensor) -> Tensor:
        return torch.eye(x.shape[-1]).expand_as(x).clone()

    with attached([(model.site_map["pattern.1"], to_self)]):
        acts = model.capture(IDS, ["pattern.1", "v.1", "z.1"])
        assert not torch.allclose(model.hf(IDS, use_cache=False).logits, clean, atol=1e-2)
    v = acts["v.1"].repeat_interleave(2 // acts["v.1"].shape[2], dim=2)
    assert torch.equal(acts["pattern.1"], torch.eye(6).expand(2, 2, 6, 6))
    torch.testing.assert_close(acts["z.1"], v)
    assert torch.equal(model.hf(IDS, use_cache=False).logits, clean)


def test_a_pattern_written_back_unchanged_changes_nothing(model: Model) -> None:
    point = model.site_map["pattern.1"]
    with attached([(point, lambda x: None)]):
        clean = model.hf(IDS, use_cache=False).logits
    with attached([(point, lambda x: x.clone())]):
        assert torch.equal(model.hf(IDS, use_cache=False).logits, clean)
    torch.testing.assert_close(model.hf(IDS, use_cache=False).logits, clean, atol=FP32_LOGITS, rtol=1e-4)


def test_gradients_flow_through_the_pattern(model: Model) -> None:
    slopes = []
    for frozen in (True, False):
        model.hf.requires_grad_(not frozen)
        acts = model.capture(IDS, ["q.1", "pattern.1"], grad=True)
        slopes += torch.autograd.grad(acts["pattern.1"].square().sum(), acts["q.1"])
    assert slopes[0].shape == acts["q.1"].shape and bool((slopes[0] != 0).any())
    torch.testing.assert_close(*slopes)


def test_a_cached_step_has_one_query_and_all_keys(model: Model) -> None:
    shapes = []
    with attached([(model.site_map["pattern.1"], lambda x: shapes.append(tuple(x.shape)))]):
        first = model.hf(IDS[:, :5], use_cache=True)
        model.hf(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert shapes == [(2, 2, 5, 5), (2, 2, 1, 6)]


def test_padding_is_never_attended_to(model: Model) -> None:
    batch = model.tokens(["abcdef", "ab"])
    pattern = model.capture(batch, ["pattern.1"])["pattern.1"]
    assert float(pattern[1, :, 4:, :4].abs().max()) == 0
    alone = model.capture("ab", ["pattern.1"])["pattern.1"]
    torch.testing.assert_close(pattern[1, :, 4:, 4:], alone[0], atol=1e-5, rtol=1e-4)


def test_several_functions_on_one_pattern_run_in_order(model: Model) -> None:
    point, seen = model.site_map["pattern.1"], []

    def uniform(x: Tensor) -> Tensor:
        return torch.full_like(x, 0.25)

    with (
        attached([(point, uniform), (point, lambda x: 2 * x)]),
        attached([(point, lambda x: seen.append(x.unique().item()))]),
    ):
        acts = model.capture(IDS, ["pattern.1"])
        model.hf(IDS, use_cache=False)
    # The hooks outside came first, so those inside see what they made: 0.25 * 2.
    assert acts["pattern.1"].unique().item() == 0.5
    assert seen == [0.5, 0.5]


def test_nested_blocks_keep_eager_until_the_outer_one_ends(model: Model) -> None:
    point = model.site_map["pattern.1"]
    with attached([(point, lambda x: None)]):
        with attached([(model.site_map["pattern.0"], lambda x: None)]):
            pass
        assert model.hf.config._attn_implementation == "eager"
        model.hf(IDS, use_cache=False)


class _Stop(Exception):
    pass


def _raise(*_: object) -> None:
    raise _Stop


@pytest.mark.parametrize("where", ["in the function", "in the body", "in a foreign hook", "by the keyboard"])
def test_an_exception_leaves_no_trace(model: Model, where: str) -> None:
    point, error = model.site_map["pattern.1"], KeyboardInterrupt if where == "by the keyboard" else _Stop
    fired = []
    foreign = point.module.register_forward_hook(lambda *_: fired.append(1))

    def interrupted(_x: Tensor) -> None:
        raise error

    fn = (lambda x: None) if where in ("in the body", "in a foreign hook") else interrupted
    inner = model.site_map["z.1"].module.register_forward_hook(
        _raise if where == "in a foreign hook" else lambda *_: None
    )
    with pytest.raises(error), attached([(point, fn)]):
        model.hf(IDS, use_cache=False)
        raise _Stop
    inner.remove()
    assert model.hf.config._attn_implementation == "sdpa"
    assert len(_get_current_function_mode_stack()) == 0
    fired.clear()
    model.hf(IDS, use_cache=False)
    assert fired == [1]
    foreign.remove()


def test_a_module_without_a_pattern_is_an_error_and_not_silence(model: Model) -> None:
    import dataclasses

    point = dataclasses.replace(model.site_map["pattern.1"], configs=())
    with pytest.raises(EditError, match="multiplied no .* result of a softmax with v"), attached([(point, _raise)]):
        model.hf(IDS, use_cache=False)
    wrong_heads = dataclasses.replace(model.site_map["pattern.1"], heads=3)
    with pytest.raises(EditError, match="multiplied no"), attached([(wrong_heads, _raise)]):
        model.hf(IDS, use_cache=False)


def test_a_pattern_that_cannot_be_found_is_withdrawn_with_the_reason(model: Model, monkeypatch: Any) -> None:
    monkeypatch.setattr("workbench.hooks.pattern._MATMUL", frozenset())
    report = model.self_check()
    assert report.ok
    assert {site.kind for site in report.withdrawn} == {"pattern"}
    assert "multiplied no" in next(iter(report.withdrawn.values()))


def test_products_in_other_hooks_are_not_taken_for_the_pattern(model: Model) -> None:
    """A hook on q that computes its own small attention must not be mistaken for the module's."""

    def own_attention(x: Tensor) -> Tensor:
        heads = x.transpose(1, 2)
        return torch.softmax(heads @ heads.transpose(-1, -2) * 0 + 1, -1).matmul(heads).transpose(1, 2) * 0 + x

    clean = model.capture(IDS, ["pattern.1"])["pattern.1"]
    with attached([(model.site_map["q.1"], own_attention)]):
        assert torch.equal(model.capture(IDS, ["pattern.1"])["pattern.1"], clean)
