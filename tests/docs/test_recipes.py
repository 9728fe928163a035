"""Every recipe runs, is at most six lines long, and gives what it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import circuits
import workbench as wb
from tests.tiny import tiny_hf, tiny_model, tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M))
DF = pd.DataFrame({"text": ["one day", "two men"]}, index=["a", "b"])

CHECKS: dict[str, Callable[[Any], bool]] = {
    "Which sites does the model have?": lambda last: last.site.tolist() == ["z.0", "z.1", "z.2"],
    "What would the model say if it ended here?": lambda last: len(last) == 3 * len("The capital of France is"),
    "And through a map that is fitted to the last layer?": lambda last: (
        len(last) == 3 * len("The capital of France is")
    ),
    "Which direction stands for a token, and what does it do?": lambda last: len(last) == 4 and (last.norm > 0).all(),
    "What does each head attend to?": lambda last: last.weight.is_monotonic_decreasing and last.weight.iloc[0] > 0.9,
    "A direction from contrast pairs, beside its control": lambda last: len(last.report) == 1,
    "Which tokens lie along a direction?": lambda last: "projection" in last.frame(),
    "One activation per text, as a table that joins back": lambda last: last.shape == (2, 16),
    "Continuations of a column of prompts": lambda last: last.text.tolist() == DF.text.tolist(),
    "Several strengths on the same prompts": lambda last: sorted(set(last.strength)) == [0.5, 1.0, 2.0],
    "What does a head do without it?": lambda last: last.shape == (2,) and bool((last > 0).all()),
    "At which layer and position is the answer decided?": lambda last: (
        len(last) == 5 and last.effect.is_monotonic_decreasing
    ),
    "Which component writes the answer?": lambda last: last["head"].notna().sum() == 6 and len(last) == 14,
    "Which heads are induction heads?": lambda last: len(last) == 3 and (last.value > 0).all(),
    "Which features made this token likely?": lambda last: len(last) == 5 and last.share.is_monotonic_decreasing,
    "Activations for other libraries": lambda last: tuple(last) == (2, 7, 2, 8),
    "A Hugging Face model that is loaded already": lambda last: len(last) == 1,
}
"""What the last line of each recipe gives."""


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs_and_gives_what_it_says(title: str) -> None:
    code = RECIPES[title]
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    space = {
        "wb": wb, "circuits": circuits, "model": tiny_model(), "texts": DF["text"].tolist(), "df": DF, "vector": torch.ones(16),
        "hf": tiny_hf(), "tokenizer": tiny_tokenizer(),
    }  # fmt: skip
    *lines, last = ast.parse(code).body
    exec(compile(ast.Module(lines, []), PAGE.name, "exec"), space)
    value = last.value if isinstance(last, ast.Assign | ast.Expr) else pytest.fail("end with a value")
    assert CHECKS[title](eval(compile(ast.Expression(value), PAGE.name, "eval"), space))


def test_every_recipe_has_a_check() -> None:
    assert set(RECIPES) == set(CHECKS)
