"""Plot blocks as matplotlib figures whose texts fit: labels wrap, legends have as many columns as there is room for."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.core.numbers import Number, decimals_for, number, setting
from workbench.core.stats import Estimate
from workbench.report.blocks import Bars, Histogram, Lines, Scatter
from workbench.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

PlotBlock = Bars | Lines | Histogram | Scatter

WIDTH = 6.6
"""Inches; the page scales the drawing to its column."""

MAX_LINES = 3
"""Longer labels are cut."""

MAX_AVOIDED = 200
"""So many points are not covered by the names of others."""

_CHARACTER, _LINE = 0.083, 0.17
"""Inches of a character and of a line at the size of the labels."""

# drawn with these; afterwards each becomes the CSS variable of its role
INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102{10 + i:02d}" for i in range(6))

_RC: Any = {  # matplotlib's keys are a literal type of its own
    "svg.hashsalt": "workbench",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "path.simplify": False,
}


@contextmanager
def drawn(block: PlotBlock, width: float = WIDTH) -> Iterator[Figure]:
    """The block as a figure of so many inches, to be saved inside the context; the user's matplotlib is left alone."""
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # text stays text, so the reader's browser picks a font that has the glyph
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        if isinstance(block, Bars):
            _bars(figure, block)
        elif isinstance(block, Lines):
            _lines(figure, block)
        elif isinstance(block, Histogram):
            _histogram(figure, block)
        else:
            _scatter(figure, block)
        yield figure


def _wrapped(text: str, inches: float) -> str:
    """A label in lines of so many inches; one that needs more than `MAX_LINES` is cut."""
    lines = textwrap.wrap(visible(text), max(8, int(inches / _CHARACTER)), max_lines=MAX_LINES, placeholder=" …")
    return "\n".join(lines)


def _colour(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _axes(figure: Figure, x_label: str, y_label: str, grid: str = "both") -> Axes:
    width, height = figure.get_size_inches()
    axes = figure.add_subplot()
    axes.set_xlabel(_wrapped(x_label, 0.7 * width))
    axes.set_ylabel(_wrapped(y_label, 0.6 * height))
    axes.grid(True, axis=grid)  # type: ignore[arg-type]  # one of x, y, both
    axes.tick_params(length=0)
    return axes


def _nothing(axes: Axes) -> None:
    """Say that there is nothing to draw, instead of empty axes that look like a result."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color=MUTED)


def _as_estimate(value: Estimate | Number) -> Estimate:
    if isinstance(value, Estimate):
        return value
    exact = float(value)
    return Estimate(exact, exact, exact, 0, "exact")


def _bars(figure: Figure, block: Bars) -> None:
    width = float(figure.get_size_inches()[0])
    labels = [_wrapped(label, 0.38 * width) for label in block.labels]
    row = 0.34 + _LINE * max((label.count("\n") for label in labels), default=0)
    figure.set_size_inches(width, 0.85 + row * max(1, len(labels)))
    axes = _axes(figure, block.y_label, "", grid="x")
    rows = [_as_estimate(value) for value in block.values]
    shown = [i for i, row in enumerate(rows) if np.isfinite([row.value, row.low, row.high]).all()]
    if not shown:
        return _nothing(axes)
    values, lows, highs = (np.array([getattr(rows[i], end) for i in shown]) for end in ("value", "low", "high"))
    axes.barh(shown, values, height=0.58, color=_colour(0), alpha=0.85, linewidth=0)
    errors = np.abs(np.stack([values - lows, highs - values]))
    axes.errorbar(values, shown, xerr=errors, fmt="none", color=INK, ecolor=INK, elinewidth=1.1, capsize=3)
    if block.reference is not None:
        axes.axvline(block.reference, color=_colour(1), linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.xaxis.set_major_locator(_few_ticks(0.4 * width))
    places = decimals_for(*values)
    right = axes.secondary_yaxis("right")
    right.spines["right"].set_visible(False)
    whole = all(isinstance(value, int) for value in block.values)
    written = [number(int(row.value)) if whole else number(row.value, places) for row in rows]
    right.set_yticks(range(len(rows)), written)
    right.tick_params(length=0, labelcolor=INK)
    axes.margins(x=0.04)
    return None


def _lines(figure: Figure, block: Lines) -> None:
    axes = _axes(figure, block.x_label, block.y_label)
    any_value = False
    names = []
    width = float(figure.get_size_inches()[0])
    for i, series in enumerate(block.series):
        x, y = _floats(series.x), _floats(series.y)
        keep = np.isfinite(x) & (x > 0 if block.log_x else True)
        any_value |= bool((keep & np.isfinite(y)).any())
        names.append(_wrapped(series.name, width - 1.0))
        axes.plot(
            x[keep],
            y[keep],
            color=_colour(i),
            label=names[-1],
            marker="o" if int(keep.sum()) <= 30 else "",
            markersize=4,
            linestyle=("-", "--", "-.", ":")[i // len(SERIES) % 4],
        )
        if series.low is not None and series.high is not None:
            low, high = _floats(series.low), _floats(series.high)
            axes.fill_between(x[keep], low[keep], high[keep], color=_colour(i), alpha=0.18, linewidth=0)
    if not any_value:
        return _nothing(axes)
    if block.log_x:
        _log_axis(axes, width)
    else:
        axes.xaxis.set_major_locator(_few_ticks(width))
    if len(names) > 1:
        entry = 0.75 + _CHARACTER * max(len(line) for name in names for line in name.split("\n"))
        columns = min(len(names), max(1, int((width - 0.2) / entry)))
        figure.set_size_inches(width, 3.4 + 0.2 * (-(-len(names) // columns) - 1))
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6)
    return None


def _histogram(figure: Figure, block: Histogram) -> None:
    axes = _axes(figure, block.x_label, block.y_label, grid="y")
    values = _floats(block.values)
    values = values[np.isfinite(values) & (values > 0 if block.log_x else True)]
    if values.size == 0:
        return _nothing(axes)
    edges: int | list[float] = block.bins
    if block.log_x and values.min() < values.max():
        edges = np.geomspace(values.min(), values.max(), block.bins + 1).tolist()
    axes.hist(values, bins=edges, color=_colour(0), alpha=0.85, edgecolor=PAPER, linewidth=0.5)
    width = float(figure.get_size_inches()[0])
    if block.log_x:
        _log_axis(axes, width)
    else:
        axes.xaxis.set_major_locator(_few_ticks(width))
    return None


def _scatter(figure: Figure, block: Scatter) -> None:
    axes = _axes(figure, block.x_label, block.y_label)
    x, y = _floats(block.x), _floats(block.y)
    keep = np.isfinite(x) & np.isfinite(y) & (x > 0 if block.log_x else True)
    if not keep.any():
        return _nothing(axes)
    size = float(np.clip(2000 / keep.sum(), 5, 28))
    axes.scatter(x[keep], y[keep], s=size, color=_colour(0), alpha=0.6, linewidth=0)
    width = float(figure.get_size_inches()[0])
    if block.log_x:
        _log_axis(axes, width)
    else:
        axes.xaxis.set_major_locator(_few_ticks(width))
    named = [(label, x[i], y[i]) for i, label in enumerate(block.labels or ()) if label and keep[i]]
    if named:
        _name_points(figure, axes, named, list(zip(x[keep], y[keep], strict=True)))
    return None


def _name_points(
    figure: Figure, axes: Axes, named: Sequence[tuple[str, float, float]], points: Sequence[tuple[float, float]]
) -> None:
    """Writes each name where it covers no other; one for which there is no room becomes a number, explained below."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the places below hold for this layout
    inside = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in axes.transData.transform(points[:MAX_AVOIDED])]
    numbered = []
    for label, x, y in named:
        if (box := _placed(axes, _wrapped(label, 2.6), x, y, inside, taken)) is not None:
            taken.append(box)
            continue
        numbered.append(label)
        box = _placed(axes, str(len(numbered)), x, y, inside, taken)
        taken += [] if box is None else [box]
    if numbered:
        notes = [_wrapped(f"{i + 1}: {label}", figure.get_size_inches()[0] - 0.4) for i, label in enumerate(numbered)]
        _notes_below(figure, axes, "\n".join(notes))


