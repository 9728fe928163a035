"""What people call nodes, as files: one JSON object per line, or what the page of a circuit saves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from circuits.graph.names import ERROR, node_name
from workbench.core.atomic import write_atomic
from workbench.core.errors import CorruptFileError, DegenerateInputError
from workbench.core.jsontext import parse_json
from workbench.core.records import json_lines, read_text

Node = tuple[str, int, int]
"""Site, position (-1 for all), feature (`ERROR` for an error)."""
COMPONENTS = {"resid_post": "resid", "attn_out": "attn", "mlp_out": "mlp"}
"""What the published files call the sites that a block writes."""
_ERROR = "ε"


def published_name(site: str, pos: int, feature: int) -> str:
    """The name of a node in the published annotation files.

    >>> published_name("resid_post.5", -1, 3036), published_name("mlp_out.2", 3, -1), published_name("embed", -1, 7)
    ('resid_5/3036', '3, mlp_2/ε', 'embed/7')
    """
    component, layer = _parts(site)
    place = "" if pos < 0 else f"{pos}, "
    return f"{place}{component}{f'_{layer}' if layer else ''}/{_ERROR if feature == ERROR else feature}"


def _parts(site: str) -> tuple[str, str]:
    kind, _, layer = site.partition(".")
    return COMPONENTS.get(kind, kind), layer


def read_labels(path: Path, nodes: Iterable[Node]) -> dict[str, str]:
    """The labels of a file for some nodes, by `node_name`. A name without a position holds at all positions.

    Args:
        path: lines with "Name" and "Annotation", or the JSON file that the page of a circuit saves.
        nodes: the nodes; what the file says of others is left out.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is neither.
        DegenerateInputError: if it names none of the nodes.
    """
    given = _of_page(path) if path.suffix == ".json" else _of_lines(path)
    found = {}
    for site, pos, feature in nodes:
        names = {name for p in (pos, -1) for name in (published_name(site, p, feature), node_name(site, p, feature))}
        if text := next((given[name] for name in sorted(names, key=len, reverse=True) if name in given), ""):
            found[node_name(site, pos, feature)] = text
    if not found:
        raise DegenerateInputError(
            f"{path}: none of its {len(given)} names is a node of this circuit. A name is written "
            "resid_5/3036, 3, resid_5/3036 at a position, or resid_5/ε for an error."
        )
    return found


def _of_page(path: Path) -> dict[str, str]:
    record = parse_json(read_text(path).encode(), str(path), dict)
    labels = record.get("labels")
    if not isinstance(labels, dict):
        raise CorruptFileError(f"{path} holds no labels. Give a file that the page of a circuit saved, or JSON lines.")
    return {str(name): str(label) for name, label in labels.items()}


def _of_lines(path: Path) -> dict[str, str]:
    found = {}
    for number, record in enumerate(json_lines(path), 1):
        name, text = record.get("Name"), record.get("Annotation")
        if not isinstance(name, str):
            raise CorruptFileError(
                f"{path}, entry {number}: there is no text under Name. Each line is an object with Name and Annotation."
            )
        if isinstance(text, str) and text:
            found[name] = text
    return found


def write_labels(path: Path, nodes: Iterable[Node], labels: Mapping[str, str]) -> Path:
    """Writes the labelled nodes in the published form, one JSON object per line."""
    lines = []
    for site, pos, feature in nodes:
        if label := labels.get(node_name(site, pos, feature)):
            component, layer = _parts(site)
            record = {
                "Component": component, "Layer": layer, "Feature": _ERROR if feature == ERROR else str(feature),
                "Name": published_name(site, pos, feature), "Annotation": label, "Notes": "",
            }  # fmt: skip
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomic(path, "".join(lines))
