"""Loading a model: the embedded one, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workbench.core.arguments import checked
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ModelUnavailableError,
    ResourceError,
    WorkbenchError,
)
from workbench.core.numbers import byte_size, counted
from workbench.core.progress import quiet_libraries, task
from workbench.core.records import load_json
from workbench.core.tokenizer import TokenizerLike
from workbench.models.embedded import embedded_folder, gguf_folder
from workbench.models.hub import cached_folder, hub_folder
from workbench.models.model import Model
from workbench.models.weights import (
    pickled_class,
    require_every_weight,
    require_real_numbers,
    stored_dtypes,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST_TEXT = 300
_WEIGHTS_PER_BYTE = 8
"""More than any way of storing weights packs into a byte."""
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")


@checked
def load_model(
    name: str | Path | PreTrainedModel = "embedded",
    *,
    tokenizer: TokenizerLike | PreTrainedTokenizerBase | str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    revision: str | None = None,
    check: bool = True,
) -> Model:
    """A model ready for reading, editing and generating; without a tokenizer, where its folder holds none, from ids.

    Args:
        name: "embedded", a folder, a .gguf file, a Hugging Face hub id (one without an owner, such as "gpt2", from the
            local cache), or a Hugging Face model that is loaded already.
        tokenizer: of the model, or the name of one; None takes the one that lies beside the weights.
        dtype: "auto" takes bfloat16 where it is measurably faster than float32 on this machine.
        device: "auto" takes CUDA, then MPS, then the CPU; or the name of a device, such as "cuda:1".
        revision: branch, tag or commit of a hub id.
        check: run `Model.self_check` and raise if it fails.

    Raises:
        ModelUnavailableError: if the model is neither on disk nor reachable, its files are damaged, or a package that
            its weights or its tokenizer need is not installed.
        MissingFileError: if a path does not exist or is not a model folder.
        MismatchError: if weights are missing, left over or of another shape than the config says.
        CorruptFileError: if weights are NaN or infinite.
        ResourceError: if it will not fit into memory.
        SelfCheckError: if the model fails its identities.
    """
    if not isinstance(name, str | Path):
        return _wrapped(name, tokenizer, dtype, device, check)
    device = _pick_device(device)
    folder = _folder(str(name), revision)
    chosen = _pick_dtype(dtype, device)
    if folder is not None:
        _check_files(folder)
        _check_memory(folder, chosen, device)
    hf, own = _from_pretrained(str(folder or name), chosen, revision)
    if tokenizer is None:
        tokenizer = own
    hf.to(device).eval().requires_grad_(False)
    shown = "SmolLM2-135M-Instruct" if str(name) == "embedded" else _short_name(name)
    # a name from the local cache stays a name: the path of its snapshot is this machine's
    path = Path(name).expanduser()
    source = str(path.resolve()) if str(name) != "embedded" and path.exists() else str(name)
    model = Model(hf, _given(tokenizer), name=shown, source=source)
    if check:
        model.self_check().require()
    return model


def _wrapped(hf: PreTrainedModel, tokenizer: object, dtype: str | torch.dtype, device: str, check: bool) -> Model:
    """A Hugging Face model that is loaded already; its precision and device stay unless others are named."""
    if dtype != "auto":
        nn.Module.to(hf, dtype=_pick_dtype(dtype, device))
    if device != "auto":
        nn.Module.to(hf, device=torch.device(_require_device(device)))
    model = Model(hf.eval().requires_grad_(False), _given(tokenizer), name=str(hf.config.name_or_path or "model"))
    if check:
        model.self_check().require()
    return model


def _given(tokenizer: object) -> Any:
    """The tokenizer itself, or the one of this name."""
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def load_tokenizer(name: str | Path = "embedded", *, revision: str | None = None) -> Any:
    """The tokenizer of a model, without loading the model.

    Raises:
        MissingFileError: for a folder without a tokenizer; otherwise the errors of `load_model`.
    """
    where = str(_folder(str(name), revision) or name)
    if not _has_tokenizer(where):
        raise MissingFileError(
            f"{where} holds no tokenizer (no tokenizer.json or other file of one). Save the model's tokenizer there "
            "with save_pretrained, or give token ids instead of text."
        )
    return _tokenizer(where, revision)


def _short_name(name: str | Path) -> str:
    return (
        Path(name).stem
        if Path(name).suffix == ".gguf"
        else (Path(name).resolve().name if Path(name).exists() else str(name))
    )


def _folder(name: str, revision: str | None = None) -> Path | None:
    """Local folder of the model, or None for a hub id that is to be fetched."""
    if name == "embedded":
        return embedded_folder()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        with _loading(name):
            return gguf_folder(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingFileError(
                f"{path} is not a model folder: it has no config.json. Name a folder made by save_pretrained."
            )
        return path
    if path.exists():
        raise InvalidInputError(f"{path} is neither a model folder nor a .gguf file.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        if (cached := cached_folder(name, revision)) is not None:
            return cached
        raise MissingFileError(
            f"There is no model {name!r}. Give 'embedded', a folder, a .gguf file or a hub id such as org/name; a name "
            "without an owner is looked up in the local cache alone."
        )
    return hub_folder(name, revision)


def _from_pretrained(where: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    with _loading(where), task(total=None, description=f"Loading {where}"):
        # Shapes that differ are collected here and refused with their names below.
        both: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, revision=revision, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        hf, loaded = both
        require_every_weight(hf, loaded, where)
    return hf, _tokenizer(where, revision) if _has_tokenizer(where) else None


def _has_tokenizer(where: str) -> bool:
    """Whether a tokenizer is to be expected: always, but for a folder without any of its files."""
    names = [file.name for file in Path(where).iterdir()] if Path(where).is_dir() else ["tokenizer.json"]
    return any(name.startswith(_TOKENIZER_FILES) or name.endswith((".model", ".tiktoken")) for name in names)


def _tokenizer(where: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    with _loading(where):
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)


@contextlib.contextmanager
def _loading(where: str) -> Iterator[None]:
    """Turns the errors of transformers into one sentence, and its reports on the log into nothing."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_libraries():
            yield
    except (WorkbenchError, MemoryError):
        raise
    except Exception as error:
        # A config of unknown origin is computed with all over transformers, so what is raised has no common class.
        raise ModelUnavailableError(_sentence(where, error)) from error
    finally:
        logging.set_verbosity(verbosity)


