"""Predictions, development scores, references, tables, pictures, and a finished run (the metrics: test_metrics.py)."""

import json
import math
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
from checkpoint import UserError, run_program
from data import Example
from lowrank import task_cosines
from model import NO_TASK, TALoRA, TALoRAConfig, load_backbone
from tasks import chinese, micro

TOKENIZER = micro.tokenizer()
CFG = SimpleNamespace(test_rows=0, max_length=64, max_new_tokens=5, eval_tokens=8192, data_root="", seed=0,
                      references=True, chat_template="off")
TASKS = ("toy-amazon", "toy-cote_mfw", "toy-c3")


@pytest.fixture
def model(tiny_backbone, open_adapter):
    return open_adapter(tiny_backbone(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id))


def test_closed_sets_are_answered_by_the_most_probable_whole_choice(model):
    examples = data.load_task("toy-thucnews", "test")[:12]
    answers = evaluate.predict(model, TOKENIZER, examples, 1, CFG)
    assert answers == evaluate.predict(model, TOKENIZER, examples[::-1], 1, CFG)[::-1], "the order of rows is nothing"
    for example, answer in zip(examples, answers):
        row, log_p = data.encode(example, TOKENIZER, 64), []
        for choice in row.choice_ids:  # one plain forward for every choice
            ids = torch.tensor([[*row.prompt_ids, *choice]])
            logits = model(ids, torch.ones_like(ids), torch.tensor([1])).logits[0].log_softmax(-1)
            start = len(row.prompt_ids) - 1
            log_p.append(sum(logits[start + t, token].item() for t, token in enumerate(choice)))
        assert answer == example.choices[log_p.index(max(log_p))] and choice[-1] == TOKENIZER.eos_token_id
    assert len(set(answers)) > 1, "the check needs answers that differ"


@pytest.mark.parametrize("ends", [[], [11], [12, 11]])
def test_a_generated_answer_is_cut_at_the_first_of_several_end_tokens(model, monkeypatch, ends):
    new = [10, 11, 10, TOKENIZER.eos_token_id, 10]  # without end tokens of the model, the tokenizer's counts
    monkeypatch.setattr(type(model), "end_tokens", ends)
    monkeypatch.setattr(model, "generate", lambda ids, *_: torch.tensor([[*ids[0].tolist(), *new]]))
    answer, = evaluate.predict(model, TOKENIZER, data.load_task("toy-cmrc2018", "test")[:1], 0, CFG)
    assert answer == TOKENIZER.decode(new[:1] if ends else new[:3])


def test_a_test_row_is_shortened_without_looking_at_its_answer(model, monkeypatch):
    """A passage that is too long keeps its beginning: a window around the answer would give the answer away."""
    passage, seen = " ".join(["soup"] * 80) + " oslo", []
    fields = (("text", 0, len(passage)),)
    example = Example("own", f"{passage} ; who was it", "oslo", protected=("oslo",), fields=fields)
    monkeypatch.setattr(model, "generate", lambda ids, *_: (seen.append(ids), ids)[1])
    evaluate.predict(model, TOKENIZER, [example], 0, CFG)
    assert "soup" in TOKENIZER.decode(seen[0][0]) and "oslo" not in TOKENIZER.decode(seen[0][0])


def test_length_batches_hold_every_row_once_within_the_budget():
    rows = [data.Encoded([1] * n, [2], [], "t") for n in (7, 3000, 5, 6000, 4, 9000, 1)]
    batches = evaluate.length_batches(rows, 8192)
    assert sorted(i for part in batches for i in part) == list(range(7)) and len(batches) < 7
    for part in batches:
        assert len(part) == 1 or len(part) * max(len(rows[i].prompt_ids) for i in part) <= 8192


def test_dev_score_is_exact_answers_and_mean_loss_over_tasks(model):
    rows = {t: [data.encode(e, TOKENIZER, 64) for e in data.load_task(t, "dev")[:n]]
            for t, n in (("toy-amazon", 5), ("toy-cmrc2018", 3))}
    right, loss = evaluate.dev_score(model, rows, {"toy-amazon": 0, "toy-cmrc2018": NO_TASK}, tokens=64)
    means = []
    for encoded, task_id in zip(rows.values(), (0, NO_TASK)):
        batches = [vars(data.collate([row], [task_id])) for row in encoded]
        means.append(sum(model(**batch).loss.item() for batch in batches) / len(batches))
    assert loss == pytest.approx(sum(means) / 2, rel=1e-4) and 0 <= right <= 1


