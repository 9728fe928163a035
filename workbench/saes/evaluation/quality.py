"""The result of evaluating an SAE: its numbers, each beside its controls, and what they mean in words."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.numbers import counted, number
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Headline, Report, Says, Section, Table

_LABELS = {
    "sae": "this SAE", "sae_sinks": "this SAE, sinks spliced too", "random": "random SAE (control)",
    "mean": "mean predictor (control)", "identity": "identity (control)",
    "zero": "zero ablation, sinks kept", "zero_all": "zero ablation, all tokens",
}  # fmt: skip
_RECOVERED = "loss recovered"


@dataclass(frozen=True, kw_only=True)
class SAEReport(Report):
    """Quality of one SAE on one set of rows; all intervals are over rows.

    Only tokens that the keep rule keeps are reconstructed or spliced, unless a field says otherwise: attention sinks
    stay as they are. Losses are means over all next-token targets of the rows, in nats per token.

    Attributes:
        target_site: what it reconstructs: the same, unless it is a transcoder.
        l0: mean number of active features per kept token.
        fvu: unexplained over total variance of the kept tokens.
        dead: share of features that were silent on all `n_tokens` tokens. On few tokens rare features look dead.
        ce: loss by splice: "sae", "sae_sinks" (sinks reconstructed too), "zero_all", "zero" (sinks kept), "mean"
            (the mean predictor, sinks kept), "random" (an SAE of the same shape with random weights), "identity".
        recovered: share of the loss that the SAE recovers, by ablation baseline "zero" (headline), "zero_all", "mean".
        recovered_controls: the headline number for the controls "sae_sinks", "mean", "random" and "identity".
        fvu_controls: FVU of "mean" (1 by definition), "random" and "identity".
        kl: KL divergence of the next-token distribution, clean to spliced, in nats.
        ahead_of_random: loss with the random SAE minus loss with this one, row by row on the same rows; above 0 this
            one is better.
        dense: share of the features that are active on more than 1 % ("1%") and 10 % ("10%") of the kept tokens.
        mse: squared error of a kept token, summed over the dimensions, mean over tokens.
        mse_all_elements: squared error of an element of any token, sinks counted; mean over rows of the mean of each.
        cosine: mean cosine of a kept token and its reconstruction; a large common mean raises it.
        shrinkage: mean of the norm of the reconstruction over the norm of the token; below 1 it is too small.
        reconstruction_bias: `E|x_hat|^2 / E[x . x_hat]`; 1 means that no rescaling would help, below 1 shrinkage;
            None where the reconstruction is zero.
        ev_legacy: explained variance as others define it: "per_token" (mean of ratios), "all_tokens" (sinks counted),
            "all_elements" (one scalar variance per row, sinks counted). They flatter; not for comparing SAEs.
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
    ahead_of_random: Estimate
    target_site: str
    dense: dict[str, float]
    mse: Estimate
    mse_all_elements: Estimate
    cosine: Estimate
    shrinkage: Estimate
    reconstruction_bias: Estimate | None
    ev_legacy: dict[str, Estimate]
    decoder_norms: dict[str, float]

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`, over kept tokens only."""
        return 1 - self.fvu.value

    def findings(self) -> tuple[str, ...]:
        """The headline numbers and whether they beat the controls."""
        random, headline = self.recovered_controls["random"], self.recovered["zero"]
        ahead = self.ahead_of_random
        beats = ahead.words("is better than", "is worse than", "is not clearly better than")
        return (
            f"The SAE leaves {self.fvu} of the variance at {self.target_site} unexplained, with "
            f"{number(self.l0.value)} features per token, over {counted(self.n_tokens, 'kept tokens')} (a share of "
            f"{number(self.kept_share)} of all; the rest are first, special or sink tokens).",
            f"Spliced into the model it recovers {headline} of the loss that zero ablation costs (sinks kept) and adds "
            f"{self.ce_difference['sae']} nats; it {beats} a random SAE of the same shape "
            f"({random}, with a loss {ahead} nats above that of this SAE on the same rows).",
            f"A share of {number(self.dead)} of the features was silent on these {counted(self.n_tokens, 'tokens')}, "
            f"{number(self.dense['10%'])} active on more than a tenth of them.",
            f"With attention sinks reconstructed as well, {self.recovered_controls['sae_sinks']} is recovered.",
        )

    def section(self) -> Section:
        """The findings with one table of the SAE beside its controls."""
        quality, recovered = self._quality(), {"sae": self.recovered["zero"], **self.recovered_controls}
        names = [key for key in _LABELS if key in recovered]
        bars = Bars(
            "Loss recovered", tuple(_LABELS[key] for key in names), tuple(recovered[key] for key in names),
            "share of the loss that zero ablation costs",
        )  # fmt: skip
        baselines = Table(
            ("ablation", "loss recovered"),
            tuple((_LABELS[key], value) for key, value in self.recovered.items()),
            "The same SAE against each ablation baseline.",
        )
        shape = Table(
            ("number", "value"),
            tuple(self._shape().items()),
            "Over the kept tokens. The last rows are explained variance as other tools define it: they flatter.",
        )
        metrics = {
            **{name: value for name, value in self._shape().items() if value is not None},
            "fvu": self.fvu, "l0": self.l0, "dead": self.dead, "kept_share": self.kept_share, "n_tokens": self.n_tokens,
            "ce_clean": self.ce_clean, "ce_difference": self.ce_difference["sae"], "kl": self.kl,
            "ahead_of_random": self.ahead_of_random,
            **{f"recovered_{key}": value for key, value in self.recovered.items()},
            **{f"recovered_zero_{key}": value for key, value in self.recovered_controls.items()},
        }  # fmt: skip
        where = self.site if self.site == self.target_site else f"{self.site} to {self.target_site}"
        return Section(
            f"SAE at {where}",
            (bars, quality, self._paired(), baselines, shape),
            self.findings(),
            metrics,
            self.headline(),
        )

    def headline(self) -> Headline:
        """Loss recovered beside a random SAE, by the difference of their losses on the same rows."""
        quality, sae, random = self._quality(), _LABELS["sae"], _LABELS["random"]
        return Headline.read(
            Says(
                "Spliced into the model, the SAE keeps more of what it does than a random SAE of the same shape.",
                "Spliced into the model, the SAE keeps no more of what it does than a random SAE of the same shape.",
                "Spliced into the model, the SAE keeps less of what it does than a random SAE of the same shape.",
            ),
            value=(quality, sae, _RECOVERED), control=(quality, random, _RECOVERED),
            difference=(self._paired(), random, "nats per token"),
            difference_name="loss of the random SAE minus loss of this one, nats per token",
        )  # fmt: skip

    def _quality(self) -> Table:
        fvus = {"sae": self.fvu, **self.fvu_controls}
        recovered = {"sae": self.recovered["zero"], **self.recovered_controls}
        rows = tuple(
            (label, fvus.get(key), self.ce[key], self.ce_difference[key], recovered.get(key))
            for key, label in _LABELS.items()
        )
        return Table(
            ("spliced in", "FVU", "loss (nats)", "loss minus clean", _RECOVERED),
            rows,
            f"The SAE beside its controls. Clean loss {self.ce_clean}. Recovered: (zero ablation − splice) / (zero "
            "ablation − clean), zero ablation with sinks kept. Intervals are over rows.",
        )

    def _paired(self) -> Table:
        rows = ((_LABELS["random"], self.ahead_of_random),)
        return Table(("control", "nats per token"), rows, "Loss with the control minus loss with the SAE. Row by row.")

    def _shape(self) -> dict[str, Estimate | float | None]:
        """What is reported without a control of its own."""
        return {
            "explained_variance": self.explained_variance,
            **{f"dense_above_{level}": share for level, share in self.dense.items()},
            "mse": self.mse, "mse_all_elements": self.mse_all_elements, "cosine": self.cosine,
            "shrinkage": self.shrinkage, "reconstruction_bias": self.reconstruction_bias,
            **{f"decoder_norm_{name}": value for name, value in self.decoder_norms.items()},
            **{f"ev_legacy_{name}": value for name, value in self.ev_legacy.items()},
        }  # fmt: skip
