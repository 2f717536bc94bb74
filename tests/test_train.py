"""The stages and the one loop: what learns, what a step does, what a run leaves behind."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import read_outcome, small_run
from safetensors.torch import load_file

import checkpoint
import data
import evaluate
import train
from checkpoint import RunFailed, UserError
from evaluate import read_metrics
from lowrank import orthogonality
from model import TALoRA, TALoRAConfig, load_backbone
from tasks import chinese, micro

SOURCES = ["toy-amazon", "toy-sanwen"]


@pytest.fixture(scope="module")
def finished(small_world, tmp_path_factory):
    """A finished run with two target tasks and two numbers of shots, with references and pictures."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train.main(small_run(small_world, run, "--shots", "8", "4", "--references", "--pictures"))
    return run


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def cfg(small_world, tmp_path):
    return train.parse(small_run(small_world, tmp_path / "run", "--clip", "1e9"))


@pytest.fixture
def model(small_world):
    """Two source tasks, gates open and no factor zero."""
    torch.manual_seed(1)
    model = TALoRA(load_backbone(small_world)[0], SOURCES, TALoRAConfig(3, 2))
    for tensor in model.adapter_state().values():
        torch.nn.init.normal_(tensor, std=0.5)
    return model


def rows_of(task, count):
    return [data.encode(row, micro.tokenizer(), 128) for row in data.load_task(task, "train")[:count]]


def batch_of(*counts):
    """A batch with so many rows of each source."""
    rows = [row for task, count in zip(SOURCES, counts) for row in rows_of(task, count)]
    return data.collate(rows, [SOURCES.index(row.task) for row in rows])


def optimizer_of(model, cfg):
    """The optimizer of the multitask stage."""
    return train.build_optimizer(model, train.learning_tensors(model, train.LEARNS["multitask"], [0, 1]), cfg)


def test_slow_and_fast_weights_have_their_rates_and_none_decays(model, cfg):
    found = {id(p): (g["initial"], g["weight_decay"]) for g in optimizer_of(model, cfg).param_groups
             for p in g["params"]}
    expected = dict.fromkeys(["theta0", "B"], (cfg.slow_rate, 0.0)) | dict.fromkeys(
        ["gate", "u.0", "u.1", "v.0", "v.1"], (cfg.fast_rate, 0.0))
    assert {name: found.pop(id(model.get_parameter(name))) for name in expected} == expected and not found
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)


