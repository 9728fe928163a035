"""The studies on devices that exist in name only; run by `tests/test_devices.py` in a process of its own.

Each study gives the numbers of the CPU wherever the model, the SAE and the rows are. That no operation met two devices
is checked too, so a mismatch that some caller survives does not pass.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from circuits.metrics import LossOfMargin
from circuits.nodes.attribute import node_effects
from circuits.nodes.exact import exact_effects
from circuits.shift.reading import ShiftOptions
from circuits.shift.study import shift
from experiments import geometry, glitch_tokens, refusal, score_features
from tests import devices
from tests.circuits.planted import planted_model, planted_sae, planted_task
from tests.features.toys import random_sae
from tests.glitch.tiny_copy import PLANTED, wordy_model
from tests.interventions.test_files import OPS
from tests.saes.stores import small_store
from tests.tiny import D_MODEL, tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import SelfText
from workbench.activations.store import ActivationStore
from workbench.bases.sae import as_basis
from workbench.controls.tokens import TokenPolicy
from workbench.core.codec import codec_of
from workbench.core.errors import InvalidInputError, WorkbenchError
from workbench.core.tokens import TokenBatch
from workbench.features import ScoreOptions
from workbench.features import score_features as score_features_
from workbench.features.cards.cardmaking import CardOptions, feature_cards
from workbench.features.explain.examples import ExampleOptions
from workbench.features.passes.windows import WindowOptions
from workbench.features.scores.profile import depth_scores
from workbench.glitch.counting.census import run_census
from workbench.glitch.counting.plan import CensusOptions, plan_census
from workbench.glitch.repairing.repair import repair
from workbench.glitch.scanning.sae_features import FeatureOptions, glitch_features
from workbench.glitch.scanning.scanner import ScanOptions
from workbench.glitch.searching.gradient import GradientOptions, climb, uncertainty
from workbench.glitch.verification.probing import SHORT
from workbench.glitch.verification.prompts import PROMPTS as COPY_PROMPTS
from workbench.glitch.verification.prompts import prompt_set
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.interventions.gates import CosineGate, ProbeGate, SAEGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import Add
from workbench.interventions.saes import SAEAblate, SAEAddMax, SAEClamp
from workbench.interventions.scopes import Generated, Last, NotPrefix
from workbench.models.model import Model
from workbench.probes.linear import Probe, ProbeOptions, fit_probe
from workbench.saes.comparison.corpus import CorpusOptions, check_corpus
from workbench.saes.comparison.faithful import FakeFeatureOptions, fake_features, quality
from workbench.saes.comparison.matching import match_by_activations
from workbench.saes.comparison.shared import shared_features
from workbench.saes.config import ARCHITECTURES, SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions, evaluate_sae
from workbench.saes.evaluation.sparse_probing import ProbingOptions
from workbench.saes.evaluation.suite import SuiteOptions, run_suite
from workbench.saes.formats.load import load_sae
from workbench.saes.formats.placement import check_sae
from workbench.saes.training.train import train_sae
from workbench.steering import SteerOptions, steer
from workbench.steering.directions.classical import Concept, DirectionOptions, concept_directions
from workbench.steering.directions.concepts import best_feature
from workbench.steering.directions.reft import ReftOptions
from workbench.steering.refusal.study import RefusalOptions
from workbench.steering.selection.groups import Depth, StudyOptions
from workbench.steering.selection.study import selection_study

SITE = "resid_post.1"
TEXTS = tuple(f"{a}zz {b}zzz {a}zz{b}" for a, b in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"))
PLAIN = tuple(f"{a}qr {b}stu {a}vw{b}" for a, b in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"))
STEERING = SteerOptions(new_tokens=4, k=5, plain_texts=("a plain text", "another one"))
CARDS = CardOptions(
    shown=4, lens_k=3, windows=WindowOptions(top=8, sample=60, before=5, after=4), examples=ExampleOptions(fewest=3)
)
PROMPTS = ("one day", "the", "for now, I", "he said")
V = torch.linspace(-1, 2, D_MODEL)


@pytest.fixture(autouse=True)
def _no_mismatch_at_all() -> Iterator[None]:
    devices.MET.clear()
    with devices.devices():
        yield
    assert not devices.MET


@functools.cache
def model_on(device: str, family: str = "llama") -> Model:
    model = tiny_model(family)
    if device == "both":
        devices.spread(model.hf)
    else:
        model.hf.to(device)
    return model


def placed(model: Model, like: Model) -> Model:
    """The model where another one is."""
    if hasattr(like.hf, "hf_device_map"):
        devices.spread(model.hf)
    else:
        model.hf.to(like.device)
    return model


def sae_on(device: str) -> Any:
    return random_sae().to(device)


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Equal within 1e-5, whatever devices the numbers are on; what is stored in bfloat16 within one rounding."""
    if isinstance(wanted, Tensor):
        rtol = 2**-7 if wanted.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            found.detach().cpu(), wanted.detach(), atol=1e-5, rtol=rtol, equal_nan=True, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(wanted, np.ndarray):
        assert_same(torch.from_numpy(found), torch.from_numpy(wanted), where)
    elif isinstance(wanted, pd.DataFrame):
        assert_same(found.to_dict("list"), wanted.to_dict("list"), where)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5, rel=1e-4, nan_ok=True), where
    elif dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            if "seconds" not in field.name:
                assert_same(getattr(found, field.name), getattr(wanted, field.name), f"{where}.{field.name}")
    elif isinstance(wanted, Mapping):
        assert list(found) == list(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}[{key}]")
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        assert len(found) == len(wanted), where
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif type(wanted).__eq__ is not object.__eq__:
        assert found == wanted, where


