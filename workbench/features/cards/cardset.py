"""A set of feature cards, made or read one at a time, saved as Parquet."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from workbench.core.arguments import checked
from workbench.core.atomic import replacing
from workbench.core.errors import CorruptFileError, InvalidInputError
from workbench.core.html import MOST_ROWS, Shown, table
from workbench.core.jsontext import Record, content_of, parse_json
from workbench.core.numbers import counted
from workbench.core.progress import track
from workbench.core.records import from_jsonable, to_jsonable
from workbench.features.card import FeatureCard
from workbench.features.parquet import reading, with_header

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from pyarrow.parquet import ParquetFile

CARDS_FILE = "cards.parquet"
VERSION = 2
AGAIN = "Make the cards with feature_cards or `workbench features cards`."
ROW_GROUP = 32
"""Cards that are read at once."""


@runtime_checkable
class CardSource(Protocol):
    """Makes or reads the cards of a set."""

    def card(self, place: int) -> FeatureCard:
        """The card at a place of the set."""
        ...


@checked
class CardSet(Shown):
    """Cards of some features, made or read on access; `cards[i]` is the card of feature i.

    Attributes:
        features: which features, in order.
        meta: model, site, tokens read, how the cards were made.
    """

    def __init__(self, features: tuple[int, ...], meta: Record, source: CardSource) -> None:
        self.features, self.meta, self._source = features, meta, source
        self._place = {feature: place for place, feature in enumerate(features)}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, feature: int) -> FeatureCard:
        """The card of a feature.

        Raises:
            InvalidInputError: if the feature has no card here.
        """
        if feature not in self._place:
            shown = ", ".join(map(str, self.features[:5])) + (", …" if len(self) > 5 else "")
            raise InvalidInputError(
                f"There is no card of feature {feature}; this set has {len(self)} ({shown}). Make one with "
                "feature_cards(..., features=[...])."
            )
        return self._source.card(self._place[feature])

    def __iter__(self) -> Iterator[FeatureCard]:
        return (self._source.card(place) for place in range(len(self)))

    def save(self, path: str | Path) -> Path:
        """Writes `cards.parquet` into a folder; returns the folder. Memory does not grow with the cards.

        A process that is killed leaves the cards that were there before, or the new ones.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(path)
        fields = [("feature", pa.int64()), ("frequency", pa.float64()), ("max_act", pa.float64())]
        schema = pa.schema([*fields, ("flags", pa.list_(pa.string())), ("card", pa.string())])
        schema = with_header(schema, {"version": VERSION, "meta": self.meta})
        rows = map(_row, track(self, total=len(self), description="cards", unit="cards"))
        with replacing(folder / CARDS_FILE) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while group := list(itertools.islice(rows, ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        return folder

    @classmethod
    def load(cls, path: str | Path) -> CardSet:
        """The cards in a folder; they are read on access.

        Raises:
            MissingFileError: if there are none.
            CorruptFileError: if the files can't be used.
        """
        place = Path(path) / CARDS_FILE
        with reading(place, "feature cards", AGAIN) as (file, header):
            if header.get("version") != VERSION or not isinstance(header.get("meta"), dict):
                raise CorruptFileError(f"{place} holds no cards of format {VERSION}. {AGAIN}")
            features = tuple(int(feature) for feature in file.read(columns=["feature"])["feature"].to_pylist())
        return cls(features, header["meta"], _Stored(place, file))

    def frame(self) -> pd.DataFrame:
        """One row per card: feature, frequency, largest activation, flags, explanation, promoted tokens; makes all."""
        return self._frame(len(self))

    def _frame(self, n: int) -> pd.DataFrame:
        """The first rows of `frame`."""
        import pandas as pd

        return pd.DataFrame([_shown(self._source.card(place)) for place in range(min(n, len(self)))])

    def _shown_line(self) -> str:
        return f"{counted(len(self), 'features')} of {self.meta.get('site')} in {self.meta.get('model')}"

    def _shown_parts(self) -> Iterable[Markup]:
        cards = self._frame(MOST_ROWS)
        yield table(list(cards.columns), cards.itertuples(index=False, name=None), total=len(self))


class _Stored:
    """Cards in a Parquet file; the last row group that was read is kept."""

    def __init__(self, path: Path, file: ParquetFile) -> None:
        self._path, self._file, self._group = path, file, -1
        self._cards: list[str] = []
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._first = [0, *itertools.accumulate(sizes)]

    def card(self, place: int) -> FeatureCard:
        import pyarrow as pa

        group = bisect.bisect_right(self._first, place) - 1
        if group != self._group:
            with content_of(self._path, AGAIN, pa.ArrowException, OSError):
                self._cards = self._file.read_row_group(group, columns=["card"])["card"].to_pylist()
            self._group = group
        where = f"{self._path}: card {place}"
        with content_of(where, AGAIN):
            return from_jsonable(FeatureCard, parse_json(self._cards[place - self._first[group]], where, remedy=AGAIN))


def _shown(card: FeatureCard) -> dict[str, object]:
    return {
        "feature": card.feature, "frequency": card.frequency, "max_act": card.max_act, "flags": ", ".join(card.flags),
        "explanation": None if card.explanation is None else card.explanation.text,
        "promoted": " · ".join(token.token for token in card.promoted[:6]),
    }  # fmt: skip


def _row(card: FeatureCard) -> Record:
    text = json.dumps(to_jsonable(card), ensure_ascii=False, allow_nan=False)
    columns = {name: getattr(card, name) for name in ("feature", "frequency", "max_act")}
    return {**columns, "flags": list(card.flags), "card": text}
