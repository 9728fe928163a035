"""The table that `model.sites()` shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.core.errors import UnknownSiteError, did_you_mean
from workbench.core.html import Shown, table
from workbench.core.numbers import counted
from workbench.hooks.sites import KINDS, Point, SiteMap, spanned

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

_SIDES = {"in": "input", "out": "output", "inside": "inside"}


class _MissingKindError(UnknownSiteError, AttributeError):
    """A kind of site that exists, but not in this model; also an AttributeError, so that `hasattr` is False."""


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
class SiteTable(Shown):
    """The sites of one model: an iterable of their names in the order of a forward pass, shown as a table of kinds.

    A kind gives the names of all its layers: `sites["resid_post"]`, or `sites.resid_post`.

    Attributes:
        rows: one per kind of site, those that the model lacks included.
        points: where each site of the model is.
    """

    rows: tuple[SiteRow, ...]
    points: tuple[Point, ...] = ()

    @classmethod
    def of(cls, sites: SiteMap) -> SiteTable:
        """The table of a site map."""
        rows = []
        for kind in KINDS:
            have = [point for site, point in sites.points.items() if site.kind == kind]
            reasons = dict.fromkeys(why for site, why in sites.missing.items() if site.kind == kind)
            name = kind if have and have[0].site.layer is None else f"{kind}.{{layer}}"
            span = spanned(point.site.layer for point in have)
            path = "" if not have else f"{have[0].path} ({_SIDES[have[0].side]})"
            shape = "" if not have else f"({', '.join(map(str, have[0].shape))})"
            rows.append(SiteRow(name, shape, span, path, "; ".join(reasons)))
        points = sorted(sites.points.values(), key=lambda point: point.site.order)
        return cls(tuple(rows), tuple(points))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all sites, in the order of a forward pass."""
        return tuple(str(point.site) for point in self.points)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, kind: str) -> tuple[str, ...]:
        """The names of one kind of site, in all its layers.

        Raises:
            UnknownSiteError: if the model has none of that kind.
        """
        if kind not in self._kinds:
            raise UnknownSiteError(f"This model has no sites of kind {kind!r}. {did_you_mean(kind, self._kinds)}")
        return tuple(str(point.site) for point in self.points if point.site.kind == kind)

    def __getattr__(self, kind: str) -> tuple[str, ...]:
        if kind not in KINDS:
            raise AttributeError(f"A table of sites has no {kind!r}. {did_you_mean(kind, KINDS)}")
        try:
            return self[kind]
        except UnknownSiteError as error:
            raise _MissingKindError(str(error)) from None

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.site.kind for point in self.points))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._kinds]

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._kinds)

    def frame(self) -> pd.DataFrame:
        """One row per site that the model has: name, kind, layer, shape, width, and the module that it belongs to."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "site": str(point.site), "kind": point.site.kind, "layer": point.site.layer, "shape": point.shape,
                    "width": point.width, "module": point.path, "side": _SIDES[point.side],
                }
                for point in self.points
            ]
        ).astype({"layer": "Int64", "width": "Int64"})  # fmt: skip

    def _shown_line(self) -> str:
        spans = (f"{row.name.split('.')[0]}{'.' * bool(row.layers)}{row.layers}" for row in self.rows if row.shape)
        return f"{counted(len(self), 'sites')}: {', '.join(spans)}; print() shows shapes"

    def _shown_note(self) -> str:
        return counted(len(self), "sites")

    def _shown_parts(self) -> Iterable[Markup]:
        rows = [(row.name, row.shape, row.layers, row.module, row.why_not) for row in self.rows]
        yield table(("site", "shape", "layers", "module (first)", "why not"), rows)

    def __str__(self) -> str:
        head = ("site", "shape", "layers", "module (first)", "why not")
        body = [(r.name, r.shape, r.layers, r.module, r.why_not) for r in self.rows]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
        )
