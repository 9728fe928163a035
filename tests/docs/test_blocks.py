"""Every Python block of the README and of the pages runs, on a tiny model and with smaller numbers."""

from __future__ import annotations

import itertools
import json
import linecache
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import circuits
import workbench as wb
from tests.circuits.tokenizers import agreeing_model
from tests.glitch.planted import planted, share, truth
from workbench.judges import LogProbJudge

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"coming-from.md", "extending.md", "recipes.md"}
"""Pages whose blocks other tests of this folder run."""
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.S)
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name not in ELSEWHERE and BLOCK.search(path.read_text(encoding="utf-8"))
]

CENSUS = 'wb.glitch.CensusOptions(sample=40, shares=(0.1, 0.5), forms="raw")'

SMALLER: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"wb\.load_model\([^)]*\)", "tiny"),
    (r'HTTPJudge\("https[^)]*\)', "LogProbJudge(tiny)"),
    ("org/name", "tiny-model"),
    ("39145, 45139", ", ".join(map(str, truth().never[:2]))),
    (r"\b(resid_post|resid_pre|mlp_out|mlp_pre|z)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) * 2 // 30}"),
    (r"\b(tokens=)(?:[\d_]{5,}|10\*\*6)", r"\g<1>3000"),
    (r"SAEConfig\((?!tokens)", "SAEConfig(tokens=6000, batch=256, "),
    (r"\bd_sae=\d+", "d_sae=64"),
    (r"\bk=(?:32|64)\b", "k=4"),
    (r"\btop=40\b", "top=12"),
    (r"\bselect\(6\)", "select(2)"),
    (r'folder="census/"', f'folder="census/", options={CENSUS}'),
    (r"\bstrengths=\([^)]*\)", "prompts=prompts, strengths=(1.0,)"),
    (r"\bSteerOptions\(", "SteerOptions(new_tokens=3, plain_texts=texts[:1], "),
    (r'"mlp_out", "resid_post"\], "my-saes"\)', '"mlp_out", "resid_post"], "my-saes", options=small)'),
    (r"SampleOptions\(loss_max=0\.1, context=64, limit=8192\)", "SampleOptions(loss_max=99.0, context=8, limit=9)"),
    (r"DoctorOptions\(inputs=30", "DoctorOptions(checks=(1, 4), steps=(2, 4), inputs=3"),
    (r"\bdirections=Dir", "options=SteerOptions(new_tokens=3, plain_texts=texts[:1]), directions=Dir"),
)
"""What is smaller in the test than on the page."""


def test_small_names_layers_and_sizes() -> None:
    text = (
        'wb.harvest(wb.load_model("embedded"), tokens=80_000, sites=["resid_post.15"]); wb.SAEConfig(d_sae=4608, k=32)'
    )
    assert (
        _smaller(text)
        == 'wb.harvest(tiny, tokens=3000, sites=["resid_post.1"]); wb.SAEConfig(tokens=6000, batch=256, d_sae=64, k=4)'
    )


def _smaller(code: str) -> str:
    for pattern, value in SMALLER:
        code = re.sub(pattern, value, code)
    return code


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reader's folder with a model, texts and an SAE, and the values that the pages take as given."""
    share(tmp_path_factory)
    folder = tmp_path_factory.mktemp("reader")
    words = itertools.cycle(
        ["the", "dog", "ran", "home", "and", "the", "sea", "was", "calm", "while", "a", "man", "read", "the", "news"]
    )
    documents = [" ".join(itertools.islice(words, 40 + i)) for i in range(60)]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "one.txt").write_text("\n".join(documents), encoding="utf-8")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents), encoding="utf-8")
    made = planted(False, 0.3, std=0.2).model  # trained for other tests too
    made.hf.save_pretrained(folder / "tiny-model")
    made.tokenizer.save_pretrained(folder / "tiny-model")
    model = wb.load_model(folder / "tiny-model", dtype="float32")
    store = wb.harvest(model, wb.TextFiles([folder / "corpus.jsonl"], tokens=3000), sites=[SITE], out=folder / "acts")
    config = wb.SAEConfig(d_sae=64, k=4, tokens=6000, batch=256)
    runs = [wb.train_sae(store, replace(config, seed=seed), out=folder / "saes" / name) for seed, name in SAES]
    saes = [wb.load_sae(run.path) for run in runs]
    wb.score_features(model, saes[0], store).save(folder / "saes" / "l15" / "features")
    acts = model.capture(documents[:4], [SITE])[SITE]
    iv = [wb.Intervention.at(SITE, wb.Add(acts[0, -1], s)) for s in (0.5, 1.0)]
    return {
        "folder": folder, "model": model, "store": store, "prompts": documents[:4], "texts": documents[:4], "x": acts.reshape(-1, model.d_model),
        "other_x": acts.repeat(4, 1, 1),
        "sae": saes[0], "sae_a": saes[0], "sae_b": saes[1], "iv1": iv[0], "iv2": iv[1], "vector": acts[0, -1], "ids": [5, 6],
        "LogProbJudge": LogProbJudge, "verified": list(truth().never[:12]),
    }  # fmt: skip


def _of_circuits() -> dict[str, Any]:
    sae = wb.SAEConfig(tokens=600, batch=128, d_sae=32, k=4)
    small = circuits.SAETrainingOptions(tokens=600, context=16, expansion=2, sae=sae)
    return {"circuits": circuits, "model": agreeing_model(), "small": small, "cards": "features.html"}


OF_PAGE: dict[str, Callable[[], dict[str, Any]]] = {"circuits": _of_circuits}
"""What a page takes as given instead: the templates of behaviours need a tokenizer that has their words."""

SITE = "resid_post.1"
SAES = ((0, "l15"), (1, "other"))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_block_runs(path: Path, reader: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(reader["folder"], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    blocks = [_smaller(code) for code in BLOCK.findall(path.read_text(encoding="utf-8"))]
    for made in set(re.findall(r'out="([\w/]+)"', "".join(blocks))):  # the page makes these itself
        shutil.rmtree(tmp_path / made, ignore_errors=True)
    page = ModuleType(f"page_{path.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # dataclasses look their module up
    page.__dict__.update(reader, wb=wb, torch=torch, tiny=reader["model"], **OF_PAGE.get(path.stem, dict)())
    for number, source in enumerate(blocks, start=1):
        name = f"<{path.name}, block {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), page.__dict__)
