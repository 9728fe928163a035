"""What a lens reads, token by token and site by site, beside the readings of its controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import clipped, visible
from workbench.core.jsontext import Json
from workbench.core.progress import track
from workbench.core.stats import POSITIVE, SHARE, Estimate, sample_mean
from workbench.features.lens import Lens, lens
from workbench.features.lenses.places import target_of
from workbench.features.lenses.vectors import named_ids
from workbench.hooks.capture import Activations
from workbench.hooks.sites import Site
from workbench.interventions.scopes import Pos
from workbench.models.model import Model
from workbench.models.wrapped import Batch
from workbench.report.base import Grid, Headline, Heat, Lines, Metric, Report, Says, Section, Series, Table
from workbench.report.headline import DIFFERENCE

if TYPE_CHECKING:
    import pandas as pd

LensMap = Callable[[str, Tensor], Tensor]
"""From a site and activations there, `(n, d)`, to the coordinates of the last block's output."""

What = Literal["kl", "log_rank"]

LOGIT, HALF_A, HALF_B = "logit", "half A", "half B"
"""Names of controls."""
_NAMES = {
    "position": "pos", "top_token": "token_out", "top_id": "id_out", "next_rank": "target_rank",
    "next_logprob": "target_logprob", "kl": "kl_to_output",
}  # fmt: skip
_COLUMNS = ("layer", "site", "pos", "token", "lens", "rank", "token_out", "logprob", "target_rank", "entropy",
            "kl_to_output", "n_fit", "target_logprob", "id_out")  # fmt: skip
_TOKENS_DRAWN, _TOP = 24, 10


