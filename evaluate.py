r"""Predictions, scores, tables, pictures, and a look into a finished run.

    python evaluate.py --run runs/toy                   its tables again
    python evaluate.py --run runs/toy --task toy-amazon --ask "ann found the soup very awful at the oslo cafe"
    python evaluate.py --adapter FOLDER --task toy-amazon --ask "ann found the soup very awful"         without the run
    python evaluate.py --diagnose runs/toy              what the adapter does: gates, prompts, cosines

Results have one shape everywhere, scores[task][column][rows][metric]: a column is a method ("talora") or what it is
compared with ("majority"); rows are "plain", the test rows as they are, or "rewritten", the same in other words.

B batch, T text tokens, C choices, L layers, n tasks, P prompt length, d model width.
"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import data
from checkpoint import Parser, UserError, pick_device, read_json, run_program, write_whole
from data import Encoded, Example, task_of
from model import NO_TASK, AdaptedLM, TALoRA, load_backbone
from tasks.chinese import Task, fill_template, letter_options
from tasks.metrics import NAMES, accuracy, char_f1, exact_match, macro_f1, majority, micro_f1

# ---------------------------------------------------------------------------------------- predictions and scores

def predict(model: AdaptedLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task_id: int, cfg,
            says: str = "answering") -> list[str]:
    """The model's answers to examples of one task, as `respond` gives them; says: for the progress bar."""
    return [text for text, _ in respond(model, tokenizer, examples, [task_id] * len(examples), cfg, says)]


def respond(model: AdaptedLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task_ids: Sequence[int],
            cfg, says: str = "answering") -> list[tuple[str, dict[str, float]]]:
    """For every example its answer, and p(choice | prompt) of every choice. Of choices the answer is the whole one with
    the highest probability, end token included; otherwise the greedy continuation up to the first end token. Tasks
    may be mixed. cfg: max_length, max_new_tokens, chat_template, eval_tokens."""
    chat = cfg.chat_template == "on"
    rows = [data.encode(example, tokenizer, cfg.max_length, False, chat) for example in examples]
    found: list = [None] * len(rows)
    ends = {data.frame_of(tokenizer, chat).end, tokenizer.eos_token_id, *model.end_tokens}
    batches = length_batches(rows, cfg.eval_tokens)
    for part in tqdm(batches, says, leave=False, disable=None):
        ids, mask = (t.to(model.device) for t in data.collate_prompts([rows[i] for i in part]))  # (B, T) x 2
        tasks = torch.tensor([task_ids[i] for i in part])
        if examples[part[0]].choices:
            scores = model.score(ids, mask, tasks, [rows[i].choice_ids for i in part])  # (B, C)
            for i, best, row in zip(part, scores.argmax(1).tolist(), scores.exp().tolist()):
                found[i] = examples[i].choices[best], dict(zip(examples[i].choices, row))
        else:
            new = model.generate(ids, mask, tasks, cfg.max_new_tokens)[:, -cfg.max_new_tokens:]
            for i, tokens in zip(part, new.tolist()):
                end = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
                found[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip(), {}
    return found


def length_batches(rows: Sequence[Encoded], tokens: int) -> list[list[int]]:
    """Indices of rows, sorted by length and cut where a batch with its padding would exceed `tokens` tokens; those with
    choices apart. A row is as long as its prompt and all its choices, which are read behind it."""
    lengths, batches = [len(row.prompt_ids) + sum(map(len, row.choice_ids)) for row in rows], []
    for i in sorted(range(len(rows)), key=lambda i: (not rows[i].choice_ids, -lengths[i])):
        first = batches[-1][0] if batches else i
        if not batches or (len(batches[-1]) + 1) * lengths[first] > tokens or (
                bool(rows[first].choice_ids) != bool(rows[i].choice_ids)):
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def dev_score(model: AdaptedLM, dev: dict[str, list[Encoded]], task_ids: dict[str, int],
              tokens: int = 8192) -> tuple[float, float]:
    """The share of rows that greedy decoding would answer exactly, and the mean loss; means over tasks of means over
    rows. It takes one forward pass over prompt and answer: cheap enough to repeat during training."""
    right, loss = [], []
    model.eval()
    for task, rows in dev.items():
        outputs = []
        for part in length_batches(rows, tokens):
            batch = data.collate([rows[i] for i in part], [task_ids[task]] * len(part)).to(model.device)
            outputs.append(model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels))
        right.append(torch.cat([output.correct for output in outputs]).float().mean().item())
        loss.append(torch.cat([output.losses for output in outputs]).mean().item())
    return sum(right) / len(right), sum(loss) / len(loss)


