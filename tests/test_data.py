"""data.py, tasks.py, rewrite.py: readers, splits, few-shot choice, rewriting, tokens, batches.

Rows are made up, in the schemas of the upstreams."""

import io
import json
import random

import pytest
import torch

import data
import tasks
import toy
from data import Encoded, Example, Sampler, UserError

NLI = ("中立", "蕴含", "矛盾")


class Characters:
    """A tokenizer with one token per character; eos 0. With `pairs` it merges the first two characters of "：x"."""

    eos_token_id = 0

    def __init__(self, merge: str = ""):
        self.merge = merge

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        if self.merge:
            text = text.replace(self.merge, "\ue000")
        return {"input_ids": [ord(character) for character in text]}


TOKENIZER = Characters()


def text_of(ids) -> str:
    return "".join(map(chr, ids))


def n_rows(make, n=12):
    return [make(i) for i in range(n)]


# One row of every upstream (hub schema), and what it has to become: (row maker, prompt must hold, answer, choices).
UPSTREAM = {
    "afqmc": (
        lambda i: {"sentence1": f"花呗{i}", "sentence2": f"借呗{i}", "label": 1, "idx": i},
        "提问二：借呗0\n",
        "相同",
    ),
    "amazon": (lambda i: {"id": f"zh_{i}", "text": f"好看{i}", "label": 4, "label_text": "4"}, "评价：好看0\n", "五星"),
    "thucnews": (lambda i: {"text": f"标题{i}", "label": 2}, "标题：标题0\n", "股票"),
    "bq": (lambda i: {"sentence1": f"额度{i}", "sentence2": f"利息{i}", "score": 0.0}, "提问一：额度0\n", "不同"),
    "cmnli": (lambda i: {"sentence1": f"前{i}", "sentence2": f"后{i}", "label": 1, "idx": i}, "假设：后0\n", "蕴含"),
    "cmrc2018": (
        lambda i: {
            "id": f"T{i}",
            "context": f"他在第{i}年出生。",
            "question": "哪一年？",
            "answers": {"text": ["不在文中", f"第{i}年"], "answer_start": [-1, 99]},
        },
        "文章：他在第0年出生。\n问题：哪一年？\n",
        "第0年",
    ),
    "sanwen": (
        lambda i: {"head": "我", "tail": "河", "relation": "Near", "text": f"我走到河边{i}"},
        "甲：我\n乙：河\n",
        "邻近",
    ),
    "cote_mfw": (lambda i: {"s": f" 西湖真美{i} ", "ot": " 西湖"}, "点评：西湖真美0\n", "西湖"),
    "chnsenticorp": (lambda i: {"text": f"房间干净{i}", "label": 1}, "点评：房间干净0\n", "正面"),
    "tnews": (lambda i: {"sentence": f"楼市{i}", "label": 5, "idx": i}, "标题：楼市0\n", "房产"),
    "ocnli": (lambda i: {"sentence1": f"前{i}", "sentence2": f"后{i}", "label": 2, "idx": i}, "前提：前0\n", "矛盾"),
    "lcqmc": (
        lambda i: {"sentence1": f"怎么去{i}", "sentence2": f"如何去{i}", "score": 1},
        "问句二：如何去0\n",
        "相同",
    ),
    "drcd": (
        lambda i: {
            "id": f"{i}",
            "context": f"他生於{i}年。",
            "question": "何年?",
            "answers": {"text": [f"{i}年"] * 2, "answer_start": [3, 3]},
        },
        "問題：何年?\n",
        "0年",
    ),
    "c3": (
        lambda i: {
            "id": str(i),
            "context": [f"男：走吧{i}。", "女：好。"],
            "question": "去吗？",
            "choice": ["去", "不去", "不知道"],
            "answer": "不去",
        },
        "材料：男：走吧0。\n女：好。\n问题：去吗？\nA. ",
        None,
    ),
    "cote_bd": (lambda i: {"s": f"长城雄伟{i}", "ot": "长城"}, "评论：长城雄伟0\n", "长城"),
    "finre": (
        lambda i: {"head": "甲公司", "tail": "乙公司", "relation": "被收购", "text": f"甲公司与乙公司<N>{i}"},
        "乙：乙公司\n",
        "被收购",
    ),
}


def folder(tmp_path, name, train, test, suffix="jsonl"):
    """Write rows (dicts) or a whole file (text) as DIR/name/{train,test}; -> DIR."""
    (tmp_path / name).mkdir(exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name / f"{split}.{suffix}").write_bytes(text.encode())
    return tmp_path


def both(make, n=12):
    """Train rows 0..n-1 and test rows n..n+3."""
    rows = n_rows(make, n + 4)
    return rows[:n], rows[n:]


@pytest.fixture(autouse=True)
def fresh_cache():
    data.load_splits.cache_clear()


# ----------------------------------------------------------------------------------------------------
# The table


