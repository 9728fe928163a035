"""What holds the parts together: who may import whom, what an import may do, what the text may say."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import workbench

ROOT = Path(__file__).parents[1]
PACKAGES = ("workbench", "circuits", "experiments")

LAYERS = (
    ("core", "engine", "report", "runs"),
    ("hooks",),
    ("bases",),
    ("interventions",),
    ("models",),
    ("controls",),
    ("activations", "saes", "probes"),
    ("judges",),
    ("features", "steering", "glitch"),
    ("serve",),
    ("cli", "__main__"),
)
"""A part imports its own layer and those above it in this list."""

FOUNDATION = {"core": set(), "engine": {"core"}, "report": {"core"}, "runs": {"core", "report"}}
"""Parts that know only these others."""

CORE = {
    "errors": set(),
    "counts": {"numbers"},
    "reporters": {"counts", "numbers"},
    "progress": {"counts", "reporters"},
    "annotations": set(),
    "kinds": {"errors"},
    "arguments": {"annotations", "errors", "kinds"},
    "jsontext": {"errors"},
    "locks": {"errors"},
    "registry": {"errors"},
    "numbers": set(),
    "stats": {"arguments", "errors", "numbers"},
    "surface": {"errors"},
    "tokenizer": {"errors"},
    "atomic": {"errors", "locks"},
    "similarity": {"errors", "numbers", "stats"},
    "records": {"errors", "atomic", "jsontext", "numbers"},
}
"""Modules of the foundation that know only these others of it."""

HEAVY = ("transformers", "transformer_lens", "sae_lens", "wandb", "matplotlib", "sklearn", "pandas", "tyro", "rich")
"""Imported inside functions; tyro and rich only by commands."""


@cache
def _modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_modules()[module].read_text(encoding="utf-8"))


def _imports(module: str) -> Iterator[str]:
    """Every module of ours that the text of `module` imports, at its top, inside functions or for types only."""
    known = _modules()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                # a module taken from a package runs the package, whose names may lead back here
                yield from (name for name in (f"{node.module}.{alias.name}", str(node.module)) if name in known)
                if (home := _public(str(node.module)).get(alias.name) if node.module in known else None) in known:
                    yield str(home)


@cache
def _public(package: str) -> dict[str, str]:
    """Where each name of a package is that its stub lists: it is imported from there when it is first used."""
    stub = _modules()[package].with_suffix(".pyi")
    if not stub.exists():
        return {}
    nodes = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{package}.{node.module}" for node in nodes if node.module for alias in node.names}


@cache
def _graph() -> dict[str, frozenset[str]]:
    return {module: frozenset(_imports(module)) - {module} for module in _modules()}


def test_the_parts_are_found() -> None:
    assert {"workbench", "workbench.core.errors", "workbench.cli"} <= _modules().keys()
    assert "workbench.report.page" in _graph()["workbench.runs.run"], "imports inside functions count"
    assert "workbench.steering.sweep.steer" in _graph()["experiments.steering_features"], "so do names of a stub"


def test_no_import_cycles_lazy_ones_included() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(_graph().get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in _graph():
        visit(module, ())


def test_imports_point_one_way() -> None:
    rank = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for module, targets in _graph().items():
        for target in targets:
            ours, theirs = module.split("."), target.split(".")
            if ours[0] != theirs[0]:
                allowed = PACKAGES.index(theirs[0]) < PACKAGES.index(ours[0])
            elif ours[0] == "workbench" and min(len(ours), len(theirs)) > 1:
                allowed = rank[theirs[1]] <= rank[ours[1]]
            else:
                allowed = True
            wrong += [] if allowed else [f"{module} imports {target}"]
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_layer() -> None:
    parts = {module.split(".")[1] for module in _modules() if module.startswith("workbench.")}
    assert parts <= {part for layer in LAYERS for part in layer}


def test_the_foundation_knows_only_itself() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in _graph().items()
        if module.startswith("workbench.")
        for target in targets
        if target.startswith("workbench.")
        for part, other in [(module.split(".")[1], target.split(".")[1])]
        if part in FOUNDATION and other != part and other not in FOUNDATION[part]
    ]
    assert not wrong, "\n".join(wrong)


READS_SAES = ("workbench.bases", "workbench.saes.formats", "workbench.saes.training")
"""The basis, and what builds and saves SAEs of sae_lens."""
OWN_WEIGHTS = ("workbench.saes.architectures", "workbench.saes.kernels", "workbench.saes.config")
"""Where these names are those of the weights that are trained here."""
OF_SAES = {
    "W_enc", "W_dec", "W_skip", "b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "cfg", "normalize_activations",
    "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "hook_z_reshaping_mode",
}  # fmt: skip


def test_only_a_basis_reads_an_sae() -> None:
    wrong = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module in _modules()
        if not module.startswith((*READS_SAES, *OWN_WEIGHTS))
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Attribute) and _reads_an_sae(node.attr, ast.unparse(node.value))
    ]
    # the second path of SHIFT, which is to share nothing with the first
    wrong = [line for line in wrong if not line.startswith("circuits.shift.editcheck:")]
    assert not wrong, "\n".join(wrong)


def _reads_an_sae(attribute: str, owner: str) -> bool:
    if attribute == "cfg" and "adapter" in owner:
        return False  # of TransformerLens
    return attribute in OF_SAES or (attribute in ("encode", "decode") and owner.endswith("sae"))


def test_the_modules_of_the_foundation_know_only_what_they_may() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, allowed in CORE.items()
        for target in _graph()[f"workbench.core.{name}"] - {"workbench.core"}
        if target not in {f"workbench.core.{other}" for other in allowed}
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_do_not_use_the_command_line() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in _graph().items()
        if module.split(".")[0] != "experiments" and module.split(".")[1:2] not in (["cli"], ["__main__"])
        for target in targets
        if target.startswith("workbench.cli")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_forbidden_words_of_the_language(package: str) -> None:
    wrong = []
    for module in _modules():
        if module.split(".")[0] != package:
            continue
        for node in ast.walk(_tree(module)):
            if problem := _forbidden(node):
                wrong.append(f"{module}:{getattr(node, 'lineno', 0)}: {problem}")
    assert not wrong, "\n".join(wrong)


def _forbidden(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "eval", "exec"):
        return f"{node.func.id}()"
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        return "star import"
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        roots = {name.split(".")[0] for name in names}
        return next((f"imports {bad}" for bad in ("pickle", "dill", "cloudpickle", "joblib") if bad in roots), None)
    if isinstance(node, ast.ExceptHandler) and not _reraises(node):
        caught = ast.unparse(node.type) if node.type is not None else "everything"
        return f"catches {caught} and goes on" if caught in ("everything", "Exception", "BaseException") else None
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        return None if safe else "torch.load without weights_only=True"
    return None


def _reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("print(1)", "print()"),
        ("from a import *", "star import"),
        ("def f():\n import pickle", "imports pickle"),
        ("try:\n pass\nexcept Exception:\n pass", "catches Exception and goes on"),
        ("torch.load(x)", "torch.load without weights_only=True"),
        ("import os\nlog.print(1)\ntorch.load(x, weights_only=True)", None),
    ],
)
def test_the_check_itself_sees_what_it_should(text: str, problem: str | None) -> None:
    found = [said for node in ast.walk(ast.parse(text)) if (said := _forbidden(node))]
    assert found == ([problem] if problem else [])


IMPORT_ALL = """
import importlib, os, sys, threading
before = set(os.environ.items())
import workbench
assert "torch" not in sys.modules, "import workbench alone imports torch"
names = sys.argv[2:]
for name in names:
    importlib.import_module(name)
