"""Does a repair help, does it cost anything, and would the wrong rows have done as well? Measured before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.core.codec import codec_of
from workbench.core.errors import DegenerateInputError, require
from workbench.core.progress import task
from workbench.core.stats import paired_difference
from workbench.glitch.repairing.repair import Control, Repair, control_of
from workbench.glitch.repairing.repair_report import RepairReport
from workbench.glitch.verification.chat import Forms, prompt_set
from workbench.glitch.verification.prompts import Template
from workbench.glitch.verification.scoring import VerifyOptions
from workbench.glitch.verification.sides import measure_sides
from workbench.glitch.verification.verify import verify
from workbench.glitch.vocabulary.tokenizer import Vocabulary, draw_controls, vocabulary_of
from workbench.interventions.intervention import Intervention
from workbench.models.model import Model
from workbench.saes.formats.placement import TEXTS


@dataclass(frozen=True, kw_only=True)
class RepairCheckOptions:
    """How a repair is judged.

    Attributes:
        controls: random ordinary tokens that are not repaired and must be copied as before.
        texts: plain text whose loss must not rise.
        tolerance: rise of that loss, in nats per token, that the upper end of its interval may not exceed.
    """

    controls: int = 16
    texts: tuple[str, ...] = TEXTS
    tolerance: float = 0.01
    seed: int = 0
    forms: Forms = "auto"
    batch_size: int = 16
    steps: int = 1

    def __post_init__(self) -> None:
        rule = "give at least 1 control token, 2 texts, and a tolerance of at least 0 nats."
        require(self.controls >= 1 and self.tolerance >= 0 and len(self.texts) >= 2, self, rule)


def check_repair(
    model: Model, made: Repair, options: RepairCheckOptions | None = None, *, vocabulary: Vocabulary | None = None
) -> RepairReport:
    """Measures a repair as an intervention: before, after, and with the wrong sources.

    Three measures, each per token: the highest probability with which it is copied; the divergence between the next
    token after it and after its text spelled out with other tokens, which is how it is read; and, for text that it is
    not in, the loss.

    Raises:
        EditError: if the repair did not reach the model.
    """
    options, vocabulary = options or RepairCheckOptions(), vocabulary or vocabulary_of(model)
    templates = prompt_set(model, vocabulary, forms=options.forms, steps=options.steps).templates
    controls = _controls(model, made, vocabulary, options)
    kinds: tuple[Control, ...] = ("shuffled", "random") if len(made.ids) > 1 else ("random",)
    arms: dict[str, Repair | None] = {"before": None, "repaired": made}
    arms |= {kind: control_of(model, made, kind, options.seed, vocabulary) for kind in kinds}
    copied: dict[str, tuple[float, ...]] = {}
    kept: dict[str, tuple[float, ...]] = {}
    gap: dict[str, tuple[float, ...]] = {}
    edits: tuple[str, ...] = ()
    with task(total=len(arms), description="check the repair", unit="arms") as running:
        for arm, repair in arms.items():
            with model.plan(Intervention() if repair is None else repair.intervention()) as plan:
                others = controls if arm in ("before", "repaired") else []
                copied[arm], kept[arm] = _copied(model, templates, made.ids, others, options)
                gap[arm] = _gap(model, made, vocabulary, options.batch_size)
            edits = tuple(map(str, plan.report)) if arm == "repaired" else edits
            running.advance()
    before, after = _losses(model, None, options), _losses(model, made, options)
    return RepairReport(
        model=made.model, tied=made.tied, options=made.options, ids=made.ids, texts=made.texts,
        sources=tuple(tuple(vocabulary.text[j] for j in pieces) for pieces in made.sources), skipped=made.skipped,
        copied=copied, gap=gap, control_ids=tuple(controls), kept_before=kept["before"], kept_after=kept["repaired"],
        loss=paired_difference(after, before, unit="texts", seed=options.seed), tolerance=options.tolerance,
        edits=edits, prompts=tuple(one.name for one in templates), seed=options.seed,
    )  # fmt: skip


def _controls(model: Model, made: Repair, vocabulary: Vocabulary, options: RepairCheckOptions) -> list[int]:
    pool = vocabulary.pool(model.d_vocab, {*made.ids, *(i for pieces in made.sources for i in pieces)})
    if not len(pool):
        raise DegenerateInputError("check_repair: no ordinary token is left as a control. Repair fewer tokens.")
    return draw_controls(pool, options.controls, options.seed)


def _copied(
    model: Model, templates: Sequence[Template], ids: Sequence[int], controls: Sequence[int],
    options: RepairCheckOptions,
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # fmt: skip
    """Highest probability of each repaired token and of each control; every prompt is run for every token."""
    how = VerifyOptions(steps=options.steps, batch_size=options.batch_size, stop_at=None)
    done = verify(model, codec_of(model.tokenizer), templates, ids, controls, how)
    return tuple(t.max_prob for t in done.candidates), tuple(t.max_prob for t in done.controls)


def _gap(model: Model, made: Repair, vocabulary: Vocabulary, batch_size: int) -> tuple[float, ...]:
    """Nats from what follows each token's text in other tokens to what follows the token; nan where none spell it."""
    sides = measure_sides(model, codec_of(model.tokenizer), vocabulary, made.ids, [], batch_size=batch_size)
    return tuple(side.read_kl for side in sides.tested)


def _losses(model: Model, made: Repair | None, options: RepairCheckOptions) -> list[float]:
    """Mean next-token loss of each text, nats per token."""
    edit = Intervention() if made is None else made.intervention(required=False)
    losses = []
    with model.plan(edit):
        for start in range(0, len(options.texts), options.batch_size):
            losses += model.loss(list(options.texts[start : start + options.batch_size])).nanmean(1).tolist()
    return losses