def _placed(axes: Axes, text: str, x: float, y: float, inside: Bbox, taken: Sequence[Bbox]) -> Bbox | None:
    """Writes a text beside a point where it is free; its box, or None if there is no room."""
    note = axes.annotate(
        text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, ha="center", va="center"
    )
    box = note.get_window_extent()
    for distance in (5, 14, 26):
        for across, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
            # of the middle of the text, in points
            place = (
                across * (distance + box.width * 36 / axes.figure.dpi),
                up * (distance + box.height * 36 / axes.figure.dpi),
            )
            moved = box.translated(*(part * axes.figure.dpi / 72 for part in place))
            is_inside = all(inside.contains(*corner) for corner in (moved.min, moved.max))
            if is_inside and not any(moved.expanded(1.04, 1.1).overlaps(other) for other in taken):
                note.set_position(place)
                if distance > 5:
                    axes.annotate(
                        "", (x, y), xytext=place, textcoords="offset points", zorder=1,
                        arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.8, "shrinkB": 0},
                    )  # fmt: skip
                return moved
    note.remove()
    return None


def _notes_below(figure: Figure, axes: Axes, text: str) -> None:
    """Makes the figure taller and writes a text in the room below."""
    width, height = figure.get_size_inches()
    more = 0.1 + _LINE * (text.count("\n") + 1)
    place = axes.get_position()
    figure.set_size_inches(width, height + more)
    scale = height / (height + more)
    axes.set_position((place.x0, (place.y0 * height + more) / (height + more), place.width, place.height * scale))
    figure.text(0.02, 0.02, text, fontsize=8.5, va="bottom", ha="left")


def _few_ticks(inches: float) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=int(np.clip(inches / 0.8, 2, 9)), steps=[1, 2, 2.5, 5, 10])


def _log_axis(axes: Axes, width: float) -> None:
    """A logarithmic axis with ticks also where it spans no power of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = np.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(numticks=int(np.clip(width / 0.8, 3, 9))))
    if decades < 3:
        ticks = [step * 10.0**power for power in range(-12, 13) for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) < 3:
            ticks = [tick for tick in _few_ticks(min(width, 5.0)).tick_values(low, high) if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _power(value: Number) -> str:
    """A tick of a log axis without mathematics markup.

    >>> _power(1000.0), _power(2e6), _power(0.01), _power(1e-6)
    ('1k', '2M', '0.01', '1e-6')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{setting(value / size)}{letter}"
    return setting(value)


def _floats(values: tuple[Number, ...]) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)
