"""What the help of every command says is whole and true."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex

import pytest

from workbench.cli import parse
from workbench.cli.base import BaseCommand
from workbench.cli.commands import commands
from workbench.cli.page import group_page, help_page

COMMANDS = sorted(commands())
READS_WEIGHTS = ("glitch lint", "glitch diff", "tokens")
"""Commands with a model of which they load no more than weights or the tokenizer."""


def command(words: str) -> type[BaseCommand]:
    return commands()[words].load()


def test_every_summary_is_whole_at_80_columns() -> None:
    page = help_page(80)
    assert "…" not in page
    assert all(len(line) <= 80 for line in page.splitlines()), [line for line in page.splitlines() if len(line) > 80]
    for words, entry in commands().items():
        assert entry.summary().endswith("."), words
        assert entry.summary() in page
    assert "…" not in group_page("glitch")


@pytest.mark.parametrize("words", COMMANDS)
def test_help_ends_with_an_example_that_can_be_typed(words: str) -> None:
    text = inspect.getdoc(command(words)) or ""
    found = re.search(r"\n\nExample: workbench (.+)\Z", text)
    assert found, text
    assert (found[1] + " ").startswith(words + " ")
    assert parse(command(words), shlex.split(found[1].removeprefix(words)), "workbench") is not None


@pytest.mark.parametrize("words", COMMANDS)
def test_the_options_say_what_is_used(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = command(words)
    assert parse(cls, ["--help"], f"workbench {words}") is None
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert not re.search(r"\{None\}|\(default: (None|False)?\)", shown), "says nothing"
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        assert field.default is not True, f"--no-{name}: an option says what it does, not what it stops"
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            option = f"--{name.replace('_', '-')}"
            assert re.search(rf"{option} \S+ .*?\(default: {re.escape(str(field.default))}\)", shown), (option, shown)
    if "model" in fields and words not in READS_WEIGHTS:
        assert {"dtype", "device"} <= fields.keys(), "a model is loaded, in a precision and on a device"
    if "out" in fields and fields["out"].default not in (None, dataclasses.MISSING):
        assert f"(default: {fields['out'].default})" in shown


@pytest.mark.parametrize("words", ["check", "sites", "tokens", "generate"])
def test_what_writes_nothing_has_no_out(words: str) -> None:
    assert "out" not in {field.name for field in dataclasses.fields(command(words))}
