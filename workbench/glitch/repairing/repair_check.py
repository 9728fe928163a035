"""Does a repair help, does it cost anything, and would the wrong rows have done as well? Measured before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from workbench.core.arguments import checked
from workbench.core.codec import codec_of
from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, require
from workbench.core.numbers import counted, number, sample_size, setting
from workbench.core.progress import task
from workbench.core.stats import SIGNED_SHARE, Estimate, paired_difference
from workbench.glitch.repairing.repair import Control, Repair, RepairOptions, control_of
from workbench.glitch.reporting import TokenReport, finite, measured, sentences, shown
from workbench.glitch.verification.prompts import Forms, prompt_set
from workbench.glitch.verification.scoring import VERIFIED, VerifyOptions
from workbench.glitch.verification.sides import measure_sides
from workbench.glitch.verification.verify import verify
from workbench.glitch.vocabulary.tokenizer import Vocabulary, draw_controls, vocabulary_of
from workbench.interventions.intervention import Intervention
from workbench.models.model import Model
from workbench.report.base import Block, Headline, Metric, Says, Table, beside
from workbench.saes.formats.placement import TEXTS

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

    _title = "Repair of glitch tokens of {self.model}"

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
        return paired_difference(
            self.copied["repaired"], self.copied[against], unit="tokens", seed=self.seed, within=SIGNED_SHARE
        )

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
        return paired_difference(
            self.kept_after, self.kept_before, unit="control tokens", seed=self.seed, within=SIGNED_SHARE
        )

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

    def headline(self) -> Headline:
        """Copying beside the same repair with wrong sources, or the cost on plain text where it is too high."""
        if not self.guard:
            says = Says(
                "", "", "Plain text may have become less probable than is allowed, so the repair is no success."
            )
            return Headline.of(says, self._beside(), "at most")
        kind = "blocked" if self.options.writing == "block" else "copied"
        return Headline.of(
            Says(
                f"Repaired tokens are {kind} better than with the wrong sources.",
                f"Repaired tokens are {kind} no better than with the wrong sources.",
                f"Repaired tokens are {kind} worse than with the wrong sources.",
            ),
            self._beside(),
            "lower" if self.options.writing == "block" else "higher",
        )  # fmt: skip

    def _beside(self) -> Table:
        if not self.guard:
            return beside("rise of the loss on plain text", ("repaired", self.loss), ("allowed", self.tolerance))
        against = next(iter(self._controls()), "before")
        means = {arm: (ARMS[arm], _mean(self.copied[arm])) for arm in ("repaired", against)}
        return beside("mean copy probability", means["repaired"], means[against], self.copying(against))

    def findings(self) -> tuple[str, ...]:
        """The verdict first, then each measure beside its control."""
        skipped = first_few((f"{i}: {why}" for i, why in self.skipped), 6, "; ")
        left = f"{len(self.skipped)} tokens were left as they are ({skipped})." if self.skipped else ""
        return sentences(self._verdict(), self._copying(), self._reading(), self._cost(), left)

    def _verdict(self) -> str:
        kind = "tied" if self.tied else "untied"
        what = f"{counted(len(self.ids), 'tokens')} of {self.model} ({kind}), reading={self.options.reading}, "
        what += f"writing={self.options.writing}, from {self.options.sources}"
        if not self.guard:
            return (
                f"NO SUCCESS: plain text may have become less probable by {number(self.loss.high)} nats per token; "
                f"{setting(self.tolerance)} is allowed ({what})."
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
        was, now = (sum(p >= VERIFIED for p in self.copied[arm]) for arm in ("before", "repaired"))
        said = (
            f"Copying: {was} of {len(self.ids)} could be said before (p of at least {VERIFIED}), {now} now; "
            f"change of p {self.copying().change()}."
        )
        for kind in self._controls():
            said += f" That is {_against(self.copying(kind), kind, 'less', 'more', 'more')}."
        return said

    def _reading(self) -> str:
        done = self.reading()
        if done is None:
            return "Reading: nothing spells these tokens, so there is nothing to compare their reading with."
        said = f"Reading: the gap to the spelled text changed by {done.change()} nats (below 0 is better)."
        for kind in self._controls():
            if (more := self.reading(kind)) is not None:
                said += f" It is {_against(more, kind, 'smaller', 'larger', 'smaller')}."
        return said

    def _cost(self) -> str:
        worst = min(self.controls.low, 0.0) + 0.0
        return (
            f"Cost: loss on plain text {self.loss.change()} nats per token (allowed: {setting(self.tolerance)}); copy "
            f"probability of tokens that were not repaired {self.controls.change()}, at worst {number(worst)}."
        )

    def _controls(self) -> Sequence[str]:
        return [arm for arm in ("shuffled", "random") if arm in self.copied]

    def _blocks(self) -> tuple[Block, ...]:
        arms = Table(
            ("arm", "mean copy probability", "mean gap to the spelled text (nats)"),
            tuple((ARMS[arm], _mean(self.copied[arm]), _mean(self.gap[arm])) for arm in self.copied),
            f"{counted(len(self.ids), 'tokens')}; prompts {', '.join(self.prompts)}.",
        )
        rows = tuple(
            (i, shown(text), " + ".join(map(shown, pieces)), self.copied["before"][k], self.copied["repaired"][k],
             finite(self.gap["before"][k]), finite(self.gap["repaired"][k]))
            for k, (i, text, pieces) in enumerate(zip(self.ids, self.texts, self.sources, strict=True))
        )  # fmt: skip
        columns = ("id", "token", "made of", "p before", "p repaired", "gap before", "gap repaired")
        edits = Table(("what the edits did",), tuple((line,) for line in self.edits))
        return arms, Table(columns, rows, sample_size(len(rows), "tokens")), edits

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers."""
        return measured({
            "success": int(self.success), "copying": self.copying(), "loss_rise": self.loss,
            "control_copying": self.controls, "n_tokens": len(self.ids), "reading": self.reading(),
            **{f"copying_against_{kind}": self.copying(kind) for kind in self._controls()},
            **{f"reading_against_{kind}": self.reading(kind) for kind in self._controls()},
        })  # fmt: skip


