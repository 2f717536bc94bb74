r"""Kill a run at random moments, again and again, and check that it ends as if nothing had happened.

    python -m experiments.soak --kills 20

A run that saves after every step is started, killed with SIGKILL after a random time (during a step, an evaluation, the
writing of a file) and started again by the same command, until it is finished. Its adapters, its log and its scores
must then equal those of a run that was never interrupted, bit for bit but for the times. TA-LoRA and one baseline.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers

from experiments import compare
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
    return ["--stage", "all", "--backbone", str(backbone), "--run", str(run), "--sources", "toy-amazon", "toy-sanwen",
            "--targets", "toy-finre", "toy-drcd", "--shots", "8", "--base-steps", "4", "--multitask-steps", "12",
            "--target-steps", "5", "--base-batch", "4", "--multitask-batch", "6", "--target-batch", "3",
            "--eval-every", "3", "--log-every", "2", "--save-every", "1", "--dev-rows", "4", "--no-references",
            "--no-pictures", *more]


def read_outcome(run: Path) -> dict:
    """What a run found, by file: the bytes of its adapters, its log, its scores."""
    found = {path: path.read_bytes() for path in run.glob("**/best/*")}
    for path in run.glob("**/metrics.jsonl"):
        found[path] = [json.loads(line) for line in path.read_text().splitlines()]
    for path in run.glob("**/results.json"):
        found[path] = json.loads(path.read_text()).get("scores")
    return {str(path.relative_to(run)): value for path, value in found.items()}


def run_silently(arguments: list[str]) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        compare.main(arguments)


def start(arguments: list[str]) -> multiprocessing.Process:
    """Run experiments.compare in a fork, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=run_silently, args=(arguments,))
    process.start()
    return process


def soak(backbone: Path, folder: Path, kills: int, rng: random.Random, *more: str) -> int:
    """Kill runs ``kills`` times in all -> how many runs that took. AssertionError if anything comes out differently."""
    began, killed, runs, whole = time.perf_counter(), 0, 0, start(command(backbone, folder / "whole", *more))
    whole.join()
    assert whole.exitcode == 0, "the run does not even finish"
    seconds, expected = time.perf_counter() - began, read_outcome(folder / "whole")
    while killed < kills:
        run, exitcode, runs = folder / f"run{runs}", -signal.SIGKILL, runs + 1
        while exitcode == -signal.SIGKILL:
            process = start(command(backbone, run, *more))
            if killed < kills:
                time.sleep(rng.uniform(0, seconds / 2))
                process.kill()
            process.join()
            exitcode = process.exitcode
            killed += exitcode == -signal.SIGKILL
        assert exitcode == 0, "a run that was killed cannot be resumed"
        found = read_outcome(run)
        other = [name for name in found | expected if found.get(name) != expected.get(name)]
        assert not other, f"after a kill {', '.join(other)} of {run} differ from those of {folder}/whole"
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each method (default: 20)")
    kills = parser.parse_args().kills
    torch.set_num_threads(1)  # a fork has the thread that forks and no other
    transformers.logging.disable_progress_bar()
    micro.TRAIN_ROWS, micro.TEST_ROWS = 60, 6
    for method in (["talora", "--prompt-length", "3", "--rank", "2"], ["spot", "--prompt-length", "3"]):
        with tempfile.TemporaryDirectory() as folder:
            runs = soak(small_world(Path(folder)), Path(folder), kills, random.Random(0), "--method", *method)
            print(f"{method[0]}: {kills} kills, {runs} runs, all as if never interrupted", flush=True)
