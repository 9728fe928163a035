"""Directional ablation at every place that writes to the residual stream."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import UnknownSiteError
from workbench.hooks.sites import Site, SiteMap
from workbench.interventions.intervention import Edit, Intervention
from workbench.interventions.ops import ProjectOut
from workbench.interventions.scopes import All


@checked
def ablate_everywhere(sites: SiteMap, directions: Float[Tensor, "*k d_model"]) -> Intervention:
    """Keeps the residual stream free of a direction or a subspace, from the embedding to the last block.

    It is projected out of the input of every block and out of everything that a sublayer adds. Where no norm stands
    between sublayer and stream, this equals an edit of the weights, which `Model.export` makes.

    Args:
        sites: of the model, `model.site_map`.
        directions: one `(d_model,)` or several `(k, d_model)`; only their span counts.

    Raises:
        UnknownSiteError: if the model lacks one of the sites.

    Source: Arditi et al. 2024 (arXiv:2406.11717), section 2.4, "directional ablation".
    """
    op = ProjectOut(directions)
    chosen = [Site(kind, layer) for layer in range(sites.n_layers) for kind in ("resid_pre", "attn_out", "mlp_out")]
    missing = [site for site in chosen if site not in sites.points]
    if missing:
        raise UnknownSiteError(
            f"ablate_everywhere needs {missing[0]}, which this model lacks: {sites.missing.get(missing[0], 'unknown')}."
        )
    return Intervention(tuple(Edit(site, op, All()) for site in chosen))