def test_references_are_the_majority_the_frozen_backbone_and_the_instruction_in_words(monkeypatch):
    backbone, tokenizer = load_backbone()
    few = {split: data.load_task("toy-amazon", split)[:20] for split in ("train", "test")}
    monkeypatch.setattr(data, "load_task", lambda task, split, root: few[split])
    columns = evaluate.references(backbone, tokenizer, "toy-amazon", CFG)
    assert list(columns) == ["majority", "frozen backbone", "hard instruction"]
    usual = evaluate.majority([row.answer for row in few["train"]])
    always = sum(row.answer == usual for row in few["test"]) / 20
    for rows in ("plain", "rewritten"):
        usual, frozen, told = (column[rows]["score"] for column in columns.values())
        assert usual == always and frozen < 0.9 < told
    monkeypatch.setattr(CFG, "references", False)
    assert list(evaluate.references(backbone, tokenizer, "toy-amazon", CFG)) == ["majority"]


def test_a_table_has_a_line_for_every_task_and_their_mean_and_blanks_for_what_is_missing():
    score = {"plain": {"score": 0.5}, "rewritten": {"score": 0.25}}
    scores = {"x": {"majority": score, "talora": {"plain": {"score": 1.0}}}, "y": {"majority": score}}
    assert evaluate.macro(scores, "majority", "rewritten") == 0.25 and math.isnan(evaluate.macro(scores, "talora"))
    assert evaluate.table(scores, {"x": "accuracy", "y": "char_f1"}) == (
        "| task          | metric   | majority | talora |\n"
        "| ------------- | -------- | -------: | -----: |\n"
        "| x             | accuracy |     50.0 |  100.0 |\n"
        "| y             | char_f1  |     50.0 |        |\n"
        "| macro average |          |     50.0 |        |\n")
    assert "talora" not in evaluate.table(scores, {"x": "accuracy", "y": "char_f1"}, "rewritten")
    relations = {"finre": {"talora": {"plain": {"score": 0.5, "micro_f1": 0.5, "accuracy": 0.75}}}}
    assert evaluate.table(relations, {"finre": "micro_f1"}).splitlines()[2:] == [
        "| finre         | micro F1 (no relation left out) |   50.0 |",
        "| finre         | accuracy                        |   75.0 |",
        "| macro average |                                 |   50.0 |"]
    assert evaluate.markdown(["a", "b"], [["long", "1"]]) == "| a | b |\n| --- | ---: |\n| long | 1 |\n"


