r"""The tasks: from rows of text to batches of tokens.

    Task -> rows -> Example(prompt, answer, choices, references, ...) -> Encoded -> Batch(input_ids, labels, task_ids)

Sixteen Chinese data sets (eight sources, eight targets) and the micro-world of toy.py. A task is one entry of the table:
what the prompt says, which answers there are, where the rows live. Rows come from `--data-root DIR` (DIR/<task>/train.jsonl
and test.jsonl, field names as upstream) or are downloaded by `datasets`. A folder without an entry in the table works too
when its rows are {"prompt": ..., "answer": ..., "choices": [...]}.

Prompt and answer are tokenised apart and joined, because a tokenizer may merge characters across the boundary:
    input_ids  p_1 .. p_n a_1 .. a_m eos pad ..     labels  -100 .. -100 a_1 .. a_m eos -100 ..

Every split goes by *group* (the passage, the premise, the pair, the text), never by row: no group is in two of train,
dev and test. `python data.py --data-root DIR` shows all of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch

import rewrite
import toy

DEV_SHARE, DEV_ROWS = 0.1, 1024  # dev is a tenth of train, cut by group, 1024 rows at most


class UserError(ValueError):
    """A mistake the user can mend: one sentence with the value, the limit and the remedy."""


# --------------------------------------------------------------------------------------------------------------------
# The table of tasks

FORMATS = ("text", "json", "parquet")  # builders of `datasets` that read files


@dataclass(frozen=True)
class Source:
    """Rows on the hub (`path`: its id, `train` and `test`: names of splits) or in files (`path`: one of FORMATS, `train`
    and `test`: addresses). Text files are read by `parse_rows`; `columns` name the fields of tab-separated lines."""

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

    @property
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


def task_of(name: str, examples: Sequence[Example] = ()) -> Task:
    """The entry of a task; for one without an entry (micro-world, own rows) what its examples show: no choices: span,
    the same choices everywhere: closed, otherwise: choice."""
    if name in TASKS:
        return TASKS[name]
    sets = {example.choices for example in examples}
    answers = next(iter(sets)) if len(sets) == 1 else ()
    kind = "closed" if answers else "choice" if any(sets) else "span"
    role = "target" if name in toy.TARGETS else "source"
    return Task(name, role, kind, "char_f1" if kind == "span" else "accuracy", answers=answers)


# --------------------------------------------------------------------------------------------------------------------
# Rows -> examples


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text. The model reads `prompt` and is to write `answer`."""

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()  # all answers in label order (closed), the letters (choice), () for spans
    references: tuple[str, ...] = ()  # all right answers, `answer` first; () means (answer,)
    protected: tuple[str, ...] = ()  # strings that `perturb` keeps
    group: str = ""  # the same for rows about the same text
    hard_prompt: str = ""  # the prompt with the instruction in words, where the prompt hides it (micro-world)
    fields: tuple[tuple[str, int, int], ...] = ()  # name, start and end in `prompt` of what was filled in
    row: str = ""  # where it comes from, for messages
    operations: tuple[str, ...] = ()  # what `perturb` did


