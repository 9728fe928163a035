"""How much of a behaviour a circuit carries: everything outside it is ablated, and the metric is read again.

`F = (m(circuit) - m(nothing)) / (m(everything) - m(nothing))`: 1 where the circuit does as well as the model, 0 where
it does no better than nothing. The complement of a circuit should have 0.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.decomposition import Place, places, reads_of, refuse_unreached
from circuits.decomposition import bases as checked_bases
from circuits.faithful.ablation import Kept, Reference, ablated, nothing
from circuits.faithful.means import TokenMeans, counting
from circuits.graph.circuit import Circuit, SiteNodes
from circuits.metrics import AnyMetric, Metric, bound, named
from circuits.nodes.runs import metric_of
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, MismatchError, require
from workbench.core.html import Shown
from workbench.core.precision import precise
from workbench.core.stats import Estimate, sample_ratio
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import Fn, attached
from workbench.hooks.capture import Activations
from workbench.hooks.sites import Point
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

Ablation = Literal["mean", "zero", "resample"]
Errors = Literal["circuit", "all", "none", "resid"]
_BATCH = 64


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Faithfulness(Shown):
    """How much of a behaviour a circuit carries on some pairs.

    Attributes:
        value: F, a ratio of means over pairs, with its interval; above 1 or below 0 where nodes outside it oppose it.
            The interval is over pairs: the reference that nodes are ablated to is held fixed, and other reference
            pairs can move F by more.
        full: metric of the model as it is, per pair.
        empty: metric with every node ablated, per pair.
        kept: metric with the circuit alone, or with `complement` without it, per pair.
        n_features: features that were kept; each position counts where nodes have positions.
        n_errors: error nodes that were kept.
        ablation: what ablated nodes are.
        errors: which error nodes were kept.
        complement: whether the circuit was taken out instead.
        metric: what was read.
        n_edges: edges through which the nodes saw each other; None where they saw each other as in the model.
    """

    value: Estimate
    full: Float[Tensor, " pairs"]
    empty: Float[Tensor, " pairs"]
    kept: Float[Tensor, " pairs"]
    n_features: int
    n_errors: int
    ablation: Ablation
    errors: Errors
    complement: bool
    metric: str
    n_edges: int | None = None

    def frame(self) -> pd.DataFrame:
        """One row per pair: the metric of the model, of nothing and of the circuit."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name).cpu().numpy() for name in ("full", "empty", "kept")})

    def _shown_line(self) -> str:
        what = "without the circuit" if self.complement else "of the circuit"
        return f"F {what} {self.value}, {self.n_features} features, {self.n_errors} errors"


@checked
def faithfulness(
    model: Model,
    bases: Mapping[str, AnySAE],
    circuit: Circuit,
    pairs: Pairs,
    metric: AnyMetric,
    *,
    ablation: Ablation = "mean",
    errors: Errors = "circuit",
    complement: bool = False,
    reference: Pairs | TokenMeans | None = None,
    free_layers: int = 0,
    batch_size: int = _BATCH,
    seed: int = 0,
) -> Faithfulness:
    """How much of the metric is left when only the circuit's nodes do what they do.

    At every site with a basis, in the order of a forward pass, features are computed from the stream as it is then, and
    what is outside the circuit is put to its reference: `x' = mean + sum over kept features (f - mean f) row`, and the
    error likewise where it is kept.

    Args:
        model: the model.
        bases: the bases that the circuit was made with.
        circuit: the nodes.
        pairs: held-out pairs, of the same length where nodes have positions.
        metric: what is read.
        ablation: "mean" puts a node to its mean at this position over the patch prompts of `reference`; "zero" to zero;
            "resample" to what it is in another prompt of `reference`.
        errors: which error nodes are kept: those of the "circuit", "all", "none", or all of the "resid" sites.
        complement: keep what is not in the circuit instead.
        reference: what means are taken over, of the same length as `pairs`; `pairs` themselves by default. Or
            `circuits.token_means`, which are the same at every position, for prompts of several lengths; first and
            special tokens, which these means are not of, then stay as they are.
        free_layers: sites below this layer, and the embedding, are not ablated.
        batch_size: rows per forward pass.
        seed: which prompts "resample" takes.

    Raises:
        MismatchError: if the circuit was made with other bases, another model or other positions, or the metric reads
            below a basis or beside it.
        InvalidInputError: for an unknown option, or prompts of several lengths.
        DegenerateInputError: if nothing and everything give the same metric, so that there is nothing to explain.
    """
    options = BenchOptions(ablation, errors, complement, free_layers, batch_size, seed)
    bench = Bench(model, bases, pairs, metric, reference or pairs, options)
    return bench.measure(circuit)


