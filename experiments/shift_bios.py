"""SHIFT on biographies in which gender goes with the profession: one SAE against several, easy and hard professions."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from circuits.shift.biographies import BiographyOptions, biographies
from experiments.shift_grid import Cell, GridStudy
from experiments.shift_task import read_saes
from workbench.cli import main_of


@dataclass(frozen=True, kw_only=True)
class ShiftBios(GridStudy):
    """Remove gender from probes of professions.

    With the last SAE by itself, where effects are exact, and with all at once, for pairs of professions.

    Example: python -m experiments.shift_bios --sae saes
    """

    run_name, step = "shift-bios", "overview"

    pairs: tuple[str, ...] = ("professor/nurse", "attorney/journalist")
    """Pairs of professions."""
    sites: tuple[str, ...] = ()
    """Sites of SAEs; by default all that --sae names."""
    each: bool = False
    """Also a study of every other site by itself."""
    train_rows: int = 120
    """Biographies in the ambiguous set, and in the balanced one."""
    test_rows: int = 200
    """Biographies in the test set."""
    judge: str = "statistics"
    """Who calls a feature spurious."""

    def cells(self) -> list[Cell]:
        sites = self.sites or tuple(read_saes(self.sae, self.runs_folder()))
        chosen: list[tuple[str, tuple[str, ...]]] = [(site, (site,)) for site in (sites if self.each else sites[-1:])]
        if len(sites) > 1:
            chosen.append((f"{len(sites)} sites", sites))
        cells = []
        for pair in self.pairs:
            professions = tuple(pair.split("/"))
            task = biographies(
                BiographyOptions(
                    professions=professions, n_train=self.train_rows, n_test=self.test_rows, seed=self.seed
                )
            )  # fmt: skip
            for name, of_cell in chosen:
                step = f"{pair}-{name}".replace("/", "-").replace(" ", "-").replace(".", "-")
                title = f"{' or '.join(professions)}, {name}"
                cells.append(Cell(name=step, title=title, task=task, judge=self.judge, sites=of_cell))
        return cells

    def about(self) -> tuple[str, str]:
        return (
            "SHIFT on biographies",
            "Generated biographies. In training the professions are of one gender each; in the test all groups are "
            "equally large, with names, templates and phrases that training does not have.",
        )


if __name__ == "__main__":
    sys.exit(main_of(ShiftBios, "python -m experiments.shift_bios"))
