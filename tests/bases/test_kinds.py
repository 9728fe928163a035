"""Bases by name, the registry, and whether a basis belongs to a model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.bases.every import hidden, made
from tests.tiny import D_MODEL, FAMILIES, MIXTURES, tiny_model
from workbench.bases.base import Basis, Dictionary
from workbench.bases.kinds.random import random_like
from workbench.bases.registry import BASES
from workbench.bases.sae import as_basis
from workbench.core.errors import (
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    ShapeError,
    UnknownNameError,
    UnknownSiteError,
    WidthError,
)
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.saes.basis import basis

SITE = "resid_post.1"
X = hidden(30)
LLAMA = functools.cache(tiny_model)


def own_sae(model: Model, site: str = SITE, **metadata: Any) -> Any:
    sae = made("jumprelu", "layer_norm", d_in=model.width(site))
    sae.cfg.metadata.__dict__.update({"hook_name": Site.parse(site).tl_name, **metadata})
    return sae


@functools.cache
def bases() -> dict[str, Basis]:
    model = LLAMA()
    return {
        "SAE": basis(own_sae(model), model),
        "neurons": basis("neurons", model, SITE),
        "pca": basis("pca", model, SITE, x=X),
        "pca, few": basis("pca", model, SITE, x=iter(X.split(7)), k=5),
        "random": basis("random", model, SITE, d_sae=24, k=4, b_dec=X.mean(0)),
    }


@pytest.mark.parametrize("name", ["SAE", "neurons", "pca", "pca, few", "random"])
def test_contributions_constant_and_error_are_the_activations_whatever_the_basis(name: str) -> None:
    own, some = bases()[name], torch.tensor([3, 0])
    close = functools.partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)
    close(own.contribution(X) + own.constant(X) + own.error(X), X)
    close(own.coefficients(X) @ own.rows() + own.constant(X), own.reconstruct(X))
    close(own.decode(own.encode(X), X), own.reconstruct(X))
    close(own.encode_some(X, some), own.encode(X)[:, some])
    close(own.contribution(X, some), own.coefficients(X)[:, some] @ own.rows()[some])
    rest = torch.tensor([f for f in range(own.d_sae) if f not in some.tolist()])
    close(own.ablate(own.ablate(X, some) * 0 + X, some), X - own.contribution(X) + own.contribution(X, rest))
    # all features gone and the error gone is the constant: the same for every basis that keeps a token's mean and size
    close(own.ablate(X, torch.arange(own.d_sae)) - own.error(X), own.constant(X))
    assert (own.site, own.site_out, own.model_fingerprint) == (SITE, SITE, LLAMA().fingerprint)
    assert own.writing().all() and own.bias.shape == (D_MODEL,) and len(own.fingerprint) == 12
    close(torch.from_numpy(own.sparse(X).toarray()), own.encode(X))


def test_each_kind_is_what_its_name_says() -> None:
    neurons, pca, few, random = (bases()[name] for name in ("neurons", "pca", "pca, few", "random"))
    assert torch.equal(neurons.encode(X), X) and torch.equal(
        neurons.ablate(X, torch.tensor([2]))[:, 2], torch.zeros(30)
    )
    torch.testing.assert_close(pca.rows() @ pca.rows().T, torch.eye(D_MODEL), atol=1e-5, rtol=0)
    variance = pca.encode(X).var(0, correction=0)
    assert bool((variance[:-1] >= variance[1:] - 1e-4).all()), "largest variance first"
    torch.testing.assert_close(variance.sum(), X.var(0, correction=0).sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(pca.encode(X).mean(0), torch.zeros(D_MODEL), atol=1e-4, rtol=0)
    torch.testing.assert_close(few.rows(), pca.rows()[:5], atol=1e-5, rtol=0)
    assert float(pca.error(X).norm()) < 1e-4 < 0.1 < float(few.error(X).norm())
    assert bool(((random.encode(X) != 0).sum(1) <= 4).all()) and float(random.encode(X).min()) >= 0
    torch.testing.assert_close(random.rows().norm(dim=1), torch.ones(24))
    again = basis("random", LLAMA(), SITE, d_sae=24, k=4, b_dec=X.mean(0))
    assert torch.equal(again.reconstruct(X), random.reconstruct(X)) and again.fingerprint == random.fingerprint
    assert basis("random", LLAMA(), SITE, d_sae=24, k=4, seed=1).fingerprint != random.fingerprint
    control = random_like(as_basis(made("transcoder")), 99)
    assert (control.d_in, control.d_out, control.transcodes) == (D_MODEL, 20, True)
    assert control.reconstruct(X).shape == (30, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_and_heads_write_what_the_model_writes(family: str) -> None:
    model, ids = tiny_model(family), torch.tensor([[5, 9, 2, 40]])
    for name, read, out, features in (
        ("mlp_hidden", "mlp_post.1", "mlp_out.1", [3, 7]),
        ("head_channels", "z.1", "attn_out.1", [0, 9]),
        ("heads", "z.1", "attn_out.1", [1]),
    ):
        own, some = basis(name, model, out), torch.tensor(features)
        assert own.fingerprint == basis(name, model, read).fingerprint
        assert (own.site, own.site_out, own.transcodes) == (read, out, True)
        acts = model.capture(ids, [read, out])
        x, y = (acts.flat(site)[0].float() for site in (read, out))
        torch.testing.assert_close(own.reconstruct(x), y, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.contribution(x) + own.constant(x), y, atol=1e-5, rtol=1e-4)
        assert float(own.error(x, y).norm()) < 1e-4 * float(y.norm())
        # By plain arithmetic: the projection of the activations without these neurons or this head, before any norm.
        module, without = model.site_map[read].module, x.clone()
        columns = some if name != "heads" else torch.arange(x.shape[1]).view(own.d_sae, -1)[some].flatten()
        without[:, columns] = 0.0
        scale = own.scale(x) * (own.gain if family.startswith(("gemma", "olmo")) else 1.0)  # type: ignore[attr-defined]
        wanted = (module(x) - module(without)) * scale
        torch.testing.assert_close(own.contribution(x, some), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.ablate(x, some, y), y - wanted, atol=1e-5, rtol=1e-4)
        assert (own.normalisation == "none") == torch.equal(own.scale(x), torch.ones(4, 1)) == (not own.normalises)
        assert (own.encode(x)[:, some] - own.encode_some(x, some)).abs().max() < 1e-6 and own.writing().all()
    lengths = own.coefficients(x)
    torch.testing.assert_close(lengths[:, 1], own.contribution(x, torch.tensor([1])).norm(dim=1), atol=1e-5, rtol=1e-4)
    halved = own.encode(x) * torch.tensor([1.0, 0.5] + [1.0] * (own.d_sae - 2))
    torch.testing.assert_close(own.decode(halved, x), y - 0.5 * wanted, atol=1e-5, rtol=1e-4)
    for call in (own.rows, lambda: own.decode(halved)):
        with pytest.raises(InvalidInputError, match="another direction for each token"):
            call()


def test_a_projection_that_is_not_what_the_model_writes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(UnknownSiteError, match="mixture of experts"):
        basis("mlp_hidden", tiny_model(MIXTURES[0]), "mlp_out.1")
    with pytest.raises(
        MismatchError, match=r"reads mlp_post and writes mlp_out. Give one of the two, such as mlp_post\.1"
    ):
        basis("mlp_hidden", model, SITE)
    mlp = model.site_map["mlp_out.1"].module
    monkeypatch.setattr(mlp, "forward", lambda x, plain=mlp.forward: 0.5 * plain(x))
    with pytest.raises(MismatchError, match=r"mlp_out\.1 is not the projection of mlp_post\.1"):
        basis("mlp_hidden", model, "mlp_post.1")


def test_a_name_is_registered_once_and_a_wrong_one_says_what_exists() -> None:
    model = LLAMA()
    assert {"neurons", "mlp_hidden", "heads", "pca", "random"} <= set(BASES)
    with pytest.raises(InvalidInputError, match="'neurons' is already the name of a basis"):
        BASES.register("neurons")(lambda model, site: bases()["neurons"])
    for asked, error, words in (
        ("neuron", UnknownNameError, "Did you mean neurons"),
        (torch.nn.Linear(2, 2), InvalidInputError, "got Linear"),
        (3, InvalidInputError, "got int"),
    ):
        with pytest.raises(error, match=words):
            wb.basis(asked, model, SITE)  # type: ignore[arg-type]
    for call, error, words in (
        (lambda: basis("neurons", model), InvalidInputError, "Give both"),
        (lambda: basis("neurons", model, "resid_pots.1"), UnknownSiteError, "Did you mean resid_post"),
        (lambda: basis("random", model, SITE, d_sea=3), InvalidInputError, "takes d_sae, k, seed, b_dec"),
        (lambda: basis("random", model, SITE, d_sae=3, k=4), InvalidInputError, "1 <= k <= d_sae"),
        (lambda: basis("pca", model, SITE, x=X[:1]), DegenerateInputError, "no variance"),
        (lambda: basis("pca", model, SITE, x=X[:, :3]), ShapeError, "has width 16"),
        (lambda: basis("pca", model, SITE, x=X, k=17), InvalidInputError, "1 <= k <= 16"),
        (lambda: basis(own_sae(model), k=3), InvalidInputError, "options are for bases by name"),
        (lambda: basis(own_sae(model), site=SITE), InvalidInputError, "Give the model as well"),
        (lambda: bases()["random"].reconstruct(X[:, :3]), ShapeError, "reads d_in=16"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_an_sae_of_another_model_site_or_width_is_refused(tmp_path: Path) -> None:
    model = LLAMA()
    sae = own_sae(model, model_fingerprint=model.fingerprint)
    placed = basis(sae, model)
    assert (placed.site, placed.model_fingerprint) == (SITE, model.fingerprint)
    assert basis(placed, model, "resid_post.-2").site == SITE
    sae.save_model(tmp_path)
    again = basis(str(tmp_path), model, SITE)
    assert torch.equal(again.encode(X), placed.encode(X)) and again.fingerprint == placed.fingerprint
    nameless = made("topk")
    assert basis(nameless).site is None and basis(nameless, model, "mlp_out.0").site == "mlp_out.0"
    for call, error, words in (
        (lambda: basis(sae, model, "resid_post.0"), MismatchError, r"trained at resid_post\.1, not at resid_post\.0"),
        (lambda: basis(sae, tiny_model(seed=3)), MismatchError, "was trained on model .* Load the model"),
        (lambda: basis(made("topk", d_in=17), model, SITE), WidthError, "d_in=17.*has width 16"),
        (lambda: basis(nameless, model), MismatchError, "does not say which site it reads"),
        (lambda: basis(own_sae(model, hook_name="model.nonsense"), model), UnknownSiteError, "model.nonsense"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_a_dictionary_of_functions_is_a_basis() -> None:
    D = torch.nn.functional.normalize(torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0)), dim=1)
    own = Dictionary.of(lambda x: (x @ D.T).relu(), D, name="planted")
    torch.testing.assert_close(own.reconstruct(X), (X @ D.T).relu() @ D)
    assert not own.transcodes and float(own.bias.abs().max()) == 0.0
