"""`RefusalReport`: what the refusal study measured, its tables, and what it says in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from workbench.core.arguments import checked
from workbench.core.numbers import counted, number, sample_size, setting
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Cell, Headline, Lines, Metric, Report, Says, Section, Series, Table, Text
from workbench.steering.refusal.contrast_features import FeatureRow
from workbench.steering.refusal.result import Contrast, RefusalArm

REFUSED = "refusals, harmful"
"""Column of the headline."""


@dataclass(frozen=True, kw_only=True)
class RefusalReport(Report):
    """The refusal study of one model at one site.

    Attributes:
        model: its name.
        site: where it was steered.
        n_train: pairs of prompts that made the direction and the features.
        n_val: pairs on which features were screened.
        seed: of the split and the controls.
        refusal_tokens: first tokens that count as the beginning of a refusal.
        contrast: how large the refusal direction is, and how much topic it would hold without the 2x2.
        features: screened SAE features, best first; empty without an SAE or without candidates.
        arms: one result per arm, the unsteered one first.
        new_tokens: longest reply.
        note: how the prompts were made into tokens.
    """

    model: str
    site: str
    n_train: int
    n_val: int
    seed: int
    refusal_tokens: tuple[str, ...]
    contrast: Contrast
    features: tuple[FeatureRow, ...]
    arms: tuple[RefusalArm, ...]
    new_tokens: int
    note: str = ""

    @checked
    def arm(self, name: str) -> RefusalArm:
        """The result of the arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    @checked
    def family(self, name: str) -> tuple[RefusalArm, ...]:
        """The results of one kind of edit, weakest first."""
        return tuple(arm for arm in self.arms if arm.family == name)

    def findings(self) -> tuple[str, ...]:
        """The base rate first, then what the direction and the features do beyond their controls, and at what cost."""
        lines = [_base_rate(self.arms[0], self.model), _topic(self.contrast)]
        for family in ("refusal direction", "refusal features"):
            results = self.family(family)
            if results:
                lines += [_effect(results), _refusals(results, self), _cost(results)]
        if not self.features:
            lines.append(
                "No SAE feature was clamped: there was no SAE, or none of its features is used more by refusals."
            )
        removed = self.family("direction removed")
        return (*lines, *(_removed(arm) for arm in removed))

    def section(self) -> Section:
        """Tables of all arms, the feature screen, plots and examples."""
        words = ", ".join(repr(token) for token in self.refusal_tokens)
        intro = Text(
            f"Steering {self.model} at {self.site}, every token but the first (an attention sink). The refusal "
            "direction is the difference of means between given refusals and given compliant replies, each after "
            f"harmful and harmless prompts alike ({counted(self.n_train, 'pairs')}, reply tokens only). Strength 1 "
            "adds it once. "
            f"Prompts: {self.note}; the template's default system prompt is in place. First-token log-odds count the "
            f"tokens {words}; replies are greedy, {self.new_tokens} tokens at most. Random arms use another random "
            "direction or other random features for each prompt. Intervals are 95 % over prompts."
        )
        costs = (self._effects(), self._costs(), self._curve(), self._refused(), *self._screen(), self._examples())
        return Section("Refusal", (intro, *costs), self.findings(), self.metrics(), self.headline())

    def headline(self) -> Headline:
        """Refusals of harmful prompts under the refusal direction nearest to its own size, beside a random one's."""
        arm = min(self.family("refusal direction"), key=lambda arm: abs(arm.strength - 1))
        whom = (
            ""
            if arm.selective is None
            else ", and moves "
            + arm.selective.words(
                "harmful prompts more than harmless ones",
                "harmless prompts more than harmful ones",
                "harmful prompts not clearly more than harmless ones",
            )
        )
        return Headline.read(
            Says(
                f"Adding {setting(arm.strength)} times the refusal direction makes the model refuse{whom}.",
                "Adding the refusal direction makes the model refuse no more often than a random direction does.",
                "Adding the refusal direction makes the model refuse less often than a random direction does.",
            ),
            value=(self._effects(), arm.name, REFUSED), measure="share of harmful prompts refused",
            control=None if arm.control is None else (self._effects(), arm.control, REFUSED),
        )  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers: `<arm>/<measure>`."""
        kept: dict[str, Metric] = {"direction_norm": self.contrast.reply, "topic_norm": self.contrast.prompt}
        names = (
            "log_odds_harmful", "log_odds_harmless", "control_harmful", "control_harmless", "selective",
            "refused_harmful", "refused_harmless", "kl_harmless", "text_change", "reply_change", "distinct_2",
        )  # fmt: skip
        for arm in self.arms:
            values = {name: getattr(arm, name) for name in names} | {"share_of_residual_norm": arm.share}
            kept |= {f"{arm.name}/{name}": value for name, value in values.items() if value is not None}
        return kept

    def _effects(self) -> Table:
        columns: dict[str, str | Callable[[RefusalArm], Cell]] = {
            "arm": "name",
            "added, share of residual norm": "share",
            "log-odds, harmful": "log_odds_harmful",
            "log-odds, harmless": "log_odds_harmless",
            "minus control, harmful": "control_harmful",
            "minus control, harmless": "control_harmless",
            "harmful minus harmless change": "selective",
            REFUSED: "refused_harmful",
            "refusals, harmless": "refused_harmless",
        }
        return Table.of(self.arms, columns, "What each arm does to refusal, on test prompts; log-odds in nats.")

    def _costs(self) -> Table:
        columns = ("arm", "loss on plain text", "change", "KL of first token, harmless",
                   "loss of replies, unsteered model", "change", "distinct bigrams")  # fmt: skip
        rows = tuple(
            (a.name, a.text_loss, a.text_change, a.kl_harmless, a.reply_nats, a.reply_change, a.distinct_2)
            for a in self.arms
        )
        return Table(columns, rows, "What it costs: nats per token, except the share of distinct bigrams.")

    def _curve(self) -> Lines:
        series = []
        for kind in ("harmful", "harmless"):
            for family in ("refusal direction", "random direction"):
                results = (self.arms[0], *self.family(family))
                odds = [getattr(arm, f"log_odds_{kind}") for arm in results]
                bands = zip(*((e.value, e.low, e.high) for e in odds), strict=True)
                series.append(Series(f"{family}, {kind}", tuple(a.strength for a in results), *bands))
        title, x_label = "First-token refusal log-odds", "strength (multiples of the difference of means)"
        return Lines(title, tuple(series), x_label, "log-odds, nats")

    def _refused(self) -> Bars:
        labels = tuple(f"{a.name}, {kind}" for a in self.arms for kind in ("harmful", "harmless"))
        values = tuple(e for a in self.arms for e in (a.refused_harmful, a.refused_harmless))
        return Bars(
            "Replies that hold a refusal phrase", labels, values, "share of prompts", self.arms[0].refused_harmful.value
        )

    def _screen(self) -> Iterator[Table]:
        if not self.features:
            return
        columns = {
            "feature": "feature", "mean difference": "mean_difference", "AUROC": "auroc",
            "cosine with direction": "cosine", "frequency": "frequency", "largest": "max_act",
            "clamped alone": "screened",
        }  # fmt: skip
        yield Table.of(
            self.features, columns,
            f"SAE features that refusals use more ({self.n_train} training pairs, both replies), ordered by the change "
            f"of the log-odds when each is clamped alone ({self.n_val} validation prompts).",
        )  # fmt: skip

    def _examples(self) -> Table:
        rows = tuple((a.name, a.example_harmful, a.example_harmless) for a in self.arms)
        return Table(
            ("arm", "reply to a harmful prompt", "reply to the harmless prompt of its form"),
            rows,
            "One pair of prompts.",
        )


def _count(share: Estimate) -> str:
    return f"{round(share.value * share.n)} of {share.n}"


def _interval(e: Estimate) -> str:
    return " ".join(e.shown(sign=True))


def _base_rate(base: RefusalArm, model: str) -> str:
    harmful, harmless = base.refused_harmful, base.refused_harmless
    verdict = "hardly refuses by itself" if harmful.value < 0.2 else "refuses by itself"
    return (
        f"Unsteered, {model} {verdict}: {_count(harmful)} harmful prompts "
        f"{harmful.shown()[1]} and {_count(harmless)} harmless ones {harmless.shown()[1]} get a refusal phrase."
    )


def _topic(contrast: Contrast) -> str:
    return (
        f"Telling refusal from topic ({contrast.n} prompts per cell): the kind of reply moves the activations by "
        f"{number(contrast.reply)}, the kind of prompt by {number(contrast.prompt)}, both together beyond their sum by "
        f"{number(contrast.interaction)}; the naive contrast has cosine {number(contrast.cosine_simple_reply)} with "
        "the refusal direction."
    )


def _what(results: Sequence[RefusalArm]) -> str:
    strengths = ", ".join(setting(arm.strength) for arm in results)
    shares = ", ".join(number(arm.share) for arm in results)
    unit = "x" if results[0].family == "refusal direction" else "times their maximum"
    verb = (
        "Adding the refusal direction" if results[0].family == "refusal direction" else "Clamping the refusal features"
    )
    return f"{verb} ({strengths} {unit}; a share of {shares} of the residual norm)"


def _effect(results: Sequence[RefusalArm]) -> str:
    gains = [arm.control_harmful for arm in results if arm.control_harmful is not None]
    works = [e for e in gains if e.low > 0]
    if len(works) == len(gains):
        verdict = "raises the refusal log-odds on harmful prompts beyond its random control"
    elif works:
        verdict = (
            "raises the refusal log-odds on harmful prompts beyond its random control at "
            f"{len(works)} of {len(gains)} strengths"
        )
    else:
        verdict = "does not raise the refusal log-odds on harmful prompts beyond its random control"
    return (
        f"{_what(results)} {verdict}: {'; '.join(map(_interval, gains))} nats ({sample_size(gains[0].n, 'prompts')})."
    )


def _refusals(results: Sequence[RefusalArm], report: RefusalReport) -> str:
    controls = [report.arm(arm.control) for arm in results if arm.control is not None]
    strongest = results[-1]
    unselective = [arm for arm in results if arm.selective is not None and arm.selective.low <= 0]
    if unselective:
        gaps = "; ".join(_interval(arm.selective) for arm in results if arm.selective is not None)
        verdict = (
            f"It is not selective: harmless prompts move as much as harmful ones at {len(unselective)} of "
            f"{len(results)} strengths "
            f"(difference of changes {gaps} nats, {sample_size(strongest.refused_harmful.n, 'pairs')})."
        )
    else:
        verdict = "Harmful prompts move more than harmless ones at every strength."
    disagree = [
        setting(arm.strength)
        for arm, control in zip(results, controls, strict=True)
        if arm.control_harmful is not None
        and arm.control_harmful.low > 0
        and arm.refused_harmful.low <= control.refused_harmful.high
    ]
    judges = (
        f"The two measures disagree at {', '.join(disagree)}: the replies begin more like refusals, but hold a refusal "
        "phrase no more often than the control within the intervals. "
        if disagree
        else ""
    )
    return (
        f"Refusal phrases at these strengths: harmful {_shares(a.refused_harmful for a in results)}, harmless "
        f"{_shares(a.refused_harmless for a in results)}; random control: harmful "
        f"{_shares(a.refused_harmful for a in controls)}, harmless {_shares(a.refused_harmless for a in controls)}. "
        f"{judges}{verdict}"
    )


def _shares(shares: Iterable[Estimate]) -> str:
    return ", ".join(f"{_count(e)} {e.shown()[1]}" for e in shares)


def _cost(results: Sequence[RefusalArm]) -> str:
    changes = [arm.text_change for arm in results if arm.text_change is not None]
    broken = [setting(arm.strength) for arm in results if arm.broken]
    replies = "; ".join(_interval(arm.reply_change) if arm.reply_change else "no reply" for arm in results)
    verdict = (
        f"at {', '.join(broken)} the replies are broken text rather than refusals"
        if broken
        else "no strength makes the replies far less likely to the unsteered model"
    )
    return (
        f"Its cost on plain text is {'; '.join(map(_interval, changes))} nats per token "
        f"({sample_size(changes[0].n, 'texts')}); the replies become less likely to the unsteered model by "
        f"{replies} nats per token: {verdict}."
    )


def _removed(arm: RefusalArm) -> str:
    assert arm.control_harmful is not None
    e = arm.control_harmful
    verdict = "changes" if e.excludes(0.0) else "does not measurably change"
    return (
        f"Removing the direction {verdict} the log-odds on harmful prompts compared with removing a random one: "
        f"{_interval(e)} nats ({sample_size(e.n, e.unit)}); {_count(arm.refused_harmful)} refusals."
    )
