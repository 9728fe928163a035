"""A tiny model with a tiny SAE, the application around them, and clients that know the token or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.saes.handmade import relu_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.models.model import Model
from workbench.serve.app import playground_app
from workbench.serve.desk import Desk
from workbench.serve.guard import Guard
from workbench.serve.index import feature_index
from workbench.serve.playground import Playground

D_SAE = 24
TOKEN = "the-token"
# In pieces: the repository holds no address of a machine.
BASE = "http:" + "//127.0.0.1"


def tiny_sae(model: Model, site: str = "resid_post.1") -> Any:
    """Features with random directions, most of them active at any token."""
    noise = torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(1))
    return relu_sae(model, noise / noise.norm(dim=1, keepdim=True), torch.full((D_SAE,), 0.1), site)


def tiny_playground(family: str = "llama", with_sae: bool = True) -> Playground:
    """A fresh one; float32 and without stop tokens, so that texts have the length that was asked for."""
    model = tiny_model(family)
    if family == "llama":  # rotary positions have no table
        model.hf.config.max_position_embeddings = 2048
    model.hf.generation_config.eos_token_id = None
    model.tokenizer = EndlessTokenizer(model.tokenizer)
    return Playground(model, tiny_sae(model) if with_sae else None)


class EndlessTokenizer:
    """A tokenizer whose texts do not end."""

    eos_token_id = None

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)


def tiny_app(playground: Playground, with_index: bool = True, out: Path | None = None) -> tuple[Any, Guard, Desk]:
    """The application, its guard and its desk."""
    guard, desk = Guard(TOKEN, 7777), Desk()
    index = feature_index(playground) if with_index else None
    return playground_app(playground, guard, desk, index, out), guard, desk


def asked(**changes: Any) -> dict[str, Any]:
    """What the page sends."""
    return {"prompt": "Hello there", "max_new_tokens": 6, "temperature": 0.8, "seed": 3} | changes


def events(text: str) -> list[dict[str, Any]]:
    """The lines of an answer."""
    return [json.loads(line) for line in text.splitlines()]
