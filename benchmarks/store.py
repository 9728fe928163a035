"""Our activation store and shuffle buffer beside those of sae_lens: same rows, one process.

    python benchmarks/store.py [--rows 784] [--context 128] [--d 576] [--threads 1] [--repeats 3]

Writing goes from activations in memory to a finished store on disk, through `harvest` here and through
`CacheActivationsRunner.run` there, with a model that hands out random activations. Reading goes from that store to fp32
rows in memory. Then one full turn of each shuffle buffer, filled before. Prints tokens per second and ratios, after
checking that both stores hold the same values and that a buffer serves each row once. Exits with 1 if they don't.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.ring import RingBuffer
from workbench.activations.sources import TokenRows
from workbench.activations.store import ActivationStore, open_store
from workbench.core.tokenizer import NoTokenizer

SITE = "resid_post.0"
PROMPTS, BATCHES_PER_SHARD = 16, 8
RINGS, BLOCK = (16_384, 262_144), 4096


class _Acts:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def flat(self, site: str) -> torch.Tensor:  # noqa: ARG002
        return self.x


class RandomModel:
    """Hands out given activations, in order of the rows that the ids name."""

    name, fingerprint, tokenizer, dtype = "random", "0", NoTokenizer(), torch.float32

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def resolve(self, site: str) -> str:
        return site

    def width(self, site: str) -> int:  # noqa: ARG002
        return self.x.shape[-1]

    def capture(self, ids: torch.Tensor, sites: list[str]) -> _Acts:  # noqa: ARG002
        first = int(ids[0, 0])
        return _Acts(self.x[first : first + len(ids)])


def write_ours(x: torch.Tensor, folder: Path, dtype: str) -> ActivationStore:
    ids = torch.arange(len(x))[:, None].expand(x.shape[:2]).contiguous()
    tokens = PROMPTS * x.shape[1]
    options = HarvestOptions(shard_tokens=BATCHES_PER_SHARD * tokens, batch_tokens=tokens, dtype=dtype)
    return harvest(RandomModel(x), TokenRows(ids, batch_rows=PROMPTS), [SITE], folder, options=options)


def write_peer(x: torch.Tensor, folder: Path) -> None:
    """The runner of sae_lens from its own configuration; only the model's batches are ours."""
    from datasets import Array2D, Features, Sequence, Value
    from sae_lens.cache_activations_runner import CacheActivationsRunner
    from sae_lens.config import CacheActivationsRunnerConfig

    rows, context, d = x.shape
    config = CacheActivationsRunnerConfig(
        dataset_path="random", model_name="random", model_batch_size=PROMPTS, hook_name=SITE, d_in=d,
        training_tokens=rows * context, context_size=context, new_cached_activations_path=str(folder), shuffle=False,
        buffer_size_gb=BATCHES_PER_SHARD * PROMPTS * context * d * 4 / 1e9, device="cpu",
    )  # fmt: skip
    runner = object.__new__(CacheActivationsRunner)
    runner.cfg, runner.context_size = config, context
    tokens = Sequence(Value(dtype="int32"), length=context)
    runner.features = Features({SITE: Array2D(shape=(context, d), dtype=config.dtype), "token_ids": tokens})
    runner.activations_store = _PeerBatches(x)  # type: ignore[assignment]
    runner.run()


class _PeerBatches:
    def __init__(self, x: torch.Tensor) -> None:
        self._parts = iter(x.split(PROMPTS))

    def get_raw_llm_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        part = next(self._parts)
        return part.flatten(0, 1), torch.zeros(part.shape[0] * part.shape[1], dtype=torch.long)


def peer_reader(x: torch.Tensor, folder: Path) -> Any:
    """The cached-activations path of sae_lens' ActivationsStore, without the model that its constructor wants."""
    from sae_lens.training.activations_store import ActivationsStore

    store = object.__new__(ActivationsStore)
    store.cached_activations_path, store.hook_name, store.device = str(folder), SITE, torch.device("cpu")
    _, store.context_size, store.d_in = x.shape
    store.store_batch_size_prompts, store.dtype = PROMPTS, torch.float32  # type: ignore[assignment]
    store.cached_activation_dataset = store.load_cached_activation_dataset()
    return store


