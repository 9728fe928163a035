"""Every architecture and normalisation of sae_lens against sae_lens itself, all parameters random."""

from __future__ import annotations

import pytest
import torch

from tests.interventions.builders import ARCHITECTURES, D_SAE, NORMALISATIONS, sae_lens_sae
from tests.tiny import D_MODEL
from workbench.bases.sae import as_basis
from workbench.core.errors import MismatchError, ShapeError
from workbench.interventions.op import Where
from workbench.interventions.saes import SAEAblate, SAEAdd, SAEAddMax, SAEClamp, SAEScale

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
ALL = pytest.mark.parametrize(
    ("architecture", "normalisation", "b_dec_in"),
    [(a, n, True) for a in ARCHITECTURES for n in NORMALISATIONS]
    + [("standard", "none", False), ("gated", "layer_norm", False)],
)


def hidden(n: int = 6, seed: int = 0) -> torch.Tensor:
    """Activations with a mean and sizes of their own, so that every normalisation matters."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, D_MODEL, generator=g) + 0.7) * torch.linspace(0.5, 4, n)[:, None]


def test_a_transcoder_is_not_edited_where_it_reads() -> None:
    h = hidden()
    sae = sae_lens_sae("standard", "none")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    for make in (
        lambda: SAEAblate(sae, [1]),
        lambda: SAEScale(sae, [1], 2.0),
        lambda: SAEClamp(sae, [1], 2.0),
        lambda: SAEAdd(sae, [1], 2.0, error="drop"),
        lambda: SAEAddMax(sae, h[0], 2.0),
    ):
        with pytest.raises(MismatchError, match=r"it reads resid_mid\.1 and writes mlp_out\.1"):
            make()
    torch.testing.assert_close(SAEAdd(sae, [1], 2.0)(h), h + 2.0 * sae.W_dec[1])
    sae.cfg.metadata.hook_name_out = sae.cfg.metadata.hook_name
    SAEAblate(sae, [1])


@ALL
def test_a_clamp_that_keeps_the_error_equals_the_difference_of_two_decodings(
    architecture: str, normalisation: str, b_dec_in: bool
) -> None:
    sae = sae_lens_sae(architecture, normalisation, b_dec_in=b_dec_in)
    h, features, value = hidden(), [2, 11, 30], torch.tensor([4.0, 0.0, 2.5])
    acts = sae.encode(h)
    x_hat = sae.decode(acts)
    changed = acts.clone()
    changed[:, features] = value
    sae.encode(h)  # sae_lens decodes with what its last encode left behind
    x_changed = sae.decode(changed)
    torch.testing.assert_close(SAEClamp(sae, features, value)(h), h + x_changed - x_hat, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(SAEClamp(sae, features, value, error="drop")(h), x_changed, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(x_changed, h + x_changed - x_hat, atol=1e-2)


@ALL
def test_features_of_each_row_equal_runs_of_one_row(architecture: str, normalisation: str, b_dec_in: bool) -> None:
    sae = sae_lens_sae(architecture, normalisation, b_dec_in=b_dec_in)
    h = hidden(5)
    where = Where(torch.tensor([0, 2, 1, 0, 2]), torch.tensor([0, 0, 1, 1, 2]))
    features = torch.tensor([[1, 4], [4, 39], [8, 1]])
    values = torch.tensor([[3.0, 0.0], [1.0, 2.0], [0.5, 6.0]])
    each = torch.tensor([3.0, 0.5, 2.0])
    for error in ("keep", "drop"):
        made = [
            (
                SAEClamp(sae, features, values, error=error),
                lambda r, e=error: SAEClamp(sae, features[r], values[r], error=e),
            ),
            (
                SAEClamp(sae, features, each, error=error),
                lambda r, e=error: SAEClamp(sae, features[r], float(each[r]), error=e),
            ),
            (
                SAEClamp(sae, features[0], values, error=error),
                lambda r, e=error: SAEClamp(sae, features[0], values[r], error=e),
            ),
            (
                SAEScale(sae, features, values, error=error),
                lambda r, e=error: SAEScale(sae, features[r], values[r], error=e),
            ),
            (
                SAEAdd(sae, features, each, error=error),
                lambda r, e=error: SAEAdd(sae, features[r], float(each[r]), error=e),
            ),
            (SAEAblate(sae, features, error=error), lambda r, e=error: SAEAblate(sae, features[r], error=e)),
        ]
        for op, single in made:
            together = op(h, where)
            for i, row in enumerate(where.rows.tolist()):
                alone = single(row)(h[i : i + 1])
                torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)
            # Rows that are taken keep their own features and values.
            taken = op.take(torch.tensor([2, 0]))
            again = taken(h[[1, 0]], Where(torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long)))
            torch.testing.assert_close(again, together[[1, 0]], **CLOSE)


@ALL
def test_the_largest_activation_is_that_of_each_token_in_units_of_the_stream(
    architecture: str, normalisation: str, b_dec_in: bool
) -> None:
    sae = sae_lens_sae(architecture, normalisation, b_dec_in=b_dec_in)
    h, s, f = hidden(), 3.0, 5
    a_max = sae.encode(h).amax(dim=1, keepdim=True)
    acts = torch.zeros(len(h), D_SAE)
    base = as_basis(sae).decode(acts, h)
    acts[:, f] = (s * a_max)[:, 0]
    # a + s a_max on feature f, decoded, against the same without: what the paper adds, whatever the normalisation.
    torch.testing.assert_close(
        SAEAddMax.of_features(sae, [f], s)(h), h + as_basis(sae).decode(acts, h) - base, atol=2e-4, rtol=1e-4
    )


def test_values_that_do_not_fit_the_features_are_refused_when_they_are_given() -> None:
    sae = sae_lens_sae()
    for features, value in (
        ([0, 1], torch.ones(3)),
        (torch.tensor([[0, 1], [2, 3]]), torch.ones(3)),
        ([0, 1], torch.ones(2, 3)),
    ):
        for op in (SAEClamp, SAEScale, SAEAdd):
            with pytest.raises(ShapeError, match="does not fit"):
                op(sae, features, value)