def test_table_has_the_sixteen_tasks_and_is_consistent():
    assert tasks.SOURCES == ("afqmc", "amazon", "thucnews", "bq", "cmnli", "cmrc2018", "sanwen", "cote_mfw")
    assert tasks.TARGETS == ("chnsenticorp", "tnews", "ocnli", "lcqmc", "drcd", "c3", "cote_bd", "finre")
    sizes = {"amazon": 5, "thucnews": 10, "cmnli": 3, "ocnli": 3, "sanwen": 10, "tnews": 15, "finre": 44}
    for task in tasks.TABLE:
        assert task.template.rstrip()[-1] == "：" and task.passage in task.fields and task.sources
        assert (task.kind == "closed") == bool(task.answers) == ("options" in task.fields)
        assert len(set(task.answers)) == len(task.answers)
        assert not task.labels or len(task.labels) == len(task.answers)
        assert set(task.group) <= set(task.fields)
        if task.kind == "closed":
            assert len(task.answers) == sizes.get(task.name, 2)


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_task_reads_its_upstream_schema(tmp_path, name):
    make, part, answer = UPSTREAM[name]
    root = folder(tmp_path, name, *both(make))
    splits = data.load_splits(name, str(root))
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (11, 1, 4)
    example = next(e for e in splits.train + splits.dev if e.row.endswith("train.jsonl:1"))
    assert part in example.prompt and example.prompt.endswith("：") and "{" not in example.prompt
    assert example.choices == (tasks.TASKS[name].answers or (("A", "B", "C") if name == "c3" else ()))
    assert all(example.prompt[a:b] in part + example.prompt for _, a, b in example.fields)
    if answer:
        assert example.answer == answer
    else:  # C3: the letter in front of the right option
        assert f"{example.answer}. 不去\n" in example.prompt
    if tasks.TASKS[name].kind == "span":
        assert example.references == (answer,) and answer in example.prompt  # "不在文中" is no reference
    if example.choices and name != "c3":
        assert "、".join(example.choices) in example.prompt


@pytest.mark.parametrize(
    "name, label, answer",
    [
        ("cmnli", 0, "中立"),
        ("cmnli", "entailment", "蕴含"),
        ("ocnli", "contradiction", "矛盾"),
        ("ocnli", "0", "中立"),
        ("tnews", 14, "游戏"),
        ("tnews", "116", "游戏"),
        ("tnews", "106", "房产"),
        ("tnews", 104, "财经"),
        ("tnews", "112", "旅游"),
        ("tnews", 10, "旅游"),
        ("thucnews", 0, "财经"),
        ("thucnews", "9", "娱乐"),
        ("amazon", 0, "一星"),
        ("bq", 1.0, "相同"),
        ("afqmc", "1", "相同"),
        ("chnsenticorp", 0, "负面"),
        ("sanwen", "unknown", "无关"),
        ("finre", "unknown", "无关"),
        ("finre", "拟收购", "拟收购"),
    ],
)
def test_labels_follow_the_upstream_order(name, label, answer):
    row = UPSTREAM[name][0](0)
    row[next(key for key in ("label", "score", "relation") if key in row)] = label
    assert data.to_example(tasks.TASKS[name], row).answer == answer


# ----------------------------------------------------------------------------------------------------
# Nasty files


def test_tab_separated_upstream_files(tmp_path):
    lines = [f'我\t"河\tNear\t我走到"河边{i}' for i in range(12)]
    train = "\ufeff" + "\r\n".join(lines[:6]) + "\r\n\r\n \r\n" + "\r\n".join(lines[6:]) + "\r\nonly\ttwo\r\n"
    root = folder(tmp_path, "sanwen", train, "我\t河\tunknown\t我在河边\n", suffix="txt")
    splits = data.load_splits("sanwen", str(root))
    rows = splits.train + splits.dev
    assert len(rows) == 12 and splits.report["dropped"]["train"] == {"wrong number of columns": 1}
    assert all('乙："河\n' in e.prompt and "\r" not in e.prompt and "\ufeff" not in e.prompt for e in rows)
    assert splits.test[0].answer == "无关"


def test_json_lines_with_bom_crlf_blank_lines_and_line_separators(tmp_path):
    make = UPSTREAM["cote_bd"][0]
    lines = [json.dumps(make(i), ensure_ascii=False) for i in range(3)] + ['{"s": "长城\u2028雄伟<N>", "ot": "长城"}']
    root = folder(tmp_path, "cote_bd", "\ufeff" + "\r\n\r\n".join(lines) + "\r\n", [make(9)])
    splits = data.load_splits("cote_bd", str(root))
    assert len(splits.train + splits.dev) == 4
    assert any("长城\u2028雄伟<N>" in e.prompt for e in splits.train + splits.dev)


def test_nested_documents_of_squad_and_c3():
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "他生於1年。",
                        "qas": [
                            {
                                "question": "何年?",
                                "answers": [{"text": "1年", "answer_start": 3}, {"text": "沒有", "answer_start": 0}],
                            }
                        ],
                    }
                ]
            }
        ]
    }
    c3 = [[["男：走。"], [{"question": "去吗？", "choice": ["去", "不"], "answer": "去"}], "7-1"]]
    for name, document in (("drcd", squad), ("c3", c3)):
        for text in (json.dumps(document), json.dumps(document, indent=1)):
            ((place, row),) = data.parse_rows(text, where="f")
            example = data.to_example(tasks.TASKS[name], row, place)
            assert example.row == "f, entry 1"
            assert example.references == ("1年",) if name == "drcd" else f"{example.answer}. 去" in example.prompt


def test_unusable_rows_are_dropped_and_counted(tmp_path):
    good = UPSTREAM["ocnli"][0]
    bad = [
        good(20) | {"label": -1},
        good(21) | {"label": "-"},
        good(22) | {"sentence2": "  "},
        good(23) | {"label": None},
        good(3),
        good(3) | {"idx": 99},
        good(0) | {"sentence1": "测 试"},
    ]
    root = folder(tmp_path, "ocnli", n_rows(good) + bad, [good(30) | {"sentence1": "测试"}, good(31) | {"label": -1}])
    report = data.load_splits("ocnli", str(root)).report
    assert report["dropped"] == {
        "train": {"no label": 3, "empty sentence2": 1, "text also in test": 1, "repeated": 2},
        "test": {"no label": 1},
    }
    assert report["read"] == {"train": 19, "test": 2}

    qa = UPSTREAM["cmrc2018"][0]
    bad = [
        qa(20) | {"answers": {"text": ["火星"], "answer_start": [0]}},
        qa(21) | {"answers": {"text": []}},
        qa(22) | {"question": ""},
    ]
    root = folder(tmp_path, "cmrc2018", n_rows(qa) + bad, [qa(30)])
    assert data.load_splits("cmrc2018", str(root)).report["dropped"]["train"] == {
        "answer not in the text": 1,
        "no answer": 1,
        "empty question": 1,
    }

    c3 = UPSTREAM["c3"][0]
    bad = [c3(20) | {"answer": ""}, c3(21) | {"answer": "都不是"}, c3(22) | {"choice": ["不去", "不去"]}]
    root = folder(tmp_path, "c3", n_rows(c3) + bad, [c3(30)])
    assert data.load_splits("c3", str(root)).report["dropped"]["train"] == {
        "no answer": 1,
        "answer not among the choices": 1,
        "fewer than two choices": 1,
    }


