from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest
from matplotlib.text import Text

from workbench.core.stats import wilson
from workbench.report.base import Bars, Histogram, Lines, Scatter, Section, Series
from workbench.report.blockhtml import block_html
from workbench.report.drawing import WIDTH, PlotBlock, drawn
from workbench.report.plots import DARK, LIGHT, plot_svg, standalone_svgs

PLOTS = (
    Bars("bars", ("first <b>", "$x_1$ $\\nope$"), (wilson(3, 10), 2), "share", 0.5),
    Lines(
        "lines",
        (Series("one", (1, 10), (1.0, 2.0), (0.5, 1.5), (1.5, 2.5)), Series("two", (1, 10), (2, 3))),
        log_x=True,
    ),
    Histogram("histogram", tuple(0.5 * i for i in range(40)), "x"),
    Scatter("scatter", (1.0, 2.0), (1.0, 2.0), ("日本 <i>", ""), "x", "y"),
)
EMPTY = (
    Bars("b", (), ()),
    Bars("b", ("x",), (math.nan,)),
    Lines("l", ()),
    Lines("l", (Series("s", (1,), (math.nan,)),)),
    Histogram("h", ()),
    Histogram("h", (-1.0, math.inf), log_x=True),
    Scatter("s", (), ()),
)


ARMS = (
    "features", "the same features, subtracted", "random directions of the same norm", "unsteered",
    "random features, their own tokens", "control features, their own tokens", "instruction in the prompt, no edit",
)  # fmt: skip
CROWDED = (
    Bars("arms", ARMS, tuple(wilson(i, 10) for i in range(7)), "share of the prompts whose reply refuses", 0.5),
    Bars("long", ("a method with a very long name that says what it is made of and where " * 2,), (-1234.5,)),
    Lines(
        "by strength",
        tuple(Series(name, (1.5, 3.0), (0.01 * i, 0.02 * i), (0.0, 0.0), (0.2, 0.3)) for i, name in enumerate(ARMS)),
        "strength (multiples of the difference of means)",
        "share of lens tokens among all of what was written",
    ),
    Lines("by amount of text", (Series("FVU", (16384, 65536), (0.321, 0.246)),), "tokens", "held-out FVU", log_x=True),
    Lines("narrow", (Series("FVU", (60000, 61000), (0.3, 0.2)),), "tokens", "FVU", log_x=True),
    Histogram("scores", tuple(10.0**-i for i in range(13)), "output score", log_x=True),
    Histogram("large", tuple(12345.6 * i for i in range(40)), "norm of the residual stream"),
    Scatter(
        "effect against cost",
        tuple(0.001 * i for i in range(12)),
        tuple(0.002 * i for i in range(12)),
        tuple(f"{ARMS[i % 7]} at {i}" for i in range(12)),
        "nats per token of the text above unsteered",
        "share of lens tokens above unsteered",
    ),
)
"""Plots as those of the demo, with as much text as there is."""


