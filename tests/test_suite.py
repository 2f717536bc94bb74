"""The suite: what it runs, what it keeps when it is stopped, and what it makes of hand-made results."""

import json
import math
import os
import pickle
import signal
import statistics
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from conftest import few_rows
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import suite
import toy
from baselines import METHODS, VARIANTS
from config import check, method_of, parse
from errors import program
from suite import REWRITTEN, SOURCE, Suite, by_seed, interval, paired, target, verdict


def record(method, seed, score, stage="multitask", shots=None, kind="method", rewritten=None, numbers=544, **more):
    scores = {method: {"x": score / 100, "y": score / 100},
              f"{method}, rewritten": {"x": (score if rewritten is None else rewritten) / 100, "y": score / 100}}
    return {"cell": f"{method} seed {seed}", "kind": kind, "method": method.split()[0], "seed": seed, "rates": {},
            "stage": stage, "shots": shots, "numbers": numbers, "scores": scores, "seconds": 60, "command": "c",
            "commit": "abc", "torch": "2", "started": "2026-01-01 00:00:00", "dev": [0.5, -1.0], **more}


def write(folder, records):
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


# ----------------------------------------------------------------------------------------------------------- numbers

def test_intervals_are_students():
    """The 97.5 % quantiles against scipy's, and one interval by hand."""
    stats = pytest.importorskip("scipy.stats", reason="scipy, which brings Student's t, is not installed")
    for df, t in enumerate(suite.T_975, start=1):
        assert t == pytest.approx(stats.t.ppf(0.975, df), abs=1e-3)
    values = [3.0, 5.0, 4.0, 8.0]
    low, high = stats.t.interval(0.95, 3, loc=5.0, scale=statistics.stdev(values) / 2)
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)
    assert interval([7.0])[0] == 7.0 and math.isnan(interval([7.0])[1])
    mean, half = interval(list(range(40)))
    assert half == pytest.approx(stats.t.ppf(0.975, 39) * statistics.stdev(range(40)) / math.sqrt(40), rel=0.01)


def test_differences_are_paired_by_seed_and_judged_by_their_interval():
    talora = {0: 80.0, 1: 60.0, 2: 70.0, 7: 10.0}
    mean, half, n = paired({0: 82.0, 1: 62.5, 2: 71.5, 9: 99.0}, talora)
    assert (mean, n) == (2.0, 3) and half == pytest.approx(4.303 * 0.5 / math.sqrt(3))
    assert verdict((mean, half, n)) == "higher" and verdict((-mean, half, n)) == "lower"
    assert verdict((1.0, half, n)) == "no effect seen"
    assert verdict(paired({0: 81.0}, talora)) == "too few seeds" and verdict(None) == "too few seeds"
    assert paired({5: 1.0}, talora) is None


def test_scores_are_macro_averages_by_seed_of_one_setting():
    records = [record("talora", 0, 90, rewritten=70), record("talora", 0, 50, "target", 8),
               record("talora", 1, 40, "target", 8), record("lora", 1, 30, "target", 8),
               record("talora", 3, 99, "target", 8, kind="sweep-target")]
    assert by_seed(records, "talora", SOURCE) == {0: 90} and by_seed(records, "talora", REWRITTEN) == {0: 80}
    assert by_seed(records, "talora", target(8)) == {0: 50, 1: 40}, "a sweep is no result"
    assert by_seed(records, "talora", target(32)) == {}


def test_rates_are_chosen_on_development_rows():
    tried = [record("lora", 100, score, kind="sweep-source", rates={"prompt_rate": rate}, dev=dev)
             for rate, dev, score in ((0.1, [0.8, -0.5], 99), (0.2, [0.9, -0.7], 10), (0.3, [0.9, -0.6], 10))]
    assert suite.chosen(tried, "lora", "sweep-source") == {"prompt_rate": 0.3}, "accuracy, then loss; never test rows"
    assert suite.chosen(tried, "pt", "sweep-source") == {}
    targets = [record("lora", 100, 9, kind="sweep-target", rates={"prompt_rate": s, "target_rate": t}, dev=[acc, -1])
               for s, t, acc in ((0.1, 1, 0.99), (0.3, 2, 0.7), (0.3, 3, 0.6))]
    assert suite.chosen(targets, "lora", "sweep-target", {"prompt_rate": 0.3}) == {"prompt_rate": 0.3, "target_rate": 2}


