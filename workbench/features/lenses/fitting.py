"""One call for every kind of lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workbench.activations.store import ActivationStore
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.features.lenses.files import LensKind
from workbench.features.lenses.jacobian import SKIP_FIRST, jacobian_lens
from workbench.features.lenses.linear import LinearLens
from workbench.features.lenses.places import lens_sites, target_of
from workbench.features.lenses.regression import fit_regression
from workbench.features.lenses.source import CONTEXT, rows_of
from workbench.features.lenses.tuned import TunedOptions, fit_tuned
from workbench.models.model import Model


@checked
def fit_lens(
    model: Model,
    kind: LensKind = "regression",
    source: ActivationStore | TokenBatch | Sequence[str] | None = None,
    *,
    sites: Sequence[str] | None = None,
    prompts: int = 25,
    context: int = CONTEXT,
    skip_first: int = SKIP_FIRST,
    options: TunedOptions | None = None,
    out: str | Path | None = None,
    resume: bool = True,
) -> LinearLens:
    """A lens with a map per site, fitted on text or on stored activations.

    "logit" reads the stream as it is. "regression" takes the map whose output is closest to that of the last block, by
    ridge regression. "tuned" refines it by the divergence of its readings from the model's output. "jacobian" takes the
    mean derivative of the last block's output, which costs a backward pass per dimension and prompt; see
    `jacobian_lens` for what can be had for less.

    Args:
        model: the model.
        kind: of the lens.
        source: texts, tokens or a store; a store that holds all sites and the last block's output is not run again for
            a regression.
        sites: in the residual stream; by default the output of every block but the last.
        prompts: of a Jacobian lens.
        context: tokens of a text that are used: its first.
        skip_first: tokens at the start of a prompt that a Jacobian lens does not count.
        options: of a tuned lens.
        out: folder that the lens is saved to; a tuned and a Jacobian lens that were stopped continue there.
        resume: continue what is in `out`; False begins again.

    Raises:
        InvalidInputError: without text to fit on.
        DegenerateInputError: for too little text.
        MismatchError: for a site outside the residual stream, a store of another model, or an `out` that holds
            something else.

    Source: nostalgebraist 2020 (logit); Belrose et al. 2023, arXiv 2303.08112 (tuned); Gurnee et al. 2026 (Jacobian).
    """
    chosen = lens_sites(model, sites)
    if kind == "logit":
        return LinearLens.logit(model, chosen)
    if source is None:
        raise InvalidInputError(f"fit_lens(kind={kind!r}): it is fitted on text. Give texts, tokens or a store.")
    if kind == "jacobian":
        lens = jacobian_lens(model, source, prompts, sites=sites, context=context, skip_first=skip_first)
        return lens.fit(out, resume=resume)
    rows = rows_of(model, source, context)
    if kind == "tuned":
        return fit_tuned(
            model, rows, chosen, lambda train: fit_regression(model, train, chosen), options, out, resume=resume
        )
    if isinstance(source, ActivationStore) and {*chosen, target_of(model)} <= {*source.sites}:
        lens = fit_regression(model, source, chosen)
    else:
        lens = fit_regression(model, rows, chosen)
    if out is not None:
        lens.save(out)
    return lens
