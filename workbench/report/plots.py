"""Plot blocks as SVG: deterministic, text as text, colours that follow the page from light to dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.core.numbers import Number, decimals_for, number
from workbench.core.stats import Estimate
from workbench.report.blocks import Bars, Histogram, Lines, Scatter
from workbench.report.section import Section
from workbench.report.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PlotBlock = Bars | Lines | Histogram | Scatter

MAX_LABEL = 44
"""Labels are cut to this many characters."""

WIDTH = 6.6
"""Inches; the page scales the drawing to its column."""

# matplotlib draws with these; afterwards each becomes the CSS variable of its role
_INK, _MUTED, _GRID, _PAPER = "#010203", "#010204", "#010205", "#010206"
_SERIES = tuple(f"#0102{10 + i:02d}" for i in range(6))
_ROLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _PAPER: "paper"} | {
    colour: f"c{i + 1}" for i, colour in enumerate(_SERIES)
}

LIGHT = {
    "ink": "#1c2127",
    "muted": "#5b6570",
    "grid": "#dde2e7",
    "paper": "#ffffff",
    "c1": "#2563a8",
    "c2": "#c2571a",
    "c3": "#2a7d52",
    "c4": "#8c4a9e",
    "c5": "#9a7a10",
    "c6": "#5b6570",
}
"""Colours on white; the series colours differ in lightness too, for print and colour-blind readers."""

DARK = {
    "ink": "#e6e9ec",
    "muted": "#9aa4ae",
    "grid": "#353c44",
    "paper": "#15191d",
    "c1": "#6aa9ea",
    "c2": "#ee9a5f",
    "c3": "#67c391",
    "c4": "#c792d8",
    "c5": "#d8bb55",
    "c6": "#9aa4ae",
}
"""The same roles on dark."""

_RC: Any = {  # matplotlib's keys are a literal type of its own
    "svg.hashsalt": "workbench",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "path.simplify": False,
}

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', sans-serif"


def colour_css(palette: dict[str, str]) -> str:
    """The palette as CSS custom properties."""
    return " ".join(f"--{role}: {colour};" for role, colour in palette.items())


_remembered: ContextVar[dict[int, str] | None] = ContextVar("workbench_drawn_plots", default=None)


@contextmanager
def drawn_once() -> Iterator[None]:
    """Inside, a plot block that is asked for again is not drawn again; drawing takes most of a report's time."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def plot_svg(block: PlotBlock) -> str:
    """The block as an `<svg>` element for a page that defines the colours (`--ink`, `--c1`, ...)."""
    drawn = _remembered.get()
    if drawn is None:
        return _draw(block)
    if id(block) not in drawn:
        drawn[id(block)] = _draw(block)
    return drawn[id(block)]


def _draw(block: PlotBlock) -> str:
    with _quiet_matplotlib():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, _height(block)), layout="constrained")
        FigureCanvasSVG(figure)
        _fill(figure, block)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), block.title)


def standalone_svgs(section: Section) -> dict[str, str]:
    """Every plot of a section as a file of its own, named by its place and title."""
    light, dark = colour_css(LIGHT), colour_css(DARK)
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    plots = [block for block in section.blocks if isinstance(block, PlotBlock)]
    return {
        f"{i + 1}-{_slug(block.title)}": re.sub(r"<svg\b[^>]*>", lambda tag: tag[0] + style, plot_svg(block), count=1)
        for i, block in enumerate(plots)
    }


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # text stays text, so the reader's browser picks a font that has the glyph
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def _themed(svg: str, title: str) -> str:
    """Drop the XML head, let CSS decide size and font, and turn stand-in colours into variables."""
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    # its style sheet would hold for the whole page
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'\s(width|height)="[0-9.]+pt"', "", body, count=2)
    label = visible(title).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    body = body.replace("<svg ", f'<svg role="img" aria-label="{label}" stroke-linejoin="round" ', 1)
    body = re.sub(
        r"(fill|stroke|stop-color): (#0102[0-9]{2})",
        lambda found: f"{found[1]}: var(--{_ROLES[found[2]]})" if found[2] in _ROLES else found[0],
        body,
    )
    return re.sub(r"'?DejaVu Sans'?(, sans-serif)?", _FONT, body)


def _slug(title: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))[:50] or "plot"