def test_the_defaults_of_every_method_are_what_the_search_found_best():
    records = suite.read(Path(__file__).parent.parent / "results" / "full")
    for method in suite.SUITES["full"].methods:
        sources = suite.chosen(records, method, "sweep-source")
        best = sources | suite.chosen(records, method, "sweep-target", sources)
        cfg, _ = parse(["--method", method])
        assert best and {name: getattr(cfg, name) for name in best} == best, method


# ------------------------------------------------------------------------------------------------------------ report

def seeds(method, scores, *rest, **more):
    return [record(method, seed, score, *rest, **more) for seed, score in enumerate(scores)]


BEFORE = {"step": 0, "tasks": ["a", "b"], "cosines": [[1, 0.1], [0.1, 1]]}
AFTER = {"step": 9, "gates": [0.1, 0.2], "theta0_norms": [3, 4], "step_norms": [1, 2],
         "tasks": ["a", "b"], "cosines": [[1, 0.2], [0.2, 1]]}
RECORDS = [*seeds("talora", (90, 91, 92), rewritten=80, first=BEFORE, last=AFTER),
           *seeds("lora", (95, 96, 98), numbers=14336, last={"step": 9}), *seeds("pt", (), numbers=2048),
           *seeds("talora", (60, 62, 61), "target", 8), *seeds("lora", (50, 51, 53), "target", 8, numbers=14336),
           *seeds("pt", (60, 61, 63), "target", 8, numbers=512), *seeds("talora", (70, 71, 72), "target", 32),
           *seeds("talora", (72, 73, 73.5), "target", 0),
           *seeds("talora open-gate", (85, 86, 86.5), kind="variant", last={"step": 9, "gates": [1, 1]}),
           *seeds("talora open-gate", (60, 62, 61), "target", 8, kind="variant"),
           record("lora", 100, 9, kind="sweep-source", rates={"prompt_rate": 0.1}, dev=[0.5, -1])]


