"""Predictions, development scores, tables and pictures (the metrics themselves: test_metrics.py)."""

import json

import pytest
import torch

import data
import evaluate
import toy
from data import Example
from model import NO_TASK

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
    evaluate.draw_run(tmp_path)
    for name in ("loss", "gates", "cosines"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def finished_stage(folder, seed, method, score):
    folder.mkdir(parents=True)
    scores = {"x": {"score": score}, "y": {"score": score / 2}}
    (folder / "results.json").write_text(json.dumps({
        "stage": "multitask", "method": method, "seed": seed, "command": "c", "columns": {"majority": {
            "x": {"score": 0.5}, "y": {"score": 0.5}}, method: scores}}))
    (folder / "env.json").write_text(json.dumps({"commit": "abc", "torch": "2", "started": "now"}))


def test_tables_of_several_seeds_hold_mean_and_deviation(tmp_path, capsys):
    for seed, score in enumerate((0.8, 0.9, 1.0)):
        finished_stage(tmp_path / f"a{seed}" / "multitask", seed, "talora", score)
    finished_stage(tmp_path / "b" / "multitask", 0, "deep-spot", 0.6)
    (tmp_path / "a0" / "base").mkdir()  # a stage that is not finished
    evaluate.main([*map(str, tmp_path.glob("[ab]*")), "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "tables.md").read_text().splitlines()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    rows = {first: rest for first, *rest in split}
    column = rows["task"].index("talora (n = 3)"), rows["task"].index("deep-spot (n = 1)")
    assert (rows["x"][column[0]], rows["x"][column[1]]) == ("90.0 ± 10.0", "60.0")
    assert rows["macro average"][column[0]] == "67.5 ± 7.5"


def test_collecting_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2 and "no finished stage" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tables_refuse_runs_that_do_not_go_together(tmp_path, capsys):
    finished_stage(tmp_path / "a" / "multitask", 0, "talora", 0.5)
    finished_stage(tmp_path / "b" / "multitask", 0, "talora", 0.7)  # the same method and seed again
    with pytest.raises(ValueError, match="two runs of talora with seed 0"):
        evaluate.tables(evaluate.collect([tmp_path / "a", tmp_path / "b"]))
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    records = evaluate.collect([tmp_path / "a"])
    other = {**records[0], "seed": 1, "scores": {"talora": {"x": 0.5}}}
    with pytest.raises(ValueError, match="different tasks"):
        evaluate.tables([*records, other])
