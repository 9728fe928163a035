from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.features.corpus import SITE, Planted, corpus, corpus_store
from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.sources import TextFiles, TokenRows
from workbench.activations.store import ActivationStore, Block
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.features.passes import sampling
from workbench.features.passes import store_pass as passes
from workbench.features.passes.coactivation import CoActivationSample
from workbench.features.passes.repeats import repeated_documents
from workbench.features.passes.sampling import MISSING, BestEntries, uniform
from workbench.features.passes.store_pass import Chunk, SAEFeatures
from workbench.features.passes.windows import OUTSIDE, FeatureWindows, WindowOptions, bin_edges, collect_windows

SMALL = WindowOptions(top=6, sample=9, before=5, after=3, background=20)
UNITS = Planted((
    lambda ids, p: float(ids[p] % 7) * (p % 3 == 0),
    lambda ids, p: float(ids[p] == 5),
    lambda ids, p: 0.0,
    lambda ids, p: 0.25 + ids[p] / 8,
))  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return corpus_store(tmp_path_factory.mktemp("w") / "s", rows=120)


@pytest.fixture(scope="module")
def found(store: ActivationStore) -> FeatureWindows:
    return collect_windows(store, SITE, UNITS, SMALL)


def slow(store: ActivationStore, unit: int) -> dict[int, dict[int, float]]:
    """Activation of a unit at each kept position of each row."""
    ids, values = corpus(120).tolist(), {}
    for block in store.blocks(SITE):
        for row, position in zip(block.rows.tolist(), block.positions.tolist(), strict=True):
            values.setdefault(row, {})[position] = UNITS.functions[unit](ids[row], position)
    return values


@pytest.mark.parametrize("unit", [0, 1, 3])
def test_counts_and_strongest_windows_equal_a_slow_search(
    store: ActivationStore, found: FeatureWindows, unit: int
) -> None:
    values = slow(store, unit)
    flat = [v for row in values.values() for v in row.values()]
    assert found.n_tokens == len(flat) == store.rows
    assert int(found.active[unit]) == sum(v > 0 for v in flat)
    assert float(found.max_act[unit]) == max(flat)
    peaks = {row: max(row_values.values()) for row, row_values in values.items()}
    best = sorted((row for row in peaks if peaks[row] > 0), key=lambda row: (-peaks[row], row))[:6]
    assert found.top.row[unit][: len(best)].tolist() == best
    for i, row in enumerate(best):
        position = min(p for p, v in values[row].items() if v == peaks[row])
        assert int(found.top.position[unit, i]) == position
        for offset, value in zip(range(-5, 4), found.top.values[unit, i].tolist(), strict=True):
            at = position + offset
            if not 0 <= at < 24:
                assert value == OUTSIDE
            elif at not in values[row]:
                assert value != value, "a token that the store left out has no value"
            else:
                assert value == values[row][at]


def test_a_dead_unit_has_no_windows(found: FeatureWindows) -> None:
    assert int(found.active[2]) == 0
    assert bool((found.top.row[2] == MISSING).all())
    with pytest.raises(DegenerateInputError, match="never active"):
        found.decile_edges(2)


def test_the_sample_is_drawn_evenly_from_the_active_rows(store: ActivationStore, found: FeatureWindows) -> None:
    active = {row for row, v in slow(store, 0).items() if max(v.values()) > 0}
    drawn = found.sample.row[0].tolist()
    assert len(set(drawn)) == 9
    assert set(drawn) <= active
    assert max(drawn) > 60, "not just the first rows"
    everything = collect_windows(store, SITE, UNITS, WindowOptions(top=1, sample=200, before=0, after=0))
    assert set(everything.sample.row[0].tolist()) - {MISSING} == active
    assert int(everything.sample.counts[0]) == len(active)
    assert set(drawn) != set(everything.top.row[0].tolist())