@checked
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LensReading(Report):
    """Readings of the same activations by a lens and by its controls.

    The target is the token that follows in the text; behind its end, the one that was asked for. Controls: the logit
    lens, further lenses that were named, the rows of the maps permuted, random maps of the same size, the map of a
    distant layer, the bias alone, and either half of the data.

    Attributes:
        lens: name of the lens; the others are its controls.
        readings: by name of the lens, the lens first.
        n_fit: tokens or prompts that each was fitted on.
    """

    lens: str
    readings: dict[str, Lens]
    n_fit: dict[str, int] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """One row per lens, site, token and rank.

        Columns: layer, site, pos, token, lens, rank (from 0), token_out, logprob, target_rank (tokens that are strictly
        more probable; -1 without a target), entropy, kl_to_output (nats), n_fit, target_logprob, id_out.
        """
        import pandas as pd

        parts = []
        for name, reading in self.readings.items():
            frame = reading.frame().rename(columns=_NAMES)
            frame["lens"], frame["n_fit"] = name, self.n_fit.get(name, 0)
            parts.append(frame[list(_COLUMNS)])
        return pd.concat(parts)

    def to_json(self) -> dict[str, Json]:
        """The rows of the table by site; what is not a number is null."""
        columns = self._site_columns()
        return {"lens": self.lens, "sites": [dict(zip(columns, row, strict=True)) for row in self._plain()]}

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where was read, without the output of the model."""
        return self.readings[self.lens].sites[:-1]

    def log_rank(self, name: str, site: int | None = None) -> Estimate | None:
        """Mean of log10(1 + rank of the target), at one site or over all; None without a target."""
        return self._estimate(self._log_ranks(name, site))

    def kl(self, name: str, site: int | None = None) -> Estimate | None:
        """Mean of KL(output || reading) in nats, at one site or over all."""
        return self._estimate(self._by_unit(self.readings[name].kl[:-1], site), POSITIVE)

    def difference(
        self, name: str, what: What = "kl", site: int | None = None, of: str | None = None
    ) -> Estimate | None:
        """The lens, or `of`, minus another, paired: below 0 it is closer to the output or the target (`log_rank`)."""
        values = [
            self._log_ranks(n, site) if what == "log_rank" else self._by_unit(self.readings[n].kl[:-1], site)
            for n in (of or self.lens, name)
        ]
        return self._estimate(values[0] - values[1])

    def half_overlap(self, site: int | None = None) -> Estimate | None:
        """Share of the ten most probable tokens of one half that the other has too; None without halves."""
        if HALF_A not in self.readings or HALF_B not in self.readings:
            return None
        a, b = (self.readings[name].ids[:-1, :, :_TOP] for name in (HALF_A, HALF_B))
        shared = (a[..., :, None] == b[..., None, :]).any(-1).double().mean(-1)
        return self._estimate(self._by_unit(shared, site), SHARE)

    def _log_ranks(self, name: str, site: int | None) -> np.ndarray:
        ranks = self.readings[name].next_rank[:-1].double()
        return self._by_unit(torch.where(ranks < 0, torch.nan, (1 + ranks).log10()), site)

    def _by_unit(self, values: Tensor, site: int | None) -> np.ndarray:
        """Means over sites, and over the tokens of a text where there are several texts; without nan."""
        each = (values if site is None else values[site : site + 1]).double().mean(0).cpu()
        rows = self.readings[self.lens].rows.cpu()
        there = ~each.isnan()
        if self._unit == "tokens":
            return each[there].numpy()
        return np.array([float(each[there & (rows == row)].mean()) for row in rows[there].unique().tolist()])

    @property
    def _unit(self) -> str:
        return "texts" if len(self.readings[self.lens].rows.unique()) > 1 else "tokens"

    def _estimate(self, values: np.ndarray, within: tuple[float, float] = (-math.inf, math.inf)) -> Estimate | None:
        kept = values[np.isfinite(values)]
        return sample_mean(kept.clip(*within), unit=self._unit, within=within) if len(kept) else None

    def headline(self) -> Headline:
        """How far the lens is from the model's output, beside the logit lens, over all sites."""
        if LOGIT not in self.readings or self.lens == LOGIT:
            says = Says("", "", "", "The logit lens reads the stream as it is; there is no other lens beside it.")
            return Headline.read(says, value=(self._beside(), self.lens, _KL))
        says = Says(
            f"Over all sites the {self.lens} lens is closer to the model's output than the logit lens.",
            f"Over all sites the {self.lens} lens is no better than the logit lens.",
            f"Over all sites the {self.lens} lens is further from the model's output than the logit lens.",
        )
        table = self._beside()
        return Headline.read(
            says, value=(table, self.lens, _KL), control=(table, LOGIT, _KL), difference=(table, LOGIT, _KL_LESS),
            difference_name="lens minus logit lens", better="lower",
        )  # fmt: skip

    def _beside(self) -> Table:
        rows = [
            (name, self.n_fit.get(name, 0) or None, self.log_rank(name), self.kl(name),
             None if name == self.lens else self.difference(name, "log_rank"),
             None if name == self.lens else self.difference(name))
            for name in self.readings
        ]  # fmt: skip
        columns = ("lens", "fitted on", _RANK, _KL, _RANK_LESS, _KL_LESS)
        caption = (
            "The lens beside its controls. Means over all sites; differences are paired, the lens minus the control, "
            "so below 0 the lens is better."
        )
        return Table(columns, tuple(rows), caption)

    def findings(self) -> tuple[str, ...]:
        """Where the lens is better than the logit lens, what its controls read, and how far its halves agree."""
        found = []
        if self.lens != LOGIT and LOGIT in self.readings:
            found.append(self.compared("kl", "closer to the output"))
            if self.log_rank(self.lens) is not None:
                found.append(self.compared("log_rank", "better at the target"))
        names = [name for name in self.readings if name not in (self.lens, LOGIT, HALF_A, HALF_B)]
        worse = [f"{name} {self.kl(name)}" for name in names]
        if worse:
            found.append(f"KL to the output in nats: {self.lens} {self.kl(self.lens)}; {'; '.join(worse)}.")
        overlap = self.half_overlap()
        if overlap is not None:
            found.append(f"Lenses of either half of the prompts share {overlap} of their {_TOP} most probable tokens.")
        return (*found, "A lens says what the end of the model would read, not what later layers use.")

    def against(self, name: str, what: What = "kl", of: str | None = None) -> tuple[int, int]:
        """At how many sites the lens, or `of`, is better than another, and at how many worse, by their intervals."""
        better = worse = 0
        for i in range(len(self.sites)):
            change = self.difference(name, what, i, of)
            if change is not None and change.n > 1 and change.excludes(0.0):
                better, worse = better + (change.high < 0), worse + (change.low > 0)
        return better, worse

    def compared(self, what: What, words: str, of: str | None = None) -> str:
        """How the lens, or `of`, compares with the logit lens, in words."""
        better, worse = self.against(LOGIT, what, of)
        n = len(self.sites)
        return (
            f"Against the logit lens the {of or self.lens} lens is {words} at {better} of {n} sites, worse at {worse}, "
            f"and no better at {n - better - worse}: there the interval of the difference holds 0."
        )

    def section(self) -> Section:
        """What is read where, the controls, curves over layers, and a row per site."""
        metrics: dict[str, Metric] = {}
        for name in self.readings:
            for what, value in (("kl", self.kl(name)), ("log rank", self.log_rank(name))):
                metrics |= {} if value is None else {f"{name}: {what}": value}
        blocks = (self.picture(), self.curves(), self._beside(), self.by_site())
        return Section(f"Reading by the {self.lens} lens", blocks, self.findings(), metrics, self.headline())

    def _site_columns(self) -> tuple[str, ...]:
        lenses = [name for name in self.readings if name not in (HALF_A, HALF_B)]
        return ("site", *(f"{name}: {what}" for name in lenses for what in ("KL", "log rank")))

    def by_site(self) -> Table:
        """KL and rank of each lens at each site."""
        caption = "Sites. KL to the output in nats, and log10 of 1 + rank of the target."
        return Table(self._site_columns(), tuple(self._by_site()), caption)

    def _by_site(self) -> list[tuple[str | Estimate | None, ...]]:
        lenses = [name for name in self.readings if name not in (HALF_A, HALF_B)]
        return [
            (str(site), *(value for name in lenses for value in (self.kl(name, i), self.log_rank(name, i))))
            for i, site in enumerate(self.sites)
        ]

    def _plain(self) -> list[tuple[str | float | None, ...]]:
        return [tuple(v.value if isinstance(v, Estimate) else v for v in row) for row in self._by_site()]

    def curves(self) -> Lines:
        """KL of each lens over the sites."""
        kinds = {site.kind for site in self.sites}
        x = tuple(i if len(kinds) > 1 else site.layer or 0 for i, site in enumerate(self.sites))
        label = "site, in the order of a forward pass" if len(kinds) > 1 else f"layer of {kinds.pop()}"
        series = []
        for name in self.readings:
            if name in (HALF_A, HALF_B):
                continue
            values = [self.kl(name, i) for i in range(len(x))]
            series.append(Series(name, x, tuple(float("nan") if v is None else v.value for v in values)))
        return Lines("KL to the output", tuple(series), label, "nats")

    def picture(self) -> Heat:
        """What is read at each site and token of the first text."""
        reading = self.readings[self.lens]
        here = (reading.rows == reading.rows[0]).nonzero()[-_TOKENS_DRAWN:, 0].tolist()
        frame = reading.frame()
        shape = (len(reading.sites), len(reading.rows), reading.ids.shape[2])
        tops, texts = (np.array(frame[c].tolist(), dtype=object).reshape(shape)[..., 0] for c in ("top_token", "token"))
        order = range(len(reading.sites) - 1, -1, -1)
        grid = Grid(
            "first text", tuple(str(reading.sites[s]) for s in order), tuple(_cell(texts[0, t]) for t in here),
            tuple(tuple(float(reading.logprobs[s, t, 0].exp()) for t in here) for s in order),
            tuple(tuple(_cell(tops[s, t]) for t in here) for s in order),
        )  # fmt: skip
        return Heat(
            f"What the {self.lens} lens reads", (grid,), "The most probable token, coloured by its probability."
        )