def test_c3_shuffles_choices_the_same_way_every_time_and_drops_doubles():
    make = UPSTREAM["c3"][0]
    row = make(0) | {"choice": ["去", "不去", "去", "不去了"]}
    first, second = (data.to_example(tasks.TASKS["c3"], row) for _ in range(2))
    assert first == second and first.choices == ("A", "B", "C") and f"{first.answer}. 不去\n" in first.prompt + "\n"
    answers = [data.to_example(tasks.TASKS["c3"], make(i)).answer for i in range(60)]
    assert min(answers.count(letter) for letter in "ABC") > 8  # upstream they all are the second


def rows_with(index, **change):
    rows = n_rows(UPSTREAM["sanwen"][0])
    rows[index] = {key: value for key, value in (rows[index] | change).items() if value is not ...}
    return rows


@pytest.mark.parametrize(
    "train, parts",
    [
        (rows_with(4, relation="Nahe"), ["train.jsonl:5", "'Nahe'", "'sanwen'", "Part-Whole"]),
        (rows_with(2, text=...), ["train.jsonl:3", "'text'", "head, tail, relation"]),
        (rows_with(2, relation=...), ["train.jsonl:3", "'relation'"]),
        ('{"head": "我", "tail"\n', ["train.jsonl:1", "JSON"]),
        ('{"head": "我"}\n[1, 2]\n', ["train.jsonl:1", "'text'"]),
        ("[1, 2]\n[3]\n", ["train.jsonl:1", "list"]),
        ("", ["'sanwen'", "no usable train row", "holds no row"]),
        (rows_with(0, text="")[:1], ["no usable train row", "1 empty text"]),
        (n_rows(UPSTREAM["sanwen"][0], 1), ["'sanwen'", "dev"]),
    ],
)
def test_what_is_wrong_with_the_rows_is_said_in_one_sentence(tmp_path, train, parts):
    root = folder(tmp_path, "sanwen", train, [UPSTREAM["sanwen"][0](99)])
    with pytest.raises(UserError) as error:
        data.load_task("sanwen", "train", root)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_missing_folders_files_names_and_splits(tmp_path):
    for root, name, split, parts in (
        (tmp_path / "none", "sanwen", "train", ["--data-root", "none"]),
        (tmp_path, "sanwen", "train", ["train.jsonl", "missing", "--data-root"]),
        (tmp_path, "sanwen", "valid", ["'valid'", "dev"]),
        (None, "nothing", "train", ["'nothing'", "afqmc", "--data-root"]),
        (None, "toy-nothing", "train", ["'toy-nothing'", "toy-afqmc"]),
    ):
        with pytest.raises(UserError) as error:
            data.load_task(name, split, root)
        assert all(part in str(error.value) for part in parts)
    root = folder(tmp_path, "sanwen", n_rows(UPSTREAM["sanwen"][0]), [])
    with pytest.raises(UserError, match="no usable test row"):
        data.load_task("sanwen", "test", root)
    (tmp_path / "sanwen" / "train.jsonl").write_bytes("我".encode("gbk"))
    with pytest.raises(UserError, match="UTF-8"):
        data.load_task("sanwen", "train", root)


# ----------------------------------------------------------------------------------------------------
# The hub


class Hub:
    """Stands for datasets.load_dataset: answers from `rows`, fails for what is not there, remembers the calls."""

    def __init__(self):
        self.rows, self.calls = {}, []

    def __call__(self, path, name=None, *, split=None, revision=None, data_files=None):
        where = data_files[split][0] if data_files else split
        self.calls.append((path, name, revision, where))
        if (path, where) not in self.rows:
            raise ConnectionError(f"Couldn't reach {path}\nfor some reason")
        return self.rows[path, where]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    fake = Hub()
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data, "urlopen", lambda url, timeout: (_ for _ in ()).throw(OSError(f"no route to {url}")))
    return fake


def test_hub_first_choice_with_its_revision_and_validation_as_test(hub):
    make = UPSTREAM["tnews"][0]
    train, test = both(make)
    hub.rows = {("clue/clue", "train"): train, ("clue/clue", "validation"): test}
    splits = data.load_splits("tnews")
    assert hub.calls == [
        ("clue/clue", "tnews", "28178267a609dd08bdc703dd6c931dfc2c2f4431", split) for split in ("train", "validation")
    ]
    assert len(splits.test) == 4 and splits.report["notes"] == [] and "clue/clue:tnews" in splits.report["source"]


@pytest.mark.parametrize("broken", ["away", "other columns", "other labels"])
def test_a_broken_first_choice_falls_back_and_says_so(hub, capsys, broken):
    train, test = both(UPSTREAM["lcqmc"][0])
    hub.rows = {("mteb/LCQMC", "train"): train, ("mteb/LCQMC", "test"): test}
    if broken != "away":
        row = {"a": 1} if broken == "other columns" else train[0] | {"score": 7}
        hub.rows |= {("C-MTEB/LCQMC", "train"): [row], ("C-MTEB/LCQMC", "test"): [row]}
    splits = data.load_splits("lcqmc")
    assert len(splits.test) == 4 and "mteb/LCQMC" in splits.report["source"]
    assert "C-MTEB/LCQMC" in splits.report["notes"][0] and "using mteb/LCQMC" in capsys.readouterr().err


