"""The page of all features, as one file that needs no network, and the card of one feature for a notebook."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from workbench.report.features.card import card_body
from workbench.report.features.encode import Card, Packed, PackOptions, pack_cards
from workbench.report.features.words import KINDS
from workbench.report.plots import DARK, LIGHT, colour_css
from workbench.report.text import visible

if TYPE_CHECKING:
    from jinja2 import Template

_FOLDER = Path(__file__).parent
_TEXT_FIELDS = ("explanation", "flag", "token", "promoted", "suppressed", "reads")


@dataclass(frozen=True)
class FeaturePage:
    """A finished page.

    Attributes:
        index_bytes: size of the table of all features, with the strings.
        card_bytes: size of all cards, packed.
    """

    html: str
    n_features: int
    index_bytes: int
    card_bytes: int


def feature_page(
    cards: Iterable[Card], title: str = "Features", subtitle: str = "", options: PackOptions | None = None
) -> FeaturePage:
    """The page of some features: one file with a table that is sorted and searched, and a card for each.

    Cards are read one at a time; each is a mapping with the fields of `FeatureCard`, nested values likewise.

    Raises:
        DegenerateInputError: if there is no card.
        InvalidInputError: if a feature occurs twice, or a window's parts do not fit together.
    """
    packed = pack_cards(cards, options)
    index = safe_json(packed.index | {"kinds": KINDS})
    html = _render(packed, index, title, subtitle)
    return FeaturePage(html, len(packed.index["feature"]), len(index.encode()), sum(map(len, packed.chunks)))


def card_html(card: Card) -> str:
    """One feature's card for a notebook: no script, carries its own style and changes nothing outside itself."""
    colours = (
        f".wb-card {{ {colour_css(LIGHT)} color-scheme: light dark; background: var(--paper); padding: 1rem;"
        " border-radius: 6px; font-family: system-ui, sans-serif; }\n"
        f"@media (prefers-color-scheme: dark) {{ .wb-card {{ {colour_css(DARK)} }} }}\n"
    )
    style = Markup(colours + asset("card.css"))
    return str(Markup('<article class="wb-card"><style>{}</style>{}</article>').format(style, card_body(card)))


def safe_json(value: object) -> str:
    r"""JSON that can stand inside a script element: nothing in it ends the element or begins a comment.

    >>> safe_json("</script>&")
    '"\\u003c/script\\u003e\\u0026"'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _render(packed: Packed, index: str, title: str, subtitle: str) -> str:
    style = theme() + asset("page.css") + asset("card.css")
    script = asset("logic.js") + asset("dom.js") + asset("page.js")
    policy = (
        f"default-src 'none'; script-src {inline_source(script)}; style-src {inline_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return page_template(asset("page.html.jinja")).render(
        title=title, subtitle=subtitle, policy=policy, style=Markup(style), script=Markup(script), index=Markup(index),
        chunks=[Markup(safe_json(chunk)) for chunk in packed.chunks], text_fields=_TEXT_FIELDS,
        names=list(packed.index["values"]),
    )  # fmt: skip


def inline_source(text: str) -> str:
    """The hash by which a content security policy allows one inline script or style, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def theme() -> str:
    """The colours of a page, light or dark as the reader's system has it."""
    return (
        f":root {{ {colour_css(LIGHT)} color-scheme: light dark; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {colour_css(DARK)} }} }}\n"
    )


@functools.cache
def asset(name: str) -> str:
    """A script, style or template of this folder."""
    return (_FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def page_template(source: str) -> Template:
    """A template that escapes everything and refuses unknown names; `visible` shows what could hide or reorder text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = lambda text: escape(visible(str(text)))
    return environment.from_string(source)
