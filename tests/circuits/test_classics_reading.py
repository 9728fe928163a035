"""Lens, direct attribution and head scores say what the model computes, and each plausible slip is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import circuits
from circuits.classics.direct import _Reader
from circuits.classics.head_scores import pattern_scores
from circuits.classics.head_weights import circuit, copying, final_norm, middle
from circuits.pairs import Pairs
from tests.tiny import FAMILIES, n_hooks, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.hooks.attach import attached
from workbench.models.frozennorm import FrozenAt, FrozenNorm
from workbench.models.model import Model

CLEAN, PATCH, ANSWERS = ["a dog", "b cat", "c cow"], ["a cat", "b dog", "c hen"], [("a", "b"), ("c", "d"), ("a", "b")]


def pairs_of(model: Model) -> Pairs:
    return Pairs.of(model, clean=CLEAN, patch=PATCH, answers=ANSWERS)


# The logit lens.


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_last_row_of_the_lens_is_the_model_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    read = circuits.logit_lens(model, "a dog", ["resid_post.0"], k=3)
    frame = read.frame()
    last = frame[frame.site == f"resid_post.{model.n_layers - 1}"]
    want = model.logits("a dog", keep="all")[0].log_softmax(-1).topk(3)
    assert last.logprob.tolist() == want.values.flatten().tolist()
    assert last.id_out.tolist() == want.indices.flatten().tolist()
    assert (last.kl_to_output == 0).all() and (frame[frame.site == "resid_post.0"].kl_to_output > 0).all()
    columns = [
        "layer",
        "site",
        "pos",
        "token",
        "rank",
        "token_out",
        "logprob",
        "target_rank",
        "entropy",
        "kl_to_output",
        "control_rank",
    ]
    assert set(columns) <= set(frame)
    assert last["rank"].tolist() == [0, 1, 2] * 5 and "warm" in read._repr_html_()
    assert "<th scope=col>␣</th>" in read._repr_html_(), "the space of the text is seen"


def test_of_pairs_the_target_is_the_answer_and_the_difference_that_of_the_logits() -> None:
    model = tiny_model("gemma2")
    pairs = pairs_of(model)
    read = circuits.logit_lens(model, pairs)
    logits = model.logits(pairs.clean)
    answers = logits.gather(1, pairs.answers)
    last = read.frame().query("layer == 2 and rank == 0")
    assert last.target_rank.tolist() == (logits > answers[:, :1]).sum(1).tolist()
    difference = torch.tensor(last.logit_difference.to_numpy())
    torch.testing.assert_close(difference, answers[:, 0] - answers[:, 1], atol=1e-4, rtol=1e-4)
    assert read.control.next_rank[-1].tolist() != last.target_rank.tolist()
    named = circuits.logit_lens(model, ["a dog", "two"], target="x").frame().query("layer == 2 and rank == 0")
    ends_of = named.groupby(level=0).tail(1).target_rank.tolist()
    ids = [row.tolist()[0] for row in model.tokens(["x"], bos=False).rows()]
    rows = model.logits(["a dog", "two"])
    assert ends_of == (rows > rows[:, ids]).sum(1).tolist()


def test_the_lens_refuses_what_it_can_not_compare() -> None:
    model = tiny_model()
    with pytest.raises(InvalidInputError, match="2 tokens"):
        circuits.logit_lens(model, "a dog", target="xy")
    with pytest.raises(InvalidInputError, match="pairs have their answers"):
        circuits.logit_lens(model, pairs_of(model), target="x")
    with pytest.raises(DegenerateInputError, match="one token"):
        circuits.logit_lens(model, "a")


# Direct logit attribution.


@pytest.mark.parametrize("family", FAMILIES)
def test_components_add_up_to_the_logit_difference_and_heads_to_attention(family: str) -> None:
    model = tiny_model(family)
    model.hf.double()
    pairs = pairs_of(model)
    real = model.logits(pairs.clean).gather(1, pairs.answers)
    found = {
        by: circuits.direct_logit_attribution(model, pairs, by, ablate=False) for by in ("component", "layer", "head")
    }
    for parts in found.values():
        torch.testing.assert_close(model.head.finish(parts.logits), real, atol=1e-5, rtol=1e-5)
        total = sum((part.diff for part in parts.parts), torch.zeros(3, dtype=torch.float64))
        torch.testing.assert_close(total, parts.logits[:, 0] - parts.logits[:, 1], atol=1e-6, rtol=1e-6)
    for layer in range(model.n_layers):
        heads = [p for p in found["head"].parts if p.layer == layer and p.component in ("head", "attention bias")]
        (attn,) = (p for p in found["component"].parts if p.name == f"attn_out.{layer}")
        assert len(heads) == 3
        torch.testing.assert_close(sum(p.logit_a for p in heads), attn.logit_a, atol=1e-6, rtol=1e-6)


def test_an_unfrozen_scale_does_not_add_up() -> None:
    model = tiny_model()
    reader = _Reader.of(model, pairs_of(model))
    norm = reader.norm.of
    parts = [written for _, _, _, written, _ in reader.parts("component") if written.shape[-1] > 2]
    frozen = sum(reader.norm.part(x) for x in parts)
    unfrozen = sum(norm.at(x).part(x) for x in parts)
    whole = norm.at(sum(parts)).part(sum(parts))
    torch.testing.assert_close(frozen, whole, atol=1e-4, rtol=1e-4)
    assert float((unfrozen - whole).abs().max()) > 0.1


def test_the_ablation_beside_a_component_is_a_run_without_it() -> None:
    model = tiny_model("gemma2")
    pairs = pairs_of(model)
    clean = model.logits(pairs.clean).gather(1, pairs.answers)
    parts = [p for by in ("head", "layer") for p in circuits.direct_logit_attribution(model, pairs, by).parts]

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1] = 0
        return x

    def zero_head(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1, 1] = 0
        return x

    before: list[Tensor] = []
    skip = [
        (model.site_map["resid_pre.1"], lambda x: before.append(x.clone())),
        (model.site_map["resid_post.1"], lambda x: torch.cat([x[:, :-1], before[0][:, -1:]], 1)),
    ]
    for name, hooks in (
        ("head.1.h1", [(model.site_map["z.1"], zero_head)]), ("mlp_out.0", [(model.site_map["mlp_out.0"], zero)]),
        ("layer.1", skip),
    ):  # fmt: skip
        with attached(hooks):
            after = model.logits(pairs.clean).gather(1, pairs.answers)
        (part,) = (p for p in parts if p.name == name)
        fall = (clean - after)[:, 0] - (clean - after)[:, 1]
        torch.testing.assert_close(part.ablation, fall, atol=1e-3, rtol=1e-3)
    biases = [p for p in parts if "bias" in p.name or p.name == "embed"]
    assert biases and all(p.ablation.isnan().all() for p in biases) and n_hooks(model.hf) == 0


def test_the_table_of_components_has_shares_or_says_why_not() -> None:
    model = tiny_model()
    found = circuits.direct_logit_attribution(model, pairs_of(model), "head", ablate=False)
    clear = replace(found, logits=torch.tensor([[2.0, 1.0], [2.1, 1.0], [1.9, 1.0]]))
    frame = clear.frame()
    assert frame["share"].sum() == pytest.approx(frame["diff"].sum() / 1.0)
    assert frame["diff"].sum() == pytest.approx(float((found.logits[:, 0] - found.logits[:, 1]).mean()), abs=1e-4)
    assert frame.pos.tolist() == [4] * len(frame) and (frame.ci_low <= frame["diff"]).all()
    noise = replace(found, logits=torch.tensor([[2.0, 1.0], [1.0, 2.1], [1.0, 1.1]]))
    assert noise.frame()["share"].isna().all() and any("within noise" in text for text in noise.findings())


def test_a_norm_of_another_kind_is_refused() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MismatchError, match="neither an RMS norm nor a layer norm"):
        FrozenNorm.of(torch.nn.Softmax(-1), x)
    for norm in (torch.nn.LayerNorm(16), torch.nn.RMSNorm(16)):
        torch.nn.init.normal_(norm.weight)
        frozen = FrozenNorm.of(norm, x)
        torch.testing.assert_close(frozen.at(x).sum_of(0.3 * x, 0.7 * x), norm(x), atol=1e-3, rtol=1e-3)
        assert frozen.centres == isinstance(norm, torch.nn.LayerNorm)


# Scores of heads.


def planted(shift: int, n: int, heads: int = 2) -> Tensor:
    """Attention of a second copy to where it was, plus `shift`; of all others to the first token."""
    pattern = torch.zeros(heads, 1 + 2 * n, 1 + 2 * n)
    pattern[:, :, 0] = 1.0
    second = torch.arange(1 + n, 1 + 2 * n)
    pattern[:, second, 0] = 0.0
    pattern[:, second, second - n + shift] = 1.0
    return pattern


def test_induction_attends_to_what_followed_and_one_off_is_a_duplicate_head() -> None:
    induction, duplicate = (pattern_scores(planted(shift, 6), 6) for shift in (1, 0))
    assert induction["induction"].tolist() == [1.0, 1.0] and induction["duplicate"].tolist() == [0.0, 0.0]
    assert duplicate["duplicate"].tolist() == [1.0, 1.0] and float(duplicate["induction"].max()) < 0.1
    assert induction["bos"].tolist() == [0.5, 0.5] and float(induction["entropy"].abs().max()) < 1e-6
    previous = torch.eye(13).roll(-1, 1).tril()[None]
    previous[:, 0, 0] = 1.0
    scores = pattern_scores(previous, 6)
    assert scores["previous"].tolist() == [1.0] and scores["self"].tolist() == [0.0]
    uniform = torch.ones(1, 13, 13).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    want = torch.arange(2.0, 14.0).log().mean()
    torch.testing.assert_close(pattern_scores(uniform, 6)["entropy"][0], want)


def test_head_scores_find_a_head_that_is_planted_in_a_model() -> None:
    model = tiny_model("mistral")  # two heads share one of keys and values

    def plant(pattern: Tensor) -> Tensor:
        if pattern.shape[-1] != 41:
            return pattern
        pattern = pattern.clone()
        pattern[:, 1] = planted(1, 20, 1).to(pattern)
        return pattern

    with attached([(model.site_map["pattern.1"], plant)]):
        found = circuits.head_scores(model, repeated=20, sequences=2, tokens=50)
    best = found.strongest("induction")
    assert (best.layer, best.head, best.kv_head) == (1, 1, 0) and best.value.value > 0.9
    others = [s.value.value for s in found.scores if s.score == "induction" and s is not best]
    assert max(others) < 3 / 20 and len(others) == 5, "random weights attend everywhere"
    frame = found.frame()
    assert set(frame.score) == {"previous", "duplicate", "induction", "bos", "self", "entropy", "copying",
                                "copied tokens", "successor"}  # fmt: skip
    assert frame[frame.score == "self"].null.nunique() == 1 and n_hooks(model.hf) == 0
    assert found.headline().verdict != "not measured" and "warm" in found._repr_html_()
    with pytest.raises(InvalidInputError, match="Measured|measured"):
        found.strongest("nothing")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2", "phi3"])
def test_eigenvalues_of_the_small_map_are_those_of_tokens_to_tokens(family: str) -> None:
    model = tiny_model(family)
    model.hf.double()
    final = final_norm(model, model.capture("abc", ["resid_post.2"])["resid_post.2"][0])
    maps = circuit(model, 1)
    embedded, unembed = model.hf.get_input_embeddings().weight, model.hf.get_output_embeddings().weight
    written = FrozenAt(final, torch.ones(len(embedded), 1)).part(maps.value(1, embedded) @ maps.writes[1])
    large = torch.linalg.eigvals(written @ unembed.T)
    want = float(large.real.sum() / large.abs().sum())
    assert copying(maps, 1, middle(model, final)) == pytest.approx(want, abs=1e-6)
    assert copying(maps, 0, middle(model, final)) != pytest.approx(want, abs=1e-3)
    assert (maps.norm.norm is None) == (family == "olmo2"), "it has its norms behind the sublayers"
    # the map is what the model computes: values from the stream, but for biases, which the difference of two tokens lacks
    acts = model.capture("abc", ["resid_pre.1", "v.1"])
    stream, values = acts["resid_pre.1"][0].double(), acts["v.1"][0, :, maps.kv(1)].double()
    change = maps.value(1, stream) * maps.norm.at(stream).scale
    torch.testing.assert_close(change[0] - change[1], values[0] - values[1], atol=1e-5, rtol=1e-4)


def test_a_head_that_writes_what_it_reads_copies() -> None:
    model = tiny_model("olmo2")
    maps = circuit(model, 0)
    final = final_norm(model, model.capture("abc", ["resid_post.2"])["resid_post.2"][0])
    between = middle(model, final)
    kept = torch.linalg.svd(between).Vh[:8]  # between positive: reads and writes one subspace alike
    square = between.T @ between
    own = replace(maps, reads=kept.T[None], writes=kept[None].expand(2, -1, -1))
    assert copying(own, 0, square) > 0.99 and copying(replace(own, writes=-own.writes), 0, square) < -0.99


def test_wrong_sizes_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(InvalidInputError, match="repeated=2"):
        circuits.head_scores(model, repeated=2)
    with pytest.raises(DegenerateInputError, match="different ones are needed"):
        circuits.head_scores(model, repeated=200)
