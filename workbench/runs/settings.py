"""What a run records of how it was started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from workbench.core.errors import InvalidInputError
from workbench.core.records import DataclassLike, to_jsonable

Config = Mapping[str, object] | DataclassLike
"""Settings of a run."""


def settings_of(config: Config) -> dict[str, object]:
    """The configuration in JSON types, without dataclass fields marked `metadata={"config": False}`."""
    if dataclasses.is_dataclass(config):
        fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("config", True)]
        config = {name: getattr(config, name) for name in fields}
    elif not isinstance(config, Mapping):
        raise InvalidInputError(f"A run's config is a {type(config).__name__}; give a dataclass or a dict.")
    return json.loads(json.dumps(to_jsonable(config)))


def arguments_of(config: Config) -> dict[str, object]:
    """The settings of a dataclass that are not its defaults, in JSON types; none for a mapping, which has none."""
    if not dataclasses.is_dataclass(config):
        return {}
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    return {name: value for name, value in settings_of(config).items() if getattr(config, name) != defaults[name]}
