"""Which features are active on a prompt: the activations of the SAE at each token that the keep rule keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.toys import BASE, TOKEN, asked, tiny_app, tiny_playground
from workbench.core.errors import InvalidInputError
from workbench.serve.ask import Ask
from workbench.serve.playground import Playground
from workbench.serve.reading import N_STRONGEST, REASONS, active_features


@pytest.fixture(scope="module")
def playground() -> Playground:
    return tiny_playground()


def _tokens(playground: Playground, **changes: Any) -> list[dict[str, Any]]:
    found: Any = active_features(playground, Ask.read(asked(**changes)))
    return found["tokens"]


def test_each_token_has_its_strongest_features_in_the_unedited_model(playground: Playground) -> None:
    tokens = _tokens(playground, edits=[{"feature": 3, "strength": 4.0}])
    batch = playground.model.tokens("Hello there")
    sae: Any = playground.sae
    acts = sae.encode(playground.model.capture(batch, ["resid_post.1"])["resid_post.1"][0])
    assert [token["text"] for token in tokens] == [playground.shown(i) for i in batch.ids[0].tolist()]
    assert (tokens[0]["left_out"], tokens[0]["active"], tokens[0]["n_active"]) == ("first token", [], 0)
    for token, row in zip(tokens[1:], acts[1:], strict=True):
        assert token["left_out"] == ""
        assert token["n_active"] == int((row > 0).sum()) > N_STRONGEST
        assert [feature for feature, _ in token["active"]] == row.topk(N_STRONGEST).indices.tolist()
        assert [value for _, value in token["active"]] == pytest.approx(row.topk(N_STRONGEST).values.tolist(), rel=1e-3)
    assert len({str(token["active"]) for token in tokens[1:]}) > 1


def test_features_that_are_silent_are_not_named_and_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    playground = tiny_playground()
    whole = _tokens(playground)
    monkeypatch.setattr("workbench.serve.reading._MAX_ACTIVATIONS", 1)
    assert _tokens(playground) == whole
    sae: Any = playground.sae
    sae.b_enc.data.fill_(-1e6)
    assert all(token["active"] == [] and token["n_active"] == 0 for token in _tokens(playground))


def test_special_tokens_and_sinks_are_marked(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    special = [token["left_out"] for token in _tokens(playground, chat=True)]
    assert special.count("special token") > 1
    capture = type(playground.model).capture

    def with_sink(self: Any, *args: Any) -> Any:
        acts = capture(self, *args)
        acts["resid_post.1"][0, 2] *= 1000
        return acts

    monkeypatch.setattr(type(playground.model), "capture", with_sink)
    assert [token["left_out"] for token in _tokens(playground)][:4] == ["first token", "", REASONS[3], ""]


def test_the_rule_of_the_sae_comes_first() -> None:
    playground = tiny_playground()
    sae: Any = playground.sae
    metadata = sae.cfg.metadata
    metadata.workbench = {"keep": {"max_norm": 1e-6, "special_ids": []}}
    assert {token["left_out"] for token in _tokens(playground)[1:]} == {REASONS[3]}


def test_a_prompt_of_one_token_and_one_without_an_sae(playground: Playground) -> None:
    assert [token["left_out"] for token in _tokens(playground, prompt="a")][0] == "first token"
    with pytest.raises(InvalidInputError, match="--sae FOLDER"):
        _tokens(tiny_playground(with_sae=False))


def test_the_page_is_answered_and_strangers_are_not(playground: Playground) -> None:
    from starlette.testclient import TestClient

    app, guard, desk = tiny_app(playground)
    assert TestClient(app, BASE).post("/api/active", json=asked()).status_code == 401
    client = TestClient(app, BASE, cookies={guard.cookie: TOKEN})
    foreign = {"Origin": "https" + "://evil.example"}
    assert client.post("/api/active", json=asked(), headers=foreign).status_code == 403
    assert client.post("/api/active", json=asked(prompt="")).status_code == 400
    answer = client.post("/api/active", json=asked()).json()
    assert answer["tokens"] == json.loads(json.dumps(_tokens(playground)))
    desk.close()