def test_learning_rates_rise_linearly_then_fall_to_zero():
    factors = [train.rate_factor(step, 100, 9) for step in range(100)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert factors[9:] == pytest.approx([(100 - n) / 91 for n in range(9, 100)])
    assert max(train.rate_factor(step, 4, 20) for step in range(4)) == 1, "a warm-up longer than the run ends in time"


@pytest.mark.parametrize("form, weight", [("cosine", 3.0), ("printed", 0.5), ("frobenius", 0.0)])
def test_a_step_minimises_equation_3_however_it_is_cut_into_micro_batches(model, cfg, form, weight):
    """The loss written by hand: log-probabilities of answer tokens, averaged within an example, then over examples."""
    cfg.regulariser, cfg.reg_weight, cfg.slow_rate, cfg.fast_rate = form, weight, 0.0, 0.0  # no step moves anything
    whole, parts = batch_of(3, 4), [batch_of(3), batch_of(0, 4)]
    log_p = model(whole.input_ids, whole.attention_mask, whole.task_ids).logits.log_softmax(-1)
    task_loss = 0
    for b in range(7):
        answer = (whole.labels[b] != -100).nonzero()[:, 0].tolist()  # a token at t is predicted at t - 1
        task_loss -= sum(log_p[b, t - 1, whole.input_ids[b, t]] for t in answer) / len(answer) / 7
    reg = orthogonality(torch.stack([*model.u], 1), torch.stack([*model.v], 1), form)
    (task_loss + weight * reg).backward()  # Eq. (3)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for batches in ([whole], parts):
        measured = train.train_step(model, optimizer_of(model, cfg), batches, cfg, regularise=True)
        assert measured["loss"] == pytest.approx(task_loss.item(), rel=1e-5)
        assert measured["reg"] == pytest.approx(reg.item(), rel=1e-5) and reg > 0
        norm = math.sqrt(sum(gradient.square().sum() for gradient in expected.values()))
        assert measured["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)


def test_relative_rates_multiply_a_step_by_the_size_of_what_the_layer_reads(tiny_backbone, open_adapter, cfg):
    model = open_adapter(tiny_backbone(vocab_size=184), SOURCES)
    sizes = torch.stack([torch.nn.init.normal_(layer.input_layernorm.weight, std=0.1).abs()
                         for layer in model.backbone.model.layers])  # (L, d)
    old, steps = {name: tensor.clone() for name, tensor in model.adapter_state().items()}, []
    for relative in (False, True):
        cfg.relative_rates = relative
        model.load_state_dict(old, strict=False)
        train.train_step(model, optimizer_of(model, cfg), [batch_of(2, 2)], cfg, regularise=True)
        steps.append({name: tensor - old[name] for name, tensor in model.adapter_state().items()})
    for name, absolute in steps[0].items():
        size = {"theta0": sizes[:, None], "v.0": sizes, "v.1": sizes}.get(name, 1.0)
        torch.testing.assert_close(steps[1][name], absolute * size, rtol=1e-4, atol=1e-6)
        assert absolute.abs().min() > 1e-3


@pytest.mark.parametrize("regularise, weight", [(False, 0.1), (True, 0.0), (True, 0.1)])
def test_an_absent_task_moves_only_if_the_regulariser_moves_it(model, cfg, regularise, weight):
    """Not even momentum: a factor without a gradient is left alone."""
    optimizer, cfg.reg_weight = optimizer_of(model, cfg), weight
    train.train_step(model, optimizer, [batch_of(2, 2)], cfg, regularise=False)
    before = {name: tensor.clone() for name, tensor in model.adapter_state().items()}
    for _ in range(2):
        train.train_step(model, optimizer, [batch_of(2)], cfg, regularise=regularise)
    still = [name for name, tensor in model.adapter_state().items() if torch.equal(tensor, before[name])]
    assert still == ([] if regularise and weight else ["u.1", "v.1"])


@pytest.mark.parametrize("name", ["theta0", "v.1"])
def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(model, cfg, name):
    model.adapter_state()[name].view(-1)[0] = math.inf
    before = {name: tensor.clone() for name, tensor in model.adapter_state().items()}
    with pytest.raises(RunFailed, match="loss is nan.*lower learning"):
        train.train_step(model, optimizer_of(model, cfg), [batch_of(2, 2)], cfg, regularise=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.adapter_state().items())


def test_a_target_starts_from_the_source_with_the_lowest_loss_on_its_examples(model, cfg):
    rows, losses = rows_of("toy-finre", 8), []
    for i in range(2):
        batch = data.collate(rows, [i] * 8)
        losses.append(model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels).loss.item())
    nearest = losses.index(min(losses))
    assert train.nearest_start(model, "toy-finre", rows, cfg) == (2, SOURCES[nearest])
    assert torch.equal(model.u[2], model.u[nearest]) and torch.equal(model.v[2], model.v[nearest])
    assert model.u[2] is not model.u[nearest] and min(losses) < max(losses)


def test_a_run_leaves_adapters_results_tables_and_pictures(finished):
    stage, shared = {"stage.json", "metrics.jsonl", "results.json"}, {"best/adapter.json", "best/adapter.safetensors"}
    answers = {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
               for path in finished.rglob("predictions.jsonl")}
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()} - {".lock"}
    expected = {"log.txt", "multitask/table.md", "multitask/cosines.png", "multitask/predictions.jsonl"}
    expected |= {f"{name}/{file}" for name in ("base", "multitask")
                 for file in stage | shared | {"loss.png", "gates.png"}}
    expected |= {f"target/table-{shots}-shot.md" for shots in (4, 8)}
    expected |= {f"target/{task}-{shots}-shot/{file}" for task in ("toy-finre", "toy-drcd") for shots in (4, 8)
                 for file in stage | {"shots.json", "predictions.jsonl", "best/task.json", "best/task.safetensors"}}
    assert expected <= names and all(name.endswith(".png") for name in names - expected)
    scores = json.loads((finished / "multitask/results.json").read_text())["scores"]
    for task, columns in scores.items():
        right = [row["right"] for row in answers["multitask"] if row["task"] == task]
        assert sum(right) / len(right) == columns["talora"]["plain"]["accuracy"]
    log = (finished / "log.txt").read_text()
    assert all(f"\n{column}: {words}" in log for column, words in evaluate.LEGEND.items() if "template" not in column)
    assert "three test rows:" in log and "\ntry: python evaluate.py" in log


