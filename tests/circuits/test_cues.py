"""Cues of texts, and tasks into which they are built with exact counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import circuits
from circuits import LabelledTexts, ShiftTask, with_cues
from circuits.cues import Casing, Cluster, Cue, FirstNoun, FirstVerb, Length, Punctuation, Token, mcc
from circuits.cues.making import cell_counts
from circuits.cues.stripping import without
from circuits.cues.tagger import is_plural, is_present
from tests.circuits.planted import LABEL, SITE, planted_model, planted_sae
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.stats import wilson

TAGGED = [line.split("\t") for line in (Path(__file__).parent / "tagged_sentences.tsv").read_text("utf-8").splitlines()]
CUES: dict[str, list[Cue]] = {
    "length": [Length()], "token": [Token("(c)")], "end": [Token("(c)", "end")], "mark": [Punctuation("!")],
    "casing": [Casing()], "verb": [FirstVerb()], "noun": [FirstNoun()], "cluster": [Cluster()],
    "two": [Length(), Token("(c)")], "token before casing": [Token("##"), Casing()],
    "three": [FirstVerb(), Punctuation("?"), Token("#")],
}  # fmt: skip


def _pool(n: int = 288) -> LabelledTexts:
    """Different sentences in which every natural cue has both values for both labels."""
    rng = random.Random(0)
    texts = []
    for i in range(n):
        noun = ("dog", "dogs")[i // 2 % 2]
        verb = "saw" if i // 4 % 2 else "sees" if noun == "dog" else "see"
        topic = ("in the river", "of the court")[i // 8 % 2]
        text = f"The {noun} {verb} {i} {topic}{' far away' * rng.randint(0, 3)}."
        texts.append(text if i % 3 else text.lower())
    return LabelledTexts(tuple(texts), tuple(i % 2 for i in range(n)))


POOL = _pool()


@pytest.mark.parametrize(("tagger", "column", "right"), [(is_present, 1, 192), (is_plural, 2, 198)])
def test_the_tagger_is_as_accurate_as_its_page_says(tagger: Callable[[str], bool], column: int, right: int) -> None:
    """The sentences were tagged by hand before the rules were written, and the rules were not fitted to them."""
    truth = [row[column] == "1" for row in TAGGED]
    assert len({row[0] for row in TAGGED}) == 200 and 80 <= sum(truth) <= 120
    accuracy = wilson(sum(tagger(row[0]) == value for row, value in zip(TAGGED, truth, strict=True)), 200)
    assert accuracy.value == right / 200 and accuracy.low > 0.92
    page = (Path(__file__).parents[2] / "docs" / "shift.md").read_text("utf-8")
    assert str(accuracy) in page


@pytest.mark.parametrize(
    ("name", "rho"), [*((name, 0.9) for name in CUES), ("token", 0.5), ("token", 1.0), ("two", 0.5), ("length", 1.0)]
)
def test_counts_are_exact_and_the_cue_is_in_the_texts(name: str, rho: float) -> None:
    cues = CUES[name]
    task = with_cues(POOL, cues, rho, n_train=40)
    half = 20
    for i, (cue, (named, values)) in enumerate(zip(cues, task.train.cues, strict=True)):
        assert named == cue.name
        agree, disagree = round(half * rho), half - round(half * rho)
        table = {(1, 1): agree, (0, 0): agree, (1, 0): disagree, (0, 1): disagree}
        assert Counter(zip(values, task.train.label, strict=True)) == {cell: n for cell, n in table.items() if n}
        assert mcc(values, task.train.label) == pytest.approx(2 * rho - 1, abs=1e-12)
        for rows in (task.train, task.test, task.balanced):
            assert rows is not None
            fitted = cue if isinstance(cue, Length | Cluster) else cue.fit(rows.texts)
            if not isinstance(fitted, Length | Cluster):
                assert fitted.of(rows.texts) == rows.cues[i][1], "read off the finished texts"
        for rows in (task.test, task.balanced):
            assert rows is not None and mcc(rows.cues[i][1], rows.label) == 0.0
    for rows in (task.test, task.balanced):
        assert rows is not None and len(rows.counts()) == 2 ** (len(cues) + 1) and len(set(rows.counts().values())) == 1


def test_no_text_is_used_twice_and_none_is_in_training_and_test() -> None:
    def plain(text: str) -> str:
        return text.replace("## ", "").lower()

    task = with_cues(POOL, CUES["token before casing"])
    train, test = ([plain(text) for text in rows.texts] for rows in (task.train, task.test))
    assert len(set(train)) == len(train) and len(set(test)) == len(test) and not set(train) & set(test)
    assert {*train, *test} <= {text.lower() for text in POOL.texts}
    label_of = dict(zip(map(str.lower, POOL.texts), POOL.label, strict=True))
    assert [label_of[text] for text in train] == list(task.train.label)
    assert with_cues(POOL, CUES["two"]) == with_cues(POOL, CUES["two"]) != with_cues(POOL, CUES["two"], seed=1)


def test_the_threshold_is_that_of_the_training_texts() -> None:
    task = with_cues(POOL, [Length()], n_train=80)
    training = circuits.ShiftTask.from_frame(
        _frame(POOL), text="text", label="label", options=circuits.SplitOptions(seed=0)
    ).train.texts
    median = float(np.median([len(text) for text in training]))
    for rows in (task.train, task.test):
        assert tuple(int(len(text) > median) for text in rows.texts) == rows.cues[0][1]
    long, value = tuple(text * 9 for text in POOL.texts), tuple(i // 2 % 2 for i in range(len(POOL)))
    longer = replace(task, test=LabelledTexts(long, POOL.label, value))
    with pytest.raises(DegenerateInputError, match="needs 1 test texts of the label '0' that are short; there are 0"):
        with_cues(longer, [Length()])


def _frame(rows: LabelledTexts):  # noqa: ANN202
    import pandas as pd

    return pd.DataFrame({"text": rows.texts, "label": rows.label})


@pytest.mark.parametrize("cue", [Token("(c)"), Token("©", "end"), Punctuation("!"), Punctuation("..."), Casing()])
def test_what_is_put_into_a_text_is_stripped_again(cue: Cue) -> None:
    texts = ["a text", " space before", "ends with space ", "two\nlines", "éclair", "7 days", "“quoted”", "", "ßtraße"]
    for text in texts:
        assert cue.of([text]) == (0,)
        put = cue.put(text)
        assert cue.strip(put) == text
        assert cue.of([put]) == (1,) or (isinstance(cue, Casing) and put == text and text in ("", "ßtraße"))


def test_cues_of_several_kinds_at_once_are_as_independent_as_whole_numbers_allow() -> None:
    for n, share, cues in ((100, Fraction(19, 20), 2), (20, Fraction(9, 10), 3), (40, Fraction(1, 2), 3)):
        counts = cell_counts(n, share, cues)
        assert sum(counts.values()) == n and min(counts.values()) >= 0
        for i in range(cues):
            assert sum(size for cell, size in counts.items() if cell[i]) == n * share
        for cell, size in counts.items():
            expected = n * float(share) ** sum(cell) * float(1 - share) ** (cues - sum(cell))
            assert abs(size - expected) < 1.5
    assert cell_counts(400, Fraction(19, 20), 2) == {
        (True, True): 361, (True, False): 19, (False, True): 19, (False, False): 1
    }  # fmt: skip


def test_too_few_texts_are_an_error_that_names_the_group_and_never_drawn_again() -> None:
    with pytest.raises(
        DegenerateInputError, match="needs 95 training texts of the label 'no' that are short; there are"
    ):
        with_cues(POOL, [Length()], n_train=200, label_names=("no", "yes"))
    taken = replace(
        POOL, texts=tuple(f"{text} (c)" if y else text for text, y in zip(POOL.texts, POOL.label, strict=True))
    )
    with pytest.raises(DegenerateInputError, match="without changing another"):
        with_cues(POOL, [Token("(c)"), Casing()])  # the token in front holds the first letter
    with pytest.raises(
        DegenerateInputError, match="label '1' into which each cue can be put without changing another; there are 0"
    ):
        with_cues(taken, [Token("(c)")])
    task = with_cues(taken, [Token("(c)", "end")], n_train=80)
    assert task.train.counts()[1, 0] == 2, "stripped where it stands already"


def test_twins_differ_by_the_cue_alone_and_exist_for_one_cue_that_can_be_put() -> None:
    task = with_cues(POOL, [Token("(c)")])
    assert task.swapped is not None
    for text, twin, value in zip(task.train.texts, task.swapped, task.train.cues[0][1], strict=True):
        assert (text == f"(c) {twin}") if value else (twin == f"(c) {text}")
    assert with_cues(POOL, CUES["two"]).swapped is None and with_cues(POOL, [Length()]).swapped is None
    two = with_cues(POOL, CUES["two"])
    assert two.spurious_names == ("short, no (c)", "short, with (c)", "long, no (c)", "long, with (c)")
    assert two.shortcut()[0] == 0 and two.shortcut()[3] == 1
    assert any("length: correlation with the label" in note and "0.900 in training" in note for note in two.notes)


def test_clusters_are_found_in_training_texts_by_the_embedding_that_is_given() -> None:
    asked: list[int] = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        asked.append(len(texts))
        return np.array([[float("river" in text), 0.0] for text in texts])

    texts = ["the river"] * 3 + ["the court"] * 5
    fitted = Cluster(embed).fit(texts)
    assert fitted.of(["a river", "a court", "else"]) == (1, 0, 0) and asked == [8, 3]
    by_words = Cluster().fit([f"{text} {i % 2} day" for i, text in enumerate(texts)])
    assert by_words.of(["river", "court"]) == (1, 0)
    with pytest.raises(DegenerateInputError, match="same embedding"):
        Cluster(embed).fit(["a", "b"])
    with pytest.raises(MismatchError, match="for 2 texts; give a row per text"):
        Cluster(lambda texts: np.zeros(3)).fit(["a", "b"])


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"cues": []}, "the cues none"),
        ({"cues": [Length(), Length(9.0)]}, "length, length"),
        ({"rho": 0.4}, "0.5 to 1"),
        ({"n_train": 90}, "90 training texts can't be divided exactly; give a multiple of 40"),
        ({"n_test": 6}, "6 test texts can't be divided exactly; give a multiple of 4"),
        ({"labelled": LabelledTexts(POOL.texts, tuple(i % 3 for i in range(len(POOL))))}, "3 labels"),
    ],
)
def test_what_can_not_be_built_is_refused(asked: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInputError, match=line):
        with_cues(**{"labelled": POOL, "cues": [Length()], **asked})


def test_cues_without_threshold_or_without_injection_say_so() -> None:
    for act in (lambda: Length().of(["a"]), lambda: Cluster().of(["a"])):
        with pytest.raises(MismatchError, match="fit"):
            act()
    assert without("Stop!!", [Punctuation("!")]) == "Stop!", "one mark alone"
    with pytest.raises(InvalidInputError, match="can't be put"):
        Length(3.0).put("a")
    with pytest.raises(InvalidInputError, match="can't be taken out"):
        FirstVerb().strip("a")
    for make in (lambda: Token(" x"), lambda: Punctuation("")):
        with pytest.raises(InvalidInputError, match="white space"):
            make()


def test_a_study_of_an_injected_cue_strips_it_and_judges_by_twins() -> None:
    texts = tuple(
        f"x {'abcdefgh'[i % 8]} {'klmnopqr'[i // 8 % 8]} {LABEL[i % 2]}{' b' * (i // 64)}" for i in range(160)
    )
    rows = LabelledTexts(texts, tuple(i % 2 for i in range(160)))
    task: ShiftTask = with_cues(rows, [Token("M M M M M")], 1.0, n_train=60, n_test=40)
    report = circuits.shift(
        planted_model(), {SITE: planted_sae()}, task, options=circuits.ShiftOptions(top_k=10, random_draws=2)
    )
    original, stripped = report.method("original"), report.method("cues stripped")
    assert original.worst.value < 0.2 and stripped.worst.value > 0.8
    assert report.judge == "statistics" and not report.left_out
    assert f"{SITE}/2" in {v.feature for v in report.verdicts if v.decision == "spurious"}, "the feature of M"
