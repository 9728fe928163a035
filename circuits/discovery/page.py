"""The page of clusters: one file that needs no network, with a card per cluster that can be searched and sorted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from workbench.core.atomic import write_atomic
from workbench.report.features.render import inline_source, page_template, theme

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the page says of one cluster; numbers are text, sort keys are numbers.

    Attributes:
        measures: name, value and interval of each number.
        contexts: end of the context, answer, loss.
        features: site, feature, effect, interval.
        page: address of the circuit's page; "" if there is none.
    """

    cluster: int
    answers: str
    n: int
    documents: int
    coherence: float
    faithful: float
    measures: tuple[tuple[str, str, str], ...]
    contexts: tuple[tuple[str, str, str], ...]
    features: tuple[tuple[str, str, str, str], ...]
    page: str


def write_clusters(cards: Sequence[Card], lead: Sequence[str], title: str, path: Path) -> Path:
    """Writes the page.

    Args:
        cards: the clusters.
        lead: lines above them.
        title: of the page.
        path: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, clusters_html(cards, lead, title).encode())
    return path


def clusters_html(cards: Sequence[Card], lead: Sequence[str], title: str) -> str:
    """The page as text."""
    style, script = theme() + _read("clusters.css"), _read("clusters.js")
    policy = (
        f"default-src 'none'; script-src {inline_source(script)}; style-src {inline_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return page_template(_read("clusters.html.jinja")).render(
        title=title, policy=policy, style=Markup(style), script=Markup(script), lead=lead, cards=cards,
    )  # fmt: skip


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
