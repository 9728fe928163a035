"""The page of toggled features: one file that needs no network and computes accuracies as features are switched."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup

from workbench.report.features.render import inline_source, page_template, safe_json, theme

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class TogglePage:
    """What a page computes from.

    Attributes:
        title: of the page.
        features: their names.
        ablated: those that are ablated to begin with.
        logits: of label 1 for each test text, nothing ablated.
        parts: for each test text what each feature adds to the logit.
        label: 0 or 1 for each test text.
        shortcut: the label that its attribute goes with in training; None if that is not known.
        groups: name of its group.
    """

    title: str
    features: tuple[str, ...]
    ablated: tuple[str, ...]
    logits: Sequence[float]
    parts: Sequence[Sequence[float]]
    label: Sequence[int]
    shortcut: Sequence[int] | None
    groups: tuple[str, ...]


def toggle_html(page: TogglePage) -> str:
    """The page as text."""
    style, script = theme() + _read("toggles.css"), _read("toggles.js")
    policy = (
        f"default-src 'none'; script-src {inline_source(script)}; style-src {inline_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return page_template(_read("toggles.html.jinja")).render(
        title=page.title, features=page.features, ablated=set(page.ablated), policy=policy, style=Markup(style),
        script=Markup(script), data=Markup(safe_json(asdict(page))),
    )  # fmt: skip


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
