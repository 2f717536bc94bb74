r"""From rows of text to batches of tokens.

    row {"prompt": ..., "answer": ..., ...} -> Example -> Encoded -> Batch(input_ids, attention_mask, labels, task_ids)

Rows come from your own files, the micro-world (tasks/micro.py) or the sixteen Chinese sets (tasks/chinese.py). Every
split goes by *group* (a passage, a premise, a pair), never by row: no text is in two of train, dev and test. Prompt and
answer are joined as tokens, since no token may span the boundary (a tokenizer would merge characters across it):

    input_ids    p_1 .. p_n  a_1 .. a_m eos  pad ..
    labels      -100 .. -100 a_1 .. a_m eos -100 ..

`python data.py` shows a page about every task of the micro-world, with `--data-root DIR` about your files.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from checkpoint import Parser, UserError, load_tokenizer, run_program
from tasks import chinese, micro, rewrite
from tasks.chinese import SPLITS, TASKS, Task, number_rows

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a row is too little work to share out among threads
DEV_SHARE, DEV_ROWS, FEW_DEV_ROWS = 0.1, 1024, 16  # of train rows become dev rows; at most; so few deserve a warning

# Rows -> examples -> train, dev, test --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Example:
    """One row as text. The model reads `prompt` and is to write `answer`."""
    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()  # all answers in class order (closed), the row's own options (choice), () for spans
    references: tuple[str, ...] = ()  # all right answers, `answer` first; () means (answer,)
    protected: tuple[str, ...] = ()  # strings that `perturb` keeps
    group: str = ""  # the same for rows about the same text
    hard_prompt: str = ""  # the prompt with the instruction in words (micro-world)
    fields: tuple[tuple[str, int, int], ...] = ()  # name, start and end in `prompt` of what filled the template
    row: str = ""  # file and line, for messages
    operations: tuple[str, ...] = ()  # what `perturb` did


def to_example(name: str, row: dict, where: str = "") -> Example:
    """A row {"prompt", "answer"} as an Example; choices, references, protected, group, hard_prompt and passage (a part
    of the prompt that may be shortened) are optional. Raises UserError by file and line."""
    texts, lists = ("prompt", "answer", "group", "hard_prompt", "passage"), ("choices", "references", "protected")
    for key in texts + lists:
        form, parts = ("a list of texts", row.get(key) or ()) if key in lists else ("a text", [row.get(key) or ""])
        if not isinstance(parts, list | tuple) or any(isinstance(part, list | dict | None) for part in parts):
            raise UserError(f"{where}: {key} is {row[key]!r}, but should be {form}")
    prompt, answer, group, hard_prompt, passage = (_text(row.get(key)) for key in texts)
    choices, references, protected = (tuple(map(_text, row.get(key) or ())) for key in lists)
    if choices and (answer not in choices or len(set(choices)) < max(2, len(choices))):
        raise UserError(f"{where}: choices {choices} should be two or more different texts with the answer {answer!r}")
    if passage not in prompt:
        raise UserError(f"{where}: the passage {passage[:40]!r} does not occur in the prompt as it stands")
    fields = row.get("fields", ())
    if passage:
        fields = (("text", prompt.index(passage), prompt.index(passage) + len(passage)),)
        protected = protected if choices else (answer, *references, *protected)
    references = tuple(dict.fromkeys((answer, *references))) if references else ()
    return Example(name, prompt, answer, choices, references, protected, group or chinese.group_of(prompt),
                   hard_prompt, fields, where)


def _text(value: object) -> str:
    """A value of JSON as text; a whole number is the same text as 1 and as 1.0."""
    return "" if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)


def task_of(name: str, examples: Sequence[Example] = ()) -> Task:
    """The entry of the table; of other rows what they show: a span task without choices, a closed one with the same
    choices in every row, in any order, otherwise a choice task."""
    if name in TASKS:
        return TASKS[name]
    choices = examples[0].choices if examples else ()
    form = {"template": "{text} =>", "passage": ""} if name in micro.TASKS else {}  # nothing of its text may be cut
    if not choices:
        return Task(name, "own", "span", "char_f1", **form)
    closed = all(set(example.choices) == set(choices) for example in examples)
    return Task(name, "own", "closed" if closed else "choice", "accuracy", answers=choices if closed else (), **form)


def spec_of(name: str, examples: Sequence[Example]) -> dict:
    """What a question to the task needs, as JSON; Task(name, "own", **spec) is the task without its rows."""
    task = task_of(name, examples)
    spec = {key: getattr(task, key) for key in ("kind", "metric", "template", "passage")}
    return spec | {"answers": list(task.answers)}


def describe_task(name: str, root: str | Path | None = None) -> str:
    """What is asked, and a short train row: "bq: answer 不同 / 相同; for example 下面两句是银行客户 … 判断： 相同"."""
    train = load_task(name, "train", root)
    task, example = task_of(name, train), min(train, key=lambda example: len(example.prompt))
    asked = {"closed": f"answer {' / '.join(task.answers)}", "choice": "choose an option",
             "span": "answer in words"}
    return f"{name}: {shorten(asked[task.kind])}; for example  {shorten(example.prompt)} {example.answer}"


def shorten(text: str, size: int = 60) -> str:
    """A text on one line, without its middle if it has more than ``size`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= size else f"{text[: 2 * size // 3]} … {text[3 - size // 3:]}"


@dataclass
class Splits:
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    report: dict  # {"source": text, "dropped": {split: {reason: rows}}, "notes": [text]}


def load_task(name: str, split: str, root: str | Path | None = None) -> list[Example]:
    """One split (train | dev | test) in a fixed random order: any first n rows are a fair sample. Rows come from
    root/<name> if there is such a folder, otherwise from the micro-world or, downloaded, the Chinese set. UserError."""
    return getattr(load_splits(name, str(root) if root else None), split)


def is_newer(name: str, root: str, file: Path) -> bool:
    """Whether rows in root/<name> were written after ``file``; never for tasks that are not there."""
    return bool(root) and any(path.stat().st_mtime > file.stat().st_mtime for path in (Path(root) / name).glob("*"))


@cache
def load_splits(name: str, root: str | None = None) -> Splits:
    """All splits of a task and a report of what was left out; errors as in `load_task`."""
    if not name or name.startswith(".") or set(name) & set("/\\"):
        raise UserError(f"{name!r} cannot be a task; name a folder, without / or a dot in front")
    folder, notes = Path(root or "DIR") / name, []
    there = bool(root) and folder.exists()
    if name in micro.TASKS:
        if there:
            raise UserError(f"{name!r} is a task of the micro-world; give the folder {folder} another name")
        source = "the micro-world"
        read = {split: (number_rows(micro.rows(name, split), f"{name} {split}"), Counter()) for split in SPLITS}
    elif there or name in TASKS:
        source, read = chinese.read_task(task_of(name), root if there else None, notes)
    else:
        raise UserError(f"no task {name!r}: --data-root {folder.parent} should hold {name}/train.jsonl and test.jsonl; "
                        f"known are {', '.join(TASKS)}, and {next(iter(micro.TASKS))} and so on of the micro-world")
    train, test = ([to_example(name, row, where) for where, row in rows] for rows, _ in read.values())
    task, dropped = task_of(name, train + test), {split: counter for split, (_, counter) in read.items()}
    seen, kept = {example.group: "test" for example in test}, {}  # texts not to train on; the train rows, each once
    if task.unseen:
        try:
            other = load_splits(task.unseen, root)
            seen = {example.group: task.unseen for example in other.train + other.dev + other.test} | seen
        except UserError as error:
            notes.append(f"not compared with {task.unseen}: {error}")
    for example in train:
        if example.group in seen:
            dropped["train"][f"text also in {seen[example.group]}"] += 1
        elif kept.setdefault((example.prompt, example.answer), example) is not example:
            dropped["train"]["repeated"] += 1
    for split, rows in zip(SPLITS, (kept, test)):
        if not rows:
            raise UserError(f"task {name!r} has no usable {split} row in {source} (left out: {_counts(dropped[split])})"
                            "; add rows or leave the task out")
    if len({bool(example.choices) for example in train + test}) > 1:
        raise UserError(f"task {name!r} has rows with and without choices in {source}; make two tasks of them")
    train, dev = _cut_dev(name, list(kept.values()))
    if task.metric == "micro_f1":  # training has a row for each relation of two names; dev and test ask once for all
        train, dev, test = map(_merge_labels, (train, dev, test))
        dev, test = (list({example.prompt: example for example in rows}.values()) for rows in (dev, test))
    for rows in (train, test):
        random.Random(f"order {name}").shuffle(rows)
    return Splits(train, dev, test, {"source": source, "dropped": dropped, "notes": notes})


def _merge_labels(examples: list[Example]) -> list[Example]:
    """A prompt that occurs with several answers accepts all of them, its own first."""
    answers = defaultdict(list)  # prompt -> its answers
    for example in examples:
        answers[example.prompt].append(example.answer)
    return [replace(e, references=tuple(dict.fromkeys([e.answer, *answers[e.prompt]])))
            if len(set(answers[e.prompt])) > 1 else e for e in examples]


def _cut_dev(name: str, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(train, dev): whole groups in random order go to dev until it has its share."""
    by_group = defaultdict(list)
    for example in examples:
        by_group[example.group].append(example)
    groups, dev, share = sorted(by_group), [], min(DEV_ROWS, int(DEV_SHARE * len(examples)))
    if len(groups) < 2:
        raise UserError(f"task {name!r} has {len(examples)} train rows on one text, no dev split can be cut; add rows")
    random.Random(f"dev {name}").shuffle(groups)
    while not dev or len(dev) < share and len(groups) > 1:
        dev += by_group[groups.pop()]
    return [example for group in groups for example in by_group[group]], dev


# Few examples and rewritten ones -------------------------------------------------------------------------------------
def k_shot(examples: Sequence[Example], k: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, dev): k rows each, no group in both, balanced over the answers of a closed set as far as the rows allow,
    whatever their order; a smaller k takes a part of a larger one's. Raises UserError if there are too few rows."""
    name = examples[0].task
    closed, rng = task_of(name, examples).kind == "closed", random.Random(f"{seed} {name}")
    order = sorted(examples, key=lambda example: (example.prompt, example.answer, example.group))
    rng.shuffle(order)
    pools = defaultdict(list)  # answer -> its rows that are still free
    for example in order:
        pools[example.answer if closed else ""].append(example)
    answers = sorted(pools)
    rng.shuffle(answers)
    sides, side_of = ([], []), {}  # rows of train and dev; group -> its side
    rounds = range(min(2 * k, len(order)))  # each answer in turn, for train and dev in turn
    for _, answer, side in product(rounds, answers, (0, 1)):
        free = (example for example in pools[answer] if side_of.get(example.group, side) == side)
        if len(sides[side]) < k and (example := next(free, None)):
            pools[answer].remove(example)
            sides[side].append(example)
            side_of[example.group] = side
    if min(map(len, sides)) < k or k < 0:
        raise UserError(f"k = {k} needs {k} train and {k} dev rows on different texts, but the {len(examples)} rows of "
                        f"{name!r} give {len(sides[0])} and {len(sides[1])}; use 0 or more, but not so many")
    return sides


def perturb(example: Example, seed: int) -> Example:
    """The example with its input rewritten and its answer kept; itself if nothing could be done safely."""
    if example.task in micro.TASKS:
        prompt, hard = (text and micro.perturb(text, seed) for text in (example.prompt, example.hard_prompt))
        return replace(example, prompt=prompt, hard_prompt=hard,
                       operations=("template",) if prompt != example.prompt else ())
    task = task_of(example.task, [example])  # a whole prompt has no operations
    values = {name: example.prompt[start:end] for name, start, end in example.fields}
    values, operation = rewrite.rewrite(values, task, example.protected, random.Random(f"{seed} {example.prompt}"))
    if not operation:
        return example
    prompt, fields = chinese.fill_template(task, values)
    return replace(example, prompt=prompt, fields=fields, operations=(operation,))


def test_rows(name: str, cfg) -> dict[str, list[Example]]:
    """The test rows of a task, "plain" and, where any can be, "rewritten"."""
    plain = load_task(name, "test", cfg.data_root)[: cfg.test_rows or None]
    rewritten = [perturb(example, cfg.seed) for example in plain]
    return {"plain": plain} | ({"rewritten": rewritten} if rewritten != plain else {})


# Examples -> tokens --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens; len() counts prompt and answer. Answers and choices end with the end-of-sequence token."""
    prompt_ids: array  # 4 bytes a token, in a list 36
    answer_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    task: str
    lost: bool = False  # shortening cut away the answer, or a name of a relation

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list:
    """Tokens of a text alone, or of several; the name of a special token inside it is text like any other."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt because the backbone was trained so: a begin token, or the turns of a chat."""
    before: list[int]  # in front of the prompt
    after: list[int]  # behind it, in front of the answer
    end: int  # ends the answer
    context: str = ""  # `after` as text
    spaces: tuple[str, str, str] = ("", "", "")  # in front of the prompt, in front of the answer, behind the answer


@cache
def frame_of(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> Frame:
    """Whatever a tokenizer puts in front of a text or, with `chat`, the turns of its template: the prompt is the user's
    and the answer the assistant's, up to its end token, both in the second round of a conversation (the first may have
    a system turn). Spaces next to a prompt or an answer are tokenised with it. Raises UserError for other templates."""
    whole, text = tokenizer("a")["input_ids"], tokens_of(tokenizer, "a")
    begin = whole[: next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)]
    if not chat:
        return Frame(begin, [], tokenizer.eos_token_id)
    talk = [{"role": role, "content": f"MARK{i}"} for i, role in enumerate(("user", "assistant") * 2)]
    try:
        _, _, between, after, closing = re.split("MARK[0-3]", tokenizer.apply_chat_template(talk, tokenize=False))
        (before, lead), (after, gap) = (re.fullmatch("(.*?)( *)", text, re.DOTALL).groups()
                                        for text in (between.removeprefix(closing), after))
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after, closing.strip())]
        begin = [] if ids[0][: len(begin)] == begin else begin
        return Frame(begin + ids[0], ids[1], ids[2][0], after, (lead, gap, closing[: -len(closing.lstrip(" "))]))
    except Exception as error:  # whatever a template raises
        raise UserError(f"the chat template cannot be used ({error}); use --chat-template off") from error


def choose_chat_template(asked: str, name: str, end_tokens: Sequence[int],
                         tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """on or off, and why. asked: on | off | auto; name: the backbone's folder or hub name; end_tokens: what ends its
    generation. auto is on where there is a template and the backbone calls itself instruct or chat, by its name or
    because it stops at the end of a turn (a base model with </s> or the like stops there anyway)."""
    if asked != "auto":
        return asked, "as asked for"
    if not tokenizer.chat_template:
        return "off", "the tokenizer has none"
    if any(word in Path(name).name.lower() for word in ("instruct", "chat")):
        return "on", "by the backbone's name"
    end = frame_of(tokenizer, chat=True).end
    if end in end_tokens and tokenizer.decode([end]) not in ("</s>", "<|endoftext|>", "<|end_of_text|>"):
        return "on", "its generation stops at the end of a turn"
    return "off", "the backbone does not call itself instruct or chat"


@lru_cache(maxsize=4096)
def answer_ids(tokenizer: PreTrainedTokenizerBase, answers: tuple[str, ...], context: str = "",
               chat: bool = False) -> tuple[tuple[int, ...], ...]:
    """Tokens of answers behind a context, with the end token: those they have in the joint text where that keeps the
    context's tokens for all of them (alone, SentencePiece would put a space in front), else those of each alone."""
    frame = frame_of(tokenizer, chat)
    answers = [frame.spaces[1] + answer + frame.spaces[2] for answer in answers]
    before, *found = tokens_of(tokenizer, [context, *(context + answer for answer in answers)])
    if all(ids[: len(before)] == before and len(ids) > len(before) for ids in found):
        return tuple((*ids[len(before):], frame.end) for ids in found)
    return tuple((*ids, frame.end) for ids in tokens_of(tokenizer, answers))


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, keep_answer: bool = True,
           chat: bool = False) -> Encoded:
    """Tokens of an example in its frame. If prompt and longest answer have more than max_length tokens, a window of the
    passage stays: around the two names of a relation or the answer of a span task (with keep_answer=False, for a test,
    its beginning). Nothing else is cut. Raises UserError if even that is too long, if the answer has no token, or if
    two choices have the same ones. A row whose own answer is too long exceeds max_length, see `fitting`."""
    frame, where = frame_of(tokenizer, chat), example.row or example.task
    context = frame.context or re.search(r"[^\n]*\n*$", example.prompt[-64:])[0]  # no token reaches further back
    texts = example.choices or (example.answer,)
    answers = answer_ids(tokenizer, texts, context, chat)
    answer, longest = answers[texts.index(example.answer)], max(map(len, answers))
    if len(answer) < 2:
        raise UserError(f"{where}: the answer {example.answer!r} has no token in this tokenizer; use another of them")
    if len(set(answers)) < len(answers):
        first, second, *_ = (text for text, ids in zip(texts, answers) if answers.count(ids) > 1)
        raise UserError(f"{where}: the choices {first!r} and {second!r} are the same tokens to this backbone; "
                        "word one of them differently")
    if not example.choices and (not keep_answer or longest > 0.9 * max_length):  # a question may be asked however long
        longest = min(longest, max_length // 2)  # its answer is, and such a row is not learned from
    room = max_length - longest - len(frame.before) - len(frame.after)
    prompt, lost = tokens_of(tokenizer, frame.spaces[0] + example.prompt), False
    if len(prompt) > room:
        prompt, lost = _shorten(example, tokenizer, room, keep_answer, frame.spaces[0])
    return Encoded(array("i", [*frame.before, *prompt, *frame.after]), answer, answers[: len(example.choices)],
                   example.task, lost)


def _shorten(example: Example, tokenizer: PreTrainedTokenizerBase, room: int, keep_answer: bool,
             lead: str) -> tuple[list[int], bool]:
    """Tokens of the prompt, behind `lead`, with the longest window of its passage that fits into `room` tokens; and
    whether that loses what is to stay: all names of a relation, one of the answers of a span."""
    task = task_of(example.task, [example])
    start, end = next((place for name, *place in example.fields if name == task.passage), (0, 0))
    passage = example.prompt[start:end]
    places = [(at, at + len(text)) for text in example.protected if (at := passage.find(text)) >= 0]
    if task.kind == "span":
        places = places[:1] if keep_answer else []
    first, last = min(places, default=(0, 0))[0], max((stop for _, stop in places), default=0)

    def cut(size: int) -> tuple[str, list[int]]:
        begin = max(0, min((first + last - size) // 2, len(passage) - size))
        window = passage[begin : begin + size]
        return window, tokens_of(tokenizer, lead + example.prompt[:start] + window + example.prompt[end:])

    low, high = last - first if task.kind == "span" else 0, len(passage)
    if not low and (least := len(cut(0)[1])) > room:
        raise UserError(f"{example.row or example.task}: the prompt without its passage has {least} tokens, but the "
                        f"answer leaves room for {room}; raise --max-length or drop the row")
    while low < high - 1:  # high does not fit; low does, unless it is an answer that is too long
        middle = (low + high) // 2
        low, high = (middle, high) if len(cut(middle)[1]) <= room else (low, middle)
    window, ids = cut(low)
    texts = example.protected if example.choices else example.references or (example.answer,)
    stays = [text in window for text in texts if text in passage]
    return ids, bool(stays) and not (all(stays) if example.choices else any(stays))


def rows_hash(rows: Iterable[Encoded]) -> str:
    """A fingerprint of tokenised rows and their order."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(array("i", [*row.prompt_ids, -1, *row.answer_ids, -2]).tobytes())
    return digest.hexdigest()


def encode_all(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, cfg,
               keep_answer: bool = False) -> list[Encoded]:
    return [encode(example, tokenizer, cfg.max_length, keep_answer, cfg.chat_template == "on")
            for example in tqdm(examples, "tokenising", leave=False, disable=None)]


def fitting(rows: list[Encoded], max_length: int) -> list[Encoded]:
    """The rows to learn from: without those whose answer is too long. Raises UserError if none is left."""
    kept = [row for row in rows if len(row) <= max_length]
    if not kept:
        raise UserError(f"no row of {rows[0].task} fits into --max-length {max_length}; raise it")
    return kept


def encode_task(name: str, tokenizer: PreTrainedTokenizerBase, cfg) -> tuple[dict[str, list[Encoded]], Counter]:
    """All rows of a task, {train | dev | test | rewritten: rows}, and warnings, {reason: number}. Raises UserError if a
    row does not fit, there are too few for the shots, or nothing can be learned or answered. cfg: see train.Config."""
    splits, unknown = load_splits(name, cfg.data_root), tokenizer.unk_token_id
    if splits.train[0].choices and len({row.answer for row in splits.train}) == 1:
        raise UserError(f"all {len(splits.train)} train rows of {name} have the answer '{splits.train[0].answer}': "
                        "there is nothing to tell apart; add rows with another answer, or leave the task out")
    shots = cfg.shots if name in cfg.targets else (0,)
    for k in shots:  # are there enough rows?
        k_shot(splits.train, k, cfg.seed)
    tests = test_rows(name, cfg)
    examples = {"train": splits.train, "dev": splits.dev[: cfg.dev_rows], "test": tests.pop("plain"), **tests}
    rows = {split: encode_all(some, tokenizer, cfg, split == "train") for split, some in examples.items()}
    warnings, words = Counter(), [token for row in rows["train"] for token in row.prompt_ids]
    if words.count(unknown) > len(words) / 2:
        warnings[f"of {len(words)} words of the train rows are unknown to the backbone's tokenizer; give a --backbone "
                 "of this language"] = words.count(unknown)
    if 0 in shots and len(splits.dev) < FEW_DEV_ROWS:
        warnings["development rows alone choose the best checkpoint; add train rows"] = len(splits.dev)
    for split in ("train", "dev", "test"):
        lost = "rows lose a name" if splits.train[0].choices else "answers are cut away"
        warnings[f"{split} {lost} where their text is shortened; raise --max-length"] = sum(r.lost for r in rows[split])
        warnings[f"{split} answers hold tokens that the backbone does not know"] = sum(
            unknown in row.answer_ids[:-1] for row in rows[split])
        if split != "test":
            warnings[f"{split} rows are left out: answer and question are too long; raise --max-length"] = sum(
                len(row) > cfg.max_length for row in rows[split])
    long = sum(min(map(len, tokens_of(tokenizer, [*(row.references or [row.answer])]))) > cfg.max_new_tokens
               for row in examples["test"] if not row.choices)
    too_long = f"test answers are longer than --max-new-tokens {cfg.max_new_tokens} and never given in full; raise it"
    if long == len(rows["test"]):
        raise UserError(f"{name}: {long} of {long} {too_long}")
    warnings[too_long] = long
    return rows | {split: fitting(rows[split], cfg.max_length) for split in ("train", "dev")}, +warnings


def list_notes(name: str, root: str | None, warnings: dict[str, int]) -> list[str]:
    """Rows left out, how the task was read, the warnings of `encode_task`."""
    report = load_splits(name, root).report
    left_out = [f"left out of {split}: {_counts(dropped)}" for split, dropped in report["dropped"].items() if dropped]
    return left_out + report["notes"] + [f"{count} {reason}" for reason, count in warnings.items()]


def draw_shots(name: str, k: int, tokenizer: PreTrainedTokenizerBase, cfg) -> tuple[
        dict[str, list[Encoded]], list[Example], dict[str, list[str]]]:
    """k examples of a target and k more for choosing a checkpoint: {train | dev: rows}, the development examples, and
    where both were drawn from (file and line)."""
    drawn = dict(zip(("train", "dev"), k_shot(load_task(name, "train", cfg.data_root), k, cfg.seed)))
    rows = {split: fitting(encode_all(some, tokenizer, cfg, split == "train"), cfg.max_length)
            for split, some in drawn.items()}
    return rows, drawn["dev"], {split: [row.row for row in some] for split, some in drawn.items()}


def _counts(counts: Counter) -> str:
    """The ten most frequent entries in words."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(10)) or "none"


# Tokens -> batches ---------------------------------------------------------------------------------------------------
@dataclass
class Batch:
    """Right-padded rows; all tensors are long."""
    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), -100 except at the tokens of the answer
    task_ids: torch.Tensor  # (B,)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(encoded: Sequence[Encoded], task_ids: Sequence[int]) -> Batch:
    """A training batch; task_ids: one per row. Padding is masked by position, so that any token may fill it."""
    labels = [[-100] * len(row.prompt_ids) + [*row.answer_ids] for row in encoded]
    return Batch(*_pad([[*row.prompt_ids, *row.answer_ids] for row in encoded]), _pad(labels, -100)[0],
                 torch.tensor(list(task_ids)))


def collate_prompts(encoded: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts alone for scoring and generation -> input_ids, attention_mask (B, T), padded on the left."""
    return _pad([[*row.prompt_ids] for row in encoded], side="left")


def _pad(rows: list[list[int]], value: int = 0, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of equal length, and 1 where they are text; (B, T) each, long."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return (pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side))


class Batches:
    """batches[step] -> the micro-batches of a step, each a list of Encoded; a step depends on nothing but its number.

    Tasks take turns, each with its rows in a new random order every epoch. A step is `batch_size` rows, sorted by
    length and cut into parts of at most `budget` tokens, padding included (a longer row has a part of its own), or
    without a budget of PART rows."""

    PART = 16

    def __init__(self, rows_by_task: dict[str, Sequence[Encoded]], batch_size: int, seed: int, budget: int = 0):
        self.rows, self.batch_size, self.seed, self.budget = rows_by_task, batch_size, seed, budget
        self.order = lru_cache(2 * len(rows_by_task))(self._order)  # this epoch's and the last one's

    def __getitem__(self, step: int) -> list[list[Encoded]]:
        names, drawn, parts = list(self.rows), [], [[]]
        for n in range(step * self.batch_size, (step + 1) * self.batch_size):  # row n of an endless stream
            name = names[n % len(names)]
            epoch, place = divmod(n // len(names), len(self.rows[name]))
            drawn.append(self.rows[name][self.order(name, epoch)[place]])
        for row in sorted(drawn, key=len):
            rows = len(parts[-1]) + 1
            wide = parts[-1] and len(row) > 1.25 * len(parts[-1][0])  # much of the shorter rows would be padding
            if parts[-1] and ((rows * len(row) > self.budget or wide) if self.budget else rows > self.PART):
                parts.append([])
            parts[-1].append(row)
        return parts

    def _order(self, name: str, epoch: int) -> list[int]:
        order = list(range(len(self.rows[name])))
        random.Random(f"{self.seed} {name} {epoch}").shuffle(order)
        return order


# The page about the data ---------------------------------------------------------------------------------------------
def page(name: str, root: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None, cfg=None) -> str:
    """A row, counts, answers, lengths, rows left out; with a tokenizer (and cfg) the warnings of `encode_task`, too."""
    splits, warnings = load_splits(name, root), encode_task(name, tokenizer, cfg)[1] if tokenizer else {}
    lengths, cut = sorted(len(row.prompt + row.answer) for row in splits.train), ""
    if tokenizer:
        rows = [encode(example, tokenizer, sys.maxsize) for example in splits.train]
        longer = sum(len(row.prompt_ids) + max(map(len, (row.answer_ids, *row.choice_ids))) > cfg.max_length
                     for row in rows)
        lengths, cut = sorted(map(len, rows)), f"; {longer} will be shortened to --max-length {cfg.max_length}"
    rewritten = sum(bool(perturb(example, seed=0).operations) for example in splits.test)
    return "\n  ".join([
        describe_task(name, root),
        f"{len(splits.train)} train, {len(splits.dev)} dev (cut from train), {len(splits.test)} test rows from "
        f"{splits.report['source']}; {rewritten} of the test rows can be rewritten",
        f"answers: {_counts(Counter(row.answer for row in splits.train))}",
        f"{'tokens' if tokenizer else 'characters'} of a train row: {lengths[len(lengths) // 2]} (median), "
        f"{lengths[-1]} (longest){cut}",
        *list_notes(name, root, warnings)])


def main(argv: list[str]) -> None:
    parser = Parser(prog="python data.py", description="Show the tasks, a page each (default: the micro-world's).")
    parser.add_argument("--data-root", help="folder with <task>/train.jsonl and test.jsonl")
    parser.add_argument("--task", nargs="+", help="only these tasks (default: all in --data-root)")
    parser.add_argument("--backbone", help="folder or hub name: show lengths in its tokens, and rows it cannot answer")
    parser.add_argument("--max-length", type=int, default=128, help="as in train.py (default: 128)")
    parser.set_defaults(seed=0, dev_rows=None, test_rows=0, targets=(), max_new_tokens=sys.maxsize, chat_template="off")
    cfg = parser.parse_args(argv)
    names = sorted({p.parent.name for p in Path(cfg.data_root).glob("*/*train*.*")}) if cfg.data_root else micro.TASKS
    if not names:
        raise UserError(f"--data-root {cfg.data_root} holds no <task>/train.jsonl")
    try:
        tokenizer = load_tokenizer(cfg.backbone) if cfg.backbone else None
    except (OSError, ValueError) as error:
        raise UserError(f"--backbone {cfg.backbone} has no tokenizer that can be read ({error})") from None
    for name in cfg.task or names:
        try:
            print(page(name, cfg.data_root, tokenizer, cfg), end="\n\n")
        except UserError as error:
            print(f"{name}: refused: {error}", end="\n\n")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
