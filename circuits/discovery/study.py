"""The study of discovery: clusters beside those of nothing, and their circuits beside controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.discovery.cluster_circuits import ARMS, OTHER, OWN, RANDOM, RUNS, ClusterCircuits
from workbench.core.jsontext import Json
from workbench.core.numbers import counted, percent
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, Text, beside

if TYPE_CHECKING:
    import pandas as pd

_SAYS = Says(
    "A cluster's circuit carries its held-out samples better than the circuit of another cluster.",
    "A cluster's circuit carries its held-out samples no better than the circuit of another cluster.",
    "A cluster's circuit carries its held-out samples worse than the circuit of another cluster.",
)
_ROWS = 40


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Discovery(Report):
    """Clusters of confident predictions, their stability, and their circuits beside controls.

    Attributes:
        found: the clusters with their circuits.
    """

    found: ClusterCircuits

    def headline(self) -> Headline:
        """Mean F of a cluster's circuit beside that of another cluster's."""
        return Headline.of(_SAYS, self._beside())

    def _beside(self) -> Table:
        own, other = self.found.mean(OWN), self.found.mean(OTHER)
        return beside("F, mean over clusters", (OWN, own), (OTHER, other), self.found.mean(OWN, minus=OTHER))

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences."""
        found, b = self.found, self.found.behaviours
        inside = int(np.isin(b.labels, b.clusters).sum())
        said = [
            f"{counted(len(b.clusters), 'clusters')} of at least {b.min_size} members hold {inside} of "
            f"{counted(len(b.samples), 'samples')}; {len(found.measured)} circuits were measured on other documents."
        ]
        gain = found.mean(OWN, minus=RANDOM)
        said.append(
            f"F of {found.n} features minus that of as many random active ones: {gain.change()}, error nodes kept; "
            f"{found.mean(OWN, 'none', minus=RANDOM).change()} without error nodes."
        )
        said.append(
            f"F of the circuits is {found.mean(OWN)} with error nodes and {found.mean(OWN, 'none')} without any: the "
            "difference is what the dictionaries leave unexplained."
        )
        if b.stability is not None:
            said.append(self._stable(b.stability.ari, b.stability.null))
        if (splits := b.splits) is not None:
            share = percent(splits.split / max(1, splits.tested))
            null = percent(splits.null_split / max(1, splits.null_tested))
            said.append(
                f"{splits.split} of {counted(splits.tested, 'clusters')} were split as mixed ({share}); of clusters "
                f"whose nodes were shuffled over the members {splits.null_split} of {splits.null_tested} ({null})."
            )
        return tuple(said)

    def _stable(self, ari: Estimate, null: Estimate) -> str:
        more = "more stable than" if ari.low > null.high else "not clearly more stable than"
        return (
            f"Clusters are {more} those of shuffled vectors: ARI with resamples {' '.join(ari.shown())}, of shuffled "
            f"ones {' '.join(null.shown())}."
        )

    def section(self) -> Section:
        """Bars and a table of the arms, stability, and the largest clusters."""
        found = self.found
        bars = Bars(
            "Faithfulness on held-out documents", ARMS, tuple(found.mean(arm) for arm in ARMS), "F", reference=1.0,
            caption="Mean over clusters, error nodes kept; intervals over clusters. 1: as much of the answer's log "
            "probability as the whole model; 0: as much as with every node at its mean.",
        )  # fmt: skip
        arms = Table(
            ("nodes kept", "error nodes", "F"), tuple((arm, rule, found.mean(arm, rule)) for arm, rule in RUNS),
            "Faithfulness by what is kept",
        )  # fmt: skip
        note = Text(
            "Circuits are found on one half of a cluster's documents and measured on the other. The other cluster's "
            "circuit and the random features, drawn from those active on the cluster, have as many features."
        )
        metrics: dict[str, Metric] = {f"F.{arm}.{rule}".replace(" ", "_"): found.mean(arm, rule) for arm, rule in RUNS}
        metrics["clusters"] = len(found.behaviours.clusters)
        if (stable := found.behaviours.stability) is not None:
            metrics |= {"ARI": stable.ari, "ARI.shuffled": stable.null}
        blocks = (bars, self._beside(), arms, note, self._clusters())
        return Section("Discovered behaviours", blocks, self.findings(), metrics, self.headline())

    def _clusters(self) -> Table:
        frame = self.found.frame().head(_ROWS)
        columns = ("cluster", "n", "documents", "answer", "share", "coherence", "F", "F_other", "F_random", "context")
        rows = tuple(tuple(row[name] for name in columns) for row in _records(frame))
        return Table(columns, rows, f"The largest {len(rows)} clusters")

    def frame(self) -> pd.DataFrame:
        """One row per cluster, as `ClusterCircuits.frame` has them."""
        return self.found.frame()

    def to_json(self) -> dict[str, Json]:
        """The rows of `frame`."""
        rows: list[Json] = [dict(row) for row in _records(self.frame())]
        return {"clusters": rows, "findings": list(self.findings())}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, with None for what was not measured."""
    records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in records]
