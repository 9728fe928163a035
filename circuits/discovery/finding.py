"""Finds a circuit for each cluster on some of its documents, and measures it on the others beside its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from circuits.decomposition import bases as checked_bases
from circuits.discovery.cluster_circuits import OTHER, OWN, RANDOM, RUNS, ClusterCircuit, ClusterCircuits
from circuits.discovery.clusters import Behaviours
from circuits.faithful.controls import random_circuit
from circuits.faithful.means import TokenMeans, token_means
from circuits.faithful.measure import Bench, BenchOptions, Errors
from circuits.graph.circuit import Circuit
from circuits.metrics import log_probability
from circuits.nodes.attribute import node_effects
from circuits.nodes.effects import NodeEffects
from circuits.nodes.parts import keep_effects, kept_effects
from circuits.nodes.runs import Method
from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, require
from workbench.core.numbers import counted
from workbench.core.progress import task
from workbench.engine.job import Made
from workbench.engine.keeper import Keeper
from workbench.models.model import Model

if TYPE_CHECKING:
    pass

MEAN_ROWS = 256
"""Contexts that means are taken over at most."""


@checked
@dataclass(frozen=True, kw_only=True)
class ClusterCircuitOptions(OneLine):
    """How circuits of clusters are found and measured.

    Attributes:
        n: features of a circuit.
        method: how effects are estimated: "ig" from several gradients, "exact", or "atp" from one, which are those of
            vectors of effects. One gradient says little here: where the model is sure, the answer's log probability
            hardly moves, whatever a feature does.
        steps: points of the integral.
        find: members at most that a circuit is found on.
        test: members at most that it is measured on, of other documents.
        clusters: at most so many clusters, the largest; None takes all.
        seed: which documents are held out, random features, and which other cluster.
    """

    n: int = 100
    method: Method = "ig"
    steps: int = 3
    find: int = 12
    test: int = 8
    clusters: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "steps", "find", "test"):
            require(getattr(self, name) >= 1, f"ClusterCircuitOptions({name}={getattr(self, name)})", "at least 1")
        require(
            self.clusters is None or self.clusters >= 2, f"ClusterCircuitOptions(clusters={self.clusters})",
            "at least 2, since the circuit of another cluster is a control",
        )  # fmt: skip


@checked
def circuits_for(
    model: Model,
    bases: Mapping[str, AnySAE],
    behaviours: Behaviours,
    *,
    options: ClusterCircuitOptions | None = None,
    means: TokenMeans | None = None,
    folder: str | Path | None = None,
) -> ClusterCircuits:
    """A circuit per cluster, from part of its documents, and its faithfulness on the others.

    The metric is minus the answer's log probability; patched nodes are features at zero with the error kept, summed
    over tokens. Ablated nodes are at their mean over all tokens of the samples. Controls are the circuit of another
    cluster and random features that are active on the cluster, as many, on the same held-out samples.

    Args:
        model: the model.
        bases: a basis per site.
        behaviours: the clusters.
        options: how circuits are found and measured.
        means: what ablated nodes are; by default means over some of the samples.
        folder: keeps finished clusters, so that a stopped call continues when it is given again.

    Raises:
        DegenerateInputError: if there are fewer than 2 clusters.
        MismatchError: if the folder holds circuits of something else.
    """
    o, placed = options or ClusterCircuitOptions(), checked_bases(model, bases)
    chosen = behaviours.clusters[: o.clusters]
    if len(chosen) < 2:
        raise DegenerateInputError(
            f"circuits_for: {counted(len(chosen), 'clusters')} of at least {behaviours.min_size} members; the circuit "
            "of another one is a control. Give more samples, or a smaller min_size."
        )
    if means is None:
        some = torch.randperm(len(behaviours.samples), generator=torch.Generator().manual_seed(o.seed))[:MEAN_ROWS]
        means = token_means(model, placed, behaviours.samples.contexts[some.sort().values])
    work = _Work(model, placed, behaviours, o, means)
    if folder is None:
        found = work.all(chosen, None)
    else:
        with Keeper.open(folder, work.key(chosen)) as keep:
            found = work.all(chosen, keep)
    return ClusterCircuits(behaviours=behaviours, circuits=found, n=o.n, method=o.method)


class _Work:
    """Finds and measures circuits; two passes, since the circuits of other clusters are controls."""

    def __init__(
        self, model: Model, bases: Mapping[str, Basis], behaviours: Behaviours, options: ClusterCircuitOptions,
        means: TokenMeans,
    ) -> None:  # fmt: skip
        self._model, self._bases, self._behaviours = model, bases, behaviours
        self._options, self._means = options, means
        first = behaviours.samples.pairs([0])
        self._bench = Bench(
            model, bases, first, log_probability(), means, BenchOptions("mean", "circuit", False, 0, 64, options.seed)
        )

    def key(self, chosen: Sequence[int]) -> dict[str, object]:
        """What kept parts depend on."""
        samples = self._behaviours.samples
        members = {str(c): self._behaviours.members(c) for c in chosen}
        return {
            "model": self._model.fingerprint, "bases": {s: b.fingerprint for s, b in self._bases.items()},
            "options": self._options, "members": members, "samples": samples.fingerprint,
            "means": {site: float(x.double().sum()) for site, x in self._means.x.items()},
        }  # fmt: skip

    def all(self, chosen: Sequence[int], keep: Keeper | None) -> dict[int, ClusterCircuit]:
        """The circuits of some clusters."""
        effects: dict[int, NodeEffects] = {}
        halves = {c: self._halves(c) for c in chosen}
        with task(total=2 * len(chosen), description="circuits of clusters", unit="steps") as bar:
            for c in chosen:
                effects[c] = self._effects(c, halves[c][0], keep)
                bar.advance()
            order = [chosen[i] for i in np.random.default_rng(self._options.seed).permutation(len(chosen))]
            after = dict(zip(order, [*order[1:], order[0]], strict=True))
            own = {c: effects[c].circuit(n=self._options.n, errors="none") for c in chosen}
            found = {}
            for c in chosen:
                arms = {
                    OWN: own[c], OTHER: own[after[c]],
                    RANDOM: random_circuit(effects[c], own[c], seed=self._options.seed + c),
                }  # fmt: skip
                found[c] = self._measured(c, halves[c], arms, keep)
                bar.advance()
        return found

    def _halves(self, cluster: int) -> tuple[list[int], list[int]]:
        """Members that the circuit is found on, and those of other documents, both nearest to the centre first."""
        members, o = self._behaviours.members(cluster), self._options
        documents = self._behaviours.samples.documents.tolist()
        known = sorted({documents[i] for i in members})
        order = np.random.default_rng([o.seed, cluster]).permutation(len(known))
        held = {known[i] for i in order[: len(known) // 2]}
        found = [i for i in members if documents[i] not in held]
        return found[: o.find], [i for i in members if documents[i] in held][: o.test]

    def _effects(self, cluster: int, rows: list[int], keep: Keeper | None) -> NodeEffects:
        name = f"effects-{cluster:06d}"
        if keep is not None and keep.has(name):
            return kept_effects(keep, name)
        vectors = self._behaviours.vectors
        if vectors.kind == "effects" and self._options.method == "atp":
            return vectors.effects(rows, self._model.fingerprint, self._means.bases)
        effects = node_effects(
            self._model, self._bases, self._behaviours.samples.pairs(rows), log_probability(),
            method=self._options.method, steps=self._options.steps, baseline="zero_keep_error", measured=False,
        )  # fmt: skip
        if keep is not None:
            keep_effects(keep, name, effects)
            return kept_effects(keep, name)
        return effects

    def _measured(
        self, cluster: int, halves: tuple[list[int], list[int]], arms: Mapping[str, Circuit], keep: Keeper | None
    ) -> ClusterCircuit:
        name, (found_on, tested_on) = f"tested-{cluster:06d}", halves
        if keep is not None and keep.has(name):
            tensors = keep.tensors(name)
        else:
            tensors = self._run(tested_on, arms)
            if keep is not None:
                keep.put(name, Made(None, tensors))
        kept: dict[tuple[str, Errors], Tensor] = {(arm, rule): tensors[f"{arm}/{rule}"] for arm, rule in RUNS}
        return ClusterCircuit(
            cluster=cluster, circuit=arms[OWN], found_on=tuple(found_on), tested_on=tuple(tested_on),
            full=tensors["full"], empty=tensors["empty"], kept=kept,
        )  # fmt: skip

    def _run(self, rows: list[int], arms: Mapping[str, Circuit]) -> dict[str, Tensor]:
        names = [f"{arm}/{rule}" for arm, rule in RUNS]
        if not rows:
            return dict.fromkeys(["full", "empty", *names], torch.zeros(0))
        bench = self._bench.on(self._behaviours.samples.pairs(rows), log_probability())
        try:
            full, empty = bench.ends
        except DegenerateInputError:  # the ablation changes nothing, so there is nothing to explain
            return dict.fromkeys(["full", "empty", *names], torch.zeros(0))
        found = {"full": full, "empty": empty}
        for arm, rule in RUNS:
            found[f"{arm}/{rule}"] = bench.with_errors(rule).measure(arms[arm]).kept
        return {name: value.float().cpu() for name, value in found.items()}
