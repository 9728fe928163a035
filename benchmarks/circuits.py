"""Effects of nodes and edges of the embedded model: `circuits` beside the published procedure with spliced SAEs.

    python benchmarks/circuits.py
    python benchmarks/circuits.py --sentences 2 --d-sae 512 --layers 27 28 --only nodes edges

Both run in one process on the same pairs and the same dictionaries, and must agree before a ratio is printed. The
procedure is the oracle of the tests (tests/circuits/oracle.py): per site N forward and backward passes of the whole
model with the features as leaves, per pair of sites one forward pass, and per later node one backward pass. It costs
the same at every site, so it runs on some sites and some nodes, and its time is scaled to all of them.

Last, the peak of memory on top of model and dictionaries, for two sizes of dictionary.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

# This file has the name of the package that it measures, which the root of the repository holds.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import circuits  # noqa: E402
from circuits.graph.circuit import ERROR  # noqa: E402
from tests.circuits.oracle import Oracle, Part, points_of  # noqa: E402, TID251  # the peer is the oracle of the tests
from workbench.bases.base import Basis  # noqa: E402
from workbench.models.loading import load_model  # noqa: E402
from workbench.models.model import Model  # noqa: E402

TOLERANCE = 1e-5
STEPS, K = 10, 32
NODES_RATIO, EDGES_RATIO, SECONDS = 10.0, 20.0, 120.0
METRIC = circuits.logit_difference()
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What both sides are given."""

    model: Model
    pairs: circuits.Pairs
    bases: dict[str, Basis]
    options: argparse.Namespace

    @property
    def sites(self) -> list[str]:
        return list(self.bases)

    def oracle(self, sites: Sequence[str]) -> Oracle:
        answers = self.pairs.answers
        rows = torch.arange(len(answers))
        return Oracle(
            self.model, [part_of(self.bases[site], site) for site in sites], self.pairs.clean, self.pairs.patch,
            lambda logits: logits[rows, answers[:, 1]] - logits[rows, answers[:, 0]], self.pairs.clean.mask,
        )  # fmt: skip


def part_of(basis: Basis, site: str) -> Part:
    """Random directions of which each token uses the `K` that it is most along."""
    rows = basis.rows()

    def encode(x: Tensor) -> Tensor:
        top = (x @ rows.T).topk(K, dim=-1)
        return x.new_zeros(*x.shape[:-1], len(rows)).scatter(-1, top.indices, top.values.relu())

    return Part(site, rows, encode, torch.zeros_like)