def test_results_hold_the_scores_of_every_column_on_plain_and_rewritten_rows(finished):
    multitask, target = (json.loads((finished / folder / "results.json").read_text())
                         for folder in ("multitask", "target/toy-finre-4-shot"))
    references = ["majority", "frozen backbone", "hard instruction"]
    assert list(multitask["scores"]) == SOURCES and list(target["scores"]) == ["toy-finre"]
    for results, columns in ((multitask, references), (target, [*references, "theta0 (k = 0)"])):
        for found in results["scores"].values():
            assert list(found) == [*columns, "talora"]
            assert all(0 <= column[rows]["score"] <= 1 for column in found.values() for rows in ("plain", "rewritten"))
    assert target["start"] in SOURCES and target["shots"] == 4 and target["trainable"] == 2 + 16
    assert multitask["trainable"] == 3 * 16 + 3 * 2 + 2 * (2 + 16) + 1
    shots = json.loads((finished / "target/toy-finre-4-shot/shots.json").read_text())
    assert len(shots["train"]) == len(shots["dev"]) == 4 and not set(shots["train"]) & set(shots["dev"])
    assert {task: found["rows"] for task, found in multitask["dev_as_test"].items()} == dict.fromkeys(SOURCES, 4)
    score = f"toy-finre: {target['dev_as_test']['toy-finre']['score']:.1%} on 4 development rows"
    assert score in (finished / "log.txt").read_text() and target["warnings"] == {"toy-finre": {}}


def test_the_log_holds_what_a_reader_wants_to_plot(finished):
    rows = read_metrics(finished / "multitask")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13)) and rows[0]["step"] == 0
    assert [row["step"] for row in rows if "dev_accuracy" in row] == [3, 6, 9, 12]
    assert all(set(row) >= {"step", "loss", "reg", "grad_norm", "learning_rates", "gates", "cosines"} for row in steps)
    assert steps[1]["learning_rates"] == pytest.approx({"slow": 0.12 * 2 / 5, "fast": 0.16 * 2 / 5})  # warming up
    assert read_metrics(finished / "base")[-1]["gates"] != rows[0]["gates"] == [0], "the gates start from zero again"


def test_what_a_stage_freezes_stays_bit_for_bit(finished, small_world):
    """Base moves theta0 and the gates, multitask everything of ours, target nothing but its own task."""
    torch.manual_seed(10 * 0 + 1)
    new = TALoRA(load_backbone(small_world)[0], SOURCES, TALoRAConfig(3, 2)).adapter_state()
    base, multitask = (load_file(finished / folder / "best/adapter.safetensors") for folder in ("base", "multitask"))
    assert {name for name in new if not torch.equal(new[name], base[name])} == {"theta0", "gate"}
    assert not any(torch.equal(base[name], multitask[name]) for name in new)
    for folder, adapter in evaluate.stages_of(finished, "toy-finre").items():
        target, own = evaluate.open_adapter(adapter)[0].adapter_state(), load_file(folder / "best/task.safetensors")
        assert all(torch.equal(multitask[name], target[name]) for name in new)
        assert torch.equal(target.pop("u.2"), own["u"]) and torch.equal(target.pop("v.2"), own["v"])
        start = json.loads((folder / "results.json").read_text())["start"]
        assert target.keys() == new.keys() and not torch.equal(own["v"], multitask[f"v.{SOURCES.index(start)}"])


