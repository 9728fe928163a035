"""What a circuit explains: a number per pair, read from logits or from the activations at a site.

The sign is that of a loss: nodes that support the clean answer raise it when they are patched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.models.reached import Reached
from workbench.probes.linear import Probe, mean_pool

Examples = Pairs | TokenBatch
"""What effects are averaged over: pairs, or texts that the metric knows the labels of."""


@runtime_checkable
class Metric(Protocol):
    """A number per row, computed from the activations at one site."""

    @property
    def site(self) -> str:
        """Where the metric reads; "logits" reads those of each row's last token."""
        ...

    def __call__(self, x: Float[Tensor, "batch *pos d"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The metric of some rows, given their activations with the padding of the whole batch, or their logits."""
        ...


@runtime_checkable
class UnboundMetric(Protocol):
    """A kind of metric, before it knows the pairs."""

    def of(self, model: Model, examples: Examples) -> Metric:
        """The metric of these examples."""
        ...


AnyMetric = Metric | UnboundMetric


@checked
@dataclass(frozen=True, eq=False)
class LogitMetric(OneLine):
    """A function of the logits of each row's last token.

    Attributes:
        name: for people.
        fn: from logits `(batch, k)` and row numbers to a number per row.
        tokens: the tokens of each row whose logits `fn` takes; None takes all.
    """

    name: str
    fn: Callable[[Tensor, Tensor], Tensor]
    tokens: Int[Tensor, "rows k"] | None = None

    @property
    def site(self) -> str:
        """The logits."""
        return "logits"

    def __call__(self, x: Float[Tensor, "batch k"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One number per row."""
        return self.fn(x, rows)


@checked
@dataclass(frozen=True, eq=False)
class SiteMetric(OneLine):
    """A function of the activations at one site.

    Attributes:
        site: the site.
        fn: from activations `(batch, pos, d)` and row numbers to a number per row.
        name: for people.
    """

    site: str
    fn: Callable[[Tensor, Tensor], Tensor]
    name: str = "a function of a site"

    def __call__(self, x: Float[Tensor, "batch pos d"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One number per row."""
        return self.fn(x, rows)


@checked
@dataclass(frozen=True)
class AnswerMetric(OneLine):
    """A kind of metric that compares the answers of pairs.

    Attributes:
        name: "logit_difference", "log_probability", "negative_logit" or "kl".
    """

    name: str

    def of(self, model: Model, examples: Examples) -> LogitMetric:
        """The metric of these pairs.

        Raises:
            InvalidInputError: for texts without answers, or pairs without a patch answer where one is compared.
        """
        if not isinstance(examples, Pairs):
            raise InvalidInputError(
                f"{self.name}() reads the answers of pairs, and these are texts. Give circuits.Pairs, or "
                "another metric."
            )
        return _KINDS[self.name](model, examples)


@checked
def logit_difference() -> AnswerMetric:
    """Logit of the patch answer minus that of the clean answer, which is also the difference of log probabilities."""
    return AnswerMetric("logit_difference")


@checked
def log_probability() -> AnswerMetric:
    """Minus the log probability of the clean answer, in nats."""
    return AnswerMetric("log_probability")


@checked
def negative_logit() -> AnswerMetric:
    """Minus the logit of the clean answer, without a softmax."""
    return AnswerMetric("negative_logit")


@checked
def kl() -> AnswerMetric:
    """KL divergence of the next token from the clean run's distribution, in nats; 0 in the clean run."""
    return AnswerMetric("kl")


@checked
def probe_margin(probe: Probe, labels: Int[Tensor, " rows"], keep: Bool[Tensor, "rows pos"]) -> LossOfMargin:
    """Minus the margin by which a probe gives each row its label; see `LossOfMargin`."""
    return LossOfMargin(probe, labels, keep)


@checked
def of_logits(fn: Callable[[Tensor, Tensor], Tensor], name: str = "a function of the logits") -> LogitMetric:
    """Any function of the logits of each row's last token, `(batch, d_vocab)`, and of the numbers of the rows."""
    return LogitMetric(name, fn)


@checked
def of_site(site: str, fn: Callable[[Tensor, Tensor], Tensor], name: str = "a function of a site") -> SiteMetric:
    """Any function of the activations at a site, `(batch, pos, d)`, and of the numbers of the rows."""
    return SiteMetric(site, fn, name)


def _logit_difference(_model: Model, pairs: Pairs) -> LogitMetric:
    if pairs.patch is None:
        raise InvalidInputError(
            "logit_difference() compares two answers, and these prompts have one. Use log_probability() or "
            "negative_logit()."
        )
    return LogitMetric("logit difference, patch minus clean", lambda x, _: x[:, 1] - x[:, 0], pairs.answers)


def _log_probability(_model: Model, pairs: Pairs) -> LogitMetric:
    def of(x: Tensor, rows: Tensor) -> Tensor:
        chosen = pairs.answers[rows.to(pairs.answers.device), 0].to(x.device)
        return -x.log_softmax(-1).gather(1, chosen[:, None])[:, 0]

    return LogitMetric("minus log probability of the clean answer", of)


def _negative_logit(_model: Model, pairs: Pairs) -> LogitMetric:
    return LogitMetric("minus logit of the clean answer", lambda x, _: -x[:, 0], pairs.answers[:, :1])


def _kl(model: Model, pairs: Pairs) -> LogitMetric:
    with torch.no_grad():
        clean = model.logits(pairs.clean).log_softmax(-1)

    def of(x: Tensor, rows: Tensor) -> Tensor:
        p = clean[rows.to(clean.device)].to(x)
        return (p.exp() * (p - x.log_softmax(-1))).sum(-1)

    return LogitMetric("KL divergence from the clean run", of)


_KINDS: dict[str, Callable[[Model, Pairs], LogitMetric]] = {
    "logit_difference": _logit_difference, "log_probability": _log_probability, "negative_logit": _negative_logit,
    "kl": _kl,
}  # fmt: skip


def sign_of(labels: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """-1 for label 0, 1 for label 1."""
    return 2 * labels - 1


@checked
@dataclass(frozen=True, eq=False)
class LossOfMargin(OneLine):
    """Minus the margin by which a probe gives each row its label; lower is better.

    As metric of `node_effects`, an effect `metric(patched) - metric(clean)` above zero therefore means that the
    feature supports the label.

    Attributes:
        probe: reads mean-pooled activations.
        labels: 0 or 1 per row.
        keep: the tokens that are pooled.
    """

    probe: Probe
    labels: Int[Tensor, " rows"]
    keep: Bool[Tensor, "rows pos"]

    @property
    def site(self) -> str:
        """The probe's site."""
        return self.probe.site

    def __call__(self, x: Float[Tensor, "batch pos d"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Minus the signed log-odds, one per row."""
        logit = self.probe.logit(mean_pool(x, taken(self.keep, rows)))
        return -sign_of(taken(self.labels, rows)).to(logit.device) * logit


def taken(x: Tensor, rows: Int[Tensor, " chosen"]) -> Tensor:
    """Some rows, indexed where they are; the metric follows the model's device."""
    return x[rows.to(x.device)]


def bound(metric: AnyMetric, model: Model, examples: Examples) -> Metric:
    """The metric of these examples.

    Raises:
        InvalidInputError: for what is no metric.
        UnknownSiteError: if it reads at a site that the model does not have.
    """
    if isinstance(metric, UnboundMetric):
        metric = metric.of(model, examples)
    if not isinstance(metric, Metric):
        raise InvalidInputError(
            f"metric={metric!r} is no metric. Give circuits.logit_difference() or another of circuits.metrics, or "
            "of_logits(fn) and of_site(site, fn) for a function of your own."
        )
    model.resolve(metric.site)
    return metric


def value(metric: Metric, reached: Reached, rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The metric where a run reached, each of its rows being the example of that number.

    Raises:
        ShapeError: if the metric gives something else than a number per row.
    """
    if metric.site != "logits":
        x = precise(reached.acts.flat(metric.site))
    elif (tokens := getattr(metric, "tokens", None)) is None:
        x = reached.logits()
    else:
        x = reached.logits(tokens[rows.to(tokens.device)])
    found = metric(x, rows.to(x.device))
    if found.shape != rows.shape:
        raise ShapeError(
            f"The metric gives shape {tuple(found.shape)} for {len(rows)} rows. It must give one number per row."
        )
    return found


def named(metric: Metric) -> str:
    """What a metric is called in tables."""
    return getattr(metric, "name", type(metric).__name__)
