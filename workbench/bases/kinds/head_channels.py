"""The channels of attention heads, with what each writes to the stream."""

from __future__ import annotations

from workbench.bases.fits import ModelLike
from workbench.bases.registry import BASES
from workbench.bases.written import Written, written_by
from workbench.hooks.sites import Site


@BASES.register("head_channels")
def head_channels(model: ModelLike, site: Site) -> Written:
    """Reads `z`, writes `attn_out` by the rows of the output projection; the error is rounding.

    Args:
        model: the model.
        site: `z` or `attn_out` of a layer.
    """
    return written_by(model, site, ("z", "attn_out"), "head_channels")