def test_the_adapter_that_is_kept_is_the_best_on_development_rows(small_world, tmp_path, monkeypatch):
    scores, seen = [(0.5, 9.0), (0.9, 2.0), (0.9, 3.0), (0.2, 1.0)], []  # accuracy, then loss
    def dev_score(model, *_):
        seen.append({name: tensor.clone() for name, tensor in model.adapter_state().items()})
        return scores[len(seen) - 1]

    monkeypatch.setattr(evaluate, "dev_score", dev_score)
    train.main(small_run(small_world, tmp_path, "--stage", "base", "--base-steps", "12"))
    kept = load_file(tmp_path / "base/best/adapter.safetensors")
    best, = (n for n, state in enumerate(seen) if all(torch.equal(kept[name], t) for name, t in state.items()))
    assert best == 1


def files_of(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def add(copied, tmp_path):
    """add(*options): what a user types to add a task of one's own to the finished run."""
    (tmp_path / "data/mine").mkdir(parents=True)
    for split, size in (("train", 20), ("test", 5)):
        rows = [{"prompt": f"{split} soup {i} =>", "answer": ("我", "soup")[i % 2]} for i in range(size)]
        (tmp_path / f"data/mine/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = "--stage", "target", "--targets", "mine", "--data-root", str(tmp_path / "data"), "--run", str(copied)
    return lambda *options: train.main([*command, *options])


def test_a_task_of_ones_own_is_added_to_a_finished_run_by_the_options_of_that_run(add, copied, capsys):
    before = files_of(copied)
    add("--shots", "4")
    reason = "test answers hold tokens that the backbone does not know"
    assert f"mine: 3 {reason}" in capsys.readouterr().out.partition("== stage 1 of 1: target mine")[0]
    add("--shots", "4", "2", "--eval-every", "2")  # one more number of examples, evaluated at other steps
    assert "stage 1 of 1: target mine; results go to" in capsys.readouterr().out, "what is finished is not done again"
    after = files_of(copied)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"log.txt", "target/table-4-shot.md"}
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {
        "mine-4-shot", "mine-2-shot", "table-2-shot.md"}
    table = after["target/table-4-shot.md"].decode()
    assert all(f"| {task} " in table for task in ("toy-finre", "toy-drcd", "mine"))
    assert json.loads(after["target/mine-4-shot/results.json"])["warnings"]["mine"][reason] == 3
    shared = evaluate.open_adapter([copied / "multitask/best"])[0].hash_shared()
    for shots, evaluated in ((4, [3, 5]), (2, [2, 4, 5])):
        folder = copied / f"target/mine-{shots}-shot"
        assert [row["step"] for row in read_metrics(folder) if "dev_loss" in row] == evaluated
        assert json.loads((folder / "best/task.json").read_text())["shared"] == shared
    assert "newer" not in capsys.readouterr().out
    (copied.parent / "data/mine/train.jsonl").touch()  # perhaps other rows
    add("--shots", "4")
    assert "warning: rows of mine are newer than" in capsys.readouterr().out
    add("--shots", "3", "--max-length", "99")
    assert json.loads((copied / "target/mine-3-shot/best/task.json").read_text())["about"]["max_length"] == 99


@pytest.mark.parametrize("options, words", [
    ("--rank 3", "rank 2 (now 3)"), ("--targets nope", "should hold nope/train.jsonl"),
    ("--targets toy-amazon", "toy-amazon: named twice among this run's sources and targets"),
    ("--targets ../mine", "'../mine'"), ("--shots 100", "k = 100"), ("--target-rate 0", "--target-rate is 0.0"),
])
def test_a_task_that_cannot_be_added_is_refused_and_nothing_is_written(add, copied, options, words):
    before = files_of(copied)
    with pytest.raises(UserError) as refused:
        add("--shots", "4", *options.split())
    assert words in str(refused.value) and "\n" not in str(refused.value) and files_of(copied) == before


@pytest.mark.parametrize("more, words", [
    (["--multitask-steps", "13"], "multitask_steps 12 (now 13)"), (["--seed", "3"], "seed 0 (now 3)"),
    (["--fast-rate", "0.5"], "fast_rate 0.16 (now 0.5)"), (["--rank", "1"], "rank 2 (now 1)"),
    (["--sources", "toy-sanwen,toy-amazon"], "sources ['toy-amazon', 'toy-sanwen'] (now"),
    (["--target-batch", "2"], "target_batch 3 (now 2)"), (["--shots", "8", "2", "--seed", "3"], "seed 0 (now 3)"),
    (["--stage", "multitask", "--eval-every", "7"], "eval_every 3 (now 7)"),  # the last stage asked for
])
def test_a_run_is_not_continued_with_other_options(copied, small_world, more, words):
    before = files_of(copied)
    with pytest.raises(UserError) as refused:
        train.main(small_run(small_world, copied, *more))
    assert words in str(refused.value) and "choose another --run" in str(refused.value)
    assert files_of(copied) == before


@pytest.mark.parametrize("shots", ["8", "2"])
def test_a_run_is_not_continued_on_another_backbone(copied, small_world, tmp_path, shots):
    """Neither a target that has begun (8 shots), nor a new one (2) on the stages that are finished."""
    (copied / "target/toy-drcd-8-shot/results.json").unlink()
    files = files_of(copied)
    other, backbone = shutil.copytree(small_world, tmp_path / "other"), load_backbone(small_world)[0]
    torch.nn.init.normal_(backbone.model.layers[0].self_attn.k_proj.weight)
    backbone.save_pretrained(other)
    with pytest.raises(UserError, match="backbone"):
        train.main(small_run(other, copied, "--shots", shots))
    assert files_of(copied) == files, "nothing was written"


def test_a_run_is_not_continued_on_other_rows(copied, small_world, monkeypatch):
    (copied / "multitask/results.json").unlink()
    encode = data.encode
    monkeypatch.setattr(data, "encode", lambda row, *rest: encode(data.perturb(row, 0), *rest))
    with pytest.raises(UserError, match="rows of toy-amazon"):
        train.main(small_run(small_world, copied))


@pytest.mark.parametrize("more, close", [
    (("--dtype", "bfloat16"), 0.1), (("--gate-per-head",), 0.5), (("--regulariser", "printed"), 0.5),
    (("--seed", "1"), 0.5), (("--tokens-per-batch", "128"), 1e-4), (("--checkpointing",), 1e-4)], ids=str)
def test_a_run_in_another_way_ends_with_fp32_adapters_and_similar_losses(finished, small_world, tmp_path, monkeypatch,
                                                                         more, close):
    step, passes = train.train_step, set()  # passes through the layer for each one of a step

    def counted(model, optimizer, batches, *rest):
        hook = model.backbone.model.layers[0].self_attn.register_forward_pre_hook(calls := Mock(return_value=None))
        measured = step(model, optimizer, batches, *rest)
        hook.remove()
        passes.add(calls.call_count / len(batches))
        return measured

    monkeypatch.setattr(train, "train_step", counted)
    train.main(small_run(small_world, tmp_path / "run", *more, "--stage", "multitask"))
    assert passes == {1 + (more[0] == "--checkpointing")}, "in the steps after an evaluation as well"
    adapter = load_file(tmp_path / "run/multitask/best/adapter.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    losses, usual = ([row["loss"] for row in read_metrics(run / "multitask") if "loss" in row]
                     for run in (tmp_path / "run", finished))
    assert losses == pytest.approx(usual, rel=close) and (close == 1e-4 or losses != usual)


def test_dtype_auto_is_bfloat16_on_a_gpu_the_faster_type_on_a_cpu_and_stored(small_world, tmp_path, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **how: ones(2, 2, **how))  # quick to multiply
    for faster, dtype in ((0, "float32"), (1, "bfloat16")):
        monkeypatch.setattr(checkpoint, "sum_over_processes", lambda found, faster=faster: faster)
        assert [checkpoint.pick_dtype("auto", device) for device in ("cpu", "cuda:1")] == [dtype, "bfloat16"]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "pick_dtype", lambda dtype, _: "bfloat16" if dtype == "auto" else dtype)
    train.main(small_run(small_world, tmp_path, "--stage", "base", "--dtype", "auto"))
    assert json.loads((tmp_path / "base/stage.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "base/best/adapter.json").read_text())["backbone"]["dtype"] == "bfloat16"
    train.main(["--stage", "base", "--run", str(tmp_path)])  # the stored one counts


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import checkpoint, train
from tasks import micro
micro.TRAIN_ROWS, micro.TEST_ROWS = 60, 6
sys.exit(checkpoint.run_program(train.main, sys.argv[1:]))
"""


def test_two_processes_give_the_losses_of_one_and_the_second_leaves_no_files(small_world, tmp_path):
    """Steps of one row: the second process has none, and a task is in no process, which must leave it alone."""
    more = "--multitask-batch", "1", "--regulariser", "off"
    train.main(small_run(small_world, tmp_path / "one", *more))
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(Path(train.__file__).parent)))
    (tmp_path / "scratch").mkdir()
    run = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
        str(tmp_path / "driver.py"), *small_run(small_world, tmp_path / "two", *more)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "scratch")})
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count(": multitask;") == 1, "one process prints"
    assert not [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    one, two = read_outcome(tmp_path / "one"), read_outcome(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("safetensors"):
            tensors = (load_file(tmp_path / run / name) for run in ("one", "two"))
            torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-5)
        elif name.endswith("metrics.jsonl"):
            for x, y in zip(one[name], two[name], strict=True):
                for key in x.keys() & {"step", "loss", "reg", "grad_norm", "dev_loss", "dev_accuracy", "gates"}:
                    assert y[key] == pytest.approx(x[key], rel=1e-5, abs=1e-5), (name, x["step"], key)
        elif not name.endswith("task.json"):  # the hash of the shared part sees every rounding
            assert one[name] == two[name], name


def test_the_help_names_and_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    for field in fields(train.Config):
        assert f"--{field.name.replace('_', '-')}" in text and len(field.metadata["how"]["help"]) >= 5, field.name


def test_what_is_typed_wins_over_the_preset_and_the_preset_over_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has options of its own
    cfg = train.parse(["--stage", "all", "--preset", "qwen2.5-7b", "--rank", "2", "--shots", "8", "32"])
    assert (cfg.backbone, cfg.dtype, cfg.prompt_length) == ("Qwen/Qwen2.5-7B", "auto", 12)
    assert (cfg.rank, cfg.shots, cfg.checkpointing, cfg.sources) == (2, (8, 32), True, chinese.SOURCES)
    assert not train.parse(["--preset", "qwen2.5-7b", "--no-checkpointing"]).checkpointing
    assert train.parse(["--sources", "a,b", "c"]).sources == ("a", "b", "c")
    with pytest.raises(UserError, match="--targets and --shots need --stage target"):
        train.parse(["--targets", "a"])
    train.check(train.parse([])), train.check(train.parse(["--preset", "qwen2.5-7b", "--stage", "all"]))
    assert [train.parse(words).run for words in ([], ["--seed", "1"])] == ["runs/toy", "runs/toy-seed1"]
    (tmp_path / "base").mkdir()  # of a run that is older than relative rates
    checkpoint.write_json(tmp_path / "base/stage.json", {"preset": "qwen2.5-0.5b", "sources": ["bq"]})
    assert cfg.relative_rates and not train.parse(["--run", "."]).relative_rates