IDS = torch.randint(2, 200, (12, 10), generator=torch.Generator().manual_seed(0))


def _reads(model: Model) -> Any:
    acts = model.capture(
        list(PROMPTS),
        [str(s) for s in ("resid_pre.0", "resid_mid.1", SITE, "q.0", "pattern.1", "mlp_post.1", "logits")],
    )
    some = model.capture(list(PROMPTS), [SITE, "z.0.h1"], positions=NotPrefix(1))
    grad = model.capture("one day", [SITE], grad=True)
    return {
        **acts,
        **{f"some {k}": v for k, v in some.items()},
        "rows": some.rows,
        "positions": some.positions,
        "grad": torch.autograd.grad(grad[SITE].square().sum(), grad[SITE])[0],
        "mean": model.mean(PROMPTS, SITE),
        "loss": model.loss(list(PROMPTS)),
        "logits of some": model.logits(list(PROMPTS), tokens=[3, 5]),
        "all": model.logits(IDS, "all"),
        "pos": model.logits(list(PROMPTS), NotPrefix(1), tokens=[3]),
        "lens": model.lens(V[None].to(model.device)),
        "W_U": model.W_U,
    }


def _texts(model: Model) -> Any:
    edit = Intervention.at(SITE, Add(V, 4.0), Generated())
    always = Intervention.at(SITE, Add(V, 4.0))
    session = model.session(intervention=always, max_new_tokens=4)
    turns = [session.turn("a"), session.turn("bc"), session.logits()]
    with model.plan(always):
        hf = model.hf.generate(**model.tokens(list(PROMPTS)).hf(), max_new_tokens=4, do_sample=False)
    return [
        model.generate(list(PROMPTS), 6, temperature=0.0, capture=[SITE]),
        model.generate(list(PROMPTS), 6, intervention=edit, seed=1, batch_size=3, stop=["e"]),
        model.generate([*PROMPTS, *PROMPTS], 8, intervention=always, seed=2, top_k=20, top_p=0.9, min_p=0.01),
        turns, hf,
    ]  # fmt: skip


def _compared(model: Model) -> Any:
    edits = [Intervention.at(SITE, Add(V, s), Last()) for s in (1.0, -2.0)] + [Intervention.at("mlp_out.0", Add(V))]
    variants = model.variants(list(PROMPTS), [*edits, Intervention()], tokens=[4, 9, 2])
    segment = model.segment(list(PROMPTS), model.resolve(SITE), last=True)
    return variants.logits, variants.clean, segment.x, segment.logits, segment.skips_blocks


@pytest.mark.parametrize("device", [pytest.param("gpu:0", marks=pytest.mark.slow), "both"])
@pytest.mark.parametrize("study", [_reads, _texts, _compared])
def test_a_model_on_devices_reads_writes_and_compares_as_on_the_cpu(study: Any, device: str) -> None:
    assert_same(study(model_on(device)), study(model_on("cpu")))


