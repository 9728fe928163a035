"""How much of a behaviour a circuit carries: everything outside it is ablated, and the metric is read again.

`F = (m(circuit) - m(nothing)) / (m(everything) - m(nothing))`: 1 where the circuit does as well as the model, 0 where
it does no better than nothing. The complement of a circuit should have 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.decomposition import Place, places, reads_of, refuse_unreached
from circuits.decomposition import bases as checked_bases
from circuits.faithful.ablation import Kept, Reference, ablated, nothing, of_rows
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
        full: metric of the model as it is, per pair.
        empty: metric with every node ablated, per pair.
        kept: metric with the circuit alone, or with `complement` without it, per pair.
        n_features: features that were kept, each position counted.
        n_errors: error nodes that were kept.
        ablation: what ablated nodes are.
        errors: which error nodes were kept.
        complement: whether the circuit was taken out instead.
        metric: what was read.
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
    reference: Pairs | None = None,
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
        reference: what means are taken over, of the same length as `pairs`; `pairs` themselves by default.
        free_layers: sites below this layer, and the embedding, are not ablated.
        batch_size: rows per forward pass.
        seed: which prompts "resample" takes.

    Raises:
        MismatchError: if the circuit was made with other bases, another model or other positions, or the metric reads
            below a basis or beside it.
        InvalidInputError: for an unknown option, or prompts of several lengths.
        DegenerateInputError: if nothing and everything give the same metric, so that there is nothing to explain.
    """
    options = _Options(ablation, errors, complement, free_layers, batch_size, seed)
    bench = _Bench(model, bases, pairs, metric, reference or pairs, options)
    return bench.measure(circuit)


@dataclass(frozen=True)
class _Options:
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


