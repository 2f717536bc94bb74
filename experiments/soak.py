"""Kill a run at random moments, again and again, and see that it ends as if nothing had happened.

    python tests/soak.py --kills 20

A run that saves after every step is started, killed with SIGKILL after a random time (in the middle of a step, of an
evaluation, of a file), and started again by the same command, until it is finished. Whatever it leaves must then be the
files of a run that was never touched, bit for bit, but for times.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import toy  # noqa: E402
import train  # noqa: E402

TIMES = ("seconds", "tokens_per_s", "command", "started")


def small_world(folder: Path) -> Path:
    """Few rows, and a random backbone of one layer: what is killed does not matter, how fast it comes back does."""
    toy.TRAIN_ROWS, toy.TEST_ROWS = 60, 6
    torch.manual_seed(0)
    tokenizer = toy.tokenizer()
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    return folder / "backbone"


def command(backbone: Path, run: Path, *more: str) -> list[str]:
    return ["--stage", "all", "--backbone", str(backbone), "--run", str(run), "--sources", "toy-amazon,toy-sanwen",
            "--targets", "toy-finre,toy-drcd", "--shots", "8", "--base-steps", "4", "--multitask-steps", "12",
            "--target-steps", "5", "--base-batch", "4", "--multitask-batch", "6", "--target-batch", "3",
            "--eval-every", "3", "--dev-rows", "4", "--log-every", "2",
            "--prompt-length", "3", *(() if "spot" in more else ("--rank", "2")), "--save-every", "1",
            "--no-references", "--no-pictures", *more]


def left(run: Path) -> dict:
    """Everything a finished run left, by file: tensors as they are, numbers without times."""
    files = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            files[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        elif path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            files[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        elif path.name == "results.json":
            files[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMES}
        elif path.is_file() and path.name not in ("log.txt", "options.json", "env.json"):
            files[name] = path.read_bytes()
    return files


def difference(one, other) -> str:
    """Where two files differ first."""
    if isinstance(one, list):
        rows = [(a, b) for a, b in zip(one, other) if a != b]
        return difference(*rows[0]) if rows else f"{len(one)} rows, {len(other)} rows"
    if isinstance(one, dict):
        return "; ".join(f"{key}: {str(one.get(key))[:60]}, {str(other.get(key))[:60]}" for key in one | other
                         if one.get(key) != other.get(key)) + f" (step {one.get('step')})"
    return f"{len(one)} bytes, {len(other)} bytes"


def start(arguments: list[str]) -> int:
    """The run in a process of its own (a fork: everything is imported already); -> its id."""
    child = os.fork()
    if child:
        return child
    try:
        with redirect_stdout(open(os.devnull, "w")):
            train.main(arguments)
    except BaseException as error:
        print(f"the run failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def soak(backbone: Path, folder: Path, kills: int, rng: random.Random, *more: str) -> dict:
    """Kill runs ``kills`` times in all; -> a tally. Raises AssertionError for a difference or an unreadable file."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    assert os.waitpid(start(command(backbone, folder / "whole", *more)), 0)[1] == 0
    seconds, expected = time.perf_counter() - began, left(folder / "whole")
    tally, parts = {"kills": 0, "runs": 0, "while a file was written": 0, "stages finished before": []}, set()
    while tally["kills"] < kills:
        run, finished = folder / f"run{tally['runs']}", False
        while not finished:
            child = start(command(backbone, run, *more))
            if tally["kills"] < kills:
                time.sleep(rng.uniform(0, seconds / 2))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), "a run that was killed cannot go on"
            finished = status == 0
            if not finished:
                tally["kills"] += 1
                now = {(path, path.stat().st_mtime_ns) for path in run.rglob("*.part")}
                tally["while a file was written"] += bool(now - parts)
                tally["stages finished before"].append(len(list(run.glob("*/results.json"))))
                parts |= now
                for path in run.rglob("checkpoint.pt"):
                    torch.load(path, weights_only=True)
                for path in run.rglob("adapter.safetensors"):
                    load_file(path)
                for path in run.rglob("*.json"):
                    json.loads(path.read_text())
        found = left(run)
        assert found.keys() == expected.keys(), f"other files: {found.keys() ^ expected.keys()}"
        for name, content in expected.items():
            assert found[name] == content, f"{run}/{name} differs after a kill: {difference(content, found[name])}"
        tally["runs"] += 1
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for method in ("talora", "spot"):
        with tempfile.TemporaryDirectory() as folder:
            backbone, rng = small_world(Path(folder)), random.Random(options.seed)
            tally = soak(backbone, Path(folder), options.kills, rng, "--method", method)
            print(method, tally, flush=True)
