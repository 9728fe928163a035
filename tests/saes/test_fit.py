from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import D_MODEL, n_hooks, tiny_model
from workbench.core.errors import DegenerateInputError, MismatchError, UnknownSiteError
from workbench.models.model import Model
from workbench.saes.formats.build import build
from workbench.saes.formats.fit_report import FVU_LIMIT, Fit, FitReport
from workbench.saes.formats.load import load_sae
from workbench.saes.formats.placement import _clearly_better, _looks_like, _right_site, check_sae
from workbench.saes.formats.raw import RawSAE

RANK = 10
FAMILIES = ("llama", "gpt2", "neox", "gemma2")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _kept(model: Model, site: str) -> Tensor:
    from workbench.saes.formats.placement import TEXTS

    tokens = model.tokens(list(TEXTS))
    return model.capture(tokens, [site]).flat(site).float()[tokens.mask & (tokens.positions > 0)]


def _principal(model: Model, site: str, rank: int = RANK, scale: float = 1.0, claims: str | None = None) -> Any:
    """Projection on the main directions at a site, as an SAE of +v and -v: what a good SAE of that site does."""
    x = _kept(model, site) * scale
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False).Vh[:rank]
    W = torch.cat([directions, -directions])
    raw = RawSAE(
        activation="relu", W_enc=W.T.contiguous(), b_enc=torch.zeros(len(W)), W_dec=W, b_dec=mean,
        metadata={"hook_name": claims or site},
    )  # fmt: skip
    return build(raw)


