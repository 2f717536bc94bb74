"""Everything a user can do wrong: one sentence with the value, the limit and the remedy, before anything is written."""

import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from conftest import few_rows
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import data
import parallel
import toy
import train
from baselines import METHODS
from config import parse, unread
from errors import UserError, program

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    """A random backbone that reads the micro-world's words."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = toy.tokenizer()
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def smaller_world():
    with few_rows(60, 6):
        yield


def json_rows(folder, task, train_rows, test_rows):
    (folder / task).mkdir(parents=True)
    for split, rows in (("train", train_rows), ("test", test_rows)):
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


RELATION = {"head": "甲某", "tail": "乙某", "relation": "Family", "text": "甲某和乙某是一家人。"}


def bad_data(tmp_path, kind):
    good = [{**RELATION, "text": f"{RELATION['text']}{i}"} for i in range(20)]
    test = [{**RELATION, "text": f"另外{i}。{RELATION['text']}"} for i in range(4)]
    if kind == "no field":
        good[3] = {k: v for k, v in good[3].items() if k != "tail"}
    elif kind == "unknown label":
        good[4] = {**good[4], "relation": "Enemy"}
    elif kind == "empty split":
        test = []
    elif kind == "wrong form":
        good = [{"prompt": "a", "answer": "b", "choices": 3}]
    elif kind == "no answer":
        good = [{**row, "relation": ""} for row in good]
    elif kind == "same choices":
        good = [{"prompt": f"a{i}", "answer": "b", "choices": ["b", "b"]} for i in range(20)]
    elif kind == "answer not offered":
        good = [{"prompt": f"a{i}", "answer": "c", "choices": ["a", "b"]} for i in range(20)]
    elif kind == "one class":
        good = [{"prompt": f"a{i}", "answer": "b", "choices": ["b", "c"]} for i in range(20)]
        test = [{"prompt": "z", "answer": "b", "choices": ["b", "c"]}]
    elif kind == "no dictionary":
        good = [["a", "b"]]
    folder = json_rows(tmp_path / "data", "sanwen", good, test)
    train_file = folder / "sanwen" / "train.jsonl"
    if kind == "empty file":
        train_file.write_text("")
    elif kind == "binary":
        train_file.write_bytes(bytes(range(256)))
    elif kind == "other encoding":
        train_file.write_bytes(json.dumps(good[0], ensure_ascii=False).encode("gb18030") + b"\n")
    if kind == "not json":
        (folder / "sanwen" / "train.jsonl").write_text("{broken\n")
    elif kind == "no file":
        (folder / "sanwen" / "test.jsonl").unlink()
    elif kind == "a folder":
        (folder / "sanwen" / "test.jsonl").unlink()
        (folder / "sanwen" / "test.jsonl").mkdir()
    return str(folder)


def bad_backbone(tmp_path, kind, good):
    from transformers import BertConfig, BertModel, BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    folder = tmp_path / "backbone"
    tokenizer = toy.tokenizer()
    if kind == "no causal LM":
        BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=16)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif kind == "no attention interface":
        BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
                         ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif kind == "short window":
        MistralForCausalLM(MistralConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=60)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif kind == "no pad token":
        Qwen2ForCausalLM.from_pretrained(good).save_pretrained(folder)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    elif kind == "too small":
        Qwen2ForCausalLM(Qwen2Config(vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    elif kind in ("no head", "cut short"):
        whole = Qwen2ForCausalLM.from_pretrained(good)
        (whole.model if kind == "no head" else whole).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if kind == "cut short":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "garbage":
        folder.mkdir()
        (folder / "config.json").write_text("{]")
    return str(folder)


def bad_options(tmp_path, asked):
    """{options:TEXT}: the folder of a run with this text for its options; {options}/STAGE: a good run's stage."""
    folder = tmp_path / "options"
    (folder / "multitask").mkdir(parents=True)
    good = json.dumps(dataclasses.asdict(parse([])[0]))
    for name in ("options.json", "multitask/options.json"):
        (folder / name).write_text(asked[9:-1] if asked.startswith("{options:") else good)
    (folder / "multitask/env.json").write_text("{}")
    return str(folder) + asked[9:] * asked.startswith("{options}")


