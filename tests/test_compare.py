"""Baselines and ablations as programs: their options, what is refused, and a whole run of each over a tiny backbone."""

import json

import pytest
from conftest import small_options
from transformers import Qwen2ForCausalLM

import evaluate
import train
from checkpoint import UserError
from evaluate import macro
from experiments import compare
from experiments.compare import METHODS, VARIANTS, unused_options
from train import TALORA, flag

ALL = METHODS | VARIANTS
CHANGED = {method.model: name for name, method in VARIANTS.items() if method.model is not TALORA.model}  # one a class
SOURCES = ["toy-amazon", "toy-sanwen"]


def run(backbone, folder, name, *more):
    used = [word for size, value in (("prompt_length", "3"), ("rank", "2")) if size not in unused_options(ALL[name])
            for word in (flag(size), value)]
    compare.main(["--method" if name in METHODS else "--variant", name, *small_options(backbone, folder),
                  "--targets", "toy-finre", "--save-every", "100", *used, *more])


@pytest.mark.parametrize("name", [*(name for name in METHODS if name != "talora"), *CHANGED.values(), "no-base"])
def test_every_method_runs_in_its_stages(name, small_world, tmp_path):
    method = ALL[name]
    run(small_world, tmp_path, name, "--shots", "4", "2")
    for shots in (4, 2):
        results = json.loads((tmp_path / "target" / f"toy-finre-{shots}-shot" / "results.json").read_text())
        columns = {"majority", method.name} | ({"theta0 (k = 0)"} if name in VARIANTS else set())
        assert set(results["scores"]["toy-finre"]) == columns and results["trainable"] > 0
        assert (results["start"] in (*SOURCES, "new weights")) == method.per_task
        assert results["method"] == method.name and 0 <= macro(results["scores"], method.name) <= 1
    for stage in ("base", "multitask"):
        assert (tmp_path / stage / "results.json").exists() == (stage in method.learns), stage


def test_deep_spot_has_one_prompt_for_all_sources_and_deep_spot_nearest_one_for_each(small_world, tmp_path, capsys):
    backbone = Qwen2ForCausalLM.from_pretrained(small_world)
    for name, owners in (("deep-spot", ["all tasks"]), ("deep-spot-nearest", SOURCES)):
        run(small_world, tmp_path / name, name)
        sources, target = (ALL[name].model.load(tmp_path / name / folder / "best", backbone)
                           for folder in ("multitask", "target/toy-finre-8-shot"))
        assert sources.tasks == owners and target.tasks == owners + (["toy-finre"] if ALL[name].per_task else [])
        state = sources.adapter_state()
        moved = {n for n, t in target.adapter_state().items() if not t.equal(state.get(n, t))}
        assert moved == ({"gate"} if ALL[name].per_task else {"gate", "prompt.0"})
    capsys.readouterr()
    evaluate.main(["--run", str(tmp_path / "deep-spot")])
    assert capsys.readouterr().out.count("deep-spot ") > 1, "the tables of sources and targets"


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_method_can_be_run_with_the_defaults_of_every_preset(preset, tmp_path):
    options = ["--preset", preset, "--stage", "all", "--run", str(tmp_path)]
    for method in ALL.values():
        compare.check_typed(options, method)
        train.check(cfg := train.parse(options, method), method)
        assert method.fixes(cfg).items() <= vars(cfg).items(), "an ablation stays what it is when its run resumes"


def test_defaults_of_a_method_yield_to_what_is_typed_and_an_ablation_does_not():
    def parse(name, *typed):
        return train.parse(list(typed), ALL[name])

    assert parse("attempt", "--preset", "qwen2.5-7b").rank == 100 and parse("lora").prompt_rate == 0.01
    assert parse("pt", "--preset", "qwen2.5-7b", "--prompt-length", "30").prompt_length == 30
    assert parse("rank-1").rank == 1 and parse("gate-per-head").gate_per_head
    swapped = parse("rates-swapped", "--slow-rate", "0.1", "--fast-rate", "0.4")
    assert (swapped.slow_rate, swapped.fast_rate) == (0.4, 0.1)
    assert parse("slow-eighth", "--fast-rate", "0.4").slow_rate == 0.05
    assert [parse(name).run for name in ("talora", "pt", "reg-off")] == ["runs/toy", "runs/toy-pt", "runs/toy-reg-off"]


@pytest.mark.parametrize("command, said", [
    (["--stage", "all"], ["--method", "--variant"]),
    (["--variant", "no-base", "--method", "lora"], ["--method", "not allowed with"]),
    (["--method", "deep-pt"], ["deep-pt", "multitask", "target"]),
    (["--variant", "no-base", "--stage", "base"], ["talora no-base", "'base'", "multitask, target"]),
    (["--variant", "rank-1", "--rank", "2"], ["rank-1 sets --rank 1, the command 2; leave it out"]),
    (["--variant", "2-terms", "--regulariser", "off"], ["2-terms sets --regulariser cosine, the command off"]),
    (["--method", "ft", "--dtype", "bfloat16"], ["ft needs --dtype float32: bfloat16 would round"]),
    (["--method", "ft", "--reg-weight", "1", "--rank=4"], ["ft does not use --rank, --reg-weight; leave out"]),
    (["--variant", "no-base", "--prompt-rate", "1"], ["no-base does not use --prompt-rate"]),
    (["--method", "mpt", "--no-gate-per-head", "--relative-rates"], ["mpt does not use", "gate-per-head", "relative"]),
])
def test_what_cannot_work_is_one_sentence(command, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        compare.main(command)
    assert all(word in str(caught.value) for word in said), caught.value
    assert not list(tmp_path.iterdir())
