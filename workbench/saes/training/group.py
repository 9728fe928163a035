"""Many SAEs in one pass over the data: each gets the same batches as it would alone, and ends the same to the bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench.activations.interrupts import held_interrupt
from workbench.activations.store import ActivationStore
from workbench.core.progress import task
from workbench.saes.config import SAEConfig
from workbench.saes.formats.normalise import Normaliser
from workbench.saes.training.batches import Batches, OrderKey, Scaled
from workbench.saes.training.build import build, find_device, kernel_for
from workbench.saes.training.checkpoint import checkpoint_state
from workbench.saes.training.member import Log, Member, Setting

MAX_CHECKPOINT_TIME_SHARE = 0.05
"""Of the time of a run, at most this goes into checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """What became of a group: final metrics by folder, and what went wrong in the other members."""

    metrics: dict[Path, dict[str, float]]
    problems: list[str]


class Group:
    """SAEs with the same order of tokens.

    Args:
        store: the activations.
        members: configuration and folder of each; all with the same `OrderKey` and their sites filled in.
        log: gets every line of metrics.
    """

    def __init__(
        self, store: ActivationStore, members: Sequence[tuple[SAEConfig, Path]], log: Log | None = None
    ) -> None:
        sites = [site for config, _ in members for site in (config.site, config.target_site) if site]
        self.batches = Batches(store, sites, OrderKey.of(members[0][0]))
        scales, held_out = self.batches.scales(), self.batches.held_out()
        self.members: list[Member] = []
        self._scaled: dict[torch.device, Scaled] = {}
        self.position = 0
        self._pause = min(config.checkpoint_seconds for config, _ in members)
        for config, folder in members:
            site, target = str(config.site), config.target_site
            folder.mkdir(parents=True, exist_ok=True)
            device = find_device(config.device)
            state = checkpoint_state(folder)
            known = None if state is None else state["kernel"]
            kernel = kernel_for(config, scales[site].mean.numel(), device, known)
            setting = Setting(
                store=store, config=config, architecture=build(config, kernel.name), device=device, kernel=kernel,
                normaliser=Normaliser(scales[site], None if target is None else scales[target]),
                held_out=(held_out[site], None if target is None else held_out[target]),
            )  # fmt: skip
            self.members.append(Member(setting, folder, log))
            self._scaled.setdefault(device, Scaled(device))

    def run(self) -> Outcome:
        """Trains all members; those that are done are saved while the others go on.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when all are saved.
        """
        first = self._restore()
        done: dict[Path, dict[str, float]] = {}
        last = max(member.config.steps for member in self.members)
        size = self.batches.key.batch
        with task(total=last * size, description=self._title(), unit="tokens") as running, held_interrupt() as stop:
            running.skip(first * size)
            saved = time.monotonic()
            self.position = first
            self._finish_those_done(done, stop)
            while not (stop.is_set() or all(member.is_done for member in self.members)):
                self._one_batch()
                running.note(**self.members[0].latest)
                running.advance(size)
                self._finish_those_done(done, stop)
                if time.monotonic() - saved > self._pause and not stop.is_set():
                    self._save(done)
                    saved = time.monotonic()
            if stop.is_set():
                raise _interrupted(self._save(done), done)
        return Outcome(done, [member.problem for member in self.members if member.problem is not None])

    def _title(self) -> str:
        return "Training the SAE" if len(self.members) == 1 else f"Training {len(self.members)} SAEs"

    def _restore(self) -> int:
        """Takes up all checkpoints; returns the step from which the first member goes on."""
        streams = [(member.restore(), member) for member in self.members]
        # One that is done needs no more batches.
        behind, member = min(streams, key=lambda found: (found[1].is_done, found[1].step))
        if behind is not None:
            self.batches.restore(behind)
        return member.step

    def _one_batch(self) -> None:
        started = time.perf_counter()
        raw = self.batches.next()
        for scaled in self._scaled.values():
            scaled.begin(raw)
        reading = time.perf_counter() - started
        for member in self.members:
            # A member that was saved later than the others waits for them.
            if member.step == self.position and not member.is_done:
                config, setting = member.config, member.setting
                pair = self._scaled[setting.device].pair(str(config.site), config.target_site, setting.normaliser)
                member.train_step(pair)
                member.seconds += reading
        self.position += 1

    def _save(self, done: Container[Path]) -> list[Member]:
        """Writes checkpoints of those that are not finished; returns the members that have one of their last step."""
        started = time.monotonic()
        state = self.batches.state()
        open_ones = [member for member in self.members if member.folder not in done]
        # A member that waits for the others still has the checkpoint that it went on from.
        saved = [member for member in open_ones if member.step > self.position or member.save(state)]
        took = time.monotonic() - started
        self._pause = max(self._pause, took / MAX_CHECKPOINT_TIME_SHARE)
        return saved

    def _finish_those_done(self, done: dict[Path, dict[str, float]], stop: threading.Event) -> None:
        """Saves the SAEs that made their last step, each whole or not at all; none after Ctrl-C."""
        for member in self.members:
            if stop.is_set():
                return
            if member.folder not in done and member.is_done and member.problem is None:
                calibration = self.batches.calibration(str(member.config.site)) if member.keeps_threshold else None
                metrics = member.finish(calibration)
                if metrics is not None:
                    done[member.folder] = metrics


def _interrupted(saved: Sequence[Member], done: Iterable[Path]) -> KeyboardInterrupt:
    error = KeyboardInterrupt()
    if saved:
        places = ", ".join(f"step {member.step} in {member.folder}" for member in saved)
        error.add_note(f"Training was saved: {places}. The same command goes on from there.")
    finished = ", ".join(map(str, done))
    if finished:
        error.add_note(f"Training is finished in {finished}.")
    return error
