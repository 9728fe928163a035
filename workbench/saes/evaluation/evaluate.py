"""How good an SAE is: reconstruction on the tokens that count, and what splicing it into the model costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.bases.base import Basis
from workbench.bases.kinds.random import random_like
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.metrics import dead_share, decoder_norm_summary, squared_error
from workbench.core.progress import task
from workbench.core.stats import Estimate, sample_mean, sample_ratio
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.saes.evaluation.quality import SAEReport
from workbench.saes.evaluation.splice import Part, Splicer, SpliceReader

Rows = Int[Tensor, "rows pos"] | Sequence[str] | ActivationStore
Sums = dict[str, np.ndarray]

SPLICES = ("sae", "sae_sinks", "zero_all", "zero", "mean", "random", "identity")
DENSE = {"1%": 0.01, "10%": 0.10}


@checked
@dataclass(frozen=True, kw_only=True)
class EvalOptions(OneLine):
    """How an SAE is evaluated.

    Attributes:
        max_rows: at most so many rows are run through the model.
        batch_rows: rows per forward pass; no effect on the numbers beyond rounding.
        seed: of the random-weight control and of the bootstrap.
    """

    max_rows: int = 64
    batch_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_rows < 2 or self.batch_rows < 1:
            raise InvalidInputError(f"{self}: evaluate at least two rows, so that there is an interval.")


@checked
def evaluate_sae(model: Model, sae: AnySAE, rows: Rows, *, options: EvalOptions | None = None) -> SAEReport:
    """Reconstruction and splice quality of an SAE or transcoder, beside its controls.

    Of a store the held-out rows are taken.

    Two passes over the rows, one batch in memory at a time: the first for the mean and the activity of the features,
    the second for everything else.

    Raises:
        MismatchError: if SAE, store and model don't belong together.
        DegenerateInputError: if there are fewer than two rows.
    """
    options = options or EvalOptions()
    batches = token_batches(model, rows, options)
    if sum(map(len, batches)) < 2:
        raise DegenerateInputError("evaluate_sae: fewer than two rows; there would be no interval. Give more text.")
    reader = SpliceReader.of(model, sae, batches)
    return _Evaluation(reader, as_basis(sae), options).run(batches)


def token_batches(model: Model, rows: Rows, options: EvalOptions) -> list[TokenBatch]:
    """The rows to evaluate on, in batches.

    Raises:
        InvalidInputError: for a single text, and for a row of one token.
        MismatchError: for a store of another model.
    """
    batches = _batches(model, rows, options)
    short = [i for i, n in enumerate(n for batch in batches for n in batch.lengths.tolist()) if n < 2]
    if short:
        raise InvalidInputError(
            f"evaluate_sae: row {short[0]} is one token long ({len(short)} such rows); a next-token loss takes two. "
            "Remove these rows."
        )
    return batches


def _batches(model: Model, rows: Rows, options: EvalOptions) -> list[TokenBatch]:
    if isinstance(rows, ActivationStore):
        rows.check_model(model)
        store, rows = rows, rows.token_rows("heldout")
        if not len(rows):
            raise DegenerateInputError(
                f"evaluate_sae: none of the {len(store.token_rows('all'))} rows of {store.path} is held out (about one "
                "in ten is). Harvest more rows, or give other text."
            )
    if isinstance(rows, Tensor):
        rows = rows[: options.max_rows]
        return [TokenBatch.of_rows(part).to(model.device) for part in rows.split(options.batch_rows)]
    if isinstance(rows, str):
        raise InvalidInputError("evaluate_sae(rows=<one text>): give a list of texts, so that there is an interval.")
    tokens = model.tokens(list(rows)[: options.max_rows])
    return [tokens[start : start + options.batch_rows] for start in range(0, len(tokens), options.batch_rows)]


@dataclass(frozen=True)
class _First:
    """What the first pass found: means of the target, activity of the features."""

    mean: Float[Tensor, " d_out"]
    mean_all: Float[Tensor, " d_out"]
    n_kept: int
    n_tokens: int
    fired: Int[Tensor, " d_sae"]


class _Evaluation:
    """One evaluation: what it is measured with, and the sums per row."""

    def __init__(self, reader: SpliceReader, basis: Basis, options: EvalOptions) -> None:
        self.reader, self.basis, self.options = reader, basis, options

    @torch.no_grad()
    def run(self, batches: list[TokenBatch]) -> SAEReport:
        first = self._first_pass(batches)
        random = random_like(self.basis, round(int(first.fired.sum()) / first.n_kept), self.options.seed)
        sums, losses = [], []
        with task(total=len(batches) * (1 + len(SPLICES)), description="Splicing the SAE", unit="passes") as running:
            for batch in batches:
                part = self.reader.read(batch)
                hats = self._reconstructions(part, random, first)
                sums.append(_reconstruction_sums(part, hats, first))
                losses.append(_losses(self.reader, part, hats))
                running.advance(1 + len(SPLICES))
        return self._report(first, _joined(sums), _joined(losses))

    def _first_pass(self, batches: list[TokenBatch]) -> _First:
        width = self.basis.d_out
        total, total_all = torch.zeros(2, width, dtype=torch.float64)
        n_kept, n_tokens = 0, 0
        fired = torch.zeros(self.basis.d_sae, dtype=torch.long)
        for batch in batches:
            part = self.reader.read(batch)
            total += part.target[part.keep].double().sum(0).cpu()
            total_all += part.target[batch.mask].double().sum(0).cpu()
            n_kept, n_tokens = n_kept + int(part.keep.sum()), n_tokens + batch.n_tokens
            for _, acts in self.basis.chunks(part.x[part.keep]):
                fired += (acts != 0).sum(0).cpu()
        if n_kept < 2:
            raise DegenerateInputError(
                "evaluate_sae: the keep rule leaves fewer than two tokens. Give more or longer rows."
            )
        return _First(total / n_kept, total_all / n_tokens, n_kept, n_tokens, fired)

    def _reconstructions(self, part: Part, random: Basis, first: _First) -> dict[str, Tensor]:
        """What each splice puts in place, for all real tokens; zero at padding."""
        mask = part.batch.mask
        hats = {name: torch.zeros_like(part.target) for name in ("sae", "random", "mean", "zero")}
        hats["sae"][mask] = self.basis.reconstruct(part.x[mask]).to(part.target)
        hats["random"][mask] = random.reconstruct(part.x[mask]).to(part.target)
        hats["mean"][mask] = first.mean.to(part.target)
        hats["identity"] = part.target
        counts = torch.zeros_like(part.keep, dtype=torch.float64)
        x = part.x[part.keep]
        active = [(acts != 0).sum(1) for _, acts in self.basis.chunks(x)]
        counts[part.keep] = torch.cat(active).double() if active else counts[part.keep]
        return {**hats, "active": counts}

    def _report(self, first: _First, sums: Sums, losses: Sums) -> SAEReport:
        seed, n_rows = self.options.seed, len(losses["clean"])
        used = sums["tokens"] > 0
        kept = {name: value[used] for name, value in sums.items()}

        def ratio(top: np.ndarray, bottom: np.ndarray) -> Estimate:
            return sample_ratio(top, bottom, unit="rows", seed=seed)

        def mean(values: np.ndarray) -> Estimate:
            return sample_mean(values, seed=seed)

        if not kept["total"].sum():
            raise DegenerateInputError(
                f"evaluate_sae: all {first.n_kept} kept tokens are the same at {self.reader.sites.write}; there is no "
                "variance to explain. Give other text."
            )

        def recovered(name: str, baseline: str) -> Estimate:
            if losses[baseline].sum() == losses["clean"].sum():
                raise DegenerateInputError(
                    f"evaluate_sae: {baseline} ablation at {self.reader.sites.write} does not change the loss of these "
                    f"{n_rows} rows, so there is nothing to recover. Give longer, more varied rows: only tokens behind "
                    "an edit notice it."
                )
            return ratio(losses[baseline] - losses[name], losses[baseline] - losses["clean"])

        density = first.fired.double() / first.n_kept
        return SAEReport(
            site=self.reader.sites.read, target_site=self.reader.sites.write,
            n_rows=n_rows, n_tokens=first.n_kept, kept_share=first.n_kept / first.n_tokens,
            l0=ratio(kept["l0"], kept["tokens"]),
            fvu=ratio(kept["error_sae"], kept["total"]),
            dead=dead_share(first.fired > 0),
            dense={name: float((density > level).double().mean()) for name, level in DENSE.items()},
            mse=ratio(kept["error_sae"], kept["tokens"]),
            mse_all_elements=mean(sums["error_elements"]),
            cosine=ratio(kept["cosine"], kept["tokens"]),
            shrinkage=ratio(kept["norm_ratio"], kept["tokens"]),
            reconstruction_bias=ratio(kept["hat_hat"], kept["x_hat"]) if kept["x_hat"].sum() else None,
            ev_legacy={
                "per_token": ratio(kept["ev_token"], kept["tokens"]),
                "all_tokens": ratio(sums["total_all"] - sums["error_all"], sums["total_all"]),
                "all_elements": mean(sums["ev_elements"]),
            },
            decoder_norms=decoder_norm_summary(self.basis.rows()),
            ce_clean=mean(losses["clean"]),
            ce={name: mean(losses[name]) for name in SPLICES},
            ce_difference={name: mean(losses[name] - losses["clean"]) for name in SPLICES},
            recovered={baseline: recovered("sae", baseline) for baseline in ("zero", "zero_all", "mean")},
            recovered_controls={name: recovered(name, "zero") for name in ("sae_sinks", "mean", "random", "identity")},
            fvu_controls={
                name: ratio(kept[f"error_{name}"], kept["total"]) for name in ("mean", "random", "identity")
            },
            kl=mean(losses["kl"]),
            ahead_of_random=mean(losses["random"] - losses["sae"]),
        )  # fmt: skip


def _reconstruction_sums(part: Part, hats: dict[str, Tensor], first: _First) -> Sums:
    """Sums over the kept tokens of each row; those named `_all` are over all its tokens."""
    x, x_hat, mask = part.target.double(), hats["sae"].double(), part.batch.mask
    error = (x - x_hat).square().sum(-1)
    total = (x - first.mean.to(x)).square().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    norm, norm_hat, dot = x.norm(dim=-1).clamp_min(tiny), x_hat.norm(dim=-1), (x * x_hat).sum(-1)
    values = {
        "tokens": torch.ones_like(error), "l0": hats["active"], "total": total, "error_sae": error,
        "cosine": dot / (norm * norm_hat).clamp_min(tiny), "norm_ratio": norm_hat / norm,
        "x_hat": dot, "hat_hat": norm_hat.square(), "ev_token": 1 - error / total.clamp_min(tiny),
        **{f"error_{name}": _errors(part.target, hats[name]) for name in ("random", "identity", "mean")},
    }  # fmt: skip
    sums = {name: _row_sums(value, part.keep) for name, value in values.items()}
    sums["error_all"] = _row_sums(error, mask)
    sums["total_all"] = _row_sums((x - first.mean_all.to(x)).square().sum(-1), mask)
    rows = [(a[m], b[m]) for a, b, m in zip(x, x_hat, mask, strict=True)]
    elements = [1 - (a - b).var(correction=0) / a.var(correction=0) for a, b in rows]
    errors = [(a - b).square().mean() for a, b in rows]
    return {
        **sums, "ev_elements": torch.stack(elements).cpu().numpy(), "error_elements": torch.stack(errors).cpu().numpy()
    }  # fmt: skip


def _errors(x: Tensor, x_hat: Tensor) -> Tensor:
    return squared_error(x.flatten(0, 1), x_hat.flatten(0, 1)).view(x.shape[:2])


def _row_sums(values: Tensor, keep: Tensor) -> np.ndarray:
    return values.double().masked_fill(~keep, 0.0).sum(1).cpu().numpy()


def _losses(reader: SpliceReader, part: Part, hats: dict[str, Tensor]) -> Sums:
    """Mean loss of each row, clean and under each splice, and the KL of the SAE splice."""
    splicer = Splicer(reader, part)
    losses = {"clean": splicer.clean()}
    for name in SPLICES:
        tokens = part.batch.mask if name.endswith(("_all", "_sinks")) else part.keep
        x_hat = hats[name.split("_")[0]]
        if name == "sae":
            losses["sae"], losses["kl"] = splicer.loss_and_kl(x_hat, tokens)
        else:
            losses[name] = splicer.loss(x_hat, tokens)
    return {name: value.double().cpu().numpy() for name, value in losses.items()}


def _joined(parts: Sequence[Sums]) -> Sums:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
