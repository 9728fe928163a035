"""Judges of SHIFT: verdicts as files, a queue for persons, how far two agree, statistics without twins."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import circuits
from circuits.shift.judgement import judge_features
from circuits.shift.judging.agreement import agreement, cohens_kappa
from circuits.shift.judging.page import QueueCard
from circuits.shift.judging.queue import _drawn
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import ShiftStudy
from circuits.shift.texts import LabelledTexts
from tests.circuits.planted import LABEL_FEATURES, SITE, SPURIOUS_FEATURES, planted_model, planted_sae, planted_task
from tests.report.browser import Browser, running
from workbench.core.errors import CorruptFileError, DegenerateInputError, MismatchError, UnknownNameError
from workbench.judges import Answer, FileJudge, Question

OPTIONS = circuits.ShiftOptions(top_k=10, random_draws=2)
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


@functools.cache
def _task() -> circuits.ShiftTask:
    return planted_task(40, 16)


@functools.cache
def _study() -> ShiftStudy:
    return circuits.read_study(planted_model(), {SITE: planted_sae()}, _task(), OPTIONS)


def _shift(judge: object, task: circuits.ShiftTask | None = None) -> ShiftReport:
    return circuits.shift(planted_model(), {SITE: planted_sae()}, task or _task(), judge, options=OPTIONS)  # type: ignore[arg-type]


def _ablated(report: ShiftReport) -> set[int]:
    return {int(v.feature.rpartition("/")[2]) for v in report.verdicts if v.decision == "spurious"}


def _given(judge: str, verdicts: Sequence[str]) -> list[circuits.Annotation]:
    return [
        circuits.Annotation(feature=f"{SITE}/{i}", verdict=verdict, rationale="", judge=judge, timestamp="t")  # type: ignore[arg-type]
        for i, verdict in enumerate(verdicts)
    ]


def test_verdicts_of_a_study_go_to_a_file_and_judge_again(tmp_path: Path) -> None:
    report = _shift("statistics")
    path = circuits.save_annotations(tmp_path / "verdicts.jsonl", circuits.verdicts_of(report))
    assert circuits.read_annotations(path) == tuple(
        replace(one, timestamp=kept.timestamp)
        for one, kept in zip(circuits.verdicts_of(report), circuits.read_annotations(path), strict=True)
    )
    record = json.loads(path.read_text().splitlines()[0])
    assert set(record) == {"feature", "verdict", "rationale", "judge", "timestamp"}
    again = _shift(f"annotations:{path}")
    assert [(v.feature, v.decision, v.why) for v in again.verdicts] == [
        (v.feature, v.decision, v.why) for v in report.verdicts
    ]
    assert _ablated(again) == _ablated(report) >= SPURIOUS_FEATURES and again.judge == "statistics"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"feature": "a.1/2", "verdict": "spurious", "rationale": "", "judge": "A"}', "entry 2: .* 'timestamp'"),
        ('{"feature": "a.1/2", "verdict": "bad", "rationale": "", "judge": "A", "timestamp": ""}', "entry 2: .*'bad'"),
        ('{"feature": "a.1", "verdict": "unsure", "rationale": "", "judge": "A", "timestamp": ""}', "entry 2: 'a.1'"),
        ("[1]", "2"),
    ],
)
def test_a_file_that_holds_no_verdicts_is_refused_by_the_entry(tmp_path: Path, line: str, message: str) -> None:
    path = circuits.save_annotations(tmp_path / "verdicts.jsonl", _given("A", ["unsure"]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CorruptFileError, match=message):
        circuits.read_annotations(path)


def test_an_unknown_judge_is_named_with_what_exists() -> None:
    with pytest.raises(UnknownNameError, match=r"'statistic'. Did you mean statistics\? .*annotations:FILE"):
        _shift("statistic")


def test_a_queue_is_blind_drawn_and_continues_where_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "of A.jsonl"
    queue = circuits.judging_queue(_study(), path, judge="A", seed=1)
    names = [card.feature for card in queue.cards]
    assert set(names) == {v.feature for v in _shift("statistics").verdicts}
    assert set(asdict(queue.cards[0])) == {"feature", "tokens", "contexts", "n_tokens"}, "no effect, no label"
    assert names == [c.feature for c in _drawn(queue.cards[::-1], 1)], "the order does not tell the effects"
    assert names != [c.feature for c in _drawn(queue.cards, 2)]
    by_name = {card.feature: card for card in queue.cards}
    assert by_name[f"{SITE}/2"].tokens == ("M",) and len(by_name[f"{SITE}/2"].contexts) > 1
    assert {context.token for context in by_name[f"{SITE}/2"].contexts} == {"M"}
    assert by_name[f"{SITE}/2"].contexts[0].after.startswith(" k ")
    queue.decide("spurious", "letters").decide("unsure")
    circuits.save_annotations(path, [*circuits.read_annotations(path), *_given("B", ["intended"] * 15)])
    resumed = circuits.judging_queue(_study(), path, judge="A", seed=1)
    assert resumed.current() is not None and resumed.current().feature == names[2]  # type: ignore[union-attr]
    resumed.decide("intended", "again", feature=names[1])
    assert [(a.feature, a.verdict) for a in queue.annotations()] == [(names[0], "spurious"), (names[1], "intended")]
    assert len([one for one in circuits.read_annotations(path) if one.judge == "B"]) == 15
    assert resumed.frame().verdict.tolist()[:3] == ["spurious", "intended", ""]
    assert resumed.current().contexts[0].after in resumed._repr_html_()  # type: ignore[union-attr]
    for _ in names[2:]:
        resumed.decide("unsure")
    assert resumed.current() is None and "All features are judged" in resumed._repr_html_()
    with pytest.raises(DegenerateInputError, match="all .* features are judged"):
        resumed.decide("unsure")


def test_what_two_persons_see_differently_is_not_ablated(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    truth = ["spurious" if i in SPURIOUS_FEATURES else "intended" for i in range(15)]
    other = list(truth)
    other[2] = "intended"
    circuits.save_annotations(path, [*_given("A", truth), *_given("B", other)])
    report = _shift(circuits.AnnotatedDecider.of(path))
    assert _ablated(report) == SPURIOUS_FEATURES - {2} and report.judge == "A and B"
    (disputed,) = [v for v in report.verdicts if v.feature == f"{SITE}/2"]
    assert disputed.decision == "unsure" and "A: spurious; B: intended" in disputed.why
    assert "A and B: Cohen's kappa 0.6" in report.judge_information and "by chance 0.8" in report.judge_information
    circuits.save_annotations(path, [*_given("A", truth), *_given("B", other[:3])])
    left = circuits.AnnotatedDecider.of(path)
    unseen = next(v for v in _shift(left).verdicts if v.feature == f"{SITE}/3")
    assert (unseen.decision, unseen.why) == ("unsure", "not judged by B")


def test_kappa_is_that_of_the_hand_computed_table() -> None:
    a = ["spurious"] * 30 + ["intended"] * 20
    b = ["spurious"] * 20 + ["intended"] * 10 + ["spurious"] * 5 + ["intended"] * 15
    found = agreement(_given("A", a), _given("B", b))
    # observed 35 / 50, by chance .6 * .5 + .4 * .5; of the first judge alone it would be .52
    assert found.kappa is not None and found.kappa.value == pytest.approx((0.7 - 0.5) / 0.5)
    assert found.observed.value == 0.7 and found.chance == pytest.approx(0.5)
    assert found.kappa.low < 0.3 and 0.5 < found.kappa.high < 0.7 and found.kappa.n == 50
    assert len(found.disputed) == 15 and found.frame().to_numpy().sum() == 50
    assert agreement(_given("A", a[:9]), _given("B", b[:9])).kappa is None, "both always say one thing"
    few = agreement(_given("A", a[20:30]), _given("B", b[20:30]))
    assert few.kappa is not None and (few.kappa.low, few.kappa.high) == (-1.0, 1.0)
    assert np.isnan(cohens_kappa(np.diag([4, 0])))
    with pytest.raises(DegenerateInputError, match="none was judged by both"):
        agreement(_given("A", a), [])


def _with_minority() -> circuits.ShiftTask:
    """Without twins and words; of 48 training texts 8 break the correlation."""
    task, more = _task(), planted_task(16, 16).balanced
    assert more is not None and more.spurious is not None and task.train.spurious is not None
    train = LabelledTexts(
        task.train.texts + more.texts, task.train.label + more.label, task.train.spurious + more.spurious
    )  # fmt: skip
    return replace(task, train=train, swapped=None, spurious_words=frozenset(), target_words=frozenset())


def test_variation_within_labels_needs_no_twins_but_texts_that_break_the_correlation() -> None:
    report = _shift("within-label", _with_minority())
    verdicts = {int(v.feature.rpartition("/")[2]): v for v in report.verdicts}
    assert {f for f in SPURIOUS_FEATURES | LABEL_FEATURES if verdicts[f].decision == "spurious"} == SPURIOUS_FEATURES
    assert {verdicts[f].decision for f in LABEL_FEATURES} == {"intended"}
    with pytest.raises(MismatchError, match="0 texts of one label break the correlation"):
        _shift("within-label")


def test_judges_of_two_labels_say_so_where_there_are_more() -> None:
    task = _task()
    texts, labels, values = ("x a M",) * 10, (2,) * 10, (0, 1) * 5
    more = {
        name: LabelledTexts(rows.texts + texts, rows.label + labels, (rows.spurious or ()) + values)
        for name, rows in task.sets().items() if name != "balanced"
    }  # fmt: skip
    three = replace(task, label_names=(*task.label_names, "X"), swapped=None, balanced=None, **more)  # type: ignore[arg-type]
    study = circuits.read_study(planted_model(), {SITE: planted_sae()}, three, OPTIONS)
    for name in ("within-label", "instability", "automatic"):
        with pytest.raises(MismatchError, match=r"two labels, and the task has 3\. Give ShiftOptions\(positive"):
            judge_features(study, circuits.DECIDERS[name]())
    with pytest.raises(MismatchError, match="two labels"):
        circuits.what_if(study, [f"{SITE}/0"]).backward()
    assert circuits.what_if(study, [f"{SITE}/0"]).leave_one_out().roles[0].label.n == len(three.test)


class Reader:
    """Says yes where most of the words are on the list of the names that are asked about."""

    name = "reader"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return [Answer(value=self._one(question.text), judge=self.name) for question in questions]

    def _one(self, text: str) -> float:
        own = _task().spurious_words if f"either {_task().spurious_names[0]} or" in text else _task().target_words
        words = text.split("words:\n")[1].split("\n\n")[0].split(", ")
        return float(np.mean([word in own for word in words]) > 0.5)


def test_an_untested_judge_is_refused_unless_it_is_allowed() -> None:
    task = _with_minority()
    with pytest.raises(MismatchError, match="judge reader can't be tried.*allow_untested=True"):
        _shift(Reader(), task)
    decider = circuits.AskedDecider.of(Reader(), task, allow_untested=True)
    report = _shift(decider, task)
    assert _ablated(report) & (SPURIOUS_FEATURES | LABEL_FEATURES) == SPURIOUS_FEATURES
    assert "UNTESTED" in report.judge_information and all("untested" in v.why for v in report.verdicts)
    tried = circuits.AskedDecider.of(Reader(), _task(), allow_untested=True)
    assert tried.gate is not None and "UNTESTED" not in tried.information
    nameless = replace(decider, attribute=())
    dossier = circuits.FeatureDossier(
        node=circuits.Node(SITE, 0), effect=1.0, acts=np.ones(2), swapped=None, label=np.ones(2),
        top_tokens=(("T", 1.0),), spurious_share=None, target_share=None, n_tokens=9,
    )  # fmt: skip
    assert nameless(dossier).decision == "intended"
    assert nameless(replace(dossier, top_tokens=(("M", 1.0),))).decision == "spurious"


def test_questions_go_to_a_file_and_replies_come_from_one(tmp_path: Path) -> None:
    first = _shift(f"questions:{tmp_path}")
    assert {v.decision for v in first.verdicts} == {"unsure"}
    prompts = [json.loads(line) for line in (tmp_path / "export-prompts.jsonl").read_text().splitlines()]
    replies = [{"id": one["id"], "reply": str(int(Reader()._one(one["prompt"])))} for one in prompts]
    (tmp_path / "import-replies.jsonl").write_text("\n".join(map(json.dumps, replies)))
    assert FileJudge(tmp_path).open_prompts() == 0
    second = _shift(f"questions:{tmp_path}")
    assert [v.decision for v in second.verdicts] == [v.decision for v in _shift(Reader()).verdicts]
    assert _ablated(second) & (SPURIOUS_FEATURES | LABEL_FEATURES) == SPURIOUS_FEATURES


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_the_page_holds_no_effect_and_no_markup_of_texts(tmp_path: Path) -> None:
    card = QueueCard(
        feature=f"{SITE}/1", tokens=("T",), n_tokens=3, contexts=(circuits.TokenContext(HOSTILE, "</script>", ""),)
    )  # fmt: skip
    queue = circuits.judging_queue(_study(), tmp_path / "v.jsonl", judge=HOSTILE)
    page = replace(queue, cards=(card, *queue.cards)).save_page(tmp_path / "page.html").read_text()
    assert "<img" not in page and page.count("</script>") == 2
    effects = [v.effect for v in _shift("statistics").verdicts]
    assert not any(repr(effect)[:6] in page for effect in effects)


@pytest.mark.browser
def test_verdicts_on_the_page_are_kept_and_come_back_as_a_file(tmp_path: Path, browser: Browser) -> None:
    queue = circuits.judging_queue(_study(), tmp_path / "v.jsonl", judge="A", seed=3)
    queue.decide("unsure", "first")
    browser.open(queue.save_page(tmp_path / "page.html").as_uri())
    shown = "document.getElementById('feature').textContent"
    assert browser.js(shown) == queue.cards[1].feature
    browser.click("#why")
    browser.type("it's 1")
    browser.key("1")  # typed, and no verdict
    assert (
        browser.js("document.getElementById('why').value") == "it's 11" and browser.js(shown) == queue.cards[1].feature
    )
    browser.click("[data-verdict=spurious]")
    browser.key("2")
    assert browser.js(shown) == queue.cards[3].feature
    browser.js("window.isOld = true")
    browser.call("Page.reload")
    browser.until("!window.isOld && document.readyState === 'complete'")
    assert browser.js(shown) == queue.cards[3].feature, "verdicts outlive the page"
    assert browser.js("document.getElementById('progress').textContent") == "4 of 4, 3 judged"
    (tmp_path / "exported.jsonl").write_text(browser.js("window.queueLines()"))
    assert queue.take(tmp_path / "exported.jsonl") == 3 and browser.problems == []
    assert [(a.verdict, a.rationale) for a in queue.annotations()] == [
        ("unsure", "first"), ("spurious", "it's 11"), ("intended", ""),
    ]  # fmt: skip
