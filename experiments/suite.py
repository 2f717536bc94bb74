r"""The experiment: methods x seeds x settings, and what it says about the paper's claims.

    python evaluate.py --suite quick        ten minutes on two cores: the path, not the evidence
    python evaluate.py --suite full         hours; it can be stopped and repeated: finished cells are kept
    python evaluate.py --suite full --out results/mine -- --data-root DIR --backbone PATH       on other data

A *cell* is one run of train.py: a method or variant with a seed, its source and its target stages. A seed changes all
that training draws: the start, the order of the batches, the k examples, and which backbone (separately pretrained ones
take turns). The seed is the unit of statistics; n seeds give one mean and one interval,

    mean +- t(n - 1) * std / sqrt(n),        t: 97.5 % quantile of Student's t

which says how far another seed may lie, on these test rows and on backbones like these; with fewer backbones than seeds
the seeds are not quite independent, and the interval is somewhat too narrow.

Every method has the same steps, batches and data order in the multitask and the target stage; TA-LoRA's base stage
comes on top, 30 steps (`--variant no-base` is without). A method's rates are the best of a small grid, GRIDS, on
development rows, with a seed that is used for nothing else and the first backbone; a variant has TA-LoRA's. Test rows
are read once, at the end of a cell. Everything below the line "from the results" is made from
results/<name>/results.jsonl alone.
"""

import json
import math
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context
from pathlib import Path

import torch

import figures
import train
from baselines import METHODS, VARIANTS
from checkpoint import Lock, Signals, atomic
from config import check, parse
from errors import Parser, RunFailed, Stopped, UserError, program

SWEEP_SEED = 100  # for choosing rates, and for nothing else
LOGGED = ("step", "gates", "theta0_norms", "step_norms", "cosines", "tasks")  # of an adapter, kept from metrics.jsonl
EVERY_K = ("talora", "pt", "deep-pt", "deep-spot", "deep-mpt")  # the other methods: 8, 32 and all examples

