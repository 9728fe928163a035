from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from workbench.core.stats import wilson
from workbench.report.base import Bars, Histogram, Lines, Scatter, Section, Series
from workbench.report.blockhtml import block_html
from workbench.report.plots import DARK, LIGHT, PlotBlock, plot_svg, standalone_svgs

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