def score_task(task: str, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """All metrics of a task; "score" repeats the one that its entry in the table of tasks names as its metric."""
    entry = task_of(task, examples)
    golds = [example.references or (example.answer,) for example in examples]
    if entry.kind == "span":
        pairs = list(zip(predictions, golds, strict=True))
        scores = {metric.__name__: sum(metric(prediction, gold) for prediction, gold in pairs) / len(pairs)
                  for metric in (exact_match, char_f1)}
    else:
        scores = {"accuracy": accuracy(predictions, golds)}
        if entry.metric == "micro_f1":
            scores |= {"micro_f1": micro_f1(predictions, golds), "macro_f1": macro_f1(predictions, golds)}
        if entry.positive:  # the F1 of one of two answers
            others = [answer for answer in entry.answers if answer != entry.positive]
            scores["f1_positive"] = micro_f1(predictions, golds, left_out=others)
    return {"score": scores[entry.metric]} | scores


# --------------------------------------------------------------------------------------------------------- tables

def macro(scores: dict, column: str, rows: str = "plain", metric: str = "score") -> float:
    """The mean of the tasks' scores in a column; nan if a task has none, as means over different tasks say little."""
    found = [columns[column][rows][metric] for columns in scores.values() if rows in columns.get(column, {})]
    return sum(found) / len(found) if len(found) == len(scores) else math.nan


def table(scores: dict, metrics: dict[str, str], rows: str = "plain") -> str:
    """scores[task][column][rows] in percent, one line a task and their mean; metrics[task] names the score. Relations
    have a second line with their accuracy."""
    columns = list(dict.fromkeys(name for by in scores.values() for name in by if rows in by[name]))
    parts = []
    for task in scores:
        parts.append((task, NAMES.get(metrics[task], metrics[task]), {task: scores[task]}, "score"))
        if metrics[task] == "micro_f1":
            parts.append((task, "accuracy", {task: scores[task]}, "accuracy"))
    parts.append(("macro average", "", scores, "score"))
    lines = [[name, metric, *(f"{100 * macro(part, column, rows, key):.1f}".replace("nan", "") for column in columns)]
             for name, metric, part, key in parts]
    return markdown(["task", "metric", *columns], lines, align="<<" + ">" * len(columns), pad=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "", pad: bool = False) -> str:
    """A table in Markdown. align: "<" or ">" for each column (default: "<>>.."); pad: columns of one width."""
    align = align or "<" + ">" * (len(head) - 1)
    rules = ["---" if side == "<" else "---:" for side in align]
    widths = [max(len(row[i]) for row in (head, rules, *rows)) if pad else 0 for i in range(len(head))]
    rules = [f"{rule:-{side}{width}}" for rule, side, width in zip(rules, align, widths)]
    lines = (" | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths))
             for row in (head, rules, *rows))
    return "".join(f"| {line} |\n" for line in lines)


# ----------------------------------------------------------------------------- test rows, and what to compare with

def score_rows(model: AdaptedLM, tokenizer: PreTrainedTokenizerBase, task: str, task_id: int, cfg,
               tests: dict[str, list[Example]] | None = None) -> dict[str, dict[str, float]]:
    """The model's scores on the test rows of a task (or on `tests`), {rows: {metric: value}}."""
    return {rows: score_task(task, predict(model, tokenizer, some, task_id, cfg, f"{task}, {rows} rows"), some)
            for rows, some in (tests or data.test_rows(task, cfg)).items()}


def references(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str,
               cfg) -> dict[str, dict[str, dict[str, float]]]:
    """Columns to compare a method with, {column: {rows: {metric: value}}}: "majority", the most frequent answer of the
    train rows; with cfg.references also "frozen backbone", with nothing learned (and, in a run with a chat template,
    "frozen, no template", without it); where rows have such a prompt, "hard instruction": told in words what to do."""
    tests = data.test_rows(task, cfg)
    usual = majority([example.answer for example in data.load_task(task, "train", cfg.data_root)])
    columns = {"majority": {rows: score_task(task, [usual] * len(some), some) for rows, some in tests.items()}}
    if cfg.references:
        frozen = AdaptedLM(backbone)
        columns["frozen backbone"] = score_rows(frozen, tokenizer, task, NO_TASK, cfg, tests)
        if cfg.chat_template == "on":
            plain = SimpleNamespace(**{**vars(cfg), "chat_template": "off"})
            columns["frozen, no template"] = score_rows(frozen, tokenizer, task, NO_TASK, plain, tests)
        if all(example.hard_prompt for example in tests["plain"]):
            told = {rows: [replace(row, prompt=row.hard_prompt) for row in some] for rows, some in tests.items()}
            columns["hard instruction"] = score_rows(frozen, tokenizer, task, NO_TASK, cfg, told)
    return columns


def test_stage(run, model: AdaptedLM, folder: Path, ids: dict[str, int], held: list[Example] | None) -> dict:
    """Answer the test rows of the tasks in ``ids``: what results.json says of them, and every answer to a plain row in
    predictions.jsonl. run: train.Run; held: the development rows of a few-shot target."""
    cfg, lines, found, answered = run.cfg, [], {}, {}
    for task, task_id in ids.items():
        tests = data.test_rows(task, cfg)
        entry = task_of(task, tests["plain"])
        dev = (held or data.load_task(task, "dev", cfg.data_root)[: cfg.dev_rows])[:64]
        if task not in run.references:
            run.references[task] = references(run.backbone, run.tokenizer, task, cfg)
            if task not in cfg.sources and isinstance(model, TALoRA):  # what a target is before its first example
                alone = score_rows(model, run.tokenizer, task, NO_TASK, cfg, tests)
                run.references[task]["theta0 (k = 0)"] = alone
        answers = {rows: predict(model, run.tokenizer, some, task_id, cfg, f"{task}, {rows} rows")
                   for rows, some in (tests | {"dev": dev}).items()}
        own = {rows: score_task(task, answers[rows], some) for rows, some in tests.items()}
        dev_right = score_task(task, answers["dev"], dev)["score"]
        run.log(f"{task}: {dev_right:.1%} on {len(dev)} development rows, scored as test rows are")
        changed = sum(bool(row.operations) for row in tests.get("rewritten", ()))
        for key, value in {"scores": run.references[task] | {run.method.name: own},
                           "metrics": entry.metric, "warnings": run.warnings[task],
                           "rewritten": changed / len(tests["plain"]),  # the share that could be
                           "dev_as_test": {"score": dev_right, "rows": len(dev)}}.items():
            found.setdefault(key, {})[task] = value
        answered[task] = list(zip(tests["plain"], answers["plain"]))
        for row, said in answered[task]:
            golds = row.references or (row.answer,)
            right = said in golds if row.choices else bool(exact_match(said, golds))
            lines.append(dict(task=task, prompt=row.prompt, answer=row.answer, prediction=said, right=right))
            lines[-1] |= {"choices": row.choices} if entry.kind == "choice" else {}
    with write_whole(folder / "predictions.jsonl") as file:
        file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
    if cfg.references:
        run.log(show_answers(run, answered))
    return found


def show_answers(run, answered: dict[str, list[tuple[Example, str]]]) -> str:
    """Three of the rows that the model answered, {task: [(row, answer)]}, and what the frozen backbone says."""
    lines = []
    for n, task in enumerate((list(answered) * 3)[:3]):
        row, said = answered[task][n % len(answered[task])]
        frozen, = predict(AdaptedLM(run.backbone), run.tokenizer, [row], NO_TASK, run.cfg)
        lines += [f"{task}: {data.shorten(row.prompt, 90)}", f"    right: {row.answer}   frozen backbone: "
                  f"{frozen or '(nothing)'}   {run.method.name}: {said or '(nothing)'}"]
    return "\n".join(["three test rows:", *lines])


# ------------------------------------------------------------- pictures; those that take an axis serve others as well

# Okabe's and Ito's colours, which colour-blind readers can tell apart, and line styles for readers in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("o-", "s--", "^-.", "v:", "D-", "x--")  # not as many as colours: pairs repeat after 42
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC")


@contextmanager
def new_figure(path: Path, columns: int = 1, size: tuple[float, float] = (6, 3.5), **options):
    """A figure and its axes, side by side, saved as `path` at the end of the with block; no display needed."""
    from matplotlib.figure import Figure  # slow to import, and most programs draw nothing

    figure = Figure(figsize=size, layout="compressed")
    yield figure, figure.subplots(1, columns, **options)
    with write_whole(path) as file:
        figure.savefig(file, dpi=130, format="png")


def label_tasks(names: Sequence[str], path: Path, log: Callable[[str], None] = print) -> list[str]:
    """Task names as the picture can show them: what matplotlib's font lacks comes from the first of CHINESE_FONTS that
    is installed; the n-th name is "task n" if neither has all its characters, and the log says so."""
    from matplotlib import font_manager, get_cachedir, rcParams

    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in font_manager.get_font_names())][:2]
    rcParams["font.family"] = fonts  # a character is drawn in the first font that has it
    files = [font_manager.findfont(font_manager.FontProperties(family=[font])) for font in fonts]
    known = {chr(code) for file in files for code in font_manager.get_font(file).get_charmap()}
    if numbered := {name: f"task {n}" for n, name in enumerate(names, 1) if not known.issuperset(name)}:
        log(f"{path}: no font has the characters of {numbered}; install Noto Sans CJK and delete {get_cachedir()}")
    return [numbered.get(name, name.replace("$", r"\$")) for name in names]  # $ would begin a formula


