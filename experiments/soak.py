r"""Kill a run at random moments, again and again, and check that it ends as if nothing had happened.

    python -m experiments.soak              20 kills; another number may follow

A run that saves after every step is started, killed with SIGKILL after a random time (during a step, an evaluation, the
writing of a file) and started again by the same command, until it is finished. Its adapters, its log and its scores
must then equal those of a run that was never interrupted, bit for bit but for the times.
"""

import io
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers

import train
from tasks import micro
from tasks.pretrain import new_backbone


def small_world(folder: Path) -> Path:
    """Save a random backbone of one layer that reads the micro-world in ``folder``; returns its own folder."""
    tokenizer = micro.tokenizer()
    new_backbone(tokenizer, seed=0, width=16, layers=1).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    return folder / "backbone"


def command(backbone: Path, run: Path, *more: str) -> list[str]:
    """Options of train.py: all stages in a few seconds, with a checkpoint after every step."""
    options = ("--stage all --sources toy-amazon toy-sanwen --targets toy-finre toy-drcd --shots 8 --base-steps 4 "
               "--multitask-steps 12 --target-steps 5 --base-batch 4 --multitask-batch 6 --target-batch 3 "
               "--eval-every 3 --log-every 2 --save-every 1 --dev-rows 4 --no-references --no-pictures")
    return [*options.split(), "--backbone", str(backbone), "--run", str(run), *more]


def read_outcome(run: Path) -> dict:
    """What a run found, by file: the bytes of its adapters, its log, its scores."""
    found = {path: path.read_bytes() for path in run.glob("**/best/*")}
    for path in run.glob("**/metrics.jsonl"):
        found[path] = [json.loads(line) for line in path.read_text().splitlines()]
    for path in run.glob("**/results.json"):
        found[path] = json.loads(path.read_text()).get("scores")
    return {str(path.relative_to(run)): value for path, value in found.items()}


def start(arguments: list[str]) -> multiprocessing.Process:
    """Run train.py in a fork, which has imported everything already and keeps what it prints to itself."""
    process = multiprocessing.get_context("fork").Process(target=train.main, args=(arguments,))
    with redirect_stdout(io.StringIO()):
        process.start()
    return process


def soak(backbone: Path, folder: Path, kills: int) -> None:
    """Kill runs until each is finished, ``kills`` times in all. AssertionError if anything comes out differently."""
    began, killed = time.perf_counter(), 0
    start(command(backbone, folder / "whole")).join()
    seconds, expected = time.perf_counter() - began, read_outcome(folder / "whole")
    while killed < kills:
        run, exitcode = Path(tempfile.mkdtemp(dir=folder)), None
        while exitcode != 0:
            process = start(command(backbone, run))
            process.join(random.uniform(0, seconds))  # wait no longer than this
            process.kill()
            process.join()
            exitcode = process.exitcode
            assert exitcode in (0, -signal.SIGKILL), "a run that was killed cannot be resumed"
            killed += exitcode == -signal.SIGKILL
        found = read_outcome(run)
        other = [name for name in found | expected if found.get(name) != expected.get(name)]
        assert not other, f"after kills {', '.join(other)} differ from those of a run that was never interrupted"


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has the thread that forks and no other
    transformers.logging.disable_progress_bar()
    micro.TRAIN_ROWS, micro.TEST_ROWS = 60, 6
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        soak(small_world(Path(folder)), Path(folder), kills)
    print(f"{kills} kills, and all as if never interrupted")
