"""Plot blocks as SVG: deterministic, text as text, colours that follow the page from light to dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from workbench.report.drawing import GRID, INK, MUTED, PAPER, SERIES, PlotBlock, drawn
from workbench.report.section import Section
from workbench.report.text import visible

_ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"c{i + 1}" for i, colour in enumerate(SERIES)
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
    known = _remembered.get()
    if known is None:
        return _draw(block)
    if id(block) not in known:
        known[id(block)] = _draw(block)
    return known[id(block)]


def _draw(block: PlotBlock) -> str:
    buffer = io.StringIO()
    with drawn(block) as figure:
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