def _memory(model: Model, site: str, scale: float = 1.0, claims: str | None = None) -> Any:
    """An SAE that knows every activation of the built-in sentences by heart, and is of no use elsewhere.

    The one feature that is active is the nearest known vector v: `x.v - |v|^2/2` is largest there, and `|v|^2/2` if x
    is v.
    """
    v = _kept(model, site) * scale
    mean = v.mean(0)
    v = v - mean
    half = v.square().sum(1) / 2
    raw = RawSAE(
        activation="topk", k=1, W_enc=v.T.contiguous(), b_enc=-half, W_dec=v / half[:, None], b_dec=mean,
        metadata={"hook_name": claims or site},
    )  # fmt: skip
    return build(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_sae_fits_where_it_was_made(family: str) -> None:
    model = tiny_model(family)
    report = check_sae(model, _principal(model, "resid_post.1", rank=14))
    assert report.ok and report.claimed.fvu < 0.1
    assert report.claimed.l0 == 14, "of each +v and -v one is active"
    assert report.require() is report
    assert n_hooks(model.hf) == 0


@pytest.mark.parametrize(("made", "claims"), [("resid_pre.1", "resid_post.1"), ("mlp_out.0", "attn_out.0")])
def test_the_wrong_site_is_named(model: Model, made: str, claims: str) -> None:
    report = check_sae(model, _memory(model, made, claims=claims))
    assert not report.ok and report.looks_like is not None
    assert report.looks_like.site == made and not report.looks_like.how
    with pytest.raises(
        MismatchError, match=rf"FVU \S+ at {claims}; at {made} it is \S+: this looks like {made}"
    ) as error:
        report.require()
    assert f"site='{made}'" in str(error.value)


def test_a_site_that_is_only_a_little_better_is_not_named(model: Model) -> None:
    """A poor SAE is poor everywhere; the smallest of many numbers proves nothing."""
    report = check_sae(model, _principal(model, "resid_post.1", rank=1))
    assert 0.1 < report.claimed.fvu < FVU_LIMIT and report.others
    assert report.ok


def test_a_lower_place_is_mentioned() -> None:
    here, there = Fit("resid_post.15", "", 0.37, 32.0, 262), Fit("resid_post.16", "", 0.30, 32.0, 262)
    assert FitReport(here, (there,), None).ok
    assert "usable, but at resid_post.16 it is 0.3" in FitReport(here, (there,), None).findings()[0]
    assert FitReport(there, (here,), None).findings()[0].endswith("it fits.")
    assert _looks_like(here, (there,)) is None, "not much lower"
    assert _looks_like(_told("resid_post.9", 0.53, 0.88), (_told("resid_post.7", 0.24, 1.1),)) is None
    assert _looks_like(Fit("resid_post.15", "", 0.61, 32.0, 262), (there,)) is there


@pytest.mark.parametrize("scale", [0.05, 40.0])
def test_the_wrong_scale_is_named(model: Model, scale: float) -> None:
    report = check_sae(model, _memory(model, "resid_post.1", scale=scale))
    assert report.looks_like is not None and report.looks_like.site == "resid_post.1"
    found = float(report.looks_like.how.removeprefix("at scale "))
    assert found == pytest.approx(scale, rel=0.5)
    with pytest.raises(MismatchError, match=r"this looks like resid_post.1 at scale .*Pass scale="):
        report.require()


def test_normed_input_is_named(model: Model) -> None:
    v = _kept(model, "resid_post.1")
    v = v - v.mean(1, keepdim=True)
    v = v / v.std(1, keepdim=True)
    half = v.square().sum(1) / 2
    raw = RawSAE(
        activation="topk", k=1, W_enc=v.T.contiguous(), b_enc=-half, W_dec=v / half[:, None], b_dec=torch.zeros(D_MODEL),
        metadata={"hook_name": "resid_post.1"},
    )  # fmt: skip
    report = check_sae(model, build(raw))
    assert report.looks_like is not None and report.looks_like.how == "with layer-normed input"
    assert check_sae(model, build(RawSAE(**{**vars(raw), "norm": "layer_norm"}))).ok


def test_an_sae_of_nothing_is_refused_without_a_guess(model: Model) -> None:
    g = torch.Generator().manual_seed(0)
    raw = RawSAE(
        activation="topk", k=6, W_enc=torch.randn(D_MODEL, 40, generator=g), b_enc=torch.randn(40, generator=g),
        W_dec=torch.randn(40, D_MODEL, generator=g), b_dec=torch.randn(D_MODEL, generator=g),
        metadata={"hook_name": "resid_post.1"},
    )  # fmt: skip
    report = check_sae(model, build(raw))
    assert report.looks_like is None and not report.ok
    with pytest.raises(MismatchError, match="worse than the mean of the tokens"):
        report.require()


def test_transcoders_are_checked_against_what_they_write(model: Model) -> None:
    x, y = _kept(model, "resid_mid.1"), _kept(model, "mlp_out.1")
    A = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    W = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])

    def made(target: str) -> Any:
        raw = RawSAE(
            activation="relu", W_enc=W.T.contiguous(), b_enc=torch.zeros(len(W)), W_dec=W @ A[:-1], b_dec=A[-1],
            transcodes=True, subtracts_b_dec=False,
            metadata={"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": target},
        )  # fmt: skip
        return build(raw)

    right = check_sae(model, made("blocks.1.hook_mlp_out"))
    expected = (y - torch.cat([x, torch.ones(len(x), 1)], 1) @ A).square().sum() / (y - y.mean(0)).square().sum()
    assert right.claimed.fvu == pytest.approx(float(expected), rel=0.02)
    assert right.ok
    assert check_sae(model, made("blocks.1.hook_resid_post")).claimed.fvu > right.claimed.fvu


def test_loading_with_a_model_checks(model: Model, tmp_path: Path) -> None:
    _memory(model, "resid_pre.1", claims="resid_post.1").save_model(tmp_path)
    load_sae(tmp_path)
    with pytest.raises(MismatchError, match="this looks like resid_pre.1"):
        load_sae(tmp_path, model=model)
    assert load_sae(tmp_path, model=model, check=False).cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    mended = load_sae(tmp_path, model=model, site="resid_pre.1")
    assert check_sae(model, mended).ok


