"""The metrics against cases worked out by hand, a slow reference, and sklearn where it has the same metric."""

import random

import pytest

from data import Example
from evaluate import score_task
from tasks.metrics import accuracy, char_f1, exact_match, macro_f1, majority, micro_f1, normalize


@pytest.mark.parametrize("text, tokens", [
    ("《Harry Potter》第3.5章。", ["harry", "potter", "第", "3.5", "章"]),
    ("１２３，ＡＢＣ 25,000", ["123abc", "25000"]),  # full width; the comma of a number is dropped
    ("1990年1月-2月", ["1990", "年", "1", "月", "2", "月"]),
    ("U.S.A. 的", ["u.s.a", "的"]),
    ("「國家」……50%", ["國", "家", "50", "%"]),
    ("。", ["。"]),
    ("", []),
])
def test_normalize_splits_characters_and_drops_case_and_punctuation(text, tokens):
    assert normalize(text) == tokens


@pytest.mark.parametrize("prediction, references, em, f1", [
    ("东西伯利亚。", ["《东西伯利亚》"], 1, 1),
    ("在东西伯利亚", ["东西伯利亚"], 0, 2 * 5 / (6 + 5)),
    ("北京大学", ["北大"], 0, 2 * 1 / (4 + 2)),  # the longest common substring is one character: 北 or 大
    ("甲乙X丙丁戊", ["甲乙丙丁戊"], 0, 2 * 3 / (6 + 5)),  # 丙丁戊, not the subsequence of five
    ("Harry Potter第一部", ["harry potter"], 0, 2 * 2 / (5 + 2)),  # words count as one token each
    ("1991年12月21日", ["1991年", "12月21日", "不对"], 0, 2 * 4 / (6 + 4)),  # the best reference counts
    ("不对", ["完全正确"], 0, 0),
    ("", ["答案"], 0, 0),
    ("3.5", ["35"], 0, 0),
    ("大 海", ["大海"], 1, 1),
])
def test_exact_match_and_character_f1_by_hand(prediction, references, em, f1):
    assert exact_match(prediction, references) == em
    assert char_f1(prediction, references) == pytest.approx(f1)


def test_character_f1_equals_a_slow_reference():
    rng = random.Random(0)
    for n in range(300):
        longest = 8 if n % 10 else 300  # difflib takes frequent characters of long texts for noise, if it may
        a, b = ("".join(rng.choice("甲乙丙") for _ in range(rng.randint(1, longest))) for _ in range(2))
        common = next((size for size in range(min(len(a), len(b)), 0, -1)
                       if any(a[i:i + size] in b for i in range(len(a) - size + 1))), 0)
        precision, recall = common / len(a), common / len(b)
        expected = 2 * precision * recall / (precision + recall) if common else 0
        assert char_f1(a, [b]) == pytest.approx(expected)


def test_the_f1_of_relations_and_the_majority_by_hand():
    golds = [("无关",), ("无关",), ("位于",), ("位于",), ("亲属",), ("使用",)]
    predictions = ["无关", "位于", "位于", "无关", "亲属", "亲属"]
    assert micro_f1(predictions, golds) == 2 * 2 / (4 + 4)  # without 无关
    assert macro_f1(predictions, golds) == pytest.approx((1 / 2 + 1 / 2 + 2 / 3 + 0) / 4)  # with it
    assert majority(["b", "a", "b", "c"]) == "b" and majority(["b", "a"]) == majority(["a", "b"]) == "a"
    assert micro_f1(["无关"] * 6, golds) == micro_f1(["无关"], [("无关",)]) == 0


def test_a_row_with_several_right_answers_accepts_each_of_them_and_counts_once():
    golds = [("合作", "签约"), ("无关", "竞争"), ("无关",)]
    assert micro_f1(["签约", "竞争", "无关"], golds) == macro_f1(["签约", "竞争", "无关"], golds) == 1
    assert micro_f1(["签约", "无关", "合作"], golds) == 2 * 1 / (2 + 2)  # 竞争 was there to be found
    assert accuracy(["签约", "无关", "合作"], golds) == 2 / 3 and accuracy(["合"], [("合作",)]) == 0  # no substrings


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_and_the_f1_of_relations_agree_with_sklearn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng, names = random.Random(seed), ["无关", "位于", "亲属", "使用", "占有"]
    golds = [rng.choice(names) for _ in range(60)]
    predictions = [gold if rng.random() < 0.5 else rng.choice(names) for gold in golds]
    known = sorted({*golds, *predictions} - {"无关"})
    assert accuracy(predictions, list(zip(golds))) == pytest.approx(metrics.accuracy_score(golds, predictions))
    for ours, average, labels in ((micro_f1, "micro", known), (macro_f1, "macro", None)):
        f1 = metrics.f1_score(golds, predictions, average=average, labels=labels, zero_division=0)
        assert ours(predictions, list(zip(golds))) == pytest.approx(f1)


def rows(task, answers, choices=(), references=()):
    return [Example(task, f"p{i}", answer, choices, references) for i, answer in enumerate(answers)]


def test_score_task_gives_each_kind_of_task_its_metrics():
    span = score_task("cmrc2018", ["北京", "在上海", "广州"], rows("cmrc2018", ["北京", "上海", "天津"]))
    assert span == pytest.approx({"score": (1 + 0.8) / 3, "exact_match": 1 / 3, "char_f1": (1 + 0.8) / 3})
    several = rows("cmrc2018", ["北京"], references=("北京", "北京市"))
    assert score_task("cmrc2018", ["北京市"], several)["exact_match"] == 1
    relation = score_task("sanwen", ["无关", "位于"], rows("sanwen", ["无关", "亲属"], ("无关", "位于", "亲属")))
    assert relation == {"score": 0, "accuracy": 0.5, "micro_f1": 0, "macro_f1": pytest.approx((1 + 0 + 0) / 3)}
    own = score_task("toy-mine", ["a", "b"], rows("toy-mine", ["a", "a"], ("a", "b")))
    assert own == {"score": 0.5, "accuracy": 0.5}
    with pytest.raises(ValueError):
        score_task("toy-mine", ["a"], rows("toy-mine", ["a", "a"], ("a", "b")))  # one prediction a row
    pairs = rows("afqmc", ["不同", "不同", "不同", "相同"], ("不同", "相同"))
    assert score_task("afqmc", ["不同"] * 4, pairs) == {"score": 0.75, "accuracy": 0.75, "f1_positive": 0}
    assert score_task("afqmc", ["相同", "不同", "不同", "相同"], pairs)["f1_positive"] == pytest.approx(2 * 1 / (2 + 1))
