"""One SAE per site of a model, in few passes over one store: what a circuit of features is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from circuits.saes.folder import SAEIndex, SiteSAE
from circuits.saes.report import TrainedSAEs, measured
from workbench.activations.harvest import harvest
from workbench.activations.manifest import MANIFEST
from workbench.activations.packing import Source
from workbench.activations.plan import HarvestEstimate, HarvestOptions, estimate_harvest
from workbench.activations.sources import SelfText
from workbench.activations.store import ActivationStore
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ResourceError
from workbench.core.html import Shown
from workbench.core.numbers import byte_size, counted
from workbench.core.progress import clock, say, track
from workbench.engine.folder import open_folder
from workbench.engine.keeper import Keeper
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.saes.basis import basis
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import CONFIG_FILE
from workbench.saes.training.batches import HELD_OUT_ROWS
from workbench.saes.training.build import find_device
from workbench.saes.training.checkpoint import store_id
from workbench.saes.training.kernel_choice import PROBE_ROWS, measure_kernels
from workbench.saes.training.train import SAERun, sweep_names
from workbench.saes.training.train import train_saes as train_together

TOKENS = 200_000
"""Tokens of the model's own text, where no other number is asked for."""
MAX_FVU = 0.2
"""Unexplained variance above which an SAE counts as bad: those of published circuits leave out 0.01 to 0.17."""
MEMORY_SHARE = 0.5
"""Of the free memory, at most this goes into the SAEs that are trained together."""
SHARD_TOKENS = HarvestOptions.shard_tokens
STORE = "store"
"""Name of the store inside the folder of the SAEs."""
COPIES = 4
"""Weights, gradient and two moments of Adam; a checkpoint holds all but the gradient."""


@checked
@dataclass(frozen=True, kw_only=True)
class SAETrainingOptions(OneLine):
    """What is trained, and on how much text.

    Attributes:
        tokens: tokens of the model's own text, unless another source is given.
        context: tokens per row of that text.
        expansion: features of each SAE, as a multiple of the width of its site.
        sae: the SAEs and their training; site and number of features are set for each site.
        max_fvu: limit above which an SAE is named as bad.
        seed: of the text.
    """

    tokens: int = TOKENS
    context: int = SelfText.context
    expansion: int = 8
    sae: SAEConfig = field(default_factory=lambda: SAEConfig(buffer=65_536))
    max_fvu: float = MAX_FVU
    seed: int = 0

    def __post_init__(self) -> None:
        if self.expansion < 1 or not 0 < self.max_fvu < 1:
            raise InvalidInputError(
                f"SAETrainingOptions(expansion={self.expansion}, max_fvu={self.max_fvu}): expansion is at least 1, and "
                "max_fvu lies between 0 and 1."
            )

    def config(self, model: Model, site: str) -> SAEConfig:
        """The configuration for a site."""
        return replace(self.sae, site=site, d_sae=self.expansion * model.width(site))


@dataclass(frozen=True, kw_only=True)
class SAEsEstimate(Shown):
    """What the SAEs of several sites take.

    Attributes:
        sites: how many SAEs are still to be trained.
        passes: over the store; the SAEs of one pass are in memory together.
        seconds: of training on this machine, alone.
        memory_bytes: of one pass, besides the model.
        disk_bytes: of the SAEs and their checkpoints.
        harvest: what the activations take before; None if they are stored already, or it was not measured.
    """

    sites: int
    passes: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    harvest: HarvestEstimate | None = None

    def __str__(self) -> str:
        """One line.

        >>> str(SAEsEstimate(sites=12, passes=1, seconds=600.0, memory_bytes=2 * 10**9, disk_bytes=10**9))
        'Training 12 SAEs in 1 pass: about 10 min 0 s, 2.00 GB of memory, 1.00 GB on disk'
        """
        before = "" if self.harvest is None else f"Activations: {self.harvest}. "
        if not self.sites:
            return f"{before}All SAEs are trained"
        return (
            f"{before}Training {counted(self.sites, 'SAEs')} in {counted(self.passes, 'passes')}: about "
            f"{clock(self.seconds)}, {byte_size(self.memory_bytes)} of memory, {byte_size(self.disk_bytes)} on disk"
        )

    def _shown_line(self) -> str:
        return f"{self}."


