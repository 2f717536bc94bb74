r"""What the results of a suite say: intervals, paired differences, tables, the paper's claims, pictures.

    python -m experiments.report experiments/results/full       tables.md and pictures, from results.jsonl alone

The seed is the unit of statistics. It changes everything that training draws: the initial weights, the order of the
batches, the k examples and the backbone (separately pretrained ones take turns). n seeds give one mean and one interval

    mean +- t(n - 1) * std / sqrt(n),        t: the 97.5 % quantile of Student's t with n - 1 degrees of freedom

Two methods are compared seed by seed: what counts is the interval of their differences. A difference is seen if its
interval excludes 0. The intervals hold for these test rows and for backbones like these; with fewer backbones than
seeds the seeds are not quite independent, and the intervals somewhat too narrow.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint import Parser, UserError, run_program, write_whole
from evaluate import draw_cosines, markdown
from experiments import plots
from experiments.compare import METHODS, VARIANTS

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom, from 1
REFERENCES = ("majority", "frozen backbone", "hard instruction")


class Setting(NamedTuple):
    """What a score was measured on: which stage, how many examples of a target (0: all), which test rows."""

    stage: str
    shots: int | None = None
    rows: str = "plain"


SOURCES, REWRITTEN = Setting("multitask"), Setting("multitask", rows="rewritten")


def target(k: int) -> Setting:
    return Setting("target", k)


# ------------------------------------------------------------------------------------------------ reading, selecting

def read_results(folder: Path) -> list[dict]:
    """The records of results.jsonl, one for each run and stage; UserError if there is no such file.

    In the file the name of a column says whose it is and which rows it is about: "talora reg-off, rewritten". Here
    record["scores"][column][rows] = {task: score}, where column is a method ("talora"), a variant ("reg-off") or a
    reference ("majority"), and rows is "plain" or "rewritten".
    """
    path = folder / "results.jsonl"
    if not path.exists():
        raise UserError(f"there is no '{path}'; give the folder into which a suite wrote its results")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        scores: dict[str, dict[str, dict[str, float]]] = {}
        for name, by_task in record["scores"].items():
            column, comma, _ = name.partition(", rewritten")
            scores.setdefault(column.removeprefix("talora "), {})["rewritten" if comma else "plain"] = by_task
        record["scores"] = scores
    return records


def select(records: Iterable[dict], column: str, stage: str, shots: int | None = None) -> list[dict]:
    """The records with results of a column, one a seed; the runs of a sweep are not results."""
    kind = "variant" if column in VARIANTS else "method"  # both have columns such as "theta0 (k = 0)"
    return [r for r in records if (r["kind"], r["stage"], r["shots"]) == (kind, stage, shots) and column in r["scores"]]


def by_seed(records: Iterable[dict], column: str, setting: Setting) -> dict[int, float]:
    """Macro average over the tasks, in percent, by seed."""
    return {r["seed"]: 100 * statistics.mean(r["scores"][column][setting.rows].values())
            for r in select(records, column, setting.stage, setting.shots) if setting.rows in r["scores"][column]}


def methods_in(records: Sequence[dict], kind: str = "method") -> list[str]:
    """Names of the methods (or, with the kind "variant", the variants) with results, in the order of their tables."""
    found = {column for r in records if r["kind"] == kind for column in r["scores"]}
    return [name for name in (METHODS if kind == "method" else VARIANTS) if name in found]


def shots_in(records: Iterable[dict], kind: str = "method") -> list[int]:
    """Numbers of examples of a target with results, the full data (0) last."""
    return sorted({r["shots"] for r in records if (r["kind"], r["stage"]) == (kind, "target")}, key=lambda k: k or 1e9)


def settings_in(records: Iterable[dict], kind: str = "method") -> dict[str, Setting]:
    """The settings with results, by their headings."""
    targets = {f"targets, k = {k}" if k else "targets, full": target(k) for k in shots_in(records, kind)}
    return {"sources": SOURCES, "sources, rewritten": REWRITTEN} | targets


def stored(records: Iterable[dict], column: str) -> int:
    """Trainable parameters of one target task, which is all that is stored for it; 0 before any target is finished."""
    return next((r["numbers"] for r in records if r["stage"] == "target" and column in r["scores"]), 0)


def choose_rates(records: Iterable[dict], method: str, kind: str, given: dict | None = None) -> dict[str, float]:
    """The learning rates of a sweep that did best on development rows (accuracy, then loss); {} without a sweep.

    kind: "sweep-source" or "sweep-target"; given: rates that all candidates share, those chosen for the sources.
    """
    tried = [r for r in records if (r["kind"], r["method"]) == (kind, method)
             and (given or {}).items() <= r["rates"].items()]
    return max(tried, key=lambda r: r["dev"])["rates"] if tried else {}


# ------------------------------------------------------------------------------------------------------- statistics

Difference = tuple[float, float, int]  # mean, half the width of its 95 % interval, number of seeds


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (nan for a single value)."""
    values = list(values)
    n = len(values)
    if n < 2:
        return statistics.mean(values), math.nan
    t = T_975[n - 2] if n - 2 < len(T_975) else 1.96 + 2.5 / (n - 1)
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def paired(one: dict[int, float], other: dict[int, float]) -> Difference | None:
    """The difference one - other over the seeds that both have; None without any."""
    seeds = sorted(one.keys() & other.keys())
    return (*interval(one[s] - other[s] for s in seeds), len(seeds)) if seeds else None


