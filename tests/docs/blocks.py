"""Runs the code blocks of `docs/coming-from.md`: one namespace per task, which begins with what task 1 loaded.

Needs neither this package nor pytest, so that the blocks of nnsight can be run in an environment of their own, in the
folder that holds the model:

    PYTHONPATH=<repository> python -c "
    from tests.docs.blocks import run_page
    import torch
    torch.save({n: space['result'] for n, space in run_page('nnsight').items()}, 'nnsight.pt')"
"""

from __future__ import annotations

import linecache
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
TOOLS = ("transformer_lens", "nnsight", "here")


def sections() -> list[str]:
    """The text before task 1, then the text of each task; the tables at the end belong to none."""
    tasks = PAGE.read_text(encoding="utf-8").split("## Names of TransformerLens")[0]
    return re.split(r"^## \d+\. .*$", tasks, flags=re.M)


def block(text: str, label: str) -> str:
    (code,) = re.findall(rf"^```python {label}\n(.*?)^```$", text, flags=re.S | re.M)
    return code


def run_page(tool: str) -> dict[int, dict[str, Any]]:
    """The namespace that each task leaves behind, by its number."""
    shared, *tasks = sections()
    start = _run(block(shared, "names"), "names", {"__name__": "page"})
    spaces = {}
    for number, text in enumerate(tasks, start=1):
        spaces[number] = _run(block(text, tool), f"task {number}, {tool}", dict(start))
        if number == 1:
            start = spaces[1]
    return spaces


def _run(code: str, name: str, space: dict[str, Any]) -> dict[str, Any]:
    # Tracebacks and nnsight read the source of what runs from here.
    linecache.cache[f"<{name}>"] = (len(code), None, code.splitlines(keepends=True), f"<{name}>")
    exec(compile(code, f"<{name}>", "exec"), space)
    return space
