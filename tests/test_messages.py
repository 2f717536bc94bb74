"""The mistakes that people make: each is one sentence with value, limit and remedy, before anything is written."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2ForCausalLM

import checkpoint
import train

QUICK = "--base-steps", "1", "--multitask-steps", "1", "--no-references", "--no-pictures"  # if it is not refused


@pytest.fixture
def refused(small_world, tmp_path, capsys):
    """refused(words, *options): the command ends with exit code 2 and one line with these words, and wrote nothing."""
    def run(words, *options):
        command = [*QUICK, "--backbone", str(small_world), "--run", str(tmp_path / "run"), *options]
        assert checkpoint.run_program(train.main, command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert [word for word in words if word not in error] == [], error
        assert not (tmp_path / "run").exists(), "something was written for a command that was refused"
    return run


@pytest.mark.parametrize("options, words", [
    ("--stage train", ["'train'", "multitask"]),
    ("--no-such-option 1", ["--no-such-option", "--help"]),
    ("--multitask-batch 0 --fast-rate -1", ["--multitask-batch is 0, but must be above 0", "--fast-rate is -1.0"]),
    ("--slow-rate nan --clip inf", ["--slow-rate is nan", "--clip is inf"]),
    ("--max-length 4", ["toy-", "raise --max-length"]),
    ("--sources toy-afqmc toy-nope", ["'toy-nope'", "known are", "toy-afqmc"]),
    ("--sources toy-afqmc,toy-afqmc", ["toy-afqmc", "twice"]),
    ("--stage target --shots 8 -3 --targets toy-finre", ["-3"]),
    ("--device banana", ["--device 'banana'", "--device cpu"]),
    ("--data-root {tmp}/nowhere", ["nowhere' is not a folder", "train.jsonl"]),
    ("--data-root {tmp} --backbone=", ["--data-root needs --backbone", "Qwen/Qwen2.5-0.5B"]),
    ("--data-root {tmp}", ["no known source", "--sources"]),
    ("--backbone {tmp}/nothing", ["nothing' cannot be", "--backbone takes", "config.json"]),
    ("--backbone nobody/nothing", ["'nobody/nothing' cannot be", "--backbone takes", "hub"]),
])
def test_a_mistake_in_an_option_is_refused_in_a_sentence(options, words, refused, tmp_path):
    refused(words, *options.format(tmp=tmp_path).split())


OWN = [{"prompt": f"soup {i} =>", "answer": ("yes", "no")[i % 2], "choices": ["yes", "no"]} for i in range(20)]
SPANS = [{"prompt": row["prompt"], "answer": "yes no yes"} for row in OWN]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("train_rows, test_rows, words", [
    (lines(OWN[:2]) + "{broken\n", OWN[16:], ["train.jsonl:3"]),
    (lines([{**row, "answer": "yes"} for row in OWN[:16]]), OWN[16:], ["mine", "'yes'", "another answer"]),
    (lines(SPANS[:16]), OWN[16:], ["mine", "with and without choices"]),
    ("", OWN[16:], ["no usable train row", "add rows"]),
    (lines(SPANS[:16]), SPANS[16:], ["4 of 4 test answers are longer than --max-new-tokens 2", "raise it"]),
], ids=["not JSON", "one answer", "mixed", "empty", "never in full"])
def test_rows_that_cannot_be_used_are_named(train_rows, test_rows, words, refused, tmp_path):
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/train.jsonl").write_text(train_rows)
    (tmp_path / "data/mine/test.jsonl").write_text(lines(test_rows))
    refused(words, "--data-root", str(tmp_path / "data"), "--sources", "mine", "--max-new-tokens", "2")


def change_weights(change):
    def harm(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return harm


def change_config(**changes):
    def harm(folder):
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | changes))
    return harm


def bring_code(folder):
    change_config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)
    (folder / "own.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\n")


def shrink_vocabulary(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(7)
    model.save_pretrained(folder)


@pytest.mark.parametrize("harm, words", [
    (lambda folder: (folder / "config.json").write_text("{]"), ["JSON"]),
    (change_config(quantization_config={"quant_method": "awq"}), ["quantised", "awq"]),
    (change_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), ["dynamic", "YaRN"]),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cut short"), ["header"]),
    (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
    (change_weights(lambda state: state.pop("model.norm.weight")), ["model.norm.weight"]),
    (change_weights(lambda state: state.update(extra=state["model.norm.weight"].clone())), ["not read", "extra"]),
    (change_weights(lambda state: state["model.norm.weight"].fill_(math.nan)), ["not finite", "model.norm.weight"]),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), ["safetensors"]),
    (bring_code, ["custom code"]), (shrink_vocabulary, [" 7"]),
    (lambda folder: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(folder),
     ["GPT2LMHeadModel", "qwen2, qwen3, llama, mistral"]),
], ids=["config", "quantised", "positions", "cut short", "no tokenizer", "missing", "unread", "nan", "pickle", "code",
        "vocabulary", "family"])
def test_a_backbone_that_cannot_be_used_is_refused_and_nothing_of_it_runs(harm, words, refused, small_world, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # somebody who says yes to everything
    folder = shutil.copytree(small_world, tmp_path / "backbone")
    harm(folder)
    refused(words, "--backbone", str(folder))
    assert not (folder / "was-run").exists()
