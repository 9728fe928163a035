"""Runs the code blocks of `docs/coming-from.md`: one namespace per task, which begins with what task 1 loaded.

Needs neither this package nor pytest, so that the blocks of nnsight can be run in an environment of their own, in the
folder that holds the model that `test_coming_from.write_model` writes:

    PYTHONPATH=<repository> python -m tests.docs.blocks > <repository>/tests/docs/nnsight.json
"""

from __future__ import annotations

import hashlib
import json
import linecache
import re
import sys
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


def sampled(result: Any) -> dict[str, Any]:
    """Shape of a tensor and at most 64 of its values, evenly spread."""
    flat = result.detach().flatten().double()
    places = [round(i * (len(flat) - 1) / 63) for i in range(64)] if len(flat) > 64 else range(len(flat))
    return {"shape": list(result.shape), "values": [float(f"{float(flat[i]):.7g}") for i in places]}


def fingerprint(tool: str) -> str:
    """Changes with the code of a tool on the page."""
    shared, *tasks = sections()
    code = [block(shared, "names"), *(block(text, tool) for text in tasks)]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()


if __name__ == "__main__":
    spaces = run_page("nnsight")
    version = sys.modules["nnsight"].__version__
    tasks = {number: sampled(space["result"]) for number, space in spaces.items()}
    json.dump({"nnsight": version, "code": fingerprint("nnsight"), "tasks": tasks}, sys.stdout)
