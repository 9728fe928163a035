"""The names that a package offers: listed once, in its stub, and imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable

import lazy_loader

from workbench.core.errors import did_you_mean


def attach(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are in the stub beside it, `__init__.pyi`.

    Type checkers and editors read the same stub, so the list of names exists once.
    """
    lazy, _, names = lazy_loader.attach_stub(package, file)
    names = sorted(names, key=lambda name: (not name[0].isupper(), name))

    def attribute(name: str) -> object:
        if name not in names:
            raise AttributeError(f"{package} has no {name!r}. {did_you_mean(name, names)}")
        return lazy(name)

    return attribute, lambda: list(names), names