def verdict(difference: Difference | None) -> str:
    """Is a paired difference seen? "higher" or "lower" if its interval excludes 0, otherwise "no effect seen"."""
    if difference is None or math.isnan(difference[1]):
        return "too few seeds"
    mean, half, _ = difference
    return "higher" if mean - half > 0 else "lower" if mean + half < 0 else "no effect seen"


def format_interval(values: Sequence[float], signed: bool = False) -> str:
    """(mean, half, ...) as "71.2 ± 3.0", signed as "+1.2 ± 3.0"."""
    mean, half = values[:2]
    return (f"{mean:+.1f}" if signed else f"{mean:.1f}") + ("" if math.isnan(half) else f" ± {half:.1f}")


def differences(records: Sequence[dict], setting: Setting) -> dict[str, tuple[float, float, str]]:
    """Of every variant: points above TA-LoRA, half the interval, verdict."""
    talora = by_seed(records, "talora", setting)
    found = {name: paired(by_seed(records, name, setting), talora) for name in methods_in(records, "variant")}
    return {name: (d[0], d[1], verdict(d)) for name, d in found.items() if d}


def sizes(records: Sequence[dict], k: int) -> dict[str, tuple[int, float, float]]:
    """Of every method: parameters stored for a target task, mean score with k examples, half its interval."""
    scores = {method: by_seed(records, method, target(k)) for method in methods_in(records)}
    return {m: (stored(records, m), *interval(values.values())) for m, values in scores.items() if values}


