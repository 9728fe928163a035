"""The option that names the bases of a circuit: a folder of SAEs, or bases that need no training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.core.errors import InvalidInputError, MissingFileError

if TYPE_CHECKING:
    from circuits.graph.circuit import Circuit
    from workbench.bases.base import Basis
    from workbench.features import CardSet
    from workbench.models.model import Model

KINDS = {"neurons": ("attn_out", "mlp_out", "resid_post"), "mlp_hidden": ("mlp_out",), "heads": ("attn_out",)}
"""Bases that need no training, with the sites that they are at unless others are named."""
LAYERS = 4
"""Layers of these sites."""


@dataclass(frozen=True, kw_only=True)
class BasesOptions:
    """Which bases a circuit is made of."""

    bases: str = "neurons"
    """Folder of one SAE per site, or neurons, mlp_hidden, heads."""
    sites: tuple[str, ...] = ()
    """Sites or kinds; by default those of the folder, or of four layers."""

    def make_bases(self, model: Model) -> dict[str, Basis]:
        """The bases by their sites.

        Raises:
            InvalidInputError: for a name that is no basis, or sites that the folder does not hold.
            MissingFileError: if there is no such folder.
        """
        from circuits.decomposition import bases
        from circuits.saes.folder import saes_in
        from circuits.saes.training import spread_layers

        if self.bases in KINDS:
            kinds = KINDS[self.bases]
            chosen = self.sites or [f"{k}.{layer}" for layer in spread_layers(model.n_layers, LAYERS) for k in kinds]
            return bases(model, {str(site): self.bases for site in model.site_map.named(chosen)})
        if not Path(self.bases).is_dir():
            raise MissingFileError(
                f"--bases {self.bases}: there is no such folder. Give one of `workbench circuit saes`, or one of "
                f"{', '.join(KINDS)}."
            )
        held = saes_in(self.bases)
        wanted = [str(site) for site in model.site_map.named(self.sites)] if self.sites else list(held)
        if missing := [site for site in wanted if site not in held]:
            raise InvalidInputError(
                f"--sites {missing[0]}: {self.bases} has SAEs at {', '.join(held)}. Choose among these."
            )
        return bases(model, {site: held[site] for site in wanted})

    def cards(self, circuit: Circuit) -> dict[str, CardSet]:
        """The feature cards that lie with the SAEs of a circuit's sites, by site; none for bases without training."""
        from circuits.saes.folder import saes_in
        from workbench.features.cards.cardset import CARDS_FILE, CardSet
        from workbench.saes.home import SAEHome

        if self.bases in KINDS:
            return {}
        there, sites = saes_in(self.bases), {site for site, _, _ in circuit.nodes()}
        homes = {site: SAEHome(folder) for site, folder in there.items() if site in sites}
        return {s: CardSet.load(home.cards) for s, home in homes.items() if (home.cards / CARDS_FILE).is_file()}
