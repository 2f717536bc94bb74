r"""The sixteen Chinese data sets: eight source tasks, on which the shared prompt is learned, and eight target tasks.

A new data set is one entry of the table. The second half of the file reads what is published:

    a row as published -> to_prompt -> {"prompt": ..., "answer": ..., "choices": [...], "group": ...}

which is the form of the micro-world's rows, and of rows of your own, which need no entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from urllib.request import urlretrieve

from checkpoint import UserError

SPLITS = ("train", "test")  # as published; data.py cuts the development set


@dataclass(frozen=True)
class Source:
    """Where rows are published: a data set on the hub (`path` is its id, `train` and `test` are its splits) or files
    (`path` is "", `train` and `test` are addresses). `columns` name the fields of tab-separated lines."""
    path: str
    train: str | tuple[str, ...] = "train"
    test: str | tuple[str, ...] = "test"
    config: str | None = None
    revision: str | None = None
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = f"{self.path}:{self.config}" if self.config else self.path
        return f"{name} at {(self.revision or 'main')[:7]}" if self.path else self.train[0]


@dataclass(frozen=True)
class Task:
    """One task. `template` names fields of a row in braces; {options} are all answers, {choices} a row's own ones."""
    name: str
    role: str  # source | target
    kind: str  # closed (one of `answers`) | span (copied from the text) | choice (the letter of an option)
    metric: str  # the score of evaluate.score_task that stands for the task
    template: str = ""
    answers: tuple[str, ...] = ()  # in the order of the published integer labels
    labels: tuple[str, ...] = ()  # the published names of the labels, in the same order, where they are not the answers
    answer_field: str = "label"  # the field of a row that holds its label, its spans or its right option
    passage: str = "text"  # the field that may be shortened
    group: tuple[str, ...] = ()  # rows that agree in these fields are about the same text; default: the passage
    rewrite: tuple[str, ...] = ()  # how `perturb` may change the input, see rewrite.py
    sources: tuple[Source, ...] = ()  # first choice, then fallbacks
    unseen: str = ""  # a target task whose texts must not be among the train rows
    positive: str = ""  # the rarer answer of two, whose F1 is reported next to the accuracy

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names in the template's braces, in their order."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.template) if name)


# The table -----------------------------------------------------------------------------------------------------------
def clue(config: str, test: str = "validation") -> Source:
    """CLUE publishes its test sets without labels: validation is the test set, and dev is cut from train."""
    return Source("clue/clue", test=test, config=config, revision="28178267a609dd08bdc703dd6c931dfc2c2f4431")


def github(commit: str, train: Sequence[str], test: Sequence[str], columns: tuple[str, ...] = ()) -> tuple[Source, ...]:
    """Files of "owner/name@commit", and the same files at a mirror."""
    folders = f"https://raw.githubusercontent.com/{commit.replace('@', '/')}", f"https://cdn.jsdelivr.net/gh/{commit}"
    return tuple(Source("", *(tuple(f"{folder}/{file}" for file in files) for files in (train, test)),
                        columns=columns) for folder in folders)


REVIEWS = "lsvih/chinese-customer-review@c1d68637f5fc1486a2483d58083669baaae7bd9d"
RELATIONS = "thunlp/Chinese_NRE@2cd47e6dc1b95e8ca3e93b5b8567666c37c5d654"
TITLES = "649453932/Chinese-Text-Classification-Pytorch@6cb26819af7b646275aff8a4693676f2849e67f6"
OCNLI = "CLUEbenchmark/OCNLI@ed7ede280dfebac89a6c574f2ce90c9dbac7840b"
C3 = "nlpdata/c3@dd2d89324e961786a1a9eec73ae13f1c6b800384"

# What tasks of one form have in common.
PAIR = dict(answers=("不同", "相同"), passage="sentence1", group=("sentence1", "sentence2"), rewrite=("swap",))
NLI = dict(answers=("中立", "蕴含", "矛盾"), labels=("neutral", "entailment", "contradiction"), passage="sentence1",
           rewrite=("sentence_order", "time_order", "adverbial_last", "frame"))
