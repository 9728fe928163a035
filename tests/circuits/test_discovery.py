"""Clusters of samples: what their vectors are, how they are compared, and which clusters are real."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import circuits
import circuits.discovery.vectors
from circuits.discovery.agreement import adjusted_rand, shuffled, stability
from circuits.discovery.clusters import vectors_key
from circuits.discovery.grouping import (
    METHODS,
    Grouping,
    angular,
    neighbour_graph,
    similarities,
    spherical_kmeans,
    units,
)
from circuits.discovery.sketch import GradientSketch, _Hash, linear_maps
from circuits.discovery.splitting import split_clusters, two_groups
from circuits.discovery.vectors import KINDS, SampleVectors, sample_vectors
from tests.circuits.planted_mechanisms import SITES, mechanism_model, mechanism_samples
from tests.circuits.toys import exact_model, exact_sae, pairs_of
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, MissingFileError
from workbench.engine.keeper import Keeper

FEW = circuits.VectorOptions(batch_size=16)


def _bases() -> dict[str, object]:
    return dict(circuits.neurons(mechanism_model(), SITES))


def _blocks(per_group: int, groups: int, columns: int, noise: float, seed: int = 0, common: float = 0.0) -> csr_matrix:
    """Groups of rows, each with columns of its own, noise everywhere, and `common` columns that all of them use."""
    rng = np.random.default_rng(seed)
    x = noise * rng.standard_normal((per_group * groups, columns)) * (rng.random((per_group * groups, columns)) < 0.3)
    own = columns // groups
    for g in range(groups):
        rows = slice(g * per_group, (g + 1) * per_group)
        x[rows, g * own : (g + 1) * own] += rng.gamma(4.0, 0.25, (per_group, own)) * (1 + rng.random(own))
    x[:, : int(common * columns)] += 2.0
    return csr_matrix(x)


@pytest.fixture(scope="module")
def effects() -> SampleVectors:
    return sample_vectors(mechanism_model(), mechanism_samples()[0], _bases(), options=FEW)


@pytest.mark.parametrize("method", METHODS)
def test_effects_tell_mechanisms_apart_that_lead_to_the_same_answers(method: str, effects: SampleVectors) -> None:
    samples, truth = mechanism_samples()
    options = circuits.DiscoveryOptions(vectors=FEW, resamples=0, split=False)
    found = circuits.find_behaviours(mechanism_model(), samples, _bases(), cluster=method, k=3, options=options)
    assert adjusted_rand(found.labels, truth) > 0.95
    assert adjusted_rand(samples.answers.numpy(), truth) < 0.1, "answers alone don't tell"
    assert (found.vectors.matrix != effects.matrix).nnz == 0


def test_other_vectors_see_the_noise_that_has_no_effect() -> None:
    samples, truth = mechanism_samples()
    found = circuits.find_behaviours(
        mechanism_model(), samples, _bases(), vectors="activations", k=3,
        options=circuits.DiscoveryOptions(vectors=FEW, resamples=0),
    )  # fmt: skip
    assert adjusted_rand(found.labels, truth) < 0.8


def test_effects_are_those_of_attribution_patching_in_the_order_of_the_samples() -> None:
    model, pairs = exact_model(), pairs_of(patched=False)
    bases = {"attn_out.0": exact_sae("topk"), "resid_post.1": exact_sae("gated", "layer_norm")}
    n = len(pairs)
    nothing = torch.zeros(n, dtype=torch.long)
    order = [2, 0, 3, 1]
    samples = circuits.Samples(
        contexts=pairs.clean, answers=pairs.answers[:, 0], losses=torch.zeros(n), documents=nothing, positions=nothing,
        n_tokens=n, n_documents=1, dropped={},
    ).chosen(order)  # fmt: skip
    found = sample_vectors(model, samples, bases, options=circuits.VectorOptions(batch_size=3)).matrix.toarray()
    wanted = circuits.node_effects(
        model, bases, pairs, circuits.log_probability(), method="atp", baseline="zero_keep_error", measured=False
    )
    start = 0
    for site, effect in wanted.sites.items():
        dense = np.zeros((n, effect.d_sae))
        dense[effect.example, effect.feature] = effect.value
        assert np.abs(dense).max() > 1e-3
        np.testing.assert_allclose(found[:, start : start + effect.d_sae], dense[order], atol=1e-7)
        assert sample_vectors(model, samples, bases).feature(start + 1) == (site, 1)
        start += effect.d_sae


def test_activations_and_dense_vectors_are_what_the_model_holds() -> None:
    model, (samples, _) = mechanism_model(), mechanism_samples()
    some = samples.chosen([3, 17, 5])
    got = sample_vectors(model, some, _bases(), kind="activations", options=FEW).matrix.toarray()
    dense = sample_vectors(model, samples, kind="dense", sites=SITES, options=FEW).matrix.toarray()
    lasts = []
    for i, row in enumerate(some.contexts.rows()):
        acts = model.capture(row[None], list(SITES))
        wanted = torch.cat([acts[site][0, 1:].sum(0) for site in SITES])
        np.testing.assert_allclose(got[i], wanted, atol=1e-4)
    for row in samples.contexts.rows():
        lasts.append(torch.cat([model.capture(row[None], list(SITES))[site][0, -1] for site in SITES]).numpy())
    centred = np.stack(lasts) - np.mean(lasts, 0)
    for half in (slice(0, 16), slice(16, 32)):
        wanted = centred[:, half] / np.sqrt((centred[:, half] ** 2).sum(1).mean())
        np.testing.assert_allclose(dense[:, half], wanted, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sketch_keeps_the_angles_of_gradients(family: str) -> None:
    model, pairs = exact_model(family), pairs_of(family, patched=False)
    weights = [module.weight for module, _ in linear_maps(model).values()]
    assert len(weights) == sum(p.ndim == 2 for n, p in model.hf.named_parameters() if "emb" not in n and "wte" not in n
                               and "wpe" not in n and "lm_head" not in n)  # fmt: skip
    gradients = []
    for i in range(len(pairs)):
        for weight in weights:
            weight.requires_grad_(True)
        logits = model.hf(input_ids=pairs.clean.rows()[i][None]).logits[0, -1].log_softmax(-1)
        found = torch.autograd.grad(-logits[pairs.answers[i, 0]], weights)
        gradients.append(torch.cat([g.flatten() for g in found]))
        for weight in weights:
            weight.requires_grad_(False)
    wanted = torch.corrcoef(torch.zeros(2, 2)) if not gradients else _cosines(torch.stack(gradients))
    width, errors = 1024, []
    for seed in range(6):
        sketches = GradientSketch(model, width, seed).of(pairs)
        assert sketches.shape == (len(pairs), width)
        errors.append((_cosines(sketches.double()) - wanted)[~torch.eye(len(pairs), dtype=torch.bool)])
        norms = sketches.double().norm(dim=1) / torch.stack(gradients).norm(dim=1)
        assert float((norms - 1).abs().max()) < 5 / width**0.5
    assert float((torch.cat(errors) ** 2).mean().sqrt()) < 1.5 / width**0.5
    assert float(wanted.min()) < 0.9, "the angles differ"


def test_a_hash_keeps_right_angles_of_vectors_whose_entries_have_one_sign() -> None:
    x = torch.zeros(2, 1, 2000)
    x[0, 0, :1000], x[1, 0, 1000:] = 1.0, 1.0
    cosines = [_cosines(_Hash.drawn(2000, 256, torch.Generator().manual_seed(s))(x)[:, 0])[0, 1] for s in range(20)]
    assert float((torch.stack(cosines) ** 2).mean().sqrt()) < 2 / 256**0.5


def _cosines(x: torch.Tensor) -> torch.Tensor:
    unit = x / x.norm(dim=1, keepdim=True)
    return unit @ unit.T


def test_the_strongest_entries_are_kept_and_memory_does_not_grow_with_the_dictionary(
    effects: SampleVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (samples, _) = mechanism_model(), mechanism_samples()
    some = samples.chosen(range(12))
    few = sample_vectors(model, some, _bases(), options=circuits.VectorOptions(per_sample=5))
    whole = effects.matrix[:12].toarray()
    for row, all_of_them in zip(few.matrix.toarray(), whole, strict=True):
        strong = np.sort(np.argsort(-np.abs(all_of_them))[:5])
        assert np.flatnonzero(row).tolist() == strong.tolist()
        np.testing.assert_allclose(row[strong], all_of_them[strong], atol=1e-6)
    assert few.kept == pytest.approx((few.matrix.toarray() ** 2).sum() / (whole**2).sum()) and few.kept < 1
    limit, entries = 4096, []
    monkeypatch.setattr(circuits.discovery.vectors, "CHUNK_ENTRIES", limit)
    for d_sae in (64, 1024):
        bases = circuits.random(model, ["resid_post.1"], d_sae=d_sae, k=4)
        sizes: list[int] = []
        basis = next(iter(bases.values()))
        encode = type(basis).encode
        monkeypatch.setattr(type(basis), "encode", lambda self, x, own=encode, sizes=sizes: _noted(own(self, x), sizes))
        vectors = sample_vectors(model, some, bases, options=circuits.VectorOptions(per_sample=20))
        monkeypatch.setattr(type(basis), "encode", encode)
        assert sizes and max(sizes) <= limit
        entries.append(vectors.matrix.nnz)
    assert max(entries) <= 12 * 20, "whatever the number of features"


def _noted(acts: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    sizes.append(acts.numel())
    return acts


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_continues_to_the_same_bits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (samples, _) = mechanism_model(), mechanism_samples()
    options = circuits.VectorOptions(batch_size=20, sketch=64)
    given = {"kind": kind, "options": options}
    whole = sample_vectors(model, samples, _bases(), **given)
    maker, calls = circuits.discovery.vectors._Maker, []
    entries = maker.entries

    def stopping(self: object, *args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return entries(self, *args)

    monkeypatch.setattr(maker, "entries", stopping)
    key = vectors_key(model, samples, _bases(), kind, (), options)
    with Keeper.open(tmp_path, key) as keep, pytest.raises(KeyboardInterrupt):
        sample_vectors(model, samples, _bases(), keep=keep, **given)
    with Keeper.open(tmp_path, key) as keep:
        again = sample_vectors(model, samples, _bases(), keep=keep, **given)
    assert len(calls) == 4, "two parts were kept, the third was made again"
    for name in ("data", "indices", "indptr"):
        assert getattr(again.matrix, name).tobytes() == getattr(whole.matrix, name).tobytes()
    assert again.kept == whole.kept
    with pytest.raises(MismatchError):
        circuits.find_behaviours(
            model, samples.chosen(range(9)), _bases(), vectors=kind, folder=tmp_path,
            options=circuits.DiscoveryOptions(vectors=options),
        )  # fmt: skip


def test_similarity_is_an_angle_and_neighbours_are_the_nearest() -> None:
    x = csr_matrix(np.random.default_rng(0).standard_normal((700, 5)) * (np.arange(700)[:, None] != 3))
    unit = units(x)
    dense = np.concatenate([block for _, block in similarities(unit)])
    assert ((dense >= 0) & (dense <= 1)).all() and (np.diag(dense) == 1).all()
    rows = x.toarray()
    a, b = rows[1], rows[600]
    angle = np.arctan2(np.linalg.norm(np.outer(a, b) - np.outer(b, a)) / 2**0.5, a @ b)
    assert dense[1, 600] == pytest.approx(1 - angle / np.pi, abs=1e-9) and dense[1, 600] == dense[600, 1]
    assert (dense[3, :3] == 0.5).all(), "a zero row is at right angles to all"
    graph = neighbour_graph(unit, 6).toarray()
    np.fill_diagonal(dense, -1)
    wanted = np.zeros_like(dense)
    for i, row in enumerate(dense):
        near = np.argsort(-row)[:6]
        wanted[i, near] = row[near]
    others = np.arange(700) != 3  # all are as far from a zero row
    np.testing.assert_allclose(
        graph[np.ix_(others, others)], np.maximum(wanted, wanted.T)[np.ix_(others, others)], atol=1e-12
    )
    assert angular(np.array([2.0, -2.0])).tolist() == [1.0, 0.0], "rounding errors"


def test_clusters_come_largest_first_and_their_number_is_chosen_by_how_many_count() -> None:
    x = _blocks(10, 6, 60, 0.3)
    grouping = Grouping(method="kmeans", k=None, neighbours=8, min_size=6, seed=0)
    labels = grouping.labels(x)
    sizes = np.bincount(labels)
    assert (np.diff(sizes) <= 0).all() and (sizes >= 6).sum() >= 5
    assert len(set(spherical_kmeans(units(x), 60, 0))) == 60, "no cluster is empty"
    same = csr_matrix(np.ones((9, 3)))
    assert len(spherical_kmeans(units(same), 4, 0)) == 9
    for method in METHODS:
        assert len(dataclasses.replace(grouping, method=method, k=2).labels(same)) == 9
    with pytest.raises(InvalidInputError, match="k=10: 9 samples make 1 to 9 clusters"):
        dataclasses.replace(grouping, k=10).labels(same)


def test_a_mixed_cluster_is_split_and_a_pure_one_is_not() -> None:
    mixed, pure = _blocks(20, 2, 300, 0.5, seed=1), _blocks(40, 1, 300, 0.5, seed=2)
    result = two_groups(mixed, 4)
    assert result is not None and result[0].is_split
    assert adjusted_rand(result[1], np.repeat([0, 1], 20)) == 1.0
    split = result[0]
    assert split.sizes == (20, 20) and split.shared < 0.3 < 0.7 < split.by_chance and split.p == pytest.approx(1 / 200)
    alone = [two_groups(_blocks(40, 1, 300, 0.5, seed=s), 4, seed=s) for s in range(20)]
    assert sum(r is not None and r[0].is_split for r in alone) <= 1
    # members that each use some nodes of their own: two groups always differ in the nodes that they were made by
    rng = np.random.default_rng(0)
    private = csr_matrix((rng.random((40, 30)) < 0.08) * (1 + rng.random((40, 30))))
    found = [two_groups(private, 4, seed=s) for s in range(10)]
    assert sum(r is not None for r in found) >= 5 and not any(r is not None and r[0].is_split for r in found)
    # two groups that differ in how strongly they use the same nodes are one mechanism
    scaled = csr_matrix(pure.toarray() * np.where(np.arange(40) < 20, 1, 5)[:, None])
    result = two_groups(scaled, 4)
    assert result is None or not result[0].is_split
    assert two_groups(mixed[:7], 4) is None, "too few for two groups"
    three = _blocks(15, 3, 300, 0.5, seed=3)
    labels, splits = split_clusters(three, np.zeros(45, dtype=np.int64), 4)
    assert adjusted_rand(labels, np.repeat([0, 1, 2], 15)) == 1.0
    assert splits.split == 2 and splits.null_split == 0 and splits.null_tested >= 2


def test_planted_clusters_are_stable_and_structureless_vectors_are_as_stable_as_their_null() -> None:
    grouping = Grouping(method="kmeans", k=4, neighbours=8, min_size=4, seed=0)
    documents = (np.arange(80) // 2).tolist()
    x = _blocks(20, 4, 40, 0.5)
    found = stability(x, grouping.labels(x), documents, grouping.labels, resamples=4)
    assert found.ari.value > 0.95 and found.null.value < 0.5 < found.ari.value - found.null.value
    assert (found.jaccard > 0.95).all() and (found.jaccard_null < 0.5).all()
    nothing = csr_matrix(np.random.default_rng(0).standard_normal((80, 40)))
    other = stability(nothing, grouping.labels(nothing), documents, grouping.labels, resamples=6)
    assert abs(other.ari.value - other.null.value) < 0.2


def test_shuffling_keeps_how_common_each_entry_is_and_nothing_else() -> None:
    x = _blocks(20, 2, 30, 0.5)
    y = shuffled(x, 0)
    assert (np.sort(x.toarray(), 0) == np.sort(y.toarray(), 0)).all() and (x != y).nnz > 0
    assert abs(np.corrcoef(y.toarray()[:, 0], y.toarray()[:, 1])[0, 1]) < 0.5 < np.corrcoef(x.toarray().T)[0, 1]


def test_what_a_cluster_is_called_and_who_is_in_it(effects: SampleVectors) -> None:
    samples, truth = mechanism_samples()
    options = circuits.DiscoveryOptions(vectors=FEW, resamples=2, split=True)
    found = circuits.find_behaviours(mechanism_model(), samples, _bases(), k=3, cluster="kmeans", options=options)
    frame = found.frame()
    assert frame["n"].tolist() == [20, 20, 20] and found.clusters == [0, 1, 2]
    x = units(effects.matrix).toarray()
    for c in found.clusters:
        members = found.members(c)
        near = x[members] @ x[members].sum(0)
        assert (np.diff(near) <= 1e-6).all() and len(set(truth[members])) == 1
        cosines = x[members] @ x[members].T
        assert found.coherence(c) == pytest.approx(cosines[~np.eye(20, dtype=bool)].mean())
        answer, n = found.answers(c)[0]
        row = frame.iloc[c]
        assert row["answer"] == answer in "pq" and row["share"] == n / 20 >= 0.5
        assert row["documents"] == len({int(samples.documents[i]) for i in members})
        assert row["context"] == found.text(samples.contexts.rows()[members[0]].tolist())
        assert found.cluster(c).answers.tolist() == samples.answers[members].tolist()
    assert found.stability is not None and found.splits is not None


def test_wrong_input_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (samples, _) = mechanism_model(), mechanism_samples()
    with pytest.raises(InvalidInputError, match=r"Give bases="):
        circuits.find_behaviours(model, samples)
    with pytest.raises(InvalidInputError, match="effects, activations, dense, gradients"):
        circuits.find_behaviours(model, samples, vectors="meaning")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="spectral, kmeans, leiden"):
        circuits.find_behaviours(model, samples, cluster="dbscan")  # type: ignore[arg-type]
    with pytest.raises(DegenerateInputError, match="3 samples make no clusters"):
        circuits.find_behaviours(model, samples.chosen([0, 1, 2]), vectors="dense")
    with pytest.raises(InvalidInputError, match="there are clusters 0 to"):
        circuits.find_behaviours(
            model, samples.chosen(range(8)), vectors="dense", k=2, options=circuits.DiscoveryOptions(resamples=0)
        ).members(7)
    monkeypatch.setitem(sys.modules, "leidenalg", None)
    with pytest.raises(MissingFileError, match=r"pip install interp-workbench\[search\]"):
        circuits.find_behaviours(model, samples, _bases(), cluster="leiden")
