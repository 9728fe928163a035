"""Ratings of steered texts: what is asked, who is believed, and what is made of the numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.core.errors import InvalidInputError, UnknownNameError
from workbench.judges import Answer, FileJudge, LogProbJudge, Question
from workbench.judges.files import PROMPTS_FILE, REPLIES_FILE
from workbench.steering import (
    SteerOptions,
    harmonic_of_means,
    mean_of_harmonics,
    rate_texts,
    rating_gate,
    rating_prompts,
    steer,
)
from workbench.steering.rating.questions import KINDS, KNOWN, templates_from
from workbench.steering.rating.rating_report import RatingReport

RIGHT = {text: (concept, request) for concept, request, text in KNOWN}


class Careful:
    """Knows the texts of the gate; rates others by marks in them: `c2 i1 f0` means concept 2, instruction 1, fluency 0."""

    def __init__(self, blind: str = "", silent: Sequence[str] = ()) -> None:
        self.blind, self.silent, self.asked = blind, silent, 0

    name = "careful"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += len(questions)
        return [Answer(value=self._one(question.text), judge=self.name) for question in questions]

    def _one(self, prompt: str) -> float | None:
        kind = "concept" if "Theme:" in prompt else "instruction" if "Request:" in prompt else "fluency"
        text = prompt.split("Text:\n", 1)[1].split("\n\n", 1)[0]
        if any(word in text for word in self.silent):
            return None
        marked = re.search(rf"\b{kind[0]}(\d)", text)
        if marked:
            return float(marked[1])
        if kind == self.blind:
            return 1.0
        if kind == "fluency":
            return 2.0 if text in RIGHT else 0.0
        return 2.0 if f": {RIGHT[text][kind == 'instruction']}\n" in prompt else 0.0


def _frame(texts: dict[str, dict[float, list[list[str]]]], features: Sequence[int] = (7,)) -> pd.DataFrame:
    """Texts by arm, strength, feature and prompt."""
    return pd.DataFrame([
        {"arm": arm, "feature": features[f], "strength": strength, "prompt": f"p{p}", "text": text}
        for arm, by_strength in texts.items() for strength, by_feature in by_strength.items()
        for f, row in enumerate(by_feature) for p, text in enumerate(row)
    ])  # fmt: skip


EXAMPLE = _frame({
    "unsteered": {0.0: [["c0 i2 f2", "c0 i2 f2", "c1 i2 f2", "c0 i2 f2"]]},
    "feature": {
        1.0: [["c1 i1 f1", "c1 i2 f2", "c0 i2 f2", "c1 i1 f1"]],  # chosen: the first two have 1 and 1.5
        4.0: [["c2 i0 f2", "c2 i2 f0", "c2 i2 f2", "c2 i2 f2"]],  # better on the last two and on all, but those don't choose
    },
})  # fmt: skip


def test_a_text_with_braces_is_put_in_as_it_is() -> None:
    concept, request, fluency = rating_prompts("pets {text}", "say {concept}", "a {instruction} and {text}")
    assert "Theme: pets {text}\n" in concept and "Request: say {concept}\n" in request
    assert all("Text:\na {instruction} and {text}\n" in prompt for prompt in (concept, request, fluency))
    assert all(prompt.endswith("Reply with the number alone.\nRating:") for prompt in (concept, request, fluency))
    assert "pets" not in request + fluency and "say {" not in concept + fluency


def test_the_gate_lets_in_who_tells_right_from_wrong() -> None:
    gate = rating_gate(Careful())
    assert gate.refusal() == "" and set(gate.margins) == set(KINDS) and gate.failed.value == 0
    assert all(margin is not None and margin.value == 2.0 for margin in gate.margins.values())


@pytest.mark.parametrize("blind", KINDS)
def test_the_gate_keeps_out_who_is_blind_to_one_kind(blind: str) -> None:
    judge = Careful(blind=blind)
    refusal = rating_gate(judge).refusal()
    assert blind in refusal and not any(kind in refusal for kind in set(KINDS) - {blind})
    report = rate_texts(judge, EXAMPLE, {7: "pets"})
    assert not report.arms and report.findings()[0].startswith("NO SCORES") and blind in report.findings()[0]


def test_a_judge_that_says_nothing_readable_is_kept_out() -> None:
    gate = rating_gate(Careful(silent=[KNOWN[0][2][:20], KNOWN[1][2][:20]]))
    assert "concept (16.7% of replies unreadable)" in gate.refusal() and gate.failed.value > 0.1


def test_strengths_are_chosen_on_one_half_and_measured_on_the_other() -> None:
    report = rate_texts(Careful(), EXAMPLE, {7: "pets"})
    by_name = {arm.name: arm for arm in report.arms}
    assert by_name["feature"].strengths == {"7": 1.0} and report.prompts == ("p2", "p3")
    rated, base = np.array([[[0.0, 2, 2], [1, 1, 1]]]), np.array([[[1.0, 2, 2], [0, 2, 2]]])
    for name, values in (("feature", rated), ("unsteered", base)):
        assert by_name[name].mean_of_harmonics.value == pytest.approx(mean_of_harmonics(torch.from_numpy(values)))
        assert by_name[name].harmonic_of_means == pytest.approx(harmonic_of_means(torch.from_numpy(values)))
    assert by_name["unsteered"].above_unsteered is None
    above = by_name["feature"].above_unsteered
    assert above is not None and above.value == pytest.approx((0 - 1.5 + 1 - 0) / 2) and above.method == "Student's t"
    assert above.low < -10, "two prompts say next to nothing"
    assert "not clearly different from unsteered" in " ".join(report.findings())
    json.dumps(report.to_json(), allow_nan=False)
    assert isinstance(report, RatingReport) and "Ratings by careful" in report._repr_html_()


def test_replies_that_can_t_be_read_count_as_zero_up_to_a_tenth() -> None:
    frame = pd.concat([EXAMPLE, EXAMPLE.assign(feature=8)], ignore_index=True)
    frame.loc[frame.index[-1], "text"] = "c2 i2 f2 mumble"
    report = rate_texts(Careful(silent=["mumble"]), frame, {7: "pets", 8: "trains"})
    assert report.failed.value == pytest.approx(3 / 72) and report.arms
    frame.loc[frame.index[-3:], "text"] = "mumble"
    report = rate_texts(Careful(silent=["mumble"]), frame, {7: "pets", 8: "trains"})
    assert not report.arms and "could not be read" in report.findings()[0]


def test_files_are_asked_once_and_read_when_they_are_there(tmp_path: Path) -> None:
    judge, sure = FileJudge(tmp_path), Careful()
    first = rate_texts(judge, EXAMPLE, {7: "pets"})
    assert not first.arms and first.waiting == judge.open_prompts() > 72 and "NO SCORES YET" in first.findings()[0]
    asked = [json.loads(line) for line in (tmp_path / PROMPTS_FILE).read_text().splitlines()]
    replies = [{"id": a["id"], "reply": f"It seems so. Rating: [[{sure._one(a['prompt']):.0f}]]"} for a in asked]
    (tmp_path / REPLIES_FILE).write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    judge.ask([Question("a question of somebody else Rating:")])
    report = rate_texts(judge, EXAMPLE, {7: "pets"})
    assert {arm.name: arm.strengths for arm in report.arms}["feature"] == {"7": 1.0} and judge.open_prompts() == 1
    assert len((tmp_path / PROMPTS_FILE).read_text().splitlines()) == len(asked) + 1, (
        "everything was asked the first time"
    )


def test_a_local_model_rates_by_the_probabilities_of_the_digits() -> None:
    model = tiny_model("llama")
    judge = LogProbJudge(model, batch=2)
    prompts = ["a b c Rating:", "d e Rating:", "f Rating:"]
    (*shared, first), *others = (model.tokenizer(f" {d}", add_special_tokens=False)["input_ids"] for d in "012")
    behind = [prompt + model.tokenizer.decode(shared) for prompt in prompts]
    p = model.logits(behind, tokens=[first, *(ids[-1] for ids in others)]).softmax(-1)
    answers = judge.ask([Question(prompt, 2, reasons=True) for prompt in prompts])
    assert [answer.value for answer in answers] == pytest.approx((p[:, 1] + 2 * p[:, 2]).tolist(), abs=1e-5)
    assert rating_gate(judge).refusal(), "random weights are no judge"


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    judge = Careful()
    with pytest.raises(InvalidInputError, match="lacks strength"):
        rate_texts(judge, EXAMPLE.drop(columns="strength"), {7: "pets"})
    with pytest.raises(InvalidInputError, match="an arm named unsteered"):
        rate_texts(judge, EXAMPLE[EXAMPLE["arm"] == "feature"], {7: "pets"})
    with pytest.raises(UnknownNameError, match="no concept is given for feature 7"):
        rate_texts(judge, EXAMPLE, {})
    with pytest.raises(InvalidInputError, match="Give every text once"):
        rate_texts(judge, EXAMPLE.iloc[:-1], {7: "pets"})
    with pytest.raises(InvalidInputError, match="got 3 prompts"):
        rate_texts(judge, EXAMPLE[EXAMPLE["prompt"] != "p0"], {7: "pets"})
    with pytest.raises(InvalidInputError, match="feature 7 has no unsteered texts"):
        base = EXAMPLE["feature"].where(EXAMPLE["arm"] != "unsteered", 8)
        rate_texts(judge, EXAMPLE.assign(feature=base), {7: "pets", 8: "trains"})
    assert not judge.asked, "a table that can't be used costs no question"
    matched = EXAMPLE[EXAMPLE["arm"] == "feature"].assign(arm="matched", feature=99)
    base = EXAMPLE[EXAMPLE["arm"] == "unsteered"].assign(feature=99, text="c2 i2 f2")
    frame = pd.concat([EXAMPLE, matched, base], ignore_index=True)
    report, alone = rate_texts(judge, frame, {7: "pets"}), rate_texts(judge, EXAMPLE, {7: "pets"})
    assert report.left_out == ("matched",) and "matched" in " ".join(report.findings())
    assert report.arms == alone.arms, "unsteered texts of the features that are left out don't count"
    both = {arm.name: arm for arm in rate_texts(judge, frame, {7: "pets", 99: "trains"}).arms}
    above = both["matched"].above_unsteered
    assert above is not None and above.value == pytest.approx(0.5 - 2.0), "compared with its own unsteered texts"
    assert both["feature"].above_unsteered == alone.arms[1].above_unsteered
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"concept": "{concept} {text}", "instruction": "{text}", "fluency": "{text}"}))
    with pytest.raises(InvalidInputError, match=r"'instruction' lacks \{instruction\}"):
        templates_from(file)
    file.write_text(json.dumps({k: "{concept}{instruction}{text}" for k in KINDS}))
    assert rating_prompts("a", "b", "c", templates_from(file)) == ("abc",) * 3


def test_the_table_of_a_steering_run_is_rated_as_it_is() -> None:
    options = SteerOptions(new_tokens=3, k=5, plain_texts=("a plain text",))
    prompts = ("one day", "the", "he said", "two")
    frame = steer(tiny_model(), random_sae(), [3, 7], (1.0, 2.0), prompts, options=options).frame()
    assert set(frame[frame["arm"] == "unsteered"]["feature"]) > {3, 7}, (
        "features of other arms have unsteered texts too"
    )
    report = rate_texts(Even(), frame, {3: "pets", 7: "trains"})
    names = {arm.name for arm in report.arms}
    assert {"feature", "unsteered", "random", "negated"} <= names and set(report.left_out) == set(frame["arm"]) - names
    assert all(arm.above_unsteered is None or arm.above_unsteered.value == 0 for arm in report.arms)


class Even(Careful):
    """Knows the texts of the gate, and rates all others 1."""

    def _one(self, prompt: str) -> float | None:
        text = prompt.split("Text:\n", 1)[1].split("\n\n", 1)[0]
        known = text in RIGHT or any(sorted(text.split()) == sorted(right.split()) for right in RIGHT)
        return super()._one(prompt) if known else 1.0
