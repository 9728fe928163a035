"""Training that is stopped, by Ctrl-C or by force, and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.saes.stores import SITE, assert_same_tensors, before_finish, before_step, ctrl_c, small_store
from tests.saes.test_train import CHECKPOINT, CONFIG, EACH
from workbench.activations.store import ActivationStore
from workbench.core.errors import ResourceError
from workbench.saes.training.batches import Batches, OrderKey
from workbench.saes.training.checkpoint import read_checkpoint, write_checkpoint
from workbench.saes.training.kernel_choice import available_kernels
from workbench.saes.training.train import train_sae


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return small_store(tmp_path_factory.mktemp("store"))


def _without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "seconds"}


@pytest.mark.parametrize("kind", EACH)
def test_stopped_and_continued_is_the_same_to_the_bit(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = EACH[kind]
    for folder, stops in (("whole", (27,)), ("cut", (9, 16, 27))):
        for step in stops:
            with monkeypatch.context() as patch:
                before_step(step, ctrl_c, patch)
                with pytest.raises(KeyboardInterrupt) as stopped:
                    train_sae(store, config, tmp_path / folder)
            assert f"step {step + 1} in" in stopped.value.__notes__[0]
    assert_same_tensors(tmp_path / "whole", tmp_path / "cut", CHECKPOINT)
    whole, cut = (read_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert whole is not None and cut is not None
    assert {"exp_avg.W_enc", "exp_avg_sq.b_dec", "step.W_dec", "since_fired", "dead", "threshold"} <= whole[0].keys()
    assert int(whole[0]["since_fired"].max()) > 0
    streams = []
    for _, state in (whole, cut):
        batches = Batches(store, (SITE,), OrderKey.of(config))
        batches.restore(state["stream"])
        streams.append(torch.cat([batches.next()[SITE] for _ in range(10)]))
    assert torch.equal(*streams)
    assert not (tmp_path / "cut" / "cfg.json").exists()
    straight = train_sae(store, config, tmp_path / "straight")
    run = train_sae(store, config, tmp_path / "cut")
    assert_same_tensors(straight.path, run.path)
    assert (straight.path / "metrics.jsonl").read_text() == (run.path / "metrics.jsonl").read_text()
    assert _without_time(straight.metrics) == _without_time(run.metrics)
    assert not (run.path / CHECKPOINT).exists()


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from tests.saes.test_train import CONFIG
from workbench.saes.training import checkpoint, group
from workbench.saes.training.train import train_sae
real, count = os.replace, 0
def dying(*args):
    global count
    count += str(args[1]).endswith("checkpoint.safetensors")
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = dying
group.MAX_CHECKPOINT_TIME_SHARE = 1e9
train_sae(sys.argv[1], replace(CONFIG, checkpoint_seconds=0.0), Path(sys.argv[2]))
"""


def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(store: ActivationStore, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(store.path), str(tmp_path / "cut")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "cut").glob(f".{CHECKPOINT}.*.tmp"))) == 1, "killed while it was writing"
    found = read_checkpoint(tmp_path / "cut")
    assert found is not None and found[1]["step"] == 2
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "half a li')
    run, straight = (train_sae(store, CONFIG, tmp_path / name) for name in ("cut", "straight"))
    assert not list((tmp_path / "cut").glob(".*.tmp"))
    assert_same_tensors(run.path, straight.path)
    assert (straight.path / "metrics.jsonl").read_text() == (run.path / "metrics.jsonl").read_text()


def test_a_second_ctrl_c_stops_at_once(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        ctrl_c()
        ctrl_c()

    before_step(5, twice, monkeypatch)
    # A process that was started in the background of a script ignores SIGINT from the start.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_sae(store, CONFIG, tmp_path / "sae")
        assert not (tmp_path / "sae" / CHECKPOINT).exists()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("moment", ["last step", "saving"])
def test_ctrl_c_at_the_very_end_loses_nothing(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, moment: str
) -> None:
    config = replace(EACH[kind], tokens=500)
    with monkeypatch.context() as patch:
        if moment == "last step":
            before_step(config.steps - 1, ctrl_c, patch)
        else:
            before_finish(ctrl_c, patch)
        with pytest.raises(KeyboardInterrupt) as stopped:
            train_sae(store, config, tmp_path / "cut")
    (note,) = stopped.value.__notes__
    is_saved = (tmp_path / "cut" / CHECKPOINT).is_file()
    assert is_saved == (moment == "last step") == (f"saved: step {config.steps} in {tmp_path / 'cut'}" in note)
    assert (not is_saved) == (note == f"Training is finished in {tmp_path / 'cut'}.")
    before_step(0, lambda: pytest.fail("trained again"), monkeypatch, name="cut")
    run, straight = (train_sae(store, config, tmp_path / name) for name in ("cut", "straight"))
    assert_same_tensors(run.path, straight.path)
    assert _without_time(run.metrics) == _without_time(straight.metrics)
    assert not (run.path / CHECKPOINT).exists()


def _moved_from_a_gpu(folder: Path) -> None:
    """Makes the checkpoint in a folder one of a run that began with the kernel of a GPU."""
    found = read_checkpoint(folder)
    assert found is not None
    weights, state = found
    state["config"]["kernel"] = "triton" if state["config"]["kernel"] != "auto" else "auto"
    write_checkpoint(folder, weights, state | {"kernel": "triton"})


@pytest.mark.parametrize("kernel", ["auto", "csr"])
def test_a_run_goes_on_where_its_first_kernel_does_not(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    config = replace(CONFIG, kernel=kernel, tokens=1000)
    with monkeypatch.context() as patch:
        before_step(5, ctrl_c, patch)
        with pytest.raises(KeyboardInterrupt):
            train_sae(store, config, tmp_path)
    _moved_from_a_gpu(tmp_path)
    if kernel == "auto":
        run = train_sae(store, config, tmp_path)
        assert run.metrics["steps"] == 10
        trained = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["workbench"]
        assert trained["kernel"]["name"] in available_kernels("cpu")
    else:
        with pytest.raises(ResourceError, match=r"kernel='triton' can't run on device 'cpu'.*csr, csr_bf16"):
            train_sae(store, replace(config, kernel="triton"), tmp_path)