def spread_layers(n_layers: int, n: int) -> tuple[int, ...]:
    """`n` layers in the middles of as many equal parts of a model.

    >>> spread_layers(30, 4), spread_layers(2, 4)
    ((3, 11, 18, 26), (0, 1))
    """
    return tuple(dict.fromkeys((2 * i + 1) * n_layers // (2 * n) for i in range(n)))


@checked
def train_saes(
    model: Model,
    sites: Sequence[str | Site],
    out: str | Path,
    *,
    source: Source | None = None,
    options: SAETrainingOptions | None = None,
) -> TrainedSAEs:
    """Trains one SAE per site on one store of activations, as many at once as memory holds, and measures each.

    What is finished in `out` is not made again, and an interrupted SAE continues from its checkpoint. The result is
    the same to the bit whatever the number of passes.

    Args:
        model: the model.
        sites: where; `"resid_post"` is every layer, and `*` stands for anything, as in `capture`.
        out: folder; gets the store, a folder per SAE and the index `saes.json`. `circuits.bases` takes it.
        source: text; None takes the model's own.
        options: what is trained, and on how much text.

    Raises:
        UnknownSiteError: for a site that the model does not have.
        MismatchError: if `out` holds another store or other SAEs.
        ResourceError: if memory or disk are too small.
    """
    plan = _Plan.of(model, sites, out, options)
    estimate = plan.estimate()
    plan.require_room(estimate)
    if estimate.sites:
        say(f"{estimate}.")
    store = harvest(model, plan.text(source), plan.sites, plan.store)
    runs: dict[str, SAERun] = {}
    for part in plan.passes():
        trained = train_together(store, [plan.configs[site] for site in part], plan.out)
        runs |= dict(zip(part, trained, strict=True))
    options = plan.options
    saes = tuple(plan.measured(store, runs))
    SAEIndex(model.source, options.max_fvu, saes).save(plan.out)
    return TrainedSAEs(folder=plan.out, saes=saes, max_fvu=options.max_fvu)


@checked
def estimate_saes(
    model: Model,
    sites: Sequence[str | Site],
    out: str | Path,
    *,
    source: Source | None = None,
    options: SAETrainingOptions | None = None,
) -> SAEsEstimate:
    """What `train_saes` would take in time, memory and disk; measured on a first batch, and nothing is written.

    Raises:
        UnknownSiteError: for a site that the model does not have.
    """
    plan = _Plan.of(model, sites, out, options)
    is_stored = (plan.store / MANIFEST).is_file()
    before = None if is_stored else estimate_harvest(model, plan.text(source), plan.sites, plan.store)
    return replace(plan.estimate(), harvest=before)


@dataclass(frozen=True)
class _Plan:
    """The SAEs of a call: what each is, and which are trained together."""

    model: Model
    out: Path
    options: SAETrainingOptions
    configs: dict[str, SAEConfig]

    @classmethod
    def of(
        cls, model: Model, sites: Sequence[str | Site], out: str | Path, options: SAETrainingOptions | None
    ) -> _Plan:
        if not sites:
            raise InvalidInputError("train_saes(sites=[]): name at least one site, such as resid_post.3.")
        options = options or SAETrainingOptions()
        named = sorted(model.site_map.named(sites), key=lambda site: site.order)
        return cls(model, Path(out).expanduser(), options, {str(s): options.config(model, str(s)) for s in named})

    @property
    def sites(self) -> list[str]:
        return list(self.configs)

    @property
    def store(self) -> Path:
        return self.out / STORE

    def text(self, source: Source | None) -> Source:
        options = self.options
        return source or SelfText(tokens=options.tokens, context=options.context, seed=options.seed)

    def estimate(self) -> SAEsEstimate:
        """What is left of the training."""
        left = {site: config for site, config in self.configs.items() if not self._is_finished(config)}
        passes = [[site for site in part if site in left] for part in self.passes()]
        passes = [part for part in passes if part]
        weights = {site: self._weight_bytes(site) for site in left}
        return SAEsEstimate(
            sites=len(left), passes=len(passes), seconds=sum((self._seconds(site) for site in left), 0.0),
            memory_bytes=max((sum(map(self._memory, part)) for part in passes), default=0),
            disk_bytes=sum(weights.values())
            + (COPIES - 1) * max((sum(weights[site] for site in part) for part in passes), default=0),
        )  # fmt: skip

    def require_room(self, estimate: SAEsEstimate) -> None:
        """Refuses what can't be trained here.

        Raises:
            ResourceError: if one SAE needs more memory than is free, or the SAEs more disk.
        """
        free, disk = self._free_memory(), open_folder(self.out).free_bytes()
        if estimate.memory_bytes > free:
            raise ResourceError(
                f"train_saes: an SAE of {max(c.d_sae for c in self.configs.values())} features needs "
                f"{byte_size(estimate.memory_bytes)} of memory; {byte_size(free)} are free. Lower expansion or the "
                "buffer of the SAEs."
            )
        if disk is not None and estimate.disk_bytes > disk:
            raise ResourceError(
                f"train_saes: {counted(estimate.sites, 'SAEs')} need {byte_size(estimate.disk_bytes)} in {self.out}; "
                f"{byte_size(disk)} are free. Train fewer sites, lower expansion, or use another disk."
            )

    def passes(self) -> list[list[str]]:
        """Sites whose SAEs are trained together, in the order of a forward pass."""
        limit = MEMORY_SHARE * self._free_memory()
        parts: list[list[str]] = [[]]
        for site in self.sites:
            if parts[-1] and sum(map(self._memory, [*parts[-1], site])) > limit:
                parts.append([])
            parts[-1].append(site)
        return parts

    def measured(self, store: ActivationStore, runs: dict[str, SAERun]) -> Iterator[SiteSAE]:
        """What each SAE leaves out; measured once."""
        made_of = (store_id(store), self.model.fingerprint, list(self.configs.values()))
        with Keeper.of_key(self.out / "measured", made_of) as parts:
            for site, run in track(runs.items(), description="Measuring the SAEs", unit="SAEs"):

                def made(site: str = site, run: SAERun = run) -> SiteSAE:
                    sae = basis(run.path, self.model, site)
                    return measured(self.model, store, sae, site, run.path.name, run.metrics)

                yield parts.once(run.path.name, SiteSAE, made)

    def _is_finished(self, config: SAEConfig) -> bool:
        return (self.out / sweep_names([config])[0] / CONFIG_FILE).is_file()

    def _weight_bytes(self, site: str) -> int:
        d_sae, width = self.configs[site].d_sae, self.model.width(site)
        return 4 * (2 * d_sae * width + d_sae + width)

    def _memory(self, site: str) -> int:
        config, width = self.configs[site], self.model.width(site)
        stored = min(config.buffer, self.options.tokens) + SHARD_TOKENS  # in bfloat16
        read = HELD_OUT_ROWS + config.batch  # in fp32
        return COPIES * self._weight_bytes(site) + (2 * stored + 4 * read) * width + 4 * config.batch * config.d_sae

    def _seconds(self, site: str) -> float:
        config = self.configs[site]
        steps = measure_kernels(find_device(config.device), self.model.width(site), config.d_sae, config.active)
        return min(steps.values()) * config.tokens / PROBE_ROWS

    def _free_memory(self) -> int:
        import psutil

        return psutil.virtual_memory().available
