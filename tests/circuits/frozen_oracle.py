"""Direct effects in a replacement model by autograd: the model itself with patterns, norms, gates and coders made leaves.

Shares no code with `circuits`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.circuits.oracle import hooked


def exact_norms(hf: Any, *, frozen: bool = False) -> None:
    """Norms in the precision of the model; with `frozen` their scale has no gradient."""

    def norm(module: Any, centres: bool, x: Tensor) -> Tensor:
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", 1e-6))
        x = x - x.mean(-1, keepdim=True) if centres else x
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
        return x * (scale.detach() if frozen else scale) * gain + (module.bias if centres else 0)

    for module in hf.modules():
        if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
            vars(module)["forward"] = functools.partial(norm, module, isinstance(module, nn.LayerNorm))


def half_rule(hf: Any) -> None:
    """MLPs of which each factor is held fast in turn."""

    def gated(mlp: Any, x: Tensor) -> Tensor:
        g, u = mlp.gate_proj(x), mlp.up_proj(x)
        s = mlp.act_fn(g)
        return mlp.down_proj((s.detach() * u + (s / g * u).detach() * g) / 2)

    def plain(into: Any, act: Any, out: Any, x: Tensor) -> Tensor:
        z = into(x)
        return out((act(z) / z).detach() * z)

    for module in hf.modules():
        if hasattr(module, "gate_proj"):
            module.forward = functools.partial(gated, module)
        elif hasattr(module, "dense_4h_to_h"):
            module.forward = functools.partial(plain, module.dense_h_to_4h, module.act, module.dense_4h_to_h)
        elif hasattr(module, "c_fc"):
            module.forward = functools.partial(plain, module.c_fc, module.act, module.c_proj)


class AutogradGraph:
    """One prompt: features, errors and tokens are leaves; gradients times values are direct effects.

    `coders` are skip transcoders of sae_lens by layer, which read `read` and write `mlp_out`.
    """

    def __init__(self, model: Any, coders: dict[int, Any], read: str, ids: Tensor) -> None:
        self.model, self.read, self.ids = model, read, ids
        seen: dict[str, Tensor] = {}
        kinds = [*(f"{kind}.{i}" for i in coders for kind in (read, "mlp_out")), "resid_pre.0"]
        model.hf.config._attn_implementation = "eager"
        with torch.no_grad(), hooked(model, [(s, lambda x, s=s: seen.__setitem__(s, x.clone())) for s in kinds]):
            self.patterns = model.hf(input_ids=ids, output_attentions=True, use_cache=False).attentions
        self.coders, self.features, self.errors, self.rest = coders, {}, {}, {}
        for i, sae in coders.items():
            x = seen[f"{read}.{i}"]
            f = sae.encode(x)
            written = f @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T
            self.features[i] = f.detach().requires_grad_(True)
            self.errors[i] = (seen[f"mlp_out.{i}"] - written).detach().requires_grad_(True)
        self.token = seen["resid_pre.0"].detach().requires_grad_(True)
        exact_norms(model.hf, frozen=True)
        half_rule(model.hf)
        self.reads: dict[int, Tensor] = {}
        self._run()

    def _run(self) -> None:
        def write(i: int, _x: Tensor) -> Tensor:
            sae = self.coders[i]
            return self.features[i] @ sae.W_dec + sae.b_dec + self.reads[i] @ sae.W_skip.T + self.errors[i]

        def note(i: int, x: Tensor) -> None:
            self.reads[i] = x

        edits: list[Any] = [("resid_pre.0", lambda _x: self.token)]
        edits += [(f"{self.read}.{i}", functools.partial(note, i)) for i in self.coders]
        edits += [(f"mlp_out.{i}", functools.partial(write, i)) for i in self.coders]
        fixed = iter(self.patterns)
        softmax = torch.nn.functional.softmax
        try:
            torch.nn.functional.softmax = lambda x, **_: next(fixed).to(x)  # type: ignore[assignment]
            with torch.enable_grad(), hooked(self.model, edits):
                self.last: list[Tensor] = []
                with hooked(self.model, [("final_norm", lambda x: self.last.append(x))]):
                    self.model.hf(input_ids=self.ids, use_cache=False)
        finally:
            torch.nn.functional.softmax = softmax

    def row(self, value: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """What features, errors and tokens add to a value: by layer `(pos, d_sae)` and `(pos,)`, and `(pos,)`."""
        leaves = [*self.features.values(), *self.errors.values(), self.token]
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(x) if g is None else g * x.detach() for x, g in zip(leaves, grads, strict=True)]
        n = len(self.coders)
        return (
            {i: part[0] for i, part in zip(self.coders, parts[:n], strict=True)},
            {i: part[0].sum(-1) for i, part in zip(self.coders, parts[n : 2 * n], strict=True)},
            parts[-1][0].sum(-1),
        )
