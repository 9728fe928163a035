"""The page for users of TransformerLens and nnsight: its blocks run, give the same numbers, and what it says is true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import workbench as wb
from tests.docs.blocks import PAGE, TOOLS, block, fingerprint, run_page, sampled, sections
from tests.tiny import FP32_LOGITS, tiny_tokenizer
from workbench.core.errors import EditError, MissingFileError, UnknownSiteError
from workbench.core.records import load_json
from workbench.hooks.sites import KINDS, Site
from workbench.models.tiny import TINY

Spaces = dict[str, dict[int, dict[str, Any]]]
TASKS = range(1, 11)
RESID = "blocks.5.hook_resid_post"


def write_model(folder: Path) -> None:
    """A random Llama of seven layers with a tokenizer that adds no BOS."""
    model_type, sizes = TINY["llama"]
    ids = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(model_type, **{**sizes, "num_hidden_layers": 7}, **ids)
    generator = torch.Generator().manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spaces]:
    """What each task of each tool leaves behind, run in a folder that holds the model."""
    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        write_model(Path("my-llama"))
        yield {tool: run_page(tool) for tool in ("here", "transformer_lens")}


def test_every_task_has_a_block_for_each_tool() -> None:
    tasks = sections()[1:]
    assert len(tasks) == len(TASKS)
    for text in tasks:
        for tool in TOOLS:
            code = block(text, tool)
            assert "result" in code
            assert len([line for line in code.splitlines() if line]) <= 8


@pytest.mark.parametrize("task", TASKS)
def test_both_give_the_same_numbers(spaces: Spaces, task: int) -> None:
    ours, theirs = (spaces[tool][task]["result"].detach() for tool in ("here", "transformer_lens"))
    assert ours.shape == theirs.shape and bool((ours != 0).any())
    torch.testing.assert_close(ours, theirs, atol=FP32_LOGITS, rtol=FP32_LOGITS)


@pytest.fixture(scope="module")
def nnsight() -> dict[str, Any]:
    """What nnsight gave; `tests/docs/blocks.py` says how to run it again."""
    return load_json(Path(__file__).parent / "nnsight.json")


def test_nnsight_was_run_on_the_code_that_the_page_shows(nnsight: dict[str, Any]) -> None:
    assert nnsight["code"] == fingerprint("nnsight")
    assert f"nnsight {nnsight['nnsight']}" in PAGE.read_text(encoding="utf-8")
    assert nnsight["tasks"].keys() == {str(task) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_nnsight_gives_the_same_numbers(spaces: Spaces, nnsight: dict[str, Any], task: int) -> None:
    ours, theirs = sampled(spaces["here"][task]["result"]), nnsight["tasks"][str(task)]
    assert ours["shape"] == theirs["shape"]
    assert ours["values"] == pytest.approx(theirs["values"], abs=FP32_LOGITS, rel=FP32_LOGITS)


@pytest.mark.parametrize("task", [6, 7])
def test_the_edits_of_the_page_move_the_logits(spaces: Spaces, task: int) -> None:
    here = spaces["here"]
    assert float((here[task]["result"] - here[1]["result"]).abs().max()) > 0.1


def test_patching_moves_the_logit_difference(spaces: Spaces) -> None:
    here = spaces["here"][8]
    for ids in (here["clean"], here["corrupt"]):
        yes, no = here["model"].logits(ids, tokens=[here["yes"], here["no"]])[0]
        assert abs(float(yes - no) - float(here["result"])) > 0.01


def test_steering_changes_the_tokens_and_five_of_six_are_edited(spaces: Spaces) -> None:
    here, theirs = spaces["here"][9], spaces["transformer_lens"][9]
    plain = here["model"].generate(wb.TokenBatch.of_rows(here["ids"]), max_new_tokens=6, temperature=0.0)
    assert plain.ids[0].tolist() != here["result"].tolist()
    assert here["touched"] == theirs["touched"] == 5


def test_what_the_page_says_about_misspelt_names_in_transformer_lens(spaces: Spaces) -> None:
    space = spaces["transformer_lens"][1]
    bridge, ids, plain = space["bridge"], space["ids"], space["result"]

    def zero(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return 0 * resid

    for name in ("blocks.5.hook_resid_pots", "blocks.9.hook_resid_post"):
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(name, zero)]), plain)
        with bridge.hooks(fwd_hooks=[(name, zero)]):
            assert torch.equal(bridge(ids), plain)
    assert not torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(RESID, zero)]), plain)
    cache = bridge.run_with_cache(ids, names_filter="blocks.5.hook_resid_pots")[1]
    with pytest.raises(KeyError):
        cache["blocks.5.hook_resid_pots"]
    with pytest.raises(AttributeError, match="not found"):
        bridge.add_hook("blocks.5.hook_resid_pots", zero)
    narrow = bridge.run_with_hooks(ids, fwd_hooks=[(RESID, lambda resid, hook: resid[..., :1])])
    assert narrow.shape == plain.shape


def test_what_the_page_says_about_tokens_in_transformer_lens(spaces: Spaces) -> None:
    bridge = spaces["transformer_lens"][1]["bridge"]
    assert bridge.to_tokens("Hi").tolist() == [[0, 41, 74]]
    assert bridge.to_tokens("<bos>Hi").tolist() == [[0, 0, 41, 74]]
    padded = bridge.to_tokens(["Hi", "Hi there"], prepend_bos=False)
    assert padded[0].tolist() == [41, 74, 1, 1, 1, 1, 1, 1]
    alone = bridge(bridge.to_tokens("Hi", prepend_bos=False))[0, -1]
    left = bridge.to_tokens(["Hi", "Hi there"], prepend_bos=False, padding_side="left")
    told = bridge(["Hi", "Hi there"], prepend_bos=False, padding_side="left")
    torch.testing.assert_close(told[0, -1], alone, atol=FP32_LOGITS, rtol=0)
    assert bool((bridge(left)[0, -1] - alone).abs().max() > 0.1)


def test_what_the_page_says_about_passes_and_caches_in_transformer_lens(spaces: Spaces) -> None:
    space = spaces["transformer_lens"][1]
    bridge, ids = space["bridge"], space["ids"]
    widths: list[int] = []
    asked = {"max_new_tokens": 3, "do_sample": False, "return_type": "tokens", "verbose": False}
    with bridge.hooks(fwd_hooks=[(RESID, lambda resid, hook: widths.append(resid.shape[1]))]):
        bridge.generate(ids, **asked)
        bridge.generate(ids, **asked, use_past_kv_cache=False)
        bridge.generate(ids[:, :1], **asked)
    assert widths == [8, 1, 1, 8, 9, 10, 1, 1, 1]
    cache = bridge.run_with_cache(ids)[1]
    assert len(cache) == 335 and not cache[RESID].requires_grad and bridge(ids).requires_grad


def test_what_the_page_says_about_ours(spaces: Spaces) -> None:
    space = spaces["here"][1]
    model, ids, vector = space["model"], space["ids"], space["vector"]
    for name in ("resid_pots.5", "resid_post.9", "blocks.5.hook_resid_pots"):
        with pytest.raises(UnknownSiteError):
            model.capture(ids, [name])
    with pytest.raises(MissingFileError):
        wb.load_model("my-lama")
    assert "already starts with BOS" in model.tokens("<bos>Hi", bos=True).note
    assert "eager" in repr(spaces["here"][4]["acts"])
    steered = wb.Intervention.at("resid_post.5", wb.Add(vector), wb.Generated())
    with pytest.raises(EditError):
        model.generate("Hi", max_new_tokens=1, intervention=steered)
    with model.plan(steered) as plan:
        model.hf.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=1)
    assert plan.report[0].tokens == 5 + 4 + 3 + 2 + 1  # without a cache each is computed again in later passes


def test_what_the_page_says_about_positions_shapes_and_rounding(spaces: Spaces) -> None:
    space = spaces["here"][1]
    ids, vector = space["ids"], space["vector"]
    model = wb.load_model("my-llama", dtype="bfloat16", check=False)

    def tokens_edited(op: Any, scope: Any = None) -> int:
        with model.plan(wb.Intervention.at("resid_post.5", op, scope)) as plan:
            model.logits(ids)
        return plan.report[0].tokens

    for op, scope in (
        (wb.Add(vector), wb.Pos(20)),
        (wb.Add(vector), wb.Pos(2, 20)),
        (wb.Add(1e-5 * vector), None),
        (wb.Map(lambda h: h[:, :1]), None),
    ):
        with pytest.raises(EditError):
            tokens_edited(op, scope)


def _rows(title: str) -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8").split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_names_of_transformer_lens_mean_what_the_table_says(spaces: Spaces) -> None:
    space = spaces["transformer_lens"][1]
    cache = space["bridge"].run_with_cache(space["ids"])[1]
    found = set()
    for theirs, ours in _rows("Names of TransformerLens"):
        name = theirs.strip("`")
        if ours.startswith("none"):
            with pytest.raises(UnknownSiteError):
                Site.parse(name)
            # The bridge computes hook_result only when it is switched on.
            assert name in cache or name.endswith("hook_result")
            continue
        site = Site.parse(name)
        assert str(site) == ours.strip("`") and torch.equal(cache[name], cache[site.tl_name])
        found.add(site.kind)
    assert found == set(KINDS)


def test_the_modules_of_nnsight_hold_what_the_table_says(spaces: Spaces) -> None:
    model = spaces["here"][1]["model"]
    rows = {row[0].split("`")[1]: row[1].strip("`") for row in _rows("Modules in nnsight")}
    assert {Site.parse(site).kind for site in rows} == set(KINDS)
    for site, path in rows.items():
        point = model.site_map[site]
        side = {"in": "input", "out": "output", "inside": "output[1]"}[point.side]
        dotted = re.sub(r"\[(\d+)\]", r".\1", path, count=1) if "layers[" in path else path
        assert dotted.removesuffix("[0]") == f"{point.path}.{side}"
