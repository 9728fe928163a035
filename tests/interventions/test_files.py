from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.interventions.builders import D_SAE, sae_lens_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MissingFileError,
    ShapeError,
    UnknownConfigKeyError,
    UnknownSiteError,
    WorkbenchError,
)
from workbench.hooks.sites import Site
from workbench.interventions import files, gates, saes
from workbench.interventions.bytoken import MixEntries, ReplaceTokens
from workbench.interventions.chosen import Mask, Rows
from workbench.interventions.gates import CASTGate, CosineGate, FnGate, Gate, ProbeGate, SAEGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op, Where
from workbench.interventions.ops import Add, AddScaled, Affine, LowRank, Map, PerRow, ProjectOut
from workbench.interventions.replacing import Ablate, Patch, Replace
from workbench.interventions.saes import SAEAblate, SAEAdd, SAEAddMax, SAEClamp, SAEScale
from workbench.interventions.scopes import (
    After,
    All,
    Both,
    Either,
    Generated,
    Last,
    Not,
    NotPrefix,
    Pos,
    Prompt,
    Scope,
    TokenIs,
)
from workbench.interventions.shapes import Cap, ClampProjection, EqualNorm, NormPreserve, Rotate, Threshold

GENERATOR = torch.Generator().manual_seed(5)
V = torch.randn(3, D_MODEL, generator=GENERATOR)
H = torch.randn(4, D_MODEL, generator=GENERATOR)
ROW_VALUES = torch.tensor([1.0, -2.0])
SAE = sae_lens_sae("jumprelu")
WHERE = Where(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([7, 8, 9, 7]))

OPS: tuple[Op, ...] = (
    Add(V[0], 2.5),
    Add(V[:2], ROW_VALUES),
    AddScaled(V[0], 0.5),
    AddScaled(V[:2], ROW_VALUES, size=7.0),
    ProjectOut(V[0]),
    ProjectOut(V),
    ProjectOut(torch.stack([V[:2], V[1:]])),
    Affine(torch.randn(D_MODEL, D_MODEL, generator=GENERATOR)),
    Affine(torch.randn(D_MODEL, D_MODEL, generator=GENERATOR), V[0]),
    LowRank(V[:2], V[1:]),
    LowRank(V[:2], V[1:], ROW_VALUES),
    PerRow((Add(V[0]), NormPreserve(ProjectOut(V[1]))), torch.tensor([1, 0])),
    Ablate(),
    Ablate("mean", V[0], directions=V[1:]),
    Ablate("resample", V, seed=4),
    Ablate("resample", V, seed=torch.tensor([4, 5])),
    Replace(V[0]),
    Replace(V[:2]),
    Patch(torch.randn(2, 3, D_MODEL, generator=GENERATOR)),
    Patch(torch.randn(2, 3, D_MODEL, generator=GENERATOR), torch.tensor([[True, True, False]] * 2), V[:2]),
    ReplaceTokens(torch.tensor([9, 7]), V[:2]),
    MixEntries(torch.tensor([3, 1]), torch.tensor([[0, 2], [4, 0]]), V[:2, :2], V[0, :2], V[1, :2]),
    ClampProjection(V[0], 3.0),
    ClampProjection(V[:2], ROW_VALUES, "min"),
    Cap(V[0], 0.5),
    Cap(V[0], math.inf),
    Threshold(V[0], -math.inf, 2.0),
    Threshold(V[0], 1.0, 2.0),
    EqualNorm((Add(V[0]), ClampProjection(V[1], 0.5)), V[2]),
    Rotate(V[0], 0.3),
    Rotate(None, 0.3, plane=V[:2]),
    NormPreserve(Add(V[0])),
    SAEAdd(SAE, [3], 2.0),
    SAEAddMax.of_features(SAE, [3, 5], ROW_VALUES),
    SAEClamp(SAE, [1, 2], torch.tensor([1.0, 2.0]), error="drop", when="active", mode="min"),
    SAEClamp(SAE, torch.tensor([[1], [2]]), torch.tensor([[1.0], [2.0]])),
    SAEScale(SAE, [1, 2], 0.5),
    SAEAblate(SAE, [0, D_SAE - 1]),
    When(CosineGate(V[0], at="resid_post.0", threshold=0.25, below=True), Add(V[1]), Cap(V[2], 1.0)),
    When(CASTGate(V[0], when="token"), Add(V[1])),
    When(ProbeGate(V[0], bias=-0.5, reduce="max"), Add(V[1])),
    When(SAEGate(SAE, 7, reduce="last"), SAEScale(SAE, [7], 0.0)),
)
SCOPES: tuple[Scope, ...] = (
    All(),
    Prompt(),
    Generated(),
    Last(),
    Pos(0, -1),
    NotPrefix(2),
    TokenIs(3, "a"),
    After("[/INST]"),
    After((3, 4), "last"),
    Mask(torch.tensor([[True, False], [False, True]])),
    Rows(torch.tensor([True, False])),
    Both(Prompt(), Not(Pos(0))),
    Either(Generated(), Both(Last(), All())),
)


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, through ops, gates, scopes and SAEs."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, torch.nn.Module):
        mine, other = a.state_dict(), b.state_dict()
        return type(a) is type(b) and mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and a == b


