"""Everything that mixes devices, without a GPU: `tests/device_checks.py` in a process that has made-up devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("device_checks.py")


def check(marks: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        marks,
        str(CHECKS),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=CHECKS.parents[1], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_no_tensors_of_two_devices_meet() -> None:
    check("not slow")


@pytest.mark.slow
def test_no_tensors_of_two_devices_meet_in_long_studies() -> None:
    check("slow")
