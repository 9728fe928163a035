from __future__ import annotations

import os

import pytest

from tests.glitch import planted


@pytest.fixture(scope="session", autouse=True)
def _train_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        planted.SHARED.append(tmp_path_factory.getbasetemp().parent)