# (--slow-rate and --fast-rate, or --prompt-rate) on the sources, --target-rate on a target: three values each, and one
# more at a time, twice at most, where the best of them stood at an end.
INPUT, DEEP, SMALL = (0.01, 0.03, 0.1, 0.3), (0.05, 0.1, 0.2, 0.025), (0.001, 0.003, 0.01, 0.03)
DEEP_TARGET, FULL = (0.02, 0.04, 0.1, 0.2), (0.0003, 0.001, 0.003, 0.0001)
GRIDS = {
    "talora": (((0.03, 0.04), (0.06, 0.08), (0.12, 0.16), (0.24, 0.32)), (0.02, 0.04, 0.08, 0.16)),
    **{name: (INPUT, INPUT) for name in ("pt", "spot", "spot-nearest", "mpt")},
    "attempt": (INPUT, (*INPUT, 1.0)),
    **{name: (DEEP, DEEP_TARGET) for name in ("deep-pt", "deep-spot-nearest")},
    "deep-spot": (DEEP, (*DEEP_TARGET, 0.01)),
    "deep-mpt": ((0.04, 0.08, 0.16, 0.02), (*DEEP_TARGET, 0.4)),
    "adapter": (SMALL, SMALL),
    "lora": (SMALL, SMALL),
    "bitfit": ((0.003, 0.01, 0.03, 0.1, 0.3), (0.003, 0.01, 0.03, 0.1)),
    "ft": (FULL, (*FULL, 0.00003)),
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
    "full": Suite({name: "4,8,16,32,0" if name in EVERY_K else "8,32,0" for name in METHODS
                   if name != "spot-nearest"}, tuple(VARIANTS),
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
    try:
        run_phases(name, suite, out, work, jobs)
    finally:  # what is there can be looked at, whatever stopped it
        if any(record["kind"] in ("method", "variant") for record in read(out)):
            write_report(out)
    print((out / "tables.md").read_text(encoding="utf-8"))


def run_phases(name: str, suite: Suite, out: Path, work: Path, jobs: int) -> None:
    for phase in (source_sweep_cells, target_sweep_cells, backbone_cells, method_cells):
        records = read(out)
        done = {record["cell"]: what_counts(record["command"]) for record in records}
        cells = phase(suite, records, work)
        for cell in cells:
            if done.get(cell.name, what_counts(cell.command)) != what_counts(cell.command):
                raise UserError(f"{out}/results.jsonl holds '{cell.name}' made by another command ({done[cell.name]}); "
                                "move that file away to begin anew")
        cells = [cell for cell in cells if cell.name not in done or
                 (cell.kind == "backbone" and not (work / cell.folder / "pretrain" / "config.json").exists())]
        if cells:
            print(f"suite {name}: {len(cells)} cells to run ({phase.__name__.replace('_', ' ')}), {jobs} at a time; "
                  f"results go to {out}/", flush=True)
            run_cells(cells, out, work, jobs)


def what_counts(command: str | Sequence[str]) -> str:
    """The options of a cell's command that change what comes out."""
    words = command.split() if isinstance(command, str) else list(command)
    words = words[words.index("train.py"):]
    at = words.index("--run")
    kept = words[:at] + words[at + 2:]
    return " ".join(word for word in kept if word not in ("--no-references", "--no-pictures"))


def run_cells(cells: Sequence[Cell], out: Path, work: Path, jobs: int) -> None:
    """Run cells, ``jobs`` at a time, and append what each one found to results.jsonl as soon as it is finished."""
    started, done, failed = time.perf_counter(), 0, []
    # Processes that live on: to start Python and to make the micro-world's rows takes as long as a short cell.
    with Signals() as signals, ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker) as pool:
        waiting, running = list(cells), {}
        try:
            while running or (waiting and not failed):
                while waiting and len(running) < jobs and not failed:
                    cell = waiting.pop(0)
                    running[pool.submit(run_cell, cell, work)] = cell
                finished = wait(running, return_when=FIRST_COMPLETED).done
                with signals.finishing(lambda: None):  # a finished cell is kept before a signal is obeyed
                    for future in finished:
                        cell, error = running.pop(future), future.exception()
                        if error:
                            failed.append(f"{cell.name}: {error} (see {work / cell.folder}/output.txt)")
                            continue
                        records, new = read(out), future.result()
                        before = [r for r in records if r["cell"] == cell.name]  # of a backbone that was made again
                        if any(r.get("weights") != again.get("weights") for r in before for again in new):
                            failed.append(f"{cell.name}: made again it came out otherwise, so new cells could not be "
                                          f"compared with those in {out}/results.jsonl; move that file away")
                            continue
                        write_records(out, [*(r for r in records if r not in before), *new])
                        done += 1
                        left = (time.perf_counter() - started) / done * (len(cells) - done)
                        print(f"  {done:>3}/{len(cells)}  {cell.name:34} ETA {left // 60:.0f}:{left % 60:02.0f}",
                              flush=True)
        except Stopped:
            for worker in active_children():
                worker.terminate()  # a run ends after its step, and its worker for want of others
            pool.shutdown()
            late = [future.result() for future in running if not future.exception()]  # finished just before
            write_records(out, [*read(out), *sum(late, [])])
            raise
    if failed:
        raise RunFailed(f"{len(failed)} of the cells failed, the others are kept; repeat the command to go on. "
                        + "; ".join(failed))


def begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the suite stops its workers itself


def run_cell(cell: Cell, work: Path) -> list[dict]:
    """One run of train.py; its records, one a stage."""
    folder = work / cell.folder
    if folder.exists():
        shutil.rmtree(folder)  # what an interrupted suite left
    folder.mkdir(parents=True)
    for stage in ("base", "multitask") if cell.start else ():
        if (cell.start / stage).exists():
            shutil.copytree(cell.start / stage, folder / stage)
    started = time.perf_counter()
    with open(folder / "output.txt", "w", encoding="utf-8") as output, redirect_stdout(output):
        try:
            train.main(list(cell.command[1:]))
        except Stopped as stop:
            raise RunFailed("stopped") from stop
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
        if result["stage"] == "pretrain":
            record["weights"] = result["weights"]
        elif result["stage"] == "multitask":
            rows = figures.read_metrics(path.parent)
            record["dev"] = best_dev(rows)
            record["first"], record["last"] = ({name: row[name] for name in LOGGED if name in row} for row in
                                               (rows[0], rows[-1]))
        elif result["stage"] == "target":
            best = [best_dev(figures.read_metrics(task)) for task in sorted(path.parent.iterdir()) if task.is_dir()]
            record["dev"] = [statistics.mean(column) for column in zip(*best)]
        records.append(record)
    return records


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
                 "--no-references", "--no-pictures", *suite.options, rates=source_rates(rate))
            for name in methods for i, rate in enumerate(GRIDS[name][0])]


