"""What a model and its results show, and their rows as pandas tables."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.core.errors import UnknownSiteError
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import Last, Pos
from workbench.saes.formats.lensmodule import sae_lens_module

TEXTS = pd.Series(["one day", "two"], index=["a", "b"])


def test_the_table_of_sites_gives_names_by_kind() -> None:
    model = tiny_model()
    sites = model.sites()
    assert len(sites) == len(sites.names) == len(model.site_map.points) and list(sites) == list(sites.names)
    assert sites.names[0] == "embed" and sites.names[-1] == "logits", "in the order of a forward pass"
    assert sites.names.index("resid_mid.0") < sites.names.index("mlp_out.0") < sites.names.index("resid_pre.1")
    assert sites.resid_post == sites["resid_post"] == ("resid_post.0", "resid_post.1", "resid_post.2")
    assert "resid_post" in dir(sites) and "resid_post" in sites._ipython_key_completions_()
    assert set(model.capture("one", sites.z)) == {"z.0", "z.1", "z.2"}
    frame = sites.frame().set_index("site")
    assert list(frame.index) == list(sites) and frame.loc["z.1", "shape"] == ("batch", "pos", 2, 8)
    assert frame.loc["z.1", "layer"] == 1 and frame.loc["embed", "layer"] is pd.NA
    assert copy.copy(sites).names == sites.names
    parallel = tiny_model("neox").sites()
    assert hasattr(sites, "resid_mid") and not hasattr(parallel, "resid_mid")
    assert "resid_mid" not in dir(parallel)
    with pytest.raises(UnknownSiteError, match="resid_mid"):
        _ = parallel.resid_mid
    with pytest.raises(AttributeError, match="resid_post"):
        _ = sites.resid_pots


def test_a_model_shows_what_it_is_and_what_edits_it() -> None:
    model = tiny_model()
    with model.plan(Intervention.at("resid_post.1", Add(torch.ones(16)))) as plan:
        assert "edited: Add at resid_post.1 on All()" in repr(model) and repr(plan).startswith("Plan(on: Add at")
        model.logits("one")
        assert "<td>Add at resid_post.1 on All()</td>" in model._repr_html_()
        assert plan.frame().tokens.tolist() == [3] and ">3</td>" in plan._repr_html_()
    assert repr(model.plan(Intervention())) == "Plan(off: no edits)" and "resid_mid" in model._repr_html_()


def test_the_self_check_as_rows() -> None:
    report = tiny_model().self_check()
    assert set(report.frame().result) == {"ok"} and len(report.frame()) == len(report.checks)
    assert repr(report) == f"CheckReport(ok: {len(report.checks)} of {len(report.checks)} checks hold)"
    bad = replace(report, checks=(replace(report.checks[0], ok=False),), withdrawn={Site("z", 1): "why"})
    assert repr(bad) == "CheckReport(FAILS: 0 of 1 check hold; withdrawn: z.1)"
    assert bad.frame().values.tolist()[1] == ["z.1", "withdrawn", "why"]


def test_variants_as_rows_are_joined_to_what_they_are() -> None:
    model, add = tiny_model(), Intervention.at("resid_post.1", Add(torch.ones(16)), Last())
    some = model.variants(TEXTS, [Intervention(), 3 * add], tokens=[70, 80, 90])
    frame = some.frame()
    assert frame.index.tolist() == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3
    assert frame.op.tolist() == ["none"] * 6 + ["Add"] * 6 and frame.strength.tolist()[6:] == [3.0] * 6
    assert frame.token_id.tolist() == [70, 80, 90] * 4 and frame.token.tolist()[:3] == ["e", "o", "y"]
    torch.testing.assert_close(torch.tensor(frame.logit.tolist()), some.logits.flatten())
    torch.testing.assert_close(torch.tensor(frame.change.tolist()), (some.logits - some.clean).flatten())
    every = model.variants(TEXTS, [add, 2 * add])
    top = every.frame(k=1)
    assert top.token_id.tolist() == every.logits.argmax(-1).flatten().tolist()
    chosen = every.logits.softmax(-1).amax(-1).flatten()
    torch.testing.assert_close(torch.tensor(top.probability.tolist()), chosen)
    clean = every.clean.softmax(-1).repeat(2, 1)[range(4), top.token_id.tolist()]
    torch.testing.assert_close(torch.tensor(top.clean_probability.tolist()), clean)


def test_activations_as_rows_keep_the_labels_of_their_texts() -> None:
    model = tiny_model()
    acts = model.capture(TEXTS, ["resid_post.1", "z.1"])
    frame = acts.frame("resid_post.1")
    assert frame.index.tolist() == ["a"] * 7 + ["b"] * 3 and "".join(frame.token) == "one daytwo"
    assert frame.position.tolist() == [*range(7), *range(3)], "padding is no row"
    torch.testing.assert_close(
        torch.tensor(frame[[f"x{i}" for i in range(16)]].values).float()[7:], acts["resid_post.1"][1, -3:]
    )
    chosen = model.capture(TEXTS, ["z.1"], positions=Pos(1, -1))
    frame = chosen.frame()
    assert frame.index.tolist() == ["a", "a", "b", "b"] and frame.token.tolist() == ["n", "y", "w", "o"]
    torch.testing.assert_close(torch.tensor(frame[[f"x{i}" for i in range(16)]].values).float(), chosen["z.1"])
    with pytest.raises(UnknownSiteError, match=r"resid_post.1, z.1"):
        acts.frame()
    assert acts._ipython_key_completions_() == ["resid_post.1", "z.1"]
    assert repr(model.capture("ab", model.sites().z)) == "Activations(z.0-2: (1, 2, 2, 8))"


def test_continuations_as_rows_join_the_table_that_the_prompts_came_from() -> None:
    model = tiny_model()
    table = pd.DataFrame({"text": TEXTS, "label": [1, 0]})
    edit = Intervention.at("resid_post.1", Add(torch.ones(16)))
    written = model.generate(table["text"], 3, intervention=edit, batch_size=1)
    frame = table.join(written.frame())
    assert frame.continuation.tolist() == list(written.texts) and frame.label.tolist() == [1, 0]
    assert frame.new_tokens.tolist() == [len(ids) for ids in written.ids] and frame.prompt_tokens.tolist() == [7, 3]
    assert frame.mean_logprob.tolist() == pytest.approx([float(row.mean()) for row in written.logprobs])
    plain = model.generate(["one day", "two"], 3)
    assert plain.frame().prompt.tolist() == ["one day", "two"] and plain.frame().index.tolist() == [0, 1]
    assert "1 edit" in repr(written) and "fired" in written._repr_html_() and "edit" not in repr(plain)


def test_what_a_plan_explains_reads_as_lines() -> None:
    shown = tiny_model().plan(Intervention.at("resid_post.1", Add(torch.ones(16)), Last())).explain()
    assert repr(shown).splitlines()[0] == "resid_post.1 (model.layers.1, output): Add on Last()"
    assert len(repr(shown).splitlines()) == 2 and "\\n" not in repr(shown)


def test_an_sae_of_sae_lens_shows_itself_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython
    from IPython.core.formatters import DisplayFormatter

    sae, display = random_sae(), DisplayFormatter()
    before = display.format(sae)[0].get("text/html", "")
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(display_formatter=display))
    sae_lens_module()
    html = display.format(sae)[0]["text/html"]
    assert before == "" and "TopKSAE" in html and ">resid_post.1</span>" in html and "<td>40</td>" in html


def test_a_conversation_as_rows() -> None:
    session = tiny_model().session("be <b>brief</b>", max_new_tokens=2)
    session.turn("hi")
    assert session.frame().role.tolist() == ["system", "user", "assistant"]
    assert "be &lt;b&gt;brief" in session._repr_html_() and repr(session).startswith("Session(1 exchange, ")
