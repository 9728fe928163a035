"""Cues of texts, and tasks into which they are built with exact counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from circuits.cues.tagger import is_plural, is_present
from workbench.core.stats import wilson

TAGGED = [line.split("\t") for line in (Path(__file__).parent / "tagged_sentences.tsv").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("tagger", "column", "right"), [(is_present, 1, 192), (is_plural, 2, 198)])
def test_the_tagger_is_as_accurate_as_its_page_says(tagger, column: int, right: int) -> None:  # noqa: ANN001
    """The sentences were tagged by hand before the rules were written, and the rules were not fitted to them."""
    truth = [row[column] == "1" for row in TAGGED]
    assert len({row[0] for row in TAGGED}) == 200 and 80 <= sum(truth) <= 120
    accuracy = wilson(sum(tagger(row[0]) == value for row, value in zip(TAGGED, truth, strict=True)), 200)
    assert accuracy.value == right / 200 and accuracy.low > 0.92
    page = (Path(__file__).parents[2] / "docs" / "shift.md").read_text("utf-8")
    assert str(accuracy) in page
