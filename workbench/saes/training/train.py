"""Training SAEs and transcoders on stored activations: one, or many in one pass over the data."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from workbench.activations.store import ActivationStore, open_store
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.html import Shown
from workbench.core.locks import in_use
from workbench.saes.config import SAEConfig
from workbench.saes.home import SAEHome
from workbench.saes.training.batches import OrderKey
from workbench.saes.training.checkpoint import CHECKPOINT_FILE, finished_metrics
from workbench.saes.training.group import Group
from workbench.saes.training.member import Log
from workbench.saes.training.optim import adam_step

__all__ = ["SAERun", "adam_step", "sweep_names", "train_sae", "train_saes"]


@dataclass(frozen=True)
class SAERun(Shown):
    """A finished training run.

    Attributes:
        path: the SAE folder.
        metrics: held-out FVU, L0, share of dead features (over the last `dead_after` tokens), steps, seconds.
    """

    path: Path
    metrics: dict[str, float]


@checked
def train_sae(
    store: ActivationStore | str | Path, config: SAEConfig, out: str | Path, *, log: Log | None = None
) -> SAERun:
    """Trains an SAE or transcoder on a store and saves it as a sae_lens folder.

    A run that was interrupted goes on from its last checkpoint when it is started again, with the same result to the
    bit on the same machine and number of threads. A finished run is returned as it is.

    Args:
        store: the activations, or their folder. One packed row in ten is held out for the FVU.
        config: what to train.
        out: folder of the SAE; also gets `metrics.jsonl`.
        log: also gets each line of `metrics.jsonl`, with the name of the folder; see `WandbLog`.

    Raises:
        MismatchError: if `out` holds an SAE or a checkpoint of another configuration or store.
        DegenerateInputError: if there are too few tokens.
        InvalidInputError: if the loss is not finite (the last checkpoint before is kept), or another process is
            training in `out`.
    """
    opened = open_store(store)
    return _train(opened, [(_with_sites(opened, config), Path(out).expanduser())], log)[0]


@checked
def train_saes(
    store: ActivationStore | str | Path, configs: Sequence[SAEConfig], out: str | Path, *, log: Log | None = None
) -> list[SAERun]:
    """Trains many SAEs and transcoders, in one pass over the data where they take the same tokens in the same order.

    That order follows from `data_seed` (or `seed`), `batch`, `buffer` and `distinct_tokens`; configurations that differ
    there get a pass of their own. Each SAE is the same to the bit as if it were trained alone. Finished ones are not
    trained again, interrupted ones go on from their checkpoints, and new ones may be added to a sweep later.

    Args:
        store: the activations, or their folder.
        configs: what to train, each in a folder named after its settings (`sweep_names`).
        out: folder of these folders.
        log: also gets each line of each `metrics.jsonl`, with the name of the folder.

    Returns:
        One run per configuration, in their order.

    Raises:
        InvalidInputError: if there is nothing to train or a configuration comes twice; if a loss is not finite, after
            the other SAEs were finished.
        MismatchError: if a folder holds another SAE.
    """
    opened = open_store(store)
    full = [_with_sites(opened, config) for config in configs]
    folder = Path(out).expanduser()
    return _train(opened, [(c, folder / name) for c, name in zip(full, sweep_names(full), strict=True)], log)


def sweep_names(configs: Sequence[SAEConfig]) -> list[str]:
    """Names of the folders of a sweep: site, architecture, d_sae, its options and seed.

    Of several with the same name the first keeps it; to the others is added what differs from the first.

    Raises:
        InvalidInputError: if there is no configuration, or one comes twice.

    >>> sweep_names([SAEConfig(site="resid_post.3", d_sae=64, k=4), SAEConfig(site="resid_post.3", d_sae=64, k=8)])
    ['resid_post.3-topk-64-k4-s0', 'resid_post.3-topk-64-k8-s0']
    """
    if not configs:
        raise InvalidInputError("train_saes: there is no configuration. Give at least one.")
    twice = next((config for i, config in enumerate(configs) if config in configs[:i]), None)
    if twice is not None:
        raise InvalidInputError(f"train_saes: this configuration comes twice: {twice}. Give each once.")
    names: dict[str, SAEConfig] = {}
    for config in configs:
        name = _stem(config)
        first = names.get(name)
        if first is not None:
            # The first keeps its name, so that a sweep may get further members later.
            differ = [f.name for f in fields(SAEConfig) if getattr(config, f.name) != getattr(first, f.name)]
            name = "-".join([name, *(f"{field}={_short(getattr(config, field))}" for field in differ)])
        names[name] = config
    return list(names)


def _stem(config: SAEConfig) -> str:
    site = str(config.site) if config.target_site is None else f"{config.site}-to-{config.target_site}"
    options = [
        f"{name}={_short(config.given[name])}" for name in config.spec.options if name != "k" and name in config.given
    ]
    k = [f"k{config.active}"] if "k" in config.spec.options else []
    return "-".join([site, config.architecture, str(config.d_sae), *k, *options, f"s{config.seed}"])


def _short(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _with_sites(store: ActivationStore, config: SAEConfig) -> SAEConfig:
    target = None if config.target_site is None else store.site(config.target_site)
    return replace(config, site=store.site(config.site), target_site=target)


def _train(store: ActivationStore, members: Sequence[tuple[SAEConfig, Path]], log: Log | None) -> list[SAERun]:
    runs = _finished(store, members)
    waiting: dict[OrderKey, list[tuple[SAEConfig, Path]]] = {}
    for config, folder in members:
        if folder not in runs:
            waiting.setdefault(OrderKey.of(config), []).append((config, folder))
    problems: list[str] = []
    for together in waiting.values():
        with contextlib.ExitStack() as folders:
            for _, folder in together:
                folders.enter_context(in_use(folder))
            # Another process may have finished one between the first look and the lock.
            runs |= _finished(store, together)
            left = [(config, folder) for config, folder in together if folder not in runs]
            if not left:
                continue
            outcome = Group(store, left, log).run()
        runs |= {folder: SAERun(folder, metrics) for folder, metrics in outcome.metrics.items()}
        problems += outcome.problems
    for folder in runs:
        SAEHome(folder).note(store.manifest.model_source, store.path)
    if problems:
        raise InvalidInputError(" ".join(problems))
    return [runs[folder] for _, folder in members]


def _finished(store: ActivationStore, members: Sequence[tuple[SAEConfig, Path]]) -> dict[Path, SAERun]:
    """The runs that need no training, by folder."""
    finished = {folder: finished_metrics(folder, config, store) for config, folder in members}
    runs = {folder: SAERun(folder, metrics) for folder, metrics in finished.items() if metrics is not None}
    for folder in runs:
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)  # of a process killed after its last step
    return runs
