"""What feature cards say about the nodes of a circuit: where they are active, what they promote, and a link."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from circuits.graph.names import ERROR
from circuits.graph.picture import Picture
from workbench.core.display import visible
from workbench.core.errors import InvalidInputError, did_you_mean
from workbench.features import CardSet, Window

Cards = CardSet | str | Path
"""Cards of the features of one site, or the page that `feature_page` made of them, as a path or an address."""
CONTEXTS, PROMOTED = 3, 8
"""Contexts and promoted tokens of a node."""
_BEFORE, _AFTER = 12, 6
_MOST_CHARACTERS = 60


class NodeDetails(TypedDict, total=False):
    """What the page shows of a node besides its numbers.

    Attributes:
        contexts: text before the token on which the feature is most active, that token, text behind it.
        promoted: tokens that it makes likelier, best first.
        link: address of its card.
    """

    contexts: list[tuple[str, str, str]]
    promoted: list[str]
    link: str


def details_of(picture: Picture, cards: Cards | Mapping[str, Cards] | None, folder: Path) -> dict[int, NodeDetails]:
    """What the cards say, by the place of the node in the picture; errors have no cards.

    Args:
        picture: the nodes.
        cards: per site, or of the only site.
        folder: of the page, from which links lead.

    Raises:
        InvalidInputError: for cards of a site that the circuit does not have, or if their site is not known.
    """
    by_site = {} if cards is None else _by_site(picture.sites, cards)
    found: dict[int, NodeDetails] = {}
    for i, node in enumerate(picture.nodes):
        given = by_site.get(picture.sites[node.row])
        if node.feature == ERROR or given is None:
            continue
        if isinstance(given, CardSet):
            if node.feature in given.features:
                card = given[node.feature]
                found[i] = {
                    "contexts": _contexts(card.windows),
                    "promoted": [_clear(token.token) for token in card.promoted[:PROMOTED]],
                }
        else:
            found[i] = {"link": f"{_address(given, folder)}#feature={node.feature}"}
    return found


def _by_site(sites: Sequence[str], cards: Cards | Mapping[str, Cards]) -> Mapping[str, Cards]:
    if isinstance(cards, Mapping):
        for site in cards:
            if site not in sites:
                raise InvalidInputError(f"cards={{{site!r}: ...}}: no node is there. {did_you_mean(site, sites)}")
        return cards
    site = str(cards.meta.get("site", "")) if isinstance(cards, CardSet) else ""
    if site in sites:
        return {site: cards}
    if len(sites) == 1 and not site:
        return {sites[0]: cards}
    raise InvalidInputError(
        f"cards=: these are of {site or 'a site that they do not name'}, and the circuit has nodes at "
        f"{', '.join(sites)}. Say which cards belong where: cards={{{sites[0]!r}: ...}}."
    )


def _contexts(windows: Iterable[Window]) -> list[tuple[str, str, str]]:
    found = []
    for window in list(windows)[:CONTEXTS]:
        before = "".join(window.tokens[max(0, window.peak - _BEFORE) : window.peak])
        after = "".join(window.tokens[window.peak + 1 : window.peak + 1 + _AFTER])
        found.append((_clear(before[-_MOST_CHARACTERS:]), _clear(window.tokens[window.peak]), _clear(after)))
    return found


def _clear(text: str) -> str:
    return visible(text[:_MOST_CHARACTERS])


def _address(page: str | Path, folder: Path) -> str:
    text = str(page)
    if text.startswith(("https://", "http://")):
        return text
    return quote(os.path.relpath(text, folder).replace(os.sep, "/"))
