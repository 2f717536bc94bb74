r"""The experiment: all methods and variants over seeds and numbers of examples, each one a run of experiments.compare.

    python -m experiments.suite quick                   five to ten minutes on two cores: the way, not the evidence
    python -m experiments.suite full                    hours; stop it at any time and repeat the command to resume
    python -m experiments.suite full --out runs/mine -- --data-root DIR --backbone PATH           on other data
    python -m experiments.suite qwen -- --data-root DIR --backbone PATH       ten Chinese sets, a Qwen2.5 of 0.5 B

A seed changes everything that training draws, and the backbone. All methods have the same steps, batches and order of
rows; TA-LoRA's base stage, 30 steps, comes on top. A method's learning rates are the best of a small grid on
development rows, with a seed of their own; variants have TA-LoRA's. Test rows are read once, at the end of a run.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import checkpoint
from checkpoint import RunFailed, UserError
from evaluate import find_results, read_metrics
from experiments.compare import METHODS, VARIANTS
from experiments.report import choose_best, read_results, write_report
from train import check, flag, parse

SWEEP_SEED = 100  # for choosing learning rates, and for nothing else
EVERY_K = ("talora", "pt", "deep-pt", "deep-spot", "deep-mpt")  # run with 4 and 16 examples, too

# Learning rates on the sources (slow and fast, or one) and on a target: three, and more where the best was at an end.
INPUT, DEEP, SMALL = (0.01, 0.03, 0.1, 0.3), (0.05, 0.1, 0.2, 0.025), (0.001, 0.003, 0.01, 0.03)
DEEP_TARGET, FULL = (0.02, 0.04, 0.1, 0.2), (0.0003, 0.001, 0.003, 0.0001)
MICRO = {
    "talora": (((0.03, 0.04), (0.06, 0.08), (0.12, 0.16), (0.24, 0.32)), (0.02, 0.04, 0.08, 0.16)),
    "pt": ((), INPUT), "spot": (INPUT, INPUT), "mpt": (INPUT, INPUT), "attempt": (INPUT, (*INPUT, 1.0)),
    "deep-pt": ((), DEEP_TARGET), "deep-spot": (DEEP, (*DEEP_TARGET, 0.01)), "deep-spot-nearest": (DEEP, DEEP_TARGET),
    "deep-mpt": ((0.04, 0.08, 0.16, 0.02), (*DEEP_TARGET, 0.4)), "adapter": (SMALL, SMALL), "lora": (SMALL, SMALL),
    "bitfit": ((0.003, 0.01, 0.03, 0.1, 0.3), (0.003, 0.01, 0.03, 0.1)), "ft": (FULL, (*FULL, 0.00003)),
}
QWEN = {
    "talora": (tuple((fast / 4, fast, fast) for fast in (0.01, 0.02, 0.04, 0.08, 0.16)), (0.01, 0.03, 0.1)),
    "lora": ((0.0003, 0.001, 0.003), (0.0003, 0.001, 0.003)), "pt": ((), (*SMALL, 0.0003)),
    "mpt": ((*SMALL, 0.1, 0.3), (*SMALL, 0.1)), "spot": (SMALL, SMALL),
    "deep-spot-nearest": ((0.01, 0.02, 0.04, 0.08), (0.01, 0.03, 0.1, 0.003)),
}


@dataclass(frozen=True)
class Suite:
    methods: dict[str, tuple[int, ...]]  # method -> numbers of examples of a target
    variants: tuple[str, ...] = ()
    variant_shots: tuple[int, ...] = (8,)
    seeds: tuple[int, ...] = (0,)
    backbones: tuple[int, ...] = (0,)  # seeds of pretraining, in turns; 0 is the shipped one
    grids: dict[str, tuple] = field(default_factory=dict)  # without one the learning rates are the methods' defaults
    options: tuple[str, ...] = ()  # of every run
    sweep: tuple[str, ...] = ()  # of the runs that choose learning rates


SUITES = {
    "quick": Suite(dict.fromkeys(("talora", "deep-pt", "deep-spot", "lora"), (8,)), ("reg-off",), seeds=(0, 1),
                   options=("--multitask-steps", "100", "--target-steps", "60")),
    "full": Suite({name: (4, 8, 16, 32, 0) if name in EVERY_K else (8, 32, 0) for name in METHODS}, tuple(VARIANTS),
                  seeds=(0, 1, 2, 3, 4), backbones=(0, 1, 2), grids=MICRO,
                  options=("--multitask-steps", "400", "--multitask-batch", "32"), sweep=("--shots", "16")),
    "qwen": Suite(dict.fromkeys(QWEN, (32,)), ("reg-off", "open-gate", "equal-rates", "one-softmax"), (32,),
                  seeds=(0, 1, 2), grids=QWEN, options=tuple(
                      "--preset qwen2.5-0.5b --sources bq cmnli sanwen cote_mfw amazon "
                      "--targets lcqmc ocnli finre cote_bd chnsenticorp --max-length 256 --max-new-tokens 16 "
                      "--dev-rows 64 --test-rows 100 --tokens-per-batch 1024 --base-steps 30 --base-batch 16 "
                      "--multitask-steps 100 --multitask-batch 16 --target-steps 40 --target-batch 8 --warmup 10 "
                      "--eval-every 50 --log-every 5".split()),
                  sweep=tuple("--base-steps 20 --multitask-steps 40 --shots 32 --targets ocnli cote_bd "
                              "--test-rows 8".split())),
}


@dataclass(frozen=True)
class Run:
    kind: str  # method, variant, sweep-source, sweep-target, backbone
    name: str  # "talora seed 0", "sweep lora 1", "backbone 2"
    method: str
    seed: int
    options: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    start: str = ""  # name of a run whose finished source stages this one takes over

    def command(self, out: Path) -> list[str]:
        """The words after `python`."""
        rates = [word for name, value in self.rates.items() for word in (flag(name), str(value))]
        module, folder = ("tasks.pretrain", "--out") if self.kind == "backbone" else ("experiments.compare", "--run")
        return ["-m", module, *self.options, *rates, "--seed", str(self.seed), folder, str(folder_of(self.name, out))]


def folder_of(name: str, out: Path) -> Path:
    return out / "runs" / name.replace(" ", "-")


def plan_sources(suite: Suite, records: Sequence[dict], out: Path) -> Iterator[Run]:
    """The backbones, and each method's learning rates on the sources; without a grid they are the defaults."""
    yield from (Run("backbone", f"backbone {seed}", "", seed) for seed in suite.backbones if seed)
    for method in suite.methods:
        options = ("--method", method, "--stage", "multitask", "--no-references", *suite.options, *suite.sweep)
        for i, rates in enumerate(suite.grids.get(method, ((), ()))[0]):
            several = isinstance(rates, tuple)
            rates = dict(zip(("slow_rate", "fast_rate", "prompt_rate"), rates)) if several else {"prompt_rate": rates}
            yield Run("sweep-source", f"sweep {method} {i}", method, SWEEP_SEED, options, rates)


