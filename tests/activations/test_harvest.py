from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.tiny import as_user, tiny_model, tiny_tokenizer
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.manifest import MANIFEST
from workbench.activations.plan import estimate_harvest
from workbench.activations.ring import RingBuffer
from workbench.activations.sources import SelfText, TextFiles, TokenRows
from workbench.activations.store import open_store
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    UnknownSiteError,
)
from workbench.core.records import load_json, save_json
from workbench.models.model import Model

SITE = "resid_post.1"
SMALL = HarvestOptions(shard_tokens=80, batch_tokens=40)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _rows(n: int = 30, context: int = 10) -> torch.Tensor:
    ids = torch.randint(2, 200, (n, context), generator=torch.Generator().manual_seed(0))
    ids[3, 4] = _eos()
    return ids


def _eos() -> int:
    end = tiny_tokenizer().eos_token_id
    assert isinstance(end, int)
    return end


def _source(n: int = 30) -> TokenRows:
    return TokenRows(_rows(n), batch_rows=4)


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_stored_activations_are_those_of_the_model_at_the_kept_tokens(model: Model, tmp_path: Path) -> None:
    store = harvest(model, _source(), [SITE, "mlp_out.0"], tmp_path / "s", options=SMALL)
    ids = _rows()
    for site in (SITE, "mlp_out.0"):
        acts = model.capture(ids, [site])[site]
        for block in store.blocks(site):
            assert torch.equal(block.tokens, ids[block.rows, block.positions])
            torch.testing.assert_close(
                block.acts.float(), acts[block.rows, block.positions].bfloat16().float(), rtol=0.02, atol=0.02
            )
    kept = {(int(r), int(p)) for b in store.blocks(SITE) for r, p in zip(b.rows, b.positions, strict=True)}
    assert not any(p == 0 for _, p in kept)
    assert (3, 4) not in kept, "special tokens are left out"
    m = store.manifest
    assert m.dropped["first of its row"] == 30
    assert m.dropped["special token"] == 1
    assert m.kept + sum(m.dropped.values()) == m.n_tokens == 300
    assert len(m.shards) > 3
    assert torch.equal(store.token_rows("all"), ids)
    norms = torch.cat([b.float().norm(dim=1) for b in store.read(SITE)])
    assert m.sites[SITE].mean_norm == pytest.approx(float(norms.mean()), rel=1e-4)


def test_sinks_are_dropped_by_norm() -> None:
    x = torch.ones(2, 5, 3)
    x[1, 3] = 11.0
    x[:, 0] = 1000.0
    ids = torch.full((2, 5), 7)
    rule = TokenPolicy.estimate(x, ids, (1,))
    expected = torch.ones(2, 5, dtype=torch.bool)
    expected[:, 0] = False
    expected[1, 3] = False
    assert torch.equal(rule.mask(x, ids), expected)
    x[1, 3] = 9.9
    expected[1, 3] = True
    assert torch.equal(rule.mask(x, ids), expected)


def test_splits_share_no_row_and_cover_all(model: Model, tmp_path: Path) -> None:
    store = harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    train, held_out = ({int(r) for b in store.blocks(SITE, split) for r in b.rows} for split in ("train", "heldout"))
    assert held_out == {9, 19, 29}
    assert train | held_out == set(range(30))
    assert not train & held_out
    assert torch.equal(store.token_rows("heldout"), _rows()[[9, 19, 29]])
    assert len(store.token_rows("train")) == 27
    for read in (
        store.token_rows,
        lambda split: next(store.read(SITE, split)),
        lambda split: store.block(0, SITE, split),
    ):
        with as_user(), pytest.raises(InvalidInputError, match=r"split='held_out'\).* Did you mean heldout\?"):
            read("held_out")


def test_aligned_blocks_hold_the_same_tokens_at_every_site(model: Model, tmp_path: Path) -> None:
    sites = [SITE, "mlp_out.0"]
    store = harvest(model, _source(), sites, tmp_path / "s", options=SMALL)
    for index in range(len(store.manifest.shards)):
        for split in ("all", "train", "heldout"):
            found = store.aligned_block(index, sites, split)
            assert list(found) == sites
            for site in sites:
                assert torch.equal(found[site], store.block(index, site, split).acts)
    with pytest.raises(UnknownSiteError, match="mlp_out.0"):
        store.aligned_block(0, ["mlp_out.1"])