def read_peer(store: Any, out: torch.Tensor) -> int:
    n = 0
    while True:
        try:
            part, _ = store.get_raw_llm_batch(raise_on_epoch_end=True)
        except StopIteration:
            return n
        out[n : n + len(part)] = part
        n += len(part)


def read_ours(store: ActivationStore, out: torch.Tensor) -> int:
    n = 0
    for part in store.read(SITE):
        out[n : n + len(part)] = part
        n += len(part)
    return n


def timed(work: Any, *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work(*arguments)
    return result, time.perf_counter() - start


def compare_stores(x: torch.Tensor, repeats: int, scratch: Path) -> bool:
    n = x.shape[0] * x.shape[1]
    names = ("sae_lens", "bfloat16", "int8")
    write = dict.fromkeys(names, float("inf"))
    first, again = dict(write), dict(write)
    same = True
    kept = x[:, 1:].flatten(0, 1)  # a harvest leaves out the first position
    out = torch.empty(n, x.shape[2])
    for repeat in range(repeats):
        for name in names:
            folder, peer = scratch / f"{name}-{repeat}", name == "sae_lens"
            _, seconds = timed(write_peer, x, folder) if peer else timed(write_ours, x, folder, name)
            write[name] = min(write[name], seconds)
            reader = peer_reader(x, folder) if peer else open_store(folder)
            for best in (first, again):
                rows, seconds = timed(read_peer if peer else read_ours, reader, out)
                best[name] = min(best[name], seconds * n / rows)
            same &= _same(out[:rows], kept if rows < n else x.flatten(0, 1), name)
    for title, best in (("write", write), ("first read", first), ("later reads", again)):
        for name in names:
            print(f"{title:12} {name:10} {n / best[name] / 1e3:8.0f} ktok/s   {best['sae_lens'] / best[name]:5.1f}x")
    return same


def _same(found: torch.Tensor, expected: torch.Tensor, name: str) -> bool:
    if name == "int8":
        return bool((found - expected).square().sum() / expected.square().sum() < 2e-4)
    return torch.equal(found, expected)


def compare_rings(d: int, capacity: int) -> bool:
    from sae_lens.training.mixing_buffer import mixing_buffer

    block = torch.randn(BLOCK, d).bfloat16()
    turn = capacity // 2

    def blocks(_epoch: int = 0) -> Iterator[torch.Tensor]:
        while True:
            yield block

    ours = RingBuffer(blocks, capacity)
    peer = mixing_buffer(capacity, BLOCK, blocks())
    for _ in range(turn // BLOCK):  # both are filled, and their first half is served
        next(peer)
        ours.next(BLOCK)
    _, our_time = timed(lambda: [len(ours.next(BLOCK)) for _ in range(turn // BLOCK)])
    _, peer_time = timed(lambda: [len(next(peer)) for _ in range(turn // BLOCK)])
    print(f"ring of {capacity:7,}  sae_lens {turn / peer_time / 1e3:8.0f} ktok/s")
    print(f"ring of {capacity:7,}  ours     {turn / our_time / 1e3:8.0f} ktok/s   {peer_time / our_time:5.1f}x")
    return _serves_each_once(d)


def _serves_each_once(d: int, rows: int = 3 * BLOCK) -> bool:
    x = torch.randn(rows, d).bfloat16()
    served = RingBuffer(lambda _epoch: x.split(BLOCK), BLOCK).next(rows)
    keys = [sorted(row.tobytes() for row in part.view(torch.int16).numpy()) for part in (x, served)]
    return keys[0] == keys[1]


def main() -> int:
    import datasets

    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 784), ("context", 128), ("d", 576), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    size = chosen.rows - chosen.rows % (PROMPTS * BATCHES_PER_SHARD)  # the peer drops what fills no buffer
    if not size:
        parser.error(f"--rows {chosen.rows}: give at least {PROMPTS * BATCHES_PER_SHARD}")
    x = torch.randn(size, chosen.context, chosen.d, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    with tempfile.TemporaryDirectory() as scratch:
        fine = compare_stores(x, chosen.repeats, Path(scratch))
    fine &= all([compare_rings(chosen.d, capacity) for capacity in RINGS])
    print("same values, each row once" if fine else "THE VALUES DIFFER")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
