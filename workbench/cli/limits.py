"""What no option may be, whatever the command: not a number, negative, or too large to count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from workbench.cli.base import BaseCommand
from workbench.core.atomic import refuse_address
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1
_ANY_SIGN = ("layer", "layers")
"""Layers are counted from the end by negative numbers."""
_AT_LEAST_ONE = (
    "batch", "batch_rows", "batch_size", "d_sae", "expansion", "items", "iterations", "k", "limit", "max_tokens",
    "n_features", "n_prompts", "new_tokens", "per_class", "rows", "seeds", "test_pairs", "tokens", "training_tokens",
    "windows",
)  # fmt: skip


def check_text(words: Sequence[str]) -> None:
    """Refuses arguments that are no text.

    Raises:
        InvalidInputError: for half a character, as bytes become that are not in the terminal's encoding, and for NUL.
    """
    for number, word in enumerate(words, 1):
        if "\0" in word or any(0xD800 <= ord(char) <= 0xDFFF for char in word):
            raise InvalidInputError(
                f"Argument {number} ({ascii(word)[:60]}) is no text in the encoding of this terminal. Type it "
                "again, or rename the file."
            )


def check_numbers(command: BaseCommand) -> None:
    """Refuses numbers that no option takes; the narrower limits of an option are those of the code that it is for.

    Raises:
        InvalidInputError: naming the option.
    """
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        option = f"--{field.name.replace('_', '-')}"
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InvalidInputError(f"{option} {number}: this is no finite number. Give one.")
            if isinstance(number, int) and not isinstance(number, bool):
                # Several tokens are ids, which begin with 0.
                counts = field.name in _AT_LEAST_ONE and not (field.name == "tokens" and isinstance(value, tuple))
                _check_integer(option, field.name, number, int(counts))


def check_places(command: BaseCommand) -> None:
    """Refuses places that results can't go to, before any work is done for them.

    Raises:
        InvalidInputError: for an address, unless the command takes them, and for what can't be written to.
    """
    from workbench.engine.folder import require_local

    for name in ("out", "save_model"):
        place = getattr(command, name, None)
        if place is None or command.takes_addresses:
            continue
        if command.writes_a_file:
            refuse_address(place)
            place = place.parent
        require_local(place)


def _check_integer(option: str, name: str, number: int, least: int) -> None:
    most = MAX_SEED if name == "seed" else MAX_COUNT
    least = -most if name in _ANY_SIGN else least
    if not least <= number <= most:
        digits = counted(round(math.log10(abs(number or 1))), "digits")
        shown = str(number) if abs(number) < 10**20 else f"a number of about {digits}"
        raise InvalidInputError(f"{option} {shown}: give {least} to {most}.")
