from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.saes.stores import (
    READ,
    SITE,
    WRITTEN,
    assert_same_tensors,
    before_finish,
    before_step,
    ctrl_c,
    small_store,
    tensors,
)
from workbench.activations.store import ActivationStore
from workbench.core.errors import InvalidInputError
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import load_sae
from workbench.saes.training import batches as batches_module
from workbench.saes.training.member import Member
from workbench.saes.training.train import sweep_names, train_sae, train_saes

BASE = SAEConfig(d_sae=48, k=4, tokens=2000, batch=100, dead_after=500, kernel="csr", buffer=300, site=SITE)
SWEEP = [
    BASE,
    replace(BASE, k=8),
    replace(BASE, d_sae=32, seed=1, data_seed=0),
    replace(BASE, lr=1e-2, tokens=1500),
    replace(BASE, architecture="batchtopk", site=WRITTEN),
    replace(BASE, architecture="matryoshka", widths=(8, 16)),
    replace(BASE, architecture="gated", k=None),
    replace(BASE, architecture="relu", k=None, site=READ, target_site=WRITTEN),
    replace(BASE, architecture="batchtopk", site=SITE, target_site=WRITTEN),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return small_store(tmp_path_factory.mktemp("store"), (SITE, READ, WRITTEN))


def test_each_member_is_as_if_trained_alone_and_the_data_are_read_once(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[int] = []
    real = batches_module.Batches.next

    def counting(self: batches_module.Batches) -> dict[str, torch.Tensor]:
        served.append(1)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(batches_module.Batches, "next", counting)
        runs = train_saes(store, SWEEP, tmp_path / "all")
    assert len(served) == BASE.steps, "one pass for all"
    assert [run.path.name for run in runs] == sweep_names(SWEEP)
    for config, run in zip(SWEEP, runs, strict=True):
        alone = train_sae(store, config, tmp_path / "alone" / run.path.name)
        assert_same_tensors(alone.path, run.path)
        assert (alone.path / "metrics.jsonl").read_text() == (run.path / "metrics.jsonl").read_text()
        assert {**alone.metrics, "seconds": 0} == {**run.metrics, "seconds": 0}
    assert len({float(tensors(run.path)["W_dec"].sum()) for run in runs}) == len(runs), "no two are the same"


def test_a_sweep_goes_on_where_each_member_stopped_and_takes_new_ones(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train_saes(store, SWEEP[:4], tmp_path / "straight")
    cut = tmp_path / "cut"
    for configs, step in ((SWEEP[:3], 7), (SWEEP[:3], 12)):
        with monkeypatch.context() as patch:
            before_step(step, ctrl_c, patch, name=sweep_names(SWEEP)[0])
            with pytest.raises(KeyboardInterrupt):
                train_saes(store, configs, cut)
    # One member is behind: its last checkpoint was lost.
    (cut / sweep_names(SWEEP)[1] / "checkpoint.safetensors").unlink()
    steps: dict[str, list[int]] = {}
    real = Member.train_step

    def counting(self: Member, pair: batches_module.Pair) -> None:
        steps.setdefault(self.name, []).append(self.step)
        real(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "train_step", counting)
        runs = train_saes(store, SWEEP[:4], cut)
    names = sweep_names(SWEEP)
    assert steps[names[0]] == list(range(13, 20)) and steps[names[1]] == list(range(20))
    assert steps[names[3]] == list(range(15)), "shorter, and new"
    for a, b in zip(straight, runs, strict=True):
        assert_same_tensors(a.path, b.path)
    before_step(0, lambda: pytest.fail("a finished member is trained again"), monkeypatch)
    assert [run.metrics for run in train_saes(store, SWEEP[:4], cut)] == [run.metrics for run in runs]


@pytest.mark.parametrize("moment", ["last step", "saving"])
def test_ctrl_c_while_a_short_member_ends_saves_all_of_them(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    configs = [replace(BASE, tokens=1000), replace(BASE, tokens=1000, k=8), BASE]
    names = ["short", "other", "long"]
    monkeypatch.setattr("workbench.saes.training.train.sweep_names", lambda _: names)
    straight = train_saes(store, configs, tmp_path / "straight")
    with monkeypatch.context() as patch:
        if moment == "last step":
            before_step(9, ctrl_c, patch, name="short")
        else:
            before_finish(ctrl_c, patch, name="short")
        with pytest.raises(KeyboardInterrupt) as stopped:
            train_saes(store, configs, tmp_path / "cut")
    saved = {name for name in names if (tmp_path / "cut" / name / "checkpoint.safetensors").is_file()}
    assert saved == (set(names) if moment == "last step" else {"other", "long"})
    notes = "\n".join(stopped.value.__notes__)
    assert {name for name in names if f"step 10 in {tmp_path / 'cut' / name}" in notes} == saved
    assert (f"finished in {tmp_path / 'cut' / 'short'}." in notes) == (moment == "saving")
    for step in range(10):
        before_step(step, lambda: pytest.fail("made again"), monkeypatch)
    for a, b in zip(straight, train_saes(store, configs, tmp_path / "cut"), strict=True):
        assert_same_tensors(a.path, b.path)


def test_one_member_that_fails_does_not_take_the_others_with_it(store: ActivationStore, tmp_path: Path) -> None:
    wild = replace(BASE, lr=1e30)
    with pytest.raises(InvalidInputError, match=r"lr=1e\+30: the (loss|held-out FVU) is"):
        train_saes(store, [BASE, wild], tmp_path)
    fine, failed = (tmp_path / name for name in sweep_names([BASE, wild]))
    assert_same_tensors(fine, train_sae(store, BASE, tmp_path / "alone").path)
    assert not (failed / "cfg.json").exists()


def test_other_orders_of_tokens_get_their_own_pass(store: ActivationStore, tmp_path: Path) -> None:
    configs = [replace(BASE, tokens=500, seed=seed) for seed in (0, 1)]
    for config, run in zip(configs, train_saes(store, configs, tmp_path / "both"), strict=True):
        assert_same_tensors(train_sae(store, config, tmp_path / str(config.seed)).path, run.path)


def test_names_tell_members_apart() -> None:
    assert sweep_names([BASE, replace(BASE, k=8)]) == [f"{SITE}-topk-48-k4-s0", f"{SITE}-topk-48-k8-s0"]
    relu = replace(BASE, architecture="relu", k=None, target_site=WRITTEN)
    names = sweep_names([replace(relu, l1_coefficient=c) for c in (1.0, 2.0)])
    assert names == [f"{SITE}-to-{WRITTEN}-relu-48-l1_coefficient={c}-s0" for c in (1.0, 2.0)]
    assert sweep_names([BASE, replace(BASE, lr=0.1, batch=50)])[1] == f"{SITE}-topk-48-k4-s0-batch=50-lr=0.1"
    with pytest.raises(InvalidInputError, match="comes twice"):
        sweep_names([BASE, BASE])
    with pytest.raises(InvalidInputError, match="no configuration"):
        sweep_names([])


def test_a_transcoder_reconstructs_its_target_from_raw_activations(store: ActivationStore, tmp_path: Path) -> None:
    config = replace(BASE, architecture="batchtopk", site=READ, target_site=WRITTEN, k=12, tokens=12_000, lr=1e-2)
    run = train_sae(store, config, tmp_path)
    sae = load_sae(tmp_path)
    x, y = (torch.cat([acts.float() for acts in store.read(site, "heldout")]) for site in (READ, WRITTEN))
    assert abs(float(x.mean(0).norm())) > 0.1, "the mean of the input matters"
    y_hat = sae.decode(sae.encode(x))
    fvu = float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu == pytest.approx(run.metrics["fvu"], rel=1e-3)
    assert fvu < 0.3
    assert sae.cfg.metadata.hook_name == "blocks.1.mlp.hook_post"
    assert sae.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