def write_metrics(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every picture that is drawn, by the name of its file."""
    axes, new_figure = {}, evaluate.new_figure

    @contextmanager
    def remember(path, *args, **options):
        with new_figure(path, *args, **options) as made:
            axes[path.name] = made[1]
            yield made

    monkeypatch.setattr(evaluate, "new_figure", remember)
    return axes


def test_the_picture_of_the_loss_shows_every_batch_their_running_mean_and_the_development_rows(tmp_path, drawn):
    losses = [3 / step for step in range(1, 31)]
    write_metrics(tmp_path, {"step": 0}, *({"step": 2 * i, "loss": loss} for i, loss in enumerate(losses, 1)),
                  {"step": 60, "dev_accuracy": 0.5, "dev_loss": 1.5})
    evaluate.draw_run(tmp_path)
    batches, means, dev = (line.get_xydata().tolist() for line in drawn["loss.png"].lines)
    assert batches == [[2 * i, loss] for i, loss in enumerate(losses, 1)] and dev == [[60, 1.5]]
    assert means[:5] == batches[:5], "a mean would be far above a loss that falls fast"
    assert means[20] == [42, pytest.approx(sum(losses[18:23]) / 5)]
    assert means[-1] == [60, pytest.approx(sum(losses[-3:]) / 3)]
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_gates_and_cosines_are_drawn_as_they_are_logged_and_only_where_they_changed(tmp_path, drawn):
    before, after = ({"gates": [g, -4 * g], "tasks": ["a", "b"], "cosines": [[1, g], [g, 1]]} for g in (0.0, 0.1))
    rows = [{"step": 0, **before}, {"step": 5, **after}, {"step": 5, "dev_accuracy": 0.5, "dev_loss": 1.5, **after}]
    write_metrics(tmp_path / "frozen", rows[0], {"step": 5, **before})
    write_metrics(tmp_path / "bare", {"step": 0})
    write_metrics(tmp_path / "target", *({key: row[key] for key in row if key != "gates"} for row in rows))
    for folder in ("frozen", "bare", "target"):
        evaluate.draw_run(tmp_path / folder)
    assert not drawn and not list(tmp_path.rglob("*.png")), "no picture of nothing"

    write_metrics(tmp_path / "run", *rows)
    (tmp_path / "run" / "best").mkdir()
    about = {"method": "talora", "config": {"rank": 8}, "backbone": {"hidden_size": 64}}
    (tmp_path / "run" / "best" / "adapter.json").write_text(json.dumps(about))
    evaluate.draw_run(tmp_path / "run")
    gates, (first, last) = drawn["gates.png"], drawn["cosines.png"]
    image = gates.collections[0]
    assert image.get_array().tolist() == [[0, 0.1], [0, -0.4]] and image.get_clim() == (-0.4, 0.4)
    shut, subtracts, adds = (image.to_rgba(value) for value in (0.0, -0.4, 0.4))
    assert min(shut[:3]) > 0.9 and subtracts[0] > subtracts[2] and adds[2] > adds[0], "white, red, blue"
    assert all(line.get_ydata()[-1] != layer and (line.get_ydata()[-1] > layer) == (gate > 0)
               for layer, (line, gate) in enumerate(zip(gates.lines[1::2], (0.1, -0.4)))), "above its zero, or below"
    assert [text.get_text() for text in gates.texts] == ["+0.10", "-0.40"]
    assert [axis.images[0].get_array()[0, 1] for axis in (first, last)] == [0, 0.1]
    level = first.figure.axes[-1].lines[-1].get_ydata()[0]
    random = task_cosines(torch.randn(500, 8), torch.randn(500, 64)).abs()
    assert level == pytest.approx(random[~torch.eye(500, dtype=torch.bool)].mean().item(), rel=0.1)


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("installed, labels", [
    ((), ["task 1", "task 2", "task 3", "café", r"\$_\$"]),
    (("not installed", "STIXGeneral"), ["task 1", "\U0001d49c-8-shot", "task 3", "café", r"\$_\$"])])
def test_names_are_drawn_in_a_font_that_has_their_characters_and_numbered_where_none_has(
        tmp_path, monkeypatch, installed, labels):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["DejaVu Sans"])  # which has no script A
    monkeypatch.setattr(evaluate, "CHINESE_FONTS", installed)
    names, said = ["情感", "\U0001d49c-8-shot", "情感-x", "café", "$_$"], []
    assert evaluate.label_tasks(names, tmp_path, said.append) == labels
    assert "'情感': 'task 1'" in said[0] and "café" not in said[0]
    row = {"step": 1, "tasks": names, "cosines": [[0.5] * 5] * 5}
    evaluate.draw_cosines(tmp_path / "cosines.png", row, row)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the shipped backbone, its adapters made by hand: the gates are open, the tasks differ."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    torch.manual_seed(0)
    model = TALoRA(load_backbone()[0], TASKS, TALoRAConfig(3, 2))
    torch.nn.init.constant_(model.gate, -0.3)
    specs = {task: data.spec_of(task, data.load_task(task, "train")) for task in TASKS}
    afqmc = data.spec_of("afqmc", []) | {"answers": ["no", "yes"]}  # two fields, in Chinese; own has no template at all
    model.about = dict(chat_template="off", max_length=64, max_new_tokens=5, tasks={"afqmc": afqmc, **specs})
    model.about["tasks"]["own"] = data.spec_of("own", [Example("own", "p", "no", ("no", "yes"))])
    model.save(folder / "multitask/best")
    torch.nn.init.normal_(model.v[model.add_task("toy-finre")])
    model.about["tasks"]["toy-finre"] = data.spec_of("toy-finre", data.load_task("toy-finre", "train"))
    model.save_task("toy-finre", folder / "target/toy-finre-8-shot/best")
    for stage, tasks, shots in (("multitask", TASKS, {}), ("target/toy-finre-8-shot", ["toy-finre"], {"shots": 8})):
        column = {"talora": {"plain": {"score": 0.5}, "rewritten": {"score": 0.25}}}
        results = {"method": "talora", "scores": dict.fromkeys(tasks, column), **shots,
                   "metrics": dict.fromkeys(tasks, "accuracy"), "rewritten": dict.fromkeys(tasks, 1.0)}
        (folder / stage / "results.json").write_text(json.dumps(results))
        (folder / stage / "stage.json").write_text(json.dumps(vars(CFG) | {"backbone": "", "dtype": "float32"}))
        write_metrics(folder / stage, {"step": 1, "dev_accuracy": 0.5, "dev_loss": 1.5})
        line = {"task": tasks[-1], "prompt": "it's =>", "choices": ["a", "b"]}
        (folder / stage / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def open_stage(run, task):
    """The one stage of a task: its folder, model and tokenizer."""
    (folder, adapter), = evaluate.stages_of(run, task).items()
    return folder, *evaluate.open_adapter(adapter)


def test_a_report_has_a_table_for_the_sources_and_for_every_number_of_examples_and_prints_what_was_asked_for(run):
    said, target = [], run / "target/toy-finre-8-shot"
    evaluate.report(run, said.append, [run / "multitask", target])
    tables = [text for text in said if "saved as" in text]
    assert len(tables) == 2 and "| toy-finre     | accuracy |   25.0 |" in tables[1] and "(100% could be)" in tables[1]
    assert (run / "multitask/table.md").read_text() in tables[0]
    assert (run / "target/table-8-shot.md").read_text() in tables[1]
    assert f"""--run {run} --task toy-finre --ask 'it'"'"'s =>' --choices a b""" in said[-1]
    evaluate.report(run, said.append, [target])
    assert len([text for text in said if "saved as" in text]) == 3


def test_of_a_single_row_the_answer_is_shown_three_times():
    shown = SimpleNamespace(backbone=load_backbone()[0], tokenizer=TOKENIZER, cfg=CFG, method=SimpleNamespace(name="x"))
    answered = {"toy-amazon": [(data.load_task("toy-amazon", "test")[0], "one")]}
    assert evaluate.show_answers(shown, answered).count("x: one") == 3


TEXT = "ann found the soup very awful at the oslo cafe"
PAIR = {"sentence1": f" {TEXT} ", "sentence2": " the soup was nice "}


def test_answers_to_mixed_questions_are_those_to_each_alone_and_a_template_is_filled(run):
    _, model, tokenizer = open_stage(run, "toy-finre")
    whole = chinese.TASKS["afqmc"].template.format(**PAIR, options="no、yes")
    questions = [("toy-amazon", TEXT), ("afqmc", PAIR), ("toy-cote_mfw", TEXT), ("toy-finre", TEXT), ("own", TEXT),
                 ("toy-c3", {"text": TEXT, "choices": ["tech", "food"]}), ("toy-amazon", f"{TEXT} =>"),
                 ("afqmc", whole), ("afqmc", PAIR | {"sentence1": " the bus came late "})]
    answers = evaluate.answer(model, tokenizer, questions)
    for question, (text, shares) in zip(questions, answers):
        (alone, own), = evaluate.answer(model, tokenizer, [question])
        assert alone == text and shares == pytest.approx(own, rel=1e-3) and sum(shares.values()) <= 1 + 1e-5
        assert text == max(shares, key=shares.get) if shares else question[0] == "toy-cote_mfw"
    shares = [shares for _, shares in answers]
    assert shares[6] == pytest.approx(shares[0], rel=1e-3) and shares[7] == pytest.approx(shares[1], rel=1e-3)
    assert shares[8] != pytest.approx(shares[7], rel=1e-3), "the fields are read"
    finre = answers_of("toy-finre")
    assert [list(found) for found in shares[1:6]] == [["no", "yes"], [], [*finre], ["no", "yes"], ["tech", "food"]]
    row = data.encode(Example("toy-finre", f"{TEXT} =>", finre[0], finre), tokenizer, 64)
    own = model.score(*data.collate_prompts([row]), torch.tensor([3]), [row.choice_ids])[0]
    assert [*shares[3].values()] == pytest.approx(own.exp().tolist(), rel=1e-3), "by the weights of its own task"


def answers_of(task):
    return data.task_of(task, data.load_task(task, "train")).answers


@pytest.mark.parametrize("question, words", [
    (("afqmc", {"sentence2": TEXT}), "reads sentence1, sentence2; missing are sentence1"),
    (("toy-amazon", "soup " * 500 + "=>"), "the question: the prompt without its passage has 501 tokens"),
])
def test_a_question_that_lacks_something_or_is_too_long_is_refused(run, question, words):
    _, model, tokenizer = open_stage(run, "toy-amazon")
    with pytest.raises(UserError, match=words):
        evaluate.answer(model, tokenizer, [("toy-amazon", TEXT), question])


def test_a_copied_adapter_and_a_copied_task_are_asked_as_in_their_run(run, tmp_path, capsys):
    question = ["--task", "toy-finre", "--ask", f"zzz {TEXT}"]
    target, model, tokenizer = open_stage(run, "toy-finre")
    copies = [str(shutil.copytree(folder / "best", tmp_path / name)) for name, folder in (
        ("shared", run / "multitask"), ("task", target))]
    evaluate.main(["--adapter", *copies, *question])
    copied = capsys.readouterr().out
    evaluate.main(["--run", str(run), *question])
    assert capsys.readouterr().out == f"{target} answers: {copied}\n"
    answer, *lines, note = copied.splitlines()
    shares = {line.split(maxsplit=1)[1]: float(line.split("%")[0]) for line in lines}
    assert list(shares) == [*answers_of("toy-finre"), "another answer"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert shares[answer] == max([*shares.values()][:-1]) and note == "1 of 11 words are unknown to the backbone"
    for task, options, fields in (("toy-cote_mfw", [TEXT], TEXT), ("afqmc", [*PAIR.values()], PAIR), (
            "toy-c3", [TEXT, "--choices", "tech", "food"], {"text": TEXT, "choices": ["tech", "food"]})):
        evaluate.main(["--adapter", copies[0], "--task", task, "--ask", *options])
        (answer, shares), = evaluate.answer(model, tokenizer, [(task, fields)])
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == answer and [line.split("%  ")[1] for line in lines][:-1] == [*shares]


def test_diagnose_shows_the_gates_and_compares_with_the_backbone_without_the_adapter(run):
    folder, model, tokenizer = open_stage(run, "toy-amazon")
    ids = {task: model.tasks.index(task) for task in TASKS}
    rows = {t: [data.encode(e, tokenizer, 64, False) for e in data.load_task(t, "dev")[:16]] for t in TASKS}
    first, *lines = evaluate.diagnose(folder, model, tokenizer).splitlines()
    assert sum(f" {math.tanh(-0.3):+.3f} " in line for line in lines) == 4, "gates keep their sign"
    assert [line.split()[0] for line in lines[-3:]] == [*TASKS], "cosines"
    own = evaluate.dev_score(model, rows, ids)[1]
    torch.nn.init.zeros_(model.gate)
    plain = evaluate.dev_score(model, rows, ids)[1]
    assert f"(loss {own:.3f}), without the adapter" in first and first.endswith(f"(loss {plain:.3f})")


@pytest.mark.parametrize("arguments, words", [
    ("--run nowhere", ["nowhere", "no finished multitask or target stage", "train.py"]),
    ("--run RUN --task toy-bq --ask x", ["toy-bq", "toy-amazon, toy-cote_mfw, toy-c3, toy-finre"]),
    ("--run RUN --ask x", ["--task NAME"]), ("--run RUN --task toy-amazon --choices x", ["--ask TEXT"]),
    ("--adapter RUN/multitask/best --task toy-amazon", ["--ask TEXT"]),
    ("--adapter RUN/multitask/best --task toy-bq --ask x", ["no task 'toy-bq'", "toy-amazon"]),
    ("--adapter RUN/multitask/best --task afqmc --ask a b c", ["reads 2 texts", "but --ask has 3"]),
    ("--adapter RUN/multitask/best --task afqmc --ask x", ["reads sentence1, sentence2", "missing are sentence2"]),
    ("--adapter RUN/multitask/best --task toy-c3 --ask x", ["choices of each row", "--choices A B"]),
    ("--adapter RUN/multitask/best RUN/base --task toy-amazon --ask x", ["RUN/base", "task.json"]),
    ("--adapter nobody/nothing --task toy-amazon --ask x", ["'nobody/nothing' is neither a folder nor an adapter"]),
    ("--ask x --task toy-bq", ["--run"]), ("", ["--run", "--diagnose", "--adapter", "--help"]),
])
def test_what_cannot_be_answered_is_refused_in_a_sentence(run, arguments, words, capsys):
    assert run_program(evaluate.main, arguments.replace("RUN", str(run)).split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and [word for word in words if word.replace("RUN", str(run)) not in error] == []
