"""A circuit per cluster, found on some of its documents and measured on the others, beside its controls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

from circuits.discovery.clusters import Behaviours
from circuits.discovery.page import Card, write_clusters
from circuits.faithful.measure import Errors
from circuits.graph.circuit import Circuit
from circuits.graph.picture import shown_effect
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import NOT_AVAILABLE, counted, number, percent
from workbench.core.stats import Estimate, sample_mean, sample_ratio

if TYPE_CHECKING:
    import pandas as pd

OWN, OTHER, RANDOM = "its circuit", "circuit of another cluster", "random features"
ARMS = (OWN, OTHER, RANDOM)
RUNS: tuple[tuple[str, Errors], ...] = ((OWN, "all"), (OTHER, "all"), (RANDOM, "all"), (OWN, "none"), (RANDOM, "none"))
"""What is measured: with all error nodes and without any, since features are patched with the error kept."""
CONTEXTS, FEATURES, ANSWERS = 8, 10, 5
"""Of each cluster, so many are on the page."""
_CHARACTERS = 200
"""Of the end of a context."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterCircuit(OneLine):
    """The circuit of one cluster.

    Attributes:
        cluster: number of the cluster.
        circuit: its nodes.
        found_on: samples that it was found on.
        tested_on: samples of other documents; none where the cluster has a single document.
        full: metric of the model as it is, per sample of `tested_on`: minus the answer's log probability, in nats.
        empty: the same with every node ablated.
        kept: the same with some nodes alone, by what they are and which error nodes are kept.
    """

    cluster: int
    circuit: Circuit
    found_on: tuple[int, ...]
    tested_on: tuple[int, ...]
    full: Float[Tensor, " samples"]
    empty: Float[Tensor, " samples"]
    kept: Mapping[tuple[str, Errors], Float[Tensor, " samples"]]

    @property
    def is_measured(self) -> bool:
        """Whether there were samples to measure it on, which the ablation of every node changes."""
        return len(self.full) > 0

    def faithfulness(self, arm: str = OWN, errors: Errors = "all") -> Estimate | None:
        """F over the held-out samples; None where it was not measured.

        Raises:
            InvalidInputError: for nodes and error nodes that are not measured together.
        """
        if (arm, errors) not in self.kept:
            known = "; ".join(f"{a!r}, {rule!r}" for a, rule in self.kept)
            raise InvalidInputError(f"faithfulness({arm!r}, {errors!r}): measured are {known}. Ask for one of these.")
        if not self.is_measured:
            return None
        gain, whole = self.kept[arm, errors] - self.empty, self.full - self.empty
        return sample_ratio(gain.double().numpy(), whole.double().numpy(), unit="samples")


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class ClusterCircuits(Shown, Mapping[int, ClusterCircuit]):
    """Circuits of clusters; `found[3]` is that of cluster 3.

    Attributes:
        behaviours: the clusters.
        circuits: by cluster.
        n: features of each.
        method: how effects were estimated.
    """

    how_to_make: ClassVar[str] = "circuits.circuits_for(model, bases, behaviours) finds circuits of clusters."
    behaviours: Behaviours
    circuits: Mapping[int, ClusterCircuit]
    n: int
    method: str

    def __getitem__(self, cluster: int) -> ClusterCircuit:
        return self.circuits[cluster]

    def __iter__(self) -> Iterator[int]:
        return iter(self.circuits)

    def __len__(self) -> int:
        return len(self.circuits)

    @property
    def measured(self) -> list[ClusterCircuit]:
        """Those with held-out samples."""
        return [found for found in self.circuits.values() if found.is_measured]

    def mean(self, arm: str = OWN, errors: Errors = "all", minus: str | None = None) -> Estimate:
        """Mean F over clusters, or of the difference of two arms in the same cluster; interval over clusters.

        Raises:
            DegenerateInputError: if no cluster was measured.
        """
        values = []
        for found in self.measured:
            own, other = found.faithfulness(arm, errors), None if minus is None else found.faithfulness(minus, errors)
            assert own is not None
            values.append(own.value - (0.0 if other is None else other.value))
        if not values:
            raise DegenerateInputError("No cluster has samples of two documents, so no circuit was measured on others.")
        return sample_mean(values, unit="clusters")

    def frame(self) -> pd.DataFrame:
        """One row per cluster: the columns of `Behaviours.frame`, and F with its interval beside both controls."""
        import pandas as pd

        return pd.DataFrame(
            [
                {**row, **self._measures(self.circuits[c])}
                for row in self.behaviours.frame().to_dict("records")
                if (c := int(row["cluster"])) in self.circuits
            ]
        )

    def _measures(self, found: ClusterCircuit) -> dict[str, object]:
        own = found.faithfulness()
        row: dict[str, object] = {"n_tested": len(found.tested_on)}
        row |= {"F": own and own.value, "low": own and own.low, "high": own and own.high}
        for name, run in zip(("F_other", "F_random", "F_no_errors"), RUNS[1:4], strict=True):
            value = found.faithfulness(*run)
            row[name] = value and value.value
        return row

    def _shown_line(self) -> str:
        of = f"{counted(len(self), 'circuits')} of {self.n} features"
        return f"{of}, {len(self.measured)} measured on other documents"

    def to_html(self, path: str | Path, *, title: str = "Behaviours", pages: Mapping[int, str] | None = None) -> Path:
        """Writes a page to browse the clusters: one file that needs no network.

        Args:
            path: the file.
            title: of the page.
            pages: by cluster the address of its circuit's page, to link to.
        """
        cards = [_card(self, cluster, (pages or {}).get(cluster, "")) for cluster in self]
        return write_clusters(cards, list(_lead(self)), title, Path(path))


