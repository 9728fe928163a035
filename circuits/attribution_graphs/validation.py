"""Whether a graph says what its model does.

Links are tested with everything else held fast, influence by ablations with nothing held fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.attribution_graphs.replacement import Replacement, Targets
from circuits.attribution_graphs.sublayers import Output
from circuits.attribution_graphs.tables import FEATURE, LOGIT, NodesAndLinks, Origin
from workbench.core import progress
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted, rounding_error
from workbench.core.precision import precise
from workbench.core.stats import Estimate, paired_difference, rank_correlation, sample_mean
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import Fn, attach
from workbench.hooks.handles import Hooks
from workbench.hooks.sites import Point, Site
from workbench.interventions.scopes import Last
from workbench.models.frozennorm import FrozenAt

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 16
"""Copies of the prompt in one run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Validation(Shown):
    """Two tests of an attribution graph, each by running the model itself.

    Links: a feature's coefficient is doubled while patterns, norms, gates and the activations of all features are held
    fast; then each target must move by exactly the link's weight. Influence: the feature is removed with nothing held
    fast, and the outputs must move the more the more influence it has; beside it, a random decoder row of the same
    length is removed at the same place.

    Attributes:
        row_error: largest difference between a link and what the target moved by, as a share of the largest link.
        n_links: links that were tested.
        influence: rank correlation of influence and the size of the effect.
        control: the same for the random rows, which shows what place and length alone predict.
        effect: mean size of the effect, in logits, weighted over outputs.
        control_effect: that of the random rows.
        difference: paired.
        node: names of the features that were removed.
        influences: of each.
        effects: of each.
        control_effects: of each.
    """

    row_error: float
    n_links: int
    influence: Estimate
    control: Estimate
    effect: Estimate
    control_effect: Estimate
    difference: Estimate
    node: tuple[str, ...]
    influences: Float[np.ndarray, " n"]
    effects: Float[np.ndarray, " n"]
    control_effects: Float[np.ndarray, " n"]

    def frame(self) -> pd.DataFrame:
        """One row per feature that was removed."""
        import pandas as pd

        return pd.DataFrame(
            {
                "node": self.node, "influence": self.influences, "effect": self.effects,
                "control_effect": self.control_effects,
            }
        )  # fmt: skip

    def _shown_line(self) -> str:
        return (
            f"{counted(self.n_links, 'links')} off by {rounding_error(self.row_error)}; influence and effect correlate "
            f"by {self.influence}, of random rows by {self.control}"
        )


