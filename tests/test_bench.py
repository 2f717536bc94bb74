"""The benchmark runs and its ratios are sane; how fast it is depends on the machine and is not tested."""

import json

import pytest
import torch

import train
from checkpoint import RunFailed
from experiments import bench

SMALL = ["--device", "cpu", "--tokens", "160", "--layers", "1"]


@pytest.fixture
def small(monkeypatch):
    for name, value in (("BATCHES", 2), ("REPEATS", 1), ("TASKS", (2, 3))):
        monkeypatch.setattr(bench, name, value)
    return bench.Bench(bench.SHAPES["toy"] | {"num_hidden_layers": 1}, train.parse(["--device", "cpu"]), 160)


def test_all_measurements_run_and_their_ratios_are_sane(small, tmp_path, capsys):
    pytest.importorskip("peft")
    bench.main([*SMALL, "--out", str(tmp_path / "a new folder")])
    report, out = json.loads((tmp_path / "a new folder" / "toy-cpu.json").read_text()), capsys.readouterr().out
    assert report["command"].startswith("python -m experiments.bench --device cpu") and "'" in report["command"]
    assert {"torch", "transformers", "machine", "threads", "commit", "peft"} <= set(report)
    methods, tasks = report["tables"]["methods"], report["tables"]["tasks"]
    for row in (*methods, *tasks):
        assert row["step, ms"] > 0 and row["text tokens/s"] > 0 and 0 < row["share of peak"] < 2
        assert "peak memory, GB" not in row and f"| {row['']} |" in out, "a CPU has no such number"
    assert [row[""] for row in methods][1:] == ["TA-LoRA", "TA-LoRA, checkpointing", bench.PEFT_PROMPT, "peft LoRA"]
    first = [row["first loss"] for row in methods if row[""] != bench.PEFT_PROMPT]
    assert max(first) == pytest.approx(min(first), rel=1e-4), "all of them start as the frozen backbone"
    assert methods[3]["share of padding and prompt"] > 0.3 > methods[0]["share of padding and prompt"]
    assert methods[0]["x the first row"] == tasks[0]["x the first row"] == 1 and tasks[0][""] == "N = 2"


def test_contenders_share_the_weights_and_nothing_else(small):
    one, two = small.share_backbone(), small.share_backbone()
    assert one.config is not two.config and all(a is b for a, b in zip(one.parameters(), two.parameters()))
    before, step = [p.clone() for p in small.backbone.parameters()], small.talora()
    losses = [step(small.batches[0]) for _ in range(3)]
    assert losses[2] < losses[0], "it learns"
    assert all(torch.equal(a, b) for a, b in zip(before, small.backbone.parameters()))


def test_contenders_that_compute_something_else_are_refused(small, monkeypatch):
    for losses in ((5.0, 6.0), (float("nan"), 5.0)):
        monkeypatch.setattr(small, "measure", lambda *_, losses=losses: [{"": "", "first loss": x} for x in losses])
        with pytest.raises(RunFailed, match="do not compute the same"):
            bench.measure_methods(small)
