"""The hidden neurons of an MLP, with what each writes to the stream."""

from __future__ import annotations

from workbench.bases.fits import ModelLike
from workbench.bases.registry import BASES
from workbench.bases.written import Written, written_by
from workbench.hooks.sites import Site


@BASES.register("mlp_hidden")
def mlp_hidden(model: ModelLike, site: Site) -> Written:
    """Reads `mlp_post`, writes `mlp_out` by the rows of the down projection; the error is rounding.

    Args:
        model: the model.
        site: `mlp_post` or `mlp_out` of a layer.
    """
    return written_by(model, site, ("mlp_post", "mlp_out"), "mlp_hidden")
