"""Writes the pages that are made from the code; a test checks that they are current."""

from __future__ import annotations

import inspect
from pathlib import Path

from workbench import errors
from workbench.cli.page import help_page
from workbench.hooks.families import build_site_map
from workbench.hooks.sites import KINDS, LAYER_KINDS, Site, SiteMap
from workbench.models.selfcheck import self_check
from workbench.models.tiny import TINY, tiny_hf

HERE = Path(__file__).parent


def errors_page() -> str:
    """Every error with its meaning and its builtin parent."""
    rows = []
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, errors.WorkbenchError):
            parents = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
            rows.append(f"| `{name}` | {parents} | {(inspect.getdoc(cls) or '').splitlines()[0]} |")
    about = "All errors that are raised on purpose. Each text says what was asked, what exists and what to do."
    return f"# Errors\n\n{about}\n\n" + "| error | also a | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def commands_page() -> str:
    """The page of `workbench --help`."""
    return f"# Commands\n\nWhat `workbench --help` prints.\n\n```\n{help_page(width=100).rstrip()}\n```\n"


SITES_ABOUT = """\
What each family has, found on models of three layers with random weights (`d_model` 16, two heads of 8, one key and
value head where the family can share them, `d_mlp` 24, GPT-2's 64). Every site in the tables passed the self-check:
its identity, where it has one; noise added there changes the logits; gradients reach it. What a site means is in
[edits](edits.md). `model.sites()` shows the same for a loaded model.
"""


def _cell(sites: SiteMap, kind: str, reasons: list[str]) -> str:
    """Shape without the batch axis, or a mark that leads to the reason."""
    site = Site(kind, 1 if kind in LAYER_KINDS else None)
    if site in sites.points:
        return " × ".join(str(size) for size in sites.points[site].shape[1:])
    why = sites.missing[site]
    if why not in reasons:
        reasons.append(why)
    return f"no ({reasons.index(why) + 1})"


def sites_page() -> str:
    """Sites by family: the shape of each, or why it is not there."""
    reasons: list[str] = []
    columns = {}
    for family in TINY:
        hf = tiny_hf(family, d_vocab=64)
        sites = build_site_map(hf)
        sites = sites.without(self_check(hf, sites).withdrawn)
        columns[family] = {kind: _cell(sites, kind, reasons) for kind in KINDS}
    names = list(columns)
    tables = []
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        head = "| site | " + " | ".join(part) + " |\n|---" + "|---" * len(part) + "|\n"
        rows = ["| `" + kind + "` | " + " | ".join(columns[name][kind] for name in part) + " |" for kind in KINDS]
        tables.append(head + "\n".join(rows))
    why = "\n".join(f"{i}. {reason}." for i, reason in enumerate(reasons, start=1))
    return f"# Sites by family\n\n{SITES_ABOUT}\n" + "\n\n".join(tables) + f"\n\nWhy not:\n\n{why}\n"


PAGES = {"errors.md": errors_page, "commands.md": commands_page, "sites.md": sites_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
