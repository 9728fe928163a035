"""The table of refusal directions equals three plain sweeps, and says what was chosen and why."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_hf, tiny_tokenizer
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError
from workbench.interventions.gates import ProbeGate
from workbench.models.model import Model
from workbench.steering.refusal.candidates import (
    HIGH_KL,
    LATE,
    LOW_INDUCE,
    NO_DIRECTION,
    Candidate,
    DirectionTable,
    SelectOptions,
    best_of,
)
from workbench.steering.refusal.data import as_chats
from workbench.steering.refusal.select_direction import (
    _kept,
    _proposed,
    _Work,
    ablation,
    addition,
    select_direction,
    when,
)

HARMFUL = [f"ab{c}{d}" for c in "cdef" for d in "xyz"]
HARMLESS = [f"mn{c}{d}" for c in "opq" for d in "xyz"]
FULL = SelectOptions(full_table=True, filter_prompts=False, batch_size=5, val_share=0.34, controls=3)


@functools.cache
def chat_model(family: str = "llama") -> Model:
    tokenizer = copy.deepcopy(tiny_tokenizer())  # that one is shared
    tokenizer.chat_template = (
        "{% for m in messages %}u{{ m.content }}v{% endfor %}{% if add_generation_prompt %}wa{% endif %}"
    )
    return Model(tiny_hf(family), tokenizer, name=f"chat-{family}")


R = (3, 7)


@functools.cache
def table() -> DirectionTable:
    return select_direction(chat_model(), HARMFUL, HARMLESS, refusal_tokens=R, options=FULL)


# A second path: the model's own modules, one candidate after another.


@contextlib.contextmanager
def ablated(hf: Any, r: Tensor) -> Iterator[None]:
    unit = r / r.norm()

    def out(x: Tensor) -> Tensor:
        return x - (x @ unit)[..., None] * unit

    handles = []
    for block in hf.model.layers:
        handles.append(block.register_forward_pre_hook(lambda _m, args: (out(args[0]), *args[1:])))
        handles.append(block.self_attn.register_forward_hook(lambda _m, _a, y: (out(y[0]), *y[1:])))
        handles.append(block.mlp.register_forward_hook(lambda _m, _a, y: out(y)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def added(hf: Any, layer: int, r: Tensor) -> Iterator[None]:
    handle = hf.model.layers[layer].register_forward_pre_hook(lambda _m, args: (args[0] + r, *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def last(hf: Any, rows: list[list[int]]) -> Tensor:
    return torch.stack([hf(input_ids=torch.tensor([row])).logits[0, -1] for row in rows]).double()


def odds(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)[:, list(R)].sum(-1)
    return (p + 1e-8).log() - (1 - p + 1e-8).log()


def parts(kind: str, prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Training and validation rows, by what the table itself says it kept."""
    model = chat_model()
    order: list[int] = np.random.default_rng([0, kind == "harmful"]).permutation(len(prompts)).tolist()
    rows = [row.tolist() for row in model.tokens(as_chats([prompts[i] for i in order])).rows()]
    n = round(0.34 * len(prompts))
    return rows[n:], rows[:n]


