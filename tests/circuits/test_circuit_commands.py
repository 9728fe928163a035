"""`workbench circuit find | edges | eval | show`: what they save is what the library finds, and a stopped one continues."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import circuits
import circuits.doctor.doctor
import circuits.nodes.attribute
from circuits.edges.parts import merged
from circuits.faithful.report import CIRCUIT
from circuits.graph.names import ERROR
from circuits.nodes.parts import effects_in
from circuits.saes.folder import SAEIndex, SiteSAE
from experiments.circuit_bases import BasesOptions
from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.cli import main
from workbench.core.stats import Estimate
from workbench.features import CardSet, FeatureCard, Window
from workbench.models.loading import load_model
from workbench.models.model import Model


class _Card:
    def __init__(self, feature: int) -> None:
        self.feature = feature

    def card(self, place: int) -> FeatureCard:
        window = Window((" the", " zebra"), (0.0, 2.0), 1, "top", 0, 0)
        return FeatureCard(feature=self.feature, frequency=0.1, max_act=2.0, n_tokens=9, windows=(window,))


def save_cards(folder: Path, feature: int) -> None:
    CardSet((feature,), {}, _Card(feature)).save(folder)


SITES = ["attn_out.0", "resid_post.1", "resid_post.2"]
METRIC = circuits.logit_difference()


def _lines(letters: str) -> str:
    rows = (
        {"clean_prefix": f"a {c}", "patch_prefix": f"b {c}", "clean_answer": "x", "patch_answer": "y"} for c in letters
    )
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("circuits")
    tiny_hf().save_pretrained(where / "tiny")
    tiny_tokenizer().save_pretrained(where / "tiny")
    (where / "pairs.jsonl").write_text(_lines("cdefghijkl"), encoding="utf-8")
    (where / "held-out.jsonl").write_text(_lines("mnopqr"), encoding="utf-8")
    return where


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder / "tiny"), dtype="float32")


def _find(folder: Path, *more: str) -> list[str]:
    given = ["--pairs", str(folder / "pairs.jsonl"), "--model", str(folder / "tiny"), "--dtype", "float32"]
    return [
        "circuit",
        "find",
        *given,
        "--sites",
        *SITES,
        "--n",
        "12",
        "--rows",
        "4",
        "--out",
        str(folder / "runs"),
        *more,
    ]


def _json(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def found(folder: Path) -> Path:
    assert main(_find(folder)) == 0
    (run,) = (folder / "runs").glob("*circuit-find*")
    return run


def test_find_saves_the_circuit_of_all_pairs(folder: Path, found: Path, model: Model) -> None:
    pairs = circuits.Pairs.from_jsonl(folder / "pairs.jsonl", model)
    whole = circuits.node_effects(model, circuits.neurons(model, SITES), pairs, METRIC)
    own, saved = whole.circuit(n=12), circuits.load_circuit(found / "artifacts" / "circuit")
    pd.testing.assert_frame_equal(saved.frame(), own.frame(), rtol=1e-4, atol=1e-7)
    assert dict(saved.bases) == dict(own.bases) and saved.n == 12
    page = (found / "report.html").read_text(encoding="utf-8")
    assert "Completeness gap" in page and "Strongest nodes" in page
    assert (found / "artifacts" / "circuit.html").is_file()


def test_cards_that_lie_with_the_saes_get_onto_the_page(found: Path, tmp_path: Path) -> None:
    circuit = circuits.load_circuit(found / "artifacts" / "circuit")
    site, _, feature = next(node for node in circuit.nodes() if node[2] != ERROR)
    fvu = Estimate(0.1, 0.0, 0.2, 9, "none", "rows")
    for name in (site, "mlp_out.0", "without"):  # one that the circuit has, one that it has not, one without cards
        (tmp_path / name).mkdir()
    for name in (site, "mlp_out.0"):
        save_cards(tmp_path / name / "cards", feature)
    other = next(name for name, _, _ in circuit.nodes() if name != site)
    saes = [
        SiteSAE(site=at, folder=name, fvu=fvu, pca=fvu, l0=1.0, dead=0.0, n_tokens=9, seconds=1.0)
        for at, name in ((site, site), ("mlp_out.0", "mlp_out.0"), (other, "without"))
    ]
    SAEIndex("embedded", 0.5, tuple(saes)).save(tmp_path)
    cards = BasesOptions(bases=str(tmp_path)).cards(circuit)
    assert list(cards) == [site] and BasesOptions().cards(circuit) == {}
    page = circuit.to_html(tmp_path / "circuit.html", cards=cards).read_text(encoding="utf-8")
    assert "zebra" in page


def test_edges_of_parts_are_those_of_all_pairs_and_get_onto_the_page(
    folder: Path, found: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _json(["circuit", "edges", str(found), "--rows", "3", "--out", str(folder / "runs")], capsys)
    table = pd.read_csv(result["edges"], dtype={"upstream_feature": str, "downstream_feature": str})
    pairs = circuits.Pairs.from_jsonl(folder / "pairs.jsonl", model)
    circuit = circuits.load_circuit(found / "artifacts" / "circuit")
    bases = circuits.neurons(model, SITES)
    own = circuits.edge_effects(model, bases, pairs, METRIC, circuit)
    frame = own.frame()
    assert len(table) == len(frame) == result["metrics"]["edges"] > 5
    for name in ("effect", "se"):
        np.testing.assert_allclose(table[name], frame[name], rtol=1e-3, atol=1e-6)
    one, rest = (circuits.edge_effects(model, bases, part, METRIC, circuit) for part in (pairs[:1], pairs[1:]))
    np.testing.assert_allclose(merged(one, rest).frame()["se"], frame["se"], rtol=1e-3, atol=1e-6)
    for asked in (str(found), str(result["run"]), "latest"):
        shown = _json(["circuit", "show", asked, "--folder", str(folder / "runs")], capsys)
        assert shown["page"] == result["page"], "the page with edges"
    assert '"edges":{"source":[' in Path(result["page"]).read_text(encoding="utf-8").replace(" ", "")


def test_edges_lead_into_a_site_that_holds_errors_alone(folder: Path, model: Model) -> None:
    pairs = circuits.Pairs.from_jsonl(folder / "pairs.jsonl", model)
    bases = circuits.pca(model, SITES, ["a c", "b d", "a e f"], k=2)
    chosen = circuits.node_effects(model, bases, pairs, METRIC).circuit(n=50)
    alone = circuits.SiteNodes.of(chosen.sites[SITES[2]].d_sae, [ERROR])
    circuit = dataclasses.replace(chosen, sites={**chosen.sites, SITES[2]: alone})
    whole, part = (circuits.edge_effects(model, bases, pairs, METRIC, c).frame() for c in (chosen, circuit))
    into_errors = whole.query("downstream_site != @SITES[2] or downstream_feature == 'error'")
    pd.testing.assert_frame_equal(part, pd.DataFrame(into_errors.reset_index(drop=True)))


def test_eval_measures_on_held_out_pairs_beside_random_nodes(
    folder: Path, found: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "circuit",
        "eval",
        "latest",
        "--pairs",
        str(folder / "held-out.jsonl"),
        "--counts",
        "3",
        "12",
        "--out",
        str(folder / "runs"),
    ]
    result = _json(given, capsys)
    rows = {row["nodes"]: row for row in result["faithfulness"]}
    pairs = circuits.Pairs.from_jsonl(folder / "held-out.jsonl", model)
    circuit = circuits.load_circuit(found / "artifacts" / "circuit")
    own = circuits.faithfulness(model, circuits.neurons(model, SITES), circuit, pairs, METRIC)
    assert rows[CIRCUIT]["F"] == pytest.approx(own.value.value, rel=1e-4) and rows[CIRCUIT]["n_pairs"] == 6
    other = rows["without the circuit"]["F"]
    assert other != pytest.approx(own.value.value, rel=1e-2)
    random = rows["random features, mean of 3 draws"]
    assert random["n_features"] == rows[CIRCUIT]["n_features"] and random["F"] != rows[CIRCUIT]["F"]
    page = (Path(result["run"]) / "report.html").read_text(encoding="utf-8")
    assert "Faithfulness by number of nodes" in page
    curve = {(row["nodes"], row["errors"], row["n"]): row for row in result["curve"]}
    assert len(curve) == 2 * 3 * 3
    assert curve["largest effects", "circuit", 12]["value"]["value"] == pytest.approx(own.value.value, rel=1e-4)


def test_a_stopped_find_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, calls = [*_find(folder)[:-1], str(tmp_path), "--n", "11"], []
    honest = circuits.nodes.attribute.node_effects

    def stopping(*args: Any, **options: Any) -> circuits.NodeEffects:
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args, **options)

    monkeypatch.setattr(circuits.nodes.attribute, "node_effects", stopping)
    assert main(words) == 130
    result = _json(words, capsys)
    assert calls == [4, 4, 4, 2], "the first part is not made again"
    assert len(list(tmp_path.glob("*circuit-find*"))) == 1 and len(result["nodes"]) == 11


def test_the_doctors_verdict_stays_with_the_circuit(
    folder: Path, found: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(folder / "doctored")
    shutil.copytree(found, Path(runs) / found.name)
    words = ["circuit", "doctor", "latest", "--inputs", "6", "--items", "6", "--sites", "1", "--checks", "1", "3", "11",
             "--steps", "4", "8", "--out", runs]  # fmt: skip
    calls, honest = [], circuits.doctor.doctor.examined

    def stopping(*args: Any, checks: tuple[int, ...], **options: Any) -> circuits.DoctorReport:
        calls.append(checks)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args, checks=checks, **options)

    monkeypatch.setattr(circuits.doctor.doctor, "examined", stopping)
    assert main(words) == 130
    result = _json(words, capsys)
    assert calls == [(1,), (3,), (3,), (11,)], "what was kept is not measured again"
    assert len(list(Path(runs).glob("*circuit-doctor*"))) == 1
    effects = effects_in(found / "artifacts" / "parts")
    pairs = circuits.Pairs.from_jsonl(folder / "pairs.jsonl", model)
    options = circuits.DoctorOptions(inputs=6, items=6, sites=1, checks=(1, 3, 11), steps=(4, 8))
    report = circuits.attribution_doctor(effects, model, circuits.neurons(model, SITES), pairs, METRIC, options=options)
    assert result["verdict"] == report.verdict and 11 in report.ran and 11 not in report.numbers
    gap = next(check["value"] for check in result["checks"] if check["part"] == "gap as given")
    assert gap["value"] == pytest.approx(next(c.value.value for c in report.checks if c.part == "gap as given"))  # type: ignore[union-attr]
    assert circuits.load_circuit(result["circuit"]).verdict == report.verdict
    page = Path(result["page"]).read_text(encoding="utf-8")
    assert report.verdict in page and "gap as given" in page
    assert _json(["circuit", "show", found.name, "--folder", runs], capsys)["page"] == result["page"]
    edges = _json(["circuit", "edges", "latest", "--out", runs], capsys)
    assert report.verdict in Path(edges["page"]).read_text(encoding="utf-8"), "later pages of the circuit carry it"
    assert circuits.load_circuit(found / "artifacts" / "circuit").doctor is None, "a finished run is not changed"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("find", "neither given"),
        ("find --pairs PAIRS --bases nowhere", "no such folder"),
        ("find --pairs PAIRS --bases EMPTY", "saes.json"),
        ("find --pairs PAIRS --sites mlp_uot.1", "mlp_uot"),
        ("find --pairs PAIRS --n 0", "--n 0"),
        ("find --task no_such_task", "no_such_task"),
        ("find --pairs PAIRS --bases mlp_hidden --sites resid_post.1", "mlp_hidden"),
        ("edges no-such-run", "no-such-run"),
        ("eval RUN", "--pairs HELD-OUT.jsonl"),
        ("eval RUN --draws 0", "--draws 0"),
        ("edges EMPTY", "run folder"),
        ("doctor RUN --checks 12", "--checks 12"),
        ("doctor RUN --inputs 1", "inputs=1"),
        ("doctor no-such-run", "no-such-run"),
        ("show no-such-run", "no-such-run"),
    ],
)
def test_wrong_input_is_one_line(
    folder: Path, found: Path, tmp_path: Path, words: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"PAIRS": str(folder / "pairs.jsonl"), "RUN": str(found), "EMPTY": str(tmp_path)}
    given = [places.get(word, word) for word in words.split()]
    model = ["--model", str(folder / "tiny")] if given[0] == "find" else []
    out = ["--folder" if given[0] == "show" else "--out", str(tmp_path / "runs")]
    capsys.readouterr()
    assert main(["circuit", *given, *model, *out]) == 2
    said = capsys.readouterr()
    assert error in said.err and len(said.err.strip().splitlines()) == 1 and "Traceback" not in said.err
