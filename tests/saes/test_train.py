from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.saes.stores import SITE, assert_same_tensors, before_step, ctrl_c, small_store, tensors
from tests.tiny import D_MODEL, tiny_model
from workbench.activations.harvest import harvest
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    UnknownNameError,
    UnknownSiteError,
)
from workbench.core.locks import in_use
from workbench.saes.architectures import Gated, JumpReLU
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import load_sae
from workbench.saes.training.batches import Batches, OrderKey
from workbench.saes.training.build import build
from workbench.saes.training.member import Member
from workbench.saes.training.train import adam_step, train_sae, train_saes

CONFIG = SAEConfig(d_sae=64, k=4, tokens=4000, batch=100, dead_after=500, kernel="csr", buffer=300)
EACH = {
    "topk": CONFIG,
    "batchtopk": replace(CONFIG, architecture="batchtopk"),
    "matryoshka": replace(CONFIG, architecture="matryoshka"),
    "topk_free": replace(CONFIG, decoder_norm="free"),
    "relu": replace(CONFIG, architecture="relu", k=None, l1_coefficient=5.0),
    "jumprelu": replace(CONFIG, architecture="jumprelu", k=None),
    "gated": replace(CONFIG, architecture="gated", k=None, l1_coefficient=5.0),
}
CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return small_store(tmp_path_factory.mktemp("store"))


def test_training_explains_held_out_tokens_and_says_so(store: ActivationStore, tmp_path: Path) -> None:
    said: list[tuple[str, dict[str, float]]] = []
    run = train_sae(store, CONFIG, tmp_path / "sae", log=lambda name, line: said.append((name, line)))
    lines = [json.loads(line) for line in (tmp_path / "sae" / "metrics.jsonl").read_text().splitlines()]
    assert said == [("sae", line) for line in lines]
    assert lines[-1]["step"] == CONFIG.steps
    assert run.metrics["fvu"] == pytest.approx(lines[-1]["fvu"])
    assert run.metrics["fvu"] < 0.7 * lines[0]["fvu"] or run.metrics["fvu"] < 0.3
    sae = load_sae(tmp_path / "sae")
    x = torch.cat([acts.float() for acts in store.read(split="heldout")])
    x_hat = sae.decode(sae.encode(x))
    fvu = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(run.metrics["fvu"], rel=1e-3), "the saved SAE reads raw activations"
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    assert float((sae.encode(x) > 0).sum(1).double().mean()) == pytest.approx(run.metrics["l0"])


