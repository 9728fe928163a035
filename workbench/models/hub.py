"""The Hugging Face hub: whether it can be reached, and what of it is on this machine already."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from workbench.core.errors import ModelUnavailableError

Kind = Literal["model", "dataset"]
"""What the hub keeps; SAEs are kept as models."""

TIMEOUT_S = 5
"""How long the hub may take to answer; a download would try again for half a minute before it said anything."""


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """Folder of a model in the local cache of the hub; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def is_cached(name: str, part: str) -> bool:
    """Whether a file or folder of a model's repository is in the local cache of the hub."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    return any((snapshot / part).exists() for snapshot in cached.glob("snapshots/*"))


def hub_folder(name: str, revision: str | None = None) -> Path | None:
    """Where to load a hub id from: None for the hub, and the folder of the local cache if the hub can't be reached.

    Raises:
        ModelUnavailableError: if the hub has no such model, or can't be reached and the model is not in the cache.
    """
    reason = unreachable(name, revision)
    if reason is None:
        return None
    if (folder := cached_folder(name, revision)) is not None:
        return folder
    raise ModelUnavailableError(
        f"Model {name!r} could not be loaded: it is not in the local cache, and the Hugging Face hub can't be reached "
        f"({reason}). Where there is a network, run `hf download {name} --local-dir FOLDER`, and give FOLDER here; "
        "'embedded' needs no hub."
    )


def files_of(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """Some files of a model's repository, fetched where they are not in the local cache: the folder that holds them.

    Raises:
        ModelUnavailableError: if the hub has no such model, or can't be reached and it is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = unreachable(name, revision)
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=reason is not None)
        )
    except LocalEntryNotFoundError as error:
        raise ModelUnavailableError(
            f"{name!r} is not in the local cache, and the Hugging Face hub can't be reached ({reason}). Where there is "
            f"a network, run `hf download {name} --local-dir FOLDER`, and give FOLDER here."
        ) from error


def unreachable(name: str, revision: str | None = None, kind: Kind = "model") -> str | None:
    """Why the hub does not answer, in a few words; None if it does.

    It is asked once, where a download would try again for half a minute.

    Raises:
        ModelUnavailableError: if it answers that there is no such model or data set, or none for this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # That of the client that this version of the hub's library is written for.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # isort: skip

    hub, what = HfApi(), {"model": "Model", "dataset": "Data set"}[kind]
    try:
        (hub.model_info if kind == "model" else hub.dataset_info)(name, revision=revision, timeout=TIMEOUT_S)
    except HFValidationError as error:
        raise ModelUnavailableError(
            f"{what} {name!r} could not be loaded: it is no name that the hub allows."
        ) from error
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status == 404 or (status in (401, 403) and cached_folder(name, revision) is None):
            raise ModelUnavailableError(
                f"{what} {name!r} could not be loaded: {str(error).strip().splitlines()[-1]} Check the name and the "
                f"revision; for a private or gated {what.lower()} log in first (hf auth login)."
            ) from error
        return f"it answered {status}"
    except (HTTPError, OSError) as error:
        return str(error) or type(error).__name__
    return None