def test_background_windows_say_who_is_silent_in_them(store: ActivationStore, found: FeatureWindows) -> None:
    assert len(found.background.active) == 20
    for unit in range(4):
        values = slow(store, unit)
        for where, active in zip(
            found.background.where.tolist(), found.background.active[:, unit].tolist(), strict=True
        ):
            row, position, token, document, low, high, start, end = where
            inside = [v for p, v in values[row].items() if low <= p < high]
            assert active == (max(inside) > 0)
            assert (low, high, start, end) == (max(position - 5, 0), min(position + 4, 24), 0, 23)
            assert token == corpus(120)[row, position]
            assert document == row


@pytest.mark.parametrize(
    ("shard_tokens", "chunk", "buffer"), [(200, 2048, 2**16), (100_000, 2048, 2**16), (2048, 24, 1), (2048, 100, 30)]
)
def test_shards_and_chunks_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: FeatureWindows, shard_tokens: int, chunk: int, buffer: int
) -> None:
    monkeypatch.setattr(passes, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(sampling, "BUFFER_ENTRIES", buffer)
    other = collect_windows(corpus_store(tmp_path / "s", 120, shard_tokens=shard_tokens), SITE, UNITS, SMALL)
    assert same(other, found)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(torch.nan_to_num(a.double(), -7.0), torch.nan_to_num(b.double(), -7.0))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return a == b


def test_an_sae_is_read_as_it_encodes_and_subsets_agree(token_store: ActivationStore) -> None:
    store, sae = token_store, random_sae()
    every = collect_windows(store, SITE, SAEFeatures(sae, torch.arange(40)), SMALL)
    acts = torch.cat([sae.encode(b.acts.float()) for b in store.blocks(SITE)])
    assert every.active.tolist() == (acts > 0).sum(0).tolist()
    torch.testing.assert_close(every.max_act, acts.amax(0))
    some = collect_windows(store, SITE, SAEFeatures(sae, torch.tensor([7, 3])), SMALL)
    assert torch.equal(some.sample.row, every.sample.row[[7, 3]]), "a feature's sample does not depend on the others"
    assert torch.equal(some.top.row, every.top.row[[7, 3]])


def test_kept_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    sizes = []
    for rows in (60, 240):
        store = corpus_store(tmp_path / str(rows), rows)
        made = collect_windows(store, SITE, UNITS, WindowOptions(top=4, sample=4, background=8, co_entries=64))
        tables = (made.top.values, made.sample.values, made.histogram, made.background.active)
        sizes.append([t.shape for t in tables])
        assert len(made.co.value) <= 64
        assert len(made.row_ids) <= 8 + 4 * 8
    assert sizes[0] == sizes[1]
    assert WindowOptions().memory(2000) - WindowOptions().memory(1000) == WindowOptions().memory(3000) - (
        WindowOptions().memory(2000)
    )


def test_histograms_count_every_activation_and_deciles_follow_them(
    store: ActivationStore, found: FeatureWindows
) -> None:
    flat = torch.tensor([v for row in slow(store, 3).values() for v in row.values()])
    edges = bin_edges()
    assert torch.equal(edges, edges.sort().values)
    for i in found.histogram[3].nonzero().flatten().tolist():
        assert int(found.histogram[3, i]) == int(((flat >= edges[i]) & (flat < edges[i + 1])).sum())
    assert int(found.histogram[3].sum()) == int((flat > 0).sum())
    peaks = torch.tensor([max(row.values()) for row in slow(store, 3).values()])
    exact = peaks.quantile(torch.arange(0.9, 0.05, -0.1))
    assert bool(((found.decile_edges(3) / exact - 1).abs() < 0.1).all())
    assert bool((found.decile_edges(3).diff() <= 0).all())


def test_windows_end_where_their_document_ends() -> None:
    documents = torch.tensor([4, 4, 4, 9, 9, 9])
    positions = torch.tensor([1, 2, 3, 5, 6, 7])
    zeros = torch.zeros(6, dtype=torch.long)
    block = Block(torch.zeros(6, 2, dtype=torch.bfloat16), zeros, positions, zeros, documents)
    low, high = Chunk(block, torch.zeros(1, 9, dtype=torch.long), 0).documents()
    assert low.tolist() == [0, 0, 0, 5, 5, 5], "the dropped first token belongs to the first document"
    assert high.tolist() == [3, 3, 3, 8, 8, 8], "the dropped token between them to neither"


def test_limits_are_checked(store: ActivationStore) -> None:
    with pytest.raises(InvalidInputError, match="negative"):
        WindowOptions(top=-1)
    short = collect_windows(store, SITE, UNITS, WindowOptions(max_tokens=100))
    assert 60 < short.n_tokens <= 100


def test_equal_keys_keep_what_came_first() -> None:
    table = BestEntries(1, 2, 1, 1)
    for where in range(5):
        wanted = table.wants(torch.tensor([0]), torch.tensor([1.0]).double())
        if bool(wanted.any()):
            entry = torch.tensor([0]), torch.tensor([1.0]), torch.tensor([[where]]), torch.tensor([[float(where)]])
            table.add(*entry)
            table.flush()
    assert table.where.flatten().tolist() == [0, 1]
    assert table.values.flatten().tolist() == [0.0, 1.0]


def test_draws_are_uniform_and_differ_by_group() -> None:
    items = torch.arange(20_000)
    drawn = uniform(items, 5)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    assert torch.histc(drawn.float(), 10, 0, 1).min() > 1800
    assert abs(float(torch.corrcoef(torch.stack([drawn, uniform(items, 6)]))[0, 1])) < 0.03
    assert not torch.equal(drawn, uniform(items, 5, seed=1))


def test_thinning_keeps_whole_rows_whatever_the_chunks() -> None:
    row = torch.arange(64).repeat_interleave(3)
    whole, parts = CoActivationSample(2, 100, 0), CoActivationSample(2, 100, 0)
    token, feature, value = torch.arange(192), torch.arange(192) % 2, torch.rand(192)
    whole.add(row, token, feature, value, row)
    for i in range(0, 192, 12):
        some = slice(i, i + 12)
        parts.add(row[some], token[some], feature[some], value[some], row[some])
    assert same(whole.result(), parts.result())
    made = whole.result()
    assert made.share in (0.5, 0.25)
    assert made.n_tokens == len(made.value) <= 100
    assert int(made.token.max()) == made.n_tokens - 1


def test_documents_that_are_there_twice_give_windows_once(found: FeatureWindows, tmp_path: Path) -> None:
    options = HarvestOptions(shard_tokens=2048, batch_tokens=2048)
    source = TokenRows(corpus(120).repeat(3, 1), batch_rows=8)
    thrice = collect_windows(harvest(tiny_model(), source, [SITE], tmp_path / "s", options=options), SITE, UNITS, SMALL)
    assert thrice.n_tokens == 3 * found.n_tokens and torch.equal(thrice.active, 3 * found.active)
    assert torch.equal(thrice.peak_histogram, found.peak_histogram)
    for name in ("top", "sample"):
        for column in ("row", "position", "document", "values"):
            once, again = (getattr(getattr(x, name), column) for x in (found, thrice))
            torch.testing.assert_close(again, once, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(thrice.background.where, found.background.where)


def test_a_repeated_document_is_found_wherever_its_rows_begin(tmp_path: Path) -> None:
    texts = ["one two three four", "x y", "one two three four", "one two three five", "one two three four", "the end"]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = TextFiles(tmp_path / "d.jsonl", context=9, batch_rows=2)
    store = harvest(tiny_model(), source, [SITE], tmp_path / "s", options=HarvestOptions(shard_tokens=27))
    assert len(store.manifest.shards) > 1
    assert repeated_documents(store).tolist() == [2, 4]