def test_it_trains_in_a_thread_too(store: ActivationStore, tmp_path: Path) -> None:
    found: list[Any] = []
    config = replace(CONFIG, tokens=300)
    thread = threading.Thread(target=lambda: found.append(train_sae(store, config, tmp_path / "thread")))
    thread.start()
    thread.join()
    assert_same_tensors(found[0].path, train_sae(store, config, tmp_path / "main").path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_step(10, ctrl_c, patch)
        with pytest.raises(KeyboardInterrupt):
            train_sae(store, CONFIG, tmp_path)
    kept = (tmp_path / CHECKPOINT).read_bytes()
    members: list[Member] = []
    with monkeypatch.context() as patch:
        real = Member.restore

        def remembering(self: Member) -> Any:
            members.append(self)
            return real(self)

        patch.setattr(Member, "restore", remembering)
        before_step(20, lambda: members[0].weights.W_enc.fill_(float("nan")), patch)
        patch.setattr("workbench.saes.training.group.MAX_CHECKPOINT_TIME_SHARE", 1e9)
        with pytest.raises(InvalidInputError, match=r"the loss is nan at step 21 .* is kept\. Lower lr"):
            train_sae(store, CONFIG, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
    assert train_sae(store, CONFIG, tmp_path).metrics["fvu"] < 1


def test_a_finished_run_is_returned_and_another_is_refused(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_sae(store, CONFIG, tmp_path / "sae")
    before_step(0, lambda: pytest.fail("trained again"), monkeypatch)
    assert train_sae(store, CONFIG, tmp_path / "sae").metrics == run.metrics
    assert train_sae(store, replace(CONFIG, checkpoint_seconds=3.0), tmp_path / "sae").metrics == run.metrics
    with pytest.raises(MismatchError, match=r"k=4 \(asked for 5\)"):
        train_sae(store, replace(CONFIG, k=5), tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    with pytest.raises(MismatchError, match="not trained here"):
        train_sae(store, CONFIG, tmp_path / "sae")


def test_a_broken_checkpoint_is_named(store: ActivationStore, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"not safetensors")
    with pytest.raises(CorruptFileError, match=CHECKPOINT):
        train_sae(store, CONFIG, tmp_path)


def test_seed_and_data_decide_the_result(store: ActivationStore, tmp_path: Path) -> None:
    short = replace(CONFIG, tokens=500)
    settings = {"a": short, "b": short, "seed": replace(short, seed=1), "order": replace(short, data_seed=1)}
    settings["part"] = replace(short, distinct_tokens=240)
    found = {name: tensors(train_sae(store, c, tmp_path / name).path)["W_dec"] for name, c in settings.items()}
    assert torch.equal(found["a"], found["b"])
    assert not any(torch.equal(found["a"], found[name]) for name in ("seed", "order", "part"))
    both = train_sae(store, replace(short, seed=1, data_seed=0), tmp_path / "both")
    assert not torch.equal(tensors(both.path)["W_dec"], found["seed"])


def test_only_training_tokens_are_served_and_each_once_per_epoch(store: ActivationStore) -> None:
    train = torch.cat(list(store.read(split="train")))
    batches = Batches(store, (SITE,), OrderKey(seed=3, batch=len(train), buffer=300, distinct_tokens=None))
    served = batches.next()[SITE]
    assert not torch.equal(served, train)
    assert sorted(map(tuple, served.tolist())) == sorted(map(tuple, train.tolist()))
    held_out = batches.held_out()[SITE]
    assert torch.equal(held_out, torch.cat([acts.float() for acts in store.read(split="heldout")]))
    first = [block for block in store.blocks(split="train")]
    inside = torch.cat([block.acts[block.rows < 20] for block in first])
    part = Batches(store, (SITE,), OrderKey(3, len(inside), 300, 240)).next()[SITE]
    assert sorted(map(tuple, part.tolist())) == sorted(map(tuple, inside.tolist())), "20 rows of 12 tokens"


def test_too_little_data_and_the_wrong_site_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(DegenerateInputError, match="one batch needs 2000"):
        train_sae(store, replace(CONFIG, batch=2000), tmp_path)
    with pytest.raises(UnknownSiteError, match="resid_post.7"):
        train_sae(store, replace(CONFIG, site="resid_post.7"), tmp_path)
    with pytest.raises(UnknownSiteError, match="mlp_out.1"):
        train_sae(store, replace(CONFIG, architecture="batchtopk", target_site="mlp_out.1"), tmp_path)
    with pytest.raises(InvalidInputError, match="device='nowhere'"):
        train_sae(store, replace(CONFIG, device="nowhere"), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"k": 0}, "choose 1 <= k <= d_sae"), ({"k": 65}, "k=65, d_sae=64"), ({"batch": 0}, "batch=0"),
        ({"tokens": 1}, "at least one batch"), ({"lr": -1.0}, "lr=-1.0"), ({"lr": float("nan")}, "lr=nan"),
        ({"warmup": 2.0}, "warmup=2.0"), ({"distinct_tokens": 0}, "distinct_tokens=0"), ({"buffer": 1}, "buffer=1"),
        ({"betas": (0.9, 1.0)}, "betas"), ({"aux_k": 0}, "aux_k=0"), ({"dead_after": 0}, "dead_after=0"),
        ({"l1_coefficient": 1.0}, "no effect on architecture 'topk', which has k"), ({"widths": (4,)}, "matryoshka"),
        ({"architecture": "relu"}, r"k=4 has no effect on architecture 'relu'.*one of: batchtopk, matryoshka, topk"),
        ({"architecture": "relu", "k": None, "l1_coefficient": -1.0}, "rewards density"),
        ({"architecture": "jumprelu", "k": None, "bandwidth": 0.0}, "no gradient"),
        ({"architecture": "jumprelu", "k": None, "initial_threshold": -0.1}, "not negative"),
        ({"architecture": "jumprelu", "k": None, "tanh_scale": 2.0}, 'together with penalty="tanh"'),
        ({"frozen_decoder": True}, "no effect on architecture 'topk'"),
        ({"architecture": "matryoshka", "widths": (8, 8)}, "must increase"),
        ({"architecture": "matryoshka", "widths": (8, 65)}, "at most d_sae"),
        ({"architecture": "topk", "target_site": "mlp_out.1"}, "Use 'batchtopk'"),
        ({"architecture": "gated", "k": None, "target_site": "mlp_out.1"}, "Use 'jumprelu'"),
    ],
)  # fmt: skip
def test_settings_that_can_not_be_used_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        replace(CONFIG, **wrong)


def test_every_option_of_an_architecture_can_be_asked_for() -> None:
    jump = SAEConfig(
        architecture="jumprelu",
        bandwidth=0.2,
        initial_threshold=0.5,
        penalty="tanh",
        tanh_scale=3.0,
        l0_coefficient=0.1,
    )
    assert build(jump, "csr") == JumpReLU(0.2, 0.5, "tanh", 3.0)
    assert build(SAEConfig(architecture="jumprelu"), "csr") == JumpReLU(0.05, 1.0, "step", 4.0)
    assert build(SAEConfig(architecture="gated", frozen_decoder=True), "csr") == Gated(frozen_decoder=True)
    assert build(SAEConfig(architecture="gated"), "csr") == Gated()


def test_names_of_architectures() -> None:
    with pytest.raises(UnknownNameError, match="topk"):
        SAEConfig(architecture="top-k")
    assert SAEConfig(architecture="standard") == SAEConfig(architecture="relu")
    assert SAEConfig(architecture="matryoshka_batchtopk", d_sae=64, widths=(8,)).prefixes == (8, 64)
    assert SAEConfig(architecture="matryoshka", d_sae=4, k=2).prefixes == (1, 2, 4)


def test_a_short_jumprelu_run_with_default_settings_is_sparse(store: ActivationStore, tmp_path: Path) -> None:
    """Thresholds that start near zero can't come up in so few steps."""
    config = SAEConfig(architecture="jumprelu", d_sae=128, tokens=60 * 128, batch=128, kernel="csr")
    runs = train_saes(store, [config, replace(config, initial_threshold=0.01)], tmp_path)
    default, from_zero = (run.metrics for run in runs)

    def objective(metrics: dict[str, float]) -> float:
        return D_MODEL * metrics["fvu"] + metrics["l0"]

    assert objective(default) < objective(from_zero)
    assert default["l0"] < 0.6 * from_zero["l0"]
    assert default["fvu"] < 0.9


def test_clipping_bounds_the_step_that_adam_sees() -> None:
    parameters = [torch.zeros(3) for _ in range(2)]
    clipped, plain = (torch.optim.Adam([p], lr=0.1, fused=True) for p in parameters)
    for p in parameters:
        p.grad = torch.tensor([3.0, 4.0, 0.0])
    norm = adam_step(clipped, 0.1, clip=1.0)
    adam_step(plain, 0.1, clip=100.0)
    assert float(norm) == pytest.approx(5)
    first = clipped.state[parameters[0]]["exp_avg"]
    torch.testing.assert_close(first, 0.1 * torch.tensor([0.6, 0.8, 0.0]))
    torch.testing.assert_close(plain.state[parameters[1]]["exp_avg"], 0.1 * torch.tensor([3.0, 4.0, 0.0]))


@pytest.mark.parametrize(
    "change", [{"k": 2.5}, {"betas": (0.9,)}, {"decoder_norm": "none"}, {"seed": 2**70}, {"data_seed": 2**70}]
)
def test_values_that_no_training_can_use_are_refused_at_once(change: dict[str, Any]) -> None:
    config = replace(CONFIG)
    for name, value in change.items():  # as a caller without type checks could
        object.__setattr__(config, name, value)
    with pytest.raises(InvalidInputError, match=next(iter(change)).removeprefix("data_")):
        config.__post_init__()
    with pytest.raises(InvalidInputError, match="l1_coefficient=nan"):
        SAEConfig(architecture="relu", l1_coefficient=float("nan"))


def test_any_seed_of_64_bits_can_be_used(store: ActivationStore, tmp_path: Path) -> None:
    assert train_sae(store, replace(CONFIG, seed=2**62, tokens=300), tmp_path).metrics["steps"] == 3


def test_held_out_tokens_that_are_all_the_same_are_refused_before_training(tmp_path: Path) -> None:
    ids = torch.randint(2, 200, (100, 2), generator=torch.Generator().manual_seed(0))
    ids[9::10] = 7
    store = harvest(tiny_model(), TokenRows(ids), [SITE], tmp_path / "store")
    with pytest.raises(DegenerateInputError, match="no FVU"):
        train_sae(store, replace(CONFIG, batch=10), tmp_path / "sae")


def test_a_site_goes_by_its_transformer_lens_name_too(store: ActivationStore) -> None:
    assert store.site("blocks.1.hook_resid_post") == SITE


def test_a_folder_that_another_process_trains_in_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    with in_use(tmp_path), pytest.raises(InvalidInputError, match="Another process"):
        train_sae(store, CONFIG, tmp_path)


def test_an_sae_that_another_process_finished_meanwhile_is_not_overwritten(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(CONFIG, k=5, tokens=300)

    @contextlib.contextmanager
    def late(path: Path) -> Iterator[None]:
        monkeypatch.undo()
        train_sae(store, other, path)
        with in_use(path):
            yield

    monkeypatch.setattr("workbench.saes.training.train.in_use", late)
    with pytest.raises(MismatchError, match="k=5"):
        train_sae(store, replace(other, k=4), tmp_path)
    monkeypatch.setattr("workbench.saes.training.train.in_use", late)
    assert train_sae(store, other, tmp_path).metrics["steps"] == 3


def test_the_l1_penalty_grows_with_the_root_of_the_width() -> None:
    config = SAEConfig(architecture="gated")
    assert config.sparsity(3600) == pytest.approx(5.0) and config.sparsity(576) == pytest.approx(2.0)
    assert replace(config, l1_coefficient=3.0).sparsity(576) == 3.0
