"""Where files are kept: a folder on this machine, or any address that fsspec knows (s3://, gs://, memory://)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from workbench.core.atomic import refuse_address
from workbench.core.errors import InvalidInputError
from workbench.engine.local import Folder, LocalFolder
from workbench.engine.remote import RemoteFolder


def open_folder(where: str | Path | Folder) -> Folder:
    """The folder at a path or address; nothing is created.

    Raises:
        InvalidInputError: for an address that fsspec does not know, or whose package is missing.
    """
    if not isinstance(where, str | Path):
        return where
    text = str(where)
    # a Path has no double slash, so an address that went through one has lost it
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)(?:::|:/{1,2})(.*)", text, re.DOTALL)
    plain = found is None or not ("://" in text or "::" in text or _is_protocol(found[1]))
    if found is None or (plain and (isinstance(where, str) or Path(f"{found[1]}:").exists())):
        return LocalFolder(Path(where).expanduser())
    if found[1] in ("file", "local"):
        return LocalFolder(Path("/" + unquote(found[2]).lstrip("/")))
    return RemoteFolder(text if "::" in text else f"{found[1]}://{found[2].lstrip('/')}")


def require_local(where: str | Path) -> None:
    """Refuses what is no folder of this machine that can be written to.

    Raises:
        InvalidInputError: for an address, also one that lost a slash as a `Path`, or as `check_writable`.
    """
    refuse_address(where)
    folder = open_folder(where)
    if not isinstance(folder, LocalFolder):
        raise InvalidInputError(f"{where} is an address; name a folder of this machine, and copy it from there.")
    check_writable(folder)


def _is_protocol(name: str) -> bool:
    import fsspec

    return name in fsspec.available_protocols()


def check_writable(folder: Folder) -> None:
    """Refuses a folder of this machine that can't be made or written to, before any work is done for it.

    Raises:
        InvalidInputError: naming the place that is in the way.
    """
    if not isinstance(folder, LocalFolder):
        return
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InvalidInputError(f"{folder.where} can't be written: {existing} is a file. Name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidInputError(
            f"{folder.where} can't be written: {existing} is read-only for you. Name another folder, or change its "
            "permissions."
        )
