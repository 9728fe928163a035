"""Circuits of features for a behaviour that templates make, such as subject-verb agreement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import circuits
from circuits.faithful.study import CircuitStudy, circuit_study
from workbench.cli.base import typed
from workbench.cli.study import Begin, Study


@dataclass(frozen=True, kw_only=True)
class SvaCircuit(Study[CircuitStudy]):
    """Find a circuit of features and measure it.

    Held-out words, beside neurons, random features and random edges.

    Example: workbench circuit study --saes saes --behaviour sva_nounpp
    """

    run_name, step = "circuit-study", "circuit"
    keeps_json = True

    saes: Path
    """Folder of one SAE per site, as `workbench circuit saes` writes it."""
    behaviour: str = "sva_nounpp"
    """What the circuit is of: a behaviour of circuits.behaviours, such as sva_simple, ioi, greater_than or pronouns."""
    pairs: int = 100
    """Pairs that the circuit is found with."""
    test_pairs: int = 40
    """Held-out pairs, with other words."""
    counts: tuple[int, ...] = (10, 50, 200, 1000)
    """Numbers of nodes of the curve."""
    n: int = 200
    """Nodes of the circuit whose edges are computed; one of the counts."""
    steps: int = 10
    """Points of the integrated gradients."""
    free_layers: int = 0
    """Layers from the bottom that are not ablated; the published study leaves out a third."""

    def measure(self, begin: Begin) -> CircuitStudy:
        model = self.load_model()
        bases = circuits.bases(model, self.saes)
        train = circuits.behaviours.pairs(self.behaviour, model, "train", self.pairs, self.seed)
        test = circuits.behaviours.pairs(self.behaviour, model, "test", self.test_pairs, self.seed)
        run = begin(model)
        found = circuit_study(
            model, bases, train, test.of_one_length(), circuits.logit_difference(), behaviour=self.behaviour,
            counts=self.counts, n=self.n, steps=self.steps, free_layers=self.free_layers, seed=self.seed,
        )  # fmt: skip
        found.circuit.save(run.artifacts / "circuit")
        return found

    def following(self, report: CircuitStudy, folder: Path) -> str:
        return typed("circuit", "show", folder, "--open")


if __name__ == "__main__":
    import tyro

    tyro.cli(SvaCircuit).run()
