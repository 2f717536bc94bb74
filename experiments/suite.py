r"""The experiment: all methods and variants over seeds and numbers of examples, each one a run of experiments.compare.

    python -m experiments.suite quick                   five to ten minutes on two cores: the way, not the evidence
    python -m experiments.suite full                    hours; stop it at any time and repeat the command to resume
    python -m experiments.suite full --out runs/mine -- --data-root DIR --backbone PATH           on other data

A seed changes everything that training draws, and the backbone: separately pretrained ones take turns. All methods have
the same steps, batches and order of rows; TA-LoRA's base stage, 30 steps, comes on top (not in the variant no-base). A
method's learning rates are the best of a small grid (GRIDS) on development rows, found with a seed that is used for
nothing else and on the shipped backbone; variants have TA-LoRA's. Test rows are read once, at the end of a run.
results.jsonl keeps what a run found, one line for each stage and number of examples; report.py makes the rest of it.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import checkpoint
from checkpoint import RunFailed, UserError, read_json
from evaluate import read_metrics
from experiments.compare import METHODS, VARIANTS
from experiments.report import choose_rates, read_results, write_report
from train import check, flag, parse

SWEEP_SEED = 100  # for choosing learning rates, and for nothing else
LOGGED = ("step", "gates", "theta0_norms", "step_norms", "cosines", "tasks")  # kept from metrics.jsonl
EVERY_K = ("talora", "pt", "deep-pt", "deep-spot", "deep-mpt")  # run with 4 and 16 examples, too

# Of each method: learning rates on the sources (slow and fast, or one) and on a target. Three values each, and one more
# at a time, twice at most, where the best of them stood at an end.
INPUT, DEEP, SMALL = (0.01, 0.03, 0.1, 0.3), (0.05, 0.1, 0.2, 0.025), (0.001, 0.003, 0.01, 0.03)
DEEP_TARGET, FULL = (0.02, 0.04, 0.1, 0.2), (0.0003, 0.001, 0.003, 0.0001)
GRIDS = {
    "talora": (((0.03, 0.04), (0.06, 0.08), (0.12, 0.16), (0.24, 0.32)), (0.02, 0.04, 0.08, 0.16)),
    "pt": ((), INPUT), "spot": (INPUT, INPUT), "mpt": (INPUT, INPUT), "attempt": (INPUT, (*INPUT, 1.0)),
    "deep-pt": ((), DEEP_TARGET), "deep-spot": (DEEP, (*DEEP_TARGET, 0.01)), "deep-spot-nearest": (DEEP, DEEP_TARGET),
    "deep-mpt": ((0.04, 0.08, 0.16, 0.02), (*DEEP_TARGET, 0.4)),
    "adapter": (SMALL, SMALL), "lora": (SMALL, SMALL),
    "bitfit": ((0.003, 0.01, 0.03, 0.1, 0.3), (0.003, 0.01, 0.03, 0.1)), "ft": (FULL, (*FULL, 0.00003)),
}


@dataclass(frozen=True)
class Suite:
    methods: dict[str, tuple[int, ...]]  # method -> numbers of examples of a target
    variants: tuple[str, ...] = ()  # with 8 examples
    seeds: tuple[int, ...] = (0,)
    backbones: tuple[int, ...] = (0,)  # seeds of pretraining; 0 is the shipped one
    sweep: bool = False  # otherwise the learning rates are the methods' defaults
    options: tuple[str, ...] = ()  # of every run


SUITES = {
    "quick": Suite(dict.fromkeys(("talora", "deep-pt", "deep-spot", "lora"), (8,)), ("reg-off",), seeds=(0, 1),
                   options=("--multitask-steps", "100", "--target-steps", "60")),
    "full": Suite({name: (4, 8, 16, 32, 0) if name in EVERY_K else (8, 32, 0) for name in METHODS}, tuple(VARIANTS),
                  seeds=(0, 1, 2, 3, 4), backbones=(0, 1, 2), sweep=True,
                  options=("--multitask-steps", "400", "--multitask-batch", "32")),
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
        folder = str(folder_of(self.name, out))
        if self.kind == "backbone":
            return ["-m", "tasks.pretrain", "--seed", str(self.seed), "--out", folder]
        rates = [word for name, value in self.rates.items() for word in (flag(name), str(value))]
        return ["-m", "experiments.compare", *self.options, *rates, "--seed", str(self.seed), "--run", folder]


def folder_of(name: str, out: Path) -> Path:
    return out / "runs" / name.replace(" ", "-")


# ------------------------------------------------------------------------------------- what to run, phase by phase

def plan_source_sweep(suite: Suite, records: Sequence[dict], out: Path) -> list[Run]:
    runs = []
    for method in suite.methods if suite.sweep else ():
        for i, rate in enumerate(GRIDS[method][0]):
            rates = dict(zip(("slow_rate", "fast_rate"), rate)) if isinstance(rate, tuple) else {"prompt_rate": rate}
            options = ("--method", method, "--stage", "multitask", "--no-references", *suite.options)
            runs.append(Run("sweep-source", f"sweep {method} {i}", method, SWEEP_SEED, options, rates))
    return runs


def plan_target_sweep(suite: Suite, records: Sequence[dict], out: Path) -> list[Run]:
    """Each from the finished source stages of its method's best run."""
    runs = []
    for method in suite.methods if suite.sweep else ():
        best = choose_rates(records, method, "sweep-source")
        tried = [r for r in records if (r["kind"], r["method"]) == ("sweep-source", method)]
        start = next((r["cell"] for r in tried if r["rates"] == best), "")
        options = ("--method", method, "--stage", "target", "--shots", "16", "--no-references", *suite.options)
        runs += [Run("sweep-target", f"{start or f'sweep {method}'} target {i}", method, SWEEP_SEED, options,
                     best | {"target_rate": rate}, start) for i, rate in enumerate(GRIDS[method][1])]
    return runs