def kinds(value: Any) -> set[str]:
    """Names of all ops, gates and scopes inside one."""
    if isinstance(value, tuple):
        return set().union(*map(kinds, value))
    if not isinstance(value, (Op, Gate, Scope)):
        return set()
    return {type(value).__name__}.union(*(kinds(getattr(value, f.name)) for f in dataclasses.fields(value)))


def test_the_lists_here_hold_every_kind_there_is() -> None:
    ours = {
        name
        for registry in (Op.registry, gates.Gate.registry, Scope.registry)
        for name, kind in registry.items()
        if kind.__module__.startswith("workbench.")
    }
    assert ours - {"Map", "FnGate"} == kinds(OPS) | kinds(SCOPES)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ops_come_back_bit_for_bit(op: Op, tmp_path: Path) -> None:
    intervention = Intervention.at("resid_post.1", op, Prompt() & NotPrefix(1))
    loaded = Intervention.load(intervention.save(tmp_path / "edit"))
    (edit,) = loaded.edits
    assert (edit.site, edit.scope) == (Site("resid_post", 1), Prompt() & NotPrefix(1))
    assert same(op, edit.op)
    if not isinstance(op, When):
        assert torch.equal(op(H, WHERE), edit.op(H, WHERE))
    again = Intervention.load(loaded.save(tmp_path / "again"))
    assert same(loaded.edits, again.edits)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_scopes_come_back(scope: Scope, tmp_path: Path) -> None:
    saved = Intervention.at("resid_post.-1", Add(V[0]), scope).save(tmp_path)
    (edit,) = Intervention.load(saved).edits
    assert same(scope, edit.scope)


@pytest.mark.parametrize("site", ["resid_post.1", "resid_post.-1", "z.1.h0", "embed", "blocks.0.hook_attn_out"])
def test_sites_order_and_model_come_back(site: str, tmp_path: Path) -> None:
    one = Intervention.at(site, Add(torch.ones(3)))
    intervention = dataclasses.replace(one + Intervention.at(site, ProjectOut(torch.ones(3))), made_for="abc")
    loaded = Intervention.load(intervention.save(tmp_path))
    assert [str(edit) for edit in loaded.edits] == [str(edit) for edit in intervention.edits]
    assert loaded.made_for == "abc"
    assert Intervention.load(Intervention().save(tmp_path / "none")) == Intervention()


def test_a_loaded_intervention_does_the_same_to_a_model(tmp_path: Path) -> None:
    model = tiny_model()
    ids = torch.arange(10, 22).view(2, 6)
    intervention = (
        Intervention.at("resid_post.0", ProjectOut(V))
        + Intervention.at("resid_post.1", SAEClamp(SAE, [1, 2], 3.0), ~Pos(0))
        + Intervention.at("mlp_out.1", When(SAEGate(SAE, 2, threshold=-1.0), AddScaled(V[:2], ROW_VALUES)))
    )
    loaded = Intervention.load(intervention.save(tmp_path))
    with model.plan(intervention):
        wanted = model.logits(ids)
    with model.plan(loaded):
        assert torch.equal(model.logits(ids), wanted)
    assert not torch.equal(model.logits(ids), wanted)


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "topk_rescaled"])
def test_each_kind_of_sae_comes_back(architecture: str, tmp_path: Path) -> None:
    sae = sae_lens_sae(architecture, "constant_norm_rescale")
    op = SAEScale(sae, [1, 2], 0.0)
    (edit,) = Intervention.load(Intervention.at("resid_post.1", op).save(tmp_path)).edits
    assert torch.equal(op(H), edit.op(H))


