from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.features.corpus import SITE, VOCABULARY, Planted, corpus_store, word
from tests.tiny import tiny_model
from workbench.activations.store import ActivationStore
from workbench.core.errors import CorruptFileError, InvalidInputError, ModelUnavailableError
from workbench.features.explain.examples import ExampleOptions, Examples, examples_of
from workbench.features.explain.judging import Gate, GateOptions, Judge, judge_explanations, judge_gate, parse_reply
from workbench.features.explain.rules import TokenView
from workbench.features.explain.units import unit_bank
from workbench.features.passes.windows import WindowOptions, collect_windows
from workbench.judges.backends import PROMPTS_FILE, REPLIES_FILE, FileJudge, HTTPJudge, LogProbJudge, prompt_id

OPTIONS = GateOptions(per_family=3, per_unit=6)


class Stub:
    """Answers by a function of explanation, passage and whether tokens are marked."""

    def __init__(self, answer: Any) -> None:
        self._answer, self.asked = answer, 0

    name = "stub"

    def answer(self, prompts: Sequence[str]) -> list[float | None]:
        self.asked += len(prompts)
        return [self._answer(*parts(prompt)) for prompt in prompts]


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
        view = TokenView(np.array(ids), np.array(before), np.arange(len(ids)) + 100)
        fires = rules[explanation].fires(view, VOCABULARY)
        wanted = fires[np.array(marks)] if any(marks) else fires
        return float(wanted.mean() >= 0.5) if any(marks) else float(wanted.any())

    return Stub(answer)


def test_one_who_knows_passes_and_one_who_does_not_fails(store: ActivationStore) -> None:
    knowing = rule_reader(store)
    gate = judge_gate(knowing, store, SITE, VOCABULARY, OPTIONS)
    assert (gate.refusal("detection"), gate.refusal("fuzzing")) == ("", ""), gate
    by = {(r.kind, r.family): r for r in gate.results}
    assert by["detection", "token"].margin is not None
    assert by["detection", "token"].margin.value > 0.3
    assert not by["detection", "position"].passed, "shown, though not needed"
    blind = judge_gate(Stub(constant), store, SITE, VOCABULARY, OPTIONS)
    assert all(r.margin is not None and r.margin.value == 0.0 and not r.passed for r in blind.results)
    assert "judge not competent at detection: fails on token (0 [0, 0]" in blind.refusal("detection")


def test_unreadable_replies_are_counted_and_give_no_value(store: ActivationStore) -> None:
    gate = judge_gate(Stub(garbage), store, SITE, VOCABULARY, OPTIONS)
    assert all(r.margin is None and r.failed.value == 1.0 for r in gate.results)
    assert "100% of replies unreadable" in gate.refusal("fuzzing")
    assert Gate("nobody", ()).refusal("detection").endswith("not tried on detection")


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


PASSED = Gate("stub", ())


