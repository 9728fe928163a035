"""Reliance on each cue, against tables that were counted by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from circuits.cues.kinds import Punctuation, Token
from circuits.cues.known import known_cue
from circuits.cues.making import with_cues
from circuits.shift.cue_panel import CuePanel, cue_panel
from circuits.shift.deciders import OracleDecider
from circuits.shift.reading import ShiftOptions
from circuits.shift.study import shift
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from tests.circuits.planted import LABEL, SITE, planted_model, planted_sae
from workbench.core.errors import MismatchError, UnknownNameError
from workbench.report.base import Table

CUES = ("length", "token")


def _rows(groups: list[tuple[int, int, int]]) -> LabelledTexts:
    """Texts of label and two cues."""
    label, a, b = (tuple(column) for column in zip(*groups, strict=True))
    combination = tuple(2 * x + y for x, y in zip(a, b, strict=True))
    return LabelledTexts(
        tuple(f"t{i}" for i in range(len(label))), label, combination, tuple(zip(CUES, (a, b), strict=True))
    )


def _task(each: int = 25, agreeing: int = 8) -> ShiftTask:
    """A balanced test set; in training `agreeing` of ten texts of each label have each cue's value."""
    train = [
        (y, y if i < agreeing else 1 - y, y if (i + 5) % 10 < agreeing else 1 - y) for y in (0, 1) for i in range(10)
    ]
    return ShiftTask(
        name="two cues", label_names=("0", "1"), spurious_names=("00", "01", "10", "11"), train=_rows(train),
        test=_rows([(y, a, b) for y, a, b in product((0, 1), repeat=3) for _ in range(each)]),
    )  # fmt: skip