def target_sweep_cells(suite: Suite, records: Sequence[dict], work: Path) -> list[Cell]:
    cells = []
    for name in suite.methods if suite.sweep else ():
        rates, start, sources = chosen(records, name, "sweep-source"), None, ""
        if "multitask" in METHODS[name].stages:
            best = next(r for r in records if r["kind"] == "sweep-source" and r["method"] == name
                        and r["rates"] == rates)
            start, sources = work / best["cell"].replace(" ", "-"), best["cell"].removeprefix(f"sweep {name}")
        cells += [cell(f"sweep {name}{sources} target {i}", "sweep-target", name, SWEEP_SEED, work, "--stage", "target",
                       "--shots", "16", "--no-references", "--no-pictures", *suite.options,
                       rates={**rates, "target_rate": rate}, start=start) for i, rate in enumerate(GRIDS[name][1])]
    return cells


def method_cells(suite: Suite, records: Sequence[dict], work: Path) -> list[Cell]:
    """Methods seed by seed, then variants one by one: whenever it is stopped, what is there can be compared."""
    order = [("method", name, seed, k) for seed in suite.seeds for name, k in suite.methods.items()]
    order += [("variant", name, seed, suite.variant_shots) for name in suite.variants for seed in suite.seeds]
    cells = []
    for kind, name, seed, k in order:
        method = name if kind == "method" else "talora"
        sources = chosen(records, method, "sweep-source")
        rates = sources | chosen(records, method, "sweep-target", sources)
        pretrained = suite.backbones[seed % len(suite.backbones)]
        more = ("--backbone", str(work / f"backbone-{pretrained}" / "pretrain")) if pretrained else ()
        more += ("--variant", name) if kind == "variant" else ()
        more += () if name == "talora" else ("--no-references",)
        cells.append(cell(f"{name} seed {seed}", kind, method, seed, work, "--stage", "all", "--shots", k,
                          "--no-pictures", *more, *suite.options, rates=rates))
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


def chosen(records: Sequence[dict], method: str, kind: str, given: dict | None = None) -> dict[str, float]:
    """The rates with the best development rows: accuracy, and the lower loss among equals; {} without a sweep.

    given: rates that those tried must have, the chosen ones of the sources when a target's is asked for.
    """
    tried = [r for r in records if (r["kind"], r["method"]) == (kind, method)
             and (given or {}).items() <= r["rates"].items()]
    return max(tried, key=lambda r: r["dev"])["rates"] if tried else {}


# ------------------------------------------------------------------------------------------------ from the results

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom, from 1
REFERENCES = ("majority", "frozen backbone", "hard instruction")
SOURCE, REWRITTEN = ("multitask", None, ""), ("multitask", None, ", rewritten")  # (stage, shots, which test rows)


def read(out: Path) -> list[dict]:
    """The records in results.jsonl."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_records(out: Path, records: Iterable[dict]) -> None:
    """All of results.jsonl anew, in one step: a cell's records are all there or none of them is."""
    with atomic(out / "results.jsonl") as file:
        file.writelines((json.dumps(record) + "\n").encode() for record in records)


def target(k: int, rows: str = "") -> tuple:
    return ("target", k, rows)


def by_seed(records: Iterable[dict], column: str, setting: tuple) -> dict[int, float]:
    """Macro average over tasks in percent of a column ("talora", "talora reg-off", "frozen backbone"), by seed."""
    stage, shots, rows = setting
    kind = "variant" if column.startswith("talora ") else "method"  # both have columns such as "theta0 (k = 0)"
    return {r["seed"]: 100 * statistics.mean(r["scores"][column + rows].values()) for r in records
            if (r["kind"], r["stage"], r["shots"]) == (kind, stage, shots) and column + rows in r["scores"]}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (nan for a single value)."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    t = T_975[len(values) - 2] if len(values) <= len(T_975) + 1 else 1.96 + 2.5 / (len(values) - 1)
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def paired(one: dict[int, float], other: dict[int, float]) -> tuple[float, float, int] | None:
    """Mean of one - other over the seeds both have, half its 95 % interval, and their number; None without any."""
    seeds = sorted(one.keys() & other.keys())
    return (*interval([one[s] - other[s] for s in seeds]), len(seeds)) if seeds else None


