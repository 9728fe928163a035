"""A census: every token of the vocabulary is asked for, so that the recall of a ranking is measured, not guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workbench.core.arguments import checked
from workbench.core.jsontext import Json, Record
from workbench.core.numbers import number, sample_size, setting
from workbench.core.records import save_json, to_jsonable
from workbench.core.stats import Estimate, clopper_pearson
from workbench.glitch.counting.plan import NO_TEST, CensusPlan, prober_of, ranking
from workbench.glitch.counting.sampling import Stratum, by_rank, recall, tally, total
from workbench.glitch.reporting import TokenReport, meanings, measured, rate, sentences, shown
from workbench.glitch.scanning.result import write_table
from workbench.glitch.verification.verify import VERDICTS, VERIFIED, verdict
from workbench.glitch.vocabulary.tokenizer import CATEGORIES
from workbench.models.model import Model
from workbench.report.base import Block, Headline, Histogram, Metric, Says, Table, Text

if TYPE_CHECKING:
    import pandas as pd

USUAL_SHARE = 0.02
"""The share of a ranking that is usually tested and nothing else."""
_ROWS = 60


def run_census(model: Model, plan: CensusPlan, folder: Path | None = None) -> CensusReport:
    """Tests the planned tokens with the model in the plan's dtype; what the folder holds is not run again.

    Results are kept in the folder, batch after batch; None keeps them in memory.

    Raises:
        InvalidInputError: if the model is not in the plan's dtype.
        MismatchError: if the folder holds results of another model, dtype or prompt.
    """
    prober = prober_of(model, plan, folder)
    prober.best_probabilities(plan.ids)
    return CensusReport(model.name, model.fingerprint, plan, prober.short, prober.best)


@dataclass(frozen=True, eq=False)
class CensusReport(TokenReport):
    """Result of `run_census`. `frame` has every token; `save` writes the tables. Arrays are indexed by token id.

    Attributes:
        short: probability of the token in the short prompt; nan where it was not tested.
        best: highest probability over all prompts; equal to `short` for a token that did not fail it.
    """

    _title = "Census of {self.model}"

    model: str
    fingerprint: str
    plan: CensusPlan
    short: np.ndarray
    best: np.ndarray

    @property
    def tested(self) -> np.ndarray:
        """Whether the token was tested."""
        return ~np.isnan(self.best)

    @property
    def glitch(self) -> np.ndarray:
        """Whether the token is a glitch token: below the threshold in every prompt."""
        return self.best < VERIFIED

    @property
    def unconfirmed(self) -> np.ndarray:
        """Whether the token failed the short prompt and the others have not been run: it is not known what it is."""
        return ~np.isnan(self.short) & np.isnan(self.best)

    @property
    def is_complete(self) -> bool:
        """Whether every token was tested."""
        return bool(self.tested[~np.isin(self.plan.scan.table.category, NO_TEST)].all())

    @checked
    def strata(self, probabilities: np.ndarray | None = None) -> tuple[Stratum, ...]:
        """Counts by rank of the ordinary tokens, from the most suspicious on."""
        ids = by_rank(ranking(self.plan.scan), self.plan.options.shares)
        return tally(ids, self.best if probabilities is None else probabilities, VERIFIED)

    @property
    def n_glitch(self) -> int:
        """Glitch tokens among the tested ones, of every category."""
        return int(self.glitch.sum())

    @property
    def can_rank(self) -> bool:
        """Whether recall has a value: there is a ranking, and each part of it has tested tokens, settled at random."""
        return self._is_settled and all(s.tested for s in self.strata())

    @property
    def _is_settled(self) -> bool:
        return self.plan.scan.indicator is not None and not self.unconfirmed.any()

    def total(self) -> Estimate:
        """Number of glitch tokens among all ordinary tokens; exact after a full census."""
        return total(self.strata())

    @checked
    def recall_at(self, share: float, probabilities: np.ndarray | None = None) -> Estimate:
        """Share of all ordinary glitch tokens that the first share of the ranking holds, one of the shares asked for.

        `probabilities` replace the highest over all prompts, such as by `short`.

        Raises:
            DegenerateInputError: without a ranking, without glitch tokens, or if a part of the ranking was not tested.
        """
        strata = self.strata(probabilities)
        return recall(strata, _n_strata(strata, share))

    def control(self) -> Estimate | None:
        """Share of glitch tokens in the less suspicious half of the ranking: what the ranking misses, or test errors.

        None without a ranking.
        """
        if not self._is_settled:
            return None
        ranked = ranking(self.plan.scan)
        late = ranked[len(ranked) // 2 :]
        return rate(self.glitch[late][self.tested[late]].tolist(), "tokens")

    def frame(self) -> pd.DataFrame:
        """One row per id, the most suspicious first, as a pandas table; `max_prob` is nan where a token was not run."""
        frame = self.plan.scan.frame()
        ids = frame["token_id"].to_numpy()
        frame["max_prob"], frame["short_prob"] = self.best[ids], self.short[ids]
        frame["verdict"] = list(map(self._verdict, ids.tolist()))
        frame["glitch"] = self.glitch[ids]
        frame["role"] = np.where(self.tested[ids], "census", "")
        return frame

    def _verdict(self, i: int) -> str:
        return verdict(float(self.best[i])) if self.tested[i] else "untested"

    @checked
    def save(self, folder: Path) -> Path:
        """Writes tokens.csv, glitch.json (both as a scan writes them) and census.json; returns the first's path."""
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / "glitch.json", self.plan.scan.to_json())
        save_json(folder / "census.json", self.to_json())
        return write_table(self.frame(), folder / "tokens.csv")

    def to_json(self) -> dict[str, Json]:
        """Everything except the table of all tokens: the glitch tokens are here."""
        strata = self.strata() if self.plan.scan.indicator else ()
        return to_jsonable({
            "model": self.model, "fingerprint": self.fingerprint, "dtype": self.plan.dtype,
            "prompts": self.plan.prompts, "complete": self.is_complete, "strata": strata,
            "metrics": self.metrics(), "findings": list(self.findings()),
            "glitch": [self.row(int(i)) for i in np.flatnonzero(self.glitch)],
        })  # fmt: skip

    @checked
    def row(self, i: int) -> Record:
        """One token as plain values."""
        table = self.plan.scan.table
        return {
            "token_id": i, "token": table.token[i], "category": table.category[i],
            "indicator": float(table.indicator[i]), "short_prob": float(self.short[i]),
            "max_prob": float(self.best[i]), "verdict": self._verdict(i),
        }  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers of the census."""
        recalls = self.plan.options.shares if self._has_recall else ()
        return measured({
            "n_tested": int(self.tested.sum()), "n_glitch": self.n_glitch,
            "n_failed_short": int((self.short < VERIFIED).sum()), "dtype": self.plan.dtype.dtype,
            "n_glitch_ordinary": self.total() if self.can_rank else None,
            **{f"recall_at_{setting(share)}": self.recall_at(share) for share in recalls},
            "glitch_rate_in_less_suspicious_half": self.control(),
        })  # fmt: skip

    @property
    def _has_recall(self) -> bool:
        return self.can_rank and any(s.glitch for s in self.strata())

    def headline(self) -> Headline:
        """Recall of the ranking beside that of a random order."""
        if not self._has_recall:
            return Headline(sentence="Recall of the ranking has no value: see which tokens were tested.")
        table, row = self._recalls(), setting(self._usual_share)
        return Headline.read(
            Says(
                "The ranking by weights finds more of the glitch tokens than a random order of tokens does.",
                "The ranking by weights finds no more of the glitch tokens than a random order of tokens does.",
                "The ranking by weights finds fewer of the glitch tokens than a random order of tokens does.",
            ),
            value=(table, row, "recall"), control=(table, row, "recall of a random order"),
            measure=f"recall of the first {row} of the ranking", control_name="random order",
        )  # fmt: skip

    @property
    def _usual_share(self) -> float:
        return min(self.plan.options.shares, key=lambda share: abs(share - USUAL_SHARE))

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences, with what is not known."""
        return sentences(self._what_ran(), self._what_was_found(), *self._what_ranking_finds(), self._what_is_open())

    def _what_ran(self) -> str:
        plan, n = self.plan, int(self.tested.sum())
        more = f", then {len(plan.confirm)} others for those that fail" if plan.confirm else ""
        return (
            f"{number(n)} tokens of {self.model} tested with one short prompt ({plan.n_own} positions each{more}). "
            f"Computed in {plan.dtype.why}."
        )

    def _what_was_found(self) -> str:
        failed, table = self.short < VERIFIED, self.plan.scan.table
        kinds = Counter(table.category[int(i)] for i in np.flatnonzero(self.glitch))
        listed = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in kinds.most_common()) or "none"
        said = f"{self.n_glitch} are glitch tokens, p < {VERIFIED} in every prompt: {listed}."
        if failed.any() and self.plan.confirm:
            share = clopper_pearson(self.n_glitch, int(failed.sum()), unit="tokens that fail")
            said += f" Of those that fail the short prompt, the others confirm {share}."
        return said

    def _what_ranking_finds(self) -> list[str]:
        scan = self.plan.scan
        if scan.indicator is None:
            return [f"No recall of a ranking, because {scan.indicator_why}."]
        if self.unconfirmed.any():
            return []
        if not self._has_recall:
            return ["Recall has no value: no glitch token among the ordinary tokens tested, or too few tested."]
        share, control = self._usual_share, self.control()
        return [
            f"Recall of the first share of {setting(share)} by {scan.indicator}: {self.recall_at(share)}; a "
            "random order "
            f"would find {setting(share)}. Glitch tokens among ordinary tokens: {self.total()}.",
            "" if control is None else
            f"In the less suspicious half of the ranking {control} are glitch tokens: an upper bound on the test's "
            "error rate, since some of them are real.",
        ]  # fmt: skip

    def _what_is_open(self) -> str:
        if n := int(self.unconfirmed.sum()):
            return (
                f"{number(n)} tokens failed the short prompt and were not confirmed; nothing is estimated without them."
            )
        if self.is_complete:
            return "Every token was tested: the counts are exact for this model, these prompts and this dtype."
        table, untested = self.plan.scan.table, ~self.tested
        left, plain = int((~np.isin(table.category, NO_TEST) & untested).sum()), table.ordinary & untested
        return (
            f"{number(left)} tokens were not tested, {number(int(plain.sum()))} of them ordinary. Within each part of "
            "the ranking those were left out at random, so totals and recall of ordinary tokens are estimates."
        )

    def _blocks(self) -> Iterator[Block]:
        yield self._categories()
        if self.can_rank:
            yield self._recalls()
            yield self._listed()
        p = self.short[self.tested]
        yield Histogram(
            "log10 p of the token in the short prompt", tuple(np.log10(np.maximum(p, 1e-12)).tolist()),
            x_label="log10 p", bins=60, caption=(
                f"{sample_size(len(p), 'tokens')}; glitch tokens lie below {setting(np.log10(VERIFIED))}"
            ),
        )  # fmt: skip
        yield Text(f"Verdicts: {meanings(VERDICTS)}.")

    def _categories(self) -> Table:
        category, failed = np.asarray(self.plan.scan.table.category), self.short < VERIFIED
        rows = []
        for name, means in CATEGORIES.items():
            here = (category == name) & self.tested
            if here.any():
                counts = (int((here & which).sum()) for which in (here, failed, self.glitch))
                rows.append((name, *counts, means))
        columns = ("category", "tested", "fail the short prompt", "glitch tokens", "meaning")
        return Table(columns, tuple(rows), caption="Tokens by category")

    def _recalls(self) -> Table:
        strata, shorts = self.strata(), self.strata(self.short)
        any_glitch, any_short = (any(s.glitch for s in part) for part in (strata, shorts))
        rows = []
        for share in self.plan.options.shares:
            first = strata[: _n_strata(strata, share)]
            here = Stratum(*(sum(getattr(s, count) for s in first) for count in ("size", "tested", "glitch")))
            rows.append((
                setting(share), here.size, here.tested, here.glitch,
                clopper_pearson(here.glitch, here.tested) if here.is_complete and here.tested else None,
                self.recall_at(share) if any_glitch else None,
                self.recall_at(share, self.short) if any_short else None, share,
            ))  # fmt: skip
        columns = (
            "first of the ranking", "tokens", "tested", "glitch tokens", "precision", "recall",
            "recall of tokens that fail the short prompt", "recall of a random order",
        )  # fmt: skip
        return Table(columns, tuple(rows), caption=f"What testing the first tokens by {self.plan.scan.indicator} finds")

    def _listed(self) -> Table:
        ranked = ranking(self.plan.scan)
        places = np.flatnonzero(self.glitch[ranked])[::-1].tolist()
        tokens = [(place, self.row(int(ranked[place]))) for place in places[:_ROWS]]
        rows = tuple(
            (t["token_id"], shown(t["token"]), (place + 1) / len(ranked), t["indicator"], t["short_prob"],
             t["max_prob"], t["verdict"])
            for place, t in tokens
        )  # fmt: skip
        columns = ("id", "token", "place in the ranking", "indicator", "p, short prompt", "highest p", "verdict")
        caption = f"{len(rows)} of {len(places)} ordinary glitch tokens, those that the ranking finds last in front"
        return Table(columns, rows, caption=caption)


def _n_strata(strata: tuple[Stratum, ...], share: float) -> int:
    """Number of strata that the first share of the ranking ends with."""
    ends = np.cumsum([s.size for s in strata])
    return int(np.searchsorted(ends, round(share * ends[-1]), "right"))
