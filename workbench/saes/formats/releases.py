"""SAEs that sae_lens knows by name, fetched from the Hugging Face hub by its own loaders."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from workbench.core.errors import CorruptFileError, ModelUnavailableError, UnknownNameError, did_you_mean
from workbench.core.progress import quiet_libraries, task
from workbench.models.hub import is_cached, unreachable
from workbench.saes.formats.lensmodule import sae_lens_module


def directory() -> Mapping[str, Any]:
    """The releases of the installed sae_lens, by name."""
    sae_lens_module()
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def split(where: str) -> tuple[str, str] | None:
    """Release and SAE id of `release/sae_id`; None if it begins with no release.

    >>> split("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    ('gpt2-small-res-jb', 'blocks.8.hook_resid_pre')
    """
    releases = directory()
    parts = where.split("/")
    for n in range(1, len(parts)):
        release = "/".join(parts[:n])
        if release in releases:
            return release, "/".join(parts[n:])
    return None


def matching(where: str, limit: int = 8) -> str:
    """A sentence with the releases whose name, or model, is close to a text."""
    releases = directory()
    words = [word for word in where.lower().replace("/", "-").replace("_", "-").split("-") if len(word) > 1]
    score = {name: sum(word in f"{name} {known.model}".lower() for word in words) for name, known in releases.items()}
    best = sorted((name for name in score if score[name]), key=lambda name: -score[name])[:limit]
    name = where.split("/")[0]
    close = "" if name in releases else did_you_mean(name, releases)
    meant = f"{close} " if close.startswith("Did") else ""
    return f"{meant}Releases of sae_lens that match: {', '.join(best) or 'none'}."


def fetch(release: str, sae_id: str) -> Any:
    """The SAE as sae_lens loads it.

    Raises:
        UnknownNameError: if the release has no such SAE, or there is no such release.
        ModelUnavailableError: if it can't be fetched.
    """
    releases = directory()
    if release not in releases and "/" not in release:
        raise UnknownNameError(f"sae_lens has no release {release!r}. {matching(release)}")
    if release in releases and sae_id not in releases[release].saes_map:
        ids = releases[release].saes_map
        raise UnknownNameError(
            f"Release {release} has {len(ids)} SAEs and none {sae_id!r}. {did_you_mean(sae_id, ids)}"
        )
    known = releases.get(release)
    repository, part = (release, sae_id) if known is None else (known.repo_id, known.saes_map[sae_id])
    if not is_cached(repository, part) and (reason := unreachable(repository)) is not None:
        raise _unreachable(release, sae_id, f"asked the hub for {repository}: {reason}")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        with warnings.catch_warnings(), quiet_libraries(), task(total=None, description=f"Fetching {release}/{sae_id}"):
            # it warns of scales that it could not fold; those are refused after loading
            warnings.simplefilter("ignore")
            return sae_lens_module().SAE.from_pretrained(release, sae_id, device="cpu")
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise _unreachable(release, sae_id, f"{type(error).__name__}: {error}") from error
    except (RuntimeError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"sae_lens can't load {release}/{sae_id}: {type(error).__name__}: {str(error)[:200]}. Fetch its folder "
            "from the hub and give that folder to load_sae, which has readers of its own."
        ) from error


def _unreachable(release: str, sae_id: str, reason: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"{release}/{sae_id} can't be fetched ({reason[:160]}). Connect to the Hugging Face hub once, or give a folder "
        f"that holds the SAE. {matching(release)}"
    )