BAD = [  # options (a function of a folder and a good backbone) and what the sentence must name
    (["--stage", "train"], ["train", "multitask"]),
    (["--preset", "huge"], ["huge", "qwen2.5-7b"]),
    (["--method", "magic"], ["magic", "talora"]),
    (["--regulariser", "l1"], ["l1", "cosine"]),
    (["--no-such-option", "1"], ["--no-such-option", "--help"]),
    (["--multitask-steps", "many"], ["--multitask-steps", "many"]),
    (["--multitask-batch", "0"], ["--multitask-batch", "0", "at least 1"]),
    (["--fast-rate", "-1"], ["--fast-rate", "-1.0"]),
    (["--slow-rate", "nan"], ["--slow-rate", "nan"]),
    (["--shots", "-3", "--rank", "99"], ["--shots", "-3", "--rank", "99", "--prompt-length"]),
    (["--prompt-length", "0"], ["--prompt-length", "0"]),
    (["--sources", "toy-afqmc,toy-nope"], ["toy-nope"]),
    (["--sources", "toy-afqmc,toy-afqmc"], ["toy-afqmc", "twice"]),
    (["--base-task", "toy-finre"], ["toy-finre", "toy-afqmc"]),
    (["--method", "deep-pt"], ["deep-pt", "multitask", "target"]),
    (["--method", "lora", "--stage", "base"], ["lora", "base", "multitask, target"]),
    (["--variant", "no-base", "--stage", "base"], ["--variant no-base", "'base'", "multitask, target"]),
    (["--variant", "magic"], ["magic", "no-base"]),
    (["--variant", "no-base", "--method", "lora"], ["no-base", "lora"]),
    (["--variant", "rank-1", "--rank", "2"], ["rank-1", "--rank 1", "2"]),
    (["--method", "ft", "--dtype", "bfloat16"], ["ft", "bfloat16", "--autocast"]),
    (["--stage", "target", "--shots", "8,8"], ["--shots", "8,8"]),
    (["--stage", "target", "--shots", "8,few"], ["--shots", "8,few"]),
    (["--stage", "target", "--shots", "100000"], ["100000"]),
    (["--device", "cuda"], ["cuda", "cpu"]) if not torch.cuda.is_available() else (["--seed", "-1"], ["--seed"]),
    (["--data-root", "{tmp}/nowhere"], ["nowhere", "train.jsonl"]),
    (["--data-root", "{tmp}"], ["sanwen", "--sources"]),
    (["--data-root", "{data:no field}"], ["tail", "train.jsonl"]),
    (["--data-root", "{data:unknown label}"], ["Enemy", "Family"]),
    (["--data-root", "{data:empty split}"], ["sanwen", "test"]),
    (["--data-root", "{data:not json}"], ["train.jsonl"]),
    (["--data-root", "{data:no file}"], ["test.jsonl"]),
    (["--data-root", "{data:a folder}"], ["test.jsonl"]),
    (["--device", "banana"], ["banana", "--device cpu"]),
    (["--run", "{tmp}/a-file"], ["a-file", "folder"]),
    (["--max-length", "4"], ["--max-length", "toy-"]),
    (["--tokens-per-batch", "64"], ["--tokens-per-batch", "64", "--max-length"]),
    (["--stage", "all", "--targets", "toy-bq"], ["toy-bq", "source and a target"]),
    (["--data-root", "{data:wrong form}"], ["train.jsonl"]),
    (["--backbone", "{backbone:no head}"], ["lm_head"]),
    (["--backbone", "{backbone:cut short}"], ["backbone"]),
    (["--backbone", "{tmp}/nothing"], ["nothing", "--backbone"]),
    (["--backbone", "{backbone:no causal LM}"], ["causal language model"]),
    (["--backbone", "{backbone:no pad token}"], ["pad", "tokenizer.pad_token"]),
    (["--backbone", "{backbone:too small}"], [str(len(toy.vocabulary())), "7", "belong together"]),
    (["--backbone", "{backbone:garbage}"], ["backbone"]),
    (["--method", "lora", "--variant", "no-base"], ["no-base", "lora"]),
    (["--variant", "rank-1", "--rank", "4"], ["rank-1", "--rank 1", "4"]),
    (["--variant", "sideways"], ["sideways", "no-base"]),
    (["--stage", "target", "--shots", "8,8"], ["--shots", "8,8"]),
    (["--stage", "target", "--shots", "few"], ["--shots", "few", "0"]),
    (["--method", "ft", "--dtype", "bfloat16"], ["ft", "bfloat16", "--dtype float32"]),
    (["--sources", "../outside"], ["../outside", "folder"]),
    (["--save-every", "0"], ["--save-every", "0", "at least 1"]),
    (["--target-steps", "0", "--clip", "inf"], ["--target-steps", "--clip"]),
    (["--resume", "{tmp}/nowhere"], ["nowhere", "options.json"]),
    (["--resume"], ["--resume"]),
    (["--data-root", "{data:no answer}"], ["sanwen"]),
    (["--data-root", "{data:same choices}"], ["train.jsonl", "different"]),
    (["--data-root", "{data:answer not offered}"], ["train.jsonl", "'c'"]),
    (["--data-root", "{data:no dictionary}"], ["train.jsonl"]),
    (["--data-root", "{data:one class}", "--backbone", "{tmp}"], ["sanwen", "'b'", "another answer"]),
    (["--data-root", "{data:empty file}"], ["sanwen", "train"]),
    (["--data-root", "{data:binary}"], ["train.jsonl"]),
    (["--data-root", "{data:other encoding}"], ["train.jsonl", "UTF-8"]),
    (["--stage", "pretrain", "--data-root", "{data:no field}"], ["tail", "train.jsonl"]),
    (["--stage", "pretrain", "--data-root", "{tmp}", "--sources", "mine"], ["no text", "train.jsonl"]),
    (["--backbone", "{backbone:no attention interface}"], ["BloomForCausalLM", "qwen2"]),
    (["--backbone", "{backbone:short window}", "--sources", "toy-cote_mfw,toy-cmnli"],
     ["sliding window of 60", "57", "toy-cmnli", "--max-length is 128"]),
    (["--backbone", "{backbone:short window}", "--method", "pt", "--stage", "target", "--targets", "toy-finre"],
     ["sliding window of 60", "40", "--max-length is 128"]),
    (["--method", "ft", "--reg-weight", "1", "--rank=4"], ["--method ft does not read --rank, --reg-weight; leave th"]),
    (["--method", "lora", "--slow-rate", "1"], ["--method lora does not read --slow-rate; leave it out"]),
    (["--variant", "no-base", "--prompt-rate", "1"], ["--variant no-base does not read --prompt-rate; leave it out"]),
    (["--method", "mpt", "--no-gate-per-head", "--scale", "2"], ["mpt does not read --scale, --gate-per-head"]),
    (["--variant", "open-gate", "--gate-per-head"], ["open-gate does not read --gate-per-head"]),
    (["--seed", str(2**63)], [f"--seed is {2**63}, but must be at most 4294967295"]),
    (["--prompt-length", str(10**9)], ["--prompt-length is 1000000000", "at most 10000"]),
    (["--pretrain-width", str(8 * 10**9)], ["--pretrain-width is 8000000000", "at most 10000"]),
    (["--target-batch", str(10**9)], ["--target-batch is 1000000000", "at most 100000"]),
    (["--fast-rate", "1e38"], ["--fast-rate is 1e+38", "above 0, and at most 10000"]),
    (["--weight-decay", "1e30"], ["--weight-decay is 1e+30", "above 0 or 0, and at most 10000"]),
    *((["--device", name], [f"--device '{name}'", "cpu, cuda, cuda:1, mps or auto"])
      for name in ("meta", "privateuseone", "cpu:7", "", "cuda:x")),
    *((["--targets", name], [repr(name), "cannot be a task", "255 bytes"])
      for name in ("results.json", "x.part", "a.PT", ".hidden", "..", "a\\b", "a\x07b", "名" * 86)),
    (["--run", "{tmp}/new\udcff"], ["new\\udcff'", "encoding"]),
    (["--run", "{tmp}/a\0b"], ["--run", "a\\x00b'", "characters that no name has"]),
    (["--run", "{tmp}/" + "x" * 300], ["--run", "xxx", "too long"]),
    (["--data-root", "{tmp}/" + "x" * 5000], ["--data-root", "too long", "is no folder"]),
    (["--backbone", "{tmp}/" + "x" * 300], ["--backbone", "xxx", "too long"]),
    (["--resume", ""], ["'options.json' cannot be read", "--resume a folder"]),
    (["--resume", "{options}", "--run", "{tmp}/other"], ["--resume '", "--run is '", "other'; leave one of them out"]),
    (["--resume", "{options}/multitask"], ["options/multitask' is a stage", "with the run: --resume ", "options"]),
    *((["--resume", "{options:" + text + "}"], ["options.json'", *named]) for text, named in (
        ('{"run": "r", "seed": "x"}', ["seed 'x'", "of type int"]),
        ('{"run": "r", "seed": true}', ["seed 'True'", "of type int"]),
        ('{"run": "r", "fast_rate": null}', ["fast_rate 'None'", "of type float"]),
        ('{"run": "r", "sources": ["a"]}', ["sources", "of type str"]),
        ('{"run": "r", "shots": 8}', ["shots '8'", "of type str"]),
        ('{"run": "r", "device": 7}', ["device '7'", "of type str"]),
        ('{"run": "r", "backbone": 3}', ["backbone '3'", "of type str"]),
        ('{"run": "r", "references": "no"}', ["references 'no'", "of type bool"]),
        ('{"run": "r", "dtype": "float7"}', ["dtype 'float7'", "one of float32, bfloat16"]),
        ('{"run": "r", "regulariser": "nope"}', ["regulariser 'nope'", "cosine"]),
        ('{"run": "r", "method": "magic"}', ["method 'magic'", "talora"]),
        ('{"run": "r", "colour": 3}', ["colour '3'", "must go"]),
        ('{"run": 3}', ["run should be in it"]), ("[]", ["run should be in it"]), ("3", ["cannot be"]),
        ("", ["cannot be read"]), ("[" * 100_000, ["cannot be read"]),
        ('{"run": "r", "seed": ' + "9" * 5000 + "}", ["cannot be read"]))),
]


