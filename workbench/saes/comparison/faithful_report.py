"""The result of the study of SAEs on own and on other text: tables, and findings that intervals decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workbench.core.numbers import counted, number, sample_size
from workbench.core.stats import Estimate
from workbench.report.base import Headline, Metric, Report, Says, Section, Table, Text, beside
from workbench.report.blocks import Block
from workbench.saes.comparison.corpus import CorpusReport
from workbench.saes.comparison.faithful import FakeFeatures, Quality, seed_difference, verdict
from workbench.saes.comparison.matching import ActivationMatch
from workbench.saes.comparison.shared import SharedFeatures

OWN, CORPUS = "own", "corpus"
DATA = {OWN: "own text", CORPUS: "the corpus"}
GROUPS = ((OWN, OWN), (CORPUS, CORPUS), (OWN, CORPUS))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One SAE: what it was trained on, its seed, and how it does.

    Attributes:
        data: "own" or "corpus".
        seed: of its initial weights and the order of tokens.
        on: its quality on held-out text of each kind.
        fake: how many of its features fire on random tokens.
        probe: accuracy of a probe on its mean activations.
        shuffled: the same with shuffled labels.
    """

    data: str
    seed: int
    on: dict[str, Quality]
    fake: FakeFeatures
    probe: Estimate
    shuffled: Estimate


@dataclass(frozen=True)
class Pair:
    """Two SAEs, by name, and what they share by direction and by activation.

    Attributes:
        data: what each was trained on.
        names: of both.
        seeds: of both. Equal seeds mean equal initial weights, which alone makes features alike.
        directions: shared by direction.
        activations: shared by activation.
    """

    data: tuple[str, str]
    names: tuple[str, str]
    seeds: tuple[int, int]
    directions: SharedFeatures
    activations: ActivationMatch

    @property
    def same_start(self) -> bool:
        """Whether both began with the same weights."""
        return self.seeds[0] == self.seeds[1]


