"""data.py: own rows, splits by group, few-shot choice, tokens, batches, the page."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_chinese import example_of, published, write_rows

import data
from checkpoint import UserError
from data import Batches, Encoded, Example
from tasks import chinese, micro


class Characters:
    """A tokenizer with one token a character, end of sequence 0; it merges ：答 into one token."""

    eos_token_id, unk_token_id = 0, None

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [ord(character) for character in text.replace("：答", "@")]}


TOKENIZER, CFG = Characters(), SimpleNamespace(seed=0, targets=(), dev_rows=64, test_rows=0, chat_template="off")


def text_of(ids):
    return "".join(map(chr, ids))


def own_rows(n, **change):
    return [{"prompt": f"好吗{i}？", "answer": "坏好"[i % 2], "choices": ["坏", "好"]} | change for i in range(n)]


def test_the_micro_world_loads_offline_with_its_groups_apart_and_the_rows_of_the_first_release():
    kinds = {"toy-cmrc2018": "span", "toy-drcd": "span", "toy-cote_mfw": "span", "toy-cote_bd": "span",
             "toy-c3": "choice"}
    for name in micro.TASKS:
        splits = data.load_splits(name)
        assert (len(splits.train), len(splits.dev), len(splits.test)) == (1800, 200, 200)
        assert not {e.group for e in splits.train} & {e.group for e in splits.dev + splits.test}
        assert data.task_of(name, splits.train).kind == kinds.get(name, "closed")
    splits = data.load_splits("toy-tnews")
    chosen = [splits.train[:4], splits.dev[:4], splits.test[:4], *data.k_shot(splits.train, 8, seed=1)]
    assert [[int(example.row.split(":")[1]) for example in rows] for rows in chosen] == [
        [1709, 1358, 1824, 273], [975, 1335, 1708, 941], [196, 172, 40, 129],
        [1081, 1466, 219, 1031, 628, 696, 1435, 758], [535, 464, 1443, 701, 1714, 120, 1897, 272]]


def test_no_group_is_in_two_splits_dev_is_a_capped_tenth_and_repeated_rows_are_dropped(tmp_path, monkeypatch):
    train = [published("cmrc2018", i % 50, question=f"问{i}？") for i in range(200)]  # four questions a passage
    write_rows(tmp_path, "cmrc2018", train, [published("cmrc2018", i, question="新？") for i in range(45, 60)])
    splits = data.load_splits("cmrc2018", str(tmp_path))
    groups = [{e.group for e in rows} for rows in (splits.train, splits.dev, splits.test)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert splits.report["dropped"]["train"] == {"text also in test": 20}
    assert len(splits.train) + len(splits.dev) == 180 and 18 <= len(splits.dev) < 22
    monkeypatch.setattr(data, "DEV_ROWS", 5)
    rows = [published("amazon", i, label=i // 40) for i in range(200)]  # sorted by star, as published
    write_rows(tmp_path, "amazon", rows + rows[:7], [published("amazon", i) for i in range(200, 240)])
    splits = data.load_splits("amazon", str(tmp_path))
    assert len(splits.dev) == 5 and splits.report["dropped"]["train"] == {"repeated": 7}
    assert len({e.answer for e in splits.train[:20]}) >= 4  # shuffled


def test_texts_of_cote_bd_are_not_trained_on_through_cote_mfw(tmp_path):
    write_rows(tmp_path, "cote_mfw", [published("cote_mfw", i) for i in range(14)], [published("cote_mfw", 40)])
    splits = data.load_splits("cote_mfw", str(tmp_path))
    assert splits.report["dropped"]["train"] == {} and "not compared with cote_bd" in splits.report["notes"][0]
    data.load_splits.cache_clear()
    write_rows(tmp_path, "cote_bd", [published("cote_mfw", i) for i in range(8, 12)], [published("cote_mfw", 13)])
    splits = data.load_splits("cote_mfw", str(tmp_path))
    assert splits.report["dropped"]["train"] == {"text also in cote_bd": 5} and splits.report["notes"] == []


def test_own_rows_need_no_entry_in_the_table(tmp_path):
    spans = [{"prompt": f"名字：小{i}", "answer": f"小{i}", "passage": f"小{i}"} for i in range(24)]
    choices = [{"prompt": f"选{i}", "answer": i, "choices": [i, "乙"], "group": i // 2} for i in range(24)]
    for rows, kind in ((own_rows(24), "closed"), (spans, "span"), (choices, "choice")):
        train = data.load_task(kind, "train", write_rows(tmp_path, kind, rows[:20], rows[20:]))
        assert len(train) == 18 and data.task_of(kind, train).kind == kind
        assert {e.prompt for e in train} < {row["prompt"] for row in rows}


@pytest.mark.parametrize("change, message", [
    ({"choices": ["好", "好"]}, "train.jsonl:1: .* different"), ({"prompt": ["a"]}, "train.jsonl:1: prompt.* text"),
    ({"choices": ["坏", "好", None]}, "train.jsonl:1: choices.* list of texts"),
    ({"answer": "a", "choices": ["A", "B"]}, "train.jsonl:1: choices .*'a'"),
    ({"passage": "别的"}, "train.jsonl:1: the passage '别的' does not occur"), ({"prompt": {"a": 1}}, "prompt.* text"),
    ({"answer": None}, "1 empty answer"), ({"prompt": ""}, "1 empty prompt"),
    (None, 'train.jsonl:1: a row needs "prompt" and "answer", as in {"prompt": "...", .* this one has text, label')])
def test_an_own_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path, change, message):
    rows = own_rows(1, **change) if change else [{"text": "好吗？", "label": "好"}]
    with pytest.raises(UserError, match=message):
        data.load_task("mine", "train", write_rows(tmp_path, "mine", rows, own_rows(9)))


def test_zero_is_a_group_no_group_is_not_one_and_a_number_is_one_text(tmp_path):
    groups = [0, 0.0, "0", 1, 2, 2.0, None, None, "", ""]
    train = [own_rows(1, prompt=f"{i}", group=g, answer=1, choices=[1.0, 2])[0] for i, g in enumerate(groups)]
    test = own_rows(1, prompt="新", group=0, answer=2.0, choices=[1, 2])
    splits = data.load_splits("mine", str(write_rows(tmp_path, "mine", train, test)))
    assert splits.report["dropped"]["train"] == {"text also in test": 3} and splits.test[0].choices == ("1", "2")
    assert {e.answer for e in splits.train + splits.dev} == {"1"}
    assert len({e.group for e in splits.train + splits.dev}) == 6  # 1, 2 and four texts without a group


@pytest.mark.parametrize("name, message", [
    ("finre", "train.jsonl:1: a row with its own prompt.*another name"), ("toy-bq", "micro-world.*another name")])
def test_own_rows_are_refused_in_a_folder_with_the_name_of_a_known_set(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        data.load_splits(name, str(write_rows(tmp_path, name, own_rows(9), own_rows(9))))


def test_missing_folders_files_names_and_splits_are_named(tmp_path):
    write_rows(tmp_path, "sanwen", [published("sanwen")], [])
    write_rows(tmp_path, "gbk", own_rows(1), own_rows(1))
    (tmp_path / "gbk" / "train.jsonl").write_bytes("我".encode("gbk"))
    (tmp_path / "empty" / "sanwen").mkdir(parents=True)
    for root, name, split, message in (
        (tmp_path / "none", "sanwen", "train", "'sanwen' cannot be loaded, tried .*HF_HUB_OFFLINE.*--data-root"),
        (tmp_path / "empty", "sanwen", "train", "empty/sanwen/train.jsonl is missing.*--data-root"),
        (tmp_path, "../sanwen", "train", "'../sanwen' cannot be a task"),
        (None, "nothing", "train", "'nothing': --data-root DIR.*nothing/train.jsonl.*afqmc.*toy-afqmc"),
        (tmp_path, "nothing", "train", f"--data-root {tmp_path} should hold nothing/train.jsonl and test.jsonl"),
        (tmp_path, "sanwen", "test", "no usable test row"),
        (tmp_path, "gbk", "train", "UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            data.load_task(name, split, root)


def test_a_task_is_described_on_a_line_and_asked_without_its_rows(tmp_path):
    long = [row | {"prompt": f"第一行\n{i}" + "很长" * 99 + "判断："} for i, row in enumerate(own_rows(24))]
    root = write_rows(tmp_path, "mine", long[:20], long[20:])
    assert data.load_task("mine", "test", root)[0].row.startswith(f"{root}/mine/test.jsonl:")
    assert data.load_task("toy-bq", "test", root) == data.load_task("toy-bq", "test")  # one run may mix them
    line, train = data.describe_task("mine", root), data.load_task("mine", "train", root)
    assert line.startswith("mine: answer 坏 / 好; for example  第一行 ") and " … 很" in line and len(line) < 110
    assert line.split("判断： ")[1] in ("坏", "好")
    write_rows(tmp_path, "cmrc2018", [published("cmrc2018", i) for i in range(9)], [published("cmrc2018", 10)])
    assert data.describe_task("cmrc2018", root).startswith("cmrc2018: answer in words; for example  从文章")
    for name, examples, spec in (
        ("mine", train, ["closed", "accuracy", "", ["坏", "好"], "text"]),
        ("cmrc2018", (), ["span", "char_f1", chinese.TASKS["cmrc2018"].template, [], "context"]),
        ("toy-c3", data.load_task("toy-c3", "dev"), ["choice", "accuracy", "{text} =>", [], ""]),
    ):
        found = json.loads(json.dumps(data.spec_of(name, examples)))
        assert [found[key] for key in ("kind", "metric", "template", "answers", "passage")] == spec
        task = chinese.Task(name, "own", **found)
        assert chinese.fill_template(task, dict.fromkeys(task.fields, "甲"))[0] == task.template.replace(
            "{text}", "甲").replace("{context}", "甲").replace("{question}", "甲")


def made_up(counts, per_group=1):
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return [Example("made-up", f"p{i}", answer, tuple(counts), group=f"g{i // per_group}", row=f"r{i}")
            for i, answer in enumerate(answers)]


def test_k_shot_is_balanced_disjoint_nested_and_independent_of_order():
    examples = made_up({"a": 300, "b": 50, "c": 3})
    train, dev = data.k_shot(examples, 16, seed=1)
    count = [[e.answer for e in side].count(answer) for side in (train, dev) for answer in "abc"]
    assert sum(count[:3]) == sum(count[3:]) == 16 and sorted((count[2], count[5])) == [1, 2]
    assert all(abs(n - 7) <= 1 for n in count[:2] + count[3:5])  # what c lacks goes to a and b alike
    assert not {e.group for e in train} & {e.group for e in dev}
    assert data.k_shot(random.Random(0).sample(examples, len(examples)), 16, seed=1) == (train, dev)
    assert data.k_shot(examples, 16, seed=2) != (train, dev) and data.k_shot(examples, 8, seed=1)[0] == train[:8]
    assert data.k_shot(examples, 0, seed=1) == ([], [])
    train, dev = data.k_shot(made_up({f"c{n}": 30 for n in range(44)}), 32, seed=0)  # fewer rows than answers
    assert len({e.answer for e in train}) == len({e.answer for e in dev}) == 32
    turned = [replace(e, choices=e.choices[:: 1 - 2 * (i % 2)]) for i, e in enumerate(made_up({"a": 80, "b": 20}))]
    assert all([e.answer for e in side].count("b") == 4 for side in data.k_shot(turned, 8, seed=0))


def test_k_shot_keeps_groups_apart_and_says_when_k_is_too_large():
    spans = [Example("made-up", f"p{i}", f"a{i}", group=f"g{i // 5}") for i in range(100)]
    train, dev = data.k_shot(spans, 20, seed=0)
    assert len(train) == len(dev) == 20 and not {e.group for e in train} & {e.group for e in dev}
    for rows, k in ((spans, 51), (spans, -1), (made_up({"a": 1, "b": 1}, per_group=2), 1)):
        with pytest.raises(UserError, match=f"k = {k} "):
            data.k_shot(rows, k, seed=0)


def test_prompt_and_answer_are_tokenised_apart_end_with_eos_and_choices_can_be_told_apart():
    row = data.encode(Example("made-up", "问：", "答案", ("答案", "别的")), TOKENIZER, 100)
    assert text_of(row.prompt_ids) == "问：" and text_of(row.answer_ids) == "答案\0"  # not merged across the boundary
    assert [text_of(choice) for choice in row.choice_ids] == ["答案\0", "别的\0"] and len(row) == 5
    with pytest.raises(UserError, match="made-up: the answer '' has no token"):
        data.encode(Example("made-up", "问：", ""), TOKENIZER, 100)
    example = Example("mine", "soup =>", "好", ("soup", "好", "坏"), row="f:3")  # unknown words
    with pytest.raises(UserError, match="f:3: the choices '好' and '坏' are the same tokens"):
        data.encode(example, micro.tokenizer(), 40)


@pytest.mark.parametrize("length", [60, 100, 400])
def test_a_long_passage_is_shortened_around_the_answer_or_blindly(length):
    context = "".join(f"第{i}句话。" for i in range(100)) + "答案在此。" + "".join(f"后{i}句话。" for i in range(100))
    example = example_of("cmrc2018", context=context, question="在哪？", answers={"text": ["答案在此"]})
    encoded = data.encode(example, TOKENIZER, length)
    prompt, blind = (text_of(data.encode(example, TOKENIZER, length, keep).prompt_ids) for keep in (True, False))
    assert len(encoded) == length  # as long a window as fits
    assert "答案在此" in prompt and prompt.startswith("从文章") and prompt.endswith("\n问题：在哪？\n片段：")
    assert prompt.split("文章：")[1].split("\n问题")[0] in context
    assert context.startswith(blind.split("文章：")[1].split("\n问题")[0]) and "答案在此" not in blind
    assert data.encode(example, TOKENIZER, 10**6).prompt_ids.tolist() == [ord(c) for c in example.prompt]


def test_the_names_of_a_relation_survive_and_what_cannot_be_shortened_is_named():
    example = example_of("sanwen", text="前" * 200 + "我走到河边" + "后" * 200)
    prompt = text_of(data.encode(example, TOKENIZER, 120).prompt_ids)
    assert "我走到河" in prompt and "甲：我\n乙：河\n可选：无关、创作" in prompt and prompt.endswith("关系：")
    for row, length in ((example, 40), (data.to_example("mine", {"prompt": "很长" * 50, "answer": "短"}, "f:3"), 20)):
        with pytest.raises(UserError, match="f:3.*max-length"):
            data.encode(row, TOKENIZER, length)


def test_a_span_that_is_too_long_is_not_learned_from_but_its_question_is_still_asked():
    example = data.to_example("mine", {"prompt": "长" * 90 + "问？", "passage": "长" * 90, "answer": "长" * 30})
    for keep_answer, prompt in ((True, 32), (False, 30)):
        row = data.encode(example, TOKENIZER, 60, keep_answer)
        assert len(row.prompt_ids) == prompt and len(row.answer_ids) == 31
        with pytest.raises(UserError, match="no row of mine fits into --max-length 60"):
            data.fitting([row], 60)
    assert data.fitting([row, row], 61) == [row, row]


def test_an_own_row_is_shortened_around_its_answer_or_around_what_it_protects():
    passage = "soup " * 100 + "oslo " + "bob " * 50
    for change in ({}, {"answer": "ann", "protected": ["oslo"], "choices": ["ann", "bob"]}):
        row = {"prompt": passage + "where =>", "answer": "oslo", "passage": passage, **change}
        ids = data.encode(data.to_example("mine", row), micro.tokenizer(), 40).prompt_ids
        assert "oslo" in micro.tokenizer().decode(ids) and len(ids) == 38


def test_rows_that_cannot_be_answered_are_counted_by_reason_on_the_page(tmp_path, capsys):
    passage = "soup " * 60 + "oslo"
    spans = [{"prompt": f"{passage} ; row {i} =>", "answer": "oslo", "passage": passage} for i in range(20)]
    spans += [{"prompt": "who =>", "answer": "我"}, {"prompt": "what =>", "answer": "ann bob ann bob"}]
    other = [{**row, "prompt": "the " + row["prompt"]} for row in spans[-5:]]
    write_rows(tmp_path, "mine", spans, other)
    write_rows(tmp_path, "same", own_rows(9), own_rows(9, prompt="新"))
    options = ["--data-root", str(tmp_path), "--backbone", str(micro.FOLDER), "--max-length", "50"]
    data.main([*options, "--task", "mine", "same", "toy-bq"])
    out = capsys.readouterr().out
    for part in ("3 test answers are cut away where their text is shortened; raise --max-length",
                 "\n  2 development rows alone choose the best checkpoint; add train rows",
                 "1 test answers hold tokens that the backbone does not know",
                 "tokens of a train row: 67 (median), 67 (longest); 18 will be shortened to --max-length 50",
                 "same: refused: ", "the choices '坏' and '好' are the same tokens",
                 "toy-bq: answer one / two; for example  "):
        assert part in out
    assert "train answers are cut" not in out and "words of the train rows" not in out


def test_rows_in_another_language_than_the_tokenizer_s_are_told(tmp_path):
    rows = own_rows(200, choices=["no", "yes"])
    rows = [row | {"prompt": f"第 {i} 行 ; the", "answer": ("no", "yes")[i % 2]} for i, row in enumerate(rows)]
    write_rows(tmp_path, "mine", rows[4:], rows[:4])
    cfg = SimpleNamespace(**vars(CFG), data_root=str(tmp_path), max_length=20, max_new_tokens=2)
    words = 5 * len(data.load_task("mine", "train", tmp_path))
    assert data.encode_task("mine", micro.tokenizer(), cfg)[1] == {
        f"of {words} words of the train rows are unknown to the backbone's tokenizer; give a --backbone of this "
        "language": words * 3 // 5}


def test_collate_on_a_hand_written_batch():
    rows = [Encoded([5, 6, 7], (8, 0), (), "a"), Encoded([5], (9, 9, 0), (), "b"), Encoded([0], (0,), (), "b")]
    batch = data.collate(rows, [3, 1, 1])  # 0 fills up, and is a token of the text, too
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0], [5, 9, 9, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 8, 0], [-100, 9, 9, 0, -100], [-100, 0, -100, -100, -100]]
    assert batch.task_ids.tolist() == [3, 1, 1] and {t.dtype for t in vars(batch).values()} == {torch.int64}
    assert batch.to("meta").labels.device.type == "meta"
    ids, mask = data.collate_prompts(rows)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 5], [0, 0, 0]] and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]


def test_the_hash_of_rows_knows_tokens_boundaries_and_order():
    rows = [Encoded([1, 2], (3, 0), (), "a"), Encoded([4], (5, 0), (), "a")]
    others = [rows[::-1], rows[:1], [Encoded([1], (2, 3, 0), (), "a"), rows[1]]]
    assert len({data.rows_hash(some) for some in [rows, *others]}) == 4 and data.rows_hash(rows) == data.rows_hash(rows)


def numbered(task, count, length=lambda i: 4):
    return [Encoded([i] * (length(i) - 2), (7, 0), (), task) for i in range(count)]


def flat(step):
    return [row for batch in step for row in batch]


def padding(steps):
    tokens = sum(len(batch) * max(map(len, batch)) for step in steps for batch in step)
    return 1 - sum(len(row) for step in steps for row in flat(step)) / tokens


THREE_TASKS = {t: numbered(t, 50 + n, lambda i, n=n: 3 + i * (n + 1) % 17) for n, t in enumerate("abc")}


def test_steps_are_those_of_the_first_release():
    batches = Batches(THREE_TASKS, 20, 5)
    steps = [[[f"{row.task}{row.prompt_ids[0]}" for row in batch] for batch in batches[step]] for step in range(120)]
    assert " ".join(steps[0][0]) == "a17 b43 c40 c29 b35 a4 b28 c13 b30 a10 a11 a28 a29 b23 c10 c27"
    assert [len(batch) for batch in steps[0]] == [16, 4]
    assert hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16] == "262c2dd884f7b44b"


@pytest.mark.parametrize("budget", [0, 30])
def test_steps_hold_equally_many_rows_of_each_task_and_every_row_comes_once_an_epoch(budget):
    batches = Batches({"a": numbered("a", 96, lambda i: 3 + i % 9), "b": numbered("b", 48)}, 6, 0, budget=budget)
    steps = [flat(batches[step]) for step in range(64)]
    assert budget or all([row.task for row in step].count("a") == 3 for step in steps)
    for task, size in (("a", 96), ("b", 48)):
        order = [row.prompt_ids[0] for step in steps for row in step if row.task == task]
        assert sorted(order[:96]) == sorted(order[96:]) == sorted([*range(size)] * (96 // size))
        assert order[:96] != order[96:]


def test_a_token_budget_keeps_the_budget_the_mixture_and_little_padding():
    rng = random.Random(0)
    rows = {name: numbered(name, 300, lambda i, low=low, high=high: rng.randint(low, high))
            for name, low, high in (("short", 60, 110), ("middle", 80, 300), ("long", 300, 1000))}
    batches = Batches(rows, 32, seed=0, budget=4096)
    steps = [batches[step] for step in range(192)]
    assert all(len(batch) * max(map(len, batch)) <= 4096 for step in steps for batch in step)
    assert {tuple(sorted(Counter(row.task for row in flat(step)).values())) for step in steps} == {(10, 11, 11)}
    again, plain = Batches(rows, 32, seed=0, budget=4096), Batches(rows, 32, seed=0)
    assert steps[40:60] == [again[step] for step in range(40, 60)]  # a step depends on nothing but its number
    assert plain[3] != Batches(rows, 32, seed=6)[3]
    assert padding(steps) < 0.12 and padding([[flat(plain[step])] for step in range(50)]) > 0.4


def test_the_page_shows_counts_and_a_row(tmp_path, capsys):
    rows = [{"s": f"长城{i}雄伟，游人也多，值得去", "ot": "长城"} for i in range(30)] + [{"s": "长城", "ot": "故宫"}]
    write_rows(tmp_path, "cote_bd", rows, [{"s": f"长城{i}雄伟，人少，值得去", "ot": "长城"} for i in range(4)])
    write_rows(tmp_path, "mine", own_rows(20), own_rows(24)[20:])
    data.main(["--data-root", str(tmp_path)])
    out = capsys.readouterr().out
    for part in ("cote_bd: answer in words; for example  ",
                 "27 train, 3 dev (cut from train), 4 test rows",
                 "mine: answer 坏 / 好; for example  好吗",
                 "of train: 1 answer not in the text", "4 of the test rows can be rewritten", "对象： 长城",
                 "characters of a train row: 6 (median), 6 (longest)"):
        assert part in out
    with pytest.raises(UserError, match="none holds no <task>/train.jsonl"):
        data.main(["--data-root", str(tmp_path / "none")])


def test_rows_that_lose_a_name_and_answers_that_are_too_long_are_counted(tmp_path):
    far = [{"head": "甲", "tail": "乙", "relation": ("合作", "unknown")[i % 2],
            "text": "甲".join([str(i), "很" * 200, "很" * 200 + "乙"])} for i in range(40)]  # one 甲 stays
    long = [{"prompt": f"{i}问：", "answer": "长" * (400 if i % 2 else 1)} for i in range(40)]
    for task, rows in (("finre", far), ("own", long)):
        write_rows(tmp_path, task, rows[:30], rows[30:])
    cfg = SimpleNamespace(**vars(CFG), data_root=str(tmp_path), max_length=390, max_new_tokens=399)
    _, warnings = data.encode_task("finre", TOKENIZER, cfg)
    assert warnings["test rows lose a name where their text is shortened; raise --max-length"] == 10
    assert warnings["development rows alone choose the best checkpoint; add train rows"] == 3
    _, warnings = data.encode_task("own", TOKENIZER, cfg)
    assert warnings["train rows are left out: answer and question are too long; raise --max-length"] > 5
    assert warnings["test answers are longer than --max-new-tokens 399 and never given in full; raise it"] == 5


def test_a_long_text_is_shown_without_its_middle():
    assert data.shorten("从文章中" * 30, 90) == "从文章中" * 15 + " … " + ("从文章中" * 30)[-27:]
    assert data.shorten(" a \n b ") == "a b"