REVIEW = dict(rewrite=("sentence_order", "clause_order", "adverbial_last"))
COTE = dict(passage="s", answer_field="ot", **REVIEW)
TITLE = dict(rewrite=("title_order", "sentence_order", "clause_order"))
QUESTION = dict(passage="context", rewrite=("question_form", "adverbial_last"))
EXTRACT = dict(answer_field="answers", **QUESTION)
RELATION_FILE = ("head", "tail", "relation", "text")
FINRE = """无关 注资 拥有 纠纷 自己 增持 重组 买资 签约 持股 交易 入股 转让 成立 分析 合作 帮助 发行 商讨 合并 竞争 订单
    减持 合资 收购 借壳 欠款 被发行 被转让 被成立 被注资 被持股 被拥有 被收购 被帮助 被借壳 被买资 被欠款 被增持 拟收购
    被减持 被分析 被入股 被拟收购"""

TABLE = (
    # Source tasks
    Task("afqmc", "source", "closed", "accuracy", "下面两句是金融客服里的提问，判断它们问的是不是同一件事。\n"
         "提问一：{sentence1}\n提问二：{sentence2}\n可选：{options}\n判断：", **PAIR, positive="相同",
         sources=(clue("afqmc"), Source("C-MTEB/AFQMC", test="validation"))),
    Task("amazon", "source", "closed", "accuracy",
         "阅读这条商品评价，推测买家打了几颗星。\n评价：{text}\n可选：{options}\n星级：",
         ("一星", "两星", "三星", "四星", "五星"), **REVIEW,
         sources=(Source("SetFit/amazon_reviews_multi_zh", revision="184ac90d5511a7f6801cba99688892f440ece660"),)),
    Task("thucnews", "source", "closed", "accuracy",
         "给这条新闻标题选一个栏目。\n标题：{text}\n可选：{options}\n栏目：",
         ("财经", "房产", "股票", "教育", "科技", "社会", "时政", "体育", "游戏", "娱乐"), **TITLE,
         sources=github(TITLES, ["THUCNews/data/train.txt"], ["THUCNews/data/test.txt"], ("text", "label"))),
    Task("bq", "source", "closed", "accuracy", "下面两句是银行客户的提问，判断能否用同一个答案回复。\n"
         "提问一：{sentence1}\n提问二：{sentence2}\n可选：{options}\n判断：", **PAIR,
         sources=(Source("C-MTEB/BQ", revision="e3dda5e115e487b39ec7e618c0c6a29137052a55"),)),
    Task("cmnli", "source", "closed", "accuracy",
         "已知前提，判断假设与它的逻辑关系。\n前提：{sentence1}\n假设：{sentence2}\n可选：{options}\n关系：", **NLI,
         sources=(clue("cmnli"), Source("fenffef/cmnli", test="validation"))),
    Task("cmrc2018", "source", "span", "char_f1",
         "从文章中原样摘出能回答问题的片段。\n文章：{context}\n问题：{question}\n片段：", **EXTRACT,
         sources=(Source("hfl/cmrc2018", test="validation"), clue("cmrc2018"))),
    Task("sanwen", "source", "closed", "micro_f1",
         "阅读这段散文，判断甲与乙的关系。\n原文：{text}\n甲：{head}\n乙：{tail}\n可选：{options}\n关系：",
         ("无关", "创作", "使用", "邻近", "社交", "位于", "占有", "种属", "亲属", "组成"),
         tuple("unknown Create Use Near Social Located Ownership General-Special Family Part-Whole".split()),
         **REVIEW, sources=github(RELATIONS, ["data/SanWen/train.txt"], ["data/SanWen/test.txt"], RELATION_FILE)),
    Task("cote_mfw", "source", "span", "char_f1",
         "摘出这条旅游点评所评价的对象。\n点评：{s}\n对象：", **COTE, unseen="cote_bd",
         sources=github(REVIEWS, ["mafengwo/train.txt"], ["mafengwo/test.txt"])),
    # Target tasks
    Task("chnsenticorp", "target", "closed", "accuracy",
         "判断这段用户点评的情感倾向。\n点评：{text}\n可选：{options}\n倾向：", ("负面", "正面"), **REVIEW,
         sources=(Source("lansinuote/ChnSentiCorp", revision="b0c4c119c3fb33b8e735969202ef9ad13d717e5a"),
                  Source("ndiy/ChnSentiCorp"))),
    Task("tnews", "target", "closed", "accuracy", "给这条资讯标题选一个频道。\n标题：{text}\n可选：{options}\n频道：",
         tuple("故事 文化 娱乐 体育 财经 房产 汽车 教育 科技 军事 旅游 国际 股票 农业 游戏".split()),
         tuple("100 101 102 103 104 106 107 108 109 110 112 113 114 115 116".split()),  # 105 and 111 do not exist
         **TITLE, sources=(clue("tnews"), Source("C-MTEB/TNews-classification", test="validation"))),
    Task("ocnli", "target", "closed", "accuracy",
         "先读前提，再看假设能否由它推出。\n前提：{sentence1}\n假设：{sentence2}\n可选：{options}\n关系：", **NLI,
         sources=(clue("ocnli"), *github(OCNLI, ["data/ocnli/train.50k.json"], ["data/ocnli/dev.json"]))),
    Task("lcqmc", "target", "closed", "accuracy", "比较下面两个问句，判断它们的意图是否一致。\n"
         "问句一：{sentence1}\n问句二：{sentence2}\n可选：{options}\n判断：", **PAIR,
         sources=(Source("C-MTEB/LCQMC", revision="17f9b096f80380fce5ed12a9be8be7784b337daf"), Source("mteb/LCQMC"))),
    Task("drcd", "target", "span", "char_f1",
         "從文章中原樣摘出能回答問題的片段。\n文章：{context}\n問題：{question}\n片段：", **EXTRACT,
         sources=(clue("drcd", test="test"), Source("roberthsu2003/for_MRC_QA"))),
    Task("c3", "target", "choice", "accuracy",
         "读材料，选出正确的一项。\n材料：{context}\n问题：{question}\n{choices}\n答案：", **QUESTION,
         answer_field="answer", sources=(clue("c3"), *github(
             C3, ["data/c3-d-train.json", "data/c3-m-train.json"], ["data/c3-d-dev.json", "data/c3-m-dev.json"]))),
    Task("cote_bd", "target", "span", "char_f1", "摘出这段网络评论所评价的对象。\n评论：{s}\n对象：", **COTE,
         sources=github(REVIEWS, ["baidu/train.txt"], ["baidu/test.txt"])),
    Task("finre", "target", "closed", "micro_f1",
         "阅读这则财经新闻，判断甲对乙的关系。\n原文：{text}\n甲：{head}\n乙：{tail}\n可选：{options}\n关系：",
         tuple(FINRE.split()), ("unknown", *FINRE.split()[1:]), **REVIEW,
         sources=github(RELATIONS, ["data/FinRE/train.txt"], ["data/FinRE/test.txt"], RELATION_FILE)),
)
TASKS = {task.name: task for task in TABLE}
SOURCES = tuple(task.name for task in TABLE if task.role == "source")
TARGETS = tuple(task.name for task in TABLE if task.role == "target")