@torch.no_grad()
def validated(graph: NodesAndLinks, origin: Origin, n: int, seed: int) -> Validation:
    """Both tests on n features: half of them the most influential ones, the others drawn.

    Raises:
        InvalidInputError: for n below 4.
        DegenerateInputError: for a graph of fewer than 4 features.
    """
    if n < 4:
        raise InvalidInputError(f"validate(n={n}): a correlation needs at least 4 features.")
    features = np.flatnonzero(graph.of_kind(FEATURE))
    if len(features) < 4:
        raise DegenerateInputError(
            f"validate: the graph has {counted(len(features), 'features')}; a correlation needs at least 4. Make it "
            "with more features."
        )
    random = np.random.default_rng(seed)
    order = features[np.argsort(-graph.influence[features], kind="stable")]
    most = order[: n // 2 if len(order) > n else len(order)]
    rest = order[len(most) :]
    chosen = np.concatenate([most, random.permutation(rest)[: max(0, n - len(most))]])
    test = _Test(graph, origin, random)
    error, n_links = test.links(chosen)
    effects, controls = test.effects(chosen)
    influence = graph.influence[chosen]
    unit = "features"
    return Validation(
        row_error=error, n_links=n_links, influence=rank_correlation(influence, effects, unit=unit),
        control=rank_correlation(influence, controls, unit=unit), effect=sample_mean(effects, unit=unit),
        control_effect=sample_mean(controls, unit=unit), difference=paired_difference(effects, controls, unit=unit),
        node=tuple(np.array(graph.names(), dtype=object)[chosen]), influences=influence, effects=effects,
        control_effects=controls,
    )  # fmt: skip


Changes = Sequence[Mapping[Site, tuple[int, Tensor]]]
"""Per copy of the prompt what is added where: at a site, a position and a vector."""


class _Test:
    def __init__(self, graph: NodesAndLinks, origin: Origin, random: np.random.Generator) -> None:
        self._graph, self._run, self._outputs, self._random = graph, origin.run, origin.outputs, random

    def links(self, chosen: np.ndarray) -> tuple[float, int]:
        """Largest difference between links out of some features and what targets moved by, relative; and how many."""
        graph, held = self._graph, np.isin(self._graph.source, chosen)
        targets = list(self._targets())
        reads = dict.fromkeys(part.site for _, part in targets)
        worst = 0.0
        place = {int(node): i for i, node in enumerate(chosen)}
        moved = np.zeros((len(chosen), len(graph.nodes)))
        changes = [self._written(node, 1.0) for node in chosen.tolist()]
        frozen = Frozen(self._run)
        for start in progress.track(range(0, len(chosen), _ROWS), description="testing links", unit="runs"):
            seen = frozen.moved(changes[start : start + _ROWS], list(reads))
            for nodes, part in targets:
                read = seen[part.site][:, part.pos]
                moved[start : start + _ROWS, nodes] = torch.einsum("bnd,nd->bn", read, part.vectors).cpu().numpy()
        found = moved[[place[int(node)] for node in graph.source[held]], graph.target[held]]
        wanted = graph.weight[held]
        if len(wanted):
            worst = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        return worst, len(wanted)

    def effects(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sizes of the effects of removing features, and random rows of the same length in their place."""
        real = self._outcome([self._written(node, -1.0) for node in chosen.tolist()])
        return real, self._outcome([self._random_row(node) for node in chosen.tolist()])

    def _targets(self) -> Iterator[tuple[np.ndarray, Targets]]:
        """Nodes with a row, with what each reads."""
        run, nodes = self._run, self._graph.nodes
        yield np.flatnonzero(nodes.kind == LOGIT), run.outputs(self._outputs.directions, self._outputs.added)
        for number in range(len(run.coders)):
            own = np.flatnonzero((nodes.kind == FEATURE) & (nodes.site == str(run.coders[number].site)))
            if len(own):
                index = torch.tensor([self._active(node)[1] for node in own.tolist()])
                yield own, run.features(run.coders[number], index)

    def _active(self, node: int) -> tuple[int, int]:
        """Coder of a node, and its place among the coder's active features."""
        nodes = self._graph.nodes
        number, known = self._places[str(nodes.site[node])]
        return number, known[int(nodes.pos[node]), int(nodes.feature[node])]

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, dict[tuple[int, int], int]]]:
        return {
            str(coder.site): (
                number,
                {key: i for i, key in enumerate(zip(coder.pos.tolist(), coder.feature.tolist(), strict=True))},
            )
            for number, coder in enumerate(self._run.coders)
        }

    def _written(self, node: int, share: float) -> dict[Site, tuple[int, Tensor]]:
        """A share of what a feature writes, wherever it writes."""
        number, place = self._active(node)
        coder = self._run.coders[number]
        pos, value = int(coder.pos[place]), share * coder.value[place]
        ids = coder.feature[place : place + 1]
        return {site: (pos, value * coder.rows(site, ids)[0].to(value)) for site in (coder.site, *coder.later)}

    def _random_row(self, node: int) -> dict[Site, tuple[int, Tensor]]:
        number, _ = self._active(node)
        coder = self._run.coders[number]
        other = torch.tensor([int(self._random.integers(coder.basis.d_sae))])
        found = {}
        for site, (pos, written) in self._written(node, -1.0).items():
            row = coder.rows(site, other)[0].to(written)
            found[site] = pos, -row * written.norm() / row.norm().clamp_min(1e-30)
        return found

    def _outcome(self, changes: Changes) -> np.ndarray:
        """Absolute changes of the outputs, weighted over them."""
        directions, weights = self._outputs.directions, self._outputs.weights
        model, clean, parts = self._run.model, None, []
        for start in progress.track(range(0, len(changes), _ROWS), description="removing features", unit="runs"):
            some = changes[start : start + _ROWS]
            with Hooks() as on:
                attach(on, adding(self._run, [{}, *some]))
                last = model.capture(_copies(self._run.batch, 1 + len(some)), ["final_norm"], positions=Last())
            read = precise(last["final_norm"]).to(directions) @ directions.T
            clean = read[:1] if clean is None else clean
            parts.append((read[1:] - read[:1]).abs().double().cpu() @ weights)
        return torch.cat(parts).numpy()


def adding(run: Replacement, changes: Changes) -> list[tuple[Point, Fn]]:
    """Hooks that add the changes, a row of the batch each."""

    def add(site: Site, x: Tensor) -> Tensor:
        x = x.clone()
        flat = x.flatten(2)
        for row, change in enumerate(changes):
            if site in change:
                pos, vector = change[site]
                flat[row, pos] += vector.to(flat)
        return flat.reshape(x.shape)

    sites = {site for change in changes for site in change}
    return [(run.model.site_map[site], functools.partial(add, site)) for site in sites]


