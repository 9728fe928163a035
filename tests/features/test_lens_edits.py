"""What lenses read in a planted model, the edits with their directions, and their files in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import workbench as wb
from tests.features.lenstoys import exact, linear_model, mixed_rows, planted, token_rows
from tests.tiny import D_MODEL, n_hooks, tiny_model
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    UnknownNameError,
    WidthError,
)
from workbench.features import TokenVectors, export_lens
from workbench.features.lenses.places import distant_sites
from workbench.interventions.intervention import Intervention
from workbench.models.model import Model


def said(model: Model, text: str, edit: Intervention | None = None) -> str:
    with model.plan(edit or Intervention()):
        best = int(model.logits(text)[0].argmax())
    return model.tokenizer.decode([best])


# A planted model.


def test_the_lens_reads_a_concept_before_it_is_an_answer_and_its_controls_do_not() -> None:
    model = planted()
    assert [said(model, text) for text in ("a", "xb")] == ["p", "q"]
    lens = wb.fit_lens(model, "jacobian", mixed_rows(), skip_first=2)
    frames = [lens.read(model, text, target=answer).frame() for text, answer in (("xa", "p"), ("xb", "q"))]
    for frame in frames:
        at = frame[(frame.site == "resid_post.1") & (frame["rank"] == 0)].set_index("lens")
        assert at.target_rank["jacobian"] == at.target_rank["half A"] == at.target_rank["half B"] == 0
        assert at.token_out["jacobian"] in "pq" and at.target_rank["logit"] > 2
    chance = [
        float(f[(f.site == "resid_post.1") & (f.lens == name) & (f["rank"] == 0)].target_rank.iloc[0])
        for f in frames for name in ("rows permuted", "random map")
    ]  # fmt: skip
    assert sum(chance) / len(chance) > 20, "at chance it would be 129"
    early = frames[0][(frames[0].site == "resid_post.0") & (frames[0]["rank"] == 0)].set_index("lens")
    assert early.target_rank["jacobian"] == 0, "through both blocks"


def test_exchanging_two_coordinates_flips_the_answer_and_those_of_other_tokens_do_not() -> None:
    model = planted()
    directions = wb.jacobian_lens(model, mixed_rows(), skip_first=2).rows(["p", "q", "x", "y"])
    for text, other in (("xa", "q"), ("xb", "p")):
        own = "p" if other == "q" else "q"
        for edit in (
            directions.swap("p", "q", sites=["resid_post.1"]),
            directions.exchange(own, other, sites=["resid_post.1"]),
            directions.clamp(model, text, "p", "q", sites=["resid_post.1"]),
            directions.clamp(model, text, "p", "q"),
        ):
            assert said(model, text, edit) == other
        assert said(model, text, directions.swap("x", "y", sites=["resid_post.1"])) == own
        assert said(model, text, directions.ablate(own, sites=["resid_post.1"])) != own
        assert said(model, text, directions.ablate("x", sites=["resid_post.1"])) == own
        assert said(model, text, directions.steer(other, 4.0, sites=["resid_post.1"])) == other
    logit = wb.fit_lens(model, "logit").rows(model, ["p", "q"])
    assert said(model, "xa", logit.swap("p", "q", sites=["resid_post.1"])) == "p", (
        "the logit lens has no such direction"
    )
    assert n_hooks(model.hf) == 0


def test_two_live_swaps_undo_each_other_and_two_clamps_are_one() -> None:
    model, eye = linear_model(*torch.zeros(3, D_MODEL, D_MODEL)), torch.eye(D_MODEL)
    plane = {site: eye[[0, 1]] + 0.2 * eye[[2, 3]] for site in ("resid_post.0", "resid_post.1")}
    directions = TokenVectors(tokens={89: "x", 90: "y"}, vectors=plane)
    edits = {
        "none": Intervention(), "one swap": directions.swap("x", "y", sites=["resid_post.0"]),
        "two swaps": directions.swap("x", "y"),
        "one clamp": directions.clamp(model, "abc", "x", "y", sites=["resid_post.1"]),
        "two clamps": directions.clamp(model, "abc", "x", "y"),
    }  # fmt: skip
    runs = {}
    for name, edit in edits.items():
        with model.plan(edit):
            runs[name] = model.logits("abc", keep="all")
    torch.testing.assert_close(runs["two swaps"], runs["none"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(runs["two clamps"], runs["one clamp"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(runs["one clamp"], runs["one swap"], atol=1e-5, rtol=1e-5)
    assert float((runs["one swap"] - runs["none"]).abs().max()) > 0.1


def test_edits_are_those_of_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    v, h = 30 * torch.randn(2, D_MODEL, generator=generator), torch.randn(5, D_MODEL, generator=generator)
    directions = TokenVectors(tokens={89: "x", 90: "y"}, vectors={"resid_post.1": v}, norms={"resid_post.1": 7.0})
    (swap, half, none, exchange, steer, ablate) = (
        edit.edits[0].op
        for edit in (
            directions.swap("x", "y"), directions.swap("x", "y", 0.5), directions.swap("x", "y", 0.0),
            directions.exchange("x", "y"), directions.steer("x", 2.0), directions.ablate("y"),
        )
    )  # fmt: skip
    plane = v.T.double()
    c = h.double() @ torch.linalg.pinv(plane).T
    change = ((c.flip(1) - c) @ plane.T).float()
    torch.testing.assert_close(swap(h), h + change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half(h), h + 0.5 * change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(swap(swap(h)), h, atol=1e-5, rtol=1e-5)
    assert torch.equal(none(h), h)
    basis = torch.linalg.qr(plane).Q.float()
    outside = lambda x: x - x @ basis @ basis.T  # noqa: E731
    torch.testing.assert_close(outside(swap(h)), outside(h), atol=1e-5, rtol=1e-5)
    s, t = (row / row.norm() for row in v)
    torch.testing.assert_close(exchange(h), h - (h @ s)[:, None] * s + (h @ s)[:, None] * t, atol=1e-5, rtol=1e-5)
    assert float((exchange(h) - swap(h)).abs().max()) > 0.1
    torch.testing.assert_close(steer(h), h + 14 * s, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ablate(h), h - (h @ t)[:, None] * t, atol=1e-5, rtol=1e-5)
    alone = TokenVectors(tokens={89: "x"}, vectors={"resid_post.1": v[:1]}).steer("x").edits[0].op
    torch.testing.assert_close(alone(h), h + h.norm(dim=1, keepdim=True) * s, atol=1e-5, rtol=1e-5)


def test_directions_that_can_not_be_told_apart_are_refused() -> None:
    a, b = torch.eye(D_MODEL)[:2]
    near = lambda cosine: TokenVectors(  # noqa: E731
        tokens={89: "x", 90: "y"},
        vectors={"resid_post.1": torch.stack([a, -cosine * a + (1 - cosine**2) ** 0.5 * b])},
    )
    with pytest.raises(DegenerateInputError, match="span no plane"):
        near(0.9991).swap("x", "y")
    with pytest.warns(UserWarning, match="small error"):
        near(0.995).swap("x", "y")
    assert near(0.98).swap("x", "y").edits
    with pytest.raises(UnknownNameError, match="'z'"):
        near(0.5).ablate("z")
    with pytest.raises(UnknownNameError, match="resid_post.0"):
        near(0.5).ablate("x", sites=["resid_post.0"])
    model = exact()
    with pytest.raises(InvalidInputError, match="2 tokens"):
        wb.fit_lens(model, "logit").rows(model, ["xy"])
    directions = wb.fit_lens(model, "logit").rows(model, ["x", "y"])
    assert directions.ablate("x").made_for == model.fingerprint
    with pytest.raises(MismatchError, match="of this model"):
        directions.clamp(tiny_model("llama"), "a", "x", "y")


def test_an_edit_is_saved_like_any_other(tmp_path: Path) -> None:
    model = planted()
    edit = wb.jacobian_lens(model, mixed_rows(), skip_first=2).rows(["p", "q"]).clamp(model, "xa", "p", "q")
    edit.save(tmp_path)
    assert said(model, "xa", Intervention.load(tmp_path)) == "q"


# The table.


def test_the_table_of_a_reading_has_its_controls_and_the_last_site_is_the_model() -> None:
    model = tiny_model("gemma2")
    rows = token_rows(*[12] * 8)
    lens, beside = wb.fit_lens(model, "jacobian", rows, skip_first=2, prompts=4), wb.fit_lens(model, "regression", rows)
    read = lens.read(model, ["a dog sat", "b"], positions=None, target="x", beside={"regression": beside}, k=3)
    frame = read.frame()
    assert list(frame.columns[:12]) == ["layer", "site", "pos", "token", "lens", "rank", "token_out", "logprob",
                                        "target_rank", "entropy", "kl_to_output", "n_fit"]  # fmt: skip
    names = ["jacobian", "logit", "regression", "rows permuted", "random map", "half A", "half B"]
    assert list(read.readings) == names and set(frame.lens) == set(names)
    assert frame.groupby("lens").n_fit.first().to_dict() == {
        "jacobian": 4, "logit": 0, "regression": 88, "rows permuted": 4, "random map": 4, "half A": 2, "half B": 2
    }  # fmt: skip
    last = frame[frame.site == "resid_post.2"]
    want = model.logits("b", keep="all")[0, -1].log_softmax(-1).topk(3)
    for name in names:
        assert last[last.lens == name].logprob.tolist()[-3:] == pytest.approx(want.values.tolist(), abs=1e-5)
    x = model.capture("b", ["resid_post.0"])["resid_post.0"][0] @ beside.weights["resid_post.0"].T
    mapped = model.head.all(model.site_map["final_norm"].module(x + beside.biases["resid_post.0"])).log_softmax(-1)
    at = frame[(frame.site == "resid_post.0") & (frame.lens == "regression")]
    assert at.logprob.tolist()[-3:] == pytest.approx(mapped[0].topk(3).values.tolist(), abs=1e-4)
    assert "bias alone" in beside.read(model, "ab", positions=None).readings
    assert read.half_overlap() is not None and "Lenses of either half" in " ".join(read.findings())
    assert read.headline().difference is not None and "warm" in read._repr_html_()
    alone = wb.fit_lens(model, "logit").read(model, "ab")
    assert alone.headline().verdict == "not measured" and list(alone.readings) == ["logit"]


def test_a_lens_without_a_whole_fit_reads_the_same() -> None:
    model = exact()
    assert distant_sites(list("abcde")) == {"a": "c", "b": "d", "c": "e", "d": "a", "e": "b"}
    lens = wb.jacobian_lens(model, mixed_rows(), skip_first=2, sites=["resid_post.0", "resid_post.1", "resid_pre.0"])
    read, wanted = lens.read("a dog"), lens.fit().read(model, "a dog")
    assert lens.sites == ("resid_pre.0", "resid_post.0", "resid_post.1"), "in the order of a forward pass"
    for name in ("jacobian", "logit", "distant layer", "half A", "half B"):
        torch.testing.assert_close(read.readings[name].kl, wanted.readings[name].kl, atol=1e-8, rtol=1e-6)
    assert set(wanted.readings) == set(read.readings) - {"regression"}
    assert float((read.readings["distant layer"].kl - read.readings["jacobian"].kl).abs().max()) > 1e-4


# Files.


def test_a_lens_is_saved_whole_and_refused_by_another_model(tmp_path: Path) -> None:
    model = exact()
    lens = wb.fit_lens(model, "jacobian", mixed_rows(), skip_first=2, out=tmp_path / "j")
    regression = wb.fit_lens(model, "regression", token_rows(*[12] * 6), out=tmp_path / "r")
    for made, place in ((lens, "j"), (regression, "r"), (wb.fit_lens(model, "logit"), "l")):
        made.save(tmp_path / place)
        loaded = wb.load_lens(tmp_path / place, model)
        assert loaded.recipe == made.recipe and loaded.norms == made.norms and loaded.n_fit == made.n_fit
        assert all(torch.equal(loaded.apply(s, EYE), made.apply(s, EYE)) for s in made.sites)
        assert (loaded.halves is None) == (made.halves is None)
    loaded = wb.load_lens(tmp_path / "j", model)
    assert loaded.halves is not None and lens.halves is not None
    assert torch.equal(loaded.halves[1].weights["resid_post.0"], lens.halves[1].weights["resid_post.0"])
    with pytest.raises(MismatchError, match="made for tiny-gpt2"):
        wb.load_lens(tmp_path / "j", exact("neox"))
    assert wb.load_lens(tmp_path / "j", exact("neox"), any_model=True).weights
    with pytest.raises(MissingFileError, match="holds no lens"):
        wb.load_lens(tmp_path, model)
    about = json.loads((tmp_path / "j" / "lens.json").read_text())
    (tmp_path / "j" / "lens.json").write_text(json.dumps({**about, "target": "resid_post.1"}))
    with pytest.raises(MismatchError, match="leads to resid_post.1"):
        wb.load_lens(tmp_path / "j", model)
    (tmp_path / "r" / "lens.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptFileError):
        wb.load_lens(tmp_path / "r", model)


EYE = torch.eye(D_MODEL, dtype=torch.double)
PUBLISHED = {"J": {0: EYE.half(), 1: (2 * EYE).half()}, "n_prompts": 7, "source_layers": [0, 1], "d_model": D_MODEL}


def test_published_jacobian_lenses_are_read_and_written(tmp_path: Path) -> None:
    model = exact()
    torch.save({**PUBLISHED, "provenance": {"target_layer": 2, "skip_first": 16, "capture_point": "block_output"}},
               tmp_path / "a.pt")  # fmt: skip
    lens = wb.load_lens(tmp_path / "a.pt", model)
    assert (lens.kind, lens.n_fit, lens.unit) == ("jacobian", 7, "prompts") and lens.recipe["skip_first"] == 16
    assert torch.equal(lens.apply("resid_post.1", EYE), 2 * EYE)
    ours = wb.fit_lens(model, "jacobian", mixed_rows(), skip_first=2)
    export_lens(ours, tmp_path / "b.pt", model)
    raw = torch.load(tmp_path / "b.pt", weights_only=True)
    assert set(raw) == {"J", "n_prompts", "source_layers", "d_model", "metadata"} and raw["source_layers"] == [0, 1]
    assert raw["J"][1].dtype == torch.half and raw["metadata"]["target_layer"] == 2 and raw["n_prompts"] == 4
    again = wb.load_lens(tmp_path / "b.pt", model)
    torch.testing.assert_close(
        again.weights["resid_post.0"], ours.weights["resid_post.0"].float(), atol=1e-3, rtol=1e-3
    )
    for wrong, error, said in (
        ({"metadata": {"target_layer": 1}}, MismatchError, "output of layer 1"),
        ({"provenance": {"capture_point": "mlp_out"}}, MismatchError, "at mlp_out"),
        ({"d_model": 8}, WidthError, "width 8"),
        ({"J": {7: EYE.half()}}, MismatchError, "layers 7"),
        ({"J": {0: EYE[:3].half()}}, CorruptFileError, "not"),
        ({"J": 3}, CorruptFileError, "can't be read"),
    ):  # fmt: skip
        torch.save({**PUBLISHED, **wrong}, tmp_path / "c.pt")
        with pytest.raises(error, match=said):
            wb.load_lens(tmp_path / "c.pt", model)
    torch.save(Path("a"), tmp_path / "d.pt")
    with pytest.raises(CorruptFileError, match="would run code"):
        wb.load_lens(tmp_path / "d.pt", model)
    with pytest.raises(InvalidInputError, match="name a .pt file"):
        export_lens(ours, tmp_path / "folder", model)


def test_published_tuned_lenses_are_read_and_written(tmp_path: Path) -> None:
    model = exact()
    sites = ["resid_pre.0", "resid_post.0", "resid_post.1"]
    lens = wb.fit_lens(model, "regression", token_rows(*[12] * 6), sites=sites)
    export_lens(lens, tmp_path / "t", model)
    state = torch.load(tmp_path / "t" / "params.pt", weights_only=True)
    assert list(state) == [f"{i}.{part}" for part in ("weight", "bias") for i in range(3)]
    torch.testing.assert_close(state["1.weight"].double(), lens.weights["resid_post.0"] - EYE, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["lens_type"] == "linear_tuned_lens" and config["bias"] is True
    again = wb.load_lens(tmp_path / "t", model)
    assert again.kind == "tuned" and again.sites == tuple(sites)
    x = torch.randn(2, D_MODEL, dtype=torch.double)
    torch.testing.assert_close(again.apply("resid_post.1", x), lens.apply("resid_post.1", x), atol=1e-5, rtol=1e-5)
    torch.save({f"{i}.weight": state[f"{i}.weight"] for i in range(3)}, tmp_path / "t" / "params.pt")
    (tmp_path / "t" / "config.json").write_text(json.dumps({**config, "bias": False, "new": 1}))
    assert not wb.load_lens(tmp_path / "t", model).biases
    for wrong, error, said in (
        ({"unembed_hash": "0" * 64}, MismatchError, "another unembedding"),
        ({"d_model": 8}, WidthError, "width 8"), ({"num_hidden_layers": 4}, MismatchError, "4 layers"),
    ):  # fmt: skip
        (tmp_path / "t" / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(error, match=said):
            wb.load_lens(tmp_path / "t", model)
    (tmp_path / "t" / "config.json").write_text(json.dumps({**config, "unembed_hash": "0" * 64}))
    assert wb.load_lens(tmp_path / "t", model, any_model=True).weights
    with pytest.raises(InvalidInputError, match="resid_pre.0"):
        export_lens(wb.fit_lens(model, "regression", token_rows(*[12] * 6)), tmp_path / "u", model)
