"""The published procedure, written plainly: the dictionary is spliced into the model, and autograd does the rest.

Shares no code with `circuits`. A dictionary splits an activation into `coefficients @ rows + rest`; the rest holds the
constant of the decoder and the error. Features and rest are leaves of the graph where effects are wanted (Marks et al.
2025, arXiv 2403.19647, sections 3.1 and A.1 to A.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Fn = Callable[[Tensor], Tensor | None]
Nodes = tuple[Tensor, Tensor]
"""Values of the features, `(batch, pos, f)`, and of the rest, `(batch, pos, d)`."""


@dataclass(frozen=True, eq=False)
class Part:
    """A dictionary at a site of a model; `read` is where it encodes, which differs from `site` for a transcoder."""

    site: str
    rows: Tensor
    coefficients: Callable[[Tensor], Tensor]
    constant: Callable[[Tensor], Tensor]
    read: str = ""

    def split(self, x: Tensor, read: Tensor) -> Nodes:
        f = self.coefficients(read)
        return f, x - f @ self.rows


def part_of(sae: Any, site: str, read: str = "") -> Part:
    """An SAE or transcoder of sae_lens; coefficients are in the units of the activation."""
    rescales = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    rows = sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True) if rescales else sae.W_dec

    def size(x: Tensor) -> Tensor:
        kind = sae.cfg.normalize_activations
        if kind == "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x.std(-1, keepdim=True) if kind == "layer_norm" else torch.ones_like(x[..., :1])

    def constant(x: Tensor) -> Tensor:
        skip = getattr(sae, "W_skip", None)
        return sae.decode(torch.zeros_like(sae.encode(x))) + (0 if skip is None else x @ skip.T)

    return Part(site, rows, lambda x: sae.encode(x) * size(x), constant, read)


@contextlib.contextmanager
def hooked(model: Any, edits: Sequence[tuple[str, Fn]]) -> Iterator[None]:
    """Forward hooks on the modules of the sites; what a function returns is written, None is not."""
    handles = []
    for site, fn in edits:
        point = model.site_map[site]

        def before(_m: Any, args: tuple[Any, ...], fn: Fn = fn) -> tuple[Any, ...] | None:
            new = fn(args[0])
            return None if new is None else (new, *args[1:])

        def after(_m: Any, _a: Any, out: Any, fn: Fn = fn) -> Any:
            new = fn(out[0] if isinstance(out, tuple) else out)
            return new if new is None or not isinstance(out, tuple) else (new, *out[1:])

        is_input = point.side == "in"
        handles.append(
            point.module.register_forward_pre_hook(before) if is_input else point.module.register_forward_hook(after)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Oracle:
    """Prompts padded on the left, a metric of the logits of the last token, and dictionaries in forward order.

    `metric` takes logits `(batch, d_vocab)` to a number per row; `keep` says which tokens are patched.
    """

    def __init__(self, model: Any, parts: Sequence[Part], clean: Any, patch: Any, metric: Fn, keep: Tensor) -> None:
        self.model, self.parts, self.metric, self.keep = model, {p.site: p for p in parts}, metric, keep
        self.clean, self.patch = clean, patch
        self.seen: dict[str, Tensor] = {}
        self.states: dict[str, dict[str, Nodes]] = {}

    def run(self, edits: Sequence[tuple[str, Fn]] = (), batch: Any = None) -> Tensor:
        """The metric of each row; activations at every site are left in `seen`."""
        batch = self.clean if batch is None else batch
        sites = list(dict.fromkeys(s for p in self.parts.values() for s in (p.read, p.site) if s))
        notes = [(site, lambda x, site=site: self.seen.__setitem__(site, x)) for site in sites]
        positions = (batch.mask.long().cumsum(1) - 1).clamp_min(0)
        first = [note for note in notes if note[0] not in dict(edits)]
        with hooked(self.model, [*first, *edits]):
            out = self.model.hf(
                input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=positions, use_cache=False
            )
        found = self.metric(out.logits[:, -1])
        assert found is not None
        return found

    def state(self, baseline: str = "") -> dict[str, Nodes]:
        """Features and rest of every part, clean or patched, without gradient."""
        if baseline in self.states:
            return self.states[baseline]
        with torch.no_grad():
            self.run(batch=self.patch if baseline == "patch" else None)
            found = {}
            for site, p in self.parts.items():
                x, read = self.seen[site], self.seen[p.read or site]
                f, rest = p.split(x, read)
                if baseline.startswith("zero"):
                    f, rest = torch.zeros_like(f), p.constant(read) if baseline == "zero" else rest
                found[site] = f.detach(), rest.detach()
        return self.states.setdefault(baseline, found)

    def changes(self, baseline: str) -> dict[str, Nodes]:
        clean, there, keep = self.state(), self.state(baseline), self.keep[..., None]
        return {s: tuple((b - a) * keep for a, b in zip(clean[s], there[s], strict=True)) for s in clean}  # type: ignore[misc]

    def gradients(self, how: str = "pass through") -> dict[str, Nodes]:
        """Gradients of the metric with every dictionary spliced in at once.

        "pass through": the rest is a constant, and the gradient of what is written goes to the model's own activation.
        "no pass through" leaves that out, and "no stop" lets the gradient into the rest too.
        """
        leaves: dict[str, Nodes] = {}

        def splice(p: Part, x: Tensor) -> Tensor:
            f, rest = p.split(x, x if not p.read else self.seen[p.read])
            if how == "pass through":
                f = f.detach().requires_grad_(True)
            if how != "no stop":
                rest = rest.detach().requires_grad_(True)
            leaves[p.site] = f, rest
            return f @ p.rows + rest + (x - x.detach() if how == "pass through" else 0)

        def start(x: Tensor) -> Tensor:
            return x.detach().requires_grad_(True)

        first = next(iter(self.parts))
        edits = [(first, start), *((s, lambda x, p=p: splice(p, x)) for s, p in self.parts.items())]
        with torch.enable_grad():
            flat = (
                [leaf for site in self.parts for leaf in leaves[site]] if (value := self.run(edits)) is not None else []
            )
            grads = iter(torch.autograd.grad(value.sum(), flat, allow_unused=True))
        return {
            site: tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(pair, grads, strict=False))  # type: ignore[misc]
            for site, pair in leaves.items()
        }

    def integrated(self, site: str, points: Sequence[tuple[float, float]], baseline: str) -> Nodes:
        """Mean gradient on the way, features and rest moving together, one forward and backward per point."""
        p, (f, rest), (df, drest) = self.parts[site], self.state()[site], self.changes(baseline)[site]
        total = torch.zeros_like(f), torch.zeros_like(rest)
        for share, weight in points:
            leaves = (f + share * df).requires_grad_(True), (rest + share * drest).requires_grad_(True)
            with torch.enable_grad():
                value = self.run([(site, lambda _x, leaves=leaves: leaves[0] @ p.rows + leaves[1])])
                for sums, grad in zip(total, torch.autograd.grad(value.sum(), leaves), strict=True):
                    sums.add_(weight * grad)
        return total

    def edges(
        self, up: str, down: str, left: Nodes, nodes: Sequence[tuple[int, int]], baseline: str
    ) -> tuple[Tensor, Tensor]:
        """Edges into some nodes (position, feature; -1 is the error), by one backward each: the features', the errors'.

        Every site between the two that has a dictionary is held. Results are (nodes, batch, pos, f) and (nodes, batch,
        pos).
        """
        a, b, (f, rest), (df, drest) = self.parts[up], self.parts[down], self.state()[up], self.changes(baseline)[up]
        order = list(self.parts)
        held = order[order.index(up) + 1 : order.index(down)]
        leaves = f.clone().requires_grad_(True), rest.clone().requires_grad_(True)
        edits: list[tuple[str, Fn]] = [(site, lambda x: x.detach()) for site in held]
        reads = dict.fromkeys(site for site in (b.read, down) if site)
        edits += [
            (site, lambda x, site=site: self.seen.__setitem__(site, x)) for site in reads if site not in (up, *held)
        ]
        features, errors = [], []
        with torch.enable_grad():
            self.run([(up, lambda _x: leaves[0] @ a.rows + leaves[1]), *edits])
            there, rest_there = b.split(self.seen[down], self.seen[b.read or down])
            for pos, j in nodes:
                value = (
                    (left[1][:, pos] * rest_there[:, pos]).sum()
                    if j < 0
                    else (left[0][:, pos, j] * there[:, pos, j]).sum()
                )
                grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
                g, e = (torch.zeros_like(x) if y is None else y for x, y in zip(leaves, grads, strict=True))
                features.append(g * df)
                errors.append((e * drest).sum(-1))
        return torch.stack(features), torch.stack(errors)


def points_of(rule: str, n: int) -> list[tuple[float, float]]:
    """Shares of the way and weights: both ends for the trapezoid, the roots of Legendre's polynomial for Gauss."""
    if rule == "trapezoid":
        return [(k / n, (1 if 0 < k < n else 0.5) / n) for k in range(n + 1)]
    if rule == "gauss":
        known = {2: [(0.5 - 3**-0.5 / 2, 0.5), (0.5 + 3**-0.5 / 2, 0.5)],
                 3: [(0.5 - 0.6**0.5 / 2, 5 / 18), (0.5, 4 / 9), (0.5 + 0.6**0.5 / 2, 5 / 18)]}  # fmt: skip
        return known[n]
    first: Mapping[str, float] = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
    return [((k + first[rule]) / n, 1 / n) for k in range(n)]