def read_metrics(folder: Path) -> list[dict]:
    """The rows that training logged into a stage's folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def draw_run(folder: Path, log: Callable[[str], None] = print) -> None:
    """Draw a stage from its metrics.jsonl: loss.png, and gates.png and cosines.png if the stage changed them."""
    rows = read_metrics(folder)
    steps, dev, gates, cosines = ([r for r in rows if key in r] for key in ("loss", "dev_loss", "gates", "cosines"))
    if steps:
        with new_figure(folder / "loss.png") as (figure, axis):
            at, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
            wide = [min(i // 5, len(at) // 15) for i in range(len(at))]  # less where the loss falls fast
            means = [fmean(losses[i - n : i + n + 1]) for i, n in enumerate(wide)]
            axis.semilogy(at, losses, ".", markersize=4, color=COLOURS[5], label="training, single batches")
            axis.semilogy(at, means, color=COLOURS[0], label="training, running mean")
            at, losses = [r["step"] for r in dev], [r["dev_loss"] for r in dev]
            axis.semilogy(at, losses, "s--", color=COLOURS[1], label="development")
            axis.set(xlabel="step", ylabel="cross-entropy of an answer token (nats)", title="Task loss")
            axis.legend()
    if gates and gates[0]["gates"] != gates[-1]["gates"]:
        with new_figure(folder / "gates.png", size=(7, 3 + 0.13 * len(gates[0]["gates"]))) as (figure, axis):
            figure.colorbar(gates_over_steps(axis, gates), label="tanh g")
    adapter = folder / "best" / "adapter.json"  # not there for a target, which begins as a copy of a source
    if cosines and cosines[0]["cosines"] != cosines[-1]["cosines"] and adapter.exists():
        about = read_json(adapter)
        sizes = (about["config"]["rank"], about["backbone"]["hidden_size"]) if "talora" in about["method"] else ()
        draw_cosines(folder / "cosines.png", cosines[0], cosines[-1], sizes, log)


def gates_over_steps(axis, rows: Sequence[dict]):
    """tanh g of every layer (up) at every logged step (across) -> the image, for a colorbar. Its sign is seen twice: as
    a colour, and as a line above the layer's zero line or below it. Numbers at the right: after the last step."""
    by_step = {row["step"]: row["gates"] for row in rows}
    by_layer, top = list(zip(*by_step.values())), max(abs(gate) for gates in by_step.values() for gate in gates) or 1
    image = axis.pcolormesh(list(by_step), range(len(by_layer)), by_layer, shading="nearest", cmap="RdBu", alpha=0.7,
                            vmin=-top, vmax=top)
    for layer, line in enumerate(by_layer):
        axis.axhline(layer, color="gray", linewidth=0.5)
        axis.plot(list(by_step), [layer + 0.45 * gate / top for gate in line], color="black", linewidth=1)
        axis.text(1.01, layer, f"{line[-1]:+.2f}", va="center", fontsize="small", transform=axis.get_yaxis_transform())
    axis.set(xlabel="step", ylabel="layer", yticks=range(0, len(by_layer), 1 + len(by_layer) // 12),
             title="Gates: blue, line above zero: adds the prompt; red, below: subtracts it")
    return image


def draw_cosines(path: Path, first: dict, last: dict, sizes: Sequence[int] = (), log: Callable = print) -> None:
    """Draw |cos(A_i, A_j)|, the mean over layers, before and after training; first, last: rows of metrics.jsonl.
    sizes: r and d, to mark what random tasks have, E|cos u| E|cos v|, about sqrt(2 / (pi r)) sqrt(2 / (pi d))."""
    level = 2 / math.pi / math.prod(sizes) ** 0.5 if sizes else math.nan
    top = max(c for row in (first, last) for i, line in enumerate(row["cosines"]) for j, c in enumerate(line) if i != j)
    names = label_tasks(first["tasks"], path, log)
    with new_figure(path, 2, (10, 5), sharey=True) as (figure, axes):
        for axis, row, when in zip(axes, (first, last), ("before", "after")):
            image = cosine_matrix(axis, names, row["cosines"], max(top, level))
            axis.set_title(f"{when} training (step {row['step']})")
        label = "|cos| of two tasks (1: the same direction), mean over layers"
        label += f"\nwhite: random tasks, about {level:.2g}" if sizes else ""
        figure.colorbar(image, ax=axes, label=label).ax.axhline(level, color="white", linewidth=3)


def cosine_matrix(axis, names: Sequence[str], cosines: Sequence[Sequence[float]], top: float | None = None):
    """A heat map of the cosines of every two tasks, the diagonal left white -> the image, for a colorbar."""
    others = [[c if i != j else math.nan for j, c in enumerate(line)] for i, line in enumerate(cosines)]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    return axis.imshow(others, cmap="viridis", vmin=0, vmax=top)


# ----------------------------------------------------------------------------------------- questions to an adapter

def answer(model: AdaptedLM, tokenizer: PreTrainedTokenizerBase,
           questions: Sequence[tuple[str, str | dict]]) -> list[tuple[str, dict[str, float]]]:
    """Answers to (task, fields), and the probability of every choice; tasks may be mixed. fields: the text of a task
    whose template has one field, a dictionary of the template's fields (and "choices", where each row has its own), or
    a whole prompt. The adapter itself says what its tasks are (adapter.json). Raises UserError for what is missing."""
    usual = {"eval_tokens": 8192, "chat_template": "off", "max_length": 1024, "max_new_tokens": 64}
    examples = [make_question(*find_task(model, name), fields) for name, fields in questions]
    # An adapter with the same weights for all tasks does not list them.
    ids = [model.tasks.index(name) if name in model.tasks else 0 for name, _ in questions]
    return respond(model.eval(), tokenizer, examples, ids, SimpleNamespace(**usual | model.about))


def find_task(model: AdaptedLM, name: str) -> tuple[Task, list[str]]:
    """A task as adapter.json describes it, and the fields that a question to it has to give."""
    specs = model.about.get("tasks", {})
    if name not in specs:
        raise UserError(f"the adapter has no task '{name}'; it has {', '.join(specs) or 'none that it describes'}")
    task = Task(name, "own", **specs[name] | {"answers": tuple(specs[name]["answers"])})
    return task, [field for field in task.fields if field not in ("options", "choices")]


def make_question(task: Task, needed: Sequence[str], fields: str | dict) -> Example:
    """A question as an example whose answer is not known. A text, or fields["prompt"], is that of the first field, or a
    whole prompt if it begins and ends as the template does."""
    fields = {"prompt": fields} if isinstance(fields, str) else dict(fields)
    head, tail = task.template.partition("{")[0], task.template.rpartition("}")[2]
    text = fields.get("prompt", "")
    if text and needed and not (text.startswith(head) and text.endswith(tail)):
        fields[needed[0]] = fields.pop("prompt")
    choices = tuple(fields.get("choices") or task.answers)
    if "choices" in task.fields and choices and "prompt" not in fields:
        fields["choices"], choices = letter_options(choices)
    missing = [] if "prompt" in fields else [field for field in needed or ["prompt"] if field not in fields]
    if missing or (task.kind == "choice" and not choices):
        raise UserError(f"{task.name} reads {', '.join(needed) or 'a prompt'}"
                        f"{' and choices of each row' if task.kind == 'choice' else ''}; missing are "
                        f"{', '.join(missing) or 'the choices (--choices A B)'}")
    prompt, places = (fields["prompt"], ()) if "prompt" in fields else fill_template(task, fields)
    some = choices[0] if choices else "a"  # to encode: the right answer is not known
    return Example(task.name, prompt, some, choices, fields=places, row="the question")


def ask(model: AdaptedLM, tokenizer: PreTrainedTokenizerBase, name: str, texts: Sequence[str],
        choices: Sequence[str] = ()) -> str:
    """One answer in words, with the probability of every choice. texts: the fields of the template in its order."""
    _, needed = find_task(model, name)
    if len(needed) > 1 and len(texts) not in (1, len(needed)):
        raise UserError(f"{name} reads {len(needed)} texts ({', '.join(needed)}), but --ask has {len(texts)}")
    fields = dict(zip(needed, texts)) if len(texts) == len(needed) > 1 else {"prompt": " ".join(texts)}
    fields |= {"choices": choices} if choices else {}
    (text, p), = answer(model, tokenizer, [(name, fields)])
    words = data.tokens_of(tokenizer, " ".join(texts))
    unknown = words.count(tokenizer.unk_token_id)
    return "\n".join([text, *(f"{share:6.1%}  {choice}" for choice, share in p.items()),
                      *([f"{max(0.0, 1 - sum(p.values())):6.1%}  another answer"] if p else []),
                      *([f"{unknown} of {len(words)} words are unknown to the backbone"] if unknown else [])])


def open_adapter(names: Sequence[str | Path], backbone: str = "") -> tuple[TALoRA, PreTrainedTokenizerBase]:
    """Open an adapter (a folder or a hub name) on the backbone it names, or on ``backbone``, and add tasks saved alone
    -> the model and its tokenizer. Raises UserError."""
    folder = Path(names[0])
    if (folder / "task.json").exists():
        raise UserError(f"'{folder}' holds one task alone; name the adapter that it belongs to first: --adapter "
                        f"RUN/multitask/best {folder}")
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(names[0]), allow_patterns=["adapter.*"]))
        except Exception as error:  # whatever the hub or the network raises
            raise UserError(f"'{names[0]}' is neither a folder nor an adapter that the hub gives "
                            f"({' '.join(str(error).split())[:200]})") from error
    named = read_json(folder / "adapter.json").get("backbone", {})
    frozen, tokenizer = load_backbone(
        backbone or named.get("name", ""), named.get("dtype", "float32"), pick_device("auto"))
    return load_adapter([folder, *names[1:]], frozen), tokenizer


