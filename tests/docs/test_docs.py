from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import workbench as wb

ROOT = Path(__file__).parents[2]


def script(name: str) -> Any:  # a module of no package
    """A program of `docs/`, loaded."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["api.md", "errors.md", "commands.md", "sites.md"])
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == script("generate").PAGES[name](), "run `make docs`"


@pytest.mark.slow
def test_every_model_type_that_can_be_built_is_what_its_page_says() -> None:
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == script("generate").families_page(), (
        "run `make docs`"
    )


def _python_in(path: Path) -> str:
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))], ids=lambda p: p.name
)
def test_every_public_name_that_is_shown_exists(path: Path) -> None:
    shown = set(re.findall(r"\bwb\.([A-Za-z_]\w*)", _python_in(path)))
    assert shown
    missing = sorted(name for name in shown if name not in wb.__all__)
    assert not missing


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_every_link_to_a_file_or_heading_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        assert file.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
