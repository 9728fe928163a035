from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

import workbench.runs.mirror as mirror_module
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError
from workbench.core.locks import lock_folder, unlock_folder
from workbench.core.records import load_json, save_json
from workbench.core.stats import wilson
from workbench.report.base import Bars, Section, Table
from workbench.runs.run import RunDir, find_run, list_runs

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 3
    rate: float = 0.1
    json: bool = field(default=False, metadata={"config": False})


SECTION = Section(
    "First <step>",
    (Bars("bars", ("x",), (wilson(1, 4),)),),
    ("One of four (n = 4 rows).",),
    {"share": wilson(1, 4), "bad": float("nan")},
)


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_a_new_folder_has_config_and_environment(tmp_path: Path) -> None:
    run = RunDir.create("shift", Config(), tmp_path)
    assert run.path.parent == tmp_path
    assert run.path.name.split("-")[1] == "shift"
    assert run.config == {"seed": 3, "rate": 0.1}
    assert run.env.get("arguments") == {} and RunDir.create("y", {"seed": 3}, tmp_path).env.get("arguments") == {}
    given = RunDir.create("y", Config(rate=0.2, json=True), tmp_path / "given")
    assert given.env.get("arguments") == {"rate": 0.2} == list_runs(tmp_path / "given")[0].arguments
    env = run.env
    assert env["seed"] == 3
    assert {"torch", "transformers", "transformer_lens", "sae_lens", "numpy"} <= env["packages"].keys()
    assert env["packages"]["torch"] is not None
    assert not run.finished
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="can't name a run"):
        RunDir.create(name, Config(), tmp_path)
    with pytest.raises(InvalidInputError, match="can't name a step"):
        RunDir.create("ok", Config(), tmp_path).save_step(name, SECTION)


def test_steps_come_back_in_the_order_of_saving(tmp_path: Path) -> None:
    run = RunDir.create("x", Config(), tmp_path)
    run.save_step("zeta", SECTION)
    run.save_step("alpha", Section("second"))
    run.save_step("zeta", Section("again"))
    assert run.steps() == ("zeta", "alpha")
    assert run.load_step("zeta") == Section("again")
    assert run.has("alpha")
    assert not run.has("beta")
    with pytest.raises(MissingFileError, match="Did you mean alpha"):
        run.load_step("alph")


def test_finish_writes_everything_and_done_last(tmp_path: Path) -> None:
    run = RunDir.create("x", Config(), tmp_path)
    run.save_step("one", SECTION)
    run.metrics("loss", 0.5, 0)
    report = run.finish("Title & more")
    result = load_json(run.path / "result.json")
    assert result["schema"] == 1
    assert result["title"] == "Title & more"
    assert result["metrics"]["one.share"]["n"] == 4
    assert result["metrics"]["one.bad"]["value"] is None
    assert result["findings"] == [{"step": "one", "text": "One of four (n = 4 rows)."}]
    assert [file.name for file in (run.path / "plots").iterdir()] == ["one-1-bars.svg"]
    page = report.read_text()
    assert "<title>Title &amp; more</title>" in page
    assert "First &lt;step&gt;" in page
    assert 'role="status"' not in page
    assert run.finished


def test_an_equal_unfinished_run_is_continued_and_others_are_not(tmp_path: Path) -> None:
    first = RunDir.resume_or_create("x", Config(), tmp_path)
    first.save_step("one", SECTION)
    assert RunDir.resume_or_create("x", Config(json=True), tmp_path).path == first.path
    assert RunDir.resume_or_create("x", Config(rate=0.2), tmp_path).path != first.path
    assert RunDir.resume_or_create("y", Config(), tmp_path).path != first.path
    newer = RunDir.resume_or_create("x", Config(), tmp_path, fresh=True)
    assert newer.path != first.path
    assert RunDir.resume_or_create("x", Config(), tmp_path).path == newer.path
    newer.finish()
    again = RunDir.resume_or_create("x", Config(), tmp_path)
    assert again.path == first.path
    assert len(again.env["resumed"]) >= 1
    first.finish()
    assert RunDir.resume_or_create("x", Config(), tmp_path).path not in (first.path, newer.path)


