"""Locks: what is locked is the file or folder that is there now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workbench.core import locks


def test_a_lock_file_that_was_replaced_while_it_was_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_lock = locks.try_lock

    def replaced(handle: int) -> bool:
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()
        return try_lock(handle)

    monkeypatch.setattr(locks, "try_lock", replaced)
    assert not locks.lock_folder(tmp_path)
    monkeypatch.undo()
    assert locks.lock_folder(tmp_path)
    locks.unlock_folder(tmp_path)


def test_a_folder_that_was_made_again_while_it_was_locked_is_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, try_lock, tries = tmp_path / "store", locks.try_lock, []

    def replaced(handle: int, *, shared: bool = False) -> bool:
        tries.append(shared)
        if len(tries) == 1:
            folder.rmdir()
            (tmp_path / "holds the number of the first").mkdir()
            folder.mkdir()
        return try_lock(handle, shared=shared)

    monkeypatch.setattr(locks, "try_lock", replaced)
    handle = locks._locked(folder, shared=False)
    assert handle is not None and os.path.samestat(os.fstat(handle), folder.stat()) and len(tries) == 2
    os.close(handle)
