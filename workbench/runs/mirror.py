"""The same files and numbers in Weights & Biases: offline unless the user says otherwise, never asking anything."""

from __future__ import annotations

import contextlib
import io
import logging
import netrc
import os
import shutil
import sys
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast

from workbench.runs.content import Point, Result

Mode: TypeAlias = Literal["online", "offline", "shared", "disabled"]

PROJECT = "interp-workbench"
"""W&B project, unless WANDB_PROJECT says another."""

_SECONDS = 20
_MODES = ("online", "offline", "shared", "disabled", "dryrun")


def mirror(folder: Path, config: Mapping[str, object], curves: Sequence[Point], result: Result) -> dict[str, str]:
    """Copy config, curves, metrics and files of a run folder to a W&B run inside it; says what happened.

    The mode is WANDB_MODE, or offline; online without stored credentials becomes offline. A failure is part of the
    answer, never an error: everything that W&B would hold is in the run folder already.
    """
    mode, notes = wandb_mode()
    if mode == "disabled":
        return {"status": "disabled"} | notes
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    was_loaded = "wandb" in sys.modules
    try:
        import wandb
    except ImportError as error:
        return {"status": "failed", "mode": mode, "reason": f"wandb can't be imported ({error})"} | notes
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), _quiet_logging():
            inside = _send(folder, config, curves, result, mode)
            if not was_loaded:
                wandb.teardown()
    except (wandb.Error, OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return {"status": "failed", "mode": mode, "reason": f"{type(error).__name__}: {error}"} | notes
    return {"status": "mirrored", "mode": mode, "folder": inside} | notes


def wandb_mode() -> tuple[Mode, dict[str, str]]:
    """The mode for W&B, and why it is not the one that was asked for.

    It is WANDB_MODE, or offline; online without stored credentials becomes offline.
    """
    mode = os.environ.get("WANDB_MODE", "offline").strip().lower() or "offline"
    if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled", {"reason": "WANDB_MODE or WANDB_DISABLED says so"}
    if mode not in _MODES:
        return "offline", {"reason": f"WANDB_MODE={mode} is unknown"}
    if mode not in ("offline", "dryrun") and not _has_credentials():
        return "offline", {"reason": f"WANDB_MODE={mode}, but no W&B credentials are stored"}
    return "offline" if mode == "dryrun" else cast("Mode", mode), {}


def _send(folder: Path, config: Mapping[str, object], curves: Sequence[Point], result: Result, mode: Mode) -> str:
    import wandb

    live = wandb.init(
        mode=mode,
        dir=str(folder),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=folder.name.rsplit("-", 1)[-1],
        job_type=result["name"],
        config=dict(config),
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=_SECONDS,
        ),
    )
    try:
        for row in curves:
            if row["value"] is not None:
                live.log({row["name"]: row["value"], f"{row['name']}/step": row["step"]})
        live.summary.update({name: metric["value"] for name, metric in result["metrics"].items()})
        live.summary.update({"findings": [finding["text"] for finding in result["findings"]]})
        for file in _files(folder):
            live.save(str(file), base_path=str(folder), policy="now")
    finally:
        live.finish()
    return os.path.relpath(Path(live.dir).parent, folder)


def _files(folder: Path) -> list[Path]:
    """Files of the run; those under wandb/ and half-written ones are not."""
    inside = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(
        path for path in inside if path.relative_to(folder).parts[0] != "wandb" and not path.name.startswith(".")
    )


def _has_credentials() -> bool:
    """Whether W&B could log in without asking: an API key, an identity token, or an entry in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Silence W&B's own log handler for the time of the mirror."""
    logger = logging.getLogger("wandb")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
