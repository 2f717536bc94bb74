"""Everything that has to be measured on a GPU, one command after another; each is printed before it runs.

    python tests/gpu.py --data-root DIR        rows as README.md says; without it the sixteen sets are downloaded

1. bench.py at the shapes of Qwen2.5-7B and 0.5B: the goals of README.md, beside what was reached
2. --stage multitask, 300 steps, on real rows with random weights of the 7B shape: memory and speed (its loss means
   nothing), and the same without checkpointing
3. the micro-world ten times as large (a backbone of 8.7 M parameters): pretraining, all stages, 8 and 32 examples

What comes out is in --out: bench's JSON, and of each run its log, results and table. 20 GB of disk, about an hour.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench  # noqa: E402
import data  # noqa: E402
import pretrain  # noqa: E402


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The commands, as lists of words after `python`."""
    work, device = Path(options.work), ["--device", options.device]
    rows = ["--data-root", options.data_root] if options.data_root else []
    if options.sources:
        rows += ["--sources", options.sources]
    large = ["train.py", "--preset", options.shape, "--stage", "multitask", *rows, "--backbone", str(work / "backbone"),
             "--multitask-steps", str(options.steps), "--base-steps", "10", "--no-references", *device]
    world = work / "world"
    made = ["--backbone", str(world / "pretrain")]
    return [*(["bench.py", "--shape", s, "--out", options.out, *device] for s in (options.shape, "qwen2.5-0.5b")),
            [*large, "--run", str(work / "large")],
            [*large, "--run", str(work / "large-without-checkpointing"), "--checkpointing", "off"],
            ["train.py", "--stage", "pretrain", "--run", str(world), "--pretrain-width", str(options.width),
             "--pretrain-layers", str(options.layers), *device],
            ["train.py", "--stage", "all", "--shots", "8,32", "--run", str(work / "world-tasks"), *made, *device]]


def random_backbone(shape: str, folder: Path, texts: list[str], device: str) -> None:
    """Random weights of a published shape in bf16, with a tokenizer of one token per character of ``texts``."""
    tokenizer = pretrain.character_tokenizer(texts)
    config = AutoConfig.for_model("qwen2", **bench.SHAPES[shape], max_position_embeddings=32768, bos_token_id=None,
                                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep(run: Path, out: Path) -> None:
    """What a run found, without its adapters."""
    for path in [run / "log.txt", *run.glob("*/results.json"), *run.glob("*/table.md"), *run.glob("*/env.json")]:
        to = out / run.name / path.relative_to(run)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-root", default="", help="rows of the sixteen sets: DIR/<task>/train.jsonl, test.jsonl")
    options.add_argument("--sources", default="", help="source tasks (default: all that are there)")
    options.add_argument("--out", default="results/gpu", help="folder for what was found (default: results/gpu)")
    options.add_argument("--work", default="runs/gpu", help="folder for runs and weights (default: runs/gpu)")
    options.add_argument("--shape", default="qwen2.5-7b", help="the large one (default: qwen2.5-7b)")
    options.add_argument("--steps", type=int, default=300, help="of its multitask stage (default: 300)")
    options.add_argument("--width", type=int, default=320, help="of the larger micro-world (default: 320)")
    options.add_argument("--layers", type=int, default=7, help="of the larger micro-world (default: 7)")
    options.add_argument("--device", default="cuda", help="where (default: cuda)")
    return options


def main(argv: list[str]) -> int:
    options, failed = parser().parse_args(argv), []
    work, out = Path(options.work), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (work / "backbone" / "config.json").exists():
        sources = options.sources.split(",") if options.sources else [
            task for task in data.TASKS if data.TASKS[task].role == "source"
            and (not options.data_root or (Path(options.data_root) / task).is_dir())]
        texts = [e.prompt for task in sources for e in data.load_task(task, "train", options.data_root or None)]
        random_backbone(options.shape, work / "backbone", texts, options.device)
    for words in commands(options):
        print(f"\n$ python {shlex.join(words)}", flush=True)
        code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        failed += [[shlex.join(words), code]] * bool(code)  # the others are still worth their time
        if "--run" in words and Path(words[words.index("--run") + 1]).is_dir():
            keep(Path(words[words.index("--run") + 1]), out)
    print(f"\nwritten to {out}" + f"; failed: {json.dumps(failed)}" * bool(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
