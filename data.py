r"""From rows of text to batches of tokens.

    Task (tasks.py) -> rows -> Example(prompt, answer, choices, ...) -> Encoded -> Batch(input_ids, labels, task_ids)

Rows come from `--data-root DIR` (DIR/<task>/train.jsonl and test.jsonl, field names as upstream), or are downloaded by
`datasets`, or are made by the micro-world (toy.py). A folder without an entry in the table of tasks works too when its
rows are {"prompt": ..., "answer": ..., "choices": [...]}.

Every split goes by *group* (the passage, the premise, the pair, the text), never by row: no group is in two of train,
dev and test.

Prompt and answer are tokenised apart and joined, because a tokenizer may merge characters across the boundary:
    input_ids  p_1 .. p_n a_1 .. a_m eos pad ..     labels  -100 .. -100 a_1 .. a_m eos -100 ..

`python data.py --data-root DIR` shows a page about every task it finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import string
import sys
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from urllib.request import urlopen

import torch
from tqdm import tqdm

import rewrite
import toy
from errors import Parser, UserError, program
from tasks import FORMATS, TASKS, Source, Task, can_be_folder

DEV_SHARE, DEV_ROWS = 0.1, 1024  # dev is a tenth of train, cut by group, 1024 rows at most


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
    """Lettered options in a fixed random order (upstream the right one sits unevenly), index of the right one."""
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


def fill(template: str, values: dict[str, str]) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """A template with its fields filled in, and where in the prompt each field stands: (name, start, end)."""
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
    prompt, fields = fill(task.template, values)
    group = group_of(*(values[name] for name in task.group or (task.passage,)))
    return Example(task.name, prompt, answer, choices, references, protected, group, fields=fields, row=where)


TEXT, NUMBER, LIST = "a text", "a text or a number", "a list of texts or numbers"
OWN = {"prompt": TEXT, "answer": NUMBER, "choices": LIST, "references": LIST, "protected": LIST, "group": NUMBER,
       "hard_prompt": TEXT, "passage": TEXT}


def _own_row(name: str, row: dict, where: str) -> Example:
    """A row that already is a prompt: {"prompt", "answer"} and maybe choices, references, protected, group,
    hard_prompt, passage (a part of the prompt that may be shortened)."""
    for field, form in OWN.items():
        value, kinds = row.get(field), (str,) if form is TEXT else (str, int, float)
        parts = value if form is LIST and type(value) is list else [value]
        if value is not None and ((form is LIST) != (type(value) is list) or any(type(p) not in kinds for p in parts)):
            raise UserError(f"{where}: {field} is {str(value)[:50]!r} ({type(value).__name__}), but must be {form}")
    prompt, answer = ("" if value is None else str(value) for value in (row["prompt"], _column(row, "answer", where)))
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
        str(row.get("group") or group_of(prompt)), row.get("hard_prompt") or "", fields, where,
    )


def parse_rows(text: str, columns: Sequence[str] = (), where: str = "") -> Iterator[tuple[str, dict | None]]:
    """Rows of a file as (place, row): tab-separated lines if `columns` are given, JSON lines, or one JSON document (a
    list of rows, or the nested forms of SQuAD and C3). None stands for a line with too few or too many columns. There
    are no quoting rules: a quotation mark is a character."""
    lines = text.removeprefix("\ufeff").split("\n")  # not splitlines: U+2028 may stand inside a text
    lines = [(number, line.strip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if columns:
        for number, line in lines:
            parts = line.split("\t")
            yield f"{where}:{number}", dict(zip(columns, parts)) if len(parts) == len(columns) else None
        return
    try:
        rows = [(f"{where}:{number}", _json(line)) for number, line in lines]
    except ValueError as error:
        rows = None
        number = next(number for number, line in lines if not _is_json(line))
        problem = f"{where}:{number}: not readable as JSON ({getattr(error, 'msg', error)}); write one object per line"
    if rows is None or (len(rows) == 1 and not (isinstance(rows[0][1], dict) and "data" not in rows[0][1])):
        try:
            rows = list(_flatten(_json(text.removeprefix("\ufeff")), where))
        except ValueError:
            raise UserError(problem) from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row is a JSON object with named fields, not {type(row).__name__}")
        yield place, row


def _json(text: str) -> object:
    """json.loads; ValueError also for what Python reads and nothing can use."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # perhaps the first half of a character without the second one
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deep") from None


