from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import circuits
from circuits.graph.circuit import ERROR, SiteNodes
from circuits.pairs import Pairs
from tests.circuits.oracle import Oracle, part_of
from tests.circuits.toys import (
    ANSWERS,
    CLEAN,
    EXACT,
    close,
    difference,
    exact_model,
    exact_sae,
    mixed_saes,
    oracle_of,
    other_bases,
    pairs_of,
)
from tests.tiny import FAMILIES, as_user
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError

DIFFERENCE = circuits.logit_difference()
SITES = ["embed", "attn_out.0", "resid_post.0", "mlp_out.1", "resid_post.1"]
ABLATIONS = ("mean", "zero", "resample")


def _circuit(family: str, bases: Any, n: int | None = None, aggregation: Any = "none") -> circuits.Circuit:
    effects = circuits.node_effects(
        exact_model(family), bases, pairs_of(family), DIFFERENCE, method="atp", measured=False, aggregation=aggregation
    )
    return effects.circuit(threshold=0.0) if n is None else effects.circuit(n=n)


def _listed(circuit: circuits.Circuit) -> circuits.Circuit:
    """The same as everything, node by node."""
    sites = {name: SiteNodes.of(site.d_sae, [*range(site.d_sae), ERROR]) for name, site in circuit.sites.items()}
    return dataclasses.replace(circuit, sites=sites)


