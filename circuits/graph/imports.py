"""A circuit and its edges from the graph JSON that circuit-tracer and Neuronpedia write, or from our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from circuits.doctor.report import DoctorReport
from circuits.edges.tables import Edges, EdgeTable
from circuits.graph.circuit import Circuit, SiteNodes
from circuits.graph.graphjson import ERRORS, FEATURE
from circuits.graph.names import ERROR, node_name
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError
from workbench.core.jsontext import Json, content_of
from workbench.core.numbers import counted
from workbench.core.records import from_jsonable, load_json

_AGAIN = "Export the graph again."
_NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class LoadedGraph(OneLine):
    """What a graph file holds.

    Attributes:
        circuit: its features and errors.
        edges: the links between them.
        prompt: tokens of the prompt.
        left_out: nodes that are neither, such as embeddings and outputs, and links to them.
    """

    circuit: Circuit
    edges: Edges
    prompt: tuple[str, ...]
    left_out: str


@dataclass(frozen=True, kw_only=True)
class _Read:
    site: str
    pos: int
    feature: int
    effect: float
    se: float
    n: int
    label: str


@dataclass(frozen=True)
class _Site:
    nodes: list[_Read] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)


@checked
def load_graph_json(path: str | Path, *, site: str = "mlp_out") -> LoadedGraph:
    """The circuit and the edges of a graph file; what `Circuit.to_graph_json` wrote comes back as it was.

    Args:
        path: the file.
        site: kind of the site of each feature, where the file does not say; its layer is that of the node.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is no such graph.
        DegenerateInputError: if it holds no feature and no error.
    """
    record = load_json(path, dict)
    with content_of(Path(path), _AGAIN):
        sites, skipped = _sites(record["nodes"], site)
        if not sites:
            raise DegenerateInputError(f"{path}: it holds no feature and no error. {_AGAIN}")
        meta = record["metadata"]
        circuit = _circuit(sites, meta.get("circuit") or {}, str(meta.get("slug", "")))
        edges, dropped = _edges(sites, record["links"], circuit, str(meta.get("slug", "")))
        left_out = f"{counted(skipped, 'nodes')} and {counted(dropped, 'links')} left out"
        prompt = tuple(map(str, meta.get("prompt_tokens", ())))
        return LoadedGraph(circuit=circuit, edges=edges, prompt=prompt, left_out=left_out)


def _sites(nodes: list[dict[str, Json]], kind: str) -> tuple[dict[str, _Site], int]:
    found: dict[str, _Site] = {}
    skipped = 0
    for node in nodes:
        if node["feature_type"] not in (FEATURE, ERRORS):
            skipped += 1
            continue
        read = _read(node, kind)
        own = found.setdefault(read.site, _Site())
        own.place[str(node["node_id"])] = len(own.nodes)
        own.nodes.append(read)
    return dict(sorted(found.items(), key=lambda item: _order(item[0]))), skipped


def _order(site: str) -> tuple[int, int]:
    kind, _, layer = site.partition(".")
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    return int(layer) if layer.isdigit() else -1, kinds.index(kind) if kind in kinds else len(kinds)


def _read(node: Mapping[str, Json], kind: str) -> _Read:
    is_error = node["feature_type"] == ERRORS
    name = str(node["node_id"]).split("_")
    feature = ERROR if is_error else int(name[1])  # "feature" may have the layer added in
    effect, se = (_NAN if node.get(key) is None else float(str(node[key])) for key in ("effect", "se"))
    site = str(node.get("site") or f"{kind}.{node['layer']}")
    n, label = int(str(node.get("n") or 0)), str(node.get("clerp") or "")
    pos = int(str(node.get("pos", node["ctx_idx"])))
    return _Read(site=site, pos=pos, feature=feature, effect=effect, se=se, n=n, label=label)


def _circuit(sites: Mapping[str, _Site], own: Mapping[str, Json], slug: str) -> Circuit:
    widths, every = own.get("d_sae"), own.get("bases")
    widths = widths if isinstance(widths, dict) else {}
    bases = every if isinstance(every, dict) else dict.fromkeys(sites, "")
    tables = {}
    for name in bases:
        nodes = sites[name].nodes if name in sites else []
        width = int(str(widths.get(name, 1 + max((node.feature for node in nodes), default=0))))
        tables[name] = SiteNodes(
            d_sae=width, pos=torch.tensor([n.pos for n in nodes], dtype=torch.long),
            feature=torch.tensor([n.feature for n in nodes], dtype=torch.long),
            effect=torch.tensor([n.effect for n in nodes], dtype=torch.float64),
            se=torch.tensor([n.se for n in nodes], dtype=torch.float64),
            n=torch.tensor([n.n for n in nodes], dtype=torch.long),
        )  # fmt: skip
    positions = [node.pos for found in sites.values() for node in found.nodes]
    n_tokens = own["n_tokens"] if "n_tokens" in own else max(positions) + 1
    labels = {node_name(n.site, n.pos, n.feature): n.label for found in sites.values() for n in found.nodes if n.label}
    return Circuit(
        sites=tables, bases={k: str(v) for k, v in bases.items()},
        model_fingerprint=str(own.get("model_fingerprint", "")),
        n_tokens=None if n_tokens is None else int(str(n_tokens)),
        made=str(own.get("made", f"read from the graph {slug}")), labels=labels,
        doctor=from_jsonable(DoctorReport | None, own.get("doctor")),
    )  # fmt: skip


def _edges(sites: Mapping[str, _Site], links: list[dict[str, Json]], circuit: Circuit, slug: str) -> tuple[Edges, int]:
    where = {name: (site, i) for site, found in sites.items() for name, i in found.place.items()}
    ends = {
        site: torch.tensor([[n.pos, n.feature] for n in found.nodes], dtype=torch.long)
        for site, found in sites.items()
    }  # fmt: skip
    tables: dict[tuple[str, str], EdgeTable] = {}
    dropped = 0
    for link in links:
        source, target = where.get(str(link["source"])), where.get(str(link["target"]))
        if source is None or target is None:
            dropped += 1
            continue
        key = source[0], target[0]
        if key not in tables:
            up, down = (ends[site] for site in key)
            nothing = torch.zeros(len(up), len(down), dtype=torch.float64)
            tables[key] = EdgeTable(upstream=up, downstream=down, effect=nothing, se=torch.full_like(nothing, _NAN))
        tables[key].effect[source[1], target[1]] = float(str(link["weight"]))
        tables[key].se[source[1], target[1]] = _NAN if link.get("se") is None else float(str(link["se"]))
    edges = Edges(
        tables=tables, n=max((int(str(link.get("n") or 1)) for link in links), default=1),
        metric="that of the graph", has_positions=circuit.n_tokens is not None, made=f"read from the graph {slug}",
    )  # fmt: skip
    return edges, dropped
