"""What a circuit carries on held-out pairs, beside random nodes of the same number, as a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from circuits.faithful.measure import Faithfulness
from circuits.graph.circuit import Circuit, SiteNodes
from circuits.graph.names import ERROR
from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import counted
from workbench.core.stats import Estimate, sample_ratio
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

CIRCUIT, RANDOM, COMPLEMENT = "circuit", "random nodes", "without the circuit"
NO_ERRORS, ALL_ERRORS = "circuit, errors removed", "circuit, all errors kept"
_SAYS = Says(
    "The circuit carries more of the behaviour than as many random nodes.",
    "The circuit carries no more of the behaviour than as many random nodes.",
    "Random nodes carry more of the behaviour than the circuit.",
)


@dataclass(frozen=True, kw_only=True)
class EvaluatedCircuit(Report):
    """Faithfulness of a circuit, with and without errors, of what is left without it, and of random nodes.

    Attributes:
        arms: by name; `CIRCUIT` is the circuit itself.
        random: circuits of as many random features at each site, with the same error nodes.
        n_nodes: of the circuit.
    """

    how_to_make: ClassVar[str] = "EvaluatedCircuit(arms={'circuit': faithfulness(...)}, random=(...), n_nodes=...)."
    arms: dict[str, Faithfulness]
    random: tuple[Faithfulness, ...]
    n_nodes: int

    def _ratio(self, kept: Tensor) -> Estimate:
        whole = self.arms[CIRCUIT].full - self.arms[CIRCUIT].empty
        return sample_ratio(kept.double().cpu().numpy(), whole.double().cpu().numpy(), unit="pairs")

    def _random(self) -> Tensor:
        return torch.stack([found.kept for found in self.random]).mean(0)

    def _beside(self) -> Table:
        circuit, other = self.arms[CIRCUIT], self._random()
        return beside(
            "faithfulness F", (CIRCUIT, circuit.value), (RANDOM, self._ratio(other - circuit.empty)),
            self._ratio(circuit.kept - other),
        )  # fmt: skip

    def headline(self) -> Headline:
        """F of the circuit beside that of random nodes, with their paired difference."""
        return Headline.of(_SAYS, self._beside())

    def findings(self) -> tuple[str, ...]:
        """F of each arm."""
        own = self.arms[CIRCUIT]
        said = [
            f"F of the circuit ({counted(self.n_nodes, 'nodes')}) on held-out pairs: {own.value}; nodes outside it are "
            f"put to their {own.ablation if own.ablation != 'resample' else 'value in another prompt'}."
        ]
        said += [
            f"{name[0].upper()}{name[1:]}: F {' '.join(arm.value.shown())}."
            for name, arm in self.arms.items() if name != CIRCUIT
        ]  # fmt: skip
        gap = float((own.full - own.empty).mean())
        return (*said, f"The whole metric is {'above' if gap > 0 else 'below'} that of no node at all.")

    def _rows(self) -> list[tuple[str, Estimate, int, int]]:
        rows = [(name, arm.value, arm.n_features, arm.n_errors) for name, arm in self.arms.items()]
        first = self.random[0]
        random = self._ratio(self._random() - self.arms[CIRCUIT].empty)
        return [*rows, (f"{RANDOM}, mean of {len(self.random)} draws", random, first.n_features, first.n_errors)]

    def section(self) -> Section:
        """A bar and a row per arm."""
        rows = self._rows()
        bars = Bars(
            "Faithfulness", tuple(row[0] for row in rows), tuple(row[1] for row in rows), "F", reference=1.0,
            caption="1: as much of the metric as the whole model; 0: as much as with every node ablated.",
        )  # fmt: skip
        table = Table(
            ("nodes kept", "F", "features", "errors"), tuple(rows),
            "Faithfulness of each set of nodes. Features and errors count each position.",
        )  # fmt: skip
        metrics: dict[str, Metric] = {name.replace(" ", "_").replace(",", ""): value for name, value, _, _ in rows}
        return Section("Faithfulness", (bars, table, self._beside()), self.findings(), metrics, self.headline())

    def frame(self) -> pd.DataFrame:
        """One row per arm: F with its interval, features, errors, pairs."""
        import pandas as pd

        columns = ["nodes", "F", "low", "high", "n_features", "n_errors", "n_pairs"]
        rows = [(name, f.value, f.low, f.high, features, errors, f.n) for name, f, features, errors in self._rows()]
        return pd.DataFrame(rows, columns=columns)


def random_like(circuit: Circuit, seed: int) -> Circuit:
    """A circuit with as many random features at each site, at the same positions, and with the same error nodes.

    Raises:
        DegenerateInputError: if a site has too few features outside the circuit.
    """
    generator = torch.Generator().manual_seed(seed)
    sites = {name: _random_nodes(name, nodes, generator) for name, nodes in circuit.sites.items()}
    return Circuit(
        sites=sites, bases=circuit.bases, model_fingerprint=circuit.model_fingerprint, n_tokens=circuit.n_tokens,
        made=f"random features in place of: {circuit.made}",
    )  # fmt: skip


def _random_nodes(name: str, nodes: SiteNodes, generator: torch.Generator) -> SiteNodes:
    feature, pos = nodes.feature.clone(), nodes.pos
    for where in pos.unique().tolist():
        here = (pos == where) & (feature != ERROR)
        outside = torch.ones(nodes.d_sae, dtype=torch.bool)
        outside[feature[here]] = False
        free, n = outside.nonzero()[:, 0], int(here.sum())
        if n > len(free):
            raise DegenerateInputError(
                f"Random nodes: {counted(n, 'features')} of {nodes.d_sae} at {name} are in the circuit, so there are "
                f"not as many others. Choose a smaller circuit."
            )
        feature[here] = free[torch.randperm(len(free), generator=generator)[:n]]
    return SiteNodes.of(nodes.d_sae, feature, pos)