def verdict(difference: tuple[float, float, int] | None) -> str:
    """Of a paired difference: higher or lower if its 95 % interval leaves out 0, otherwise "no effect seen"."""
    if difference is None or math.isnan(difference[1]):
        return "too few seeds"
    mean, half, _ = difference
    return "higher" if mean - half > 0 else "lower" if mean + half < 0 else "no effect seen"


def shown(values: Sequence[float] | tuple, signed: bool = False) -> str:
    mean, half = values[:2]
    return f"{mean:{'+' if signed else ''}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def label(record: dict) -> str:
    return next(name for name in record["scores"] if name.startswith("talora") or name == record["method"])


def methods_in(records: Iterable[dict], kind: str) -> list[str]:
    """Columns of the methods or variants that have results, in the order of their tables."""
    there = {label(r).removesuffix(", rewritten") for r in records if r["kind"] == kind}
    order = list(METHODS) if kind == "method" else [f"talora {name}" for name in VARIANTS]
    return [name for name in order if name in there]


def shots_in(records: Iterable[dict]) -> list[int]:
    """Numbers of examples that have results, the full data (0) last."""
    return sorted({r["shots"] for r in records if r["kind"] == "method" and r["stage"] == "target"},
                  key=lambda k: k or math.inf)


def numbers_of(records: Iterable[dict], column: str) -> int:
    """Numbers that learn for one target task: what is stored for it; 0 as long as no target is finished."""
    return next((r["numbers"] for r in records if r["stage"] == "target" and column in r["scores"]), 0)


def main_table(records: Sequence[dict]) -> str:
    settings = [SOURCE, REWRITTEN, *map(target, shots_in(records))]
    names = {SOURCE: "sources", REWRITTEN: "sources, rewritten"} | {
        target(k): f"targets, k = {k}" if k else "targets, full" for k in shots_in(records)}
    rows = []
    for column in (*REFERENCES, *methods_in(records, "method")):
        values = [by_seed(records, column, setting) for setting in settings]
        if any(values):
            stored = f"{numbers_of(records, column):,}" if column in METHODS else ""
            cells = [f"{shown(interval(list(v.values())))} ({len(v)})" if v else "" for v in values]
            blind = column in METHODS and "multitask" in METHODS[column].stages and not METHODS[column].per_task
            rows.append([f"**{column}**" if column == "talora" else column + " †" * blind, stored, *cells])
    return table(["method", "stored for a target", *(names[setting] for setting in settings)], rows)


def variant_settings(records: Sequence[dict]) -> dict[str, tuple]:
    ks = sorted({r["shots"] for r in records if r["kind"] == "variant" and r["stage"] == "target"})
    return {"sources": SOURCE, "sources, rewritten": REWRITTEN} | {f"targets, k = {k}": target(k) for k in ks}


SAYS = {"higher": "helps", "lower": "hurts", "no effect seen": "no effect seen", "too few seeds": "one seed"}


def variant_table(records: Sequence[dict]) -> str:
    settings, rows = variant_settings(records), []
    for column in methods_in(records, "variant"):
        cells = []
        for setting in settings.values():
            d = paired(by_seed(records, column, setting), by_seed(records, "talora", setting))
            cells.append(f"{shown(d, signed=True)} ({d[2]}): {SAYS[verdict(d)]}" if d else "")
        rows.append([column.removeprefix("talora "), VARIANTS[column.removeprefix("talora ")].says, *cells])
    return table(["variant", "what is other", *settings], rows)


def task_table(records: Sequence[dict], stage: str, shots: int | None) -> str:
    """Mean over seeds of every task, by method."""
    chosen_ = [r for r in records if r["kind"] == "method" and (r["stage"], r["shots"]) == (stage, shots)]
    columns = [c for c in (*REFERENCES, *methods_in(records, "method")) if any(c in r["scores"] for r in chosen_)]
    tasks = list(next(iter(chosen_[0]["scores"].values())))
    rows = [[task, *(f"{100 * statistics.mean(r['scores'][c][task] for r in chosen_ if c in r['scores']):.1f}"
                     for c in columns)] for task in tasks]
    return table(["task", *columns], rows)