def plan_targets(suite: Suite, records: Sequence[dict], out: Path) -> Iterator[Run]:
    """Each method's learning rates on the targets, from the finished source stages of its best run."""
    for method in suite.methods:
        best = choose_best(records, method, "sweep-source")
        options = ("--method", method, "--stage", "target", "--no-references", *suite.options, *suite.sweep)
        for i, rate in enumerate(suite.grids.get(method, ((), ()))[1]):
            yield Run("sweep-target", f"{best['cell'] or f'sweep {method}'} target {i}", method, SWEEP_SEED, options,
                      best["rates"] | {"target_rate": rate}, best["cell"])


def plan_methods(suite: Suite, records: Sequence[dict], out: Path) -> Iterator[Run]:
    """Methods seed by seed, then variants one by one: whenever it is stopped, what there is can be compared."""
    order = [("method", name, name, seed, shots) for seed in suite.seeds for name, shots in suite.methods.items()]
    order += [("variant", name, "talora", seed, suite.variant_shots) for name in suite.variants for seed in suite.seeds]
    for kind, name, method, seed, shots in order:
        options = [f"--{kind}", name, "--stage", "all", "--shots", *map(str, shots), *suite.options]
        if backbone := suite.backbones[seed % len(suite.backbones)]:
            options += ["--backbone", str(folder_of(f"backbone {backbone}", out))]
        options += ["--no-references"] if name != "talora" else []  # they are the same for all
        best = choose_best(records, method, "sweep-target")
        yield Run(kind, f"{name} seed {seed}", method, seed, tuple(options), best["rates"])


def run_suite(suite: Suite, out: Path, jobs: int) -> None:
    """Run what is missing, phase by phase, then write the report."""
    (out / "results.jsonl").touch()
    for plan in (plan_sources, plan_targets, plan_methods):
        records = read_results(out)
        made, runs = {record["cell"]: record["command"] for record in records}, list(plan(suite, records, out))
        for run in runs:
            if run.name in made and shlex.split(made[run.name])[1:] != run.command(out):
                raise UserError(f"'{out}/results.jsonl' holds '{run.name}' made by another command ({made[run.name]}); "
                                "choose another --out")
        run_all([run for run in runs if run.name not in made], out, jobs)
    write_report(out)


