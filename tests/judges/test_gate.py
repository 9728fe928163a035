"""The gate: who tells known right cases from wrong ones gets in, per subject."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.core.stats import Estimate, paired_difference
from workbench.judges import Cost, JudgeGate, Trial, trial

RIGHT = np.array([1.0, 1, 1, 1, 1, 1, 1, 1, 1, 0.9])


def _trial(wrong: np.ndarray, **options: object) -> Trial:
    def margin(read: np.ndarray) -> Estimate:
        return paired_difference(RIGHT[read], wrong[read])

    return trial("taste", RIGHT, wrong, margin, **{"needed_margin": 0.5, **options})  # pyright: ignore[reportArgumentType]


def test_the_whole_interval_must_exceed_the_margin() -> None:
    assert _trial(RIGHT - 0.9).passed
    assert not _trial(RIGHT - 0.5).passed, "as large as the margin is not enough"
    wide = RIGHT - np.array([2.0, -0.8] * 5)
    tried = _trial(wide)
    assert tried.margin is not None and tried.margin.value == pytest.approx(0.6) and not tried.passed


def test_a_tenth_of_the_cases_may_be_unreadable_and_they_are_left_out() -> None:
    wrong = np.where(np.arange(10) == 3, np.nan, 0.0)
    one = _trial(wrong)
    assert one.passed and (one.unread, one.cases) == (1, 10) and one.margin is not None and one.margin.n == 9
    masks: list[np.ndarray] = []
    cases = np.arange(20)
    either = trial(
        "taste", np.where(cases == 3, np.nan, 1.0), np.where(cases == 4, np.nan, 0.0), masks.append, needed_margin=0.5
    )
    assert either.unread == 2 and np.flatnonzero(~masks[0]).tolist() == [3, 4], "both replies must be readable"
    unknown = Estimate(np.nan, np.nan, np.nan, 9, "one case each")
    assert not trial("taste", RIGHT, RIGHT, lambda _: unknown, needed_margin=0.5).passed
    two = _trial(np.where(np.arange(10) < 2, np.nan, 0.0))
    assert two.margin is None and not two.passed and str(two) == "taste (20.0% of replies unreadable)"
    none = trial("taste", np.zeros(0), np.zeros(0), lambda _: None, needed_margin=0.5)
    assert none.failed.value == 1.0 and not none.passed


def test_a_refusal_names_the_subject_and_what_is_only_shown_refuses_nobody() -> None:
    good, bad = _trial(RIGHT - 1), _trial(RIGHT, group="sour")
    shown = _trial(RIGHT, group="bitter", is_needed=False)
    assert JudgeGate("she", (good, shown)).refusal() == JudgeGate("she", (good, shown)).refusal("taste") == ""
    gate = JudgeGate("she", (good, bad, shown), Cost(4))
    assert "judge not competent at taste: fails on sour (0 " in gate.refusal("taste") and "0.5" in gate.refusal()
    assert "bitter" not in gate.refusal() and set(gate.margins) == {"taste", "sour", "bitter"}
    assert "not tried on smell" in gate.refusal("smell") and "not tried on anything" in JudgeGate("she", ()).refusal()
    assert gate.failed.value == 0 and gate.failed.n == 30
