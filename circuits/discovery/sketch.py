"""Gradients with respect to weights, one per prompt, in a few thousand numbers that keep their angles.

The gradient of a linear map is a sum over tokens of outer products, output gradient times input. A CountSketch whose
hash of an entry is the sum of hashes of its row and its column turns an outer product into a convolution, so no
gradient of a single prompt is ever in memory.

Source: Pham and Pagh 2013 (TensorSketch); Charikar et al. 2002 (CountSketch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.metrics import bound, log_probability
from circuits.nodes.runs import metric_of
from circuits.pairs import Pairs
from workbench.core.errors import InvalidInputError, UnknownSiteError
from workbench.core.precision import precise
from workbench.models.model import Model


class GradientSketch:
    """Sketches of the gradient of minus the answer's log probability with respect to the weights of all linear maps.

    The unembedding, embeddings, norms and biases are left out. The inner product of two sketches is that of the two
    gradients, up to a relative error of about one over the square root of the width.

    Args:
        model: the model.
        width: entries of a sketch.
        seed: of the hashes.

    Raises:
        InvalidInputError: if the model has no linear map.
    """

    def __init__(self, model: Model, width: int, seed: int = 0) -> None:
        self._model, self.width = model, width
        self._maps = linear_maps(model)
        if not self._maps:
            raise InvalidInputError(
                f"{model.name} has no linear map that PyTorch or transformers would know, so there is no gradient to "
                "sketch. Use vectors of another kind: effects, activations, dense."
            )
        g = torch.Generator().manual_seed(seed)
        self._hashes = {
            name: tuple(_Hash.drawn(size, width, g) for size in shape) for name, (_, shape) in self._maps.items()
        }

    def of(self, pairs: Pairs) -> Float[Tensor, "prompts width"]:
        """One sketch per prompt, on the CPU."""
        clean, n = pairs.clean, len(pairs)
        spectrum = torch.zeros(n, self.width // 2 + 1, dtype=torch.complex64)
        inputs: dict[str, Tensor] = {}
        handles: list[torch.utils.hooks.RemovableHandle] = []

        def add(name: str, slope: Tensor) -> None:
            rows, columns = self._hashes[name]
            x, g = (part.reshape(n, -1, part.shape[-1]) for part in (inputs.pop(name), slope))
            product = torch.fft.rfft(columns(precise(x))) * torch.fft.rfft(rows(precise(g)))
            spectrum.add_(product.sum(1).cpu())

        def note(name: str, x: Tensor, out: Tensor) -> None:
            if out.requires_grad:
                inputs[name] = x.detach()
                out.register_hook(lambda slope: add(name, slope.detach()))

        for name, (module, _) in self._maps.items():
            handles.append(module.register_forward_hook(_noting(name, note)))
        try:
            metric = bound(log_probability(), self._model, pairs)
            every = torch.arange(n, device=clean.ids.device)
            start = self._model.site_map["resid_pre.0"].site
            acts = self._model.capture(clean, [str(start), "final_norm"], grad=True)
            with torch.enable_grad():
                value = metric_of(self._model, metric, acts.flat("final_norm"), clean, every)
            torch.autograd.grad(value.sum(), acts[start])
        except UnknownSiteError as error:
            raise InvalidInputError(
                f"{self._model.name}: gradients need the stream in front of block 0. {error}"
            ) from None
        finally:
            for handle in handles:
                handle.remove()
        return torch.fft.irfft(spectrum, n=self.width)


def linear_maps(model: Model) -> Mapping[str, tuple[nn.Module, tuple[int, int]]]:
    """Every linear map but the unembedding, by its name, with the widths of its output and input."""
    from transformers.pytorch_utils import Conv1D

    head = model.hf.get_output_embeddings()
    found: dict[str, tuple[nn.Module, tuple[int, int]]] = {}
    for name, module in model.hf.named_modules():
        if module is head or not isinstance(module, nn.Linear | Conv1D):
            continue
        rows, columns = module.weight.shape
        found[name] = module, (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
    return found


def _noting(name: str, note: Callable[[str, Tensor, Tensor], None]) -> Callable[..., None]:
    """A hook that notes what goes into a module and what comes out of it."""

    def hook(_module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        note(name, given[0], out)

    return hook


class _Hash:
    """A CountSketch of vectors: each coordinate goes, with a sign, to one of `width` places."""

    def __init__(self, place: Tensor, sign: Tensor, width: int) -> None:
        self.place, self.sign, self.width = place, sign, width

    @classmethod
    def drawn(cls, size: int, width: int, g: torch.Generator) -> _Hash:
        """A random one."""
        return cls(
            torch.randint(width, (size,), generator=g), torch.randint(2, (size,), generator=g).mul(2).sub(1), width
        )

    def __call__(self, x: Float[Tensor, "rows pos size"]) -> Float[Tensor, "rows pos width"]:
        out = x.new_zeros(*x.shape[:-1], self.width)
        return out.index_add_(-1, self.place.to(x.device), x * self.sign.to(x))
