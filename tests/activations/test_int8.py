from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.activations.test_harvest import SITE, SMALL, _source
from tests.tiny import tiny_model
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.quant import Int8Code
from workbench.activations.sources import TextFiles
from workbench.activations.store import open_store
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.metrics import fvu
from workbench.models.model import Model

INT8 = HarvestOptions(shard_tokens=80, batch_tokens=40, dtype="int8")


def _outliers(n: int = 2000, d: int = 64) -> torch.Tensor:
    """Channels of very different width and mean, as in a residual stream."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 1.5, d)
    x[:, -1] += 88
    return x


def test_standardised_int8_loses_less_than_one_scale_per_token() -> None:
    x = _outliers()
    code = Int8Code.estimate(x)
    assert code.fvu(x) < 2e-4
    plain = Int8Code(torch.zeros(64), torch.ones(64))
    worst = [float(fvu(x[:, :1], c.decode(*c.encode(x)).float()[:, :1])) for c in (code, plain)]
    assert worst[0] < 2e-4 and worst[1] > 1e-2, "the narrowest channel drowns without"
    assert float(fvu(x, code.decode(*code.encode(x)).float())) == pytest.approx(code.fvu(x), rel=1e-3)


def test_a_row_depends_on_no_other_and_extremes_survive() -> None:
    x = _outliers()
    code = Int8Code.estimate(x)
    q, scale = code.encode(x)
    assert torch.equal(code.encode(x[700:701])[0], q[700:701])
    assert int(q.abs().amax(dim=1).min()) >= 126
    at_mean = code.mean[None]
    assert torch.equal(code.decode(*code.encode(at_mean)), at_mean.bfloat16())
    far = code.mean[None] + 1e9 * code.std
    assert torch.isfinite(code.decode(*code.encode(far))).all(), "a scale beyond float16 is cut off"
    with pytest.raises(DegenerateInputError, match="at least 2"):
        Int8Code.estimate(x[:1])


def test_the_reader_gives_the_activations_of_a_bfloat16_store(tmp_path: Path) -> None:
    model = tiny_model()
    sites = [SITE, "mlp_out.0"]
    exact = harvest(model, _source(), sites, tmp_path / "exact", options=SMALL)
    store = harvest(model, _source(), sites, tmp_path / "s", options=INT8)
    assert open_store(tmp_path / "s").manifest.dtype == "int8"
    for site in sites:
        for split in ("all", "train", "heldout"):
            a, b = torch.cat(list(exact.read(site, split))).float(), torch.cat(list(store.read(site, split)))
            assert b.dtype == torch.bfloat16
            assert float(fvu(a, b.float())) < 2e-4
        stats = store.manifest.sites[site]
        assert stats.int8_fvu is not None and 0 < stats.int8_fvu < 2e-4
        assert stats.mean_norm == pytest.approx(exact.manifest.sites[site].mean_norm)
        sample = next(exact.read(site)).float()
        assert stats.channel_mean == pytest.approx(sample.mean(0).tolist()), "the first shard and no more"
    small, large = (sum(f.stat().st_size for f in (tmp_path / n).glob("shard*")) for n in ("s", "exact"))
    assert small < 0.8 * large, "ids and headers are most of so narrow a store"
    first = store.block(1, SITE)
    assert torch.equal(first.tokens, exact.block(1, SITE).tokens)
    with pytest.raises(MismatchError, match="dtype is 'int8'"):
        harvest(model, _source(), sites, tmp_path / "s", options=SMALL)
    with pytest.raises(InvalidInputError, match="int4"):
        HarvestOptions(dtype="int4")


@pytest.mark.slow
@pytest.mark.embedded
def test_int8_of_the_middle_layer_loses_less_than_two_in_ten_thousand(embedded: Model, tmp_path: Path) -> None:
    text = Path(__file__).parents[2] / "docs" / "coming-from.md"
    source = TextFiles(_as_text(text, tmp_path), tokens=4096, context=128, batch_rows=8)
    store = harvest(embedded, source, ["resid_post.15"], tmp_path / "s", options=HarvestOptions(dtype="int8"))
    found = store.manifest.sites["resid_post.15"].int8_fvu
    assert found is not None and 1e-6 < found < 2e-4


def _as_text(file: Path, folder: Path) -> Path:
    copy = folder / "text.txt"
    copy.write_text(file.read_text("utf-8"), "utf-8")
    return copy


def test_activations_that_never_vary_are_stored_without_loss() -> None:
    x = torch.full((5, 3), 2.0)
    code = Int8Code.estimate(x)
    assert code.fvu(x) == 0.0 and torch.equal(code.decode(*code.encode(x)).float(), x)