@dataclass(frozen=True)
class BenchOptions:
    """The options of `faithfulness`, checked."""

    ablation: Ablation
    errors: Errors
    complement: bool
    free_layers: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.ablation not in ("mean", "zero", "resample") or self.errors not in ("circuit", "all", "none", "resid"):
            raise InvalidInputError(
                f"faithfulness(ablation={self.ablation!r}, errors={self.errors!r}): ablations are mean, zero, "
                "resample; errors circuit, all, none, resid."
            )
        require(self.batch_size >= 1, f"batch_size={self.batch_size}", "it must be at least 1")
        require(self.free_layers >= 0, f"free_layers={self.free_layers}", "it must not be negative")


class Bench:
    """Everything that does not depend on the circuit: references, the model as it is, and nothing."""

    def __init__(
        self, model: Model, bases: Mapping[str, AnySAE], pairs: Pairs, metric: AnyMetric,
        reference: Pairs | TokenMeans, options: BenchOptions,
    ) -> None:  # fmt: skip
        self.model, self._options = model, options
        self.places = places(model, checked_bases(model, bases))
        self._fingerprints = {place.site: place.basis.fingerprint for place in self.places}
        self._edited = [p for p in self.places if _layer(model, p.site) >= options.free_layers]
        self._read(pairs, metric)
        refuse_unreached(model, [place.site for place in self._edited], self.metric.site, "The metric")
        self._counted: Tensor | None = None
        if isinstance(reference, TokenMeans):
            require(options.ablation == "mean", f"ablation={options.ablation!r}", "means of tokens are for 'mean'")
            self._references = reference.references(self._edited, self._fingerprints)
            self._counted = counting(self.pairs.clean)
            return
        if reference.length != self.pairs.length or reference.length is None:
            raise InvalidInputError(
                f"faithfulness: the pairs have {_lengths(pairs)} tokens and the reference {_lengths(reference)}; means "
                "are taken position by position, so all must have one length. Take pairs.of_one_length(), or "
                "reference=circuits.token_means(model, bases, texts)."
            )
        self._references = self._made(reference.to(model.device))

    def _read(self, pairs: Pairs, metric: AnyMetric) -> None:
        self.pairs = pairs.to(self.model.device)
        self.metric: Metric = bound(metric, self.model, self.pairs)
        self._n_tokens = self.pairs.clean.ids.shape[1]

    def on(self, pairs: Pairs, metric: AnyMetric) -> Bench:
        """The same bench for other pairs, where what ablated nodes are does not depend on them: with `TokenMeans`."""
        assert self._counted is not None
        other = copy.copy(self)
        other.__dict__.pop("ends", None)
        other._read(pairs, metric)
        other._counted = counting(other.pairs.clean)
        return other

    # What ablated nodes are.

    def _made(self, pairs: Pairs) -> dict[str, Reference]:
        """The references of every place; of "resample" those of all prompts, from which rows are taken."""
        if self._options.ablation == "zero":
            return {place.site: Reference(None, None, None) for place in self._edited}
        batch = pairs.clean if pairs.patch is None else pairs.patch
        found = {}
        parts = torch.arange(len(batch), device=batch.ids.device).split(self._options.batch_size)
        sites = reads_of(self._edited)
        acts = [self.model.capture(TokenBatch(batch.ids[p], batch.mask[p]), sites) for p in parts if sites]
        for place in self._edited:
            x, read = (torch.cat([precise(part.flat(site)) for part in acts]) for site in (place.site, place.read))
            written = torch.cat([place.basis.contribution(some) for some in read.split(self._options.batch_size)])
            if self._options.ablation == "mean":
                x, written = x.mean(0, keepdim=True), written.mean(0, keepdim=True)
            found[place.site] = Reference(x, written, read)
        return found

    def reference(self, site: str, rows: Int[Tensor, " rows"]) -> Reference:
        """What ablated nodes of a site are in some pairs; one row where it is the same for all."""
        whole = self._references[site]
        if self._options.ablation != "resample" or whole.x is None or whole.written is None or whole.read is None:
            return whole
        others = self._others[rows]
        return Reference(whole.x[others], whole.written[others], whole.read[others])

    def coefficients(
        self, place: Place, features: Int[Tensor, " f"], reference: Reference
    ) -> Float[Tensor, "rows pos f"]:
        """Coefficients of some features in a reference; one row where they are the same for all."""
        if reference.coefficients is not None:
            return reference.coefficients[features.to(reference.coefficients.device)][None, None]
        if reference.read is None:
            return torch.zeros(1, 1, len(features), device=self.pairs.clean.ids.device)
        found = place.basis.coefficients(reference.read, features)
        return found.mean(0, keepdim=True) if self._options.ablation == "mean" else found

    @functools.cached_property
    def _others(self) -> Int[Tensor, " pairs"]:
        """Which row of the reference each pair takes: another one, by a random cycle through all."""
        n = next((len(r.read) for r in self._references.values() if r.read is not None), 1)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self._options.seed))
        step = torch.empty_like(order)
        step[order] = order.roll(1)
        return step[torch.arange(len(self.pairs)) % n].to(self.pairs.clean.ids.device)

    # Running.

    def measure(self, *circuits: Circuit) -> Faithfulness:
        """F of a circuit; of several alike, such as random ones, that of their mean."""
        keeps = [self._keeps(circuit) for circuit in circuits]
        runs = [self._run({s: k for s, k in keep.items() if k is not None}) for keep in keeps]
        return self.found(torch.stack(runs).mean(0), circuits[0])

    def found(self, kept: Float[Tensor, " pairs"], circuit: Circuit) -> Faithfulness:
        """F from the metric of every pair with a circuit."""
        o, (full, empty) = self._options, self.ends
        gain, whole = kept - empty, full - empty
        value = sample_ratio(gain.double().cpu().numpy(), whole.double().cpu().numpy(), unit="pairs", seed=o.seed)
        n_features, n_errors = self._counts(self._keeps(circuit), 1 if circuit.n_tokens is None else circuit.n_tokens)
        return Faithfulness(
            value=value, full=full, empty=empty, kept=kept, n_features=n_features, n_errors=n_errors,
            ablation=o.ablation, errors=o.errors, complement=o.complement, metric=named(self.metric),
        )  # fmt: skip

    @functools.cached_property
    def ends(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """The metric of the model as it is, and with every node ablated.

        Raises:
            DegenerateInputError: if they are the same.
        """
        full, empty = self._run(None), self._run({place.site: nothing(self._n_tokens) for place in self._edited})
        if float((full - empty).mean().abs()) <= 1e-9 * float(full.abs().mean() + empty.abs().mean()):
            raise DegenerateInputError(
                "faithfulness: with every node ablated the metric is what it is without any edit, so there is nothing "
                "to explain. Use another ablation, more sites, or pairs whose answers the model tells apart."
            )
        return full, empty

    def _keeps(self, circuit: Circuit) -> dict[str, Kept | None]:
        self.require_same(circuit)
        return {place.site: self._kept(place, circuit.sites[place.site]) for place in self._edited}

    def with_errors(self, errors: Errors) -> Bench:
        """The same bench that keeps other error nodes; what does not depend on them is shared."""
        other = copy.copy(self)
        other._options = replace(self._options, errors=errors)
        other.__dict__["ends"] = self.ends
        return other

    def require_same(self, circuit: Circuit) -> None:
        """Refuses a circuit of another model, of other bases or of other positions."""
        own = self._fingerprints
        if circuit.model_fingerprint != self.model.fingerprint or dict(circuit.bases) != own:
            raise MismatchError(
                f"faithfulness: the circuit was made with bases at {', '.join(circuit.bases)} of another model or with "
                f"other weights than those given, at {', '.join(own)}. Give the model and the bases that made it."
            )
        if circuit.n_tokens not in (None, self._n_tokens):
            raise MismatchError(
                f"faithfulness: the circuit has positions of prompts with {circuit.n_tokens} tokens, and these have "
                f"{self._n_tokens}. Use pairs of that length, or a circuit whose positions were put together."
            )

    def _kept(self, place: Place, nodes: SiteNodes) -> Kept | None:
        """What is kept at a place; None if all of it is."""
        o, n = self._options, self._n_tokens
        error = nodes.error(n)
        if o.errors != "circuit":
            error = torch.full_like(
                error, o.errors == "all" or (o.errors == "resid" and place.site.startswith("resid"))
            )
            error = ~error if o.complement else error
        features = nodes.features()
        kept = Kept(features, nodes.mask(n, features), error, inverted=o.complement)
        if nodes.every and bool(error.all()):
            return nothing(n) if o.complement else None
        return None if o.complement and not bool(kept.mask.any()) and not bool(error.any()) else kept

    def _counts(self, keeps: Mapping[str, Kept | None], n: int) -> tuple[int, int]:
        """How many features and errors are kept; a position counts by itself only where nodes have positions."""
        n_features = n_errors = 0
        for place in self._edited:
            kept = keeps[place.site]
            every = place.basis.d_sae * n
            if kept is None:
                n_features, n_errors = n_features + every, n_errors + n
                continue
            count, errors = int(kept.mask[:n].sum()), int(kept.error[:n].sum())
            n_features += every - count if kept.inverted else count
            n_errors += n - errors if kept.inverted else errors
        return n_features, n_errors

    def _run(self, keeps: Mapping[str, Kept] | None) -> Float[Tensor, " pairs"]:
        """The metric of every pair, with everything but what is kept ablated; None runs the model as it is."""
        clean, found = self.pairs.clean, []
        device = clean.ids.device
        for rows in torch.arange(len(clean), device=device).split(self._options.batch_size):
            batch = TokenBatch(clean.ids[rows], clean.mask[rows])
            reads = "final_norm" if self.metric.site == "logits" else self.metric.site
            hooks, counts = self._hooks(keeps or {}, rows)
            with torch.no_grad(), attached(hooks):
                acts: Activations = self.model.capture(batch, [reads])
            if counts and set(counts.values()) != {1}:
                raise EditError(f"faithfulness: the sites were edited {counts} times in a run; each must be once.")
            found.append(metric_of(self.model, self.metric, acts.flat(reads), batch, rows).detach())
        return torch.cat(found)

    def _hooks(self, keeps: Mapping[str, Kept], rows: Tensor) -> tuple[list[tuple[Point, Fn]], dict[str, int]]:
        hooks: list[tuple[Point, Fn]] = []
        counts = {place.site: 0 for place in self._edited if place.site in keeps}
        for place in self._edited:
            if place.site not in keeps:
                continue
            point, seen = self.model.site_map[place.site], {}
            if place.read != place.site:
                read_point = self.model.site_map[place.read]
                hooks.append((read_point, _note(seen, read_point)))
            hooks.append((point, self._edit(place, keeps[place.site], rows, seen, counts)))
        return hooks, counts

    def _edit(self, place: Place, kept: Kept, rows: Tensor, seen: dict[str, Tensor], counts: dict[str, int]) -> Fn:
        point, reference = self.model.site_map[place.site], self.reference(place.site, rows)
        ours = self.coefficients(place, kept.features, reference) if len(kept.features) else None

        def fn(raw: Tensor) -> Tensor:
            counts[place.site] += 1
            x = precise(point.flat(raw))
            read = seen.pop("x") if place.read != place.site else x
            out = ablated(place, kept, x, read, ours, reference)
            if self._counted is not None:
                out = torch.where(self._counted[rows][..., None].to(out.device), out, x)
            return point.unflat(out.to(raw), raw)

        return fn


def _layer(model: Model, site: str) -> int:
    """The layer of a site; the embedding is below all of them as soon as one is free."""
    layer = model.resolve(site).layer
    return 0 if layer is None else layer


def _note(seen: dict[str, Tensor], point: Point) -> Fn:
    def fn(x: Tensor) -> None:
        seen["x"] = precise(point.flat(x))

    return fn


def _lengths(pairs: Pairs) -> str:
    low, high = (int(bound) for bound in pairs.clean.lengths.aminmax())
    return str(low) if low == high else f"{low} to {high}"
