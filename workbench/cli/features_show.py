"""The command that writes the feature browser: features show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from workbench.cli.base import BaseCommand, typed
from workbench.cli.places import sae_folder
from workbench.core.errors import MissingFileError
from workbench.core.numbers import byte_size, counted

if TYPE_CHECKING:
    from workbench.features.card import FeatureCard
    from workbench.features.scores.table import FeatureTable

_MUCH = 60_000_000
"""Bytes of a page from which on some viewers are slow to open it."""


@dataclass(frozen=True, kw_only=True)
class FeaturesShow(BaseCommand):
    """Write the feature browser: one HTML file, offline.

    It holds a table of all features and a card of each.

    Example: workbench features show sae --out features.html
    """

    writes_a_file: ClassVar[bool] = True

    folder: tyro.conf.Positional[Path]
    """SAE: its folder, or a run that holds one (folder, name or latest); or a folder of feature cards or a table."""
    table: Path | None = None
    """Folder of a feature table, from `workbench features score`, whose scores are added."""
    out: Path = Path("features.html")
    """File to write."""
    title: str | None = None
    """Heading of the page; by default the model and the site, or the name of the folder where these are not known."""
    windows: int = 20
    """Contexts per feature; fewer make the file smaller."""

    def run(self) -> None:
        """Writes the page, and says how large it is."""
        from workbench.core.records import to_jsonable, write_atomic
        from workbench.features.cards.tablecards import complete_cards
        from workbench.report.features import PackOptions, feature_page
        from workbench.saes.formats.load import CONFIG_FILE

        folder = sae_folder(self.folder)
        cards, table, meta = load_cards(folder, self.table)
        if table is not None:
            cards = complete_cards(cards, table)
        page = feature_page(
            map(to_jsonable, cards),
            self.title or f"Features of {_origin(meta) or self.folder.resolve().name}",
            _subtitle(meta),
            PackOptions(windows=self.windows),
        )
        file = write_atomic(self.out, page.html)
        size = file.stat().st_size
        line = (
            f"{counted(page.n_features, 'features')} in {file}: {byte_size(size)}, of which "
            f"{byte_size(page.index_bytes)} table and {byte_size(page.card_bytes)} cards."
        )
        hint = [f"Large for some viewers; --windows {max(1, self.windows // 2)} makes it smaller."] * (size > _MUCH)
        summary = {
            "file": file, "features": page.n_features, "bytes": size, "index_bytes": page.index_bytes,
            "card_bytes": page.card_bytes,
        }  # fmt: skip
        has_sae = (folder / CONFIG_FILE).is_file()
        following = typed("serve", "--sae", folder) if has_sae else typed("runs")
        self.emit(summary, [line, *hint, "Open it in a browser; it needs no network."], following)


def load_cards(
    folder: Path, table: Path | None = None
) -> tuple[Iterable[FeatureCard], FeatureTable | None, dict[str, object]]:
    """The cards of a folder, the table that completes them, and how they were made; cards or table may be missing.

    Raises:
        MissingFileError: if there is no such folder, or neither in it.
        MismatchError: if the table is of another SAE.
    """
    from workbench.features.cards.cardset import CARDS_FILE, CardSet
    from workbench.features.scores.origin import require_same_origin
    from workbench.features.scores.table import IN_RUN, TABLE_FILE, FeatureTable
    from workbench.saes.home import SAEHome

    for place in filter(None, (folder, table)):
        if not place.is_dir():
            raise MissingFileError(f"There is no folder {place}. Give one that holds feature cards or a feature table.")
    home = SAEHome(folder)
    places = (folder, home.cards, home.table, folder / IN_RUN)
    cards = next((CardSet.load(place) for place in places if (place / CARDS_FILE).is_file()), None)
    scored = table or next((place for place in places if (place / TABLE_FILE).is_file()), None)
    if cards is None and scored is None:
        raise MissingFileError(
            f"Neither {folder} nor its folders cards/ and features/ hold feature cards or a feature table. Make cards "
            f"with `{typed('features', 'cards', folder)}`, or scores with `{typed('features', 'score', folder)}`."
        )
    found = None if scored is None else FeatureTable.load(scored)
    if cards is None:
        return (), found, {} if found is None else found.meta
    if found is not None:
        require_same_origin("The feature table", found.meta, cards.meta)
    return cards, found, cards.meta


def _origin(meta: dict[str, object]) -> str:
    return " at ".join(str(meta[key]) for key in ("model", "site") if meta.get(key))


def _subtitle(meta: dict[str, object]) -> str:
    where = " of ".join(str(meta[key]) for key in ("site", "model") if meta.get(key))
    n = meta.get("n_tokens")
    return where + (f", {counted(n, 'tokens')} read" if isinstance(n, int) and n else "")
