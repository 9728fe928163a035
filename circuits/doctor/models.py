"""Copies of a model that compute something else, or the same in another way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from circuits.decomposition import bases as checked_bases
from workbench.bases.base import Basis
from workbench.core.tokens import TokenBatch
from workbench.hooks.ends import embedding
from workbench.models.model import Model

PARTS = 3
"""Steps from the model as it is to one of random weights."""


def copied(model: Model) -> Model:
    """The same weights in memory of their own."""
    return Model(copy.deepcopy(model.hf), model.tokenizer, f"{model.name} (copy)")


def rebound(bases: Mapping[str, Basis], model: Model) -> dict[str, Basis]:
    """The same bases for a copy of the model that they were made for."""
    return checked_bases(model, {site: replace(basis, model_fingerprint=None) for site, basis in bases.items()})


def randomised(model: Model, part: int, seed: int = 0) -> Model:
    """A copy whose top layers are drawn again, normal with mean and spread of each weight; the last part is all of it.

    Args:
        model: the model.
        part: 1 to `PARTS`; the parts of a seed are nested.
        seed: of the weights.

    Source: Adebayo et al. 2018 (arXiv 1810.03292), cascading randomisation.
    """
    made = copied(model)
    n = made.n_layers
    if part >= PARTS:
        modules: list[nn.Module] = [made.hf]
    else:
        layers = range(n - max(1, round(n * part / PARTS)), n)
        modules = [made.site_map[f"resid_post.{layer}"].module for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            spread = parameter.float().std() if parameter.numel() > 1 else torch.zeros(())
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.copy_((parameter.float().mean() + spread * noise).to(parameter))
    return made


@dataclass(eq=False)
class _Norm:
    """A norm with the linear layers that read it, and what its weight has to be for a gain of 1."""

    module: nn.Module
    readers: list[nn.Module] = field(default_factory=list)
    offset: float = 0.0


def rescaled(model: Model, batch: TokenBatch, seed: int = 0) -> Model | None:
    """A copy whose norm gains are scaled by powers of two, and the weights that read them by the inverse.

    Every product and every sum is that of the model, bit by bit. None if no norm of the model allows it.
    """

    def gains(gain: Tensor) -> Tensor:
        exponents = torch.randint(-2, 3, gain.shape, generator=torch.Generator().manual_seed(seed))
        return gain * torch.exp2(exponents.float()).to(gain)

    return _with_gains(model, batch, gains, exactly=True)


def folded(model: Model, batch: TokenBatch) -> Model | None:
    """A copy whose norm gains are folded into the weights that read them; None if no norm of the model allows it."""
    return _with_gains(model, batch, torch.ones_like, exactly=False)


def _with_gains(model: Model, batch: TokenBatch, gains: Callable[[Tensor], Tensor], *, exactly: bool) -> Model | None:
    made = copied(model)
    norms = [norm for norm in _norms(made, batch) if not (exactly and norm.offset)]
    with torch.no_grad():
        before = made.logits(batch)
        for norm in norms:
            weight = _parameter(norm.module, "weight")
            gain = weight + norm.offset
            target = gains(gain)
            ratio = gain / target
            weight.copy_(target - norm.offset)
            if isinstance(bias := getattr(norm.module, "bias", None), Tensor):
                bias.copy_(bias / ratio)
            for reader in norm.readers:
                own = _parameter(reader, "weight")
                own.mul_((ratio if isinstance(reader, nn.Linear) else ratio[:, None]).to(own))
        after = made.logits(batch)
    same = torch.equal(before, after) if exactly else torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    return made if norms and same else None


def _norms(model: Model, batch: TokenBatch) -> list[_Norm]:
    """The norms of which every output goes to linear layers, as far as a run shows it, with untied weights."""
    from transformers.pytorch_utils import Conv1D

    found: dict[int, _Norm] = {}
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}

    def written(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[id(output)] = (output, module)
            found.setdefault(id(module), _Norm(module))

    def read(module: nn.Module, inputs: tuple[object, ...]) -> None:
        if inputs and (known := outputs.get(id(inputs[0]))) is not None:
            found[id(known[1])].readers.append(module)

    linear = [m for m in model.hf.modules() if isinstance(m, nn.Linear | Conv1D)]
    with _hooked([(m, written) for m in model.hf.modules() if _is_norm(m, model.d_model)], [(m, read) for m in linear]):
        model.logits(batch)
    tied = embedding(model.hf).weight.data_ptr()
    usable = []
    for norm in found.values():
        if norm.readers and all(_parameter(r, "weight").data_ptr() != tied for r in norm.readers):
            norm.offset = _offset(norm.module, model.d_model)
            usable.append(norm)
    return usable


def _is_norm(module: nn.Module, width: int) -> bool:
    names = {name for name, _ in module.named_parameters()}
    weight = getattr(module, "weight", None)
    return names in ({"weight"}, {"weight", "bias"}) and isinstance(weight, Tensor) and tuple(weight.shape) == (width,)


def _offset(norm: nn.Module, width: int) -> float:
    """What is added to a norm's weight to make its gain: 0, or 1 where a weight of zero is a gain of one."""
    weight = _parameter(norm, "weight")
    kept, x = weight.clone(), torch.linspace(-1, 1, width).to(weight)[None]
    with torch.no_grad():
        weight.zero_()
        bias = getattr(norm, "bias", None)
        size = float((norm(x) - (bias if isinstance(bias, Tensor) else 0.0)).abs().max())
        weight.copy_(kept)
    return 1.0 if size > 0 else 0.0


def _parameter(module: nn.Module, name: str) -> Tensor:
    found = getattr(module, name)
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _hooked(
    after: list[tuple[nn.Module, Callable[..., None]]], before: list[tuple[nn.Module, Callable[..., None]]]
) -> Iterator[None]:
    handles = []
    try:
        handles += [module.register_forward_hook(fn) for module, fn in after]
        handles += [module.register_forward_pre_hook(fn) for module, fn in before]
        yield
    finally:
        for handle in handles:
            handle.remove()