def test_an_sae_of_several_edits_is_written_once_and_shared_again(tmp_path: Path) -> None:
    other = sae_lens_sae("topk")
    intervention = Intervention()
    for layer, sae in ((0, SAE), (1, SAE), (2, other)):
        intervention += Intervention.at(f"resid_post.{layer}", SAEAblate(sae, [layer]))
    intervention.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "intervention.json", "sae-0", "sae-1", "tensors.safetensors"
    ]  # fmt: skip
    first, second, third = (edit.op.sae for edit in Intervention.load(tmp_path).edits)
    assert first is second
    assert same(third, other)


def test_functions_can_not_be_saved_and_nothing_is_written(tmp_path: Path) -> None:
    for op in (Map(torch.relu), When(FnGate(lambda h: h.sum(1)), Add(V[0])), NormPreserve(Map(torch.relu))):
        with pytest.raises(InvalidInputError, match="function"):
            Intervention.at("resid_post.1", op).save(tmp_path / "edit")
    assert not list(tmp_path.iterdir())


def test_saving_over_another_intervention_leaves_nothing_of_it(tmp_path: Path) -> None:
    Intervention.at("resid_post.1", Add(V[0])).save(tmp_path)
    Intervention.at("resid_post.1", Ablate()).save(tmp_path)
    assert not (tmp_path / "tensors.safetensors").exists()
    assert same(Intervention.load(tmp_path).edits[0].op, Ablate())


def test_a_crash_while_saving_over_another_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Intervention.at("resid_post.1", Add(V[0])).save(tmp_path)

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("workbench.interventions.files.save_json", crash)
    with pytest.raises(OSError, match="disk full"):
        Intervention.at("resid_post.1", Add(V[1])).save(tmp_path)
    with pytest.raises(MissingFileError, match="holds no intervention"):
        Intervention.load(tmp_path)


# Files that are not what was written.


def content(record: dict[str, Any]) -> dict[str, Any]:
    return record["content"]


