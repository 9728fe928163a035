"""Locks on files and folders: one process at a time; the lock of a killed process is free at once."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from workbench.core.errors import InvalidInputError

try:
    import fcntl
except ImportError:  # Windows: a locked file can't be renamed there, so two processes are told apart by nothing
    fcntl = None

HAS_LOCKS = fcntl is not None

_held: dict[Path, int] = {}


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Locks an open file or folder without waiting; False if another process holds it.

    Closing the handle, or the end of the process, releases the lock. An exclusive lock is one of `filelock`, which has
    no shared lock on an open file: its read-write lock is a database file that would lie in the folder for good.

    Raises:
        OSError: on a disk that has no locks.
    """
    if fcntl is None:
        return True
    if not shared:
        from filelock import lock_descriptor

        return lock_descriptor(handle, blocking=False)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_folder(folder: Path) -> bool:
    """Whether this process now holds the folder; it may hold it already, as after an interrupted notebook cell."""
    key = folder.resolve()
    if key in _held or not HAS_LOCKS:
        return True
    try:
        handle = os.open(key / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # another process has just removed the folder
        return False
    with contextlib.ExitStack() as unless_held:
        unless_held.callback(os.close, handle)
        with contextlib.suppress(FileNotFoundError):
            if try_lock(handle) and os.path.samestat(os.fstat(handle), os.stat(key / ".lock")):
                _held[key] = handle
                unless_held.pop_all()
                return True
    return False


def unlock_folder(folder: Path) -> None:
    """Releases the folder; nothing happens if this process does not hold it."""
    handle = _held.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


def remove_dead(folder: Path) -> None:
    """Removes a folder that no live process works in."""
    if not HAS_LOCKS or folder.resolve() in _held:
        return
    with contextlib.suppress(OSError):
        folder.rmdir()  # killed before it was locked
        return
    if (folder / ".lock").exists() and lock_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)
        unlock_folder(folder)


def lock_moved(old: Path, new: Path) -> None:
    """Keeps the lock of a folder that was renamed: it is on the file, not on its name."""
    if (handle := _held.pop(old.resolve(), None)) is not None:
        _held[new.resolve()] = handle


def locked_elsewhere(folder: Path) -> bool:
    """Whether another live process works in the folder."""
    lock = folder / ".lock"
    if not HAS_LOCKS or folder.resolve() in _held or not lock.exists():
        return False
    with open(lock, "rb") as file:
        return not try_lock(file.fileno(), shared=True)


@contextlib.contextmanager
def in_use(path: Path, shared: bool = False, *, temporary: bool = False) -> Iterator[None]:
    """Makes a folder and keeps other processes from writing to it, until the block ends or the process dies.

    Several processes may share it (`shared`). A `temporary` folder is removed, if it is empty, even if an earlier
    process left it.

    The lock is on the folder itself, which holds no file for it. A folder that was made for this and is still empty at
    the end is removed.

    Raises:
        InvalidInputError: if another process is at work there.
    """
    is_new = temporary or not path.exists()
    handle = _locked(path, shared)
    try:
        yield
    finally:
        if handle is not None:
            if is_new:
                with contextlib.suppress(OSError):
                    if try_lock(handle):  # not while others share it
                        path.rmdir()
            os.close(handle)


def refuse_folder_in_use(path: Path) -> InvalidInputError:
    """The refusal of a folder that another process writes to."""
    return InvalidInputError(f"Another process is writing to {path}. Wait until it has ended, or name another folder.")


def _locked(path: Path, shared: bool) -> int | None:
    """The open folder with a lock on it; None where there are no locks."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        if not HAS_LOCKS:
            return None
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as unless_locked:
            handle = os.open(path, os.O_RDONLY)
            unless_locked.callback(os.close, handle)
            is_free = True
            with contextlib.suppress(OSError):  # some network disks have no locks
                is_free = try_lock(handle, shared=shared)
            if not is_free:
                raise refuse_folder_in_use(path)
            # the process before may have removed the folder between opening and locking
            if os.path.samestat(os.fstat(handle), path.stat()):
                unless_locked.pop_all()
                return handle
