"""Reading activations: named sites only, no further than the last one needed."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.core.errors import DegenerateInputError, EditError, UnknownSiteError, did_you_mean
from workbench.core.html import Shown, table
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch, labelled
from workbench.hooks.attach import Fn, attached
from workbench.hooks.handles import refuse_compiled
from workbench.hooks.sites import Point, Site, SiteMap, flattened, spanned

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

EAGER_NOTE = "attention ran in eager mode for this call, which pattern needs"


class Activations(Shown, Mapping[str, Tensor]):
    """Captured activations by site; accepts `resid_post.10`, a `Site`, or a TransformerLens name.

    Without a choice of positions, tensors have the canonical shape of their site: `(batch, pos, d)`; `(batch, pos,
    heads, d_head)` for q, k, v and z; `(batch, heads, q_pos, k_pos)` for pattern. With a choice, they are
    `(tokens, width)` in row order.

    Attributes:
        rows: batch row of each token, if positions were chosen.
        positions: absolute position of each token in its row, if positions were chosen.
        note: what was different from an ordinary forward pass, in words.
        tokens: the batch that they belong to, if `Model.capture` made them.
    """

    how_to_use = "acts['resid_post.10'] is the tensor of one site."

    def __init__(
        self,
        tensors: Mapping[Site, Tensor],
        *,
        n_layers: int | None = None,
        rows: Int[Tensor, " tokens"] | None = None,
        positions: Int[Tensor, " tokens"] | None = None,
        note: str = "",
        tokens: TokenBatch | None = None,
    ) -> None:
        self._tensors, self._n_layers = dict(tensors), n_layers
        self.rows, self.positions, self.note, self.tokens = rows, positions, note, tokens
        self._model: weakref.ref[object] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_model": None}  # a file of activations holds no model

    @property
    def model(self) -> object:
        """The model that they were captured from, as long as it is there; None otherwise."""
        return None if self._model is None else self._model()

    def belong_to(self, model: object, tokens: TokenBatch, chosen: Bool[Tensor, "batch pos"] | None) -> None:
        """Notes the model and the batch that they were captured from, and which of its tokens were chosen."""
        self._model, self.tokens = weakref.ref(model), tokens
        self.positions = None if chosen is None else tokens.positions[chosen]

    def float(self) -> Activations:
        """The same activations in fp32."""
        tensors = {site: x.float() for site, x in self._tensors.items()}
        about = {"rows": self.rows, "positions": self.positions, "note": self.note, "tokens": self.tokens}
        same = Activations(tensors, n_layers=self._n_layers, **about)
        same._model = self._model
        return same

    def numpy(self) -> dict[str, np.ndarray]:
        """Arrays by site; those of bfloat16, which numpy lacks, in fp32."""
        kept = {site: x.float() if x.dtype == torch.bfloat16 else x for site, x in self._tensors.items()}
        return {str(site): x.detach().cpu().numpy() for site, x in kept.items()}

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

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def frame(self, site: str | Site | None = None) -> pd.DataFrame:
        """The activations at a site, one row per real token, labelled by the row of the batch.

        The columns are the token's position, its text where a tokenizer is known, and its fp32 values `x0`, `x1`, ...

        Args:
            site: which; may be left out where only one was captured.

        Raises:
            UnknownSiteError: if it was not captured, or if several were and none is named.
        """
        if site is None and len(self) != 1:
            raise UnknownSiteError(f"frame(): {len(self)} sites were captured. Name one: {', '.join(list(self)[:8])}.")
        x = self.flat(next(iter(self)) if site is None else site).detach().float()
        rows, positions, texts = self.rows, self.positions, self.tokens.str_tokens if self.tokens else ()
        if rows is None:
            real = self.tokens.mask.to(x.device) if self.tokens else torch.ones(x.shape[:2], dtype=torch.bool)
            rows, positions, x = real.nonzero()[:, 0], (real.cumsum(1) - 1)[real], x[real]
        places = list(zip(rows.tolist(), [0] * len(rows) if positions is None else positions.tolist(), strict=True))
        columns: dict[str, object] = {"position": [position for _, position in places]}
        if texts:
            columns["token"] = [texts[row][position] for row, position in places]
        columns |= {f"x{i}": values for i, values in enumerate(x.T.cpu().numpy())}
        return labelled(columns, self.tokens.index if self.tokens else None, rows.tolist())

    def _shown_line(self) -> str:
        shown = "; ".join(f"{names}: {', '.join(map(str, shapes))}" for names, shapes in self._kinds().items())
        return f"{shown}; {self.note}" if self.note else shown

    def _shown_note(self) -> str:
        return "; ".join(filter(None, [counted(len(self), "sites"), self.note]))

    def _shown_parts(self) -> Iterable[Markup]:
        rows = [(site, str(tuple(x.shape)), str(x.dtype).removeprefix("torch.")) for site, x in self.items()]
        yield table(("site", "shape", "dtype"), rows)

    def _kinds(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes by kind of site, with a range of layers: what fits on one line."""
        kinds: dict[Site, list[Site]] = {}
        for site in self._tensors:
            kinds.setdefault(replace(site, layer=None if site.layer is None else 0), []).append(site)
        return {
            str(first).replace(".0", f".{spanned(site.layer for site in sites)}", 1): list(
                dict.fromkeys(tuple(self._tensors[site].shape) for site in sites)
            )
            for first, sites in kinds.items()
        }


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
    points: list[Point] = [sites[site] for site in sites.named(wanted)]
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
