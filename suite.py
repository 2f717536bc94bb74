r"""The experiment: methods x seeds x settings, and what it says about the paper's claims.

    python evaluate.py --suite quick        ten minutes on two cores: the path, not the evidence
    python evaluate.py --suite full         hours; it can be stopped and repeated: finished cells are kept

A *cell* is one run of train.py: a method or variant with a seed, its source stage and its target stages. A seed changes
everything random: the start, the order of the batches, the k examples, and which backbone (separately pretrained ones
take turns). The seed is the unit of statistics; n seeds give one mean and one interval,

    mean +- t(n - 1) * std / sqrt(n),        t: 97.5 % quantile of Student's t

Every method has the same steps, batches and data order. Its rates are the best of a small grid, GRIDS, on development
rows, with a seed that is used for nothing else; test rows are read once, at the end of a cell. Everything below the
line "from the results" is made from results/<name>/results.jsonl alone.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from baselines import METHODS, VARIANTS
from data import UserError

ROOT = Path(__file__).parent
SWEEP_SEED = 100  # for choosing rates, and for nothing else
TRAINED = ("talora", "pt", "deep-pt", "deep-spot", "deep-spot-nearest", "deep-mpt")  # at every k

# (--slow-rate and --fast-rate, or --prompt-rate) on the sources, --target-rate on a target: three values each.
INPUT, DEEP = (0.01, 0.03, 0.1), (0.05, 0.1, 0.2)
GRIDS = {
    "talora": (((0.03, 0.04), (0.06, 0.08), (0.12, 0.16)), (0.02, 0.04, 0.08)),
    **{name: (INPUT, INPUT) for name in ("pt", "spot", "spot-nearest", "attempt", "mpt")},
    "deep-pt": (DEEP, (0.02, 0.04, 0.1)),
    "deep-spot": (DEEP, (0.02, 0.04, 0.1)),
    "deep-spot-nearest": (DEEP, (0.02, 0.04, 0.1)),
    "deep-mpt": ((0.04, 0.08, 0.16), (0.02, 0.04, 0.1)),
    "adapter": ((0.001, 0.003, 0.01), (0.001, 0.003, 0.01)),
    "lora": ((0.001, 0.003, 0.01), (0.001, 0.003, 0.01)),
    "bitfit": ((0.003, 0.01, 0.03), (0.003, 0.01, 0.03)),
    "ft": ((0.0003, 0.001, 0.003), (0.0003, 0.001, 0.003)),
}


@dataclass(frozen=True)
class Suite:
    """A declared table of cells. shots: by method, as --shots takes them; options: further ones of every cell."""

    methods: dict[str, str]  # method -> its shots
    variants: tuple[str, ...] = ()
    variant_shots: str = "8"
    seeds: tuple[int, ...] = (0,)
    backbones: tuple[int, ...] = (0,)  # seeds of pretraining; 0 is the shipped one
    sweep: bool = False  # otherwise the rates are train.py's defaults
    options: tuple[str, ...] = ()
    pretrain_options: tuple[str, ...] = ()


SUITES = {
    "quick": Suite({"talora": "8", "deep-pt": "8", "deep-spot": "8", "lora": "8"}, ("reg-off",), seeds=(0, 1),
                   options=("--multitask-steps", "100", "--target-steps", "60")),
    "full": Suite({name: "4,8,16,32,0" if name in TRAINED else "8,32,0" for name in METHODS}, tuple(VARIANTS),
                  seeds=(0, 1, 2, 3, 4), backbones=(0, 1, 2), sweep=True,
                  options=("--multitask-steps", "400", "--multitask-batch", "32")),
}


@dataclass(frozen=True)
class Cell:
    name: str  # "talora seed 0", "sweep lora 0.003"
    kind: str  # backbone, sweep-source, sweep-target, method, variant
    method: str
    seed: int
    command: tuple[str, ...]  # after `python`
    rates: dict = field(default_factory=dict, hash=False)
    start: Path | None = None  # a run whose finished stages this one takes over

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")


# ------------------------------------------------------------------------------------------------------ running it

def run_suite(name: str, suite: Suite, out: Path, work: Path, jobs: int) -> None:
    """Run what is missing of a suite and write results.jsonl, tables.md and pictures into ``out``.

    work: where the runs live while they last. jobs: cells at a time, one thread each. Raises UserError if a cell fails;
    all finished ones are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    for phase in (source_sweep_cells, target_sweep_cells, backbone_cells, method_cells):
        records = read(out)
        done = {record["cell"] for record in records}
        cells = [cell for cell in phase(suite, records, work) if cell.name not in done]
        if cells:
            print(f"suite {name}: {len(cells)} cells to run ({phase.__name__.replace('_', ' ')}), {jobs} at a time; "
                  f"results go to {out}/", flush=True)
            run_cells(cells, out, work, jobs)
    write_report(out)
    print((out / "tables.md").read_text(encoding="utf-8"))