def test_nothing_reachable_is_one_sentence_with_task_tries_and_remedy(hub):
    with pytest.raises(UserError) as error:
        data.load_task("afqmc", "train")
    for part in ("'afqmc'", "clue/clue:afqmc", "C-MTEB/AFQMC", "Couldn't reach", "--data-root", "network"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


class Reply(io.BytesIO):
    def __init__(self, body: bytes, length: int):
        super().__init__(body)
        self.headers = {"Content-Length": str(length)}


def test_raw_files_are_downloaded_once_from_the_commit_or_its_mirror(hub, monkeypatch):
    commit = "thunlp/Chinese_NRE@2cd47e6dc1b95e8ca3e93b5b8567666c37c5d654"
    mirror = f"https://cdn.jsdelivr.net/gh/{commit}/data/FinRE/"
    train = "\n\n".join(f"甲\t乙\t合作\t甲乙{i}" for i in range(12)).encode()
    bodies = {mirror + "train.txt": train, mirror + "test.txt": "甲\t乙\tunknown\t甲与乙\r\n".encode()}
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Reply(bodies[url], len(bodies[url])) if url in bodies else Reply(b"half", 1000)

    monkeypatch.setattr(data, "urlopen", urlopen)
    splits = data.load_splits("finre")
    assert asked[0] == f"https://raw.githubusercontent.com/{commit.replace('@', '/')}/data/FinRE/train.txt"
    assert asked[1:] == [mirror + "train.txt", mirror + "test.txt"]
    assert len(splits.train + splits.dev) == 12 and splits.test[0].answer == "无关"
    assert "broke off after 4 of 1000 bytes" in splits.report["notes"][0]
    data.load_splits.cache_clear()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert data.load_splits("finre").test == splits.test and len(asked) == 3  # from the cache


def test_files_of_the_hub_are_read_by_their_builder(hub):
    train, test = both(UPSTREAM["amazon"][0])
    files = "hf://datasets/mteb/amazon_reviews_multi/zh/{}.jsonl"
    hub.rows = {("json", files.format("train")): train, ("json", files.format("test")): test}
    assert len(data.load_task("amazon", "test")) == 4
    assert hub.calls[0][0] == "SetFit/amazon_reviews_multi_zh"


# ----------------------------------------------------------------------------------------------------
# Splits


def test_no_group_is_in_two_splits_and_dev_is_a_tenth(tmp_path):
    make = UPSTREAM["cmrc2018"][0]
    train = [make(i % 50) | {"question": f"问{i}？"} for i in range(200)]  # four questions a passage
    root = folder(tmp_path, "cmrc2018", train, [make(i) | {"question": "新？"} for i in range(45, 60)])
    splits = data.load_splits("cmrc2018", str(root))
    groups = [{e.group for e in rows} for rows in (splits.train, splits.dev, splits.test)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert splits.report["dropped"]["train"] == {"text also in test": 20}
    assert len(splits.train) + len(splits.dev) == 180 and 18 <= len(splits.dev) < 22
    data.load_splits.cache_clear()
    assert data.load_splits("cmrc2018", str(root)).dev == splits.dev


def test_dev_is_capped_and_rows_are_shuffled(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEV_ROWS", 5)
    make = UPSTREAM["amazon"][0]
    rows = [make(i) | {"label": i // 40} for i in range(200)]  # sorted by star, as upstream
    splits = data.load_splits("amazon", str(folder(tmp_path, "amazon", rows, [make(i) for i in range(200, 240)])))
    assert len(splits.dev) == 5
    assert len({e.answer for e in splits.train[:20]}) >= 4
    assert [e.row for e in splits.test] != sorted((e.row for e in splits.test), key=lambda r: int(r.split(":")[1]))


def test_pairs_are_one_group_in_either_order_and_swapped_relations_share_it():
    pair = UPSTREAM["lcqmc"][0](0)
    swapped = pair | {"sentence1": pair["sentence2"], "sentence2": pair["sentence1"]}
    relation = UPSTREAM["finre"][0](0)
    inverse = relation | {"head": relation["tail"], "tail": relation["head"], "relation": "收购"}
    nli, other = UPSTREAM["ocnli"][0](0), UPSTREAM["ocnli"][0](0) | {"sentence2": "别的"}
    for name, a, b in (("lcqmc", pair, swapped), ("finre", relation, inverse), ("ocnli", nli, other)):
        a, b = (data.to_example(tasks.TASKS[name], row) for row in (a, b))
        assert a.group == b.group and a.prompt != b.prompt


def test_texts_of_cote_bd_are_not_trained_on_through_cote_mfw(tmp_path):
    make = UPSTREAM["cote_mfw"][0]
    folder(tmp_path, "cote_bd", [make(i) for i in range(8, 12)], [make(13)])
    root = folder(tmp_path, "cote_mfw", [make(i) for i in range(14)], [make(40)])
    splits = data.load_splits("cote_mfw", str(root))
    assert splits.report["dropped"]["train"] == {"text also in cote_bd": 5} and splits.report["notes"] == []
    alone = folder(tmp_path / "cote_bd", "cote_mfw", [make(i) for i in range(14)], [make(40)])
    splits = data.load_splits("cote_mfw", str(alone))
    assert splits.report["dropped"]["train"] == {} and "not compared with cote_bd" in splits.report["notes"][0]


def test_rows_with_two_relations_accept_both(tmp_path):
    make = UPSTREAM["finre"][0]
    test = [make(50), make(50) | {"relation": "合作"}, make(51)]
    splits = data.load_splits("finre", str(folder(tmp_path, "finre", n_rows(make), test)))
    references = {(e.answer, e.references) for e in splits.test}
    assert references == {("被收购", ("被收购", "合作")), ("合作", ("合作", "被收购")), ("被收购", ())}


def test_micro_world_tasks_load_offline():
    for name in toy.SOURCES + toy.TARGETS:
        train, dev, test = (data.load_task(name, split) for split in ("train", "dev", "test"))
        assert len(train) > len(dev) > 0 and len(test) >= 100
        assert not {e.group for e in train} & {e.group for e in dev + test}
        kind = data.task_of(name, train).kind
        assert kind == {
            "toy-cmrc2018": "span",
            "toy-drcd": "span",
            "toy-cote_mfw": "span",
            "toy-cote_bd": "span",
            "toy-c3": "choice",
        }.get(name, "closed")
        assert all(e.answer in e.choices for e in test) or kind == "span"


# ----------------------------------------------------------------------------------------------------
# Own tasks


def test_own_rows_need_no_entry(tmp_path):
    closed = [{"prompt": f"好不好{i}？", "answer": "好" if i % 2 else "坏", "choices": ["坏", "好"]} for i in range(24)]
    span = [{"prompt": f"名字：小{i}", "answer": f"小{i}", "passage": f"小{i}"} for i in range(24)]
    choice = [{"prompt": f"选{i}", "answer": f"甲{i}", "choices": [f"甲{i}", "乙"]} for i in range(24)]
    for name, rows, kind in (("mine", closed, "closed"), ("spans", span, "span"), ("choices", choice, "choice")):
        root = folder(tmp_path, name, rows[:20], rows[20:])
        train = data.load_task(name, "train", root)
        assert len(train) == 18 and data.task_of(name, train).kind == kind
        assert {e.prompt for e in train} < {row["prompt"] for row in rows}
    bad = [{"prompt": "好不好？", "answer": "中", "choices": ["坏", "好"]}]
    with pytest.raises(UserError, match="train.jsonl:1.*'中'"):
        data.load_task("bad", "train", folder(tmp_path, "bad", bad, bad))


def test_a_new_task_is_one_entry(tmp_path, monkeypatch):
    task = tasks.Task(
        "weather", "target", "closed", "accuracy", "天气如何？\n日记：{text}\n可选：{options}\n天气：", ("晴", "雨")
    )
    monkeypatch.setitem(tasks.TASKS, "weather", task)
    rows = [{"text": f"今天{i}", "label": i % 2} for i in range(24)]
    train = data.load_task("weather", "train", folder(tmp_path, "weather", rows[:20], rows[20:]))
    assert {e.answer for e in train} == {"晴", "雨"}
    assert all(e.prompt.endswith("可选：晴、雨\n天气：") for e in train)


# ----------------------------------------------------------------------------------------------------
# K-shot


def made_up(counts: dict[str, int], per_group: int = 1, task="toy-made-up") -> list[Example]:
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return [
        Example(task, f"p{i}", answer, tuple(counts), group=f"g{i // per_group}", row=f"r{i}")
        for i, answer in enumerate(answers)
    ]


def test_k_shot_is_balanced_disjoint_nested_and_independent_of_order():
    examples = made_up({"a": 300, "b": 50, "c": 3})
    train, dev = data.k_shot(examples, 16, seed=1)
    count = [[e.answer for e in side].count(answer) for side in (train, dev) for answer in "abc"]
    assert sum(count[:3]) == sum(count[3:]) == 16 and sorted((count[2], count[5])) == [1, 2]
    assert all(abs(n - 7) <= 1 for n in count[:2] + count[3:5])  # what c lacks goes to a and b alike
    assert not {e.group for e in train} & {e.group for e in dev}
    shuffled = random.Random(0).sample(examples, len(examples))
    assert data.k_shot(shuffled, 16, seed=1) == (train, dev)
    assert data.k_shot(examples, 16, seed=2) != (train, dev)
    assert data.k_shot(examples, 8, seed=1)[0] == train[:8]
    assert data.k_shot(examples, 0, seed=1) == ([], [])


def test_k_shot_below_the_number_of_classes_takes_one_row_of_as_many_classes():
    examples = made_up({f"c{n}": 30 for n in range(44)})
    train, dev = data.k_shot(examples, 32, seed=0)
    assert len({e.answer for e in train}) == len({e.answer for e in dev}) == 32


def test_k_shot_keeps_groups_apart_and_says_when_k_is_too_large():
    spans = [Example("toy-made-up", f"p{i}", f"a{i}", group=f"g{i // 5}") for i in range(100)]
    train, dev = data.k_shot(spans, 20, seed=0)
    assert len(train) == len(dev) == 20 and not {e.group for e in train} & {e.group for e in dev}
    with pytest.raises(UserError, match="k = 51"):
        data.k_shot(spans, 51, seed=0)
    with pytest.raises(UserError, match="k = 1 "):
        data.k_shot(made_up({"a": 1, "b": 1}, per_group=2), 1, seed=0)
    with pytest.raises(UserError, match="-1"):
        data.k_shot(spans, -1, seed=0)


def test_k_shot_record_names_rows_and_data():
    examples = made_up({"a": 20, "b": 20})
    record = data.k_shot_record(examples, 4, seed=3)
    train, dev = data.k_shot(examples, 4, seed=3)
    assert [examples[i] for i in record["train_indices"]] == train
    assert record["dev"] == [e.row for e in dev] and record["answers"] == {"a": 2, "b": 2}
    assert json.loads(json.dumps(record)) == record
    assert record["data"] == data.data_hash(examples[::-1]) != data.data_hash(examples[1:])


# ----------------------------------------------------------------------------------------------------
# Perturb


def example_of(name, **change):
    return data.to_example(tasks.TASKS[name], UPSTREAM[name][0](0) | change)


@pytest.mark.parametrize(
    "name, change, operation, old, new",
    [
        ("afqmc", {}, "swap", "提问一：花呗0\n提问二：借呗0\n", "提问一：借呗0\n提问二：花呗0\n"),
        ("amazon", {"text": "质量好。价格低！"}, "sentence_order", "质量好。价格低！", "价格低。质量好！"),
        ("amazon", {"text": "质量好，价格低。"}, "clause_order", "质量好，价格低。", "价格低，质量好。"),
        (
            "thucnews",
            {"text": "词汇是关键 考研复习全指南"},
            "title_order",
            "词汇是关键 考研复习全指南",
            "考研复习全指南 词汇是关键",
        ),
        ("cmnli", {"sentence1": "他昨天去了北京"}, "time_order", "前提：他昨天去了北京", "前提：昨天他去了北京"),
        ("cmnli", {"sentence1": "昨天，他去了北京"}, "time_order", "前提：昨天，他去了北京", "前提：他昨天去了北京"),
        (
            "cmnli",
            {"sentence1": "在会议之后，主席离开了大楼。"},
            "adverbial_last",
            "在会议之后，主席离开了大楼。",
            "主席离开了大楼，在会议之后。",
        ),
        ("cmnli", {"sentence1": "猫在睡觉"}, "frame", "前提：猫在睡觉", "前提：情况是这样的：猫在睡觉"),
        (
            "cmrc2018",
            {"question": "这部书的作者是谁？"},
            "question_form",
            "问题：这部书的作者是谁？",
            "问题：谁是这部书的作者？",
        ),
        (
            "cmrc2018",
            {"question": "他的著作有哪些？"},
            "question_form",
            "问题：他的著作有哪些？",
            "问题：有哪些，他的著作？",
        ),
        (
            "drcd",
            {"question": "花垣縣位於哪個省?"},
            "question_form",
            "問題：花垣縣位於哪個省?",
            "問題：位於哪個省，花垣縣?",
        ),
        ("sanwen", {"text": "天黑了，我走到河边，月亮升起"}, "clause_order", None, None),
        ("cote_mfw", {"s": "西湖真美，人也多，值得去"}, "clause_order", None, None),
    ],
)
def test_operations_on_hand_made_rows(name, change, operation, old, new):
    example = example_of(name, **change)
    changed = {data.perturb(example, seed) for seed in range(8)}
    assert all(e.operations == (operation,) for e in changed)
    for e in changed:
        assert (e.answer, e.choices, e.references, e.group) == (
            example.answer,
            example.choices,
            example.references,
            example.group,
        )
        assert "".join(e.prompt[a:b] for _, a, b in e.fields) != "".join(
            example.prompt[a:b] for _, a, b in example.fields
        )
        if old:
            assert e.prompt == example.prompt.replace(old, new)
        else:
            assert e.prompt != example.prompt and sorted(e.prompt) == sorted(example.prompt)
            assert all(e.prompt.count(text) == example.prompt.count(text) for text in example.protected)


@pytest.mark.parametrize(
    "name, change",
    [
        ("amazon", {"text": "质量好，但是价格高。"}),  # the contrast decides
        ("amazon", {"text": "因为质量好，所以买了。"}),
        ("amazon", {"text": "虽然质量好，我没买。"}),
        ("amazon", {"text": "“质量好，价格低”"}),  # a comma inside quotation marks
        ("amazon", {"text": "卖25,000元"}),
        ("amazon", {"text": "很好"}),
        ("sanwen", {"head": "我", "tail": "河", "text": "我出门，河水上涨"}),  # would turn head and tail round
        ("cmrc2018", {"question": "他被称为什么？"}),  # 为什么 is another question
        ("cmrc2018", {"question": "他去了哪，是和谁？"}),
        ("cmrc2018", {"question": "这里还有什么？"}),
        ("cmnli", {"sentence1": "你去吗？"}),
        ("thucnews", {"text": "词汇是关键"}),
    ],
)
def test_what_is_not_safe_is_left_alone(name, change):
    example = example_of(name, **change)
    for seed in range(8):
        assert data.perturb(example, seed) is example


def test_an_answer_that_spans_clauses_is_never_torn():
    example = example_of("cote_mfw", s="你好，李焕英，电影真好看，值得看", ot="你好，李焕英")
    changed = {data.perturb(example, seed) for seed in range(20)} - {example}
    assert changed and all("你好，李焕英" in e.prompt for e in changed)


def test_perturb_moves_no_word_out_of_the_text_field_and_keeps_offsets():
    example = example_of("cote_mfw", s="西湖真美，人也多，值得去")
    changed = data.perturb(example, 0)
    ((_, a, b),) = changed.fields
    assert changed.prompt[:a] == example.prompt[:a] and changed.prompt[b:].startswith("\n对象：")
    assert sorted(changed.prompt[a:b]) == sorted("西湖真美，人也多，值得去")
    assert data.perturb(example, 0) == changed


def test_perturb_of_the_micro_world_changes_most_rows():
    rows = data.load_task("toy-amazon", "test")[:50]
    changed = [data.perturb(e, 0) for e in rows]
    assert sum(e.operations == ("template",) for e in changed) > 40
    assert all(a.answer == b.answer and b.hard_prompt != a.hard_prompt for a, b in zip(rows, changed) if b.operations)
    assert changed == [data.perturb(e, 0) for e in rows]


# ----------------------------------------------------------------------------------------------------
# Tokens


def test_prompt_and_answer_are_tokenised_apart_and_end_with_eos():
    example = Example("toy-made-up", "问：", "答案", ("答案", "别的"))
    row = data.encode(example, Characters(merge="：答"), 100)
    assert text_of(row.prompt_ids) == "问：" and text_of(row.answer_ids) == "答案\0"  # not merged across the boundary
    assert [text_of(choice) for choice in row.choice_ids] == ["答案\0", "别的\0"] and len(row) == 5
    with pytest.raises(UserError, match="no token"):
        data.encode(Example("toy-made-up", "问：", ""), TOKENIZER, 100)


def test_truncation_keeps_answer_question_and_template():
    context = "".join(f"第{i}句话。" for i in range(100)) + "答案在此。" + "".join(f"后{i}句话。" for i in range(100))
    row = {"context": context, "question": "在哪？", "answers": {"text": ["答案在此"], "answer_start": [0]}}
    example = data.to_example(tasks.TASKS["cmrc2018"], row, "f:3")
    for length in (60, 100, 400):
        encoded = data.encode(example, TOKENIZER, length)
        prompt = text_of(encoded.prompt_ids)
        assert len(encoded) == length  # as long a window as fits
        assert "答案在此" in prompt and prompt.startswith("从文章") and prompt.endswith("\n问题：在哪？\n片段：")
        passage = prompt.split("文章：", 1)[1].split("\n问题")[0]
        assert passage in context
        blind = text_of(data.encode(example, TOKENIZER, length, keep_answer=False).prompt_ids)
        assert context.startswith(blind.split("文章：", 1)[1].split("\n问题")[0]) and "答案在此" not in blind
    with pytest.raises(UserError, match="f:3.*max-length"):
        data.encode(example, TOKENIZER, 40)
    assert data.encode(example, TOKENIZER, 10**6).prompt_ids.tolist() == [ord(c) for c in example.prompt]


def test_truncation_of_relations_and_of_rows_without_a_passage():
    text = "前" * 200 + "我走到河边" + "后" * 200
    example = data.to_example(tasks.TASKS["sanwen"], {"head": "我", "tail": "河", "relation": "Near", "text": text})
    prompt = text_of(data.encode(example, TOKENIZER, 120).prompt_ids)
    assert "我走到河" in prompt and "甲：我\n乙：河\n可选：无关、创作" in prompt and prompt.endswith("关系：")
    own = data.to_example(
        tasks.Task("mine", "source", "span", "char_f1"), {"prompt": "很长" * 50, "answer": "短"}, "mine:1"
    )
    with pytest.raises(UserError, match="mine:1"):
        data.encode(own, TOKENIZER, 20)


def encoded(task: str, *lengths: int) -> list[Encoded]:
    return [Encoded([1] * (n - 2), (7, 0), ((7, 0),), task) for n in lengths]


def test_collate_on_a_hand_written_batch():
    rows = [
        Encoded([5, 6, 7], (8, 0), ((8, 0),), "a"),
        Encoded([5], (9, 9, 0), ((9, 9, 0),), "b"),
        Encoded([0], (0,), ((0,),), "b"),
    ]  # the padding token 0 is a token of text, too
    batch = data.collate(rows, [3, 1, 1], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0], [5, 9, 9, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 8, 0], [-100, 9, 9, 0, -100], [-100, 0, -100, -100, -100]]
    assert batch.task_ids.tolist() == [3, 1, 1] and {t.dtype for t in vars(batch).values()} == {torch.int64}
    moved = batch.to("meta")
    assert moved.labels.device.type == "meta" and moved.labels.shape == (3, 5)
    ids, mask = data.collate_prompts(rows, pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 5], [0, 0, 0]] and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert data.collate_prompts(rows, 0, side="right")[1].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


# ----------------------------------------------------------------------------------------------------
# Batches


def numbered(task: str, count: int, length=lambda i: 4) -> list[Encoded]:
    return [Encoded([i] * (length(i) - 2), (7, 0), (), task) for i in range(count)]


def flat(step):
    return [row for batch in step for row in batch]


def test_uniform_steps_hold_equally_many_rows_of_each_task_and_go_through_epochs():
    sampler = Sampler({"a": numbered("a", 12), "b": numbered("b", 5)}, 6, seed=0)
    steps = [flat(sampler.next()) for _ in range(20)]
    assert all([row.task for row in step].count("a") == 3 for step in steps)
    for task, size in (("a", 12), ("b", 5)):
        order = [row.prompt_ids[0] for step in steps for row in step if row.task == task]
        epochs = [order[i : i + size] for i in range(0, 60, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs) and epochs[0] != epochs[1]


def test_uniform_rotates_what_does_not_divide_and_proportional_follows_the_rows():
    rows = {"a": numbered("a", 30), "b": numbered("b", 30), "c": numbered("c", 60)}
    sampler = Sampler(rows, 4, seed=0)
    steps = [[row.task for row in flat(sampler.next())] for _ in range(6)]
    assert [sorted(step.count(t) for t in "abc") for step in steps] == [[1, 1, 2]] * 6
    assert [sum(step.count(t) for step in steps) for t in "abc"] == [8, 8, 8]
    sampler = Sampler(rows, 12, seed=0, mixing="proportional")
    drawn = [(row.task, row.prompt_ids[0]) for _ in range(10) for row in flat(sampler.next())]
    assert len(set(drawn)) == 120  # one epoch of all rows


@pytest.mark.parametrize("mixing", ["uniform", "proportional"])
@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("at", [1, 7, 40])
def test_a_saved_state_goes_on_with_the_same_batches(mixing, budget, at):
    rows = {t: numbered(t, 50 + n, lambda i, n=n: 3 + i * (n + 1) % 17) for n, t in enumerate("abc")}
    first = Sampler(rows, 8, 5, mixing, budget)
    for _ in range(at):
        first.next()
    state = json.loads(json.dumps(first.state_dict()))
    expected = [first.next() for _ in range(60)]
    second = Sampler(rows, 8, 5, mixing, budget)
    second.load_state_dict(state)
    assert [second.next() for _ in range(60)] == expected
    assert second.state_dict() == first.state_dict()
    assert len(json.dumps(state)) < 400
    with pytest.raises(UserError, match="batch size"):
        Sampler(rows, 4, 5, mixing, budget).load_state_dict(state)
    with pytest.raises(UserError, match="rows"):
        Sampler(rows | {"c": rows["c"][:9]}, 8, 5, mixing, budget).load_state_dict(state)


def test_token_budget_keeps_the_budget_the_mixture_and_little_padding():
    rng = random.Random(0)
    rows = {
        "short": numbered("short", 400, lambda i: rng.randint(60, 110)),
        "middle": numbered("middle", 300, lambda i: rng.randint(80, 300)),
        "long": numbered("long", 300, lambda i: rng.randint(300, 1000)),
    }
    sampler = Sampler(rows, 32, seed=0, tokens_per_batch=4096)
    steps = [sampler.next() for _ in range(200)]
    assert all(len(batch) * max(map(len, batch)) <= 4096 for step in steps for batch in step)
    sizes = [len(flat(step)) for step in steps]
    assert 30 < sum(sizes) / len(sizes) < 34 and max(sizes) <= 48
    counts = [row.task for step in steps for row in flat(step)]
    assert all(abs(counts.count(task) / len(counts) - 1 / 3) < 0.02 for task in rows)
    assert sum(len({row.task for row in flat(step)}) > 1 for step in steps) > 150
    padded = sum(len(batch) * max(map(len, batch)) for step in steps for batch in step)
    assert sampler.padding == pytest.approx(1 - sum(len(row) for step in steps for row in flat(step)) / padded)
    assert sampler.padding < 0.05
    plain = Sampler(rows, 32, seed=0)
    [plain.next() for _ in range(50)]
    assert plain.padding > 0.4


def test_without_a_budget_a_step_is_read_in_parts_of_similar_length():
    rng, part = random.Random(0), Sampler.PART
    rows = {task: numbered(task, 5 * part, lambda i: rng.randint(10, 100)) for task in "ab"}
    sampler = Sampler(rows, 2 * part + 4, seed=0)
    steps = [sampler.next() for _ in range(4)]
    assert all([len(batch) for batch in step] == [part, part, 4] for step in steps)
    assert all(sorted(map(len, flat(step))) == [*map(len, flat(step))] for step in steps)
    drawn = [(row.task, row.prompt_ids[0]) for step in steps for row in flat(step)]
    assert len(set(drawn)) == len(drawn) == 4 * (2 * part + 4)  # sorting loses no row and repeats none
    assert sampler.padded_tokens < 0.9 * sum(len(flat(step)) * max(map(len, flat(step))) for step in steps)
    assert [len(batch) for batch in Sampler(rows, 4, seed=0).next()] == [4]


def test_token_budget_visits_every_row_once_an_epoch():
    rows = {"a": numbered("a", 64, lambda i: 3 + i % 9)}
    sampler = Sampler(rows, 2, seed=0, tokens_per_batch=30)
    assert Sampler.WINDOW * 2 == 64
    seen = []
    while len(seen) < 64:
        seen += [row.prompt_ids[0] for row in flat(sampler.next())]
    assert sorted(seen[:64]) == list(range(64))


def test_sampler_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="b"):
        Sampler({"a": numbered("a", 3), "b": []}, 2, 0)
    with pytest.raises(UserError, match="'random'"):
        Sampler({"a": numbered("a", 3)}, 2, 0, mixing="random")
    with pytest.raises(UserError, match="50 tokens.*--tokens-per-batch 40"):
        Sampler({"a": encoded("a", 50)}, 2, 0, tokens_per_batch=40).next()


# ----------------------------------------------------------------------------------------------------
# The page


def test_page_shows_counts_example_and_rewriting(tmp_path, capsys):
    make = UPSTREAM["cote_bd"][0]
    rows = [{"s": f"长城{i}雄伟，游人也多，值得去", "ot": "长城"} for i in range(30)] + [make(40) | {"ot": "故宫"}]
    root = folder(tmp_path, "cote_bd", rows, [{"s": f"长城{i}雄伟，人少，值得去", "ot": "长城"} for i in range(4)])
    folder(tmp_path, "mine", *both(lambda i: {"prompt": f"好{i}？", "answer": "好", "choices": ["好", "坏"]}))
    data.main(["--data-root", str(root)])
    out = capsys.readouterr().out
    for part in (
        "cote_bd: target task, span",
        "27 train, 3 dev",
        "of 31 train rows: 1 answer not in the text",
        "对象：\n  answer      长城",
        "100 % of the test rows: 4 clause_order",
        "mine: source task, closed",
        "好 100 %",
    ):
        assert part in out
    assert "\033" not in out and "\033[1;32m长城" in data.page("cote_bd", str(root), colour=True)
    with pytest.raises(UserError, match="none is no folder"):
        data.main(["--data-root", str(root / "none")])


def test_the_page_may_be_piped_into_head():
    """A reader that stops reading is no error."""
    import subprocess
    import sys
    from pathlib import Path

    run = subprocess.Popen([sys.executable, "data.py"], cwd=Path(data.__file__).parent, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    assert "BrokenPipe" not in run.stderr.read().decode() and run.wait() in (0, 1)
