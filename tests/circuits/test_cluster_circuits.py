"""Circuits of clusters: found on some documents, measured on others beside controls, kept, shown, and as a command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuits
from circuits.discovery.cluster_circuits import ARMS, OTHER, OWN, RANDOM, RUNS
from circuits.discovery.study import Discovery
from circuits.faithful.measure import Bench
from circuits.graph.circuit import SiteNodes
from tests.circuits.planted_mechanisms import SITES, mechanism_model, mechanism_samples
from tests.report.browser import Browser, running
from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.cli import main
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.numbers import number
from workbench.core.tokens import TokenBatch

METRIC = circuits.log_probability()
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
OPTIONS = circuits.ClusterCircuitOptions(n=4, find=6, test=6, method="atp")


def _bases() -> dict[str, Any]:
    return dict(circuits.neurons(mechanism_model(), SITES))


@pytest.fixture(scope="module")
def behaviours() -> circuits.Behaviours:
    options = circuits.DiscoveryOptions(resamples=2)
    samples = mechanism_samples()[0]
    return circuits.find_behaviours(mechanism_model(), samples, _bases(), cluster="kmeans", k=3, options=options)


@pytest.fixture(scope="module")
def found(behaviours: circuits.Behaviours) -> circuits.ClusterCircuits:
    return circuits.circuits_for(mechanism_model(), _bases(), behaviours, options=OPTIONS)


def test_a_circuit_is_found_on_some_documents_and_holds_on_others_where_controls_do_not(
    found: circuits.ClusterCircuits,
) -> None:
    samples, truth = mechanism_samples()
    for cluster, of in found.items():
        (mechanism,) = {truth[i] for i in found.behaviours.members(cluster)}
        assert {(site, f) for site, _, f in of.circuit.nodes()} == {
            (site, 2 * mechanism + i) for site in SITES for i in (0, 1)
        }
        documents = [{int(samples.documents[i]) for i in rows} for rows in (of.found_on, of.tested_on)]
        assert not documents[0] & documents[1] and 0 < len(of.found_on) <= 6 and 0 < len(of.tested_on) <= 6
        own, other, random = (of.faithfulness(arm) for arm in ARMS)
        assert own is not None and other is not None and random is not None
        assert own.low > max(other.high, random.high)
        np.testing.assert_allclose(of.full, _metric(list(of.tested_on)), atol=1e-5)
    gain = found.mean(OWN, minus=OTHER)
    assert gain.low > 0 and gain.value == pytest.approx(found.mean(OWN).value - found.mean(OTHER).value)
    frame = found.frame()
    assert frame["F"].tolist() == [found[c].faithfulness().value for c in found]  # type: ignore[union-attr]
    assert frame["F_random"].tolist() == [found[c].faithfulness(RANDOM).value for c in found]  # type: ignore[union-attr]
    assert frame["F_no_errors"].tolist() == [found[c].faithfulness(OWN, "none").value for c in found]  # type: ignore[union-attr]
    with pytest.raises(InvalidInputError, match="measured are"):
        found[0].faithfulness(OTHER, "none")


def _metric(rows: list[int]) -> torch.Tensor:
    model, (samples, _) = mechanism_model(), mechanism_samples()
    pairs = samples.pairs(rows)
    return -model.logits(pairs.clean).log_softmax(-1).gather(1, pairs.answers)[:, 0]


def test_effects_of_vectors_are_those_of_attribution_patching(behaviours: circuits.Behaviours) -> None:
    model, samples, rows = mechanism_model(), behaviours.samples, [7, 3, 20]
    bases = circuits.decomposition.bases(model, _bases())
    own = behaviours.vectors.effects(rows, model.fingerprint, {site: b.fingerprint for site, b in bases.items()})
    wanted = circuits.node_effects(model, bases, samples.pairs(rows), METRIC, method="atp", measured=False)
    assert (own.metric, own.baseline, own.aggregation, own.n, dict(own.bases)) == (
        wanted.metric, wanted.baseline, wanted.aggregation, 3, dict(wanted.bases),
    )  # fmt: skip
    for site in SITES:
        assert own[site].method == wanted[site].method
        np.testing.assert_allclose(own[site].effect, wanted[site].effect, atol=1e-6)
        np.testing.assert_allclose(own[site].se, wanted[site].se, atol=1e-5)


def test_means_over_tokens_serve_prompts_of_several_lengths() -> None:
    model, (samples, _) = mechanism_model(), mechanism_samples()
    site = "resid_post.1"
    bases = circuits.neurons(model, [site])
    means = circuits.token_means(model, bases, samples.contexts)
    tokens = torch.cat([model.capture(row[None], [site])[site][0, 1:] for row in samples.contexts.rows()])
    np.testing.assert_allclose(means.x[site], tokens.mean(0), atol=1e-5)
    np.testing.assert_allclose(means.coefficients[site], tokens.mean(0), atol=1e-5)
    assert means.n == len(tokens)
    pairs = samples.pairs([0, 4, 11])
    assert pairs.length is None
    width = model.d_model

    def measured(nodes: SiteNodes, of: circuits.Pairs = pairs) -> circuits.Faithfulness:
        circuit = circuits.Circuit(
            sites={site: nodes}, bases={site: bases[site].fingerprint}, model_fingerprint=model.fingerprint
        )
        return circuits.faithfulness(model, bases, circuit, of, METRIC, reference=means)

    whole, none, two = (measured(SiteNodes.of(width, f)) for f in (range(width), [], [2, 5]))
    assert whole.value.value == pytest.approx(1, abs=1e-4) and none.value.value == 0
    for kept, found in (([], none.empty), ([2, 5], two.kept)):
        for i in range(3):
            row = pairs.clean.rows()[i]
            x = model.capture(row[None], [site])[site].clone()
            out = means.x[site].expand_as(x).clone()
            out[..., kept] = x[..., kept]
            out[:, 0] = x[:, 0]  # the first token stays as it is
            logits = model.segment(TokenBatch.of_rows(row[None]), site, "logits").run(out).logits()
            assert float(found[i]) == pytest.approx(-float(logits.log_softmax(-1)[0, pairs.answers[i, 0]]), abs=1e-4)
    alone = measured(SiteNodes.of(width, [2, 5]), samples.pairs([4]))
    assert float(alone.kept[0]) == pytest.approx(float(two.kept[1]), abs=1e-5), "whatever else is in the batch"
    with pytest.raises(InvalidInputError, match="means of tokens"):
        circuits.faithfulness(model, bases, _empty(model, bases), pairs, METRIC, reference=means, ablation="zero")
    with pytest.raises(MismatchError, match="Take them again"):
        other = circuits.neurons(model, ["resid_post.0"])
        circuits.faithfulness(model, other, _empty(model, other), pairs, METRIC, reference=means)
    with pytest.raises(InvalidInputError, match="token_means"):
        circuits.faithfulness(model, bases, _empty(model, bases), pairs, METRIC)


def _empty(model: Any, bases: Any) -> circuits.Circuit:
    sites = {site: SiteNodes.of(basis.d_sae) for site, basis in bases.items()}
    prints = {site: basis.fingerprint for site, basis in bases.items()}
    return circuits.Circuit(sites=sites, bases=prints, model_fingerprint=model.fingerprint)


@pytest.mark.parametrize("method", ["atp", "ig"])
def test_a_stopped_search_for_circuits_continues_to_the_same_bits(
    method: Any, behaviours: circuits.Behaviours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = mechanism_model(), []
    options = circuits.ClusterCircuitOptions(n=4, find=3, test=3, method=method, steps=2)
    whole = circuits.circuits_for(model, _bases(), behaviours, options=options)
    measure = Bench.measure

    def stopping(self: Bench, *circuits: Any) -> Any:
        calls.append(1)
        if len(calls) == len(RUNS) + 3:
            raise KeyboardInterrupt
        return measure(self, *circuits)

    monkeypatch.setattr(Bench, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        circuits.circuits_for(model, _bases(), behaviours, options=options, folder=tmp_path)
    again = circuits.circuits_for(model, _bases(), behaviours, options=options, folder=tmp_path)
    assert len(calls) == len(RUNS) + 3 + 2 * len(RUNS), "the first cluster was kept"
    for c, of in whole.items():
        assert again[c].found_on == of.found_on and again[c].tested_on == of.tested_on
        for run in RUNS:
            assert torch.equal(again[c].kept[run], of.kept[run]) and torch.equal(again[c].empty, of.empty)
        assert again[c].circuit.frame().equals(of.circuit.frame())


def test_stopped_samples_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import circuits.discovery.samples as module

    monkeypatch.setattr(module, "DOCUMENTS_AT_ONCE", 2)
    model, losses, calls = mechanism_model(), module._losses, []
    texts = ["abcdefghijklm" * 2, "x", "nopqrstuvwxyz" * 2, "abcabc", "klmno" * 4]
    options = circuits.SampleOptions(loss_max=99, context=9, min_context=3, limit=25, one_per_document=False)
    whole = circuits.find_samples(model, texts, options=options)

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(module, "_losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        circuits.find_samples(model, texts, options=options, folder=tmp_path)
    before = len(calls)
    again = circuits.find_samples(model, texts, options=options, folder=tmp_path)
    made = len(calls) - before
    assert circuits.find_samples(model, texts, options=options, folder=tmp_path).losses.equal(again.losses)
    assert len(calls) == before + made and made >= 1, "all is kept by now"
    assert again.fingerprint == whole.fingerprint and again.dropped == whole.dropped and len(again) == 25
    np.testing.assert_allclose(again.losses, whole.losses, atol=1e-5)
    assert again.documents.equal(whole.documents) and again.positions.equal(whole.positions)


def test_too_few_clusters_are_refused(behaviours: circuits.Behaviours) -> None:
    samples = behaviours.samples.chosen(range(8))
    one = circuits.find_behaviours(
        mechanism_model(), samples, _bases(), k=1, options=circuits.DiscoveryOptions(resamples=0, split=False)
    )
    with pytest.raises(DegenerateInputError, match="1 cluster of at least 4 members"):
        circuits.circuits_for(mechanism_model(), _bases(), one)


def test_the_report_says_what_was_measured(found: circuits.ClusterCircuits) -> None:
    report = Discovery(found=found)
    headline = report.headline()
    assert headline.verdict == "works" and headline.value == found.mean(OWN) and headline.control == found.mean(OTHER)
    said = " ".join(report.findings())
    assert "3 clusters of at least 4 members hold 60 of 60 samples" in said
    assert str(found.mean(OWN)) in said and found.mean(OWN, minus=RANDOM).change() in said
    assert "ARI" in said and "split as mixed" in said
    headline.require_in([b for b in report.section().blocks if hasattr(b, "cell")])  # type: ignore[arg-type]
    json.dumps(report.to_json(), allow_nan=False)
    html = report._repr_html_()
    assert number(found[0].faithfulness().value) in html  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def page(found: circuits.ClusterCircuits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "clusters.html"
    return found.to_html(path, title=f"Test {HOSTILE}", pages={1: "pages/one.html"})


def test_the_page_escapes_and_shows_the_numbers_of_the_table(found: circuits.ClusterCircuits, page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert HOSTILE not in html and "&lt;img src=x" in html and "default-src &#39;none&#39;" in html
    assert html.count("<article") == 3 and html.count('href="pages/one.html"') == 1
    for c, of in found.items():
        own = of.faithfulness()
        assert own is not None
        card = html.split(f'id="cluster-{c}"')[1].split("</article>")[0]
        value, interval = own.shown()
        assert f'<td class="num">{value}</td><td class="num">{interval}</td>' in card
        answer = found.behaviours.answers(c)[0][0]
        assert f"<mark>{answer}</mark>" in card
        strongest = of.circuit.frame().iloc[0]
        assert f'<td>{strongest.site}</td><td class="num">{strongest.feature}</td>' in card


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.browser
def test_clusters_are_searched_and_sorted(found: circuits.ClusterCircuits, page: Path, browser: Browser) -> None:
    browser.size(1200, 900)
    browser.open(page.as_uri())
    shown = "[...document.querySelectorAll('#cards article')].filter((a) => !a.hidden).map((a) => Number(a.id.split('-')[1]))"
    assert sorted(browser.js(shown)) == [0, 1, 2] and browser.js("document.title") != "owned"
    context = found.behaviours.text(found.behaviours.samples.contexts.rows()[found.behaviours.members(2)[0]].tolist())
    browser.js(f"(() => {{ query.value = {json.dumps(context.upper())}; query.dispatchEvent(new Event('input')); }})()")
    assert browser.js(shown) == [2] and browser.js("document.getElementById('shown').textContent") == "1 of 3 clusters"
    browser.js("(() => { query.value = 'nothing has this'; query.dispatchEvent(new Event('input')); })()")
    assert browser.js(shown) == [] and not browser.js("document.getElementById('nothing').hidden")
    browser.js("(() => { query.value = ''; query.dispatchEvent(new Event('input')); })()")
    browser.js("(() => { order.value = 'faithful'; order.dispatchEvent(new Event('change')); })()")
    by_f = sorted(found, key=lambda c: -found[c].faithfulness().value)  # type: ignore[union-attr]
    assert browser.js(shown) == by_f and browser.problems == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("discover")
    tiny_hf().save_pretrained(where / "tiny")
    tiny_tokenizer().save_pretrained(where / "tiny")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijkl "), 40)) for _ in range(14)]
    (where / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return where


def _words(folder: Path, *more: str) -> list[str]:
    given = ["--model", str(folder / "tiny"), "--dtype", "float32", "--files", str(folder / "texts.jsonl")]
    sites = ["--sites", "resid_post.0", "mlp_out.1", "--loss-max", "99", "--limit", "60", "--cluster", "kmeans"]
    sizes = ["--k", "6", "--n", "5", "--resamples", "2", "--out", str(folder / "runs")]
    return ["circuit", "discover", *given, *sites, *sizes, *more]


def test_the_command_writes_report_page_and_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_words(folder, "--pages", "1", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    page = Path(result["page"]).read_text(encoding="utf-8")
    assert len(result["clusters"]) == page.count("<article") >= 2 and result["next"].startswith("workbench report ")
    assert 'href="pages/cluster-0000.html"' in page
    assert (Path(result["page"]).parent / "pages" / "cluster-0000.html").is_file()
    assert Path(result["table"]).read_text(encoding="utf-8").count("\n") >= len(result["clusters"])
    assert Path(result["report"]).is_file() and result["findings"]


def test_the_command_says_what_it_would_take_and_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_words(folder, "--estimate")) == 0
    assert "A stopped run continues." in capsys.readouterr().out
    for more, line in (
        (("--bases", "nowhere"), "no such folder"),
        (("--files", str(folder / "nothing.jsonl")), "nothing.jsonl"),
        (("--k", "900"), "clusters"),
        (("--pages", "-1"), "--pages -1: give 0"),
    ):
        assert main(_words(folder, *more)) == 2
        error = capsys.readouterr().err
        assert line in error and "Traceback" not in error
