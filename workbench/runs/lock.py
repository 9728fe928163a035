"""One process at a time in a run folder; the lock of a killed process is free at once."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: there two processes with one configuration are told apart by nothing
    fcntl = None

_held: dict[Path, int] = {}


def lock_folder(folder: Path) -> bool:
    """Whether this process now holds the folder; it may hold it already, as after an interrupted notebook cell."""
    key = folder.resolve()
    if key in _held or fcntl is None:
        return True
    try:
        handle = os.open(key / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # another process has just removed the folder
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(key / ".lock")):
            _held[key] = handle
            return True
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return False


def unlock_folder(folder: Path) -> None:
    """Give the folder back; nothing happens if this process does not hold it."""
    handle = _held.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


def remove_dead(folder: Path) -> None:
    """Remove a folder that no live process works in."""
    if fcntl is None or folder.resolve() in _held:
        return
    with contextlib.suppress(OSError):
        folder.rmdir()  # killed before it was locked
        return
    if (folder / ".lock").exists() and lock_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)
        unlock_folder(folder)


def lock_moved(old: Path, new: Path) -> None:
    """Keep the lock of a folder that was renamed: it is on the file, not on its name."""
    if (handle := _held.pop(old.resolve(), None)) is not None:
        _held[new.resolve()] = handle


def locked_elsewhere(folder: Path) -> bool:
    """Whether another live process works in the folder."""
    lock = folder / ".lock"
    if fcntl is None or folder.resolve() in _held or not lock.exists():
        return False
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