@pytest.mark.parametrize(("family", "device"), [("llama", "both"), ("mixtral", "both"), ("gpt2", "gpu:0")])
def test_fingerprint_and_self_check(family: str, device: str) -> None:
    model, cpu = model_on(device, family), model_on("cpu", family)
    assert model.fingerprint == cpu.fingerprint
    found, wanted = model.self_check(), cpu.self_check()
    found.require()
    assert [check.name for check in found.checks] == [check.name for check in wanted.checks]
    assert found.withdrawn == wanted.withdrawn


def _all_ops(model: Model, sae: Any, store: ActivationStore) -> Any:
    ids = torch.tensor([[7, 8, 9], [5, 7, 8]])
    at: dict[str, Any] = {"at": "resid_post.0"}
    gates = [ProbeGate(V, **at), ProbeGate(V, when="token", **at), CosineGate(V, **at), SAEGate(sae, 3, **at)]
    ops: list[Op] = [*OPS, *(When(gate, Add(V), Add(-V)) for gate in gates)]
    ops += [SAEClamp(sae, [1, 3], 2.0), SAEAblate(sae, [1, 3], error="drop"), SAEAddMax(sae, sae.W_dec[2], 2.0)]
    found = []
    for op in ops:
        try:
            with model.plan(Intervention.at("resid_post.2", op)) as plan:
                found.append((model.logits(ids, "all"), plan.report))
        except WorkbenchError as error:
            found.append(str(error))
    return found


def _evaluated(model: Model, sae: Any, store: ActivationStore) -> Any:
    options = EvalOptions(max_rows=6, batch_rows=5)
    # Rows on a device of their own, and those of a store.
    return [evaluate_sae(model, sae, rows, options=options) for rows in (IDS.to("gpu:0"), store)]


def _scores(model: Model, sae: Any, store: ActivationStore) -> Any:
    options = ScoreOptions(k=5, rows=16, random_directions=4)
    table = score_features.study(model, sae, store, options=options)
    model_only = score_features_(model, sae, scores=("output",), options=replace(options, precision="model"))
    return table.df, table.controls, model_only.df


def _cards(model: Model, sae: Any, store: ActivationStore) -> Any:
    return list(feature_cards(model, sae, store, [1, 3, 5], options=CARDS))


def _depths(model: Model, sae: Any, store: ActivationStore) -> Any:
    return depth_scores(model, sae.W_dec[:3], prompt="one day", n_random=3)


def _steered(model: Model, sae: Any, store: ActivationStore) -> Any:
    return steer(model, sae, [3, 8], (1.0, 3.0), PROMPTS, [20, 21], options=STEERING)


def _selected(model: Model, sae: Any, store: ActivationStore) -> Any:
    table = score_features_(model, sae, scores=("output",), options=ScoreOptions(k=5, rows=16, random_directions=4))
    deeper = random_sae(site="resid_post.2").to(sae.W_dec.device)
    options = StudyOptions(n_features=2, strengths=(1.0,), prompts=PROMPTS, steering=replace(STEERING, plain_texts=()))
    return selection_study(model, [Depth(sae, table), Depth(deeper, table)], options)


def _concepts(model: Model, sae: Any, store: ActivationStore) -> Any:
    concept = Concept("z", TEXTS, PLAIN)
    directions = concept_directions(model, concept, SITE, DirectionOptions(reft=ReftOptions(epochs=2)))
    return directions, best_feature(model, sae, concept, SITE)


def _refused(model: Model, sae: Any, store: ActivationStore) -> Any:
    options = RefusalOptions(
        n_train=6, n_val=4, n_test=4, strengths=(1.0,), clamps=(1.0,), n_features=1, n_candidates=3, new_tokens=4
    )
    return refusal.study(model, sae, TokenBatch.of_rows(IDS[:4]), options=options)


def _fits(model: Model, sae: Any, store: ActivationStore) -> Any:
    return check_sae(model, sae), check_sae(model, sae, store)


def _suite(model: Model, sae: Any, store: ActivationStore) -> Any:
    options = SuiteOptions(
        evaluation=EvalOptions(max_rows=12, batch_rows=7), probing=ProbingOptions(ks=(1,), reseeds=2, per_class=20),
        absorption=None, synthetic=None,
    )  # fmt: skip
    return run_suite(
        model, sae, [f"{i} Some words, and more; then {i * 7} of them." for i in range(16)], options=options
    )


