"""Many interventions on the same prompts, as rows of few forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.progress import track
from workbench.core.tokenizer import decoded
from workbench.core.tokens import TokenBatch, labelled
from workbench.hooks.sites import Site, SiteMap
from workbench.interventions.gates import When
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import Plan
from workbench.interventions.proof import EditReports
from workbench.interventions.scopes import Last
from workbench.interventions.variants import variants
from workbench.models.choice import chosen_tokens
from workbench.models.numbers import has_nan
from workbench.models.segment import Segment
from workbench.models.wrapped import Wrapped

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, kw_only=True)
class VariantLogits(Shown):
    """What several interventions do to the next-token logits of the same prompts.

    Attributes:
        logits: at the last token of each prompt, fp32; of all tokens, or of the tokens that were asked for.
        clean: the same without an edit.
        report: what each edit did. Interventions that differ in parameters only count as one edit with rows.
        how: which blocks were run, in words.
        interventions: what was compared.
        batch: the prompts.
        tokens: ids of the tokens that were asked for; None for all.
    """

    logits: Float[Tensor, "variants batch k"]
    clean: Float[Tensor, "batch k"]
    report: EditReports
    how: str
    interventions: tuple[Intervention, ...]
    batch: TokenBatch
    tokens: Int[Tensor, " k"] | None = None

    def frame(self, k: int = 5) -> pd.DataFrame:
        """One row per intervention, prompt and token, labelled by the prompt and joined to what the intervention is.

        `change` is the logit less that of the unedited model. Where logits of all tokens are known, `probability` and
        `clean_probability` are there too.

        Args:
            k: of logits of all tokens, how many are listed: those that the intervention makes most probable.
        """
        n, batch, width = self.logits.shape
        k = min(k, width) if self.tokens is None else width
        places = self.logits.topk(k).indices if self.tokens is None else torch.arange(width).expand(n, batch, width)
        variant, row, _ = (part.tolist() for part in torch.ones(places.shape).nonzero(as_tuple=True))
        ids = (places if self.tokens is None else self.tokens.to(places.device)[places]).flatten().tolist()
        known = [intervention.row() for intervention in self.interventions]
        columns: dict[str, object] = {"variant": variant}
        columns |= {name: [known[v].get(name) for v in variant] for name in dict.fromkeys(x for r in known for x in r)}
        columns |= {"token_id": ids}
        if self.batch.tokenizer:
            columns["token"] = [decoded(self.batch.tokenizer, [i]) for i in ids]
        columns |= {name: values.cpu().numpy() for name, values in self._values(places.to(self.logits.device)).items()}
        return labelled(columns, self.batch.index, row)

    def _values(self, places: Int[Tensor, "variants batch k"]) -> dict[str, Float[Tensor, " rows"]]:
        """Numbers at some places of the logits, in row order."""

        def at(x: Float[Tensor, "variants batch d"]) -> Float[Tensor, " rows"]:
            return x.gather(-1, places).flatten()

        clean = self.clean.expand_as(self.logits)
        values = {"logit": at(self.logits), "clean": at(clean), "change": at(self.logits) - at(clean)}
        if self.tokens is None:
            values |= {"probability": at(self.logits.softmax(-1)), "clean_probability": at(clean.softmax(-1))}
        return values

    def _shown_line(self) -> str:
        n, batch, width = self.logits.shape
        sizes = (counted(n, "interventions"), counted(batch, "prompts"), counted(width, "tokens"))
        return f"{' x '.join(sizes)}; {self.how}"


@torch.no_grad()
def compare(
    model: Wrapped,
    batch: TokenBatch,
    interventions: Sequence[Intervention],
    make_plan: Callable[[Intervention], Plan],
    tokens: Int[Tensor, " k"] | None = None,
    max_tokens: int = 4096,
) -> VariantLogits:
    """Next-token logits under each intervention; see `Model.variants`.

    Args:
        model: the model.
        batch: the prompts.
        interventions: what to compare.
        make_plan: binds an intervention to the model.
        tokens: ids of the tokens whose logits are wanted; None for all.
        max_tokens: tokens in one forward pass.
    """
    if not interventions:
        raise DegenerateInputError("variants([]): there is no intervention to compare. Give at least one.")
    resolved = [make_plan(intervention).intervention for intervention in interventions]
    edits = [edit for intervention in resolved for edit in intervention.edits]
    site = _earliest(model.site_map, resolved) or "resid_post.-1"
    ends_in_token = bool(batch.mask[:, -1].all())
    last = ends_in_token and all(edit.scope.only_last for edit in edits) and not any(e.op.gated for e in edits)
    whole = any(edit.site.kind == "logits" for edit in edits)
    segment = Segment(model, batch, "final_norm" if whole else site, last=last and not whole)
    clean = segment.logits if tokens is None else segment.logits[:, tokens]
    size = max(1, max_tokens // (len(batch) * (1 if last else batch.ids.shape[1])))
    found, reports = [], []
    for start in track(range(0, len(resolved), size), description="variants", unit="batches"):
        part = resolved[start : start + size]
        together = variants(part, len(batch))
        if not together.edits:
            found.append(clean.repeat(len(part), 1))
            continue
        with make_plan(together) as plan:
            if whole:
                found.append(_whole(model, batch, len(part), tokens))
            else:
                found.append(segment.run(rows=len(part), plan=plan).logits(tokens))
        reports.extend(plan.report)
    logits = torch.cat(found).unflatten(0, (len(resolved), len(batch)))
    if has_nan(logits):
        variant, row = logits.amax(-1).isnan().nonzero()[0].tolist()
        edits = "; ".join(map(str, resolved[variant].edits))
        raise InvalidInputError(
            f"variants: the logits of row {row} are NaN under intervention {variant} ({edits}). Make it weaker, or "
            "load the model with dtype='float32'."
        )
    how = "the whole model was run" if whole else segment.how
    return VariantLogits(
        logits=logits, clean=clean, report=EditReports(reports), how=how,
        interventions=tuple(interventions), batch=batch, tokens=tokens,
    )  # fmt: skip


def _whole(model: Wrapped, batch: TokenBatch, copies: int, tokens: Tensor | None) -> Tensor:
    """Logits at the last token of each row from a run of the whole model."""
    rows = TokenBatch(batch.ids.repeat(copies, 1), batch.mask.repeat(copies, 1))
    return model.head.logits(model._inputs(rows), chosen_tokens(rows, Last(), model._wording), tokens)


def _earliest(sites: SiteMap, interventions: Iterable[Intervention]) -> Site | None:
    """The first site that any of the interventions edits or reads; None if none edits anything."""
    edits = [edit for intervention in interventions for edit in intervention.edits]
    gates = [edit.op.gate for edit in edits if isinstance(edit.op, When)]
    used = [edit.site for edit in edits] + [gate.site for gate in gates if gate.site is not None]
    return min((sites[site].site for site in used), key=lambda site: site.order, default=None)
