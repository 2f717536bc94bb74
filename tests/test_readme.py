"""What the README says is there is there, and what it tells people to type works."""

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import bench
import suite
import toy
import train
from baselines import METHODS
from checkpoint import write_json
from config import check, parse
from model import TALoRA, TALoRAConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_equation_is_where_the_table_says():
    rows = re.findall(r"^\| \((\d)\) \|.*\| \[`(\w+\.py):(\w+)`\]\((\w+\.py)\) \|$", README, re.MULTILINE)
    assert [number for number, *_ in rows] == ["1", "2", "3", "4", "5"]
    for number, file, function, link in rows:
        assert file == link
        source = (ROOT / file).read_text(encoding="utf-8")
        found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == function]
        assert len(found) == 1, f"{file} has no function {function}"
        lines = source.splitlines()[found[0].lineno:found[0].end_lineno]
        assert any(f"Eq. ({number})" in line for line in lines), f"{file}:{function} has no line tagged Eq. ({number})"


def test_the_file_map_is_complete_and_imports_go_up():
    table = README.split("## The files")[1].split("\n## ")[0]
    files = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", table, re.MULTILINE)
    assert sorted(files) == sorted(path.stem for path in ROOT.glob("*.py"))
    for i, name in enumerate(files):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        below = imported & set(files[i:])
        assert not below, f"{name}.py imports {below}, which the README's list names later"


def commands():
    lines = re.findall(r"^    (.*python (?:train|evaluate|data)\.py.*)$", README, re.MULTILINE)
    assert len(lines) >= 8
    alone = [part.strip() for line in lines for part in re.split("&&|;", line) if "python" in part]
    return alone + re.findall(r"^    torchrun .* -- (train\.py .*)$", README, re.MULTILINE)


def test_every_training_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/toy").mkdir(parents=True)
    write_json(Path("runs/toy/options.json"), dataclasses.asdict(parse([])[0]))  # what --resume reads
    count = 0
    for command in commands():
        command = command.replace("DIR", str(ROOT)).replace("$seed", "1").replace("PATH", "path")
        words = shlex.split(command)
        if "train.py" in words:
            cfg, _ = parse(words[words.index("train.py") + 1:])
            check(cfg, words)
            count += 1
    assert count >= 8 and any(command.startswith("train.py") for command in commands()), "torchrun's, too"


def test_every_option_named_in_the_text_exists():
    options = {"--" + name.replace("_", "-") for name in vars(parse([])[0])} | {
        "--help", "--no-references", "--ask", "--choices", "--task", "--diagnose", "--suite", "--jobs", "--out",
        "--resume", "--debug", "--nproc-per-node"}
    options |= set(re.findall(r"--[a-z]+", bench.parser().format_usage()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named <= options, named - options


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    backbone, _ = toy.load_backbone()
    TALoRA(backbone, list(toy.SOURCES), TALoRAConfig(8, 4)).save(tmp_path / "runs/toy/multitask/best")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in toy.vocabulary()


def test_the_two_commands_come_first():
    first = README.splitlines()[:20]
    assert "    pip install -r requirements.txt && python train.py --stage multitask" in first
    assert "    pip install -r requirements.txt && pytest" in first


def test_tables_are_those_of_the_result_files():
    found = re.findall(r"<!-- tables: (\S+) -->\n(.*?)<!-- end of tables -->", README, re.DOTALL)
    assert found
    for folder, text in found:
        assert text.strip() in (ROOT / folder / "tables.md").read_text("utf-8"), f"these are not the tables of {folder}"


def test_tables_of_a_suite_are_made_from_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "draw", lambda *_: None)
    for name in suite.SUITES:
        results = ROOT / "results" / name / "results.jsonl"
        if results.exists() and results.with_name("tables.md").exists():
            (tmp_path / "results.jsonl").write_bytes(results.read_bytes())
            suite.write_report(tmp_path)
            assert (tmp_path / "tables.md").read_text("utf-8") == results.with_name("tables.md").read_text("utf-8")


def stored(name, backbone, preset):
    """What learns of a method for one target task: the numbers of the README's table."""
    cfg, _ = parse(["--method", name, "--preset", preset])
    method = METHODS[name]
    model = method.model(backbone, ["source"], TALoRAConfig(cfg.prompt_length, cfg.rank, cfg.scale, cfg.gate_per_head))
    new = model.add_task("target") if method.per_task else 0
    return train.count(model, train.learning_tensors(model, method, "target", [new]))


def test_what_a_method_stores_is_what_the_readme_says():
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d,]+) \| ([\d,]+) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(METHODS)
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False))
    small, _ = toy.load_backbone()
    for name, micro, seven in rows:
        assert f"{stored(name, small, 'toy'):,}" == micro, name
        with torch.device("meta"):
            assert f"{stored(name, large, 'qwen2.5-7b'):,}" == seven, name


def test_tables_of_the_benchmark_are_made_from_its_files():
    for name, section in (("toy", "methods"), ("toy", "tasks"), ("qwen2.5-0.5b", "methods")):
        report = json.loads((ROOT / "results" / "bench" / f"{name}-cpu.json").read_text("utf-8"))
        assert bench.show("", report["tables"][section]).strip() in README
        assert f"`{report['command']}`" in README
