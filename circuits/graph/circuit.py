"""A circuit: the nodes that are kept when everything else is ablated."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.doctor.report import DoctorReport, Examinable, attrs_of, watermark, worse
from circuits.graph.names import ERROR, node_name
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.html import Shown
from workbench.core.jsontext import content_of
from workbench.core.numbers import counted
from workbench.core.records import from_jsonable, load_json, save_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from markupsafe import Markup

    from circuits.graph.details import Cards
    from circuits.graph.page import EffectSource, FaithSource
    from circuits.graph.picture import EdgeSource
    from circuits.pairs import Pairs

Sign = Literal["both", "positive", "negative"]
ErrorRule = Literal["ranked", "all", "resid", "none"]
CIRCUIT_FILE, NODES_FILE = "circuit.json", "nodes.safetensors"
_FORMAT = 2
ARRAYS = ("pos", "feature", "effect", "se", "n")


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class SiteNodes(OneLine):
    """The nodes of a circuit at one site.

    Attributes:
        d_sae: number of features that the site has.
        pos: column of the batch; -1 stands for all positions.
        feature: number of the feature; `ERROR` for the error node.
        effect: mean effect; NaN where it is not known.
        se: its standard error.
        n: number of examples that `effect` is a mean over; 0 where it is not known.
        every: all nodes are in the circuit, whatever the lists hold.
    """

    d_sae: int
    pos: Int[Tensor, " nodes"]
    feature: Int[Tensor, " nodes"]
    effect: Float[Tensor, " nodes"]
    se: Float[Tensor, " nodes"]
    n: Int[Tensor, " nodes"]
    every: bool = False

    @classmethod
    def of(
        cls, d_sae: int, feature: Sequence[int] | Tensor = (), pos: Sequence[int] | Tensor | None = None
    ) -> SiteNodes:
        """Nodes by their numbers, at all positions or at one each, without effects."""
        features = torch.as_tensor(feature, dtype=torch.long)
        where = torch.full_like(features, -1) if pos is None else torch.as_tensor(pos, dtype=torch.long)
        unknown = torch.full(features.shape, float("nan"))
        return cls(d_sae=d_sae, pos=where, feature=features, effect=unknown, se=unknown, n=torch.zeros_like(features))

    def __len__(self) -> int:
        return len(self.feature)

    def features(self) -> Int[Tensor, " f"]:
        """The features that are kept somewhere, each once; of a whole site all of them."""
        return torch.arange(self.d_sae) if self.every else self.feature[self.feature != ERROR].unique()

    def mask(self, n_tokens: int, features: Int[Tensor, " f"]) -> Bool[Tensor, "pos f"]:
        """True where a feature is kept, for some features and the columns of a batch."""
        if self.every:
            return torch.ones(n_tokens, len(features), dtype=torch.bool)
        out = torch.zeros(n_tokens, len(features), dtype=torch.bool)
        place = {int(f): i for i, f in enumerate(features)}
        for f, pos in zip(self.feature.tolist(), self.pos.tolist(), strict=True):
            if f in place:
                out[slice(None) if pos < 0 else pos, place[f]] = True
        return out

    def error(self, n_tokens: int) -> Bool[Tensor, " pos"]:
        """True at the columns where the error node is kept."""
        if self.every:
            return torch.ones(n_tokens, dtype=torch.bool)
        return self.mask(n_tokens, torch.tensor([ERROR]))[:, 0]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Circuit(Examinable, Shown):
    """Nodes of some sites: features, and errors of their bases.

    Attributes:
        sites: the nodes per site, in the order of a forward pass; sites without nodes too, since they are ablated.
        bases: fingerprint of the basis of each site.
        model_fingerprint: of the model.
        n_tokens: number of columns of the batch, where nodes have positions; None otherwise.
        made: how the nodes were chosen, in words.
        labels: what people call nodes, by `node_name`.
        doctor: what `circuits.attribution_doctor` found of the effects that the nodes were chosen by.
    """

    sites: Mapping[str, SiteNodes]
    bases: Mapping[str, str]
    model_fingerprint: str
    n_tokens: int | None = None
    made: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    doctor: DoctorReport | None = None

    @property
    def n_features(self) -> int:
        """Number of features, each position counted."""
        return sum(
            site.d_sae * (self.n_tokens or 1) if site.every else int((site.feature != ERROR).sum())
            for site in self.sites.values()
        )

    @property
    def n_errors(self) -> int:
        """Number of error nodes, each position counted."""
        return sum(
            self.n_tokens or 1 if site.every else int((site.feature == ERROR).sum()) for site in self.sites.values()
        )

    @property
    def n(self) -> int:
        """Number of nodes."""
        return self.n_features + self.n_errors

    def nodes(self) -> Iterator[tuple[str, int, int]]:
        """Site, position (-1 for all) and feature (`ERROR` for an error) of every node.

        Raises:
            InvalidInputError: for a circuit of everything, which lists no nodes.
        """
        for name, site in self.sites.items():
            if site.every:
                raise InvalidInputError(
                    "This circuit is everything and lists no nodes. Choose some: effects.circuit(n=100)."
                )
            for pos, feature in zip(site.pos.tolist(), site.feature.tolist(), strict=True):
                yield name, pos, feature

    def frame(self) -> pd.DataFrame:
        """One row per node: site, pos (where kept), feature ("error" for an error), effect, se, n, label.

        `attrs` has the doctor's verdict.
        """
        import pandas as pd

        rows = []
        for name, site in self.sites.items():
            arrays = (getattr(site, field).tolist() for field in ARRAYS)
            for pos, feature, effect, se, n in zip(*arrays, strict=True):
                label = self.labels.get(node_name(name, pos, feature), "")
                rows.append((name, pos, "error" if feature == ERROR else feature, effect, se, n, label))
        frame = pd.DataFrame(rows, columns=["site", "pos", "feature", "effect", "se", "n", "label"])
        frame = frame if self.n_tokens is not None else frame.drop(columns="pos")
        frame = frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
        frame.attrs.update(attrs_of(self.doctor))
        return frame

    def with_labels(self, labels: Mapping[str, str]) -> Circuit:
        """The same circuit with names for nodes, by `node_name`, such as {"resid_post.10/123": "plural"}.

        Raises:
            InvalidInputError: for a node that is not in the circuit.
        """
        known = {node_name(*node) for node in self.nodes()}
        if unknown := sorted(labels.keys() - known):
            raise InvalidInputError(
                f"with_labels: the circuit has no node {', '.join(unknown[:3])}; it has {', '.join(sorted(known)[:5])} "
                "and more. Write a node as site/feature."
            )
        return dataclasses.replace(self, labels={**self.labels, **labels})

    def only(self, nodes: Collection[tuple[str, int, int]], made: str) -> Circuit:
        """The circuit of some of the nodes, by site, position and feature.

        Args:
            nodes: which ones.
            made: how they were chosen, in words.
        """
        sites = {}
        for name, site in self.sites.items():
            here = zip(site.pos.tolist(), site.feature.tolist(), strict=True)
            index = torch.tensor([i for i, node in enumerate(here) if (name, *node) in nodes], dtype=torch.long)
            sites[name] = dataclasses.replace(site, **{field: getattr(site, field)[index] for field in ARRAYS})
        kept = {node_name(*node) for node in nodes}
        labels = {name: label for name, label in self.labels.items() if name in kept}
        return dataclasses.replace(self, sites=sites, made=made, labels=labels)

    def united(self, other: Circuit) -> Circuit:
        """The nodes of either circuit; a node of both keeps the effect that it has here.

        Raises:
            MismatchError: if they are of another model, other bases or other positions.
        """
        for name in ("bases", "model_fingerprint", "n_tokens"):
            if getattr(self, name) != getattr(other, name):
                raise MismatchError(f"united: the two circuits differ in {name}. Unite circuits of the same bases.")
        sites = {name: _united(site, other.sites[name]) for name, site in self.sites.items()}
        made = f"{self.made}; united with: {other.made}"
        labels, doctor = {**other.labels, **self.labels}, worse(self.doctor, other.doctor)
        return dataclasses.replace(self, sites=sites, made=made, labels=labels, doctor=doctor)

    def save(self, folder: str | Path) -> Path:
        """Writes the circuit as `circuit.json` and `nodes.safetensors` into a folder, which is made if missing."""
        from safetensors.torch import save

        from workbench.core.atomic import write_atomic

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}/{field}": getattr(site, field).contiguous().cpu()
            for name, site in self.sites.items()
            for field in ARRAYS
        }
        write_atomic(folder / NODES_FILE, save(tensors))
        sites = {name: {"d_sae": site.d_sae, "every": site.every} for name, site in self.sites.items()}
        record = {
            "format": _FORMAT, "sites": sites, "bases": dict(self.bases), "model_fingerprint": self.model_fingerprint,
            "n_tokens": self.n_tokens, "made": self.made, "labels": dict(self.labels),
            "doctor": None if self.doctor is None else self.doctor.to_json(),
        }  # fmt: skip
        save_json(folder / CIRCUIT_FILE, record)
        return folder

    def to_html(
        self,
        path: str | Path,
        edges: EdgeSource | None = None,
        *,
        pairs: Pairs | None = None,
        effects: EffectSource | None = None,
        cards: Cards | Mapping[str, Cards] | None = None,
        faithfulness: FaithSource | None = None,
        title: str = "Circuit",
    ) -> Path:
        """Writes the picture of the circuit: one file that needs no network.

        Positions across, sites up; a circle is a feature, a triangle an error; colour is the sign of the effect and
        size its absolute value. The page has sliders for both thresholds, lists the edges of a node, and keeps labels
        and groups as a file that `annotated` reads.

        Args:
            path: the file.
            edges: edges between these nodes, from `circuits.edge_effects`.
            pairs: what the circuit was found on; the tokens of the first prompt name the columns.
            effects: the effects that the nodes were chosen by, for their metric and gaps.
            cards: feature cards of the one site, or per site; or the page that `feature_page` made of them, to link to.
            faithfulness: what `circuits.faithfulness` measured, for the headline.
            title: of the page.

        Raises:
            DegenerateInputError: if the circuit lists no nodes.
            MismatchError: if none of the edges is between these nodes.
            InvalidInputError: for cards of a site that has no node.
        """
        from circuits.graph.page import Source, write_page

        of_edges = edges.doctor if isinstance(edges, Examinable) else None
        source = Source(
            frame=self.frame(), sites=tuple(self.sites), made=self.made, edges=edges, pairs=pairs, effects=effects,
            cards=cards, faithfulness=faithfulness, title=title,
            doctor=self.doctor if of_edges is None else worse(self.doctor, of_edges),
        )  # fmt: skip
        return write_page(source, Path(path))

    def to_graph_json(
        self,
        path: str | Path,
        edges: EdgeSource | None = None,
        *,
        pairs: Pairs | None = None,
        slug: str = "circuit",
        scan: str = "",
    ) -> Path:
        """Writes the graph JSON that circuit-tracer and Neuronpedia read; `circuits.load_graph_json` reads it back.

        A viewer has one row per layer: where a layer has several sites, each site has a row of its own. Nodes whose
        positions were put together stand at the last token. A node that no edge leaves has a link to the output with
        its own effect; of the others, what they do to the output directly is not known.

        Args:
            path: the file.
            edges: edges between these nodes.
            pairs: what the circuit was found on; the first prompt is that of the graph.
            slug: name of the graph.
            scan: model or set of dictionaries in which a viewer looks features up.

        Raises:
            DegenerateInputError: if the circuit lists no nodes.
            MismatchError: if none of the edges is between these nodes.
        """
        from circuits.graph.graphjson import GraphNames, write_graph
        from circuits.graph.page import Source

        source = Source(frame=self.frame(), sites=tuple(self.sites), made=self.made, edges=edges, pairs=pairs)
        identity = {
            "model_fingerprint": self.model_fingerprint, "bases": dict(self.bases), "n_tokens": self.n_tokens,
            "d_sae": {name: site.d_sae for name, site in self.sites.items()},
            "doctor": None if self.doctor is None else self.doctor.to_json(),
        }  # fmt: skip
        return write_graph(source, identity, GraphNames(slug=slug, scan=scan), Path(path))

    def annotated(self, path: str | Path) -> Circuit:
        """The same circuit with the labels of a file; what the file says of other nodes is left out.

        Args:
            path: JSON lines with "Name" (`resid_5/3036`, `3, resid_5/3036` at a position, `resid_5/ε` for an error) and
                "Annotation"; or the JSON file that the page of a circuit saves.

        Raises:
            MissingFileError: if there is no such file.
            CorruptFileError: if it is neither.
            DegenerateInputError: if it names none of the nodes.
        """
        from circuits.graph.annotations import read_labels

        return self.with_labels(read_labels(Path(path), self.nodes()))

    def save_annotations(self, path: str | Path) -> Path:
        """Writes the labels as JSON lines, which `annotated` reads."""
        from circuits.graph.annotations import write_labels

        return write_labels(Path(path), self.nodes(), self.labels)

    def _shown_parts(self) -> Iterable[Markup]:
        from circuits.graph.picture import picture_of, static_svg

        if len(frame := self.frame()):
            positions = None if self.n_tokens is None else [str(pos) for pos in range(self.n_tokens)]
            yield static_svg(picture_of(frame, tuple(self.sites), positions), "output", watermark(self.doctor))
        yield from super()._shown_parts()

    def _shown_line(self) -> str:
        parts = f"{counted(self.n_features, 'features')} and {counted(self.n_errors, 'errors')}"
        return f"{parts} of {len(self.sites)} sites; attribution doctor: {self.verdict}"


@checked
def load_circuit(folder: str | Path) -> Circuit:
    """The circuit that `Circuit.save` wrote.

    Raises:
        MissingFileError: if there is none.
        CorruptFileError: if a file is damaged.
        MismatchError: if another version of the workbench wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    record = load_json(folder / CIRCUIT_FILE, dict)
    if (found := record.get("format")) != _FORMAT:
        raise MismatchError(
            f"{folder / CIRCUIT_FILE} has format {found}, and this version reads {_FORMAT}, which keeps the number of "
            "examples of every effect. Find the circuit again."
        )
    with content_of(folder, "Save the circuit again.", SafetensorError, OSError):
        tensors = load_file(folder / NODES_FILE)
        sites = {
            str(name): SiteNodes(
                d_sae=int(site["d_sae"]), every=bool(site["every"]),
                **{field: tensors[f"{name}/{field}"] for field in ARRAYS},
            )
            for name, site in record["sites"].items()
        }  # fmt: skip
        return Circuit(
            sites=sites, bases={str(k): str(v) for k, v in record["bases"].items()},
            model_fingerprint=str(record["model_fingerprint"]), n_tokens=record["n_tokens"], made=str(record["made"]),
            labels={str(k): str(v) for k, v in record["labels"].items()},
            doctor=from_jsonable(DoctorReport | None, record["doctor"]),
        )  # fmt: skip


def _united(a: SiteNodes, b: SiteNodes) -> SiteNodes:
    if a.every or b.every:
        return a if a.every else b
    own = set(zip(a.pos.tolist(), a.feature.tolist(), strict=True))
    new = [i for i, node in enumerate(zip(b.pos.tolist(), b.feature.tolist(), strict=True)) if node not in own]
    index = torch.tensor(new, dtype=torch.long)
    joined = {field: torch.cat([getattr(a, field), getattr(b, field)[index]]) for field in ARRAYS}
    return dataclasses.replace(a, **joined)