def _boxes(figure: Any) -> Iterator[tuple[str, Any]]:
    """Every text that is drawn, with its box in pixels."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in [part for main in figure.axes for part in (main, *main.child_axes)]:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
            hidden |= {id(tick.label2) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            yield text.get_text(), text.get_window_extent()


@pytest.mark.parametrize("width", [4.2, WIDTH, 10.0])
@pytest.mark.parametrize("block", (*PLOTS, *CROWDED), ids=lambda block: block.title)
def test_no_text_of_a_plot_is_clipped_or_covers_another(block: PlotBlock, width: float) -> None:
    with drawn(block, width) as figure:
        boxes = list(_boxes(figure))
        page = figure.bbox
    assert boxes
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < page.x1 + 1 and box.y1 < page.y1 + 1, f"{text!r} is clipped"
    for (one, box), (other, second) in itertools.combinations(boxes, 2):
        across = min(box.x1, second.x1) - max(box.x0, second.x0)
        down = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert across < 1 or down < 1, f"{one!r} covers {other!r}"


@pytest.mark.parametrize("block", CROWDED, ids=lambda block: block.title)
def test_both_axes_have_ticks_and_every_name_is_drawn(block: PlotBlock) -> None:
    with drawn(block) as figure:
        texts = " ".join(text for text, _ in _boxes(figure))
        (axes,) = figure.axes
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            assert isinstance(block, Bars) or len(shown) >= 2
            assert all(tick.label1.get_text() for tick in shown)
    named = {Lines: "series", Scatter: "labels"}.get(type(block))
    names = [getattr(item, "name", item) for item in getattr(block, named) or ()] if named else []
    words = " ".join(texts.split())
    assert all(name in words for name in names if len(names) > 1)


def test_the_overlap_check_sees_what_it_should() -> None:
    with drawn(Scatter("s", (1.0,), (1.0,), ("name",))) as figure:
        (axes,) = figure.axes
        place = dict(_boxes(figure))["name"]
        axes.text(1.0, 1.0, "other", transform=axes.transData)
        assert dict(_boxes(figure))["other"].overlaps(place.expanded(2, 2))


def _texts(svg: str) -> list[str]:
    return [
        "".join(node.itertext())
        for node in ElementTree.fromstring(_with_xlink(svg)).iter()
        if node.tag.endswith("text")
    ]


def _with_xlink(svg: str) -> str:
    assert svg.startswith("<svg ")
    return svg


@pytest.mark.parametrize("block", PLOTS, ids=lambda block: block.kind)
def test_a_plot_is_wellformed_themed_and_the_same_every_time(block: PlotBlock) -> None:
    svg = plot_svg(block)
    ElementTree.fromstring(svg)
    assert svg == plot_svg(block)
    colours = set(re.findall(r"#[0-9a-fA-F]{6}", svg))
    assert not colours, f"fixed colours vanish on white or on dark: {colours}"
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", svg))
    assert used <= LIGHT.keys() == DARK.keys()
    assert {"ink", "c1"} <= used


def test_text_stays_text_and_is_no_markup() -> None:
    assert {"first <b>", "$x_1$ $\\nope$", "share"} <= set(_texts(plot_svg(PLOTS[0])))
    assert "日本 <i>" in _texts(plot_svg(PLOTS[3]))


def test_bars_write_the_values_beside_them() -> None:
    texts = _texts(plot_svg(Bars("b", ("x", "y"), (0.25, wilson(1, 2)))))
    assert {"0.250", "0.500"} <= set(texts)


def test_a_bar_is_as_long_as_its_value() -> None:
    svg = plot_svg(Bars("b", ("x", "y"), (1.0, 3.0)))
    paths = re.findall(
        r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \nL [^"]*z\s*" clip-path[^>]*opacity: 0.85', svg
    )
    lengths = [float(right) - float(left) for left, right in paths]
    assert len(lengths) == 2
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=1e-3)


@pytest.mark.parametrize("block", EMPTY, ids=lambda block: block.kind)
def test_nothing_to_draw_is_said(block: PlotBlock) -> None:
    assert "no finite values" in _texts(plot_svg(block))


def test_values_that_are_left_out_are_counted() -> None:
    assert "2 values n/a, not drawn." in block_html(Histogram("h", (1.0, 2.0, math.nan, math.inf)))
    assert "1 value n/a" in block_html(Scatter("s", (0.0, 1.0), (1.0, 1.0), log_x=True))
    assert "n/a" not in block_html(Histogram("h", (1.0, 2.0)))


def test_a_file_of_its_own_brings_its_colours() -> None:
    files = standalone_svgs(Section("s", PLOTS))
    assert list(files) == ["1-bars", "2-lines", "3-histogram", "4-scatter"]
    for svg in files.values():
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme: dark" in svg
        assert f"--c1: {LIGHT['c1']}" in svg


def test_drawing_leaves_the_users_matplotlib_alone() -> None:
    before = dict(matplotlib.rcParams)
    plot_svg(PLOTS[0])
    assert dict(matplotlib.rcParams) == before
