"""What the page hands over: the Python block runs as it stands, and a saved intervention is loaded by `generate`."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.serve.test_edits import EDITS
from tests.serve.toys import BASE, TOKEN, asked, tiny_app, tiny_sae
from tests.tiny import tiny_model
from workbench.cli import main
from workbench.core.errors import InvalidInputError
from workbench.interventions.intervention import Intervention
from workbench.models.loading import load_model
from workbench.saes.formats.load import load_sae
from workbench.serve.ask import Ask
from workbench.serve.export import generate_command, packed_edits, python_block, save_edits
from workbench.serve.playground import Playground

QUOTES = "It's \"one\"\\ \n'''wb.x'''\u202e"


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    """A playground of a model and an SAE that lie in folders."""
    place, tiny = tmp_path_factory.mktemp("playground"), tiny_model()
    tiny.hf.save_pretrained(str(place / "model"))
    tiny.tokenizer.save_pretrained(place / "model")
    tiny_sae(tiny).save_model(place / "sae")
    model = load_model(place / "model", dtype="float32", device="cpu", check=False)
    return Playground(model, load_sae(place / "sae"), str(place / "sae"))


@pytest.fixture(scope="module")
def load_once() -> Callable[..., Any]:
    """`load_model`, but what is asked for again, in the same words, is the same model: its self-check takes a second."""
    return functools.cache(load_model)


def _tokens(playground: Playground, ask: Ask) -> dict[str, list[str]]:
    rows: Any = playground.run(ask, lambda _: None, lambda: False)["rows"]
    return {row["arm"]: row["tokens"] for row in rows}


def _several(**changes: Any) -> Ask:
    """A run with all modes; the additions are small enough that the text is no loop."""
    return Ask(**asked(max_new_tokens=12, edits=EDITS, **changes))


@pytest.mark.parametrize(
    "ask",
    [
        _several(),
        _several(scope="all", temperature=0.0, prompt=QUOTES),
        _several(chat=True, seed=7),
        Ask(**asked(max_new_tokens=12, edits=EDITS[1:2])),
        Ask(**asked(max_new_tokens=12, prompt=QUOTES)),
    ],
    ids=["all modes", "whole prompt", "chat", "one edit", "no edit"],
)
def test_the_copied_python_writes_the_same_text(
    playground: Playground,
    ask: Ask,
    load_once: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wb, "load_model", load_once)
    code = python_block(playground, ask)
    names: dict[str, Any] = {}
    exec(compile(code, "copied", "exec"), names)
    ids = names["text"].ids[0].tolist()
    written = _tokens(playground, ask)
    assert [playground.shown(i) for i in ids] == written["steered" if ask.edits else "unsteered"]
    assert not ask.edits or written["steered"] != written["unsteered"]
    assert capsys.readouterr().out == names["text"].texts[0] + "\n"
    assert ("import torch" in code) == ("torch." in code)
    assert "\u202e" not in code


@pytest.mark.parametrize("ask", [_several(), _several(chat=True, seed=7, temperature=1.3, scope="all")])
def test_a_saved_intervention_is_used_by_the_command_that_is_shown(
    playground: Playground, ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_edits(playground, ask, tmp_path)
    if ask.chat:  # the file that is downloaded does as well as the folder
        name, file = packed_edits(playground, ask)
        assert name == f"{folder.name}.zip"
        folder = tmp_path / name
        with file:
            file.seek(0)
            folder.write_bytes(file.read())
    assert main([*shlex.split(generate_command(playground, ask, folder))[1:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [playground.shown(i) for i in said["ids"]] == _tokens(playground, ask)["steered"]
    assert Intervention.load(folder).made_for == playground.model.fingerprint


def test_each_set_of_edits_has_one_folder_inside_the_given_one(playground: Playground, tmp_path: Path) -> None:
    first = save_edits(playground, _several(), tmp_path)
    written = (first / "intervention.json").stat().st_mtime_ns
    assert save_edits(playground, _several(prompt="../../elsewhere", seed=9), tmp_path) == first
    assert (first / "intervention.json").stat().st_mtime_ns == written
    assert save_edits(playground, _several(scope="all"), tmp_path) != first
    changed = Playground(playground.model, tiny_sae(playground.model), playground.sae_source)
    changed.sae.W_dec.data.mul_(2)  # type: ignore[union-attr]
    assert save_edits(changed, _several(), tmp_path) != first, "another SAE at the same place"
    assert {path.parent for path in tmp_path.iterdir()} == {tmp_path}
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_handed_over_is_refused_in_words(playground: Playground, tmp_path: Path) -> None:
    in_memory = Playground(playground.model, playground.sae)
    with pytest.raises(InvalidInputError, match="Save the edits as an intervention"):
        python_block(in_memory, _several())
    with pytest.raises(InvalidInputError, match="--out FOLDER"):
        save_edits(playground, _several(), None)
    with pytest.raises(InvalidInputError, match="no feature is edited"):
        save_edits(playground, Ask(**asked()), tmp_path)
    with pytest.raises(InvalidInputError, match="no SAE was given"):
        python_block(Playground(playground.model), _several())
    assert not list(tmp_path.iterdir())


def test_the_page_is_answered_and_strangers_are_not(
    playground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    from starlette.testclient import TestClient

    app, guard, desk = tiny_app(playground, out=tmp_path / "out")
    body = asked(edits=[{"feature": 3, "mode": "clamp", "strength": 2}])
    stranger = TestClient(app, BASE)
    client = TestClient(app, BASE, cookies={guard.cookie: TOKEN})
    foreign = {"Origin": "https" + "://evil.example"}
    for path in ("/api/python", "/api/save", "/api/download"):
        assert stranger.post(path, json=body).status_code == 401
        assert client.post(path, json=body, headers=foreign).status_code == 403
        assert client.post(path, json=body, headers={"Host": "evil.example"}).status_code == 421
        assert client.get(path).status_code == 405
        assert client.post(path, json=asked(edits=[{"feature": 99}])).status_code == 400
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    assert client.post("/api/python", json=body).json() == {"code": python_block(playground, Ask.read(body))}
    saved = client.post("/api/save", json=body).json()
    answer = client.post("/api/download", json=body)
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{Path(saved["folder"]).name}.zip"'
    (tmp_path / "edits.zip").write_bytes(answer.content)
    loaded = Intervention.load(tmp_path / "edits.zip")
    assert str(loaded) == str(Intervention.load(saved["folder"])) and loaded.made_for == playground.model.fingerprint
    assert not list((tmp_path / "temporary").iterdir()), "a download leaves nothing on the server"
    op: Any = loaded.edits[0].op
    assert (op.name, op.features.tolist(), float(torch.as_tensor(op.value))) == ("SAEClamp", [3], 2.0)
    assert saved["folder"] in saved["command"]
    desk.close()