def load_adapter(folders: Sequence[str | Path], backbone: PreTrainedModel,
                 model_class: type[AdaptedLM] = TALoRA) -> AdaptedLM:
    """The adapter in the first folder, with the tasks that the other folders hold alone. Raises UserError."""
    model = model_class.load(folders[0], backbone).eval()
    for folder in folders[1:]:
        model.load_task(folder)
    return model


# ------------------------------------------------------------------------------------------------- a finished run

LEGEND = {
    "majority": "the most frequent answer of the train rows", "frozen backbone": "nothing trained",
    "frozen, no template": "nothing trained, without the chat template", "hard instruction": "told in words what to do",
    "theta0 (k = 0)": "the shared prompt alone: no example of the task",
}


def find_results(run: Path) -> list[tuple[str, Path, dict]]:
    """Every finished stage with test rows: the table that it belongs to, its folder and its results.json."""
    found = []
    for path in [*run.glob("multitask/results.json"), *sorted(run.glob("target/*/results.json"))]:
        results = read_json(path)
        name = {None: "multitask/table.md", 0: "target/table-full.md"}.get(
            results.get("shots"), f"target/table-{results.get('shots')}-shot.md")
        found.append((name, path.parent, results))
    return found


def report(run: Path, log: Callable[[str], None], asked: Sequence[Path]) -> None:
    """Save the tables of a run's finished stages, plain and rewritten test rows, and print those that the folders in
    ``asked`` belong to, with a legend and what to try next."""
    found = find_results(run)
    for name in dict.fromkeys(name for name, folder, _ in found if folder in asked):
        stages = [results for table_name, _, results in found if table_name == name]
        scores, metrics, rewritten = ({task: value for results in stages for task, value in results[key].items()}
                                      for key in ("scores", "metrics", "rewritten"))
        text = f"test rows\n\n{table(scores, metrics)}"
        if any(rewritten.values()):
            share = sum(rewritten.values()) / len(rewritten)
            text += (f"\nthe same rows, rewritten in ways that training never shows ({share:.0%} could be)\n\n"
                     f"{table(scores, metrics, 'rewritten')}")
        columns = dict.fromkeys(column for by in scores.values() for column in by)
        text += "".join(f"\n{column}: {LEGEND[column]}" for column in columns if column in LEGEND)
        with write_whole(run / name) as file:
            file.write(text.encode())
        log(f"\n{text}\nsaved as {run / name}")
    if any(folder == asked[-1] and results["method"] == "talora" for _, folder, results in found):
        row = json.loads((asked[-1] / "predictions.jsonl").read_text(encoding="utf-8").partition("\n")[0])
        choices = f" --choices {shlex.join(row['choices'])}" if "choices" in row else ""
        log(f"\ntry: python evaluate.py --run {run} --task {row['task']} --ask {shlex.quote(row['prompt'])}{choices}\n"
            f"     python evaluate.py --diagnose {run}\n"
            f"     python train.py --stage target --run {run} --shots 8 --targets TASK")


