"""The picture of the README shows the numbers that it was made of, and the README says the same ones."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tests.docs.test_docs import ROOT, script
from tests.tiny import tiny_model
from workbench.report.blocks import Lines
from workbench.steering import Concept, ConceptReport, DirectionOptions, SteerOptions, steer_concepts

Points = list[tuple[float, float, float, float]]
"""x, value, low and high of each point of a curve."""


def read_svg(text: str) -> tuple[str, list[Points], str]:
    """Title, curves and all text of a plot; pixels become numbers by the grid lines and the ticks beside them."""
    root = ElementTree.fromstring(text)
    for node in root.iter():
        node.tag = node.tag.split("}")[-1]
    title = str(root.get("aria-label"))
    axes = next(group for group in root.iter("g") if group.get("id") == "axes_1")
    to_x, to_y = (_scale(axes, name, column) for name, column in (("xtick", 0), ("ytick", 1)))
    bottom = float(str(root.get("viewBox")).split()[3])
    bands = [_numbers(str(path.get("d"))) for path in _in_groups(axes, "FillBetween", "path")]
    curves = []
    for group in (
        group for group in axes if str(group.get("id")).startswith("line2d") and group.find(".//use") is not None
    ):
        marks = [(float(str(use.get("x"))), float(str(use.get("y")))) for use in group.iter("use")]
        band = bands[len(curves)] + [0, bottom]
        ends = [sorted(y for at, y in band if abs(at - x) < 1e-3) for x, _ in marks]
        curves.append(
            [(to_x(x), to_y(y), to_y(end[-1]), to_y(end[0])) for (x, y), end in zip(marks, ends, strict=True)]
        )
    return title, curves, " ".join(node.text or "" for node in root.iter("text"))


def _in_groups(axes: ElementTree.Element, name: str, tag: str) -> list[ElementTree.Element]:
    return [node for group in axes.iter("g") if str(group.get("id")).startswith(name) for node in group.iter(tag)]


def _numbers(path: str) -> np.ndarray:
    return np.array([float(part) for part in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)


def _scale(axes: ElementTree.Element, name: str, column: int) -> np.poly1d:
    lines = [group for group in axes.iter("g") if str(group.get("id")).startswith(name)]
    pixels = [_numbers(str(group.find(".//path").get("d")))[0, column] for group in lines]  # type: ignore[union-attr]
    ticks = [float(str(group.find(".//text").text).replace("\u2212", "-")) for group in lines]  # type: ignore[union-attr]
    return np.poly1d(np.polyfit(pixels, ticks, 1))


@pytest.fixture(scope="module")
def report() -> ConceptReport:
    model = tiny_model()
    tokens = tuple(range(0, model.d_vocab, 2))  # half of the vocabulary, so that some are written
    return steer_concepts(
        model, [Concept("space", ("zz zzzz z", "zz z zzzz"), ("ab cd", "ef gh"), tokens)], "resid_post.1", (0.5, 4.0),
        ("ab", "cd", "ef", "gh"), SteerOptions(new_tokens=3, k=len(tokens)),
        DirectionOptions(methods=("difference of means",)),
    )  # fmt: skip


def test_the_picture_shows_the_numbers_of_its_report(report: ConceptReport) -> None:
    picture = script("picture")
    lines = picture.curves(report)
    title, curves, texts = read_svg(picture.svg(lines))
    assert title == lines.title and f"{report.n_evaluation} neutral prompts" in title
    assert [series.name for series in lines.series] == list(picture.NAMES.values())
    assert len(curves) == 2
    original = next(block for block in report.section().blocks if isinstance(block, Lines))
    of_report = {series.name: series for series in original.series}
    for name, shown, points in zip(picture.NAMES, picture.NAMES.values(), curves, strict=True):
        made = of_report[name]
        assert made.low is not None and made.high is not None
        wanted = [made.x, *(tuple(100 * value for value in part) for part in (made.y, made.low, made.high))]
        np.testing.assert_allclose(np.array(points).T, wanted, atol=1e-3)
        assert shown in texts
    _, shares, lows, highs = np.array(curves[0]).T
    assert shares.min() > 1 and (highs - lows).max() > 1, "curves and bands that are no line at zero"


def test_the_readme_says_what_its_picture_shows() -> None:
    title, (steered, control), texts = read_svg((ROOT / "docs" / "pictures" / "space.svg").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"on (\d+) neutral prompts beside .*? at strength ([\d.]+), ([\d.]+) % of the tokens are words about space "
        r"\[([\d.]+), ([\d.]+)\], with the random one (\d+) %",
        text,
    )
    assert said
    n, strength, *numbers = map(float, said.groups())
    assert f"({n:.0f} neutral prompts, 95 % intervals)" in title
    (point,) = [point for point in steered if point[0] == pytest.approx(strength, abs=1e-3)]
    (other,) = [point for point in control if point[0] == pytest.approx(strength, abs=1e-3)]
    assert [*point[1:], other[1]] == pytest.approx(numbers, abs=0.051)
    assert [x for x, *_ in steered] == pytest.approx(script("picture").STRENGTHS, abs=1e-3)
    assert all(name in texts for name in script("picture").NAMES.values())