def test_half_written_files_are_ignored_and_removed(tmp_path: Path) -> None:
    run = RunDir.create("x", Config(), tmp_path)
    run.metrics("loss", 1.0, 0)
    run.metrics("loss", float("inf"), 1)
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"name": "loss", "st')
    (run.path / "steps" / ".one.json.abcd1234.tmp").write_text("{")
    assert run.steps() == ()
    assert [row["value"] for row in run.read_metrics()] == [1.0, None]
    again = RunDir.resume_or_create("x", Config(), tmp_path)
    again.metrics("loss", 0.25, 1)
    assert again.path == run.path
    assert [row["value"] for row in again.read_metrics()] == [1.0, 0.25]
    assert list((run.path / "steps").iterdir()) == []


def test_ctrl_c_leaves_a_report_of_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, RunDir.create("x", Config(), tmp_path) as run:
        run.save_step("one", SECTION)
        raise KeyboardInterrupt
    page = (run.path / "report.html").read_text()
    assert "Unfinished: stopped by KeyboardInterrupt. Finished steps: one." in page
    assert "One of four" in page
    assert not run.finished
    assert str(run.path) in caught.value.__notes__[0]
    assert RunDir.resume_or_create("x", Config(), tmp_path).has("one")


def test_an_error_in_the_block_is_not_hidden_by_a_report_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, RunDir.create("x", Config(), tmp_path) as run:
        (run.path / "env.json").unlink()
        raise ZeroDivisionError
    assert "could not be written" in caught.value.__notes__[0]


def test_the_model_is_noted_once(tmp_path: Path) -> None:
    class FakeModel:
        name, fingerprint, dtype, device, hf = "tiny", "abc", "float32", "cpu", None

    run = RunDir.create("x", Config(), tmp_path)
    run.note_model(FakeModel())
    run.note_model(FakeModel())
    assert run.env["models"] == [{"name": "tiny", "fingerprint": "abc", "dtype": "float32", "device": "cpu"}]


def test_runs_are_listed_newest_first_and_found_by_part_of_the_name(tmp_path: Path) -> None:
    old, new = (RunDir.create(name, Config(), tmp_path) for name in ("old", "new"))
    old.save_step("one", SECTION)
    old.finish()
    (tmp_path / "notes").mkdir()
    assert [(info.name, info.status) for info in list_runs(tmp_path)] == [("new", "unfinished"), ("old", "finished")]
    assert find_run("latest", tmp_path) == new.path
    assert find_run("-old-", tmp_path) == old.path
    assert find_run(old.path) == old.path
    with pytest.raises(MissingFileError, match="fits 2 runs"):
        find_run("-", tmp_path)
    with pytest.raises(MissingFileError, match="There are no runs"):
        find_run("x", tmp_path / "nowhere")
    assert RunDir.open(old.path).name == "old"
    with pytest.raises(MissingFileError, match="no run folder"):
        RunDir.open(tmp_path)


def test_unreadable_runs_are_listed_and_end_nothing(tmp_path: Path) -> None:
    good, bad = (RunDir.create(name, Config(), tmp_path) for name in ("good", "bad"))
    unlock_folder(bad.path)
    damaged = (
        ("env.json", "[" * 5000), ("env.json", '{"models": ["gpt2"]}'), ("env.json", '{"arguments": [7]}'),
        ("config.json", "{"), ("result.json", '{"metrics": 7}'), ("result.json", '{"headlines": null}'),
        ("result.json", '{"headlines": [7]}'),
    )  # fmt: skip
    for name, text in damaged:
        (bad.path / name).write_text(text)
        infos = list_runs(tmp_path)
        assert [(info.status, name in info.problem) for info in infos] == [("unfinished", False), ("unreadable", True)]
        assert find_run("latest", tmp_path) == good.path
        save_json(bad.path / name, {})
    assert RunDir.resume_or_create("good", Config(), tmp_path).path == good.path


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("models", {"dtype": "torch.float32"}, "expected a list"),
        ("models", ["llama"], "expected an object"),
        ("models", [{"dtype": 32}], "32 is a int; expected str"),
        ("name", ["one"], "expected str"),
        ("resumed", "yesterday", "expected a list"),
        ("arguments", ["--seed"], "expected an object"),
    ],
)
def test_an_environment_that_was_edited_by_hand_is_refused_in_words(
    tmp_path: Path, key: str, value: object, problem: str
) -> None:
    run = RunDir.create("x", Config(), tmp_path)
    env = dict(run.env)
    save_json(run.path / "env.json", {**env, key: value})
    uses = [lambda: run.note_model(object()), lambda: RunDir.open(run.path), lambda: run.finish("t")]
    for use in uses:
        with pytest.raises(CorruptFileError, match=rf"env\.json, '{key}': .*{problem}.* Or remove '{key}'"):
            use()
    (info,) = list_runs(tmp_path)
    assert info.status == "unreadable" and f"'{key}'" in info.problem
    save_json(run.path / "env.json", env)
    run.note_model(SimpleNamespace(name="m", dtype="torch.float32"))
    assert RunDir.open(run.path).env.get("models") == [{"name": "m", "dtype": "torch.float32"}]