@torch.no_grad()
def test_every_candidate_is_what_three_plain_sweeps_give() -> None:
    model, found = chat_model(), table()
    hf: Any = model.hf
    (harmful, harmful_val), (harmless, harmless_val) = parts("harmful", HARMFUL), parts("harmless", HARMLESS)
    assert found.n_train == (len(harmful), len(harmless)) and found.n_val == (len(harmful_val), len(harmless_val))
    states = [
        torch.stack([torch.stack(hf(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states)[:, 0, -4:]
                     for row in rows]).double().mean(0)
        for rows in (harmful, harmless)
    ]  # fmt: skip
    base = last(hf, harmless_val)
    assert found.base_harmful.value == pytest.approx(float(odds(last(hf, harmful_val)).mean()), abs=1e-4)
    p = base.softmax(-1)
    checked = 0
    positions = sorted({c.position for c in found.candidates})
    assert positions == [-3, -2, -1], "what the template puts behind the instruction, v, w and a"
    for c in found.candidates:
        r = (states[0][c.layer, c.position] - states[1][c.layer, c.position]).float()
        torch.testing.assert_close(c.vector, r, atol=1e-5, rtol=1e-4)
        if c.layer == 0:
            assert c.removed_by.startswith(NO_DIRECTION) and c.bypass is None, "the same token has the same embedding"
            continue
        assert c.bypass is not None and c.induce is not None and c.kl is not None
        with ablated(hf, r):
            bypass, q = odds(last(hf, harmful_val)), last(hf, harmless_val).softmax(-1)
        with added(hf, c.layer, r):
            induce = odds(last(hf, harmless_val))
        kl = (p * ((p + 1e-6).log() - (q + 1e-6).log())).sum(-1)
        assert c.bypass.value == pytest.approx(float(bypass.mean()), abs=1e-4)
        assert c.induce.value == pytest.approx(float(induce.mean()), abs=1e-4)
        assert c.kl.value == pytest.approx(float(kl.clamp_min(0).mean()), abs=1e-5)
        checked += 1
    assert checked == 6
    frame = found.df
    assert len(frame) == 9 and frame["is_best"].tolist()[0] and not frame["is_best"].tolist()[1]


def test_filters_save_work_and_choose_the_same() -> None:
    quick = select_direction(
        chat_model(), HARMFUL, HARMLESS, refusal_tokens=R,
        options=dataclasses.replace(FULL, full_table=False, max_kl=1e9, min_induce=-99.0),
    )  # fmt: skip
    whole = select_direction(
        chat_model(), HARMFUL, HARMLESS, refusal_tokens=R,
        options=dataclasses.replace(FULL, max_kl=1e9, min_induce=-99.0),
    )  # fmt: skip
    assert (quick.best.layer, quick.best.position) == (whole.best.layer, whole.best.position)
    late = [c for c in quick.candidates if c.layer == 2]
    assert all(c.removed_by == LATE and c.bypass is None for c in late)
    assert not quick.loosened and quick.best.removed_by == ""


def _candidate(bypass: float, induce: float, kl: float, layer: int = 1, removed: str = "") -> Candidate:
    mean = table().base_harmful
    values = {n: dataclasses.replace(mean, value=v) for n, v in (("bypass", bypass), ("induce", induce), ("kl", kl))}
    return Candidate(position=-1, layer=layer, vector=torch.ones(2), norm=1.0, removed_by=removed, **values)


def test_filters_are_loosened_in_order_and_it_is_said() -> None:
    o = SelectOptions()
    good, changes, weak = _candidate(-1.0, 1.0, 0.05), _candidate(-3.0, 1.0, 0.5), _candidate(-5.0, -1.0, 0.5)
    late = _candidate(-9.0, 1.0, 0.05, removed=LATE)
    assert best_of([weak, changes, good, late], o) == (good, ())
    assert best_of([weak, changes, late], o) == (changes, (HIGH_KL,))
    assert best_of([weak, late], o) == (weak, (HIGH_KL, LOW_INDUCE))
    assert best_of([late], o)[0] is None


@torch.no_grad()
def test_the_edits_are_those_that_were_measured() -> None:
    model, found = chat_model(), table()
    best, (_, val) = found.best, parts("harmless", HARMLESS)
    assert best.induce is not None
    with model.plan(addition(best)) as plan:
        value = odds(torch.cat([model.logits(torch.tensor([row])) for row in val]).double()).mean()
    assert float(value) == pytest.approx(best.induce.value, abs=1e-4) and plan.report
    clean, row = model.logits(torch.tensor([val[0]])), torch.tensor([val[0]])
    gate = ProbeGate(torch.zeros(model.width("resid_pre.0")), bias=-1.0, at="resid_pre.0")
    with model.plan(when(gate, ablation(model, best))):
        assert torch.equal(model.logits(row), clean), "closed: not a bit changes"
    with model.plan(when(dataclasses.replace(gate, bias=1.0), ablation(model, best))):
        opened = model.logits(row)
    with model.plan(ablation(model, best)):
        torch.testing.assert_close(opened, model.logits(row))


def test_a_measure_that_is_not_the_edit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = _Work._ablated

    def wrong(self: _Work, batch: Any, candidates: Any, of: Any, bar: Any) -> Any:
        other = [dataclasses.replace(c, vector=c.vector.roll(1)) for c in candidates]
        return measure(self, batch, other, of, bar)

    monkeypatch.setattr(_Work, "_ablated", wrong)
    with pytest.raises(EditError, match="were measured"):
        select_direction(chat_model(), HARMFUL, HARMLESS, refusal_tokens=R, options=FULL)


def test_parallel_and_post_norm_models_have_directions() -> None:
    for family in ("neox", "gemma2"):
        options = dataclasses.replace(FULL, full_table=False)
        found = select_direction(chat_model(family), HARMFUL, HARMLESS, refusal_tokens=R, options=options)
        assert found.best.bypass is not None


@pytest.mark.parametrize(
    ("harmful", "harmless", "error", "says"),
    [
        ([], HARMLESS, InvalidInputError, "0 different harmful prompts"),
        (HARMFUL, HARMLESS[:3], InvalidInputError, "3 different harmless"),
        (HARMFUL, [*HARMLESS, HARMFUL[0]], InvalidInputError, "in both lists, such as 'abcx'"),
        ([*HARMFUL, " "], HARMLESS, InvalidInputError, r"harmful prompt 12 \(from 0\) is empty"),
    ],
)
def test_lists_that_can_not_be_used(harmful: list[str], harmless: list[str], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        select_direction(chat_model(), harmful, harmless, refusal_tokens=R)


def test_a_model_that_answers_both_alike_is_told_so() -> None:
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.get_output_embeddings().weight.zero_()
    model = Model(hf, chat_model().tokenizer, name="blank")
    with pytest.raises(DegenerateInputError, match="does not seem to refuse"):
        select_direction(model, HARMFUL, HARMLESS)


def test_refusal_tokens_are_those_that_harmful_prompts_alone_make_likely() -> None:
    harmful, harmless = torch.zeros(5, 6), torch.zeros(5, 6)
    harmful[:, 2], harmless[:, 2] = 5.0, 5.0  # the likeliest first token of both says nothing
    harmful[:, 4], harmless[:, 1] = 5.0, 5.0
    assert _proposed({("harmful", "train"): harmful, ("harmless", "train"): harmless}) == (4,)


def test_prompts_that_are_not_answered_as_their_kind_says_are_left_out() -> None:
    odds = torch.tensor([2.0, -1.0, 0.5, -3.0])
    kept = {kind: _kept((kind, "train"), odds) for kind in ("harmful", "harmless")}
    assert kept["harmful"][0].tolist() == [0, 2] and kept["harmless"][0].tolist() == [1, 3]
    assert "2 of 4 harmful prompts of the training part are kept" in kept["harmful"][1][0]
    keep, said = _kept(("harmful", "val"), -odds.abs())
    assert keep.tolist() == [0, 1, 2, 3] and "though the model" in said[0], (
        "none is refused: all are kept, and it is said"
    )
