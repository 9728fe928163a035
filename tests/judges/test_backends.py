"""Judges: servers, files, people and local models are asked the same questions and give the same kind of answer."""

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

from tests.tiny import tiny_model
from workbench.core.errors import CorruptFileError, InvalidInputError, ModelUnavailableError
from workbench.judges import (
    JUDGES,
    Answer,
    Cost,
    FileJudge,
    HTTPJudge,
    Judge,
    LogProbJudge,
    PersonJudge,
    Question,
    ask,
    parse_reply,
)
from workbench.judges.files import PROMPTS_FILE, REPLIES_FILE


def values(judge: Judge, texts: Sequence[str]) -> list[float | None]:
    return [answer.value for answer in judge.ask([Question(text) for text in texts])]


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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
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


def judge_at(url: str, **kwargs: Any) -> HTTPJudge:
    return HTTPJudge(url, "m", key_variable="TEST_JUDGE_KEY", wait=0.0, timeout=5.0, **kwargs)


def test_a_server_is_asked_and_its_answers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")
    graded = said("1", [("1", -0.2876820724), (" 0", -1.3862943611), ("x", -9.0)])
    with served((200, said("1")), (200, said("0 no")), (200, said("maybe")), (200, said(None)), (200, graded)) as url:
        judge = judge_at(url)
        assert isinstance(judge, Judge)
        answers = values(judge, ["a", "b", "c", "d", "e"])
    assert answers[:4] == [1.0, 0.0, None, None]
    assert answers[4] == pytest.approx(0.75)
    assert _Handler.seen[0][0] == "Bearer secret-key"
    assert _Handler.seen[0][1]["messages"] == [{"role": "user", "content": "a"}]
    assert "secret" not in repr(judge) + judge.name


def test_failures_that_may_pass_are_tried_again_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")
    with served((503, {}), (429, {}), (200, said("1"))) as url:
        assert values(judge_at(url), ["a"]) == [1.0]
        assert len(_Handler.seen) == 3
    for status, tries in ((401, 1), (302, 1), (500, 3)):
        with served((status, {"error": "secret-key"})) as url:
            with pytest.raises(ModelUnavailableError, match=f"status {status}") as caught:
                values(judge_at(url, retries=2), ["a"])
            assert len(_Handler.seen) == tries
            assert "secret" not in str(caught.value)
    with pytest.raises(ModelUnavailableError, match="no connection"):
        values(judge_at(url, retries=0), ["a"])


def test_a_refused_prompt_stops_nobody_and_replies_are_kept(tmp_path: Path) -> None:
    cache = tmp_path / "replies"
    with served((200, said("1")), (400, {}), (200, said("0")), (500, {})) as url:
        judge = judge_at(url, retries=0, cache=cache)
        with pytest.raises(ModelUnavailableError, match="status 500"):
            values(judge, ["a", "b", "c", "d"])
        asked = len(_Handler.seen)
        assert values(judge, ["a", "b", "c"]) == [1.0, None, 0.0]
        assert len(_Handler.seen) == asked, "what is known is not asked again"
        again = judge_at(url, retries=0, cache=cache)
        assert values(again, ["c", "b", "a"]) == [0.0, None, 1.0] and len(_Handler.seen) == asked
        with pytest.raises(ModelUnavailableError, match="status 500"):  # graded answers are not digits
            values(judge_at(url, retries=0, cache=cache, logprobs=False), ["a"])
    with served((400, {})) as url, pytest.raises(ModelUnavailableError, match="status 400"):
        values(judge_at(url), ["a", "b", "c", "d"])
    assert len(_Handler.seen) == 3, "not every prompt is tried at a server that refuses all"
    once, mended = tmp_path / "once", (200, said("1"))
    with served((400, {}), (400, {}), (400, {}), (400, {}), (400, {}), (400, {}), mended) as url:
        judge = judge_at(url, cache=once)
        for asked in (3, 6):
            with pytest.raises(ModelUnavailableError, match="status 400"):
                values(judge, ["a", "b", "c", "d"])
            assert len(_Handler.seen) == asked, "what was refused before any reply is asked again"
        assert values(judge, ["a", "b", "c", "d"]) == [1.0] * 4
    with served((400, {}), mended) as url:
        assert values(judge_at(url), ["a", "b"]) == [None, 1.0], (
            "a refusal before the first reply counts once there is one"
        )