def _matched(model: Model, sae: Any, store: ActivationStore) -> Any:
    other = random_sae(seed=1)
    return match_by_activations(sae, other, store), shared_features(sae, other)


def _corpus(model: Model, sae: Any, store: ActivationStore) -> Any:
    fake = fake_features(model, {"a": sae}, IDS, options=FakeFeatureOptions(tokens=60, context=10, seeds=2))
    return check_corpus(model, IDS, options=CorpusOptions(draws=100)), fake, quality(model, sae, IDS)


def _repaired(model: Model, sae: Any, store: ActivationStore) -> Any:
    words = placed(wordy_model(), model)
    with words.plan(repair(words, PLANTED[:2]).intervention()):
        return words.logits(torch.tensor([[20, PLANTED[0], 30, PLANTED[1]]]))


def _glitches(model: Model, sae: Any, store: ActivationStore) -> Any:
    words = placed(wordy_model(), model)
    probe = prompt_set(words, analyse(codec_of(words.tokenizer)), [SHORT], "raw").templates[0]
    walk = climb(words, probe, np.arange(20, 60), lambda ids: ids % 2 == 0, GradientOptions(iterations=2))
    options = CensusOptions(confirm=COPY_PROMPTS[2:], again=(), batch_size=100)
    census = run_census(words, plan_census(words, options=options, measure_both=False))
    scan = glitch_tokens.study(words, "top", options=ScanOptions(top=2, controls=2, contexts=1, sides=False))
    said = [scan.row(i)["max_prob"] for i in scan.candidates()]
    return uncertainty(words, probe, torch.tensor([40, 77])), walk.asked, census.best, scan.table.indicator, said


def _glitch_features(model: Model, sae: Any, store: ActivationStore) -> Any:
    return glitch_features(model, sae, list(range(60, 69)), options=FeatureOptions(controls=3))


def _stored(model: Model, sae: Any, store: ActivationStore) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        sites = [SITE, "mlp_out.0"]
        options = HarvestOptions(shard_tokens=200, batch_tokens=200)
        made = harvest(model, SelfText(tokens=240, context=12), sites, Path(folder) / "s", options=options)
        return made.token_rows("all"), *(block.acts for site in sites for block in made.blocks(site))


def _trained(model: Model, sae: Any, store: ActivationStore) -> Any:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES:
            k: dict[str, Any] = {"k": 4} if name in ("topk", "batchtopk", "matryoshka") else {}
            # Few steps: rounding decides near ties of TopK, after which two trainings go their own ways.
            config = SAEConfig(architecture=name, d_sae=32, tokens=300, batch=100, kernel="csr", **k)
            run = train_sae(store, replace(config, device=str(sae.W_dec.device)), Path(folder) / name)
            found.append((run.metrics["fvu"], load_sae(run.path, device=sae.W_dec.device).W_dec))
    return found


def _probed(model: Model, sae: Any, store: ActivationStore) -> Any:
    acts = model.capture(IDS, [SITE])[SITE].mean(1)
    probe = fit_probe(acts, torch.arange(12, device=acts.device) % 2, SITE, options=ProbeOptions(folds=0))
    return probe.w, probe.b, probe.logit(acts), probe.logit(acts.cpu())


def _measured(model: Model, sae: Any, store: ActivationStore) -> Any:
    return geometry.study(model, IDS.repeat(4, 1), (SITE, "resid_post.2"), geometry.Options(clipped_rows=8))


def _shifted(model: Model, sae: Any, store: ActivationStore) -> Any:
    like, near = planted_sae(), sae.W_dec.device
    known = replace(like, W_enc=like.W_enc.to(near), W_dec=like.W_dec.to(near), b_dec=like.b_dec.to(near))
    options = ShiftOptions(top_k=10, random_draws=2, probe_site="resid_post.2")
    task, text = planted_task(24, 24), TokenBatch.of_rows(IDS[:6])
    return shift(placed(planted_model(), model), {SITE: known}, task, options=options, plain_text=text)


def _attributed(model: Model, sae: Any, store: ActivationStore) -> Any:
    batch = model.tokens(list(PROMPTS))
    keep = TokenPolicy.of_batch(batch).kept(batch)
    metric = LossOfMargin(Probe(V, 0.3, "resid_post.2"), torch.tensor([0, 1, 1, 0]), keep)
    effects = node_effects(model, {SITE: sae}, batch, metric, keep=keep)
    exact = exact_effects(model, {SITE: sae}, batch, metric, {SITE: [0, 1, 2, 3]}, keep=keep)
    return effects[SITE], exact[SITE]


