"""Segments of many sites from one recorded run."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.segment import Segment, Stretch
from workbench.models.wrapped import Wrapped


def stretches(
    model: Wrapped, batch: TokenBatch, wanted: Sequence[Stretch], *, last: bool | int = False
) -> list[Segment]:
    """A segment for each stretch. Those inside the blocks share one recorded run and one check that it is reproduced.

    Args:
        model: the model.
        batch: what runs.
        wanted: where each starts, where it leads, and what stays as recorded between.
        last: as in `Segment`.

    Raises:
        UnknownSiteError: for a site that this model does not have.
        InvalidInputError: if a site does not reach its end.
    """
    sites = model.site_map
    inside = [stretch for stretch in wanted if sites[stretch[0]].site.layer is not None]
    if len(inside) < 2:  # nothing to share  # noqa: PLR2004
        return [Segment(model, batch, site, to, last=last, hold=hold) for site, to, hold in wanted]
    start = Site("resid_pre", min(sites[site].site.layer or 0 for site, _, _ in inside))
    ends = dict.fromkeys(end for site, to, hold in inside for end in (*to, *hold))
    whole = Segment(model, batch, start, list(ends), last=last)
    found = iter(whole.stretches(inside))
    return [
        Segment(model, batch, site, to, last=last, hold=hold) if sites[site].site.layer is None else next(found)
        for site, to, hold in wanted
    ]
