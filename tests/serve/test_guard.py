from __future__ import annotations

import pytest

from workbench.serve.guard import Guard, is_loopback

GUARD = Guard("secret", 7777)
HOME = {"host": "127.0.0.1:7777"}
COOKIE = {"workbench-7777": "secret"}


def _status(method: str = "GET", path: str = "/api/setup", guard: Guard = GUARD, **given: dict[str, str]) -> int | None:
    found = guard.refusal(
        method, path, given.get("headers", HOME), given.get("query", {}), given.get("cookies", COOKIE)
    )
    return None if found is None else found.status


def test_the_cookie_opens_everything() -> None:
    assert _status() is None
    assert _status("POST", "/api/run", headers=HOME | {"origin": "http" + "://127.0.0.1:7777"}) is None
    assert _status("POST", "/api/run") is None, "clients other than browsers send no origin"


@pytest.mark.parametrize("cookies", [{}, {"workbench-7777": ""}, {"workbench-7777": "secre"}, {"workbench-8888": "secret"}, {"workbench-7777": "sécret"}])  # fmt: skip
def test_without_the_token_nothing_is_answered(cookies: dict[str, str]) -> None:
    for path in ("/", "/api/setup", "/api/run", "/anything"):
        assert _status(path=path, cookies=cookies) == 401


def test_the_token_in_the_address_opens_the_page_only() -> None:
    assert _status(path="/", cookies={}, query={"token": "secret"}) is None
    assert _status(path="/", cookies={}, query={"token": "other"}) == 401
    assert _status(path="/api/run", cookies={}, query={"token": "secret"}) == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7777", "127.0.0.1.evil.example", "", "localhost.evil.example", "[::2]:80", "0.0.0.0:7777", "192.0.2.1"])  # fmt: skip
def test_another_name_is_refused_even_with_the_token(host: str) -> None:
    assert _status(headers={"host": host}) == 421
    assert _status(path="/", headers={"host": host}, query={"token": "secret"}) == 421


@pytest.mark.parametrize("host", ["localhost:7777", "localhost", "[::1]:7777", "127.0.0.1:9999"])
def test_own_names_are_answered_at_any_port(host: str) -> None:
    assert _status(headers={"host": host}) is None


@pytest.mark.parametrize(
    "origin", ["null", "http" + "://127.0.0.1:8888", "https" + "://evil.example", "http" + "://localhost:7777"]
)
def test_another_origin_may_not_make_the_browser_send_the_cookie(origin: str) -> None:
    assert _status("POST", "/api/run", headers=HOME | {"origin": origin}) == 403


def test_an_open_server_answers_to_addresses_and_its_own_name_but_no_other() -> None:
    guard = Guard("secret", 7777, open=True)
    assert _status(guard=guard, headers={"host": "192.0.2.1:7777"}) is None
    assert _status(guard=guard, headers={"host": "evil.example"}) == 421


def test_the_token_is_not_shown() -> None:
    assert "secret" not in repr(GUARD)
    assert not is_loopback("0.0.0.0")
    assert is_loopback("127.9.9.9")
