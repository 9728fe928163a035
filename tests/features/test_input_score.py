from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.features.toys import byte_ids
from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore
from workbench.core.errors import ShapeError
from workbench.features.passes.contexts import MISSING
from workbench.features.scores.input_score import input_score
from workbench.models.model import Model

SITE = "resid_post.1"


def make_store(
    folder: Path, rows: int = 60, shard_tokens: int = 256, site: str = SITE, model: Model | None = None
) -> ActivationStore:
    ids = torch.randint(2, 258, (rows, 16), generator=torch.Generator().manual_seed(1))
    options = HarvestOptions(shard_tokens=shard_tokens, batch_tokens=128)
    return harvest(model or tiny_model(), TokenRows(ids, batch_rows=8), [site], folder, options=options)


def test_repeated_tokens_count_each_time() -> None:
    assert input_score(torch.tensor([[7, 7, 9, 3]]), torch.tensor([[7, 9]]), 4).tolist() == [0.75]


def test_too_few_contexts_give_nan_and_missing_ones_do_not_count() -> None:
    tokens = torch.tensor([[7, 3, MISSING], [7, MISSING, MISSING]])
    scores = input_score(tokens, torch.tensor([[7], [7]]), min_contexts=2)
    assert scores[0] == 0.5
    assert scores[1].isnan()


def test_tokens_match_by_id_whatever_their_text() -> None:
    underscore, space = byte_ids("_")[0], byte_ids(" ")[0]
    scores = input_score(torch.tensor([[underscore, space]]), torch.tensor([[underscore, space]]), 2)
    assert scores.tolist() == [1.0]


def test_features_must_pair_up() -> None:
    with pytest.raises(ShapeError, match="pair up"):
        input_score(torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
