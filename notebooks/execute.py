"""Runs every notebook from top to bottom in a fresh kernel; a cell that raises fails the run.

usage: execute.py [--write] [NOTEBOOK ...]    --write stores the outputs in the notebooks
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path, write: bool) -> None:
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    print(f"{path.name}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s")
    if write:
        for cell in notebook.cells:
            if cell.cell_type == "code":  # warnings of other packages name files of this machine
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--write"]
    for name in [Path(a) for a in arguments] or sorted(HERE.glob("*.ipynb")):
        execute(name, "--write" in sys.argv)
