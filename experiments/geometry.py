"""Which dimensions and tokens are out of the ordinary, layer by layer: outliers, massive activations, sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from workbench.activations.clipping import ClippingCost, clipping_cost
from workbench.activations.geometry import GeometryOptions, SiteGeometry, measure_geometry
from workbench.activations.sources import SelfText, TextFiles
from workbench.cli.study import Begin, Study
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted, number, sample_size, setting
from workbench.models.model import Model
from workbench.report.base import Headline, Lines, Metric, Report, Says, Section, Series, Table, beside
from workbench.report.blocks import Block


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes of the study.

    Attributes:
        geometry: thresholds and sizes of the measurement.
        batch_rows: rows per forward pass.
        clipped_rows: rows on which clipping is tried during the forward pass; 0 leaves it out.
        clipped_site: where; None takes the middle one of the sites that have outlier dimensions.
    """

    geometry: GeometryOptions = field(default_factory=GeometryOptions)
    batch_rows: int = 16
    clipped_rows: int = 16
    clipped_site: str | None = None

    def __post_init__(self) -> None:
        if self.batch_rows < 1 or self.clipped_rows < 0 or self.clipped_rows == 1:
            raise InvalidInputError(f"{self}: needs a row per batch, and clipped_rows=0 or at least 2.")