# From a published row to a prompt ------------------------------------------------------------------------------------
ALIASES = {"text": ("text", "sentence"), "label": ("label", "score", "relation")}  # the same field at different sources
LETTERS = ["".join(letters) for n in (1, 2) for letters in product(string.ascii_uppercase, repeat=n)]  # A .. Z AA .. ZZ


class Unusable(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""

def to_prompt(task: Task, row: dict | None, where: str) -> dict:
    """A published row in the form of the micro-world's rows, with the `fields` of `fill_template`; whole prompts, of a
    task without a template, stay as they are. Raises UserError (a field is missing, a label is unknown), Unusable."""
    if row is None:
        raise Unusable("wrong number of columns")
    whole = not task.template
    if "prompt" in row and not whole:
        raise UserError(f"{where}: a row with its own prompt, but {task.name!r} is a known data set; give the folder "
                        "another name")
    if whole and not {"prompt", "answer"} <= row.keys():
        raise UserError(f'{where}: a row needs "prompt" and "answer", as in {{"prompt": "...", "answer": "..."}}; this '
                        f"one has {', '.join(row) or 'nothing'}")
    names = ("prompt", "answer") if whole else [name for name in task.fields if name not in ("options", "choices")]
    values = {name: _clean(_field(row, name, where)) for name in names}
    if empty := [name for name, text in values.items() if not text]:
        raise Unusable(f"empty {empty[0]}")
    if whole:
        return row | {"fields": ()}
    group, given = group_of(*map(values.get, task.group or (task.passage,))), _field(row, task.answer_field, where)
    if task.kind == "span":
        references, spans = _spans(given, values[task.passage])
        answers = {"answer": spans[0], "references": references, "protected": spans}
    elif task.kind == "choice":
        options, right = _options(given, _field(row, "choice", where), f"{values['context']}\n{values['question']}")
        values["choices"], letters = letter_options(options)
        answers = {"answer": letters[right], "choices": letters}
    else:
        answers = {"answer": _label(task, given, where), "choices": task.answers,
                   "protected": [values[name] for name in ("head", "tail") if name in values]}  # of a relation
    prompt, fields = fill_template(task, values)
    return {"prompt": prompt, "group": group, "fields": fields, **answers}


def letter_options(options: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Options as lines "A. ...", and the letters, which are the answers to choose from."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options)), LETTERS[: len(options)]


def fill_template(task: Task, values: dict[str, str]) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """The task's template with its fields filled in, and where in the prompt each stands: (name, start, end). {options}
    are its answers, joined as the template's language does it."""
    comma = "、" if re.search("[\u4e00-\u9fff]", task.template) else ", "
    values, prompt, fields = {"options": comma.join(task.answers)} | values, "", []
    for literal, name, _, _ in string.Formatter().parse(task.template):
        prompt += literal
        if name:
            fields.append((name, len(prompt), len(prompt) + len(values[name])))
            prompt += values[name]
    return prompt, tuple(fields)


def group_of(*texts: str) -> str:
    """A short name for a text that ignores white space and, for a pair of texts, their order."""
    key = "\n".join(sorted("".join(text.split()) for text in texts))
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _field(row: dict, name: str, where: str) -> object:
    names = ALIASES.get(name, (name,))
    if found := [row[alias] for alias in names if alias in row]:
        return found[0]
    raise UserError(f"{where}: no field {' or '.join(map(repr, names))} in the row (it has {', '.join(row) or 'none'})")


def _clean(value: object) -> str:
    """One text, stripped, in NFC (NFKC would change characters, and answers would no longer occur in their passage)."""
    if isinstance(value, list | tuple):
        value = "\n".join(str(part) for part in value)
    return unicodedata.normalize("NFC", "" if value is None else str(value)).replace("\r\n", "\n").strip()


def _label(task: Task, label: object, where: str) -> str:
    """The answer of a published label: a name, or a number in the order of `answers`."""
    name = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
    if name in ("", "-", "-1", "None"):
        raise Unusable("no label")
    for names in (task.labels, task.answers, [str(number) for number in range(len(task.answers))]):
        if name in names:
            return task.answers[names.index(name)]
    raise UserError(f"{where}: unknown label {name!r} for task {task.name!r}; known are "
                    f"{', '.join(task.labels or task.answers)}, or 0 to {len(task.answers) - 1}")


def _spans(given: object, passage: str) -> tuple[list[str], list[str]]:
    """All answers, and those that really occur in the passage (published offsets are not used, some are wrong). given:
    a text, a list of texts, a list of {"text": text} as in SQuAD, or {"text": list of texts} as on the hub."""
    given = (given["text"] if isinstance(given, dict) else given) or ()
    texts = [given] if isinstance(given, str) else [a["text"] if isinstance(a, dict) else a for a in given]
    answers = list(dict.fromkeys(filter(None, map(_clean, texts))))
    if not (found := [text for text in answers if text in passage]):
        raise Unusable("answer not in the text" if answers else "no answer")
    return answers, found


def _options(given: object, choices: Sequence[object], text: str) -> tuple[list[str], int]:
    """The options in a random order, fixed by the text (as published, some places are right more often than others),
    and the place of the right one."""
    answer, options = _clean(given), list(dict.fromkeys(filter(None, map(_clean, choices))))
    if answer not in options:
        raise Unusable("answer not among the choices" if answer else "no answer")
    if len(options) < 2:
        raise Unusable("fewer than two choices")
    random.Random("\n".join((text, *options))).shuffle(options)
    return options, options.index(answer)


# Files and downloads -------------------------------------------------------------------------------------------------
decode = json.JSONDecoder(parse_constant=lambda name: None).decode  # NaN, as pandas writes it, is a missing value
Rows = Iterable[tuple[str, dict | None]]  # (place, row), None for a line with too few or too many columns


def read_task(task: Task, root: str | None, notes: list[str]) -> tuple[str, dict[str, tuple[list, Counter]]]:
    """(source, {split: (rows as prompts with their places, dropped rows by reason)}) of the files in root/<task>, or of
    the first source that can be read; what failed before it is added to `notes`. Raises UserError."""
    if root:
        return str(Path(root) / task.name), {split: _read(task, local_rows(task, root, split)) for split in SPLITS}
    for source in task.sources:
        try:
            return str(source), {split: _read(task, published_rows(source, split)) for split in SPLITS}
        except Exception as error:  # `datasets` raises a different type for every way in which a download can fail
            reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
            notes.append(f"{source} failed ({reason})")
    raise UserError(f"task {task.name!r} cannot be loaded, tried {'; '.join(notes)}: connect to the network once "
                    f"(files are kept), or put {task.name}/train.jsonl and test.jsonl into the folder --data-root")


def _read(task: Task, rows: Rows) -> tuple[list[tuple[str, dict]], Counter]:
    prompts, dropped = [], Counter()
    for where, row in rows:
        try:
            prompts.append((where, to_prompt(task, row, where)))
        except Unusable as reason:
            dropped[str(reason)] += 1
    return prompts, dropped


def local_rows(task: Task, root: str, split: str) -> Rows:
    """Rows of root/<task>/<split>.jsonl, or .txt as published, or the .json files of CLUE, CMRC and C3, whose
    development set is the test set where the test set has no answers."""
    folder, columns = Path(root) / task.name, next((source.columns for source in task.sources if source.columns), ())
    stems = ["train"] if split == "train" else ["test", "dev"]
    if task.sources and task.sources[0].test == "validation":
        stems.reverse()
    names = [f"{split}.jsonl", f"{split}.txt"]
    for stem in stems:
        names += f"{stem}.json", f"*[-_]{stem}*.json", f"{stem}.50k.json"  # the last is OCNLI's largest train set
    paths = next(filter(None, (sorted(folder.glob(name)) for name in names)), ())
    if not paths:
        raise UserError(f"{folder / split}.jsonl is missing: --data-root should hold {task.name}/train.jsonl and "
                        "test.jsonl, one JSON object a line")
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
        yield from parse_rows(text, columns if path.suffix == ".txt" else (), str(path))


def published_rows(source: Source, split: str) -> Rows:
    """Rows of a source, downloaded on first use; raises whatever `datasets` raises if that fails."""
    from datasets import load_dataset  # slow to import, and the micro-world does not need it

    place = source.train if split == "train" else source.test
    if not source.path:
        return (row for url in place for row in parse_rows(_download(url).read_bytes().decode(), source.columns, url))
    rows = load_dataset(source.path, source.config, revision=source.revision, split=place)
    return number_rows(rows, f"{source.path} {place}")


def _download(url: str) -> Path:
    """A file of a pinned commit, kept with the downloads of `datasets` (which cannot read such files by itself)."""
    from datasets import config

    path = Path(config.HF_DATASETS_CACHE) / "downloads" / f"{group_of(url)}-{url.rsplit('/', 1)[1]}"
    if not path.is_file():
        if config.HF_HUB_OFFLINE:
            raise ConnectionError("not downloaded yet, and HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        urlretrieve(url, part)  # raises if the connection breaks
        part.replace(path)
    return path


def number_rows(rows: Iterable[dict], where: str) -> Rows:
    return ((f"{where}:{number}", row) for number, row in enumerate(rows, 1))


def parse_rows(text: str, columns: Sequence[str] = (), where: str = "") -> Rows:
    """Rows of a file: tab-separated lines if `columns` are given, JSON lines, or one JSON document. A quotation mark in
    a tab-separated line is an ordinary character."""
    text = text.removeprefix("\ufeff")
    rows = [(f"{where}:{number}", line.strip("\r"))  # split at \n only: U+2028 may stand inside a text
            for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if columns:
        for place, line in rows:
            cells = line.split("\t")
            yield place, dict(zip(columns, cells)) if len(cells) == len(columns) else None
        return
    with suppress(ValueError):  # several lines, or a mistake in one
        document = decode(text)
        document = document.get("data") if isinstance(document, dict) else document
        rows = _flatten(document, where) if isinstance(document, list) else rows
    for place, row in rows:
        if isinstance(row, str):
            try:
                row = decode(row)
            except ValueError as error:
                raise UserError(f"{place}: not readable as JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row is a JSON object with named fields, not {type(row).__name__}")
        yield place, row


def _flatten(document: list, where: str) -> Iterator[tuple[str, object]]:
    """Rows of one JSON document: a list, or the nested forms of SQuAD, CMRC and C3."""
    for number, row in enumerate(document, 1):
        place = f"{where}, entry {number}"
        flat = [row]
        if isinstance(row, dict) and "paragraphs" in row:  # SQuAD: article > paragraphs > questions
            flat = [{"context": part["context"]} | question for part in row["paragraphs"] for question in part["qas"]]
        elif isinstance(row, dict) and "context_text" in row:  # CMRC before it had the form of SQuAD
            flat = [question | {"context": row["context_text"], "question": question["query_text"]}
                    for question in row["qas"]]
        elif isinstance(row, list) and len(row) == 3 and isinstance(row[1], list):  # C3: [lines, questions, id]
            flat = [{"context": row[0]} | question for question in row[1]]
        yield from ((place, row) for row in flat)
