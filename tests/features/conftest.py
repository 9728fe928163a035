from __future__ import annotations

import pytest

from tests.features.test_input_score import make_store
from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.activations.store import ActivationStore
from workbench.features import ContextOptions, FeatureTable, ScoreOptions, score_features


@pytest.fixture(scope="session")
def token_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Activations of the tiny model over 120 rows of random tokens, in several shards; only to be read."""
    return make_store(tmp_path_factory.mktemp("tokens") / "s", rows=120)


@pytest.fixture(scope="session")
def table(token_store: ActivationStore) -> FeatureTable:
    """Scores of the 40 features of `random_sae`; only to be read."""
    options = ScoreOptions(k=5, rows=16, random_directions=12, contexts=ContextOptions(per_feature=20))
    return score_features(tiny_model(), random_sae(), token_store, options=options)