Study = Callable[[Model, Any, ActivationStore], Any]
SHORT_STUDIES: tuple[Study, ...] = (
    _all_ops, _evaluated, _scores, _cards, _depths, _concepts, _fits, _matched, _corpus, _repaired, _glitch_features,
    _stored, _trained, _probed, _measured, _attributed,
)  # fmt: skip
LONG_STUDIES: tuple[Study, ...] = (_steered, _selected, _refused, _suite, _glitches, _shifted)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return small_store(tmp_path_factory.mktemp("store") / "s")


@functools.cache
def _on_cpu(study: Study, store: ActivationStore) -> Any:
    return study(model_on("cpu"), sae_on("cpu"), store)


@pytest.mark.parametrize("study", [*SHORT_STUDIES, *(pytest.param(s, marks=pytest.mark.slow) for s in LONG_STUDIES)])
def test_a_study_with_a_model_over_both_devices_and_the_sae_on_the_second(study: Study, store: ActivationStore) -> None:
    assert_same(study(model_on("both"), sae_on("gpu:1"), store), _on_cpu(study, store))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "sae"), [("gpu:0", "cpu"), ("cpu", "gpu:0"), ("gpu:0", "gpu:1")])
@pytest.mark.parametrize("study", [_all_ops, _evaluated, _scores, _fits, _matched, _attributed])
def test_a_study_with_model_and_sae_on_any_two_devices(study: Study, model: str, sae: str, store: Any) -> None:
    assert_same(study(model_on(model), sae_on(sae), store), _on_cpu(study, store))


# ---- the devices themselves


def test_mixtures_raise_and_copies_do_not() -> None:
    cpu, first, second = torch.ones(3), torch.ones(3, device="gpu:0"), torch.ones(3).to("gpu:1")
    assert (first.device, second.device, (first + 1).device) == (
        torch.device("gpu:0"),
        torch.device("gpu:1"),
        first.device,
    )
    mixtures = [
        lambda: first + cpu, lambda: first + second, lambda: torch.cat([first, cpu]), lambda: cpu[second.long()],
        lambda: torch.where(cpu > 0, first, 0.0), lambda: cpu.add_(first), lambda: torch.tensor(1.0).add_(first[0]),
        lambda: torch.equal(first, cpu), lambda: first.masked_fill(cpu > 0, 0.0), lambda: first[second.long()],
        lambda: torch.rand(2, device="gpu:0", generator=torch.Generator()), lambda: cpu @ first,
    ]  # fmt: skip
    for mixture in mixtures:
        with pytest.raises(devices.DeviceMismatch):
            mixture()
    for read in (first.numpy, lambda: np.asarray(first)):
        with pytest.raises(TypeError, match="numpy"):
            read()
    assert len(devices.MET) == len(mixtures) + 2
    devices.MET.clear()
    first[:2] = cpu[:2] * 5
    assert first.tolist() == [5.0, 5.0, 1.0] and (first * torch.tensor(2.0)).device == first.device
    assert first[torch.tensor([2])].item() == 1.0 and first[cpu > 0].device == first.device
    assert (first + second.to("gpu:0")).cpu().tolist() == [6.0, 6.0, 2.0]


@pytest.mark.parametrize("device", ["gpu:0", "gpu:1"])
def test_feature_numbers_on_a_device_are_checked_like_those_on_the_cpu(device: str) -> None:
    basis, x = as_basis(sae_on("gpu:0")), torch.ones(2, D_MODEL)
    some = torch.tensor([3, 0])
    assert_same(basis.ablate(x, some.to(device)), basis.ablate(x, some))
    for wrong in ([basis.d_sae], [-1], [3, 0, 3]):
        with pytest.raises(InvalidInputError, match="does not exist|named twice"):
            basis.contribution(x, torch.tensor(wrong).to(device))
    with pytest.raises(InvalidInputError, match="does not exist"):
        basis.rows(torch.tensor([-1], device=device))


def test_gradients_cross_devices_and_tied_weights_stay_tied() -> None:
    x = torch.ones(3, requires_grad=True)
    (x.to("gpu:0") * 2).to("gpu:1").sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3 and x.grad.device.type == "cpu"
    model = model_on("gpu:0", "gpt2")
    assert model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
