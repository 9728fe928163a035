"""What FaithfulSAE asks of an SAE: does it fire on noise, does it serve other text, does another seed find the same?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.overlap import RESAMPLES
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.numbers import number
from workbench.core.progress import track
from workbench.core.stats import SHARE, Estimate, sample_mean
from workbench.core.tokenizer import special_ids, start_ids
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.report.base import Headline, Metric, Report, Says, Section, Table, beside
from workbench.saes.evaluation.evaluate import EvalOptions, evaluate_sae
from workbench.saes.evaluation.splice import RULE_ROWS, estimate_rules
from workbench.saes.formats.load import sae_keep_rule

CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class FakeFeatureOptions:
    """Constants of the fake feature ratio; no published ones are known, so a report shows these.

    Attributes:
        taus: a feature is fake if it fires on more than this share of random tokens; one ratio for each.
        seeds: how many sets of random rows.
        tokens: random tokens per set, the start tokens included.
        context: tokens per random row.
        batch_rows: rows per forward pass.
        seed: of the first set; the others follow.
    """

    taus: tuple[float, ...] = (1e-3, 1e-2, 0.1)
    seeds: int = 3
    tokens: int = 100_000
    context: int = 64
    batch_rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.taus or min(self.taus) < 0 or max(self.taus) >= 1:
            raise InvalidInputError(f"taus={self.taus}: give shares of tokens, at least 0 and below 1.")
        if self.seeds < 1 or self.context < 2 or self.tokens < self.context or self.batch_rows < 1:
            raise InvalidInputError(f"{self}: needs one seed, rows of two tokens and tokens for one row.")


@dataclass(frozen=True, kw_only=True)
class FakeFeatures(Report):
    """Share of the features of an SAE that fire on uniformly random tokens. Intervals are over features.

    Only tokens that the SAE's keep rule keeps are counted: not the first of a row, no special token, no sink.

    Attributes:
        alive: features that fired on the text.
        random_tokens: kept random tokens per set.
        text_tokens: kept tokens of the text.
        ratio: by threshold, share of all features that fire on more than that share of random tokens; mean over sets.
        alive_ratio: the same among the features that fired on the text.
        more_on_random: of the features that fired at all, the share that fires more often on random tokens than on as
            many of the text; ties count half, so that it is 0.5 where both are alike.
        per_seed: `ratio` of each set of random rows.
    """

    name: str
    d_sae: int
    alive: int
    random_tokens: tuple[int, ...]
    text_tokens: int
    ratio: dict[str, Estimate]
    alive_ratio: dict[str, Estimate]
    more_on_random: Estimate
    per_seed: tuple[dict[str, float], ...]
    options: FakeFeatureOptions

    def findings(self) -> tuple[str, ...]:
        """The ratio at each threshold."""
        ratios = "; ".join(f"{value} above {tau} of the tokens" for tau, value in self.ratio.items())
        return (
            f"{self.name}: share of features that fire on random tokens: {ratios}. Of those that fired at all, "
            f"{self.more_on_random} fire more often on random tokens than on as many of text (0.5 if both are alike).",
        )

    def headline(self) -> Headline:
        """Share of features that fire more on random tokens than on text."""
        return Headline.of(
            Says(
                "The features fire less on random tokens than on text.",
                "The features fire as much on random tokens as on text.",
                "The features fire more on random tokens than on text.",
            ),
            self._beside(),
            "lower",
        )

    def _beside(self) -> Table:
        measure = "share of features that fire more often on random tokens"
        return beside(measure, (self.name, self.more_on_random), ("no difference", 0.5))

    def section(self) -> Section:
        """The ratios, with every constant of their definition."""
        o = self.options
        rows = tuple(
            (f"> {tau}", self.ratio[tau], self.alive_ratio[tau], ", ".join(number(seed[tau]) for seed in self.per_seed))
            for tau in self.ratio
        )
        table = Table(
            ("share of random tokens", "fake feature ratio", "among features alive on text", "each set"),
            rows,
            f"{o.seeds} sets of {o.tokens} tokens in rows of {o.context}: a start token, then ids drawn uniformly from "
            f"the tokenizer's vocabulary without special tokens; seeds {o.seed} to {o.seed + o.seeds - 1}. "
            f"{self.alive} of {self.d_sae} features fired on {self.text_tokens} kept tokens of text.",
        )
        metrics: dict[str, Metric] = {f"ffr_{tau}": value for tau, value in self.ratio.items()}
        metrics |= {f"ffr_alive_{tau}": value for tau, value in self.alive_ratio.items()}
        metrics |= {"more_on_random": self.more_on_random, "alive": self.alive}
        return Section(
            f"Fake features: {self.name}", (table, self._beside()), self.findings(), metrics, self.headline()
        )


def random_rows(model: Model, tokens: int, context: int, seed: int) -> Int[Tensor, "rows context"]:
    """Rows of the start tokens and ids drawn uniformly from the tokenizer's vocabulary without its special tokens.

    Embeddings beyond the tokenizer's vocabulary, which no text reaches, are left out as well.
    """
    special = set(special_ids(model.tokenizer))
    known = min(model.d_vocab, len(model.tokenizer))
    ordinary = torch.tensor([i for i in range(known) if i not in special])
    random = torch.Generator().manual_seed(seed)
    rows = ordinary[torch.randint(len(ordinary), (-(-tokens // context), context), generator=random)]
    start = torch.tensor(start_ids(model.tokenizer))
    rows[:, : len(start)] = start
    return rows


@checked
def fake_features(
    model: Model,
    saes: Mapping[str, AnySAE],
    text: Int[Tensor, "rows context"],
    *,
    options: FakeFeatureOptions | None = None,
) -> dict[str, FakeFeatures]:
    """The fake feature ratio of SAEs of one site; the model runs once for all of them.

    Raises:
        MismatchError: if an SAE does not belong to the model, or they read different sites.
        DegenerateInputError: without an SAE.

    Source: the idea is that of FaithfulSAE (arXiv 2506.17673); its constants are not published, these are ours.
    """
    options = options or FakeFeatureOptions()
    rules = _keep_rules(model, saes, text)
    on_text, text_tokens = firing_rates(model, saes, text, batch_rows=options.batch_rows, rules=rules)
    sets = [
        firing_rates(model, saes, random_rows(model, options.tokens, options.context, options.seed + i),
                     batch_rows=options.batch_rows, rules=rules)
        for i in range(options.seeds)
    ]  # fmt: skip
    fake = {}
    for name in saes:
        rates = torch.stack([rates[name] for rates, _ in sets])
        tokens = tuple(counts[name] for _, counts in sets)
        fake[name] = _fake(name, rates, on_text[name], (tokens, text_tokens[name]), options)
    return fake


def _fake(
    name: str, rates: Tensor, on_text: Tensor, tokens: tuple[tuple[int, ...], int], options: FakeFeatureOptions
) -> FakeFeatures:
    def share(hits: Tensor) -> Estimate:
        """Over features, each counted by the share of sets in which it is a hit."""
        if not hits.shape[1]:
            return Estimate(math.nan, math.nan, math.nan, 0, "no feature is alive", "features")
        values = hits.double().mean(0).numpy()
        return sample_mean(values, unit="features", seed=options.seed, resamples=RESAMPLES, within=SHARE)

    alive = on_text > 0
    fired = alive | (rates > 0).any(0)
    more = torch.stack([
        _more_often(rate, n, on_text, tokens[1], options.seed + i)
        for i, (rate, n) in enumerate(zip(rates, tokens[0], strict=True))
    ])  # fmt: skip
    return FakeFeatures(
        name=name, d_sae=len(on_text), alive=int(alive.sum()), random_tokens=tokens[0], text_tokens=tokens[1],
        ratio={str(tau): share(rates > tau) for tau in options.taus},
        alive_ratio={str(tau): share((rates > tau)[:, alive]) for tau in options.taus},
        more_on_random=share(more[:, fired]),
        per_seed=tuple({str(tau): float((one > tau).double().mean()) for tau in options.taus} for one in rates),
        options=options,
    )  # fmt: skip


def _more_often(a: Tensor, n_a: int, b: Tensor, n_b: int, seed: int) -> Tensor:
    """1 where a feature fires more often at rate `a` than at rate `b`, 0.5 where as often, on as many tokens of each.

    With unequal numbers the smaller sample can't show rates that the larger one does, and a feature that fired once
    among few tokens seems frequent. What a draw of tokens without replacement leaves of a count is hypergeometric.
    """
    random, n = np.random.default_rng(seed), min(n_a, n_b)
    counts = []
    for rate, of in ((a, n_a), (b, n_b)):
        fired = (rate * of).round().long().numpy()
        counts.append(torch.from_numpy(random.hypergeometric(fired, of - fired, n)))
    return ((counts[0] - counts[1]).sign().double() + 1) / 2


def _keep_rules(model: Model, saes: Mapping[str, AnySAE], rows: Int[Tensor, "rows context"]) -> dict[str, TokenPolicy]:
    """The rule that each SAE was trained by, or for SAEs from elsewhere that of the first of these rows."""
    own, site = {name: sae_keep_rule(sae) for name, sae in saes.items()}, common_site(model, saes)
    if all(own.values()):
        return {name: rule for name, rule in own.items() if rule is not None}
    estimated = estimate_rules(model, [site], [TokenBatch.of_rows(rows[:RULE_ROWS]).to(model.device)])[site]
    return {name: rule or estimated for name, rule in own.items()}


@torch.no_grad()
def firing_rates(
    model: Model,
    saes: Mapping[str, AnySAE],
    rows: Int[Tensor, "rows context"],
    *,
    batch_rows: int = 64,
    rules: Mapping[str, TokenPolicy] | None = None,
) -> tuple[dict[str, Float[Tensor, " d_sae"]], dict[str, int]]:
    """On which share of the kept tokens each feature fires, and how many tokens are kept, by name of the SAE.

    Without `rules` a token is kept by the rule that each SAE was trained by, or one estimated on the first rows.

    Raises:
        MismatchError: if an SAE does not belong to the model, or they read different sites.
        DegenerateInputError: without an SAE, or if no token is kept.
    """
    site = common_site(model, saes)
    rules = _keep_rules(model, saes, rows) if rules is None else rules
    bases = {name: as_basis(sae) for name, sae in saes.items()}
    fired = {name: torch.zeros(basis.d_sae, dtype=torch.double) for name, basis in bases.items()}
    kept = dict.fromkeys(saes, 0)
    for ids in track(rows.split(batch_rows), description="Counting which features fire", unit="batches"):
        x = model.capture(ids, [site]).flat(site).float().cpu()
        for name, basis in bases.items():
            chosen = x[rules[name].mask(x, ids)]
            kept[name] += len(chosen)
            for part in chosen.split(CHUNK):
                fired[name] += (basis.encode(part.to(basis.device)) > 0).sum(0).double().cpu()
    empty = [name for name, n in kept.items() if not n]
    if empty:
        raise DegenerateInputError(f"firing_rates: no token is kept for {', '.join(empty)}; give more or longer rows.")
    return {name: counts / kept[name] for name, counts in fired.items()}, kept


def common_site(model: Model, saes: Mapping[str, AnySAE]) -> str:
    """The site that all of these SAEs read.

    Raises:
        MismatchError: if an SAE does not belong to the model, or they read different sites.
        DegenerateInputError: without an SAE.
    """
    sites = {name: str(placed_at(sae, model).site) for name, sae in saes.items()}
    if not sites:
        raise DegenerateInputError("There is no SAE to measure. Give at least one, by name.")
    if len(set(sites.values())) > 1:
        raise MismatchError(f"The SAEs read different sites ({sites}). Compare SAEs of one site.")
    return next(iter(sites.values()))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well one SAE serves one set of rows. Intervals are over rows.

    Attributes:
        recovered: loss recovered against zero ablation with sinks kept.
        ce_kept: loss added by splicing at kept tokens, in nats per token.
        ce_sinks: loss added by splicing at every token, sinks and first tokens included, as FaithfulSAE does.
        ev_scalar: explained variance as FaithfulSAE computes it, with one scalar mean instead of the mean vector: a
            constant vector counts as variance that is explained, and a sink at the first token can be most of it. All
            tokens; `fvu` is the number to use.
        l2: mean squared error per element over all tokens, as there.
    """

    fvu: Estimate
    recovered: Estimate
    ce_kept: Estimate
    ce_sinks: Estimate
    ev_scalar: Estimate
    l2: Estimate
    tokens: int


