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
    for name, value in (("BATCHES", 2), ("REPEATS", 1)):
        monkeypatch.setattr(bench, name, value)
    return bench.Bench(bench.SHAPES["toy"] | {"num_hidden_layers": 1}, train.parse(["--device", "cpu"]), 160)


def test_all_measurements_run_and_their_ratios_are_sane(small, tmp_path, capsys):
    pytest.importorskip("peft")
    bench.main([*SMALL, "--out", str(tmp_path / "a new folder")])
    out, path = capsys.readouterr().out, tmp_path / "a new folder" / "toy-cpu-float32.json"
    report = json.loads(path.read_text())
    assert report["command"].startswith("python -m experiments.bench --device cpu") and "'" in report["command"]
    assert {"torch", "transformers", "machine", "threads", "commit", "peft"} <= set(report)
    methods, parts = report["tables"]["methods"], report["tables"]["parts"]
    assert [row[""] for row in methods][1:] == ["TA-LoRA", "TA-LoRA, checkpointing", bench.PEFT_PROMPT, "peft LoRA"]
    for row in methods:
        assert row["step, ms"] > 0 and row["text tokens/s"] > 0 and 0 < row["share of peak"] < 2
    for row in (*methods, *parts):
        assert 0.1 < row["peak memory, GB"] < 10 and f"| {row['']} |" in out, "of this process, the libraries included"
    first = [row["first loss"] for row in methods if row[""] not in bench.IN_FRONT]
    assert max(first) == pytest.approx(min(first), rel=1e-4), "all of them start as the frozen backbone"
    assert methods[3]["share of padding and prompt"] > 0.3 > methods[0]["share of padding and prompt"]


def test_the_7b_shape_on_a_cpu_is_measured_part_by_part(tmp_path, capsys, monkeypatch):
    narrow = dict(hidden_size=56, intermediate_size=64, num_attention_heads=28, vocab_size=100)
    monkeypatch.setitem(bench.SHAPES, "qwen2.5-7b", bench.SHAPES["qwen2.5-7b"] | narrow)
    bench.main(["--shape", "qwen2.5-7b", "--device", "cpu", "--tokens", "64", "--out", str(tmp_path)])
    report, out = json.loads((tmp_path / "qwen2.5-7b-cpu-bfloat16.json").read_text()), capsys.readouterr().out
    assert list(report["tables"]) == ["parts"] and report["dtype"] == "bfloat16"
    size = 28 * (12 * 56 + 12 * 8 + 8 + 56 + 1)  # L (P d + P r + r + d + 1), with d = 3,584 it is 1,307,516
    assert f"{size:,} trainable parameters for one task" in out


def test_random_weights_have_the_real_frequencies_and_are_tied_where_the_shape_says_so():
    for tied in (False, True):
        shape = bench.SHAPES["toy"] | {"tie_word_embeddings": tied}
        backbone = bench.build_backbone(shape, "bfloat16", torch.device("cpu"))
        assert (backbone.lm_head.weight is backbone.model.embed_tokens.weight) == tied
        real = type(backbone)(backbone.config).model.rotary_emb.inv_freq
        assert torch.equal(backbone.model.rotary_emb.inv_freq, real), "no weight, so not filled at random"


def test_contenders_share_the_weights_and_nothing_else(small):
    one, two = small.share_backbone(), small.share_backbone()
    assert one.config is not two.config and all(a is b for a, b in zip(one.parameters(), two.parameters()))
    before, step = [p.clone() for p in small.backbone.parameters()], small.contenders()["TA-LoRA"]
    losses = [step(small.batches[0]) for _ in range(3)]
    assert losses[2] < losses[0], "it learns"
    assert all(torch.equal(a, b) for a, b in zip(before, small.backbone.parameters()))


def test_what_computes_something_else_is_refused(small, monkeypatch):
    for losses in ((5.0, 6.0), (float("nan"), 5.0)):
        steps = {str(loss): lambda batch, loss=loss: loss for loss in losses}
        monkeypatch.setattr(small, "contenders", lambda steps=steps: steps)
        with pytest.raises(RunFailed, match="do not compute the same"):
            small.compare()
    adapter = small.adapter(1, False)
    adapter.gate.data.fill_(1.0)
    monkeypatch.setattr(small, "adapter", lambda *_, **__: adapter)
    with pytest.raises(RunFailed, match="with its gates at zero"):
        small.measure_parts()
