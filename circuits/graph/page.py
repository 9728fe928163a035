"""The page of a circuit: one file that needs no network, with its picture, its nodes and its edges."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from markupsafe import Markup

from circuits.doctor.report import DoctorReport, verdict_of, watermark
from circuits.graph.details import Cards, NodeDetails, details_of
from circuits.graph.names import ERROR
from circuits.graph.picture import EdgeSource, Picture, picture_of, shown_effect
from circuits.pairs import Pairs
from workbench.core.atomic import write_atomic
from workbench.core.display import visible
from workbench.core.numbers import counted, number, percent
from workbench.core.stats import Estimate
from workbench.report.features.render import asset, inline_source, page_template, safe_json, theme

if TYPE_CHECKING:
    import pandas as pd

_FOLDER = Path(__file__).parent
_LEGEND = "raises the metric when patched (supports the clean answer)", "lowers it"


@runtime_checkable
class EffectSource(Protocol):
    """Effects of nodes, as `circuits.NodeEffects` holds them."""

    @property
    def n(self) -> int:
        """Number of examples."""
        ...

    @property
    def metric(self) -> str:
        """What the effects are on."""
        ...

    @property
    def gaps(self) -> dict[str, float]:
        """Per site, how far the effects are from adding up."""
        ...


@runtime_checkable
class FaithSource(Protocol):
    """How much a circuit carries, as `circuits.Faithfulness` holds it."""

    @property
    def value(self) -> Estimate:
        """F."""
        ...

    @property
    def ablation(self) -> str:
        """What ablated nodes are."""
        ...

    @property
    def errors(self) -> str:
        """Which error nodes were kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a page is made of.

    Attributes:
        frame: nodes of the circuit.
        sites: its sites, in the order of a forward pass.
        made: how the nodes were chosen.
        edges: edges between them.
        pairs: what they were found on; the first prompt names the columns.
        effects: effects that they were chosen by.
        cards: feature cards, or pages of them.
        faithfulness: what the circuit carries.
        title: of the page.
        tokens: what stands at each position, where there are no pairs.
        lead: the headline in words, in place of that of a circuit.
        kinds: what nodes of some sites are called; others are features and errors.
        legend: what the two colours of a node mean.
        output: what stands at the top, where there are no effects.
        doctor: what the attribution doctor found.
    """

    frame: pd.DataFrame
    sites: Sequence[str]
    made: str
    edges: EdgeSource | None = None
    pairs: Pairs | None = None
    effects: EffectSource | None = None
    cards: Cards | Mapping[str, Cards] | None = None
    faithfulness: FaithSource | None = None
    title: str = "Circuit"
    tokens: Sequence[str] | None = None
    lead: Sequence[str] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    legend: tuple[str, str] = _LEGEND
    output: str = "output"
    doctor: DoctorReport | None = None


def write_page(source: Source, path: Path) -> Path:
    """Writes the page of a circuit.

    Raises:
        DegenerateInputError: if there is no node.
        MismatchError: if the edges are not between these nodes.
        InvalidInputError: for cards of a site that has no node.
    """
    picture = picture_of(source.frame, source.sites, tokens_of(source), source.edges)
    details = details_of(picture, source.cards, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page_html(source, picture, details).encode())
    return path


def page_html(source: Source, picture: Picture, details: Mapping[int, NodeDetails]) -> str:
    """The page as text."""
    style = theme() + _read("page.css")
    script = asset("dom.js") + _read("layout.js") + _read("store.js") + _read("page.js")
    policy = (
        f"default-src 'none'; script-src {inline_source(script)}; style-src {inline_source(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return page_template(_read("page.html.jinja")).render(
        title=source.title, policy=policy, style=Markup(style), script=Markup(script),
        lead=list(source.lead or _lead(source, picture)), legend=source.legend, made=source.made, notes=picture.notes,
        verdict=verdict_of(source.doctor), failed=watermark(source.doctor) != "", checks=_checks(source),
        data=Markup(safe_json(_data(source, picture, details))), rows=list(_rows(picture)), gaps=_gaps(source, picture),
    )  # fmt: skip


def tokens_of(source: Source) -> list[str] | None:
    """What stands at each position: tokens of the first prompt, or their numbers; None without positions."""
    if "pos" not in source.frame:
        return None
    if source.tokens is not None:
        return list(source.tokens)
    if source.pairs is None:
        return [str(pos) for pos in range(max(source.frame["pos"].tolist(), default=-1) + 1)]
    return [str(token) for token in source.pairs.clean.str_tokens[0]]


def _lead(source: Source, picture: Picture) -> Iterator[str]:
    """The headline in words."""
    if source.pairs is not None:
        row = source.pairs.frame().iloc[0]
        against = f" and not “{row['patch_answer']}”" if "patch_answer" in row else ""
        yield (
            f"What makes the model say “{row['clean_answer']}”{against} behind prompts such as "
            f"“{row['clean_prefix']}” ({counted(len(source.pairs), 'pairs')})."
        )
    n_errors = source.frame["feature"].tolist().count("error")
    parts = f"{counted(len(source.frame) - n_errors, 'features')} and {counted(n_errors, 'errors')}"
    on = "" if source.effects is None else f" on {source.effects.metric}"
    yield f"{counted(len(source.frame), 'nodes')}{on}: {parts} at {counted(len(picture.sites), 'sites')}."
    if (faith := source.faithfulness) is not None:
        yield (
            f"Faithfulness F = {faith.value}: the share of the metric that is left when everything else is put to its "
            f"{faith.ablation if faith.ablation != 'resample' else 'value in another prompt'}; errors kept: "
            f"{faith.errors}."
        )


def _gaps(source: Source, picture: Picture) -> list[tuple[str, str]]:
    if source.effects is None:
        return []
    return [(site, percent(gap)) for site, gap in source.effects.gaps.items() if site in picture.sites]


def _checks(source: Source) -> list[tuple[str, ...]]:
    """What the doctor measured, one row each."""
    if source.doctor is None:
        return []
    return [(str(c.number), c.name, c.part, c.shown, c.threshold, c.outcome, c.why) for c in source.doctor.checks]


def _rows(picture: Picture) -> Iterator[tuple[str, ...]]:
    """The table below the picture."""
    for node in picture.nodes:
        feature = "error" if node.feature == ERROR else str(node.feature)
        place = picture.columns[node.column], picture.sites[node.row]
        yield (*place, feature, *shown_effect(node.effect, node.se, node.n), node.label)


def _data(source: Source, picture: Picture, details: Mapping[int, NodeDetails]) -> dict[str, object]:
    """What the script reads: nodes and edges as columns, numbers with the text that is shown."""
    nodes, edges = picture.nodes, picture.edges
    texts = [shown_effect(node.effect, node.se, node.n) for node in nodes]
    edge_texts = [shown_effect(edge.effect, edge.se, edge.n) for edge in edges]
    output = source.output if source.effects is None else source.effects.metric
    kinds = [
        "error" if node.feature == ERROR else source.kinds.get(picture.sites[node.row], "feature") for node in nodes
    ]
    return {
        "title": source.title, "verdict": verdict_of(source.doctor), "watermark": watermark(source.doctor),
        "output": visible(output), "sites": [visible(site) for site in picture.sites],
        "columns": [visible(column) for column in picture.columns],
        "nodes": {
            "name": [node.name for node in nodes], "row": [node.row for node in nodes],
            "column": [node.column for node in nodes], "isError": [node.feature == ERROR for node in nodes],
            "kind": kinds,
            "effect": [_plain(node.effect) for node in nodes], "se": [_plain(node.se) for node in nodes],
            "n": [node.n for node in nodes],
            "text": [text for text, _ in texts], "interval": [interval for _, interval in texts],
            "size": [number(node.size) for node in nodes],
        },
        "edges": {
            "source": [edge.source for edge in edges], "target": [edge.target for edge in edges],
            "effect": [_plain(edge.effect) for edge in edges], "se": [_plain(edge.se) for edge in edges],
            "n": [edge.n for edge in edges],
            "text": [text for text, _ in edge_texts], "interval": [interval for _, interval in edge_texts],
            "size": [number(abs(edge.effect)) for edge in edges],
        },
        "labels": {node.name: visible(node.label) for node in nodes if node.label},
        "details": {str(i): found for i, found in details.items()},
    }  # fmt: skip


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