def _is_json(line: str) -> bool:
    try:
        return _json(line) is not None
    except ValueError:
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

    root: folder with <name>/train.jsonl and test.jsonl; None: the hub (toy tasks need neither). dev is cut from train
    by group; rows come in a fixed random order, so that any first n rows are a fair sample.
    Raises UserError for an unknown name or split, missing or unreadable files, a row without a field or with an unknown
    label, an empty split.
    """
    if split not in ("train", "dev", "test"):
        raise UserError(f"no split {split!r}; there are train, dev and test")
    return getattr(load_splits(name, None if root is None or name.startswith("toy-") else str(root)), split)


@cache
def load_splits(name: str, root: str | None = None) -> Splits:
    """All splits of a task and the report of what was read and dropped; arguments and errors as in `load_task`."""
    task, notes = task_of(name), []
    if not can_be_folder(name):
        raise UserError(f"{name!r} cannot be a task: a name is that of a folder in --data-root, without / in it")
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
    if task.unseen:
        train = _without(train, _groups_of(task.unseen, root, notes), f"text also in {task.unseen}", lost)
    train = _once(train, lost)
    for split, rows, dropped in (("train", train, lost), ("test", test, lost_test)):
        if not rows:
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the file holds no row"
            raise UserError(f"task {name!r} has no usable {split} row in {source} ({why}); add rows or leave it out")
    if len({bool(example.choices) for example in train + test}) == 2:
        raise UserError(f"task {name!r} has rows with and without choices in {source}; make two tasks of them")
    if task.metric == "micro_f1":
        train, test = _merge_labels(train), _merge_labels(test)
    train, dev = _cut_dev(name, train)
    for rows in (train, test):
        random.Random(f"order {name}").shuffle(rows)
    dropped = {"train": dict(lost), "test": dict(lost_test)}
    return Splits(train, dev, test, {"source": source, "read": counts, "dropped": dropped, "notes": notes})


def _numbered(rows: Iterable[dict], where: str) -> Iterator[tuple[str, dict]]:
    return ((f"{where}:{number}", row) for number, row in enumerate(rows, 1))


def _read(task: Task, rows: Iterable[tuple[str, dict | None]]) -> tuple[list[Example], Counter]:
    examples, dropped, where = [], Counter(), "the first row"
    try:
        for where, row in rows:
            try:
                if row is None:
                    raise _Drop("wrong number of columns")
                examples.append(to_example(task, row, where))
            except _Drop as reason:
                dropped[str(reason)] += 1
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: a field of this or the next row has another form than task {task.name!r} expects "
                        f"({type(error).__name__}: {error}); compare it with its upstream") from error
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
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give yourself the permission") from None
    except UnicodeDecodeError as error:
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
        f"task {task.name!r} cannot be loaded, tried {'; '.join(failures)}: connect to the network once (the files are "
        f"kept), or put {task.name}/train.jsonl and test.jsonl into a folder and pass it as --data-root"
    )


def _hub_rows(source: Source, split: str) -> Iterator[tuple[str, dict | None]]:
    from datasets import load_dataset  # slow to import, and the default run needs none of it

    place = getattr(source, split)
    if source.path not in FORMATS:
        rows = load_dataset(source.path, source.config, revision=source.revision, split=place)
        return _numbered(rows, f"{source.path} {place}")
    files = [place] if isinstance(place, str) else list(place)
    if source.path != "text":
        return _numbered(load_dataset(source.path, data_files={split: files}, split=split), files[0])
    return (row for url in files for row in parse_rows(_download(url).read_bytes().decode(), source.columns, url))


def _download(url: str) -> Path:
    """A file from the web, kept beside the downloads of `datasets` (which itself needs an extra package for addresses
    outside the hub). The addresses are pinned to a commit, so what is kept never grows old."""
    from datasets import config

    path = Path(config.HF_DATASETS_CACHE) / "downloads" / f"{group_of(url)}-{url.rsplit('/', 1)[1]}"
    if path.is_file():
        return path
    if config.HF_HUB_OFFLINE:
        raise ConnectionError("not downloaded yet, and HF_HUB_OFFLINE is set")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with urlopen(url, timeout=60) as reply, part.open("wb") as file:
        size = int(reply.headers.get("Content-Length") or 0)
        with tqdm.wrapattr(reply, "read", total=size or None, desc=path.name, disable=None, leave=False) as stream:
            shutil.copyfileobj(stream, file)
    if size and part.stat().st_size != size:
        raise ConnectionError(f"the download broke off after {part.stat().st_size} of {size} bytes")
    return part.replace(path)


def _groups_of(name: str, root: str | None, notes: list[str]) -> set[str]:
    """Groups of all rows of another task; none, and a note, if it is not there."""
    try:
        other = load_splits(name, root)
    except UserError as error:
        notes.append(f"not compared with {name}: {error}")
        return set()
    return {example.group for rows in (other.train, other.dev, other.test) for example in rows}


def _without(examples: list[Example], groups: set[str], reason: str, dropped: Counter) -> list[Example]:
    kept = [example for example in examples if example.group not in groups]
    if len(kept) < len(examples):
        dropped[reason] += len(examples) - len(kept)
    return kept


def _once(examples: list[Example], dropped: Counter) -> list[Example]:
    kept = {}
    for example in examples:
        kept.setdefault((example.prompt, example.answer), example)
    if len(kept) < len(examples):
        dropped["repeated"] += len(examples) - len(kept)
    return list(kept.values())


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
        raise UserError(f"task {name!r} has {len(examples)} train rows on one text, no dev split can be cut; add rows")
    return [example for group in groups for example in by_group[group]], dev


# --------------------------------------------------------------------------------------------------------------------
# Few-shot and unseen data


def k_shot(examples: Sequence[Example], k: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, dev): k rows each, no group in both, balanced over the answers of a closed set as far as the rows allow.

    k counts rows in total. With k below the number of answers, k of the answers have one row each. The same seed gives
    the same rows whatever the order of `examples`, and a smaller k gives a part of the rows of a larger one.
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
    """The example with its input text rewritten, template and answer untouched; `operations` says how, () if nothing
    could be done safely and the example is as it was. Deterministic in the prompt and the seed."""
    if example.task.startswith("toy-"):
        prompt = toy.perturb(example.prompt, seed)
        hard = toy.perturb(example.hard_prompt, seed) if example.hard_prompt else ""
        operations = ("template",) if prompt != example.prompt else ()
        return replace(example, prompt=prompt, hard_prompt=hard, operations=operations)
    task = task_of(example.task)
    before = {name: example.prompt[start:end] for name, start, end in example.fields}
    if task.template and set(before) != set(task.fields) - {"options", "choices"}:  # whole prompts of the user's own
        return example
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
    """One example as tokens; len() counts prompt and answer. Answers and choices end with the end-of-sequence token.

    A million rows are held at once: an array takes 4 bytes a token (a list 36), and equal answers are one object."""

    prompt_ids: array
    answer_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    task: str

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=4096)
def answer_ids(tokenizer, answer: str) -> tuple[int, ...]:
    return (*_ids(tokenizer, answer), tokenizer.eos_token_id)


@lru_cache(maxsize=4096)
def _choice_ids(tokenizer, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(answer_ids(tokenizer, choice) for choice in choices)


def encode(example: Example, tokenizer, max_length: int, keep_answer: bool = True) -> Encoded:
    """Tokens of an example: prompt and answer tokenised apart, no special tokens but the end of every answer.

    What is longer than max_length tokens (prompt + longest answer) loses the ends of its passage: a window stays,
    around the answer of a span task (or at the beginning with keep_answer=False, for a test that must not know it),
    around the two names of a relation. Question, options and answer are never cut.
    Raises UserError naming the row if even that is too long, or if the answer has no token."""
    answer = answer_ids(tokenizer, example.answer)
    if len(answer) < 2:
        raise UserError(f"{example.row or example.task}: the answer {example.answer!r} has no token in this tokenizer; "
                        "use another answer or tokenizer")
    choices = _choice_ids(tokenizer, example.choices)
    room = max_length - max(map(len, (answer, *choices)))
    prompt = _ids(tokenizer, example.prompt)
    if len(prompt) > room:
        prompt = _shorten(example, tokenizer, room, keep_answer)
    return Encoded(array("i", prompt), answer, choices, example.task)


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
        return _ids(tokenizer, example.prompt[:start] + passage[begin : begin + size] + example.prompt[end:])

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


def _pad(rows: list[Sequence[int]], value: int, side: str = "right") -> torch.Tensor:
    longest = max(map(len, rows))
    pads = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*row, *pad] if side == "right" else [*pad, *row] for row, pad in zip(rows, pads)])  # (B, T)


def collate(encoded: Sequence[Encoded], task_ids: Sequence[int], pad_id: int, device=None) -> Batch:
    """A training batch; task_ids: one per row. Padding is known by its place, never by its token: it may be the eos."""
    texts = [[*row.prompt_ids, *row.answer_ids] for row in encoded]
    labels = [[-100] * len(row.prompt_ids) + [*row.answer_ids] for row in encoded]
    mask = [[1] * len(text) for text in texts]
    batch = Batch(_pad(texts, pad_id), _pad(mask, 0), _pad(labels, -100), torch.tensor(list(task_ids)))
    return batch if device is None else batch.to(device)


def collate_prompts(encoded: Sequence[Encoded], pad_id: int, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts alone for scoring and generation -> input_ids, attention_mask (B, T), padded on the left or right."""
    prompts = [row.prompt_ids for row in encoded]
    return _pad(prompts, pad_id, side), _pad([[1] * len(prompt) for prompt in prompts], 0, side)


