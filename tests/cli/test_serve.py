"""The command serve: where it listens, what it prints, that Ctrl-C ends it in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.features.test_tablecards import make_table
from tests.serve.toys import asked, events, tiny_playground, tiny_sae
from workbench.cli.serve import Serve, address, listen
from workbench.core.errors import InvalidInputError, MismatchError, MissingFileError, WorkbenchError


def _visit(url: str, seen: dict[str, Any]) -> None:
    """Opens the address as a browser would, begins a long run, and presses Ctrl-C in the middle of it."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            seen["page"] = answer.status
            cookie = answer.headers["Set-Cookie"].split(";")[0]
        base = url.partition("/?")[0]
        request = urllib.request.Request(
            f"{base}/api/run?name=a", data=json.dumps(asked(max_new_tokens=1500)).encode(),
            headers={"Content-Type": "application/json", "Cookie": cookie, "Origin": base},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = [answer.readline() for _ in range(3)]
            os.kill(os.getpid(), signal.SIGINT)
            seen["events"] = events(b"".join([*lines, answer.read()]).decode())
    except Exception as error:
        seen["error"] = error
        os.kill(os.getpid(), signal.SIGINT)
        raise


def test_it_serves_until_ctrl_c_and_says_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    listener = listen("127.0.0.1", 0, False)
    command = Serve()
    visits: list[threading.Thread] = []

    class Visiting(type(command)):  # type: ignore[misc]
        def _greet(self, playground: Any, url: str, is_open: bool) -> None:
            super()._greet(playground, url, is_open)
            # The socket listens as soon as the server runs; a connection before that waits.
            listener.listen()
            visits.append(threading.Thread(target=_visit, args=(url, seen)))
            visits[0].start()

    with listener:
        Visiting()._serve(tiny_playground(), None, listener)
    visits[0].join(30)
    assert "error" not in seen, seen
    assert seen["page"] == 200
    assert [event["kind"] for event in seen["events"]][-1] == "stopped"
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "Playground of tiny-llama, SAE at resid_post.1."
    assert lines[1].startswith(address("127.0.0.1", listener_port(lines[1]), ""))
    assert lines[2:] == ["Ctrl-C stops it.", "Stopped."]
    assert "Traceback" not in err


def listener_port(url: str) -> int:
    return int(url.split(":")[2].split("/")[0])


def test_an_open_server_warns(capsys: pytest.CaptureFixture[str]) -> None:
    Serve()._greet(tiny_playground(with_sae=False), "the-url", True)
    assert capsys.readouterr().out.startswith("Other machines can reach this.")
    Serve(json=True)._greet(tiny_playground(with_sae=False), "the-url", False)
    assert json.loads(capsys.readouterr().out) == {"url": "the-url", "model": "tiny-llama", "site": None, "open": False}


def test_it_names_the_command_that_shows_all_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sae").mkdir()
    for made, command in (("sae", "cards"), ("sae/cards", "show")):
        (tmp_path / made).mkdir(exist_ok=True)
        Serve(sae=str(tmp_path / "sae"))._greet(tiny_playground(), "the-url", False)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2:] == ["Ctrl-C stops it.", f"Next: workbench features {command} {tmp_path / 'sae'}"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_another_address_than_this_machine_needs_leave(host: str) -> None:
    with pytest.raises(InvalidInputError, match="--allow-network"):
        listen(host, 0, False)


def test_a_port_that_is_taken_or_is_none_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InvalidInputError, match="0 takes a free one"):
            listen("127.0.0.1", taken.getsockname()[1], False)
    with pytest.raises(InvalidInputError, match="ports are 0 to 65535"):
        listen("127.0.0.1", 70000, False)
    with listen("127.0.0.1", 0, False) as found:
        assert found.getsockname()[0] == "127.0.0.1"


def test_features_come_from_a_table_a_run_or_the_folder_of_the_sae(tmp_path: Path) -> None:
    playground = tiny_playground()
    table = make_table()
    for folder in ("table", "run/artifacts/features", "sae/features"):
        table.save(tmp_path / folder)
    known = table.df["feature"].tolist()
    for given in (
        Serve(features=tmp_path / "table"),
        Serve(features=tmp_path / "run"),
        Serve(sae=str(tmp_path / "sae")),
    ):
        assert given._index(playground)["feature"] == known
    every = Serve(sae=str(tmp_path))._index(playground)
    assert every["feature"] == list(range(24))
    assert all(every["promoted"])
    with pytest.raises(MissingFileError):
        Serve(sae=str(tmp_path), features=tmp_path / "none")._index(playground)
    assert Serve()._index(tiny_playground(with_sae=False)) is None
    table.meta["sae"] = "0123456789ab"
    table.save(tmp_path / "strange")
    with pytest.raises(MismatchError, match="belongs to other features"):
        Serve(features=tmp_path / "strange")._index(playground)


def test_an_sae_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    playground = tiny_playground()
    with pytest.raises(WorkbenchError):
        Serve(sae=str(tmp_path))._sae(playground.model)
    assert Serve()._sae(playground.model) is None


def test_an_sae_that_does_not_fit_is_served_if_that_is_asked_for(tmp_path: Path) -> None:
    playground = tiny_playground()
    noise = tiny_sae(playground.model)
    noise.W_enc.mul_(1000.0)
    noise.save_model(tmp_path)
    with pytest.raises(MismatchError, match="--no-check"):
        Serve(sae=str(tmp_path))._sae(playground.model)
    assert Serve(sae=str(tmp_path), no_check=True)._sae(playground.model) is not None
