"""Conditional edits: a gate reads activations and decides, per row or per token, whether an edit is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.registry import Registry
from workbench.hooks.sites import Site
from workbench.interventions.op import Op, Where, changed, floats, unit
from workbench.interventions.step import Step

Reduce = Literal["mean", "last", "max"]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Gate(OneLine):
    """A score of activations and a threshold on it.

    Attributes:
        at: the site that is read, such as `resid_post.8`; None reads the site of the edit, before the edit.
        when: "prompt": one decision per row, made on its prompt tokens and held while generating. "token": one
            decision per token.
        reduce: how a row's prompt tokens become one score: the score of their "mean" activation, of the "last" one, or
            the "max" of their scores.
        threshold: the gate is open where the score is greater.
        below: open where the score is smaller instead.
    """

    at: Site | str | None = None
    when: Literal["prompt", "token"] = "prompt"
    reduce: Reduce = "mean"
    threshold: float = 0.0
    below: bool = False
    registry: ClassVar[Registry[type[Gate]]] = Registry("gate", "workbench.interventions")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Gate.registry.add(cls.__name__, cls)

    def __post_init__(self) -> None:
        if self.at is not None:
            object.__setattr__(self, "at", Site.parse(self.at))

    @property
    def site(self) -> Site | None:
        """The site that is read."""
        return None if self.at is None else Site.parse(self.at)

    @property
    def width(self) -> int | None:
        """Size of the activations that this gate reads, or None for any."""
        return None

    def score(self, h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The score of each activation, fp32."""
        raise NotImplementedError

    def open(self, scores: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Where the edit is made."""
        return scores < self.threshold if self.below else scores > self.threshold

    def decide(self, h: Float[Tensor, "batch pos d"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, " batch"]:
        """One decision per row from the tokens marked in `real`; rows without one stay closed."""
        some, h = real.any(1), h.float()
        if self.reduce == "max":
            scores = self.score(h.flatten(0, 1)).view(real.shape)
            worst = float("inf") if self.below else float("-inf")
            best = scores.masked_fill(~real, worst)
            return self.open(best.amin(1) if self.below else best.amax(1)) & some
        if self.reduce == "last":
            index = real.long().cumsum(1).argmax(1)
            return self.open(self.score(h[torch.arange(len(h), device=h.device), index])) & some
        weight = real.to(h)[..., None]
        return self.open(self.score((h * weight).sum(1) / weight.sum(1).clamp_min(1))) & some

    def to(self, device: torch.device) -> Gate:
        """The same gate with its tensors on a device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.device != device
        }
        return dataclasses.replace(self, **moved) if moved else self