def _ablated(
    slow: Oracle, circuit: circuits.Circuit, ablation: str, errors: str, complement: bool, other: list[int]
) -> Tensor:
    """The metric with nodes outside the circuit at their reference, one site after the other, each encoded as it is."""
    with torch.no_grad():
        slow.run(batch=slow.patch)
        references = {s: p.split(slow.seen[s], slow.seen[p.read or s]) for s, p in slow.parts.items()}

    def edit(site: str, x: Tensor) -> Tensor:
        part, nodes = slow.parts[site], circuit.sites[site]
        read = slow.seen[part.read] if part.read else x
        f, rest = part.split(x, read)
        kept = torch.zeros(x.shape[1], f.shape[2] + 1, dtype=torch.bool)
        for pos, feature in zip(nodes.pos.tolist(), nodes.feature.tolist(), strict=True):
            kept[slice(None) if pos < 0 else pos, feature] = True  # the error is the last column
        kept = ~kept if complement else kept
        if errors != "circuit":
            kept[:, -1] = errors == "all" or (errors == "resid" and site.startswith("resid"))
        if ablation == "zero":
            f_out, rest_out = torch.zeros_like(f), part.constant(read)
        else:
            f_out, rest_out = (r.mean(0, keepdim=True) if ablation == "mean" else r[other] for r in references[site])
        f_new, rest_new = torch.where(kept[:, :-1], f, f_out), torch.where(kept[:, -1:], rest, rest_out)
        return f_new @ part.rows + rest_new

    with torch.no_grad():
        return slow.run([(site, lambda x, site=site: edit(site, x)) for site in slow.parts])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_what_is_left_is_what_spliced_dictionaries_leave(ablation: Any) -> None:
    model, pairs, saes = exact_model(), pairs_of(), mixed_saes(SITES, shift=2)
    slow, nothing, other = oracle_of("gpt2", saes, pairs), _circuit("gpt2", saes, 0), [0, 1, 2, 3]
    empty = circuits.faithfulness(model, saes, nothing, pairs, DIFFERENCE, ablation=ablation).empty
    if ablation == "resample":
        # Which prompt each pair takes its nodes from, read off where everything is ablated.
        of_all = torch.stack([_ablated(slow, nothing, ablation, "none", False, [j] * 4) for j in range(4)])
        other = (of_all - empty).abs().argmin(0).tolist()
        assert sorted(other) == [0, 1, 2, 3] and all(i != j for i, j in enumerate(other)), "another prompt, each once"
    errors: Any
    by_position, together = _circuit("gpt2", saes, 25), _circuit("gpt2", saes, 12, "sum")
    for circuit, errors, complement in (
        (by_position, "circuit", False), (by_position, "circuit", True), (together, "circuit", False),
        (together, "circuit", True), (by_position, "all", False), (together, "all", True), (by_position, "none", True),
        (together, "none", False), (by_position, "resid", False), (together, "resid", True),
    ):  # fmt: skip
        found = circuits.faithfulness(
            model, saes, circuit, pairs, DIFFERENCE, ablation=ablation, errors=errors, complement=complement, batch_size=3
        )  # fmt: skip
        assert close(found.kept, _ablated(slow, circuit, ablation, errors, complement, other), 1e-11)
        assert close(found.empty, empty)
        f = (found.kept - found.empty).mean() / (found.full - found.empty).mean()
        assert found.value.value == pytest.approx(float(f), rel=1e-9)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_transcoders_channels_and_neurons_are_ablated_as_spliced_ones(ablation: Any) -> None:
    model, pairs, (bases, parts) = exact_model(), pairs_of(), other_bases()
    slow = Oracle(model, parts, pairs.clean, pairs.patch, difference(pairs.answers), pairs.clean.mask)
    circuit = _circuit("gpt2", bases, 20)
    for complement in (False, True):
        found = circuits.faithfulness(
            model, bases, circuit, pairs, DIFFERENCE, ablation=ablation, complement=complement
        )
        assert close(found.kept, _ablated(slow, circuit, ablation, "circuit", complement, []), 1e-11)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_everything_is_one_nothing_is_zero_and_complements_are_the_other(ablation: Any) -> None:
    model, pairs, saes = exact_model(), pairs_of(), mixed_saes(SITES, shift=5)
    whole, nothing = _circuit("gpt2", saes), _circuit("gpt2", saes, 0)
    for circuit, complement, value in (
        (whole, False, 1.0),
        (whole, True, 0.0),
        (nothing, False, 0.0),
        (nothing, True, 1.0),
    ):
        found = circuits.faithfulness(model, saes, circuit, pairs, DIFFERENCE, ablation=ablation, complement=complement)
        assert found.value.value == value and torch.equal(found.kept, found.full if value else found.empty)
        n_nodes = 5 * 5 * 40 if value else 0
        assert (found.n_features, found.n_errors) == (n_nodes, n_nodes // 40)
    assert close(found.full, oracle_of("gpt2", saes, pairs).run())
    for complement, value in ((False, 1.0), (True, 0.0)):
        found = circuits.faithfulness(
            model, saes, _listed(whole), pairs, DIFFERENCE, ablation=ablation, complement=complement
        )
        assert found.value.value == pytest.approx(value, abs=1e-10), "listed node by node, and computed"
    again = circuits.faithfulness(model, saes, _listed(whole), pairs, DIFFERENCE, ablation=ablation, complement=True)
    assert torch.equal(found.kept, again.kept), "two calls are alike"


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_and_everything_are_the_same_in_every_basis_and_architecture(family: str) -> None:
    model, pairs, sites = exact_model(family), pairs_of(family), ["attn_out.0", "resid_post.1"]
    found = {}
    for name, bases in (
        ("sae", mixed_saes(sites, shift=FAMILIES.index(family))), ("neurons", circuits.neurons(model, sites)),
        ("random", circuits.random(model, sites, d_sae=24, k=5)),
        *([("pca", circuits.pca(model, sites, ["abXde", "ecXaf", "kbYdd"], k=6))] if family in EXACT else []),
    ):  # fmt: skip
        whole = _circuit(family, bases)
        for ablation in ("mean", "resample"):
            # Listed node by node and taken out, everything is at its reference: the error holds the rest.
            out = circuits.faithfulness(
                model, bases, _listed(whole), pairs, DIFFERENCE, ablation=ablation, complement=True
            )  # type: ignore[arg-type]
            found[name, ablation] = out
            assert out.value.value == pytest.approx(0.0, abs=1e-5 if name in ("random", "pca") else 1e-6)
    for ablation in ("mean", "resample"):
        for name in dict.fromkeys(name for name, _ in found if name != "neurons"):
            assert torch.equal(found[name, ablation].full, found["neurons", ablation].full)
            assert close(found[name, ablation].empty, found["neurons", ablation].empty, 1e-12)


def test_means_are_those_of_the_reference_position_by_position() -> None:
    model, pairs, saes = exact_model(), pairs_of(), mixed_saes(["resid_post.1"])
    reference = Pairs.of(model, clean=CLEAN[::-1], patch=["abcde", "qrstu", "zyxwv", "aaaaa"], answers=ANSWERS)
    found = circuits.faithfulness(model, saes, _circuit("gpt2", saes, 5), pairs, DIFFERENCE, reference=reference)
    assert reference.patch is not None
    mean = model.capture(reference.patch, ["resid_post.1"])["resid_post.1"].mean(0)
    slow = oracle_of("gpt2", saes, pairs)
    assert close(found.empty, slow.run([("resid_post.1", lambda x: mean.expand_as(x))]))


def test_layers_that_are_free_are_left_alone_and_later_sites_read_what_is_ablated_before() -> None:
    model, pairs, saes = exact_model(), pairs_of(), mixed_saes(SITES, shift=1)
    above = {site: sae for site, sae in saes.items() if site.endswith(".1")}
    nothing = _circuit("gpt2", saes, 0)
    free = circuits.faithfulness(model, saes, nothing, pairs, DIFFERENCE, free_layers=1)
    assert torch.equal(
        free.empty, circuits.faithfulness(model, above, _circuit("gpt2", above, 0), pairs, DIFFERENCE).empty
    )
    # A metric at the site of a basis reads it after the edit.
    metric = circuits.of_site("resid_post.1", lambda x, _: x[:, -1, 0])
    sae = {"resid_post.1": saes["resid_post.1"]}
    whole = circuits.node_effects(model, sae, pairs, metric).circuit(n=0)
    assert pairs.patch is not None
    x = model.capture(pairs.patch, ["resid_post.1"])["resid_post.1"]
    out = circuits.faithfulness(model, sae, whole, pairs, metric)
    assert close(out.empty, x.mean(0)[-1, 0].expand(4))


def test_arguments_are_left_as_they_are() -> None:
    model, pairs, saes = exact_model(), pairs_of(), mixed_saes(SITES, shift=3)
    circuit = _circuit("gpt2", saes, 15)
    before = [(site.pos.clone(), site.feature.clone()) for site in circuit.sites.values()]
    weights = {site: sae.W_dec.clone() for site, sae in saes.items()}
    runs = [
        circuits.faithfulness(model, saes, circuit, pairs, DIFFERENCE, ablation="resample", seed=3).kept
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    for (pos, feature), site in zip(before, circuit.sites.values(), strict=True):
        assert torch.equal(pos, site.pos) and torch.equal(feature, site.feature)
    assert all(torch.equal(sae.W_dec, weights[site]) for site, sae in saes.items())


def test_k_features_are_a_patch_of_k_neurons() -> None:
    # Zeroing a set of features and keeping the rest is x - relu(x W + c)[S] V[S]; it needs no other part of the SAE.
    model, pairs, some = exact_model(), pairs_of(), [3, 8, 21]
    sae, plain = exact_sae("jumprelu"), exact_sae("standard")
    for one, site in ((sae, "resid_post.1"), (plain, "attn_out.1")):
        part = part_of(one, site)
        slow = Oracle(model, [part], pairs.clean, pairs.patch, difference(pairs.answers), pairs.clean.mask)
        circuit = dataclasses.replace(_circuit("gpt2", {site: one}), sites={site: SiteNodes.of(40, some)})

        def patched(x: Tensor, one: Any = one) -> Tensor:
            pre = (x - one.b_dec) @ one.W_enc[:, some] + one.b_enc[some]
            acts = pre.relu() * (pre > one.threshold[some]) if hasattr(one, "threshold") else pre.relu()
            return x - acts @ one.W_dec[some]

        found = circuits.faithfulness(model, {site: one}, circuit, pairs, DIFFERENCE, ablation="zero", complement=True)
        assert close(found.kept, slow.run([(site, patched)]), 1e-12)


def test_wrong_input_is_answered_in_words() -> None:
    model, pairs, saes = exact_model(), pairs_of(), mixed_saes(["resid_post.1"])
    circuit = _circuit("gpt2", saes, 3)
    other = {"resid_post.1": exact_sae("standard", seed=9)}
    short = Pairs.of(model, clean=["aX"], patch=["aY"], answers=[("p", "q")])
    mixed = Pairs.of(model, clean=["ab", "abc"], patch=["ax", "axc"], answers=[("p", "q")] * 2)
    constant = circuits.of_site("resid_post.2", lambda x, _: x.sum((1, 2)) * 0 + 1)

    def run(bases: Any = saes, some: Any = pairs, metric: Any = DIFFERENCE, **options: Any) -> None:
        circuits.faithfulness(model, bases, circuit, some, metric, **options)

    for call, error, words in (
        (lambda: run(other), MismatchError, "the circuit was made with bases at resid_post.1"),
        (lambda: run(some=short), MismatchError, "prompts with 5 tokens, and these have 2"),
        (lambda: run(some=mixed), InvalidInputError, "the pairs have 2 to 3 tokens"),
        (lambda: run(reference=short), InvalidInputError, "have 5 tokens and the reference 2"),
        (lambda: run(ablation="noise"), InvalidInputError, "ablation"),
        (lambda: run(errors="some"), InvalidInputError, "errors"),
        (lambda: run(batch_size=0), InvalidInputError, "batch_size=0"),
        (lambda: run(free_layers=-1), InvalidInputError, "free_layers=-1"),
        (lambda: run(free_layers=3), DegenerateInputError, "more sites"),
        (lambda: run(metric=constant), DegenerateInputError, "there is nothing to explain"),
    ):
        with as_user(), pytest.raises(error, match=words):
            call()
