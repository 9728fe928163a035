"""The page that `workbench --help` shows, and the short one of a group."""

from __future__ import annotations

import shutil
import textwrap

from workbench.cli.commands import commands, members

GROUPS = (
    ("Start here", ("demo", "check")),
    ("Look inside a model", ("sites", "tokens", "capture", "generate")),
    ("Sparse autoencoders (SAEs)", ("harvest", "sae train", "sae eval", "sae suite", "sae faithful", "geometry")),
    ("Features", ("features score", "features cards", "features show", "features study")),
    ("Interventions", ("steer", "serve", "shift", "refusal", "probe")),
    (
        "Circuits",
        (
            "circuit saes",
            "circuit find",
            "circuit doctor",
            "circuit edges",
            "circuit eval",
            "circuit show",
            "circuit graph",
            "circuit study",
        ),
    ),
    ("Circuits of behaviours that nobody named", ("circuit discover",)),
    (
        "Circuits in one call",
        ("circuit lens", "circuit lenses", "circuit patch", "circuit paths", "circuit attribution", "circuit heads"),
    ),
    ("Glitch tokens", ("glitch scan", "glitch census", "glitch search", "glitch repair", "glitch features")),
    ("Use of a glitch scan", ("glitch lint", "glitch diff", "glitch export", "glitch sanitize", "glitch adt")),
    ("Results", ("runs", "report")),
)
"""What a newcomer wants, in this order; commands that are not named here come last."""

_NAME = 16
"""Characters of a name that the column of summaries makes room for; a longer name moves its own."""

_ABOUT = """\
Look inside a language model and change what it does: collect activations, train
sparse autoencoders, score their features, steer and ablate them, with a control
and an interval beside every number. Runs offline on a small embedded model;
nothing to sign up for.
"""

_USAGE = """\
Usage: workbench COMMAND [OPTIONS]    workbench COMMAND --help explains it.
       --debug shows the traceback of an error; --version the version.
       Each command prints the one that comes next.
"""

_EXAMPLES = """\
Examples:
  workbench demo
  workbench generate "The capital of France is" --max-new-tokens 20
"""


def help_page(width: int | None = None) -> str:
    """The page: what this is, how to call it, every command in one line."""
    width = width or min(100, shutil.get_terminal_size((100, 24)).columns)
    summaries = {words: entry.summary() for words, entry in commands().items()}
    column = max((len(words) for words in summaries if len(words) <= _NAME), default=0) + 4
    listed = {words for _, group in GROUPS for words in group}
    rest = ("More", tuple(words for words in summaries if words not in listed))
    parts = [_ABOUT, _USAGE]
    for heading, group in (*GROUPS, rest):
        lines = [_line(words, summaries[words], column, width) for words in group if words in summaries]
        if lines:
            parts.append("\n".join([f"{heading}:", *lines]) + "\n")
    return "\n".join([*parts, _EXAMPLES])


def group_page(group: str) -> str:
    """The commands of one group, such as `workbench sae`."""
    names = members(group)
    column = max(map(len, names)) + 4
    lines = [_line(words, commands()[words].summary(), column, 100) for words in names]
    return "\n".join([f"Usage: workbench {group} COMMAND [OPTIONS]", "", *lines, ""])


def _line(words: str, summary: str, column: int, width: int) -> str:
    name = f"  {words:<{column - 2}}" if len(words) + 4 <= column else f"  {words}  "
    return name + textwrap.shorten(summary, max(20, width - len(name)), placeholder=" …")
