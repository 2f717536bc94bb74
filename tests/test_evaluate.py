"""Predictions, development scores, references, tables, pictures, and a finished run (the metrics: test_metrics.py)."""

import copy
import json
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
from checkpoint import UserError
from data import Example
from lowrank import task_cosines
from model import NO_TASK, TALoRA, TALoRAConfig, load_backbone
from tasks import micro

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
    model.train()
    right, loss = evaluate.dev_score(model, rows, {"toy-amazon": 0, "toy-cmrc2018": NO_TASK}, tokens=64)
    assert model.training, "evaluation gives the mode back"
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


def test_the_picture_of_the_targets_has_a_bar_for_every_column_and_number_of_examples(tmp_path, drawn):
    def result(task, shots, **columns):
        scores = {name.replace("_", " "): {"plain": {"score": score}} for name, score in columns.items()}
        return {"shots": shots, "method": "talora", "scores": {task: scores}}

    found = [result("x", 0, majority=0.1, frozen_backbone=0.25, talora=1.0),
             result("x", 32, majority=0.1, frozen_backbone=0.25, talora=0.75),
             result("x", 8, majority=0.1, frozen_backbone=0.25, talora=0.5), result("y", 8, majority=0.2, talora=0.5)]
    evaluate.draw_targets(tmp_path / "targets.png", found)
    *bars, majority = drawn["targets.png"].containers
    heights = {bar.get_label(): [patch.get_height() for patch in bar] for bar in bars}
    assert list(heights) == ["frozen backbone", "talora, 8 examples", "talora, 32 examples", "talora, all examples"]
    assert [scores[0] for scores in heights.values()] == [25, 50, 75, 100]
    assert heights["talora, 8 examples"][1] == 50 and math.isnan(heights["talora, 32 examples"][1])
    assert [line[0][1] for line in majority[2][0].get_segments()] == [10, 20]
    assert [label.get_text() for label in drawn["targets.png"].get_xticklabels()] == ["x", "y"]


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
    """A finished run on the shipped backbone, its adapters made by hand: the gates are open, nothing is zero."""
    folder, (backbone, _) = tmp_path_factory.mktemp("runs") / "toy", load_backbone()
    for stage, tasks, shots in (("multitask", TASKS, {}), ("target/toy-finre-8-shot", ["toy-finre"], {"shots": 8})):
        torch.manual_seed(0)
        model = TALoRA(backbone, dict.fromkeys([*TASKS, *tasks]), TALoRAConfig(3, 2))
        torch.nn.init.constant_(model.gate, -0.3)
        model.save(folder / stage / "best")
        column = {"talora": {"plain": {"score": 0.5}, "rewritten": {"score": 0.25}}}
        results = {"method": "talora", "scores": dict.fromkeys(tasks, column), **shots,
                   "metrics": dict.fromkeys(tasks, "accuracy"), "rewritten": dict.fromkeys(tasks, 1.0)}
        (folder / stage / "results.json").write_text(json.dumps(results))
        write_metrics(folder / stage, {"step": 1, "dev_accuracy": 0.5, "dev_loss": 1.5})
    options = {**vars(CFG), "backbone": "", "dtype": "float32", "device": "cpu", "pictures": True}
    (folder / "options.json").write_text(json.dumps(options))
    return folder


def test_a_report_has_a_table_for_the_sources_and_for_every_number_of_examples(run):
    said = []
    evaluate.report(run, said.append)
    assert len(said) == 2 and "| toy-finre     | accuracy |   25.0 |" in said[1] and "(100% could be)" in said[1]
    assert (run / "multitask" / "table.md").read_text() in said[0]
    assert (run / "target" / "table-8-shot.md").read_text() in said[1] and (run / "target" / "targets.png").exists()