def op_of(record: dict[str, Any]) -> dict[str, Any]:
    return record["content"]["edits"][0]["op"]


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = folder / "intervention.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return Intervention.at("resid_post.1", SAEAddMax.of_features(SAE, [3]), Pos(1)).save(tmp_path / "edit")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r: op_of(r).update(op="SAEAdMax"), UnknownConfigKeyError, "no op 'SAEAdMax'.*Did you mean SAEAddMax"),
        (lambda r: op_of(r).update(op=["SAEAddMax"]), CorruptFileError, "(not a saved intervention|can't be read)"),
        (lambda r: op_of(r)["fields"].update(strenght=1.0), UnknownConfigKeyError, "Did you mean strength"),
        (lambda r: op_of(r)["fields"].pop("sae"), CorruptFileError, "sae"),
        (lambda r: op_of(r).update(fields=[1]), CorruptFileError, "(not a saved intervention|can't be read)"),
        (lambda r: op_of(r)["fields"]["direction"].update(tensor="x"), CorruptFileError, "no tensor 'x'"),
        (lambda r: op_of(r)["fields"]["direction"].update(tensor=["x"]), CorruptFileError, "(not a saved intervention|can't be read)"),
        (lambda r: op_of(r)["fields"].update(direction="x"), WorkbenchError, "SAEAddMax"),
        (lambda r: op_of(r)["fields"]["sae"].update(sae="sae-9"), MissingFileError, "lacks the folder sae-9"),
        (lambda r: content(r)["edits"][0].update(op=3), CorruptFileError, "(not a saved intervention|can't be read)"),
        (lambda r: content(r)["edits"][0].update(scope=None), CorruptFileError, "(not a saved intervention|can't be read)"),
        (lambda r: content(r)["edits"][0].pop("scope"), CorruptFileError, "scope"),
        (lambda r: content(r)["edits"][0]["scope"].update(scope="Position"), UnknownConfigKeyError, "no scope"),
        (lambda r: content(r)["edits"][0]["scope"].update(fields={}), CorruptFileError, "positions"),
        (lambda r: content(r)["edits"][0]["scope"].update(fields={"ids": [1]}), UnknownConfigKeyError, "'ids'"),
        (lambda r: content(r)["edits"][0].update(site="resid_pst.1"), UnknownSiteError, "resid_post"),
        (lambda r: content(r).update(edits=7), CorruptFileError, "(not a saved intervention|can't be read)"),
        (lambda r: content(r).pop("made_for"), CorruptFileError, "made_for"),
        (lambda r: r.update(content=[1]), CorruptFileError, "no object"),
        (lambda r: r.pop("content"), CorruptFileError, "content"),
        (lambda r: r.update(format=99), CorruptFileError, "format 1"),
    ],
)  # fmt: skip
def test_changed_json_is_refused(saved: Path, change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Intervention.load(changed(saved, change))


@pytest.mark.parametrize("name", ["..", "../edit/sae-0", "/etc", "sae-0/..", "", ".", "./sae-0"])
def test_an_sae_is_read_from_its_own_folder_only(saved: Path, name: str) -> None:
    def point_elsewhere(record: dict[str, Any]) -> None:
        op_of(record)["fields"]["sae"]["sae"] = name

    with pytest.raises(CorruptFileError, match="outside its folder"):
        Intervention.load(changed(saved, point_elsewhere))


def test_an_archive_of_the_folder_is_read_as_the_folder_is(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "edits.zip"
    with file.open("wb") as opened:
        files.pack(saved, opened)
    assert str(Intervention.load(file)) == str(Intervention.load(saved))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("../outside.json", "{}")
    with pytest.raises(MissingFileError, match="holds no intervention"):
        Intervention.load(tmp_path / "other.zip")
    assert not (tmp_path.parent / "outside.json").exists()
    file.write_bytes(b"PK no archive")
    with pytest.raises(CorruptFileError, match=r"edits.zip.*can't be read.*Download or save it again"):
        Intervention.load(file)


def test_broken_files_are_refused(saved: Path) -> None:
    whole = (saved / "tensors.safetensors").read_bytes()
    for bad in (b"", b"not tensors", whole[:-3]):
        (saved / "tensors.safetensors").write_bytes(bad)
        with pytest.raises(CorruptFileError, match="can't be read"):
            Intervention.load(saved)
    (saved / "tensors.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="has no tensor"):
        Intervention.load(saved)
    (saved / "tensors.safetensors").write_bytes(whole)
    weights = next((saved / "sae-0").glob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(CorruptFileError, match="not an SAE of sae_lens"):
        Intervention.load(saved)
    weights.write_bytes(kept)
    (saved / "sae-0" / "cfg.json").unlink()
    with pytest.raises(CorruptFileError, match="not an SAE of sae_lens"):
        Intervention.load(saved)
    (saved / "intervention.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not JSON"):
        Intervention.load(saved)
    with pytest.raises(MissingFileError, match="holds no intervention"):
        Intervention.load(saved / "nowhere")


def test_tensors_are_checked_and_normalised_when_they_are_not_as_saved(tmp_path: Path) -> None:
    Intervention.at("resid_post.1", AddScaled(V[0])).save(tmp_path)
    ((name, tensor),) = safetensors.torch.load_file(tmp_path / "tensors.safetensors").items()
    safetensors.torch.save_file({name: 10 * tensor}, tmp_path / "tensors.safetensors")
    op = Intervention.load(tmp_path).edits[0].op
    assert isinstance(op, AddScaled)
    torch.testing.assert_close(op.vector, tensor)
    for bad, error in ((tensor * torch.nan, InvalidInputError), (tensor.view(1, 1, -1), ShapeError)):
        safetensors.torch.save_file({name: bad.contiguous()}, tmp_path / "tensors.safetensors")
        with pytest.raises(error, match="AddScaled"):
            Intervention.load(tmp_path)
    Intervention.at("resid_post.1", ProjectOut(V)).save(tmp_path)
    safetensors.torch.save_file({name.replace("vector", "directions"): 2 * V}, tmp_path / "tensors.safetensors")
    projected = Intervention.load(tmp_path).edits[0].op(H)
    torch.testing.assert_close(projected, ProjectOut(V)(H), atol=1e-5, rtol=1e-5)


def test_loading_runs_no_code(saved: Path) -> None:
    def name_a_function(record: dict[str, Any]) -> None:
        content(record)["edits"][0]["op"] = {"op": "Map", "fields": {"fn": "os.getcwd"}}

    with pytest.raises(CorruptFileError, match="Python function"):
        Intervention.load(changed(saved, name_a_function))


def test_saes_module_names_are_those_in_files() -> None:
    assert {name for name in Op.registry if name.startswith("SAE")} == {
        name for name in vars(saes) if name.startswith("SAE") and isinstance(getattr(saes, name), type)
    }
