"""The lens reads what the model writes; maps show every head and token, with the right names."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import workbench as wb
from tests.tiny import FP32_LOGITS, n_hooks, tiny_model
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.models.model import Model

TEXTS = pd.Series(["one day", "two"], index=["a", "b"])


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("gemma2")  # norm weights that are 1 + w, and a soft cap


def test_at_the_last_site_it_is_what_the_model_writes(model: Model) -> None:
    read = wb.lens(model.capture(TEXTS, ["resid_post"]), k=4)
    batch = model.tokens(TEXTS)
    logprobs = model.logits(batch, keep="all")[batch.mask].log_softmax(-1)
    torch.testing.assert_close(read.logprobs[-1], logprobs.topk(4).values, atol=FP32_LOGITS, rtol=0)
    assert torch.equal(read.ids[-1], logprobs.topk(4).indices)
    assert not torch.equal(read.ids[-1], read.ids[0]) and float(read.kl[-1].abs().max()) == 0 < float(read.kl[0].min())
    loss = model.loss(batch)
    torch.testing.assert_close(-read.next_logprob[-1][:6], loss[0], atol=FP32_LOGITS, rtol=0)
    torch.testing.assert_close(-read.next_logprob[-1][7:9], loss[1, -2:], atol=FP32_LOGITS, rtol=0)
    assert read.next_logprob[:, [6, 9]].isnan().all() and read.next_rank[:, [6, 9]].eq(-1).all(), "no token follows"
    target = torch.tensor([batch.ids[0, i + 1] for i in range(6)])
    assert read.next_rank[-1, :6].tolist() == [int((p > p[t]).sum()) for p, t in zip(logprobs, target, strict=False)]


def test_a_site_in_between_is_read_by_the_norm_and_the_unembedding(model: Model) -> None:
    acts = model.capture("one day", ["resid_post.0", "resid_post.1"])
    read, x = wb.lens(acts), acts["resid_post.0"][0]
    logits = model.hf.lm_head(model.site_map["final_norm"].module(x))
    cap = model.hf.config.final_logit_softcapping
    expected = (cap * torch.tanh(logits / cap)).log_softmax(-1)
    torch.testing.assert_close(read.logprobs[0], expected.topk(5).values, atol=FP32_LOGITS, rtol=0)
    torch.testing.assert_close(read.entropy[0], -(expected.exp() * expected).sum(-1), atol=FP32_LOGITS, rtol=0)
    later = model.capture("one day", ["resid_post.1"])["resid_post.1"][0]
    other = (cap * torch.tanh(model.hf.lm_head(model.site_map["final_norm"].module(later)) / cap)).log_softmax(-1)
    torch.testing.assert_close(read.kl[0], (other.exp() * (other - expected)).sum(-1), atol=FP32_LOGITS, rtol=0)


def test_rows_keep_labels_and_chosen_tokens_are_read_alone(model: Model) -> None:
    whole = wb.lens(model.capture(TEXTS, ["resid_post", "z.1"]), k=2)
    frame = whole.frame()
    assert len(frame) == 3 * 10 * 2 and frame.index[:2].tolist() == ["a", "a"] and set(frame.site) == {
        "resid_post.0", "resid_post.1", "resid_post.2"
    }  # fmt: skip
    top = frame[(frame.site == "resid_post.2") & (frame["rank"] == 0)]
    assert top.top_id.tolist() == whole.ids[-1, :, 0].tolist() and "".join(top.token) == "one daytwo"
    last = wb.lens(model.capture(TEXTS, ["resid_post"], positions=wb.Last()), k=2)
    assert last.positions.tolist() == [6, 2] and torch.equal(last.ids, whole.ids[:, [6, 9]])
    first = wb.lens(model.capture(TEXTS, ["resid_post"], positions=wb.Pos(0)), k=2)
    torch.testing.assert_close(first.next_logprob, whole.next_logprob[:, [0, 7]])


def test_the_heat_map_has_the_last_site_on_top(model: Model) -> None:
    read = wb.lens(model.capture("a<b", ["resid_post"]))
    html = read._repr_html_()
    assert html.index("resid_post.2") < html.index("resid_post.0") and "<th>&lt;</th>" in html
    assert html.count("<td") == 9 and html.count("color-mix(in srgb,#e07b39") > 3 and "first" not in html
    many = wb.lens(model.capture(["ab"] * 4, ["resid_post"]))._repr_html_()
    assert many.count("<table") == 3 and "the first 3 of 4 rows" in many


def test_what_the_lens_can_not_read_is_refused(model: Model) -> None:
    acts = model.capture("ab", ["z.1"])
    with pytest.raises(MismatchError, match="z.1"):
        wb.lens(acts)
    acts = tiny_model().capture("ab", ["resid_post"])
    with pytest.raises(InvalidInputError, match=r"lens\(acts, model\)"):
        wb.lens(acts)
    assert wb.lens(acts, tiny_model()).ids.shape == (3, 2, 5)
    with pytest.raises(InvalidInputError, match="k=999"):
        wb.lens(model.capture("ab", ["resid_post"]), k=999)
    assert n_hooks(model.hf) == 0


def test_attention_maps_are_the_patterns_of_real_tokens() -> None:
    model = tiny_model()
    acts = model.capture(TEXTS, ["pattern.1", "pattern.2.h1"])
    shown = wb.show_attention(acts, row=1)
    assert shown.tokens == ("t", "w", "o") and {k: v.shape for k, v in shown.patterns.items()} == {
        "pattern.1": (2, 3, 3), "pattern.2.h1": (1, 3, 3)
    }  # fmt: skip
    torch.testing.assert_close(shown.patterns["pattern.1"].sum(-1), torch.ones(2, 3))
    frame = shown.frame()
    row = frame[(frame.site == "pattern.2.h1") & (frame["query"] == 2) & (frame["key"] == 1)].iloc[0]
    assert (row.query_token, row.key_token) == ("o", "w")
    assert row.weight == pytest.approx(float(acts["pattern.2.h1"][1, -1, -2]), rel=1e-5)
    assert shown._repr_html_().count("<table") == 3 and "in all" not in shown._repr_html_()
    long = wb.show_attention(model.capture("x" * 24, ["pattern.1"]))._repr_html_()
    assert long.count("<table") == 1 and "2 heads and 24 tokens in all" in long
    with pytest.raises(MismatchError, match="pattern.3"):
        wb.show_attention(model.capture("ab", ["z.1"]))
    with pytest.raises(InvalidInputError, match="row=2"):
        wb.show_attention(acts, row=2)


def test_tokens_with_numbers() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    values = torch.arange(14.0).view(2, 7) - 3
    shown = wb.show_tokens(batch, values, "score")
    assert shown.frame().score.tolist() == [*range(-3, 4), 8, 9, 10] and shown.frame().index[-1] == "b"
    assert "position 0: −3.00" in shown._repr_html_() and "#3b82d0" in shown._repr_html_()
    more = wb.show_tokens(model.tokens(["ab"] * 7), torch.zeros(7, 2))._repr_html_()
    assert "the first 6 of 7 rows" in more and "of 2 rows" not in shown._repr_html_()
    with pytest.raises(MismatchError, match=r"\(2, 6\)"):
        wb.show_tokens(batch, values[:, 1:])
