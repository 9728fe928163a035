"""How the options of a command are read and shown in its help, the same for all commands."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import tyro
from tyro.constructors import MISSING_NONPROP, ConstructorRegistry, StructConstructorSpec, StructTypeInfo

STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
"""--json, not --json | --no-json; an option that may be left out takes no word "None"."""
_NO_HINT = tyro.conf.arg(help_behavior_hint="")


def quiet_defaults() -> ConstructorRegistry:
    """The rules of tyro, but the help shows no default that is None, False or empty: the text of the option says it."""
    registry = ConstructorRegistry()
    entered: list[object] = []

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type in entered:
            return None  # tyro's own rule comes next
        entered.append(info.type)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            entered.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = (
            replace(field, type=Annotated[field.type, _NO_HINT]) if _says_nothing(field.default) else field
            for field in spec.fields
        )
        return replace(spec, fields=tuple(fields))

    return registry


def _says_nothing(default: object) -> bool:
    return default is None or default is False or default is MISSING_NONPROP or default in ((), "")
