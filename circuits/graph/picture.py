"""What a picture of a circuit shows: nodes by site and position, edges, and where a static picture has its nodes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from markupsafe import Markup

from circuits.graph.names import ERROR, node_name
from workbench.core.display import OneLine, clipped, visible
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.core.numbers import counted, with_interval
from workbench.core.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

MOST_NODES, MOST_EDGES = 2000, 20_000
"""Nodes and edges that a page holds, the strongest first."""
MOST_COLUMNS = 24
"""Tokens above which only the columns with nodes are shown."""
ALL_POSITIONS = "all positions"


@runtime_checkable
class EdgeSource(Protocol):
    """Edges between nodes, as `circuits.Edges` holds them."""

    @property
    def n(self) -> int:
        """Number of pairs."""
        ...

    @property
    def made(self) -> str:
        """How they were made."""
        ...

    def frame(self) -> pd.DataFrame:
        """One row per edge."""
        ...


@dataclass(frozen=True, kw_only=True)
class DrawnNode(OneLine):
    """A node with what is said about it.

    Attributes:
        name: by `node_name`.
        row: which of the sites.
        column: which of the columns.
        feature: number of the feature; `ERROR` for an error.
        effect: mean effect; NaN where it is not known.
        se: its standard error; NaN where it is not known.
        n: number of examples of the mean; 0 where it is not known.
        label: what people call it.
    """

    name: str
    row: int
    column: int
    feature: int
    effect: float
    se: float
    n: int
    label: str = ""

    @property
    def size(self) -> float:
        """The absolute effect; 0 where it is not known."""
        return abs(self.effect) if math.isfinite(self.effect) else 0.0


@dataclass(frozen=True, kw_only=True)
class DrawnEdge(OneLine):
    """An edge between two nodes, by their places in the list of nodes; its effect is a mean over `n` pairs."""

    source: int
    target: int
    effect: float
    se: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Picture(OneLine):
    """Nodes and edges of a circuit.

    Attributes:
        sites: sites that hold nodes, in the order of a forward pass.
        columns: what stands below each column: tokens of the first prompt, or `ALL_POSITIONS`.
        nodes: the strongest first.
        edges: the strongest first.
        notes: what is not shown, in words.
    """

    sites: tuple[str, ...]
    columns: tuple[str, ...]
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...] = ()
    notes: tuple[str, ...] = ()


def picture_of(
    frame: pd.DataFrame, sites: Sequence[str], tokens: Sequence[str] | None = None, edges: EdgeSource | None = None, *,
    whole: bool = False,
) -> Picture:  # fmt: skip
    """The picture of the nodes in a circuit's table.

    Args:
        frame: `Circuit.frame()`.
        sites: the sites of the circuit, in the order of a forward pass.
        tokens: what stands at each position; None if positions were put together.
        edges: edges between the nodes.
        whole: take all nodes and edges, not the strongest `MOST_NODES` and `MOST_EDGES`.

    Raises:
        DegenerateInputError: if there is no node.
        MismatchError: if there are edges, and none is between these nodes.
    """
    if not len(frame):
        raise DegenerateInputError(
            "This circuit lists no nodes, so there is nothing to draw. Choose some: effects.circuit(n=100)."
        )
    shown = frame if whole else frame.head(MOST_NODES)
    used = set(shown["site"])
    rows = {site: i for i, site in enumerate(site for site in sites if site in used)}
    where = shown["pos"].tolist() if "pos" in shown else [-1] * len(shown)
    columns = _columns(where, tokens)
    names = list(columns.values())
    nodes = tuple(
        DrawnNode(
            name=node_name(site, pos, feature), row=rows[site], column=list(columns).index(pos), feature=feature,
            effect=effect, se=se, n=n, label=label,
        )
        for pos, site, feature, effect, se, n, label in zip(
            where, shown["site"], map(_number_of, shown["feature"]), shown["effect"].tolist(), shown["se"].tolist(),
            shown["n"].tolist(), shown["label"], strict=True,
        )
    )  # fmt: skip
    notes = []
    if len(shown) < len(frame):
        notes.append(f"the {len(shown)} strongest of {counted(len(frame), 'nodes')} are shown")
    if empty := len(sites) - len(rows):
        notes.append(f"{counted(empty, 'sites')} without nodes left out")
    drawn, said = ((), ()) if edges is None else _edges_of(edges, nodes, None if whole else MOST_EDGES)
    return Picture(sites=tuple(rows), columns=tuple(names), nodes=nodes, edges=drawn, notes=(*notes, *said))


def _columns(where: Sequence[int], tokens: Sequence[str] | None) -> dict[int, str]:
    if tokens is None:
        return {pos: ALL_POSITIONS if pos < 0 else f"position {pos}" for pos in sorted(set(where))}
    used = range(len(tokens)) if len(tokens) <= MOST_COLUMNS else sorted(set(where))
    return {pos: tokens[pos] for pos in used}


def _number_of(feature: object) -> int:
    return ERROR if feature == "error" else int(str(feature))


def _edges_of(
    edges: EdgeSource, nodes: Sequence[DrawnNode], most: int | None
) -> tuple[tuple[DrawnEdge, ...], tuple[str, ...]]:
    frame = edges.frame()
    place = {node.name: i for i, node in enumerate(nodes)}
    ends = []
    for side in ("upstream", "downstream"):
        where = frame[f"{side}_pos"].tolist() if f"{side}_pos" in frame else [-1] * len(frame)
        features = map(_number_of, frame[f"{side}_feature"])
        ends.append([
            place.get(node_name(*node)) for node in zip(frame[f"{side}_site"], where, features, strict=True)
        ])  # fmt: skip
    every = [
        DrawnEdge(source=source, target=target, effect=effect, se=se, n=edges.n)
        for source, target, effect, se in zip(*ends, frame["effect"].tolist(), frame["se"].tolist(), strict=True)
        if source is not None and target is not None
    ]
    if len(frame) and not every:
        raise MismatchError(
            f"None of {counted(len(frame), 'edges')} is between the nodes that are shown: they were made for another "
            "circuit. Give the edges of this one: circuits.edge_effects(..., circuit)."
        )
    notes = []
    if len(every) < len(frame):
        notes.append(f"{counted(len(frame) - len(every), 'edges')} to nodes that are not shown left out")
    if most is not None and len(every) > most:
        notes.append(f"the {most} strongest of {counted(len(every), 'edges')} are shown")
    return tuple(every[:most]), tuple(notes)


@functools.cache
def standard_errors(n: int) -> float:
    """Standard errors on each side of a mean over n examples in its 95 % interval: Student's t, n - 1 degrees.

    >>> round(standard_errors(3), 3), round(standard_errors(1000), 3)
    (4.303, 1.962)
    """
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1)) if n > 1 else math.inf


def effect_estimate(effect: float, se: float, n: int) -> Estimate:
    """An effect over so many pairs with its 95 % interval; without a standard error the interval has no width.

    >>> round(effect_estimate(0.5, 0.1, 3).high, 4)  # 0.5 + 4.303 * 0.1
    0.9303
    """
    half = standard_errors(n) * se if math.isfinite(se) and n > 1 else 0.0
    return Estimate(effect, effect - half, effect + half, n, "Student's t", "pairs")


def shown_effect(effect: float, se: float, n: int) -> tuple[str, str]:
    """An effect and its 95 % interval as text; without a standard error or n there is no interval.

    >>> shown_effect(0.5, 0.1, 3), shown_effect(0.5, 0.1, 0), shown_effect(0.5, math.nan, 3)
    (('+0.500', '[+0.070, +0.930]'), ('+0.500', ''), ('+0.500', ''))
    """
    if not math.isfinite(se) or n < 2:
        return with_interval(effect, effect, effect, sign=True)[0], ""
    half = standard_errors(n) * se
    return with_interval(effect, effect - half, effect + half, sign=True)


# The static picture.

_WIDTH, _GUTTER, _SLOT, _PAD, _HEAD, _FOOT, _EMPTY = 720.0, 104.0, 20.0, 8.0, 30.0, 22.0, 36.0
MOST_STATIC = 300
"""Nodes of the static picture, the strongest first."""
POSITIVE, NEGATIVE = "#e07b39", "#3b82d0"


def columns_of(picture: Picture) -> list[tuple[float, float]]:
    """Left end and width of each column: those without nodes are narrow, the others share the rest."""
    used = {node.column for node in picture.nodes}
    room = _WIDTH - _GUTTER
    narrow = min(_EMPTY, room / len(picture.columns))
    wide = (room - narrow * (len(picture.columns) - len(used))) / len(used)
    widths = [wide if i in used else narrow for i in range(len(picture.columns))]
    return [(_GUTTER + sum(widths[:i]), width) for i, width in enumerate(widths)]


def placed(picture: Picture) -> tuple[list[tuple[float, float]], list[float], float]:
    """Where a static picture puts the nodes, the lower end of each site, and the height of all."""
    columns = columns_of(picture)
    per_line = [max(1, int(width // _SLOT)) for _, width in columns]
    cells: dict[tuple[int, int], list[int]] = {}
    for i, node in enumerate(picture.nodes):
        cells.setdefault((node.row, node.column), []).append(i)
    lines = [1] * len(picture.sites)
    for (row, col), members in cells.items():
        lines[row] = max(lines[row], math.ceil(len(members) / per_line[col]))
    heights = [n * _SLOT + _PAD for n in lines]
    total = _HEAD + sum(heights) + _FOOT
    bottoms = [total - _FOOT - sum(heights[:row]) for row in range(len(heights))]
    where = [(0.0, 0.0)] * len(picture.nodes)
    for (row, col), members in cells.items():
        start, width = columns[col]
        for k, i in enumerate(members):
            line, place = divmod(k, per_line[col])
            n = min(per_line[col], len(members) - line * per_line[col])
            x = start + width / 2 + _SLOT * (place - (n - 1) / 2)
            where[i] = (x, bottoms[row] - _PAD / 2 - _SLOT * (line + 0.5))
    return where, bottoms, total


def static_svg(picture: Picture, output: str, mark: str = "") -> Markup:
    """The picture without a script, for a notebook: colours of the text around it, orange above zero, blue below.

    Args:
        picture: what is drawn; its strongest nodes.
        output: what stands at the top.
        mark: what is written across it; "" for nothing.
    """
    nodes = picture.nodes[:MOST_STATIC]
    whole = Picture(sites=picture.sites, columns=picture.columns, nodes=nodes)
    where, bottoms, height = placed(whole)
    largest = max((node.size for node in nodes), default=0.0) or 1.0
    parts = [*_frame(whole, bottoms, height, output), *(
        _mark(node, *where[i], radius(node.size, largest, 2.5, 6.0)) for i, node in enumerate(nodes)
    ), *_across(mark, height)]  # fmt: skip
    return Markup(
        '<svg viewBox="0 0 {} {}" width="{}" height="{}" font-size="11" font-family="system-ui, sans-serif" '
        'fill="currentColor" role="img" aria-label="{}">{}</svg>'
    ).format(
        _px(_WIDTH), _px(height), _px(_WIDTH), _px(height),
        f"{counted(len(nodes), 'nodes')} at {counted(len(picture.sites), 'sites')}", Markup("").join(parts),
    )  # fmt: skip


def radius(size: float, largest: float, least: float, most: float) -> float:
    """Of a node: its area grows with the absolute effect.

    >>> radius(0.0, 1.0, 2.0, 6.0), radius(1.0, 1.0, 2.0, 6.0)
    (2.0, 6.0)
    """
    return least + (most - least) * math.sqrt(min(1.0, size / largest))


def _frame(picture: Picture, bottoms: Sequence[float], height: float, output: str) -> Iterator[Markup]:
    middle = (_GUTTER + _WIDTH) / 2
    yield Markup('<text x="{}" y="16" text-anchor="middle" font-weight="600">{}</text>').format(
        _px(middle), visible(clipped(output, 60))
    )
    for site, bottom in zip(picture.sites, bottoms, strict=True):
        yield Markup('<path d="M0 {}H{}" stroke="currentColor" stroke-opacity=".15"/>').format(_px(bottom), _px(_WIDTH))
        yield Markup('<text x="0" y="{}" opacity=".75">{}</text>').format(_px(bottom - 9), visible(clipped(site, 18)))
    for text, (left, width) in zip(picture.columns, columns_of(picture), strict=True):
        yield Markup('<text x="{}" y="{}" text-anchor="middle" opacity=".75">{}</text>').format(
            _px(left + width / 2), _px(height - 6), visible(clipped(text, max(2, int(width // 6.5))))
        )


def _mark(node: DrawnNode, x: float, y: float, r: float) -> Markup:
    effect, interval = shown_effect(node.effect, node.se, node.n)
    said = " ".join(filter(None, (clipped(node.label, 60), node.name, effect, interval)))
    title = Markup("<title>{}</title>").format(visible(said))
    colour = NEGATIVE if node.effect < 0 else POSITIVE
    if node.feature == ERROR:
        low = _px(y + 0.8 * r)
        points = f"{_px(x)},{_px(y - r)} {_px(x - r)},{low} {_px(x + r)},{low}"
        return Markup('<polygon points="{}" fill="{}">{}</polygon>').format(points, colour, title)
    return Markup('<circle cx="{}" cy="{}" r="{}" fill="{}">{}</circle>').format(_px(x), _px(y), _px(r), colour, title)


def _across(mark: str, height: float) -> Iterator[Markup]:
    """The mark across the whole picture, so that no part of it is without it."""
    if not mark:
        return
    size = max(11.0, min(40.0, 1.7 * _WIDTH / len(mark)))
    gap = max(110.0, 4 * size)
    y = 0.6 * min(height, gap)
    while y < height:
        yield Markup(
            '<text x="{}" y="{}" text-anchor="middle" transform="rotate(-8 {} {})" font-size="{}" font-weight="800" '
            'fill="#c0392b" opacity=".3" pointer-events="none" class="watermark">{}</text>'
        ).format(_px(_WIDTH / 2), _px(y), _px(_WIDTH / 2), _px(y), _px(size), visible(mark))
        y += gap


def _px(length: float) -> float:
    return round(length, 1)
