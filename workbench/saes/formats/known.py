"""Which format a folder or file is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workbench.core.errors import MissingFileError, UnknownNameError, did_you_mean
from workbench.saes.formats import dictionary_learning, gemma_scope, sparsify
from workbench.saes.formats.files import read_tensors
from workbench.saes.formats.overrides import Overrides
from workbench.saes.formats.raw import RawSAE
from workbench.saes.formats.tensors import bare

Reader = Callable[[Path, Overrides], RawSAE]

SAE_LENS = "sae_lens"
SAE_LENS_FILES = ("cfg.json", "sae_weights.safetensors")
READERS: dict[str, Reader] = {
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
    "gemma_scope": gemma_scope.read,
    "tensors": lambda path, overrides: bare(read_tensors(path), path, overrides),
}
FORMATS = {
    SAE_LENS: " and ".join(SAE_LENS_FILES),
    "sparsify": " and ".join(sparsify.NEEDS),
    "dictionary_learning": " and ".join(dictionary_learning.NEEDS),
    "gemma_scope": " or ".join(gemma_scope.NEEDS),
    "tensors": "one .safetensors, .pt, .pth or .npz file, named directly",
}
"""The formats that are read, and by which files each is known."""

_SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")


def located(path: Path) -> Path:
    """The folder of one SAE if the path is a file in it, whose config must be read as well; else the path itself."""
    inside = {*SAE_LENS_FILES, *sparsify.NEEDS, *dictionary_learning.NEEDS, *gemma_scope.NEEDS}
    if not path.is_file() or path.name not in inside:
        return path
    try:
        recognise(path.parent)
    except MissingFileError:
        return path
    return path.parent


def recognise(path: Path) -> str:
    """The format of a folder or file.

    Raises:
        MissingFileError: if it is none of those known; says what is there.
    """
    if path.is_file() and path.suffix in _SUFFIXES:
        return "tensors"
    if all((path / name).is_file() for name in SAE_LENS_FILES):
        return SAE_LENS
    for name, module in (
        ("sparsify", sparsify),
        ("dictionary_learning", dictionary_learning),
        ("gemma_scope", gemma_scope),
    ):
        if module.recognise(path):
            return name
    raise MissingFileError(_nothing(path))


def require_format(name: str) -> str:
    """A format's name.

    Raises:
        UnknownNameError: if there is none of this name.
    """
    if name not in FORMATS:
        raise UnknownNameError(f"format={name!r} is not known. {did_you_mean(name, FORMATS)}")
    return name


def _nothing(path: Path) -> str:
    if (path / "checkpoint.safetensors").is_file():
        return (
            f"{path} holds an unfinished training run: {', '.join(SAE_LENS_FILES)} not found. Resume it with "
            "`workbench sae train`."
        )
    here = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir()) if path.is_dir() else []
    missing = [name for name in SAE_LENS_FILES if name not in here]
    formats = "; ".join(f"{name} ({files})" for name, files in FORMATS.items())
    shown = ", ".join(here[:20]) + (", …" if len(here) > 20 else "") or "nothing"
    return (
        f"{path} holds no SAE: {', '.join(missing)} not found. It holds {shown}. Formats that are read: {formats}. "
        "Train one with `workbench sae train`, or name the folder of one SAE."
    )
