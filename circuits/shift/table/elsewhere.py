"""The procedure of SHIFT on other features than those of the SAEs: neurons at the same sites, and token embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.shift.judgement import edit_check, judge_features
from circuits.shift.needs import Need
from circuits.shift.table.base import SHIFT_METHODS
from circuits.shift.task import Prediction, ShiftStudy
from workbench.controls.methods import Method


@dataclass(frozen=True)
class _Procedure:
    """Candidates by effect, the same judge, ablation at the same tokens, the probe retrained; checked as SHIFT is."""

    need: Need

    def __call__(self, study: ShiftStudy) -> Prediction:
        assert study.judged is not None
        own = study.along(self.need)
        judgement = judge_features(own, study.judged.by)
        chosen = judgement.chosen
        edit_check(own, chosen or judgement.candidates)
        probe = own.refit(own.ablated(chosen, of="train"))
        notes = () if chosen else (f"the judge called none of {len(judgement.dossiers)} candidates spurious",)
        return Prediction((probe.predict(own.ablated(chosen, of="test")),), len(chosen), notes=notes)


def _register(name: str, need: Need, what: str) -> None:
    SHIFT_METHODS.add(
        name,
        Method(
            name=name, run=_Procedure(need), role="rival", needs=(need,), regime="R0",
            information=f"what the judge of SHIFT uses, of {what} in place of SAE features",
        ),
    )  # fmt: skip


_register("neurons SHIFT + retrain", "neurons", "neurons at the same sites")
_register("embed-only SHIFT + retrain", "tokens", "the embeddings of single tokens")