@dataclass(frozen=True, kw_only=True)
class FaithfulReport(Report):
    """SAEs on the model's own text beside SAEs on a corpus, as many tokens each.

    Attributes:
        site: where they read.
        tokens: tokens of each text.
        corpus: what the corpus is, in words.
        saes: the SAEs.
        pairs: every two of them.
        texts: checks of both texts.
        classes: the two classes of the probing task.
        raw_probe: accuracy of a probe on the mean activations of the model itself, the ceiling of comparison.
        raw_shuffled: the same with shuffled labels.
    """

    site: str
    tokens: int
    corpus: str
    saes: tuple[Trained, ...]
    pairs: tuple[Pair, ...]
    texts: dict[str, CorpusReport]
    classes: tuple[str, str]
    raw_probe: Estimate
    raw_shuffled: Estimate

    def differences(self) -> dict[str, Estimate]:
        """Own text minus corpus, over seeds, by what is measured."""
        measures: dict[str, Callable[[Trained], float]] = {}
        for text in DATA:
            measures |= {
                f"FVU on {DATA[text]}": lambda s, t=text: s.on[t].fvu.value,
                f"loss recovered on {DATA[text]}": lambda s, t=text: s.on[t].recovered.value,
                f"added loss on {DATA[text]}, sinks kept": lambda s, t=text: s.on[t].ce_kept.value,
                f"added loss on {DATA[text]}, every token spliced": lambda s, t=text: s.on[t].ce_sinks.value,
            }
        for tau in self.saes[0].fake.ratio:
            measures[f"fake feature ratio above {tau}"] = lambda s, t=tau: s.fake.ratio[t].value
        measures["probe accuracy"] = lambda s: s.probe.value

        def values(data: str, measure: Callable[[Trained], float]) -> list[float]:
            return [measure(sae) for sae in self.saes if sae.data == data]

        return {name: seed_difference(values(OWN, m), values(CORPUS, m)) for name, m in measures.items()}

    def of(self, group: tuple[str, str]) -> list[Pair]:
        """The pairs of SAEs trained on these two kinds of text."""
        return [pair for pair in self.pairs if pair.data == group]

    def headline(self) -> Headline:
        """Fake features of SAEs on own text beside those on the corpus, over seeds."""
        return Headline.of(
            Says(
                "SAEs on own text have fewer features that fire on random tokens than SAEs on the corpus.",
                "SAEs on own text have no fewer features that fire on random tokens than SAEs on the corpus.",
                "SAEs on own text have more features that fire on random tokens than SAEs on the corpus.",
            ),
            self._beside(),
            "lower",
        )

    def _beside(self) -> Table:
        tau = next(iter(self.saes[0].fake.ratio))
        name = f"fake feature ratio above {tau}"

        def mean(data: str) -> tuple[str, float]:
            return DATA[data], float(np.mean([sae.fake.ratio[tau].value for sae in self.saes if sae.data == data]))

        return beside(name, mean(OWN), mean(CORPUS), self.differences()[name])

    def findings(self) -> tuple[str, ...]:
        """Each comparison in one sentence; what the intervals don't decide is called not clearly different."""
        seeds = len({sae.seed for sae in self.saes})
        said = [
            f"{name}: {_compared(difference)} with own text than with the corpus "
            f"({' '.join(difference.shown(sign=True))}, "
            f"{counted(seeds, 'seeds')} each)."
            if difference.excludes(0.0)
            else (
                f"{name}: not clearly different ({' '.join(difference.shown(sign=True))}, "
                f"{counted(seeds, 'seeds')} each)."
            )
            for name, difference in self.differences().items()
        ]
        return (self._shared_finding(), *said, self._probe_finding(), *self._text_findings())

    def _shared_finding(self) -> str:
        own, corpus, across = (self.of(group) for group in GROUPS)
        other, same = ([pair for pair in across if pair.same_start is start] for start in (False, True))
        ratios = [[pair.directions.ratio for pair in group] for group in (own, corpus)]
        word = (
            "more" if min(r.low for r in ratios[0]) > max(r.high for r in ratios[1])
            else "fewer" if max(r.high for r in ratios[0]) < min(r.low for r in ratios[1])
            else "not clearly more or fewer"
        )  # fmt: skip
        return (
            f"Two seeds on own text share {word} features than two seeds on the corpus: {_range(own)} against "
            f"{_range(corpus)} by decoder direction; across the two texts {_range(other)} with other seeds, "
            f"{_range(same)} from the same initial weights."
        )

    def _probe_finding(self) -> str:
        low, high = min(s.probe.value for s in self.saes), max(s.probe.value for s in self.saes)
        return (
            f"Probes of {self.classes[0]} against {self.classes[1]} reach {number(low)} to {number(high)} on mean SAE "
            f"activations, {self.raw_probe} on the mean activations of the model, and {self.raw_shuffled} with "
            "shuffled labels."
        )

    def _text_findings(self) -> tuple[str, ...]:
        return tuple(f"{name}: {finding}" for name, text in self.texts.items() for finding in text.findings())

    def section(self) -> Section:
        """All tables: quality, differences, shared features, fake features, probes, texts."""
        intro = Text(
            f"SAEs at {self.site}: trained on {self.tokens} tokens that the model wrote, or on {self.tokens} tokens of "
            f"{self.corpus}. Everything is measured on held-out text of both kinds."
        )
        differences = Table(
            ("measure", "own text minus corpus", "reading"),
            tuple((name, value, verdict(value)) for name, value in self.differences().items()),
            f"Means over seeds; Welch t intervals over seeds. {len(self.differences())} comparisons at 95 % each: one "
            "in twenty excludes 0 by chance.",
        )
        tables = (self._beside(), self._quality(), differences, self._shared(), self._fake(), self._probes())
        blocks: list[Block] = [intro, *tables]
        metrics: dict[str, Metric] = {f"difference.{_key(n)}": value for n, value in self.differences().items()}
        metrics["probe.raw"] = self.raw_probe
        for sae in self.saes:
            name = f"{sae.data}-{sae.seed}"
            metrics |= {f"{name}.probe": sae.probe}
            metrics |= {f"{name}.ffr_{tau}": value for tau, value in sae.fake.ratio.items()}
            for text, found in sae.on.items():
                where = f"{name}.on_{text}"
                metrics |= {f"{where}.fvu": found.fvu, f"{where}.recovered": found.recovered}
                metrics |= {f"{where}.ce_kept": found.ce_kept, f"{where}.ce_sinks": found.ce_sinks}
        for pair in self.pairs:
            metrics |= {f"sfr.{pair.names[0]}.{pair.names[1]}": pair.directions.ratio}
        for name, text in self.texts.items():
            section = text.section()
            blocks += [Text(f"Check of {name}."), *section.blocks]
            metrics |= {f"{_key(name)}.{key}": value for key, value in section.metrics.items()}
        title = "SAEs on own text and on a corpus"
        return Section(title, tuple(blocks), self.findings(), metrics, self.headline())

    def _quality(self) -> Table:
        columns = ("trained on", "seed", "measured on", "FVU", "loss recovered", "added loss, sinks kept",
                   "added loss, every token", "scalar EV", "L2")  # fmt: skip
        rows = []
        for sae in self.saes:
            for text, q in sae.on.items():
                rows.append((DATA[sae.data], sae.seed, DATA[text], q.fvu, q.recovered, q.ce_kept, q.ce_sinks,
                             q.ev_scalar, q.l2))  # fmt: skip
        return Table(
            columns,
            tuple(rows),
            "Held-out rows, intervals over rows; losses in nats per token. Scalar EV and L2 follow the "
            "definitions of FaithfulSAE over every token, sinks included; FVU is over kept tokens.",
        )

    def _shared(self) -> Table:
        rows = tuple(
            (" and ".join(pair.names) + " (same initial weights)" * pair.same_start,
             pair.directions.ratio, pair.directions.top1,
             max(d.above.value for draws in pair.directions.overlap.nulls.values() for d in draws),
             pair.directions.overlap.observed.mean_max, pair.activations.shared, pair.activations.correlation,
             pair.activations.null.value)
            for group in GROUPS for pair in self.of(group)
        )  # fmt: skip
        first = self.pairs[0]
        return Table(
            ("SAEs", "shared feature ratio", "top-1 ratio", "its null", "mean largest cosine", "shared by activation",
             "mean largest correlation", "its null"),
            rows,
            f"Decoder cosine above {first.directions.overlap.threshold} in a one-to-one matching "
            f"({first.directions.method}); null: random and permuted dictionaries. By activation: correlation above "
            f"{first.activations.threshold} on the same held-out tokens of both texts, features that fired at least "
            f"{first.activations.min_fired} times; null: shuffled tokens.",
        )  # fmt: skip

    def _fake(self) -> Table:
        taus = tuple(self.saes[0].fake.ratio)
        rows = tuple(
            (DATA[s.data], s.seed, *(s.fake.ratio[t] for t in taus), *(s.fake.alive_ratio[t] for t in taus),
             s.fake.more_on_random, s.fake.alive)
            for s in self.saes
        )  # fmt: skip
        return Table(
            ("trained on", "seed", *(f"fake above {t}" for t in taus), *(f"of alive, above {t}" for t in taus),
             "more often than on as much text", "alive on text"),
            rows,
            self.saes[0].fake.section().blocks[0].caption,  # type: ignore[union-attr]  # a table
        )  # fmt: skip

    def _probes(self) -> Table:
        rows: list[tuple[str, Estimate, Estimate]] = [("model", self.raw_probe, self.raw_shuffled)]
        rows += [(f"SAE on {DATA[s.data]}, seed {s.seed}", s.probe, s.shuffled) for s in self.saes]
        return Table(
            ("mean activations of", "accuracy", "with shuffled labels"),
            tuple(rows),
            f"{self.classes[0]} against {self.classes[1]}: L2 logistic regression, cross-validated.",
        )


def _compared(difference: Estimate) -> str:
    return "higher" if difference.value > 0 else "lower"


def _range(pairs: list[Pair]) -> str:
    ratios = [pair.directions.ratio for pair in pairs]
    values = [ratio.value for ratio in ratios]
    size = sample_size(ratios[0].n, "features")
    return f"{number(min(values))} to {number(max(values))} ({size}, {counted(len(ratios), 'pairs')})"


def _key(name: str) -> str:
    return name.replace(",", "").replace(" ", "_").lower()