class Sampler:
    """Endless training steps over several tasks; `next()` gives the micro-batches of one step, each a list of Encoded.

    examples_by_task: task -> sequence of Encoded (anything with len and [i]). mixing: "uniform": equally many rows of
    each task (in rotation if batch_size is no multiple), "proportional": as the rows are. Every row once an epoch of
    its task (of all rows if proportional), in a new random order each time.

    tokens_per_batch: None: batch_size rows a step, read in parts of at most PART rows of similar length, which saves a
    third of the padding and changes nothing else. Otherwise rows are drawn a window ahead, sorted
    by length and cut into micro-batches of at most that many tokens, padding included, and at most half a step's rows;
    a step takes micro-batches in random order for about batch_size rows. Over a window the mixture of tasks is exact.

    `state_dict()` is a few numbers from which the same steps go on. Raises UserError for an empty task, a row longer
    than tokens_per_batch, a state of other data or settings.
    """

    WINDOW = 32  # steps
    PART = 16  # rows

    def __init__(
        self, examples_by_task: dict[str, Sequence[Encoded]], batch_size: int, seed: int,
        mixing: str = "uniform", tokens_per_batch: int | None = None,
    ):
        empty = [name for name, rows in examples_by_task.items() if not len(rows)]
        if empty or not examples_by_task:
            raise UserError(f"no training rows for {', '.join(empty) or 'any task'}; add rows or leave the task out")
        if mixing not in ("uniform", "proportional"):
            raise UserError(f"mixing {mixing!r} is unknown; use uniform or proportional")
        self.rows, self.batch_size, self.seed = examples_by_task, batch_size, seed
        self.tokens_per_batch = tokens_per_batch
        places = {name: [(name, i) for i in range(len(rows))] for name, rows in examples_by_task.items()}
        self.streams = places if mixing == "uniform" else {"all": [place for rows in places.values() for place in rows]}
        sizes = {name: len(rows) for name, rows in examples_by_task.items()}
        self.setup = {"seed": seed, "batch size": batch_size, "mixing": mixing, "tokens per batch": tokens_per_batch,
                      "rows": sizes}
        self.drawn, self.position = 0, {name: [0, 0] for name in self.streams}  # epoch, rows of it already drawn
        self.orders: dict[str, tuple[int, list[int]]] = {}
        self.window, self.taken, self.start = [], 0, self._position()  # micro-batches, used, where it was drawn
        self.real_tokens = self.padded_tokens = 0

    def next(self) -> list[list[Encoded]]:
        """The micro-batches of the next optimisation step."""
        if self.tokens_per_batch is None:
            rows = sorted(self._draw(self.batch_size), key=len)
            step = [rows[i : i + self.PART] for i in range(0, len(rows), self.PART)]
        else:
            step = [self._take()]
            while sum(map(len, step)) + len(self._peek()) // 2 <= self.batch_size:
                step.append(self._take())
        for batch in step:
            self.real_tokens += sum(map(len, batch))
            self.padded_tokens += len(batch) * max(map(len, batch))
        return step

    @property
    def padding(self) -> float:
        """Share of padding among the tokens handed out so far."""
        return 1 - self.real_tokens / max(1, self.padded_tokens)

    def state_dict(self) -> dict:
        """Where the streams stood when the window was drawn, and the number of micro-batches taken from it."""
        at = self._position() if self.tokens_per_batch is None else self.start
        return {"setup": self.setup, **at, "taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        for name, value in self.setup.items():
            if state["setup"][name] != value:
                raise UserError(f"the saved run had {name} {state['setup'][name]}, not {value}; start a new run")
        self.drawn, self.position = state["drawn"], {name: list(at) for name, at in state["position"].items()}
        self.window, self.taken, self.start = [], 0, self._position()
        if state["taken"]:
            self._peek()  # the same window again
            self.taken = state["taken"]

    def _position(self) -> dict:
        return {"drawn": self.drawn, "position": {name: list(at) for name, at in self.position.items()}}

    def _draw(self, count: int) -> list[Encoded]:
        rows, names = [], list(self.streams)
        for _ in range(count):
            name = names[self.drawn % len(names)]
            self.drawn += 1
            epoch, at = self.position[name]
            if self.orders.get(name, (None,))[0] != epoch:
                order = list(range(len(self.streams[name])))
                random.Random(f"{self.seed} {name} {epoch}").shuffle(order)
                self.orders[name] = epoch, order
            task, i = self.streams[name][self.orders[name][1][at]]
            self.position[name] = [epoch, at + 1] if at + 1 < len(self.streams[name]) else [epoch + 1, 0]
            rows.append(self.rows[task][i])
        return rows

    def _take(self) -> list[Encoded]:
        batch = self._peek()
        self.taken += 1
        return batch

    def _peek(self) -> list[Encoded]:
        """The next micro-batch; draws, sorts and cuts a new window when the old one is used up."""
        if self.taken == len(self.window):
            self.start, self.taken, self.window = self._position(), 0, []
            rng = random.Random(f"{self.seed} window {self.drawn}")
            rows = sorted(self._draw(self.WINDOW * self.batch_size), key=len, reverse=True)
            if len(rows[0]) > self.tokens_per_batch:
                raise UserError(f"a row of {rows[0].task} has {len(rows[0])} tokens, more than --tokens-per-batch "
                                f"{self.tokens_per_batch}; raise it or lower --max-length")
            while rows:
                size = min(self.tokens_per_batch // len(rows[0]), max(1, self.batch_size // 2))
                self.window.append(rows[:size])
                rows = rows[size:]
            rng.shuffle(self.window)
        return self.window[self.taken]


# --------------------------------------------------------------------------------------------------------------------
# The page about the data


def page(name: str, root: str | None = None, seed: int = 0, colour: bool = False) -> str:
    """What a user looks at first: counts, dropped rows, lengths, balance of answers, an example, rewritten rows."""

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    def counts(numbers: dict, total: int = 0) -> str:
        most = sorted(numbers.items(), key=lambda item: -item[1])
        shown = (f"{key} {100 * n / total:.0f} %" if total else f"{n} {key}" for key, n in most[:10])
        return ", ".join(shown) + (f" and {len(most) - 10} more" if len(most) > 10 else "") if most else "none"

    def spread(lengths: Iterable[int]) -> str:
        ordered = sorted(lengths)
        middle, most = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
        return f"{middle} (median), {most} (95 %), {ordered[-1]} (longest)"

    def indented(text: str) -> str:
        return "\n".join("    " + line for line in text.split("\n"))

    splits = load_splits(name, root)
    rows = splits.train + splits.dev + splits.test
    task, report = task_of(name, rows), splits.report
    rewritten = [perturb(example, seed) for example in splits.test]
    changed = [(old, new) for old, new in zip(splits.test, rewritten) if new.operations]
    done = Counter(operation for _, new in changed for operation in new.operations)
    example = sorted(splits.test, key=lambda e: len(e.prompt))[len(splits.test) // 4]
    lines = [
        f"{name}: {task.role} task, {task.kind}, scored by {task.metric}, from {report['source']}",
        f"  rows        {len(splits.train)} train, {len(splits.dev)} dev (cut from train), {len(splits.test)} test",
        *(f"  left out    of {report['read'][split]} {split} rows: {counts(dropped)}"
          for split, dropped in report["dropped"].items()),
        *(f"  note        {note}" for note in report["notes"]),
        f"  characters  prompt and answer {spread(len(e.prompt) + len(e.answer) for e in rows)}",
    ]
    if task.kind == "span":
        lines.append(f"              answer {spread(len(e.answer) for e in rows)}; up to "
                     f"{max(len(e.references) for e in rows)} right answers a row")
    else:
        lines.append(f"  answers     {counts(Counter(e.answer for e in splits.train), len(splits.train))}")
    lines += [f"  example     {example.row}", indented(paint(example.prompt, "36")),
              f"  answer      {paint(example.answer, '1;32')}"]
    lines.append(f"  rewritten   {100 * len(changed) / len(splits.test):.0f} % of the test rows: {counts(done)}")
    for old, new in changed[:1]:
        for (field, *at), (_, *to) in zip(old.fields or [("prompt", 0, None)], new.fields or [("prompt", 0, None)]):
            if old.prompt[slice(*at)] != new.prompt[slice(*to)]:
                lines.append(indented(f"{field}: {old.prompt[slice(*at)]}\n    -> {new.prompt[slice(*to)]}"))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(prog="data.py", description="Show the tasks: one page each.")
    parser.add_argument("--data-root", help="folder with <task>/train.jsonl and test.jsonl (default: the micro-world)")
    parser.add_argument("--task", nargs="+", help="only these tasks; without --data-root from the hub")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rewriting")
    options = parser.parse_args(argv)
    root, names = options.data_root, options.task or list(toy.SOURCES + toy.TARGETS)
    if root and not options.task:
        if not Path(root).is_dir():
            raise UserError(f"--data-root {root} is no folder; it should hold <task>/train.jsonl and test.jsonl")
        found = {path.name for path in Path(root).iterdir() if path.is_dir()}
        names = [name for name in TASKS if name in found] + sorted(found - set(TASKS))
        if not names:
            raise UserError(f"--data-root {root} holds no folder; it should hold <task>/train.jsonl and test.jsonl")
    for name in names:
        print(page(name, root, options.seed, colour=sys.stdout.isatty()) + "\n")


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
