from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.features.test_input_score import SITE, make_store
from tests.features.toys import random_sae
from tests.tiny import tiny_tokenizer
from workbench.activations.store import ActivationStore
from workbench.features.passes.contexts import ContextOptions, top_contexts


@pytest.mark.parametrize(("chosen", "chunk"), [(None, 2048), ([5, 3, 11], 2048), (None, 7)])
def test_contexts_equal_a_slow_search(
    token_store: ActivationStore, monkeypatch: pytest.MonkeyPatch, chosen: list[int] | None, chunk: int
) -> None:
    monkeypatch.setattr("workbench.features.passes.store_pass.CHUNK_TOKENS", chunk)
    store, sae = token_store, random_sae()
    features = torch.arange(40) if chosen is None else torch.tensor(chosen)
    found = top_contexts(store, sae, tiny_tokenizer(), features, SITE, ContextOptions(per_feature=10, min_contexts=5))
    blocks = list(store.blocks(SITE))
    acts = torch.cat([sae.encode(b.acts.float()) for b in blocks])
    rows, tokens = torch.cat([b.rows for b in blocks]), torch.cat([b.tokens for b in blocks])
    assert found.n_tokens == len(acts) == store.rows
    for i, f in enumerate(features.tolist()):
        best = {}
        for a, row, token in zip(acts[:, f].tolist(), rows.tolist(), tokens.tolist(), strict=True):
            if a > 0 and a > best.get(row, (0, 0))[0]:
                best[row] = (a, token)
        slow = sorted(best.items(), key=lambda kv: -kv[1][0])[:10]
        assert int(found.counts[i]) == len(slow)
        assert found.acts[i, : len(slow)].tolist() == pytest.approx([a for _, (a, _) in slow], rel=1e-5)
        assert found.tokens[i, : len(slow)].tolist() == [token for _, (_, token) in slow]
        assert found.rows[i, : len(slow)].tolist() == [row for row, _ in slow]
        assert float(found.frequency[i]) == pytest.approx(float((acts[:, f] > 0).double().mean()), rel=1e-5)
        assert float(found.max_act[i]) == pytest.approx(float(acts[:, f].max()), rel=1e-5)


def test_sharding_does_not_matter(token_store: ActivationStore, tmp_path: Path) -> None:
    sae, all_ = random_sae(), torch.arange(40)
    small, large = token_store, make_store(tmp_path / "s", rows=120, shard_tokens=100_000)
    assert len(small.manifest.shards) > len(large.manifest.shards) == 1
    one, other = (top_contexts(s, sae, tiny_tokenizer(), all_, SITE) for s in (small, large))
    assert torch.equal(one.tokens, other.tokens)
    assert one.texts == other.texts


def test_shown_text_marks_the_activating_token(token_store: ActivationStore) -> None:
    store, sae = token_store, random_sae()
    options = ContextOptions(shown=2, before=3, after=2)
    found = top_contexts(store, sae, tiny_tokenizer(), torch.tensor([4]), SITE, options)
    row = store.token_rows("all")[int(found.rows[0, 0])]
    at = int(found.positions[0, 0])
    assert int(row[at]) == int(found.tokens[0, 0])
    assert f"«{tiny_tokenizer().decode(row[at : at + 1])}»" in found.texts[0][0]
    assert len(found.texts[0]) == 2


def test_limit_stops_at_whole_rows(token_store: ActivationStore) -> None:
    store, sae = token_store, random_sae()
    assert store.manifest.shards[0].kept < 300, "the limit lies beyond the first shard"
    found = top_contexts(store, sae, tiny_tokenizer(), torch.arange(40), SITE, ContextOptions(max_tokens=400))
    assert 300 < found.n_tokens <= 400
    rows = torch.cat([b.rows for b in store.blocks(SITE)])
    assert found.n_tokens in {int((rows < r).sum()) for r in rows.unique().tolist()}
