from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest

from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.records import from_jsonable, to_jsonable
from workbench.core.stats import Estimate, wilson
from workbench.report.base import (
    Bars,
    Grid,
    Headline,
    Heat,
    Histogram,
    Lines,
    Report,
    Says,
    Scatter,
    Section,
    Series,
    Table,
    Text,
    Tokens,
    beside,
    flat_metrics,
)
from workbench.report.blockhtml import block_html

ALL_BLOCKS = (
    Text("prose"),
    Table(("a", "b"), ((1, None), (wilson(1, 2), "x")), "caption"),
    Bars("bars", ("x",), (wilson(1, 2),), "share", 0.5),
    Lines("lines", (Series("s", (1, 2), (0.5, 1.0), (0.25, 0.5), (1.0, 1.5)),), "x", "y", True),
    Histogram("histogram", (1.0, 2.0), "x"),
    Scatter("scatter", (1.0,), (2.0,), ("label",)),
    Tokens(((("The", None), (" end", 0.5)),)),
    Heat("heat", (Grid("effect", ("1", "0"), ("a", "b"), ((0.5, None), (-1.0, 2)), (("x", ""), ("", "y"))),)),
)


@dataclass(frozen=True)
class Finding(Report):
    rate: Estimate

    def section(self) -> Section:
        blocks = (Text("<b>"), self._beside())
        return Section("Rate", blocks, self.findings(), {"rate": self.rate}, self.headline())

    def headline(self) -> Headline:
        return Headline.of(Says("It is high.", "It is as chance has it.", "It is low."), self._beside())

    def _beside(self) -> Table:
        return beside("rate", ("measured", self.rate), ("chance", 0.5))

    def findings(self) -> tuple[str, ...]:
        return (f"The rate is {self.rate}.",)


def test_a_heat_map_colours_by_one_scale_and_shows_the_last_columns() -> None:
    html = block_html(Heat("h", (Grid("a", ("r",), ("x", "<"), ((0.5, None),)), Grid("b", ("r",), ("y",), ((-1.0,),)))))
    assert '<td class=warm style="--v:50%"' in html and '<td class=cool style="--v:100%"' in html and "&lt;" in html
    names = tuple(f"c{i}" for i in range(2_000))
    wide = block_html(Heat("h", (Grid("a", ("r",), names, (tuple(range(2_000)),)),)))
    assert ">c1999<" in wide and ">c499<" not in wide and ">c500<" in wide and "the last 1500 of 2000 columns" in wide
    with pytest.raises(ShapeError, match="pair up"):
        Grid("a", ("r",), ("x",), ((1.0, 2.0),))


def test_every_block_survives_json() -> None:
    section = Section("all", ALL_BLOCKS, ("found",), {"a": wilson(1, 2), "b": 1, "c": 0.5, "d": "word"})
    assert from_jsonable(Section, json.loads(json.dumps(to_jsonable(section)))) == section


def test_a_value_that_is_not_finite_stays_a_hole() -> None:
    section = Section(
        "s", (Table(("a",), ((math.nan,), (math.inf,))),), (), {"m": Estimate(math.nan, 0.0, 1.0, 1, "x")}
    )
    back = from_jsonable(Section, json.loads(json.dumps(to_jsonable(section), allow_nan=False)))
    assert back.blocks[0].rows == ((None,), (math.inf,))
    assert math.isnan(back.metrics["m"].value)


def test_rows_columns_and_labels_must_fit() -> None:
    with pytest.raises(ShapeError, match="row 1 has 1 cells, the header has 2"):
        Table(("a", "b"), ((1, 2), (3,)))
    with pytest.raises(ShapeError, match="2 labels, 1 values"):
        Bars("b", ("x", "y"), (1.0,))
    with pytest.raises(ShapeError, match="2 x, 1 y"):
        Scatter("s", (1.0, 2.0), (1.0,))
    with pytest.raises(InvalidInputError, match="low and high"):
        Series("s", (1,), (1,), low=(0,))


def test_flat_metrics_have_value_interval_n_and_null_for_what_does_not_exist() -> None:
    rows = flat_metrics({"a": Estimate(0.5, 0.25, math.inf, 4, "Wilson", "prompts"), "b": 7}, prefix="sae.")
    assert rows["sae.a"] == {
        "value": 0.5,
        "low": 0.25,
        "high": None,
        "n": 4,
        "unit": "prompts",
        "method": "Wilson",
        "level": 0.95,
    }
    assert rows["sae.b"]["value"] == 7
    assert rows["sae.b"]["low"] is None


def test_a_report_shows_itself() -> None:
    report = Finding(rate=wilson(1, 2))
    assert report.to_json()["rate"]["n"] == 2
    html = report._repr_html_()
    assert "&lt;b&gt;" in html
    assert "The rate is" in html


def test_a_report_must_say_what_it_found() -> None:
    class Silent(Report):
        def section(self) -> Section:
            return Section("s")

    with pytest.raises(TypeError, match="findings.*headline"):
        Silent()  # type: ignore[abstract]  # that is the test
