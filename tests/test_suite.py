"""The suite: what it plans, what it keeps when it is stopped, and two real runs from end to end."""

import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

import train
from checkpoint import RunFailed, UserError
from experiments import compare, suite
from experiments.compare import METHODS, VARIANTS
from experiments.report import read_results
from experiments.suite import Run, Suite


def finished(kind, method, rates, name):
    """What a sweep leaves in results.jsonl."""
    return {"cell": name, "kind": kind, "method": method, "rates": rates, "dev": [0.5, -1.0]}


def test_every_planned_run_is_a_command_that_can_run(tmp_path):
    records = []
    for name, method in METHODS.items():
        rates = {f"{rate}_rate": 0.3 for rate in method.learns.get("multitask", {}).values()}
        records += [finished("sweep-source", name, rates, f"sweep {name} 0")] if rates else []
        records.append(finished("sweep-target", name, rates | {"target_rate": 0.5}, "target"))
    phases = (suite.plan_sources, suite.plan_targets, suite.plan_methods)
    runs = [run for plan in phases for run in plan(suite.SUITES["full"], records, tmp_path)]
    assert len(runs) == len({run.name for run in runs}) >= 278, "as many as there are in the committed results"
    for run in runs:
        module, name, *words = run.command(tmp_path)[1:]
        if run.kind == "backbone":
            assert module == "tasks.pretrain" and name == "--seed"
            continue
        which, *words = words
        method = VARIANTS[which] if name == "--variant" else METHODS[which]
        compare.check_typed(words, method)
        cfg = train.parse(words, method)
        train.check(cfg, method)
        assert (cfg.seed, cfg.run) == (run.seed, str(suite.folder_of(run.name, tmp_path)))
        assert (cfg.multitask_steps, cfg.multitask_batch, cfg.target_steps) == (400, 32, 120), "the same for all"
        if run.kind in ("method", "variant"):
            assert cfg.target_rate == 0.5 and cfg.seed != suite.SWEEP_SEED
            assert cfg.backbone.endswith(("", "backbone-1", "backbone-2")[run.seed % 3])


