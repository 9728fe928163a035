"""A census in words, tables and files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.core.records import save_json, to_jsonable
from workbench.core.stats import Estimate, clopper_pearson
from workbench.glitch.counting.census_result import NO_TEST, CensusResult, ranking
from workbench.glitch.counting.sampling import Stratum, recall, total
from workbench.glitch.scanning.result import shown, write_table
from workbench.glitch.verification.verify import VERDICTS, VERIFIED, verdict
from workbench.glitch.vocabulary.tokenizer import CATEGORIES
from workbench.report.base import Block, Histogram, Report, Section, Table, Text

USUAL = 0.02
"""The share of a ranking that is usually tested and nothing else."""
_ROWS = 60


@dataclass(frozen=True, eq=False)
class CensusReport(CensusResult, Report):
    """Result of `run_census`. `df` has every token; `save` writes the tables."""

    @property
    def n_glitch(self) -> int:
        """Glitch tokens among the tested ones, of every category."""
        return int(self.glitch.sum())

    @property
    def can_rank(self) -> bool:
        """Whether recall has a value: there is a ranking, and each part of it has tested tokens, settled at random."""
        if self.plan.scan.indicator is None or self.unconfirmed.any():
            return False
        return all(s.tested for s in self.strata())

    def total(self) -> Estimate:
        """Number of glitch tokens among all ordinary tokens; exact after a full census."""
        return total(self.strata())

    def recall_at(self, share: float, probabilities: np.ndarray | None = None) -> Estimate:
        """Share of all ordinary glitch tokens that the first share of the ranking holds, one of the shares asked for.

        `probabilities` replace the highest over all prompts, such as by `short`.

        Raises:
            DegenerateInputError: without a ranking, without glitch tokens, or if a part of the ranking was not tested.
        """
        strata = self.strata(probabilities)
        ends = np.cumsum([s.size for s in strata])
        return recall(strata, int(np.searchsorted(ends, round(share * ends[-1]), "right")))

    def control(self) -> Estimate | None:
        """Share of glitch tokens in the less suspicious half of the ranking: what the ranking misses, or test errors.

        None without a ranking.
        """
        if self.plan.scan.indicator is None or self.unconfirmed.any():
            return None
        ranked = ranking(self.plan.scan)
        late = ranked[len(ranked) // 2 :]
        n = int(self.tested[late].sum())
        return clopper_pearson(int(self.glitch[late].sum()), n, unit="tokens") if n else None

    @property
    def df(self) -> Any:
        """One row per id, the most suspicious first, as a pandas table; `max_prob` is nan where a token was not run."""
        frame = self.plan.scan.df
        ids = frame["token_id"].to_numpy()
        frame["max_prob"], frame["short_prob"] = self.best[ids], self.short[ids]
        frame["verdict"] = [verdict(p) if tested else "untested" for p, tested in self._by(ids)]
        frame["glitch"] = self.glitch[ids]
        frame["role"] = np.where(self.tested[ids], "census", "")
        return frame

    def _by(self, ids: np.ndarray) -> list[tuple[float, bool]]:
        return list(zip(self.best[ids].tolist(), self.tested[ids].tolist(), strict=True))

    def save(self, folder: Path) -> Path:
        """Writes tokens.csv, glitch.json (both as a scan writes them) and census.json; returns the first's path."""
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / "glitch.json", self.plan.scan.to_json())
        save_json(folder / "census.json", self.to_json())
        return write_table(self.df, folder / "tokens.csv")

    def to_json(self) -> dict[str, Any]:
        """Everything except the table of all tokens: the glitch tokens are here."""
        strata = self.strata() if self.plan.scan.indicator else ()
        return to_jsonable({
            "model": self.model, "fingerprint": self.fingerprint, "dtype": self.plan.dtype,
            "prompts": self.plan.prompts, "complete": self.is_complete, "strata": strata,
            "metrics": self.metrics(), "findings": list(self.findings()),
            "glitch": [self.row(int(i)) for i in np.flatnonzero(self.glitch)],
        })  # fmt: skip

    def row(self, i: int) -> dict[str, Any]:
        """One token as plain values."""
        table = self.plan.scan.table
        return {
            "token_id": i, "token": table.token[i], "category": table.category[i],
            "indicator": float(table.indicator[i]), "short_prob": float(self.short[i]),
            "max_prob": float(self.best[i]), "verdict": verdict(float(self.best[i])) if self.tested[i] else "untested",
        }  # fmt: skip

    def metrics(self) -> dict[str, Estimate | float | int | str]:
        """Flat numbers of the census."""
        found: dict[str, Estimate | float | int | str] = {
            "n_tested": int(self.tested.sum()), "n_glitch": self.n_glitch,
            "n_failed_short": int((self.short < VERIFIED).sum()), "dtype": self.plan.dtype.dtype,
        }  # fmt: skip
        if self.can_rank:
            found["n_glitch_ordinary"] = self.total()
            if any(s.glitch for s in self.strata()):
                found |= {f"recall_at_{share:g}": self.recall_at(share) for share in self.plan.options.shares}
        if (rate := self.control()) is not None:
            found["glitch_rate_in_less_suspicious_half"] = rate
        return found

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences, with what is not known."""
        return (self._what_ran(), self._what_was_found(), *self._what_ranking_finds(), *self._what_is_open())

    def _what_ran(self) -> str:
        plan, n = self.plan, int(self.tested.sum())
        more = f", then {len(plan.confirm)} others for those that fail" if plan.confirm else ""
        return (
            f"{n:,} tokens of {self.model} tested with one short prompt ({plan.n_own} positions each{more}). "
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
        if not self.can_rank or not any(s.glitch for s in self.strata()):
            return ["Recall has no value: no glitch token among the ordinary tokens tested, or too few tested."]
        share = min(self.plan.options.shares, key=lambda s: abs(s - USUAL))
        said = [
            f"Recall of the first {share:.1%} by {scan.indicator}: {self.recall_at(share)}; a random {share:.1%} would "
            f"find {share:.1%}. Glitch tokens among ordinary tokens: {self.total()}."
        ]
        rate = self.control()
        if rate is not None:
            said.append(
                f"In the less suspicious half of the ranking {rate} are glitch tokens: an upper bound on the test's "
                "error rate, since some of them are real."
            )
        return said

    def _what_is_open(self) -> list[str]:
        if self.unconfirmed.any():
            n = int(self.unconfirmed.sum())
            return [f"{n:,} tokens failed the short prompt and were not confirmed; nothing is estimated without them."]
        if self.is_complete:
            return ["Every token was tested: the counts are exact for this model, these prompts and this dtype."]
        table, untested = self.plan.scan.table, ~self.tested
        left, plain = int((~np.isin(np.asarray(table.category), NO_TEST) & untested).sum()), table.ordinary & untested
        return [
            f"{left:,} tokens were not tested, {int(plain.sum()):,} of them ordinary. Within each part of the ranking "
            "those were left out at random, so totals and recall of ordinary tokens are estimates."
        ]

    def section(self) -> Section:
        """Tables, histogram and findings."""
        blocks: list[Block] = [self._categories()]
        if self.can_rank:
            blocks += [self._recalls(), self._listed()]
        p = self.short[self.tested]
        blocks.append(
            Histogram(
                "log10 p of the token in the short prompt", tuple(np.log10(np.maximum(p, 1e-12)).tolist()),
                x_label="log10 p", bins=60, caption=f"n = {len(p):,}; glitch tokens lie below {np.log10(VERIFIED):g}",
            )
        )  # fmt: skip
        blocks.append(Text("Verdicts: " + "; ".join(f"{name}: {means}" for name, means in VERDICTS.items()) + "."))
        return Section(f"Census of {self.model}", tuple(blocks), findings=self.findings(), metrics=self.metrics())

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
        ends = np.cumsum([s.size for s in strata])
        some = {"all prompts": any(s.glitch for s in strata), "short": any(s.glitch for s in shorts)}
        rows = []
        for share in self.plan.options.shares:
            first = int(np.searchsorted(ends, round(share * ends[-1]), "right"))
            here = _together(strata[:first])
            rows.append((
                f"{share:.1%}", here.size, here.tested, here.glitch,
                clopper_pearson(here.glitch, here.tested) if here.is_complete and here.tested else None,
                self.recall_at(share) if some["all prompts"] else None,
                self.recall_at(share, self.short) if some["short"] else None, share,
            ))  # fmt: skip
        columns = (
            "first of the ranking", "tokens", "tested", "glitch tokens", "precision", "recall",
            "recall of tokens that fail the short prompt", "recall of a random order",
        )  # fmt: skip
        return Table(columns, tuple(rows), caption=f"What testing the first tokens by {self.plan.scan.indicator} finds")

    def _listed(self) -> Table:
        ranked, table = ranking(self.plan.scan), self.plan.scan.table
        place = {int(i): k for k, i in enumerate(ranked)}
        found = [int(i) for i in ranked[::-1] if self.glitch[i]]
        rows = tuple(
            (i, shown(table.token[i]), f"{(place[i] + 1) / len(ranked):.1%}", float(table.indicator[i]),
             float(self.short[i]), float(self.best[i]), verdict(float(self.best[i])))
            for i in found[:_ROWS]
        )  # fmt: skip
        columns = ("id", "token", "place in the ranking", "indicator", "p, short prompt", "highest p", "verdict")
        caption = f"{len(rows)} of {len(found)} ordinary glitch tokens, those that the ranking finds last in front"
        return Table(columns, rows, caption=caption)


def _together(strata: tuple[Stratum, ...]) -> Stratum:
    return Stratum(sum(s.size for s in strata), sum(s.tested for s in strata), sum(s.glitch for s in strata))
