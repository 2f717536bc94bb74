r"""Predictions, metrics, tables.

Metrics (first section, pure functions of strings)
    exact match   1 if the prediction equals a reference after NFKC, lower case and removal of punctuation
    character F1  the way of the CMRC 2018 script: a Chinese character is a token, a run of Latin letters or digits is a
                  token, punctuation is dropped; with m the length of the longest common *contiguous* token sequence,
                  P = m / |prediction|,  R = m / |reference|,  F1 = 2 P R / (P + R),  the best over all references.
                  (The script tokenises Latin runs with nltk and keeps ASCII punctuation; we split them by one
                  regular expression and drop it.)
    relation F1   micro and macro over the relation names, with and without the name that means "no relation".
                  Micro F1 over all names is accuracy; without "no relation" it is not.
All scores are fractions in [0, 1].
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import data
import parallel
from backbone import load_backbone
from checkpoint import atomic
from config import Config, method_of, read_options
from data import Encoded, Example, task_of
from errors import Parser, UserError, program
from frozen import FrozenLM, evaluating
from tasks import can_be_folder

# --------------------------------------------------------------------------------------------------------------------
# Metrics

DROPPED = set("-:_*^/\\~`+=,;!?()\"'<>[]{}|…。“”‘’《》〈〉·•、「」『』【】〔〕—–〜﹏")  # as they look after NFKC
TOKEN = re.compile(r"[a-z0-9]+(?:\.[a-z0-9]+)*|\S")  # "3.5" is one token


def normalize(text: str) -> list[str]:
    """Tokens that exact match and character F1 compare: "《Harry Potter》第3.5章。" -> harry potter 第 3.5 章."""
    text = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(character for character in text if character not in DROPPED)
    tokens = [token for token in TOKEN.findall(kept) if token != "."]
    return tokens or text.split()  # an answer that is nothing but punctuation is compared as it stands


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the references after `normalize`, else 0.0."""
    return float(any(normalize(prediction) == normalize(reference) for reference in references))


def char_f1(prediction: str, references: Sequence[str]) -> float:
    """Best character F1 of the prediction over the references (module docstring)."""
    return max(_f1(normalize(prediction), normalize(reference)) for reference in references)


def _f1(prediction: list[str], reference: list[str]) -> float:
    longest, previous = 0, [0] * (len(reference) + 1)
    for token in prediction:  # previous[j]: length of the common run that ends just before reference[j]
        current = [0] * (len(reference) + 1)
        for j, other in enumerate(reference):
            if token == other:
                current[j + 1] = previous[j] + 1
        longest = max(longest, *current)
        previous = current
    return 2 * longest / (len(prediction) + len(reference)) if longest else 0.0


def accuracy(predictions: Sequence[str], golds: Sequence) -> float:
    """Share of right predictions; a gold is a name, or several names where a row has several right answers."""
    return sum(p in gold for p, gold in zip(predictions, _several(golds), strict=True)) / len(golds)


def _several(golds: Sequence) -> list[Sequence[str]]:
    return [(gold,) if isinstance(gold, str) else gold for gold in golds]


def relation_f1(predictions: Sequence[str], golds: Sequence, ignore: Sequence[str] = ("无关",)) -> dict[str, float]:
    """micro_f1, macro_f1 (all names that occur) and micro_f1_known, macro_f1_known (names in `ignore` left out).

    A gold is a name, or several names where a row has several right relations: a prediction among them counts as the
    gold of that row, otherwise the first one does."""
    pairs = [(p, p if p in gold else gold[0]) for p, gold in zip(predictions, _several(golds), strict=True)]
    right, predicted, true = Counter(), Counter(), Counter()
    for prediction, gold in pairs:
        predicted[prediction] += 1
        true[gold] += 1
        right[gold] += prediction == gold

    def scores(names: list[str]) -> tuple[float, float]:
        total = sum(predicted[name] + true[name] for name in names)
        micro = 2 * sum(right[name] for name in names) / total if total else 0.0
        each = [2 * right[name] / (predicted[name] + true[name]) for name in names]
        return micro, sum(each) / len(each) if each else 0.0

    names = sorted(predicted | true)
    micro, macro = scores(names)
    micro_known, macro_known = scores([name for name in names if name not in ignore])
    return {"micro_f1": micro, "macro_f1": macro, "micro_f1_known": micro_known, "macro_f1_known": macro_known}


