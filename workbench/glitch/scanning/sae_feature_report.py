"""What an SAE does on glitch tokens: features that fire otherwise than on ordinary ones, and reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.core.numbers import number, setting
from workbench.core.stats import Estimate
from workbench.glitch.reporting import TokenReport, sentences, shown
from workbench.report.base import Block, Headline, Metric, Says, Table, Text, beside

if TYPE_CHECKING:
    import pandas as pd

TOP = 30


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """One feature that differs between glitch tokens and controls.

    Attributes:
        glitch: mean activation on glitch tokens.
        difference: glitch token minus the mean of its matched controls, over glitch tokens.
        fires_glitch: share of the glitch tokens on which it fires in some context.
        q: false discovery rate at which it is just named.
    """

    feature: int
    glitch: float
    control: float
    difference: Estimate
    fires_glitch: float
    fires_control: float
    q: float


@dataclass(frozen=True, repr=False, kw_only=True)
class GlitchFeatures(TokenReport):
    """Features and reconstruction on glitch tokens and matched ordinary tokens.

    Attributes:
        target_site: what it reconstructs.
        ids: glitch tokens that were compared.
        distinct: those with an input row of their own.
        dropped: glitch tokens and controls left out as sinks or special tokens.
        tested: features that fired at all.
        fdr: expected share of false ones among `rows`.
        shuffled: features found with shuffled labels: mean and most over the shuffles.
        l0: active features per token, glitch tokens and controls.
        fvu_glitch: unexplained over total variance of the glitch tokens about the mean of the controls.
        fvu_difference: that ratio of each glitch token minus the mean of its matched controls.
    """

    _title = "SAE features on glitch tokens at {self.site}"

    model: str
    site: str
    target_site: str
    sae: str
    d_sae: int
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    asked: int
    distinct: int
    n_controls: int
    dropped: tuple[int, int]
    contexts: tuple[str, ...]
    rows: tuple[FeatureRow, ...]
    tested: int
    fdr: float
    shuffled: tuple[float, int]
    l0: tuple[Estimate, Estimate]
    fvu_glitch: Estimate
    fvu_control: Estimate
    fvu_difference: Estimate

    @property
    def more(self) -> tuple[FeatureRow, ...]:
        """Features that fire more on glitch tokens."""
        return tuple(row for row in self.rows if row.difference.value > 0)

    def frame(self) -> pd.DataFrame:
        """One row per feature that differs, as a pandas table."""
        import pandas as pd

        columns = ["feature", "glitch", "control", "difference", "low", "high", "fires_glitch", "fires_control", "q"]
        values = [(r.feature, r.glitch, r.control, r.difference.value, r.difference.low, r.difference.high,
                   r.fires_glitch, r.fires_control, r.q) for r in self.rows]  # fmt: skip
        return pd.DataFrame(values, columns=columns)

    def headline(self) -> Headline:
        """How many features fire otherwise on glitch tokens, beside the most that shuffled labels give."""
        return Headline.of(
            Says(
                "More SAE features fire otherwise on glitch tokens than shuffled labels give.",
                "No more SAE features fire otherwise on glitch tokens than shuffled labels give.",
                "Fewer SAE features fire otherwise on glitch tokens than shuffled labels give.",
            ),
            self._beside(),
        )  # fmt: skip

    def _beside(self) -> Table:
        shuffled = ("shuffled labels, at most", self.shuffled[1])
        return beside("features that differ", ("glitch and ordinary tokens", len(self.rows)), shuffled)

    def findings(self) -> tuple[str, ...]:
        """How many features, how many by chance, how well tokens are reconstructed, and what was left out."""
        same, drawn = self.asked - self.distinct, len(self.ids) + self.dropped[0]
        return sentences(
            self._features(),
            self._reconstruction(),
            f"{same} of {self.asked} tokens have the same input row as another one, bit for bit, and were not counted "
            "again." if same else "",
            f"Of {self.distinct} different glitch tokens {drawn} were drawn at random."
            if drawn < self.distinct else "",
            f"{self.dropped[0]} glitch tokens and {self.dropped[1]} controls were left out: special tokens, or "
            "attention sinks at this site." if any(self.dropped) else "",
        )  # fmt: skip

    def _features(self) -> str:
        here = f"{len(self.ids)} glitch tokens than on {self.n_controls} matched ordinary ones at {self.site}"
        tested = f"of {self.tested} that fire at all (FDR {setting(self.fdr)})"
        chance = f"With shuffled labels {number(self.shuffled[0])} are found on average, {self.shuffled[1]} at most"
        if not self.rows:
            return f"No feature fires more or less on {here}, {tested}. {chance}."
        best = max(self.rows, key=lambda row: row.difference.value)
        more, less = len(self.more), len(self.rows) - len(self.more)
        word = "" if len(self.rows) > self.shuffled[1] else ": no fewer than here"
        return (
            f"{more} features fire more and {less} less on {here}, {tested}. {chance}{word}. Most: feature "
            f"{best.feature}, by {best.difference}; it fires on a share of {number(best.fires_glitch)} of the "
            "glitch tokens and "
            f"{number(best.fires_control)} of the others."
        )

    def _reconstruction(self) -> str:
        done = self.fvu_difference
        word = done.words("worse", "better", "not clearly better or worse")
        return (
            f"Glitch tokens are reconstructed {word}: FVU {self.fvu_glitch} against {self.fvu_control}, token by token "
            f"a difference of {' '.join(done.shown(sign=True))}; active features {self.l0[0]} "
            f"against {self.l0[1]}."
        )

    def _blocks(self) -> tuple[Block, ...]:
        columns = ("feature", "on glitch tokens", "on controls", "difference", "fires on", "fires on controls", "q")
        rows = tuple((str(r.feature), r.glitch, r.control, r.difference, r.fires_glitch, r.fires_control, r.q)
                     for r in self.rows[:TOP])  # fmt: skip
        n = len(self.contexts)
        caption = f"The {len(rows)} largest differences of {len(self.rows)}; mean activations over {n} texts."
        tokens = Text("Glitch tokens: " + ", ".join(repr(shown(text)) for text in self.texts) + ".")
        return Table(columns, rows, caption), tokens

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers."""
        return {
            "features_more": len(self.more), "features_less": len(self.rows) - len(self.more), "tested": self.tested,
            "by_chance": self.shuffled[0], "fvu_glitch": self.fvu_glitch, "fvu_control": self.fvu_control,
            "fvu_difference": self.fvu_difference, "l0_glitch": self.l0[0], "l0_control": self.l0[1],
        }  # fmt: skip