def test_refused_work_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for root in ("new/runs", "own"):
        with pytest.raises(InvalidInputError), RunDir.create("x", Config(), tmp_path / root):
            raise InvalidInputError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    with pytest.raises(InvalidInputError), RunDir.create("x", Config(), tmp_path / "shared"):
        other = RunDir.create("y", Config(), tmp_path / "shared")
        raise InvalidInputError("no")
    assert list((tmp_path / "shared").iterdir()) == [other.path]


def test_folders_of_killed_processes_are_removed_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    dead, empty, live = (tmp_path / f".20200101T000000Z-x-{i}.partial" for i in range(3))
    for folder in (dead, empty, live):
        folder.mkdir()
    (dead / ".lock").touch()
    (dead / "config.json").touch()
    code = "import sys; from workbench.core.locks import *; lock_folder(Path(sys.argv[1])); print(1, flush=1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(live)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_env()
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        RunDir.create("y", Config(), tmp_path)
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [live]
        process.communicate("\n")


# One driver forks a child per moment, which kills itself just before or after its n-th rename.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from workbench.report.base import Section, Bars
from workbench.runs.run import RunDir
import workbench.report.page, workbench.report.plots, matplotlib.figure, matplotlib.backends.backend_svg

PLOT = (Bars("bars", ("x",), (0.5,)),)

def study(root):
    run = RunDir.resume_or_create("study", {"seed": 0}, root)
    done = []
    for step in ("a", "b"):
        if not run.has(step):
            for i in range(3):
                run.metrics(step, i, i)
            run.save_step(step, Section(step, PLOT if step == "a" else (), (f"found {step}",), {"m": 1}))
            done.append(step)
    run.finish("Study")
    return done

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(repr(error)); os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def killed_at(n, after, root):
    calls, replace = [0], os.replace
    def counting(*args):
        calls[0] += 1
        if calls[0] == n and not after: os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if calls[0] == n and after: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = counting
    study(root)

rows, root = [], Path(sys.argv[1])
def attempt(n, after):
    folder = root / f"{n}-{after}"
    status = child(lambda: killed_at(n, after, folder))
    if not os.WIFSIGNALED(status): return False
    again = child(lambda: (folder / "redone.json").write_text(json.dumps(study(folder))))
    rows.append({"folder": str(folder), "signal": os.WTERMSIG(status), "again": again})
    return True

n = 1
while attempt(n, False): n += 1
for moment in (3, 4, n - 1): attempt(moment, True)
print(json.dumps(rows))
"""


def test_a_run_killed_at_any_write_is_finished_by_the_next_start(tmp_path: Path) -> None:
    # the driver runs outside pytest, so that forking and killing touch no other test
    out = _python(DRIVER, str(tmp_path))
    rows = json.loads(out)
    assert len(rows) >= 14  # config, env, folder, two steps, env, result, plot, report, mirror, DONE; three just after
    for row in rows:
        assert row["signal"] == signal.SIGKILL
        assert row["again"] == 0, row
        where = Path(row["folder"]).name
        visible = [path for path in Path(row["folder"]).iterdir() if path.is_dir() and not path.name.startswith(".")]
        assert all((path / "config.json").exists() and (path / "env.json").exists() for path in visible), where
        infos = [info for info in list_runs(row["folder"]) if info.status == "finished"]
        assert infos, where
        run = RunDir.open(infos[0].path)
        assert run.steps() == ("a", "b"), where
        assert list(infos[0].metrics) == ["a.m", "b.m"], where
        assert [(point["name"], point["step"]) for point in run.read_metrics()] == [
            (name, i) for name in "ab" for i in range(3)
        ], where
        assert "found b" in (run.path / "report.html").read_text()
        assert not list(run.path.rglob(".*.tmp")), where
        assert not list(run.path.parent.glob(".*")), where
    redone = {json.dumps(load_json(Path(row["folder"]) / "redone.json")) for row in rows}
    assert redone == {'["a", "b"]', '["b"]', "[]"}  # what was saved is not done again


SLOW_STUDY = """
import sys, time
from workbench.report.base import Section
from workbench.runs.run import RunDir
run = RunDir.resume_or_create("slow", {"seed": 0}, sys.argv[1])
run.save_step("a", Section("a"))
print(run.path, flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_works_on_is_left_alone_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_STUDY, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_env()) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        try:
            assert [info.status for info in list_runs(tmp_path)] == ["running"]
            assert not lock_folder(path)
            other = RunDir.resume_or_create("slow", {"seed": 0}, tmp_path)
            assert other.path != path
            other.finish()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    again = RunDir.resume_or_create("slow", {"seed": 0}, tmp_path)
    assert again.path == path
    assert again.has("a")


