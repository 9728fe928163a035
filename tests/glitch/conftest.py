from __future__ import annotations

import pytest

from tests.glitch import planted


@pytest.fixture(scope="session", autouse=True)
def _train_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    planted.share(tmp_path_factory)
