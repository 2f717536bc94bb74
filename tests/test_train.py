"""The stages and the one loop: what learns, what a step does, what a run leaves behind."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import few_rows
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import evaluate
import figures
import tasks
import toy
import train
from baselines import METHODS, VARIANTS
from config import ORDER, Config, check, depends, flag, parse, plan, unread
from data import UserError
from lowrank import orthogonality
from model import NO_TASK, TALoRA, TALoRAConfig

ROOT = Path(__file__).parent.parent
TASKS = ("toy-amazon", "toy-sanwen", "toy-cote_mfw")


@pytest.fixture(scope="module", autouse=True)
def smaller_world():
    with few_rows(300, 40):
        yield


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the run itself; `finished_run` (a fixture of the module, so made before this) draws."""
    monkeypatch.setattr(figures, "draw_run", lambda *_: None)
    monkeypatch.setattr(figures, "draw_targets", lambda *_: None)


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    """A random two-layer backbone that reads the micro-world's words: the loop does not care what it knows."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    tokenizer = toy.tokenizer()
    backbone = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.3, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id))
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(folder, run, *more):
    """A command line that runs in a second or two."""
    sizes = {"--prompt-length": "3", "--rank": "2"}
    idle = [flag(name) for name in unread(parse([*more])[0])]
    return ["--backbone", str(folder), "--run", str(run), "--sources", ",".join(TASKS), "--base-steps", "3",
            "--multitask-steps", "5", "--target-steps", "3", "--multitask-batch", "6", "--base-batch", "4",
            "--eval-every", "2", "--log-every", "2", "--dev-rows", "4",
            *(word for size in sizes.items() if size[0] not in idle for word in size), *more]


@pytest.fixture
def model(backbone_folder):
    torch.manual_seed(1)
    model = TALoRA(Qwen2ForCausalLM.from_pretrained(backbone_folder), list(TASKS), TALoRAConfig(3, 2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("backbone."):
                p.normal_(std=0.5)  # gates open, no factor zero
    return model


@pytest.fixture
def cfg(backbone_folder, tmp_path):
    return parse(small(backbone_folder, tmp_path / "run"))[0]


def rows_of(task, count, start=0):
    return [data.encode(e, toy.tokenizer(), 128) for e in data.load_task(task, "train")[start:start + count]]


def multitask_tensors(model):
    return train.learning_tensors(model, METHODS["talora"], "multitask", [0, 1, 2])


def batch_of(*pairs):
    rows = [row for task, count in pairs for row in rows_of(task, count)]
    return data.collate(rows, [TASKS.index(row.task) for row in rows], 0)


# ------------------------------------------------------------------------------------------------ what learns, and how

SHARED = {"theta0", "B", "gate"}
OWN = {"u.0", "v.0", "u.1", "v.1", "u.2", "v.2"}


@pytest.mark.parametrize("name, stage, expected", [
    ("talora", "base", {"theta0", "gate"}),
    ("talora", "multitask", SHARED | OWN),
    ("talora", "target", {"u.1", "v.1"}),
    ("frozen-theta0", "multitask", SHARED - {"theta0"} | OWN),
    ("open-gate", "base", {"theta0"}),
    ("open-gate", "multitask", {"theta0", "B"} | OWN),
])
def test_learning_tensors(model, name, stage, expected):
    ids = {"multitask": [0, 1, 2], "target": [1], "base": [NO_TASK]}[stage]
    method = (METHODS | VARIANTS)[name]
    assert set(train.learning_tensors(model, method, stage, ids)) == expected


@pytest.mark.parametrize("name, stage, expected", [
    ("spot", "multitask", {"prompt.0"}),
    ("pt", "target", {"prompt.0"}),
    ("spot-nearest", "target", {"prompt.2"}),
    ("attempt", "multitask", {"prompt.0", "prompt.1", "prompt.2"}),
    ("attempt", "target", {"prompt.2", "down", "up"}),
    ("deep-spot", "multitask", {"prompt.0", "gate"}),
    ("deep-pt", "target", {"prompt.0", "gate"}),
])
def test_learning_tensors_of_prompts(backbone_folder, name, stage, expected):
    """A task id in the name decides, wherever it stands in the list of what the method owns."""
    method, ids = METHODS[name], sorted(int(n.rpartition(".")[2]) for n in expected if "." in n)
    model = method.model(Qwen2ForCausalLM.from_pretrained(backbone_folder), list(TASKS), TALoRAConfig(3, 2))
    assert set(train.learning_tensors(model, method, stage, ids)) == expected


def test_stages_come_in_order_and_every_rate_is_an_option():
    for name, method in (METHODS | VARIANTS).items():
        assert list(method.stages) == [stage for stage in ORDER if stage in method.stages], name
        assert "target" in method.stages and all(method.learns.values()), name
        for rate in {rate for rates in method.learns.values() for rate in rates.values()}:
            assert f"{rate}_rate" in Config.__dataclass_fields__, (name, rate)


def test_optimizer_groups(model, cfg):
    cfg.weight_decay = 0.1
    learns = multitask_tensors(model)
    optimizer = train.build_optimizer(model, learns, cfg)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(learns) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(rate)
    assert rate[id(model.theta0)] == rate[id(model.B)] == cfg.slow_rate
    assert rate[id(model.u[0])] == rate[id(model.v[2])] == rate[id(model.gate)] == cfg.fast_rate
    assert decay[id(model.gate)] == 0 and decay[id(model.B)] == 0.1


def test_rates_rise_then_fall():
    factors = [train.rate_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and 0 < factors[0] < 0.1 and max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 0.02
    assert max(train.rate_factor(step, 4, 20) for step in range(4)) == 1, "a warm-up longer than the run never arrives"


def test_a_step_is_the_same_however_it_is_cut(model, cfg):
    """The loss is a mean over the examples of the whole step: micro-batches of 1, 2 and 4 rows add up to one of 7."""
    counts = list(zip(TASKS, (1, 2, 4)))
    whole, parts, gradients = batch_of(*counts), [batch_of(count) for count in counts], []
    for batches in ([whole], parts):
        optimizer = train.build_optimizer(model, multitask_tensors(model), cfg)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        measured = train.train_step(model, optimizer, batches, cfg, regularise=True)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        gradients.append((measured["loss"], grads))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for name, grad in gradients[0][1].items():
        torch.testing.assert_close(grad, gradients[1][1][name], rtol=1e-4, atol=1e-6)


def test_two_equal_steps_have_equal_gradients(model, cfg):
    optimizer = train.build_optimizer(model, multitask_tensors(model), cfg)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    batch, grads = batch_of((TASKS[0], 3), (TASKS[1], 3)), []
    for _ in range(2):
        train.train_step(model, optimizer, [batch], cfg, regularise=True)
        grads.append(model.theta0.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_regulariser_enters_with_its_weight(model, cfg):
    """Without the task loss' share: the difference of two gradients is lambda times the regulariser's own."""
    cfg.clip, batch, grads = 1e9, batch_of((TASKS[0], 2), (TASKS[1], 2), (TASKS[2], 2)), []
    optimizer = train.build_optimizer(model, multitask_tensors(model), cfg)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for cfg.reg_weight in (0.0, 3.0):
        measured = train.train_step(model, optimizer, [batch], cfg, regularise=True)
        grads.append(model.v[1].grad.clone())
    expected, = torch.autograd.grad(orthogonality(*model.factors(), "cosine"), model.v[1])
    torch.testing.assert_close(grads[1] - grads[0], 3.0 * expected, rtol=1e-3, atol=1e-6)
    assert measured["reg"] > 0 and expected.abs().max() > 0


def test_an_absent_task_does_not_move(model, cfg):
    optimizer = train.build_optimizer(model, multitask_tensors(model), cfg)
    everyone, without = batch_of(*((t, 2) for t in TASKS)), batch_of((TASKS[0], 2), (TASKS[1], 2))
    for _ in range(3):
        train.train_step(model, optimizer, [everyone], cfg, regularise=False)
    before = [model.u[2].clone(), model.v[2].clone(), model.u[0].clone()]
    for _ in range(3):
        train.train_step(model, optimizer, [without], cfg, regularise=False)
    assert torch.equal(before[0], model.u[2]) and torch.equal(before[1], model.v[2])
    assert not torch.equal(before[2], model.u[0])


@pytest.mark.parametrize("where", ["theta0", "v"])
def test_bad_numbers_stop_the_run_and_change_nothing(model, cfg, where):
    optimizer = train.build_optimizer(model, multitask_tensors(model), cfg)
    with torch.no_grad():
        (model.theta0 if where == "theta0" else model.v[1]).view(-1)[0] = math.inf
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match="toy-amazon, toy-sanwen"):
        train.train_step(model, optimizer, [batch_of((TASKS[0], 2), (TASKS[1], 2))], cfg, regularise=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_nearest_start_is_the_source_with_the_lowest_loss(model, cfg):
    rows = rows_of("toy-sanwen", 8)
    losses = []
    for i in range(3):
        batch = data.collate(rows, [i] * 8, 0)
        losses.append(model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels).loss.item())
    nearest = losses.index(min(losses))
    new, name = train.nearest_start(model, "toy-finre", rows)
    assert (new, name) == (3, TASKS[nearest]) and len(set(losses)) == 3
    assert torch.equal(model.u[3], model.u[nearest]) and torch.equal(model.v[3], model.v[nearest])
    assert model.u[3] is not model.u[nearest]


# ----------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def finished_run(backbone_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    targets = ("--targets", "toy-finre,toy-drcd", "--shots", "8")
    train.main(small(backbone_folder, run, "--stage", "all", *targets))
    return run, targets


def test_a_run_leaves_adapters_numbers_and_pictures(finished_run):
    run, _ = finished_run
    trained = ("best/adapter.safetensors", "last/adapter.json", "metrics.jsonl")
    drawn = ("loss.png", "gates.png", "cosines.png")
    for stage, files in (("base", trained + drawn), ("multitask", trained + drawn),
                         ("target-8-shot/toy-finre", trained), ("target-8-shot/toy-drcd", trained),
                         ("target-8-shot", ("targets.png", "table.md"))):
        for file in files:
            assert (run / stage / file).stat().st_size > 0, f"{stage}/{file}"
    assert not [*(run / "target-8-shot").glob("*/*.png")]  # eight targets would be sixteen pictures
    results = json.loads((run / "multitask" / "results.json").read_text())
    columns = ["majority", "frozen backbone", "hard instruction", "talora"]
    assert set(results["columns"]) == {*columns, *(f"{column}, rewritten" for column in columns)}
    for column in results["columns"].values():
        assert set(column) == set(TASKS) and all(0 <= scores["score"] <= 1 for scores in column.values())
    target = json.loads((run / "target-8-shot" / "results.json").read_text())
    assert set(target["starts"].values()) <= set(TASKS) and set(target["columns"]["theta0 (k = 0)"]) == set(
        target["starts"]) == {"toy-finre", "toy-drcd"}
    shots = json.loads((run / "target-8-shot" / "toy-finre" / "shots.json").read_text())
    assert len(shots["train"]) == len(shots["dev"]) == 8 and not set(shots["train"]) & set(shots["dev"])


def test_metrics_hold_what_a_reader_wants_to_plot(finished_run):
    rows = [json.loads(line) for line in open(finished_run[0] / "multitask" / "metrics.jsonl")]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [2, 4, 5]
    assert set(steps[0]) >= {"loss", "reg", "grad_norm", "rates", "gates", "cosines", "tasks", "tokens_per_s"}
    assert set(steps[0]["rates"]) == {"slow", "fast"} and len(steps[0]["gates"]) == 2
    assert rows[0]["gates"] == [0, 0], "the gates start the multitask stage at zero"
    assert [row["step"] for row in rows if "dev_accuracy" in row] == [2, 4, 5]


def test_what_is_frozen_stays_bit_for_bit(finished_run, backbone_folder):
    """Base moves theta0 and gates alone; the target stage moves the new task alone; the backbone never moves."""
    run, _ = finished_run
    backbone = Qwen2ForCausalLM.from_pretrained(backbone_folder)
    base, multi, target = (TALoRA.load(run / s / "last", backbone) for s in (
        "base", "multitask", "target-8-shot/toy-finre"))
    best = TALoRA.load(run / "multitask" / "best", backbone)
    state = {n: t.clone() for n, t in base.adapter_state().items()}
    changed = {n for n, t in multi.adapter_state().items() if not torch.equal(t, state[n])}
    assert changed == set(state), "the multitask stage moves everything of ours"
    for name, t in best.adapter_state().items():
        assert torch.equal(t, target.adapter_state()[name]), f"the target stage moved {name}"
    assert target.tasks == [*TASKS, "toy-finre"]
    start = json.loads((run / "target-8-shot" / "results.json").read_text())["starts"]["toy-finre"]
    assert not torch.equal(target.v[3], best.v[TASKS.index(start)])


def test_stages_are_reused_and_missing_ones_run_first(finished_run, backbone_folder, capsys):
    run, targets = finished_run
    before = (run / "multitask" / "metrics.jsonl").read_bytes()
    train.main(small(backbone_folder, run, "--stage", "all", *targets))
    assert "nothing more to do" in capsys.readouterr().out
    train.main(small(backbone_folder, run, "--stage", "target", "--targets", "toy-drcd", "--shots", "4"))
    out = capsys.readouterr().out
    assert "runs first" not in out and (run / "target-4-shot" / "results.json").exists()
    assert (run / "multitask" / "metrics.jsonl").read_bytes() == before


def test_a_missing_stage_runs_first_and_a_beginning_without_checkpoint_is_begun_anew(backbone_folder, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "base").mkdir(parents=True)
    (run / "base" / "metrics.jsonl").write_text("half")
    train.main(small(backbone_folder, run))
    assert "builds on stage 'base'" in capsys.readouterr().out
    assert (run / "base" / "results.json").exists() and "half" not in (run / "base" / "metrics.jsonl").read_text()


def test_a_finished_stage_made_otherwise_is_refused(finished_run, backbone_folder):
    run, targets = finished_run
    with pytest.raises(UserError, match=re.escape("--multitask-steps 5 (now 6)")):
        train.main(small(backbone_folder, run, "--multitask-steps", "6"))
    with pytest.raises(UserError, match=re.escape("--rank 2 (now 1)")):
        train.main(small(backbone_folder, run, "--stage", "target", *targets, "--rank", "1"))


def test_same_seed_same_numbers(backbone_folder, tmp_path):
    def numbers(run, *more):
        train.main(small(backbone_folder, run, *more))
        rows = [json.loads(line) for line in open(run / "multitask" / "metrics.jsonl")]
        return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]

    first = numbers(tmp_path / "a")
    assert first == numbers(tmp_path / "b")
    assert first != numbers(tmp_path / "c", "--seed", "1")


def test_checkpointing_changes_nothing_but_rounding(backbone_folder, tmp_path):
    losses = []
    for more in ((), ("--checkpointing", "on")):
        run = tmp_path / str(len(losses))
        train.main(small(backbone_folder, run, *more))
        rows = [json.loads(line) for line in open(run / "multitask" / "metrics.jsonl")]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("more", [("--autocast",), ("--dtype", "bfloat16"), ("--gate-per-head",),
                                  ("--tokens-per-batch", "128"), ("--regulariser", "printed")])
def test_other_ways_to_run(backbone_folder, tmp_path, more):
    train.main(small(backbone_folder, tmp_path / "run", *more))
    results = json.loads((tmp_path / "run" / "multitask" / "results.json").read_text())
    assert 0 <= evaluate.macro(results["columns"]["talora"]) <= 1
    backbone = Qwen2ForCausalLM.from_pretrained(backbone_folder, dtype="bfloat16" if "--dtype" in more else None)
    adapter = TALoRA.load(tmp_path / "run" / "multitask" / "best", backbone)
    assert all(p.dtype == torch.float32 for p in adapter.adapter_state().values())


CLASSES = {method.model: name for name, method in VARIANTS.items() if method.model is not TALoRA}  # one of each


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "talora"), *CLASSES.values(), "no-base"])
def test_every_method_runs_in_its_stages(backbone_folder, tmp_path, name):
    method = (METHODS | VARIANTS)[name]
    options = ("--method", name) if name in METHODS else ("--variant", name)
    train.main(small(backbone_folder, tmp_path / "run", *options, "--stage", "all", "--shots", "4,2",
                     "--targets", "toy-finre", "--no-references"))
    label = name if name in METHODS else f"talora {name}"
    for shots in (4, 2):
        results = json.loads((tmp_path / "run" / f"target-{shots}-shot" / "results.json").read_text())
        assert set(results["columns"]) - {"majority", "majority, rewritten", "theta0 (k = 0)"} == {
            label, f"{label}, rewritten"}
        assert results["shots"] == shots and list(results["starts"]) == ["toy-finre"] * method.per_task
        assert results["numbers"] > 0
    for stage in ("base", "multitask"):
        assert (tmp_path / "run" / stage / "results.json").exists() == (stage in method.stages), stage


def test_one_set_of_weights_or_one_for_each_source(backbone_folder, tmp_path):
    """spot learns one prompt for all sources and starts every target from it; spot-nearest learns one for each."""
    backbone = Qwen2ForCausalLM.from_pretrained(backbone_folder)
    for name, owners in (("spot", [train.ALL_TASKS]), ("spot-nearest", list(TASKS))):
        run = tmp_path / name
        train.main(small(backbone_folder, run, "--method", name, "--stage", "all", "--shots", "4", "--targets",
                         "toy-finre", "--no-references"))
        sources, target = (METHODS[name].model.load(run / folder, backbone) for folder in (
            "multitask/best", "target-4-shot/toy-finre/last"))
        assert sources.tasks == owners
        assert target.tasks == owners + ["toy-finre"] * (name == "spot-nearest")
        moved = [n for n, t in target.adapter_state().items() if not torch.equal(t, sources.adapter_state().get(n, t))]
        assert moved == (["prompt.0"] if name == "spot" else [])  # a source's own prompt stays as it was


def test_an_adapter_of_another_backbone_is_refused(finished_run, backbone_folder, tmp_path):
    run, targets = finished_run
    other = Qwen2ForCausalLM.from_pretrained(backbone_folder)
    torch.nn.init.normal_(other.model.layers[0].self_attn.k_proj.weight)
    other.save_pretrained(backbone_folder / "other")
    toy.tokenizer().save_pretrained(backbone_folder / "other")
    with pytest.raises(UserError, match="backbone"):
        train.main(small(backbone_folder / "other", run, "--stage", "target", "--targets", "toy-drcd"))


# -------------------------------------------------------------------------------------------------------------- options

def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], train.__doc__)
    text = capsys.readouterr().out
    for name, f in Config.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in text
        assert len(f.metadata["help"]) > 15


def test_presets_and_overrides():
    cfg, changed = parse(["--preset", "qwen2.5-7b", "--rank", "2"])
    assert (cfg.backbone, cfg.dtype, cfg.checkpointing) == ("Qwen/Qwen2.5-7B", "bfloat16", "on")
    assert (cfg.prompt_length, cfg.rank, changed["rank"]) == (12, 2, 2)
    assert cfg.sources.split(",") == list(tasks.SOURCES) and parse(["--checkpointing", "off"])[0].checkpointing == "off"
    check(parse([])[0])


def test_options_of_methods_and_variants():
    assert parse(["--preset", "qwen2.5-7b", "--method", "attempt"])[0].rank == 100
    assert parse(["--preset", "qwen2.5-7b", "--method", "pt", "--prompt-length", "30"])[0].prompt_length == 30
    swapped, changed = parse(["--variant", "rates-swapped", "--slow-rate", "0.1", "--fast-rate", "0.3"])
    assert (swapped.slow_rate, swapped.fast_rate) == (0.3, 0.1) and changed["slow_rate"] == 0.3
    equal = parse(["--variant", "equal-rates"])[0]
    assert equal.slow_rate == equal.fast_rate == parse([])[0].fast_rate
    assert parse(["--variant", "gate-per-head"])[0].gate_per_head and parse(["--variant", "rank-1"])[0].rank == 1
    runs = [parse(options)[0].run for options in ([], ["--method", "pt"], ["--variant", "rank-1"], ["--seed", "1"])]
    assert len(set(runs)) == 4


def test_plan_names_what_a_stage_builds_on():
    assert plan(Config(stage="target")) == ["base", "multitask", "target"]
    assert plan(Config(stage="multitask")) == ["base", "multitask"]
    assert plan(Config(stage="target", method="deep-pt")) == ["target"]
    assert plan(Config(stage="all", method="lora")) == ["multitask", "target"]
    assert plan(Config(stage="all", variant="no-base")) == ["multitask", "target"]
    assert plan(Config(stage="base", data_root="x")) == ["pretrain", "base"]
    assert plan(Config(stage="base", data_root="x", backbone="y")) == ["base"]


def test_what_a_stage_depends_on():
    assert "target_rate" not in depends("multitask") and "target_rate" in depends("target")
    assert "multitask_steps" not in depends("base") and "rank" in depends("base")
    assert not {"run", "stage", "device", "log_every"} & set(depends("target"))


@pytest.mark.parametrize("preset", ["toy", "qwen2.5-0.5b", "qwen2.5-7b"])
def test_every_method_can_be_run_with_the_defaults_of_every_preset(preset, tmp_path):
    for name in METHODS:
        check(parse(["--preset", preset, "--method", name, "--stage", "all", "--run", str(tmp_path)])[0])
    for name in VARIANTS:
        check(parse(["--preset", preset, "--variant", name, "--stage", "all", "--run", str(tmp_path)])[0])


def test_resume_takes_the_options_as_they_were(tmp_path):
    """A variant that follows another option, such as swapped rates, is not applied a second time."""
    cfg = parse(["--variant", "rates-swapped", "--fast-rate", "0.5", "--slow-rate", "0.1", "--run", str(tmp_path)])[0]
    assert (cfg.slow_rate, cfg.fast_rate) == (0.5, 0.1)
    (tmp_path / "options.json").write_text(json.dumps(vars(cfg)))
    for again in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        assert vars(parse(again)[0]) == vars(cfg)
    assert parse([f"--resume={tmp_path}", "--log-every", "7"])[0].log_every == 7
