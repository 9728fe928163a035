"""Effects of nodes on a metric: exact, by attribution patching, or by integrated gradients.

The basis stays out of the gradient. Its decoder is affine, so moving features and error in a straight line moves the
activation in a straight line, and one mean gradient `G` per token gives all effects: `G . row of f * change of f`,
where f is measured in the units of the activation (`Basis.coefficients`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from circuits.decomposition import Place
from circuits.graph.circuit import ERROR
from circuits.metrics import AnyMetric, named
from circuits.nodes.effects import Aggregation, NodeEffects, SiteEffects, aggregated
from circuits.nodes.runs import AttributionOptions, Method, Rule, Run, clean_slopes, dots, last_columns, runs_of
from circuits.nodes.setting import Baseline, Setting, SiteState, States, setting_of
from circuits.pairs import Pairs
from workbench.bases.base import CHUNK_ENTRIES, Basis
from workbench.bases.sae import AnySAE
from workbench.core import progress
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model


@checked
def node_effects(
    model: Model,
    bases: Mapping[str, AnySAE],
    pairs: Pairs | TokenBatch,
    metric: AnyMetric,
    *,
    method: Method = "ig",
    steps: int = 10,
    rule: Rule = "midpoint",
    baseline: Baseline | None = None,
    aggregation: Aggregation = "sum",
    keep: Bool[Tensor, "batch pos"] | None = None,
    measured: bool = True,
    batch_size: int = 64,
) -> NodeEffects:
    """Effects of every node at every site on the metric, `metric(patched) - metric(clean)`, one site at a time.

    All features, errors and positions of a site move together from clean to patched; the rest of the model follows.

    Args:
        model: the model.
        bases: a basis per site.
        pairs: pairs; or texts, with a metric that knows their labels.
        metric: what is explained, such as `circuits.logit_difference()`; it reads at or above each site.
        method: "ig", "atp" or "exact"; see `AttributionOptions`, also for the rest.
        steps: points of the integral.
        rule: where they are.
        baseline: what a patched node is; by default "patch" where there are counterparts, else "zero_keep_error".
        aggregation: how positions are put together; "none" needs prompts of one length.
        keep: the tokens that are patched; by default all of pairs, and of texts all but the first and special ones.
        measured: whether the whole site is patched as well, to say how far the effects are from adding up.
        batch_size: rows per forward pass.

    Raises:
        MismatchError: if the metric reads below a site or beside it, or an SAE was made for another model or site.
        ShapeError: if the mask or an SAE has another shape than the batch or the site.
        DegenerateInputError: if there is no SAE, or the mask keeps no token.
        InvalidInputError: for an unknown option, or one that these pairs do not allow.

    Source: Marks et al. 2025 (arXiv 2403.19647), section 3 and appendix A, there with a one-sided rule.
    """
    paired = isinstance(pairs, Pairs) and pairs.patch is not None
    options = AttributionOptions(
        method=method, steps=steps, rule=rule, baseline=baseline or ("patch" if paired else "zero_keep_error"),
        aggregation=aggregation, measured=measured, batch_size=batch_size,
    )  # fmt: skip
    setting = setting_of(model, bases, pairs, metric, options.baseline, keep)
    return effects_of(setting, options)


def effects_of(setting: Setting, options: AttributionOptions) -> NodeEffects:
    """The effects in a checked setting."""
    if options.aggregation == "none" and len(set(setting.clean.lengths.tolist())) > 1:
        lengths = setting.clean.lengths
        raise InvalidInputError(
            f"aggregation='none' keeps positions, and the prompts have {int(lengths.min())} to {int(lengths.max())} "
            "tokens, so a position means something else in each. Take pairs.of_one_length(), or put positions together."
        )
    states, found = States(setting, options.batch_size), _Collected(setting, options)
    chunks = setting.chunks(options.batch_size)
    n_sites = len(setting.places)
    with progress.task(total=len(chunks) * n_sites, description="effects of nodes", unit="sites") as task:
        for rows in chunks:
            at, slopes = states.of(rows), {}
            if options.method == "atp":
                slopes = clean_slopes(setting, rows)
            if options.method == "atp" and not options.measured:
                for place in setting.places:
                    found.linear(place, rows, at[place.site], slopes[place.site])
                    found.total(place, rows, None)
                    task.advance(1)
                continue
            base: Tensor | None = None
            for place, run in runs_of(setting, setting.places, rows, options):
                state = at[place.site]
                base = run.values([run.clean])[0] if base is None else base
                if options.method == "exact":
                    found.exact(place, rows, state, run, base)
                else:
                    slope = slopes[place.site] if options.method == "atp" else run.slope(state.change)
                    found.linear(place, rows, state, slope)
                total = run.values([run.clean + state.change])[0] - base if options.measured else None
                found.total(place, rows, total)
                task.advance(1)
    return found.effects()


class _Collected:
    """Entries of all sites, as they are found."""

    def __init__(self, setting: Setting, options: AttributionOptions) -> None:
        self._setting, self._options = setting, options
        self._last = last_columns(setting.clean)
        self._entries: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {p.site: [] for p in setting.places}
        self._added: dict[str, list[Tensor]] = {p.site: [] for p in setting.places}
        self._total: dict[str, list[Tensor]] = {p.site: [] for p in setting.places}

    def linear(self, place: Place, rows: Tensor, state: SiteState, slope: Tensor) -> None:
        """Effects as gradient times change."""
        basis, whole = place.basis, (slope * state.change).sum(1)
        error = whole.clone()
        keeps_error = self._setting.baseline == "zero_keep_error"
        parts = []
        for some in _token_slices(basis, len(slope)):
            moves = state.moves(basis, some)
            token, feature = moves.nonzero(as_tuple=True)
            values = moves[token, feature] * dots(basis, slope[some], token, feature)
            error[some] -= values.new_zeros(len(moves)).index_add_(0, token, values)
            parts.append((token + (some.start or 0), feature, values))
        token, feature, values = (torch.cat(column) for column in zip(*parts, strict=True))
        if not keeps_error:
            token = torch.cat([token, torch.arange(len(slope), device=token.device)])
            feature = torch.cat([feature, torch.full((len(slope),), ERROR, device=feature.device)])
            values = torch.cat([values, error])
        self._keep(place, rows, token, feature, values)

    def exact(self, place: Place, rows: Tensor, state: SiteState, run: Run, base: Tensor) -> None:
        """Effects of patching each node alone: a row per node and token."""
        basis, none = place.basis, rows[:0]
        tokens, features, values = [none], [none], [run.clean.new_zeros(0)]
        row = self._setting.keep[rows].nonzero(as_tuple=True)[0]
        for token, of in enumerate(row.tolist()):
            moves = state.moves(basis, slice(token, token + 1))[0]
            active = moves.nonzero()[:, 0]
            steps = moves[active, None] * basis.rows(active).to(moves)
            if self._setting.baseline != "zero_keep_error":
                steps = torch.cat([steps, (state.change[token] - moves @ basis.rows().to(moves))[None]])
                active = torch.cat([active, active.new_tensor([ERROR])])
            own = row == of
            states = run.clean[own].expand(len(steps), -1, -1).clone()
            states[:, int(own[:token].sum())] += steps
            values.append(run.alone(of, states) - base[of])
            tokens.append(torch.full_like(active, token))
            features.append(active)
        self._keep(place, rows, torch.cat(tokens), torch.cat(features), torch.cat(values))

    def _keep(self, place: Place, rows: Tensor, token: Tensor, feature: Tensor, values: Tensor) -> None:
        row, pos = (index.to(token.device) for index in self._setting.keep[rows].nonzero(as_tuple=True))
        example = rows.to(token.device)[row[token]]
        self._added[place.site].append(values.new_zeros(len(rows)).index_add_(0, row[token], values))
        d_sae, last = place.basis.d_sae, self._last
        entries = aggregated(example, pos[token], feature, values, d_sae, self._options.aggregation, last)
        self._entries[place.site].append(entries)

    def total(self, place: Place, rows: Tensor, total: Tensor | None) -> None:
        """What patching the whole site does; None if it was not measured."""
        found = torch.full((len(rows),), float("nan"), device=rows.device) if total is None else total
        self._total[place.site].append(found)

    def effects(self) -> NodeEffects:
        """The effects of all sites."""
        s, options = self._setting, self._options
        sites = {}
        for place in s.places:
            example, pos, feature, values = (
                torch.cat(column) for column in zip(*self._entries[place.site], strict=True)
            )
            sites[place.site] = SiteEffects(
                site=place.site, d_sae=place.basis.d_sae, n=len(s.clean), example=example, pos=pos, feature=feature,
                value=values, added=torch.cat(self._added[place.site]), total=torch.cat(self._total[place.site]),
                method=options.words,
            )  # fmt: skip
        return NodeEffects(
            sites=sites, metric=named(s.metric), baseline=options.baseline, aggregation=options.aggregation,
            n_tokens=s.keep.shape[1] if options.aggregation == "none" else None,
            model_fingerprint=s.model.fingerprint, bases={p.site: p.basis.fingerprint for p in s.places}, note=s.note,
        )  # fmt: skip


def _token_slices(basis: Basis, n: int) -> Iterator[slice]:
    step = max(1, CHUNK_ENTRIES // basis.d_sae)
    return (slice(start, min(n, start + step)) for start in range(0, max(n, 1), step))