def test_the_mirror_is_an_offline_run_with_the_same_numbers(tmp_path: Path) -> None:
    code = """
import sys
from workbench.report.base import Section
from workbench.runs.run import RunDir
run = RunDir.create("x", {"seed": 0}, sys.argv[1])
run.metrics("loss", 0.5, 0)
run.save_step("one", Section("one", (), ("found",), {"share": 0.25}))
run.finish()
assert "torch" not in sys.modules
"""
    began = time.monotonic()
    # a terminal-less start without credentials must neither ask nor wait
    out = _python(code, str(tmp_path), WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    assert time.monotonic() - began < 60
    assert out == ""
    run = RunDir.open(list_runs(tmp_path)[0].path)
    assert run.finished
    outcome = load_json(run.path / "mirror.json")
    assert outcome["status"] == "mirrored"
    assert outcome["mode"] == "offline"
    assert "no W&B credentials" in outcome["reason"]
    files = {path.name for path in (run.path / outcome["folder"] / "files").rglob("*")}
    assert {"config.json", "env.json", "metrics.jsonl", "result.json", "report.html"} <= files
    assert _mirrored(next((run.path / outcome["folder"]).glob("*.wandb"))) == {"loss": 0.5, "one.share": 0.25}


def _mirrored(file: Path) -> dict[str, float]:
    """The numbers in the curves and the summary of a W&B file, a log of protobuf records in the format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    raw, at, body, found = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(raw):
        if (left := -at % 2**15) < 7:  # no header crosses the end of a block
            at += left
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        body += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (2, 3):  # the first or a middle part
            continue
        record = wandb_internal_pb2.Record.FromString(body)
        body = b""
        for item in (*record.history.item, *record.summary.update):
            name = item.key or ".".join(item.nested_key)
            if name in ("loss", "one.share"):
                found[name] = json.loads(item.value_json)
    return found


def test_a_mirror_that_fails_is_told_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no service <here>")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(mirror_module, "_send", broken)
    run = RunDir.create("x", Config(), tmp_path)
    run.save_step("one", Section("s", (Table(("a",), ((1,),)),)))
    report = run.finish()
    assert run.finished
    assert load_json(run.path / "mirror.json")["status"] == "failed"
    assert "no service &lt;here&gt;" in report.read_text()


def _env(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"} | more


def _python(code: str, *arguments: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=_env(**more),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wrong_input_leaves_no_folder_and_loses_no_result(tmp_path: Path) -> None:
    def stopped(
        step: bool = False, artifact: bool = False, curve: bool = False, error: type[BaseException] = InvalidInputError
    ) -> bool:
        with pytest.raises(error), RunDir.resume_or_create("study", Config(), root=tmp_path, fresh=True) as run:
            if step:
                run.save_step("one", SECTION)
            if artifact:
                (run.artifacts / "part").mkdir(parents=True)
                (run.artifacts / "part" / "a.csv").write_text("1")
            if curve:
                (run.path / "metrics.jsonl").write_text("{}\n")
            raise error("wrong")
        return run.path.exists()

    assert not stopped() and not list(tmp_path.glob("*-study-*"))
    assert stopped(step=True) and stopped(artifact=True) and stopped(curve=True) and stopped(error=KeyboardInterrupt)
