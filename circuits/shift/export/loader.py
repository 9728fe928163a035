"""A repaired text classifier, run with nothing but PyTorch, safetensors and its language model.

`load(folder, hf_model, tokenizer)(texts)` gives the labels. A copy of this file lies in every saved folder. At each
site of the patch a few neurons are computed from the activations and what they write is taken off; then the activations
at the probe's site are pooled and a linear head reads them. One text at a time, so that padding plays no part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FORMAT = "repaired text classifier 1"
SETTINGS, WEIGHTS = "classifier.json", "classifier.safetensors"


class Classifier:
    """Labels texts.

    Attributes:
        label_names: names of the labels, in the order of the probabilities.
        settings: what the file says: sites, rules, tokens that are read, the model.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        if (found := checksum(model)) != settings["model"]["checksum"]:
            raise ValueError(
                f"This classifier was made for the model {settings['model']['name']} with checksum "
                f"{settings['model']['checksum']}; the given model has {found}. Load the model that it was made for."
            )
        self.settings, self.label_names = settings, tuple(settings["label_names"])
        self._model, self._tokenizer, self._weights = model, tokenizer, weights
        self._modules = dict(model.named_modules())

    def __call__(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The label of each text."""
        return tuple(self.label_names[label] for label in self.logits(texts).argmax(dim=1).tolist())

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Probability of each label, a row per text."""
        return self.logits(texts).softmax(dim=1)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """Logit of each label, a row per text, in fp64."""
        pooled = torch.stack([self._pooled(text) for text in texts]).double()
        return pooled @ self._weights["head.weight"].double().T + self._weights["head.bias"].double()

    def _pooled(self, text: str) -> Tensor:
        """Mean over the tokens that are read, after the patch."""
        ids = [*self.settings["prefix_ids"], *self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        found: list[Tensor] = []
        probe = self.settings["probe"]
        with self._at(probe, lambda x: found.append(x.float())):
            self._run(ids)
        keep = self._kept(ids, found[0])
        if self.settings["patches"]:
            with contextlib.ExitStack() as hooks:
                for i, patch in enumerate(self.settings["patches"]):
                    hooks.enter_context(self._at(patch, self._patched(patch, f"patch.{i}.", keep)))
                hooks.enter_context(self._at(probe, lambda x: found.append(x.float())))
                self._run(ids)
        return found[-1][keep.to(found[-1].device)].mean(dim=0).cpu()

    def _kept(self, ids: Sequence[int], x: Tensor) -> Tensor:
        """Neither the first token nor a special one nor one of a norm beyond the limit."""
        tokens = self.settings["tokens"]
        keep = ~torch.isin(torch.tensor(ids), torch.tensor(tokens["special_ids"], dtype=torch.long))
        keep[0] = False
        if tokens["max_norm"] is not None:
            keep &= (x.norm(dim=-1) <= tokens["max_norm"]).cpu()
        if not bool(keep.any()):
            raise ValueError("A text has no token besides its first, special and sink ones. Give longer texts.")
        return keep

    def _patched(self, patch: Mapping[str, Any], prefix: str, keep: Tensor) -> Callable[[Tensor], Tensor]:
        weights = {name.removeprefix(prefix): value for name, value in self._weights.items() if name.startswith(prefix)}

        def edit(x: Tensor) -> Tensor:
            own = {name: value.to(x.device) for name, value in weights.items()}
            edited = x.float().clone()
            rows = edited[keep.to(x.device)]
            edited[keep.to(x.device)] = rows - neurons(rows, patch, own) @ own["write"].float()
            return edited.to(x.dtype)

        return edit

    def _run(self, ids: Sequence[int]) -> None:
        device = next(self._model.parameters()).device
        self._model(input_ids=torch.tensor([ids], device=device), use_cache=False)

    @contextlib.contextmanager
    def _at(self, place: Mapping[str, Any], fn: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Calls `fn` with the activations `(pos, d)` at a place, and puts what it gives in their stead."""

        def call(x: Tensor) -> None:
            columns = slice(None) if place["columns"] is None else torch.tensor(place["columns"], device=x.device)
            new = fn(x[0][:, columns])
            if new is not None:  # in place, so that it reaches whoever else holds this tensor
                x[0, :, columns] = new

        def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call(args[0] if args else kwargs["hidden_states"])

        def leave(_module: Any, _args: Any, output: Any) -> None:
            call(output if isinstance(output, Tensor) else output[0])

        module = self._modules[place["module"]]
        handle = (
            module.register_forward_pre_hook(enter, with_kwargs=True)
            if place["side"] == "in"
            else module.register_forward_hook(leave)
        )
        try:
            yield
        finally:
            handle.remove()


def neurons(x: Tensor, patch: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """By how many of its rows each of the patch's neurons moves each token: activation times the token's scale.

    Args:
        x: tokens `(n, d)` in fp32.
        patch: rule and normalisation.
        weights: "read" (d, neurons), with what the rule needs: "bias", "before", "threshold", "gate", "magnitude",
            "magnitude_bias", "norms", "chosen".
    """
    normed, scale = _normed(x, patch["normalisation"])
    if "before" in weights:
        normed = normed.to(weights["before"]) - weights["before"]
    pre = normed.to(weights["read"]) @ weights["read"]
    rule = patch["rule"]
    if rule == "linear":
        acts = pre
    elif rule == "gated":
        acts = (pre * weights["magnitude"].exp() + weights["magnitude_bias"]).relu() * (pre + weights["gate"] > 0)
    else:
        pre = pre + weights["bias"]
        if "norms" in weights:
            pre = pre * weights["norms"]
        acts = pre.relu()
        if rule == "jumprelu":
            acts = acts * (pre.float() > weights["threshold"].float())
        if rule == "topk":
            kept = pre.topk(patch["k"], dim=-1)
            acts = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())[:, weights["chosen"]]
    return acts.float() * scale


def _normed(x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Tokens as the encoder reads them, and by what each one's activations are multiplied to be in the units of `x`."""
    if how == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / size, size
    if how == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        spread = centred.std(-1, keepdim=True)
        return centred / (spread + 1e-5), spread
    return x, torch.ones_like(x[:, :1])


def checksum(model: Any) -> str:
    """Twelve hex digits that tell a model from others, by a sample of every weight rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        taken = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(taken.numpy().tobytes())
    return digest.hexdigest()[:12]


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of a saved classifier."""
    settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
    if settings.get("format") != FORMAT:
        raise ValueError(f"{folder}: the format is {settings.get('format')!r}; this loader reads {FORMAT!r}.")
    return settings, load_file(str(Path(folder) / WEIGHTS))


def load(folder: str | Path, model: Any, tokenizer: Any) -> Classifier:
    """A saved classifier on its language model.

    Args:
        folder: what was saved.
        model: the model of transformers that it was made for.
        tokenizer: of the model.
    """
    return Classifier(model, tokenizer, *read(folder))
