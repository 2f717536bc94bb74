"""tasks/chinese.py and rewrite.py: the table, every published form of a row, downloads, rewritten inputs.

Rows are made up, in the forms in which the sixteen sets are published."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import data
import evaluate
from checkpoint import UserError
from tasks import chinese
from tasks.chinese import TASKS

# Task -> (a published row, a part of its prompt, its answer); rows of one task differ in the number i.
PUBLISHED = {
    "afqmc": (lambda i: {"sentence1": f"花呗{i}", "sentence2": f"借呗{i}", "label": 1}, "提问二：借呗0\n", "相同"),
    "amazon": (lambda i: {"id": f"zh_{i}", "text": f"好看{i}", "label": 4}, "评价：好看0\n", "五星"),
    "thucnews": (lambda i: {"text": f"标题{i}", "label": 2}, "标题：标题0\n", "股票"),
    "bq": (lambda i: {"sentence1": f"额度{i}", "sentence2": f"利息{i}", "score": 0.0}, "提问一：额度0\n", "不同"),
    "cmnli": (lambda i: {"sentence1": f"前{i}", "sentence2": f"后{i}", "label": 1}, "假设：后0\n", "蕴含"),
    "cmrc2018": (lambda i: {"context": f"他在第{i}年出生。", "question": "哪一年？",
                            "answers": {"text": ["不在文中", f"第{i}年"], "answer_start": [-1, 99]}},
                 "文章：他在第0年出生。\n问题：哪一年？\n", "第0年"),
    "sanwen": (lambda i: {"head": "我", "tail": "河", "relation": "Near", "text": f"我走到河边{i}"},
               "甲：我\n乙：河\n", "邻近"),
    "cote_mfw": (lambda i: {"s": f" 西湖真美{i} ", "ot": " 西湖"}, "点评：西湖真美0\n", "西湖"),
    "chnsenticorp": (lambda i: {"text": f"房间干净{i}", "label": 1}, "点评：房间干净0\n", "正面"),
    "tnews": (lambda i: {"sentence": f"楼市{i}", "label": 5, "idx": i}, "标题：楼市0\n", "房产"),
    "ocnli": (lambda i: {"sentence1": f"前{i}", "sentence2": f"后{i}", "label": 2, "idx": i}, "前提：前0\n", "矛盾"),
    "lcqmc": (lambda i: {"sentence1": f"怎么去{i}", "sentence2": f"如何{i}", "score": 1}, "问句二：如何0\n", "相同"),
    "drcd": (lambda i: {"context": f"他生於{i}年。", "question": "何年?",
                        "answers": {"text": [f"{i}年"] * 2, "answer_start": [3, 3]}}, "問題：何年?\n", "0年"),
    "c3": (lambda i: {"context": [f"男：走吧{i}。", "女：好。"], "question": "去吗？",
                      "choice": ["去", "不去", "不知道"], "answer": "不去"},
           "材料：男：走吧0。\n女：好。\n问题：去吗？\nA. ", ""),
    "cote_bd": (lambda i: {"s": f"长城雄伟{i}", "ot": "长城"}, "评论：长城雄伟0\n", "长城"),
    "finre": (lambda i: {"head": "甲公司", "tail": "乙公司", "relation": "被收购", "text": f"甲公司与乙公司<N>{i}"},
              "乙：乙公司\n", "被收购"),
}


def published(name, i=0, **change):
    return PUBLISHED[name][0](i) | change


def example_of(name, **change):
    return data.to_example(name, chinese.to_prompt(TASKS[name], published(name, **change), "f:3"), "f:3")


def write_rows(folder, name, train, test, suffix="jsonl"):
    """Write rows (dicts) or a whole file (text) as folder/name/{train,test}.jsonl; -> folder."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name / f"{split}.{suffix}").write_bytes(text.encode())
    return folder


def both(name):
    """Twelve train rows and four test rows."""
    return [published(name, i) for i in range(12)], [published(name, i) for i in range(12, 16)]


def test_the_table_is_consistent_and_source_and_target_tasks_are_apart():
    assert set(PUBLISHED) <= set(TASKS) and {*chinese.SOURCES, *chinese.TARGETS} == set(TASKS)
    for task in chinese.TABLE:
        assert task.role in ("source", "target") and task.passage in task.fields and task.sources
        assert (task.kind == "closed") == bool(task.answers) and (task.kind == "choice") == ("choices" in task.fields)
        assert not task.labels or len(task.labels) == len(task.answers) == len(set(task.answers))
        assert set(task.group) <= set(task.fields) and task.positive in ("", *task.answers)