def _copies(batch: TokenBatch, n: int) -> TokenBatch:
    return TokenBatch(batch.ids.repeat(n, 1), batch.mask.repeat(n, 1))


class Frozen:
    """The model itself, run with everything held fast that the replacement model holds fast."""

    def __init__(self, run: Replacement) -> None:
        self._run = run
        self._given: dict[tuple[int, int], Tensor] = {}

    def moved(self, changes: Changes, reads: Sequence[Site]) -> dict[Site, Float[Tensor, "rows pos d"]]:
        """By how much each site moves, before what a coder writes there is put back."""
        run, n = self._run, 1 + len(changes)
        seen: dict[Site, Tensor] = {}
        with Hooks() as on:
            for module, hook in (*self._norms(), *self._branches()):
                on.add(module, hook)
            attach(on, [*self._inside(), *self._sites(seen, [{}, *changes], reads)])
            last = Site("resid_post", run.model.n_layers - 1)
            seen.setdefault(last, run.model.capture(_copies(run.batch, n), [last]).flat(last))
        return {site: precise(seen[site][1:]) - precise(seen[site][:1]) for site in reads}

    def _norms(self) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        def linear(at: FrozenAt, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return at.sum_of(args[0]).to(output)

        def scaled(end: Output, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return (precise(args[0]) * end.gain * end.scale).to(output)

        run = self._run
        norms = [a.values.norm for a in run.attention.values()] + [m.branches[0].into.norm for m in run.mlp.values()]
        # one norm may stand before several of these, as in parallel blocks
        for module, at in {at.of.module: at for at in (*norms, *run.norms.values())}.items():
            if module is not None:
                yield module, functools.partial(linear, at)
        for kind, maps in (("attn_out", run.attention), ("mlp_out", run.mlp)):
            for layer, part in maps.items():
                if part.output.norm:
                    point = run.model.site_map[Site(kind, layer)]
                    yield point.module, functools.partial(scaled, part.output)

    def _branches(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Notes what the projections of each MLP give."""

        def note(
            layer: int, number: int, columns: slice | Tensor | None, _m: nn.Module, _a: object, output: Tensor
        ) -> None:
            self._given[layer, number] = output if columns is None else output[..., columns]

        for layer, mlp in self._run.mlp.items():
            for number, branch in enumerate(mlp.branches):
                yield branch.module, functools.partial(note, layer, number, branch.columns)

    def _inside(self) -> Iterator[tuple[Point, Fn]]:
        """Patterns as they were, and hidden neurons by their shares."""
        run = self._run

        def pattern(kept: Tensor, x: Tensor) -> Tensor:
            return kept.expand_as(x).to(x).clone()

        def neurons(layer: int, x: Tensor) -> Tensor:
            parts = [branch.factor * self._given[layer, i] for i, branch in enumerate(run.mlp[layer].branches)]
            return sum(parts[1:], parts[0]).to(x)

        for layer, attention in run.attention.items():
            yield run.model.site_map[Site("pattern", layer)], functools.partial(pattern, attention.pattern)
        for layer in run.mlp:
            yield run.model.site_map[Site("mlp_post", layer)], functools.partial(neurons, layer)

    def _sites(self, seen: dict[Site, Tensor], changes: Changes, reads: Sequence[Site]) -> Iterator[tuple[Point, Fn]]:
        """Notes what is read; puts back what coders and MLPs that are not followed wrote, with the changes."""
        run = self._run
        held = {*run.written, *(site for site in run.columns.sites)}

        def at(site: Site, x: Tensor) -> Tensor | None:
            flat = x.flatten(2)
            seen[site] = flat.clone()
            if site not in held:
                return None
            new = run.acts[site].to(flat).expand_as(flat).clone()
            for there, matrix in run.written[site].skips if site in run.written else ():
                passed = (precise(seen[there]) - precise(run.acts[there])) @ matrix.T
                if not run.first:
                    passed[:, 0] = 0
                new = new + passed.to(new)
            for row, change in enumerate(changes):
                if site in change:
                    pos, vector = change[site]
                    new[row, pos] += vector.to(new)
            return new.reshape(x.shape)

        skipped = {there for written in run.written.values() for there, _ in written.skips}
        for site in sorted({*held, *reads, *skipped}, key=lambda site: site.order):
            yield run.model.site_map[site], functools.partial(at, site)
