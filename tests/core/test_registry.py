"""Registries: duplicates are refused, unknown names get help, files of a package are found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.core.errors import InvalidInputError, UnknownNameError
from workbench.core.registry import Registry


def test_duplicates_are_refused_and_the_first_stays() -> None:
    parts: Registry[object] = Registry("part")
    first = parts.add("one", object())
    with pytest.raises(InvalidInputError, match=r"'one' is already the name of a part.*remove\('one'\)"):
        parts.add("one", object())
    assert parts["one"] is first
    assert parts.add("one", first) is first, "the same object again is no duplicate"
    assert parts.remove("one") is first
    assert "one" not in parts
    with pytest.raises(InvalidInputError, match="empty"):
        parts.add("", first)


def test_a_function_replaces_its_older_self_alone() -> None:
    rules: Registry[Callable[[], int]] = Registry("rule")

    def define(value: int) -> Callable[[], int]:
        @rules.register("rule")
        def rule() -> int:
            return value

        return rule

    define(1), define(2)
    assert rules["rule"]() == 2
    with pytest.raises(InvalidInputError, match="already"):
        rules.register("rule")(lambda: 3)


def test_unknown_names_name_the_closest() -> None:
    parts: Registry[int] = Registry("indicator")
    parts.add("I_cos", 1)
    for look_up in (parts.__getitem__, parts.remove):
        with pytest.raises(UnknownNameError, match=r"There is no indicator 'I_cso'. Did you mean I_cos\?"):
            look_up("I_cso")
    assert "I_cso" not in parts and len(parts) == 1 and repr(parts) == "Registry('indicator': I_cos)"


def test_modules_of_a_package_are_imported_at_the_first_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "registered_parts"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from workbench.core.registry import Registry\nPARTS = Registry('part', package=__name__)\n"
    )
    for name in ("beta", "alpha"):
        (package / f"{name}.py").write_text(
            f"from registered_parts import PARTS\nPARTS.add({name!r}, 1)\nassert {name!r} in PARTS\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    from registered_parts import PARTS  # pyright: ignore[reportMissingImports]

    assert "registered_parts.alpha" not in sys.modules
    import registered_parts.beta  # pyright: ignore[reportMissingImports]  # noqa: F401

    assert list(PARTS) == ["alpha", "beta"], "whichever was imported first"
