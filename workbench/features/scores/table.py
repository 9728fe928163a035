"""The feature table: one row per feature, in pandas, Parquet and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.bases.sae import AnySAE
from workbench.controls.matching import matched_features
from workbench.core.arguments import checked
from workbench.core.atomic import replacing
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    UnknownNameError,
    did_you_mean,
)
from workbench.core.html import MOST_ROWS, Shown, table
from workbench.core.jsontext import Record
from workbench.core.numbers import counted, number
from workbench.core.records import from_jsonable
from workbench.features.parquet import reading, with_header
from workbench.features.scores.origin import origin, require_same_origin
from workbench.features.scores.score_report import FeatureScoreReport, score_report
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from pyarrow import Table

IN_RUN = "artifacts/features"
"""Where `workbench features score` saves a table in its run folder."""
TABLE_FILE = "features.parquet"
AGAIN = "Score the features with `workbench features score`."
COLUMNS = (
    "feature", "input_score", "output_score", "output_score_delta", "confidence_delta", "frequency", "max_act",
    "n_contexts", "best_token", "top_tokens", "top_token_ids", "contexts", "context_token_ids",
)  # fmt: skip


@checked
@dataclass(frozen=True, eq=False)
class FeatureTable(Shown):
    """Scores of SAE features.

    Attributes:
        df: one row per feature with `COLUMNS`; nan where a score was not asked for or could not be computed.
        meta: how the scores were made: model, site, prompt, strength, precision, tokens read.
        controls: scores of the controls: `random_output_score` (random directions of the features' norms),
            `shuffled_input_score` (each feature's contexts against another feature's lens tokens).
    """

    df: Any  # pandas is imported only where a table is made
    meta: Record
    controls: dict[str, tuple[float, ...]]

    def __len__(self) -> int:
        return len(self.df)

    def frame(self) -> pd.DataFrame:
        """`df`, as every result with rows has it."""
        return self.df

    def check(self, model: Model, sae: AnySAE) -> None:
        """Refuses a table of another model or SAE; what the table does not record is not checked.

        Raises:
            MismatchError: naming what differs.
        """
        require_same_origin("This feature table", self.meta, origin(model, sae, None))

    def row(self, feature: int) -> Any:
        """The row of one feature.

        Raises:
            InvalidInputError: if the feature was not scored.
        """
        rows = self.df[self.df["feature"] == feature]
        if rows.empty:
            raise InvalidInputError(f"Feature {feature} is not in this table of {len(self)} features. Score it first.")
        return rows.iloc[0]

    def alive(self) -> Any:
        """The rows of features that were active on at least one token; all rows if no store was read."""
        return self.df[(self.df["frequency"] > 0) | self.df["frequency"].isna()]

    def select(self, n: int | None = None, min_output_score: float = 0.01, by: str = "output_score") -> tuple[int, ...]:
        """Features to steer with: alive, best first, at most n.

        Args:
            n: how many; None takes all that qualify.
            min_output_score: least output score; not used with `by="confidence_delta"`.
            by: "output_score", or "confidence_delta" for those that change the model's confidence most, either way.

        Raises:
            DegenerateInputError: if no feature qualifies, with the best score.
            UnknownNameError: for another `by`.
            InvalidInputError: for n below 1.

        Source: Arad, Mueller, Belinkov 2025 recommend 0.01; Wang et al. 2025 (arXiv 2510.03659) the confidence.
        """
        if n is not None and n < 1:
            raise InvalidInputError(f"select(n={n}): choose at least one feature.")
        if by not in ("output_score", "confidence_delta"):
            raise UnknownNameError(f"select(by={by!r}). {did_you_mean(by, ('output_score', 'confidence_delta'))}")
        if by == "confidence_delta":
            return self._most_changed(n)
        alive = self.alive().sort_values(["output_score", "feature"], ascending=[False, True])
        good = alive[alive["output_score"] >= min_output_score]
        if good.empty:
            best = float(alive["output_score"].max()) if len(alive) else float("nan")
            raise DegenerateInputError(
                f"select(min_output_score={min_output_score}): none of {len(alive)} alive features reaches it; the "
                f"best has {number(best)}. Lower the threshold, or score at a later layer."
            )
        return tuple(int(f) for f in good["feature"][:n])

    def _most_changed(self, n: int | None) -> tuple[int, ...]:
        known = self.alive().dropna(subset=["confidence_delta"])
        if known.empty:
            raise DegenerateInputError(
                "select(by='confidence_delta'): no feature of this table has a confidence. Score output scores first."
            )
        order = known["confidence_delta"].abs().sort_values(ascending=False, kind="stable").index
        return tuple(int(f) for f in known.loc[order, "feature"][:n])

    def worst_matched(self, features: Sequence[int], share: float = 0.25) -> tuple[int, ...]:
        """For each given feature another from the `share` with the lowest output scores, matched in frequency.

        The rule is that of `matched_features`. No feature is used twice.

        Raises:
            DegenerateInputError: if there are fewer such features than asked for.
        """
        alive = self.alive()
        pool = alive[~alive["feature"].isin(list(features)) & alive["output_score"].notna()]
        pool = pool.sort_values(["output_score", "feature"])[: max(int(share * len(pool)), len(features))]
        if len(pool) < len(features):
            raise DegenerateInputError(
                f"worst_matched: {counted(len(features), 'features')} asked for, {len(pool)} others are alive. Ask for "
                "fewer."
            )
        ids = [*features, *pool["feature"]]
        frequency = [float(self.row(feature)["frequency"]) for feature in features] + [*pool["frequency"].astype(float)]
        (places,) = matched_features(range(len(features)), torch.tensor(frequency, dtype=torch.float64))
        return tuple(int(ids[place]) for place in places)

    def report(self, threshold: float = 0.01, high: float = 0.1) -> FeatureScoreReport:
        """Distributions, shares and co-occurrence of the scores, with their controls.

        Args:
            threshold: output score above which a feature counts as an output feature.
            high: cut for "high" input and output scores in their co-occurrence.
        """
        return score_report(self.df, self.meta, self.controls, threshold, high)

    def save(self, path: str | Path) -> Path:
        """Writes `features.parquet` into a folder, whole or not at all; returns the folder."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = pa.Table.from_pandas(self.df, preserve_index=False)
        schema = with_header(rows.schema, {"version": 2, "meta": self.meta, "controls": self.controls})
        with replacing(Path(path) / TABLE_FILE) as file:
            pq.write_table(rows.replace_schema_metadata(schema.metadata), file)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> FeatureTable:
        """The table in a folder, or in a run folder of `workbench features score`.

        Raises:
            MissingFileError: if there is none.
            CorruptFileError: if its files can't be read.
        """
        places = (Path(path) / TABLE_FILE, Path(path) / IN_RUN / TABLE_FILE)
        place = next((file for file in places if file.is_file()), places[0])
        with reading(place, "feature table", AGAIN) as (file, header), file:
            rows = file.read()
            if missing := [column for column in COLUMNS if column not in rows.column_names]:
                raise CorruptFileError(f"{place} lacks the columns {', '.join(missing)}. {AGAIN}")
            df = _typed(rows, place).to_pandas()
            for column in ("top_tokens", "top_token_ids", "contexts", "context_token_ids"):
                df[column] = [list(value) for value in df[column]]
            controls = from_jsonable(dict[str, tuple[float, ...]], header["controls"])
            return cls(df, from_jsonable(Record, header["meta"]), controls)

    def _shown_line(self) -> str:
        where = f"{self.meta.get('site')} in {self.meta.get('model')}"
        return f"{counted(len(self), 'features')} of {where}: columns {', '.join(COLUMNS)}"

    def _shown_note(self) -> str:
        return f"{counted(len(self), 'features')}, those with the highest output score first"

    def _shown_parts(self) -> Iterable[Markup]:
        shown = ["feature", "output_score", "input_score", "frequency", "max_act", "top_tokens", "contexts"]
        best = self.df.sort_values("output_score", ascending=False)[shown].head(MOST_ROWS)
        rows = [[_cell(value) for value in row] for row in best.itertuples(index=False, name=None)]
        yield table(shown, rows, total=len(self))


def _typed(rows: Table, path: Path) -> Table:
    """The Arrow table with each of `COLUMNS` in its type; only scores may be missing."""
    import pyarrow as pa

    types = dict.fromkeys(COLUMNS, pa.float64()) | {"feature": pa.int64(), "n_contexts": pa.int64()}
    types |= {"best_token": pa.large_string(), "top_tokens": pa.list_(pa.string()), "contexts": pa.list_(pa.string())}
    types |= {"top_token_ids": pa.list_(pa.int64()), "context_token_ids": pa.list_(pa.int64())}
    for name, kind in types.items():
        column = rows.column(name).cast(kind)
        if column.null_count and kind != pa.float64():
            raise CorruptFileError(f"{path}: {name} is missing in {column.null_count} rows. {AGAIN}")
        rows = rows.set_column(rows.column_names.index(name), name, column)
    return rows


def _cell(value: object) -> object:
    """A cell of the table; of a list of texts the first six."""
    return " · ".join(str(part) for part in list(value)[:6]) if isinstance(value, list | tuple | np.ndarray) else value