def test_every_kept_token_is_served_once_per_epoch_from_the_store(model: Model, tmp_path: Path) -> None:
    store = harvest(model, _source(), [SITE, "mlp_out.0"], tmp_path / "s", options=SMALL)

    def epoch(number: int) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(store.manifest.shards), generator=torch.Generator().manual_seed(number))
        for index in order.tolist():
            yield store.aligned_block(index, [SITE, "mlp_out.0"], "train")

    def hashes(x: torch.Tensor) -> list[bytes]:
        return sorted(row.tobytes() for row in x.view(torch.int16).numpy())

    ring = RingBuffer(epoch, 50, seed=1)
    n = sum(len(block) for block in store.read(SITE, "train"))
    for _ in range(2):
        batch = ring.next(n)
        for site, x in batch.items():
            assert hashes(x) == hashes(torch.cat(list(store.read(site, "train"))))


KILLED = """
import sys
from pathlib import Path
from tests.activations.test_harvest import SITE, SMALL
from tests.tiny import tiny_model
from dataclasses import replace
from workbench.activations import harvest as h
from workbench.activations.sources import SelfText
import os, signal, workbench.engine.folder as module
real, written, after = module.os.replace, [], float(sys.argv[2])
def killing(partial, target):
    written.append(target)
    if len(written) > after:
        os.kill(os.getpid(), signal.SIGKILL)
    real(partial, target)
    if len(written) == after:
        os.kill(os.getpid(), signal.SIGKILL)
module.os.replace = killing
options = replace(SMALL, dtype="int8")
h.harvest(tiny_model(), SelfText(tokens=240, context=10, batch_size=4), [SITE], Path(sys.argv[1]), options=options)
"""


def test_a_harvest_killed_twice_equals_an_uninterrupted_one_to_the_byte(tmp_path: Path) -> None:
    def killed(after: float) -> int:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(after)]
        return subprocess.run(
            command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode

    assert killed(1) == -signal.SIGKILL, "a shard, but not in the manifest"
    assert killed(2.5) == -signal.SIGKILL, "in the middle of the second shard"
    assert len(list((tmp_path / "killed").glob(".*.tmp"))) == 1
    with pytest.raises(DegenerateInputError, match="not finished"):
        open_store(tmp_path / "killed")
    before = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in ("shard-00000.safetensors",)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, options = SelfText(tokens=240, context=10, batch_size=4), replace(SMALL, dtype="int8")
    harvest(tiny_model(), source, [SITE], tmp_path / "killed", options=options)
    harvest(tiny_model(), source, [SITE], tmp_path / "whole", options=options)
    torch.set_num_threads(threads)
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")
    after = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in before}
    assert before == after, "a finished shard is kept, not made again"


def test_a_finished_harvest_does_not_run_the_model(model: Model, tmp_path: Path) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    twin = tiny_model()
    twin.hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    assert harvest(twin, _source(), [SITE], tmp_path / "s", options=SMALL).rows > 0


