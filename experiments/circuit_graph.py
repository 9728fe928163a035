"""The attribution graph of one prompt as a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from circuits.attribution_graphs.report import FoundGraph
from experiments.circuit_find import BasesStudy
from experiments.circuit_tables import PARTS
from workbench.cli.base import model_words, typed
from workbench.cli.study import Begin
from workbench.core import progress
from workbench.core.errors import InvalidInputError

if TYPE_CHECKING:
    from circuits.attribution_graphs.coders import Coders
    from workbench.core.tokens import TokenBatch
    from workbench.models.model import Model

PAGE, GRAPH, NODES, EDGES = "graph.html", "graph.json", "nodes.csv", "edges.csv"
"""Among the artifacts of a run: the pruned graph as a page and for other viewers, all nodes, all links."""


@dataclass(frozen=True, kw_only=True)
class CircuitGraph(BasesStudy[FoundGraph]):
    """Find the features that made one prompt's next token likely.

    Every link is exact with attention and norms held fast; tested on the model.

    Example: workbench circuit graph "The capital of France is" --bases my-saes
    """

    run_name = "circuit-graph"
    step = "graph"

    text: tyro.conf.Positional[str] = ""
    """Prompt; or give --pairs or --task, of which the first pair is taken."""
    bases: str = "mlp_hidden"
    """Folder of one SAE or transcoder per site, folder or hub id of a transcoder set, or mlp_hidden, neurons."""
    limit: int = 1
    """Pairs that are read; the first one is explained."""
    targets: tuple[str, ...] = ()
    """Tokens to explain; by default the likeliest ones, or both answers of the pair."""
    features: int = 1000
    """Features that become nodes, at most."""
    budget_gb: float = 2.0
    """Memory above that of the model; more is refused before anything is made."""
    mlps: Literal["half", "leaf"] = "half"
    """Paths through MLPs without a basis: followed, or ended in an error."""
    first_token: bool = False
    """Take features of the first token as nodes; otherwise they are a constant."""
    nodes: float = 0.8
    """Share of the influence that the pruned nodes hold."""
    edges: float = 0.98
    """Share of the links' scores that the pruned links hold."""
    validate: int = 50
    """Features that are tested on the model itself; 0 leaves the tests out."""
    no_control: bool = False
    """Leave out the graph of random dictionaries."""
    batch: int = field(default=64, metadata={"config": False})
    """Rows made together; a stopped run loses one batch at most."""

    def measure(self, begin: Begin) -> FoundGraph:
        from circuits.attribution_graphs.attribute import attribution_graph
        from circuits.attribution_graphs.controls import random_coders
        from circuits.attribution_graphs.graph import AttributionGraph

        if self.validate and self.validate < 4:
            raise InvalidInputError(f"--validate {self.validate}: a correlation needs at least 4 features, 0 none.")
        model = self.load_model()
        coders, (text, targets) = self._coders(model), self._asked(model)
        run = begin(model)

        def graph(which: str, chosen: Coders) -> AttributionGraph:
            return attribution_graph(
                model, chosen, text, self.features, self.budget_gb, targets=targets, mlps=self.mlps,
                first_token=self.first_token, batch_size=self.batch, out=run.artifacts / PARTS / which,
            )  # fmt: skip

        found = graph("graph", coders)
        pruned = found.prune(self.nodes, self.edges)
        if not pruned.n_features and not pruned.n_links:
            progress.say(
                "Pruning leaves nothing: most influence is in features without a row. The whole graph is drawn."
            )
            pruned = found
        control = None if self.no_control else graph("random", random_coders(model, coders, text, self.seed))
        report = FoundGraph(
            graph=found, pruned=pruned, control=control,
            validation=found.validate(self.validate, seed=self.seed) if self.validate else None,
        )  # fmt: skip
        found.frame().to_csv(run.artifacts / NODES, index=False)
        found.edges_frame().to_csv(run.artifacts / EDGES, index=False)
        pruned.to_html(run.artifacts / PAGE, title=f"Attribution graph: {''.join(found.tokens)}")
        pruned.to_json(run.artifacts / GRAPH)
        return report

    def _coders(self, model: Model) -> Coders:
        from circuits.attribution_graphs.transcoders import CONFIG_FILE, load_transcoders

        place = Path(self.bases)
        # owner/name is an id of the hub, unless the owner is a folder here, whose name is then misspelt
        is_hub_id = len(place.parts) == 2 and not place.parent.exists()
        if (place / CONFIG_FILE).is_file() or is_hub_id:
            return load_transcoders(model, self.bases)
        return self.make_bases(model)

    def _asked(self, model: Model) -> tuple[str | TokenBatch, tuple[str, ...] | list[tuple[str, str]] | None]:
        """The prompt, and what is explained."""
        if self.text and (self.task or self.pairs):
            raise InvalidInputError("A text and pairs were given. Give one of them.")
        if self.text:
            return self.text, self.targets or None
        if not (self.task or self.pairs):
            raise InvalidInputError("There is no prompt. Give a text, --pairs FILE.jsonl or --task NAME.")
        pairs = self.read_pairs(model)[0:1]
        row = pairs.frame().iloc[0]
        answers = [str(row[name]) for name in ("clean_answer", "patch_answer") if name in row]
        text = str(row["clean_prefix"])
        if self.targets:
            return text, self.targets
        return text, [(answers[0], answers[1])] if len(answers) == 2 else (answers[0],)

    def details(self, report: FoundGraph, folder: Path) -> Iterable[str]:
        where = folder / "artifacts"
        return [f"Picture: {where / PAGE}; for other viewers: {where / GRAPH}; all nodes: {where / NODES}"]

    def summary(self, report: FoundGraph, folder: Path) -> Mapping[str, object]:
        where = folder / "artifacts"
        return {
            **super().summary(report, folder), "page": where / PAGE, "graph": where / GRAPH, "nodes": where / NODES,
            "edges": where / EDGES,
        }  # fmt: skip

    def following(self, report: FoundGraph, folder: Path) -> str:
        return typed("circuit", "lens", self.text or "TEXT", *model_words(self.model))
