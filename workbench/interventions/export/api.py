"""One entry for all kinds of export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.core.errors import DegenerateInputError, InvalidInputError, did_you_mean
from workbench.hooks.sites import SiteMap
from workbench.interventions.export.lora import export_lora
from workbench.interventions.export.result import TOLERANCE, Exported
from workbench.interventions.export.stream import require_copyable
from workbench.interventions.export.vectors import export_gguf, export_hook, export_lm_eval
from workbench.interventions.export.weights import export_weights
from workbench.interventions.intervention import Intervention
from workbench.interventions.plan import active_plans

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TO_FILE = {"lora": export_lora, "gguf": export_gguf, "lm_eval": export_lm_eval, "hook": export_hook}


def export(
    hf: PreTrainedModel,
    sites: SiteMap,
    intervention: Intervention,
    kind: str,
    out: str | Path | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """An intervention as something that other programs run.

    Args:
        hf: the model; it is not changed.
        sites: where its sites are.
        intervention: what to export.
        kind: "weights", a changed copy of the model; "lora", a PEFT adapter; "gguf", a control vector of llama.cpp and
            repeng; "lm_eval", a steering file of lm-evaluation-harness; "hook", a few lines of Python and a file of
            vectors.
        out: file or folder to write; only "weights" can do without.
        tolerance: largest allowed difference of a logit from the edited model, on probe tokens; in proportion for an
            intervention that moves logits by more than 1.

    Raises:
        NotExactlyExportable: if this kind can't express the intervention, with the edit and the reason.
    """
    known = ("weights", *_TO_FILE)
    if kind not in known:
        raise InvalidInputError(f"export(kind={kind!r}): {did_you_mean(kind, known)}")
    if not intervention.edits:
        raise DegenerateInputError("export: the intervention has no edits, so there is nothing to export.")
    require_copyable(hf, active_plans(hf), needs_fp32=kind in ("weights", "lora", "lm_eval"))
    if kind == "weights":
        return export_weights(hf, sites, intervention, None if out is None else Path(out), tolerance)
    if out is None:
        raise InvalidInputError(f"export(kind={kind!r}) writes a file; name it with out=....")
    return _TO_FILE[kind](hf, sites, intervention, Path(out), tolerance)