def rate_table(records: Sequence[dict]) -> str:
    """Every rate that was tried; a target's with the chosen rates of the sources."""
    rows = []
    for method in METHODS:
        sources = chosen(records, method, "sweep-source")
        for kind, what, given in (("sweep-source", "sources", {}), ("sweep-target", "targets, k = 16", sources)):
            best, cells, tried = chosen(records, method, kind, given), [], []
            for r in records:
                if (r["kind"], r["method"]) == (kind, method) and given.items() <= r["rates"].items():
                    rates = "/".join(f"{value:g}" for name, value in r["rates"].items() if name not in given)
                    tried.append(max(value for name, value in r["rates"].items() if name not in given))
                    cells.append(f"{rates}: {100 * r['dev'][0]:.1f}" + " (chosen)" * (r["rates"] == best))
            if cells:
                at = tried[[i for i, cell in enumerate(cells) if "chosen" in cell][0]]
                cells[-1] += " *- an end of the grid*" * (at in (min(tried), max(tried)))
                rows.append([method, what, "; ".join(cells)])
    return table(["method", "development rows of", "rate: exact answers"], rows)


def claims(records: Sequence[dict]) -> str:
    """The paper's claims, each with an answer here and the numbers.

    "yes" needs every comparison of a row, "no" one that is against it; a component whose removal is seen to cost
    something in some comparisons and nothing in the others is needed "in part".
    """
    others = [m for m in methods_in(records, "method") if m != "talora"]
    rows = []

    def against(those: list[str], where: str, setting: tuple) -> None:
        found = {m: paired(by_seed(records, "talora", setting), by_seed(records, m, setting)) for m in those}
        found = {m: d for m, d in found.items() if d}
        verdicts = {verdict(d) for d in found.values()}
        if found:
            answer = "yes" if verdicts == {"higher"} else "no" if "lower" in verdicts else "unclear"
            whom = "every baseline" if len(found) == len(those) else f"the {len(found)} baselines that were run there"
            rows.append([f"better than {whom} on {where}", answer, grouped(found, "above", "below")])

    # A method that is not told the task cannot tell apart sources that ask the same and want other answers.
    against([m for m in others if METHODS[m].per_task], "unseen data (rewritten sources; methods that know the task)",
            REWRITTEN)
    for k in shots_in(records):
        against(others, f"unseen tasks, {f'k = {k}' if k else 'full data'}", target(k))
    few = paired(by_seed(records, "talora", target(32)), by_seed(records, "talora", target(0)))
    if few and not math.isnan(few[1]):
        answer = "yes" if few[0] - few[1] > -5 else "no" if few[0] + few[1] < -5 else "unclear"
        rows.append(["32 examples come within 5 points of full data (same steps)", answer, shown(few, signed=True)])
    if others:
        sizes = {m: numbers_of(records, m) for m in ("talora", *others)}
        fewer = [m for m in others if 0 < sizes[m] < sizes["talora"]]
        rows.append(["fewest numbers stored for a task", "no" if fewer else "yes",
                     f"{sizes['talora']:,}" + "".join(f"; {m} {sizes[m]:,}" for m in fewer)])
    for names, part in ((("equal-rates", "rates-swapped"), "a fast and a slow rate (here 4 : 3) are needed"),
                        (("open-gate", "one-softmax"), "zero-initialised attention is needed"),
                        (("reg-off",), "the regulariser (cosine form) is needed")):
        found = {f"{n} ({what})": paired(by_seed(records, f"talora {n}", s), by_seed(records, "talora", s))
                 for n in names for what, s in (("sources", SOURCE), ("rewritten", REWRITTEN), ("k = 8", target(8)))}
        found = {name: d for name, d in found.items() if d}
        if found:
            verdicts = {verdict(d) for d in found.values()}
            answer = ("yes" if verdicts == {"lower"} else "unclear" if {"lower", "higher"} <= verdicts else
                      "in part" if "lower" in verdicts else "no" if "higher" in verdicts else
                      "no effect seen" if verdicts == {"no effect seen"} else "unclear")
            rows.append([part, answer, grouped(found, "better without", "worse without")])
    return table(["claim", "here", "paired differences in points, with 95 % intervals"], rows)