def stages_of(run: Path, task: str = "") -> dict[Path, list[Path]]:
    """Folders of the finished stages with test rows (of ``task``) -> their adapter, as `load_adapter` takes it."""
    found = find_results(run)
    tasks = dict.fromkeys(name for _, _, results in found for name in results["scores"])
    if not found:
        raise UserError(f"'{run}' holds no finished multitask or target stage; python train.py --run {run} trains one")
    if task and task not in tasks:
        raise UserError(f"the run '{run}' has no task '{task}'; it has {', '.join(tasks)}")
    return {folder: adapter_of(run, folder) for _, folder, results in found if task in ("", *results["scores"])}


def adapter_of(run: Path, folder: Path) -> list[Path]:
    """The adapter of a stage, as `load_adapter` takes it: its own, or the multitask stage's and a task saved alone."""
    alone = (folder / "best" / "task.json").exists()
    return [run / "multitask" / "best", folder / "best"] if alone else [folder / "best"]


def diagnose(folder: Path, model: TALoRA, tokenizer: PreTrainedTokenizerBase) -> str:
    """Does a stage's adapter do anything? Development rows with it and without it, its gates, its tasks' cosines."""
    cfg, tasks = SimpleNamespace(**read_json(folder / "stage.json")), read_json(folder / "results.json")["scores"]
    ids = {name: model.tasks.index(name) for name in tasks}
    rows = {task: data.encode_all(data.load_task(task, "dev", cfg.data_root)[:16], tokenizer, cfg) for task in ids}
    right, loss = dev_score(model, rows, ids, cfg.eval_tokens)
    plain_right, plain_loss = dev_score(AdaptedLM(model.backbone), rows, dict.fromkeys(ids, NO_TASK), cfg.eval_tokens)
    lines = [f"{folder}: of {sum(map(len, rows.values()))} development rows {right:.1%} are right (loss "
             f"{loss:.3f}), without the adapter {plain_right:.1%} (loss {plain_loss:.3f})"]
    if loss > plain_loss - 0.01:
        lines.append("the adapter changes next to nothing: train longer, or with higher learning rates")
    logged = model.diagnose()
    norms = model.prompts(list(ids.values())).norm(dim=-1).mean((1, 2)).tolist()  # (L, n, P, d) -> (L,)
    lines += ["", "layer   tanh g  norm of a prompt row"]
    lines += [f"{layer:>5}  {gate:+7.3f}  {norm:20.2f}"
              for layer, (gate, norm) in enumerate(zip(logged["gates"], norms))]
    if "cosines" in logged:
        lines += ["", f"|cos| of every task with {', '.join(ids)}, mean over layers"]
        for task, row in zip(logged["tasks"], logged["cosines"]):
            lines.append(f"{task:16} " + " ".join(f"{row[i]:5.2f}" for i in ids.values()))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- the program