def few_shot(records: Sequence[dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """Of the methods that were run at every k: "name (parameters)" -> k -> mean score, half its interval."""
    curves = {}
    for method in methods_in(records):
        found = {k: by_seed(records, method, target(k)) for k in shots_in(records)}
        if all(found.values()):
            curves[f"{method} ({stored(records, method):,})"] = {k: interval(v.values()) for k, v in found.items()}
    return curves


# ----------------------------------------------------------------------------------------------------------- tables

def main_table(records: Sequence[dict], columns: Sequence[str] = (), settings: dict[str, Setting] | None = None) -> str:
    """One row for each reference and method, one column for each setting; all of them, or those that are given."""
    settings, rows = settings or settings_in(records), []
    for name in columns or (*REFERENCES, *methods_in(records)):
        found = [by_seed(records, name, setting) for setting in settings.values()]
        if any(found):
            cells = [f"{format_interval(interval(v.values()))} ({len(v)})" if v else "" for v in found]
            method = METHODS.get(name)
            not_told = method is not None and "multitask" in method.learns and not method.per_task
            label = "**talora**" if name == "talora" else f"{name} †" if not_told else name
            rows.append([label, f"{stored(records, name):,}" if method else "", *cells])
    return markdown(["method", "parameters stored for a target", *settings], rows)


def variant_table(records: Sequence[dict]) -> str:
    words = {"higher": "helps", "lower": "hurts", "no effect seen": "no effect seen", "too few seeds": "one seed"}
    settings, rows = settings_in(records, "variant"), []
    for name in methods_in(records, "variant"):
        found = [paired(by_seed(records, name, s), by_seed(records, "talora", s)) for s in settings.values()]
        cells = [f"{format_interval(d, signed=True)} ({d[2]}): {words[verdict(d)]}" if d else "" for d in found]
        rows.append([name, VARIANTS[name].says.replace("|", r"\|"), *cells])
    return markdown(["variant", "what is changed", *settings], rows, align="<<" + ">" * len(settings))


def task_table(records: Sequence[dict], setting: Setting) -> str:
    """Mean over the seeds for every task, by method."""
    columns = {name: [r["scores"][name][setting.rows] for r in select(records, name, setting.stage, setting.shots)]
               for name in (*REFERENCES, *methods_in(records))}
    columns = {name: scores for name, scores in columns.items() if scores}
    rows = [[task, *(f"{100 * statistics.mean(score[task] for score in scores):.1f}" for scores in columns.values())]
            for task in next(iter(columns.values()))[0]]
    return markdown(["task", *columns], rows)


def rate_table(records: Sequence[dict]) -> str:
    """Every learning rate that was tried; a target's with the chosen ones of the sources."""
    rows = []
    for method in METHODS:
        sources = choose_rates(records, method, "sweep-source")
        for kind, where, given in (("sweep-source", "sources", {}), ("sweep-target", "targets, k = 16", sources)):
            best, cells = choose_rates(records, method, kind, given), []
            for r in records:
                if (r["kind"], r["method"]) == (kind, method) and given.items() <= r["rates"].items():
                    rates = "/".join(f"{rate:g}" for name, rate in r["rates"].items() if name not in given)
                    cells.append(f"{rates}: {100 * r['dev'][0]:.1f}{' (chosen)' if r['rates'] == best else ''}")
            if cells:
                rows.append([method, where, "; ".join(cells)])
    return markdown(["method", "development rows of", "learning rate: exact answers"], rows, align="<<<")


# ----------------------------------------------------------------------------------------------------------- claims

def claims(records: Sequence[dict]) -> str:
    """The paper's claims, each with an answer for these results and the numbers behind it."""
    rows = [*claims_against_baselines(records), *claims_about_parts(records)]
    return markdown(["claim", "here", "paired differences in points, with 95 % intervals"], rows, align="<<<")


def claims_against_baselines(records: Sequence[dict]) -> list[list[str]]:
    """Is TA-LoRA better, and with less? "yes" needs every comparison of a row, "no" one that is against it."""
    baselines = [m for m in methods_in(records) if m != "talora"]
    told = [m for m in baselines if METHODS[m].per_task]  # others cannot tell apart sources that want other answers
    settings = {"unseen data (rewritten sources; methods that are told the task)": (REWRITTEN, told)}
    settings |= {f"unseen tasks, {f'k = {k}' if k else 'full data'}": (target(k), baselines) for k in shots_in(records)}
    rows = []
    for where, (setting, against) in settings.items():
        talora = by_seed(records, "talora", setting)
        found = {m: d for m in against if (d := paired(talora, by_seed(records, m, setting)))}
        if found:
            verdicts = {verdict(d) for d in found.values()}
            answer = "yes" if verdicts == {"higher"} else "no" if "lower" in verdicts else "unclear"
            whom = "every baseline" if len(found) == len(against) else f"the {len(found)} baselines that were run there"
            rows.append([f"better than {whom} on {where}", answer, group_by_verdict(found, "above", "below")])
    few = paired(by_seed(records, "talora", target(32)), by_seed(records, "talora", target(0)))
    if few and not math.isnan(few[1]):
        answer = "yes" if few[0] - few[1] > -5 else "no" if few[0] + few[1] < -5 else "unclear"
        rows.append(["32 examples come within 5 points of full data (same steps)", answer, format_interval(few, True)])
    if baselines:
        size = stored(records, "talora")
        fewer = [f"; {m} {stored(records, m):,}" for m in baselines if 0 < stored(records, m) < size]
        rows.append(["fewest trainable parameters stored for a target", "no" if fewer else "yes",
                     f"{size:,}" + "".join(fewer)])
    return rows


def claims_about_parts(records: Sequence[dict]) -> list[list[str]]:
    """Is a component needed? "in part" if removing it costs something in some comparisons and nothing in the others."""
    parts = {"fast and slow learning rates (here 4 : 3) are needed": ("equal-rates", "rates-swapped"),
             "zero-initialised attention is needed": ("open-gate", "one-softmax"),
             "the regulariser (cosine form) is needed": ("reg-off",)}
    settings, rows = {"sources": SOURCES, "rewritten": REWRITTEN, "k = 8": target(8)}, []
    for claim, without in parts.items():
        found = {f"{name} ({where})": d for name in without for where, setting in settings.items()
                 if (d := paired(by_seed(records, name, setting), by_seed(records, "talora", setting)))}
        if found:
            verdicts = {verdict(d) for d in found.values()}
            answer = ("yes" if verdicts == {"lower"} else "unclear" if {"lower", "higher"} <= verdicts else
                      "in part" if "lower" in verdicts else "no" if "higher" in verdicts else
                      "no effect seen" if verdicts == {"no effect seen"} else "unclear")
            rows.append([claim, answer, group_by_verdict(found, "better without", "worse without")])
    return rows


def group_by_verdict(found: dict[str, Difference], higher: str, lower: str) -> str:
    """Differences, listed by their verdicts."""
    words = {"higher": higher, "lower": lower, "no effect seen": "no difference seen", "too few seeds": "one seed"}
    groups = {says: [f"{name} {format_interval(d, signed=True)}" for name, d in found.items() if verdict(d) == group]
              for group, says in words.items()}
    return "; ".join(f"*{says}* " + ", ".join(members) for says, members in groups.items() if members)


# ----------------------------------------------------------------------------------------------------------- report

ABOUT = """Scores in %, macro averages over tasks; mean ± half the 95 % interval over seeds (number of seeds). † one set
of weights for all source tasks, not told which task a row belongs to. Each comparison is at 95 % by itself, not
corrected for their number. Variants have TA-LoRA's learning rates and are compared with it seed by seed, in points."""


def build_tables(records: Sequence[dict]) -> dict[str, str]:
    """Every table that these results can fill, by its title."""
    tables = {"Methods": main_table(records), "Claims of the paper": claims(records)}
    if methods_in(records, "variant"):
        tables["Variants of TA-LoRA"] = variant_table(records)
    if by_seed(records, "talora", SOURCES):
        tables["Source tasks, by task"] = task_table(records, SOURCES)
    for k in shots_in(records):
        tables[f"Target tasks, {f'{k} examples' if k else 'full data'}, by task"] = task_table(records, target(k))
    if any(r["kind"] == "sweep-target" for r in records):
        tables["Learning rates tried, exact answers on development rows in %"] = rate_table(records)
    return tables


def write_report(folder: Path) -> None:
    """tables.md and the pictures, from results.jsonl alone."""
    records = read_results(folder)
    seconds = {r["cell"]: r["seconds"] for r in records}
    head = (f"{len(seconds)} runs in {sum(seconds.values()) / 3600:.1f} core hours, torch {records[0]['torch']}, begun "
            f"{min(r['started'] for r in records)[:16]}, commits {', '.join(sorted({r['commit'] for r in records}))}.")
    parts = [f"{head}\n{ABOUT}\n", *(f"## {title}\n\n{table}" for title, table in build_tables(records).items())]
    with write_whole(folder / "tables.md") as file:
        file.write("\n".join(parts).encode())

    shots, variants = shots_in(records), methods_in(records, "variant")
    if shots:
        plots.draw_few_shot(folder / "fewshot.png", shots, few_shot(records))
        ks = [k for k in (8, 32) if k in shots] or shots[:1]
        plots.draw_sizes(folder / "size.png", {k: sizes(records, k) for k in ks})
    if variants:
        found = {where: differences(records, setting) for where, setting in settings_in(records, "variant").items()}
        plots.draw_variants(folder / "variants.png", found)
    logged = {name: select(records, name, "multitask") for name in ("talora", *variants)}
    if logged["talora"] and "cosines" in logged["talora"][0].get("last", ()):
        rows = {name: [r["last"] for r in runs if "last" in r] for name, runs in logged.items()}
        plots.draw_mechanism(folder / "mechanism.png", rows)
        draw_cosines(folder / "cosines.png", logged["talora"][0]["first"], logged["talora"][0]["last"])


def fill_tables(page: str, tables: dict[str, str]) -> str:
    """A page with all text between <!-- tables: TITLE --> and <!-- end of tables --> replaced by the tables."""
    return re.sub(r"(<!-- tables: (.*?) -->\n).*?(<!-- end of tables -->)",
                  lambda found: found[1] + tables[found[2]] + found[3], page, flags=re.DOTALL)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.report", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where a suite wrote results.jsonl")
    parser.add_argument("--page", type=Path, help="a Markdown page whose marked tables are replaced, too")
    options = parser.parse_args(argv)
    write_report(options.folder)
    if options.page:
        page = fill_tables(options.page.read_text(encoding="utf-8"), build_tables(read_results(options.folder)))
        with write_whole(options.page) as file:
            file.write(page.encode())
    print((options.folder / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