def test_a_run_answers_its_test_rows_again(run, capsys, monkeypatch):
    rows = {task: data.load_task(task, "test")[:12] for task in (*TASKS, "toy-finre")}
    monkeypatch.setattr(data, "load_task", lambda task, split, root: rows[task])
    evaluate.main(["--run", str(run)])
    out = capsys.readouterr().out
    found = [json.loads(line) for line in (run / "multitask" / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == [example.prompt for task in TASKS for example in rows[task]]
    amazon = [row for row in found if row["task"] == "toy-amazon"]
    assert all(row["right"] == (row["prediction"] == row["answer"]) for row in amazon)
    assert f"| toy-amazon    | accuracy | {100 * sum(row['right'] for row in amazon) / 12:6.1f} |" in out
    assert len((run / "target" / "toy-finre-8-shot" / "predictions.jsonl").read_text().splitlines()) == 12


def test_a_question_is_answered_with_probabilities(run, capsys):
    stage, = evaluate.open_run(run, task="toy-amazon")
    assert stage.task_ids == dict(zip(TASKS, range(3)))
    text = "zzz found the soup very awful at the oslo cafe"
    evaluate.main(["--run", str(run), "--task", "toy-amazon", "--ask", text])
    answer, _, *lines, note = capsys.readouterr().out.partition(" answers: ")[2].splitlines()
    shares = {line.split(maxsplit=1)[1]: float(line.split("%")[0]) for line in lines}
    assert list(shares) == ["one", "two", "three", "four", "five", "another answer"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.5) and shares[answer] == max([*shares.values()][:5])
    assert note == "1 of 11 words are not in the backbone's vocabulary"  # the eleventh is =>
    ids = stage.tokenizer(f"{text} =>", return_tensors="pt")
    p = stage.model(ids.input_ids, ids.attention_mask, torch.tensor([0])).logits[0, -1].softmax(-1)
    first = p[stage.tokenizer.convert_tokens_to_ids(answer)].item()
    assert shares[answer] <= 100 * first + 0.06, "a whole answer is never more probable than its first word"


def test_a_question_may_bring_its_own_choices_or_have_none(run, capsys):
    evaluate.main(["--run", str(run), "--task", "toy-cote_mfw", "--ask", "ann found the oslo cafe"])
    assert len(capsys.readouterr().out.splitlines()) == 1  # generated
    evaluate.main(["--run", str(run), "--task", "toy-c3", "--ask", "the soup ; food or", "--choices", "tech", "food"])
    shares = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("%  ")[1] for line in shares] == ["tech", "food", "another answer"]


def test_the_fields_of_a_template_are_asked_for_by_name(run, monkeypatch):
    stage, = evaluate.open_run(run, task="toy-amazon")
    stage.task_ids["afqmc"] = 0
    row = Example("afqmc", "p", "不同", ("不同", "相同"))
    monkeypatch.setattr(data, "load_task", lambda *_: [row])
    assert evaluate.ask(stage, "afqmc", ["甲", "乙"], ["one", "two"]).splitlines()[0] in ("one", "two")
    with pytest.raises(UserError, match=r"afqmc reads 2 texts \(sentence1, sentence2\), but --ask has 1"):
        evaluate.ask(stage, "afqmc", ["甲"])
    with pytest.raises(UserError, match="the text of --ask: the choices '不同' and '相同' are the same tokens"):
        evaluate.ask(stage, "afqmc", ["甲", "乙"])
    monkeypatch.setattr(data, "load_task", lambda *_: [replace(row, own=True)])
    assert evaluate.ask(stage, "afqmc", ["甲 乙"], ["one", "two"]).splitlines()[0] in ("one", "two")


def test_diagnose_closes_one_layer_after_the_other(run, capsys):
    evaluate.main(["--diagnose", str(run), "--task", "toy-amazon"])
    out = capsys.readouterr().out
    stage, = evaluate.open_run(run, task="toy-amazon")
    rows = {t: [data.encode(e, stage.tokenizer, 64, False) for e in data.load_task(t, "dev")[:16]] for t in TASKS}
    torch.nn.init.zeros_(stage.model.gate)
    assert f"(loss {evaluate.dev_score(stage.model, rows, stage.task_ids)[1]:.3f})" in out.splitlines()[0]
    layers = [line for line in out.splitlines() if re.match(r" +\d ", line)]
    assert len(layers) == 4 and all(f" {math.tanh(-0.3):.3f} " in line for line in layers), "gates keep their sign"
    assert len({line.split("loss")[1] for line in layers}) == 4, "closing another layer costs another loss"


def test_diagnose_compares_with_the_backbone_as_it_was_before_the_adapter(run):
    stage, = evaluate.open_run(run, task="toy-amazon")
    without = evaluate.diagnose(stage).splitlines()[0].partition("without the adapter")[2]
    stage.model.backbone = copy.deepcopy(stage.backbone)  # as of a method that changes modules inside the backbone
    torch.nn.init.zeros_(stage.model.backbone.lm_head.weight)
    assert evaluate.diagnose(stage).splitlines()[0].endswith(without)


@pytest.mark.parametrize("arguments, words", [
    (["--run", "nowhere"], ["nowhere", "no finished multitask or target stage", "train.py"]),
    (["--run", "RUN", "--task", "toy-bq", "--ask", "x"], ["toy-bq", "toy-amazon, toy-cote_mfw, toy-c3, toy-finre"]),
    (["--run", "RUN", "--ask", "x"], ["--task"]),
    (["--run", "RUN", "--task", "toy-amazon", "--ask", " =>"], ["--ask TEXT"]),
    (["--run", "RUN", "--task", "toy-amazon", "--ask", "soup " * 500], ["the text of --ask", "tokens"]),
    (["--run", "RUN", "--task", "toy-c3", "--ask", "x"], ["toy-c3", "choices of its own", "--choices "]),
    (["--run", "RUN", "--choices", "x"], ["--choices", "--ask"]),
    (["--ask", "x", "--task", "toy-bq"], ["--run"]),
    ([], ["--run", "--diagnose", "evaluate.py --help"]),
])
def test_what_cannot_be_answered_is_refused(run, arguments, words):
    with pytest.raises(UserError) as caught:
        evaluate.main([str(run) if a == "RUN" else a for a in arguments])
    assert all(word in str(caught.value) for word in words)
