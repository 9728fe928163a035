from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from workbench.core.errors import InvalidInputError
from workbench.core.records import from_jsonable, to_jsonable
from workbench.core.stats import Estimate
from workbench.report.base import Headline, Says, Section, Table, beside
from workbench.report.headline import Better, Measured, Verdict, verdict
from workbench.report.page import Page, page_html
from workbench.runs.content import headline_rows

SAYS = Says("It works.", "It does no more than chance.", "It does harm.", "Nobody looked.")


def between(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 40, "t", "prompts")


@pytest.mark.parametrize(
    ("value", "control", "difference", "better", "expected"),
    [
        (between(0.8, 0.9), between(0.4, 0.6), None, "higher", "works"),
        (between(0.4, 0.6), between(0.8, 0.9), None, "higher", "fails"),
        (between(0.4, 0.6), between(0.8, 0.9), None, "lower", "works"),
        (between(0.5, 0.9), between(0.4, 0.5), None, "higher", "no better than its control"),  # they touch
        # the paired difference decides, also where the two intervals overlap, and also where they don't
        (between(0.5, 0.9), between(0.4, 0.8), between(0.01, 0.2), "higher", "works"),
        (between(0.5, 0.9), between(0.4, 0.8), between(0.01, 0.2), "lower", "fails"),
        (between(0.8, 0.9), between(0.4, 0.5), between(-0.01, 0.8), "higher", "no better than its control"),
        (between(0.5, 0.9), 0.4, None, "higher", "works"),
        (0.5, 0.5, None, "higher", "not measured"),
        (0.51, 0.5, None, "higher", "not measured"),
        (50, 50, None, "higher", "no better than its control"),
        (51, 50, None, "higher", "works"),
        (23, 23, None, "at least", "works"),
        (22, 23, None, "at least", "fails"),
        (between(0.0, 0.9), 0.5, None, "at most", "fails"),
        (between(0.0, 0.5), 0.5, None, "at most", "works"),
        (0.5, None, None, "higher", "not measured"),
        (None, 0.5, None, "at least", "not measured"),
        (math.nan, 0.5, None, "higher", "not measured"),
        (0.9, 0.5, Estimate(math.nan, math.nan, math.nan, 1, "t"), "higher", "not measured"),
        (Estimate(0.9, -math.inf, math.inf, 1, "t"), 0.5, None, "higher", "no better than its control"),
    ],
)
def test_one_rule_judges_by_value_control_and_intervals(
    value: Measured, control: Measured, difference: Estimate | None, better: Better, expected: Verdict
) -> None:
    assert verdict(value, control, difference, better) == expected


TABLE = Table(
    ("arm", "accuracy", "note"),
    (("SHIFT", between(0.8, 0.9), "ours"), ("random", between(0.4, 0.6), "control"), ("other", None, "")),
    "Accuracy of each arm. Over texts.",
)


def read(value: str = "SHIFT", control: str = "random", column: str = "accuracy") -> Headline:
    return Headline.read(SAYS, value=(TABLE, value, column), control=(TABLE, control, column))


def test_the_sentence_is_that_of_the_verdict() -> None:
    assert read().sentence == "It works." and read().verdict == "works"
    assert read("random", "SHIFT").sentence == "It does harm."
    assert read("random", "random").sentence == "It does no more than chance."
    assert read("other").sentence == "Nobody looked."
    assert read().line() == "works: It works. Accuracy: 0.850 [0.800, 0.900]; random: 0.500 [0.400, 0.600]."


def test_a_headline_is_read_from_a_table_or_refused() -> None:
    with pytest.raises(InvalidInputError, match="no row 'SHIF'.*Did you mean SHIFT"):
        read("SHIF")
    with pytest.raises(InvalidInputError, match="no column 'accurcy'"):
        read(column="accurcy")
    with pytest.raises(InvalidInputError, match="holds 'ours', not a number"):
        read(column="note")


def test_a_section_refuses_a_number_that_is_not_the_one_in_its_table() -> None:
    Section("s", (TABLE,), headline=read())
    for changed in ({"value": between(0.8, 0.91)}, {"control": 0.5}, {"value": 0.85}):
        with pytest.raises(InvalidInputError, match="Read it by Headline.read"):
            Section("s", (TABLE,), headline=dataclasses.replace(read(), **changed))
    with pytest.raises(InvalidInputError, match="no table here"):
        Section("s", (), headline=read())


def test_a_headline_survives_json_with_its_verdict() -> None:
    for told in (read(), read("other"), Headline(sentence="Left out.")):
        section = Section("s", (TABLE,), headline=told)
        back = from_jsonable(Section, json.loads(json.dumps(to_jsonable(section), allow_nan=False)))
        assert back == section and back.headline is not None and back.headline.verdict == told.verdict
    (row,) = headline_rows("shift", Section("s", (TABLE,), headline=read()))
    assert row["verdict"] == "works" and row["value"] is not None and row["value"]["low"] == 0.8
    assert headline_rows("s", Section("s")) == []


def test_the_summary_links_each_number_to_the_row_that_holds_it() -> None:
    other = Section("Other", (TABLE,), headline=read("other"))
    page = page_html(Page(title="t", sections={"a": Section("One", (TABLE,), headline=read()), "b": other}))
    summary, rest = page.split("</section>", 1)
    assert summary.count('<span class="badge') == 2 and "no better" not in summary
    links = re.findall(r'<a href="#(step-a-[^"]+)">(.*?)</a>', summary)
    assert len(links) == 2
    for anchor, shown in links:
        row = re.search(rf'<tr id="{anchor}">(.*?)</tr>', rest)
        assert row is not None and shown in row[1].replace(" class=num", "")


def test_the_difference_that_decides_is_shown_wherever_the_numbers_are() -> None:
    close, apart = between(0.4, 0.7), Estimate(0.05, 0.01, 0.09, 40, "t")
    table = beside("accuracy", ("SHIFT", between(0.5, 0.7)), ("random", close), apart)
    section = Section("One", (table,), headline=Headline.of(SAYS, table))
    assert section.headline is not None and section.headline.verdict == "works", "though the intervals overlap"
    shown = "paired difference: +0.0500 [+0.0100, +0.0900]"
    assert shown in section.headline.line()
    (row,) = headline_rows("a", section)
    assert row["difference"] is not None and row["difference"]["low"] == 0.01
    page = page_html(Page(title="t", sections={"a": section, "b": Section("Other")}))
    assert shown in page.split("</section>", 1)[0]
