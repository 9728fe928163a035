"""What an eraser and a transport are: affine maps of activations that become interventions, each with its control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.html import Shown
from workbench.core.numbers import counted, number
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Affine, LowRank
from workbench.interventions.scopes import Scope
from workbench.probes.erase.moments import ClassMoments


@dataclass(frozen=True, kw_only=True)
class ErasureCheck(OneLine):
    """How much of the classes an affine map leaves, computed from the moments that it was fitted on.

    Attributes:
        r2: share of the class indicators' variance that an affine map of the rows explains, without the edit.
        r2_after: the same after the edit; 0 says that no affine predictor beats the constant.
        r2_control: the same after the control.
        change: root mean square length of the edit, as a share of that of the centred rows.
        change_control: the same of the control.
        control: what the control is.
    """

    r2: float
    r2_after: float
    r2_control: float
    change: float
    change_control: float
    control: str

    def text(self) -> str:
        """The check as a sentence."""
        return (
            f"R² of the classes {number(self.r2)} before, {number(self.r2_after)} after, {number(self.r2_control)} "
            f"after the control ({self.control}); length of the edit {number(self.change)} of the spread of the rows, "
            f"{number(self.change_control)} for the control"
        )

    def facts(self) -> Mapping[str, object]:
        """The check as names and values."""
        return {
            "R² of the classes": self.r2, "R² after the edit": self.r2_after, "R² after the control": self.r2_control,
            "length of the edit / spread": self.change, "length of the control / spread": self.change_control,
            "control": self.control,
        }  # fmt: skip


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Eraser(Shown):
    """Removes what an affine predictor reads of a concept: `x - ((x - mean) read^T) write`.

    Attributes:
        name: of the method.
        classes: how many classes the concept has.
        read: what is read, one row per dimension that is removed.
        write: an orthonormal basis of what is written.
        mean: of the rows; it stays where it is.
        check: what it leaves, beside its control.
    """

    name: str
    classes: int
    read: Float[Tensor, "rank d"]
    write: Float[Tensor, "rank d"]
    mean: Float[Tensor, " d"]
    check: ErasureCheck

    @property
    def rank(self) -> int:
        """Dimensions that are removed."""
        return len(self.read)

    def __call__(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """The erased rows, computed in fp64 and returned in the dtype of `x`."""
        rows = x.to(self.mean)
        return (rows - (rows - self.mean) @ self.read.T @ self.write).to(x)

    @property
    def op(self) -> LowRank:
        """The same as an edit of hidden states, in fp32."""
        return LowRank(R=self.write, W=self.write - self.read, b=self.read @ self.mean)

    def at(self, site: str | Site, scope: Scope | None = None) -> Intervention:
        """The eraser as an intervention at a site; the default scope is every token."""
        return Intervention.at(site, self.op, scope)

    def control(self, seed: int = 0) -> Eraser:
        """The eraser of a random subspace of equal rank: what removing so many dimensions does by itself."""
        write = random_subspace(self.rank, self.mean, seed)
        return Eraser(
            name=f"random subspace of rank {self.rank}", classes=self.classes, read=write, write=write,
            mean=self.mean, check=self.check,
        )  # fmt: skip

    def _shown_line(self) -> str:
        return f"{self.name}, {self.classes} classes, {counted(self.rank, 'dimensions')}; {self.check.text()}"

    def _shown_facts(self) -> Mapping[str, object]:
        return {"method": self.name, "classes": self.classes, "dimensions": self.rank, **self.check.facts()}


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Transport(Shown):
    """Moves rows of one class to where those of another are: `to + A (x - mean)`.

    Attributes:
        name: of the method.
        source: class that is moved.
        target: class to which it is moved.
        weight: A, symmetric and positive semidefinite.
        mean: of the source.
        to: where the mean goes.
        check: what an affine predictor still tells apart, beside the control.
    """

    name: str
    source: int
    target: int
    weight: Float[Tensor, "d d"]
    mean: Float[Tensor, " d"]
    to: Float[Tensor, " d"]
    check: ErasureCheck

    def __call__(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """The moved rows, computed in fp64 and returned in the dtype of `x`; give rows of the source class."""
        return (self.to + (x.to(self.mean) - self.mean) @ self.weight.T).to(x)

    @property
    def bias(self) -> Float[Tensor, " d"]:
        """What is added to `A x`."""
        return self.to - self.weight @ self.mean

    @property
    def op(self) -> Affine:
        """The same as an edit of hidden states, in fp32."""
        return Affine(self.weight, self.bias)

    def at(self, site: str | Site, scope: Scope | None = None) -> Intervention:
        """The transport as an intervention at a site; the default scope is every token."""
        return Intervention.at(site, self.op, scope)

    def control(self, seed: int = 0) -> Transport:
        """A shift of equal length in a random direction: what any push of that size does."""
        shift = random_subspace(1, self.mean, seed)[0] * (self.to - self.mean).norm()
        identity = torch.eye(len(self.mean)).to(self.weight)
        return Transport(
            name="shift in a random direction", source=self.source, target=self.target, weight=identity,
            mean=self.mean, to=self.mean + shift, check=self.check,
        )  # fmt: skip

    def _shown_line(self) -> str:
        return f"{self.name}, class {self.source} to {self.target}; {self.check.text()}"

    def _shown_facts(self) -> Mapping[str, object]:
        return {"method": self.name, "moved": f"class {self.source} to {self.target}", **self.check.facts()}


def random_subspace(rank: int, like: Float[Tensor, " d"], seed: int) -> Float[Tensor, "rank d"]:
    """Orthonormal basis of a subspace drawn uniformly, in the dtype and on the device of `like`."""
    noise = torch.randn(len(like), rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q.T.contiguous().to(like)


def eraser_of(name: str, moments: ClassMoments, read: Tensor, write: Tensor) -> Eraser:
    """An eraser with its check; the control is drawn from seed 0."""
    mean = moments.mean
    control = random_subspace(len(read), mean, 0)
    (after, change), (after_control, change_control) = (
        _left(moments, *_affine(mean, *map_)) for map_ in ((read, write), (control, control))
    )
    check = ErasureCheck(
        r2=moments.class_r2(), r2_after=after, r2_control=after_control, change=change, change_control=change_control,
        control="a random subspace of equal rank",
    )  # fmt: skip
    return Eraser(name=name, classes=len(moments.n), read=read, write=write, mean=mean, check=check)


def transport_of(name: str, moments: ClassMoments, source: int, target: int, weight: Tensor, to: Tensor) -> Transport:
    """A transport with its check, over the rows of both classes."""
    pair = torch.tensor([source, target], device=moments.n.device)
    both = ClassMoments(n=moments.n[pair], means=moments.means[pair], scatter=moments.scatter[pair])
    mean = moments.means[source]
    shift = random_subspace(1, mean, 0)[0] * (to - mean).norm()
    identity = torch.eye(len(mean)).to(weight)
    after, change = _left(both, weight, to - weight @ mean, 0)
    after_control, change_control = _left(both, identity, shift, 0)
    check = ErasureCheck(
        r2=both.class_r2(), r2_after=after, r2_control=after_control, change=change, change_control=change_control,
        control="a shift of equal length in a random direction",
    )  # fmt: skip
    return Transport(name=name, source=source, target=target, weight=weight, mean=mean, to=to, check=check)


def _affine(mean: Tensor, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """`x - ((x - mean) read^T) write` as weight and bias."""
    removed = write.T @ read
    return torch.eye(len(mean)).to(mean) - removed, removed @ mean


def _left(moments: ClassMoments, weight: Tensor, bias: Tensor, label: int | None = None) -> tuple[float, float]:
    """R² of the classes after an affine map, and how long the edit is, as a share of the spread of the rows."""
    identity = torch.eye(moments.width).to(weight)
    edit = moments.mapped(weight - identity, bias)
    chosen = slice(None) if label is None else slice(label, label + 1)
    squares = edit.scatter.diagonal(dim1=1, dim2=2).sum(1) + edit.n * edit.means.square().sum(1)
    length = squares[chosen].sum() / moments.n[chosen].sum() / moments.covariance.trace()
    return moments.mapped(weight, bias, label).class_r2(), float(length.sqrt())