def main(argv: list[str]) -> None:
    parser = Parser(prog="evaluate.py", description="Look into a finished run, or ask an adapter.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="its tables again; with --ask: what its adapters answer")
    what.add_argument("--diagnose", type=Path, metavar="RUN", help="what its adapters do: gates, prompts, cosines")
    what.add_argument("--adapter", nargs="+", metavar="FOLDER", help="an adapter to ask: a folder or its name on the "
                      "hub, and folders of single tasks to add to it")
    parser.add_argument("--backbone", default="", help="where the backbone is now, if it has moved")
    parser.add_argument("--task", default="", help="only the stages that were tested on this task")
    parser.add_argument("--ask", nargs="+", metavar="TEXT", default=[],
                        help="with --task: answer this instead (a task that reads a pair takes two texts)")
    parser.add_argument("--choices", nargs="+", metavar="ANSWER", default=[],
                        help="with --ask: what to choose from, for a task whose rows each have their own")
    options = parser.parse_args(argv)
    asks = bool(options.task and " ".join(options.ask).strip())
    if (options.ask or options.choices or options.adapter) and (options.diagnose or not asks):
        raise UserError("a question needs --run RUN or --adapter FOLDER, --task NAME and --ask TEXT")
    if options.adapter:
        model, tokenizer = open_adapter(options.adapter, options.backbone)
        print(ask(model, tokenizer, options.task, options.ask, options.choices))
        return
    run = options.run or options.diagnose
    stages = stages_of(run, options.task)
    if options.run and not options.ask:
        report(run, print, list(stages))
        return
    first, tokenizer = open_adapter(next(iter(stages.values())), options.backbone)  # the backbone is read once
    for folder, adapter in stages.items():
        model = load_adapter(adapter, first.backbone)
        if options.ask:
            print(f"{folder} answers: {ask(model, tokenizer, options.task, options.ask, options.choices)}\n")
        else:
            print(diagnose(folder, model, tokenizer), end="\n\n")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
