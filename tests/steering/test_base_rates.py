"""Replies are read by their final answer, and base rates say when a model does not refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.steering.test_select_direction import chat_model
from workbench import refusal
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import wilson
from workbench.models.model import Model
from workbench.steering.refusal.data import refusal_data

NO, YES = "I'm sorry, but I can't help with that.", "Mix flour and water, then bake it for an hour."


@pytest.mark.parametrize(
    ("reply", "is_"),
    [
        (NO, "refused"),
        ("I’m unable to do so.", "refused"),
        (f"<think>Harmful? {NO} But it is fine.</think>\n{YES}", "answered"),
        (f"<think>All fine.</think>{NO}", "refused"),
        ("<think>I must think about it, and think again", "unfinished"),
        ("<|channel|>analysis<|message|>No.<|channel|>final<|message|>" + NO, "refused"),
        ('The letter reads "I cannot accept your offer", which is polite.', "answered"),
        (" ".join(f"step{i}" for i in range(40)) + " I cannot say more.", "answered"),
        ("", "neither"),
        ("Sure. Sure. Sure! sure", "neither"),
    ],
)
def test_outcomes_of_replies(reply: str, is_: str) -> None:
    assert refusal.outcome(reply) == is_


def test_given_replies_of_the_package_are_read_as_they_are_meant() -> None:
    data = refusal_data()
    assert set(refusal.outcomes(data.refusals)) == {"refused"}
    assert "refused" not in refusal.outcomes(data.compliant)


def _answering(monkeypatch: pytest.MonkeyPatch, replies: dict[str, str]) -> Model:
    """A model whose replies are given; what else it does is its own."""

    def generate(self: Model, prompts: Any, max_new_tokens: int = 40, **more: Any) -> Any:
        assert more["temperature"] == 0.0
        return SimpleNamespace(texts=tuple(replies[chat[-1]["content"]] for chat in prompts))

    monkeypatch.setattr(Model, "generate", generate)
    return chat_model()


def test_rates_are_shares_with_intervals_and_their_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = [f"bad {i}" for i in range(10)], [f"good {i}" for i in range(8)]
    replies = {p: NO for p in bad[:9]} | {bad[9]: "Ok"} | {p: YES for p in good}
    rates = refusal.base_rates(_answering(monkeypatch, replies), {"harmful": bad, "harmless": good})
    assert rates["harmful"].shares["refused"] == wilson(9, 10, unit="harmful prompts")
    assert rates["harmful"].shares["neither"].value == 0.1 and rates["harmless"].shares["answered"].value == 1.0
    assert rates.refuses and rates.difference is not None and rates.difference.value == pytest.approx(0.9)
    frame = rates.frame()
    assert [frame["share"][frame["kind"] == kind].sum() for kind in ("harmful", "harmless")] == pytest.approx(
        [1.0, 1.0]
    )
    assert rates.replies()["outcome"].tolist() == ["refused"] * 9 + ["neither"] + ["answered"] * 8


def test_a_model_that_does_not_refuse_stops_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"harmful": ["a", "b", "c"], "harmless": ["d", "e", "f"]}
    model = _answering(monkeypatch, dict.fromkeys("abcdef", NO))
    with pytest.raises(DegenerateInputError, match="no refusal to study"):
        refusal.base_rates(model, sets)
    rates = refusal.base_rates(model, sets, force=True)
    assert rates.refuses is False and "does not refuse" in repr(rates)
    alone = refusal.base_rates(model, {"borderline": ["a", "b"]})
    assert alone.refuses is None and alone.difference is None


def test_the_real_path_writes_replies() -> None:
    rates = refusal.base_rates(
        chat_model(), {"harmful": ["ab", "cd"], "harmless": ["ef", "gh"]}, new_tokens=3, force=True
    )
    assert [len(rate.replies) for rate in rates.rates] == [2, 2]


@pytest.mark.parametrize("prompts", [{}, {"harmful": []}, {"harmful": ["a", " "]}])
def test_prompts_that_can_not_be_used(prompts: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidInputError, match="base_rates"):
        refusal.base_rates(chat_model(), prompts)
