"""What the words for a place mean: a run by its folder, its name or "latest"."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from workbench.core.errors import MissingFileError, did_you_mean
from workbench.runs.listing import find_run, list_runs

RUNS = Path("runs")
SCANS, CENSUSES = "glitch-scan", "glitch-census"
"""Names of the runs of commands whose results others read."""
SAE_IN_RUN = "artifacts/sae"
"""Where a run keeps the SAE that it has trained."""


def named_run(asked: Path, made_by: str, root: Path = RUNS) -> Path:
    """What is at a path, or else the run of a command that is called so; "latest" is its newest.

    Raises:
        MissingFileError: if there is neither.
    """
    if asked.exists():
        return asked
    try:
        return find_run(asked, root, made_by)
    except MissingFileError as error:
        command = made_by.replace("-", " ")
        raise MissingFileError(
            f"There is neither a folder {asked} nor such a run of `workbench {command}` in {root}. {error} Give the "
            "folder of a run, a part of its name, or latest."
        ) from error


def any_run(asked: Path, root: Path = RUNS) -> Path | None:
    """The run of a glitch scan that is called so; None if there is none, as of the name of a model."""
    try:
        return None if asked.exists() else find_run(asked, root, SCANS)
    except MissingFileError:
        return None


def sae_folder(asked: Path, root: Path = RUNS) -> Path:
    """The folder of an SAE that is at a path, or that a run holds: its whole name or id, what was run, or "latest".

    What may be a release of sae_lens, such as gpt2-small-res-jb/blocks.8.hook_resid_pre, is left as it is.

    Raises:
        MissingFileError: if it is none of these, or the name of several runs.
    """
    if asked.exists():
        return asked / SAE_IN_RUN if (asked / SAE_IN_RUN).is_dir() else asked
    text = str(asked)
    holding = [info for info in list_runs(root) if (info.path / SAE_IN_RUN).is_dir()]
    names = {info.path: (info.path.name, info.name, info.path.name.rpartition("-")[2]) for info in holding}
    fitting = [path for path, known in names.items() if text in known] if text != "latest" else list(names)[:1]
    if len(fitting) > 1:
        shown = ", ".join(path.name for path in fitting[:5])
        raise MissingFileError(f"{text!r} is the name of {len(fitting)} runs with an SAE: {shown}. Give one of these.")
    if fitting:
        return fitting[0] / SAE_IN_RUN
    if _is_release(asked):
        return asked
    here = _saes_here(names)
    hint = did_you_mean(text, here) if here else f"No run in {root} holds an SAE."
    raise MissingFileError(
        f"There is no SAE {asked}: neither a folder {asked} nor a run in {root} with this name and an SAE, and no "
        f"release/sae_id of sae_lens. {hint} Give the folder of the SAE, the whole name of a run, or latest; "
        "`workbench sae train STORE` makes one."
    )


def _is_release(asked: Path) -> bool:
    if asked.is_absolute() or len(asked.parts) < 2 or Path(asked.parts[0]).is_dir():
        return False  # known without an import of sae_lens, which takes seconds
    from workbench.saes.formats import releases

    return releases.split(str(asked)) is not None


def _saes_here(runs: Iterable[Path]) -> list[str]:
    """The SAEs that a newcomer may mean: folders here, and runs."""
    from workbench.saes.home import HOME_FILE

    return [*sorted(str(file.parent) for file in Path().glob(f"*/{HOME_FILE}")), *(path.name for path in runs)]