@checked
@dataclass(frozen=True, eq=False)
class ProbeGate(Gate):
    """The logit of a linear probe: `h . weight + bias`.

    >>> gate = ProbeGate(torch.tensor([1.0, 0.0]), bias=-2.0)
    >>> gate.open(gate.score(torch.tensor([[3.0, 0.0], [1.0, 0.0]])))
    tensor([ True, False])
    """

    weight: Float[Tensor, " d"]
    bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weight", floats(self.weight, "ProbeGate", (1,), "(d,)"))

    @property
    def width(self) -> int | None:
        return len(self.weight)

    def score(self, h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return h @ self.weight.to(h) + self.bias


@checked
@dataclass(frozen=True, eq=False)
class CosineGate(Gate):
    """Signed cosine between the activation and a direction; 0 for a zero activation.

    >>> CosineGate(torch.tensor([0.6, 0.8])).score(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]))
    tensor([ 1., -1.])
    """

    direction: Float[Tensor, " d"]

    def __post_init__(self) -> None:
        super().__post_init__()
        floats(self.direction, type(self).__name__, (1,), "one direction (d,)")
        object.__setattr__(self, "direction", unit(self.direction, type(self).__name__))

    @property
    def width(self) -> int | None:
        return len(self.direction)

    def score(self, h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return (h @ self.direction.to(h)) / h.norm(dim=1).clamp_min(torch.finfo(h.dtype).tiny)


@checked
@dataclass(frozen=True, eq=False)
class CASTGate(CosineGate):
    """The condition of CAST (Lee et al. 2024): `cos(h, tanh((h . c) c))` for the unit direction c.

    It is even in h, so lies in [0, 1], and the tanh bends the direction of large activations; use `CosineGate` unless
    the published form is wanted. An activation without a part along c scores 0.

    >>> CASTGate(torch.tensor([0.6, 0.8])).score(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
    tensor([0.9903, 0.0000])
    """

    def score(self, h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        c = self.direction.to(h)
        along, size = h @ c, h.norm(dim=1)
        image = torch.tanh(along[:, None] * c)
        lengths = (size * image.norm(dim=1)).clamp_min(torch.finfo(h.dtype).tiny)
        # A projection of rounding size has a direction, but one that means nothing.
        none = along.abs() <= 4 * torch.finfo(h.dtype).eps * size
        return ((h * image).sum(1) / lengths).masked_fill(none, 0.0)


@checked
@dataclass(frozen=True, eq=False)
class SAEGate(Gate):
    """The activation of an SAE feature.

    Attributes:
        sae: an SAE in the sae_lens form that reads the gate's site.
        feature: its index.
    """

    sae: AnySAE
    feature: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.basis.features([self.feature])

    @functools.cached_property
    def basis(self) -> Basis:
        """The SAE as a basis."""
        return as_basis(self.sae)

    @property
    def width(self) -> int | None:
        return self.basis.d_in

    def score(self, h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return self.basis.encode_some(h, torch.tensor([self.feature]))[:, 0]


@checked
@dataclass(frozen=True, eq=False)
class FnGate(Gate):
    """Any function from activations `(n, d)` in fp32 to scores `(n,)`."""

    fn: Callable[[Tensor], Tensor]

    def score(self, h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        scores = self.fn(h.clone())  # a function that works in place must not reach the model's own tensor
        if scores.shape != h.shape[:1]:
            raise ShapeError(f"FnGate: the function returned {tuple(scores.shape)} for {tuple(h.shape)}; give (n,).")
        return scores.float()


class GateState:
    """What one gate has decided from the activations at one site."""

    def __init__(self, gate: Gate, site: Site) -> None:
        self.gate, self.site = gate, site
        self.forget()

    def forget(self) -> None:
        """Nothing is decided any more."""
        self._of_row: Tensor | None = None
        self._of_token: Tensor | None = None

    @torch.no_grad()
    def read(self, x: Float[Tensor, "batch pos d"], step: Step) -> None:
        """Decides; a prompt's decision is held while generating."""
        if self.gate.when == "token":
            self._of_token = self.gate.open(self.gate.score(x.flatten(0, 1).float())).view(x.shape[:2])
            return
        prompt = (step.is_prompt & step.is_real).to(x.device)
        if bool(prompt.any()):
            self._of_row = self.gate.decide(x, prompt)

    def select(self, index: Int[Tensor, " kept"]) -> None:
        """Keeps the decisions of some rows."""
        if self._of_row is not None:
            self._of_row = self._of_row[index.to(self._of_row.device)]

    def at(self, row: Int[Tensor, " n"], column: Int[Tensor, " n"], width: int) -> Bool[Tensor, " n"] | None:
        """The decision for each token of the last `width` columns, or None if there is none yet."""
        if self._of_token is not None:
            return self._of_token.to(row.device)[row, column - width]
        return None if self._of_row is None else self._of_row.to(row.device)[row]


@checked
@dataclass(frozen=True, eq=False)
class When(Op):
    """An edit that is made only where a gate is open; tokens behind a closed gate are not touched at all.

    Bound to a model, the gate reads its own site. Called by itself, it decides per activation on what it is given.

    Attributes:
        gate: the condition.
        op: the edit where it is open.
        otherwise: the edit where it is closed, or None.

    >>> from workbench.interventions.ops import Add
    >>> positive = ProbeGate(torch.tensor([1.0, 0.0]), when="token")
    >>> When(positive, Add(torch.tensor([0.0, 9.0])))(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    tensor([[ 1.,  9.],
            [-1.,  0.]])
    """

    gate: Gate
    op: Op
    otherwise: Op | None = None

    def __post_init__(self) -> None:
        inner = [op for part in (self.op, self.otherwise) if part is not None for op in part.walk()]
        if any(isinstance(op, When) for op in inner):
            raise InvalidInputError("When(gate, When(...)): combine the two conditions in one FnGate instead.")

    def __call__(self, h: Float[Tensor, "n d"], where: Where | None = None) -> Float[Tensor, "n d"]:
        where = where or Where.of(h)
        chosen = self.gate.open(self.gate.score(h))
        other = h if self.otherwise is None else self.otherwise(h, where)
        return torch.where(chosen[:, None], self.op(h, where), other)

    @property
    def width(self) -> int | None:
        return self.op.width

    @property
    def gated(self) -> bool:
        return True

    @property
    def must_change(self) -> bool:
        return self.op.must_change and (self.otherwise is None or self.otherwise.must_change)

    @property
    def name(self) -> str:
        other = "" if self.otherwise is None else f", otherwise {self.otherwise.name}"
        return f"When({type(self.gate).__name__}, {self.op.name}{other})"

    def to(self, device: torch.device) -> Op:
        return changed(super().to(device), {"gate": self.gate.to(device)})
