"""What a repair did, as values, tables and sentences that intervals decide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workbench.core.errors import DegenerateInputError
from workbench.core.stats import Estimate, paired_difference
from workbench.glitch.repairing.repair import RepairOptions
from workbench.glitch.reporting import TokenReport, finite, first_few, measured, sentences, shown
from workbench.glitch.verification.scoring import VERIFIED
from workbench.report.base import Block, Metric, Table

MIN_TOKENS = 5
"""Fewer tokens than this allow no claim, whatever their interval is."""
ARMS = {
    "before": "not repaired",
    "repaired": "repaired",
    "shuffled": "with another token's sources (control)",
    "random": "with random sources (control)",
}


@dataclass(frozen=True, repr=False, kw_only=True)
class RepairReport(TokenReport):
    """A repair before and after, beside the same repair with the wrong sources.

    Attributes:
        copied: by arm, the highest probability with which each token was copied in any prompt.
        gap: by arm, nats by which the next token after each differs from that after its text spelled out; nan where
            nothing spells it.
        kept_before: probability with which each of them was copied before.
        loss: rise of the loss on plain text, nats per token, text by text.
        tolerance: what the upper end of its interval may not exceed.
    """

    model: str
    tied: bool
    options: RepairOptions
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    skipped: tuple[tuple[int, str], ...]
    copied: dict[str, tuple[float, ...]]
    gap: dict[str, tuple[float, ...]]
    control_ids: tuple[int, ...]
    kept_before: tuple[float, ...]
    kept_after: tuple[float, ...]
    loss: Estimate
    tolerance: float
    edits: tuple[str, ...]
    prompts: tuple[str, ...]
    seed: int

    def copying(self, against: str = "before") -> Estimate:
        """Copy probability with the repair minus that in another arm, token by token; positive means it helps."""
        return paired_difference(self.copied["repaired"], self.copied[against], unit="tokens", seed=self.seed)

    def reading(self, against: str = "before") -> Estimate | None:
        """The same for the gap to the spelled text, nats: negative means that it helps; None if nothing spells them."""
        pairs = zip(self.gap["repaired"], self.gap[against], strict=True)
        known = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        if not known:
            return None
        return paired_difference([a for a, _ in known], [b for _, b in known], unit="tokens", seed=self.seed)

    @property
    def controls(self) -> Estimate:
        """Copy probability of the tokens that were not repaired, with the repair on minus before."""
        return paired_difference(self.kept_after, self.kept_before, unit="control tokens", seed=self.seed)

    @property
    def guard(self) -> bool:
        """Whether plain text is as probable as before, by no more than `tolerance`."""
        return self.loss.high <= self.tolerance

    @property
    def helps_copying(self) -> bool:
        """Whether the tokens are copied with a higher probability: the interval lies above zero."""
        done = self.copying()
        return self.options.writing != "block" and done.n >= MIN_TOKENS and done.low > 0

    @property
    def helps_reading(self) -> bool:
        """Whether they are read more like their spelled text: the interval lies below zero."""
        done = self.reading()
        return done is not None and done.n >= MIN_TOKENS and done.high < 0

    @property
    def blocked(self) -> bool:
        """Whether tokens that must not be written are never written."""
        return self.options.writing == "block" and max(self.copied["repaired"]) < 1e-6

    @property
    def success(self) -> bool:
        """Whether it helps and costs nothing; never where plain text became less probable."""
        return self.guard and (self.helps_copying or self.helps_reading or self.blocked)

    def require(self) -> RepairReport:
        """Itself, if the repair is a success.

        Raises:
            DegenerateInputError: if it is not, with what was measured.
        """
        if self.success:
            return self
        raise DegenerateInputError(f"The repair is no success. {' '.join(self.findings())}")

    def findings(self) -> tuple[str, ...]:
        """The verdict first, then each measure beside its control."""
        skipped = first_few((f"{i}: {why}" for i, why in self.skipped), 6, "; ")
        left = f"{len(self.skipped)} tokens were left as they are ({skipped})." if self.skipped else ""
        return sentences(self._verdict(), self._copying(), self._reading(), self._cost(), left)

    def _verdict(self) -> str:
        kind = "tied" if self.tied else "untied"
        what = f"{len(self.ids)} tokens of {self.model} ({kind}), reading={self.options.reading}, "
        what += f"writing={self.options.writing}, from {self.options.sources}"
        if not self.guard:
            return (
                f"NO SUCCESS: plain text may have become less probable by {self.loss.high:.3g} nats per token; "
                f"{self.tolerance:g} is allowed ({what})."
            )
        if self.success:
            return f"The repair helps {' and '.join(self._helped())} ({what})."
        few = f", which are too few for a claim (at least {MIN_TOKENS})" if len(self.ids) < MIN_TOKENS else ""
        return f"No help shown on these tokens{few} ({what})."

    def _helped(self) -> Iterator[str]:
        any_row = ", as any row of its own would"
        if self.helps_copying:
            yield "copying" + ("" if all(self.copying(kind).low > 0 for kind in self._controls()) else any_row)
        if self.helps_reading:
            others = [self.reading(kind) for kind in self._controls()]
            yield "reading" + ("" if all(more is None or more.high < 0 for more in others) else any_row)
        if self.blocked:
            yield "blocking"

    def _copying(self) -> str:
        now = sum(p >= VERIFIED for p in self.copied["repaired"])
        was = sum(p >= VERIFIED for p in self.copied["before"])
        said = (
            f"Copying: {was} of {len(self.ids)} could be said before (p of at least {VERIFIED}), {now} now; "
            f"change of p {_with_n(self.copying())}."
        )
        for kind in self._controls():
            said += f" That is {_against(self.copying(kind), kind, 'less', 'more', 'more')}."
        return said

    def _reading(self) -> str:
        done = self.reading()
        if done is None:
            return "Reading: nothing spells these tokens, so there is nothing to compare their reading with."
        said = f"Reading: the gap to the spelled text changed by {_with_n(done)} nats (below 0 is better)."
        for kind in self._controls():
            if (more := self.reading(kind)) is not None:
                said += f" It is {_against(more, kind, 'smaller', 'larger', 'smaller')}."
        return said

    def _cost(self) -> str:
        worst = min(self.controls.low, 0.0) + 0.0
        return (
            f"Cost: loss on plain text {_with_n(self.loss)} nats per token (allowed: {self.tolerance:g}); copy "
            f"probability of tokens that were not repaired {_with_n(self.controls)}, at worst {worst:.3g}."
        )

    def _controls(self) -> Sequence[str]:
        return [arm for arm in ("shuffled", "random") if arm in self.copied]

    @property
    def _title(self) -> str:
        return f"Repair of glitch tokens of {self.model}"

    def _blocks(self) -> tuple[Block, ...]:
        arms = Table(
            ("arm", "mean copy probability", "mean gap to the spelled text (nats)"),
            tuple((ARMS[arm], _mean(self.copied[arm]), _mean(self.gap[arm])) for arm in self.copied),
            f"{len(self.ids)} tokens; prompts {', '.join(self.prompts)}.",
        )
        rows = tuple(
            (i, shown(text), " + ".join(map(shown, pieces)), self.copied["before"][k], self.copied["repaired"][k],
             finite(self.gap["before"][k]), finite(self.gap["repaired"][k]))
            for k, (i, text, pieces) in enumerate(zip(self.ids, self.texts, self.sources, strict=True))
        )  # fmt: skip
        columns = ("id", "token", "made of", "p before", "p repaired", "gap before", "gap repaired")
        edits = Table(("what the edits did",), tuple((line,) for line in self.edits))
        return arms, Table(columns, rows, f"n = {len(rows)} tokens"), edits

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers."""
        return measured({
            "success": int(self.success), "copying": self.copying(), "loss_rise": self.loss,
            "control_copying": self.controls, "n_tokens": len(self.ids), "reading": self.reading(),
            **{f"copying_against_{kind}": self.copying(kind) for kind in self._controls()},
            **{f"reading_against_{kind}": self.reading(kind) for kind in self._controls()},
        })  # fmt: skip


def _against(more: Estimate, control: str, below: str, above: str, wanted: str) -> str:
    word = below if more.high < 0 else above if more.low > 0 else f"not clearly {wanted}"
    return f"{word} than {ARMS[control].removesuffix(' (control)')}: {_with_n(more)}"


def _with_n(estimate: Estimate) -> str:
    return f"{estimate.value:+.3g} [{estimate.low:+.3g}, {estimate.high:+.3g}] (n={estimate.n} {estimate.unit})"


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None