def _columns(task: ShiftTask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    label = np.array(task.test.label)
    length, token = (np.array(values) for _, values in task.test.cues)
    return label, length, token


def _panel(task: ShiftTask, **predicted: np.ndarray) -> CuePanel:
    panel = cue_panel(task, {name: np.atleast_2d(rows) for name, rows in predicted.items()})
    assert panel is not None
    return panel


def test_a_method_that_trades_one_cue_for_another_is_caught() -> None:
    task = _task()
    label, length, token = _columns(task)
    panel = _panel(task, original=length, traded=token, repaired=label, against=1 - length)
    values = {(row.method, row.cue): (row.mcc.value, row.drop.value) for row in panel.rows}
    # balanced groups: following a cue is always right where it agrees and never where it conflicts
    assert values["original", "length"] == (1.0, 1.0) and values["original", "token"] == (0.0, 0.0)
    assert values["traded", "length"] == (0.0, 0.0) and values["traded", "token"] == (1.0, 1.0)
    assert values["repaired", "length"] == (0.0, 0.0) == values["repaired", "token"]
    assert panel.trades() == ("traded",)
    less, more = panel.of("traded", "length").change, panel.of("traded", "token").change
    assert less is not None and more is not None
    assert (less.value, more.value) == (-1.0, 1.0) and less.high < 0 < more.low
    against = panel.of("against", "length")
    assert against.mcc.value == -1.0 and against.change is not None
    assert against.change.value == 0.0, "to do the opposite of a cue is to rely on it as much"
    assert any("traded relies less on length" in line and "more on token" in line for line in panel.findings())
    assert [gap.method for gap in panel.gaps if gap.trade and gap.trade.is_whac_a_mole] == ["traded"]
    assert "relies less on length and more on token" in str(panel.tables()[1].rows)


def test_the_numbers_are_those_of_a_table_counted_by_hand() -> None:
    task = _task(4)
    label, length, token = _columns(task)
    predicted = label.copy()
    wrong = np.flatnonzero((label == 1) & (length == 0))[:6]
    predicted[wrong] = 0
    row = _panel(task, original=predicted).of("original", "length")
    # cue 0: 16 rows, of 8 with label 1 six wrong: 14 predicted 0, 2 predicted 1; cue 1: 8 and 8 of 16
    table = np.array([[14, 2], [8, 8]])
    phi = (14 * 8 - 2 * 8) / np.sqrt(16 * 16 * 22 * 10)
    assert row.mcc.value == pytest.approx(phi) and table.sum() == 32
    assert row.drop.value == pytest.approx(16 / 16 - 10 / 16)
    assert row.change is None and row.mcc.n == 32
    # the interval against one by resampled rows
    random, draws = np.random.default_rng(1), []
    for _ in range(2000):
        rows = random.integers(0, 32, 32)
        draws.append(np.corrcoef(length[rows], predicted[rows])[0, 1])
    low, high = np.nanquantile(draws, [0.025, 0.975])
    assert abs(row.mcc.low - low) < 0.05 and abs(row.mcc.high - high) < 0.05


def test_draws_are_averaged_and_changes_keep_rows_paired() -> None:
    task = _task()
    label, length, token = _columns(task)
    both = _panel(task, original=length, random=np.stack([length, token]), same=length)
    assert both.of("random", "length").mcc.value == 0.5 == both.of("random", "token").mcc.value
    change = both.of("same", "length").change
    assert change is not None and (change.value, change.low, change.high) == (0.0, 0.0, 0.0)
    assert [gap.method for gap in both.gaps] == ["original", "same"], "gaps are of single draws"
    noisy = label.copy()
    noisy[:3] = 1 - noisy[:3]
    few = _panel(task, original=label, noisy=noisy).of("noisy", "length").change
    assert few is not None and few.high - few.low < 0.1, "paired: only three rows differ"


def test_there_is_no_panel_without_cues_and_no_gap_where_training_is_certain() -> None:
    task = _task(agreeing=10)
    label, length, _ = _columns(task)
    assert _panel(task, original=length).gaps == ()
    assert cue_panel(task, {"SHIFT": label[None]}) is None
    plain = LabelledTexts(task.test.texts, task.test.label)
    bare = ShiftTask(name="bare", label_names=("0", "1"), train=plain, test=plain)
    assert cue_panel(bare, {"original": label[None]}) is None
    small = _panel(_task(1), original=np.array(_task(1).test.label))
    assert (small.rows[0].mcc.low, small.rows[0].mcc.high) == (-1.0, 1.0), "8 rows are too few for a bootstrap"
    frame = small.frame()
    assert list(frame["cue"]) == ["length", "token"] and {"mcc_low", "drop", "change_high"} <= set(frame)


def test_a_study_of_two_cues_has_the_panel_and_each_cue_erased_alone() -> None:
    """The letters F and M at the end are cues: each is a feature of the planted SAE."""
    texts = tuple(f"x {'abcdefgh'[i % 8]} {LABEL[i % 2]} {'klmnopqr'[i // 8 % 8]}" for i in range(384))
    task = with_cues(
        LabelledTexts(texts, tuple(i % 2 for i in range(384))), [Token("M"), Token("F", "end")], 0.9, n_train=80,
        n_test=80, label_names=LABEL,
    )  # fmt: skip
    options = ShiftOptions(top_k=6, random_draws=2, methods=("LEACE of token F alone", "cues stripped"))
    report = shift(planted_model(), {SITE: planted_sae()}, task, OracleDecider(), options=options)
    assert report.cues is not None and report.cues.cues == ("token M", "token F")
    stripped = [report.cues.of("cues stripped", cue) for cue in report.cues.cues]
    assert not any(row.mcc.excludes(0.0) for row in stripped), "what is gone can't be relied on"
    assert len(report.cues.rows) == 2 * len(report.methods)
    erased = report.cues.of("LEACE of token F alone", "token F")
    assert erased.change is not None and erased.change.value <= 0
    known = known_cue(task, Token("F", "end"))
    assert known.spurious_names == ("no F", "with F") and known.train.spurious == dict(task.train.cues)["token F"]
    assert known.swapped is not None and known.test.counts().keys() == {(y, a) for y in (0, 1) for a in (0, 1)}
    for text, twin, f in zip(known.train.texts, known.swapped, known.train.spurious or (), strict=True):
        assert (" F" in text, " F" in twin) == (f == 1, f == 0) and text.startswith("M") == twin.startswith("M")
    with pytest.raises(UnknownNameError, match="final"):
        known_cue(task, Punctuation("!"))
    twice = LabelledTexts(texts, tuple(i % 2 for i in range(384)))
    inner = with_cues(twice, [Token("F", "end"), Token("M", "end")], 0.9, n_train=80, n_test=80)
    with pytest.raises(MismatchError, match="put behind it"):
        known_cue(inner, Token("F", "end"))
    said = " ".join(report.findings())
    assert "Reliance of the original probe on each cue" in said
    captions = [block.caption for block in report.section().blocks if isinstance(block, Table)]
    assert sum("Whac-A-Mole" in caption for caption in captions) == 1