def allowed(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setattr(Gate, "refusal", lambda self, kind: "")
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
    (entry,) = judge_explanations(judge, Gate("stub", ()), {0: "pets"}, pets, VOCABULARY).values()
    assert (entry.scores, judge.asked) == ({}, 0)
    assert "judge not competent" in entry.text


class _Handler(http.server.BaseHTTPRequestHandler):
    script: list[tuple[int, Any]] = []
    seen: list[tuple[str | None, dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.headers.get("Authorization"), body))
        status, reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        raw = json.dumps(reply).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(*script: tuple[int, Any]) -> Iterator[str]:
    _Handler.script, _Handler.seen = list(script), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        host, port = server.server_address[:2]
        yield f"http://{host!s}:{port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: Any, tops: list[tuple[str, float]] | None = None) -> dict[str, Any]:
    content = None if tops is None else [{"top_logprobs": [{"token": t, "logprob": p} for t, p in tops]}]
    return {"choices": [{"message": {"content": text}, "logprobs": content and {"content": content}}]}


class Short(Stub):
    """Leaves out the last answer."""

    def answer(self, prompts: Sequence[str]) -> list[float | None]:
        return super().answer(prompts)[:-1]


def test_a_judge_that_leaves_out_answers_is_named(store: ActivationStore) -> None:
    with pytest.raises(InvalidInputError, match=r"stub gave \d+ answers to \d+ questions"):
        judge_gate(Short(constant), store, SITE, VOCABULARY, OPTIONS)


def judge_at(url: str, **kwargs: Any) -> HTTPJudge:
    return HTTPJudge(url, "m", key_variable="TEST_JUDGE_KEY", wait=0.0, timeout=5.0, **kwargs)


def test_a_server_is_asked_and_its_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")
    graded = said("1", [("1", -0.2876820724), (" 0", -1.3862943611), ("x", -9.0)])
    with served((200, said("1")), (200, said("0 no")), (200, said("maybe")), (200, said(None)), (200, graded)) as url:
        judge = judge_at(url)
        assert isinstance(judge, Judge)
        answers = judge.answer(["a", "b", "c", "d", "e"])
    assert answers[:4] == [1.0, 0.0, None, None]
    assert answers[4] == pytest.approx(0.75)
    assert _Handler.seen[0][0] == "Bearer secret-key"
    assert _Handler.seen[0][1]["messages"] == [{"role": "user", "content": "a"}]
    assert "secret" not in repr(judge) + judge.name


def test_failures_that_may_pass_are_tried_again_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")
    with served((503, {}), (429, {}), (200, said("1"))) as url:
        assert judge_at(url).answer(["a"]) == [1.0]
        assert len(_Handler.seen) == 3
    for status, tries in ((401, 1), (302, 1), (500, 3)):
        with served((status, {"error": "secret-key"})) as url:
            with pytest.raises(ModelUnavailableError, match=f"status {status}") as caught:
                judge_at(url, retries=2).answer(["a"])
            assert len(_Handler.seen) == tries
            assert "secret" not in str(caught.value)
    with pytest.raises(ModelUnavailableError, match="no connection"):
        judge_at(url, retries=0).answer(["a"])


def test_a_refused_prompt_stops_nobody_and_replies_are_kept(tmp_path: Path) -> None:
    cache = tmp_path / "replies.jsonl"
    with served((200, said("1")), (400, {}), (200, said("0")), (500, {})) as url:
        judge = judge_at(url, retries=0, cache=cache)
        with pytest.raises(ModelUnavailableError, match="status 500"):
            judge.answer(["a", "b", "c", "d"])
        asked = len(_Handler.seen)
        assert judge.answer(["a", "b", "c"]) == [1.0, None, 0.0]
        assert len(_Handler.seen) == asked, "what is known is not asked again"
        again = judge_at(url, retries=0, cache=cache)
        assert again.answer(["c", "b", "a"]) == [0.0, None, 1.0] and len(_Handler.seen) == asked
    with served((400, {})) as url, pytest.raises(ModelUnavailableError, match="status 400"):
        judge_at(url).answer(["a", "b", "c", "d"])
    assert len(_Handler.seen) == 3, "not every prompt is tried at a server that refuses all"
    once, mended = tmp_path / "once.jsonl", (200, said("1"))
    with served((400, {}), (400, {}), (400, {}), (400, {}), (400, {}), (400, {}), mended) as url:
        judge = judge_at(url, cache=once)
        for asked in (3, 6):
            with pytest.raises(ModelUnavailableError, match="status 400"):
                judge.answer(["a", "b", "c", "d"])
            assert len(_Handler.seen) == asked, "what was refused before any reply is asked again"
        assert judge.answer(["a", "b", "c", "d"]) == [1.0] * 4
    with served((400, {}), mended) as url:
        assert judge_at(url).answer(["a", "b"]) == [None, 1.0], (
            "a refusal before the first reply counts once there is one"
        )


def test_probabilities_of_both_spellings_of_a_digit_are_added() -> None:
    graded = said("1", [("1", math.log(0.3)), (" 1", math.log(0.2)), ("0", math.log(0.5))])
    chatter = said("Sure", [("Sure", math.log(0.99)), ("0", math.log(0.001))])
    with served((200, graded), (200, chatter)) as url:
        assert judge_at(url).answer(["a", "b"]) == [pytest.approx(0.5), None]


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


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://me:pw@host/v1", "https://host/v1?key=1", "host", "http://[::1/v1"]
)
def test_odd_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="https://host/v1") as caught:
        HTTPJudge(url, "m")
    assert "pw" not in str(caught.value)


def test_files_carry_prompts_out_and_replies_in(tmp_path: Path) -> None:
    judge = FileJudge(tmp_path / "j")
    assert isinstance(judge, Judge)
    assert judge.answer(["one\n«a»", "two", "two"]) == [None, None, None]
    assert judge.answer(["one\n«a»", "three"]) == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "j" / PROMPTS_FILE).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["one\n«a»", "two", "three"], "each prompt once"
    replies = tmp_path / "j" / REPLIES_FILE
    replies.write_text(json.dumps({"id": prompt_id("two"), "reply": "1"}) + "\n\n")
    assert judge.answer(["two", "three"]) == [1.0, None]
    assert judge.open_prompts() == 2
    replies.write_text('{"id": "x"}\n')
    with pytest.raises(CorruptFileError, match="line 1"):
        judge.answer(["two"])


def test_replies_are_read_strictly() -> None:
    assert [parse_reply(t) for t in ("1\n", "0.", " 1 because", "", "yes", "12")] == [1.0, 0.0, 1.0, None, None, None]


def test_a_local_model_is_read_by_its_log_probabilities() -> None:
    model = tiny_model()
    judge = LogProbJudge(model, batch=2)
    prompts = ["a?", "longer prompt?", "b"]
    answers = judge.answer(prompts)
    zero, one = (model.tokenizer(d, add_special_tokens=False)["input_ids"][0] for d in "01")
    for prompt, p in zip(prompts, answers, strict=True):
        logits = model.logits(prompt + " ")[0]
        expected = torch.softmax(logits[[zero, one]], 0)[1]
        assert p == pytest.approx(float(expected), abs=1e-4)


def test_replies_files_and_keys_that_are_not_what_they_should_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / REPLIES_FILE).write_text('{"id": "a", "reply": "1"}', "utf-16")
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        FileJudge(tmp_path).answer(["a"])
    cache = tmp_path / "cache.jsonl"
    cache.write_text('{"id": "a", "p": "abc"}')
    with pytest.raises(CorruptFileError, match="'abc', which is no number"):
        judge_at("https://host/v1", cache=cache).answer(["a"])
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret\nkey")
    with pytest.raises(InvalidInputError, match="TEST_JUDGE_KEY holds a line break") as caught:
        judge_at("https://host/v1").answer(["a"])
    assert "secret" not in str(caught.value)


def test_absurd_replies_of_a_server_are_no_answer() -> None:
    endless = said("1", [("1", math.inf), ("0", -math.inf)])
    with served((200, said("1", [("1", 1000.0)])), (200, endless), (200, said("1"))) as url:
        assert judge_at(url).answer(["a", "b", "c"]) == [None, None, 1.0]
