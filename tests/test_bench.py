"""The benchmark runs and its ratios are sane; how fast it is depends on the machine and is not tested."""

import json

import gpu
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import bench
import pretrain
from config import check, parse
from errors import UserError, program

TINY = ["--device", "cpu", "--tokens", "160", "--batches", "2", "--repeats", "1", "--layers", "1"]


@pytest.fixture
def run(tmp_path, capsys):
    """run(*options) -> what was printed, and the JSON."""

    def start(*options):
        bench.main([*TINY, "--out", str(tmp_path / "new" / "out"), *options])
        [file] = (tmp_path / "new" / "out").iterdir()
        return capsys.readouterr().out, json.loads(file.read_text("utf-8"))

    return start


@pytest.fixture
def make():
    """make(*options) -> a Bench on the CPU."""

    def start(*options):
        return bench.Bench(bench.parser().parse_args([*TINY, *options]), parse([])[0], torch.device("cpu"))

    return start


def test_all_measurements_run_and_their_ratios_are_sane(run):
    out, report = run()
    assert report["command"].startswith("python bench.py --device cpu --tokens 160")
    assert {"torch", "transformers", "machine", "threads", "commit", "peft"} <= set(report)
    tables = report["tables"]
    assert list(tables) == list(bench.SECTIONS)
    steps = [row for name in ("methods", "tasks", "prompts", "lengths", "logits") for row in tables[name]]
    for row in steps:
        assert row["step, ms"] > 0 and row["text tokens/s"] > 0 and 0 < row["share of peak"] < 2
        assert row["peak memory, GB"] is None, "a CPU has no such number"
        assert f"| {row['']} |" in out
    assert all(rows[0]["x the first row"] == 1 for rows in tables.values() if "x the first row" in rows[0])
    assert [row[""] for row in tables["tasks"]][:3] == ["N = 8", "N = 64", "N = 512"]
    assert [row[""] for row in tables["lengths"]] == ["T = 64, floor", "T = 64, TA-LoRA"], "no text above the budget"
    few, every = tables["logits"]
    assert few["first loss"] == pytest.approx(every["first loss"], rel=1e-5), "the same loss"
    assert every["logits in fp32, GB"] > 4 * few["logits in fp32, GB"]
    assert [row["labels"] for row in tables["labels"]] == [2, 15, 44]
    assert [goal["goal"] for goal in report["goals"]] == ["<= 1.05", ">= 2.5", "<= 1.05", ">= 75%", "<= 18"]
    methods = {row[""]: row for row in tables["methods"]}
    assert report["goals"][0]["here"] == methods["TA-LoRA"]["step, ms"] / methods["floor"]["step, ms"]
    waste = [row["share of padding"] for row in tables["padding"]]
    assert len(waste) == 6 and waste[0] > waste[1] > 0.2, "sorting the rows of one step helps, but not enough"
    assert waste[0] > 0.5 and max(waste[2:]) <= 0.05, "a token budget keeps padding at 5 % or less"
    assert f"| {waste[0]:.1%} | 64 |" in out
    assert [row[""] for row in tables["imports"]] == ["torch", "torch and transformers", "train.py"]
    assert all(row["seconds"] > 0 for row in tables["imports"])


def test_a_published_shape_with_few_layers_and_words(run):
    pytest.importorskip("peft")
    out, report = run("--shape", "qwen2.5-0.5b", "--vocabulary", "500", "--tokens", "64", "--only", "methods")
    assert (report["hidden_size"], report["num_hidden_layers"], report["vocab_size"]) == (896, 1, 500)
    rows = {row[""]: row for row in report["tables"]["methods"]}
    assert list(rows) == ["floor", "TA-LoRA", "TA-LoRA, checkpointing", bench.PEFT_PROMPT, "peft LoRA"]
    start = rows["floor"]["first loss"]
    for name in ("TA-LoRA", "TA-LoRA, checkpointing", "peft LoRA"):
        assert rows[name]["first loss"] == pytest.approx(start, rel=1e-4), "all of them start as the frozen backbone"
    assert rows[bench.PEFT_PROMPT]["first loss"] != pytest.approx(start, rel=1e-4)
    assert rows[bench.PEFT_PROMPT]["share of padding and prompt"] > 0.5 > rows["floor"]["share of padding and prompt"]


def test_without_peft_its_rows_are_left_out_and_it_is_said(run, monkeypatch):
    monkeypatch.setattr(bench, "peft", None)
    out, report = run("--only", "methods")
    assert [row[""] for row in report["tables"]["methods"]] == ["floor", "TA-LoRA", "TA-LoRA, checkpointing"]
    assert "not installed: its two rows are left out" in out
    assert report["goals"][1]["here"] is None and "| text tokens/s, TA-LoRA / peft prompt tuning | - | >= 2.5 |" in out


