"""What the README says is there is there, and what it tells people to type works."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import data
import train
from experiments import report
from experiments.compare import METHODS
from model import TALoRA, TALoRAConfig, load_backbone

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:^    |&& |`)((?:python|torchrun) [^`\n]+)", README, re.MULTILINE)


def test_it_starts_with_what_to_type():
    assert README.splitlines().index("## Qwen2.5-7B on one GPU") < 140
    assert "    pip install -r requirements.txt && python train.py --stage multitask" in README.splitlines()[:10]


@pytest.mark.parametrize("folder", [".", "tasks", "experiments", "notebooks"])
def test_every_link_leads_somewhere(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for path, _, section in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", text)):
        path = path or "README.md"
        assert (ROOT / folder / path).exists(), path
        if section:
            titles = re.findall(r"^#+ (.*)$", (ROOT / folder / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], section


def test_every_equation_is_where_the_table_says():
    rows = re.findall(r"^\| \((\d)\) \|.*\| \[`(\w+\.py):(\w+)`\]\((\w+\.py)\) \|$", README, re.MULTILINE)
    assert [number for number, *_ in rows] == ["1", "2", "3", "4", "5"]
    for number, file, function, link in rows:
        source = inspect.getsource(getattr(importlib.import_module(file.removesuffix(".py")), function))
        assert file == link and f"Eq. ({number})" in source, f"{function} is not tagged Eq. ({number})"


def test_files_are_listed_in_the_order_to_read_them():
    section = README.split("## The files")[1].split("\n## ")[0]
    order = ["lowrank", "gating", "model", "train", "data", "evaluate"]
    assert re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", section, re.MULTILINE) == order
    assert {path.stem for path in ROOT.glob("*.py")} == {*order, "checkpoint"} and "Skip [checkpoint.py]" in section


def test_every_command_can_be_parsed():
    assert len(COMMANDS) >= 12
    for command in COMMANDS:
        words = shlex.split(command)
        if "-m" in words:
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), command
        if "train.py" in words and not {"--help", "..."} & {*words}:
            train.parse(words[words.index("train.py") + 1:])
        if "experiments.compare" in words:
            train.parse(words[words.index("--method") + 2:], METHODS[words[words.index("--method") + 1]])


def test_every_option_in_the_text_exists():
    options = {train.flag(name) for name in vars(train.parse([]))} | {"--help", "--nproc-per-node"}
    for program in ("checkpoint.py", "evaluate.py", "data.py", "experiments/compare.py"):
        options |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / program).read_text(encoding="utf-8")))
    named = {word.replace("--no-", "--") for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)}
    assert named <= options, named - options


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    model = TALoRA(load_backbone()[0], ["toy-amazon"], TALoRAConfig(8, 4))
    own = data.Example("mymood", "bob found the tea nice =>", "happy", ("sad", "happy"))
    specs = {"toy-amazon": data.spec_of("toy-amazon", data.load_task("toy-amazon", "train")),
             "mymood": data.spec_of("mymood", [own])}
    model.about = dict(chat_template="off", max_length=128, max_new_tokens=8, tasks=specs)
    model.save(tmp_path / "runs/toy/multitask/best")
    model.add_task("mymood")
    model.save_task("mymood", tmp_path / "runs/toy/target/mymood-32-shot/best")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})
    stars, mood = capsys.readouterr().out.strip().splitlines()
    assert "'five':" in stars and mood.startswith(("sad {'sad':", "happy {'sad':"))


def test_the_results_are_those_of_the_results_file():
    records = report.read_results(ROOT / "experiments/results/full")
    settings = {"sources": report.SOURCES, "sources, rewritten": report.REWRITTEN}
    settings |= {f"targets, k = {k}": report.target(k) for k in (8, 32)}
    methods = ("talora", "pt", "spot", "mpt", "deep-spot-nearest", "lora", "adapter", "ft")
    assert report.main_table(records, methods, settings).replace(" (5)", "") in README
    real = report.read_results(ROOT / "experiments/results/qwen2.5-coder-0.5b")
    assert report.main_table(real, ("frozen backbone", *report.methods_in(real))) in README