def test_probabilities_of_both_spellings_of_a_digit_are_added() -> None:
    graded = said("1", [("1", math.log(0.3)), (" 1", math.log(0.2)), ("0", math.log(0.5))])
    chatter = said("Sure", [("Sure", math.log(0.99)), ("0", math.log(0.001))])
    with served((200, graded), (200, chatter)) as url:
        assert values(judge_at(url), ["a", "b"]) == [pytest.approx(0.5), None]


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
    assert values(judge, ["one\n«a»", "two", "two"]) == [None, None, None]
    assert values(judge, ["one\n«a»", "three"]) == [None, None]
    lines = [json.loads(line) for line in (tmp_path / "j" / PROMPTS_FILE).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["one\n«a»", "two", "three"], "each prompt once"
    replies = tmp_path / "j" / REPLIES_FILE
    replies.write_text(json.dumps({"id": Question("two").id, "reply": "1"}) + "\n\n")
    assert values(judge, ["two", "three"]) == [1.0, None]
    assert judge.open_prompts() == 2
    replies.write_text('{"id": "x"}\n')
    with pytest.raises(CorruptFileError, match="line 1"):
        values(judge, ["two"])


def test_replies_are_read_strictly() -> None:
    assert [parse_reply(t) for t in ("1\n", "0.", " 1 because", "", "yes", "12")] == [1.0, 0.0, 1.0, None, None, None]


def test_a_local_model_is_read_by_its_log_probabilities() -> None:
    model = tiny_model()
    judge = LogProbJudge(model, batch=2)
    prompts = ["a?", "longer prompt?", "b"]
    answers = values(judge, prompts)
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
        values(FileJudge(tmp_path), ["a"])
    with served((200, said("1"))) as url:
        values(judge_at(url, cache=tmp_path / "kept"), ["a"])
        (log,) = (tmp_path / "kept").rglob("answers.jsonl")
        log.write_text(log.read_text().replace('"value": 1.0', '"value": "abc"'))
        with pytest.raises(CorruptFileError, match="'abc'.*Delete its line"):
            values(judge_at(url, cache=tmp_path / "kept"), ["a"])
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret\nkey")
    with pytest.raises(InvalidInputError, match="TEST_JUDGE_KEY holds a line break") as caught:
        values(judge_at("https://host/v1"), ["a"])
    assert "secret" not in str(caught.value)


def test_absurd_replies_of_a_server_are_no_answer() -> None:
    endless = said("1", [("1", math.inf), ("0", -math.inf)])
    with served((200, said("1", [("1", 1000.0)])), (200, endless), (200, said("1"))) as url:
        assert values(judge_at(url), ["a", "b", "c"]) == [None, None, 1.0]


def test_a_server_reads_any_scale_and_its_cost_is_counted_once(tmp_path: Path) -> None:
    graded = said("3", [("3", math.log(0.75)), ("1", math.log(0.25))]) | {"usage": {"total_tokens": 7}}
    reasoned = said("It is fine. Rating: [[2]]", [("It", 0.0)]) | {"usage": {"total_tokens": 30}}
    questions = [Question("how much?", 4), Question("how good?", 2, reasons=True)]
    with served((200, graded), (200, reasoned)) as url:
        judge = judge_at(url, cache=tmp_path / "kept")
        first, again = ask(judge, questions), judge_at(url, cache=tmp_path / "kept").ask(questions)
        assert _Handler.seen[0][1]["top_logprobs"] == 5 and "logprobs" not in _Handler.seen[1][1]
        assert _Handler.seen[1][1]["max_tokens"] > _Handler.seen[0][1]["max_tokens"]
        assert len(_Handler.seen) == 2
        values(judge, ["how good?"])
        assert len(_Handler.seen) == 3, "the same text on another scale is another question"
    assert first.values.tolist() == pytest.approx([2.5, 2.0])  # 0.75 * 3 + 0.25 * 1
    assert (first.cost.answers, first.cost.kept, first.cost.tokens) == (2, 0, 37) and first.cost.seconds > 0
    assert [(a.kept, a.tokens, a.reply) for a in again] == [(True, 7, "3"), (True, 30, "It is fine. Rating: [[2]]")]
    assert sum((a.cost for a in again), Cost()) == Cost(2, 2)


def test_a_person_is_asked_once_in_another_order_and_until_the_reply_can_be_read(tmp_path: Path) -> None:
    typed = {"a": ["x", "9", " 1"], "b": [""], "c": ["2"], "d": ["0"], "e": ["1"]}
    shown: list[str] = []

    def prompt(text: str) -> str:
        if "\n" in text:
            shown.append(text.split("\n")[0])
        return typed[shown[-1]].pop(0)

    questions = [Question("a"), Question("b"), Question("c", 4), Question("d"), Question("e"), Question("a")]
    judge = PersonJudge(tmp_path, "Ada", prompt)
    assert isinstance(judge, Judge)
    assert [a.value for a in judge.ask(questions)] == [1.0, None, 2.0, 0.0, 1.0, 1.0]
    assert sorted(shown) == list("abcde") and shown != list("abcde")
    assert not any(typed.values())
    assert [a.judge for a in judge.ask(questions)] == ["Ada"] * 6 and len(shown) == 5, "what was left empty stays so"


def test_a_local_model_answers_mixed_scales_in_the_order_of_the_questions() -> None:
    judge = LogProbJudge(tiny_model(), batch=2)
    questions = [Question("a", 4), Question("b"), Question("c", 4), Question("d"), Question("e", 4)]
    alone = [judge.ask([question])[0].value for question in questions]
    mixed = judge.ask(questions)
    assert [a.value for a in mixed] == pytest.approx(alone, abs=1e-5)
    assert all(a.tokens > 0 and a.judge == judge.name for a in mixed)


def test_answers_off_the_scale_and_scales_that_are_no_digits_are_refused() -> None:
    class Generous:
        name = "generous"

        def ask(self, questions: Sequence[Question]) -> list[Answer]:
            return [Answer(value=3.0, judge=self.name) for _ in questions]

    assert ask(Generous(), [Question("a", 3)]).values.tolist() == [3.0]
    with pytest.raises(InvalidInputError, match=r"generous answered 3.0, and the scale goes from 0 to 2"):
        ask(Generous(), [Question("a", 2)])
    with pytest.raises(InvalidInputError, match="single digits"):
        Question("a", 10)


def test_every_kind_of_judge_is_registered() -> None:
    assert {"file", "http", "logprob", "person"} <= set(JUDGES) and JUDGES["http"] is HTTPJudge
