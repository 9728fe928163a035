from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.probes.linear import ProbeOptions, fit_probe, mean_pool


def _blobs(n: int = 80, d: int = 6, gap: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    x = torch.randn(n, d, generator=generator)
    x[:, 2] += gap * (2 * y - 1)
    return x, y


@pytest.mark.parametrize("d", [6, 200])
def test_probe_minimises_the_penalised_log_loss(d: int) -> None:
    # The gradient of l2/2 |w|^2 + sum log loss, on standardised activations, is zero only at the solution.
    x, y = _blobs(d=d)
    l2 = 0.7
    probe = fit_probe(x, y, "resid_post.0", options=ProbeOptions(l2=l2, folds=0))
    scale, centre = x.double().std(0, correction=0), x.double().mean(0)
    w = probe.w.double() * scale
    z = (x.double() - centre) / scale
    residual = torch.sigmoid(z @ w + probe.b + centre @ probe.w.double()) - y
    assert (z.T @ residual + l2 * w).abs().max() < 1e-3
    assert residual.sum().abs() < 1e-3


def test_scale_and_shift_of_a_dimension_do_not_matter() -> None:
    x, y = _blobs()
    moved = x.clone()
    moved[:, 1] = 5000 * moved[:, 1] + 20000
    options = ProbeOptions(folds=0)
    a, b = fit_probe(x, y, "s", options=options).logit(x), fit_probe(moved, y, "s", options=options).logit(moved)
    torch.testing.assert_close(a, b, atol=2e-2, rtol=1e-2)


def test_cross_validation_shows_signal_and_shuffled_labels_show_none() -> None:
    x, y = _blobs(n=200, d=50)
    probe = fit_probe(x, y, "s", groups=tuple("ab"[int(i)] for i in y))
    assert probe.accuracy is not None and probe.shuffled is not None
    assert probe.accuracy.low > 0.85
    assert not probe.shuffled.excludes(0.5)
    assert [name for name, _ in probe.groups] == ["a", "b"]
    assert probe.groups[0][1].n == 100


def test_cross_validated_accuracy_is_not_the_accuracy_on_rows_seen() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 300, generator=generator), torch.arange(60) % 2
    probe = fit_probe(x, y, "s")
    assert torch.equal(probe.predict(x), y)
    assert probe.accuracy is not None and probe.accuracy.value < 0.8


def test_pooling_ignores_padding_whatever_it_holds() -> None:
    model = tiny_model()
    batch = model.tokens(["abcdef", "gh"])
    x = model.capture(batch, ["resid_post.1"])["resid_post.1"].clone()
    keep = TokenPolicy.of_batch(batch).kept(batch)
    before = mean_pool(x, keep)
    x[1, :4] = float("nan")
    assert torch.equal(mean_pool(x, keep), before)
    alone = model.tokens(["gh"])
    single = mean_pool(model.capture(alone, ["resid_post.1"])["resid_post.1"], TokenPolicy.of_batch(alone).kept(alone))
    torch.testing.assert_close(before[1:], single, atol=1e-5, rtol=1e-4)


def test_the_first_token_specials_and_sinks_are_not_read() -> None:
    model = tiny_model()
    batch = model.tokens(["abcdef", "gh"], bos=True)
    keep = TokenPolicy.of_batch(batch).kept(batch)
    assert keep.tolist() == [[False] + [True] * 6, [False] * 5 + [True] * 2]
    x = torch.ones(2, 7, 4)
    x[0, 3] = 1000.0
    limit = TokenPolicy.of_batch(batch, x).max_norm
    assert limit == pytest.approx(20.0)  # 10 times the median norm, sqrt(4)
    assert TokenPolicy(limit, TokenPolicy.of_batch(batch).special_ids).kept(batch, x).sum() == keep.sum() - 1


def test_wrong_input_is_refused() -> None:
    x, y = _blobs()
    with pytest.raises(ShapeError, match="pair up"):
        fit_probe(x, y[:-1], "s")
    with pytest.raises(InvalidInputError, match="give 0 and 1"):
        fit_probe(x, y + 1, "s")
    with pytest.raises(DegenerateInputError, match="both classes"):
        fit_probe(x, torch.zeros_like(y), "s")
    with pytest.raises(DegenerateInputError, match="folds"):
        fit_probe(x[:6], y[:6], "s")
    with pytest.raises(DegenerateInputError, match="nothing to pool"):
        TokenPolicy().kept(tiny_model().tokens(["a", "bcd"]))
    with pytest.raises(InvalidInputError):
        ProbeOptions(l2=0.0)
    constant = torch.cat([x, torch.ones(80, 1)], dim=1)
    assert torch.isfinite(fit_probe(constant, y, "s").w).all()