def grouped(found: dict[str, tuple], higher: str, lower: str) -> str:
    """Differences, put together by their verdicts."""
    parts = []
    for group, says in (("higher", higher), ("lower", lower), ("no effect seen", "not told apart"),
                        ("too few seeds", "one seed")):
        members = [f"{name} {shown(d, signed=True)}" for name, d in found.items() if verdict(d) == group]
        parts += [f"*{says}* " + ", ".join(members)] * bool(members)
    return "; ".join(parts)


def write_report(out: Path) -> None:
    """tables.md and the pictures, from results.jsonl alone."""
    records = read(out)
    cells = {r["cell"]: r["seconds"] for r in records}
    commits = ", ".join(sorted({r["commit"] for r in records}))
    began = min(r["started"] for r in records)[:16]
    parts = [f"{len(cells)} cells, {sum(cells.values()) / 3600:.1f} core hours, torch {records[0]['torch']}, begun "
             f"{began}, commits {commits}. Scores in %, macro averages over tasks; mean ± half the 95 % "
             "interval over seeds (number of seeds).\n",
             "**Methods** († one set of weights for all sources, without being told the task)\n", main_table(records),
             "**Which claims hold here** (each comparison at 95 % by itself, not corrected for their number)\n",
             claims(records)]
    if methods_in(records, "variant"):
        parts += ["**Variants of TA-LoRA**, paired differences to it in points, all at its rates\n",
                  variant_table(records)]
    if by_seed(records, "talora", SOURCE):
        parts += ["**Source tasks, by task**\n", task_table(records, "multitask", None)]
    parts += [part for k in shots_in(records) for part in (
        f"**Target tasks, {f'{k} examples' if k else 'full data'}, by task**\n", task_table(records, "target", k))]
    if any(r["kind"].startswith("sweep") for r in records):
        parts += ["**Rates**: tried, with exact answers on development rows in %\n", rate_table(records)]
    with atomic(out / "tables.md") as file:
        file.write("\n".join(parts).encode())
    draw(records, out)


def draw(records: Sequence[dict], out: Path) -> None:
    """fewshot.png, size.png, variants.png, mechanism.png, cosines.png."""
    if shots_in(records):
        figure, axis = figures.new(size=(7, 4.2))
        few_shot(axis, records)
        axis.set_title("From few examples (numbers stored for a task)")
        figures.save(figure, out / "fewshot.png")

        ks = [k for k in (8, 32) if k in shots_in(records)] or shots_in(records)[:1]
        figure, axes = figures.new(1, len(ks), (5.5 * len(ks), 4.2), squeeze=False, sharey=True)
        for axis, k in zip(axes[0], ks):
            figures.sizes_against_scores(axis, sizes(records, k))
            axis.set_title(f"{k} examples of a target task" if k else "all examples of a target task")
        axes[0][0].set_ylabel("score, mean of the target tasks (%)")
        figures.save(figure, out / "size.png")

    variants = methods_in(records, "variant")
    if variants:
        settings = variant_settings(records)
        figure, axes = figures.new(1, len(settings), (11, 1.2 + 0.3 * len(variants)), sharey=True)
        for axis, (title, setting) in zip(axes, settings.items()):
            figures.difference_bars(axis, differences(records, setting))
            axis.set_title(title)
        figures.save(figure, out / "variants.png")

    run = next((r for r in records if r["cell"].startswith("talora seed") and r.get("last")), None)
    if run:
        names = ["talora", *variants]
        figure, axes = figures.new(1, 4, (13, 1.4 + 0.28 * len(names)), sharey=True)
        for axis, (name, title) in zip(axes, (("gates", "gates |tanh g|"), ("theta0_norms", "shared prompt |theta0|"),
                                              ("step_norms", "a task's step |s B A_i|"))):
            figure.colorbar(figures.layer_heat_map(axis, logged(records, name, names)), ax=axis)
            axis.set_title(title)
        figures.mean_and_most(axes[3], alignments(records, names))
        axes[3].set(title="|cos| of two tasks", xlabel="mean (dot) up to largest")
        figures.save(figure, out / "mechanism.png")
        figures.draw_cosines(out / "cosines.png", run["first"], run["last"])