@dataclass(frozen=True)
class GeometryReport(Report):
    """The geometry of several sites.

    Attributes:
        sites: one measurement each, in the order asked for.
        clipping: what setting the outlier dimensions of one site to 0 costs in the forward pass, if there are any.
        options: constants of the measurement.
    """

    sites: tuple[SiteGeometry, ...]
    clipping: ClippingCost | None
    options: Options

    def headline(self) -> Headline:
        """Loss added without the outlier dimensions, beside as many random ones."""
        if self.clipping is None:
            return Headline(sentence="What outlier dimensions do for the loss was not measured.")
        return Headline.of(
            Says(
                "The model needs its outlier dimensions more than random ones.",
                "The model needs its outlier dimensions no more than random ones.",
                "The model needs its outlier dimensions less than random ones.",
            ),
            self._beside()[0],
        )

    def _beside(self) -> tuple[Table, ...]:
        cost, measure = self.clipping, "loss added by setting dimensions to 0 (nats per token)"
        if cost is None:
            return ()
        return (beside(measure, ("outlier dimensions", cost.outliers), ("random dimensions", cost.random)),)

    def findings(self) -> tuple[str, ...]:
        """Outlier dimensions, who holds massive activations, what position and anisotropy owe to the outliers."""
        return (self._outliers(), self._massive(), *self._anisotropy(), self._clipping())

    def _outliers(self) -> str:
        with_some = [site for site in self.sites if site.outliers]
        if not with_some:
            return f"No outlier dimension at {counted(len(self.sites), 'sites')}."
        often: dict[int, int] = {}
        for site in with_some:
            for dim in site.outlier_dims:
                often[dim] = often.get(dim, 0) + 1
        most = sorted(often, key=lambda dim: -often[dim])[:5]
        named = ", ".join(f"{dim} (at {often[dim]})" for dim in most)
        return (
            f"{len(with_some)} of {len(self.sites)} sites have outlier dimensions over ordinary tokens; the most "
            f"frequent: {named}."
        )

    def _massive(self) -> str:
        worst = max(self.sites, key=lambda site: max(part.largest for part in site.classes))
        parts = [f"{part.name} {part.massive} of {part.tokens}" for part in worst.classes if part.tokens]
        largest = max(part.largest for part in worst.classes)
        return (
            f"Largest activation: {number(largest)} at {worst.site}; tokens with massive ones there: "
            f"{', '.join(parts)}."
        )

    def _anisotropy(self) -> tuple[str, ...]:
        changed = [s for s in self.sites if s.outliers and s.anisotropy["clipped"].high < s.anisotropy["raw"].low]
        raw = [site.anisotropy["raw"].value for site in self.sites]
        return (
            f"Two tokens of different rows have a mean cosine of {number(min(raw))} to {number(max(raw))} over "
            "the sites "
            f"({sample_size(self.sites[0].anisotropy['raw'].n, 'pairs')} each); without the outlier dimensions "
            "it is clearly lower "
            f"at {len(changed)} of {sum(bool(s.outliers) for s in self.sites)} sites that have some.",
        )

    def _clipping(self) -> str:
        if self.clipping is None:
            return "Clipping during the forward pass was not tried: no outlier dimension, or not asked for."
        c = self.clipping
        return (
            f"Setting {counted(len(c.dims), 'outlier dimensions')} at {c.site} to 0 at every token of the "
            "forward pass adds "
            f"{c.outliers} nats per token, as many random dimensions {c.random}. Clip copies of activations, not this."
        )

    def section(self) -> Section:
        """Tables of dimensions, classes of tokens, position and anisotropy; anisotropy as curves over the sites."""
        blocks: list[Block] = [self._summary(), self._dimensions(), self._classes(), self._cosines()]
        if len(self.sites) > 1:
            blocks.append(self._curves())
        metrics: dict[str, Metric] = {}
        for site in self.sites:
            metrics |= {f"{site.site}.outliers": len(site.outliers), f"{site.site}.norm_share": site.norm_share[0]}
            metrics |= {f"{site.site}.anisotropy.{name}": value for name, value in site.anisotropy.items()}
            metrics |= {f"{site.site}.sinks": sum(part.sinks for part in site.classes)}
            metrics |= {f"{site.site}.r2.{name}": r2 for name, r2 in site.position.items() if r2 is not None}
        if self.clipping is not None:
            metrics |= {"clipping.outliers": self.clipping.outliers, "clipping.random": self.clipping.random}
        blocks += self._beside()
        return Section("Geometry of activations", tuple(blocks), self.findings(), metrics, self.headline())

    def _summary(self) -> Table:
        o = self.options.geometry
        rows = tuple(
            (s.site, s.ordinary, ", ".join(map(str, s.outlier_dims)) or "none", s.norm_share[0], s.norm_share[-1],
             s.kurtosis, sum(part.sinks for part in s.classes), s.position["all dimensions"],
             s.position["without outliers"], s.position["outliers alone"])
            for s in self.sites
        )  # fmt: skip
        top = len(self.sites[0].norm_share)
        return Table(
            ("site", "ordinary tokens", "outlier dimensions", "norm share of 1", f"of {top}", "median kurtosis",
             "sinks", "position R2", "without outliers", "outliers alone"),
            rows,
            f"Ordinary: not first, not special, norm at most ten medians. Outlier: extremal on more than "
            f"a share of {setting(o.extremal_share)} of the tokens (and five times 1/d), or root mean square "
            f"above {setting(o.rms_factor)} "
            "medians. Share of the squared norm in the largest dimensions. Position: ridge regression of the position "
            "in the row, R2 on rows that were not fitted.",
        )  # fmt: skip

    def _dimensions(self) -> Table:
        rows = []
        for site in self.sites:
            for kind, dims in (("outlier", site.outliers), ("largest |mean| / std", site.largest_means)):
                rows += [(site.site, kind, d.dim, d.mean, d.std, d.kurtosis, d.extremal, d.norm_share) for d in dims]
        return Table(
            ("site", "listed as", "dimension", "mean", "std", "kurtosis", "share extremal", "norm share"), tuple(rows)
        )

    def _classes(self) -> Table:
        o = self.options.geometry
        rows = []
        for site in self.sites:
            dims = ", ".join(f"{dim} ({n})" for dim, n in site.massive_dims)
            rows += [
                (site.site, c.name, c.tokens, c.massive, c.sinks, c.largest, dims) for c in site.classes if c.tokens
            ]
        return Table(
            ("site", "tokens", "n", "with a massive activation", "sinks", "largest |a|", "massive dimensions (tokens)"),
            tuple(rows),
            f"Massive: |a| above {setting(o.massive)} and above {setting(o.massive_ratio)} times the median |a| "
            "of the site.",
        )

    def _cosines(self) -> Table:
        names = tuple(self.sites[0].anisotropy)
        return Table(
            ("site", *names),
            tuple((site.site, *(site.anisotropy[name] for name in names)) for site in self.sites),
            "Mean cosine of disjoint pairs of ordinary tokens of different rows, 95 % normal intervals. Clipped: "
            "outlier dimensions set to 0. All but the top: without mean and first principal components.",
        )

    def _curves(self) -> Lines:
        x = tuple(range(len(self.sites)))

        def series(name: str) -> Series:
            values = [site.anisotropy[name] for site in self.sites]
            return Series(name, x, *(tuple(getattr(v, part) for v in values) for part in ("value", "low", "high")))

        return Lines(
            "Anisotropy", tuple(series(n) for n in self.sites[0].anisotropy), "site, in the order asked", "mean cosine"
        )