def majority(train_answers: Sequence[str]) -> str:
    """The most frequent answer (the first one in sorted order on a tie): the baseline that reads nothing."""
    counts = Counter(train_answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def score_task(task: str, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """All metrics of one task; "score" is the one the task table names as its metric.

    accuracy for closed sets and choices (+ relation F1s, + F1 of the positive class for AFQMC), exact_match and char_f1
    for spans."""
    spec = task_of(task, examples)
    golds = [example.references or (example.answer,) for example in examples]
    if spec.kind == "span":
        rows = list(zip(predictions, golds, strict=True))
        scores = {
            "exact_match": sum(exact_match(p, g) for p, g in rows) / len(rows),
            "char_f1": sum(char_f1(p, g) for p, g in rows) / len(rows),
        }
    else:
        scores = {"accuracy": accuracy(predictions, golds)}
        if spec.metric == "micro_f1":
            scores |= relation_f1(predictions, golds)
        if spec.name == "afqmc":  # 69 % of its pairs differ: accuracy alone says little
            positive = relation_f1(predictions, golds, ignore=("不同",))
            scores["f1_positive"] = positive["micro_f1_known"]
    return {"score": scores[spec.metric]} | scores


# --------------------------------------------------------------------------------------------------------------------
# Predictions

EVAL_TOKENS = 8192  # padded tokens of a forward pass; evaluation keeps no activations


def predict(model: FrozenLM, tokenizer, examples: Sequence[Example], task_id: int, max_length: int,
            max_new_tokens: int) -> list[str]:
    """The model's answer to every example, in order.

    Where an example has choices, the whole choice with the highest log-probability (end-of-sequence token included);
    otherwise the greedy continuation up to the end-of-sequence token. Rows of similar length share a batch.
    """
    examples = parallel.share(examples)
    rows = [data.encode(example, tokenizer, max_length, keep_answer=False) for example in examples]
    answers = [""] * len(rows)
    for part in length_batches(rows):
        closed = bool(examples[part[0]].choices)  # a task has choices in all of its rows or in none
        ids, mask = (t.to(model.device) for t in data.collate_prompts([rows[i] for i in part],
                                                                             tokenizer.pad_token_id))
        task_ids = torch.full((len(part),), task_id)
        if closed:
            scores = model.score(ids, mask, task_ids, [rows[i].choice_ids for i in part])  # (B, C)
            for i, best in zip(part, scores.argmax(1).tolist()):
                answers[i] = examples[i].choices[best]
        else:
            new = model.generate(ids, mask, task_ids, max_new_tokens)[:, -max_new_tokens:].tolist()
            for i, tokens in zip(part, new):
                end = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else None
                answers[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
    return parallel.together(answers)


def length_batches(rows: Sequence[Encoded]) -> list[list[int]]:
    """Indices of rows, sorted by length and cut where a batch would hold more than EVAL_TOKENS padded tokens.

    The length of a row is that of its prompt and of all its choices, which are read behind it.
    """
    lengths = [len(row.prompt_ids) + sum(map(len, row.choice_ids)) for row in rows]
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > EVAL_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def evaluate_tasks(model: FrozenLM, tokenizer, tests: dict[str, list[Example]], task_ids: dict[str, int],
                   cfg) -> dict[str, dict[str, float]]:
    """Every metric of every task: {task: {"score": ..., "accuracy": ...}}; tests and task_ids are by task name."""
    with progress(sum(map(len, tests.values())), "evaluating") as bar:
        scores = {}
        for task, examples in tests.items():
            answers = predict(model, tokenizer, examples, task_ids[task], cfg.max_length, cfg.max_new_tokens)
            scores[task] = score_task(task, answers, examples)
            bar.update(len(examples))
    return scores


def progress(total: int, what: str) -> tqdm:
    """A progress bar where a person is watching; it leaves nothing behind and is silent in a log file."""
    return tqdm(total=total, desc=what, leave=False, disable=None, unit="row")


def majority_scores(task: str, train: Sequence[Example], tests: Sequence[Example]) -> dict[str, float]:
    """The metrics of always giving the most frequent training answer."""
    return score_task(task, [majority([example.answer for example in train])] * len(tests), tests)


@torch.no_grad()
def dev_score(model: FrozenLM, dev: dict[str, list[Encoded]], task_ids: dict[str, int]) -> tuple[float, float]:
    """Share of rows that greedy decoding would answer exactly, and mean loss; a mean over tasks of a mean over rows.

    One forward pass over prompt and answer, so it is cheap enough to repeat during training.
    """
    right, loss = [], []
    with evaluating(model):
        for task, rows in dev.items():
            outputs = []
            for part in length_batches(rows):
                batch = data.collate([rows[i] for i in part], [task_ids[task]] * len(part), 0).to(model.device)
                outputs.append(model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels))
            right.append(torch.cat([o.correct for o in outputs]).float().mean().item())
            loss.append(torch.cat([o.losses for o in outputs]).mean().item())
    return sum(right) / len(right), sum(loss) / len(loss)


# --------------------------------------------------------------------------------------------------------------------
# Tables

def macro(column: dict[str, dict[str, float]]) -> float:
    """Mean of the tasks' scores, every task counting the same."""
    return sum(scores["score"] for scores in column.values()) / len(column)


def table(columns: dict[str, dict[str, dict[str, float]]], metrics: dict[str, str]) -> str:
    """A markdown table in percent: one row a task and their mean, one column a method.

    columns[method][task] are the task's scores, metrics[task] the name of the one that counts.
    """
    tasks = list(next(iter(columns.values())))
    width = max(map(len, [*tasks, "macro average"]))
    lines = [f"| {'task':{width}} | metric      | " + " | ".join(columns) + " |",
             f"|{'-' * (width + 2)}|-------------|" + "|".join("-" * (len(c) + 1) + ":" for c in columns) + "|"]
    for task in tasks:
        cells = [f"{100 * column[task]['score']:{len(name)}.1f}" for name, column in columns.items()]
        lines.append(f"| {task:{width}} | {metrics[task]:11} | " + " | ".join(cells) + " |")
    cells = [f"{100 * macro(column):{len(name)}.1f}" for name, column in columns.items()]
    return "\n".join([*lines, f"| {'macro average':{width}} | {'':11} | " + " | ".join(cells) + " |"]) + "\n"


# --------------------------------------------------------------------------------------------------------------------
# One finished run

class Trained:
    """A stage of a finished run, opened: its options, backbone, tokenizer and, for each task, its adapter."""

    def __init__(self, folder: Path):
        """folder: a stage's, such as runs/toy/multitask. Raises UserError if no finished stage is there."""
        self.cfg = Config(**read_options(folder))
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            if results.get("stage") in ("base", "pretrain"):
                raise UserError(f"its stage, {results['stage']}, has no test rows")
            first = next(iter(results["columns"].values()))
            if type(first) is not dict or not first or not all(map(can_be_folder, first)):
                raise UserError("its results.json has no scores by task")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            why = error if isinstance(error, UserError) else repr(error)
            raise UserError(f"'{folder}' is no finished stage that can be opened ({why}); give a folder that train.py "
                            "made, such as runs/toy or runs/toy/multitask") from error
        self.tasks = list(first)
        self.folder, self.method = folder, method_of(self.cfg)
        device = parallel.place(self.cfg.device) if torch.cuda.is_available() else "cpu"
        self.backbone, self.tokenizer = backbone_of(self.cfg.backbone, self.cfg.dtype, device)

    @cache  # noqa: B019 (lives as long as the program)
    def adapter(self, task: str) -> tuple[FrozenLM, int]:
        """The adapter that answers a task, and the task's id in it."""
        if task not in self.tasks:
            raise UserError(f"the run '{self.folder}' has no task '{task}'; it has {', '.join(self.tasks)}")
        own = self.folder / task  # a target has an adapter of its own, the source tasks share one
        try:
            shared = (self.folder / "best" / "adapter.json").exists() or not own.is_dir()
            folder = (self.folder if shared else own) / "best"
            model = self.method.model.load(folder, self.backbone)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.method.per_task and task not in model.tasks:
            raise UserError(f"the adapter in '{folder}' is for {', '.join(model.tasks) or 'no task'}, not for {task}; "
                            "put back the one that training left there")
        return model.eval(), model.tasks.index(task) if self.method.per_task else 0

    def rows(self, task: str, split: str) -> list[Example]:
        return data.load_task(task, split, self.cfg.data_root or None)


backbone_of = cache(load_backbone)  # the stages of a run share it


def open_run(run: Path) -> list[Trained]:
    """The finished stages of a run's folder, or the one stage whose folder it is."""
    stages = [run] if (run / "results.json").exists() else sorted(p.parent for p in run.glob("*/table.md"))
    if not stages:
        raise UserError(f"'{run}' holds no finished stage; python train.py --run {run} makes one")
    return [Trained(stage) for stage in stages]


def evaluate_run(stage: Trained) -> str:
    """Answer all test rows again: the table, and predictions.jsonl in the stage's folder."""
    scores, cfg, path = {}, stage.cfg, stage.folder / "predictions.jsonl"
    with atomic(path) as file:
        for task in stage.tasks:
            rows, (model, task_id) = stage.rows(task, "test"), stage.adapter(task)
            answers = predict(model, stage.tokenizer, rows, task_id, cfg.max_length, cfg.max_new_tokens)
            scores[task] = score_task(task, answers, rows)
            for row, answer in zip(rows, answers):
                gold = row.references or (row.answer,)
                right = answer in gold if row.choices else bool(exact_match(answer, gold))
                line = {"task": task, "prompt": row.prompt, "answer": row.answer, "prediction": answer, "right": right}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    metrics = {task: task_of(task, stage.rows(task, "test")).metric for task in stage.tasks}
    return table({cfg.variant or cfg.method: scores}, metrics) + f"every answer: {path}\n"


def ask(stage: Trained, task: str, texts: Sequence[str], choices: Sequence[str] = ()) -> str:
    """One input from the shell: the answer, and the probability of every choice.

    texts: the fields of the task's template in its order; for a task without a template its whole prompt. choices:
    answers to choose from, where they are other ones in every row. Raises UserError for other numbers of texts, and
    for choices that are missing.
    """
    if not all(text.strip().removesuffix("=>").strip() for text in texts):
        raise UserError("--ask has an empty text; give the words that are asked about")
    model, task_id = stage.adapter(task)
    rows, most = stage.rows(task, "test"), stage.cfg.max_length
    spec = task_of(task, rows)
    choices = tuple(choices) or spec.answers
    if spec.template:
        names = [name for name in spec.fields if name != "options"]
        if len(texts) != len(names):
            raise UserError(f"{task} reads {len(names)} texts ({', '.join(names)}), but --ask has {len(texts)}")
        prompt, _ = data.fill(spec.template, {**dict(zip(names, texts)), "options": "、".join(spec.answers)})
        if spec.kind == "choice":  # lettered options, one a line
            choices = tuple(string.ascii_uppercase[: texts[names.index("choices")].count("\n") + 1])
    else:
        if rows[0].choices and not choices:
            raise UserError(f"every text of {task} has choices of its own; name those of this one, as in --choices "
                            + shlex.join(rows[0].choices))
        prompt = " ".join(texts) + " =>" * (rows[0].prompt.endswith(" =>") and not texts[-1].endswith("=>"))
    example = Example(task, prompt, (*choices, rows[0].answer)[0], choices)
    try:
        row = data.encode(example, stage.tokenizer, most, keep_answer=False)
    except UserError as error:
        raise UserError(f"the text of --ask is too long: with its answer it may have {most} tokens, as in training; "
                        "shorten it") from error
    unknown = row.prompt_ids.count(stage.tokenizer.unk_token_id) if stage.tokenizer.unk_token_id is not None else 0
    note = f"\n{unknown} of {len(row.prompt_ids)} words are not in the backbone's vocabulary" * bool(unknown)
    if not choices:
        return predict(model, stage.tokenizer, [example], task_id, most, stage.cfg.max_new_tokens)[0] + note
    ids, mask = (t.to(model.device) for t in data.collate_prompts([row], stage.tokenizer.pad_token_id))
    scores = model.score(ids, mask, torch.tensor([task_id]), [row.choice_ids])[0].exp()  # (C,) p(choice | prompt)
    best, width = int(scores.argmax()), max(map(len, choices))
    lines = [f"{choice:{width}}  {p:6.1%}{'  <-' if i == best else ''}"
             for i, (choice, p) in enumerate(zip(choices, scores.tolist()))]
    lines.append(f"{'another':{width}}  {max(0.0, 1 - float(scores.sum())):6.1%}{note}")
    return "\n".join([choices[best], "", *lines])


def diagnose(stage: Trained) -> str:
    """Does the adapter do anything? Development rows with and without it; of prompts behind gates also the gates, the
    size of the prompts, the rows with one layer's gate closed, and the cosines of the tasks."""
    rows = {task: [data.encode(e, stage.tokenizer, stage.cfg.max_length, False) for e in stage.rows(task, "dev")[:16]]
            for task in stage.tasks}

    def dev(closed: int | None = None) -> tuple[float, float]:
        """dev_score as a mean over the tasks; closed: a layer whose gates are shut."""
        found = []
        for task in stage.tasks:
            model, task_id = stage.adapter(task)
            gates = [p for name, p in model.named_parameters() if name.startswith("gate") and closed is not None]
            before = [gate.detach().clone() for gate in gates]
            with torch.no_grad():
                [gate[closed].zero_() for gate in gates]
                found.append(dev_score(model, {task: rows[task]}, {task: task_id}))
                [gate.copy_(old) for gate, old in zip(gates, before)]
        return tuple(statistics.mean(column) for column in zip(*found))

    on, adapters = dev(), [stage.adapter(task) for task in stage.tasks]  # the sources' is one and the same
    model = adapters[0][0]
    off = dev_score(FrozenLM(stage.backbone, model.config), rows, dict.fromkeys(rows, -1))
    lines = [f"{stage.folder}: of {sum(map(len, rows.values()))} development rows {on[0]:.1%} are right (loss "
             f"{on[1]:.3f}), without the adapter {off[0]:.1%} (loss {off[1]:.3f})"]
    if on[1] > off[1] - 0.01:
        lines.append("the adapter changes next to nothing: train longer, or at higher rates")
    looks = model.diagnose()
    if "gates" in looks:
        gates = torch.tensor([one.diagnose()["gates"] for one, _ in adapters]).mean(0)  # (L,)
        norms = torch.stack([one.prompts([i])[:, 0].norm(dim=-1).mean(-1) for one, i in adapters]).mean(0)  # (L,)
        lines += ["", "means over the tasks",
                  "layer  |tanh g|  norm of a prompt row  right if this layer's gate is closed"]
        for layer, (gate, norm) in enumerate(zip(gates.tolist(), norms.tolist())):
            right, loss = dev(layer)
            lines.append(f"{layer:>5}  {gate:8.3f}  {norm:20.2f}  {right:7.1%} (loss {loss:.3f})")
    if "cosines" in looks and set(stage.tasks) <= set(model.tasks):
        lines += ["", "|cos| between tasks, mean over layers"]
        for task, row in zip(model.tasks, looks["cosines"]):
            lines.append(f"{task:16} " + " ".join(f"{c:5.2f}" for c in row))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The program

def main(argv: list[str]) -> None:
    parser = Parser(prog="evaluate.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run or one of its stages: answer its test rows, save the answers")
    parser.add_argument("--ask", nargs="+", metavar="TEXT", help="with --run and --task: answer one input (a task that "
                        "reads a pair takes two texts)")
    parser.add_argument("--task", help="the task of --ask")
    parser.add_argument("--choices", nargs="+", default=(), metavar="ANSWER",
                        help="with --ask: the answers to choose from, for a task whose texts each have their own")
    parser.add_argument("--diagnose", type=Path, metavar="RUN", help="what the adapter does: gates, prompts, cosines")
    parser.add_argument("--suite", metavar="NAME", help="run the experiment of this name (suite.py): quick, full")
    parser.add_argument("--jobs", type=int, default=2, help="cells of the suite at a time, one thread each")
    parser.add_argument("--out", help="folder for the suite's results (default: results/NAME); what stands behind -- "
                        "are options of train.py for all its runs")
    at = argv.index("--") if "--" in argv else len(argv)
    options, more = parser.parse_args(argv[:at]), argv[at:]
    if not (options.run or options.diagnose or options.suite) or bool(options.ask) != bool(options.task):
        raise UserError("say what to do: --run RUN, --run RUN --ask TEXT --task NAME, --diagnose RUN or --suite NAME")
    if options.choices and not options.ask:
        raise UserError("--choices needs the text that is asked about: --ask TEXT")
    if options.ask and not options.run:
        raise UserError("--ask needs the run that is to answer: --run RUN")
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}, but must be at least 1")
    if (more or options.out) and not options.suite:
        raise UserError(f"{'--out' if options.out else ' '.join(more)} is for --suite NAME only; leave it out")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.ask:
        stages = open_run(options.run)
        stage = next((stage for stage in stages if options.task in stage.tasks), stages[0])
        print(f"{stage.folder} answers: {ask(stage, options.task, options.ask, options.choices)}")
    elif options.run:
        for stage in open_run(options.run):
            print(evaluate_run(stage))
    if options.diagnose:
        for stage in open_run(options.diagnose):
            print(diagnose(stage) + "\n")
    if options.suite:  # a program of its own: it starts train.py, which needs this file
        command = [sys.executable, str(Path(__file__).parent / "suite.py"), options.suite, "--jobs", str(options.jobs)]
        os.execv(sys.executable, [*command, *(["--out", options.out] if options.out else []), *more])


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