def test_shapes_are_the_published_ones(make):
    for shape, parameters, inside in (("qwen2.5-0.5b", 494_032_768, 357_897_216),
                                      ("qwen2.5-7b", 7_615_616_512, 6_525_618_176)):
        with torch.device("meta"):
            backbone = AutoModelForCausalLM.from_config(Qwen2Config(**bench.SHAPES[shape]))
        of = make()
        of.__dict__["backbone"] = backbone
        assert sum(p.numel() for p in backbone.parameters()) == parameters and of.parameters == inside


def test_batches_are_of_the_mixture_and_within_the_budget(make):
    batches = make("--tokens", "2048", "--batches", "5").batches
    assert len(batches) == 5
    rows = [len(batch.input_ids) for batch in batches]
    assert rows == sorted(rows, reverse=True) and rows[0] > 4 * rows[-1], "from short rows to long ones"
    for batch in batches:
        assert 1024 < batch.input_ids.numel() <= 2048
        assert ((batch.labels != -100).sum(1) == bench.ANSWER).all()
        assert batch.task_ids.tolist() == list(range(len(batch.task_ids)))


def test_contenders_share_the_weights_and_nothing_else(make):
    of = make()
    one, two = of.shared_backbone(), of.shared_backbone()
    assert one is not two and one.config is not two.config
    assert all(a is b for a, b in zip(one.parameters(), two.parameters()))
    one.gradient_checkpointing_enable()
    assert one.model.layers[0].gradient_checkpointing and not two.model.layers[0].gradient_checkpointing
    before = [p.clone() for p in of.backbone.parameters()]
    step = of.talora()
    losses = [step(of.batches[0]) for _ in range(3)]
    assert losses[2] < losses[0], "it learns"
    assert all(torch.equal(a, b) for a, b in zip(before, of.backbone.parameters()))


def test_a_contender_without_memory_leaves_the_others_in_the_table(make):
    of, calls = make(), []

    def never():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def later():
        def step(batch):
            calls.append(batch)
            if len(calls) > 4:  # after the warm-up
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return 1.0
        return step

    never_, later_, fine = bench.measure(of, {"never": never, "later": later, "fine": of.floor})
    assert never_ == {"": "never", "step, ms": "out of memory"} and later_ == {"": "later", "step, ms": "out of memory"}
    assert fine["step, ms"] > 0 and fine["x the first row"] is None
    assert "| never | out of memory | - |" in bench.show("title", [never_, fine])

    def broken():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        bench.measure(of, {"broken": broken})


def test_contenders_that_compute_something_else_are_refused(make, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_, **__: [{"": "a", "first loss": 5.0}, {"": "b", "first loss": 6.0}])
    with pytest.raises(bench.RunFailed, match="do not compute the same"):
        bench.methods(make())
    monkeypatch.setattr(bench, "measure", lambda *_, **__: [{"": "a", "first loss": float("nan")}])
    with pytest.raises(bench.RunFailed):
        bench.methods(make())


def test_what_cannot_work_is_refused_in_a_sentence(make, monkeypatch, capsys, tmp_path):
    for options, sentence in ((["--tokens", "10"], "error: --tokens is 10, but must be at least 32"),
                              (["--shape", "gpt"], "error: argument --shape: invalid choice: 'gpt'")):
        assert program(bench.main, [*options, "--out", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.startswith(sentence)
    assert not (tmp_path / "none").exists()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is no GPU here"):
            bench.main(["--device", "cuda"])
    if hasattr(bench.os, "sysconf"):
        monkeypatch.setattr(bench.os, "sysconf", lambda name: 1000)
        with pytest.raises(UserError, match=r"takes 28.6 GB, but there are 0.0 GB; make it smaller with --layers"):
            _ = make("--shape", "qwen2.5-7b", "--layers", "26").backbone


def test_the_gpu_script_is_made_of_commands_that_can_run(tmp_path):
    options = gpu.parser().parse_args(["--data-root", str(tmp_path), "--sources", "sanwen", "--device", "cpu"])
    commands = gpu.commands(options)
    assert [words[0] for words in commands] == ["bench.py"] * 2 + ["train.py"] * 4
    for program_, *words in commands:
        if program_ == "bench.py":
            assert bench.parser().parse_args(words).shape in bench.SHAPES
        else:
            cfg, _ = parse(words)
            check(cfg, words)
    large = parse(commands[2][1:])[0]
    assert (large.dtype, large.checkpointing, large.tokens_per_batch) == ("bfloat16", "on", 4096)
    world = pretrain.new_backbone(184, 0, 1, options.width, options.layers)
    assert 10 < world.num_parameters() / 835_712 < 11
