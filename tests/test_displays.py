"""Every public class shows itself: one line of at most 300 characters, and HTML of at most 200 kB, all escaped."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

import circuits
import workbench as wb
from circuits.attribution_graphs.validation import Validation
from circuits.discovery.cluster_circuits import RUNS, ClusterCircuit
from circuits.faithful.curves import CurvePoint
from circuits.shift.evidence import PooledTexts, Reader
from circuits.shift.export.loader import Classifier, checksum
from circuits.shift.removal import RemovalRow
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import ShiftStudy
from tests.tiny import tiny_model, tiny_tokenizer
from workbench.activations.manifest import Manifest, SiteStats
from workbench.activations.store import ActivationStore
from workbench.controls import Arm, Sweep
from workbench.controls.tokens import TokenPolicy
from workbench.core.display import LONGEST, OneLine
from workbench.core.html import Shown, ShownText
from workbench.core.registry import Registry
from workbench.core.tokens import TokenBatch
from workbench.features import (
    CardSet,
    DepthScores,
    FeatureCard,
    FeatureTable,
    LensEnds,
    LensEstimate,
    LensToken,
    LensTokens,
    OutputScores,
    TokenVectors,
    TopContexts,
    Window,
)
from workbench.features.lens import AttentionMap, Lens, TokenMap
from workbench.features.scores.table import COLUMNS
from workbench.glitch import TokenTable
from workbench.hooks.capture import Activations
from workbench.hooks.sites import Site
from workbench.interventions.op import Op
from workbench.interventions.proof import EditReport, EditReports
from workbench.interventions.scopes import Scope
from workbench.judges import Answers, JudgeGate, Trial
from workbench.models.compare import VariantLogits
from workbench.models.innerchecks import Check
from workbench.models.segment import Segment
from workbench.models.selfcheck import CheckReport
from workbench.models.session import Session
from workbench.models.sitetable import SiteTable
from workbench.probes import ClassMoments, Eraser, Transport, fit_leace, fit_mimic
from workbench.report.base import Headline, Histogram, Lines, Report, Says, Section, Series, Table, Text
from workbench.runs.run import RunDir

MOST_HTML = 200_000
EVIL = "<script>alert(1)</script>\n'\"&" + "x" * 1_000
PACKAGES = ("", "controls", "features", "glitch", "judges", "probes", "saes", "steering", "saes.architectures")
DISPLAY = ("__repr__", "_repr_html_", "_shown_line", "_shown_note", "_shown_facts", "_shown_parts", "frame")
SHORT = (Site, wb.Estimate, Registry, ShownText, Op, Scope)
"""Not tested: `Site` and `Estimate` are short, texts show themselves as they read, the others are bases."""


def _offered() -> Iterator[object]:
    for name in PACKAGES:
        package = importlib.import_module(f"workbench.{name}".rstrip("."))
        yield from (getattr(package, public) for public in package.__all__)
    yield from (getattr(circuits, public) for public in circuits.__all__)


def _returned(value: object) -> Iterator[type]:
    """Classes of this package that a function, or the methods of a class, say that they return."""
    members = [m for name, m in vars(value).items() if name[0] != "_"] if isinstance(value, type) else [value]
    for member in members:
        function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        if inspect.isfunction(function):
            names = re.findall(r"[A-Za-z_]\w*", str(function.__annotations__.get("return", "")))
            found = (function.__globals__.get(name) for name in names)
            yield from (
                c for c in found if inspect.isclass(c) and c.__module__.split(".")[0] in ("workbench", "circuits")
            )


@cache
def public_classes() -> tuple[type, ...]:
    """Classes that are public, or that something public returns; without errors, protocols and typed dicts."""
    known: dict[type, None] = {}
    waiting: list[object] = list(_offered())
    while waiting:
        value = waiting.pop()
        if isinstance(value, type) and value in known:
            continue
        if isinstance(value, type):
            known[value] = None
        waiting += _returned(value)
    return tuple(
        cls for cls in known
        if not (issubclass(cls, BaseException) or getattr(cls, "_is_protocol", False) or typing.is_typeddict(cls))
    )  # fmt: skip


def _own_display(cls: type) -> bool:
    """Whether a class says itself how it is shown, so that only a real instance can tell."""
    bases = (OneLine, Shown, Report, object)
    common = [vars(base).get(name) for base in bases for name in DISPLAY]
    return any(vars(base).get(name) not in (None, *common) for base in cls.__mro__ for name in DISPLAY)


def _stuffed(cls: type) -> object:
    """A dataclass with monstrous values in every field that can hold them."""
    one = object.__new__(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = str(field.type)
        value: object = (EVIL,) * 10_000
        if re.fullmatch(r"(int|float|bool)( \| None)?", kind):
            value = 10**12
        elif "Tensor" in kind:
            value = torch.zeros(200, 300)
        elif kind.startswith(("str", "Literal", "Path")):
            value = EVIL
        object.__setattr__(one, field.name, value)
    return one


class _Cards:
    def card(self, place: int) -> FeatureCard:
        return _card(place)


def _card(feature: int) -> FeatureCard:
    window = Window(tokens=(EVIL[:30],) * 32, values=(1.0,) * 32, peak=0, stratum="top", row=0, document=0)
    lens = tuple(LensToken(EVIL[:20], i, 1.0) for i in range(10))
    return FeatureCard(
        feature=feature, frequency=0.1, max_act=2.0, n_tokens=10, flags=(EVIL,), windows=(window,) * 30, promoted=lens
    )


def _edit_report() -> EditReport:
    norms = dict.fromkeys(("mean_norm_intended", "mean_norm_applied", "mean_norm_before", "share"), 1.0)
    return EditReport(edit=EVIL, site="resid_post.1", fired=3, tokens=10**9, gate_open=1, gate_decided=2, **norms)


def _many_edits() -> wb.Intervention:
    add = wb.Add(torch.ones(16))
    return sum(
        (wb.Intervention.at(f"resid_post.{i % 3}", add, wb.Pos(*range(40))) for i in range(60)), wb.Intervention()
    )


def _batch(rows: int = 60) -> TokenBatch:
    ids = torch.randint(2, 200, (rows, 300), generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(TokenBatch.of_rows(ids), tokenizer=tiny_tokenizer(), note=EVIL)


def _variants() -> VariantLogits:
    logits = torch.randn(4, 60, 258)
    return VariantLogits(
        logits=logits, clean=logits[0], report=EditReports([_edit_report()] * 500), how=EVIL, batch=_batch(),
        interventions=(_many_edits(),) * 4,
    )  # fmt: skip


def _generation() -> wb.Generation:
    rows = 1_000
    return wb.Generation(
        texts=(EVIL,) * rows, ids=(torch.zeros(5).long(),) * rows, logprobs=(torch.zeros(5),) * rows,
        report=EditReports([_edit_report()] * 500), ended=("length",) * rows, prompt_lengths=(3,) * rows, note=EVIL,
        prompts=(EVIL,) * rows,
    )  # fmt: skip


def _table() -> FeatureTable:
    df = pd.DataFrame({name: [1.0] * 1_000 for name in COLUMNS})
    for name in ("top_tokens", "contexts"):
        df[name] = [[EVIL] * 10] * 1_000
    return FeatureTable(df, {"site": EVIL, "model": EVIL}, {})


def _contexts() -> TopContexts:
    n, k = 200, 20
    places = {name: torch.zeros(n, k).long() for name in ("tokens", "rows", "positions")}
    return TopContexts(
        acts=torch.ones(n, k), frequency=torch.ones(n), max_act=torch.ones(n), n_tokens=9, texts=((EVIL,) * 2,) * n,
        **places,
    )  # fmt: skip


def _lens_tokens() -> LensTokens:
    return LensTokens(torch.ones(300, 20).long(), torch.ones(300, 20))


def _lens() -> Lens:
    sites, rows = tuple(Site("resid_post", i) for i in range(60)), torch.arange(4).repeat_interleave(60)
    shape = (60, len(rows))
    numbers = {name: torch.zeros(shape) for name in ("entropy", "kl", "next_logprob")}
    return Lens(
        sites=sites, ids=torch.full((*shape, 1), 70), logprobs=-torch.rand(*shape, 1), next_rank=torch.zeros(shape).long(),
        rows=rows, positions=torch.arange(60).repeat(4), batch=_batch(4), **numbers,
    )  # fmt: skip


def _linear_lens() -> wb.LinearLens:
    sites = tuple(f"resid_post.{i}" for i in range(60))
    eye = torch.eye(16)
    return wb.LinearLens(
        kind="jacobian", target="resid_post.60", sites=sites, weights=dict.fromkeys(sites, eye), n_fit=10**9,
        model_name=EVIL[:60], fingerprint="0",
    )  # fmt: skip


def _jacobian_lens() -> wb.JacobianLens:
    model = _named(tiny_model())
    model.name = EVIL[:60]
    return wb.jacobian_lens(model, _batch(2))


def _token_vectors() -> TokenVectors:
    sites = [f"resid_post.{i}" for i in range(60)]
    return TokenVectors(tokens={i: EVIL for i in range(9)}, vectors=dict.fromkeys(sites, torch.ones(9, 16)))


def _gate() -> JudgeGate:
    trial = Trial(
        subject=EVIL, group=EVIL, margin=wb.Estimate(1.0, 0.0, 2.0, 9, "t"), needed_margin=0.1, cases=9, unread=0
    )
    return JudgeGate(EVIL, (trial,) * 500)


def _token_table() -> TokenTable:
    n = 5_000
    columns: dict[str, Any] = {name: np.zeros(n) for name in ("is_reference", "is_byte", "reserved", "copies", "norm")}
    texts = dict.fromkeys(("token", "category", "group"), (EVIL,) * n)
    return TokenTable(**columns, **texts, indicators={EVIL[:50]: np.zeros(n)}, indicator=np.zeros(n))


def _scores() -> OutputScores:
    each = {name: torch.ones(5_000) for name in ("score", "delta", "confidence", "bound")}
    return OutputScores(
        **each, token=torch.ones(5_000).long(), a_max=1.0, lens=_lens_tokens(), skipped_blocks=True,
        by_prompt=torch.ones(2, 5_000),
    )  # fmt: skip


def _sweep() -> Sweep:
    return Sweep(tuple(Arm(name=f"{i} {EVIL}", kind=EVIL) for i in range(500)))


def _moments() -> ClassMoments:
    random = torch.Generator().manual_seed(0)
    return ClassMoments.of(torch.randn(400, 200, generator=random), torch.arange(400) % 2, 2)


def _session() -> Session:
    session = tiny_model().session(EVIL)
    session._messages = [{"role": "user", "content": EVIL}] * 500
    return session


def _merged() -> wb.MergedLora:
    merged = object.__new__(wb.MergedLora)
    merged.modules, merged._originals = (EVIL,) * 500, []
    return merged


def _named(model: wb.Model) -> wb.Model:
    model.name = EVIL
    return model


def _store(folder: Path) -> ActivationStore:
    sites = {f"resid_post.{i}": SiteStats(d=16, max_norm=1.0) for i in range(60)}
    manifest = Manifest(
        model_name=EVIL, model_fingerprint="0", source={}, sites=sites, context=8, special_ids=(), shard_rows=1,
        batch_rows=1,
    )  # fmt: skip
    return ActivationStore(folder / EVIL[:7], manifest)


def _run(folder: Path) -> RunDir:
    run = RunDir.create("long", {}, folder / ("x" * 200))
    for i in range(30):
        run.save_step(f"step-{i}-{'y' * 40}", Section("s"))
    return run


METRIC = circuits.logit_difference()


def _samples() -> circuits.Samples:
    batch = _batch()
    n = len(batch)
    where = torch.arange(n)
    return circuits.Samples(
        contexts=batch, answers=batch.ids[:, 0], losses=torch.rand(n), documents=where, positions=where, n_tokens=999,
        n_documents=n, dropped={EVIL: 9},
    )  # fmt: skip


def _task() -> circuits.ShiftTask:
    n = 500
    label, spurious = tuple(i % n for i in range(2 * n)), tuple(i // n for i in range(2 * n))
    rows = circuits.LabelledTexts((EVIL,) * 2 * n, label, spurious)
    return circuits.ShiftTask(
        name=EVIL, label_names=(EVIL,) * n, spurious_names=(EVIL,) * 2, train=rows, test=rows, notes=(EVIL,) * n
    )


def _classifier() -> circuits.ShiftClassifier:
    hf = tiny_model().hf
    settings = {
        "model": {"name": EVIL, "checksum": checksum(hf)}, "label_names": [EVIL] * 500, "patches": [{"site": EVIL}] * 500,
    }  # fmt: skip
    return circuits.ShiftClassifier(Classifier(hf, None, settings, {}))


@cache
def _pairs() -> circuits.Pairs:
    clean = [f"ab{EVIL[:9]}{chr(97 + i)}" for i in range(20)]
    return circuits.Pairs.of(
        tiny_model(), clean=clean, patch=[f"b{text[1:]}" for text in clean], answers=[("g", "h")] * 20
    )


def _behaviours() -> circuits.Behaviours:
    samples = _samples()
    n = len(samples)
    flat = wb.Estimate(0.5, 0.2, 0.8, 5, "t", EVIL)
    labels = np.arange(n) // 2
    return circuits.Behaviours(
        samples=samples,
        vectors=_vectors(n),
        labels=labels,
        method="kmeans",
        min_size=1,
        stability=circuits.Stability(ari=flat, null=flat, jaccard=np.ones(n), jaccard_null=np.ones(n), share=0.8),
        before=labels,
        splits=None,
    )


def _cluster_circuits() -> circuits.ClusterCircuits:
    behaviours = _behaviours()
    circuit = circuits.Circuit(
        sites={EVIL: circuits.SiteNodes.of(9, [1, 2])}, bases={EVIL: "0"}, model_fingerprint="0", made=EVIL
    )
    x = torch.ones(2)
    kept = {run: x for run in RUNS}
    found = {
        c: ClusterCircuit(
            cluster=c, circuit=circuit, found_on=(0,), tested_on=(1, 2), full=x, empty=2 * x, kept=kept
        )
        for c in behaviours.clusters
    }  # fmt: skip
    return circuits.ClusterCircuits(behaviours=behaviours, circuits=found, n=2, method=EVIL)


def _vectors(n: int) -> circuits.SampleVectors:
    return circuits.SampleVectors(kind="effects", matrix=csr_matrix(np.ones((n, 9))), sites={EVIL: 9}, kept=0.5)


def _bench() -> tuple[wb.Model, dict[str, Any]]:
    model = tiny_model()
    return model, circuits.neurons(model, [f"{kind}.{i}" for i in range(3) for kind in ("mlp_out", "resid_post")])


@cache
def _effects() -> circuits.NodeEffects:
    return circuits.node_effects(*_bench(), _pairs(), METRIC, steps=2, aggregation="none")


@cache
def _graph() -> circuits.AttributionGraph:
    model = _bench()[0]
    return circuits.attribution_graph(
        model, circuits.mlp_hidden(model, [0, 2]), EVIL[:40], targets={EVIL: torch.ones(16)}
    )


@cache
def _edges() -> circuits.Edges:
    return circuits.edge_effects(*_bench(), _pairs(), METRIC, _effects().circuit(n=200))


def _removal() -> circuits.RemovalScores:
    share = wb.Estimate(0.5, 0.25, 0.75, 9, EVIL)
    row = RemovalRow(n_features=9, n_ablated=9, score=share, random=None, noise=share)
    return circuits.RemovalScores(
        name=EVIL, site=EVIL, ablated=EVIL, rows=(row,) * 99, accuracies=((EVIL, share),), notes=(EVIL,)
    )


@cache
def _faithful() -> circuits.Faithfulness:
    return circuits.faithfulness(*_bench(), _effects().circuit(n=9), _pairs(), METRIC)


def _shortcut() -> circuits.ShortcutEvidence:
    flat = wb.Estimate(0.5, 0.2, 0.8, 5, "t", EVIL)
    return circuits.ShortcutEvidence(
        is_shortcut=True, why=EVIL, features=(EVIL,) * 64, harm=((EVIL, 1.0),) * 64, n_search=10**9, n_errors=10**9,
        opposed=flat, opposed_without=flat, others=flat, others_without=flat, gain=0.1, p_ablation=0.1,
        p_environment=0.1, alpha=0.05,
    )  # fmt: skip


def _toggled() -> circuits.WhatIf:
    """Of a study that reads nothing: its task has monstrous names."""
    texts = circuits.LabelledTexts((EVIL,) * 4, (0, 0, 1, 1), (0, 1, 0, 1))
    names = (EVIL, EVIL)
    task = circuits.ShiftTask(name=EVIL, label_names=names, spurious_names=names, train=texts, test=texts)
    x, site = torch.randn(4, 3), "resid_post.1"
    pooled = PooledTexts(
        texts=texts.texts, x=x, acts={site: torch.ones(4, 5)}, frequency={site: torch.ones(5)}, n_tokens=9, n_left_out=0
    )
    reader = Reader(model=tiny_model(), bases={}, probe_site=site, policy=TokenPolicy())
    study = ShiftStudy(
        task=task, options=circuits.ShiftOptions(), reader=reader, train=pooled, test=pooled, others={},
        probe=wb.probes.Probe(w=torch.ones(3), b=0.0, site=site),
    )  # fmt: skip
    return circuits.WhatIf(study=study, nodes=(circuits.Node(EVIL, 1),) * 500, ablated=())


class _Table(ShiftReport):
    """A report of a study, as far as its table."""

    def __init__(self) -> None:
        pass

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({"method": [EVIL] * 500, "accuracy": [0.5] * 500})


REAL: dict[type, Callable[[Path], object]] = {
    ActivationStore: _store,
    Activations: lambda _: tiny_model().capture("one", [*tiny_model().sites(), *(f"z.{i}.h{h}" for i in range(3) for h in range(2))]),
    Answers: lambda _: Answers(np.ones(5_000)),
    CardSet: lambda _: CardSet(tuple(range(500)), {"site": EVIL, "model": EVIL}, _Cards()),
    CheckReport: lambda _: CheckReport((Check(EVIL, False, EVIL),) * 500, {Site("z", i): EVIL for i in range(99)}),
    circuits.Behaviours: lambda _: _behaviours(),
    circuits.SampleVectors: lambda _: _vectors(9),
    circuits.ClusterCircuits: lambda _: _cluster_circuits(),
    circuits.TokenMeans: lambda _: circuits.TokenMeans(
        x={EVIL: torch.ones(2)}, coefficients={EVIL: torch.ones(3)}, bases={EVIL: EVIL}, n=9
    ),
    circuits.Stability: lambda _: _behaviours().stability,
    circuits.AttributionGraph: lambda _: _graph(),
    Validation: lambda _: _graph().validate(4),
    circuits.Circuit: lambda _: _effects().circuit(n=200).with_labels({}),
    circuits.Edges: lambda _: _edges(),
    circuits.Faithfulness: lambda _: _faithful(),
    circuits.FaithfulnessCurve: lambda _: circuits.FaithfulnessCurve((CurvePoint(EVIL, 9, _faithful()),) * 500),
    circuits.ShiftTask: lambda _: _task(),
    circuits.ShiftClassifier: lambda _: _classifier(),
    circuits.ShortcutEvidence: lambda _: _shortcut(),
    circuits.LeftOut: lambda _: circuits.LeftOut(
        roles=(circuits.FeatureRole(feature=EVIL, label=wb.Estimate(0.5, 0.2, 0.8, 5, "t", EVIL), conflict=None),) * 500
    ),
    circuits.Backward: lambda _: circuits.Backward(
        steps=(
            circuits.BackwardStep(
                kept=EVIL, n_ablated=10**9, label=wb.Estimate(0.5, 0.2, 0.8, 5, "t", EVIL),
                worst=wb.Estimate(0.5, 0.2, 0.8, 5, "t", EVIL), worst_group=EVIL,
            ),
        ) * 500
    ),
    circuits.WhatIf: lambda _: _toggled(),
    circuits.AutomaticShift: lambda _: circuits.AutomaticShift(evidence=_shortcut(), report=_Table()),  # type: ignore[arg-type]
    circuits.Agreement: lambda _: circuits.Agreement(
        judges=(EVIL, EVIL), observed=wb.Estimate(1.0, 0.5, 1.0, 9, "t"), chance=0.5, kappa=None,
        table=((10**9,) * 3,) * 3, disputed=((EVIL, EVIL, EVIL),) * 500,
    ),
    circuits.JudgingQueue: lambda folder: circuits.JudgingQueue(
        cards=(
            circuits.QueueCard(
                feature="resid_post.1/3", tokens=(EVIL,) * 6, n_tokens=10**9,
                contexts=(circuits.TokenContext(EVIL, EVIL, EVIL),) * 6,
            ),
        ) * 500,
        path=folder / "none.jsonl", judge=EVIL, label_names=(EVIL,) * 2, spurious_names=(EVIL,) * 2,
    ),
    circuits.RemovalScores: lambda _: _removal(),
    circuits.SAEsEstimate: lambda _: circuits.SAEsEstimate(
        sites=90, passes=3, seconds=1e6, memory_bytes=10**9, disk_bytes=10**12
    ),
    circuits.Samples: lambda _: _samples(),
    circuits.NodeEffects: lambda _: _effects(),
    circuits.Pairs: lambda _: _pairs(),
    circuits.SiteEffects: lambda _: _effects()["resid_post.1"],
    DepthScores: lambda _: DepthScores(tuple(range(200)), torch.ones(200, 9), torch.ones(200, 9)),
    EditReport: lambda _: _edit_report(),
    EditReports: lambda _: EditReports([_edit_report()] * 500),
    AttentionMap: lambda _: AttentionMap(patterns={EVIL: torch.rand(99, 60, 60)}, tokens=(EVIL,) * 60),
    Eraser: lambda _: fit_leace(_moments()),
    Transport: lambda _: fit_mimic(_moments(), 0, 1, ridge=1.0),
    FeatureCard: lambda _: _card(3),
    Lens: lambda _: _lens(),
    LensEstimate: lambda _: LensEstimate(seconds=1e6, memory_bytes=10**12, disk_bytes=10**12, what=EVIL[:60]),
    TokenVectors: lambda _: _token_vectors(),
    wb.JacobianLens: lambda _: _jacobian_lens(),
    wb.LinearLens: lambda _: _linear_lens(),
    TokenMap: lambda _: TokenMap(batch=_batch(9), values=torch.rand(9, 300), name=EVIL),
    FeatureTable: lambda _: _table(),
    JudgeGate: lambda _: _gate(),
    LensEnds: lambda _: LensEnds(_lens_tokens(), _lens_tokens()),
    LensTokens: lambda _: _lens_tokens(),
    OutputScores: lambda _: _scores(),
    RunDir: _run,
    Segment: lambda _: tiny_model().segment("one day", "resid_post.0"),
    Session: lambda _: _session(),
    SiteTable: lambda _: tiny_model("neox").sites(),
    Sweep: lambda _: _sweep(),
    TokenBatch: lambda _: _batch(),
    TokenTable: lambda _: _token_table(),
    TopContexts: lambda _: _contexts(),
    VariantLogits: lambda _: _variants(),
    wb.Generation: lambda _: _generation(),
    wb.Intervention: lambda _: _many_edits(),
    wb.Mask: lambda _: wb.Mask(torch.ones(99, 99).bool()),
    wb.MergedLora: lambda _: _merged(),
    wb.Model: lambda _: _named(tiny_model()),
    wb.Plan: lambda _: tiny_model().plan(_many_edits()),
}  # fmt: skip
"""A large instance of each class that says itself how it is shown."""


class _Everything(Report):
    """A report with more of everything than a notebook should hold."""

    def findings(self) -> tuple[str, ...]:
        return (EVIL,) * 500

    def headline(self) -> Headline:
        arms = self._arms()
        return Headline.read(
            Says("It works.", "It does nothing.", "It fails."), value=(arms, "last", "n"), control=(arms, "3", "n")
        )

    def _arms(self) -> Table:
        return Table(("arm", "n"), (*((str(i), i) for i in range(200)), ("last", 7)), "Arms")

    def section(self) -> Section:
        series = Series("s", tuple(range(400)), tuple(range(400)))
        plots = tuple(Lines(f"{EVIL[:20]} {i}", (series,) * 6) for i in range(5))
        long = Table((EVIL, "b"), ((EVIL, 1),) * 5_000, EVIL)
        blocks = (long, *plots, Histogram("h", (1.0, 2.0)), Text(EVIL), self._arms())
        return Section(EVIL, blocks, self.findings(), {EVIL: 1.0}, self.headline())


def require_shown(value: object) -> None:
    """What holds for the displays of every public object."""
    line = repr(value)
    assert len(line) <= LONGEST, len(line)
    assert "\n" not in line and "object at 0x" not in line
    html = getattr(value, "_repr_html_", lambda: "")()
    assert len(html.encode()) <= MOST_HTML, len(html.encode())
    assert "<script>alert" not in html


@pytest.mark.parametrize(
    "cls", sorted(public_classes(), key=lambda c: (c.__name__, c.__module__)), ids=lambda c: c.__name__
)
def test_a_class_shows_itself_in_bounds(cls: type, tmp_path: Path) -> None:
    if cls in SHORT or inspect.isabstract(cls):
        return
    assert issubclass(cls, OneLine), "derive it from OneLine (a value) or Shown (a result)"
    real = next((make for kind, make in REAL.items() if kind is cls), None)
    if issubclass(cls, Report):
        assert cls._repr_html_ is Report._repr_html_, "the sections of reports are bounded there"
    elif _own_display(cls):
        assert real is not None, f"add a large instance of {cls.__name__} to REAL"
        require_shown(real(tmp_path))
    else:
        assert dataclasses.is_dataclass(cls), "say in _shown_line what stands in its repr, and add it to REAL"
        require_shown(_stuffed(cls))


def test_a_report_is_bounded_whatever_is_in_it() -> None:
    require_shown(_Everything())
    html = _Everything()._repr_html_()
    assert "It works." in html and html.count("<tr") < 300, (
        "long tables are cut, and keep what the headline was read from"
    )
    assert "of this section are in section().blocks alone" in html