def timed(fn: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = fn()
    return time.perf_counter() - start, found


def require_alike(what: str, found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    off = float((found - wanted).abs().max() / wanted.abs().max())
    if not off <= TOLERANCE:
        raise SystemExit(f"{what}: the two differ by {off:.1e} of the largest; no ratio is printed")
    return off


def said(name: str, fast: float, slow: float, target: float, how: str, off: float) -> None:
    ratio = slow / fast
    print(
        f"{name}: {fast:.2f} s, spliced {slow:.1f} s ({how}); ratio {ratio:.1f}, "
        f"{'' if ratio >= target else 'BELOW '}target {target:g}; largest difference {off:.1e}"
    )


def spread(items: Sequence[T], n: int) -> list[T]:
    """So many of the items, evenly, the first and the last among them."""
    steps = max(1, n - 1)
    return list(dict.fromkeys(items[round(i * (len(items) - 1) / steps)] for i in range(n)))


def nodes(work: Work) -> None:
    """Effects of all nodes at all sites by integrated gradients; the oracle on a few sites."""
    few = spread(work.sites, work.options.oracle_sites)

    def fast() -> circuits.NodeEffects:
        return circuits.node_effects(
            work.model, work.bases, work.pairs, METRIC, steps=STEPS, aggregation="none", measured=False
        )

    seconds, effects = timed(fast)
    assert isinstance(effects, circuits.NodeEffects)
    slow, off, spent = work.oracle(few), 0.0, 0.0
    changes = slow.changes("patch")
    for site in few:
        took, slopes = timed(lambda site=site: slow.integrated(site, points_of("midpoint", STEPS), "patch"))
        spent += took
        assert isinstance(slopes, tuple)
        wanted = torch.cat([slopes[0] * changes[site][0], (slopes[1] * changes[site][1]).sum(-1, keepdim=True)], -1)
        own, found = effects[site], torch.zeros_like(wanted)
        found[own.example, own.pos, own.feature] = own.value  # the error is the last column, as ERROR is -1
        off = max(off, require_alike(f"nodes at {site}", found, wanted))
    how = f"{len(few)} sites in {spent:.1f} s, scaled to {len(work.sites)}"
    said("nodes", seconds, spent / len(few) * len(work.sites), NODES_RATIO, how, off)
    if not work.options.layers and len(work.pairs) == 8:
        print(f"nodes of all sites, 8 sentences: {'' if seconds < SECONDS else 'ABOVE '}target {SECONDS:g} s")


def edges(work: Work) -> None:
    """Edges between the strongest nodes; the oracle on a few pairs of sites, scaled by backward passes."""
    model, bases, pairs = work.model, work.bases, work.pairs
    effects = circuits.node_effects(model, bases, pairs, METRIC, method="atp", aggregation="none", measured=False)
    circuit = effects.circuit(n=work.options.nodes)
    seconds, found = timed(lambda: circuits.edge_effects(model, bases, pairs, METRIC, circuit))
    assert isinstance(found, circuits.Edges)
    passes = {key: len(table.downstream) for key, table in found.tables.items()}
    busy = sorted((key for key, n in passes.items() if n and len(found.tables[key].upstream)), key=work_order(work))
    some = spread(busy, work.options.oracle_pairs)
    spent, done, off = 0.0, 0, 0.0
    slow = work.oracle(work.sites)
    slow.changes("patch")  # both states, once
    gradients = slow.gradients()
    for up, down in some:
        table = found.tables[up, down]
        left, later = gradients[down], [(int(p), int(f)) for p, f in table.downstream]
        took, values = timed(lambda: slow.edges(up, down, left, later, "patch"))  # noqa: B023
        spent, done = spent + took, done + len(later)
        assert isinstance(values, tuple)
        wanted = torch.cat([values[0], values[1][..., None]], -1).mean(1)[:, table.upstream[:, 0], table.upstream[:, 1]]
        off = max(off, require_alike(f"edges from {up} to {down}", table.effect.T.to(wanted), wanted))
    total = sum(n for key, n in passes.items() if key in busy)
    errors = sum(feature == ERROR for _, _, feature in circuit.nodes())
    how = f"{done} backward passes of {len(some)} pairs of sites in {spent:.1f} s, scaled to {total} of {len(busy)}"
    said(
        f"edges between {circuit.n} nodes, {errors} of them errors",
        seconds,
        spent / done * total,
        EDGES_RATIO,
        how,
        off,
    )


def work_order(work: Work) -> Callable[[tuple[str, str]], tuple[int, int]]:
    place = {site: i for i, site in enumerate(work.sites)}
    return lambda key: (place[key[1]], place[key[0]])


def memory(work: Work) -> None:
    """The peak of the resident set on top of model and dictionaries, in a second run. Linux only."""
    for d_sae in (work.options.d_sae, 8 * work.options.d_sae):
        site = work.sites[len(work.sites) // 2]
        bases = circuits.random(work.model, [site], d_sae=d_sae, k=K)

        def run(bases: dict[str, Basis] = bases) -> None:
            effects = circuits.node_effects(work.model, bases, work.pairs, METRIC, steps=STEPS, measured=False)
            effects.circuit(n=50)

        run()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the high-water mark again
        before = status("VmRSS")
        run()
        print(f"memory: {d_sae} features at {site}: {max(0.0, status('VmHWM') - before):.0f} MiB on top at the peak")


def status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:"))


PARTS: dict[str, Callable[[Work], None]] = {"nodes": nodes, "edges": edges, "memory": memory}
"""What is measured, by name; each part is a function of the same work."""


def main() -> None:
    """Time all and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sentences", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=2304, help="features per site")
    parser.add_argument("--layers", type=int, nargs="+", help="by default all")
    parser.add_argument("--nodes", type=int, default=200, help="nodes between which edges are computed")
    parser.add_argument("--oracle-sites", type=int, default=3, help="sites for the spliced procedure")
    parser.add_argument("--oracle-pairs", type=int, default=4, help="pairs of sites for the spliced procedure")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    model = load_model(options.model, dtype="float32", check=False)
    layers = range(model.n_layers) if options.layers is None else options.layers
    sites = [f"{kind}.{i}" for i in layers for kind in ("attn_out", "mlp_out", "resid_post")]
    pairs = circuits.behaviours.pairs("sva_nounpp", model, n=options.sentences)
    bases = circuits.random(model, sites, d_sae=options.d_sae, k=K)
    work = Work(model, pairs, {site: bases[site] for site in sites}, options)
    print(
        f"{model.name}, {torch.get_num_threads()} threads, fp32; {len(pairs)} pairs of {pairs.length} tokens, "
        f"{len(sites)} sites with {options.d_sae} features, {STEPS} midpoints"
    )
    for name in options.only:
        PARTS[name](work)


if __name__ == "__main__":
    main()
