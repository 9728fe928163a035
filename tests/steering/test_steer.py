"""Steering runs: rows, controls, strengths, reports."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.features.toys import random_sae
from tests.tiny import FP32_LOGITS, n_hooks, tiny_model
from workbench.controls.arms import UNEDITED, Arm
from workbench.controls.matching import matched_features
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.progress import task
from workbench.features.scores.table import COLUMNS, FeatureTable
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import Generated, Last, NotPrefix
from workbench.steering import SteerOptions, kl_divergence, steer
from workbench.steering.sweep.arms import ArmTexts
from workbench.steering.sweep.build import build_report
from workbench.steering.sweep.prompts import neutral_prompts
from workbench.steering.sweep.rows import ArmRunner, Harm, Pushes
from workbench.steering.sweep.steer import check_prompts, frequencies, frequency_ratio

PROMPTS = ("one day", "the", "for now, I", "he said", "two", "what a")
OPTIONS = SteerOptions(new_tokens=6, k=5, temperature=1.0, plain_texts=("a plain text", "another one"))
ARMS = ["feature", "negated", "random", "matched", "control", "prompt", "unsteered"]


@pytest.fixture(scope="module")
def report() -> Any:
    return steer(tiny_model(), random_sae(), [3, 8], (1.0, 3.0), PROMPTS, [20, 21], options=OPTIONS)


def table_of(d_sae: int = 40) -> FeatureTable:
    """Frequency of feature f is (f + 1) / 100, its largest activation f + 1."""
    rows: dict[str, Any] = {name: [float("nan")] * d_sae for name in COLUMNS}
    rows |= {
        "feature": list(range(d_sae)),
        "frequency": [(f + 1) / 100 for f in range(d_sae)],
        "max_act": [f + 1.0 for f in range(d_sae)],
    }
    return FeatureTable(pd.DataFrame(rows), {}, {})


def planted(name: str, counts: list[list[float]], nll: float = 2.0) -> ArmTexts:
    """An arm of one feature with these counts by strength and prompt, of 20 tokens each."""
    count = np.array([counts])
    even = {key: np.ones_like(count) for key in ("distinct1", "distinct2", "repeated", "kl", "log_odds")}
    values = {"success@20": count, "share": count / 20, "nll": np.full_like(count, nll), **even}
    return ArmTexts(
        name=name,
        features=(3,),
        strengths=(1.0, 2.0)[: len(counts)],
        values=values,
        texts=((("x",) * 6,) * len(counts),),
    )


def pushed(sae: Any, features: list[int]) -> Arm:
    pushes = Pushes(sae.W_dec.detach()[features], 2.0, sae=sae)
    return Arm(name="pushed", kind="feature", strength=2.0, edits=pushes)


def divergence(logits: Tensor, base: Tensor, rows: Tensor) -> dict[str, Tensor]:
    assert len(logits) == len(base) == len(rows)
    return {"kl": kl_divergence(base, logits)}


SETTINGS = {
    "site": "s", "model": "m", "scope": "Last", "new_tokens": 20, "temperature": 1.0, "seed": 0, "k": 20,
    "strengths": [1.0, 2.0], "a_max": "token", "matched_on_frequency": True,
}  # fmt: skip


def built(counts: list[list[float]]) -> Any:
    zero = [[0.0] * 6] * 2
    arms = [planted("feature", counts), planted("random", zero), planted("negated", zero)]
    return build_report(SETTINGS, PROMPTS, ("w",), arms, {"feature": planted("unsteered", [[0.0] * 6])})


def test_evaluation_prompts_have_no_say_in_the_strength() -> None:
    first = [2.0, 0, 2, 0, 2, 0]
    report = built([first, [1.0, 3, 1, 3, 1, 3]])
    assert report.features[0].strength == 1.0, "even prompts prefer the first strength"
    assert report.arm("feature").success.value == 0.0, "odd prompts measure it"
    assert built([first, [1.0, 0, 1, 0, 1, 0]]).features[0].strength == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"matched_ratio": 1.25}, "norm and frequency (frequencies are a factor of 1.25 apart)."),
        ({"matched_on_frequency": False}, "the norm alone (no frequency is known)."),
    ],
)
def test_the_page_says_what_random_features_are_matched_on(settings: dict[str, Any], words: str) -> None:
    assert (
        f"random features are matched on {words}"
        in replace(built([[1.0] * 6] * 2), settings=SETTINGS | settings)._about()
    )


def test_the_papers_rule_stands_beside_and_says_where_it_was_measured() -> None:
    report = built([[2.0, 0, 2, 0, 2, 0], [1.0, 3, 1, 3, 1, 3]])
    held_out, paper = report.rules
    assert report.features[0].paper_strength == 2.0, "over all prompts the second strength has more tokens"
    assert (held_out.rule, held_out.success.value) == ("held-out rule", 0.0)
    assert (paper.rule, paper.success.value, paper.success.n) == ("paper's rule", 2.0, 6)


def test_prompts_and_features_are_the_units() -> None:
    report = built([[0.0, 1, 0, 2, 0, 3]] * 2)
    for estimate in (*report.differences.values(), report.arm("feature").share):
        assert (estimate.n, estimate.unit) == (3, "prompts x 1 feature")
    assert report.differences["unsteered"].value == pytest.approx(0.1)  # (1 + 2 + 3) / 3 of 20 tokens


def test_the_front_is_marked_among_all_arms() -> None:
    report = built([[0.0, 1, 0, 1, 0, 1], [0.0, 2, 0, 2, 0, 2]])
    best = [(p.arm, p.strength) for p in report.points if p.on_front]
    assert best == [("feature", 2.0)], "no other point has more effect at no more cost"


def test_report_has_every_control(report: Any) -> None:
    assert [a.name for a in report.arms] == ARMS
    assert list(report.differences) == [
        "unsteered", "random directions", "the features subtracted", "an instruction in the prompt",
        "random features, both above unsteered", "control features, both above unsteered",
    ]  # fmt: skip
    assert list(report.concept) == list(report.differences)
    assert report.n_selection == report.n_evaluation == 3
    assert report.settings["scope"] == "(Last() | Generated())"
    for edits in report.edits.values():
        assert [e.strength for e in edits] == [1.0, 3.0]
        # two features on six prompts; the last prompt token and the new ones that are fed back
        assert all(12 <= e.tokens <= 12 * OPTIONS.new_tokens and e.mean_norm > 0 for e in edits)
    assert set(report.edits) == set(ARMS) - {"prompt", "unsteered"}
    assert report.arm("prompt").harm is None and report.arm("feature").harm is not None
    assert report.arm("unsteered").kl.value == report.arm("unsteered").log_odds.value == 0.0
    assert len(report.findings()) >= 6


def test_every_text_is_kept_with_its_measures_but_not_in_the_json(report: Any) -> None:
    frame = report.frame()
    # five edited arms and three unsteered ones of two features, and the instructions
    assert len(frame) == 6 * 2 * (5 * 2 + 3 + 1)
    assert {"success@1", "success@5", "share", "log_odds", "nll", "distinct1", "kl", "text"} <= set(frame.columns)
    assert report.to_json()["written"] == []


def test_random_directions_add_the_same_norm(report: Any) -> None:
    steered, random = report.edits["feature"][0], report.edits["random"][0]
    assert random.mean_norm == pytest.approx(steered.mean_norm, rel=0.5)


def test_same_seed_same_report_whatever_the_batch(report: Any) -> None:
    model = tiny_model()
    other = replace(OPTIONS, batch_size=5)
    again = steer(model, random_sae(), [3, 8], (1.0, 3.0), PROMPTS, [20, 21], options=other)
    ours, theirs = again.frame(), report.frame()
    assert list(ours.text) == list(theirs.text)
    assert np.allclose(ours.nll, theirs.nll, rtol=1e-4, equal_nan=True)
    assert np.allclose(ours[["kl", "log_odds"]], theirs[["kl", "log_odds"]], atol=1e-4)
    assert again.examples == report.examples
    assert n_hooks(model.hf) == 0


@pytest.mark.parametrize("scope", ["last+generated", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_texts_are_those_of_a_plain_steered_generation(family: Any, scope: Any) -> None:
    """Row i of the job is prompt i, so `generate` on the prompts alone draws the same numbers."""
    model, sae = tiny_model(family), random_sae()
    options = replace(OPTIONS, scope=scope)
    sweep = ArmRunner(model, "resid_post.1", model.tokens(list(PROMPTS)), options.writing)
    assert sweep.shares_prefix == (scope == "last+generated" and "the" in PROMPTS)
    arm = pushed(sae, [3, 8])
    with task(total=1, description="x", unit="texts") as progress:
        written = sweep.write(arm, divergence, progress)
        base = sweep.write(UNEDITED, divergence, progress)
    for i, feature in enumerate((3, 8)):
        where = Last() | Generated() if scope == "last+generated" else None
        edit = Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[feature], 2.0), where)
        plain = model.generate(list(PROMPTS), 6, intervention=edit, seed=0, temperature=1.0)
        assert written.texts[i * 6 : i * 6 + 6] == plain.texts
        with model.plan(edit if where is None else Intervention.at("resid_post.1", edit.edits[0].op, Last())):
            logits = model.logits(list(PROMPTS))
        expected = kl_divergence(model.logits(list(PROMPTS)), logits)
        assert torch.allclose(written.first["kl"][i * 6 : i * 6 + 6], expected, atol=1e-3)
    assert base.texts == model.generate(list(PROMPTS), 6, seed=0, temperature=1.0).texts


def test_fluency_is_that_of_the_unsteered_model_after_the_plain_prompt() -> None:
    model, sae = tiny_model(), random_sae()
    sweep = ArmRunner(model, "resid_post.1", model.tokens(list(PROMPTS)), OPTIONS.writing)
    with task(total=1, description="x", unit="texts") as progress:
        written = sweep.write(pushed(sae, [3]), divergence, progress)
    for prompt, ids, nll in zip(PROMPTS, written.ids, written.nll.tolist(), strict=True):
        whole = torch.cat([model.tokens(prompt).ids[0], ids])[None]
        assert nll == pytest.approx(float(model.loss(whole)[0, -len(ids) :].mean()), abs=FP32_LOGITS)


def test_a_prompt_of_one_token_is_steered_as_well() -> None:
    model, sae = tiny_model(), random_sae()
    prompts = model.tokens(["a", "bcd"])
    sweep = ArmRunner(model, "resid_post.1", prompts, OPTIONS.writing)
    with task(total=1, description="x", unit="texts") as progress:
        written = sweep.write(pushed(sae, [3]), divergence, progress)
    edit = Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[3], 2.0), Last() | Generated())
    assert written.texts == model.generate(["a", "bcd"], 6, intervention=edit, seed=0, temperature=1.0).texts


def test_harm_is_the_change_of_the_loss_on_plain_text() -> None:
    model, sae = tiny_model(), random_sae()
    texts = model.tokens(["a plain text", "another"])
    found = Harm(model, "resid_post.1", texts).of(Pushes(sae.W_dec.detach()[[3, 8]], 4.0, sae=sae))
    for i, feature in enumerate((3, 8)):
        op = SAEAddMax(sae, sae.W_dec[feature], 4.0)
        with model.plan(Intervention.at("resid_post.1", op, NotPrefix(1))):
            edited = model.loss(texts).nanmean(1)
        assert np.allclose(found[i], (edited - model.loss(texts).nanmean(1)).numpy(), atol=1e-3)
        assert abs(found[i]).min() > 1e-3


def test_matches_are_near_at_both_ends_of_the_frequencies() -> None:
    import pandas as pd

    frequency = np.exp(np.random.default_rng(0).normal(-6, 2, 4096)).clip(max=0.9)
    table = FeatureTable(pd.DataFrame({"feature": range(4096), "frequency": frequency}), {}, {})
    order = np.argsort(frequency)
    for group in (order[50:70], order[2000:2020], order[-120:-100]):
        found = matched_features(group.tolist(), frequencies(table, 4096), seed=OPTIONS.seed)[0]
        ratio = frequency_ratio(table, group.tolist(), found)
        assert ratio is not None and ratio < 1.25
    assert frequency_ratio(None, [1], [2]) is None
    pair = FeatureTable(pd.DataFrame({"feature": [0, 1], "frequency": [0.1, 0.4]}), {}, {})
    assert frequency_ratio(pair, [0], [1]) == pytest.approx(4.0)


def test_random_features_are_of_like_frequency() -> None:
    norm = random_sae().W_dec.detach().norm(dim=1)
    found = matched_features([10, 30], frequencies(table_of(), 40), norm=norm, excluded=[11, 31])[0]
    assert len(set(found)) == 2
    assert not set(found) & {10, 11, 30, 31}
    assert abs(found[0] - 10) <= 3 and abs(found[1] - 30) <= 3, "frequency rises with the feature"
    assert not frequencies(None, 40).isfinite().any()


def test_strengths_can_multiply_the_largest_activation_in_the_data() -> None:
    model, sae = tiny_model(), random_sae()
    options = replace(OPTIONS, a_max="dataset", table=table_of())
    found = steer(model, sae, [3], (0.5,), PROMPTS, options=options)
    assert found.edits["feature"][0].mean_norm == pytest.approx(0.5 * 4.0, rel=1e-3)  # max_act of 3 is 4, W_dec unit
    with pytest.raises(InvalidInputError, match="table"):
        SteerOptions(a_max="dataset")


def test_a_direction_that_writes_its_token_is_found_to_do_so() -> None:
    """A feature that points at one token's unembedding must beat every control; the report must say so."""
    model, sae = tiny_model(), random_sae(site="resid_post.2")
    sae.W_dec[3] = model.W_U[:, 70] / model.W_U[:, 70].norm()
    with model.plan(Intervention.at("resid_post.2", Add(sae.W_dec[3], 50.0))):
        assert int(model.logits("x").argmax()) in model.lens(sae.W_dec[3]).topk(5).indices.tolist()
    found = steer(model, sae, [3], (30.0,), PROMPTS, options=replace(OPTIONS, new_tokens=12))
    assert found.differences["unsteered"].low > 0
    assert "more than unsteered" in found.findings()[1]
    assert min(value.low for name, value in found.concept.items() if "both" not in name) > 0
    assert found.arm("negated").log_odds.value < 0 < found.arm("feature").log_odds.value