def test_an_entry_of_ones_own_reads_fields_and_labels_and_joins_answers_in_its_language():
    for template, joined in (("{text} 选{options}", "甲 选a、b"), ("{text} One of: {options}", "甲 One of: a, b")):
        task = chinese.Task("new", "source", "closed", "accuracy", template, ("a", "b"))
        row = chinese.to_prompt(task, {"text": "甲", "label": "b"}, "")
        assert (row["prompt"], row["answer"]) == (joined, "b")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_task_reads_its_published_form(tmp_path, name):
    _, part, answer = PUBLISHED[name]
    splits = data.load_splits(name, str(write_rows(tmp_path, name, *both(name))))
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (11, 1, 4)
    example = next(e for e in splits.train + splits.dev if e.row.endswith("train.jsonl:1"))
    assert part in example.prompt and example.prompt.endswith("：") and "{" not in example.prompt
    assert all(example.prompt[a:b] in part + example.prompt for _, a, b in example.fields)
    if name == "c3":  # the letter in front of the right option
        assert f"{example.answer}. 不去\n" in example.prompt and example.choices == ("A", "B", "C")
        return
    assert example.answer == answer and example.choices == TASKS[name].answers
    assert "、".join(example.choices) in example.prompt
    if TASKS[name].kind == "span":
        others = ("不在文中",) if name == "cmrc2018" else ()
        assert example.references == (answer, *others) and answer in example.prompt


@pytest.mark.parametrize("name, label, answer", [
    ("cmnli", 0, "中立"), ("cmnli", "entailment", "蕴含"), ("ocnli", "contradiction", "矛盾"), ("ocnli", "0", "中立"),
    ("tnews", 14, "游戏"), ("tnews", "116", "游戏"), ("tnews", "106", "房产"), ("tnews", 104, "财经"),
    ("tnews", "112", "旅游"), ("tnews", 10, "旅游"), ("thucnews", 0, "财经"), ("thucnews", "9", "娱乐"),
    ("amazon", 0, "一星"), ("bq", 1.0, "相同"), ("afqmc", "1", "相同"), ("chnsenticorp", 0, "负面"),
    ("sanwen", "unknown", "无关"), ("finre", "unknown", "无关"), ("finre", "拟收购", "拟收购")])
def test_labels_follow_the_published_order(name, label, answer):
    field = next(key for key in ("label", "score", "relation") if key in published(name))
    assert example_of(name, **{field: label}).answer == answer


def test_files_may_hold_a_byte_order_mark_quotes_blank_lines_line_separators_and_a_broken_line(tmp_path):
    train = "\ufeff" + "\r\n \r\n".join(f'我\t"河\tNear\t我走到"河边{i}' for i in range(12)) + "\r\n\r\nonly\ttwo\r\n"
    write_rows(tmp_path, "sanwen", train, "我\t河\tunknown\t我在河边\n", suffix="txt")
    splits = data.load_splits("sanwen", str(tmp_path))
    rows = splits.train + splits.dev
    assert len(rows) == 12 and splits.report["dropped"]["train"] == {"wrong number of columns": 1}
    assert all('乙："河\n' in e.prompt and "\r" not in e.prompt and "\ufeff" not in e.prompt for e in rows)
    assert splits.test[0].answer == "无关"
    lines = [json.dumps(published("cote_bd", i, s=f"长城{i}\u2028雄伟<N>"), ensure_ascii=False) for i in range(4)]
    write_rows(tmp_path, "cote_bd", "\ufeff" + "\r\n\r\n".join(lines) + "\r\n", [published("cote_bd", 9)])
    splits = data.load_splits("cote_bd", str(tmp_path))
    assert ["\u2028雄伟<N>" in e.prompt for e in splits.train + splits.dev] == [True] * 4


