"""The attribution doctor: one call on any attribution."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from circuits.classics.direct import DirectAttribution
from circuits.classics.patch_grid import PatchGrid
from circuits.decomposition import bases as checked_bases
from circuits.doctor import tables
from circuits.doctor.attribution import Attribution
from circuits.doctor.direct import Sizes
from circuits.doctor.examine import examined
from circuits.doctor.nodes import NodeCase, attributions_of
from circuits.doctor.report import DoctorReport
from circuits.edges.tables import Edges
from circuits.graph.circuit import Circuit
from circuits.metrics import AnyMetric
from circuits.nodes.effects import NodeEffects
from circuits.nodes.runs import Method, Rule
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

_OF_NODES = "model, bases, examples and metric"
_NAMES = {"ig": "IG", "atp": "AtP", "exact": "Exact patching"}


@checked
@dataclass(frozen=True, kw_only=True)
class DoctorOptions(OneLine):
    """How much the doctor measures.

    Attributes:
        inputs: inputs that are examined, spread evenly; 30 or more for intervals that say something.
        items: items per input and site whose effect is measured alone; half by score, half drawn.
        sites: sites that are examined, those of the largest effects.
        draws: random rankings per input.
        steps: of the integral, at which sums are compared with the total, and scores with each other.
        checks: numbers of the checks; none takes all.
        seed: of all that is drawn.
    """

    inputs: int = 30
    items: int = 50
    sites: int = 2
    draws: int = 3
    steps: tuple[int, ...] = (8, 16, 32, 64)
    checks: tuple[int, ...] = ()
    seed: int = 0

    def sizes(self) -> Sizes:
        """How much the checks measure."""
        return Sizes(items=self.items, draws=self.draws, steps=self.steps, seed=self.seed)

    def __post_init__(self) -> None:
        for name, least in (("inputs", 2), ("items", 4), ("sites", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"DoctorOptions({name}={getattr(self, name)}): needs at least {least}.")
        if list(self.steps) != sorted(set(self.steps)) or min(self.steps, default=1) < 1:
            raise InvalidInputError(f"DoctorOptions(steps={self.steps}): give rising numbers of at least 1.")


@checked
def attribution_doctor(
    attribution: NodeEffects | Edges | DirectAttribution | PatchGrid | Attribution,
    model: Model | None = None,
    bases: Mapping[str, AnySAE] | None = None,
    examples: Pairs | TokenBatch | None = None,
    metric: AnyMetric | None = None,
    *,
    circuit: Circuit | None = None,
    method: Method = "ig",
    steps: int = 10,
    rule: Rule = "midpoint",
    keep: Bool[Tensor, "batch pos"] | None = None,
    options: DoctorOptions | None = None,
) -> DoctorReport:
    """Runs the checks that apply to an attribution and says what each one measured.

    Attach the result: `effects = effects.stamped(report)`; what is made of the attribution then carries the verdict.

    Args:
        attribution: effects of `node_effects`; edges of `edge_effects`; a table of `direct_logit_attribution` or of
            `patch_grid`; or an `Attribution`, the plain form of any other.
        model: the model; an `Attribution` needs none of these.
        bases: a basis per site, as effects and edges were made with.
        examples: the pairs or texts that it was made on.
        metric: what it is on; direct logit attribution has none.
        circuit: the nodes that the edges are between.
        method: as `node_effects` had it, as steps, rule and keep.
        steps: points of the integral.
        rule: where they are.
        keep: the tokens that are patched.
        options: how much is measured.

    Raises:
        MismatchError: if the attribution was not made of these things.
        InvalidInputError: if something is missing, or the effects keep one position of a node.

    Source: Bilodeau et al. 2024; Bansal et al. 2020 (SAM); Hooker et al. 2019 (ROAR); Shah et al. 2021 (DiffROAR);
    Adebayo et al. 2018.
    """
    options = options or DoctorOptions()
    if isinstance(attribution, Attribution):
        return examined(attribution.name, [attribution], sizes=options.sizes(), checks=options.checks)
    if model is None or examples is None:
        of_nodes = isinstance(attribution, NodeEffects)
        raise InvalidInputError(_missing(attribution, _OF_NODES if of_nodes else "model and examples"))
    if isinstance(attribution, DirectAttribution | PatchGrid | Edges):
        if not isinstance(examples, Pairs):
            raise InvalidInputError(_missing(attribution, "the pairs"))
        made = tables.attribution_of(
            attribution, tables.TableCase(model=model, pairs=examples, bases=bases, metric=metric, circuit=circuit)
        )
        return examined(made.name, [made], sizes=options.sizes(), checks=options.checks)
    if bases is None or metric is None:
        raise InvalidInputError(_missing(attribution, _OF_NODES))
    case = NodeCase(
        model=model, bases=checked_bases(model, bases), examples=examples.to(model.device), metric=metric, keep=keep,
        method=method, steps=steps, rule=rule, seed=options.seed,
    )  # fmt: skip
    return examination(attribution, case, options)(options.checks)


def examination(
    effects: NodeEffects, case: NodeCase, options: DoctorOptions
) -> Callable[[Sequence[int]], DoctorReport]:
    """What runs some checks on effects of nodes; what several checks need is made once, and only when one needs it."""
    prepared = functools.cache(lambda: attributions_of(effects, case, options.inputs, options.sites, options.steps))

    def run(checks: Sequence[int]) -> DoctorReport:
        group, what = prepared()
        return examined(what, group, sizes=options.sizes(), checks=checks, method_name=_NAMES[case.method])

    return run


def together(reports: Sequence[DoctorReport]) -> DoctorReport:
    """Several reports on one attribution as one."""
    checks = tuple(check for report in reports for check in report.checks)
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    return DoctorReport(what=reports[0].what, checks=checks, notes=tuple(notes))


def _missing(attribution: object, what: str) -> str:
    kind = type(attribution).__name__
    return f"attribution_doctor: {kind} is examined on what it was made of. Give {what} as its function had them."


@checked
def edits_needed(error: float = 0.1, doubt: float = 0.05) -> int:
    """Number of edits to run to know how often they flip an output, within `error` except with probability `doubt`.

    An attribution proposes candidates; whether changing one flips the output is answered by changing it. Hoeffding:
    `n >= ln(2 / doubt) / (2 error^2)`.

    Raises:
        InvalidInputError: unless both lie between 0 and 1.

    Source: Bilodeau et al. 2024 (PNAS), on repeated evaluation of the model once the question is defined.

    >>> edits_needed(0.1, 0.05)
    185
    """
    if not (0 < error < 1 and 0 < doubt < 1):
        raise InvalidInputError(f"edits_needed(error={error}, doubt={doubt}): each lies between 0 and 1.")
    return math.ceil(math.log(2 / doubt) / (2 * error**2))
