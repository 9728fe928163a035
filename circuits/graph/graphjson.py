"""A circuit as the graph JSON that circuit-tracer and Neuronpedia read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.graph.names import ERROR
from circuits.graph.page import Source, tokens_of
from circuits.graph.picture import DrawnEdge, DrawnNode, Picture, picture_of
from workbench.core.errors import InvalidInputError
from workbench.core.records import save_json

if TYPE_CHECKING:
    from workbench.core.jsontext import Json

FEATURE, ERRORS, LOGIT = "cross layer transcoder", "mlp reconstruction error", "logit"
"""Kinds of nodes in such a file; what is no error and no output counts as the first."""
EMBEDDING, BIAS = "embedding", "bias"
"""Tokens; and what has no place of its own."""
_NAME = re.compile(r"[A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class GraphNames:
    """What such a file is called.

    Attributes:
        slug: name of the graph.
        scan: the model or set of dictionaries that a viewer looks features up in; "" if there is none.
    """

    slug: str = "circuit"
    scan: str = ""

    def __post_init__(self) -> None:
        for name, value in (("slug", self.slug), ("scan", self.scan)):
            if not _NAME.fullmatch(value) or name == "slug" and not value:
                raise InvalidInputError(
                    f"{name}={value!r}: viewers take letters, digits, '.', '_' and '-' alone. Rename it, such as "
                    f"{re.sub('[^A-Za-z0-9_.-]+', '-', value).strip('-') or 'graph'!r}."
                )


def cantor(layer: int, feature: int) -> int:
    """One number for a layer and a feature, as circuit-tracer pairs them.

    >>> cantor(0, 0), cantor(1, 0), cantor(0, 1)
    (0, 1, 2)
    """
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def write_graph(source: Source, identity: Mapping[str, Json], names: GraphNames, path: Path) -> Path:
    """Writes a circuit and its edges.

    Beyond the fields that viewers read, each node has `site`, `pos`, `effect`, `se` and `n`, each link `se` and `n`,
    and the metadata `circuit`, so nothing is lost.

    Args:
        source: nodes, edges and pairs.
        identity: model, bases and number of columns of the circuit.
        names: of the graph.
        path: the file.
    """
    picture = picture_of(source.frame, source.sites, tokens_of(source), source.edges, whole=True)
    prompt = list(picture.columns) if source.pairs is None else list(source.pairs.clean.str_tokens[0])
    layers = layers_of(picture.sites)
    ids = _ids(picture, layers)
    end = _output(source, max(layers.values()) + 1, len(prompt))
    output = str(end["node_id"])
    record = {
        "metadata": {
            "slug": names.slug, "scan": names.scan, "transcoder_list": [], "prompt_tokens": prompt,
            "prompt": "".join(prompt), "node_threshold": None, "circuit": {**identity, "made": source.made},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [
            *(
                _node(node, ids[i], layers[picture.sites[node.row]], picture, influence, len(prompt))
                for i, (node, influence) in enumerate(zip(picture.nodes, _influences(picture.nodes), strict=True))
            ),
            end,
        ],
        "links": [*(_link(edge, ids) for edge in picture.edges), *_direct(picture, ids, output)],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_json(path, record)


def layers_of(sites: Sequence[str]) -> dict[str, int]:
    """The row of each site: its layer, or its rank where a layer has several sites, since a viewer has one row each.

    >>> layers_of(["resid_post.3", "resid_post.9"]), layers_of(["attn_out.3", "resid_post.3"])
    ({'resid_post.3': 3, 'resid_post.9': 9}, {'attn_out.3': 0, 'resid_post.3': 1})
    """
    numbers = [site.partition(".")[2] for site in sites]
    if all(number.isdigit() for number in numbers) and len(set(numbers)) == len(numbers):
        return {site: int(number) for site, number in zip(sites, numbers, strict=True)}
    return {site: i for i, site in enumerate(sites)}


def position_of(node: DrawnNode) -> int:
    """The position in the node's name; -1 for all."""
    place, comma, _ = node.name.partition(", ")
    return int(place) if comma else -1


def _ids(picture: Picture, layers: Mapping[str, int]) -> list[str]:
    found: dict[str, None] = {}
    for node in picture.nodes:
        layer, pos = layers[picture.sites[node.row]], max(position_of(node), 0)
        name = f"0_{layer}_{pos}" if node.feature == ERROR else f"{layer}_{node.feature}_{pos}"
        while name in found:  # in this format an error may have the id of a feature in layer 0
            name += "_error"
        found[name] = None
    return list(found)


def _influences(nodes: Sequence[DrawnNode]) -> list[float]:
    """The share of all absolute effects that a node and the stronger ones have together, as viewers filter by it."""
    total, so_far, found = sum(node.size for node in nodes) or 1.0, 0.0, []
    for node in nodes:
        so_far += node.size
        found.append(so_far / total)
    return found


def _node(node: DrawnNode, name: str, layer: int, picture: Picture, influence: float, n_tokens: int) -> dict[str, Json]:
    pos, is_error = position_of(node), node.feature == ERROR
    column = pos if pos >= 0 else max(n_tokens - 1, 0)
    return {
        "node_id": name, "feature": node.feature, "layer": str(layer), "ctx_idx": column,
        "feature_type": ERRORS if is_error else FEATURE, "token_prob": 0.0, "is_target_logit": False, "run_idx": 0,
        "reverse_ctx_idx": 0, "jsNodeId": f"{name}-0", "clerp": node.label, "influence": influence,
        "activation": None, "site": picture.sites[node.row], "pos": pos, "effect": _plain(node.effect),
        "se": _plain(node.se), "n": node.n,
    }  # fmt: skip


def _output(source: Source, layer: int, n_tokens: int) -> dict[str, Json]:
    column = max(n_tokens - 1, 0)
    said = "output" if source.effects is None else source.effects.metric
    return {
        "node_id": f"{layer}_0_{column}", "feature": 0, "layer": str(layer), "ctx_idx": column, "feature_type": LOGIT,
        "token_prob": 0.0, "is_target_logit": True, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"L_0-{column}",
        "clerp": said, "influence": None, "activation": None,
    }  # fmt: skip


def _link(edge: DrawnEdge, ids: Sequence[str]) -> dict[str, Json]:
    return {
        "source": ids[edge.source],
        "target": ids[edge.target],
        "weight": edge.effect,
        "se": _plain(edge.se),
        "n": edge.n,
    }


def _direct(picture: Picture, ids: Sequence[str], output: str) -> Iterator[dict[str, Json]]:
    """Links to the output of nodes that no edge leaves: their own effects."""
    leaves = {edge.source for edge in picture.edges}
    for i, node in enumerate(picture.nodes):
        if i not in leaves and node.size:
            yield {"source": ids[i], "target": output, "weight": node.effect, "se": _plain(node.se)}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