class _Drop(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


ALIASES = {"text": ("text", "sentence"), "label": ("label", "score", "relation")}  # one column, several names upstream


def _column(row: dict, name: str, where: str) -> object:
    names = ALIASES.get(name, (name,))
    for alias in names:
        if alias in row:
            return row[alias]
    raise UserError(f"{where}: no field {' or '.join(map(repr, names))} in the row (it has {', '.join(row) or 'none'})")


def _clean(value: object) -> str:
    """One text, stripped, NFC (not NFKC, which would move answers away from their passages)."""
    if isinstance(value, list | tuple):
        value = "\n".join(str(part) for part in value)
    return unicodedata.normalize("NFC", "" if value is None else str(value)).replace("\r\n", "\n").strip()


def _text(row: dict, name: str, where: str) -> str:
    text = _clean(_column(row, name, where))
    if not text:
        raise _Drop(f"empty {name}")
    return text


def group_of(*texts: str) -> str:
    """A short name for a text that ignores white space and, for a pair, the order."""
    key = "\n".join(sorted("".join(text.split()) for text in texts))
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _label(task: Task, row: dict, where: str) -> str:
    value = _column(row, "label", where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip()
    if name in ("", "-", "-1", "None"):
        raise _Drop("no label")
    for names in (task.labels, task.answers):
        if name in names:
            return task.answers[names.index(name)]
    if name.isdecimal() and int(name) < len(task.answers):
        return task.answers[int(name)]
    known = ", ".join((*(task.labels or task.answers), f"or 0 to {len(task.answers) - 1}"))
    raise UserError(f"{where}: unknown label {name!r} for task {task.name!r}; known are {known}")


def _spans(values: dict[str, str], row: dict, passage: str, where: str) -> tuple[str, ...]:
    """The answers that really occur in the passage; stored offsets are not used, some are wrong upstream."""
    answers = _column(row, "ot" if "ot" in row or passage == "s" else "answers", where)
    if isinstance(answers, dict):
        answers = _column(answers, "text", where)
    texts = [answers] if isinstance(answers, str) else [a["text"] if isinstance(a, dict) else a for a in answers or ()]
    cleaned = dict.fromkeys(text for text in map(_clean, texts) if text)
    if not cleaned:
        raise _Drop("no answer")
    found = tuple(text for text in cleaned if text in values[passage])
    if not found:
        raise _Drop("answer not in the text")
    return found


def _choices(values: dict[str, str], row: dict, where: str) -> tuple[str, int]:
    """Lettered options in a fixed random order (the right one sits unevenly upstream) and the index of the right one."""
    gold = _clean(_column(row, "answer", where))
    if not gold:
        raise _Drop("no answer")
    options = list(dict.fromkeys(option for option in map(_clean, _column(row, "choice", where)) if option))
    if gold not in options:
        raise _Drop("answer not among the choices")
    if len(options) < 2:
        raise _Drop("fewer than two choices")
    random.Random("\n".join((values["context"], values["question"], *options))).shuffle(options)
    lines = (f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options))
    return "\n".join(lines), options.index(gold)


def _fill(template: str, values: dict[str, str]) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    prompt, fields = "", []
    for literal, name, _, _ in string.Formatter().parse(template):
        prompt += literal
        if name:
            if name not in ("options", "choices"):
                fields.append((name, len(prompt), len(prompt) + len(values[name])))
            prompt += values[name]
    return prompt, tuple(fields)


def to_example(task: Task, row: dict, where: str = "") -> Example:
    """One upstream row as an Example. Raises UserError (missing field, unknown label) or _Drop (unusable row)."""
    if "prompt" in row:
        return _own_row(task.name, row, where)
    values = {name: _text(row, name, where) for name in task.fields if name not in ("options", "choices")}
    values["options"] = "、".join(task.answers)
    choices, references, protected = task.answers, (), ()
    if task.kind == "span":
        references = protected = _spans(values, row, task.passage, where)
        answer = references[0]
    elif task.kind == "choice":
        values["choices"], index = _choices(values, row, where)
        choices = tuple(string.ascii_uppercase[: values["choices"].count("\n") + 1])
        answer = choices[index]
    else:
        answer = _label(task, row, where)
        protected = tuple(values[name] for name in ("head", "tail") if name in values)
    prompt, fields = _fill(task.template, values)
    group = group_of(*(values[name] for name in task.group or (task.passage,)))
    return Example(task.name, prompt, answer, choices, references, protected, group, fields=fields, row=where)


def _own_row(name: str, row: dict, where: str) -> Example:
    """A row that already is a prompt: {"prompt", "answer"} and maybe choices, references, protected, group, hard_prompt,
    passage (a part of the prompt that may be shortened)."""
    prompt, answer = str(row["prompt"]), str(_column(row, "answer", where))
    if not prompt.strip() or not answer.strip():
        raise _Drop("empty prompt" if not prompt.strip() else "empty answer")
    choices = tuple(map(str, row.get("choices") or ()))
    if choices and (answer not in choices or len(set(choices)) < max(2, len(choices))):
        raise UserError(f"{where}: choices {choices} should be two or more different texts with the answer {answer!r}")
    start = prompt.find(row["passage"]) if row.get("passage") else -1
    fields = (("text", start, start + len(row["passage"])),) if start >= 0 else ()
    references = tuple(dict.fromkeys((answer, *map(str, row["references"])))) if row.get("references") else ()
    return Example(
        name, prompt, answer, choices, references, tuple(map(str, row.get("protected") or ())),
        str(row.get("group") or group_of(prompt)), row.get("hard_prompt", ""), fields, where,
    )


def parse_rows(text: str, columns: Sequence[str] = (), where: str = "") -> Iterator[tuple[str, dict | None]]:
    """Rows of a file as (place, row): tab-separated lines if `columns` are given, JSON lines, or one JSON document (a
    list of rows, or the nested forms of SQuAD and C3). None stands for a line with too few or too many columns. There are
    no quoting rules: a quotation mark is a character."""
    lines = text.removeprefix("\ufeff").split("\n")  # not splitlines: U+2028 may stand inside a text
    lines = [(number, line.strip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if columns:
        for number, line in lines:
            parts = line.split("\t")
            yield f"{where}:{number}", dict(zip(columns, parts)) if len(parts) == len(columns) else None
        return
    try:
        rows = [(f"{where}:{number}", json.loads(line)) for number, line in lines]
    except json.JSONDecodeError as error:
        rows = None
        number = next(number for number, line in lines if not _is_json(line))
        problem = f"{where}:{number}: not readable as JSON ({error.msg}); write one object per line"
    if rows is None or (len(rows) == 1 and not (isinstance(rows[0][1], dict) and "data" not in rows[0][1])):
        try:
            rows = list(_flatten(json.loads(text.removeprefix("\ufeff")), where))
        except json.JSONDecodeError:
            raise UserError(problem) from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row is a JSON object with named fields, not {type(row).__name__}")
        yield place, row


def _is_json(line: str) -> bool:
    try:
        return json.loads(line) is not None
    except json.JSONDecodeError:
        return False


def _flatten(document: object, where: str) -> Iterator[tuple[str, object]]:
    rows = document["data"] if isinstance(document, dict) and "data" in document else document
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        place = f"{where}, entry {number}"
        if isinstance(row, dict) and "paragraphs" in row:  # SQuAD: article > paragraphs > questions
            for paragraph in row["paragraphs"]:
                for question in paragraph["qas"]:
                    yield place, {"context": paragraph["context"]} | question
        elif isinstance(row, list) and len(row) == 3 and isinstance(row[1], list):  # C3: [lines, questions, id]
            for question in row[1]:
                yield place, {"context": row[0]} | question
        else:
            yield place, row


# --------------------------------------------------------------------------------------------------------------------
# Examples -> train, dev, test


@dataclass
class Splits:
    """report: {"source": text, "read": {split: rows}, "dropped": {split: {reason: rows}}, "notes": [text]}"""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    report: dict


def load_task(name: str, split: str, root: str | Path | None = None) -> list[Example]:
    """Examples of a task. name: an entry of TASKS, a toy-... task, or a folder of own rows; split: train | dev | test.

    root: folder with <name>/train.jsonl and test.jsonl; None: the hub (toy tasks need neither). dev is cut from train by
    group; rows come in a fixed random order, so that any first n rows are a fair sample.
    Raises UserError for an unknown name or split, missing or unreadable files, a row without a field or with an unknown
    label, an empty split.
    """
    if split not in ("train", "dev", "test"):
        raise UserError(f"no split {split!r}; there are train, dev and test")
    return getattr(load_splits(name, None if root is None or name.startswith("toy-") else str(root)), split)


@cache
def load_splits(name: str, root: str | None = None) -> Splits:
    """All splits of a task at once with the report of what was read and dropped; arguments and errors as in `load_task`."""
    task, notes = task_of(name), []
    if name.startswith("toy-"):
        if name not in toy.SOURCES + toy.TARGETS:
            raise UserError(f"no task {name!r} in the micro-world; it has {', '.join(toy.SOURCES + toy.TARGETS)}")
        source = "the micro-world"
        read = {split: _read(task, _numbered(toy.rows(name, split), f"{name} {split}")) for split in ("train", "test")}
    elif root is not None:
        source = str(Path(root) / name)
        read = {split: _read(task, _local_rows(task, Path(root), split)) for split in ("train", "test")}
    elif name in TASKS:
        source, read = _hub(task, notes)
    else:
        raise UserError(f"no task {name!r}; known are {', '.join(TASKS)} and the toy- tasks, "
                        f"or give your own rows as DIR/{name}/train.jsonl and test.jsonl with --data-root DIR")
    (train, lost), (test, lost_test) = read["train"], read["test"]
    counts = {"train": len(train) + lost.total(), "test": len(test) + lost_test.total()}

    train = _without(train, {example.group for example in test}, "text also in test", lost)
    if task.unseen and (root is None or (Path(root) / task.unseen).is_dir()):
        other = load_splits(task.unseen, root)
        unseen = {example.group for rows in (other.train, other.dev, other.test) for example in rows}
        train = _without(train, unseen, f"text also in {task.unseen}", lost)
    train = _once(train, lost)
    for split, rows, dropped in (("train", train, lost), ("test", test, lost_test)):
        if not rows:
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the file holds no row"
            raise UserError(f"task {name!r} has no usable {split} row in {source} ({why}); add rows or leave the task out")
    if task.metric == "micro_f1":
        train, test = _merge_labels(train), _merge_labels(test)
    train, dev = _cut_dev(name, train)
    for rows in (train, test):
        random.Random(f"order {name}").shuffle(rows)
    report = {"source": source, "read": counts, "dropped": {"train": dict(lost), "test": dict(lost_test)}, "notes": notes}
    return Splits(train, dev, test, report)


def _numbered(rows: Iterable[dict], where: str) -> Iterator[tuple[str, dict]]:
    return ((f"{where}:{number}", row) for number, row in enumerate(rows, 1))


def _read(task: Task, rows: Iterable[tuple[str, dict | None]]) -> tuple[list[Example], Counter]:
    examples, dropped = [], Counter()
    for where, row in rows:
        try:
            if row is None:
                raise _Drop("wrong number of columns")
            examples.append(to_example(task, row, where))
        except _Drop as reason:
            dropped[str(reason)] += 1
    return examples, dropped


def _local_rows(task: Task, root: Path, split: str) -> Iterator[tuple[str, dict | None]]:
    if not root.is_dir():
        raise UserError(f"--data-root {root} is no folder; it should hold {task.name}/train.jsonl and test.jsonl")
    path = root / task.name / f"{split}.jsonl"
    columns = next((source.columns for source in task.sources if source.columns), ())
    if not path.is_file() and (path.with_suffix(".txt")).is_file():  # the upstream's own file
        path = path.with_suffix(".txt")
    if not path.is_file():
        raise UserError(f"{path} is missing; put one JSON object per line there, or leave --data-root out to download")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as UTF-8 text ({error}); save it as UTF-8") from None
    return parse_rows(text, columns if path.suffix == ".txt" else (), str(path))


def _hub(task: Task, notes: list[str]) -> tuple[str, dict]:
    """The first source of the task that can be read; what failed before it is added to `notes` and printed."""
    failures = []
    for source in task.sources:
        try:
            read = {split: _read(task, _hub_rows(source, split)) for split in ("train", "test")}
        except Exception as error:  # `datasets` raises a different type for every way a download can fail
            reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
            failures.append(f"{source} ({reason})")
            continue
        if failures:
            notes.append(f"{task.name}: {'; '.join(failures)} failed, using {source}")
            print(notes[-1], file=sys.stderr)
        return str(source), read
    raise UserError(
        f"task {task.name!r} cannot be loaded, tried {'; '.join(failures)}: connect to the network once (files are then "
        f"kept by `datasets`), or put {task.name}/train.jsonl and test.jsonl into a folder and pass it as --data-root"
    )


def _hub_rows(source: Source, split: str) -> Iterator[tuple[str, dict | None]]:
    from datasets import load_dataset  # slow to import, and the default run needs none of it

    place = getattr(source, split)
    if source.path not in FORMATS:
        rows = load_dataset(source.path, source.config, revision=source.revision, split=place)
        return _numbered(rows, f"{source.path} {place}")
    files = {split: [place] if isinstance(place, str) else list(place)}
    if source.path != "text":
        return _numbered(load_dataset(source.path, data_files=files, split=split), files[split][0])
    documents = load_dataset("text", data_files=files, split=split, sample_by="document")
    return (row for file, text in zip(files[split], documents) for row in parse_rows(text["text"], source.columns, file))


def _without(examples: list[Example], groups: set[str], reason: str, dropped: Counter) -> list[Example]:
    kept = [example for example in examples if example.group not in groups]
    if len(kept) < len(examples):
        dropped[reason] += len(examples) - len(kept)
    return kept


def _once(examples: list[Example], dropped: Counter) -> list[Example]:
    kept = list({(example.prompt, example.answer): example for example in reversed(examples)}.values())[::-1]
    if len(kept) < len(examples):
        dropped["repeated"] += len(examples) - len(kept)
    return kept


def _merge_labels(examples: list[Example]) -> list[Example]:
    """Rows of one question with several labels are all right answers of each other."""
    answers = defaultdict(dict)
    for example in examples:
        answers[example.prompt][example.answer] = None
    return [
        example if len(answers[example.prompt]) == 1
        else replace(example, references=tuple(dict.fromkeys((example.answer, *answers[example.prompt]))))
        for example in examples
    ]


def _cut_dev(name: str, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    by_group = defaultdict(list)
    for example in examples:
        by_group[example.group].append(example)
    wanted = max(1, min(DEV_ROWS, int(DEV_SHARE * len(examples))))
    groups, dev = sorted(by_group), []
    random.Random(f"dev {name}").shuffle(groups)
    while len(dev) < wanted and len(groups) > 1:
        dev += by_group[groups.pop()]
    if not dev:
        raise UserError(f"task {name!r} has {len(examples)} train rows on one text, too few to cut a dev split; add rows")
    return [example for group in groups for example in by_group[group]], dev


# --------------------------------------------------------------------------------------------------------------------
# Few-shot and unseen data


def k_shot(examples: Sequence[Example], k: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, dev): k rows each, no group in both, balanced over the answers of a closed set as far as the rows allow.

    k counts rows in total. With k below the number of answers k of the answers have one row. The same seed gives the same
    rows whatever the order of `examples`, and a smaller k a part of the rows of a larger one.
    Raises UserError when there are not 2 k rows to choose from."""
    train, dev = _k_shot_indices(examples, k, seed)
    return [examples[i] for i in train], [examples[i] for i in dev]


def _k_shot_indices(examples: Sequence[Example], k: int, seed: int) -> tuple[list[int], list[int]]:
    if k < 0:
        raise UserError(f"k = {k} examples make no sense; use 0 or more")
    task = task_of(examples[0].task, examples) if examples else None
    rng = random.Random(f"{seed} {task and task.name}")
    order = sorted(range(len(examples)), key=lambda i: (examples[i].prompt, examples[i].answer, examples[i].group))
    rng.shuffle(order)
    pools = defaultdict(list)
    for i in order:
        pools[examples[i].answer if task.kind == "closed" else ""].append(i)
    answers = sorted(pools)
    rng.shuffle(answers)
    sides, groups = ([], []), (set(), set())
    progress = True
    while progress and len(sides[1]) < k:  # every answer in turn, train and dev in turn
        progress = False
        for answer in answers:
            for side, other in ((0, 1), (1, 0)):
                pool = pools[answer]
                at = next((n for n, i in enumerate(pool) if examples[i].group not in groups[other]), None)
                if at is not None and len(sides[side]) < k:
                    i = pool.pop(at)
                    sides[side].append(i)
                    groups[side].add(examples[i].group)
                    progress = True
    if len(sides[0]) < k or len(sides[1]) < k:
        raise UserError(f"k = {k} needs {k} train and {k} dev rows on different texts, but the {len(examples)} rows of "
                        f"task {task.name if task else ''!r} give {len(sides[0])} and {len(sides[1])}; use a smaller k")
    return sides


def data_hash(examples: Iterable[Example]) -> str:
    """A fingerprint of prompts and answers that ignores their order."""
    lines = sorted(f"{example.prompt}\0{example.answer}" for example in examples)
    return hashlib.blake2b("\0\0".join(lines).encode(), digest_size=8).hexdigest()


def k_shot_record(examples: Sequence[Example], k: int, seed: int) -> dict:
    """What a run keeps of its k-shot choice: task, k, seed, hash of the rows chosen from, places of the chosen rows."""
    train, dev = _k_shot_indices(examples, k, seed)
    return {
        "task": examples[0].task if examples else "", "k": k, "seed": seed, "data": data_hash(examples),
        "answers": dict(Counter(examples[i].answer for i in train)),
        "train": [examples[i].row for i in train], "dev": [examples[i].row for i in dev],
        "train_indices": train, "dev_indices": dev,
    }


def perturb(example: Example, seed: int) -> Example:
    """The example with its input text rewritten (template and answer untouched); `operations` says how, () if it could not
    be done safely and the example is returned as it was. Deterministic in the prompt and the seed."""
    if example.task.startswith("toy-"):
        prompt = toy.perturb(example.prompt, seed)
        hard = toy.perturb(example.hard_prompt, seed) if example.hard_prompt else ""
        operations = ("template",) if prompt != example.prompt else ()
        return replace(example, prompt=prompt, hard_prompt=hard, operations=operations)
    task = task_of(example.task)
    before = {name: example.prompt[start:end] for name, start, end in example.fields}
    after, operation = rewrite.rewrite(before, task, example.protected, random.Random(f"{seed} {example.prompt}"))
    if not operation:
        return example
    prompt, fields, end = "", [], 0
    for name, start, stop in example.fields:
        prompt += example.prompt[end:start]
        fields.append((name, len(prompt), len(prompt) + len(after[name])))
        prompt, end = prompt + after[name], stop
    return replace(example, prompt=prompt + example.prompt[end:], fields=tuple(fields), operations=(operation,))


# --------------------------------------------------------------------------------------------------------------------
# Examples -> tokens -> batches


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens; len() counts prompt and answer. Answers and choices end with the end-of-sequence token."""

    prompt_ids: list[int]
    answer_ids: list[int]
    choice_ids: list[list[int]]
    task: str

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@lru_cache(maxsize=4096)
def _answer_ids(tokenizer, answer: str) -> tuple[int, ...]:
    return (*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def encode(example: Example, tokenizer, max_length: int, keep_answer: bool = True) -> Encoded:
    """Tokens of an example: prompt and answer tokenised apart, no special tokens but the end of every answer.

    What is longer than max_length tokens (prompt + longest answer) loses the ends of its passage: a window stays, around
    the answer of a span task (or at the beginning with keep_answer=False, for a test that must not know the answer),
    around the two names of a relation. Question, options and answer are never cut.
    Raises UserError naming the row if even that is too long, or if the answer has no token."""
    answer = _answer_ids(tokenizer, example.answer)
    if len(answer) < 2:
        raise UserError(f"{example.row or example.task}: the answer {example.answer!r} has no token in this tokenizer; "
                        "use another answer or tokenizer")
    choices = [_answer_ids(tokenizer, choice) for choice in example.choices]
    room = max_length - max(map(len, (answer, *choices)))
    prompt = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    if len(prompt) > room:
        prompt = _shorten(example, tokenizer, room, keep_answer)
    return Encoded(prompt, list(answer), [list(choice) for choice in choices], example.task)


def _shorten(example: Example, tokenizer, room: int, keep_answer: bool) -> list[int]:
    """Tokens of the prompt with the longest window of its passage that fits into `room` tokens."""
    task = task_of(example.task)
    start, end = next(((s, e) for name, s, e in example.fields if name == task.passage), (0, 0))
    passage = example.prompt[start:end]
    places = [(at, at + len(text)) for text in example.protected if (at := passage.find(text)) >= 0]
    if task.kind == "span":
        places = places[:1] if keep_answer else []
    first, last = min((a for a, _ in places), default=0), max((b for _, b in places), default=0)

    def window(size: int) -> list[int]:
        begin = max(0, min((first + last - size) // 2, len(passage) - size))
        text = example.prompt[:start] + passage[begin : begin + size] + example.prompt[end:]
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    low, high = last - first if task.kind == "span" else 0, len(passage)
    if len(window(low)) > room:
        raise UserError(f"{example.row or example.task}: the prompt without its passage has {len(window(low))} tokens, "
                        f"{room} are left beside the answer; raise --max-length or drop the row")
    while low < high - 1:  # window(low) fits, window(high) does not
        middle = (low + high) // 2
        low, high = (middle, high) if len(window(middle)) <= room else (low, middle)
    return window(low)


@dataclass
class Batch:
    """Right-padded rows: input_ids, attention_mask, labels (B, T) and task_ids (B,), all long; labels are -100 but for
    answer tokens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    task_ids: torch.Tensor

    def to(self, device) -> Batch:
        return Batch(*(t.to(device) for t in (self.input_ids, self.attention_mask, self.labels, self.task_ids)))


def _pad(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    longest = max(map(len, rows))
    pads = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([row + pad if side == "right" else pad + row for row, pad in zip(rows, pads)])  # (B, T)


def collate(encoded: Sequence[Encoded], task_ids: Sequence[int], pad_id: int, device=None) -> Batch:
    """A training batch; task_ids: one per row. Padding is known by its place, never by its token: it may be the eos."""
    texts = [[*row.prompt_ids, *row.answer_ids] for row in encoded]
    labels = [[-100] * len(row.prompt_ids) + row.answer_ids for row in encoded]
    mask = [[1] * len(text) for text in texts]
    batch = Batch(_pad(texts, pad_id), _pad(mask, 0), _pad(labels, -100), torch.tensor(list(task_ids)))
    return batch if device is None else batch.to(device)


def collate_prompts(encoded: Sequence[Encoded], pad_id: int, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts alone for scoring and generation -> input_ids, attention_mask (B, T), padded on the left or right."""
    prompts = [row.prompt_ids for row in encoded]
    return _pad(prompts, pad_id, side), _pad([[1] * len(prompt) for prompt in prompts], 0, side)


class Sampler:
    """Endless training steps over several tasks; `next()` gives the micro-batches of one step, each a list of Encoded.

    mixing: "uniform": equally many rows of each task (rotating if batch_size is no multiple), "proportional": as they are.
    Each task goes through a new random order of its rows every epoch.
    tokens_per_batch: None: one micro-batch of batch_size rows a step. Otherwise rows are drawn a window ahead, sorted by
    length and cut into micro-batches of at most that many tokens, padding counted, and at most half a step's rows; a
    step takes micro-batches, in random order, for about batch_size rows. Over a window the mixture is exact.
    `state_dict()` is a few numbers from which the same steps go on. Raises UserError for an empty task or a row that is
    too long.
    """

    WINDOW = 32  # steps

    def __init__(self, examples_by_task: dict[str, Sequence[Encoded]], batch_size: int, seed: int,
                 mixing: str = "uniform", tokens_per_batch: int | None = None):
        empty = [name for name, rows in examples_by_task.items() if not len(rows)]
        if empty or not examples_by_task:
            raise UserError(f"no training rows for {', '.join(empty) or 'any task'}; add rows or leave the task out")
        if mixing not in ("uniform", "proportional"):
            raise UserError(f"mixing {mixing!r} is unknown; use uniform or proportional")
        self.rows, self.batch_size, self.seed = examples_by_task, batch_size, seed
        self.tokens_per_batch = tokens_per_batch
        places = {name: [(name, i) for i in range(len(rows))] for name, rows in examples_by_task.items()}
        self.streams = places if mixing == "uniform" else {"all": [place for rows in places.values() for place in rows]}
        self.names = list(self.streams)
        self.drawn, self.position = 0, {name: [0, 0] for name in self.names}  # epoch, rows of it already drawn
        self.orders: dict[str, tuple[int, list[int]]] = {}
        self.window: list[list[Encoded]] = []
        self.start, self.taken = self._position(), 0  # where the window began, micro-batches taken from it
        self.real_tokens = self.padded_tokens = 0

    def next(self) -> list[list[Encoded]]:
        """The micro-batches of the next optimisation step."""
        if self.tokens_per_batch is None:
            step = [self._draw(self.batch_size)]
        else:
            step, rows = [], 0
            while not step or rows + len(self._peek()) // 2 <= self.batch_size:
                step.append(self._peek())
                rows += len(step[-1])
                self.taken += 1
        for batch in step:
            self.real_tokens += sum(map(len, batch))
            self.padded_tokens += len(batch) * max(map(len, batch))
        return step

    @property
    def padding(self) -> float:
        """Share of the tokens handed out so far that were padding."""
        return 1 - self.real_tokens / max(1, self.padded_tokens)

    def state_dict(self) -> dict:
        """Where the streams stood at the start of the window, and the number of micro-batches taken from it."""
        at = self._position() if self.tokens_per_batch is None else self.start
        return {"seed": self.seed, **at, "taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        if set(state["position"]) != set(self.names) or state["seed"] != self.seed:
            raise UserError(f"the saved sampler is of tasks {', '.join(state['position'])} with seed {state['seed']}, this "
                            f"run has {', '.join(self.names)} with seed {self.seed}; start a new run")
        self.drawn, self.position = state["drawn"], {name: list(at) for name, at in state["position"].items()}
        self.window, self.taken, self.start = [], 0, self._position()
        if state["taken"]:
            self._peek()
            self.taken = state["taken"]

    def _position(self) -> dict:
        return {"drawn": self.drawn, "position": {name: list(at) for name, at in self.position.items()}}

    def _draw(self, count: int) -> list[Encoded]:
        rows = []
        for _ in range(count):
            stream = self.names[self.drawn % len(self.names)]
            self.drawn += 1
            epoch, at = self.position[stream]
            if self.orders.get(stream, (None,))[0] != epoch:
                order = list(range(len(self.streams[stream])))
                random.Random(f"{self.seed} {stream} {epoch}").shuffle(order)
                self.orders[stream] = epoch, order
            name, i = self.streams[stream][self.orders[stream][1][at]]
            self.position[stream] = [epoch, at + 1] if at + 1 < len(self.streams[stream]) else [epoch + 1, 0]
            rows.append(self.rows[name][i])
        return rows

    def _peek(self) -> list[Encoded]:
        """The next micro-batch; draws, sorts and cuts a new window when the old one is used up."""
        if self.taken >= len(self.window):
            self.start, self.taken = self._position(), 0
            rng = random.Random(f"{self.seed} window {self.drawn}")
            rows = sorted(self._draw(self.WINDOW * self.batch_size), key=len, reverse=True)
            if len(rows[0]) > self.tokens_per_batch:
                raise UserError(f"a row of {rows[0].task} has {len(rows[0])} tokens, more than --tokens-per-batch "
                                f"{self.tokens_per_batch}; raise it or lower --max-length")
            self.window = []
            while rows:
                size = min(self.tokens_per_batch // len(rows[0]), max(1, self.batch_size // 2))
                self.window.append(rows[:size])
                rows = rows[size:]
            rng.shuffle(self.window)
        return self.window[self.taken]