def test_the_factor_that_is_named_mends_the_sae(model: Model, tmp_path: Path) -> None:
    _memory(model, "resid_post.1", scale=0.125).save_model(tmp_path)
    with pytest.raises(MismatchError, match="Pass scale="):
        load_sae(tmp_path, model=model)
    assert check_sae(model, load_sae(tmp_path, model=model, scale=0.125)).ok


def test_sinks_and_first_tokens_do_not_count(model: Model) -> None:
    sae = _principal(model, "resid_post.1", rank=14)
    quiet = check_sae(model, sae)

    def sink(_module: object, _args: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 5] = 1e5
        return out

    handle = model.hf.model.layers[1].register_forward_hook(sink)
    try:
        loud = check_sae(model, sae, model.tokens(["abcdefghijklmnop", "qrstuvwxyzabcdef"]).ids)
    finally:
        handle.remove()
    assert loud.ok and loud.claimed.n_tokens == 2 * (16 - 2)
    assert quiet.ok


def test_given_batches_and_bf16(model: Model) -> None:
    sae = _principal(model, "resid_post.1", rank=14)
    ids = torch.randint(2, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    by_ids = check_sae(model, sae, ids)
    assert by_ids.claimed.n_tokens == 4 * 11
    assert check_sae(model, sae.to(torch.bfloat16)).claimed.fvu == pytest.approx(
        check_sae(model, sae).claimed.fvu, abs=0.02
    )
    with pytest.raises(DegenerateInputError, match="fewer than two"):
        check_sae(model, sae, ["a"])


def test_a_site_that_the_model_lacks(model: Model) -> None:
    with pytest.raises(UnknownSiteError, match="layer 9"):
        check_sae(model, _principal(model, "resid_post.1", claims="resid_post.9"))


def test_the_report_shows_itself(model: Model) -> None:
    report = check_sae(model, _principal(model, "resid_post.1", rank=3))
    assert "resid_post.1" in repr(report) and "<table" in report._repr_html_()
    assert report.section().metrics["fvu"] == report.claimed.fvu


def _told(site: str, fvu: float, standardised: float, how: str = "", spread: float = 0.1, texts: int = 12) -> Fit:
    """A fit whose texts differ from each other by `spread`, in the same way in every fit."""
    shape = [1 + spread * (-1) ** i for i in range(texts)]
    parts = [tuple(value * s / texts for s in shape) for value in (fvu, standardised)]
    return Fit(site, how, fvu, 32.0, 260, *parts)


def test_a_site_that_is_clearly_better_by_both_measures_is_named_and_by_one_it_is_not() -> None:
    here = _told("resid_post.14", 0.38, 0.68)
    right = _told("resid_post.15", 0.31, 0.53)
    assert _clearly_better(here, (right, _told("resid_post.16", 0.37, 0.66))) is right
    assert _clearly_better(right, (here,)) is None
    outliers, blind = _told("resid_post.8", 0.20, 0.90), _told("resid_post.16", 0.40, 0.50)
    assert _clearly_better(here, (outliers, blind)) is None, "one dimension outweighs the others; too much in most"
    assert _clearly_better(_told("resid_post.3", 0.5, 1.9), (_told("resid_post.4", 0.4, 1.2),)) is None, "untrained"
    assert _clearly_better(here, (_told("resid_post.14", 0.31, 0.53, "at scale 2"),)) is None
    uneven = Fit("x.1", "", 0.31, 32.0, 260, (0.0, 0.14) * 6, (0.0, 0.2) * 6)
    assert _clearly_better(here, (uneven,)) is None, "lower on average, and higher on half of the texts"
    few = _told("resid_post.14", 0.38, 0.68, texts=4)
    assert _clearly_better(few, (_told("resid_post.15", 0.31, 0.53, texts=4),)) is None
    report = FitReport(here, (right,), right)
    assert not report.ok
    with pytest.raises(MismatchError, match=r"this looks like resid_post.15.*site='resid_post.15'"):
        report.require()


def test_where_an_sae_is_of_no_use_all_dimensions_alike_decide() -> None:
    """The measured numbers of an SAE of layer 20 that claims layer 8, where few dimensions hold all the variance."""
    here, made = _told("resid_post.8", 0.369, 1.85), _told("resid_post.20", 0.413, 0.66)
    outliers, far_off = _told("resid_post.7", 0.15, 1.2), _told("resid_post.21", 0.45, 0.70)
    assert _right_site(here, (outliers, far_off, made)) is made
    assert _right_site(here, (outliers,)) is None, "of no use there either"
    assert _right_site(here, (_told("resid_post.20", 1.1, 0.66),)) is None
    uneven = Fit("resid_post.20", "", 0.4, 32.0, 260, (0.0, 0.06) * 6, (0.0, 0.16) * 6)
    assert _right_site(_told("resid_post.8", 0.37, 1.05), (uneven,)) is None, "not clearly better"
    assert _right_site(here, (_told("resid_post.8", 0.2, 0.1, "at scale 2"), made)) is None, "it is the scale"
    assert _right_site(_told("resid_post.8", 0.369, 0.95), (made,)) is None and _right_site(here, ()) is None


def test_an_sae_that_explains_less_than_nothing_of_the_dimensions_is_not_called_usable() -> None:
    there = _told("resid_post.9", 0.30, 1.2)
    report = FitReport(_told("resid_post.8", 0.37, 1.85), (there,), None)
    assert "not usable: on average over the dimensions its error is 1.85 times their variance" in report.findings()[0]
    assert "fits" not in report.findings()[0] and repr(report).startswith("FitReport(of no use: ")
    assert report.ok, "an SAE that was hardly trained is like this at its own site"
    fine = FitReport(_told("resid_post.8", 0.37, 0.95), (there,), None)
    assert "usable, but at resid_post.9" in fine.findings()[0] and repr(fine).startswith("FitReport(ok: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_standardised_measure_is_the_mean_over_dimensions(family: str) -> None:
    model = tiny_model(family)
    sae = _principal(model, "resid_post.1", rank=3)
    found = check_sae(model, sae).claimed
    x = _kept(model, "resid_post.1")
    error, variance = (x - sae.decode(sae.encode(x))).square().sum(0), (x - x.mean(0)).square().sum(0)
    assert found.standardised == pytest.approx(float((error / variance).mean()), rel=1e-4)
    assert sum(found.by_text) == pytest.approx(found.fvu, rel=1e-4)
    assert found.standardised != pytest.approx(found.fvu, rel=1e-2)


@pytest.mark.slow
@pytest.mark.embedded
def test_on_a_real_model_no_right_site_is_refused_and_one_layer_off_is(embedded: Model) -> None:
    """Layer 9 has no outlier dimensions and layer 8 has: its FVU alone is lower there."""
    for layer, rank in ((9, 5), (9, 200), (15, 5), (15, 50), (26, 50)):
        report = check_sae(embedded, _principal(embedded, f"resid_post.{layer}", rank=rank))
        assert report.ok, report
    moved = check_sae(embedded, _principal(embedded, "resid_post.15", rank=50, claims="resid_post.14"))
    assert not moved.ok and moved.looks_like is not None
    assert moved.looks_like.site == "resid_post.15"


@pytest.mark.embedded
def test_on_a_real_model_the_right_site_is_named(embedded: Model) -> None:
    assert check_sae(embedded, _principal(embedded, "resid_post.15", rank=200)).ok
    for made, claims in (
        ("mlp_out.15", "attn_out.15"),
        ("resid_post.15", "resid_post.14"),  # FVU 0.09 there, and 0.009 at its own site
        ("resid_post.20", "resid_post.8"),
        ("resid_post.12", "resid_post.2"),
    ):
        moved = check_sae(embedded, _principal(embedded, made, rank=200, claims=claims))
        assert moved.looks_like is not None and moved.looks_like.place == made, claims