@pytest.mark.parametrize("options, named", BAD, ids=[ascii(" ".join(options))[1:70] for options, _ in BAD])
def test_it_is_one_sentence_before_anything_is_written(options, named, tmp_path, backbone_folder):
    def filled(option):
        kind = option.partition(":")[2].rstrip("}")
        if option.startswith("{options"):
            return bad_options(tmp_path, option)
        if option.startswith("{data:"):
            return bad_data(tmp_path, kind)
        return bad_backbone(tmp_path, kind, backbone_folder) if option.startswith("{backbone:") else option.replace(
            "{tmp}", str(tmp_path))

    run = tmp_path / "run"
    (tmp_path / "a-file").write_text("")
    command = [*map(filled, options)]
    with pytest.raises(UserError) as caught:
        train.main(command if {"--run", "--resume"} & {*options} else [*command, "--run", str(run)])
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(name in sentence for name in named), sentence
    assert not run.exists(), "something was written for a command that was refused"


def test_exit_code_and_no_traceback():
    out = subprocess.run([sys.executable, "train.py", "--stage", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith("error: ") and "Traceback" not in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("environment, named", [
    ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE is 'abc'"]),
    ({"WORLD_SIZE": ""}, ["WORLD_SIZE is ''"]),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": ""}, ["LOCAL_WORLD_SIZE is ''"]),
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is 2, but RANK is not set"]),
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE is 2, but MASTER_ADDR is not set"]),
    ({"WORLD_SIZE": "2", "RANK": "one", **TORCHRUN}, ["RANK is 'one'"]),
    ({"WORLD_SIZE": "2", "RANK": "5", **TORCHRUN}, ["WORLD_SIZE is 2, but RANK is 5"]),
])
def test_an_environment_that_torchrun_has_not_made(environment, named, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel.dist, "init_process_group", pytest.fail)
    monkeypatch.setenv("RANK", environment.get("RANK", "x"))
    if "RANK" not in environment:
        monkeypatch.delenv("RANK")
    code, error = program(train.main, ["--run", str(tmp_path / "run")]), capsys.readouterr().err
    if error or environment.get("RANK", "0") == "0":  # another process says what is wrong
        assert code == 2 and "unset WORLD_SIZE" in error and all(name in error for name in named), error
    assert code == 2 and len(error.splitlines()) <= 1 and not (tmp_path / "run").exists()


def test_of_several_processes_the_first_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # without WORLD_SIZE it means nothing
    assert program(train.main, ["--stage", "nope"]) == 2 and "nope" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert program(train.main, ["--stage", "nope"]) == 2 and not capsys.readouterr().err


def test_a_terminal_that_lacks_letters_shows_their_numbers(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))

    def main(_):
        print("新闻")
        raise UserError("情感")

    assert program(main, []) == 2
    sys.stdout.flush(), sys.stderr.flush()
    assert sys.stdout.buffer.getvalue() == rb"\u65b0\u95fb" + b"\n"
    assert sys.stderr.buffer.getvalue() == rb"error: \u60c5\u611f" + b"\n"


def test_without_a_terminal_nothing_is_printed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert program(lambda _: sys.stdout.write("x"), []) == 0
    assert program(lambda _: train.main(["--stage", "x"]), []) == 2


def test_standard_output_that_is_full_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert program(lambda _: print("x"), []) == 1
    assert capsys.readouterr().err.startswith("error: standard output: No space left on device; ")
    sys.stdout.close()  # what is left in it no longer matters


def test_a_long_name_is_shortened(tmp_path, capsys):
    assert program(train.main, ["--run", str(tmp_path / ("x" * 5000))]) == 2
    assert len(capsys.readouterr().err) < 400


def test_several_problems_are_reported_together(tmp_path):
    with pytest.raises(UserError) as caught:
        train.main(["--run", str(tmp_path / "run"), "--multitask-batch", "0", "--fast-rate", "-1", "--prompt-length",
                    "0", "--sources", "toy-bq,toy-bq", "--device", "banana"])
    assert all(word in str(caught.value) for word in ("--multitask-batch", "--fast-rate", "--prompt-length", "toy-bq",
                                                      "banana"))


def test_what_every_method_reads(tmp_path):
    """Every rate that something learns at, and every size: nothing of use is refused, nothing idle is let through."""
    idle = {name: unread(parse(["--method", name])[0]) for name in METHODS}
    assert idle["talora"] == []
    assert idle["ft"] == ["prompt_length", "rank", "scale", "gate_per_head", "slow_rate", "fast_rate", "regulariser",
                          "reg_weight"]
    assert "prompt_rate" in idle["pt"] and "prompt_rate" not in idle["spot"]
    assert [name for name in METHODS if "scale" not in idle[name]] == ["talora", "lora"]
    assert [name for name in METHODS if "gate_per_head" not in idle[name]] == [
        "talora", "deep-pt", "deep-spot", "deep-spot-nearest", "deep-mpt"]


def test_offline_a_name_of_the_hub_is_refused_in_one_sentence(tmp_path):
    out = subprocess.run([sys.executable, "train.py", "--backbone", "nobody/nothing", "--run", str(tmp_path / "run")],
                         cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert out.returncode == 2 and len(out.stderr.splitlines()) == 1, out.stderr
    assert "'nobody/nothing'" in out.stderr and "--backbone takes a folder" in out.stderr
    assert not (tmp_path / "run").exists()


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    root, read = bad_data(tmp_path, "none"), Path.read_bytes

    def refused(path):  # root may read whatever it likes
        if path.name == "train.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match="sanwen/train.jsonl cannot be read .Permission denied.; give yourself"):
        train.main(["--data-root", root, "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(UserError, match="no permission"):
        train.main(["--run", str(tmp_path / "run")])


def test_a_gpu_without_bfloat16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match="cuda does not know bfloat16; use --dtype float32"):
        train.main(["--run", str(tmp_path / "run"), "--device", "cuda", "--dtype", "bfloat16"])


# ------------------------------------------------------------------------------------- hostile backbones and rows

def changed(file, **values):
    """A change of a backbone's JSON file."""
    return lambda folder: (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))


def weights(change):
    def rewrite(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return rewrite


def pickled(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def with_code(folder):
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    changed("config.json", model_type="evil", auto_map=code)(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'OWNED')!r}, 'w')\n")


BACKBONES = {  # what is wrong with it, and what the sentence must name
    "nan": (weights(lambda state: state["lm_head.weight"][0].fill_(math.nan)), ["not finite in lm_head.weight"]),
    "inf": (weights(lambda state: state["model.norm.weight"][:2].copy_(torch.tensor([math.inf, -math.inf]))),
            ["not finite in model.norm.weight"]),
    "other shape": (weights(lambda state: state.update({"model.norm.weight": torch.ones(3)})),
                    ["another shape", "model.norm.weight"]),
    "pickle": (pickled, ["model.safetensors", "weights (safetensors)"]),
    "code": (with_code, ["custom code"]),
    "no layers": (changed("config.json", num_hidden_layers=0), ["num_hidden_layers"]),
    "no heads": (changed("config.json", num_attention_heads=0), ["ZeroDivisionError"]),
    "a word": (changed("config.json", hidden_size="x"), ["hidden_size", "'x'"]),
    "null": (lambda folder: (folder / "config.json").write_text("null"), ["TypeError"]),
    "list": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), ["AttributeError"]),
    "awq": (changed("config.json", quantization_config={"quant_method": "awq"}), ["Error"]),
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_hostile_backbone_is_refused_and_nothing_of_it_runs(kind, tmp_path, backbone_folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # somebody who says yes to everything
    folder, (change, named) = tmp_path / "backbone", BACKBONES[kind]
    shutil.copytree(backbone_folder, folder)
    change(folder)
    with pytest.raises(UserError) as caught:
        train.main(["--backbone", str(folder), "--run", str(tmp_path / "run")])
    sentence = str(caught.value)
    assert all(name in sentence for name in [str(folder), "--backbone takes", *named]), sentence
    assert "\n" not in sentence
    assert not (tmp_path / "run").exists() and not (folder / "OWNED").exists()


OWN = {"prompt": "soup {i} =>", "answer": "y"}
ROWS = [  # fields of every row, or the first line of the file; options; what the sentence must name
    ({"answer": None}, [], ["sanwen", "20 empty answer"]),
    ({"answer": ["y"]}, [], ["train.jsonl:1", "answer is \"['y']\" (list), but must be a text or a number"]),
    ({"choices": "yn"}, [], ["train.jsonl:1", "choices is 'yn' (str), but must be a list"]),
    ({"choices": ["y", ["n"]]}, [], ["train.jsonl:1", "choices", "a list of texts or numbers"]),
    ({"prompt": ["a"]}, [], ["train.jsonl:1", "prompt is", "must be a text"]),
    ({"hard_prompt": 3}, [], ["train.jsonl:1", "hard_prompt is '3' (int), but must be a text"]),
    ({"passage": 3}, [], ["train.jsonl:1", "passage is '3'"]),
    ({"group": {"a": 1}}, [], ["train.jsonl:1", "group", "a text or a number"]),
    ("[" * 100_000, [], ["train.jsonl:1", "nested too deep"]),
    ('{"prompt": ' + "9" * 5000 + ', "answer": "y"}', [], ["train.jsonl:1", "not readable as JSON"]),
    ('{"prompt": "soup \\ud800", "answer": "y"}', [], ["train.jsonl:1", "not readable as JSON", "surrogates"]),
    ({"answer": "soup soup soup"}, ["--max-new-tokens", "2"], ["sanwen: 4 of 4 test answers", "--max-new-tokens 2"]),
    ({"hard_prompt": "soup " * 40}, ["--max-length", "32", "--references"], ["sanwen/test.jsonl:", "--max-length"]),
]


@pytest.mark.parametrize("fields, options, named", ROWS, ids=[str(fields)[:40] for fields, *_ in ROWS])
def test_rows_of_another_form_are_refused_by_file_and_line(fields, options, named, tmp_path, backbone_folder):
    train_rows, test_rows = ([{**OWN, "prompt": f"soup {split} {i} =>", **(fields if isinstance(fields, dict) else {})}
                              for i in range(count)] for split, count in (("train", 20), ("test", 4)))
    data_root = json_rows(tmp_path / "data", "sanwen", train_rows, test_rows)
    if isinstance(fields, str):
        path = data_root / "sanwen" / "train.jsonl"
        path.write_text(fields + "\n" + path.read_text())
    with pytest.raises(UserError) as caught:
        train.main(["--data-root", str(data_root), "--backbone", str(backbone_folder), "--run", str(tmp_path / "run"),
                    *options])
    assert all(name in str(caught.value) for name in named) and "\n" not in str(caught.value), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_answers_that_are_too_long_are_counted_where_others_are_not(tmp_path, backbone_folder, capsys, monkeypatch):
    rows = [{"prompt": f"soup {i} =>", "answer": "soup " * (1 + i % 2 * 3)} for i in range(24)]
    data_root = json_rows(tmp_path / "data", "sanwen", rows[:20], rows[20:])
    monkeypatch.setattr(train.Run, "check_identity", lambda *_: (_ for _ in ()).throw(UserError("far enough")))
    with pytest.raises(UserError, match="far enough"):
        train.main(["--data-root", str(data_root), "--backbone", str(backbone_folder), "--run", str(tmp_path / "run"),
                    "--max-new-tokens", "2"])
    assert "sanwen: 2 of 4 test answers are longer than --max-new-tokens 2" in capsys.readouterr().out


def test_rewritten_rows_that_do_not_fit_are_refused_before_training(tmp_path, backbone_folder):
    with pytest.raises(UserError, match=r"toy-\w+ test:\d+, rewritten: .*raise --max-length"):
        train.main(["--sources", "toy-amazon", "--targets", "toy-sanwen", "--stage", "all", "--max-length", "16",
                    "--backbone", str(backbone_folder), "--run", str(tmp_path / "run"), "--no-references"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../etc", "/etc", "..", "a\nb"])
def test_a_task_cannot_lie_outside_the_data(name, tmp_path):
    json_rows(tmp_path, "etc", [OWN], [OWN])
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="cannot be a task"):
        data.main(["--data-root", str(tmp_path / "data"), "--task", name])


def test_an_adapter_for_other_tasks_is_not_built_on(small_world, tmp_path):
    run = tmp_path / "run"
    command = [*soak.command(small_world, run), "--base-steps", "1", "--multitask-steps", "1"]
    train.main([*command, "--stage", "multitask"])
    for stage, next_stage in (("multitask", "target"), ("base", "multitask")):
        changed("adapter.json", tasks=["toy-sanwen", "toy-amazon"])(run / stage / "best")
        with pytest.raises(UserError, match=f"{stage}/best' is for toy-sanwen, toy-amazon, not for toy-amazon"):
            train.main([*command, "--stage", next_stage])
        shutil.rmtree(run / "multitask", ignore_errors=True)