def plan_backbones(suite: Suite, records: Sequence[dict], out: Path) -> list[Run]:
    return [Run("backbone", f"backbone {seed}", "", seed) for seed in suite.backbones if seed]


def plan_methods(suite: Suite, records: Sequence[dict], out: Path) -> list[Run]:
    """Methods seed by seed, then variants one by one: whenever it is stopped, what there is can be compared."""
    order = [("method", name, name, seed, shots) for seed in suite.seeds for name, shots in suite.methods.items()]
    order += [("variant", name, "talora", seed, (8,)) for name in suite.variants for seed in suite.seeds]
    runs = []
    for kind, name, method, seed, shots in order:
        sources = choose_rates(records, method, "sweep-source")
        rates = sources | choose_rates(records, method, "sweep-target", sources)
        backbone = suite.backbones[seed % len(suite.backbones)]
        options = [f"--{kind}", name, "--stage", "all", "--shots", *map(str, shots), *suite.options]
        options += ["--backbone", str(folder_of(f"backbone {backbone}", out))] if backbone else []
        options += ["--no-references"] if name != "talora" else []  # they are the same for all
        runs.append(Run(kind, f"{name} seed {seed}", method, seed, tuple(options), rates))
    return runs


# ------------------------------------------------------------------------------------------------------- running it

def run_suite(suite: Suite, out: Path, jobs: int) -> None:
    """Run what is missing, phase by phase, since later phases need what earlier ones found; then write the report."""
    for plan in (plan_source_sweep, plan_target_sweep, plan_backbones, plan_methods):
        records = read_results(out) if (out / "results.jsonl").exists() else []
        made, missing = {r["cell"]: r["command"] for r in records}, []
        for run in plan(suite, records, out):
            if run.name not in made:
                missing.append(run)
            elif shlex.split(made[run.name])[1:] != run.command(out):
                raise UserError(f"'{out}/results.jsonl' holds '{run.name}' made by another command ({made[run.name]}); "
                                "choose another --out")
        if missing:
            print(f"{len(missing)} runs to do, {jobs} at a time; what they print goes to {out}/runs/", flush=True)
            run_all(missing, out, jobs)
    write_report(out)