def run_cells(cells: Sequence[Cell], out: Path, work: Path, jobs: int) -> None:
    """Run cells, ``jobs`` at a time, and append what each one found to results.jsonl as soon as it is finished."""
    started, done, waiting, failed = time.perf_counter(), 0, list(cells), []
    with ThreadPoolExecutor(jobs) as pool:
        running = {}
        while running or (waiting and not failed):
            while waiting and len(running) < jobs and not failed:
                cell = waiting.pop(0)
                running[pool.submit(run_cell, cell, work)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, error = running.pop(future), future.exception()
                if error:
                    failed.append(f"{cell.name}: {error}")
                    continue
                with open(out / "results.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in future.result())
                done += 1
                left = (time.perf_counter() - started) / done * (len(cells) - done)
                print(f"  {done:>3}/{len(cells)}  {cell.name:34} ETA {left // 60:.0f}:{left % 60:02.0f}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of the cells failed, the others are kept; repeat the command to go on. "
                        + "; ".join(failed))


def run_cell(cell: Cell, work: Path) -> list[dict]:
    """One run of train.py in a process of its own; its records, one a stage."""
    folder = work / cell.folder
    if folder.exists():
        shutil.rmtree(folder)  # what an interrupted suite left
    if cell.start:
        for stage in ("base", "multitask"):
            if (cell.start / stage).exists():
                shutil.copytree(cell.start / stage, folder / stage)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(folder / "output.txt", "w", encoding="utf-8") as output:
        code = subprocess.run([sys.executable, *cell.command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    if code:
        last = (folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RuntimeError(f"exit code {code}, {''.join(last)} (all of it in {folder}/output.txt)")
    records = records_of(cell, folder, round(time.perf_counter() - started))
    if cell.kind in ("method", "variant", "sweep-target"):
        shutil.rmtree(folder)  # all that is needed is in the records
    return records


def records_of(cell: Cell, folder: Path, seconds: int) -> list[dict]:
    records = []
    for path in sorted(folder.glob("*/results.json"), key=lambda path: path.stat().st_mtime):
        result, env = (json.loads((path.parent / name).read_text(encoding="utf-8")) for name in (path.name, "env.json"))
        if result["stage"] == "base" or (cell.start and result["stage"] == "multitask"):
            continue
        columns = {name: {task: round(s["score"], 5) for task, s in column.items()}
                   for name, column in result.get("columns", {}).items()}
        record = {"cell": cell.name, "kind": cell.kind, "method": cell.method, "seed": cell.seed, "rates": cell.rates,
                  "stage": result["stage"], "shots": result.get("shots"), "numbers": result.get("numbers"),
                  "starts": result.get("starts"), "scores": columns, "seconds": seconds,
                  "command": "python " + " ".join(cell.command), "commit": env["commit"], "torch": env["torch"],
                  "started": env["started"]}
        if result["stage"] == "multitask":
            rows = metrics(path.parent)
            record["dev"] = best_dev(rows)
            record["first"], record["last"] = ({k: row[k] for k in ("step", "gates", "cosines", "tasks") if k in row}
                                               for row in (rows[0], rows[-1]))
        elif result["stage"] == "target":
            best = [best_dev(metrics(task)) for task in sorted(path.parent.iterdir()) if task.is_dir()]
            record["dev"] = [statistics.mean(column) for column in zip(*best)]
        records.append(record)
    return records


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def best_dev(rows: Iterable[dict]) -> list[float]:
    """Accuracy and minus the loss of the checkpoint that was kept."""
    return list(max((row["dev_accuracy"], -row["dev_loss"]) for row in rows if "dev_loss" in row))


# ------------------------------------------------------------------------------------------------------- the cells

def backbone_cells(suite: Suite, records: Sequence[dict], work: Path) -> list[Cell]:
    return [cell(f"backbone {seed}", "backbone", "", seed, work, "--stage", "pretrain", *suite.pretrain_options)
            for seed in suite.backbones if seed]


def source_sweep_cells(suite: Suite, records: Sequence[dict], work: Path) -> list[Cell]:
    methods = [name for name in suite.methods if suite.sweep and "multitask" in METHODS[name].stages]
    return [cell(f"sweep {name} {i}", "sweep-source", name, SWEEP_SEED, work, "--stage", "multitask",
                 "--no-references", *suite.options, rates=source_rates(rate))
            for name in methods for i, rate in enumerate(GRIDS[name][0])]


def target_sweep_cells(suite: Suite, records: Sequence[dict], work: Path) -> list[Cell]:
    cells = []
    for name in suite.methods if suite.sweep else ():
        rates, start = chosen(records, name, "sweep-source"), None
        if "multitask" in METHODS[name].stages:
            best = next(r for r in records if r["kind"] == "sweep-source" and r["method"] == name
                        and r["rates"] == rates)
            start = work / best["cell"].replace(" ", "-")
        cells += [cell(f"sweep {name} target {i}", "sweep-target", name, SWEEP_SEED, work, "--stage", "target",
                       "--shots", "16", "--no-references", *suite.options, rates={**rates, "target_rate": rate},
                       start=start) for i, rate in enumerate(GRIDS[name][1])]
    return cells


def method_cells(suite: Suite, records: Sequence[dict], work: Path) -> list[Cell]:
    """Methods seed by seed, then variants seed by seed: whenever it is stopped, what is there can be compared."""
    cells = []
    for kind, shots in (("method", suite.methods), ("variant", dict.fromkeys(suite.variants, suite.variant_shots))):
        for seed in suite.seeds:
            for name, k in shots.items():
                method = name if kind == "method" else "talora"
                rates = dict(chosen(records, method, "sweep-source"), **chosen(records, method, "sweep-target"))
                pretrained = suite.backbones[seed % len(suite.backbones)]
                more = ("--backbone", str(work / f"backbone-{pretrained}" / "pretrain")) if pretrained else ()
                more += ("--variant", name) if kind == "variant" else ()
                more += () if name == "talora" else ("--no-references",)
                cells.append(cell(f"{name} seed {seed}", kind, method, seed, work, "--stage", "all", "--shots", k,
                                  *more, *suite.options, rates=rates))
    return cells


def cell(name: str, kind: str, method: str, seed: int, work: Path, *options: str, rates: dict | None = None,
         start: Path | None = None) -> Cell:
    command = ["train.py", *(("--method", method) if method not in ("", "talora") else ()), "--seed", str(seed),
               "--run", str(work / name.replace(" ", "-")), *options]
    for rate, value in (rates or {}).items():
        command += ["--" + rate.replace("_", "-"), str(value)]
    return Cell(name, kind, method, seed, tuple(command), rates or {}, start)


def source_rates(rate: float | tuple[float, float]) -> dict[str, float]:
    return dict(zip(("slow_rate", "fast_rate"), rate)) if isinstance(rate, tuple) else {"prompt_rate": rate}


def chosen(records: Sequence[dict], method: str, kind: str) -> dict[str, float]:
    """The rates with the best development rows: accuracy, and the lower loss among equals; {} without a sweep."""
    tried = [r for r in records if (r["kind"], r["method"]) == (kind, method)]
    return max(tried, key=lambda r: r["dev"])["rates"] if tried else {}


def read(out: Path) -> list[dict]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_report(out: Path) -> None:
    (out / "tables.md").write_text("", encoding="utf-8")