def quality(
    model: Model, sae: AnySAE, rows: Int[Tensor, "rows context"], *, options: EvalOptions | None = None
) -> Quality:
    """Reconstruction and splice loss of an SAE on rows of text, ours beside the definitions of FaithfulSAE.

    Raises:
        MismatchError: if SAE and model don't belong together.
    """
    report = evaluate_sae(model, sae, rows, options=options)
    return Quality(
        fvu=report.fvu, recovered=report.recovered["zero"], ce_kept=report.ce_difference["sae"],
        ce_sinks=report.ce_difference["sae_sinks"], ev_scalar=report.ev_legacy["all_elements"],
        l2=report.mse_all_elements, tokens=report.n_tokens,
    )  # fmt: skip


def seed_difference(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean of `a` minus mean of `b` over independent seeds, with Welch's t interval; n counts both sides.

    Three seeds a side make wide intervals, which is what three seeds are worth. Where no seed differs from another of
    its side (shares that are all 0, say) there is nothing to say how far the next one would be: the interval is then
    without ends, and excludes nothing.

    Raises:
        DegenerateInputError: with fewer than two seeds on a side.
        InvalidInputError: if a value is not finite.

    >>> seed_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).value
    0.0
    """
    from scipy.stats import t

    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(x), len(y)) < 2:
        raise DegenerateInputError(f"seed_difference: {len(x)} and {len(y)} seeds; each side needs at least two.")
    if not np.isfinite(np.concatenate([x, y])).all():
        raise InvalidInputError(f"seed_difference: {list(a)} and {list(b)}: all values must be finite.")
    parts = np.array([x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)])
    value = float(x.mean() - y.mean())
    if np.ptp(x) == np.ptp(y) == 0:
        return Estimate(value, -math.inf, math.inf, len(x) + len(y), "none: the seeds are all alike", "seeds", level)
    freedom = parts.sum() ** 2 / (parts**2 / np.array([len(x) - 1, len(y) - 1])).sum()
    reach = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(parts.sum())
    return Estimate(value, value - reach, value + reach, len(x) + len(y), "Welch t over seeds", "seeds", level)


def verdict(difference: Estimate) -> str:
    """Reads a difference: "more", "less" or "not clearly different", by whether its interval excludes 0.

    >>> verdict(seed_difference([5.0, 5.1], [1.0, 1.1])), verdict(seed_difference([1.0, 9.0], [2.0, 5.0]))
    ('more', 'not clearly different')
    """
    return difference.words("more", "less")