heavy = [name for name in sys.argv[1].split(",") if name in sys.modules]
assert not heavy, f"imported at import time: {heavy}"
assert set(os.environ.items()) - before == set(), "environment changed"
assert threading.active_count() == 1, "threads started"
"""


def _import_all(modules: list[str], heavy: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    home = folder / "home"
    home.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    work = folder / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL, ",".join(heavy), *modules],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    written = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert not written, f"importing wrote files: {written}"
    return done


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    # a module that is a command may import what makes commands
    commands = ("workbench.cli", "experiments")
    libraries = [name for name in _modules() if not name.startswith(commands) and not name.endswith("__main__")]
    done = _import_all(libraries, HEAVY, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_importing_commands_has_no_side_effects(tmp_path: Path) -> None:
    modules = [name for name in _modules() if not name.endswith("__main__")]
    done = _import_all(modules, tuple(name for name in HEAVY if name not in ("tyro", "rich")), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def test_the_public_surface_is_complete_documented_and_sorted() -> None:
    names = workbench.__all__
    assert len(names) == len(set(names))
    assert sorted(names, key=lambda name: (not name[0].isupper(), name)) == names
    assert set(dir(workbench)) == set(names)
    for name in names:
        value = getattr(workbench, name)
        assert inspect.getdoc(value), f"workbench.{name} has no docstring"
        if not inspect.ismodule(value):
            assert value is getattr(importlib.import_module(value.__module__), name), name


def test_an_unknown_name_says_what_is_close() -> None:
    with pytest.raises(AttributeError, match="Did you mean Estimate"):
        workbench.Estimat  # noqa: B018  # looking it up is the test


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_and_modules_say_what_they_are(package: str) -> None:
    silent = [
        module
        for module, file in _modules().items()
        if module.split(".")[0] == package and file.stat().st_size and ast.get_docstring(_tree(module)) is None
    ]
    assert not silent


NUMBERS_OF_THEIR_OWN = {
    "workbench.core.numbers": "writes them for everybody else",
    "workbench.core.display": "a repr shows a value as Python writes it",
    "workbench.controls.arms": "names of arms, by which results are looked up",
    "workbench.runs.run": "the date in the name of a folder",
}
"""Modules in which a format code stands, with the reason."""


def _formats_a_number(node: ast.AST) -> bool:
    """Whether it writes a number with a precision or separators of its own; widths and clipped texts are no numbers."""
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is not None:
        spec = "".join(part.value if isinstance(part, ast.Constant) else "0" for part in node.format_spec.values)
        return bool(re.search(r"[.,_%eEfFgGn]", spec))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "format":
        return len(node.args) > 1
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    return bool(re.search(r"%[.\d]+[eEfFgG]|\{[^{}]*:[^{}]*\.\d+[eEfFgG%]\}", text)) and "`" not in text


def test_numbers_are_written_in_one_way() -> None:
    wrong = [
        f"{module}:{node.lineno}: {ast.unparse(node)[:80]}"
        for module in _modules()
        if module not in NUMBERS_OF_THEIR_OWN
        for node in ast.walk(_tree(module))
        if _formats_a_number(node)
    ]
    assert not wrong, "use workbench.core.numbers:\n" + "\n".join(wrong)
    needless = [name for name in NUMBERS_OF_THEIR_OWN if not any(map(_formats_a_number, ast.walk(_tree(name))))]
    assert not needless


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ('f"{x:.3f}"', True),
        ('f"{x:>8.2g}"', True),
        ('f"{x:.{n}e}"', True),
        ('f"{x:,}"', True),
        ('f"{x:.0%}"', True),
        ('"{:.2f}".format(x)', True),
        ('"%.2f" % x', True),
        ('format(x, ".3g")', True),
        ('f"{x:>8}{name:<{width}}{i:05d}{ord(c):04X}{text!r:.40}"', False),
    ],
)
def test_the_check_of_numbers_sees_what_it_should(text: str, formats: bool) -> None:
    assert any(map(_formats_a_number, ast.walk(ast.parse(text)))) == formats


MAX_LINES = 400


def test_files_stay_readable() -> None:
    long = {str(file): n for file in _modules().values() if (n := len(file.read_text().splitlines())) > MAX_LINES + 20}
    assert not long


# Written in pieces, so that this file does not contain what it looks for.
LOCAL_TRACES = {
    "a folder of the machine it was written on": r"(?<![\w.~])/(?:work|tmp/proto|opt/(?:wheels|pypi)|root|home/\w+)"
    + r"/",
    "a private package index": r"https?://(?:10\.|127\.|192\.168\.|localhost|[\w.-]*(?:artifactory|nexus|devpi|\.internal\b))",
    "a credential": r"(?:hf_[A-Za-z]{30,}|ghp_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})",
}
PUBLIC_INDEXES = ("https://download.pytorch.org/whl/cpu", "https://pypi.org/simple")


def _repository_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.fail("The repository check needs git and a checkout.")
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and file.stat().st_size < 5_000_000 and not name.startswith("shared/"):
            raw = file.read_bytes()
            if b"\0" not in raw[:4096]:
                yield name, raw.decode("utf-8", errors="replace")


def test_the_repository_holds_no_trace_of_one_machine() -> None:
    wrong = []
    for name, text in _repository_texts():
        for number, line in enumerate(text.splitlines(), 1):
            for what, pattern in LOCAL_TRACES.items():
                if name != "tests/test_architecture.py" and re.search(pattern, line):
                    wrong.append(f"{name}:{number}: {what}: {line.strip()[:100]}")
            for url in re.findall(r"--(?:extra-)?index-url[= ]+(\S+)", line):
                if not url.startswith((*PUBLIC_INDEXES, "$")):
                    wrong.append(f"{name}:{number}: package index {url}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["workbench/saes/evaluation", "workbench/saes/comparison", "circuits"])
def test_wide_results_are_made_by_keyword(package: str) -> None:
    positional = [
        f"{file.name}: {node.name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        and any("dataclass(" in (text := ast.unparse(d)) and "kw_only=True" not in text for d in node.decorator_list)
        and sum(isinstance(statement, ast.AnnAssign) for statement in node.body) >= 7
    ]
    assert not positional, "a swap of two of seven values would be silent"
