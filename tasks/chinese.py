r"""The sixteen tasks: eight sources, on which the shared prompt is learned, and eight targets, which borrow from it.

One entry says what a data set asks (template), which answers it has (in the order of the hub's integer labels), how it
is scored, where its rows live, and what may be rewritten for its "unseen" test set. To add a task of your own, add an
entry; rows that already are prompts, {"prompt": ..., "answer": ..., "choices": [...]}, need none.

Two choices are readings of ours: FinRE as eighth target (the twin of SanWen), and the Chinese part of the multilingual
Amazon reviews, balanced over the stars, as Amazon. Published tasks without test labels (CLUE) are tested on validation.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FORMATS = ("text", "json", "parquet")  # builders of `datasets` that read files
OURS = (".json", ".jsonl", ".md", ".part", ".png", ".pt", ".txt")  # files that stand beside the folders of tasks


@dataclass(frozen=True)
class Source:
    """Rows on the hub (path: its id, train and test: names of splits) or in files (path: one of FORMATS, train and
    test: addresses). Text files are read by `data.parse_rows`; `columns` name the fields of tab-separated lines."""

    path: str
    train: str | tuple[str, ...] = "train"
    test: str | tuple[str, ...] = "test"
    config: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.path in FORMATS:
            return self.train if isinstance(self.train, str) else self.train[0]
        return f"{self.path}{':' if self.config else ''}{self.config or ''} at {(self.revision or 'main')[:7]}"


@dataclass(frozen=True)
class Task:
    """One data set. `template` names fields of a row in braces; the answer follows its last colon."""

    name: str
    role: str  # source | target
    kind: str  # closed (one of `answers`) | span (copied from the text) | choice (a letter)
    metric: str  # the entry of evaluate.score_task that stands for the task
    template: str = ""
    answers: tuple[str, ...] = ()  # in the order of the hub's integer labels
    labels: tuple[str, ...] = ()  # the upstream's names in that order, where they differ from the answers
    passage: str = "text"  # the field that may be shortened
    group: tuple[str, ...] = ()  # fields that make two rows the same text; default: the passage
    rewrite: tuple[str, ...] = ()  # what `perturb` may do, see rewrite.py
    sources: tuple[Source, ...] = ()  # first choice, fallbacks
    unseen: str = ""  # a target task whose texts are taken out of the train rows

    @cached_property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.template) if name)


def clue(config: str, test: str = "validation") -> Source:
    """CLUE publishes its test sets without labels: validation is the test set, and dev is cut from train."""
    return Source("clue/clue", test=test, config=config, revision="28178267a609dd08bdc703dd6c931dfc2c2f4431")


def github(commit: str, train: str | tuple[str, ...], test: str | tuple[str, ...], columns: tuple[str, ...] = ()):
    """Files of "owner/name@commit", and the same files at a mirror."""

    def at(folder: str, files: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{folder}/{files}" if isinstance(files, str) else tuple(f"{folder}/{file}" for file in files)

    raw = f"https://raw.githubusercontent.com/{commit.replace('@', '/')}", f"https://cdn.jsdelivr.net/gh/{commit}"
    return tuple(Source("text", at(folder, train), at(folder, test), columns=columns) for folder in raw)


def hub_files(builder: str, pattern: str) -> Source:
    return Source(builder, *(f"hf://datasets/{pattern.format(split)}" for split in ("train", "test")))


REVIEWS = "lsvih/chinese-customer-review@c1d68637f5fc1486a2483d58083669baaae7bd9d"
RELATIONS = "thunlp/Chinese_NRE@2cd47e6dc1b95e8ca3e93b5b8567666c37c5d654"
TITLES = "649453932/Chinese-Text-Classification-Pytorch@6cb26819af7b646275aff8a4693676f2849e67f6"
OCNLI = "CLUEbenchmark/OCNLI@ed7ede280dfebac89a6c574f2ce90c9dbac7840b"
C3 = "nlpdata/c3@dd2d89324e961786a1a9eec73ae13f1c6b800384"

# What data sets of one shape have in common.
PAIR = dict(answers=("不同", "相同"), passage="sentence1", group=("sentence1", "sentence2"), rewrite=("swap",))
NLI = dict(
    answers=("中立", "蕴含", "矛盾"), labels=("neutral", "entailment", "contradiction"), passage="sentence1",
    rewrite=("sentence_order", "time_order", "adverbial_last", "frame"),
)
REVIEW = dict(rewrite=("sentence_order", "clause_order", "adverbial_last"))
TITLE = dict(rewrite=("title_order", "sentence_order", "clause_order"))
QUESTION = dict(passage="context", rewrite=("question_form", "adverbial_last"))
RELATION_FILE = ("head", "tail", "relation", "text")
FINRE = """无关 注资 拥有 纠纷 自己 增持 重组 买资 签约 持股 交易 入股 转让 成立 分析 合作 帮助 发行 商讨 合并 竞争 订单
    减持 合资 收购 借壳 欠款 被发行 被转让 被成立 被注资 被持股 被拥有 被收购 被帮助 被借壳 被买资 被欠款 被增持 拟收购
    被减持 被分析 被入股 被拟收购"""

TABLE = (
    # Sources
    Task("afqmc", "source", "closed", "accuracy",
         "下面两句是金融客服里的提问，判断它们问的是不是同一件事。\n"
         "提问一：{sentence1}\n提问二：{sentence2}\n可选：{options}\n判断：", **PAIR,
         sources=(clue("afqmc"), Source("C-MTEB/AFQMC", test="validation"))),
    Task("amazon", "source", "closed", "accuracy",
         "阅读这条商品评价，推测买家打了几颗星。\n评价：{text}\n可选：{options}\n星级：",
         ("一星", "两星", "三星", "四星", "五星"), **REVIEW,
         sources=(Source("SetFit/amazon_reviews_multi_zh", revision="184ac90d5511a7f6801cba99688892f440ece660"),
                  hub_files("json", "mteb/amazon_reviews_multi/zh/{}.jsonl"))),
    Task("thucnews", "source", "closed", "accuracy",
         "给这条新闻标题选一个栏目。\n标题：{text}\n可选：{options}\n栏目：",
         ("财经", "房产", "股票", "教育", "科技", "社会", "时政", "体育", "游戏", "娱乐"), **TITLE,
         sources=github(TITLES, "THUCNews/data/train.txt", "THUCNews/data/test.txt", ("text", "label"))),
    Task("bq", "source", "closed", "accuracy",
         "下面两句是银行客户的提问，判断能否用同一个答案回复。\n"
         "提问一：{sentence1}\n提问二：{sentence2}\n可选：{options}\n判断：", **PAIR,
         sources=(Source("C-MTEB/BQ", revision="e3dda5e115e487b39ec7e618c0c6a29137052a55"),
                  hub_files("parquet", "shibing624/nli_zh@refs/convert/parquet/BQ/{}/*.parquet"))),
    Task("cmnli", "source", "closed", "accuracy",
         "已知前提，判断假设与它的逻辑关系。\n前提：{sentence1}\n假设：{sentence2}\n可选：{options}\n关系：", **NLI,
         sources=(clue("cmnli"), Source("fenffef/cmnli", test="validation"))),
    Task("cmrc2018", "source", "span", "char_f1",
         "从文章中原样摘出能回答问题的片段。\n文章：{context}\n问题：{question}\n片段：", **QUESTION,
         sources=(Source("hfl/cmrc2018", test="validation"), clue("cmrc2018"))),
    Task("sanwen", "source", "closed", "micro_f1",
         "阅读这段散文，判断甲与乙的关系。\n原文：{text}\n甲：{head}\n乙：{tail}\n可选：{options}\n关系：",
         ("无关", "创作", "使用", "邻近", "社交", "位于", "占有", "种属", "亲属", "组成"),
         tuple("unknown Create Use Near Social Located Ownership General-Special Family Part-Whole".split()),
         **REVIEW, sources=github(RELATIONS, "data/SanWen/train.txt", "data/SanWen/test.txt", RELATION_FILE)),
    Task("cote_mfw", "source", "span", "char_f1",
         "摘出这条旅游点评所评价的对象。\n点评：{s}\n对象：", passage="s", **REVIEW, unseen="cote_bd",
         sources=github(REVIEWS, "mafengwo/train.txt", "mafengwo/test.txt")),
    # Targets
    Task("chnsenticorp", "target", "closed", "accuracy",
         "判断这段用户点评的情感倾向。\n点评：{text}\n可选：{options}\n倾向：", ("负面", "正面"), **REVIEW,
         sources=(Source("lansinuote/ChnSentiCorp", revision="b0c4c119c3fb33b8e735969202ef9ad13d717e5a"),
                  Source("ndiy/ChnSentiCorp"))),
    Task("tnews", "target", "closed", "accuracy",
         "给这条资讯标题选一个频道。\n标题：{text}\n可选：{options}\n频道：",
         tuple("故事 文化 娱乐 体育 财经 房产 汽车 教育 科技 军事 旅游 国际 股票 农业 游戏".split()),
         tuple("100 101 102 103 104 106 107 108 109 110 112 113 114 115 116".split()),  # 105 and 111 do not exist
         **TITLE, sources=(clue("tnews"), Source("C-MTEB/TNews-classification", test="validation"))),
    Task("ocnli", "target", "closed", "accuracy",
         "先读前提，再看假设能否由它推出。\n前提：{sentence1}\n假设：{sentence2}\n可选：{options}\n关系：", **NLI,
         sources=(clue("ocnli"), *github(OCNLI, "data/ocnli/train.50k.json", "data/ocnli/dev.json"))),
    Task("lcqmc", "target", "closed", "accuracy",
         "比较下面两个问句，判断它们的意图是否一致。\n"
         "问句一：{sentence1}\n问句二：{sentence2}\n可选：{options}\n判断：", **PAIR,
         sources=(Source("C-MTEB/LCQMC", revision="17f9b096f80380fce5ed12a9be8be7784b337daf"), Source("mteb/LCQMC"))),
    Task("drcd", "target", "span", "char_f1",
         "從文章中原樣摘出能回答問題的片段。\n文章：{context}\n問題：{question}\n片段：", **QUESTION,
         sources=(clue("drcd", test="test"), Source("roberthsu2003/for_MRC_QA"))),
    Task("c3", "target", "choice", "accuracy",
         "读材料，选出正确的一项。\n材料：{context}\n问题：{question}\n{choices}\n答案：", **QUESTION,
         sources=(clue("c3"), *github(C3, ("data/c3-d-train.json", "data/c3-m-train.json"),
                                      ("data/c3-d-dev.json", "data/c3-m-dev.json")))),
    Task("cote_bd", "target", "span", "char_f1",
         "摘出这段网络评论所评价的对象。\n评论：{s}\n对象：", passage="s", **REVIEW,
         sources=github(REVIEWS, "baidu/train.txt", "baidu/test.txt")),
    Task("finre", "target", "closed", "micro_f1",
         "阅读这则财经新闻，判断甲对乙的关系。\n原文：{text}\n甲：{head}\n乙：{tail}\n可选：{options}\n关系：",
         tuple(FINRE.split()), ("unknown", *FINRE.split()[1:]), **REVIEW,
         sources=github(RELATIONS, "data/FinRE/train.txt", "data/FinRE/test.txt", RELATION_FILE)),
)
TASKS = {task.name: task for task in TABLE}
SOURCES = tuple(task.name for task in TABLE if task.role == "source")
TARGETS = tuple(task.name for task in TABLE if task.role == "target")


def writable(names: str) -> bool:
    """Whether a path, or names with commas, can be files': no control character, no torn one, not too long."""
    return (all(unicodedata.category(character) not in ("Cc", "Cs") for character in names) and len(names) < 3000
            and all(len(part.encode()) < 256 for part in re.split("[/,]", names)))


def can_be_folder(name: str) -> bool:
    """Whether a task's name can be a folder's, in the data and among the files of a run, and of no other place."""
    return (writable(name) and not set(name) & set("/\\") and not name.startswith(".")
            and Path(name).suffix.lower() not in OURS)
