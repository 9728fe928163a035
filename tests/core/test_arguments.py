"""Wrong arguments of the public surface: refused in words, wherever they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int
from torch import Tensor

import workbench as wb
from tests.interventions.builders import bad_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.core.arguments import checked
from workbench.core.errors import CallError, InvalidInputError, WorkbenchError
from workbench.models.model import Model
from workbench.models.sampling import Sampling

IDS = torch.arange(10, 16)[None]
V = torch.linspace(-1, 1, D_MODEL)
IV = wb.Intervention.at("resid_post.1", wb.Add(V))


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without the run-time checks of the tests, in an empty folder."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.chdir(tmp_path)
    yield
    monkeypatch.undo()


@functools.cache
def wrong() -> tuple[Any, ...]:
    """Values of every kind; many of them are right in some places."""
    d, nan = D_MODEL, float("nan")
    tensors = (
        torch.randn(2, 3, 4), torch.ones(d, dtype=torch.complex64), torch.ones(d, dtype=torch.bool),
        torch.ones(d).to_sparse(), torch.ones(d, device="meta"), torch.full((d,), nan), torch.zeros(d), torch.ones(0),
        torch.ones(()), torch.ones(d, dtype=torch.long), torch.ones(1, 6), torch.full((1, 6), 10**6), torch.full((2, 2), -1),
    )  # fmt: skip
    return (
        None, "x", "", b"x", 3, -1, 0, 2.5, nan, float("inf"), -float("inf"), True, 10**30, -(10**30), 10**12, 1j, [],
        [None], ["x"], [1.5], [-1], {}, object(), int, np.int64(2), np.float32(2), np.array([1, 2]), np.array("a"),
        "\ud800", "a\0b", "resid_post.99", "blocks.x.hook_resid_post", "resid_post.1.h9", wb.All(), IV, wb.Add(V), *tensors,
    )  # fmt: skip


@functools.cache
def model() -> Model:
    return tiny_model()


Case = tuple[Callable[..., Any], dict[str, Any], Callable[[Any], object] | None]


@functools.cache
def cases() -> dict[str, Case]:
    """By name: what is called, arguments that are right, and what is done with what comes out."""
    m, sae, one = model(), bad_sae(), torch.ones(1)

    def run(iv: wb.Intervention) -> None:
        with m.plan(iv):
            m.hf(IDS, use_cache=False)

    def op(edit: Any) -> None:
        run(wb.Intervention.at("resid_post.1", edit))

    def gate(condition: Any) -> None:
        op(wb.When(condition, wb.Add(V)))

    def scope(tokens: Any) -> None:
        run(wb.Intervention.at("resid_post.1", wb.Add(V), tokens))

    def case(fn: Callable[..., Any], use: Callable[[Any], object] | None = None, **good: Any) -> Case:
        return fn, good, use

    vector, sae_op = {"vector": V}, {"sae": sae, "features": [1]}
    return {
        "Add": case(wb.Add, op, **vector, strength=1.0),
        "AddScaled": case(wb.AddScaled, op, **vector, strength=1.0, size="norm"),
        "ProjectOut": case(wb.ProjectOut, op, directions=V),
        "Affine": case(wb.Affine, op, weight=torch.eye(D_MODEL), bias=V),
        "LowRank": case(wb.LowRank, op, R=V[None], W=V[None], b=one),
        "Ablate": case(wb.Ablate, op, kind="mean", reference=V, directions=V, seed=0),
        "Replace": case(wb.Replace, op, value=V),
        "Patch": case(wb.Patch, op, source=torch.ones(1, 6, D_MODEL), known=torch.ones(1, 6).bool(), directions=V),
        "ReplaceTokens": case(wb.ReplaceTokens, op, ids=torch.tensor([1]), values=V[None]),
        "MixEntries": case(
            wb.MixEntries, op, entries=torch.tensor([1]), sources=torch.tensor([[0]]), weights=one[None], mean_weight=one,
            bias=one,
        ),
        "ClampProjection": case(wb.ClampProjection, op, **vector, value=1.0, mode="set"),
        "Cap": case(wb.Cap, op, **vector, tau=1.0),
        "Threshold": case(wb.Threshold, op, **vector, tau=1.0, amount=1.0),
        "Rotate": case(wb.Rotate, op, **vector, theta=1.0),
        "Rotate in a plane": case(functools.partial(wb.Rotate, None), op, theta=1.0, plane=torch.eye(D_MODEL)[:2]),
        "NormPreserve": case(wb.NormPreserve, op, op=wb.Add(V)),
        "EqualNorm": case(wb.EqualNorm, op, ops=(wb.Add(V),), direction=V),
        "SAEClamp": case(wb.SAEClamp, op, **sae_op, value=1.0, error="keep", when="always", mode="set"),
        "SAEScale": case(wb.SAEScale, op, **sae_op, factor=2.0),
        "SAEAblate": case(wb.SAEAblate, op, **sae_op),
        "SAEAdd": case(wb.SAEAdd, op, **sae_op, amount=1.0),
        "SAEAddMax": case(wb.SAEAddMax, op, sae=sae, direction=V, strength=1.0),
        "When": case(wb.When, op, gate=wb.ProbeGate(V), op=wb.Add(V), otherwise=None),
        "ProbeGate": case(
            wb.ProbeGate, gate, weight=V, bias=0.0, at="resid_post.0", when="token", reduce="mean", threshold=0.0, below=False
        ),
        "CosineGate": case(wb.CosineGate, gate, direction=V, threshold=0.1),
        "CASTGate": case(wb.CASTGate, gate, direction=V),
        "SAEGate": case(wb.SAEGate, gate, sae=sae, feature=1),
        "Pos": case(lambda at: wb.Pos(at), scope, at=1),
        "NotPrefix": case(wb.NotPrefix, scope, n=1),
        "TokenIs": case(lambda token: wb.TokenIs(token), scope, token=12),
        "After": case(wb.After, scope, marker=(12,), occurrence="first"),
        "Mask": case(wb.Mask, scope, chosen=torch.ones(1, 6).bool(), may_skip_rows=False),
        "Site": case(wb.Site, kind="z", layer=1, head=0),
        "Site.parse": case(wb.Site.parse, text="z.1"),
        "Intervention": case(wb.Intervention, edits=(), made_for=None),
        "Intervention.at": case(wb.Intervention.at, run, site="resid_post.1", op=wb.Add(V), scope=wb.All()),
        "Intervention.load": case(wb.Intervention.load, folder="nothing"),
        "times": case(lambda factor: factor * IV, run, factor=2),
        "save": case(IV.save, folder="iv"),
        "take": case(IV.take, rows=torch.tensor([0])),
        "TokenBatch": case(wb.TokenBatch, ids=IDS, mask=IDS > 0),
        "TokenBatch.pad": case(wb.TokenBatch.pad, rows=[[1]], pad_id=0),
        "Model": case(wb.Model, hf=m.hf, tokenizer=m.tokenizer, name="x"),
        "tokens": case(m.tokens, value="abc", bos="auto"),
        "capture": case(m.capture, batch=IDS, sites=["resid_post.1"], positions=wb.Last(), grad=False),
        "stream": case(m.stream, list, texts=["ab"], sites=["resid_post.1"], batch_size=1, positions=wb.Last()),
        "mean": case(m.mean, texts=["ab"], site="resid_post.1", positions=wb.Last(), batch_size=1),
        "logits": case(m.logits, batch=IDS, keep="last", tokens=[1]),
        "lens": case(m.lens, x=V[None]),
        "loss": case(m.loss, batch=IDS),
        "segment": case(m.segment, batch=IDS, site="resid_post.1", last=True),
        "variants": case(m.variants, batch=IDS, interventions=[IV], tokens=[1]),
        "plan": case(m.plan, intervention=IV, any_model=False),
        "generate": case(
            m.generate, prompts=IDS, max_new_tokens=2, intervention=IV, seed=0, temperature=1.0, stop=(), capture=(),
            batch_size=8, top_k=0, top_p=1.0, min_p=0.0,
        ),
        "Sampling": case(Sampling, max_new_tokens=2, temperature=1.0, seed=0, top_k=0, top_p=1.0, min_p=0.0, stop=()),
        "session": case(m.session, intervention=IV, seed=0, temperature=1.0, max_new_tokens=2),
        "turn": case(m.session(max_new_tokens=2).turn, text="a", max_new_tokens=2, temperature=1.0, seed=0),
        "ablate_everywhere": case(wb.ablate_everywhere, sites=m.site_map, directions=V),
    }  # fmt: skip


def _arguments(name: str, place: int, value: Any) -> tuple[str, dict[str, Any]]:
    """One wrong argument beside right ones."""
    _, good, _ = cases()[name]
    chosen = list(good)[place % len(good)]
    return chosen, {**good, chosen: value}


@settings(
    max_examples=180, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)  # fmt: skip
@given(st.data())
def test_a_wrong_argument_of_any_kind_is_refused_in_words_or_does_no_harm(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(cases())))
    number = data.draw(st.integers(0, len(wrong()) - 1))
    chosen, arguments = _arguments(name, data.draw(st.integers(0, 11)), wrong()[number])
    fn, _, use = cases()[name]
    try:
        made = fn(**arguments)
        if use is not None:
            use(made)
    except WorkbenchError as error:
        assert len(str(error)) > 20, (name, chosen)


@checked
def _all_kinds(
    n: int = 1,
    x: float = 1.0,
    path: str | Path = "a",
    mode: Literal["mean", "last"] = "mean",
    features: Sequence[int] = (),
    strength: float | Float[Tensor, " rows"] = 1.0,
    sites: Sequence[str] = (),
    markers: tuple[int, ...] = (),
    ids: Int[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    fn: Callable[[int], int] | None = None,
) -> dict[str, Any]:
    return dict(locals())


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"n": np.int64(3)}, 3),
        ({"n": torch.tensor(4)}, 4),
        ({"x": np.float32(0.5)}, 0.5),
        ({"x": torch.tensor(1.5)}, 1.5),
        ({"x": 2}, 2),
        ({"features": np.array([1, 2])}, [1, 2]),
        ({"features": (np.int64(1),)}, (1,)),
        ({"markers": [1, 2]}, (1, 2)),
        ({"strength": torch.tensor(2.0)}, 2.0),
    ],
)
def test_numbers_of_other_libraries_are_numbers(given: dict[str, Any], seen: object) -> None:
    ((name, _),) = given.items()
    found = _all_kinds(**given)[name]
    assert (type(found), found) == (type(seen), seen)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"n": "3"}, r"_all_kinds\(n='3'\): got str; give a whole number"),
        ({"n": True}, "got bool"),
        ({"n": 2.0}, "got float"),
        ({"n": 2**63}, "64 bits"),
        ({"x": "hot"}, "give a number that is not nan"),
        ({"x": float("nan")}, "got nan"),
        ({"path": "a\0b"}, "give a text or a Path"),
        ({"mode": "meen"}, "give 'mean' or 'last'. Did you mean mean?"),
        ({"features": [1.5]}, "each a whole number"),
        ({"features": torch.ones(2).to_sparse()}, "sparse tensor of shape"),
        ({"strength": torch.ones(2, dtype=torch.complex64)}, "dense tensor of real numbers"),
        ({"strength": torch.ones(2, dtype=torch.bool)}, "torch.bool"),
        ({"sites": "resid_post.1"}, "got one text; give a list of values, each a text"),
        ({"ids": torch.ones(2)}, "dense tensor of whole numbers"),
        ({"mask": torch.ones(2)}, "dense tensor of booleans"),
        ({"mask": torch.ones(2, device="meta").bool()}, "meta tensor"),
        ({"fn": 3}, "give a function or None"),
    ],
)
def test_the_error_says_what_was_given_and_what_to_give(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        _all_kinds(**given)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: _all_kinds(zz=3), r"_all_kinds\(zz=...\): there is no such argument. Known: n, x, path"),
        (lambda: wb.Add(), "Add: vector must be given. It takes vector, strength."),
        (
            lambda: model().generate(IDS, interventions=IV),
            r"generate\(interventions=...\).* Did you mean intervention\?",
        ),
        (lambda: model().generate(IDS, top=3), r"generate\(top=...\).* Did you mean .*top_k"),
        (
            lambda: model().generate(IDS, 2, 3),
            "generate: only these may be given without a name: prompts, max_new_tokens",
        ),
        (lambda: wb.train_sae("nothing", d_sea=3), r"Give config=SAEConfig\(d_sae=...\)."),
    ],
)
def test_calls_that_do_not_fit_say_what_does(call: Callable[[], object], text: str) -> None:
    with pytest.raises(CallError, match=text) as caught:
        call()
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: wb.Intervention(wb.Add(V)),
            r"Intervention\(edits=.*got Add; .*Intervention.at\('resid_post.10', op\) makes",
        ),
        (
            lambda: wb.Intervention.at(["embed"], wb.Add(V)),
            r"Intervention.at\(site=.*a list of 1; .*one of them at a time",
        ),
        (lambda: model().generate(IDS, intervention=[IV, IV]), r"intervention=.*a list of 2; .*a \+ b one of two"),
        (lambda: model().variants(IDS, IV), r"variants\(interventions=.*Put it into a list"),
        (lambda: model().variants(IDS, [wb.Add(V)]), "a list whose value at 0 is Add"),
        (lambda: IV + wb.Add(V), r"Intervention.__add__\(other=.*got Add; give an Intervention"),
        (
            lambda: wb.Patch.of_run(model().capture(IDS, ["embed"])),
            r"Patch.of_run: batch must be given.*\n.*of_run\(acts=.*got Activations;.* acts\['resid_post.10'\] is the tensor",
        ),
    ],
)
def test_one_for_several_and_several_for_one_say_what_to_do(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        call()


def test_every_argument_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(InvalidInputError, match=r"_all_kinds\(n='3'\)[^\n]*\n_all_kinds\(mode='meen'\)"):
        _all_kinds(n="3", mode="meen")


@checked
def _nested(
    pair: tuple[str, int] = ("a", 1),
    shares: Mapping[str, float] | None = None,
    names: frozenset[str] = frozenset(),
    x: Float[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    return dict(locals())


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({"pair": ["b", np.int64(2)]}, ("b", 2)),
        ({"shares": {"a": np.float32(0.5)}}, {"a": 0.5}),
        ({"names": ["a", "b"]}, frozenset("ab")),
    ],
)
def test_what_holds_values_is_put_in_its_declared_form(given: dict[str, Any], seen: object) -> None:
    ((name, _),) = given.items()
    assert _nested(**given)[name] == seen


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"pair": ("a", "b")}, r"give a list of 2 values \(a text, a whole number"),
        ({"pair": ("a",)}, "got a list of 1"),
        ({"shares": {"a": "b"}}, "give a dict of a text to a number that is not nan"),
        ({"x": ["a"]}, "give an array of real numbers"),
    ],
)
def test_what_holds_wrong_values_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        _nested(**given)
