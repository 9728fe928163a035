from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.features.toys import random_sae
from tests.tiny import n_hooks, tiny_model
from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import Generated, Last
from workbench.steering import SteerOptions, best_strength, continuation_nll, distinct_2, generation_success, steer
from workbench.steering.measures import TextMeasures, measure
from workbench.steering.report import Arm, build_report

PROMPTS = ("one day", "the", "for now, I", "he said", "two", "what a")
OPTIONS = SteerOptions(new_tokens=6, k=5, temperature=1.0)


@pytest.fixture(scope="module")
def report() -> Any:
    return steer(tiny_model(), random_sae(), [3, 8], (1.0, 3.0), PROMPTS, [20, 21], options=OPTIONS)


def measures(count: list[int], nll: list[float]) -> TextMeasures:
    return TextMeasures(tuple(count), tuple(c / 20 for c in count), tuple(nll), tuple(1.0 for _ in count))


def test_generation_success_counts_occurrences_in_the_continuation() -> None:
    texts = [torch.tensor(t) for t in ([7, 7, 3], [9], [3])]
    assert generation_success(texts, torch.tensor([7, 9])) == 1.0
    m = measure(texts, torch.tensor([7, 9]), torch.zeros(3))
    assert m.count == (2, 1, 0)
    assert m.share == pytest.approx((2 / 3, 1.0, 0.0))


def test_repetition_lowers_distinct_2() -> None:
    assert distinct_2(torch.tensor([5] * 11)) == 0.1
    assert math.isnan(distinct_2(torch.tensor([5])))


def test_nll_is_that_of_the_continuation_alone() -> None:
    model = tiny_model()
    batch = model.tokens(["ab", "abcde"])
    new = [torch.tensor([40, 50, 60]), torch.tensor([70])]
    found = continuation_nll(model, batch, new)
    for i, prompt in enumerate(("ab", "abcde")):
        ids = torch.cat([model.tokens(prompt).ids[0], new[i]])[None]
        alone = model.loss(ids)[0, -len(new[i]) :].mean()
        assert float(found[i]) == pytest.approx(float(alone), abs=1e-4)
    assert continuation_nll(model, batch, [torch.tensor([], dtype=torch.long), new[1]])[0].isnan()


def test_best_strength_weighs_success_against_perplexity() -> None:
    weak, good, odd = measures([0, 1], [1.0, 1.0]), measures([2, 2], [1.1, 1.1]), measures([3, 3], [5.0, 5.0])
    assert best_strength([weak, good, odd], [0, 1]) == (1, False)


def test_best_strength_drops_repetition() -> None:
    good, repeats = measures([1, 1], [2.0, 2.0]), measures([9, 9], [0.5, 0.5])
    assert best_strength([good, repeats], [0, 1]) == (0, False)
    assert best_strength([repeats, repeats], [0, 1]) == (0, True)


def arm(name: str, per_strength: list[TextMeasures], texts: int = 6) -> Arm:
    return Arm(
        name, (3,), (1.0, 2.0)[: len(per_strength)], (tuple(per_strength),), (("x",) * texts,) * len(per_strength), ()
    )


SETTINGS = {
    "site": "s",
    "model": "m",
    "scope": "Last",
    "new_tokens": 20,
    "temperature": 1.0,
    "seed": 0,
    "strengths": [1.0, 2.0],
}


def built(steered: list[TextMeasures]) -> Any:
    zero = measures([0] * 6, [2.0] * 6)
    return build_report(
        SETTINGS, PROMPTS, ("w",), [arm("feature", steered), arm("random", [zero, zero])], [arm("unsteered", [zero])]
    )


def test_evaluation_prompts_have_no_say_in_the_strength() -> None:
    first = measures([2, 0, 2, 0, 2, 0], [2.0] * 6)
    second = measures([1, 3, 1, 3, 1, 3], [2.0] * 6)
    report = built([first, second])
    assert report.features[0].strength == 1.0, "even prompts prefer the first strength"
    assert report.arms[0].count.value == 0.0, "odd prompts measure it"
    swapped = built([first, measures([1, 0, 1, 0, 1, 0], [2.0] * 6)])
    assert swapped.features[0].strength == 1.0


