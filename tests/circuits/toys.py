"""Tiny models in float64 with a dictionary at every site, and pairs that first differ in their second or third token."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import circuits
from circuits.nodes.effects import SiteEffects
from circuits.pairs import Pairs
from tests.bases.every import made
from tests.circuits.oracle import Oracle, Part, part_of
from tests.interventions.builders import ARCHITECTURES, NORMALISATIONS, sae_lens_sae
from tests.tiny import D_MODEL, tiny_hf, tiny_tokenizer
from workbench.models.model import Model

EXACT = ("gpt2", "neox")
"""Families whose norms compute in the precision of the model; those of the others round to fp32 inside."""
CLEAN, PATCH = ["abXde", "kbYdd", "ecXaf", "abXdd"], ["abYde", "kbZed", "eaWah", "abZfg"]
ANSWERS = [("p", "q"), ("r", "s"), ("q", "t"), ("p", "u")]


@functools.cache
def exact_model(family: str = "gpt2") -> Model:
    """In float64, shared between tests: none may change it."""
    return Model(tiny_hf(family).double(), tiny_tokenizer(), name=f"tiny-{family}")


@functools.cache
def pairs_of(family: str = "gpt2", patched: bool = True) -> Pairs:
    model = exact_model(family)
    if patched:
        return Pairs.of(model, clean=CLEAN, patch=PATCH, answers=ANSWERS)
    return Pairs.of(model, clean=CLEAN, answers=[a for a, _ in ANSWERS])


def all_sites(family: str = "gpt2") -> list[str]:
    """The embedding and what every block writes, in forward order."""
    model = exact_model(family)
    return ["embed", *(f"{kind}.{i}" for i in range(model.n_layers) for kind in ("attn_out", "mlp_out", "resid_post"))]


@functools.cache
def exact_sae(architecture: str, normalisation: str = "none", seed: int = 0) -> Any:
    sae = sae_lens_sae(architecture, normalisation).to(torch.float64)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        if name != "threshold":
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return sae


def mixed_saes(sites: list[str], shift: int = 0) -> dict[str, Any]:
    """Another architecture and normalisation at each site, all of them over fifteen sites."""
    kinds = [(a, n) for n in NORMALISATIONS for a in ARCHITECTURES]
    return {site: exact_sae(*kinds[(7 * i + shift) % len(kinds)], seed=i) for i, site in enumerate(sites)}


def difference(answers: Tensor) -> Any:
    """Logit of the patch answer minus that of the clean one."""
    rows = torch.arange(len(answers))
    return lambda logits: logits[rows, answers[:, 1]] - logits[rows, answers[:, 0]]


def oracle_of(family: str, saes: dict[str, Any], pairs: Pairs, keep: Tensor | None = None) -> Oracle:
    """The oracle of pairs and the logit difference."""
    parts = [sae if isinstance(sae, Part) else part_of(sae, site) for site, sae in saes.items()]
    keep = pairs.clean.mask if keep is None else keep
    return Oracle(exact_model(family), parts, pairs.clean, pairs.patch, difference(pairs.answers), keep)


def neurons_part(site: str, width: int = D_MODEL) -> Part:
    """The coordinates themselves: no constant, no error."""
    return Part(site, torch.eye(width, dtype=torch.float64), lambda x: x, torch.zeros_like)


def dense(site: SiteEffects, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Effects of features, (batch, pos, d_sae), and of errors, (batch, pos)."""
    out = torch.zeros(*shape, site.d_sae + 1, dtype=site.value.dtype)
    out[site.example, site.pos, site.feature] = site.value  # the error is the last column, -1
    return out[..., :-1], out[..., -1]


def close(found: Tensor, wanted: Tensor, rel: float = 1e-12) -> bool:
    """Whether two tensors of which the second is not zero agree, relative to its largest entry."""
    largest = float(wanted.abs().max())
    return largest > 1e-6 and float((found - wanted).abs().max()) <= rel * largest


def skip_transcoder(site: str = "resid_mid.1", out: str = "mlp_out.1") -> Any:
    """A transcoder of sae_lens with a skip connection, every parameter random."""
    sae = made("skip_transcoder", d_out=D_MODEL).to(torch.float64)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = site, out
    return sae


def other_bases() -> tuple[dict[str, Any], list[Part]]:
    """Hidden neurons, heads, neurons and a transcoder of the tiny GPT-2: as bases, and for the oracle."""
    model = exact_model("gpt2")
    hf: Any = model.hf
    blocks = hf.transformer.h
    transcoder = skip_transcoder()

    def written(site: str, read: str, projection: Any) -> Part:
        return Part(
            site, projection.weight, lambda x: x, lambda x: projection.bias.expand_as(x @ projection.weight), read
        )

    bases = {
        **circuits.mlp_hidden(model, [0]), "resid_post.0": exact_sae("gated", "layer_norm"), **circuits.heads(model, [1]),
        "mlp_out.1": transcoder, **circuits.neurons(model, ["resid_post.1"]),
    }  # fmt: skip
    parts = [
        written("mlp_out.0", "mlp_post.0", blocks[0].mlp.c_proj), part_of(bases["resid_post.0"], "resid_post.0"),
        written("attn_out.1", "z.1", blocks[1].attn.c_proj), part_of(transcoder, "mlp_out.1", "resid_mid.1"),
        neurons_part("resid_post.1"),
    ]  # fmt: skip
    return bases, parts
