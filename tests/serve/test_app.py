"""The server as a browser meets it: who is let in, what is answered, how runs end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.toys import BASE, TOKEN, asked, events, tiny_app, tiny_playground
from tests.tiny import n_hooks
from workbench.core.errors import InvalidInputError
from workbench.serve.ask import Ask
from workbench.serve.desk import Desk
from workbench.serve.guard import HEADERS, Guard
from workbench.serve.playground import Playground, Stopped

EDITS = [{"feature": 3, "strength": 4.0}]


@pytest.fixture(scope="module")
def playground() -> Playground:
    return tiny_playground()


@pytest.fixture(scope="module")
def app(playground: Playground) -> Any:
    return tiny_app(playground)[0]


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[Any]:
    """Somebody who has the cookie."""
    from starlette.testclient import TestClient

    with TestClient(app, BASE, cookies={"workbench-7777": TOKEN}) as client:
        yield client


@pytest.fixture
def stranger(app: Any) -> Any:
    """Somebody who has not."""
    from starlette.testclient import TestClient

    return TestClient(app, BASE)


def test_the_address_with_the_token_gives_the_page_and_a_strict_cookie(stranger: Any) -> None:
    answer = stranger.get("/", params={"token": TOKEN})
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"workbench-7777={TOKEN}")
    for flag in ("httponly", "samesite=strict", "path=/"):
        assert flag in cookie
    assert TOKEN not in answer.text
    assert stranger.get("/").status_code == stranger.get("/api/setup").status_code == 200
    assert "set-cookie" not in stranger.get("/").headers


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/api/setup"), ("GET", "/api/feature?number=1"), ("POST", "/api/run?name=a"), ("POST", "/api/stop?name=a"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing")])  # fmt: skip
def test_without_the_token_nothing_is_told(stranger: Any, method: str, path: str) -> None:
    for token in ({}, {"params": {"token": "wrong"}}):
        answer = stranger.request(method, path, json=asked() if method == "POST" else None, **token)
        assert answer.status_code == 401
        assert "workbench serve" in answer.json()["error"]
        assert "set-cookie" not in answer.headers


def test_names_and_origins_of_others_are_refused(client: Any) -> None:
    assert client.get("/api/setup", headers={"Host": "evil.example"}).status_code == 421
    answer = client.post("/api/run?name=a", json=asked(), headers={"Origin": "https" + "://evil.example"})
    assert answer.status_code == 403
    assert client.options("/api/run", headers={"Origin": "https" + "://evil.example"}).status_code == 403
    assert (
        "access-control-allow-origin"
        not in client.get("/api/setup", headers={"Origin": "https" + "://evil.example"}).headers
    )


def test_every_answer_is_kept_from_others(client: Any) -> None:
    for path in ("/", "/api/setup", "/nothing"):
        headers = client.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy


def test_sockets_are_refused(client: Any) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass


def test_the_page_is_told_what_there_is(client: Any, playground: Playground) -> None:
    setup = client.get("/api/setup").json()
    assert setup["about"]["site"] == "resid_post.1"
    assert setup["about"]["d_sae"] == len(setup["index"]["feature"]) == 24
    strings, promoted = setup["index"]["strings"], setup["index"]["promoted"]
    assert [strings[i] for i in promoted[3]] == client.get("/api/feature?number=3").json()["promoted"]
    assert client.get("/api/feature?number=24").status_code == 400
    assert "0 to 23" in client.get("/api/feature?number=24").json()["error"]
    assert client.get("/api/feature?number=x").status_code == 400


def test_a_run_answers_line_by_line_with_the_edit_report(client: Any, playground: Playground) -> None:
    answer = client.post("/api/run?name=one", json=asked(edits=EDITS))
    assert answer.status_code == 200
    said = events(answer.text)
    assert [event["kind"] for event in said if event["kind"] != "token"] == [
        "waiting",
        "writing",
        "writing",
        "writing",
        "measuring",
        "done",
    ]
    alone = playground.run(Ask.read(asked(edits=EDITS)), lambda _: None, lambda: False)
    assert said[-1]["result"] == alone
    report = said[-1]["result"]["edits"]
    assert [edit["arm"] for edit in report] == ["steered", "control"]
    assert all(edit["tokens"] == 6 and edit["passes"] == 6 and edit["norm"] > 0 for edit in report)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (asked(prompt=""), "prompt is empty"),
        (asked(edits=[{"feature": 99}]), "features 0 to 23"),
        (asked(extra=1), "no key 'extra'"),
        (asked(temperature="hot"), "expected float"),
        (asked(temperature={"$float": "x"}), "expected float"),
        (asked(seed=2**70), "Seed"),
        (asked(prompt="a" * 100_001), "100,001 characters"),
        (asked(edits=[{"feature": 1}] * 65), "at most 64"),
        ([1, 2], "JSON object"),
        ("text", "JSON object"),
        (None, "JSON object"),
    ],
)
def test_wrong_input_is_refused_in_words(client: Any, body: Any, said: str) -> None:
    answer = client.post("/api/run?name=one", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_what_is_no_json_is_refused_in_words(client: Any) -> None:
    for content, kind in (
        (b"{", "application/json"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
        (b"\xff", "application/json"),
    ):
        answer = client.post("/api/run?name=one", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert answer.json()["error"]
    assert client.post("/api/run", json=asked()).status_code == 400, "a run needs a name"


def test_bodies_are_read_to_a_limit(client: Any) -> None:
    answer = client.post("/api/run?name=one", content=b" " * 2**21, headers={"Content-Type": "application/json"})
    assert (answer.status_code, "1,048,576 bytes" in answer.json()["error"]) == (413, True)


def test_a_run_is_stopped_inside_a_pass(playground: Playground) -> None:
    calls = iter([False] * 3)
    with pytest.raises(Stopped):
        playground.run(Ask.read(asked()), lambda _: None, lambda: next(calls, True))
    assert n_hooks(playground.model.hf) == 0


def test_prompts_have_a_longest_length(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.serve.playground.MAX_PROMPT_TOKENS", 3)
    with pytest.raises(InvalidInputError, match="The prompt has 5 tokens"):
        playground.run(Ask.read(asked(prompt="hello")), lambda _: None, lambda: False)


def test_half_characters_and_hostile_prompts_come_back_as_they_are_shown(client: Any) -> None:
    answer = client.post(
        "/api/run?name=one", content=b'{"prompt": "a\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, "surrogate" in answer.json()["error"]) == (400, True)
    said = events(client.post("/api/run?name=one", json=asked(prompt="<script>\u202e\n\0")).text)
    assert said[-1]["kind"] == "done"


def test_an_error_while_it_runs_is_told_and_the_next_run_works(client: Any, playground: Playground) -> None:
    sae = playground.sae
    kept = sae.b_enc.detach().clone()
    sae.b_enc.data.fill_(-1e6)
    last = events(client.post("/api/run?name=one", json=asked(edits=EDITS)).text)[-1]
    sae.b_enc.data.copy_(kept)
    assert last["kind"] == "error"
    assert "SAEAddMax at resid_post.1" in last["message"]
    assert events(client.post("/api/run?name=one", json=asked(edits=EDITS)).text)[-1]["kind"] == "done"


def test_two_pages_at_once_get_their_own_texts(client: Any) -> None:
    each = [asked(seed=seed, max_new_tokens=12, edits=EDITS if seed % 2 else []) for seed in range(4)]
    alone = [events(client.post("/api/run?name=x", json=body).text)[-1]["result"] for body in each]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: events(client.post(f"/api/run?name=tab{i}", json=each[i]).text), range(4)))
    assert [said[-1]["result"] for said in answers] == alone
    assert len({str(result["rows"][0]["tokens"]) for result in alone}) == 4


def test_a_run_can_be_stopped_and_the_one_behind_it_goes_on(client: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(client.post, "/api/run?name=long", json=asked(max_new_tokens=1500, edits=EDITS))
        while not client.post("/api/stop?name=long").json()["stopped"]:
            pass
        assert events(long.result().text)[-1]["kind"] == "stopped"
    assert client.post("/api/stop?name=long").json() == {"stopped": False}
    assert events(client.post("/api/run?name=long", json=asked()).text)[-1]["kind"] == "done"


class _Held:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, say: Any, stopped: Any) -> dict[str, Any]:
        self.stopped = stopped
        self.began.set()
        assert self.go.wait(30)
        return {"stopped": stopped()}


async def _collect(desk: Desk, name: str, work: Any) -> list[str]:
    return [event["kind"] async for event in desk.events(name, work)]


def test_runs_wait_in_line_and_those_that_wait_can_be_stopped() -> None:
    import asyncio

    async def play() -> None:
        desk, first, second = Desk(), _Held(), _Held()
        one = asyncio.create_task(_collect(desk, "one", first))
        await asyncio.to_thread(first.began.wait, 30)
        two = asyncio.create_task(_collect(desk, "two", second))
        await asyncio.sleep(0)
        with pytest.raises(Exception, match="'two' is there already"):
            await _collect(desk, "two", second)
        assert desk.stop("two")
        assert not desk.stop("three")
        first.go.set()
        assert await one == ["waiting", "done"]
        assert await two == ["waiting", "stopped"]
        assert not second.began.is_set()
        desk.close()

    asyncio.run(play())


def test_closing_stops_what_runs_and_what_waits() -> None:
    import asyncio

    async def play() -> None:
        desk, first, second = Desk(), _Held(), _Held()
        one = asyncio.create_task(_collect(desk, "one", first))
        await asyncio.to_thread(first.began.wait, 30)
        two = asyncio.create_task(_collect(desk, "two", second))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(desk.close))
        while not first.stopped():
            await asyncio.sleep(0.001)
        first.go.set()
        await closing
        assert await one == ["waiting", "done"]
        assert await two == ["waiting", "stopped"]

    asyncio.run(play())


def test_who_stops_listening_stops_the_run() -> None:
    import asyncio

    async def play() -> None:
        desk, seen, over = Desk(), threading.Event(), threading.Event()

        def work(say: Any, stopped: Any) -> dict[str, Any]:
            while not stopped() and not over.is_set():
                pass
            if stopped():
                seen.set()
            return {}

        listening = asyncio.create_task(_collect(desk, "one", work))
        await asyncio.sleep(0.01)
        listening.cancel()
        found = await asyncio.to_thread(seen.wait, 10)
        over.set()
        desk.close()
        assert found

    asyncio.run(play())


def test_what_nobody_expected_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    def work(say: Any, stopped: Any) -> dict[str, Any]:
        raise ZeroDivisionError("by zero")

    async def play() -> list[dict[str, Any]]:
        desk = Desk()
        found = [dict(event) async for event in desk.events("one", work)]
        await asyncio.to_thread(desk.close)
        return found

    last = asyncio.run(play())[-1]
    assert last["kind"] == "error"
    assert "ZeroDivisionError: by zero" in last["message"]
    assert "ZeroDivisionError" in caplog.text


def test_without_an_index_features_are_found_by_number() -> None:
    from starlette.testclient import TestClient

    app, guard, _ = tiny_app(tiny_playground(with_sae=False))
    assert isinstance(guard, Guard)
    with TestClient(app, BASE, cookies={guard.cookie: TOKEN}) as client:
        setup = client.get("/api/setup").json()
        assert (setup["index"], setup["about"]["site"], setup["about"]["d_sae"]) == (None, None, None)
        assert client.get("/api/feature?number=1").status_code == 400
        assert "--sae" in client.post("/api/run?name=a", json=asked(edits=EDITS)).json()["error"]
        assert events(client.post("/api/run?name=a", json=asked()).text)[-1]["kind"] == "done"