def _lead(found: ClusterCircuits) -> Iterator[str]:
    behaviours = found.behaviours
    yield behaviours._shown_line() + "."
    if found.measured:
        means = [(arm, found.mean(arm)) for arm in ARMS]
        said = "; ".join(f"{name} {' '.join(value.shown())}" for name, value in means)
        yield f"Mean faithfulness on documents that the circuit was not found on, error nodes kept: {said}."


def _card(found: ClusterCircuits, cluster: int, page: str) -> Card:
    behaviours, of = found.behaviours, found[cluster]
    members, samples = behaviours.members(cluster), behaviours.samples
    rows, own = samples.contexts.rows(), of.faithfulness()
    contexts = tuple(
        (
            behaviours.text(rows[i].tolist())[-_CHARACTERS:], behaviours.text([int(samples.answers[i])]),
            number(float(samples.losses[i])),
        )
        for i in members[:CONTEXTS]
    )  # fmt: skip
    frame = of.circuit.frame().head(FEATURES)
    columns = [frame[name] for name in ("site", "feature", "effect", "se", "n")]
    features = tuple(
        (str(site), str(feature), *shown_effect(effect, se, n))
        for site, feature, effect, se, n in zip(*columns, strict=True)
    )
    answers = ", ".join(f"“{token}” {percent(n / len(members))}" for token, n in behaviours.answers(cluster)[:ANSWERS])
    coherence = behaviours.coherence(cluster)
    return Card(
        cluster=cluster, answers=answers, n=len(members),
        documents=len(set(samples.documents[members].tolist())), coherence=coherence,
        faithful=own.value if own is not None else -math.inf,
        measures=tuple(_measures(found, of, coherence)), contexts=contexts, features=features, page=page,
    )  # fmt: skip


def _measures(found: ClusterCircuits, of: ClusterCircuit, coherence: float) -> Iterator[tuple[str, str, str]]:
    def row(name: str, value: Estimate | None) -> tuple[str, str, str]:
        return (name, NOT_AVAILABLE, "") if value is None else (name, *value.shown())

    yield row(f"F on {counted(len(of.tested_on), 'samples')} of other documents", of.faithfulness())
    yield row("F of the circuit of another cluster", of.faithfulness(OTHER))
    yield row("F of as many random features", of.faithfulness(RANDOM))
    yield row("F without error nodes", of.faithfulness(OWN, "none"))
    yield "mean cosine between members", number(coherence), ""
    stable = found.behaviours.stability
    if stable is not None:
        parent = int(found.behaviours.before[found.behaviours.members(of.cluster)[0]])
        yield "overlap with resamples (Jaccard)", number(float(stable.jaccard[parent])), ""
        yield "the same by chance", number(float(stable.jaccard_null[parent])), ""
