r"""What the results of a suite say: intervals, paired differences, tables, the paper's claims, pictures.

    python -m experiments.report experiments/results/full       tables.md and pictures, from results.jsonl alone

The seed is the unit of statistics: it changes everything that training draws. n seeds give one mean and one interval

    mean +- t(n - 1) * std / sqrt(n),        t: the 97.5 % quantile of Student's t with n - 1 degrees of freedom

Two methods are compared seed by seed, by the interval of their differences. A difference is seen if it excludes 0.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from checkpoint import Parser, UserError, run_program
from evaluate import markdown, new_figure
from experiments import plots
from experiments.compare import METHODS, VARIANTS

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom, from 1
REFERENCES = ("majority", "frozen backbone", "frozen, no template", "hard instruction", "theta0 (k = 0)")
PARTS = {"fast and slow learning rates (here 4 : 3) are needed": ("equal-rates", "rates-swapped"),
         "zero-initialised attention is needed": ("open-gate", "one-softmax"),
         "the regulariser (cosine form) is needed": ("reg-off",)}  # the paper's claim -> the variants without this part

# What a score was measured on: the stage, the examples of a target (0: all there are), and which rows ("" or
# ", rewritten", the end of a column's name).
Setting = tuple[str, int | None, str]
SOURCES, REWRITTEN = ("multitask", None, ""), ("multitask", None, ", rewritten")
TARGETS_REWRITTEN = "target", 32, ", rewritten"


def target(k: int) -> Setting:
    return "target", k, ""


def read_results(folder: Path) -> list[dict]:
    """The records of results.jsonl, one for each run and stage, with record["scores"][column + rows] = {task: score}. A
    column is a method, a variant ("reg-off", in the file "talora reg-off") or a reference. UserError without a file."""
    path = folder / "results.jsonl"
    if not path.exists():
        raise UserError(f"there is no '{path}'; give the folder into which a suite wrote its results")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["scores"] = {name.removeprefix("talora "): score for name, score in record["scores"].items()}
    return records


def select(records: Iterable[dict], column: str, stage: str, shots: int | None = None, rows: str = "") -> list[dict]:
    """The records with results of a column, one a seed; the runs of a sweep are not results."""
    about = "variant" if column in VARIANTS else "method", stage, shots  # both have columns such as "theta0 (k = 0)"
    return [r for r in records if (r["kind"], r["stage"], r["shots"]) == about and column + rows in r["scores"]]


def by_seed(records: Iterable[dict], column: str, setting: Setting) -> dict[int, float]:
    """Macro average over the tasks, in percent, by seed."""
    return {r["seed"]: 100 * statistics.mean(r["scores"][column + setting[2]].values())
            for r in select(records, column, *setting)}


def methods_in(records: Sequence[dict], kind: str = "method") -> list[str]:
    """Names of the methods (or, with the kind "variant", the variants) with results, in the order of their tables."""
    found = {column for r in records if r["kind"] == kind for column in r["scores"]}
    return [name for name in (METHODS if kind == "method" else VARIANTS) if name in found]


def shots_in(records: Iterable[dict], kind: str = "method") -> list[int]:
    """Numbers of examples of a target with results, the full data (0) last."""
    return sorted({r["shots"] for r in records if (r["kind"], r["stage"]) == (kind, "target")}, key=lambda k: k or 1e9)


def settings_in(records: Sequence[dict], kind: str = "method") -> dict[str, Setting]:
    """The settings with results, by their headings."""
    settings = {"sources": SOURCES, "sources, rewritten": REWRITTEN}
    settings |= {f"targets, k = {k}" if k else "targets, full": target(k) for k in shots_in(records, kind)}
    settings["targets, k = 32, rewritten"] = TARGETS_REWRITTEN
    names = methods_in(records, kind)
    return {where: s for where, s in settings.items() if any(by_seed(records, name, s) for name in names)}


def stored(records: Iterable[dict], column: str) -> int:
    """Trainable parameters of one target task, which is all that is stored for it; 0 before any target is finished."""
    return next((r["numbers"] for r in records if r["stage"] == "target" and column in r["scores"]), 0)


def choose_best(records: Iterable[dict], method: str, kind: str) -> dict:
    """The record of a sweep (sweep-source or sweep-target) with the best accuracy, then loss, on development rows."""
    tried = [r for r in records if (r["kind"], r["method"]) == (kind, method)]
    return max(tried, key=lambda r: r["dev"], default={"cell": "", "rates": {}})


Difference = tuple[float, float, int]  # mean, half the width of its 95 % interval, number of seeds


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (nan for a single value)."""
    n = len(values := list(values))
    t = T_975[n - 2] if n < 12 else 1.96 + 2.5 / (n - 1)
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def paired(one: dict[int, float], other: dict[int, float]) -> Difference | None:
    """The difference one - other over the seeds that both have; None for fewer than two, which have no interval."""
    seeds = sorted(one.keys() & other.keys())
    return (*interval(one[s] - other[s] for s in seeds), len(seeds)) if len(seeds) > 1 else None


