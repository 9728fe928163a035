"""Edges between the nodes of a circuit, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from circuits.doctor.report import DoctorReport, Examinable, attrs_of
from circuits.graph.circuit import ERROR
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeTable(OneLine):
    """Edges between the nodes of two sites.

    Attributes:
        upstream: nodes of the earlier site, `(n_up, 2)`: position (-1 for all) and feature.
        downstream: nodes of the later site, `(n_down, 2)`.
        effect: mean over pairs.
        se: standard error; NaN for one pair.
    """

    upstream: Int[Tensor, "n_up 2"]
    downstream: Int[Tensor, "n_down 2"]
    effect: Float[Tensor, "n_up n_down"]
    se: Float[Tensor, "n_up n_down"]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Edges(Examinable, Shown):
    """Edges between the nodes of a circuit.

    Attributes:
        tables: by upstream and downstream site.
        n: number of pairs.
        metric: what the edges are on.
        has_positions: whether nodes have positions.
        made: how, in words.
        doctor: what the attribution doctor found, where it was attached.
    """

    tables: Mapping[tuple[str, str], EdgeTable]
    n: int
    metric: str
    has_positions: bool
    made: str
    doctor: DoctorReport | None = None

    def frame(self, *, threshold: float = 0.0) -> pd.DataFrame:
        """One row per edge whose effect is larger than `threshold`, the strongest first.

        Columns upstream_site, upstream_pos (where kept), upstream_feature, the same for downstream, effect, se; a
        feature is "error" for what a basis leaves unexplained.
        """
        import pandas as pd

        frames = []
        for (above, below), table in self.tables.items():
            up, down = (table.effect.abs() > threshold).nonzero(as_tuple=True)
            columns: dict[str, object] = {}
            for side, site, nodes in (
                ("upstream", above, table.upstream[up]), ("downstream", below, table.downstream[down]),
            ):  # fmt: skip
                columns[f"{side}_site"] = [site] * len(nodes)
                columns[f"{side}_pos"] = nodes[:, 0].cpu().numpy()
                names = ["error" if f == ERROR else f for f in nodes[:, 1].tolist()]
                columns[f"{side}_feature"] = pd.Series(names, dtype=object)
            columns |= {name: getattr(table, name)[up, down].cpu().numpy() for name in ("effect", "se")}
            frames.append(pd.DataFrame(columns))
        if not frames:
            raise InvalidInputError(
                "These edges are between no two sites, so there is no table. Give bases at two sites."
            )
        frame = pd.concat(frames, ignore_index=True)
        if not self.has_positions:
            frame = frame.drop(columns=["upstream_pos", "downstream_pos"])
        frame = frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
        frame.attrs.update(attrs_of(self.doctor))
        return frame

    def __len__(self) -> int:
        return sum(int((table.effect != 0).sum()) for table in self.tables.values())

    def _shown_line(self) -> str:
        between = f"{counted(len(self), 'edges')} between {counted(len(self.tables), 'pairs')} of sites"
        return f"{between}, {self.metric}; attribution doctor: {self.verdict}"