def run_all(runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Run them, ``jobs`` at a time, and keep what each one found. After a failure (RunFailed) or a signal (SystemExit)
    those at work save their step and end."""
    waiting, working = list(runs), {}
    with checkpoint.catch_signals() as caught:
        try:
            while waiting or working:
                while waiting and len(working) < jobs:
                    run = waiting.pop(0)
                    print(f"  {len(runs) - len(waiting):>3}/{len(runs)}  {run.name}", flush=True)
                    working[start(run, out, max(1, (os.cpu_count() or 1) // jobs))] = run, time.time()
                time.sleep(0.1)
                if caught:
                    raise SystemExit(128 + caught[0])
                for process in [process for process in working if process.poll() is not None]:
                    run, started = working.pop(process)
                    if process.returncode:
                        log = Path(f"{folder_of(run.name, out)}.txt")
                        said = ["", *log.read_text(encoding="utf-8").splitlines()][-1].removeprefix("error: ")
                        raise RunFailed(f"'{run.name}' failed: {said} (see {log})")
                    keep(collect(run, out, started), run, out)
        finally:
            for process in working:
                process.terminate()
            for process in working:
                process.wait()


def start(run: Run, out: Path, threads: int) -> subprocess.Popen:
    """A run in a process of its own; in a session of its own it does not hear Ctrl-C."""
    folder = folder_of(run.name, out)
    folder.mkdir(parents=True, exist_ok=True)
    if run.start:
        shutil.copytree(folder_of(run.start, out), folder, dirs_exist_ok=True)
    with open(f"{folder}.txt", "a", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, *run.command(out)], stdout=output, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)}, start_new_session=True)


def collect(run: Run, out: Path, started: float) -> list[dict]:
    """The lines of results.jsonl of a finished run: one for its sources, one for each number of examples."""
    made = checkpoint.environment(shlex.join(["python", *run.command(out)]))
    about = {"cell": run.name, "kind": run.kind, "method": run.method, "seed": run.seed, "rates": run.rates,
             "command": made["command"], "commit": made["commit"], "torch": made["torch"],
             "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
             "seconds": round(time.time() - started), "stage": "pretrain", "shots": None}
    records: dict[tuple, dict] = {}  # by stage and number of examples
    for _, folder, result in find_results(folder_of(run.name, out)):
        stage, shots, rows = result["stage"], result.get("shots"), read_metrics(folder)
        if run.start and stage == "multitask":
            continue  # another run's
        ends = {"first": rows[0], "last": rows[-1]} if stage == "multitask" else {}
        record = records.setdefault((stage, shots), {
            **about, "stage": stage, "shots": shots, "numbers": result["trainable"], "scores": {}, "dev": [], **ends})
        for task, columns in result["scores"].items():
            for column, scores in columns.items():
                for rows_kind, score in scores.items():
                    name = column if rows_kind == "plain" else f"{column}, rewritten"
                    record["scores"].setdefault(name, {})[task] = round(score["score"], 5)
        record["dev"].append(max((row["dev_accuracy"], -row["dev_loss"]) for row in rows if "dev_loss" in row))
    for record in records.values():
        record["dev"] = [statistics.mean(each) for each in zip(*record["dev"])]  # over the targets
    return list(records.values()) or [about | {"scores": {}}]


def keep(records: Sequence[dict], run: Run, out: Path) -> None:
    """Add records to results.jsonl, all of them or none, and delete the run's folder if no other starts from it, except
    that of TA-LoRA's first seed."""
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8") + "".join(json.dumps(record) + "\n" for record in records)
    with checkpoint.write_whole(path) as file:
        file.write(lines.encode())
    if run.kind in ("method", "variant", "sweep-target") and run.name != "talora seed 0":
        shutil.rmtree(folder_of(run.name, out))


def main(argv: list[str]) -> None:
    parser = checkpoint.Parser(prog="python -m experiments.suite", description=__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SUITES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores (default: 2)")
    parser.add_argument("--only", nargs="+", choices=METHODS | VARIANTS, metavar="NAME", help="methods and variants")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these seeds (default: the suite's)")
    parser.add_argument("--out", type=Path, help="folder for runs and results (default: runs/suite/NAME)")
    at = argv.index("--") if "--" in argv else len(argv)
    asked = parser.parse_args(argv[:at])
    if asked.jobs < 1:
        raise UserError(f"--jobs is {asked.jobs}, but must be at least 1")
    suite, out = SUITES[asked.name], asked.out or Path("runs") / "suite" / asked.name
    options, only = (*suite.options, "--no-pictures", *argv[at + 1:]), asked.only or METHODS | VARIANTS
    cfg = parse(["--stage", "all", *options, "--run", str(out)])
    check(cfg)  # refuses now what would fail in every run
    suite = replace(suite, options=options, seeds=tuple(asked.seeds or suite.seeds),
                    backbones=(0,) if cfg.backbone else suite.backbones,
                    variants=tuple(name for name in suite.variants if name in only),
                    methods={name: shots for name, shots in suite.methods.items() if name in only})
    with checkpoint.lock(out):
        run_suite(suite, out, asked.jobs)
    print((out / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(checkpoint.run_program(main, sys.argv[1:]))
