"""How good an SAE is: reconstruction on the tokens that count, and what splicing it into the model costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.activations.keep import KeepRule
from workbench.activations.store import ActivationStore
from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Map
from workbench.interventions.scopes import Mask
from workbench.metrics import dead_share, kl_divergence, squared_error
from workbench.progress import task
from workbench.report import Report, Section, Table
from workbench.saes.io import check_sae_fits, sae_keep_rule
from workbench.stats import Estimate, bootstrap_mean, bootstrap_ratio
from workbench.tokens import TokenBatch

Rows = Int[Tensor, "rows pos"] | Sequence[str] | ActivationStore
Reconstruct = Callable[[Tensor], Tensor]

SPLICES = ("sae", "sae_sinks", "zero_all", "zero", "mean", "random", "identity")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How an SAE is evaluated.

    Attributes:
        max_rows: at most so many rows are run through the model.
        batch_rows: rows per forward pass.
        seed: of the random-weight control and of the bootstrap.
    """

    max_rows: int = 64
    batch_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_rows < 2 or self.batch_rows < 1:
            raise InvalidInputError(f"{self}: evaluate at least two rows, so that there is an interval.")


@dataclass(frozen=True)
class SAEReport(Report):
    """Quality of one SAE on one set of rows; all intervals are bootstraps over rows.

    Only tokens that the keep rule keeps are reconstructed or spliced, unless a field says otherwise: attention sinks
    stay as they are. Losses are means over all next-token targets of the rows, in nats per token.

    Attributes:
        site: where the SAE reads.
        n_rows: packed rows evaluated.
        n_tokens: kept tokens among them.
        kept_share: kept tokens over all tokens.
        l0: mean number of active features per kept token.
        fvu: unexplained over total variance of the kept tokens.
        dead: share of features that were silent on all `n_tokens` tokens. On few tokens rare features look dead.
        ce_clean: loss of the unchanged model.
        ce: loss by splice: "sae", "sae_sinks" (sinks reconstructed too), "zero_all", "zero" (sinks kept), "mean"
            (the mean predictor, sinks kept), "random" (an SAE of the same shape with random weights), "identity".
        ce_difference: loss minus clean loss, by splice.
        recovered: share of the loss that the SAE recovers, by ablation baseline "zero" (headline), "zero_all", "mean".
        recovered_controls: the headline number for the controls "sae_sinks", "mean", "random" and "identity".
        fvu_controls: FVU of "mean" (1 by definition), "random" and "identity".
        kl: KL divergence of the next-token distribution, clean to spliced, in nats.
    """

    site: str
    n_rows: int
    n_tokens: int
    kept_share: float
    l0: Estimate
    fvu: Estimate
    dead: float
    ce_clean: Estimate
    ce: dict[str, Estimate]
    ce_difference: dict[str, Estimate]
    recovered: dict[str, Estimate]
    recovered_controls: dict[str, Estimate]
    fvu_controls: dict[str, Estimate]
    kl: Estimate

    def findings(self) -> tuple[str, ...]:
        """The headline numbers and whether they beat the controls."""
        random, headline = self.recovered_controls["random"], self.recovered["zero"]
        beats = "beats" if headline.low > random.high else "does not beat"
        return (
            f"The SAE leaves {self.fvu} of the variance at {self.site} unexplained, with {self.l0.value:.1f} "
            "features per "
            f"token, over {self.n_tokens} kept tokens ({self.kept_share:.1%} of all; the rest are first, special "
            "or sink tokens).",
            f"Spliced into the model it recovers {headline} of the loss that zero ablation costs (sinks kept) and adds "
            f"{self.ce_difference['sae']} nats; it {beats} a random SAE of the same shape ({random}).",
            f"{self.dead:.1%} of the features were silent on these {self.n_tokens} tokens.",
            f"With attention sinks reconstructed as well, {self.recovered_controls['sae_sinks']} is recovered.",
        )

    def section(self) -> Section:
        """The findings with one table of the SAE beside its controls."""
        labels = {
            "sae": "this SAE", "sae_sinks": "this SAE, sinks spliced too", "random": "random SAE (control)",
            "mean": "mean predictor (control)", "identity": "identity (control)",
            "zero": "zero ablation, sinks kept", "zero_all": "zero ablation, all tokens",
        }  # fmt: skip
        fvus = {"sae": self.fvu, **self.fvu_controls}
        recovered = {"sae": self.recovered["zero"], **self.recovered_controls}
        rows = tuple(
            (label, fvus.get(key), self.ce[key], self.ce_difference[key], recovered.get(key))
            for key, label in labels.items()
        )
        quality = Table(
            ("spliced in", "FVU", "loss (nats)", "loss minus clean", "loss recovered"),
            rows,
            f"Clean loss {self.ce_clean}. Recovered: (zero ablation − splice) / (zero ablation − clean), zero "
            "ablation with "
            "sinks kept. Intervals: bootstrap over rows.",
        )
        baselines = Table(
            ("ablation", "loss recovered"),
            tuple((labels[key], value) for key, value in self.recovered.items()),
            "The same SAE against each ablation baseline.",
        )
        metrics = {
            "fvu": self.fvu, "l0": self.l0, "dead": self.dead, "kept_share": self.kept_share, "n_tokens": self.n_tokens,
            "ce_clean": self.ce_clean, "ce_difference": self.ce_difference["sae"], "kl": self.kl,
            **{f"recovered_{key}": value for key, value in self.recovered.items()},
            **{f"recovered_zero_{key}": value for key, value in self.recovered_controls.items()},
        }  # fmt: skip
        return Section(f"SAE at {self.site}", (quality, baselines), self.findings(), metrics)


