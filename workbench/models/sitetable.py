"""The table that `model.sites()` shows."""

from __future__ import annotations

import html
from dataclasses import dataclass

from workbench.hooks.sites import KINDS, SiteMap

_SIDES = {"in": "input", "out": "output", "inside": "inside"}


@dataclass(frozen=True)
class SiteRow:
    """One kind of site in one model.

    Attributes:
        name: text form, with `{layer}` for the layer.
        shape: of the activation.
        layers: which layers have it, such as "0-29".
        module: path of the module in the Hugging Face model.
        why_not: the reason if it is missing somewhere.
    """

    name: str
    shape: str
    layers: str
    module: str
    why_not: str


@dataclass(frozen=True)
class SiteTable:
    """All kinds of site of one model."""

    rows: tuple[SiteRow, ...]

    @classmethod
    def of(cls, sites: SiteMap) -> SiteTable:
        """The table of a site map."""
        rows = []
        for kind in KINDS:
            have = [point for site, point in sites.points.items() if site.kind == kind]
            reasons = dict.fromkeys(why for site, why in sites.missing.items() if site.kind == kind)
            name = kind if have and have[0].site.layer is None else f"{kind}.{{layer}}"
            layers = [p.site.layer for p in have if p.site.layer is not None]
            span = "" if not layers else f"{min(layers)}-{max(layers)}"
            if layers and len(layers) != max(layers) - min(layers) + 1:
                span = ", ".join(map(str, sorted(layers)))
            path = "" if not have else f"{have[0].path} ({_SIDES[have[0].side]})"
            shape = "" if not have else f"({', '.join(map(str, have[0].shape))})"
            rows.append(SiteRow(name, shape, span, path, "; ".join(reasons)))
        return cls(tuple(rows))

    def __str__(self) -> str:
        head = ("site", "shape", "layers", "module (first)", "why not")
        body = [(r.name, r.shape, r.layers, r.module, r.why_not) for r in self.rows]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
        )

    def _repr_html_(self) -> str:
        body = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(c)}</td>" for c in (r.name, r.shape, r.layers, r.module, r.why_not))
            + "</tr>"
            for r in self.rows
        )
        return f"<table><tr><th>site<th>shape<th>layers<th>module<th>why not</tr>{body}</table>"
