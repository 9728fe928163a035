"""An attribution graph as a page and as the graph JSON that circuit-tracer and Neuronpedia read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from circuits.attribution_graphs.tables import (
    EMBED,
    ERRORS,
    FEATURE,
    KINDS,
    LOGIT,
    LOGITS,
    NodesAndLinks,
    said,
)
from circuits.graph import graphjson
from circuits.graph.graphjson import GraphNames, cantor, layers_of
from circuits.graph.page import Source, write_page
from circuits.graph.picture import picture_of, static_svg
from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import counted, number, percent
from workbench.core.records import save_json

if TYPE_CHECKING:
    import pandas as pd

    from workbench.core.jsontext import Json

_TYPES = (
    graphjson.FEATURE, graphjson.ERRORS, graphjson.EMBEDDING, graphjson.LOGIT, graphjson.BIAS, graphjson.BIAS,
)  # fmt: skip
"""What each kind of node is called in the file."""


@dataclass(frozen=True, eq=False)
class DrawnLinks:
    """Links as a page draws them: by signed share of what enters the target."""

    graph: NodesAndLinks
    n: int = 1

    @property
    def made(self) -> str:
        """How the graph was made."""
        return self.graph.made

    def frame(self) -> pd.DataFrame:
        """One row per link between nodes that are drawn."""
        frame = self.graph.edges_frame()
        frame = frame[frame["upstream_site"] != ""]
        frame["effect"] = frame.pop("share") * np.sign(frame.pop("weight"))
        return frame.assign(se=np.nan)


def drawn_nodes(graph: NodesAndLinks) -> pd.DataFrame:
    """The nodes that have a place in the picture: all but constant and rest; outputs by their weight."""
    frame = graph.frame()
    frame["effect"] = frame["influence"]
    frame.loc[frame["kind"] == "logit", "effect"] = [output.weight for output in graph.outputs]
    frame = frame[frame["site"] != ""].assign(se=np.nan, n=1)
    frame = frame.sort_values("effect", ascending=False, kind="stable", ignore_index=True)
    return frame.drop(columns=["kind", "activation", "influence"])


def sites_of(graph: NodesAndLinks) -> tuple[str, ...]:
    """Tokens, sites with nodes in the order of a forward pass, outputs."""
    n = graph.nodes
    inner = dict.fromkeys(str(site) for site in n.site[graph.of_kind(FEATURE, ERRORS)])
    if graph.origin is not None:
        inner = dict.fromkeys(str(site) for site in graph.origin.run.columns.sites if str(site) in inner)
    return (EMBED, *inner, LOGITS)


def static_picture(graph: NodesAndLinks) -> Markup:
    """The strongest nodes without a script."""
    return static_svg(picture_of(drawn_nodes(graph), sites_of(graph), graph.tokens), said(graph.outputs))


def write_graph_page(graph: NodesAndLinks, path: Path, title: str) -> Path:
    """Writes the page of a graph."""
    if not graph.n_features and not graph.n_links:
        raise DegenerateInputError("to_html: this graph has no links, so there is nothing to draw. Prune it less.")
    scores = graph.scores()
    lead = (
        f"What makes the model say {said(graph.outputs)} behind “{''.join(graph.tokens)}”.",
        f"{counted(graph.n_features, 'features')} and {counted(graph.n_links, 'links')}. Completeness "
        f"{percent(scores.completeness)}: the share of what enters features and outputs that comes from features and "
        f"tokens. Replacement {percent(scores.replacement)}: the share of all influence that leads back to tokens; the "
        "rest ends in errors, constants and features that are not shown.",
    )
    source = Source(
        frame=drawn_nodes(graph), sites=sites_of(graph), made=graph.made, title=title, tokens=graph.tokens, lead=lead,
        edges=DrawnLinks(graph) if graph.n_links else None, kinds={EMBED: "token", LOGITS: "output"},
        legend=("influence: share of the outputs that leads back to the node", "edges that lower their target"),
        output=said(graph.outputs),
    )  # fmt: skip
    return write_page(source, path)


def write_graph_json(graph: NodesAndLinks, path: Path, slug: str, scan: str) -> Path:
    """Writes the graph JSON; each node also has `site` and `pos`, so features and links come back as they were."""
    names = GraphNames(slug=slug, scan=scan)
    layers = layers_of(sites_of(graph)[1:-1])
    top = 1 + max(layers.values(), default=0)
    nodes = [_node(graph, i, layers, top, label) for i, label in enumerate(graph.labels())]
    order = np.argsort(-graph.influence, kind="stable")
    shares = np.cumsum(graph.influence[order]) / max(float(graph.influence.sum()), 1e-30)
    for i, share in zip(order, shares, strict=True):
        nodes[i]["influence"] = None if graph.nodes.kind[i] == LOGIT else float(share)
    record = {
        "metadata": {
            "slug": names.slug, "scan": names.scan, "transcoder_list": [], "prompt_tokens": list(graph.tokens),
            "prompt": "".join(graph.tokens), "node_threshold": None, "schema_version": 1,
            "circuit": {
                "model_fingerprint": dict(graph.identity).get("model", ""), "made": graph.made,
                "bases": {site: dict(graph.identity).get(site, "") for site in layers}, "n_tokens": len(graph.tokens),
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [
            {"source": nodes[source]["node_id"], "target": nodes[target]["node_id"], "weight": weight}
            for source, target, weight in zip(graph.source, graph.target, graph.weight.tolist(), strict=True)
        ],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_json(path, record)


def _node(graph: NodesAndLinks, i: int, layers: dict[str, int], top: int, label: str) -> dict[str, Json]:
    n = graph.nodes
    kind, site, pos, feature = int(n.kind[i]), str(n.site[i]), int(n.pos[i]), int(n.feature[i])
    chance, layer, activation = 0.0, str(layers.get(site, "E")), float(n.activation[i])
    match KINDS[kind]:
        case "feature":
            name, numbered, shown = f"{layer}_{feature}_{pos}", cantor(layers[site], feature), f"{layer}_{feature}-0"
        case "error":
            name, numbered, shown = f"{layer}_-1_{pos}", -1, f"{layer}_-1-0"
        case "token":
            name, numbered, shown = f"E_{feature}_{pos}", pos, f"E_{feature}-{pos}"
        case "logit":
            output = graph.outputs[int((n.kind[:i] == LOGIT).sum())]
            layer, chance = str(top), output.probability or 0.0
            name, numbered, shown = f"{top}_{feature}_{pos}", feature, f"L_{feature}-{pos}"
            label = f'Output "{output.label}" (p={number(chance, 3)})'  # viewers cut at "(p="
        case other:
            name, numbered, shown, label = f"{other}_0", -1, f"{other}-0", other
    return {
        "node_id": name, "feature": numbered, "layer": layer, "ctx_idx": max(pos, 0), "feature_type": _TYPES[kind],
        "token_prob": chance, "is_target_logit": kind == LOGIT, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": shown,
        "clerp": label, "influence": None, "activation": activation if np.isfinite(activation) else None,
        "site": site, "pos": pos,
    }  # fmt: skip
