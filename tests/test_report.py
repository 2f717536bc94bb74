"""What is made of results: intervals, tables and claims of hand-made records, and the committed tables themselves."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from checkpoint import UserError
from experiments import bench, plots, report
from experiments.compare import METHODS, VARIANTS
from experiments.report import REWRITTEN, SOURCES, by_seed, interval, paired, target, verdict
from model import TALoRAConfig, load_backbone

FOLDER = Path(report.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def record(column, seed, score, stage="multitask", shots=None, kind="method", rewritten=None, numbers=544, **more):
    """A line of results.jsonl, with the column names that read_results makes: "talora", "reg-off"."""
    scores = {column: {"x": score / 100, "y": score / 100},
              f"{column}, rewritten": {"x": (score if rewritten is None else rewritten) / 100, "y": score / 100}}
    return {"cell": f"{column} seed {seed}", "kind": kind, "method": column, "seed": seed, "rates": {},
            "stage": stage, "shots": shots, "numbers": numbers, "scores": scores, "seconds": 60, "command": "c",
            "commit": "abc", "torch": "2", "started": "2026-01-01 00:00:00", "dev": [0.5, -1.0], **more}


def seeds(column, scores, *rest, **more):
    return [record(column, seed, score, *rest, **more) for seed, score in enumerate(scores)]


def write(folder, records):
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_intervals_are_students():
    assert interval([3.0, 5.0, 4.0, 8.0]) == (5.0, pytest.approx(3.182 * statistics.stdev([3, 5, 4, 8]) / 2))
    assert interval([7.0])[0] == 7.0 and math.isnan(interval([7.0])[1])
    expected = 2.0227 * statistics.stdev(range(40)) / math.sqrt(40)  # t of 39 degrees of freedom, beyond the table
    assert interval(range(40))[1] == pytest.approx(expected, rel=0.01)


def test_differences_are_paired_by_seed_and_judged_by_their_interval():
    talora = {0: 80.0, 1: 60.0, 2: 70.0, 7: 10.0}
    mean, half, n = paired({0: 82.0, 1: 62.5, 2: 71.5, 9: 99.0}, talora)
    assert (mean, n) == (2.0, 3) and half == pytest.approx(4.303 * 0.5 / math.sqrt(3))
    assert verdict((mean, half, n)) == "higher" and verdict((-mean, half, n)) == "lower"
    assert verdict((1.0, half, n)) == "no effect seen"
    assert paired({0: 81.0}, talora) is None and paired({5: 1.0}, talora) is None, "one seed has no interval"


def test_names_in_the_file_become_columns_and_scores_are_macro_averages(tmp_path):
    write(tmp_path, [record("talora", 0, 90, rewritten=70), record("talora reg-off", 0, 60, kind="variant"),
                     record("talora", 0, 50, "target", 8), record("talora", 1, 40, "target", 8),
                     record("talora", 3, 99, "target", 8, kind="sweep-target")])
    records = report.read_results(tmp_path)
    assert records[0]["scores"] == {"talora": {"x": 0.9, "y": 0.9}, "talora, rewritten": {"x": 0.7, "y": 0.9}}
    assert by_seed(records, "talora", SOURCES) == {0: 90} and by_seed(records, "talora", REWRITTEN) == {0: 80}
    assert by_seed(records, "reg-off", SOURCES) == {0: 60} and by_seed(records, "talora", target(32)) == {}
    assert by_seed(records, "talora", target(8)) == {0: 50, 1: 40}, "a sweep is not a result"
    with pytest.raises(UserError, match="there is no 'nowhere/results.jsonl'"):
        report.read_results(Path("nowhere"))
    write(tmp_path, [])
    with pytest.raises(UserError, match="no run in .* is finished yet"):
        report.write_report(tmp_path)


BEFORE = {"step": 0, "tasks": ["a", "b"], "cosines": [[1, 0.1], [0.1, 1]]}
AFTER = {"step": 9, "gates": [-0.1, 0.2], "theta0_norms": [3, 4], "step_norms": [1, 2],
         "tasks": ["a", "b"], "cosines": [[1, 0.2], [0.2, 1]]}
RECORDS = [*seeds("talora", (90, 91, 92), rewritten=80, first=BEFORE, last=AFTER),
           *seeds("lora", (95, 96, 98), numbers=14336, last={"step": 9}),
           *seeds("talora", (60, 62, 61), "target", 8), *seeds("lora", (50, 51, 53), "target", 8, numbers=14336),
           *seeds("pt", (60, 61, 63), "target", 8, numbers=512), *seeds("talora", (72, 73, 73.5), "target", 0),
           *seeds("talora", (70, 71, 72), "target", 32, rewritten=50),
           *seeds("open-gate", (85, 86, 86.5), kind="variant", last={**AFTER, "gates": [1, 1]}),
           *seeds("open-gate", (60, 62, 61), "target", 8, kind="variant"),
           record("lora", 100, 9, kind="sweep-source", rates={"prompt_rate": 0.1}, dev=[0.5, -1])]


def row_of(table, name):
    return next([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
                if line.startswith((f"| {name} |", f"| **{name}** |")))


def test_tables_hold_means_intervals_and_counts():
    table = report.main_table(RECORDS)
    assert row_of(table, "talora")[1:4] == ["544", "91.0 ± 2.5 (3)", "85.5 ± 1.2 (3)"]
    assert row_of(table, "talora")[-1] == "60.5 ± 1.2 (3)" and "targets, k = 32, rewritten |\n" in table
    assert row_of(table, "pt") == ["pt", "512", "", "", "61.3 ± 3.8 (3)", *[""] * 3] and "lora †" in table
    variants = row_of(report.variant_table(RECORDS), "open-gate")
    assert variants[1] == VARIANTS["open-gate"].says and variants[2] == "-5.2 ± 0.7 (3): lower"
    assert variants[4] == "+0.0 ± 0.0 (3): no effect seen"
    assert row_of(report.task_table(RECORDS, target(8)), "x") == ["x", "61.0", "61.3", "51.3"]


def test_claims_are_answered_by_the_numbers():
    def answers(records):
        rows = [[cell.strip() for cell in line.split("|")] for line in report.claims(records).splitlines()[2:]]
        return {row[1]: row[2:4] for row in rows}

    found = answers(RECORDS)
    assert not any("rewritten" in claim for claim in found), "lora is not told the task: no comparison on sources"
    answer, numbers = found["better than every baseline on targets, k = 8"]
    assert answer == "in part" and numbers.startswith("*above* lora +9.7 ± ") and "*no difference seen* pt" in numbers
    assert found["32 examples come within 5 points of full data (same steps)"][0] == "yes"
    assert found["fewest trainable parameters stored for a target"] == ["no", "544; pt 512"]
    assert found["zero-initialised attention is needed"][0] == "in part", "the sources say so, k = 8 does not"
    told = answers([*RECORDS, *seeds("deep-mpt", (95, 96, 98), rewritten=85, numbers=576)])
    answer, numbers = next(found for claim, found in told.items() if "rewritten" in claim)
    assert answer == "no" and numbers.startswith("*below* deep-mpt -")


def test_the_report_is_made_of_whatever_is_finished(tmp_path):
    """As in the suite "qwen": first a sweep, then methods with one seed, then a variant with two; and much more."""
    def plain(*records, **more):
        return [r | {"scores": {c: s for c, s in r["scores"].items() if "rewritten" not in c} | more} for r in records]

    sweep = plain(record("talora", 100, 9, kind="sweep-source"), record("talora", 100, 9, "target", 32, "sweep-target"))
    one = plain(record("talora", 0, 70, first=BEFORE, last=AFTER), record("talora", 0, 60, "target", 32),
                **dict.fromkeys(("frozen backbone", "frozen, no template"), {"x": 0.5, "y": 0.4}))
    lora = plain(record("lora", 0, 62, "target", 32, numbers=14336))
    two = plain(record("talora", 1, 72, first=BEFORE, last=AFTER), record("talora", 1, 61, "target", 32),
                *seeds("reg-off", (70, 71), kind="variant", last=AFTER))
    some = {"Methods", "Claims of the paper", "Learning rates tried"}
    every = some | {"Variants of TA-LoRA"}
    for records, titles, pictures in (
            (sweep, {"Learning rates tried"}, set()), (sweep + one + lora, some, {"mechanism"}),
            (sweep + one + lora + two, every, {"mechanism", "variants"}),
            (RECORDS, every, {"mechanism", "variants", "fewshot"})):
        write(tmp_path, records)
        report.main([str(tmp_path)])
        tables = report.build_tables(records)
        assert all(table in (tmp_path / "tables.md").read_text() for table in tables.values())
        assert {title for title in tables if "By task" not in title} == titles
        assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    tables = report.build_tables(sweep + one + lora + two)
    assert row_of(report.main_table(one + lora), "talora") == ["**talora**", "544", "70.0 (1)", "60.0 (1)"]
    assert row_of(tables["Methods"], "frozen, no template")[2:] == ["45.0 (1)", "45.0 (1)"]
    assert row_of(tables["Variants of TA-LoRA"], "reg-off")[2] == "-0.5 ± 6.4 (2): no effect seen"
    assert "lora" not in tables["Claims of the paper"].replace("talora", ""), "one seed is no comparison"
    frozen = plain(*seeds("talora", (70, 72)), **{"frozen backbone": {"x": 0.5, "y": 0.4}})
    assert "| better than the frozen backbone | yes | *above* (sources) +26.0 ± 12.7 |" in report.claims(frozen)
    tries = [record("lora", 100, 9, kind="sweep-source", rates={"prompt_rate": rate}, dev=[0.4, -loss])
             for rate, loss in ((0.1, 0.5), (0.003, 0.25), (0.02, 0.75))]
    assert re.findall(r"prompt [^|]* \| 40.0 \| 0[.\d]*", report.search_table(tries)) == [
        "prompt 0.003** | 40.0 | 0.250", "prompt 0.02 | 40.0 | 0.750", "prompt 0.1 | 40.0 | 0.500"]


def test_the_pictures_show_the_numbers_and_name_the_rows_once(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    bars = {"a": (-2.0, 1.0, "lower"), "b": (0.5, 2.0, "no effect seen")}
    for other in (bars, {"c": bars["a"]}):
        plots.draw_differences(tmp_path / "x.png", {"here": bars, "there": other})
    bare = {key: AFTER[key] for key in AFTER if key != "gates"}
    plots.draw_mechanism(tmp_path / "x.png", {"talora": [AFTER, {**AFTER, "gates": [0.3, 0.4]}], "bare": [bare]})
    panels = [[axis.yaxis.get_tick_params()["labelleft"] for axis in figure.axes] for figure in figures[:2]]
    assert panels == [[True, False], [True, True]], "other rows need their own names"
    lower, unseen = figures[0].axes[0].patches
    assert (lower.get_width(), unseen.get_width()) == (-2, 0.5) and lower.get_hatch() and not unseen.get_hatch()
    gates, *_, pairs = figures[2].axes[:4]
    assert gates.images[0].get_array()[0].tolist() == pytest.approx([0.2, 0.3]), "a mean of sizes, whatever the signs"
    assert gates.images[0].get_array().mask.tolist() == [[False] * 2, [True] * 2]
    assert pairs.lines[0].get_xdata().tolist() == [0.2, 0.2]


@pytest.mark.parametrize("name", ["full", "qwen2.5-coder-0.5b"])
def test_the_committed_tables_are_made_from_the_committed_results(name, tmp_path, monkeypatch):
    """If they differ: python -m experiments.report experiments/results/NAME, and copy its tables to the README."""
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)
    committed = FOLDER / "results" / name
    (tmp_path / "results.jsonl").write_bytes((committed / "results.jsonl").read_bytes())
    report.write_report(tmp_path)
    assert (tmp_path / "tables.md").read_text("utf-8") == (committed / "tables.md").read_text("utf-8")
    for title, table in report.build_tables(report.read_results(committed)).items():
        if not title.startswith(("Learning rates", "By task" if name == "full" else "Learning rates")):
            assert table in README, title


def test_the_committed_measurements_are_in_the_readme():
    for path in (FOLDER / "results" / "bench").glob("*.json"):
        assert all(bench.show(table) in README for table in json.loads(path.read_text())["tables"].values()), path


@pytest.mark.parametrize("name, preset", [("full", "toy"), ("qwen2.5-coder-0.5b", "qwen2.5-0.5b")])
def test_the_defaults_of_every_method_are_what_the_search_found_best(name, preset):
    records = report.read_results(FOLDER / "results" / name)
    best = {name: report.choose_best(records, name, "sweep-target")["rates"] for name in METHODS}  # and of the sources
    for name, rates in best.items():
        assert rates.items() <= vars(train.parse(["--preset", preset, "--run", "new"], METHODS[name])).items(), name
    assert best["talora"]


def test_the_readme_knows_every_file_and_what_every_method_stores():
    files = re.findall(r"^\| \[([\w.]+)\]", README, re.MULTILINE)
    assert sorted(files) == sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh"))
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d,]+) \| ([\d,]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 13
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(Qwen2Config(**bench.SHAPES["qwen2.5-7b"]))
    for name, *said in rows:
        for backbone, preset, parameters in zip((load_backbone()[0], large), ("toy", "qwen2.5-7b"), said):
            method = METHODS[name]
            cfg = train.parse(["--preset", preset, "--run", "new"], method)
            with backbone.device:
                model = method.model(backbone, ["source"], TALoRAConfig(cfg.prompt_length, cfg.rank))
                new = model.add_task("target") if method.per_task else 0
            learning = train.learning_tensors(model, method.learns["target"], [new])
            assert f"{train.count(model, learning):,}" == parameters, (name, preset)
