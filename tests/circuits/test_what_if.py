"""Features toggled: accuracies are those of the table, in Python and on the page; which features matter."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import circuits
from circuits.shift.shift_report import ShiftReport
from tests.circuits.planted import LABEL_FEATURES, SITE, SPURIOUS_FEATURES, planted_model, planted_sae, planted_task
from tests.report.browser import Browser, running
from workbench.core.errors import DegenerateInputError, MismatchError, UnknownNameError

OPTIONS = circuits.ShiftOptions(top_k=10, random_draws=2)
ALL = [f"{SITE}/{f}" for f in sorted(SPURIOUS_FEATURES)]


@functools.cache
def _what_if(probe_site: str = SITE) -> tuple[ShiftReport, circuits.WhatIf]:
    model, bases, task = planted_model(), {SITE: planted_sae()}, planted_task(40, 80)
    options = replace(OPTIONS, probe_site=probe_site)
    report = circuits.shift(model, bases, task, options=options)
    return report, circuits.what_if(circuits.read_study(model, bases, task, options), report)


@pytest.mark.parametrize("probe_site", [SITE, "resid_post.2"])
def test_toggled_accuracies_are_those_of_the_table(probe_site: str) -> None:
    report, live = _what_if(probe_site)
    for name, row in (
        ("original", live.without([])), ("SHIFT", live.without(ALL)),
        ("SHIFT + retrain", live.without(ALL, retrain=True)),
    ):  # fmt: skip
        same = report.method(name)
        assert (row.label, row.worst, row.spurious, row.worst_group) == (
            same.label, same.worst, same.spurious, same.worst_group,
        )  # fmt: skip
    assert live.without(ALL).n_features == 2 and live.without([]).label != live.without(ALL).label
    assert [str(node) for node in live.ablated] == sorted(ALL, key=[v.feature for v in report.verdicts].index)


def test_unknown_features_and_studies_of_other_saes_are_refused() -> None:
    _, live = _what_if()
    with pytest.raises(UnknownNameError, match=f"{SITE}/99"):
        live.without([f"{SITE}/99"])
    with pytest.raises(MismatchError, match="no feature resid_post.0/1"):
        circuits.what_if(live.study, ["resid_post.0/1"])
    with pytest.raises(DegenerateInputError, match="no feature is ablated"):
        circuits.what_if(live.study, []).leave_one_out()
    with pytest.raises(MismatchError, match="run of the model"):
        _what_if("resid_post.2")[1].backward()


def test_leaving_one_out_tells_which_features_an_ablation_needs() -> None:
    _, live = _what_if()
    idle = f"{SITE}/7"
    found = circuits.what_if(live.study, [*ALL, idle]).leave_one_out()
    by_name = {role.feature: role for role in found.roles}
    every = live.without(ALL).label.value
    for name in ALL:
        kept = live.without([other for other in ALL if other != name]).label.value
        assert by_name[name].label.value == pytest.approx(every - kept) and by_name[name].label.n == 80
    assert found.roles[-1].feature == idle and max(by_name[name].label.value for name in ALL) > 0.05
    conflict = by_name[found.roles[0].feature].conflict
    assert conflict is not None and conflict.n == 40 and conflict.value > by_name[found.roles[0].feature].label.value
    assert found.frame().columns.tolist()[:4] == ["feature", "label", "label_low", "label_high"]


def test_backward_selection_gives_back_what_matters_least_first_and_measures_on_other_texts() -> None:
    _, live = _what_if()
    harmful, idle = f"{SITE}/{min(LABEL_FEATURES)}", f"{SITE}/7"
    found = circuits.what_if(live.study, [*ALL, harmful, idle]).backward()
    order = [step.kept for step in found.steps]
    assert order[:2] == ["", harmful] and set(order[-2:]) == set(ALL), "the label's feature comes back first"
    assert [step.n_ablated for step in found.steps] == [4, 3, 2, 1, 0]
    assert all(step.label.n == 40 and step.worst.n == 10 for step in found.steps)
    assert found.steps[2].label.value > max(found.steps[0].label.value, found.steps[-1].label.value)
    assert len(found.frame()) == 5


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.browser
def test_the_page_computes_what_python_computes(tmp_path: Path, browser: Browser) -> None:
    _, live = _what_if()
    browser.open(live.save_page(tmp_path / "what-if.html").as_uri())

    def same(features: list[str]) -> None:
        row, told = live.without(features), json.loads(browser.js("JSON.stringify(window.whatIf)"))
        for name, expected in (("label", row.label), (row.worst_group, row.worst)):
            assert told[name]["value"] == pytest.approx(expected.value, abs=1e-12)
            assert [told[name]["low"], told[name]["high"]] == pytest.approx([expected.low, expected.high], abs=1e-9)
            assert told[name]["n"] == expected.n
        assert row.spurious is not None
        assert told["agreement with the attribute"]["value"] == pytest.approx(row.spurious.value)

    same(ALL)
    browser.click("#none")
    same([])
    place = [str(node) for node in live.nodes].index(ALL[0])
    browser.click(f"fieldset input[value='{place}']")
    same(ALL[:1])
    browser.click("#all")
    same([str(node) for node in live.nodes])
    browser.click("#first")
    same(ALL)
    assert browser.problems == [] and "worst" in browser.js("document.querySelector('tr.worst').className")