def evaluate_sae(model: Any, sae: Any, rows: Rows, *, options: EvalOptions | None = None) -> SAEReport:
    """Reconstruction and splice quality of an SAE, beside its controls.

    Args:
        model: a `Model`.
        sae: an sae_lens SAE, from `load_sae`.
        rows: packed token rows, texts, or a store, of which the held-out rows are taken.
        options: how many rows, batch size, seed.

    Raises:
        MismatchError: if SAE, store and model don't belong together.
        DegenerateInputError: if there are fewer than two rows.
    """
    options = options or EvalOptions()
    site = check_sae_fits(model, sae)
    batches = _batches(model, rows, options)
    if sum(map(len, batches)) < 2:
        raise DegenerateInputError("evaluate_sae: fewer than two rows; there would be no interval. Give more text.")
    rule = sae_keep_rule(sae)
    if rule is None:
        x = model.capture(batches[0], [site]).flat(site)
        rule = KeepRule.estimate(x.cpu(), batches[0].ids.cpu(), tuple(model.tokenizer.all_special_ids))
    return _Evaluation(model, sae, site, rule, options).run(batches)


def _batches(model: Any, rows: Rows, options: EvalOptions) -> list[TokenBatch]:
    if isinstance(rows, ActivationStore):
        rows.check_model(model)
        rows = rows.token_rows("heldout")
    if isinstance(rows, Tensor):
        rows = rows[: options.max_rows]
        return [TokenBatch.of_rows(part).to(model.device) for part in rows.split(options.batch_rows)]
    if isinstance(rows, str):
        raise InvalidInputError("evaluate_sae(rows=<one text>): give a list of texts, so that there is an interval.")
    tokens = model.tokens(list(rows)[: options.max_rows])
    return [tokens[start : start + options.batch_rows] for start in range(0, len(tokens), options.batch_rows)]