class _Bench:
    """Everything that does not depend on the circuit: references, the model as it is, and nothing."""

    def __init__(
        self, model: Model, bases: Mapping[str, AnySAE], pairs: Pairs, metric: AnyMetric, reference: Pairs,
        options: _Options,
    ) -> None:  # fmt: skip
        self._model, self._options = model, options
        self._pairs = pairs.to(model.device)
        self.places = places(model, checked_bases(model, bases))
        self._edited = [p for p in self.places if _layer(model, p.site) >= options.free_layers]
        self.metric: Metric = bound(metric, model, self._pairs)
        refuse_unreached(model, [place.site for place in self._edited], self.metric.site, "The metric")
        self._n_tokens = self._pairs.clean.ids.shape[1]
        if reference.length != self._pairs.length or reference.length is None:
            raise InvalidInputError(
                f"faithfulness: the pairs have {_lengths(pairs)} tokens and the reference {_lengths(reference)}; means "
                "are taken position by position, so all must have one length. Take pairs.of_one_length()."
            )
        self._references = self._made(reference.to(model.device))
        self._full: Tensor | None = None
        self._empty: Tensor | None = None

    # What ablated nodes are.

    def _made(self, pairs: Pairs) -> dict[str, Reference]:
        """The references of every place; of "resample" those of all prompts, from which rows are taken."""
        if self._options.ablation == "zero":
            return {place.site: Reference(None, None, None) for place in self._edited}
        batch = pairs.clean if pairs.patch is None else pairs.patch
        found = {}
        parts = torch.arange(len(batch), device=batch.ids.device).split(self._options.batch_size)
        sites = reads_of(self._edited)
        acts = [self._model.capture(TokenBatch(batch.ids[p], batch.mask[p]), sites) for p in parts if sites]
        for place in self._edited:
            x, read = (torch.cat([precise(part.flat(site)) for part in acts]) for site in (place.site, place.read))
            written = torch.cat([place.basis.contribution(some) for some in read.split(self._options.batch_size)])
            if self._options.ablation == "mean":
                x, written = x.mean(0, keepdim=True), written.mean(0, keepdim=True)
            found[place.site] = Reference(x, written, read)
        return found

    def _coefficients(self, place: Place, features: Tensor, rows: Tensor) -> Tensor:
        """Coefficients of some features in the reference of some rows: (rows or 1, pos, f)."""
        reference = self._references[place.site]
        if reference.read is None:
            return torch.zeros(1, 1, len(features), device=rows.device)
        if self._options.ablation == "mean":
            return place.basis.coefficients(reference.read, features).mean(0, keepdim=True)
        return place.basis.coefficients(reference.read[rows], features)

    def _others(self) -> Int[Tensor, " pairs"]:
        """Which row of the reference each pair takes: another one, by a random cycle through all."""
        n = len(next(iter(self._references.values())).x) if self._references else 1  # type: ignore[arg-type]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self._options.seed))
        step = torch.empty_like(order)
        step[order] = order.roll(1)
        return step[torch.arange(len(self._pairs)) % n].to(self._pairs.clean.ids.device)

    # Running.

    def measure(self, circuit: Circuit) -> Faithfulness:
        """F of a circuit."""
        self._require_same(circuit)
        o = self._options
        if self._full is None or self._empty is None:
            self._full, self._empty = (
                self._run(None),
                self._run({p.site: nothing(self._n_tokens) for p in self._edited}),
            )
        keeps = {place.site: self._kept(place, circuit.sites[place.site]) for place in self._edited}
        kept = self._run({site: keep for site, keep in keeps.items() if keep is not None})
        gain, whole = kept - self._empty, self._full - self._empty
        if float(whole.mean().abs()) <= 1e-9 * float(self._full.abs().mean() + self._empty.abs().mean()) or not len(
            whole
        ):
            raise DegenerateInputError(
                "faithfulness: with every node ablated the metric is what it is without any edit, so there is nothing "
                "to explain. Use another ablation, more sites, or pairs whose answers the model tells apart."
            )
        value = sample_ratio(gain.double().cpu().numpy(), whole.double().cpu().numpy(), unit="pairs", seed=o.seed)
        n_features, n_errors = self._counts(keeps)
        return Faithfulness(
            value=value, full=self._full, empty=self._empty, kept=kept, n_features=n_features, n_errors=n_errors,
            ablation=o.ablation, errors=o.errors, complement=o.complement, metric=named(self.metric),
        )  # fmt: skip

    def _require_same(self, circuit: Circuit) -> None:
        own = {place.site: place.basis.fingerprint for place in self.places}
        if circuit.model_fingerprint != self._model.fingerprint or dict(circuit.bases) != own:
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

    def _counts(self, keeps: Mapping[str, Kept | None]) -> tuple[int, int]:
        n_features = n_errors = 0
        for place in self._edited:
            kept, n = keeps[place.site], self._n_tokens
            every = place.basis.d_sae * n
            if kept is None:
                n_features, n_errors = n_features + every, n_errors + n
                continue
            count, errors = int(kept.mask.sum()), int(kept.error.sum())
            n_features += every - count if kept.inverted else count
            n_errors += n - errors if kept.inverted else errors
        return n_features, n_errors

    def _run(self, keeps: Mapping[str, Kept] | None) -> Float[Tensor, " pairs"]:
        """The metric of every pair, with everything but what is kept ablated; None runs the model as it is."""
        clean, found = self._pairs.clean, []
        device = clean.ids.device
        others = self._others() if self._options.ablation == "resample" else None
        for rows in torch.arange(len(clean), device=device).split(self._options.batch_size):
            batch = TokenBatch(clean.ids[rows], clean.mask[rows])
            reads = "final_norm" if self.metric.site == "logits" else self.metric.site
            hooks, counts = self._hooks(keeps or {}, rows if others is None else others[rows])
            with torch.no_grad(), attached(hooks):
                acts: Activations = self._model.capture(batch, [reads])
            if counts and set(counts.values()) != {1}:
                raise EditError(f"faithfulness: the sites were edited {counts} times in a run; each must be once.")
            found.append(metric_of(self._model, self.metric, acts.flat(reads), batch, rows).detach())
        return torch.cat(found)

    def _hooks(self, keeps: Mapping[str, Kept], rows: Tensor) -> tuple[list[tuple[Point, Fn]], dict[str, int]]:
        hooks: list[tuple[Point, Fn]] = []
        counts = {place.site: 0 for place in self._edited if place.site in keeps}
        for place in self._edited:
            if place.site not in keeps:
                continue
            point, seen = self._model.site_map[place.site], {}
            if place.read != place.site:
                read_point = self._model.site_map[place.read]
                hooks.append((read_point, _note(seen, read_point)))
            hooks.append((point, self._edit(place, keeps[place.site], rows, seen, counts)))
        return hooks, counts

    def _edit(self, place: Place, kept: Kept, rows: Tensor, seen: dict[str, Tensor], counts: dict[str, int]) -> Fn:
        point, reference = self._model.site_map[place.site], self._references[place.site]
        ours = self._coefficients(place, kept.features, rows) if len(kept.features) else None

        def fn(raw: Tensor) -> Tensor:
            counts[place.site] += 1
            x = precise(point.flat(raw))
            read = seen.pop("x") if place.read != place.site else x
            out = ablated(place, kept, x, read, ours, of_rows(reference, rows))
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
