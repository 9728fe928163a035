"""Reading activations: named sites only, no further than the last one needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.core.errors import DegenerateInputError, EditError, UnknownSiteError, did_you_mean
from workbench.hooks.attach import Fn, attached
from workbench.hooks.handles import refuse_compiled
from workbench.hooks.sites import Point, Site, SiteMap, flattened

EAGER_NOTE = "attention ran in eager mode for this call, which pattern needs"


class Activations(Mapping[str, Tensor]):
    """Captured activations by site; accepts `resid_post.10`, a `Site`, or a TransformerLens name.

    Without a choice of positions, tensors have the canonical shape of their site: `(batch, pos, d)`; `(batch, pos,
    heads, d_head)` for q, k, v and z; `(batch, heads, q_pos, k_pos)` for pattern. With a choice, they are
    `(tokens, width)` in row order.

    Attributes:
        rows: batch row of each token, if positions were chosen.
        positions: absolute position of each token in its row, if positions were chosen.
        note: what was different from an ordinary forward pass, in words.
    """

    def __init__(
        self,
        tensors: Mapping[Site, Tensor],
        *,
        n_layers: int | None = None,
        rows: Int[Tensor, " tokens"] | None = None,
        positions: Int[Tensor, " tokens"] | None = None,
        note: str = "",
    ) -> None:
        self._tensors, self._n_layers = dict(tensors), n_layers
        self.rows, self.positions, self.note = rows, positions, note

    def __getitem__(self, site: str | Site) -> Float[Tensor, "batch ..."]:
        parsed = self._resolve(site)
        if parsed not in self._tensors:
            raise UnknownSiteError(f"Site {parsed} was not captured. {did_you_mean(str(parsed), self)}")
        return self._tensors[parsed]

    def flat(self, site: str | Site) -> Float[Tensor, "*batch_pos width"]:
        """One vector per token: heads side by side; for `pattern`, `n_heads * k_pos` wide."""
        x = self[site]
        return x if self.rows is not None else flattened(Site.parse(site), x)

    def __contains__(self, site: object) -> bool:
        return isinstance(site, str | Site) and self._resolve(site) in self._tensors

    def _resolve(self, site: str | Site) -> Site:
        """The site with its layer counted from the start."""
        parsed = Site.parse(site)
        if self._n_layers is None or parsed.layer is None or not -self._n_layers <= parsed.layer < 0:
            return parsed
        return replace(parsed, layer=parsed.layer + self._n_layers)

    def __iter__(self) -> Iterator[str]:
        return map(str, self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{s}: {tuple(t.shape)}" for s, t in self._tensors.items())
        return f"Activations({shapes}" + (f"; {self.note})" if self.note else ")")


class _AllCaptured(Exception):
    """Raised by the last hook needed; the rest of the forward pass is not computed."""


def _kept(point: Point, x: Tensor, chosen: Tensor | None, grad: bool) -> tuple[Tensor, Tensor | None]:
    """What is captured, and for gradients an equal tensor for the model that is computed from what is captured.

    Where nothing before requires gradients, as in a model with frozen weights, what is captured begins the graph.
    """
    if grad and not x.requires_grad:
        x = x.detach().requires_grad_(True)
        if chosen is None:
            return x, x
    if chosen is None:
        kept = x.view_as(x) if grad else x
        return kept, kept if grad else None
    flat, chosen = point.flat(x), chosen.to(x.device)
    kept = flat[chosen]
    if not grad:
        return kept, None
    rest = flat.clone()
    rest[chosen] = kept
    return kept, point.unflat(rest, x)


def capture(
    hf: nn.Module,
    sites: SiteMap,
    inputs: Mapping[str, object],
    wanted: Sequence[str | Site],
    *,
    grad: bool = False,
    chosen: Bool[Tensor, "batch pos"] | None = None,
) -> Activations:
    """Activations at `wanted` sites from one forward pass that stops after the last of them.

    `chosen` limits what is held in memory to some tokens; each tensor is then `(tokens, width)`. With `grad` the
    autograd graph is kept, and what comes later in the model depends on the captured tensors.

    The tensors are on the device of the inputs, wherever their block is; with `grad` they stay where they are.

    Raises:
        UnknownSiteError: if a site does not exist in this model, or with `grad` has no gradient.
        EditError: if a hook did not fire.
    """
    if not wanted:
        raise DegenerateInputError("capture(sites=[]): name at least one site, such as resid_post.0.")
    points: list[Point] = list(dict.fromkeys(sites[site] for site in wanted))
    if grad:
        sites.require_gradient(point.site for point in points)
    refuse_compiled(hf, points)
    captured: dict[Site, Tensor] = {}
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))

    def read(point: Point) -> Fn:
        def fn(x: Tensor) -> Tensor | None:
            kept, written = _kept(point, x, chosen, grad)
            captured[point.site] = kept if grad else kept.detach().to(device)
            if len(captured) == len(points):
                raise _AllCaptured
            return written

        return fn

    hooks = [(point, read(point)) for point in points]
    with torch.set_grad_enabled(grad), attached(hooks), contextlib.suppress(_AllCaptured):
        hf(**{"use_cache": False, **inputs})
    silent = [str(point.site) for point in points if point.site not in captured]
    if silent:
        raise EditError(f"Nothing was captured at {', '.join(silent)}: the model never ran that module.")
    note = EAGER_NOTE if any(point.side == "inside" for point in points) else ""
    rows = None if chosen is None else chosen.nonzero()[:, 0]
    return Activations({p.site: captured[p.site] for p in points}, n_layers=sites.n_layers, rows=rows, note=note)