def test_files_are_read_under_the_names_that_clue_cmrc_and_c3_give_them(tmp_path):
    nested = {"cmrc2018": [{"context_text": "他生于1年。", "qas": [{"query_text": "何年？", "answers": ["1年"]}]}],
              "drcd": {"data": [{"paragraphs": [{"context": "他生於1年。", "qas": [
                  {"question": "何年?", "answers": [{"text": "1年", "answer_start": 3}, {"text": "沒有"}]}]}]}]},
              "c3": [[["男：走。"], [{"question": "去吗？", "choice": ["去", "不"], "answer": "去"}], "7-1"]]}
    names = {"tnews": ["train", "dev", "test"], "cmrc2018": ["cmrc2018_train", "cmrc2018_dev"],
             "drcd": ["DRCD_training", "DRCD_dev", "DRCD_test"], "c3": ["d-train", "m-train", "d-dev", "m-dev"]}
    test = {"tnews": ["dev"], "cmrc2018": ["cmrc2018_dev"], "drcd": ["DRCD_test"], "c3": ["d-dev", "m-dev"]}
    for task, files in names.items():
        (tmp_path / task).mkdir()
        for file in files:
            row = {"sentence": "楼市"} | ({} if file == "test" else {"label": "106"})  # CLUE's test sets have no labels
            indent = 1 if task in nested and "m-" not in file else None  # on many lines or on one
            (tmp_path / task / f"{file}.json").write_text(json.dumps(nested.get(task, row), indent=indent))
    for task, files in test.items():
        rows = list(chinese.local_rows(TASKS[task], str(tmp_path), "test"))
        place = ".json, entry 1" if task in nested else ".json:1"
        assert [place for place, _ in rows] == [f"{tmp_path / task / file}{place}" for file in files]
        prompt = chinese.to_prompt(TASKS[task], rows[0][1], "")
        assert prompt["answer"] in ("房产", "1年") or f"{prompt['answer']}. 去\n" in prompt["prompt"]
        assert prompt.get("references", ["1年"]) == ["1年", "沒有"][: 2 if task == "drcd" else 1]
        assert len(list(chinese.local_rows(TASKS[task], str(tmp_path), "train"))) == len(files)


def test_a_question_is_scored_against_all_its_answers_and_trained_on_one_that_stands_in_the_passage():
    example = example_of("cmrc2018", answers={"text": ["第0年。", "第0年", "在第0年", "第零年"]})
    assert example.answer == "第0年" and example.protected == ("第0年", "在第0年")
    for answer in example.references:
        assert evaluate.score_task("cmrc2018", [answer], [example])["exact_match"] == 1


def test_the_relations_of_two_names_in_a_text_are_one_question_of_the_test_and_a_train_row_each(tmp_path):
    train, test = both("finre")
    train += [row | {"relation": "合作"} for row in train]
    test += [row | {"relation": "合作"} for row in test[:1]] + test[1:2]
    splits = data.load_splits("finre", str(write_rows(tmp_path, "finre", train, test)))
    assert len(splits.train) == 22 and [set(row.references) for row in splits.dev] == [{"被收购", "合作"}]
    assert sorted(len(row.references) for row in splits.test) == [0, 0, 0, 2] and len(test) == 6
    assert evaluate.score_task("finre", ["合作"] * 4, splits.test)["score"] == 2 * 1 / (4 + 4)


@pytest.mark.parametrize("name, changes, reasons", [
    ("ocnli", [{"label": -1}, {"label": "-"}, {"label": None}, {"sentence2": " "}],
     {"no label": 3, "empty sentence2": 1}), ("drcd", [{"question": float("nan")}], {"empty question": 1}),
    ("cmrc2018", [{"answers": {"text": ["火星"]}}, {"answers": {"text": []}}, {"question": ""}],
     {"answer not in the text": 1, "no answer": 1, "empty question": 1}),
    ("c3", [{"answer": ""}, {"answer": "都不是"}, {"choice": ["不去", "不去"]}],
     {"no answer": 1, "answer not among the choices": 1, "fewer than two choices": 1})])
def test_unusable_rows_are_left_out_and_counted_by_reason(tmp_path, name, changes, reasons):
    train, test = both(name)
    train += [published(name, 20 + i, **change) for i, change in enumerate(changes)]
    splits = data.load_splits(name, str(write_rows(tmp_path, name, train, test)))
    assert splits.report["dropped"] == {"train": reasons, "test": {}} and len(splits.train + splits.dev) == 12


def test_c3_shuffles_its_choices_the_same_way_every_time_drops_doubles_and_has_letters_for_all():
    example = example_of("c3", choice=["去", "不去", "去", "不去了"])
    assert example == example_of("c3", choice=["去", "不去", "去", "不去了"]) and example.choices == ("A", "B", "C")
    answers = [example_of("c3", i=i).answer for i in range(60)]
    assert min(answers.count(letter) for letter in "ABC") > 8  # as published, they all are the second
    example = example_of("c3", choice=["不去", *(f"去{i}" for i in range(29))])
    assert len(example.choices) == 30 and example.choices[25:28] == ("Z", "AA", "AB")
    assert f"\n{example.answer}. 不去\n" in f"{example.prompt}\n"


