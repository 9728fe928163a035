"""What the playground writes is what `Model.generate` writes, and what it measures is what whole forward passes give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.saes.handmade import relu_sae
from tests.serve.toys import D_SAE, asked, tiny_playground, tiny_sae
from tests.tiny import D_MODEL, FP32_LOGITS, n_hooks, tiny_model
from workbench.core.errors import EditError, InvalidInputError, MismatchError
from workbench.hooks.attach import attached
from workbench.serve.ask import Ask
from workbench.serve.edits import control, steered
from workbench.serve.playground import Playground, Stopped
from workbench.steering.sweep.options import SCOPES

EDITS = [{"feature": 3, "strength": 4.0}, {"feature": 5, "mode": "clamp", "strength": 6.0}]


def _run(playground: Playground, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []
    return playground.run(Ask.read(asked(**changes)), lambda event: said.append(dict(event)), lambda: False), said


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox"])
@pytest.mark.parametrize("scope", ["last+generated", "all"])
def test_the_texts_are_those_of_generate(family: str, scope: str) -> None:
    playground = tiny_playground(family)
    model, sae, site = playground.model, playground.sae, playground.site
    result, said = _run(playground, edits=EDITS, scope=scope)
    ask = Ask.read(asked(edits=EDITS))
    by_arm = {row["arm"]: row for row in result["rows"]}
    assert list(by_arm) == ["unsteered", "steered", "control"]
    for arm, intervention in (
        ("unsteered", None),
        ("steered", steered(sae, site, ask.edits, SCOPES[scope])),
        ("control", control(sae, site, ask.edits, SCOPES[scope], ask.seed)),
    ):
        alone = model.generate(ask.prompt, 6, intervention=intervention, seed=3, temperature=0.8)
        assert by_arm[arm]["tokens"] == [playground.shown(i) for i in alone.ids[0].tolist()], arm
        assert by_arm[arm]["logprobs"][arm] == pytest.approx(alone.logprobs[0].tolist(), abs=1e-3), arm
        reports = [edit for edit in result["edits"] if edit["arm"] == arm]
        assert [(r["tokens"], r["norm"]) for r in reports] == [(r.tokens, r.mean_norm_applied) for r in alone.report]
        streamed = [event["text"] for event in said if event["kind"] == "token" and event["arm"] == arm]
        assert streamed == by_arm[arm]["tokens"][:-1], "the last token is not fed back"
    assert len({tuple(row["tokens"]) for row in result["rows"]}) == 3, (
        "the edits change the texts, or nothing is tested"
    )
    assert n_hooks(model.hf) == 0


def _whole(playground: Playground, ids: torch.Tensor, n_prompt: int, ops: list[Any]) -> torch.Tensor:
    """Log-probabilities where new tokens are predicted, by one plain forward pass with a plain hook."""
    model = playground.model

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for op in ops:
            x[0, n_prompt - 1 :] = op(x[0, n_prompt - 1 :])
        return x

    assert playground.site is not None
    with torch.no_grad(), attached([(model.site_map[playground.site], change)]):
        return model.hf(input_ids=ids).logits[0].float().log_softmax(1)[n_prompt - 1 : -1]


def test_every_text_is_measured_under_every_model() -> None:
    playground = tiny_playground()
    result, _ = _run(playground, edits=EDITS)
    ask = Ask.read(asked(edits=EDITS))
    prompt, given = playground.model.tokens(ask.prompt), (playground.sae, playground.site, ask.edits)
    edits = {
        "unsteered": None,
        "steered": steered(*given, SCOPES[ask.scope]),
        "control": control(*given, SCOPES[ask.scope], ask.seed),
    }
    for row in result["rows"]:
        made = playground.model.generate(ask.prompt, 6, intervention=edits[row["arm"]], seed=3, temperature=0.8)
        new = made.ids[0]
        ids = torch.cat([prompt.ids[0], new])[None]
        base = _whole(playground, ids, prompt.n_tokens, [])
        for arm, intervention in edits.items():
            ops = [] if intervention is None else [edit.op for edit in intervention.edits]
            logprobs = _whole(playground, ids, prompt.n_tokens, ops)
            expected = logprobs.gather(1, new[:, None]).squeeze(1)
            assert row["logprobs"][arm] == pytest.approx(expected.tolist(), abs=1e-3), (row["arm"], arm)
            if ops:
                kl = (base.exp() * (base - logprobs)).sum(1)
                assert row["kl"][arm] == pytest.approx(kl.tolist(), abs=1e-3), (row["arm"], arm)
                assert min(row["kl"][arm]) > 10 * FP32_LOGITS
        assert "unsteered" not in row["kl"]


def test_lens_tokens_are_those_that_the_features_promote() -> None:
    playground = tiny_playground()
    result, _ = _run(playground, edits=[{"feature": 3, "strength": 60.0}], max_new_tokens=20)
    rows = {row["arm"]: row for row in result["rows"]}
    top = playground.model.lens(playground.sae.W_dec[3]).topk(20).indices.tolist()
    texts = [playground.shown(i) for i in top]
    for row in rows.values():
        assert row["lens"] == [token in texts for token in row["tokens"]]
    assert sum(rows["steered"]["lens"]) > max(sum(rows["unsteered"]["lens"]), sum(rows["control"]["lens"]))


def test_the_control_can_be_left_out_and_nothing_is_edited_without_features() -> None:
    playground = tiny_playground()
    result, said = _run(playground, edits=EDITS, control=False)
    assert [row["arm"] for row in result["rows"]] == ["unsteered", "steered"]
    assert [event["of"] for event in said if event["kind"] == "writing"] == [2, 2]
    for plain in (playground, tiny_playground(with_sae=False)):
        result, _ = _run(plain)
        assert ([row["arm"] for row in result["rows"]], result["edits"]) == (["unsteered"], [])
        assert result["rows"][0]["kl"] == {}
        assert len(result["rows"][0]["logprobs"]["unsteered"]) == 6


def test_an_edit_that_changes_nothing_is_seen_in_the_report() -> None:
    playground = tiny_playground()
    with torch.no_grad():
        playground.sae.b_enc[7] = -1e6
    result, _ = _run(playground, edits=[{"feature": 7, "mode": "ablate"}])
    assert [edit["norm"] for edit in result["edits"]] == [0.0, 0.0]
    assert [edit["tokens"] for edit in result["edits"]] == [6, 6], "the last prompt token and five that were fed back"
    assert result["rows"][0]["tokens"] == result["rows"][1]["tokens"] == result["rows"][2]["tokens"]
    assert set(result["rows"][0]["kl"]["steered"]) == {0.0}


def test_an_edit_that_had_to_happen_and_did_not_is_an_error() -> None:
    playground = tiny_playground()
    with torch.no_grad():
        playground.sae.b_enc.fill_(-1e6)
    with pytest.raises(EditError):
        _run(playground, edits=[{"feature": 7, "strength": 3.0}])
    assert n_hooks(playground.model.hf) == 0


def test_a_run_stops_between_tokens() -> None:
    playground = tiny_playground()
    for limit in (0, 4, 9):
        said: list[Any] = []

        def stopped(said: list[Any] = said, limit: int = limit) -> bool:
            return sum(event["kind"] == "token" for event in said) >= limit

        with pytest.raises(Stopped):
            playground.run(Ask.read(asked(edits=EDITS)), said.append, stopped)
        assert sum(event["kind"] == "token" for event in said) == limit
        assert n_hooks(playground.model.hf) == 0
        assert playground.model.active_edits() == ()
    assert [row["arm"] for row in _run(playground, edits=EDITS)[0]["rows"]] == ["unsteered", "steered", "control"]


def test_a_text_that_ends_at_once_is_measured_as_nothing() -> None:
    model = tiny_model()
    playground = Playground(model, tiny_sae(model))
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.zero_()
        model.hf.get_output_embeddings().weight[model.stop_ids[0]] = 1.0
    direction = torch.ones(D_MODEL)
    with attached([(model.site_map["final_norm"], lambda x: x * 0 + direction)]):
        result, _ = _run(playground, temperature=0)
    assert result["rows"][0]["tokens"] == []
    assert result["rows"][0]["ended"] == "stop token"
    assert result["rows"][0]["logprobs"] == {"unsteered": []}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"edits": [{"feature": D_SAE}]}, f"features 0 to {D_SAE - 1}"),
        ({"edits": [{"feature": -1}]}, "Feature -1 does not exist"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_it_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        _run(tiny_playground(), **changes)


def test_edits_need_an_sae_and_a_chat_a_template() -> None:
    playground = tiny_playground(with_sae=False)
    with pytest.raises(InvalidInputError, match="--sae"):
        _run(playground, edits=EDITS)
    assert "template" in _run(playground, chat=True)[0]["note"]
    playground.model.tokenizer.chat_template = None
    with pytest.raises(InvalidInputError, match="no chat template"):
        _run(playground, chat=True)
    with pytest.raises(InvalidInputError, match="no SAE"):
        playground.lens(0)


def test_an_sae_of_another_model_or_a_transcoder_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(MismatchError):
        Playground(model, tiny_sae(tiny_model(seed=1)))
    sae = relu_sae(model, torch.eye(D_MODEL), torch.zeros(D_MODEL))
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(MismatchError, match="transcoder"):
        Playground(model, sae)


def test_what_a_feature_writes_is_told() -> None:
    playground = tiny_playground()
    found = playground.lens(3)
    logits = playground.model.lens(playground.sae.W_dec[3])
    assert found["promoted"] == [playground.shown(i) for i in logits.topk(10).indices.tolist()]
    assert found["suppressed"][0] == playground.shown(int(logits.argmin()))