def test_another_harvest_in_the_same_folder_is_refused(model: Model, tmp_path: Path) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    with pytest.raises(MismatchError, match="source"):
        harvest(model, _source(20), [SITE], tmp_path / "s", options=SMALL)
    with pytest.raises(MismatchError, match="sites"):
        harvest(model, _source(), ["mlp_out.0"], tmp_path / "s", options=SMALL)
    with pytest.raises(MismatchError, match=r"harvest of tiny-llama \(weights .*asked for tiny-llama \(weights"):
        harvest(tiny_model(seed=5), _source(), [SITE], tmp_path / "s", options=SMALL)
    swapped = load_json(tmp_path / "s" / MANIFEST)
    save_json(tmp_path / "s" / MANIFEST, swapped | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(MismatchError, match="tokenizer_sha256"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    save_json(tmp_path / "s" / MANIFEST, swapped | {"packing": swapped["packing"] | {"separator": "a full stop"}})
    with pytest.raises(MismatchError, match="packing.*a full stop"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    save_json(tmp_path / "s" / MANIFEST, swapped | {"packing": None, "tokenizer_sha256": None})
    assert harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL).manifest.packing is None, "older stores"
    save_json(tmp_path / "s" / MANIFEST, swapped | {"model_dtype": "bfloat16"})
    with pytest.raises(MismatchError, match="model_dtype is 'bfloat16', asked for 'float32'"):
        harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    with pytest.raises(MismatchError, match=r"harvested from tiny-llama \(weights .*, not from tiny-llama \(weights"):
        open_store(tmp_path / "s").check_model(tiny_model(seed=5))
    with pytest.raises(
        MismatchError, match="harvested from tiny-llama, not from tiny-gpt2. Load tiny-llama, or harvest"
    ):
        open_store(tmp_path / "s").check_model(tiny_model("gpt2"))
    with pytest.raises(MismatchError, match="holds a harvest of tiny-llama, asked for tiny-gpt2. Use another folder"):
        harvest(tiny_model("gpt2"), _source(), [SITE], tmp_path / "s", options=SMALL)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_longer_than_the_positions_are_refused_before_text_is_written(family: str) -> None:
    model = tiny_model(family)
    room = model.max_tokens
    assert room is not None
    with pytest.raises(InvalidInputError, match=f"Rows of {room + 1} tokens .* the {room} positions"):
        estimate_harvest(model, SelfText(tokens=room + 1, context=room + 1), ["resid_post.0"])


def test_wrong_sites_are_refused_before_anything_is_written(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UnknownSiteError, match="layer 9"):
        harvest(model, _source(), ["resid_post.9"], tmp_path / "s")
    with pytest.raises(InvalidInputError, match="got one text; give a list"):
        harvest(model, _source(), SITE, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_manifests_can_not_name_files_elsewhere(model: Model, tmp_path: Path) -> None:
    harvest(model, _source(), [SITE], tmp_path / "s", options=SMALL)
    file = tmp_path / "s" / "manifest.json"
    file.write_text(file.read_text("utf-8").replace("shard-00000", "../shard-00000"), "utf-8")
    with pytest.raises(CorruptFileError, match="plain file name"):
        open_store(tmp_path / "s")
    with pytest.raises(MissingFileError, match="workbench harvest"):
        open_store(tmp_path / "nothing")


def test_a_store_says_that_its_source_ended_early_and_repeats(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh " * 10)
    store = harvest(model, TextFiles(tmp_path / "a.txt", tokens=1000, context=9), [SITE], tmp_path / "s", options=SMALL)
    assert repr(store).endswith(
        f"The source ended after {store.manifest.n_tokens} of the 1000 tokens that were asked for.)"
    )
    twice = harvest(model, TokenRows(_rows(6).repeat(2, 1), batch_rows=4), [SITE], tmp_path / "t", options=SMALL)
    assert repr(twice).endswith(", 50.0% of rows repeat an earlier one)")
    assert "repeat" not in repr(harvest(model, _source(), [SITE], tmp_path / "u", options=SMALL))


def test_the_store_names_what_it_has(model: Model, tmp_path: Path) -> None:
    store = harvest(model, _source(), [SITE, "mlp_out.0"], tmp_path / "s", options=SMALL)
    with pytest.raises(UnknownSiteError, match="mlp_out.0"):
        store.site("mlp_out.1")
    with pytest.raises(UnknownSiteError, match="No site was named"):
        store.site()


def test_positions_of_very_long_rows_do_not_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.activations.harvest.MOST_INT16", 8)
    model, ids = tiny_model(), torch.arange(2, 42).view(2, 20)
    store = harvest(model, TokenRows(ids), ["resid_post.1"], tmp_path / "s")
    assert store.block(0).positions.max() == 19
    raw = safetensors.torch.load_file(tmp_path / "s" / store.manifest.shards[0].file)
    assert raw["position"].dtype == torch.int32
