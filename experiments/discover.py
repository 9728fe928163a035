"""Behaviours that nobody named: clusters of confident predictions, a circuit for each, and a page to browse them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.discovery.cluster_circuits import ClusterCircuits
from circuits.discovery.clusters import DiscoveryOptions, find_behaviours
from circuits.discovery.finding import ClusterCircuitOptions, circuits_for
from circuits.discovery.grouping import ClusterMethod
from circuits.discovery.samples import SampleOptions, find_samples
from circuits.discovery.study import Discovery
from circuits.discovery.vectors import VectorKind, VectorOptions
from circuits.nodes.runs import Method
from experiments.circuit_bases import BasesOptions
from workbench.cli.base import typed
from workbench.cli.study import Begin, Study
from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import counted, number
from workbench.core.progress import clock

if TYPE_CHECKING:
    from workbench.bases.base import Basis
    from workbench.models.model import Model

PAGE, TABLE, CORPUS = "clusters.html", "clusters.csv", "corpus.jsonl"
SAMPLES, VECTORS, CIRCUITS, PAGES = "samples", "vectors", "circuits", "pages"
"""Folders among the artifacts: what a stopped run keeps, and the pages of circuits."""
_TRIED = 8
"""Documents, and samples, that the estimate is measured on."""


@dataclass(frozen=True, kw_only=True)
class Discover(BasesOptions, Study[Discovery]):
    """Find behaviours in text that nobody named.

    Clusters of confident predictions, a circuit for each, controls, a page.

    Example: workbench circuit discover --bases my-saes --files text.jsonl
    """

    run_name = "circuit-discover"
    step = "discovery"
    keeps_json = True

    files: tuple[Path, ...] = ()
    """Text files (.txt, .jsonl, .parquet) or folders; by default docs of Python's library."""
    limit: int = 2000
    """Samples at most."""
    loss_max: float = 0.1
    """Largest loss of a sample, in nats."""
    context: int = 32
    """Tokens of context at most."""
    windows: int = 8
    """Windows of each document that are looked at."""
    one_per_document: bool = False
    """Keep one sample of each document."""
    vectors: VectorKind = "effects"
    """What samples are compared by: effects, activations, dense or gradients."""
    cluster: ClusterMethod = "spectral"
    """How they are clustered: spectral, kmeans or leiden."""
    k: int | None = None
    """Number of clusters; by default several are tried."""
    min_size: int = 4
    """Members of a cluster that counts."""
    resamples: int = 5
    """For the stability of clusters; 0 leaves it out."""
    n: int = 100
    """Features of a circuit."""
    method: Method = "ig"
    """How effects of circuits are estimated: ig, exact or atp; atp is fast and misleads."""
    clusters: int | None = None
    """Clusters that get a circuit, the largest; by default all."""
    pages: int = 0
    """Clusters whose circuit gets a page of its own, the largest."""
    estimate: bool = field(default=False, metadata={"config": False})
    """Say what it would take in time, and write nothing."""

    def options(self) -> tuple[DiscoveryOptions, ClusterCircuitOptions]:
        """What the library is called with."""
        samples = SampleOptions(
            loss_max=self.loss_max, context=self.context, min_context=min(8, self.context), limit=self.limit,
            one_per_document=self.one_per_document, windows_per_document=self.windows, seed=self.seed,
        )  # fmt: skip
        discovery = DiscoveryOptions(
            samples=samples, vectors=VectorOptions(seed=self.seed), min_size=self.min_size, resamples=self.resamples,
            seed=self.seed,
        )  # fmt: skip
        circuits = ClusterCircuitOptions(n=self.n, method=self.method, clusters=self.clusters, seed=self.seed)
        return discovery, circuits

    def texts(self, folder: Path | None) -> Iterator[str]:
        """The documents.

        Args:
            folder: where the default corpus is written; None reads it without a file.
        """
        from workbench.activations.files import documents, text_files

        files = text_files(self.files) if self.files else None
        if files is None:
            from workbench.saes.evaluation.library_texts import library_documents, write_corpus

            if folder is None:
                return iter(library_documents(self.seed))
            files = (write_corpus(folder / CORPUS, self.seed),)
        return (text for file in files for text in documents(file, "text"))

    def measure(self, begin: Begin) -> Discovery | None:
        discovery, circuits = self.options()
        if self.files:
            next(self.texts(None), None)  # files that can't be read are met before the model is loaded
        model = self.load_model()
        bases = self.make_bases(model)
        if self.estimate:
            self._show_estimate(model, bases, discovery, circuits)
            return None
        run = begin(model)
        kept = run.artifacts
        samples = find_samples(model, self.texts(kept), options=discovery.samples, folder=kept / SAMPLES)
        behaviours = find_behaviours(
            model, samples, bases, vectors=self.vectors, cluster=self.cluster, k=self.k, options=discovery,
            folder=kept / VECTORS,
        )  # fmt: skip
        found = circuits_for(model, bases, behaviours, options=circuits, folder=kept / CIRCUITS)
        found.frame().to_csv(kept / TABLE, index=False)
        found.to_html(kept / PAGE, title="Discovered behaviours", pages=self._pages(found, kept))
        return Discovery(found=found)

    def _pages(self, found: ClusterCircuits, folder: Path) -> dict[int, str]:
        """Pages of the circuits of the largest clusters, by their address from the page of all."""
        addresses = {}
        for cluster in list(found)[: self.pages]:
            addresses[cluster] = f"{PAGES}/cluster-{cluster:04d}.html"
            pairs = found.behaviours.samples.pairs(list(found[cluster].found_on))
            title = f"Circuit of cluster {cluster}"
            circuit = found[cluster].circuit
            circuit.to_html(folder / addresses[cluster], pairs=pairs, cards=self.cards(circuit), title=title)
        return addresses

    def _show_estimate(
        self, model: Model, bases: Mapping[str, Basis], options: DiscoveryOptions, circuits: ClusterCircuitOptions
    ) -> None:
        """Measures a few documents and samples, and says what all would take."""
        from itertools import islice

        from circuits.discovery.vectors import sample_vectors
        from circuits.metrics import log_probability
        from circuits.nodes.attribute import node_effects

        documents = list(islice(self.texts(None), _TRIED))
        start = time.perf_counter()
        try:
            some = find_samples(model, documents, options=dataclasses.replace(options.samples, limit=None))
        except DegenerateInputError as error:
            of = counted(len(documents), "documents")
            raise DegenerateInputError(f"The first {of} give no estimate. {error}") from error
        seconds = {"samples": (time.perf_counter() - start) / len(some) * self.limit}
        tried = some.chosen(range(min(_TRIED, len(some))))
        start = time.perf_counter()
        sample_vectors(model, tried, bases, kind=self.vectors, options=options.vectors)
        per_sample = (time.perf_counter() - start) / len(tried)
        seconds["vectors"] = per_sample * self.limit
        start = time.perf_counter()
        if self.method != "atp":
            metric, steps = log_probability(), circuits.steps
            node_effects(
                model, bases, tried.pairs(), metric, method=self.method, steps=steps, baseline="zero_keep_error",
                measured=False,
            )  # fmt: skip
        per_member = (time.perf_counter() - start) / len(tried)
        members = self.limit if self.clusters is None else min(self.limit, self.clusters * circuits.find)
        seconds["circuits"] = (per_member + 2 * per_sample) * members
        tokens = int(self.limit * some.n_tokens / len(some))
        line = (
            f"About {clock(sum(seconds.values()))} on this machine, alone: {clock(seconds['samples'])} for "
            f"{self.limit} samples from about {number(tokens)} tokens, {clock(seconds['vectors'])} for vectors, "
            f"{clock(seconds['circuits'])} for circuits. A stopped run continues."
        )
        self.emit({"seconds": seconds, "tokens": tokens}, [line])

    def places(self, report: Discovery, folder: Path) -> str:
        return f"Page: {folder / 'artifacts' / PAGE}; report: {folder / 'report.html'}"

    def summary(self, report: Discovery, folder: Path) -> Mapping[str, object]:
        return {
            **super().summary(report, folder), "page": folder / "artifacts" / PAGE,
            "table": folder / "artifacts" / TABLE, "clusters": report.to_json()["clusters"],
        }  # fmt: skip

    def following(self, report: Discovery, folder: Path) -> str:
        return typed("report", folder, "--open")


if __name__ == "__main__":
    import tyro

    tyro.cli(Discover).run()
