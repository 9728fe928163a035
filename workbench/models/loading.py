"""Loading a model: the embedded one, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from workbench.errors import InvalidInputError, MissingFileError, ModelUnavailableError, ResourceError
from workbench.models.embedded import cache_dir, convert_gguf, embedded_folder, quiet_transformers
from workbench.models.model import Model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path = "embedded",
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    revision: str | None = None,
    check: bool = True,
) -> Model:
    """A model ready for reading, editing and generating.

    Args:
        name: "embedded", a folder, a .gguf file, or a Hugging Face hub id.
        dtype: "auto" takes bfloat16 where it is measurably faster than float32 on this machine.
        device: "auto" takes CUDA, then MPS, then the CPU.
        revision: branch, tag or commit of a hub id.
        check: run `Model.self_check` and raise if it fails.

    Raises:
        ModelUnavailableError: if the model is neither on disk nor reachable.
        MissingFileError: if a path does not exist or is not a model folder.
        ResourceError: if it will not fit into memory.
        SelfCheckError: if the model fails its identities.
    """
    device = _pick_device(device)
    folder = _folder(str(name))
    chosen = _pick_dtype(dtype, device)
    if folder is not None:
        _check_memory(folder, chosen, device)
    hf, tokenizer = _from_pretrained(str(folder or name), chosen, revision)
    hf.to(device).eval().requires_grad_(False)
    model = Model(hf, tokenizer, name="SmolLM2-135M-Instruct" if str(name) == "embedded" else _short_name(name))
    if check:
        model.self_check().require()
    return model


def load_tokenizer(name: str | Path = "embedded", *, revision: str | None = None) -> Any:
    """The tokenizer of a model, without loading the model. Same names and errors as `load_model`."""
    return _tokenizer(str(_folder(str(name)) or name), revision)


def _short_name(name: str | Path) -> str:
    return (
        Path(name).stem
        if Path(name).suffix == ".gguf"
        else (Path(name).resolve().name if Path(name).exists() else str(name))
    )


def _folder(name: str) -> Path | None:
    """Local folder of the model, or None for a hub id."""
    if name == "embedded":
        return embedded_folder()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _converted(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingFileError(
                f"{path} is not a model folder: it has no config.json. Name a folder made by save_pretrained."
            )
        return path
    if path.exists():
        raise InvalidInputError(f"{path} is neither a model folder nor a .gguf file.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MissingFileError(
            f"There is no model {name!r}. Give 'embedded', a folder, a .gguf file or a hub id such as org/name."
        )
    return None


def _converted(gguf: Path) -> Path:
    if not gguf.is_file():
        raise MissingFileError(f"There is no GGUF file {gguf}.")
    stamp = f"{gguf.stem}-{gguf.stat().st_size}-{int(gguf.stat().st_mtime)}"
    folder = cache_dir() / "gguf" / stamp
    if not (folder / "config.json").is_file():
        scratch = folder.with_name(f".{folder.name}.tmp")
        scratch.mkdir(parents=True, exist_ok=True)
        convert_gguf(gguf, scratch)
        scratch.rename(folder)
    return folder


def _from_pretrained(where: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    with _loading(where):
        hf = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, revision=revision, trust_remote_code=False)
    return hf, _tokenizer(where, revision)


def _tokenizer(where: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    with _loading(where):
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)


@contextlib.contextmanager
def _loading(where: str) -> Iterator[None]:
    """Turns the errors of transformers into one sentence."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnavailableError(
            f"Model {where!r} could not be loaded: {first} Check the name, or download it first and name its folder."
        ) from error


def _pick_device(device: str) -> str:
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _pick_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") or bf16_speedup() >= 1.3 else torch.float32
    if dtype not in _DTYPES:
        raise InvalidInputError(f"dtype={dtype!r}: use 'auto', {', '.join(map(repr, _DTYPES))} or a torch.dtype.")
    return _DTYPES[dtype]


def bf16_speedup(repeats: int = 3) -> float:
    """How many times faster a bfloat16 matrix product is than a float32 one on this CPU; takes about 0.1 s."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        torch.mm(a, b)
        laps = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b)
            laps.append(time.perf_counter() - start)
        times[dtype] = min(laps)
    return times[torch.float32] / times[torch.bfloat16]


def _check_memory(folder: Path, dtype: torch.dtype, device: str) -> None:
    if device != "cpu":
        return
    import psutil

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    have = psutil.virtual_memory().available
    # Weights in the file's dtype while they are read, and once more in the wanted dtype at worst.
    need = int(size * (1.2 if dtype == torch.float32 else 1.5))
    if need > have:
        raise ResourceError(
            f"Loading {folder.name} as {dtype} needs about {need / 2**30:.1f} GiB of memory; "
            f"{have / 2**30:.1f} GiB are free. "
            "Close other programs, choose dtype='bfloat16', or a smaller model."
        )
