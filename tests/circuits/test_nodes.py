from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuits
import workbench as wb
from circuits.graph.circuit import ERROR
from circuits.nodes.effects import NodeEffects, aggregated
from circuits.pairs import Pairs
from tests.circuits.oracle import Oracle, points_of
from tests.circuits.toys import (
    ANSWERS,
    CLEAN,
    EXACT,
    PATCH,
    all_sites,
    close,
    dense,
    difference,
    exact_model,
    exact_sae,
    mixed_saes,
    oracle_of,
    other_bases,
    pairs_of,
)
from tests.interventions.builders import padded
from tests.tiny import D_MODEL, as_user, tiny_hf, tiny_tokenizer
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ShapeError,
    UnknownSiteError,
)
from workbench.models.model import Model

DIFFERENCE = circuits.logit_difference()


def _effects(family: str, bases: Any, pairs: Any = None, metric: Any = DIFFERENCE, **options: Any) -> NodeEffects:
    options = {"aggregation": "none", "measured": False, **options}
    return circuits.node_effects(exact_model(family), bases, pairs or pairs_of(family), metric, **options)


def _products(nodes: tuple[Tensor, Tensor], changes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient times change: per feature, and summed for the vector of the rest."""
    return nodes[0] * changes[0], (nodes[1] * changes[1]).sum(-1)


# Effects, against the procedure with spliced dictionaries.


@pytest.mark.parametrize(
    ("baseline", "rule", "steps"),
    [
        ("patch", "left", 3),
        ("patch", "gauss", 3),
        ("zero", "trapezoid", 2),
        pytest.param("zero_keep_error", "right", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", EXACT)
def test_effects_of_every_node_are_those_of_spliced_saes(family: str, baseline: str, rule: str, steps: int) -> None:
    # Fifteen kinds of SAE over the sites of both families: five architectures, three normalisations, biases not zero.
    pairs, saes = pairs_of(family), mixed_saes(all_sites(family), shift=EXACT.index(family) * 5)
    keep = pairs.clean.mask
    slow, shape = oracle_of(family, saes, pairs), (len(keep), keep.shape[1])
    integrated = _effects(family, saes, baseline=baseline, rule=rule, steps=steps, keep=keep)
    patched = _effects(family, saes, baseline=baseline, method="atp", keep=keep)
    changes, gradients = slow.changes(baseline), slow.gradients()
    for site in saes:
        at = slow.integrated(site, points_of(rule, steps), baseline)
        for found, slopes in ((integrated, at), (patched, gradients[site])):
            features, errors = dense(found[site], shape)
            wanted, wanted_errors = _products(slopes, changes[site])
            assert close(features, wanted), site
            assert close(errors, wanted_errors) if baseline != "zero_keep_error" else not bool(errors.any())


@pytest.mark.parametrize("baseline", ["patch", "zero"])
def test_transcoders_hidden_neurons_heads_and_neurons_have_the_effects_of_spliced_ones(baseline: str) -> None:
    pairs, (bases, parts) = pairs_of(), other_bases()
    slow = Oracle(exact_model(), parts, pairs.clean, pairs.patch, difference(pairs.answers), pairs.clean.mask)
    found = _effects("gpt2", bases, baseline=baseline, steps=2, keep=pairs.clean.mask)
    changes = slow.changes(baseline)
    assert list(found) == [part.site for part in parts]
    for part in parts:
        features, errors = dense(found[part.site], tuple(pairs.clean.ids.shape))  # type: ignore[arg-type]
        at = slow.integrated(part.site, points_of("midpoint", 2), baseline)
        wanted, wanted_errors = _products(at, changes[part.site])
        assert close(features, wanted), part.site
        assert float((errors - wanted_errors).abs().max()) < 1e-12
    assert float(dense(found["mlp_out.1"], (4, 5))[1].abs().max()) > 1e-3, "a transcoder has an error"


def test_the_oracle_needs_its_pass_through_and_its_stop() -> None:
    slow = oracle_of("gpt2", mixed_saes(all_sites()), pairs_of())
    right, cut, leaking = (slow.gradients(how) for how in ("pass through", "no pass through", "no stop"))
    assert not close(cut["resid_post.0"][0], right["resid_post.0"][0], 0.1)
    assert close(cut["resid_post.2"][0], right["resid_post.2"][0]), "nothing is above the last site"
    assert float(right["resid_post.1"][0].abs().max()) > 0.1
    assert all(float(f.abs().max()) < 1e-12 for f, _ in leaking.values())


def test_the_gradient_of_a_feature_is_the_change_of_the_metric_along_its_row() -> None:
    pairs, saes, h = pairs_of(), {"resid_post.1": exact_sae("gated", "layer_norm")}, 1e-5
    slow = oracle_of("gpt2", saes, pairs)
    part, (f, rest), (df, _) = (
        slow.parts["resid_post.1"],
        slow.state()["resid_post.1"],
        slow.changes("patch")["resid_post.1"],
    )
    found, _ = dense(_effects("gpt2", saes, method="atp")["resid_post.1"], (4, 5))
    strongest = found.abs().amax(0).flatten().argsort(descending=True)[:6]
    for pos, i in (divmod(int(at), found.shape[2]) for at in strongest):
        step = torch.zeros_like(f)
        step[:, pos, i] = h
        up, down = (slow.run([("resid_post.1", lambda _x, f=f + s: f @ part.rows + rest)]) for s in (step, -step))
        assert close((up - down) / (2 * h) * df[:, pos, i], found[:, pos, i], 1e-6)


def test_exact_effects_are_those_of_patching_each_node_alone() -> None:
    pairs, saes = (
        pairs_of(),
        {"attn_out.1": exact_sae("jumprelu", "constant_norm_rescale"), "mlp_out.1": exact_sae("topk")},
    )
    found, slow = _effects("gpt2", saes, method="exact"), oracle_of("gpt2", saes, pairs)
    base, shape = slow.run(), (4, 5)
    for site, part in slow.parts.items():
        (f, rest), (df, drest) = slow.state()[site], slow.changes("patch")[site]
        features, errors = dense(found[site], shape)
        for pos, i in [(2, int(features[:, 2].abs().sum(0).argmax())), (4, int(features[:, 4].abs().sum(0).argmax()))]:
            there = f.clone()
            there[:, pos, i] += df[:, pos, i]
            moved = slow.run([(site, lambda _x, there=there, p=part, rest=rest: there @ p.rows + rest)])
            assert close(features[:, pos, i], moved - base)
            wrong = rest.clone()
            wrong[:, pos] += drest[:, pos]
            moved = slow.run([(site, lambda _x, f=f, p=part, wrong=wrong: f @ p.rows + wrong)])
            assert close(errors[:, pos], moved - base)
    # The slow reference, over all positions or at each of them, agrees.
    chosen = found.circuit(n=6)
    again = circuits.exact_effects(exact_model(), saes, pairs, DIFFERENCE, chosen)
    known = {(s, p, f): e for s, p, f, e in found.frame()[["site", "pos", "feature", "effect"]].itertuples(index=False)}
    rows = again.frame()[["site", "pos", "feature", "effect"]].itertuples(index=False)
    assert {(s, p, f): pytest.approx(e, rel=1e-9) for s, p, f, e in rows} == {
        key: value for key, value in known.items() if key in {(s, p, "error" if f == ERROR else f) for s, p, f in chosen.nodes()}
    }  # fmt: skip


# Closed forms.


def _quadratic(site: str) -> tuple[Any, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((D_MODEL, D_MODEL), (D_MODEL,)))
    a = a + a.T
    metric = circuits.of_site(site, lambda x, _: (0.5 * torch.einsum("rpi,ij,rpj->rp", x, a, x) + x @ b).sum(1))
    return metric, a, b


@pytest.mark.parametrize(
    ("rule", "share"), [("left", None), ("right", None), ("midpoint", 0.5), ("trapezoid", 0.5), ("gauss", 0.5)]
)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_every_rule_on_a_quadratic_metric_is_its_closed_form(rule: str, share: float | None, steps: int) -> None:
    # The gradient at x + aD is b + A(x + aD); the mean of a is (N - 1)/2N on the left, (N + 1)/2N on the right.
    site, saes, pairs = "resid_post.1", {"resid_post.1": exact_sae("topk", "constant_norm_rescale")}, pairs_of()
    metric, a, b = _quadratic(site)
    mean = {"left": (steps - 1) / (2 * steps), "right": (steps + 1) / (2 * steps)}.get(rule, share)
    assert mean is not None
    slow = oracle_of("gpt2", saes, pairs)
    (f, rest), (df, drest) = slow.state()[site], slow.changes("patch")[site]
    rows = slow.parts[site].rows
    x, change = f @ rows + rest, df @ rows + drest
    slope = b + (x + mean * change) @ a
    found = _effects("gpt2", saes, pairs, metric, rule=rule, steps=steps, measured=True)[site]
    features, errors = dense(found, (4, 5))
    assert close(features, df * (slope @ rows.T)) and close(errors, (drest * slope).sum(-1))
    curved = torch.einsum("rpi,ij,rpj->r", change, a, change)
    assert close(found.added - found.total, (mean - 0.5) * curved) if mean != 0.5 else found.gap < 1e-12


def test_on_a_linear_metric_every_method_gives_the_effect_of_patching() -> None:
    site, saes, pairs = "mlp_out.2", {"mlp_out.2": exact_sae("gated", "constant_norm_rescale")}, pairs_of()
    w = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = circuits.of_site("resid_post.2", lambda x, _: (x @ w).sum(1))
    df, drest = oracle_of("gpt2", saes, pairs).changes("patch")[site]
    wanted = df * (oracle_of("gpt2", saes, pairs).parts[site].rows @ w), drest @ w
    for options in (
        {"method": "atp"}, {"rule": "left", "steps": 1}, {"rule": "right", "steps": 3}, {"rule": "gauss", "steps": 2},
        {"method": "exact"},
    ):  # fmt: skip
        found = _effects("gpt2", saes, pairs, metric, measured=True, **options)[site]
        assert all(close(mine, right) for mine, right in zip(dense(found, (4, 5)), wanted, strict=True))
        assert found.gap < 1e-12


def test_gaps_close_with_the_order_of_the_rule_and_errors_are_part_of_the_sum() -> None:
    saes = mixed_saes(["resid_post.0"])

    def miss(rule: str, steps: int) -> float:
        found = _effects("gpt2", saes, rule=rule, steps=steps, measured=True)["resid_post.0"]
        return float((found.added - found.total).mean())

    for rule, order in (("left", 2.0), ("right", 2.0), ("midpoint", 4.0), ("trapezoid", 4.0)):
        assert miss(rule, 32) / miss(rule, 64) == pytest.approx(order, rel=0.05), rule
    assert abs(miss("gauss", 40)) < 1e-9
    found = _effects("gpt2", saes, rule="gauss", steps=40, measured=True)["resid_post.0"]
    features, _ = dense(found, (4, 5))
    assert float((features.sum((1, 2)) - found.total).abs().min()) > 0.01, "without the errors the sum is wrong"


def test_a_linear_network_that_nothing_bends_is_exact_in_one_step() -> None:
    # The last site of the stream, read by its own neurons: the metric is the sum of a coordinate.
    metric = circuits.of_site("resid_post.2", lambda x, _: x[:, -1, 3])
    found = _effects(
        "gpt2", circuits.neurons(exact_model(), ["resid_post.2"]), None, metric, method="atp", measured=True
    )
    site = found["resid_post.2"]
    assert set(site.feature[site.value != 0].tolist()) == {3} and site.gap < 1e-12
    assert float(dense(site, (4, 5))[1].abs().max()) < 1e-12, "neurons leave no error"


# What effects must not depend on.


@pytest.mark.parametrize("method", ["ig", "exact"])
def test_what_comes_before_the_first_difference_has_no_effect(method: str) -> None:
    saes = {"embed": exact_sae("standard"), "resid_post.1": exact_sae("standard")}
    found = _effects("gpt2", saes, method=method, steps=2)
    first = {0: 2, 1: 2, 2: 1, 3: 2}
    for site in found.values():
        assert {e: int(site.pos[site.example == e].min()) for e in range(4)} == first
    # With every token kept, clean and patched states are equal there, so the answer is the same.
    again = _effects("gpt2", saes, method=method, steps=2, keep=pairs_of().clean.mask)
    assert all(torch.equal(a.value, again[name].value) for name, a in found.items())


def test_inactive_features_are_not_listed_and_only_they_are_not() -> None:
    saes = {"resid_post.1": exact_sae("jumprelu")}
    found = _effects("gpt2", saes, steps=1)["resid_post.1"]
    df, _ = oracle_of("gpt2", saes, pairs_of()).changes("patch")["resid_post.1"]
    listed = {tuple(x) for x in torch.stack([found.example, found.pos, found.feature], 1).tolist() if x[2] != ERROR}
    assert listed == {tuple(x) for x in df.nonzero().tolist()} and 0 < len(listed) < df[:, 2:].numel() / 2


def test_the_length_of_decoder_rows_does_not_matter() -> None:
    sae, scaled = exact_sae("standard"), exact_sae.__wrapped__("standard")
    c = torch.rand(len(sae.W_dec), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    with torch.no_grad():
        scaled.W_dec.mul_(c[:, None])
        scaled.W_enc.div_(c)
        scaled.b_enc.div_(c)
    one, two = (dense(_effects("gpt2", {"mlp_out.1": s}, steps=2)["mlp_out.1"], (4, 5)) for s in (sae, scaled))
    assert all(close(b, a) for a, b in zip(one, two, strict=True))


CASES = [("ab", "aX", "p", "q"), ("kbYdd", "kbZed", "r", "s"), ("ecXafgh", "ecWahgh", "q", "t")]


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "ig"), ("neox", "atp"), pytest.param("neox", "exact", marks=pytest.mark.slow)]
)
def test_scores_depend_on_neither_batch_mates_nor_batch_size_nor_padding(family: str, method: str) -> None:
    model, saes = exact_model(family), mixed_saes(["attn_out.1", "mlp_out.2"], shift=3)
    clean, patch = ([case[i] for case in CASES] for i in (0, 1))
    pairs = Pairs.of(model, clean=clean, patch=patch, answers=[case[2:] for case in CASES])

    def run(some: Pairs, size: int = 64) -> list[dict[tuple[str, int, int], float]]:
        """Per row, the effect of each node by its distance from the end."""
        found = _effects(family, saes, some, aggregation="sum", method=method, steps=2, batch_size=size)
        out: list[dict[tuple[str, int, int], float]] = [{} for _ in range(len(some))]
        for name, site in found.items():
            for e, f, v in zip(site.example.tolist(), site.feature.tolist(), site.value.tolist(), strict=True):
                out[e][name, 0, f] = v
        return out

    together = run(pairs)
    alone = [run(Pairs.of(model, clean=[a], patch=[b], answers=[(c, d)]))[0] for a, b, c, d in CASES]
    turned = run(pairs[[2, 0, 1]])
    on_the_right = Pairs(
        padded([row.tolist() for row in pairs.clean.rows()], "right"),
        padded([row.tolist() for row in pairs.patch.rows()], "right"),  # type: ignore[union-attr]
        pairs.answers,
    )  # fmt: skip
    for other in (alone, run(pairs, 2), [turned[i] for i in (1, 2, 0)], run(on_the_right)):
        for mine, theirs in zip(together, other, strict=True):
            assert mine.keys() == theirs.keys() and mine == {k: pytest.approx(v, abs=1e-12) for k, v in theirs.items()}
    last = [
        _effects(family, saes, some, aggregation="last", method=method, steps=2)["mlp_out.2"]
        for some in (pairs, on_the_right)
    ]
    assert all(set(site.example.tolist()) == {0, 1, 2} for site in last), "the last token is that of the row"
    assert close(last[1].value, last[0].value)


def test_positions_are_put_together_by_hand() -> None:
    # Example 0 has feature 3 at positions 1 and 2 (2 and -5) and an error at 2; example 1 has feature 3 at 2 (1).
    entries = (
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([1, 2, 2, 2]),
        torch.tensor([3, 3, ERROR, 3]),
        torch.tensor([2.0, -5.0, 7.0, 1.0]),
    )
    for how, wanted in (
        ("sum", {(0, 3): -3.0, (0, ERROR): 7.0, (1, 3): 1.0}),
        ("max", {(0, 3): -5.0, (0, ERROR): 7.0, (1, 3): 1.0}),
        ("last", {(0, 3): -5.0, (0, ERROR): 7.0, (1, 3): 1.0}),
    ):  # fmt: skip
        example, pos, feature, value = aggregated(*entries, 8, how, torch.tensor([2, 2]))  # type: ignore[arg-type]
        assert dict(zip(zip(example.tolist(), feature.tolist(), strict=True), value.tolist(), strict=True)) == wanted
        assert set(pos.tolist()) == {-1}


def test_means_errors_and_sign_consistency_over_examples() -> None:
    found = _effects("gpt2", {"resid_post.1": exact_sae("standard")}, steps=2)
    features, _ = dense(found["resid_post.1"], (4, 5))
    rows: list[Any] = list(found["resid_post.1"].frame().query("feature != 'error'").itertuples())
    for row in rows:
        x = features[:, row.pos, row.feature]
        assert row.effect == pytest.approx(float(x.mean()), abs=1e-14) and row.n == 4
        assert row.se == pytest.approx(float(x.std()) / 2, rel=1e-6)
        same = (x * x.mean() > 0).sum() / (x != 0).sum()
        assert row.sign_consistency == pytest.approx(float(same))
    halves = [
        _effects("gpt2", {"resid_post.1": exact_sae("standard")}, pairs_of()[rows], steps=2)
        for rows in ([0, 1], [2, 3])
    ]
    joined = halves[0].merged(halves[1]).frame()
    assert joined.effect.tolist() == pytest.approx(found.frame().effect.tolist(), abs=1e-13)
    with pytest.raises(MismatchError, match="merged: metric is"):
        halves[0].merged(_effects("gpt2", {"resid_post.1": exact_sae("standard")}, metric=circuits.kl(), steps=2))


# Metrics.


def test_metrics_are_losses_of_the_clean_answer() -> None:
    model, pairs = exact_model(), pairs_of()
    logits = model.hf(pairs.clean.ids).logits[:, -1]
    patched = model.hf(pairs.patch.ids).logits[:, -1]  # type: ignore[union-attr]
    p, q = logits.log_softmax(-1), patched.log_softmax(-1)
    rows, (clean, patch) = torch.arange(4), pairs.answers.T
    last = circuits.neurons(model, ["resid_post.2"])
    for metric, wanted in (
        (DIFFERENCE, (patched - logits)[rows, patch] - (patched - logits)[rows, clean]),
        (circuits.log_probability(), p[rows, clean] - q[rows, clean]),
        (circuits.negative_logit(), (logits - patched)[rows, clean]),
        (circuits.kl(), (p.exp() * (p - q)).sum(-1)),
        (circuits.of_logits(lambda x, _: x[:, 7]), (patched - logits)[:, 7]),
    ):
        found = _effects("gpt2", last, pairs, metric, measured=True)["resid_post.2"]
        assert close(found.total, wanted, 1e-10), metric


# What is chosen and kept.


def test_circuits_take_the_largest_nodes_of_a_sign_and_come_back_from_disk(tmp_path: Path) -> None:
    effects = _effects("gpt2", mixed_saes(["embed", "mlp_out.1", "resid_post.1"]), steps=2)
    frame = effects.frame()

    def names(circuit: circuits.Circuit) -> set[tuple[str, int, Any]]:
        return {(site, pos, "error" if f == ERROR else f) for site, pos, f in circuit.nodes()}

    def of(rows: Any) -> set[tuple[str, int, Any]]:
        return set(rows[["site", "pos", "feature"]].itertuples(index=False, name=None))

    real, error = frame[frame.feature != "error"], frame[frame.feature == "error"]
    chosen = effects.circuit(n=12)
    assert names(chosen) == of(frame.head(12)) and (chosen.n, chosen.n_errors) == (
        12,
        int((frame.head(12).feature == "error").sum()),
    )
    assert names(effects.circuit(n=12, errors="none")) == of(real.head(12))
    assert names(effects.circuit(n=12, errors="all")) >= of(real.head(12)) | of(error)
    assert names(effects.circuit(n=5, sign="positive")) == of(frame[frame.effect > 0].head(5))
    assert names(effects.circuit(n=5, sign="negative")) == of(frame[frame.effect < 0].head(5))
    assert names(effects.circuit(threshold=0.1)) == of(frame[frame.effect.abs() > 0.1])
    assert effects.circuit(n=0).n == 0 and list(effects.circuit(n=0).sites) == list(effects)
    assert effects.circuit(threshold=0.0).n == 5 * 3 * 41, "everything, features that are never active too"
    labelled = (
        chosen.with_labels({"2, resid_post.1/error": "what is left"})
        if ("resid_post.1", 2, "error") in names(chosen)
        else chosen
    )
    for circuit in (labelled, effects.circuit(n=0), effects.circuit(threshold=0.0)):
        back = circuits.load_circuit(circuit.save(tmp_path / "c"))
        assert (back.bases, back.model_fingerprint, back.n_tokens, back.made, back.labels) == (
            circuit.bases, circuit.model_fingerprint, circuit.n_tokens, circuit.made, circuit.labels
        )  # fmt: skip
        for name, site in circuit.sites.items():
            assert back.sites[name].every == site.every and back.sites[name].d_sae == site.d_sae
            for field in ("pos", "feature", "effect", "se"):
                torch.testing.assert_close(
                    getattr(back.sites[name], field), getattr(site, field), rtol=0, atol=0, equal_nan=True
                )
    with pytest.raises(MissingFileError):
        circuits.load_circuit(tmp_path / "nothing")
    (tmp_path / "c" / "nodes.safetensors").write_bytes(b"x")
    with pytest.raises(CorruptFileError):
        circuits.load_circuit(tmp_path / "c")


def test_all_errors_are_all_where_the_baseline_leaves_errors_alone() -> None:
    saes = mixed_saes(["embed", "mlp_out.1", "resid_post.1"])
    for aggregation, n in (("sum", 1), ("none", 5)):
        effects = _effects(
            "gpt2", saes, pairs_of(patched=False), circuits.negative_logit(), steps=1, aggregation=aggregation
        )
        for errors, sites in (("all", 3), ("resid", 1), ("none", 0), ("ranked", 0)):
            circuit = effects.circuit(n=4, errors=errors)  # type: ignore[arg-type]
            assert (circuit.n - circuit.n_errors, circuit.n_errors) == (4, sites * n), (aggregation, errors)


# Wrong input.


@pytest.mark.parametrize(
    ("family", "site", "read", "where"),
    [
        ("gpt2", "resid_post.1", "resid_post.0", "below"), ("gpt2", "mlp_out.1", "resid_mid.1", "below"),
        ("gpt2", "mlp_out.1", "attn_out.1", "below"), ("gpt2", "attn_out.1", "resid_pre.1", "below"),
        ("neox", "attn_out.1", "mlp_out.1", "beside"), ("gemma2", "mlp_out.0", "resid_mid.0", "below"),
    ],
)  # fmt: skip
def test_a_metric_that_reads_below_a_basis_is_refused_by_all_that_take_one(
    family: str, site: str, read: str, where: str
) -> None:
    model, pairs = exact_model(family), pairs_of(family)
    bases = circuits.neurons(model, [site])
    metric = circuits.of_site(read, lambda x, _: x.sum((1, 2)))
    whole = circuits.node_effects(model, bases, pairs, DIFFERENCE, measured=False).circuit(threshold=0.0)
    for call in (
        lambda: circuits.node_effects(model, bases, pairs, metric),
        lambda: circuits.exact_effects(model, bases, pairs, metric, {site: [0]}),
        lambda: circuits.edge_effects(model, bases, pairs, metric, whole),
        lambda: circuits.faithfulness(model, bases, whole, pairs, metric),
    ):
        with pytest.raises(MismatchError, match=f"The metric reads {read}, {where} the SAE at {site}: no feature"):
            call()


def test_wrong_input_is_answered_in_words() -> None:
    model, pairs, alone = exact_model(), pairs_of(), pairs_of(patched=False)
    sae = {"resid_post.1": exact_sae("standard")}
    keep = pairs.clean.mask.clone()
    keep[:, 1:] = False
    mixed = Pairs.of(model, clean=["ab", "abc"], patch=["ax", "axc"], answers=[("p", "q")] * 2)
    text = model.tokens(["abc", "de"])
    cases: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
        (alone, {"baseline": "patch", "metric": circuits.negative_logit()}, InvalidInputError, "baseline='patch' needs the counterparts"),
        (alone, {}, InvalidInputError, r"logit_difference\(\) compares two answers, and these prompts have one"),
        (text, {}, InvalidInputError, r"logit_difference\(\) reads the answers of pairs, and these are texts"),
        (pairs, {"method": "shapley"}, InvalidInputError, "method"),
        (pairs, {"rule": "simpson"}, InvalidInputError, "rule"),
        (pairs, {"baseline": "noise"}, InvalidInputError, "baseline"),
        (pairs, {"aggregation": "mean"}, InvalidInputError, "aggregation"),
        (pairs, {"steps": 0}, InvalidInputError, "steps=0"),
        (pairs, {"batch_size": 0}, InvalidInputError, "batch_size=0"),
        (pairs, {"keep": keep}, DegenerateInputError, "keeps no token"),
        (pairs, {"keep": keep[:, 1:]}, ShapeError, "must be alike"),
        (mixed, {"aggregation": "none"}, InvalidInputError, "the prompts have 2 to 3 tokens"),
        (pairs, {"metric": 3}, InvalidInputError, "metric"),
        (pairs, {"metric": circuits.of_logits(lambda x, _: x)}, ShapeError, "one number per row"),
        (pairs, {"metric": circuits.of_site("resid_post.9", lambda x, _: x.sum((1, 2)))}, UnknownSiteError, "layer 9"),
    )  # fmt: skip
    for examples, options, error, words in cases:
        metric = options.pop("metric", DIFFERENCE)
        with as_user(), pytest.raises(error, match=words):
            circuits.node_effects(model, sae, examples, metric, **options)
    effects = _effects("gpt2", sae, steps=1)
    calls: tuple[tuple[Callable[[], object], type[Exception], str], ...] = (
        (lambda: effects.circuit(), InvalidInputError, "either n= or threshold="),
        (lambda: effects.circuit(n=1, threshold=0.1), InvalidInputError, "either n= or threshold="),
        (lambda: effects.circuit(n=-1), InvalidInputError, "n=-1"),
        (lambda: effects.circuit(threshold=float("nan")), InvalidInputError, "threshold=nan"),
        (lambda: effects["resid_post.2"], LookupError, "resid_post.1"),
        (lambda: effects.circuit(n=1).with_labels({"resid_post.1/900": "x"}), InvalidInputError, "no node resid_post.1/900"),
        (lambda: list(effects.circuit(threshold=0.0).nodes()), InvalidInputError, "This circuit is everything"),
        (lambda: circuits.exact_effects(model, sae, pairs, DIFFERENCE, effects.circuit(threshold=0.0)), InvalidInputError, "everything"),
        (lambda: circuits.exact_effects(model, sae, pairs, DIFFERENCE, {"resid_post.1": [40]}), InvalidInputError, "Feature 40"),
    )  # fmt: skip
    for call, error, words in calls:
        with as_user(), pytest.raises(error, match=words):
            call()


def test_scores_in_single_precision_are_those_in_double() -> None:
    exact, single = exact_model(), Model(tiny_hf("gpt2"), tiny_tokenizer(), name="tiny-gpt2")
    found = []
    for model in (exact, single):
        pairs = Pairs.of(model, clean=CLEAN, patch=PATCH, answers=ANSWERS)
        bases = circuits.neurons(model, ["embed", "mlp_out.0", "resid_post.1"])
        effects = circuits.node_effects(model, bases, pairs, DIFFERENCE, aggregation="none", measured=False)
        found.append(torch.cat([dense(site, (4, 5))[0].flatten().double() for site in effects.values()]))
    assert float(torch.corrcoef(torch.stack(found))[0, 1]) > 1 - 1e-9 and not torch.equal(*found)


# The embedded model.


@pytest.fixture(scope="session")
def agreement(embedded: Model) -> Pairs:
    return circuits.behaviours.pairs("sva_nounpp", embedded, n=4)


@pytest.mark.embedded
def test_the_stream_of_the_embedded_model_is_a_sum(embedded: Model, agreement: Pairs) -> None:
    layers = (1, 14, 29)
    sites = [f"{kind}.{i}" for i in layers for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    acts = embedded.capture(agreement.clean, sites)
    for i in layers:
        before, attn, mlp, after = (acts[f"{kind}.{i}"] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        torch.testing.assert_close(before + attn + mlp, after, rtol=1e-6, atol=1e-5 * float(after.abs().max()))


@pytest.mark.embedded
@pytest.mark.slow
def test_ten_midpoints_are_complete_at_every_depth_where_attribution_patching_fails(embedded: Model) -> None:
    # Eight pairs say little of attribution patching, whose miss at layer 21 is 0.36 to 0.78 with the draw.
    few, many = (circuits.behaviours.pairs("sva_nounpp", embedded, n=n) for n in (8, 64))
    bases = circuits.neurons(embedded, [f"resid_post.{i}" for i in (0, 7, 14, 21, 28)])
    runs: dict[str, tuple[Pairs, dict[str, Any]]] = {
        "midpoint": (few, {}), "left": (few, {"rule": "left"}), "atp": (many, {"method": "atp"}),
    }  # fmt: skip
    gaps = {
        name: list(circuits.node_effects(embedded, bases, pairs, DIFFERENCE, **options).gaps.values())
        for name, (pairs, options) in runs.items()
    }
    assert max(gaps["midpoint"]) < 0.02 and max(gaps["left"]) < 0.05, gaps
    assert min(gaps["atp"][:4]) > 0.4, gaps


@pytest.mark.embedded
@pytest.mark.slow
def test_half_precision_finds_the_same_nodes(embedded: Model) -> None:
    half = wb.load_model("embedded", dtype="bfloat16", check=False)
    top = []
    for model in (embedded, half):
        bases = circuits.neurons(model, ["mlp_out.8", "resid_post.14", "attn_out.20"])
        pairs = circuits.behaviours.pairs("sva_nounpp", model, n=16)
        effects = circuits.node_effects(model, bases, pairs, DIFFERENCE, measured=False)
        frame = effects.frame().sort_values("effect", key=abs, ascending=False).head(50)
        top.append(set(zip(frame["site"], frame["feature"], strict=True)))
    assert len(top[0] & top[1]) >= 45, len(top[0] & top[1])
