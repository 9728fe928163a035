"""How a SHIFT study is run."""

from __future__ import annotations

from dataclasses import dataclass, field

from circuits.doctor.doctor import DoctorOptions
from circuits.nodes.runs import AttributionOptions
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import setting
from workbench.probes.linear import ProbeOptions


@checked
@dataclass(frozen=True, kw_only=True)
class ShiftOptions(OneLine):
    """How a SHIFT study is run.

    Attributes:
        probe_site: where the probe reads; by default at the last SAE's own site, where effects are exact.
        positive: name of the label that the probe tells from all others; by default it tells all labels apart.
        methods: "standard", "all", or names of methods; what SHIFT is compared with in any case is always there.
        top_k: how many features, strongest effect first, are put before the judge.
        min_effect: features whose effect is not above this are never candidates, in logits.
        random_draws: sets of random features in the control.
        probe: how probes are fitted.
        attribution: how effects are estimated where they are not exact.
        attribution_rows: ambiguous training rows that the estimate uses.
        batch_size: texts per forward pass.
        seed: decides whatever is random.
        doctor: how much the attribution doctor measures of the effects; None does not ask it.
    """

    probe_site: str | None = None
    positive: str | None = None
    methods: str | tuple[str, ...] = "standard"
    top_k: int = 64
    min_effect: float = 0.0
    random_draws: int = 10
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    attribution_rows: int = 64
    batch_size: int = 32
    seed: int = 0
    doctor: DoctorOptions | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "random_draws", "attribution_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"ShiftOptions({name}={getattr(self, name)}): needs at least 1.")
        if not self.min_effect >= 0:
            raise InvalidInputError(f"ShiftOptions(min_effect={setting(self.min_effect)}): give 0 or more.")
