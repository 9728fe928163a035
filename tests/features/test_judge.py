from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.features.corpus import SITE, VOCABULARY, Planted, corpus_store, word
from workbench.activations.store import ActivationStore
from workbench.core.errors import InvalidInputError
from workbench.features.explain.examples import ExampleOptions, Examples, examples_of
from workbench.features.explain.judging import GateOptions, judge_explanations, judge_gate
from workbench.features.explain.rules import TokenView
from workbench.features.explain.units import unit_bank
from workbench.features.passes.windows import WindowOptions, collect_windows
from workbench.judges import Answer, FileJudge, JudgeGate, Question
from workbench.judges.files import PROMPTS_FILE, REPLIES_FILE

OPTIONS = GateOptions(per_family=3, per_unit=6)


class Stub:
    """Answers by a function of explanation, passage and whether tokens are marked."""

    def __init__(self, answer: Any) -> None:
        self._answer, self.asked = answer, 0

    name = "stub"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += len(questions)
        return [Answer(value=self._answer(*parts(q.text)), judge=self.name, tokens=2) for q in questions]


def parts(prompt: str) -> tuple[str, str]:
    explanation = prompt.split("like this:\n")[1].split("\n\n")[0]
    return explanation, prompt.split("Passage:\n")[1].split("\n\nDoes")[0].split("\n\nAre")[0]


def constant(_explanation: str, _passage: str) -> float:
    return 0.7


def garbage(_explanation: str, _passage: str) -> None:
    return None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return corpus_store(tmp_path_factory.mktemp("j") / "s", rows=600)


def rule_reader(store: ActivationStore) -> Stub:
    """Executes the explanations of the known units on the passage: it knows everything but the position."""
    rules = {unit.rule.text(VOCABULARY): unit.rule for unit in unit_bank(store, per_family=OPTIONS.per_family)}
    texts = sorted(range(len(VOCABULARY)), key=lambda i: -len(VOCABULARY.text(i)))

    def split(passage: str) -> tuple[list[int], list[bool]]:
        ids, marks, marked = [], [], False
        while passage:
            if passage.startswith(("<<", ">>")):
                marked, passage = passage.startswith("<<"), passage[2:]
                continue
            token = next(i for i in texts if passage.startswith(VOCABULARY.text(i)))
            ids.append(token)
            marks.append(marked)
            passage = passage[len(VOCABULARY.text(token)) :]
        return ids, marks

    def answer(explanation: str, passage: str) -> float:
        if explanation not in rules:
            return 0.5
        import numpy as np

        ids, marks = split(passage)
        before = [[ids[i - b] if i >= b else -1 for b in range(1, 9)] for i in range(len(ids))]
        view = TokenView(np.array(ids), np.array(before), np.arange(len(ids)) + 100, np.array([*ids[1:], -1]))
        fires = rules[explanation].fires(view, VOCABULARY)
        wanted = fires[np.array(marks)] if any(marks) else fires
        return float(wanted.mean() >= 0.5) if any(marks) else float(wanted.any())

    return Stub(answer)


def test_one_who_knows_passes_and_one_who_does_not_fails(store: ActivationStore) -> None:
    knowing = rule_reader(store)
    gate = judge_gate(knowing, store, SITE, VOCABULARY, OPTIONS)
    assert (gate.refusal("detection"), gate.refusal("fuzzing")) == ("", ""), gate
    by = {(r.subject, r.group): r for r in gate.trials}
    assert by["detection", "token"].margin is not None
    assert by["detection", "token"].margin.value > 0.3
    assert not by["detection", "position"].passed, "shown, though not needed"
    blind = judge_gate(Stub(constant), store, SITE, VOCABULARY, OPTIONS)
    assert all(r.margin is not None and r.margin.value == 0.0 and not r.passed for r in blind.trials)
    assert "judge not competent at detection: fails on token (0 [0, 0]" in blind.refusal("detection")


def test_unreadable_replies_are_counted_and_give_no_value(store: ActivationStore) -> None:
    gate = judge_gate(Stub(garbage), store, SITE, VOCABULARY, OPTIONS)
    assert all(r.margin is None and r.failed.value == 1.0 for r in gate.trials)
    assert "100% of replies unreadable" in gate.refusal("fuzzing")
    assert JudgeGate("nobody", ()).refusal("detection").endswith("not tried on detection")


