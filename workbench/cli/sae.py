"""Commands on the way from activations to an SAE: sae train, sae eval."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from workbench.cli.base import BaseCommand, typed
from workbench.core.errors import InvalidInputError
from workbench.core.jsontext import Record
from workbench.core.numbers import counted, number, percent
from workbench.core.progress import clock
from workbench.saes.config import ARCHITECTURES, Kernel, SAEConfig, architecture_name

if TYPE_CHECKING:
    from workbench.activations.store import ActivationStore
    from workbench.saes.training.train import SAERun


@dataclass(frozen=True, kw_only=True)
class SaeTrain(BaseCommand):
    """Train SAEs or transcoders on stored activations.

    Several values of an option train several SAEs in one pass. Interrupted training continues when the same command is
    given again.

    Example: workbench sae train acts --out sae --d-sae 4608
    """

    store: tyro.conf.Positional[Path]
    """Folder of stored activations, from `workbench harvest`."""
    out: Path = Path("sae")
    """Folder of the SAE; of several, the folder of their folders."""
    architecture: tuple[str, ...] = ("topk",)
    """Kinds: topk, batchtopk, matryoshka, relu, jumprelu, gated."""
    d_sae: tuple[int, ...] = ()
    """Numbers of features; by default eight times the width of the site."""
    k: tuple[int, ...] = ()
    """Features that may be active on one token (topk, batchtopk, matryoshka); by default 32."""
    l1: tuple[float, ...] = ()
    """Weights of the sum of activations (relu, gated); by default sqrt(width) / 12."""
    l0: tuple[float, ...] = ()
    """Weights of the number of active features (jumprelu); by default 1."""
    widths: tuple[int, ...] = ()
    """Prefixes of a matryoshka SAE; by default 1/16, 1/8, 1/4 and 1/2 of d_sae."""
    tokens: int = 600_000
    """Token-steps: tokens that are trained on, counted again in each epoch."""
    batch: int = 2048
    """Tokens per step."""
    lr: tuple[float, ...] = ()
    """Peak learning rates; by default 1e-3 / sqrt(d_sae / 16384)."""
    site: tuple[str, ...] = ()
    """Sites to train on; by default the only one in the store."""
    target_site: tuple[str, ...] = ()
    """For transcoders: what is reconstructed, one for each site."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the initial weights; the first is also that of the order of tokens, which all share."""
    kernel: Kernel = "auto"
    """How a step is computed; by default the fastest here."""
    device: str = "auto"
    """cpu or cuda; by default a GPU if there is one."""
    wandb: bool = False
    """Also send the curves to W&B, offline unless WANDB_MODE says otherwise."""

    def configs(self, store: ActivationStore) -> list[SAEConfig]:
        """One configuration for each combination of what was given.

        Raises:
            InvalidInputError: if sites and targets don't pair up, or no architecture has an option that was given.
        """
        sites = [store.site(site) for site in self.site] or [store.site()]
        if len(self.target_site) not in (0, len(sites)):
            raise InvalidInputError(
                f"sae train: {counted(len(self.target_site), 'target sites')} for {counted(len(sites), 'sites')}. Give "
                "one for each, in order."
            )
        targets = self.target_site or (None,) * len(sites)
        configs = []
        for (site, target), kind, seed in itertools.product(
            zip(sites, targets, strict=True), self.architecture, self.seed
        ):
            kind = architecture_name(kind)
            d_saes = self.d_sae or (8 * store.manifest.sites[site].d,)
            for values in itertools.product(d_saes, self.lr or (None,), *self._options(kind).values()):
                options: Record = dict(zip(("d_sae", "lr", *self._options(kind)), values, strict=True))
                configs.append(
                    SAEConfig(
                        architecture=kind,
                        site=site,
                        target_site=target,
                        seed=seed,
                        data_seed=self.seed[0],
                        tokens=self.tokens,
                        batch=self.batch,
                        kernel=self.kernel,
                        device=self.device,
                        **options,
                    )  # fmt: skip
                )
        return configs

    def _options(self, kind: str) -> dict[str, tuple[object, ...]]:
        """What was given of the options that only some architectures have, for one of them."""
        given: dict[str, tuple[object, ...]] = {
            "k": self.k, "l1_coefficient": self.l1, "l0_coefficient": self.l0,
            "widths": (self.widths,) if self.widths else (),
        }  # fmt: skip
        kinds = set(map(architecture_name, self.architecture))
        for name, values in given.items():
            owners = [owner for owner, spec in ARCHITECTURES.items() if name in spec.options]
            if values and not kinds & set(owners):
                raise InvalidInputError(
                    f"sae train: {name.split('_')[0]} {values} has no effect on {', '.join(self.architecture)}. Leave "
                    f"it out, or choose an architecture that has it: {', '.join(owners)}."
                )
        return {name: values for name, values in given.items() if values and name in ARCHITECTURES[kind].options}

    def run(self) -> None:
        """Trains, saves, and prints the held-out numbers."""
        from workbench.activations.store import open_store
        from workbench.runs.live import WandbLog
        from workbench.saes.training.train import sweep_names, train_sae, train_saes

        store = open_store(self.store)
        configs = self.configs(store)
        names = [self.out.name] if len(configs) == 1 else sweep_names(configs)
        log = WandbLog(self.out, dict(zip(names, configs, strict=True))) if self.wandb else None
        with log or contextlib.nullcontext():
            if len(configs) == 1:
                runs = [train_sae(store, configs[0], self.out, log=log)]
            else:
                runs = train_saes(store, configs, self.out, log=log)
        lines = [line for run, config in zip(runs, configs, strict=True) for line in _summary(run, config)]
        if log is not None and log.problem is not None:
            lines.append(f"W&B: {log.problem}. All metrics are in metrics.jsonl.")
        saes = [{"sae": run.path, "metrics": run.metrics} for run in runs]
        self.emit(saes[0] if len(saes) == 1 else {"saes": saes}, lines, typed("sae", "eval", runs[0].path))


def _summary(run: SAERun, config: SAEConfig) -> list[str]:
    m = run.metrics
    if config.tokens < config.dead_after:
        dead = f"too few tokens to call a feature dead (dead_after={config.dead_after})"
    else:
        dead = f"{percent(m['dead'])} of the features silent for {config.dead_after} tokens"
    took = f"{counted(int(m['steps']), 'steps')} in {clock(m['seconds'])}"
    line = f"Held-out FVU {number(m['fvu'])}, L0 {number(m['l0'])}, {dead}; {took}."
    return [line, f"{'SAE' if config.target_site is None else 'Transcoder'}: {run.path}"]