def few_shot(axis, records: Sequence[dict]) -> None:
    """Curves of the methods that have more than three numbers of examples."""
    shots = shots_in(records)
    curves = {}
    for method in methods_in(records, "method"):
        points = {k: interval(list(v.values())) for k in shots if (v := by_seed(records, method, target(k)))}
        if points and (len(points) > 3 or len(shots) < 4):
            curves[f"{method} ({numbers_of(records, method):,})"] = points
    figures.few_shot_curves(axis, shots, curves)


def sizes(records: Sequence[dict], k: int) -> dict[str, tuple[int, float, float]]:
    """Of every method: numbers stored for a task, mean score with k examples, half its interval."""
    scores = {method: by_seed(records, method, target(k)) for method in methods_in(records, "method")}
    return {m: (numbers_of(records, m), *interval(list(values.values()))) for m, values in scores.items() if values}


def differences(records: Sequence[dict], setting: tuple) -> dict[str, tuple[float, float, str]]:
    """Of every variant: points against TA-LoRA, half the interval, verdict."""
    found = {name: paired(by_seed(records, name, setting), by_seed(records, "talora", setting))
             for name in methods_in(records, "variant")}
    return {name.removeprefix("talora "): (*d[:2], verdict(d)) for name, d in found.items() if d}


def last_logged(records: Sequence[dict], name: str, what: str) -> list:
    """What the last step of the multitask stage logged, for every seed that has it."""
    return [r["last"][what] for r in records if r["stage"] == "multitask" and name in r["scores"]
            and r["kind"] in ("method", "variant") and what in r.get("last", ())]


def logged(records: Sequence[dict], what: str, names: Sequence[str]) -> dict[str, list[float]]:
    """What the last step of the multitask stage logged of each layer, mean over seeds; nan where it has none."""
    found = {name: last_logged(records, name, what) for name in names}
    layers = len(next(rows[0] for rows in found.values() if rows))
    return {name.removeprefix("talora "): figures.mean_by_layer(rows) if rows else [math.nan] * layers
            for name, rows in found.items()}


def alignments(records: Sequence[dict], names: Sequence[str]) -> list[tuple[float, float]]:
    """|cos| of every two tasks after the multitask stage, (mean, largest) of each name; means over seeds."""
    found = []
    for name in names:
        seeds = [[c for i, line in enumerate(cosines) for j, c in enumerate(line) if i < j]
                 for cosines in last_logged(records, name, "cosines")]
        found.append(tuple(statistics.mean(map(of, seeds)) if seeds else math.nan for of in (statistics.mean, max)))
    return found


def main(argv: list[str]) -> None:
    parser = Parser(prog="suite.py", description="Run an experiment; python evaluate.py --suite NAME.")
    parser.add_argument("name", help=", ".join(SUITES))
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--out", type=Path, help="folder for the results (default: results/NAME)")
    at = argv.index("--") if "--" in argv else len(argv)
    options, more = parser.parse_args(argv[:at]), argv[at + 1 :]  # behind "--": options of train.py for every cell
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}, but must be at least 1")
    if options.name not in SUITES:
        raise UserError(f"there is no suite '{options.name}'; there are {', '.join(SUITES)}")
    suite, out = with_options(SUITES[options.name], more), options.out or Path("results") / options.name
    work = Path("runs") / "suite" / out.name
    with Lock(work) as lock:
        lock.take()
        run_suite(options.name, suite, out, work, options.jobs)


def with_options(suite: Suite, more: Sequence[str]) -> Suite:
    """The suite with further options of train.py in every cell: other data, another backbone.

    Raises UserError for options that train.py would refuse, and for data without a backbone that reads them.
    """
    asked, _ = parse([*suite.options, *more])
    check(asked, more)
    if asked.data_root and not asked.backbone:
        raise UserError("a suite on other data needs one backbone for all its runs: --backbone PATH (python train.py "
                        f"--stage pretrain --data-root {asked.data_root} makes a small one)")
    return replace(suite, options=(*suite.options, *more), backbones=suite.backbones if not asked.backbone else (0,))


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