def row_of(table, name):
    return next([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
                if line.startswith((f"| {name} |", f"| **{name}** |")))


def test_tables_hold_means_intervals_and_counts():
    table = suite.main_table(RECORDS)
    assert table.splitlines()[0] == ("| method | stored for a target | sources | sources, rewritten | targets, k = 8 | "
                                     "targets, k = 32 | targets, full |")
    assert row_of(table, "talora")[1:4] == ["544", "91.0 ± 2.5 (3)", "85.5 ± 1.2 (3)"]
    assert row_of(table, "pt") == ["pt", "512", "", "", "61.3 ± 3.8 (3)", "", ""]
    variants = row_of(suite.variant_table(RECORDS), "open-gate")
    assert variants[1] == VARIANTS["open-gate"].says and variants[2] == "-5.2 ± 0.7 (3): hurts"
    assert variants[4] == "+0.0 ± 0.0 (3): no effect seen"
    assert row_of(suite.task_table(RECORDS, "target", 8), "x") == ["x", "61.0", "61.3", "51.3"]
    asked = [dict(RECORDS[0], scores={**RECORDS[0]["scores"], "majority": {"x": 0.2, "y": 0.3}})]
    assert row_of(suite.task_table(asked, "multitask", None), "y") == ["y", "30.0", "90.0"], "with its references"


def test_every_variant_says_what_the_paper_says():
    assert [name for name, each in VARIANTS.items() if "[paper" not in each.says and "[printed" not in each.says] == []


def test_how_alike_the_tasks_are_is_a_mean_over_seeds_of_mean_and_largest():
    three = [[1, 0.2, 0.4], [0.2, 1, 0.0], [0.4, 0.0, 1]], [[1, 0.1, 0.1], [0.1, 1, 0.1], [0.1, 0.1, 1]]
    records = [record("talora", seed, 9, last={"cosines": cosines}) for seed, cosines in enumerate(three)]
    (mean, most), nothing = suite.alignments(records, ["talora", "talora open-gate"])
    assert (mean, most) == (pytest.approx((0.2 + 0.1) / 2), pytest.approx((0.4 + 0.1) / 2))
    assert all(map(math.isnan, nothing))


def claims_of(records):
    return {claim.strip("| "): rest for claim, *rest in (line.split(" | ") for line in
                                                         suite.claims(records).splitlines()[2:])}


def test_claims_are_answered_by_the_numbers():
    claims = claims_of(RECORDS)
    assert not any("unseen data" in claim for claim in claims), "lora is not told the task: no comparison on sources"
    knows = seeds("deep-mpt", (95, 96, 98), rewritten=85, numbers=576)
    unseen = next(rest for claim, rest in claims_of([*RECORDS, *knows]).items() if "unseen data" in claim)
    assert unseen[0] == "no" and unseen[1].startswith("*below* deep-mpt -")
    assert claims["better than every baseline on unseen tasks, k = 8"][0] == "unclear", "above lora, level with pt"
    unseen = claims["better than every baseline on unseen tasks, k = 8"][1]
    assert unseen.startswith("*above* lora +9.7 ± ") and "*not told apart* pt -0.3 ± " in unseen
    assert claims["32 examples come within 5 points of full data (same steps)"][0] == "yes"
    assert claims["fewest numbers stored for a task"][:2] == ["no", "544; pt 512 |"]
    assert claims["zero-initialised attention is needed"][0] == "in part", "the sources say so, k = 8 does not"


def test_a_claim_names_whom_it_compares_with_and_what_counts_for_it():
    few = [*seeds("talora", (60, 62, 61), "target", 4), *seeds("pt", (50, 51, 53), "target", 4)]
    claims = claims_of([*RECORDS, *few])
    assert claims["better than the 1 baselines that were run there on unseen tasks, k = 4"][0] == "yes"
    assert claims["better than every baseline on unseen tasks, k = 8"][0] == "unclear"
    rates = [r for name, score in (("equal-rates", 90), ("rates-swapped", 90), ("slow-eighth", 70)) for r in
             seeds(f"talora {name}", (score, score + 1, score + 2), kind="variant", rewritten=80)]
    answer = claims_of([*RECORDS, *rates])["a fast and a slow rate (here 4 : 3) are needed"]
    assert answer[0] == "no effect seen" and "slow-eighth" not in answer[1], "more of a difference is no lack of it"


def test_a_rate_at_an_end_of_its_grid_is_marked():
    tried = [record("lora", 100, 9, kind="sweep-source", rates={"prompt_rate": rate}, dev=[right, -1])
             for rate, right in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))]
    assert "0.2: 70.0 (chosen)" in suite.rate_table(tried) and "an end" not in suite.rate_table(tried)
    assert "0.2: 70.0 (chosen) *- an end of the grid*" in suite.rate_table(tried[:2])


