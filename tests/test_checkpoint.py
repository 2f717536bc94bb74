"""Interruption and resume: nothing is lost, nothing is repeated, and what cannot go on is refused by name."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

import checkpoint
import data
import evaluate
import figures
import pretrain
import toy
import train
from config import parse
from errors import RunFailed, Stopped, UserError, program

sys.path.insert(0, str(Path(__file__).parent))
import soak  # noqa: E402


@pytest.fixture(scope="module")
def backbone(small_world):
    return small_world


# -------------------------------------------------------------------------------------------------------------- files

def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), checkpoint.atomic(path) as file:
        file.write(b"half")
        file.flush()
        assert json.loads(path.read_text()) == {"a": 1}, "the old file stands until the new one is complete"
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_file_and_one_sentence(small_disk, capsys):
    path = small_disk / "checkpoint.pt"

    def main(_):
        with checkpoint.atomic(path) as file:
            torch.save(torch.zeros(100_000), file)  # 400 kB

    with checkpoint.atomic(path) as file:
        torch.save(torch.ones(10), file)
    assert program(main, []) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(path) in error and os.strerror(errno.ENOSPC) in error
    assert len(error.splitlines()) == 1 and torch.equal(torch.load(path, weights_only=True), torch.ones(10))
    assert list(small_disk.iterdir()) == [path]


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(backbone, tmp_path, monkeypatch, capsys):
    """A checkpoint finds the disk full: the one before is intact, and the run ends as it should."""
    write = checkpoint.os.fsync

    def full(number):
        name = os.readlink(f"/proc/self/fd/{number}")
        if name.endswith("multitask/.checkpoint.pt.part") and (tmp_path / "run/multitask/best").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(number)

    train.main(soak.command(backbone, tmp_path / "whole"))
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    capsys.readouterr()
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 1
    assert "No space left" in capsys.readouterr().err
    assert torch.load(tmp_path / "run/multitask/checkpoint.pt", weights_only=True)["progress"]["step"] == 2
    monkeypatch.undo()
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 0
    assert soak.left(tmp_path / "run") == soak.left(tmp_path / "whole")


@pytest.mark.parametrize("name", ["base/metrics.jsonl", "log.txt"])
def test_a_full_disk_while_something_is_logged_names_the_file(backbone, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "run").mkdir()
    if name == "log.txt":
        (tmp_path / "run/log.txt").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(train, "open_metrics", lambda *_: open("/dev/full", "a"))
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/run/{name}: No space left on device; "), error


# ----------------------------------------------------------------------------------------------------------- going on

@pytest.mark.parametrize("method", ["talora", "spot"])
def test_killed_at_random_moments_it_ends_the_same(backbone, tmp_path, method):
    """SIGKILL, three times; `python tests/soak.py` does it twenty times."""
    tally = soak.soak(backbone, tmp_path, 3, random.Random(1), "--method", method)
    assert tally["kills"] == 3


def stop_at(monkeypatch, stage, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step."""
    whole, count = train.train_step, [0]

    def interrupted(model, optimizer, batches, cfg, regularise):
        measured = whole(model, optimizer, batches, cfg, regularise)
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return measured

    monkeypatch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize("number, step", [(signal.SIGTERM, 2), (signal.SIGINT, 9), (signal.SIGTERM, 19)],
                         ids=["base", "multitask", "target"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(backbone, tmp_path, monkeypatch, capsys, number, step):
    run, untouched = tmp_path / "run", signal.getsignal(number)
    train.main(soak.command(backbone, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stop_at(patched, "base", step, number)
        options = soak.command(backbone, run, "--save-every", "1000")  # nothing but the signal makes it save
        assert program(train.main, options) == 128 + number
    captured = capsys.readouterr()
    assert "repeat the command" in captured.err and "Traceback" not in captured.err
    assert signal.getsignal(number) is untouched
    done, = (torch.load(path, weights_only=True)["progress"]["step"] for path in run.rglob("checkpoint.pt"))
    before = (*(step - s for s in (0, 4, 16)),)  # 4 steps of base, 12 of multitask, 5 for each target
    assert done in before
    assert program(train.main, ["--resume", str(run), "--save-every", "3"]) == 0
    out = capsys.readouterr().out
    assert f"goes on after step {done}" in out and "--save-every 3 (was 1000)" in out
    assert "--save-every 3 (was 1000)" in (run / "log.txt").read_text()
    assert soak.left(run) == soak.left(tmp_path / "whole")


def killed(*_):
    raise KeyboardInterrupt


def test_what_is_logged_before_the_first_step_is_not_logged_again(backbone, tmp_path, monkeypatch):
    """Killed between the checkpoint of step 0 and that of step 1."""
    train.main(soak.command(backbone, tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", killed)
        assert program(train.main, soak.command(backbone, tmp_path / "run")) == 130
    train.main(soak.command(backbone, tmp_path / "run"))
    assert soak.left(tmp_path / "run") == soak.left(tmp_path / "whole")


def test_checkpoints_by_minutes(backbone, tmp_path, monkeypatch):
    """A kill in step 3 finds the checkpoint of step 2, though none is due by steps."""
    whole, count = train.train_step, [0]

    def two_steps(*arguments):
        count[0] += 1
        return whole(*arguments) if count[0] < 3 else killed()

    monkeypatch.setattr(train, "train_step", two_steps)
    often = "--save-every", "1000", "--save-minutes", "1e-9"
    assert program(train.main, soak.command(backbone, tmp_path / "run", *often)) == 130
    state = torch.load(tmp_path / "run/base/checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 2


def test_a_second_signal_does_not_wait():
    with checkpoint.Signals() as signals:
        with pytest.raises(Stopped), signals.finishing(pytest.fail):
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.caught == signal.SIGINT, "the first one waits"
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one does not")
    with checkpoint.Signals(), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)  # outside of a step
    assert stopped.value.code == 143


@pytest.fixture(scope="module")
def stopped(backbone, tmp_path_factory):
    """A run that was stopped in its multitask stage."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, "multitask", 9)
        assert program(train.main, soak.command(backbone, run)) == 143
    return run


@pytest.fixture
def interrupted(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture(scope="module")
def ended(backbone, tmp_path_factory):
    """A run that is finished."""
    run = tmp_path_factory.mktemp("ended") / "run"
    train.main(soak.command(backbone, run))
    return run


@contextmanager
def harmed(path: Path, content: bytes):
    """A file with other content, for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(before)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"backbone": {}, "data', b'{"backbone": [], "data": {}}',
                                     bytes(range(256)), b"[" * 100_000],
                         ids=["empty", "nothing in it", "a list", "cut short", "of other types", "binary", "too deep"])
@pytest.mark.parametrize("name", ["base/identity.json", "target-8-shot/toy-drcd/results.json"])
def test_a_broken_file_of_a_run_is_refused_by_name(backbone, stopped, ended, capsys, name, content):
    run = stopped if "identity" in name else ended
    before = soak.left(run)
    with harmed(run / name, content):
        assert program(train.main, soak.command(backbone, run)) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # a bar shows how weights are loaded
    assert error.startswith(f"error: '{run / name}' cannot be read (") and "delete it" in error and len(error) < 500
    assert soak.left(run) == before


@pytest.mark.parametrize("scores", [{}, {"talora": 3, "talora, rewritten": {}}, {"talora": {"score": "x"}}])
def test_a_target_without_its_scores_is_refused(backbone, ended, capsys, scores):
    path = ended / "target-8-shot/toy-finre/results.json"
    with harmed(path, json.dumps({"start": "", "numbers": 3, "scores": scores}).encode()):
        assert program(train.main, soak.command(backbone, ended)) == 2
    error = capsys.readouterr().err
    assert f"'{path}' cannot be read (start and numbers and scores should be in it" in error and "delete it" in error


def test_a_table_with_odd_bytes_is_shown_all_the_same(backbone, ended, capsys):
    with harmed(ended / "multitask/table.md", b"| task \xff |"):
        assert program(train.main, soak.command(backbone, ended)) == 0
    assert "| task" in capsys.readouterr().out


def test_the_same_things_in_another_place_are_the_same(backbone, ended, tmp_path, monkeypatch, capsys):
    """A folder however it is written, a copy of it; but not one with other weights or another tokenizer in it."""
    monkeypatch.chdir(backbone.parent)
    for folder in ("backbone", "./backbone/", "../" + backbone.parent.name + "/backbone"):
        cfg, _ = parse(["--backbone", folder, "--data-root", folder])
        assert cfg.backbone == cfg.data_root == str(backbone.resolve())
    copy, command = shutil.copytree(backbone, tmp_path / "copy"), soak.command("backbone", ended)
    assert program(train.main, command) == 0 and "another place" not in capsys.readouterr().out
    again = soak.command(copy, ended)
    assert program(train.main, again) == 0
    said = f"another place, the same in it: --backbone {backbone.resolve()} (now {copy})"
    assert said in capsys.readouterr().out and said in (ended / "log.txt").read_text()
    words = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["the"], vocabulary["was"] = vocabulary["was"], vocabulary["the"]
    with harmed(copy / "tokenizer.json", json.dumps(words).encode()):
        assert program(train.main, again) == 2
    assert "made with other rows of toy-amazon in tokens" in capsys.readouterr().err
    save_file({name: t + 1 for name, t in load_file(copy / "model.safetensors").items()}, copy / "model.safetensors",
              {"format": "pt"})
    assert program(train.main, again) == 2
    assert f"{ended}/base was made with another backbone (other weights)" in capsys.readouterr().err


def test_another_backbone_in_the_same_folder_is_refused(backbone, tmp_path, capsys):
    """A finished stage is not built upon if the weights of its backbone were overwritten."""
    own, run = shutil.copytree(backbone, tmp_path / "own"), tmp_path / "run"
    train.main(soak.command(own, run, "--stage", "base"))
    weights = own / "model.safetensors"
    save_file({name: -t for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    before = soak.left(run)
    assert program(train.main, soak.command(own, run)) == 2
    assert f"{run}/base was made with another backbone (other weights)" in capsys.readouterr().err
    assert soak.left(run) == before


def test_what_would_make_it_another_run_is_refused(backbone, interrupted, capsys):
    before = soak.left(interrupted)
    for more, words in ((("--fast-rate", "0.5"), ["--fast-rate 0.16 (now 0.5)"]),
                        (("--multitask-batch", "7"), ["--multitask-batch 6 (now 7)"]),
                        (("--seed", "3"), ["--seed 0 (now 3)"])):
        assert program(train.main, soak.command(backbone, interrupted, *more)) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words) and "--run" in error
    assert soak.left(interrupted) == before


@pytest.mark.parametrize("left", [0, 1, 700], ids=["deleted", "not one line", "cut in a line"])
def test_shortened_metrics_are_noted_and_the_run_goes_on(backbone, interrupted, left):
    """What was learned does not depend on them; every line that is there afterwards can be read."""
    metrics = interrupted / "multitask/metrics.jsonl"
    found = metrics.read_bytes()[:left]
    metrics.write_bytes(found) if left else metrics.unlink()
    assert program(train.main, soak.command(backbone, interrupted)) == 0
    assert "shorter than its checkpoint says" in (interrupted / "log.txt").read_text()
    rows = figures.read_metrics(interrupted / "multitask")
    assert [row["step"] for row in rows if "loss" in row][-2:] == [10, 12] and metrics.read_bytes().startswith(
        found[: found.rfind(b"\n") + 1])


def test_other_data_is_refused(backbone, interrupted, monkeypatch, capsys):
    rows = toy._rows

    def fewer(task, split):
        return rows(task, split)[:-5] if (task, split) == ("toy-amazon", "train") else rows(task, split)

    monkeypatch.setattr(toy, "_rows", fewer)
    data.load_splits.cache_clear()
    assert program(train.main, soak.command(backbone, interrupted)) == 2
    assert "other rows of toy-amazon" in capsys.readouterr().err
    data.load_splits.cache_clear()


@pytest.mark.parametrize("harm, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:500]), ["cannot be read", "delete it"]),
    (lambda path: path.write_bytes(b""), ["cannot be read"]),
    (lambda path: torch.save({"identity": 3, "tensors": {}}, path), ["cannot be read"]),
    (lambda path: change(path, identity={"backbone": {}}), ["another backbone"]),
    (lambda path: change(path, u=torch.ones(1, 3)), ["'u.0'", "(1, 3)", "(1, 2)"]),
    (lambda path: change(path, u=torch.full((1, 2), torch.nan)), ["'u.0'".strip("'"), "not finite"]),
    (lambda path: torch.save(evil(), path), ["cannot be read"]),
    (lambda path: change(path, u="x"), ["'u.0' should be (1, 2) torch.float32 and is a str"]),
    (lambda path: change(path, optimizer="x"), ["cannot be read"]),
    (lambda path: moments(path, lambda t: torch.ones(7)), ["the optimizer's numbers for tensor 0"]),
    (lambda path: moments(path, lambda t: t * torch.nan), ["the optimizer's numbers for tensor 0"]),
    (lambda path: moments(path, lambda t: "x"), ["cannot be read"]),
    (lambda path: change(path, sampler={}), ["its sampler is not what it should be"]),
    (lambda path: sampler_at(path, [0, 10**6]), ["cannot be read (list index out of range)"]),
    (lambda path: sampler_at(path, [0, -1]), ["its sampler is not"]),
    (lambda path: change(path, random={"cpu": torch.zeros(3)}), ["cannot be read"]),
    (lambda path: change(path, random={}), ["cannot be read"]),
    (lambda path: change(path, progress={}), ["its progress is not what it should be"]),
    (lambda path: step(path, "x"), ["its progress is not what it should be"]),
    (lambda path: step(path, -1), ["its progress is not what it should be"]),
    (lambda path: step(path, 10**9), ["says 1000000000 steps were done of 12"]),
], ids=["cut short", "empty", "of other things", "of another backbone", "of other shapes", "not finite", "code",
        "a tensor is a text", "the optimizer is a text", "moments of another shape", "moments not finite",
        "a moment is a text", "no sampler", "sampler beyond the rows", "sampler before them", "other random state",
        "no random state", "no progress", "a step that is a text", "a step below 0", "a step beyond the last"])
def test_a_broken_checkpoint_is_refused_by_name(backbone, interrupted, capsys, harm, words):
    path, = interrupted.rglob("checkpoint.pt")
    harm(path)
    assert program(train.main, soak.command(backbone, interrupted)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in error and all(word in error for word in words) and not Path("was-run").exists()
    assert "--run" in error or "delete it" in error


def test_rates_are_those_of_the_options_whatever_a_checkpoint_says(backbone, interrupted, ended):
    path = interrupted / "multitask/checkpoint.pt"
    optimizer = torch.load(path, weights_only=True)["optimizer"]
    for group in optimizer["param_groups"]:
        group.update(initial=1e9, betas="x", weight_decay=7.0)
    change(path, optimizer=optimizer)
    train.main(soak.command(backbone, interrupted))
    assert soak.left(interrupted) == soak.left(ended)


def moments(path, harm):
    optimizer = torch.load(path, weights_only=True)["optimizer"]
    optimizer["state"][0]["exp_avg"] = harm(optimizer["state"][0]["exp_avg"])
    change(path, optimizer=optimizer)


def sampler_at(path, place):
    sampler = torch.load(path, weights_only=True)["sampler"]
    change(path, sampler={**sampler, "position": dict.fromkeys(sampler["position"], place)})


def step(path, number):
    change(path, progress={**torch.load(path, weights_only=True)["progress"], "step": number})


def change(path, u=None, **parts):
    saved = torch.load(path, weights_only=True) | parts
    if u is not None:
        saved["tensors"]["u.0"] = u
    torch.save(saved, path)


class evil:  # noqa: N801
    def __reduce__(self):
        return os.system, ("touch was-run",)


# ------------------------------------------------------------------------------------------------- making a backbone

@pytest.fixture
def pretraining(tmp_path):
    """pretraining(name) -> the command that makes a tiny backbone from text in the run of this name."""
    torch.set_num_threads(1)  # a fork has one, and other numbers of threads give other roundings
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    rows = [json.dumps({"prompt": f"{a} and {b} are {a + b} >", "answer": "yes"}) + "\n"
            for a in range(9) for b in range(9)]
    (folder / "train.jsonl").write_text("".join(rows[:70]))
    (folder / "test.jsonl").write_text("".join(rows[70:]))
    return lambda name: ["--stage", "pretrain", "--data-root", str(tmp_path / "data"), "--sources", "mine",
                         "--run", str(tmp_path / name), "--max-length", "16", "--pretrain-steps", "6",
                         "--pretrain-width", "8", "--pretrain-layers", "1", "--save-every", "2"]


def weights(run):
    return (run / "pretrain/model.safetensors").read_bytes(), (run / "pretrain/tokenizer.json").read_bytes()


@pytest.mark.parametrize("number, left", [(signal.SIGTERM, 3), (signal.SIGINT, 3), (signal.SIGKILL, 2)])
def test_pretraining_goes_on_where_it_was_stopped(pretraining, tmp_path, number, left):
    train.main(pretraining("whole"))
    child = os.fork()
    if not child:  # a process of its own: SIGKILL cannot be caught
        whole, count = pretrain.step_loss, [0]

        def loss(*arguments):
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), number)
            return whole(*arguments)

        pretrain.step_loss = loss
        os._exit(program(train.main, pretraining("run")))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    state = torch.load(tmp_path / "run/pretrain/checkpoint.pt", weights_only=True)
    assert len(state["progress"]["losses"]) == left
    assert program(train.main, ["--resume", str(tmp_path / "run")]) == 0
    assert f"goes on after step {left} of 6" in (tmp_path / "run/log.txt").read_text()
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert not (tmp_path / "run/pretrain/checkpoint.pt").exists()


def test_a_backbone_that_does_not_fit_on_the_disk_is_written_when_there_is_room(pretraining, tmp_path, monkeypatch,
                                                                                capsys):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    train.main(pretraining("whole"))
    with monkeypatch.context() as patched:
        patched.setattr(Qwen2ForCausalLM, "save_pretrained", full)
        assert program(train.main, pretraining("run")) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "No space left" in error and "run/pretrain" in error
    monkeypatch.setattr(pretrain, "step_loss", pytest.fail)  # nothing is learned again
    assert program(train.main, pretraining("run")) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_pretraining_on_other_text_is_refused(pretraining, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "store", killed)
        assert program(train.main, pretraining("run")) == 130
    rows = tmp_path / "data/mine/train.jsonl"
    rows.write_text(rows.read_text().replace("and", "dna"))
    data.load_splits.cache_clear()
    assert program(train.main, pretraining("run")) == 2
    assert "belongs to another text" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- one process at a time

def test_a_second_process_on_a_run_is_refused_until_the_first_is_gone(backbone, tmp_path, capsys, monkeypatch):
    run, (ready, tell) = tmp_path / "run", os.pipe()
    run.mkdir()
    first = os.fork()
    if not first:
        with checkpoint.Lock(run):
            os.write(tell, b"!")
            signal.pause()
    os.read(ready, 1)
    try:
        assert program(train.main, soak.command(backbone, run)) == 2
        error = capsys.readouterr().err
        assert "another process" in error and str(run) in error and len(error.splitlines()) == 1
        assert [path.name for path in run.iterdir()] == [".lock"]
        with monkeypatch.context() as patched:  # another process of the same job
            patched.setenv("WORLD_SIZE", "2")
            patched.setenv("RANK", "1")
            with checkpoint.Lock(run) as lock:
                lock.take()
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    with checkpoint.Lock(run) as lock:
        assert lock.file, "a process that was killed holds nothing"


def test_of_two_processes_that_would_make_a_folder_one_is_refused(tmp_path):
    with checkpoint.Lock(tmp_path / "run") as one, checkpoint.Lock(tmp_path / "run") as other:
        one.take()
        one.take()  # once is enough
        with pytest.raises(UserError, match="another process"):
            other.take()


# ---------------------------------------------------------------------------------------------------- numbers gone bad

def test_bad_numbers_name_step_tasks_and_the_last_good_state(backbone, tmp_path, monkeypatch, capsys):
    whole, count = train.train_step, [0]

    def poisoned(model, *rest):
        count[0] += 1
        if count[0] == 10:
            with torch.no_grad():
                model.theta0.fill_(float("nan"))
        return whole(model, *rest)

    monkeypatch.setattr(train, "train_step", poisoned)
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "multitask, step 6" in error and "toy-amazon, toy-sanwen" in error and "checkpoint.pt" in error
    state = torch.load(tmp_path / "run/multitask/checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 5 and all(t.isfinite().all() for t in state["tensors"].values())


@pytest.mark.parametrize("at, kept", [(9, 3), (10, 3), (16, 9)], ids=["unsaved", "at an evaluation", "the last step"])
def test_bad_numbers_are_never_saved(backbone, tmp_path, monkeypatch, capsys, at, kept):
    """Numbers that the optimizer itself made bad: neither the checkpoint nor best/ nor last/ holds them."""
    whole, count = train.train_step, [0]

    def poisoned(model, *rest):
        measured, count[0] = whole(model, *rest), count[0] + 1
        if count[0] == at:
            with torch.no_grad():
                model.theta0.fill_(float("nan"))
        return measured

    monkeypatch.setattr(train, "train_step", poisoned)
    folder = tmp_path / "run/multitask"
    assert program(train.main, soak.command(backbone, tmp_path / "run", "--save-every", "1000")) == 1
    error = capsys.readouterr().err
    assert f"multitask, step {6 if at < 16 else 12}: " in error and f"is in {folder}/checkpoint.pt" in error
    assert "--slow-rate 0.12" in error and "another --run" in error
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == kept and not (folder / "results.json").exists()
    for tensors in (state["tensors"], *map(load_file, folder.glob("*/adapter.safetensors"))):
        assert all(t.isfinite().all() for t in tensors.values())


def test_a_bad_loss_on_development_rows_stops_the_run(backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "dev_score", lambda *_: (0.0, float("nan")))
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "base, step 3: numbers went bad (the loss on development rows, nan), and are not saved" in error
    assert error.count("--prompt-rate") == 1 and not (tmp_path / "run/base/best").exists()


def test_a_full_gpu_names_the_options_that_help(backbone, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_step", full)
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert "--checkpointing" in error and "--tokens-per-batch" in error and "GB" in error and "4 rows" in error


@pytest.mark.parametrize("name", ["dev_score", "predict"])
def test_a_full_gpu_outside_of_a_step_is_one_sentence(backbone, tmp_path, monkeypatch, capsys, name):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, name, full)
    assert program(train.main, soak.command(backbone, tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ("--checkpointing", "--tokens-per-batch", "EVAL_TOKENS", "GB"))
    assert hasattr(evaluate, "EVAL_TOKENS")


def test_gradient_norm_is_logged(backbone, tmp_path):
    train.main(soak.command(backbone, tmp_path / "run"))
    rows = figures.read_metrics(tmp_path / "run/multitask")
    assert all(row["grad_norm"] > 0 for row in rows if "loss" in row) and any("loss" in row for row in rows)


def test_debug_shows_where_an_error_came_from(capsys):
    def main(_):
        raise RunFailed("too hot\n  to go on")

    assert program(main, []) == 1 and capsys.readouterr().err == "error: too hot to go on\n"
    with pytest.raises(UserError):
        program(main, ["--debug"])
