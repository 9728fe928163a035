"""How good the SAEs of several sites are, each beside principal directions and a limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from circuits.saes.folder import SiteSAE
from workbench.activations.store import ActivationStore
from workbench.bases.base import Basis
from workbench.bases.registry import build_basis
from workbench.core.metrics import squared_error
from workbench.core.numbers import counted, number
from workbench.core.stats import Estimate, sample_ratio
from workbench.models.model import Model
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

MEASURED_TOKENS, PCA_TOKENS = 8192, 32_768
"""Held-out tokens on which an SAE is measured, and training tokens to which principal directions are fitted."""
_ROWS_AT_ONCE = 1024
_SAYS = Says(
    "Every SAE meets the limit on unexplained variance.",
    "No SAE was measured.",
    "At some sites the SAE leaves out more than the limit: a circuit of bad SAEs is a picture of the errors.",
)


@dataclass(frozen=True, kw_only=True)
class TrainedSAEs(Report):
    """One SAE per site, with what each leaves out.

    Attributes:
        folder: holds a folder per SAE, the store and the index; `circuits.bases(model, folder)` takes it.
        saes: one per site, in the order of a forward pass.
        max_fvu: limit above which an SAE counts as bad.
    """

    how_to_make: ClassVar[str] = "circuits.train_saes(model, sites, folder) trains them."
    folder: Path
    saes: tuple[SiteSAE, ...]
    max_fvu: float

    @property
    def above(self) -> tuple[str, ...]:
        """The sites whose SAE is not clearly below the limit."""
        return tuple(sae.site for sae in self.saes if sae.fvu.high > self.max_fvu)

    def headline(self) -> Headline:
        """The worst SAE beside the limit."""
        return Headline.of(_SAYS, self._worst(), "at most")

    def _worst(self) -> Table:
        worst = max(self.saes, key=lambda sae: sae.fvu.high)
        return beside(
            "unexplained variance (FVU) of the worst site",
            (f"worst SAE, {worst.site}", worst.fvu),
            ("limit", self.max_fvu),
        )

    def findings(self) -> tuple[str, ...]:
        """The range over the sites, the sites above the limit by name, and those no better than PCA."""
        best, worst = (one(self.saes, key=lambda sae: sae.fvu.value) for one in (min, max))
        said = [
            f"Unexplained variance over {counted(len(self.saes), 'sites')}: {best.fvu} at {best.site} to {worst.fvu} "
            f"at {worst.site}."
        ]
        if self.above:
            said.append(
                f"Not below the limit of {number(self.max_fvu)}: {', '.join(self.above)}. There the error nodes "
                "carry much of a circuit; report it with and without them."
            )
        no_better = [sae.site for sae in self.saes if sae.fvu.high >= sae.pca.low]
        if no_better:
            said.append(f"Not clearly better than as many principal directions: {', '.join(no_better)}.")
        return tuple(said)

    def section(self) -> Section:
        """A bar and a row per site."""
        bars = Bars(
            "Unexplained variance by site", tuple(sae.site for sae in self.saes),
            tuple(sae.fvu for sae in self.saes), "FVU", reference=self.max_fvu,
            caption="Held-out tokens, 95 % intervals over packed rows. The line is the limit.",
        )  # fmt: skip
        table = Table.of(
            self.saes,
            {
                "site": "site", "FVU": "fvu", "FVU of PCA": "pca", "L0": "l0", "share of features silent": "dead",
                "held-out tokens": "n_tokens", "seconds of training": "seconds", "SAE": "folder",
            },
            "One SAE per site. FVU of PCA: of as many principal directions as the SAE has active features on a token.",
        )  # fmt: skip
        metrics: dict[str, Metric] = {f"{sae.site}.fvu": sae.fvu for sae in self.saes}
        metrics |= {f"{sae.site}.l0": sae.l0 for sae in self.saes} | {"sites_above_limit": len(self.above)}
        return Section("SAEs for circuits", (bars, table, self._worst()), self.findings(), metrics, self.headline())

    def frame(self) -> pd.DataFrame:
        """One row per site: FVU with its interval, FVU of PCA, L0, silent features, whether it is above the limit."""
        import pandas as pd

        rows = (
            {
                "site": sae.site, "fvu": sae.fvu.value, "fvu_low": sae.fvu.low, "fvu_high": sae.fvu.high,
                "fvu_pca": sae.pca.value, "l0": sae.l0, "dead": sae.dead, "n_tokens": sae.n_tokens,
                "is_above_limit": sae.site in self.above, "seconds": sae.seconds, "folder": sae.folder,
            }
            for sae in self.saes
        )  # fmt: skip
        return pd.DataFrame(list(rows))


@torch.no_grad()
def measured(
    model: Model, store: ActivationStore, basis: Basis, site: str, folder: str, training: dict[str, float]
) -> SiteSAE:
    """What a basis leaves out at a site, on the held-out rows of a store.

    Args:
        model: the model.
        store: its activations.
        basis: what is measured.
        site: where.
        folder: name of its folder.
        training: final numbers of its training.
    """
    x, rows = _held_out(store, site)
    active = sum(int((basis.encode(part) != 0).sum()) for part in x.split(_ROWS_AT_ONCE))
    k = min(max(1, round(active / len(x))), x.shape[1])
    pca = build_basis("pca", model, site, x=list(_some(store, site)), k=k)
    return SiteSAE(
        site=site, folder=folder, fvu=_fvu(basis, x, rows), pca=_fvu(pca, x, rows), l0=active / len(x),
        dead=training["dead"], n_tokens=len(x), seconds=training["seconds"],
    )  # fmt: skip


def _held_out(store: ActivationStore, site: str) -> tuple[Tensor, Tensor]:
    """Held-out activations and the packed row of each."""
    acts, rows, n = [], [], 0
    for block in store.blocks(site, "heldout"):
        acts.append(block.acts.float())
        rows.append(block.rows)
        n += len(block.rows)
        if n >= MEASURED_TOKENS:
            break
    return torch.cat(acts)[:MEASURED_TOKENS], torch.cat(rows)[:MEASURED_TOKENS]


def _some(store: ActivationStore, site: str) -> Iterator[Tensor]:
    left = PCA_TOKENS
    for x in store.read(site, "train"):
        yield x[:left].float()
        left -= len(x)
        if left <= 0:
            return


def _fvu(basis: Basis, x: Tensor, rows: Tensor) -> Estimate:
    error = torch.cat([squared_error(part, basis.reconstruct(part)) for part in x.split(_ROWS_AT_ONCE)])
    variance = squared_error(x, x.mean(0).expand(x.shape))
    _, row = rows.unique(return_inverse=True)
    by_row = (np.bincount(row.numpy(), weights=part.double().cpu().numpy()) for part in (error, variance))
    return sample_ratio(*by_row, unit="rows")
