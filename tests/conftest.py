from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch

from workbench.models.model import Model


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded() -> Model:
    """The embedded model in fp32, loaded once per run."""
    from workbench.models.loading import load_model

    return load_model("embedded", dtype="float32")