def test_the_report_is_made_from_the_result_file_alone(tmp_path, monkeypatch):
    out = write(tmp_path / "out", RECORDS)
    suite.write_report(out)
    text = (out / "tables.md").read_text()
    for part in (suite.main_table, suite.claims, suite.variant_table, suite.rate_table):
        assert part(RECORDS) in text
    for name in ("fewshot", "size", "variants", "mechanism", "cosines"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------------------------- cells

def test_every_cell_of_the_declared_suites_is_a_command_that_can_run(tmp_path, monkeypatch):
    sweeps = []
    for m in METHODS:  # as the sweeps would leave them
        sources = suite.source_rates(suite.GRIDS[m][0][0]) if "multitask" in METHODS[m].stages else {}
        sweeps += [record(m, 100, 9, kind="sweep-source", rates=sources, cell=f"sweep-source {m}")] * bool(sources)
        sweeps.append(record(m, 100, 9, kind="sweep-target", rates={**sources, "target_rate": 0.5}, cell=f"target {m}"))
    for declared in suite.SUITES.values():
        records = sweeps if declared.sweep else []
        cells = [cell for phase in (suite.source_sweep_cells, suite.target_sweep_cells, suite.backbone_cells,
                                    suite.method_cells) for cell in phase(declared, records, tmp_path)]
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            cfg, _ = parse(list(cell.command[1:]))
            check(cfg, cell.command)
            assert cfg.seed == cell.seed and cfg.run == str(tmp_path / cell.folder)
            if cell.kind == "variant":
                assert method_of(cfg) is VARIANTS[cfg.variant] and cfg.method == "talora"
            if cell.kind in ("method", "variant") and declared.sweep:
                assert cfg.target_rate == 0.5 and cfg.seed != suite.SWEEP_SEED
            assert pickle.loads(pickle.dumps(cell)) == cell, "it travels to a worker"
        budgets = {(cfg.multitask_steps, cfg.multitask_batch, cfg.target_steps, cfg.target_batch)
                   for cfg in (parse(list(cell.command[1:]))[0] for cell in cells if cell.kind != "backbone")}
        assert len(budgets) == 1, "every method has the same steps and batches"


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """The shipped backbone's place is taken by a random one, the world has few rows, and the worker is this process."""
    monkeypatch.setattr(suite, "ProcessPoolExecutor", Here)
    tokenizer = toy.tokenizer()
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    with few_rows(400, 40):
        yield ("--backbone", str(tmp_path / "backbone"), "--sources", "toy-amazon,toy-cote_mfw", "--targets",
               "toy-finre", "--multitask-steps", "3", "--base-steps", "2", "--target-steps", "2", "--multitask-batch",
               "4", "--eval-every", "2", "--dev-rows", "4")


def test_a_suite_runs_end_to_end_and_goes_on_where_it_was_stopped(tiny_world, tmp_path, capsys, monkeypatch):
    declared = Suite({"talora": "8", "bitfit": "8"}, ("reg-off",), sweep=True, options=tiny_world)
    monkeypatch.setattr(suite, "GRIDS", {"talora": (((0.01, 0.02),), (0.03,)), "bitfit": ((0.01,), (0.02,))})
    out, work = tmp_path / "results", tmp_path / "work"
    suite.run_suite("tiny", declared, out, work, jobs=1)
    records = suite.read(out)
    assert [(r["cell"], r["stage"], r["shots"]) for r in records] == [
        ("sweep talora 0", "multitask", None), ("sweep bitfit 0", "multitask", None),
        ("sweep talora 0 target 0", "target", 16), ("sweep bitfit 0 target 0", "target", 16),
        ("talora seed 0", "multitask", None), ("talora seed 0", "target", 8),
        ("bitfit seed 0", "multitask", None), ("bitfit seed 0", "target", 8),
        ("reg-off seed 0", "multitask", None), ("reg-off seed 0", "target", 8)]
    assert records[4]["rates"] == {"slow_rate": 0.01, "fast_rate": 0.02, "target_rate": 0.03}
    for r in records:
        assert all(f"--{name.replace('_', '-')} {value}" in r["command"] for name, value in r["rates"].items())
    assert "hard instruction" in records[4]["scores"] and "hard instruction" not in records[6]["scores"]
    assert not list(work.glob("*seed-0")), "what a finished cell left is in its records"
    table = (out / "tables.md").read_text()
    assert "bitfit" in table and "reg-off" in table

    kept = "".join(json.dumps(r) + "\n" for r in records if r["cell"] != "bitfit seed 0")
    (out / "results.jsonl").write_text(kept)  # as if it had been stopped before
    capsys.readouterr()
    suite.run_suite("tiny", declared, out, work, jobs=1)
    assert "1 cells to run" in capsys.readouterr().out
    again = suite.read(out)
    assert len(again) == len(records)
    with pytest.raises(data.UserError, match="'talora seed 0' made by another command"):
        other = Suite({"talora": "4", "bitfit": "8"}, ("reg-off",), sweep=True, options=tiny_world)
        suite.run_suite("tiny", other, out, work, jobs=1)
    old = next(r for r in records if r["cell"] == "bitfit seed 0")["scores"]
    assert next(r for r in again if r["cell"] == "bitfit seed 0")["scores"] == old, "the same seed, the same numbers"


def test_a_failing_cell_is_named_and_the_others_are_kept(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "run_cell", fail_second)
    declared = Suite({"talora": "8", "bitfit": "8"}, seeds=(0,), options=tiny_world)
    with pytest.raises(data.UserError, match="bitfit seed 0: the disk is full") as caught:
        suite.run_suite("tiny", declared, tmp_path / "out", tmp_path / "work", jobs=1)
    assert "repeat the command" in str(caught.value)
    assert [r["cell"] for r in suite.read(tmp_path / "out")] == ["talora seed 0"]


def test_a_backbone_that_comes_out_otherwise_is_not_compared_with_the_old_one(tmp_path, monkeypatch):
    """Runs of an earlier machine are in results.jsonl, and the backbone they were made with has to be made again."""
    monkeypatch.setattr(suite, "ProcessPoolExecutor", Here)
    cells = [suite.cell("backbone 1", "backbone", "", 1, tmp_path)]
    made = {"cell": "backbone 1", "kind": "backbone", "weights": "abc"}
    out = write(tmp_path / "out", [made, record("talora", 1, 50)])
    monkeypatch.setattr(suite, "run_cell", lambda cell, work: [made])
    suite.run_cells(cells, out, tmp_path, jobs=1)
    assert [r["cell"] for r in suite.read(out)] == ["talora seed 1", "backbone 1"], "once, not twice"
    monkeypatch.setattr(suite, "run_cell", lambda cell, work: [{**made, "weights": "other"}])
    with pytest.raises(data.UserError, match="backbone 1: made again it came out otherwise"):
        suite.run_cells(cells, out, tmp_path, jobs=1)
    assert [r.get("weights") for r in suite.read(out)] == [None, "abc"]


def test_a_suite_takes_options_of_train_for_all_its_runs(tmp_path, monkeypatch):
    asked = ["--data-root", str(tmp_path), "--backbone", "somewhere", "--sources", "a", "--targets", "b"]
    declared = suite.with_options(suite.SUITES["full"], asked)
    assert declared.backbones == (0,) and declared.options[-8:] == tuple(asked)
    assert suite.with_options(suite.SUITES["full"], ["--dev-rows", "8"]).backbones == (0, 1, 2)
    for more, words in (([*asked[:2], *asked[4:]], "--backbone PATH"), (["--dev-rows", "0"], "--dev-rows is 0"),
                        (["--ev"], "--ev")):
        with pytest.raises(data.UserError, match=words):
            suite.main(["full", "--", *more])
    ran = []
    monkeypatch.setattr(suite, "run_suite", lambda *arguments: ran.append(arguments))
    monkeypatch.chdir(tmp_path)
    suite.main(["quick", "--out", "results/mine", "--jobs", "1", "--", "--dev-rows", "8"])
    (name, declared, out, work, jobs), = ran
    assert (name, str(out), str(work), jobs) == ("quick", "results/mine", "runs/suite/mine", 1)
    assert declared.options[-2:] == ("--dev-rows", "8")


def test_a_signal_stops_the_workers_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    """The second of two cells would sleep for an hour, and its worker never hears of what happens to the suite."""
    monkeypatch.setattr(suite, "run_cell", sleep_second)
    cells = [suite.cell(f"{name} seed 0", "method", name, 0, tmp_path) for name in ("talora", "lora")]
    out = tmp_path / "out"
    out.mkdir()

    def main(_):
        threading.Thread(target=signal_after, args=(out / "results.jsonl",)).start()
        suite.run_cells(cells, out, tmp_path, jobs=2)

    began = time.perf_counter()
    assert program(main, []) == 143 and time.perf_counter() - began < 600
    assert "repeat the command" in capsys.readouterr().err
    assert [r["cell"] for r in suite.read(out)] == ["talora seed 0"] and not active_children()


def signal_after(path):
    while not path.exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)


def sleep_second(cell, work):
    if cell.method == "lora":
        time.sleep(3600)
    return [record("talora", 0, 50)]


def fail_second(cell, work):
    if cell.method == "bitfit":
        raise OSError("the disk is full")
    return [record("talora", 0, 50)]


class Here:
    """A pool that does the work at once, in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        from concurrent.futures import Future
        future = Future()
        try:
            future.set_result(function(*arguments))
        except OSError as error:
            future.set_exception(error)
        return future


def test_an_unknown_suite_is_refused():
    with pytest.raises(data.UserError, match="quick, full"):
        suite.main(["everything"])
