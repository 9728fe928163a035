"""Writes the pages that are made from the code; a test checks that they are current.

usage: generate.py [PAGE ...]    without a page all; families.md builds about 95 tiny models
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

import circuits
import workbench
from workbench.cli.page import help_page
from workbench.core import errors
from workbench.hooks.families import build_site_map
from workbench.hooks.sites import KINDS, LAYER_KINDS, Site, SiteMap
from workbench.models.head import Head
from workbench.models.selfcheck import self_check
from workbench.models.tiny import TINY, tiny_hf
from workbench.models.tinyfamilies import model_types, tiny_of

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


API_ABOUT = """\
Every public name, from the stubs beside the packages (`workbench/__init__.pyi` and those of its rooms), which type
checkers and editors read too. `import workbench as wb` imports nothing until a name is used. What is not listed here is
internal and may change.
"""
ROOMS = ("controls", "features", "glitch", "judges", "probes", "saes", "steering", "core")


def api_page() -> str:
    """All names of the public surface with their signature and what they are."""
    parts = [f"# The public surface\n\n{API_ABOUT}", _names(workbench, "wb")]
    parts += [_names(importlib.import_module(f"workbench.{room}"), f"wb.{room}") for room in ROOMS]
    parts += [_names(importlib.import_module("workbench.steering.refusal"), "wb.refusal")]
    parts += [_names(circuits, "circuits"), _names(circuits.behaviours, "circuits.behaviours")]
    parts += [_names(circuits.cues, "circuits.cues")]
    return "\n".join(parts)


def _names(package: ModuleType, called: str) -> str:
    rows = [
        f"| `{called}.{name}{_parameters(value)}` | {_about(value)} |"
        for name, value in ((name, getattr(package, name)) for name in package.__all__)
    ]
    return f"## `{called}`\n\n{_first_line(package)}\n\n| name | what it is |\n|---|---|\n" + "\n".join(rows) + "\n"


def _first_line(value: object) -> str:
    return (inspect.getdoc(value) or "").splitlines()[0]


def _parameters(value: object) -> str:
    return f"({', '.join(inspect.signature(value).parameters)})" if inspect.isfunction(value) else ""


def _about(value: object) -> str:
    if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)):
        return f"A constant, {type(value).__name__}."
    if not inspect.isclass(value):
        return _first_line(value)
    # `Model` is written in parts
    parts = [base for base in value.__mro__ if base is value or base.__module__.startswith("workbench.models.")]
    members = {name: member for base in reversed(parts) for name, member in vars(base).items()}
    methods = [f"`{name}`" for name, member in members.items() if name[0] != "_" and _called(member)]
    return _first_line(value) + (f" Methods: {', '.join(methods)}." if methods else "")


def _called(member: object) -> bool:
    return inspect.isfunction(member) or isinstance(member, classmethod | staticmethod)


SITES_ABOUT = """\
What each family has, found on models of three layers with random weights (`d_model` 16, two heads of 8, one key and
value head where the family can share them, `d_mlp` 24, GPT-2's 64). Every site in the tables passed the self-check:
its identity, where it has one; noise added there changes the logits; gradients reach it. What a site means is in
[edits](edits.md). `model.sites()` shows the same for a loaded model. These families have tests of every feature;
[model types](families.md) says what the self-check finds on all others that can be built.
"""


def _cell(sites: SiteMap, kind: str, reasons: list[str]) -> str:
    """Shape without the batch axis, or a mark that leads to the reason."""
    site = Site(kind, 1 if kind in LAYER_KINDS else None)
    if site in sites.points:
        return " × ".join(str(size) for size in sites.points[site].shape[1:])
    return f"no ({_number(sites.missing[site], reasons)})"


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


FAMILIES_ABOUT = """\
Every model type that `AutoModelForCausalLM` of transformers {version} builds and that TransformerLens has an adapter
for, each tried as a model of two layers with random weights: the [self-check](sites.md) that `load_model` runs, and the
logits of chosen tokens against all logits. A hybrid has one layer of each kind. Sites that a check withdrew and sites
that the adapter has no module for are listed with the reason; asking for one of them is an error with this reason. The
same check runs on each real model when it is loaded.
"""


def families_page() -> str:
    """What of each model type is offered, for all that can be built; about 20 s."""
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    reasons: list[str] = []
    types = model_types()
    rows = [f"| `{kind}` | {name} | {_offered(kind, reasons)} |" for kind, name in types.items()]
    why = "\n".join(f"{i}. {reason}." for i, reason in enumerate(reasons, start=1))
    rest = ", ".join(sorted(set(SUPPORTED_ARCHITECTURES) - set(types.values())))
    return (
        f"# Model types\n\n{FAMILIES_ABOUT.format(version=transformers.__version__)}\n"
        f"| type | class | sites |\n|---|---|---|\n" + "\n".join(rows) + f"\n\nWhy not:\n\n{why}\n\n## Not tried\n\n"
        "TransformerLens names these classes too. `AutoModelForCausalLM` does not build them from a model type alone: "
        "they are encoders, encoder-decoders and models of other modalities, or come with code of their own. Whether "
        f"one of them works is what its self-check says.\n\n{rest}.\n"
    )


def _offered(kind: str, reasons: list[str]) -> str:
    """The sites of a model type: all of them, or which are missing, with numbers of reasons."""
    try:
        hf = tiny_of(kind)
    except ImportError:
        return "not tried: it needs a package that is not part of the developer's environment"
    try:
        sites = build_site_map(hf)
    except errors.UnknownSiteError as error:
        return f"none ({_number(str(error).partition('. ')[0], reasons)})"
    report = self_check(hf, sites)
    if not report.ok:
        failed = "; ".join(check.name for check in report.checks if not check.ok)
        return f"refused by its self-check ({_number(f'it fails: {failed}', reasons)})"
    _same_logits(Head(hf))
    return _differences(sites.without(report.withdrawn), reasons)


def _same_logits(head: Head) -> None:
    inputs, some = {"input_ids": torch.arange(6)[None]}, torch.tensor([3, 5])
    torch.testing.assert_close(
        head.logits(inputs, None, some), head.logits(inputs, None, None)[..., some], atol=1e-4, rtol=1e-4
    )


def _differences(sites: SiteMap, reasons: list[str]) -> str:
    gone: dict[tuple[str, str], list[str]] = {}
    for site in KINDS:
        here = [s for s in sites.points if s.kind == site]
        for why in dict.fromkeys(_general(why) for s, why in sites.missing.items() if s.kind == site):
            gone.setdefault((why, "on some layers" if here else ""), []).append(f"`{site}`")
    parts = [
        f"{', '.join(kinds)}{f' {where}' if where else ''} ({_number(why, reasons)})"
        for (why, where), kinds in gone.items()
    ]
    return "all" if not parts else f"all but {'; '.join(parts)}"


def _general(why: str) -> str:
    """A reason without the figures of one layer of one model."""
    why = re.sub(r" by [\d.e+-]+( \(relative\))?| at layer \d+", "", why)
    why = re.sub(r"(Site \w+)\.\d+", r"\1", why)
    return re.sub(r"TransformerLens' \w+ maps", "TransformerLens' adapter maps", why).rstrip(".")


def _number(why: str, reasons: list[str]) -> int:
    if why not in reasons:
        reasons.append(why)
    return reasons.index(why) + 1


PAGES = {
    "api.md": api_page, "commands.md": commands_page, "errors.md": errors_page, "families.md": families_page,
    "sites.md": sites_page,
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        (HERE / name).write_text(PAGES[name](), encoding="utf-8")
