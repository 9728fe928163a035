"""The page of the playground: one document with its script and style, and a policy that allows nothing else."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from workbench.report.features.render import asset, inline_source, page_template, theme

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ServedPage:
    """A page and its content security policy."""

    html: str
    policy: str


def playground_page(title: str) -> ServedPage:
    """The page of a model; it gets everything else from the server."""
    style = theme() + asset("page.css") + _read("page.css")
    script = asset("logic.js") + asset("dom.js") + _read("logic.js") + _read("page.js")
    policy = (
        f"default-src 'none'; script-src {inline_source(script)}; style-src {inline_source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    template = page_template(_read("page.html.jinja"))
    return ServedPage(template.render(title=title, style=Markup(style), script=Markup(script)), policy)


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