def _against(more: Estimate, control: str, below: str, above: str, wanted: str) -> str:
    word = more.words(above, below, f"not clearly {wanted}")
    return f"{word} than {ARMS[control].removesuffix(' (control)')}: {more.change()}"


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class RepairCheckOptions:
    """How a repair is judged.

    Attributes:
        controls: random ordinary tokens that are not repaired and must be copied as before.
        texts: plain text whose loss must not rise.
        tolerance: rise of that loss, in nats per token, that the upper end of its interval may not exceed.
    """

    controls: int = 16
    texts: tuple[str, ...] = TEXTS
    tolerance: float = 0.01
    seed: int = 0
    forms: Forms = "auto"
    batch_size: int = 16
    steps: int = 1

    def __post_init__(self) -> None:
        rule = "give at least 1 control token, 2 texts, and a tolerance of at least 0 nats."
        require(self.controls >= 1 and self.tolerance >= 0 and len(self.texts) >= 2, self, rule)


@checked
def check_repair(
    model: Model, made: Repair, options: RepairCheckOptions | None = None, *, vocabulary: Vocabulary | None = None
) -> RepairReport:
    """Measures a repair as an intervention: before, after, and with the wrong sources.

    Three measures, each per token: the highest probability with which it is copied; the divergence between the next
    token after it and after its text spelled out with other tokens, which is how it is read; and, for text that it is
    not in, the loss.

    Raises:
        EditError: if the repair did not reach the model.
    """
    options, vocabulary = options or RepairCheckOptions(), vocabulary or vocabulary_of(model)
    templates = prompt_set(model, vocabulary, forms=options.forms, steps=options.steps).templates
    controls, codec = _controls(model, made, vocabulary, options), codec_of(model.tokenizer)
    how = VerifyOptions(steps=options.steps, batch_size=options.batch_size)
    kinds: tuple[Control, ...] = ("shuffled", "random") if len(made.ids) > 1 else ("random",)
    arms: dict[str, Repair | None] = {"before": None, "repaired": made}
    arms |= {kind: control_of(model, made, kind, options.seed, vocabulary) for kind in kinds}
    copied: dict[str, tuple[float, ...]] = {}
    kept: dict[str, tuple[float, ...]] = {}
    gap: dict[str, tuple[float, ...]] = {}
    edits: tuple[str, ...] = ()
    with task(total=len(arms), description="check the repair", unit="arms") as running:
        for arm, repair in arms.items():
            with model.plan(Intervention() if repair is None else repair.intervention()) as plan:
                others = controls if arm in ("before", "repaired") else []
                done = verify(model, codec, templates, made.ids, others, how)
                copied[arm], kept[arm] = (tuple(t.max_prob for t in part) for part in (done.candidates, done.controls))
                sides = measure_sides(model, codec, vocabulary, made.ids, [], batch_size=options.batch_size)
                gap[arm] = tuple(side.read_kl for side in sides.tested)
            edits = tuple(map(str, plan.report)) if arm == "repaired" else edits
            running.advance()
    before, after = _losses(model, None, options), _losses(model, made, options)
    return RepairReport(
        model=made.model, tied=made.tied, options=made.options, ids=made.ids, texts=made.texts,
        sources=tuple(tuple(vocabulary.text[j] for j in pieces) for pieces in made.sources), skipped=made.skipped,
        copied=copied, gap=gap, control_ids=tuple(controls), kept_before=kept["before"], kept_after=kept["repaired"],
        loss=paired_difference(after, before, unit="texts", seed=options.seed), tolerance=options.tolerance,
        edits=edits, prompts=tuple(one.name for one in templates), seed=options.seed,
    )  # fmt: skip


def _controls(model: Model, made: Repair, vocabulary: Vocabulary, options: RepairCheckOptions) -> list[int]:
    pool = vocabulary.pool(model.d_vocab, {*made.ids, *(i for pieces in made.sources for i in pieces)})
    if not len(pool):
        raise DegenerateInputError("check_repair: no ordinary token is left as a control. Repair fewer tokens.")
    return draw_controls(pool, options.controls, options.seed)


def _losses(model: Model, made: Repair | None, options: RepairCheckOptions) -> list[float]:
    """Mean next-token loss of each text, nats per token."""
    edit = Intervention() if made is None else made.intervention(required=False)
    losses = []
    with model.plan(edit):
        for start in range(0, len(options.texts), options.batch_size):
            losses += model.loss(list(options.texts[start : start + options.batch_size])).nanmean(1).tolist()
    return losses