def test_wrong_input_is_refused() -> None:
    model, sae = tiny_model(), random_sae()
    with pytest.raises(InvalidInputError, match="at least four"):
        steer(model, sae, [1], prompts=PROMPTS[:3])
    with pytest.raises(InvalidInputError, match="positive, finite factors"):
        steer(model, sae, [1], (0.0, 1.0), PROMPTS)
    with pytest.raises(InvalidInputError, match="positive, finite factors"):
        steer(model, sae, [1], (1.0, math.inf), PROMPTS)
    with pytest.raises(InvalidInputError, match="positive, finite factors"):
        check_prompts(PROMPTS, (1.0, math.nan), "steer")
    with pytest.raises(DegenerateInputError, match="controls at once"):
        steer(model, sae, [1, 2], (1.0,), PROMPTS, [2])
    with pytest.raises(InvalidInputError, match="Feature 99"):
        steer(model, sae, [99], (1.0,), PROMPTS)
    with pytest.raises(InvalidInputError, match="new_tokens"):
        SteerOptions(new_tokens=1)
    with pytest.raises(InvalidInputError, match="n_prompts=-2"):
        neutral_prompts(-2)
    room = tiny_model("gpt2").n_positions
    assert room is not None
    with pytest.raises(InvalidInputError, match=f"{room}"):
        steer(tiny_model("gpt2"), sae, [1], (1.0,), PROMPTS, options=SteerOptions(new_tokens=room - 12))


def test_examples_are_escaped(report: Any) -> None:
    shown = replace(report, examples=(("<b>p</b>", "<i>", "<script>x</script>"),))._repr_html_()
    assert "<script>x" not in shown
    assert "&lt;script&gt;" in shown
