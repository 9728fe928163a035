"""A copy of a model folder with some token rows replaced; every other tensor stays bit for bit as it was."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import InvalidInputError, MismatchError, MissingFileError, NotExactlyExportable
from workbench.core.jsontext import Record
from workbench.core.numbers import number
from workbench.core.progress import track
from workbench.core.records import load_json, save_json
from workbench.glitch.ranking.weights import INDEX, Matrix, TokenMatrices, in_folder, tensor_files
from workbench.glitch.repairing.repair import Repair, with_sources
from workbench.glitch.reporting import TokenReport
from workbench.glitch.scanning.scanner import local_path
from workbench.models.head import agree
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.report.base import Headline, Metric, Says, Table, beside

NOTE = "repair.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")


def save_repaired(made: Repair, source: str | Path, out: str | Path, *, untie: bool = False) -> Path:
    """Writes the repaired model as a folder of its own.

    Only the rows of the repaired tokens change; configuration, tokenizer and all other files are copied. The files
    appear under `out` when all of them are written.

    Args:
        made: the repair.
        source: the model's safetensors folder, sharded or not.
        out: a new folder.
        untie: give the copy of a tied model an output matrix of its own, so that reading can be repaired without
            writing, or the other way round. It takes as much space as the embedding.

    Raises:
        InvalidInputError: if `out` is in use or inside `source`.
        MismatchError: if `source` is not the model that the repair was made for.
        NotExactlyExportable: for a repair that no weights of this model can express, with the reason.
    """
    source, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInputError(f"{out} exists and is not an empty folder; name a new one for the repaired model.")
    if out == source or source in out.parents:
        raise InvalidInputError(f"{out} lies inside the model's own folder {source}; name a folder outside of it.")
    matrices = in_folder(source)
    again = _from_files(made, matrices, source)
    copies = _copies(source, matrices.E_in)
    config: Record = load_json(source / "config.json", dict, foreign=True)
    new_head = _new_head(again, copies, config, untie)
    changes = _changes(again, matrices, copies, new_head)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "model"
        ignored = shutil.ignore_patterns("*.safetensors", INDEX, *_OTHER_WEIGHTS, ".*")
        shutil.copytree(source, folder, ignore=ignored)
        _write_weights(source, folder, matrices.E_in.name, changes, made.ids, new_head)
        if new_head is not None:
            for part in (config, config.get("text_config")):
                if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
                    part["tie_word_embeddings"] = False
            save_json(folder / "config.json", config)
        save_json(folder / NOTE, _record(again, source, new_head))
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    return out


def _from_files(made: Repair, matrices: TokenMatrices, source: Path) -> Repair:
    """The repair with rows made from the files, which may be more exact than the loaded model's."""
    fits = matrices.tied == made.tied and max(made.ids) < min(matrices.E_in.n_rows, matrices.E_out.n_rows)
    again = with_sources(made, matrices, made.sources) if fits else made
    for before, after in ((made.E_in, again.E_in), (made.E_out, again.E_out)):
        if before is not None and after is not None:
            fits &= before.shape == after.shape and float((before - after).norm()) <= 0.03 * float(before.norm())
    if not fits:
        raise MismatchError(
            f"{source} ({matrices.E_in.n_rows} x {matrices.E_in.width}, {'tied' if matrices.tied else 'untied'}) is "
            f"not the model {made.model} that the repair was made for: its rows are others. Name that model's folder."
        )
    return again


def _copies(source: Path, E_in: Matrix) -> tuple[str, ...]:
    """Tensors that are bit-for-bit copies of the embedding: the output matrix of a tied model that was saved twice."""
    from safetensors import safe_open

    copies = []
    for name, file in tensor_files(source).items():
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            if name != E_in.name and tuple(part.get_shape()) == (E_in.n_rows, E_in.width):
                blocks = E_in.blocks()
                if all(torch.equal(part[start : start + len(block)].float(), block) for start, block in blocks):
                    copies.append(name)
    return tuple(copies)


def _new_head(made: Repair, copies: Sequence[str], config: Mapping[str, object], untie: bool) -> str | None:
    """Name of the output matrix that the copy needs and its original shares with the embedding; None if none."""
    if not made.tied or made.options.reading == made.options.writing == "mean":
        return None
    if copies and not config.get("tie_word_embeddings", False):
        return None
    if not untie:
        raise NotExactlyExportable(
            f"{made.model} has one matrix for reading and writing, so reading={made.options.reading!r} with "
            f"writing={made.options.writing!r} has no weights. Repair both, pass untie=True, or use the intervention."
        )
    return copies[0] if copies else f"{made.head}.weight"


