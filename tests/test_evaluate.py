"""Predictions, development scores, tables and pictures (the metrics themselves: test_metrics.py)."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch

import data
import evaluate
import figures
import toy
from config import parse
from data import Example
from model import NO_TASK, TALoRA, TALoRAConfig

TOKENIZER = toy.tokenizer()


@pytest.fixture
def model(tiny_backbone, open_adapter):
    backbone = tiny_backbone(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id,
                             pad_token_id=TOKENIZER.pad_token_id)
    return open_adapter(backbone)


def test_closed_sets_are_answered_by_the_most_probable_whole_choice(model):
    examples = data.load_task("toy-thucnews", "test")[:12]
    answers = evaluate.predict(model, TOKENIZER, examples, 1, 64, 8)
    for example, answer in zip(examples, answers):
        row = data.encode(example, TOKENIZER, 64)
        log_p = []
        for choice in row.choice_ids:  # one plain forward for every choice
            ids = torch.tensor([[*row.prompt_ids, *choice]])
            logits = model(ids, torch.ones_like(ids), torch.tensor([1])).logits[0].log_softmax(-1)
            start = len(row.prompt_ids) - 1
            log_p.append(sum(logits[start + t, token].item() for t, token in enumerate(choice)))
        assert answer == example.choices[max(range(len(log_p)), key=log_p.__getitem__)]
        assert row.choice_ids[0][-1] == TOKENIZER.eos_token_id
    assert len(set(answers)) > 1, "the check needs answers that differ"


def test_spans_are_generated_up_to_the_end_token(model):
    examples = data.load_task("toy-cmrc2018", "test")[:6]
    answers = evaluate.predict(model, TOKENIZER, examples, 2, 64, 5)
    for example, answer in zip(examples, answers):
        ids = torch.tensor([[*data.encode(example, TOKENIZER, 64).prompt_ids]])
        new = []
        while len(new) < 5:  # greedy, step by step, without a cache
            tokens = torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)
            logits = model(tokens, torch.ones_like(tokens), torch.tensor([2])).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] == TOKENIZER.eos_token_id:
                break
        assert answer == TOKENIZER.decode(new, skip_special_tokens=True).strip()


def test_the_order_of_rows_changes_no_prediction(model):
    examples = data.load_task("toy-cmnli", "test")[:20]
    assert evaluate.predict(model, TOKENIZER, examples, 0, 64, 4)[::-1] == evaluate.predict(
        model, TOKENIZER, examples[::-1], 0, 64, 4)


def test_a_test_row_is_shortened_without_looking_at_its_answer(model, monkeypatch):
    """A passage that is too long keeps its beginning: a window around the answer would give the answer away."""
    words = " ".join(["soup"] * 40)
    passage = f"{words} oslo"
    fields = (("text", 0, len(passage)),)
    example = Example("own", f"{passage} ; who was it", "oslo", protected=("oslo",), fields=fields)
    seen = []
    monkeypatch.setattr(model, "generate", lambda ids, *_: (seen.append(ids), torch.ones(len(ids), 4).long())[1])
    evaluate.predict(model, TOKENIZER, [example], 0, 24, 4)
    assert "oslo" not in TOKENIZER.decode(seen[0][0]) and seen[0].shape[1] <= 24


def test_length_batches_hold_every_row_once_within_the_budget():
    rows = [data.Encoded([1] * n, [2], [], "t") for n in (7, 3000, 5, 6000, 4, 9000, 1)]
    batches = evaluate.length_batches(rows)
    assert sorted(i for part in batches for i in part) == list(range(7))
    for part in batches:
        longest = max(len(rows[i].prompt_ids) for i in part)
        assert len(part) == 1 or longest * len(part) <= evaluate.EVAL_TOKENS
    assert len(batches) < 7


def test_dev_score_is_exact_answers_and_mean_loss_over_tasks(model):
    rows = {t: [data.encode(e, TOKENIZER, 64) for e in data.load_task(t, "dev")[:n]]
            for t, n in (("toy-amazon", 5), ("toy-cmrc2018", 3))}
    model.train()
    right, loss = evaluate.dev_score(model, rows, {"toy-amazon": 0, "toy-cmrc2018": NO_TASK})
    assert model.training, "evaluation gives the mode back"
    losses = []
    for (_, encoded), task_id in zip(rows.items(), (0, NO_TASK)):
        each = []
        for row in encoded:
            batch = data.collate([row], [task_id], 0)
            each.append(model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels).loss.item())
        losses.append(sum(each) / len(each))
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-4) and 0 <= right <= 1


def test_majority_gives_the_most_frequent_training_answer():
    train = [Example("t", "p", a, choices=("a", "b")) for a in ("a", "b", "b")]
    tests = [Example("t", "p", a, choices=("a", "b")) for a in ("a", "b", "b", "b")]
    assert evaluate.majority_scores("t", train, tests)["score"] == 0.75


def test_table_and_macro_average():
    columns = {"majority": {"x": {"score": 0.5}, "y": {"score": 0.25}},
               "talora": {"x": {"score": 1.0}, "y": {"score": 0.9}}}
    assert evaluate.macro(columns["talora"]) == pytest.approx(0.95)
    lines = evaluate.table(columns, {"x": "accuracy", "y": "char_f1"}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["task", "metric", "majority", "talora"]
    assert cells[2:] == [["x", "accuracy", "50.0", "100.0"], ["y", "char_f1", "25.0", "90.0"],
                         ["macro average", "", "37.5", "95.0"]]


def test_pictures_are_drawn_from_the_metrics_file_alone(tmp_path):
    rows = [{"step": 0, "gates": [0, 0], "tasks": ["a", "b"], "cosines": [[1, 0.3], [0.3, 1]]},
            {"step": 5, "loss": 2.0, "rates": {"fast": 0.1}, "gates": [0.1, 0.2], "tasks": ["a", "b"],
             "cosines": [[1, 0.1], [0.1, 1]]},
            {"step": 5, "dev_accuracy": 0.5, "dev_loss": 1.5, "gates": [0.1, 0.2]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures.draw_run(tmp_path)
    for name in ("loss", "gates", "cosines"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------------- one finished run

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the shipped backbone, its adapter made by hand: the gates are open, nothing is zero."""
    folder = tmp_path_factory.mktemp("runs") / "toy" / "multitask"
    cfg = parse(["--prompt-length", "3", "--rank", "2", "--sources", ",".join(TASKS)])[0]
    backbone, _ = toy.load_backbone()
    torch.manual_seed(0)
    model = TALoRA(backbone, list(TASKS), TALoRAConfig(3, 2))
    torch.nn.init.constant_(model.gate, 0.3)
    model.save(folder / "best")
    for place in (folder, folder.parent):
        (place / "options.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    (folder / "results.json").write_text(json.dumps({"columns": {"majority": {task: {} for task in TASKS}}}))
    (folder / "table.md").write_text("")
    return folder.parent


TASKS = ("toy-amazon", "toy-cote_mfw", "toy-c3")


def test_a_run_answers_its_test_rows_again(run, capsys, monkeypatch):
    rows = {task: data.load_task(task, "test")[:12] for task in TASKS}
    monkeypatch.setattr(evaluate.data, "load_task", lambda task, split, root=None: rows[task])
    evaluate.main(["--run", str(run)])
    out = capsys.readouterr().out
    found = [json.loads(line) for line in (run / "multitask" / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == [example.prompt for task in TASKS for example in rows[task]]
    for task, line in zip(TASKS, out.splitlines()[2:]):
        right = [row["right"] for row in found if row["task"] == task]
        if task == "toy-amazon":
            assert f"{100 * sum(right) / len(right):.1f}" in line
            assert all(row["right"] == (row["prediction"] == row["answer"]) for row in found if row["task"] == task)


def test_ask_answers_one_text_with_probabilities(run, capsys):
    stage, = evaluate.open_run(run)
    text = "ann found the soup very awful at the oslo cafe"
    evaluate.main(["--run", str(run), "--task", "toy-amazon", "--ask", text])
    lines = capsys.readouterr().out.partition(" answers: ")[2].splitlines()
    shares = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in lines[2:]}
    assert list(shares) == ["one", "two", "three", "four", "five", "another"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert shares[lines[0]] == max(list(shares.values())[:5])
    assert next(line for line in lines if "<-" in line).startswith(f"{lines[0]} ")
    model, task_id = stage.adapter("toy-amazon")
    ids = stage.tokenizer(text + " =>", return_tensors="pt")
    logits = model(ids.input_ids, ids.attention_mask, torch.tensor([task_id])).logits[0, -1].softmax(-1)
    first = logits[stage.tokenizer.convert_tokens_to_ids("two")].item()
    assert shares["two"] <= 100 * first + 0.06, "a whole answer is never likelier than its first word"
    evaluate.main(["--run", str(run), "--task", "toy-cote_mfw", "--ask", text])
    assert len(capsys.readouterr().out.splitlines()) == 1  # generated
    text += " ; food or tech"
    evaluate.main(["--run", str(run), "--task", "toy-c3", "--ask", text, "--choices", "tech", "food"])
    lines = capsys.readouterr().out.partition(" answers: ")[2].splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["tech", "food", "another"] and lines[0] in ("tech", "food")


def test_diagnose_closes_the_gates(run, capsys):
    evaluate.main(["--diagnose", str(run)])
    out = capsys.readouterr().out
    stage, = evaluate.open_run(run)
    rows = {t: [data.encode(e, stage.tokenizer, 128, False) for e in data.load_task(t, "dev")[:16]] for t in TASKS}
    plain = TALoRA(stage.backbone, ["a"], TALoRAConfig(3, 2))  # its gates are zero
    off = [evaluate.dev_score(plain, {t: rows[t]}, {t: 0})[1] for t in TASKS]
    assert f"(loss {sum(off) / len(off):.3f})" in out.splitlines()[0]
    layers = [line for line in out.splitlines() if re.match(r" +\d ", line)]
    assert len(layers) == 4 and all(f"{math.tanh(0.3):.3f}" in line for line in layers)
    assert len({line.split("loss")[1] for line in layers}) == 4, "closing another layer costs another loss"
    model, _ = stage.adapter(TASKS[0])
    assert torch.equal(model.gate, torch.full((4,), 0.3)), "the gates are as they were"


def test_diagnose_of_targets_is_a_mean_over_their_adapters(run, tmp_path, capsys):
    stage, = evaluate.open_run(run)
    folder = tmp_path / "target"
    for task, gate in (("toy-amazon", 0.3), ("toy-cote_mfw", 0.9)):
        model = TALoRA(stage.backbone, [task], TALoRAConfig(3, 2))
        torch.nn.init.constant_(model.gate, gate)
        model.save(folder / task / "best")
    (folder / "options.json").write_text((run / "options.json").read_text())
    (folder / "results.json").write_text(json.dumps({"columns": {"majority": {"toy-amazon": {}, "toy-cote_mfw": {}}}}))
    evaluate.main(["--diagnose", str(folder)])
    out = capsys.readouterr().out
    assert out.count(f"{(math.tanh(0.3) + math.tanh(0.9)) / 2:.3f}") == 4 and "cos" not in out


@pytest.mark.parametrize("arguments, words", [
    (["--run", "nowhere"], ["nowhere", "no finished stage"]),
    (["--run", "RUN", "--task", "toy-bq", "--ask", "x"], ["toy-bq", "toy-amazon, toy-cote_mfw"]),
    (["--run", "RUN", "--ask", "x"], ["--task"]),
    (["--run", "RUN", "--task", "toy-c3", "--ask", "x"], ["toy-c3", "choices of its own", "--choices "]),
    (["--run", "RUN", "--choices", "x"], ["--choices", "--ask"]),
    (["--ask", "x", "--task", "toy-bq"], ["--run"]),
    ([], ["--run", "--suite"]),
    (["--jobs", "many"], ["--jobs", "many", "evaluate.py --help"]),
    (["--suite", "quick", "--jobs", "0"], ["--jobs", "0"]),
])
def test_what_cannot_be_answered_is_refused(run, arguments, words):
    with pytest.raises(data.UserError) as caught:
        evaluate.main([str(run) if a == "RUN" else a for a in arguments])
    assert all(word in str(caught.value) for word in words)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the stage, to be damaged."""
    shutil.copytree(run / "multitask", tmp_path / "multitask")
    return tmp_path / "multitask"


@pytest.mark.parametrize("results, words", [
    ("[" * 100_000, ["RecursionError"]),
    ('{"columns": ', ["JSONDecodeError"]),
    ("[1]", ["AttributeError"]),
    ('{"columns": {}}', ["StopIteration"]),
    ('{"columns": {"a": [1, 2]}}', ["no scores by task"]),
    ('{"columns": {"a": {}}}', ["no scores by task"]),
    ('{"columns": {"a": {"../../b": {}}}}', ["no scores by task"]),
    ('{"stage": "base", "task": "toy-amazon"}', ["its stage, base, has no test rows"]),
])
def test_results_of_another_form_are_refused_and_no_answer_is_lost(results, words, copied):
    (copied / "predictions.jsonl").write_text("kept")
    (copied / "results.json").write_text(results)
    with pytest.raises(data.UserError) as caught:
        evaluate.main(["--run", str(copied)])
    assert all(word in str(caught.value) for word in [f"'{copied}' is no finished stage", "runs/toy", *words])
    assert (copied / "predictions.jsonl").read_text() == "kept"


def test_a_task_that_the_adapter_does_not_know_is_refused(copied):
    about = json.loads((copied / "best" / "adapter.json").read_text())
    (copied / "best" / "adapter.json").write_text(json.dumps(about | {"tasks": ["a", "toy-amazon", "b"]}))
    with pytest.raises(data.UserError, match="best' is for a, toy-amazon, b, not for toy-c3; put back"):
        evaluate.main(["--run", str(copied), "--task", "toy-c3", "--ask", "x", "--choices", "x", "y"])
    (copied / "best" / "adapter.json").write_text(json.dumps(about | {"method": "lora"}))
    with pytest.raises(data.UserError, match="method 'lora' and tasks .* should be 'talora' and a list"):
        evaluate.main(["--run", str(copied)])
    shutil.rmtree(copied / "best")
    with pytest.raises(data.UserError, match=f"no adapter can be read from '{copied}/best'"):
        evaluate.main(["--run", str(copied)])


@pytest.mark.parametrize("text, words", [
    ("", ["--ask has an empty text"]), ("   ", ["--ask has an empty text"]), (" =>", ["--ask has an empty text"]),
    ("soup " * 500, ["the text of --ask is too long", "128 tokens", "shorten it"]),
])
def test_a_text_that_cannot_be_asked_about_is_refused(text, words, run):
    for task in ("toy-amazon", "toy-cote_mfw"):
        with pytest.raises(data.UserError) as caught:
            evaluate.main(["--run", str(run), "--task", task, "--ask", text])
        assert all(word in str(caught.value) for word in words) and "--max-length" not in str(caught.value)


def test_words_that_the_vocabulary_lacks_are_counted(run, capsys):
    for task in ("toy-amazon", "toy-cote_mfw"):
        evaluate.main(["--run", str(run), "--task", task, "--ask", "zzz found the soup qqq"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == "2 of 6 words are not in the backbone's vocabulary"  # the sixth is =>