def test_pairs_in_either_order_and_swapped_relations_are_one_group():
    for name, first, second in (("lcqmc", "sentence1", "sentence2"), ("finre", "head", "tail")):
        row = published(name)
        a, b = example_of(name), example_of(name, **{first: row[second], second: row[first]})
        assert a.group == b.group and a.prompt != b.prompt
    assert example_of("ocnli").group == example_of("ocnli", sentence2="别的").group  # one premise


@pytest.mark.parametrize("train, parts", [
    ([published("sanwen", i, relation="Nahe" if i == 4 else "Near") for i in range(9)],
     ["train.jsonl:5", "'Nahe'", "'sanwen'", "Part-Whole"]),
    ([published("sanwen"), {"head": "我", "tail": "河", "text": "我在河边"}],
     ["train.jsonl:2", "'relation'", "head, tail, text"]),
    ("[1, 2]\n[3]\n", ["train.jsonl:1", "list"]), ("3\n", ["train.jsonl:1: a row is a JSON object"]),
    ([published("sanwen", text="")], ["no usable train row", "1 empty text"]),
    ([published("sanwen")], ["'sanwen'", "dev"])])
def test_what_is_wrong_with_the_rows_is_said_in_one_sentence(tmp_path, train, parts):
    write_rows(tmp_path, "sanwen", train, [published("sanwen", 99)])
    with pytest.raises(UserError) as error:
        data.load_task("sanwen", "train", tmp_path)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands for datasets.load_dataset: answers from `rows`, fails for what is not there, remembers the calls."""
    fake = SimpleNamespace(rows={}, calls=[])

    def load_dataset(path, name=None, *, split=None, revision=None, data_files=None):
        where = data_files[split][0] if data_files else split
        fake.calls.append((path, name, revision, where))
        if (path, where) not in fake.rows:
            raise ConnectionError(f"Couldn't reach {path}\nfor some reason")
        return fake.rows[path, where]

    data.load_splits.cache_clear()
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return fake


def test_the_first_source_is_read_at_its_revision_with_validation_as_test(hub):
    hub.rows = dict(zip([("clue/clue", "train"), ("clue/clue", "validation")], both("tnews")))
    splits = data.load_splits("tnews")
    revision = "28178267a609dd08bdc703dd6c931dfc2c2f4431"
    assert hub.calls == [("clue/clue", "tnews", revision, split) for split in ("train", "validation")]
    assert len(splits.test) == 4 and splits.report["notes"] == [] and "clue/clue:tnews" in splits.report["source"]


@pytest.mark.parametrize("first", [None, {"a": 1}, published("lcqmc", score=7)])
def test_a_source_that_is_away_or_has_other_columns_or_labels_falls_back_and_says_so(hub, first):
    hub.rows = dict(zip([("mteb/LCQMC", "train"), ("mteb/LCQMC", "test")], both("lcqmc")))
    if first:
        hub.rows |= {("C-MTEB/LCQMC", "train"): [first], ("C-MTEB/LCQMC", "test"): [first]}
    report = data.load_splits("lcqmc").report
    assert report["source"] == "mteb/LCQMC at main"
    assert report["notes"][0].startswith("C-MTEB/LCQMC at 17f9b09 failed (")


def test_files_are_downloaded_once_from_the_commit_or_its_mirror(hub, monkeypatch, tmp_path):
    commit, asked = "thunlp/Chinese_NRE@2cd47e6dc1b95e8ca3e93b5b8567666c37c5d654", []
    mirror = f"https://cdn.jsdelivr.net/gh/{commit}/data/FinRE/"
    texts = {mirror + "train.txt": "\n\n".join(f"甲\t乙\t合作\t甲乙{i}" for i in range(12)),
             mirror + "test.txt": "甲\t乙\tunknown\t甲与乙\r\n"}

    def retrieve(url, path):
        asked.append(url)
        path.write_text(texts.get(url, "half"), encoding="utf-8", newline="")
        if url not in texts:
            raise OSError("retrieval incomplete")

    monkeypatch.setattr(chinese, "urlretrieve", retrieve)
    splits = data.load_splits("finre")
    assert len(list(tmp_path.rglob("*train.txt"))) == 1  # half a download is not kept
    assert asked == [f"https://raw.githubusercontent.com/{commit.replace('@', '/')}/data/FinRE/train.txt", *texts]
    assert len(splits.train + splits.dev) == 12 and splits.test[0].answer == "无关"
    data.load_splits.cache_clear()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert data.load_splits("finre").test == splits.test and len(asked) == 3  # from the cache
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        chinese._download("https://example.org/other.txt")


@pytest.mark.parametrize("name, change, operation, old, new", [
    ("afqmc", {}, "swap", "提问一：花呗0\n提问二：借呗0\n", "提问一：借呗0\n提问二：花呗0\n"),
    ("amazon", {"text": "质量好。价格低！"}, "sentence_order", "质量好。价格低！", "价格低。质量好！"),
    ("amazon", {"text": "质量好，价格低。"}, "clause_order", "质量好，价格低。", "价格低，质量好。"),
    ("thucnews", {"text": "词汇是关键 考研全指南"}, "title_order", "词汇是关键 考研全指南", "考研全指南 词汇是关键"),
    ("cmnli", {"sentence1": "他昨天去了北京"}, "time_order", "前提：他昨天去了北京", "前提：昨天他去了北京"),
    ("cmnli", {"sentence1": "昨天，他去了北京"}, "time_order", "前提：昨天，他去了北京", "前提：他昨天去了北京"),
    ("cmnli", {"sentence1": "在会议之后，主席离开了大楼。"}, "adverbial_last", "在会议之后，主席离开了大楼。",
     "主席离开了大楼，在会议之后。"),
    ("cmnli", {"sentence1": "猫在睡觉"}, "frame", "前提：猫在睡觉", "前提：情况是这样的：猫在睡觉"),
    ("cmrc2018", {"question": "这部书的作者是谁？"}, "question_form", "这部书的作者是谁？", "谁是这部书的作者？"),
    ("cmrc2018", {"question": "他的著作有哪些？"}, "question_form", "他的著作有哪些？", "有哪些，他的著作？"),
    ("drcd", {"question": "花垣縣位於哪個省?"}, "question_form", "花垣縣位於哪個省?", "位於哪個省，花垣縣?")])
def test_each_operation_changes_one_field_and_keeps_the_answer(name, change, operation, old, new):
    example = example_of(name, **change)
    for rewritten in {data.perturb(example, seed) for seed in range(8)}:
        assert rewritten.operations == (operation,) and rewritten.prompt == example.prompt.replace(old, new)
        texts = {field: rewritten.prompt[start:end] for field, start, end in rewritten.fields}
        assert chinese.fill_template(TASKS[name], texts) == (rewritten.prompt, rewritten.fields)
        assert replace(rewritten, prompt=example.prompt, fields=example.fields, operations=()) == example


@pytest.mark.parametrize("name, text", [
    ("amazon", "质量好，但是价格高。"), ("amazon", "因为质量好，所以买了。"), ("amazon", "虽然质量好，我没买。"),
    ("amazon", "“质量好，价格低”"), ("amazon", "卖25,000元"), ("amazon", "很好"), ("thucnews", "词汇是关键"),
    ("sanwen", "我出门，河水上涨"),  # would turn head and tail round
    ("cmrc2018", "他被称为什么？"),  # 为什么 is another question
    ("cmrc2018", "他去了哪，是和谁？"), ("cmrc2018", "这里还有什么？"), ("cmnli", "你去吗？")])
def test_what_is_not_safe_is_left_alone(name, text):
    example = example_of(name, **{{"cmrc2018": "question", "cmnli": "sentence1"}.get(name, "text"): text})
    assert all(data.perturb(example, seed) is example for seed in range(8))


@pytest.mark.parametrize("name, change", [
    ("sanwen", {"text": "天黑了，我走到河边，月亮升起"}),
    ("cote_mfw", {"s": "你好，李焕英，电影真好看，值得看", "ot": "你好，李焕英"})])  # an answer that spans clauses
def test_the_answer_and_the_names_of_a_relation_are_never_torn(name, change):
    example = example_of(name, **change)
    changed = {data.perturb(example, seed) for seed in range(20)} - {example}
    assert changed and all(sorted(e.prompt) == sorted(example.prompt) for e in changed)
    assert all(e.prompt.count(text) == example.prompt.count(text) for e in changed for text in example.protected)