def _label(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= MAX_LABEL else shown[: MAX_LABEL - 1] + "…"


def _colour(i: int) -> str:
    return _SERIES[i % len(_SERIES)]


def _axes(figure: Figure, x_label: str, y_label: str, grid: str = "both") -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel(_label(x_label) if len(x_label) <= MAX_LABEL else visible(x_label))
    axes.set_ylabel(visible(y_label))
    axes.grid(True, axis=grid)  # type: ignore[arg-type]  # one of x, y, both
    axes.tick_params(length=0)
    return axes


def _nothing(axes: Axes) -> None:
    """Say that there is nothing to draw, instead of empty axes that look like a result."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color=_MUTED)


def _as_estimate(value: Estimate | Number) -> Estimate:
    if isinstance(value, Estimate):
        return value
    exact = float(value)
    return Estimate(exact, exact, exact, 0, "exact")


def _bars(figure: Figure, block: Bars) -> None:
    axes = _axes(figure, block.y_label, "", grid="x")
    rows = [_as_estimate(value) for value in block.values]
    drawn = [i for i, row in enumerate(rows) if np.isfinite([row.value, row.low, row.high]).all()]
    if not drawn:
        return _nothing(axes)
    values, lows, highs = (np.array([getattr(rows[i], end) for i in drawn]) for end in ("value", "low", "high"))
    axes.barh(drawn, values, height=0.58, color=_colour(0), alpha=0.85, linewidth=0)
    errors = np.abs(np.stack([values - lows, highs - values]))
    axes.errorbar(values, drawn, xerr=errors, fmt="none", color=_INK, ecolor=_INK, elinewidth=1.1, capsize=3)
    if block.reference is not None:
        axes.axvline(block.reference, color=_colour(1), linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_yticks(range(len(rows)), [_label(label) for label in block.labels])
    axes.invert_yaxis()
    places = decimals_for(*values)
    right = axes.secondary_yaxis("right")
    right.spines["right"].set_visible(False)
    whole = all(isinstance(value, int) for value in block.values)
    shown = [number(int(row.value)) if whole else number(row.value, places) for row in rows]
    right.set_yticks(range(len(rows)), shown)
    right.tick_params(length=0, labelcolor=_INK)
    axes.margins(x=0.04)
    return None


def _lines(figure: Figure, block: Lines) -> None:
    axes = _axes(figure, block.x_label, block.y_label)
    drawn = False
    for i, series in enumerate(block.series):
        x, y = _floats(series.x), _floats(series.y)
        keep = np.isfinite(x) & (x > 0 if block.log_x else True)
        drawn |= bool((keep & np.isfinite(y)).any())
        few = int(keep.sum()) <= 30
        axes.plot(
            x[keep],
            y[keep],
            color=_colour(i),
            label=_label(series.name),
            marker="o" if few else "",
            markersize=4,
            linestyle=("-", "--", "-.", ":")[i // len(_SERIES) % 4],
        )
        if series.low is not None and series.high is not None:
            low, high = _floats(series.low), _floats(series.high)
            axes.fill_between(x[keep], low[keep], high[keep], color=_colour(i), alpha=0.18, linewidth=0)
    if not drawn:
        return _nothing(axes)
    if block.log_x:
        _log_axis(axes)
    if len(block.series) > 1:
        figure.legend(loc="outside upper left", ncols=min(3, len(block.series)), handlelength=1.6)
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
    axes.hist(values, bins=edges, color=_colour(0), alpha=0.85, edgecolor=_PAPER, linewidth=0.5)
    if block.log_x:
        _log_axis(axes)
    return None


def _scatter(figure: Figure, block: Scatter) -> None:
    axes = _axes(figure, block.x_label, block.y_label)
    x, y = _floats(block.x), _floats(block.y)
    keep = np.isfinite(x) & np.isfinite(y) & (x > 0 if block.log_x else True)
    if not keep.any():
        return _nothing(axes)
    size = float(np.clip(2000 / keep.sum(), 5, 28))
    axes.scatter(x[keep], y[keep], s=size, color=_colour(0), alpha=0.6, linewidth=0)
    for i, label in enumerate(block.labels or ()):
        if label and keep[i]:
            axes.annotate(_label(label), (x[i], y[i]), xytext=(4, 4), textcoords="offset points", fontsize=8.5)
    if block.log_x:
        _log_axis(axes)
    return None


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _power(value: Number) -> str:
    """A tick of a log axis without mathematics markup.

    >>> _power(1000.0), _power(2e6), _power(0.01), _power(1e-6)
    ('1k', '2M', '0.01', '1e-06')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _floats(values: tuple[Number, ...]) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _height(block: PlotBlock) -> float:
    """In inches."""
    return 0.85 + 0.34 * max(1, len(block.labels)) if isinstance(block, Bars) else 3.4


def _fill(figure: Figure, block: PlotBlock) -> None:
    if isinstance(block, Bars):
        _bars(figure, block)
    elif isinstance(block, Lines):
        _lines(figure, block)
    elif isinstance(block, Histogram):
        _histogram(figure, block)
    else:
        _scatter(figure, block)
