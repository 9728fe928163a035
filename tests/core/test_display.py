from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import tiny_tokenizer
from workbench.core.display import LONGEST, OneLine, brief
from workbench.core.errors import InvalidInputError
from workbench.core.html import MOST_ROWS, Shown, ShownText, facts, frame_table, framed, grid, table, tokens_line
from workbench.core.stats import Estimate
from workbench.core.tokens import Column, encode, labelled


@dataclass(frozen=True)
class Pair(OneLine):
    left: int
    right: str = "r"


@dataclass(frozen=True, kw_only=True)
class Many(OneLine):
    name: str = "n"
    vector: Tensor | None = None
    steps: tuple[float, ...] = ()
    options: Pair = Pair(1)
    secret: str = field(default="s3cret", repr=False)
    texts: tuple[str, ...] = ()


def test_a_short_dataclass_reads_as_its_constructor() -> None:
    assert repr(Pair(2)) == "Pair(left=2, right='r')"
    assert repr(Many()).startswith("Many(name='n', vector=None, steps=(), options=Pair(left=1, right='r')")


def test_contents_of_tensors_and_long_containers_are_not_shown() -> None:
    many = Many(vector=torch.arange(500.0), texts=("t",) * 1_000)
    assert "vector=tensor[500] float32" in repr(many)
    assert "texts=('t', 't', 't', … 1000 in all)" in repr(many)
    assert "s3cret" not in repr(many), "a field with repr=False is kept back"


def test_where_there_is_no_room_fields_at_their_default_go_first() -> None:
    long = Many(name="x" * 60, steps=(0.123456789,) * 3, texts=tuple("y" * 70 for _ in range(3)))
    assert len(repr(long)) <= LONGEST
    assert "options" not in repr(long) and "steps=(0.123457, 0.123457, 0.123457)" in repr(long)


def test_a_subclass_may_say_its_own_line_and_dataclass_keeps_it() -> None:
    @dataclass(frozen=True)
    class Named(Pair):
        def _shown_line(self) -> str:
            return "a\nb" * 400

    assert repr(Named(1)).startswith("Named(a⏎ba⏎b")
    assert len(repr(Named(1))) == LONGEST and repr(Named(1)).endswith("…)")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "True"),
        (0.1 + 0.2, "0.3"),
        (2.0, "2.0"),
        (np.zeros((2, 1)), "array[2, 1] float64"),
        (pd.DataFrame({"a": [1]}), "DataFrame[1, 1]"),
        (nn.Linear(1, 1), "Linear"),
        (Path("a") / "b", "a/b"),
        (len, "len"),
        ({"k": (1, 2, 3, 4)}, "{'k': (1, 2, 3, … 4 in all)}"),
        (((((1, 2),),),), "((((2),),),)"),
        (torch.float32, "torch.float32"),
        (object(), "object"),
    ],
)
def test_values_are_brief(value: object, shown: str) -> None:
    assert brief(value) == shown


def test_a_text_of_lines_shows_its_lines() -> None:
    text = ShownText("a\nb <i>")
    assert repr(text) == str(text) == "a\nb <i>" and text == "a\nb <i>"
    assert "a\nb &lt;i&gt;" in text._repr_html_()


def test_html_is_escaped_left_aligned_and_says_what_it_leaves_out() -> None:
    rows = [("<b>", 0.123456, Estimate(0.5, 0.25, 0.75, 4, "t"))] * (MOST_ROWS + 5)
    html = framed(table(("a", "n", "e"), rows, caption="c"))
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert html.count("<tr>") == MOST_ROWS + 1 and f"c; the first {MOST_ROWS} of {MOST_ROWS + 5} rows" in html
    assert '<td class="num">0.123</td>' in html and "<td>0.500 [0.250, 0.750]</td>" in html
    assert "text-align:left!important" in html, "notebooks align cells right"
    assert "the first 48 of 50 columns" in table([str(i) for i in range(50)], [list(range(50))])


def test_facts_without_a_value_are_left_out() -> None:
    assert facts({"a": None, "b": 0}) == "<table><tbody><tr><th>b</th><td>0</td></tr></tbody></table>"


def test_a_frame_is_shown_with_its_labels_if_it_has_some() -> None:
    frame = pd.DataFrame({"x": [1.5]}, index=pd.Index(["k"], name="key"))
    assert "<th>key</th>" in frame_table(frame) and "<td>k</td>" in frame_table(frame)
    assert "<td>0</td>" not in frame_table(pd.DataFrame({"x": ["t"]})) and ">0<" not in frame_table(
        pd.DataFrame({"x": ["t"]})
    )


def test_colours_follow_sign_and_size() -> None:
    line = tokens_line(["a", "b", "c", "<d>"], [2.0, -1.0, 0.0, float("nan")], ["the first"])
    orange, blue, *plain = line.split("<span")[1:]
    assert "#e07b39 75%" in orange and 'title="the first"' in orange and "#3b82d0 38%" in blue
    assert not any("style" in part for part in plain) and "&lt;d&gt;" in plain[1]
    few = tokens_line(["t"] * 11, [0.0] * 9 + [0.02, 0.01])
    assert few.count("color-mix") == 2 and " 75%" in few and " 38%" in few, "where most are 0, the others set the scale"
    cells = grid(["r"], ["c", "d"], [[1.0, 0.0]], [["<x>", "y"]])
    assert cells.count("background:color-mix") == 1 and "&lt;x&gt;" in cells


def test_a_result_with_rows_shows_its_first_rows() -> None:
    @dataclass(frozen=True)
    class Rows(Shown):
        n: int

        def frame(self) -> pd.DataFrame:
            return pd.DataFrame({"i": range(self.n)})

    assert f"the first {MOST_ROWS} of 99 rows" in Rows(99)._repr_html_() and "<th>n</th>" not in Rows(9)._repr_html_()


def test_labels_of_a_column_come_back() -> None:
    texts = pd.Series(["ab", "c", "def"], index=pd.Index(["x", "y", "z"], name="id"))
    assert isinstance(texts, Column) and not isinstance(["ab"], Column) and not isinstance(torch.zeros(1), Column)
    batch = encode(tiny_tokenizer(), texts)
    frame = batch.frame()
    assert frame.index.tolist() == ["x", "x", "y", "z", "z", "z"] and frame.index.name == "id"
    assert frame.token.tolist() == list("abcdef") and frame.position.tolist() == [0, 1, 0, 0, 1, 2]
    assert batch[torch.tensor([2, 0])].frame().index.tolist() == ["z", "z", "z", "x", "x"]
    assert batch[1:].frame().index.tolist() == ["y", "z", "z", "z"]
    assert encode(tiny_tokenizer(), ["ab", "c"]).frame().index.tolist() == [0, 0, 1], "rows are counted without labels"


def test_a_missing_text_of_a_column_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="float"):
        encode(tiny_tokenizer(), pd.Series(["a", float("nan")]))


def test_labelled_rows_name_their_row() -> None:
    frame = labelled({"v": [1, 2]}, None, [4, 4])
    assert frame.index.tolist() == [4, 4] and frame.index.name == "row"
