from __future__ import annotations

from typing import Any

import pytest

from tests.serve.toys import asked
from workbench.core.errors import InvalidInputError, UnknownConfigKeyError
from workbench.serve.ask import MAX_NEW_TOKENS, Ask, FeatureEdit


def test_what_the_page_sends_is_read() -> None:
    ask = Ask.read(
        asked(edits=[{"feature": 3, "mode": "clamp", "strength": 2}, {"feature": 4, "mode": "ablate"}], scope="all")
    )
    assert ask.edits == (FeatureEdit(feature=3, mode="clamp", strength=2.0), FeatureEdit(feature=4, mode="ablate"))
    assert (ask.scope, ask.control, ask.chat) == ("all", True, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"prompt": 3}, "expected str"),
        ({"max_new_tokens": 0}, f"1 to {MAX_NEW_TOKENS}"),
        ({"max_new_tokens": 10**9}, f"1 to {MAX_NEW_TOKENS}"),
        ({"max_new_tokens": 2.5}, "expected int"),
        ({"temperature": -1}, "give 0"),
        ({"temperature": None}, "give 0"),
        ({"temperature": {"$float": "inf"}}, "give 0"),
        ({"seed": "x"}, "expected int"),
        ({"scope": "some"}, "last\\+generated"),
        ({"edits": [{"feature": 1}, {"feature": 1, "mode": "ablate"}]}, "Feature 1 is there twice"),
        ({"edits": [{"feature": 1, "strength": 0}]}, "adds nothing"),
        ({"edits": [{"feature": 1, "mode": "scale", "strength": 1}]}, "leaves the activation"),
        ({"edits": [{"feature": 1, "strength": None}]}, "no finite number"),
        ({"edits": [{"feature": 1, "mode": "boost"}]}, "'steer' or 'clamp'"),
        ({"edits": [{}]}, "lacks the key 'feature'"),
        ({"edits": {}}, "expected a list"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_to_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        Ask.read(asked(**changes))


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(UnknownConfigKeyError, match="Did you mean temperature"):
        Ask.read(asked(temprature=1.0))


def test_clamping_to_zero_and_scaling_by_zero_do_something() -> None:
    assert FeatureEdit(feature=1, mode="clamp", strength=0.0).strength == 0
    assert FeatureEdit(feature=1, mode="scale", strength=0.0).strength == 0


def test_edits_in_words() -> None:
    edits = [FeatureEdit(feature=7, mode=mode, strength=2.5) for mode in ("steer", "clamp", "scale", "ablate")]
    assert [str(edit) for edit in edits] == ["steer #7 2.5 × a_max", "clamp #7 at 2.5", "scale #7 × 2.5", "ablate #7"]
