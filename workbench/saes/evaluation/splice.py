"""Where an SAE reads and writes, which tokens count there, and what the model loses when something is put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import MismatchError, WidthError
from workbench.core.metrics import kl_divergence
from workbench.core.tokenizer import special_ids
from workbench.core.tokens import TokenBatch
from workbench.interventions.chosen import Mask
from workbench.interventions.intervention import Intervention
from workbench.interventions.replacing import Patch
from workbench.models.model import Model
from workbench.saes.formats.load import sae_keep_rule

RULE_ROWS = 16
"""Rows from which the keep rule of an SAE without one is estimated; a constant, so that batches don't decide."""


@dataclass(frozen=True)
class SpliceSites:
    """Where an SAE reads and where its reconstruction goes; the same site unless it is a transcoder."""

    read: str
    write: str

    @classmethod
    def of(cls, model: Model, sae: AnySAE) -> SpliceSites:
        """From the metadata of an SAE that belongs to this model.

        Raises:
            MismatchError: if it does not, or if a transcoder names no output or one of another width.
        """
        basis = placed_at(sae, model)
        read, out = str(basis.site), basis.site_out
        if out is None:
            raise MismatchError(
                f"This {basis.architecture} reads {read} and does not say what it reconstructs. Set "
                "metadata.hook_name_out, as load_sae(..., site_out='mlp_out.5')."
            )
        write = str(model.resolve(out))
        if basis.d_out != model.width(write):
            raise WidthError(
                f"This SAE writes vectors of width {basis.d_out}; {write} of {model.name} has width "
                f"{model.width(write)}. A transcoder names its output in metadata.hook_name_out."
            )
        return cls(read, write)

    @property
    def distinct(self) -> tuple[str, ...]:
        """The sites to capture."""
        return (self.read,) if self.read == self.write else (self.read, self.write)


@dataclass(frozen=True)
class Part:
    """One batch at the sites of an SAE.

    Attributes:
        x: what the SAE reads, fp32.
        target: what it should reconstruct; `x` itself unless it is a transcoder.
        keep: the tokens that count.
    """

    batch: TokenBatch
    x: Float[Tensor, "rows pos d_in"]
    target: Float[Tensor, "rows pos d_out"]
    keep: Bool[Tensor, "rows pos"]


@dataclass(frozen=True)
class SpliceReader:
    """Reads batches of a model at the sites of an SAE.

    Attributes:
        write_rule: a transcoder's output has sinks of its own; None where it is the site that is read.
    """

    model: Model
    sites: SpliceSites
    rule: TokenPolicy
    write_rule: TokenPolicy | None = None

    @classmethod
    def of(cls, model: Model, sae: AnySAE, batches: Iterable[TokenBatch]) -> SpliceReader:
        """With the rule that the SAE was trained by; for one from elsewhere it is estimated from the first rows."""
        sites, rule = SpliceSites.of(model, sae), sae_keep_rule(sae)
        missing = [site for site in sites.distinct if site != sites.read or rule is None]
        estimated = estimate_rules(model, missing, batches) if missing else {}
        return cls(
            model, sites, rule or estimated[sites.read], estimated.get(sites.write) if len(sites.distinct) > 1 else None
        )

    def read(self, batch: TokenBatch) -> Part:
        """Activations and kept tokens of one batch; the model stops behind the last site."""
        acts = self.model.capture(batch, self.sites.distinct)
        x, target = (acts.flat(site).float() for site in (self.sites.read, self.sites.write))
        keep = self.rule.mask(x.cpu(), batch.ids.cpu()).to(x.device) & batch.mask & (batch.positions > 0)
        if self.write_rule is not None:
            keep &= target.norm(dim=-1) <= self.write_rule.max_norm
        return Part(batch, x, target, keep)


def estimate_rules(model: Model, sites: list[str], batches: Iterable[TokenBatch]) -> dict[str, TokenPolicy]:
    """Token policies with `max_norm` at ten times the median norm of the first rows' ordinary tokens.

    Raises:
        DegenerateInputError: if all of their tokens are first or special ones.
    """
    special = special_ids(model.tokenizer)
    norms: dict[str, list[Tensor]] = {site: [] for site in sites}
    n_rows = 0
    for batch in batches:
        batch = batch[: RULE_ROWS - n_rows]
        n_rows += len(batch)
        ids = torch.tensor(special, dtype=torch.long, device=batch.ids.device)
        ordinary = batch.mask & (batch.positions > 0) & ~torch.isin(batch.ids, ids)
        acts = model.capture(batch, sites)
        for site in sites:
            norms[site].append(acts.flat(site).float().norm(dim=-1)[ordinary].cpu())
        if n_rows >= RULE_ROWS:
            break
    return {site: TokenPolicy.from_norms(torch.cat(parts), special) for site, parts in norms.items()}


class Splicer:
    """Losses of one batch with something else at the write site; the blocks in front of it run once."""

    def __init__(self, reader: SpliceReader, part: Part) -> None:
        self._model, self._site, self._part = reader.model, reader.sites.write, part
        self._segment = self._model.segment(part.batch, self._site)
        with torch.no_grad():
            self._clean = self._segment.run().hidden

    def clean(self) -> Float[Tensor, " rows"]:
        """Mean next-token loss of each row of the unchanged model, in nats."""
        return self._losses(self._clean)

    def loss(self, x_hat: Float[Tensor, "rows pos d_out"], tokens: Bool[Tensor, "rows pos"]) -> Float[Tensor, " rows"]:
        """The same with `x_hat` in place of the activations of these tokens."""
        return self._losses(self._hidden(x_hat, tokens))

    def loss_and_kl(
        self, x_hat: Float[Tensor, "rows pos d_out"], tokens: Bool[Tensor, "rows pos"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Also the mean KL divergence, clean to spliced, of the next-token distribution over each row's tokens."""
        hidden = self._hidden(x_hat, tokens)
        return self._losses(hidden), self._by_row(hidden, self._row_kl)

    @torch.no_grad()
    def _hidden(self, x_hat: Tensor, tokens: Tensor) -> Tensor:
        if not bool(tokens.any()):
            return self._clean
        edit = Intervention.at(
            self._site, Patch.of_run(x_hat, self._part.batch), scope=Mask(tokens, may_skip_rows=True)
        )
        with self._model.plan(edit) as plan:
            return self._segment.run(plan=plan).hidden

    def _losses(self, hidden: Tensor) -> Tensor:
        return self._by_row(hidden, self._row_loss)

    @torch.no_grad()
    def _by_row(self, hidden: Tensor, fn: Callable[[int, Tensor], Tensor]) -> Tensor:
        # One row of logits at a time: a batch of them is larger than the model.
        return torch.stack([fn(i, self._model.head.all(h)) for i, h in enumerate(hidden)])

    def _row_loss(self, row: int, logits: Tensor) -> Tensor:
        ids, mask = self._part.batch.ids[row], self._part.batch.mask[row]
        loss = cross_entropy(logits[:-1], ids[1:], reduction="none").double()
        return loss[mask[1:] & mask[:-1]].mean()

    def _row_kl(self, row: int, logits: Tensor) -> Tensor:
        clean = self._model.head.all(self._clean[row])
        return kl_divergence(clean, logits).double()[self._part.batch.mask[row]].mean()