@pytest.fixture(scope="module")
def pets(store: ActivationStore) -> dict[int, Examples]:
    units = Planted((
        lambda ids, p: float(ids[p] in (word(" dog"), word(" cat"))), lambda ids, p: float(ids[p] == word(" Paris")),
    ))  # fmt: skip
    found = collect_windows(store, SITE, units, WindowOptions(before=6, after=6))
    return {i: examples_of(found, i, i, ExampleOptions(tested=20)) for i in range(2)}


TEXTS = {0: "pets", 1: "Paris"}
MEANT = {"pets": (" dog", " cat"), "Paris": (" Paris",)}


def omniscient(explanation: str, passage: str) -> float:
    wanted = MEANT.get(explanation, ())
    if "<<" in passage:
        return float(any(f"<<{w}>>" in passage for w in wanted))
    return float(any(w in passage for w in wanted))


PASSED = JudgeGate("stub", ())


def allowed(monkeypatch: pytest.MonkeyPatch) -> JudgeGate:
    monkeypatch.setattr(JudgeGate, "refusal", lambda self, kind: "")
    return PASSED


def test_the_omniscient_scores_one_and_its_controls_a_half(
    monkeypatch: pytest.MonkeyPatch, pets: dict[int, Examples]
) -> None:
    found = judge_explanations(Stub(omniscient), allowed(monkeypatch), TEXTS, pets, VOCABULARY)
    for entry in found.values():
        assert {n: e.value for n, e in entry.scores.items()} == {
            "detection": 1.0, "detection: auroc": 1.0, "detection: failed replies": 0.0,
            "fuzzing": 1.0, "fuzzing: auroc": 1.0, "fuzzing: failed replies": 0.0,
        }  # fmt: skip
        assert entry.controls["empty: detection"].value == entry.controls["empty: fuzzing: auroc"].value == 0.5
        assert entry.controls["shuffled: fuzzing"].value <= 0.5
        assert 0.2 < entry.controls["shuffled: detection"].value < 0.8
        assert entry.n_windows == 40


def test_a_constant_scores_a_half(monkeypatch: pytest.MonkeyPatch, pets: dict[int, Examples]) -> None:
    (entry,) = judge_explanations(Stub(constant), allowed(monkeypatch), {0: "x"}, pets, VOCABULARY).values()
    assert {entry.scores[n].value for n in ("detection", "detection: auroc", "fuzzing", "fuzzing: auroc")} == {0.5}


def test_garbage_gets_no_score_but_a_failure_rate(monkeypatch: pytest.MonkeyPatch, pets: dict[int, Examples]) -> None:
    (entry,) = judge_explanations(Stub(garbage), allowed(monkeypatch), {0: "x"}, pets, VOCABULARY).values()
    assert {n: e.value for n, e in entry.scores.items()} == {
        "detection: failed replies": 1.0,
        "fuzzing: failed replies": 1.0,
    }
    assert "40 of 40 replies could not be read" in entry.text


def test_a_refused_judge_is_not_asked(pets: dict[int, Examples]) -> None:
    judge = Stub(omniscient)
    (entry,) = judge_explanations(judge, JudgeGate("stub", ()), {0: "pets"}, pets, VOCABULARY).values()
    assert (entry.scores, judge.asked) == ({}, 0)
    assert "judge not competent" in entry.text


class Short(Stub):
    """Leaves out the last answer."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return super().ask(questions)[:-1]


def test_a_judge_that_leaves_out_answers_is_named(store: ActivationStore) -> None:
    with pytest.raises(InvalidInputError, match=r"stub gave \d+ answers to \d+ questions"):
        judge_gate(Short(constant), store, SITE, VOCABULARY, OPTIONS)


def test_a_file_judge_is_asked_for_the_controls_in_the_same_round(
    monkeypatch: pytest.MonkeyPatch, pets: dict[int, Examples], tmp_path: Path
) -> None:
    judge = FileJudge(tmp_path)
    judge_explanations(judge, allowed(monkeypatch), {0: "x"}, pets, VOCABULARY)
    asked = (tmp_path / PROMPTS_FILE).read_text(encoding="utf-8")
    assert "token is one of" in asked and "(no description)" in asked
    ids = [json.loads(line)["id"] for line in asked.splitlines()]
    lines = [json.dumps({"id": i, "reply": "1"}) for i in ids]
    (tmp_path / REPLIES_FILE).write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    judge_explanations(judge, allowed(monkeypatch), {0: "x"}, pets, VOCABULARY)
    assert judge.open_prompts() == 0, "one round is enough"
