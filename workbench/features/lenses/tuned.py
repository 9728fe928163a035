"""The tuned lens: a regression lens refined until what it reads is closest to the model's output."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.atomic import write_atomic
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.jsontext import content_of
from workbench.core.precision import precise
from workbench.core.progress import task
from workbench.core.records import to_jsonable
from workbench.core.tokens import TokenBatch
from workbench.engine.keeper import Keeper
from workbench.features.lens import log_probabilities
from workbench.features.lenses.files import BEGIN_AGAIN, JSON, load_with_metadata
from workbench.features.lenses.linear import LinearLens
from workbench.features.lenses.loading import load_lens
from workbench.features.lenses.source import kept_tokens, middle, policy_of
from workbench.models.model import Model

HELD_OUT_EVERY, SAVE_EVERY = 10, 10
"""Of rows; of steps."""
_STATE = "state.safetensors"


@checked
@dataclass(frozen=True, kw_only=True)
class TunedOptions(OneLine):
    """How a tuned lens is refined; stochastic gradient descent with Nesterov momentum.

    The published recipe has 2**18 tokens per step and starts from the identity, over 250 steps. From a regression lens
    far less is needed. Gradients are clipped site by site, so that a site does not depend on which others are fitted.

    Attributes:
        steps: with a rate that falls linearly to zero.
        tokens: per step.
        rate: of learning; 1 - momentum in the published recipe.
        momentum: of the gradient.
        decay: pulls towards the identity.
        clip: largest norm of a site's gradient.
        seed: of the order of rows.
    """

    steps: int = 250
    tokens: int = 512
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-3
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens < 1 or self.rate <= 0 or not 0 <= self.momentum < 1 or self.clip <= 0:
            raise InvalidInputError(
                f"TunedOptions(steps={self.steps}, tokens={self.tokens}, rate={self.rate}, momentum={self.momentum}, "
                f"clip={self.clip}): steps and tokens at least 1, rate and clip above 0, 0 <= momentum < 1."
            )


@dataclass(frozen=True)
class _State:
    """What a step changes: maps less the identity and biases, and their velocities, by site."""

    step: int
    values: dict[str, tuple[Tensor, Tensor]]
    velocities: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def start(cls, lens: LinearLens) -> _State:
        values = {s: (w - torch.eye(len(w)).to(w), lens.biases[s].clone()) for s, w in lens.weights.items()}
        return cls(0, values, {s: (torch.zeros_like(a), torch.zeros_like(b)) for s, (a, b) in values.items()})

    def write(self, file: Path) -> None:
        parts = {"value": self.values, "velocity": self.velocities}
        tensors = {
            f"{name}/{i}/{site}": both[i].cpu().contiguous()
            for name, maps in parts.items() for site, both in maps.items() for i in (0, 1)
        }  # fmt: skip
        write_atomic(file, safetensors.torch.save(tensors, {"step": str(self.step)}))

    @classmethod
    def read(cls, file: Path, sites: Sequence[str], device: torch.device) -> _State:
        with content_of(file, BEGIN_AGAIN, safetensors.SafetensorError, OSError):
            tensors, about = load_with_metadata(file)
            values, velocities = (
                {s: (tensors[f"{name}/0/{s}"].to(device), tensors[f"{name}/1/{s}"].to(device)) for s in sites}
                for name in ("value", "velocity")
            )
            return cls(int(about["step"]), values, velocities)


def fit_tuned(
    model: Model,
    rows: TokenBatch,
    sites: tuple[str, ...],
    start: Callable[[TokenBatch], LinearLens],
    options: TunedOptions | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = True,
) -> LinearLens:
    """A lens, refined by the KL divergence of its readings from the model's output.

    Every tenth row is held out. A site at which the refinement did not lower the held-out divergence keeps its map.

    Args:
        model: the model.
        rows: that it is refined on; they are used again where there are not enough for all steps.
        sites: where it reads.
        start: the lens of the rows that are not held out, with a map and a bias at each site.
        options: of the refinement.
        out: folder in which the state is kept while it runs, and the lens afterwards; None keeps nothing.
        resume: continue what is in `out`.

    Raises:
        DegenerateInputError: for fewer than two rows.
        MismatchError: if `out` holds a lens of another model, other rows or other options.
    """
    options = options or TunedOptions()
    if len(rows) < 2:
        raise DegenerateInputError("A tuned lens needs two rows or more, since some are held out. Give more texts.")
    every = min(HELD_OUT_EVERY, len(rows))
    is_held_out = torch.arange(len(rows), device=rows.ids.device) % every == every - 1
    train, held_out = (rows[chosen.nonzero()[:, 0]] for chosen in (~is_held_out, is_held_out))
    refine = _Refinement(model, train, options, policy_of(model, train, middle(sites)))
    test = replace(refine, rows=held_out)
    if out is None:
        first = start(train)
        return _finished(first, refine.run(_State.start(first), None), test)
    key = {"model": model.fingerprint, "sites": sites, "options": to_jsonable(options), "dtype": str(model.dtype),
           "rows": hashlib.sha256(repr([row.tolist() for row in rows.rows()]).encode()).hexdigest()}  # fmt: skip
    with Keeper.open(Path(out) / "fit", key) as keep:
        folder = keep.scratch("state")
        if not resume:
            shutil.rmtree(folder)
            folder = keep.scratch("state")
        file, kept = folder / _STATE, folder / "start"
        first = load_lens(kept, model) if (kept / JSON).exists() else start(train)
        if not file.exists():
            first.save(kept)
        state = _State.read(file, sites, model.device) if file.exists() else _State.start(first)
        lens = _finished(first, refine.run(state, file), test)
        lens.save(out)
    return lens


def _finished(start: LinearLens, state: _State, held_out: _Refinement) -> LinearLens:
    """The refined maps, each where it is better on held-out rows."""
    before, after = held_out.divergence(_State.start(start).values), held_out.divergence(state.values)
    better = [site for site in start.sites if after[site] < before[site]]
    weights = {s: state.values[s][0] + torch.eye(len(w)).to(w) if s in better else w for s, w in start.weights.items()}
    biases = {site: state.values[site][1] if site in better else bias for site, bias in start.biases.items()}
    recipe = {**start.recipe, "kl_before": before, "kl_after": after, "refined": better,
              "options": to_jsonable(held_out.options)}  # fmt: skip
    return replace(start, kind="tuned", weights=weights, biases=biases, recipe=recipe, halves=None)


@dataclass(frozen=True)
class _Refinement:
    """Steps over rows of tokens."""

    model: Model
    rows: TokenBatch
    options: TunedOptions
    policy: TokenPolicy

    def run(self, state: _State, file: Path | None) -> _State:
        """The state after the last step; kept every few steps, and an interruption loses no more than those."""
        with task(total=self.options.steps - state.step, description="Tuning", unit="steps") as running:
            while state.step < self.options.steps:
                state, loss = self._step(state)
                running.note(kl=loss)
                running.advance()
                if file is not None and (state.step % SAVE_EVERY == 0 or state.step == self.options.steps):
                    state.write(file)
        return state

    def _step(self, state: _State) -> tuple[_State, float]:
        acts, output = self._tokens(self._rows_of(state.step), list(state.values))
        rate = self.options.rate * (1 - state.step / self.options.steps)
        values, velocities, losses = {}, {}, []
        for site, both in state.values.items():
            leaves = [x.detach().requires_grad_(True) for x in both]
            with torch.enable_grad():
                loss = self._divergence(acts[site], output, leaves[0], leaves[1]).mean()
                grads = torch.autograd.grad(loss, leaves)
            losses.append(float(loss.detach()))
            moved = self._moved(both, grads, state.velocities[site], rate)
            values[site], velocities[site] = (moved[0], moved[1]), (moved[2], moved[3])
        return _State(state.step + 1, values, velocities), sum(losses) / len(losses)

    def _moved(
        self, values: Sequence[Tensor], grads: Sequence[Tensor], velocities: Sequence[Tensor], rate: float
    ) -> list[Tensor]:
        """Both values, then both velocities, after a step."""
        size = torch.stack([g.norm() for g in grads]).norm()
        scale = min(1.0, self.options.clip / float(size)) if float(size) > 0 else 1.0
        momentum = self.options.momentum
        pulled = [g * scale + self.options.decay * x for g, x in zip(grads, values, strict=True)]
        after = [momentum * v + g for v, g in zip(velocities, pulled, strict=True)]
        moved = [x - rate * (g + momentum * v) for x, g, v in zip(values, pulled, after, strict=True)]
        return [*moved, *after]

    def _divergence(
        self, h: Float[Tensor, "n d"], output: Float[Tensor, "n vocab"], a: Tensor, b: Tensor
    ) -> Float[Tensor, " n"]:
        """KL(output || reading) of each token, in nats."""
        h = precise(h).to(a)
        read = log_probabilities(self.model, h + h @ a.T + b)
        return (output.exp() * (output - read)).sum(-1)

    @torch.no_grad()
    def divergence(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Mean divergence over the rows, by site."""
        sums, n = dict.fromkeys(values, 0.0), 0
        for part in self._every():
            acts, output = self._tokens(part, list(values))
            n += len(output)
            for site, (a, b) in values.items():
                sums[site] += float(self._divergence(acts[site], output, a, b).sum())
        return {site: total / n for site, total in sums.items()}

    @property
    def _rows_per_step(self) -> int:
        return max(1, -(-self.options.tokens // int(self.rows.lengths.max())))

    def _every(self) -> Iterator[TokenBatch]:
        size = self._rows_per_step
        return (self.rows[i : i + size] for i in range(0, min(len(self.rows), 4 * size), size))

    def _rows_of(self, step: int) -> TokenBatch:
        """The rows of a step, which depend on its number and the seed alone."""
        size, n = self._rows_per_step, len(self.rows)
        chosen = []
        for place in range(step * size, (step + 1) * size):
            generator = torch.Generator().manual_seed(self.options.seed + place // n)
            chosen.append(int(torch.randperm(n, generator=generator)[place % n]))
        return self.rows[torch.tensor(chosen, device=self.rows.ids.device)]

    @torch.no_grad()
    def _tokens(self, batch: TokenBatch, sites: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Activations of the tokens that count, and the model's log-probabilities there."""
        target = f"resid_post.{self.model.n_layers - 1}"
        acts = self.model.capture(batch, [*sites, target])
        keep = kept_tokens(self.policy, batch, acts[middle(sites)])
        found = {site: acts[site][keep.to(acts[site].device)] for site in (*sites, target)}
        return found, log_probabilities(self.model, found[target])