def study(model: Model, rows: Tensor, sites: Sequence[str], options: Options | None = None) -> GeometryReport:
    """Geometry of the sites on these rows, and the cost of clipping at one of them.

    Args:
        model: the model.
        rows: packed rows of tokens.
        sites: where to read, all in one pass.
        options: thresholds and sizes.
    """
    options = options or Options()
    found = measure_geometry(model, rows, sites, batch_rows=options.batch_rows, options=options.geometry)
    return GeometryReport(found, _clipped(model, rows, found, options), options)


def _clipped(model: Model, rows: Tensor, found: Sequence[SiteGeometry], options: Options) -> ClippingCost | None:
    with_some = [site for site in found if 0 < len(site.outliers) <= site.d // 2]
    if options.clipped_site is not None:
        wanted = str(model.resolve(options.clipped_site))
        with_some = [site for site in with_some if site.site == wanted]
    if not with_some or not options.clipped_rows:
        return None
    site = with_some[len(with_some) // 2]
    dims = site.outlier_dims
    return clipping_cost(model, rows[: options.clipped_rows], site.site, dims, seed=options.geometry.seed)


@dataclass(frozen=True, kw_only=True)
class Geometry(Study[GeometryReport]):
    """Measure outlier dimensions, sinks and anisotropy by layer.

    Also massive activations and what depends on the position.

    Example: workbench geometry --tokens 16384
    """

    run_name = step = "geometry"

    sites: tuple[str, ...] = ()
    """Where to read; by default the residual stream after every block."""
    files: tuple[Path, ...] = ()
    """Text files (.txt, .jsonl) instead of the model's own text."""
    tokens: int = 16_384
    """Tokens of text."""
    context: int = 64
    """Tokens per row."""
    clipped_rows: int = 16
    """Rows on which outlier dimensions are set to 0 during the forward pass, to see what it costs; 0 leaves it out."""

    def measure(self, begin: Begin) -> GeometryReport:
        model = self.load_model()
        sites = self.sites or tuple(f"resid_post.{layer}" for layer in range(model.n_layers))
        options = Options(geometry=GeometryOptions(seed=self.seed), clipped_rows=self.clipped_rows)
        begin(model)
        return study(model, self.rows(model), sites, options)

    def title(self, report: GeometryReport) -> str:
        return "Geometry of activations"

    def rows(self, model: Model) -> Tensor:
        """Packed rows of the model's own text or of the files."""
        own = SelfText(tokens=self.tokens, context=self.context, seed=self.seed)
        source = TextFiles(self.files, tokens=self.tokens, context=self.context) if self.files else own
        parts = [batch.ids for batch in source.batches(model)]
        if not parts:
            raise DegenerateInputError(f"The files hold no row of {self.context} tokens. Give more text.")
        return torch.cat(parts)


if __name__ == "__main__":
    import tyro

    tyro.cli(Geometry).run()