class _Evaluation:
    """One evaluation: what it is measured with, and the sums per row."""

    def __init__(self, model: Any, sae: Any, site: str, rule: KeepRule, options: EvalOptions) -> None:
        self.model, self.site, self.rule, self.options = model, site, rule, options
        self.functions: dict[str, Reconstruct] = {
            "sae": lambda x: sae.decode(sae.encode(x)),
            "random": _random_sae(sae, options.seed),
            "identity": lambda x: x,
        }
        self.encode: Reconstruct = sae.encode
        self.fired = torch.zeros(int(sae.cfg.d_sae), dtype=torch.bool)

    @torch.no_grad()
    def run(self, batches: list[TokenBatch]) -> SAEReport:
        captured = [self.model.capture(batch, [self.site]).flat(self.site).float() for batch in batches]
        keeps = [_kept(self.rule, x, batch) for x, batch in zip(captured, batches, strict=True)]
        kept = torch.cat([x[keep] for x, keep in zip(captured, keeps, strict=True)])
        if len(kept) < 2:
            raise DegenerateInputError(
                "evaluate_sae: the keep rule leaves fewer than two tokens. Give more or longer rows."
            )
        mean = kept.mean(0)
        self.functions |= {"mean": lambda x: mean.expand(x.shape), "zero": torch.zeros_like}
        sums = [self._reconstruction(x, keep, mean) for x, keep in zip(captured, keeps, strict=True)]
        with task(total=len(batches) * (1 + len(SPLICES)), description="Splicing the SAE", unit="passes") as running:
            losses = []
            for batch, keep in zip(batches, keeps, strict=True):
                losses.append(self._losses(batch, keep))
                running.advance(1 + len(SPLICES))
        total = sum(batch.n_tokens for batch in batches)
        return self._report(_joined(sums), _joined(losses), len(kept) / total)

    def _reconstruction(self, x: Tensor, keep: Tensor, mean: Tensor) -> dict[str, np.ndarray]:
        """Sums over the kept tokens of each row."""
        rows, flat = keep.nonzero(as_tuple=True)[0], x[keep]
        active = self.encode(flat) > 0
        self.fired |= active.any(0).cpu()
        values = {
            "tokens": torch.ones(len(flat)),
            "l0": active.sum(1),
            "total": squared_error(flat, mean.expand(flat.shape)),
        }
        for name in ("sae", "random", "identity", "mean"):
            values[f"error_{name}"] = squared_error(flat, self.functions[name](flat))
        sums = {}
        for name, value in values.items():
            sums[name] = (
                torch.zeros(len(x), dtype=torch.float64).index_add_(0, rows.cpu(), value.double().cpu()).numpy()
            )
        return sums

    def _losses(self, batch: TokenBatch, keep: Tensor) -> dict[str, np.ndarray]:
        """Mean loss of each row, clean and under each splice, and the KL of the SAE splice."""
        clean = self.model.logits(batch, keep="all")
        losses = {"clean": _row_means(_next_token_loss(clean, batch))}
        for name in SPLICES:
            function = self.functions[name.split("_")[0]]
            tokens = batch.mask if name.endswith(("_all", "_sinks")) else keep
            with self.model.plan(Intervention.at(self.site, Map(function), scope=Mask(tokens))):
                if name != "sae":
                    losses[name] = _row_means(self.model.loss(batch))
                    continue
                spliced = self.model.logits(batch, keep="all")
                losses["sae"] = _row_means(_next_token_loss(spliced, batch))
                losses["kl"] = _row_means(kl_divergence(clean, spliced).masked_fill(~batch.mask, float("nan")))
        return losses

    def _report(self, sums: dict[str, np.ndarray], losses: dict[str, np.ndarray], kept_share: float) -> SAEReport:
        seed, n_rows = self.options.seed, len(losses["clean"])
        used = sums["tokens"] > 0
        per_row = {name: value[used] for name, value in sums.items()}

        def ratio(top: np.ndarray, bottom: np.ndarray) -> Estimate:
            return bootstrap_ratio(top, bottom, unit="rows", seed=seed)

        def recovered(name: str, baseline: str) -> Estimate:
            return ratio(losses[baseline] - losses[name], losses[baseline] - losses["clean"])

        differences = {name: losses[name] - losses["clean"] for name in SPLICES}
        return SAEReport(
            site=self.site, n_rows=n_rows, n_tokens=int(sums["tokens"].sum()), kept_share=kept_share,
            l0=ratio(per_row["l0"], per_row["tokens"]),
            fvu=ratio(per_row["error_sae"], per_row["total"]),
            dead=dead_share(self.fired),
            ce_clean=bootstrap_mean(losses["clean"], seed=seed),
            ce={name: bootstrap_mean(losses[name], seed=seed) for name in SPLICES},
            ce_difference={name: bootstrap_mean(value, seed=seed) for name, value in differences.items()},
            recovered={baseline: recovered("sae", baseline) for baseline in ("zero", "zero_all", "mean")},
            recovered_controls={name: recovered(name, "zero") for name in ("sae_sinks", "mean", "random", "identity")},
            fvu_controls={
                name: ratio(per_row[f"error_{name}"], per_row["total"]) for name in ("mean", "random", "identity")
            },
            kl=bootstrap_mean(losses["kl"], seed=seed),
        )  # fmt: skip


def _kept(rule: KeepRule, x: Float[Tensor, "rows pos d"], batch: TokenBatch) -> Bool[Tensor, "rows pos"]:
    first = batch.positions == 0
    return rule.mask(x.cpu(), batch.ids.cpu()).to(x.device) & batch.mask & ~first


def _next_token_loss(logits: Float[Tensor, "rows pos d_vocab"], batch: TokenBatch) -> Float[Tensor, "rows targets"]:
    """What `Model.loss` gives, from logits that are there already; row by row as there, for equal rounding."""
    pairs = zip(logits, batch.ids[:, 1:], strict=True)
    loss = torch.stack([cross_entropy(row[:-1], target, reduction="none") for row, target in pairs])
    return loss.masked_fill(~(batch.mask[:, 1:] & batch.mask[:, :-1]), float("nan"))


def _row_means(values: Float[Tensor, "rows pos"]) -> np.ndarray:
    return values.double().nanmean(1).cpu().numpy()


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _random_sae(sae: Any, seed: int) -> Reconstruct:
    """Reconstruction by an SAE of the same shape and `b_dec` with random unit decoder rows and a tied encoder."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(sae.W_dec.shape, generator=random)
    W = (W / W.norm(dim=1, keepdim=True)).to(sae.W_dec.device)
    bias = sae.b_dec.detach().float()
    k = min(int(getattr(sae.cfg, "k", 32)), len(W))

    def reconstruct(x: Tensor) -> Tensor:
        top = ((x - bias) @ W.t()).topk(k, dim=1)
        acts = torch.zeros(len(x), len(W), device=x.device).scatter_(1, top.indices, top.values.relu())
        return acts @ W + bias

    return reconstruct
