"""Reading activations: named sites only, no further than the last one needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import DegenerateInputError, EditError, UnknownSiteError, did_you_mean
from workbench.hooks.attach import Fn, attached
from workbench.hooks.sites import Point, Site, SiteMap


class Activations(Mapping[str, Tensor]):
    """Captured activations by site; accepts `resid_post.10`, a `Site`, or a TransformerLens name."""

    def __init__(self, tensors: Mapping[Site, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, site: str | Site) -> Float[Tensor, "batch pos d"]:
        parsed = Site.parse(site)
        if parsed not in self._tensors:
            raise UnknownSiteError(f"Site {parsed} was not captured. {did_you_mean(str(parsed), self)}")
        return self._tensors[parsed]

    def __iter__(self) -> Iterator[str]:
        return map(str, self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return "Activations(" + ", ".join(f"{s}: {tuple(t.shape)}" for s, t in self._tensors.items()) + ")"


class _Enough(Exception):
    """Raised by the last hook needed; the rest of the forward pass is not computed."""


def capture(
    hf: nn.Module, sites: SiteMap, inputs: Mapping[str, Any], wanted: Sequence[str | Site], *, grad: bool = False
) -> Activations:
    """Activations at `wanted` sites from one forward pass that stops after the last of them.

    Args:
        hf: the Hugging Face model.
        sites: its site map.
        inputs: keyword arguments of the model, as made by `TokenBatch.hf`.
        wanted: the sites.
        grad: keep the autograd graph.

    Raises:
        UnknownSiteError: if a site does not exist in this model.
        EditError: if a hook did not fire.
    """
    if not wanted:
        raise DegenerateInputError("capture(sites=[]): name at least one site, such as resid_post.0.")
    points: list[Point] = [sites[site] for site in wanted]
    found: dict[Site, Tensor] = {}

    def read(point: Point) -> Fn:
        def fn(x: Tensor) -> None:
            found[point.site] = x if grad else x.detach()
            if len(found) == len(set(p.site for p in points)):
                raise _Enough

        return fn

    hooks = [(point, read(point)) for point in dict.fromkeys(points)]
    with torch.set_grad_enabled(grad), attached(hooks), contextlib.suppress(_Enough):
        hf(**{"use_cache": False, **inputs})
    silent = [str(point.site) for point in points if point.site not in found]
    if silent:
        raise EditError(f"Nothing was captured at {', '.join(silent)}: the model never ran that module.")
    return Activations(found)