def _sentence(where: str, error: Exception) -> str:
    """What an error of transformers says, on one line, and what to do about it."""
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())
    text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"
    if isinstance(error, ImportError):
        return f"Model {where!r} needs a package that is not installed or does not work here: {text} Install it first."
    if (held := pickled_class(error)) is not None:
        return f"Model {where!r} holds {held}, and loading it would run its code. Ask its author for safetensors."
    advice = "Check its files, or fetch them again." if Path(where).exists() else (
        "Check the name, or download it first and name its folder."
    )  # fmt: skip
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"Model {where!r} could not be loaded: {kind}{text or 'no message'} {advice}"


def _pick_device(device: str) -> str:
    if device != "auto":
        return _require_device(device)
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _require_device(device: str | torch.device) -> str:
    """The name of a device on which a tensor can be made.

    Raises:
        InvalidInputError: if there is none of this name.
    """
    n_cuda = torch.cuda.device_count()
    there = ["cpu", *(f"cuda:{i}" for i in range(n_cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
    try:
        kind = torch.device(device)
        found = kind.type != "meta" and torch.zeros(1, device=kind).item() == 0
    except (RuntimeError, AssertionError, ImportError, NotImplementedError, TypeError, ValueError):
        # what torch raises depends on the device and on how it was built
        found = False
    if not found:
        raise InvalidInputError(f"device={str(device)!r}: this machine has {', '.join(there)}. Use one, or 'auto'.")
    return str(device)


def _pick_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in (torch.float64, *_DTYPES.values()):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") or bf16_speedup() >= 1.3 else torch.float32
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InvalidInputError(
            f"dtype={dtype!r}: use 'auto', {', '.join(map(repr, _DTYPES))}, or the torch.dtype of one of them."
        )
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


def _check_files(folder: Path) -> None:
    """Refuses an index that leads out of the folder or to files that are not there, and unreadable settings.

    transformers overlooks generation settings that it can't read, and with them the tokens that end a text.

    Raises:
        CorruptFileError: with the name of the file.
    """
    settings = folder / "generation_config.json"
    with _loading(str(folder)):
        if settings.exists() and not isinstance(load_json(settings), dict):
            raise CorruptFileError(f"{settings} holds no JSON object. Fetch it again, or delete it.")
    for index in sorted(folder.glob("*.index.json")):
        with _loading(str(folder)):
            named = load_json(index)
        files = named.get("weight_map") if isinstance(named, dict) and "metadata" in named else None
        if not files or not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise CorruptFileError(f"{index} lacks metadata, or a weight_map from names to files. Fetch it again.")
        for file in sorted(set(files.values())):
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise CorruptFileError(f"{index} names {file}, which is outside its folder. Fetch it again.")
            if not (folder / file).is_file():
                raise CorruptFileError(f"{index} names {file}, which is not in {folder}. Fetch this file too.")


def _check_memory(folder: Path, dtype: torch.dtype, device: str) -> None:
    """Refuses a model that does not fit into memory, or whose config asks for much more than its files hold.

    Raises:
        MismatchError: if the files are too small for the config.
        ResourceError: if memory does not suffice.
    """
    size = sum(file.stat().st_size for file in weight_files(folder))
    n_weights, quantised = _described(folder)
    if size and n_weights > _WEIGHTS_PER_BYTE * size:
        raise MismatchError(
            f"{folder}: its config.json describes a model of {counted(n_weights, 'weights')}; its files hold "
            f"{counted(size, 'bytes')}. Fetch both again from the same revision."
        )
    if device != "cpu":
        return
    import psutil

    have = psutil.virtual_memory().available
    # Weights in the file's dtype while they are read, and once more in the wanted dtype at worst.
    need = int(size * (1.2 if dtype == torch.float32 else 1.5))
    need = need if quantised else max(need, n_weights * dtype.itemsize)
    if need > have:
        raise ResourceError(
            f"Loading {folder.name} as {dtype} needs about {byte_size(need)} of memory; {byte_size(have)} are free. "
            "Close other programs, choose dtype='bfloat16', or a smaller model."
        )


def _described(folder: Path) -> tuple[int, bool]:
    """How many weights the config of a folder describes, and whether they are stored in a quantised form."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading(str(folder)):
        load_json(folder / "config.json")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers, stored = getattr(config.get_text_config(), "num_hidden_layers", 0), stored_dtypes(folder)
        # Before anything is built: a loop over a billion layers has no end.
        if stored and isinstance(layers, int) and layers > len(stored):
            raise MismatchError(
                f"{folder}: its config.json describes {counted(layers, 'layers')}; its files hold "
                f"{counted(len(stored), 'tensors')}. Fetch both again from the same revision."
            )
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        require_real_numbers(hf, stored, str(folder))
        return sum(p.numel() for p in hf.parameters()), hasattr(config, "quantization_config")