_RANK, _KL = "log10(1 + target rank)", "KL to the output, nats"
_RANK_LESS, _KL_LESS = f"{DIFFERENCE} of log ranks", f"{DIFFERENCE} of KL"


def _cell(text: str) -> str:
    return clipped(visible(text if text.strip(" ") else "␣" * len(text)), 12)


@torch.no_grad()
def read_with(
    model: Model,
    text: Batch,
    sites: Sequence[str],
    maps: Mapping[str, LensMap],
    *,
    positions: Sequence[int] | None = (-1,),
    k: int = 10,
    target: str | Int[Tensor, " rows"] | None = None,
    n_fit: Mapping[str, int] | None = None,
) -> LensReading:
    """Readings of the same activations by several lenses, the first of which the others are compared with.

    Raises:
        InvalidInputError: for a target that is not one token, or a position that a text does not have.
    """
    output = target_of(model)
    scope = None if positions is None else Pos(*positions)
    acts = model.capture(text, [*sites, output], positions=scope)
    assert acts.tokens is not None
    answers = target if isinstance(target, Tensor) else None
    if isinstance(target, str):
        (answer,) = named_ids(model, [target], "read")
        answers = torch.full((len(acts.tokens),), answer)
    readings = {
        name: lens(_mapped(acts, fn, output), model, k=k, answers=answers)
        for name, fn in track(maps.items(), description="Reading", unit="lenses")
    }
    return LensReading(lens=next(iter(maps)), readings=readings, n_fit=dict(n_fit or {}))


def _mapped(acts: Activations, apply: LensMap, output: str) -> Activations:
    """The activations as a lens maps them; the output stays."""

    def of(site: str, x: Tensor) -> Tensor:
        if site == output:
            return x
        return apply(site, x.flatten(0, -2)).reshape(x.shape)

    tensors = {Site.parse(site): of(site, acts[site]) for site in acts}
    return Activations(tensors, rows=acts.rows, positions=acts.positions, tokens=acts.tokens)
