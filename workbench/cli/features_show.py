"""The command that writes the feature browser: features show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from workbench.cli.base import BaseCommand
from workbench.core.errors import MissingFileError

if TYPE_CHECKING:
    from workbench.features.card import FeatureCard
    from workbench.features.scores.table import FeatureTable

_MUCH = 60_000_000
"""Bytes of a page from which on some viewers are slow to open it."""


@dataclass(frozen=True, kw_only=True)
class FeaturesShow(BaseCommand):
    """Write the feature browser: one HTML file with a table and a card of every feature, offline."""

    writes_a_file: ClassVar[bool] = True

    folder: tyro.conf.Positional[Path]
    """Folder of feature cards or of a feature table, or the SAE or run folder that holds one."""
    table: Path | None = None
    """Folder of a feature table, from `workbench features score`, whose scores are added."""
    out: Path = Path("features.html")
    """File to write."""
    title: str | None = None
    """Heading of the page; by default the name of the folder."""
    windows: int = 20
    """Contexts per feature; fewer make the file smaller."""

    def run(self) -> None:
        """Writes the page, and says how large it is."""
        from workbench.core.records import to_jsonable, write_atomic
        from workbench.features.cards.tablecards import complete_cards
        from workbench.report.features import PackOptions, feature_page

        cards, table, meta = load_cards(self.folder, self.table)
        if table is not None:
            cards = complete_cards(cards, table)
        page = feature_page(
            map(to_jsonable, cards),
            self.title or f"Features of {self.folder.resolve().name}",
            _subtitle(meta),
            PackOptions(windows=self.windows),
        )
        file = write_atomic(self.out, page.html)
        size = file.stat().st_size
        line = (
            f"{page.n_features:,} features in {file}: {size / 1e6:.1f} MB, of which {page.index_bytes / 1e6:.1f} MB "
            f"table and {page.card_bytes / 1e6:.1f} MB cards."
        )
        hint = [f"Large for some viewers; --windows {max(1, self.windows // 2)} makes it smaller."] * (size > _MUCH)
        summary = {
            "file": file, "features": page.n_features, "bytes": size, "index_bytes": page.index_bytes,
            "card_bytes": page.card_bytes,
        }  # fmt: skip
        self.emit(summary, [line, *hint, "Open it in a browser; it needs no network."])


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
    from workbench.features.scores.table import TABLE_FILE, FeatureTable

    for place in filter(None, (folder, table)):
        if not place.is_dir():
            raise MissingFileError(f"There is no folder {place}. Give one that holds feature cards or a feature table.")
    inner = (folder, folder / "artifacts")
    places = tuple(place / name for place in inner for name in ("", "cards", "features"))
    cards = next((CardSet.load(place) for place in places if (place / CARDS_FILE).is_file()), None)
    scored = table or next((place for place in places if (place / TABLE_FILE).is_file()), None)
    if cards is None and scored is None:
        raise MissingFileError(
            f"Neither {folder} nor its folders cards/, features/ and artifacts/ hold feature cards or a feature table."
            f" Make cards with `workbench features cards {folder} --store ACTIVATIONS`, or scores with "
            "`workbench features score`, and name their folder with --table."
        )
    found = None if scored is None else FeatureTable.load(scored)
    if cards is None:
        return (), found, {} if found is None else found.meta
    if found is not None:
        require_same_origin("The feature table", found.meta, cards.meta)
    return cards, found, cards.meta


def _subtitle(meta: dict[str, object]) -> str:
    where = " of ".join(str(meta[key]) for key in ("site", "model") if meta.get(key))
    return where + (f", {meta['n_tokens']:,} tokens read" if meta.get("n_tokens") else "")