def compare(records: Sequence[dict], one: str, other: str, setting: Setting) -> Difference | None:
    return paired(by_seed(records, one, setting), by_seed(records, other, setting))


def verdict(difference: Difference) -> str:
    """Is a paired difference seen? "higher" or "lower" if its interval excludes 0."""
    mean, half = difference[:2]
    return "higher" if mean - half > 0 else "lower" if mean + half < 0 else "no effect seen"


def format_interval(values: Sequence[float], signed: bool = False) -> str:
    """(mean, half, ...) as "71.2 ± 3.0", signed as "+1.2 ± 3.0"; of a single value the mean alone."""
    mean, half = values[:2]
    return (f"{mean:+.1f}" if signed else f"{mean:.1f}") + ("" if math.isnan(half) else f" ± {half:.1f}")


def differences(records: Sequence[dict], setting: Setting) -> dict[str, tuple[float, float, str]]:
    """Of every variant: points above TA-LoRA, half the interval, verdict."""
    found = {name: compare(records, name, "talora", setting) for name in methods_in(records, "variant")}
    return {name: (*d[:2], verdict(d)) for name, d in found.items() if d}


def few_shot(records: Sequence[dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """Of the methods that were run at every k: "name (parameters)" -> k -> mean score, half its interval."""
    found = {m: {k: by_seed(records, m, target(k)) for k in shots_in(records)} for m in methods_in(records)}
    return {f"{m} ({stored(records, m):,})": {k: interval(scores.values()) for k, scores in by_k.items()}
            for m, by_k in found.items() if all(by_k.values())}


def main_table(records: Sequence[dict], columns: Sequence[str] = (), settings: dict[str, Setting] | None = None) -> str:
    """One row for each reference and method, one column for each setting; all of them, or those that are given."""
    settings, rows = settings or settings_in(records), []
    for name in columns or (*REFERENCES, *methods_in(records)):
        found = [by_seed(records, name, setting) for setting in settings.values()]
        if any(found):
            cells = [f"{format_interval(interval(v.values()))} ({len(v)})" if v else "" for v in found]
            method = METHODS.get(name)
            label = "**talora**" if name == "talora" else name
            label += " †" if method and "multitask" in method.learns and not method.per_task else ""
            rows.append([label, f"{stored(records, name):,}" if method else "", *cells])
    return markdown(["method", "parameters stored for a target", *settings], rows)


def variant_table(records: Sequence[dict]) -> str:
    settings, rows = settings_in(records, "variant"), []
    for name in methods_in(records, "variant"):
        found = [compare(records, name, "talora", setting) for setting in settings.values()]
        cells = [f"{format_interval(d, signed=True)} ({d[2]}): {verdict(d)}" if d else "" for d in found]
        rows.append([name, VARIANTS[name].says.replace("|", r"\|"), *cells])
    return markdown(["variant", "what is changed", *settings], rows, align="<<" + ">" * len(settings))


def task_table(records: Sequence[dict], setting: Setting) -> str:
    """Mean over the seeds for every task, by method."""
    columns = {name: scores for name in (*REFERENCES, *methods_in(records))
               if (scores := [r["scores"][name + setting[2]] for r in select(records, name, *setting)])}
    rows = [[task, *(f"{100 * statistics.mean(score[task] for score in scores):.1f}" for scores in columns.values())]
            for task in next(iter(columns.values()), [{}])[0]]
    return markdown(["task", *columns], rows)


def search_table(records: Sequence[dict]) -> str:
    """All learning rates that were tried, and what they reach on development rows; in bold those that were chosen."""
    rows, tried = [], [r for r in records if r["kind"].startswith("sweep")]
    for r in sorted(tried, key=lambda r: (r["method"], r["kind"], sorted(r["rates"].items()))):
        rates = ", ".join(f"{name.removesuffix('_rate')} {value:g}" for name, value in sorted(r["rates"].items()))
        rates = f"**{rates}**" if r is choose_best(records, r["method"], r["kind"]) else rates
        right, loss = r["dev"]
        rows.append([r["method"], f"{r['kind'].removeprefix('sweep-')}s", rates, f"{100 * right:.1f}", f"{-loss:.3f}"])
    head = ["method", "trained on", "learning rates", "development rows right, %", "loss"]
    return markdown(head, rows, align="<<<>>")


def claims(records: Sequence[dict]) -> str:
    """The paper's claims that these results say something about: an answer, and the numbers behind it."""
    baselines, rows = [m for m in methods_in(records) if m != "talora"], []
    for where, setting in settings_in(records).items():
        # A method that is not told the task cannot tell apart sources that want other answers.
        against = [m for m in baselines if METHODS[m].per_task or setting != REWRITTEN]
        found = {m: d for m in against if (d := compare(records, "talora", m, setting))}
        if found and setting != SOURCES:
            n = len(found)
            some = f"the {n} baselines that were run there" if n > 1 else f"{[*found][0]} (no other yet)"
            whom = "every baseline" if n == len(against) else some
            told = " (those that are told the task)" if setting == REWRITTEN else ""
            rows.append([f"better than {whom} on {where}{told}", *judge(found, {"higher": "above", "lower": "below"})])
    found = {f"({where})": d for where, setting in settings_in(records).items()
             if (d := compare(records, "talora", "frozen backbone", setting))}
    if found:
        rows.append(["better than the frozen backbone", *judge(found, {"higher": "above", "lower": "below"})])
    if few := paired(by_seed(records, "talora", target(32)), by_seed(records, "talora", target(0))):
        answer = "yes" if few[0] - few[1] > -5 else "no" if few[0] + few[1] < -5 else "unclear"
        rows.append(["32 examples come within 5 points of full data (same steps)", answer, format_interval(few, True)])
    if baselines and (size := stored(records, "talora")):
        fewer = "".join(f"; {m} {stored(records, m):,}" for m in baselines if 0 < stored(records, m) < size)
        rows.append(["fewest trainable parameters stored for a target", "no" if fewer else "yes", f"{size:,}{fewer}"])
    for claim, without in PARTS.items():
        found = {f"{name} ({where})": d for where, setting in settings_in(records, "variant").items()
                 for name in without if (d := compare(records, name, "talora", setting))}
        if found:
            rows.append([claim, *judge(found, {"lower": "worse without", "higher": "better without"})])
    return markdown(["claim", "here", "paired differences in points, with 95 % intervals"], rows, align="<<<")


def judge(found: dict[str, Difference], words: dict[str, str]) -> tuple[str, str]:
    """An answer, and the differences by verdict; words: what to call the claimed verdict and, second, its opposite."""
    words = words | {"no effect seen": "no difference seen"}
    groups = {says: [f"{name} {format_interval(d, signed=True)}" for name, d in found.items() if verdict(d) == group]
              for group, says in words.items()}
    claimed, against, neither = groups.values()
    answer = "no" if against else "no effect seen" if not claimed else "in part" if neither else "yes"
    return answer, "; ".join(f"*{says}* " + ", ".join(members) for says, members in groups.items() if members)


ABOUT = """Scores in %, macro averages over tasks; mean ± half the 95 % interval over seeds (number of seeds). † one set
of weights for all source tasks, not told which task a row belongs to. Each comparison is at 95 % by itself, not
corrected for their number. Variants have TA-LoRA's learning rates and are compared with it seed by seed, in points."""


def build_tables(records: Sequence[dict]) -> dict[str, str]:
    """Every table that these results can fill, by its title."""
    tables = {"Methods": main_table(records), "Claims of the paper": claims(records),
              "Variants of TA-LoRA": variant_table(records)}
    tables |= {f"By task: {where}": task_table(records, setting) for where, setting in settings_in(records).items()}
    tables["Learning rates tried"] = search_table(records)
    return {title: table for title, table in tables.items() if table.count("\n") > 2}  # more than a head


def write_report(folder: Path) -> None:
    """tables.md and the pictures, from results.jsonl alone. UserError if there is no result yet."""
    records = read_results(folder)
    if not records:
        raise UserError(f"no run in '{folder}' is finished yet; repeat this command later")
    tables, seconds = build_tables(records), {r["cell"]: r["seconds"] for r in records}
    began, commits = min(r["started"] for r in records)[:16], ", ".join(sorted({r["commit"] for r in records}))
    head = (f"{len(seconds)} runs of {sum(seconds.values()) / 3600:.1f} hours in all, torch {records[0]['torch']}, "
            f"begun {began}, commits {commits}.")
    parts = [f"{head}\n{ABOUT}\n", *(f"## {title}\n\n{table}" for title, table in tables.items())]
    (folder / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    draw_pictures(folder, records)


def draw_pictures(folder: Path, records: Sequence[dict]) -> None:
    """Those that show something: curves of two points, differences, tasks to be alike."""
    shots, curves, variants = shots_in(records), few_shot(records), methods_in(records, "variant")
    bars = {where: differences(records, s) for where, s in settings_in(records, "variant").items()}
    if len(shots) > 1 and curves:
        with new_figure(folder / "fewshot.png", size=(7, 4.2)) as (_, axis):
            plots.few_shot_curves(axis, shots, curves)
            axis.set_title("A new task from few examples")
    if any(bars.values()):
        plots.draw_differences(folder / "variants.png", bars)
    logged = {name: [r["last"] for r in rows] for name in ("talora", *variants)
              if (rows := select(records, name, "multitask"))}
    if "cosines" in logged.get("talora", [{}])[0]:  # not for a single source
        plots.draw_mechanism(folder / "mechanism.png", logged)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.report", description="Tables and pictures from a suite's results.")
    parser.add_argument("folder", type=Path, help="where a suite wrote results.jsonl")
    folder = parser.parse_args(argv).folder
    write_report(folder)
    print((folder / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