def test_prompts_are_the_units() -> None:
    report = built([measures([0, 1, 0, 2, 0, 3], [2.0] * 6)] * 2)
    for estimate in (*report.differences.values(), report.arms[0].share):
        assert (estimate.n, estimate.unit) == (3, "prompts")
    assert report.differences["unsteered"].value == pytest.approx(0.1)  # (1 + 2 + 3) / 3 of 20 tokens


def test_report_has_every_control(report: Any) -> None:
    assert [a.name for a in report.arms] == ["feature", "random", "control", "unsteered"]
    assert list(report.differences) == ["unsteered", "random directions", "control features, both above unsteered"]
    assert report.n_selection == report.n_evaluation == 3
    assert report.settings["scope"] == "(Last() | Generated())"
    for edits in report.edits.values():
        assert [e.strength for e in edits] == [1.0, 3.0]
        # two features on six prompts; the last prompt token and the new ones that are fed back
        assert all(12 <= e.tokens <= 12 * OPTIONS.new_tokens and e.mean_norm > 0 for e in edits)
    assert len(report.findings()) >= 4
    assert set(report.edits) == {"feature", "random", "control"}


def test_random_directions_add_the_same_norm(report: Any) -> None:
    steered, random = report.edits["feature"][0], report.edits["random"][0]
    assert random.mean_norm == pytest.approx(steered.mean_norm, rel=0.5)


def test_same_seed_same_report_whatever_the_batch(report: Any) -> None:
    model = tiny_model()
    other = replace(OPTIONS, batch_size=5)
    again = steer(model, random_sae(), [3, 8], (1.0, 3.0), PROMPTS, [20, 21], options=other)
    for one, other_ in zip(again.features, report.features, strict=True):
        assert one.perplexity == pytest.approx(other_.perplexity, rel=1e-4)
        assert replace(one, perplexity=0.0) == replace(other_, perplexity=0.0)
    assert again.examples == report.examples
    assert n_hooks(model.hf) == 0


def test_texts_are_those_of_a_plain_steered_generation(report: Any) -> None:
    """Row i of the job is prompt i, so `generate` on the prompts alone draws the same numbers."""
    model, sae = tiny_model(), random_sae()
    best = next(f for f in report.features if report.example_title.startswith(f"Feature {f.feature} ("))
    edit = Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[best.feature], best.strength), Last() | Generated())
    steered = model.generate(list(PROMPTS), 6, intervention=edit, seed=0, temperature=1.0)
    unsteered = model.generate(list(PROMPTS), 6, seed=0, temperature=1.0)
    assert [e[2] for e in report.examples] == [steered.texts[i] for i in (1, 3, 5)]
    assert [e[1] for e in report.examples] == [unsteered.texts[i] for i in (1, 3, 5)]


def test_a_direction_that_writes_its_token_is_found_to_do_so() -> None:
    """A feature that points at one token's unembedding must beat every control; the report must say so."""
    model, sae = tiny_model(), random_sae(site="resid_post.2")
    sae.W_dec[3] = model.W_U[:, 70] / model.W_U[:, 70].norm()
    with model.plan(Intervention.at("resid_post.2", Add(sae.W_dec[3], 50.0))):
        assert int(model.logits("x").argmax()) in model.lens(sae.W_dec[3]).topk(5).indices.tolist()
    found = steer(model, sae, [3], (30.0,), PROMPTS, options=replace(OPTIONS, new_tokens=3))
    assert found.differences["unsteered"].low > 0
    assert "more than unsteered" in found.findings()[1]


def test_wrong_input_is_refused() -> None:
    model, sae = tiny_model(), random_sae()
    with pytest.raises(InvalidInputError, match="at least four"):
        steer(model, sae, [1], prompts=PROMPTS[:3])
    with pytest.raises(InvalidInputError, match="positive factors"):
        steer(model, sae, [1], (0.0, 1.0), PROMPTS)
    with pytest.raises(DegenerateInputError, match="controls at once"):
        steer(model, sae, [1, 2], (1.0,), PROMPTS, [2])
    with pytest.raises(InvalidInputError, match="Feature 99"):
        steer(model, sae, [99], (1.0,), PROMPTS)
    with pytest.raises(InvalidInputError, match="new_tokens"):
        SteerOptions(new_tokens=1)


def test_examples_are_escaped(report: Any) -> None:
    shown = replace(report, examples=(("<b>p</b>", "<i>", "<script>x</script>"),))._repr_html_()
    assert "<script>x" not in shown
    assert "&lt;script&gt;" in shown
