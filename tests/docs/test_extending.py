"""Every example of the page on extending runs, and the part that it adds does what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from circuits.behaviours import BEHAVIOURS
from circuits.shift.heads.base import HEADS
from circuits.shift.table.base import SHIFT_METHODS
from tests.circuits.planted import SITE as PLANTED_SITE
from tests.circuits.planted import planted_model, planted_sae, planted_task
from tests.features.toys import random_sae
from tests.saes.stores import SITE, small_store
from tests.tiny import tiny_model
from workbench.bases.registry import BASES
from workbench.core.registry import Registry
from workbench.glitch.ranking.indicators import INDICATORS, RowFacts, measure
from workbench.interventions.op import Op
from workbench.judges import JUDGES
from workbench.models.model import Model
from workbench.saes.architectures import StepOptions
from workbench.saes.architectures.dense_reference import reference_step
from workbench.saes.config import ARCHITECTURES
from workbench.saes.kernels.weights import SAEWeights
from workbench.steering import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M))
REGISTRIES: tuple[Registry[Any], ...] = (
    Op.registry,
    ARCHITECTURES,
    INDICATORS,
    JUDGES,
    METHODS,
    BASES,
    BEHAVIOURS,
    HEADS,
    SHIFT_METHODS,
)


def shrinks(names: dict[str, Any], model: Model, folder: Path) -> None:
    loaded = wb.Intervention.load(folder / "shrunk")
    with model.plan(loaded) as plan, torch.no_grad():
        edited = model.capture(["one day"], ["resid_post.1"])["resid_post.1"]
    plain = model.capture(["one day"], ["resid_post.1"])["resid_post.1"]
    assert plan.report is not None and torch.equal(edited, 0.5 * plain) and len(names["out"].texts) == 1


def steps_equal_autograd_and_training_saves(names: dict[str, Any], model: Model, folder: Path) -> None:
    kind, random = names["config"].spec.build(names["config"]), torch.Generator().manual_seed(0)
    shapes = ((32, 8), (32,), (32, 8), (8,))
    weights = SAEWeights(*(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes))
    x = torch.randn(50, 8, generator=random, dtype=torch.float64)
    options = StepOptions(torch.float64, sparsity=0.7)
    step, dense = kind.step(weights, x, options=options), reference_step(kind, weights, x, options=options)
    for mine, oracle in zip(step.gradients.tensors(), dense.gradients.tensors(), strict=True):
        torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-12)
    assert float(step.sparsity_loss) == pytest.approx(float(dense.sparsity_loss))
    config = wb.SAEConfig(
        architecture="log_penalty", own={"slope": 2.0}, d_sae=32, tokens=400, batch=100, kernel="csr", site=SITE
    )
    run = wb.train_sae(small_store(folder / "store", (SITE,), rows=60), config, folder / "sae")
    assert type(wb.load_sae(run.path)).__name__ == "StandardSAE"


def is_measured(names: dict[str, Any], model: Model, folder: Path) -> None:
    from workbench.glitch.ranking.weights import in_memory

    matrices = in_memory(model.hf)
    rows = matrices.E_out.rows(range(matrices.E_out.n_rows))
    outer = RowFacts(rows.norm(dim=1).numpy(), rows.isfinite().all(1).numpy(), rows.mean(0), ())
    values = measure(matrices, outer, outer, [0, 1], 16)["I_l1"]
    torch.testing.assert_close(torch.from_numpy(values).float(), (rows - rows[:2].mean(0)).abs().sum(1))
    assert names["options"].indicator == "I_l1"


def answers(names: dict[str, Any], model: Model, folder: Path) -> None:
    assert names["answers"].values.tolist() == [0.0, 1.0] and names["answers"].cost.answers == 2


def is_unit(names: dict[str, Any], model: Model, folder: Path) -> None:
    assert float(names["directions"]["medians"].norm()) == pytest.approx(1.0, abs=1e-5)


def rebuilds(names: dict[str, Any], model: Model, folder: Path) -> None:
    x = model.capture(["one day"], ["resid_post.1"])["resid_post.1"][0]
    torch.testing.assert_close(names["basis"].decode(names["basis"].encode(x)), x)


def is_explained(names: dict[str, Any], model: Model, folder: Path) -> None:
    effects, batch = names["effects"], names["batch"]
    x = model.capture(batch, ["resid_post.2"])["resid_post.2"]
    clean = names["MeanNorm"]("resid_post.2")(x, torch.arange(2)).mean()
    assert effects.effect.isfinite().all() and effects.effect.abs().max() > 0 and float(clean) > 0
    assert effects.gap < 0.5, "the effects add up to most of what patching the whole site does"


def has_pairs(names: dict[str, Any], model: Model, folder: Path) -> None:
    pairs = names["pairs"]
    assert len(pairs) == 20 and pairs.length == 3
    assert set("".join(pairs.frame()["clean_prefix"])) <= set("nopqrstuvwxyz")


def is_compared(names: dict[str, Any], model: Model, folder: Path) -> None:
    row = names["report"].method("trained on swapped texts too")
    assert (
        row.information == names["both"].information
        and row.label.value > names["report"].method("original").label.value
    )
    assert any((c.better, c.other) == (row.name, "original") for c in names["report"].comparisons)
    asked = names["table"].set_index("method").loc["swapped texts too"]
    assert (asked["regime"], asked["accuracy"]) == ("R0", row.label.value)
    assert "JTT" in names["table"]["method"].tolist()


def is_fitted(names: dict[str, Any], model: Model, folder: Path) -> None:
    head, scores = names["head"], names["scores"]
    assert (head.method, head.regime, head.n_attribute_labels) == ("minority only", "R2", 160)
    assert scores.mcc.value < 0 and len(scores.groups) == 4, "in the minority the other attribute goes with a label"


CHECKS: dict[str, Callable[[dict[str, Any], Model, Path], None]] = {
    "An op": shrinks,
    "An SAE architecture": steps_equal_autograd_and_training_saves,
    "A glitch indicator": is_measured,
    "A judge": answers,
    "A direction method": is_unit,
    "A basis": rebuilds,
    "A metric": is_explained,
    "A behaviour": has_pairs,
    "A method of a study": is_compared,
    "A robust head": is_fitted,
}
BY_VALUE = ("A metric",)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    known = [set(registry) for registry in REGISTRIES]
    yield
    for registry, names in zip(REGISTRIES, known, strict=True):
        for name in set(registry) - names:
            registry.remove(name)


def test_every_example_has_a_check() -> None:
    assert set(EXAMPLES) == set(CHECKS)


@pytest.mark.parametrize("title", CHECKS)
def test_the_example_runs_and_does_what_it_says(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    is_study = title == "A method of a study"
    model = planted_model() if is_study else tiny_model()
    names: dict[str, Any] = {
        "__name__": "an_example", "model": model, "sae": planted_sae() if is_study else random_sae(),
        "site": PLANTED_SITE if is_study else "resid_post.1", "task": planted_task(),
    }  # fmt: skip
    known = sum(map(len, REGISTRIES))
    exec(compile(EXAMPLES[title], PAGE.name, "exec", dont_inherit=True), names)
    assert sum(map(len, REGISTRIES)) == known + (title not in BY_VALUE), "it registers one part"
    CHECKS[title](names, model, tmp_path)
