"""The eleven checks on an attribution in the plain form."""

from __future__ import annotations

from collections.abc import Sequence

from circuits.doctor import direct, planted, repeated, retrained
from circuits.doctor.attribution import Attribution
from circuits.doctor.report import NAMES, Check, DoctorReport
from workbench.core.errors import InvalidInputError


def examined(
    what: str, group: Sequence[Attribution], *, sizes: direct.Sizes, checks: Sequence[int] = (), method_name: str = ""
) -> DoctorReport:
    """Runs the checks that apply; values are means over the attributions of a group, which have the same inputs.

    Args:
        what: the attribution in words.
        group: one attribution per site, or one alone.
        sizes: how much is measured.
        checks: numbers of those to run; by default all.
        method_name: the method in words, for the notes.

    Raises:
        InvalidInputError: for a number that is no check.
    """
    if unknown := sorted(set(checks) - NAMES.keys()):
        raise InvalidInputError(f"checks={unknown}: the checks are {', '.join(f'{k} {v}' for k, v in NAMES.items())}.")
    wanted = set(checks) or set(NAMES)
    found: list[Check] = []
    if 1 in wanted:
        found += repeated.completeness(group, sizes.steps)
    if 2 in wanted:
        found += planted.axioms(group) + repeated.same_function(group)
    if 3 in wanted:
        found += direct.agreement(group, sizes)
    if 4 in wanted:
        found += direct.rankings(group, sizes)
    if 5 in wanted:
        found += repeated.randomisation(group)
    if 6 in wanted:
        found += repeated.settings(group)
    if wanted & {7, 8}:
        found += [check for check in retrained.roar(group, sizes.seed) if check.number in wanted]
    if 9 in wanted:
        found += planted.truth(group)
    if 10 in wanted:
        found += direct.deletion(group, sizes)
    if 11 in wanted:
        found += repeated.gauge(group)
    method = group[0].method
    runs_method = method is not None and wanted & {2, 9}
    notes = [planted.slope(method, method_name or "This method")] if method and runs_method else []
    notes += [
        check.why[:1].upper() + check.why[1:] + "." for check in found if "show the measured effects" in check.why
    ]
    return DoctorReport(what=what, checks=tuple(found), notes=tuple(filter(None, notes)))