def _changes(
    made: Repair, matrices: TokenMatrices, copies: Sequence[str], new_head: str | None
) -> dict[str, Float[Tensor, "k ..."]]:
    changes: dict[str, Tensor] = {}
    if made.E_in is not None:
        changes[matrices.E_in.name] = made.E_in
    if made.E_out is not None:
        heads = (new_head, *copies) if matrices.tied else (matrices.E_out.name,)
        changes |= {name: made.E_out for name in heads if name is not None}
    if made.bias is not None:
        if matrices.bias is None:
            raise NotExactlyExportable(
                f"writing={made.options.writing!r} needs an output bias, which {made.model} does not have. Use the "
                "intervention, or a ban list (workbench glitch export)."
            )
        changes[f"{made.head}.bias"] = made.bias
    return changes


def _write_weights(
    source: Path, folder: Path, embedding: str, changes: Mapping[str, Tensor], ids: Sequence[int], new_head: str | None
) -> None:
    """Every safetensors file again: as it is, or with the changed rows and, beside the embedding, the new head."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(set(tensor_files(source).values()))
    index: Record = load_json(source / INDEX, dict) if (source / INDEX).is_file() else {}
    for file in track(files, total=len(files), description="write the repaired weights", unit="files"):
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            if not names & {embedding, *changes}:
                shutil.copyfile(file, folder / file.name)
                continue
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in names}
        if new_head is not None and embedding in names:
            tensors.setdefault(new_head, tensors[embedding])
            if index:
                index["weight_map"].setdefault(new_head, file.name)
        made = {name: _changed(name, tensor, changes.get(name), ids) for name, tensor in tensors.items()}
        save_file(made, folder / file.name, metadata)
    if index:
        save_json(folder / INDEX, index)


def _changed(name: str, tensor: Tensor, values: Tensor | None, ids: Sequence[int]) -> Tensor:
    if not tensor.is_floating_point() and values is not None:
        raise NotExactlyExportable(
            f"{name} is stored as {tensor.dtype}, which can't take a row of numbers. Save the model unquantised first."
        )
    # A copy in any case: a new head must not share memory with the embedding, which safetensors refuses.
    out = tensor.clone()
    if values is not None:
        out[list(ids)] = values.to(out.dtype)
    return out


def _record(made: Repair, source: Path, head: str | None) -> Mapping[str, object]:
    rows = [
        {"token_id": i, "text": text, "sources": list(pieces)}
        for i, text, pieces in zip(made.ids, made.texts, made.sources, strict=True)
    ]
    return {
        "repaired_from": str(source), "model_fingerprint": made.made_for, "options": made.options,
        "untied": head is not None, "tokens": rows,
    }  # fmt: skip


def source_folder(model: Model) -> Path:
    """The safetensors folder that a model was loaded from; of a .gguf file, the folder it was converted to.

    Raises:
        MissingFileError: if it was made in memory or its files are gone.
    """
    where = str(getattr(model.hf.config, "_name_or_path", ""))
    if not where:
        raise MissingFileError(f"{model.name} was not loaded from files, so there is no folder to copy. Save it first.")
    return local_path(where)


@dataclass(frozen=True)
class CopyReport(TokenReport):
    """Whether a saved copy does what the edit does: their largest difference of a next-token logit is rounding only.

    `effect` is the largest change of such a logit by the repair itself.
    """

    _title = "The saved copy"

    folder: Path
    difference: float
    effect: float
    agrees: bool
    n: int
    stored: str

    def headline(self) -> Headline:
        """Whether the copy agrees with the edit on every prompt."""
        says = Says("The saved copy does what the edit does.", "", "The saved copy does not do what the edit does.")
        return Headline.of(says, self._beside(), "at least")

    def _beside(self) -> Table:
        return beside("copies that agree with the edit", ("loaded again", int(self.agrees)), ("needed", 1))

    def findings(self) -> tuple[str, ...]:
        """One sentence."""
        word = "does what the edit does" if self.agrees else "DOES NOT DO WHAT THE EDIT DOES"
        return (
            f"The copy in {self.folder}, loaded again, {word}: its logits differ by at most "
            f"{number(self.difference)} on "
            f"{self.n} prompts, where the repair changes them by up to {number(self.effect)} ({self.stored} rows).",
        )

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers."""
        return {"copy_difference": self.difference, "copy_effect": self.effect, "copy_agrees": int(self.agrees)}

    def _blocks(self) -> tuple[()]:
        return ()


def compare_copy(model: Model, made: Repair, folder: Path, *, size: int = 32) -> CopyReport:
    """Loads a saved copy and compares it with the edited model on prompts that end in the repaired tokens."""
    again = load_model(folder, dtype=model.dtype, device=str(model.device), check=False)
    begun = model.tokens("She pointed at the word").ids[0].tolist()
    rows = torch.tensor([[*begun, i] for i in made.ids[:size]])
    before, after = model.logits(rows), again.logits(rows)
    with model.plan(made.intervention()):
        edited = model.logits(rows)
    stored = in_folder(folder).E_in.stored
    exact = stored.upper() in ("F32", "FLOAT32") and model.dtype == torch.float32
    return CopyReport(
        folder, float((after - edited).abs().max()), float((edited - before).abs().max()),
        agree(edited, after, torch.float32 if exact else torch.bfloat16), len(rows), stored,
    )  # fmt: skip