def test_a_target_sweep_starts_from_the_best_source_run(tmp_path):
    tried = [finished("sweep-source", "lora", {"prompt_rate": rate}, f"sweep lora {i}") | {"dev": [right, -1.0]}
             for i, (rate, right) in enumerate(((0.1, 0.6), (0.2, 0.9), (0.3, 0.9)))]
    tried[2]["dev"][1] = -1.5  # as often right, a higher loss
    runs = list(suite.plan_targets(Suite({"lora": (8,), "pt": (8,)}, grids=suite.MICRO), tried, tmp_path))
    assert {run.start for run in runs if run.method == "lora"} == {"sweep lora 1"}
    assert runs[0].name == "sweep lora 1 target 0" and runs[0].rates["prompt_rate"] == 0.2
    assert {run.start for run in runs if run.method == "pt"} == {""}, "from scratch"


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Runs whose method is a line of Python, and whose only record is their name."""
    monkeypatch.setattr(Run, "command", lambda run, out: ["-c", run.method])
    monkeypatch.setattr(suite, "collect", lambda run, out, started: [{"cell": run.name, "scores": {}}])
    (tmp_path / "results.jsonl").touch()
    return lambda **programs: [Run("method", name, program, 0) for name, program in programs.items()]


def test_a_failing_run_is_named_and_finished_ones_are_kept(stubs, tmp_path):
    runs = stubs(first="pass", second="import sys; sys.exit('the disk is full')", third="pass")
    with pytest.raises(RunFailed, match="'second' failed: the disk is full .see .*second.txt"):
        suite.run_all(runs, tmp_path, jobs=1)
    [kept] = read_results(tmp_path)
    assert kept["cell"] == "first" and "the disk is full" in (tmp_path / "runs/second.txt").read_text()


def test_a_signal_reaches_the_runs_and_finished_ones_are_kept(stubs, tmp_path):
    def stop_after_first():
        while not (tmp_path / "runs/second.txt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_first).start()
    began = time.perf_counter()
    with pytest.raises(SystemExit) as stopped:
        suite.run_all(stubs(first="pass", second="import time; time.sleep(600)", third="pass"), tmp_path, jobs=1)
    assert stopped.value.code == 143 and time.perf_counter() - began < 60
    [kept] = read_results(tmp_path)
    assert kept["cell"] == "first", "the second one was stopped, the third one not started"


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, sentence in ((["slow"], "invalid choice: 'slow'"), (["quick", "--jobs", "0"], "--jobs is 0"),
                            (["quick", "--", "--dev-rows", "0"], "--dev-rows is 0"),
                            (["quick", "--", "--data-root", str(tmp_path)], "--data-root needs --backbone")):
        with pytest.raises(UserError, match=sentence):
            suite.main(words)
    assert not list(tmp_path.iterdir())


def write_task(folder, answers):
    """32 train and 8 test rows of different texts."""
    folder.mkdir(parents=True)
    texts = [f"{who} found the {what} very {word} =>" for who in ("ann", "bob", "carl", "dora")
             for what in ("soup", "tea") for word in ("awful", "lovely", "dull", "nice", "poor")]
    rows = [{"prompt": text, "answer": answers[i % 2], "choices": answers} for i, text in enumerate(texts)]
    for split, part in (("train", rows[:32]), ("test", rows[32:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def test_two_runs_from_end_to_end_one_of_them_interrupted(small_world, tmp_path, monkeypatch, capsys):
    """In folders with blanks; the first run had finished its sources when the suite was stopped."""
    monkeypatch.chdir(Path(suite.__file__).parent.parent)
    for task in ("stars", "moods"):
        write_task(tmp_path / "my data" / task, ["one", "two"])
    options = ("--data-root", str(tmp_path / "my data"), "--backbone", str(small_world), "--sources", "stars",
               "--targets", "moods", "--base-steps", "2", "--multitask-steps", "3", "--target-steps", "2")
    tiny, out = Suite({"talora": (4,), "pt": (4,)}), tmp_path / "my results"
    monkeypatch.setitem(suite.SUITES, "tiny", tiny)
    talora, pt = suite.plan_methods(suite.replace(tiny, options=("--no-pictures", *options)), [], out)
    compare.main([*talora.command(out)[2:], "--stage", "multitask"])
    before = (suite.folder_of(talora.name, out) / "multitask" / "metrics.jsonl").read_text()

    suite.main(["tiny", "--out", str(out), "--", *options])
    records = read_results(out)
    found = {(r["cell"], r["stage"], r["shots"]): r for r in records}
    assert set(found) == {("talora seed 0", "multitask", None), ("talora seed 0", "target", 4),
                          ("pt seed 0", "target", 4)}
    sources, target = found["talora seed 0", "multitask", None], found["talora seed 0", "target", 4]
    assert sources["last"] == json.loads(before.splitlines()[-1]), "these stages were not repeated"
    assert set(sources["scores"]) == {"talora", "majority", "frozen backbone"}, "own rows are never rewritten"
    assert {"talora", "theta0 (k = 0)"} <= set(target["scores"])
    assert shlex.split(target["command"]) == ["python", *talora.command(out)]
    assert target["numbers"] > 0 and len(target["dev"]) == 2 and not suite.folder_of(pt.name, out).exists()

    monkeypatch.setattr(suite, "start", None)  # the same command again: there is nothing to run
    suite.main(["tiny", "--out", str(out), "--", *options])
    assert "| **talora** |" in capsys.readouterr().out and read_results(out) == records
    with pytest.raises(UserError, match="holds 'talora seed 0' made by another command"):
        suite.main(["tiny", "--out", str(out), "--", *options, "--dev-rows", "3"])
