"""Interruption and resume: nothing is lost, nothing is done twice, and what cannot be resumed is refused by name."""

import errno
import os
import signal

import pytest
import torch
from conftest import read_outcome, small_run
from safetensors.torch import load_file

import checkpoint
import evaluate
import train
from checkpoint import UserError


def exit_code(arguments):
    """As the shell sees it: of an error, or of a signal that was obeyed after a step."""
    try:
        return checkpoint.run_program(train.main, arguments)
    except SystemExit as stopped:
        return stopped.code


@pytest.fixture(scope="module")
def whole(small_world, tmp_path_factory):
    """What a run finds that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train.main(small_run(small_world, run))
    return read_outcome(run)


@pytest.fixture
def before_call(monkeypatch):
    """before_call(module, name, number, action): run action before the number-th call of a function, once."""
    def patch(module, name, number, action):
        function, calls = getattr(module, name), []

        def counted(*arguments):
            calls.append(name)
            if len(calls) == number:
                action()
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    return patch


@pytest.fixture
def stopped(small_world, tmp_path, before_call, monkeypatch):
    """A run that was stopped in step 5 of its multitask stage."""
    before_call(train, "train_step", 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert exit_code(small_run(small_world, tmp_path / "run")) == 143
    monkeypatch.undo()
    return tmp_path / "run"


def saved_step(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["step"]


def test_a_full_disk_leaves_the_old_checkpoint_and_one_sentence(small_world, whole, tmp_path, before_call, monkeypatch,
                                                                capsys):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    run = tmp_path / "run"
    before_call(checkpoint.os, "fsync", 25, full)
    assert exit_code(small_run(small_world, run)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and "repeat the command" in error
    assert saved_step(run / "multitask") > 0 and not list(run.rglob("*.part"))
    monkeypatch.undo()  # there is room again
    assert exit_code(small_run(small_world, run)) == 0 and read_outcome(run) == whole


@pytest.mark.parametrize("module, name, number", [
    (train, "train_step", 1), (train, "train_step", 11), (train, "train_step", 26), (checkpoint.os, "fsync", 9),
    *((checkpoint.os, "replace", number) for number in (1, 21, 45, 46, 60, 81)),  # stage, best/, step, results, tables
    (evaluate, "dev_score", 5), (evaluate, "score_rows", 2),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(small_world, whole, tmp_path, before_call,
                                                                        module, name, number):
    """In a step, in the writing of a file, before it takes its place, in an evaluation: SIGKILL cannot be caught."""
    child = os.fork()
    if not child:
        before_call(module, name, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(exit_code(small_run(small_world, tmp_path / "run")))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert exit_code(small_run(small_world, tmp_path / "run")) == 0
    assert read_outcome(tmp_path / "run") == whole
    assert not list((tmp_path / "run").rglob("*.part")) and not list((tmp_path / "run").rglob("checkpoint.pt"))


@pytest.mark.parametrize("number, step, stage, done", [
    (signal.SIGTERM, 2, "base", 2), (signal.SIGINT, 9, "multitask", 5),
    (signal.SIGTERM, 18, "target/toy-finre-8-shot", 2)], ids=["base", "multitask", "target"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(small_world, whole, tmp_path, before_call, monkeypatch,
                                                                 capsys, number, step, stage, done):
    run, handler = tmp_path / "run", signal.getsignal(number)
    before_call(train, "train_step", step, lambda: os.kill(os.getpid(), number))
    assert exit_code(small_run(small_world, run, "--save-every", "1000")) == 128 + number
    captured = capsys.readouterr()
    assert "repeat the command" in captured.out + captured.err and signal.getsignal(number) is handler
    assert saved_step(run / stage) == done
    monkeypatch.undo()
    again = ["--stage", "all", "--targets", "toy-finre", "toy-drcd", "--shots", "8", "--run", str(run)]  # and no more
    assert exit_code([*again, "--save-every", "3"]) == 0 and read_outcome(run) == whole


def test_a_second_signal_does_not_wait():
    with checkpoint.catch_signals() as caught, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM], "the first one waits"
        os.kill(os.getpid(), signal.SIGTERM)


class Code:
    def __reduce__(self):
        return os.system, ("touch was-run",)


@pytest.mark.parametrize("file, harm, words", [
    ("multitask/checkpoint.pt", lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read"),
    ("multitask/checkpoint.pt", lambda path: torch.save(Code(), path), "cannot be read"),
    ("multitask/stage.json", lambda path: path.write_text("{half"), "cannot be read"),
    ("base/stage.json", os.unlink, "earlier release"),
], ids=["half", "code", "JSON", "none"])
def test_a_broken_file_is_refused_by_name(small_world, stopped, capsys, tmp_path, monkeypatch, file, harm, words):
    monkeypatch.chdir(tmp_path)
    harm(stopped / file)
    assert exit_code(small_run(small_world, stopped)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(stopped / file.split("/")[0]) in error and words in error
    assert not (tmp_path / "was-run").exists(), "nothing of a file is run"


def test_a_second_process_is_refused_while_the_first_works(small_world, tmp_path, capsys):
    run = tmp_path / "run"
    with checkpoint.lock(run):
        assert exit_code(small_run(small_world, run)) == 2
        assert f"another process is working in '{run}'; wait for it" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [".lock"]
    with checkpoint.lock(run):
        pass


@pytest.mark.parametrize("at, kept", [(9, 3), (10, 3), (16, 9)], ids=["unsaved", "at an evaluation", "the last step"])
def test_numbers_that_are_not_finite_are_never_saved(small_world, tmp_path, monkeypatch, capsys, at, kept):
    """The optimizer itself made them bad: neither the checkpoint nor best/ may hold them."""
    step, count, folder = train.train_step, [0], tmp_path / "run/multitask"

    def poisoned(model, *rest):
        measured, count[0] = step(model, *rest), count[0] + 1
        if count[0] == at:
            model.adapter_state()["theta0"].fill_(float("nan"))
        return measured

    monkeypatch.setattr(train, "train_step", poisoned)
    assert exit_code(small_run(small_world, tmp_path / "run", "--save-every", "1000")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lower learning" in error and not (folder / "results.json").exists()
    assert saved_step(folder) == kept
    for tensors in (torch.load(folder / "checkpoint.pt", weights_only=True)["tensors"],
                    load_file(folder / "best/adapter.safetensors")):
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("error, code, words", [
    (UserError("--x is 3\n  but"), 2, "error: --x is 3 but\n"),
    (OSError(28, "No space left", "a.pt"), 1, "No space left: 'a.pt'; what was"),
    (KeyboardInterrupt(), 130, "stopped; what was"),
    (torch.OutOfMemoryError("CUDA"), 1, "--tokens-per-batch (training), --eval-tokens"),
], ids=lambda value: type(value).__name__)
def test_an_error_is_one_line_with_an_exit_code_and_a_traceback_only_with_debug(error, code, words, capsys):
    def main(arguments):
        assert arguments == ["--run", "x"]
        raise error

    assert checkpoint.run_program(main, ["--run", "x"]) == code
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1
    with pytest.raises(type(error)):
        checkpoint.run_program(main, ["--run", "x", "--debug"])
