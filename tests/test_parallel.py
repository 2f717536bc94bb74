"""Two processes give the numbers of one: torchrun on the CPU, with gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from safetensors.torch import load_file

import parallel
import train
from checkpoint import Signals
from config import check, parse
from errors import Stopped, UserError

DRIVER = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import soak, toy, train
from errors import program
toy.TRAIN_ROWS, toy.TEST_ROWS = 60, 6
stop, step, whole = int(sys.argv.pop(1)), [0], train.train_step

def counted(*arguments):
    step[0] += 1
    if step[0] == stop and os.environ["RANK"] == "1":  # one process alone is told to stop
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(*arguments)

train.train_step = counted
sys.exit(program(train.main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def backbone(small_world):
    return small_world


def torchrun(tmp_path, command, stop=0):
    """train.py in two processes; stop: the step in which process 1 gets a SIGTERM."""
    tests = Path(__file__).parent
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(tests.parent), tests=str(tests)))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
                           str(driver), str(stop), *command], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def assert_same(one: Path, other: Path):
    """Equal files; numbers and tensors to 1e-5."""
    a, b = soak.left(one), soak.left(other)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".safetensors"):
            torch.testing.assert_close(load_file(other / name), load_file(one / name), rtol=1e-4, atol=1e-5)
        elif name.endswith("metrics.jsonl"):
            assert len(a[name]) == len(b[name]) and any("loss" in row for row in a[name])
            for x, y in zip(a[name], b[name]):
                assert x.keys() == y.keys()
                for key in x.keys() & {"step", "loss", "reg", "grad_norm", "dev_loss", "dev_accuracy", "gates"}:
                    assert y[key] == pytest.approx(x[key], rel=1e-5, abs=1e-5), (name, x["step"], key)
        elif name.endswith("results.json"):
            assert a[name] == b[name], name


@pytest.mark.parametrize("more", [("--multitask-batch", "1", "--regulariser", "off"),
                                  ("--method", "attempt", "--tokens-per-batch", "128")], ids=["talora", "attempt"])
def test_two_processes_give_the_losses_of_one(backbone, tmp_path, more):
    """Steps of one row, so that process 1 has none and a task is in no process; micro-batches by a token budget; every
    stage, and the test scores."""
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(soak.command(backbone, one, *more))
    run = torchrun(tmp_path, soak.command(backbone, two, *more))
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("== multitask") == 1, "one process prints"
    assert_same(one, two)
    last = json.loads((two / "target-8-shot" / "env.json").read_text())
    assert last["processes"] == 2


def test_one_process_told_to_stop_stops_both_and_one_goes_on_alone(backbone, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(soak.command(backbone, one))
    run = torchrun(tmp_path, soak.command(backbone, two), stop=9)  # step 5 of the multitask stage
    assert run.returncode != 0 and "stopped; nothing that was saved is lost" in run.stderr, run.stderr[-2000:]
    assert torch.load(two / "multitask" / "checkpoint.pt", weights_only=True)["progress"]["step"] == 5
    train.main(soak.command(backbone, two))
    assert_same(one, two)


def test_a_signal_while_others_are_asked_is_not_lost(monkeypatch):
    """It arrives after this process has said that it has none: the next step obeys."""
    saved = []
    with Signals() as signals:
        monkeypatch.setattr(parallel, "PROCESSES", 2)
        monkeypatch.setattr(parallel, "largest", lambda caught: os.kill(os.getpid(), signal.SIGTERM) or caught)
        with signals.finishing(lambda: saved.append(1)):
            pass
        monkeypatch.setattr(parallel, "largest", lambda caught: caught)
        with pytest.raises(Stopped) as stop, signals.finishing(lambda: saved.append(2)):
            pass
    assert stop.value.code == 143 and saved == [2]


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.place("auto") == "cuda" and parallel.place("cuda:1") == "cuda:1" and parallel.place("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [parallel.place(device) for device in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3"] * 3 + ["cpu"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes, but there are 2 GPUs; lower --nproc-per-node"):
        check(parse(["--run", "runs/none"])[0])


def test_what_one_process_alone_can_do_is_said_by_one(tmp_path):
    run = torchrun(tmp_path, ["--stage", "pretrain", "--run", str(tmp_path / "run")])
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode != 0 and len(errors) == 1 and "without torchrun" in errors[0], run.stderr[-2000:]
    assert not (tmp_path / "run").exists()
