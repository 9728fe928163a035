"""From a model to an exported SAE without a network, and twice to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import SelfText
from workbench.core.records import to_jsonable
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions, evaluate_sae
from workbench.saes.formats.load import load_sae, sae_lens_module
from workbench.saes.training.train import train_sae

STEPS = 50


def pipeline(folder: Path) -> dict[str, str]:
    """Harvest, training, evaluation and the export to sae_lens; hashes of all that they leave behind."""
    torch.set_num_threads(1)
    model = tiny_model()
    source = SelfText(tokens=2000, context=20, batch_size=10)
    store = harvest(model, source, ["resid_post.1"], folder / "acts", options=HarvestOptions(shard_tokens=600))
    config = SAEConfig(architecture="batchtopk", d_sae=48, k=4, tokens=STEPS * 64, batch=64, kernel="csr")
    run = train_sae(store, config, folder / "sae")
    report = evaluate_sae(model, load_sae(run.path), store, options=EvalOptions(max_rows=6))
    sae_lens_module().SAE.load_from_disk(run.path).save_model(folder / "export")
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    found["manifest"] = hashlib.sha256((folder / "acts" / "manifest.json").read_bytes()).hexdigest()
    found["report"] = hashlib.sha256(json.dumps(to_jsonable(report)).encode()).hexdigest()
    assert run.metrics["steps"] == STEPS
    return found


def no_network(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise AssertionError("the network was asked for something")


ELSEWHERE = """
import json, socket, sys
from pathlib import Path
from tests.saes.test_pipeline import no_network, pipeline
socket.socket.connect = socket.getaddrinfo = no_network
print(json.dumps(pipeline(Path(sys.argv[1]))))
"""


@pytest.mark.slow
def test_two_processes_without_a_network_end_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    threads = torch.get_num_threads()
    here = pipeline(tmp_path / "here")
    torch.set_num_threads(threads)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    other = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "there")], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(other.stdout.splitlines()[-1]) == here
    assert {"acts/shard-00000.safetensors", "sae/sae_weights.safetensors", "export/sae_weights.safetensors"} <= set(
        here
    )
