from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from circuits.pairs import FIELDS, Pairs
from tests.circuits.toys import ANSWERS, CLEAN, PATCH, exact_model, pairs_of
from tests.interventions.builders import padded
from tests.tiny import as_user
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MissingFileError,
    ShapeError,
)

GOOD = [
    dict(zip(FIELDS, (a, b, *c), strict=True)) | {"case": f"case {i}"}
    for i, (a, b, c) in enumerate(zip(CLEAN, PATCH, ANSWERS, strict=True))
]
BAD = [
    {**GOOD[0], "patch_prefix": "abYdef"}, {**GOOD[0], "clean_answer": "pq"}, {**GOOD[0], "patch_answer": "p"},
    {**GOOD[0], "patch_prefix": "abXde"}, {**GOOD[0], "clean_prefix": " "},
]  # fmt: skip


def _file(folder: Path, rows: list[Any]) -> Path:
    path = folder / "pairs.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_and_a_table_give_the_pairs_that_texts_give(tmp_path: Path) -> None:
    model, texts = exact_model(), pairs_of()
    for pairs in (Pairs.from_jsonl(_file(tmp_path, GOOD), model), Pairs.from_frame(pd.DataFrame(GOOD), model)):
        assert torch.equal(pairs.clean.ids, texts.clean.ids) and torch.equal(pairs.patch.ids, texts.patch.ids)  # type: ignore[union-attr]
        assert torch.equal(pairs.answers, texts.answers) and pairs.cases == tuple(f"case {i}" for i in range(4))
        frame = pairs.frame()
        assert all(frame[k].tolist() == [row[k] for row in GOOD] for k in FIELDS)
        assert (len(pairs), pairs.length, pairs.note) == (4, 5, "")


def test_pairs_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    model = exact_model()
    pairs = Pairs.from_jsonl(_file(tmp_path, [*BAD, *GOOD]), model)
    assert len(pairs) == 4 and pairs.note.startswith("5 of 9 pairs left out: 'abXde' has 5 tokens and 'abYdef' 6")
    few = Pairs.from_jsonl(_file(tmp_path, GOOD), model, limit=2)
    assert few.frame().clean_prefix.tolist() == CLEAN[:2] and few.note == ""
    assert Pairs.from_jsonl(_file(tmp_path, GOOD), model, limit=9).note.startswith("9 pairs asked for, 4 found.")
    orders = [
        Pairs.from_jsonl(_file(tmp_path, GOOD), model, seed=seed).frame().clean_prefix.tolist() for seed in (1, 1, 2, 3)
    ]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) > 1 and sorted(orders[0]) == sorted(CLEAN)
    for row, words in zip(BAD, ("must have the same number", "is 2 tokens; it must be one", "same token", "both prompts are the same", "A prompt is empty"), strict=True):  # fmt: skip
        with pytest.raises(InvalidInputError, match=words):
            Pairs.of(
                model,
                clean=[row["clean_prefix"]],
                patch=[row["patch_prefix"]],
                answers=[(row["clean_answer"], row["patch_answer"])],
            )


def test_rows_keep_their_answers_and_know_where_they_change() -> None:
    pairs = pairs_of()
    assert pairs.changed().long().argmax(1).tolist() == [2, 2, 1, 2]
    assert bool(pairs.changed()[:, -1].all()), "from there on, whatever is equal again"
    for rows in ([2, 0], torch.tensor([2, 0])):
        some = pairs[rows]
        assert torch.equal(some.answers, pairs.answers[[2, 0]]) and some.frame().patch_prefix.tolist() == [
            PATCH[2],
            PATCH[0],
        ]
    assert len(pairs[1:3]) == 2 and len(pairs[-1:]) == 1
    for mask in ([True, False, True, False], torch.tensor([True, False, True, False])):
        assert pairs[mask].frame().clean_prefix.tolist() == [CLEAN[0], CLEAN[2]], "not rows 1 and 0"
    with pytest.raises(ShapeError, match="a mask of 2 for 4 pairs"):
        pairs[[True, False]]
    mixed = Pairs.of(exact_model(), clean=["ab", "abc", "xbc"], patch=["ax", "axc", "xbx"], answers=[("p", "q")] * 3)
    assert mixed.length is None and len(mixed.of_one_length()) == 2 and mixed.of_one_length(2).length == 2
    assert mixed.clean.mask[0].tolist() == [False, True, True]
    with pytest.raises(DegenerateInputError, match=r"of_one_length\(7\): the pairs have 2 to 3 tokens"):
        mixed.of_one_length(7)
    with pytest.raises(InvalidInputError, match="no counterparts"):
        pairs_of(patched=False).changed()


def test_wrong_input_is_answered_in_words(tmp_path: Path) -> None:
    model, pairs = exact_model(), pairs_of()
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    shorter = padded([[5, 6], [5], [5], [5]], "left")
    for call, error, words in (
        (lambda: Pairs.of(model, clean=[], answers=[]), DegenerateInputError, "there are no prompts"),
        (
            lambda: Pairs.of(model, clean=["ab"], patch=["ax", "b"], answers=[("p", "q")]),
            ShapeError,
            "1 clean prompts, 2 patch prompts",
        ),
        (lambda: Pairs.of(model, clean=["ab"], patch=["ax"], answers=["p"]), ShapeError, "pair 0 has 1 answer"),
        (lambda: Pairs.of(model, clean=["ab"], answers=[("p", "q")]), ShapeError, "need one each"),
        (lambda: Pairs(pairs.clean, shorter, pairs.answers), ShapeError, "the same number of tokens"),
        (lambda: Pairs(pairs.clean, pairs.patch, pairs.answers[:, :1]), ShapeError, r"4 pairs need \(4, 2\)"),
        (lambda: Pairs(pairs.clean, pairs.patch, pairs.answers, ("a",)), ShapeError, "1 cases for 4 pairs"),
        (lambda: Pairs.from_jsonl(tmp_path / "none.json", model), MissingFileError, "none.json"),
        (lambda: Pairs.from_jsonl(tmp_path / "broken.json", model), CorruptFileError, "broken.json"),
        (
            lambda: Pairs.from_jsonl(_file(tmp_path, [{"clean_prefix": "a"}]), model),
            CorruptFileError,
            "entry 1: there is no text under patch_prefix",
        ),
        (lambda: Pairs.from_jsonl(_file(tmp_path, BAD), model), DegenerateInputError, "none of 5 pairs can be used"),
        (
            lambda: Pairs.from_frame(pd.DataFrame(GOOD).drop(columns="patch_answer"), model),
            InvalidInputError,
            "no column patch_answer; it has",
        ),
    ):
        with as_user(), pytest.raises(error, match=words):
            call()