def run_all(runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Run them, ``jobs`` at a time; what one found is in results.jsonl as soon as it is finished.

    After a failure (RunFailed) or a signal (SystemExit) no run is started, and those at work are waited for.
    """
    started, path = time.perf_counter(), out / "results.jsonl"
    with checkpoint.catch_signals() as caught, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(execute, run, out, caught) for run in runs]
        for finished, future in enumerate(as_completed(futures), start=1):
            try:
                records = future.result()
            except (RunFailed, SystemExit):
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            before = path.read_bytes() if path.exists() else b""
            with checkpoint.write_whole(path) as file:  # all records of a run or none
                file.write(before + "".join(json.dumps(record) + "\n" for record in records).encode())
            left = (time.perf_counter() - started) / finished * (len(runs) - finished) / 60
            print(f"  {finished:>3}/{len(runs)}  {records[0]['cell']:34} ETA {left:.0f} min", flush=True)


def execute(run: Run, out: Path, caught: list[int]) -> list[dict]:
    """One run in a process of its own with one thread; its records. SystemExit once ``caught`` holds a signal."""
    if caught:
        raise SystemExit(128 + caught[0])
    folder, started = folder_of(run.name, out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("base", "multitask") if run.start else ():
        if (folder_of(run.start, out) / stage).exists():
            shutil.copytree(folder_of(run.start, out) / stage, folder / stage, dirs_exist_ok=True)
    with open(f"{folder}.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, *run.command(out)], stdout=output, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    while process.poll() is None and not caught:
        time.sleep(0.1)
    if caught:  # also Ctrl-C, which a session of its own does not hear: the run saves its step and ends
        process.terminate()
        process.wait()
        raise SystemExit(128 + caught[0])
    if process.returncode:
        said = Path(f"{folder}.txt").read_text(encoding="utf-8").strip().splitlines() or [""]
        raise RunFailed(f"'{run.name}' failed: {said[-1].removeprefix('error: ')} (see {folder}.txt)")
    records = collect(run, out, round(time.perf_counter() - started))
    if run.kind in ("method", "variant", "sweep-target"):  # no other run starts from it
        shutil.rmtree(folder)
    return records


def collect(run: Run, out: Path, seconds: int) -> list[dict]:
    """The lines of results.jsonl of a finished run: one for its sources, one for each number of examples."""
    made = checkpoint.environment(shlex.join(["python", *run.command(out)]))
    about = {"cell": run.name, "kind": run.kind, "method": run.method, "seed": run.seed, "rates": run.rates,
             "seconds": seconds, "command": made["command"], "commit": made["commit"], "torch": made["torch"],
             "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - seconds))}
    if run.kind == "backbone":
        return [about | {"stage": "pretrain", "shots": None, "scores": {}}]
    stages: dict[tuple, list[Path]] = {}  # (stage, shots) -> folders, in the order of their training
    for path in sorted(folder_of(run.name, out).glob("**/results.json"), key=lambda path: path.stat().st_mtime):
        result = read_json(path)
        if result["stage"] == "target" or (result["stage"] == "multitask" and not run.start):
            stages.setdefault((result["stage"], result.get("shots")), []).append(path.parent)
    return [about | {"stage": stage, "shots": shots} | collect_stage(folders)
            for (stage, shots), folders in stages.items()]


def collect_stage(folders: Sequence[Path]) -> dict:
    """What there is in the folder of the sources, or in those of the targets with one number of examples."""
    results, histories = zip(*((read_json(folder / "results.json"), read_metrics(folder)) for folder in folders))
    best = [max((row["dev_accuracy"], -row["dev_loss"]) for row in rows if "dev_loss" in row) for rows in histories]
    scores: dict[str, dict[str, float]] = {}
    for task, columns in (item for result in results for item in result["scores"].items()):
        for column, by_rows in columns.items():
            for rows, score in by_rows.items():
                name = f"{column}, rewritten" if rows == "rewritten" else column
                scores.setdefault(name, {})[task] = round(score["score"], 5)
    first, last = ({name: row[name] for name in LOGGED if name in row} for row in (histories[0][0], histories[0][-1]))
    return {"numbers": results[0]["trainable"], "scores": scores, "dev": [statistics.mean(each) for each in zip(*best)],
            **({"first": first, "last": last} if results[0]["stage"] == "multitask" else
               {"starts": {result["task"]: result["start"] for result in results if result["start"]}})}


def main(argv: list[str]) -> None:
    parser = checkpoint.Parser(prog="python -m experiments.suite", description=__doc__,
                               usage="%(prog)s {quick,full} [--jobs N] [--out DIR] [-- OPTIONS for every run]",
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SUITES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--out", type=Path, help="folder for runs and results (default: runs/suite/NAME)")
    at = argv.index("--") if "--" in argv else len(argv)
    asked = parser.parse_args(argv[:at])
    if asked.jobs < 1:
        raise UserError(f"--jobs is {asked.jobs}, but must be at least 1")
    suite, out = SUITES[asked.name], asked.out or Path("runs") / "suite" / asked.name
    suite = replace(suite, options=(*suite.options, "--no-pictures", *argv[at + 1:]))
    cfg = parse(list(suite.options))
    check(cfg)  # refuses now what would fail in every run
    if cfg.backbone:
        suite = replace(suite, backbones=(0,))
    with checkpoint.lock(out):
        run_suite(suite, out, asked.jobs)
    print((out / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(checkpoint.run_program(main, sys.argv[1:]))
