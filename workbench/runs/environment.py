"""What a result depends on besides its configuration: code, versions, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import cast

from workbench.core.errors import CorruptFileError, InvalidInputError
from workbench.core.records import from_jsonable, load_json
from workbench.runs.content import Environment, GitState

PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "numpy")
"""Distributions whose version can change a number."""

_READ_AGAIN = {
    "name": str, "title": str, "started": str, "models": list[dict[str, str]], "resumed": list[dict[str, object]],
    "arguments": dict[str, object],
}  # fmt: skip
"""Of env.json, what a continued run, its report or a list of runs uses."""

_GIT_SECONDS = 10
_CHECKOUT = Path(__file__).resolve().parents[2]


def environment(seed: int | None = None) -> Environment:
    """Versions, machine, seed and the commit of the running code (null outside a git checkout)."""
    return {
        "git": git_state(),
        "command": sys.argv,
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("interp-workbench", *PACKAGES)},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": _threads(),
        "memory_gib": _memory_gib(),
    }


def read_environment(folder: Path) -> Environment:
    """What env.json of a run folder says; of what is read again the types are checked, since people edit the file.

    Raises:
        CorruptFileError: if it is no JSON object, or a value is of another type.
    """
    env = load_json(folder / "env.json", dict)
    for key, kind in _READ_AGAIN.items():
        if key not in env:
            continue
        try:
            from_jsonable(kind, env[key])
        except InvalidInputError as error:
            raise CorruptFileError(
                f"{folder / 'env.json'}, {key!r}: {error} Or remove {key!r} from the file."
            ) from None
    return cast("Environment", env)


def git_state(folder: Path = _CHECKOUT) -> GitState | None:
    """Commit of the checkout that tracks this package, and whether tracked files differ from it."""
    # a virtual environment inside somebody's repository must not report that repository's commit
    if not _git(folder, "ls-files", "workbench/runs"):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def _memory_gib() -> float:
    import psutil

    return round(psutil.virtual_memory().total / 2**30, 1)
