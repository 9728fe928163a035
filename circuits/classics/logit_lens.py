"""The logit lens as a table: what each layer would say if the model ended there, beside another token's reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from circuits.classics.shared import single_token
from circuits.classics.tables import TableReport, plain
from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.display import clipped, visible
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.stats import Estimate, sample_mean
from workbench.core.tokens import TokenBatch
from workbench.features.lens import Lens, lens
from workbench.features.scores.logit_lens import IN_RESIDUAL, in_residual
from workbench.hooks.capture import Activations
from workbench.hooks.sites import Site
from workbench.interventions.scopes import Last
from workbench.models.model import Model
from workbench.models.wrapped import Batch
from workbench.report.base import Grid, Headline, Heat, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {
    "position": "pos", "top_token": "token_out", "top_id": "id_out", "next_rank": "target_rank",
    "next_logprob": "target_logprob", "kl": "kl_to_output",
}  # fmt: skip
_TOKENS_DRAWN, _ROWS_IN_REPORT = 24, 60


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogitLens(TableReport):
    """What the model's own end reads at each site, token by token.

    The target is the token that follows in the text; at the end of a prompt with an answer, the answer.

    Attributes:
        lens: the readings.
        control: the reading of another token's activation at the same site, with the same targets.
        patch: with pairs, the readings of the same tokens with the patch answer as target; None otherwise.
    """

    lens: Lens
    control: Lens
    patch: Lens | None = None

    def frame(self) -> pd.DataFrame:
        """One row per site, token and rank: the token that is read, and where the target stands."""
        frame = self.lens.frame().rename(columns=_NAMES)
        k = self.lens.ids.shape[2]
        frame["control_rank"] = self.control.next_rank.flatten().repeat_interleave(k).cpu().numpy()
        if self.patch is not None:
            other = self.patch.next_logprob.flatten().repeat_interleave(k).cpu().numpy()
            frame["logit_difference"] = frame["target_logprob"] - other
        return frame

    def headline(self) -> Headline:
        """In the middle of the model: the target's rank beside its rank in another token's reading."""
        says = Says(
            "In the middle of the model the lens already reads the target better than from another token.",
            "In the middle of the model the lens reads the target no better than from another token.",
            "In the middle of the model the lens reads the target worse than from another token.",
            "There is no target to read.",
        )
        return Headline.of(says, self._beside(), better="lower")

    def _beside(self) -> Table:
        i = len(self.lens.sites) // 2
        real, control = self._log_ranks(self.lens, i), self._log_ranks(self.control, i)
        if not len(real):
            return Table(("measured", "rank"), (("nothing", None),), "The number beside its control")
        measure, site = "log10 of 1 + rank of the target", str(self.lens.sites[i])
        return beside(
            measure, (site, _mean(real)), ("another token's activation", _mean(control)), _mean(real - control)
        )

    def _log_ranks(self, reading: Lens, site: int) -> np.ndarray:
        ranks = reading.next_rank[site].cpu().double().numpy()
        return np.log10(1 + ranks[ranks >= 0])

    def findings(self) -> tuple[str, ...]:
        """From which layer on the target leads."""
        first = [self._first(t) for t in range(len(self.lens.rows)) if int(self.lens.next_rank[-1, t]) == 0]
        n = int((self.lens.next_rank[-1] >= 0).sum())
        found = [f"The model itself puts the target first at {len(first)} of {n} tokens."]
        if first:
            middle = self.lens.sites[int(np.median(first))]
            found.append(f"There the lens puts it first from {middle} on, in the median, and at every later site.")
        return tuple(found)

    def _first(self, token: int) -> int:
        """The site from which on the target is first."""
        behind = (self.lens.next_rank[:, token] != 0).nonzero()
        return int(behind[-1]) + 1 if len(behind) else 0

    def section(self) -> Section:
        """Sites by tokens, with what is read in each cell."""
        frame = self.frame()
        top = frame[frame["rank"] == 0]
        columns = (
            "site",
            "pos",
            "token",
            "token_out",
            "logprob",
            "target_rank",
            "control_rank",
            "entropy",
            "kl_to_output",
        )
        rows = tuple(zip(*([plain(value) for value in top[name].tolist()] for name in columns), strict=True))
        last = tuple(reversed(rows))[:_ROWS_IN_REPORT]
        table = Table(columns, last, "Readings. The most probable token at each site and token, the last site first; "
                      "ranks count the tokens that are strictly more probable; entropy and KL in nats.")  # fmt: skip
        return Section("Logit lens", (self._picture(), self._beside(), table), self.findings(), {}, self.headline())

    def _picture(self) -> Heat:
        reading, tokenizer = self.lens, self.lens.batch.tokenizer
        here = (reading.rows == reading.rows[0]).nonzero()[-_TOKENS_DRAWN:, 0].tolist()
        frame = self.frame()
        top = np.array(frame["token_out"].tolist(), dtype=object)[:: reading.ids.shape[2]].reshape(
            len(reading.sites), -1
        )
        names = np.array(frame["token"].tolist(), dtype=object).reshape(len(reading.sites), len(reading.rows), -1)[
            0, :, 0
        ]
        order = range(len(reading.sites) - 1, -1, -1)
        grid = Grid(
            "" if tokenizer is None else "first prompt", tuple(str(reading.sites[s]) for s in order),
            tuple(_cell(str(names[t])) for t in here),
            tuple(tuple(float(reading.logprobs[s, t, 0].exp()) for t in here) for s in order),
            tuple(tuple(_cell(str(top[s, t])) for t in here) for s in order),
        )  # fmt: skip
        return Heat("What each layer would say", (grid,), "The most probable token, coloured by its probability.")


def _cell(text: str) -> str:
    """A token in a cell; one of spaces alone is shown by signs."""
    return clipped(visible(text if text.strip(" ") else "␣" * len(text)), 12)


def _mean(values: np.ndarray) -> Estimate:
    return sample_mean(values, unit="tokens")


@checked
def logit_lens(
    model: Model,
    text: Batch | Pairs,
    sites: Sequence[str] = ("resid_post",),
    *,
    k: int = 5,
    target: str | None = None,
    seed: int = 0,
) -> LogitLens:
    """What the model's final norm and unembedding read at each site; at the last `resid_post`, what the model says.

    Bias and soft cap are included. The control reads the target from the activation of another token at the same site:
    a frequent token ranks high there too.

    Args:
        model: the model.
        text: a text, texts or tokens; of pairs the last tokens of the clean prompts, with their answers as targets.
        sites: in the residual stream; the last `resid_post`, the model's output, is added.
        k: tokens per site and token.
        target: a single token that is looked for behind the texts.
        seed: of the choice of other tokens.

    Raises:
        InvalidInputError: if `target` is not one token, or is given for pairs, which have answers.
        MismatchError: for a site that is not in the residual stream.
        DegenerateInputError: for a single token, which no other can stand beside.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    answers: Int[Tensor, " batch"] | None = None
    if other := [str(site) for site in model.site_map.named(sites) if not in_residual(site)]:
        raise MismatchError(
            f"logit_lens(sites={list(sites)}): {', '.join(other)} can't be read, since the end of the model reads the "
            f"residual stream. Choose among {', '.join(IN_RESIDUAL)}."
        )
    sites = [*sites, "resid_post.-1"]  # the output, which every reading is compared with
    if isinstance(text, Pairs):
        if target is not None:
            raise InvalidInputError(f"logit_lens(target={target!r}): pairs have their answers. Leave it out.")
        acts, answers = model.capture(text.clean, sites, positions=Last()), text.answers[:, 0]
    else:
        acts = model.capture(text, sites)
        if target is not None:
            answers = torch.full((len(_tokens(acts)),), single_token(f"logit_lens(target={target!r})", model, target))
    n_tokens = _tokens(acts).n_tokens if acts.rows is None else len(acts.rows)
    if n_tokens < 2:
        raise DegenerateInputError("logit_lens: there is one token, and none to read beside it. Give a longer text.")
    control = lens(_shuffled(acts, seed), model, k=1, answers=answers)
    others = text.answers[:, 1] if isinstance(text, Pairs) and text.patch is not None else None
    patch = None if others is None else lens(acts, model, k=1, answers=others)
    return LogitLens(lens=lens(acts, model, k=k, answers=answers), control=control, patch=patch)


def _tokens(acts: Activations) -> TokenBatch:
    assert acts.tokens is not None
    return acts.tokens


def _shuffled(acts: Activations, seed: int) -> Activations:
    """The same sites, each token holding the activation of another one."""
    tokens = _tokens(acts)
    real = tokens.mask if acts.rows is None else torch.ones_like(acts.rows, dtype=torch.bool)
    n = int(real.sum())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # a cycle, so no token keeps its own
    moved: dict[Site, Tensor] = {}
    for site, x in acts.items():
        moved[Site.parse(site)] = x = x.clone()
        where = real.to(x.device)
        x[where] = x[where][other.to(x.device)]
    return Activations(moved, rows=acts.rows, positions=acts.positions, tokens=tokens)
