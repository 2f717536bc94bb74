r"""The stages of TA-LoRA and the one loop that runs them.

    base        theta0 and the gates, on one source task
    multitask   B, all u_i and v_i, the gates (from zero again) and, slowly, theta0, on the source tasks
    target      u, v of one target task at a time, on k examples or all; everything shared is frozen
    pretrain    a small backbone from scratch, where there is none to download (pretrain.py)

In every stage a step minimises

    loss = L_PLM + lambda * R(A_1 .. A_N)                                                               Eq. (3)

where L_PLM is the cross-entropy of the answer's tokens, averaged within an example and then over the examples of the
step, and R is the orthogonality of the task matrices (multitask stage only). The shared weights and the weights of a
task learn at different rates:

    slow: theta0, B          fast: u_i, v_i, gate                                                       Eq. (5)

    python train.py --stage multitask                       the embedded micro-world, minutes on a laptop
    python train.py --stage target --shots 32               eight new tasks from 32 examples each
    python train.py --preset qwen2.5-7b --stage all         the paper's run
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
import transformers

import data
import evaluate
import figures
import parallel
import pretrain
from backbone import load_backbone
from baselines import InputPrompts, Method
from checkpoint import Lock, Signals, atomic, load_checkpoint, naming, read_json, save_checkpoint, write_json
from config import (
    ORDER,
    Config,
    check,
    depends,
    flag,
    method_of,
    parse,
    plan,
    read_options,
    shots_of,
    split_names,
    stage_folder,
)
from data import Batch, Encoded
from errors import RunFailed, UserError, program
from frozen import NO_TASK, FrozenLM, TALoRAConfig, describe

REWRITTEN = ", rewritten"  # ends the name of a column about rewritten rows
ALL_TASKS = "all tasks"  # the one name of methods that have one set of weights for all source tasks

# ---------------------------------------------------------------------------------------------------- the loop

def learning_tensors(model: FrozenLM, method: Method, stage: str, task_ids: list[int]) -> dict[str, str]:
    """Name of every tensor that learns in this stage -> its rate (--slow-rate and so on), by the method's table.

    Freezing, the optimizer's groups and the printed table follow it. Of the tensors that each task has one of (u.i,
    v.i) only those of ``task_ids`` learn.
    """
    rates = method.learns[stage]
    learns = {}
    for name in model.adapter_state():
        tensor, _, task = name.partition(".")
        if tensor in rates and (not task.isdigit() or int(task) in task_ids):
            learns[name] = rates[tensor]
    return learns


def build_optimizer(model: FrozenLM, learns: dict[str, str], cfg: Config) -> torch.optim.AdamW:
    """AdamW with one group per rate, and freeze everything that is in no group. Eq. (5)

    Weight decay spares the gates: pulled towards zero they would close. Each group remembers its rate as "initial".
    """
    rates = {name: getattr(cfg, f"{name}_rate") for name in ("slow", "fast", "prompt", "target")}
    groups = []
    for rate in dict.fromkeys(learns.values()):
        for decay in (True, False):
            names = [n for n in learns if learns[n] == rate and n.startswith("gate") != decay]
            if names:
                groups.append({"name": rate, "params": [model.get_parameter(n) for n in names], "lr": rates[rate],
                               "initial": rates[rate], "weight_decay": cfg.weight_decay if decay else 0.0})
    for name, p in model.named_parameters():
        p.requires_grad_(name in learns)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(learns) > 0, "a tensor in no group or in two"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """What every rate is multiplied by: rises linearly over the warm-up, then falls linearly to 0 at the end."""
    warmup = min(warmup, steps // 3)
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)


def train_step(model: FrozenLM, optimizer: torch.optim.Optimizer, batches: list[Batch], cfg: Config,
               regularise: bool) -> dict[str, float]:
    """One optimisation step over the micro-batches ``batches``; returns what it measured. Eq. (3)

    Of several processes each has its own part of the step's rows (parallel.py), perhaps none.
    Raises RunFailed, before any weight has changed, if the loss or the gradient is not finite.
    """
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    examples = parallel.total(sum(len(batch.task_ids) for batch in batches))
    optimizer.zero_grad(set_to_none=True)  # None, not 0: AdamW then leaves a task alone that nothing asks to move
    task_loss = torch.zeros((), device=model.device)
    for batch in batches:
        with autocast(cfg, model.device):
            losses = model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels).losses  # (B,)
        loss = losses.sum() / examples  # L_PLM: a mean over the examples of the whole step, however it was cut
        loss.backward()
        task_loss += loss.detach()
    parallel.sum_gradients(learning, task_loss)
    reg = torch.zeros(())
    if regularise:
        reg = model.orthogonality(cfg.regulariser)  # Eq. (4)
        if reg.requires_grad:
            (cfg.reg_weight * reg).backward()  # Eq. (3)
    norm = torch.nn.utils.clip_grad_norm_(learning, cfg.clip)
    measured = {"loss": task_loss.item(), "reg": reg.item(), "grad_norm": norm.item()}
    if not all(map(math.isfinite, measured.values())):
        tasks = sorted({model.tasks[i] if i >= 0 else "theta0 alone" for b in batches for i in b.task_ids.tolist()})
        raise RunFailed(f"the numbers went bad (loss {measured['loss']:.3g}, gradient norm {norm:.3g}) in a batch of "
                        f"{', '.join(tasks)}; no weight was changed: {lower(optimizer)}")
    optimizer.step()
    return measured


def lower(optimizer: torch.optim.Optimizer) -> str:
    """What to do about numbers that went bad."""
    rates = dict.fromkeys(f"{flag(group['name'] + '_rate')} {group['initial']:g}" for group in optimizer.param_groups)
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    return f"try lower rates ({', '.join([*rates, *[f'--weight-decay {decay:g}'] * (decay > 0)])}) in another --run"


def autocast(cfg: Config, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if cfg.autocast else nullcontext()


def fit(run: "Run", model: FrozenLM, stage: str, train: dict[str, list[Encoded]], dev: dict[str, list[Encoded]],
        task_ids: dict[str, int], folder: Path) -> None:
    """The one loop. Trains what the method's table says for this stage and keeps the best checkpoint on ``dev``.

    train, dev: encoded examples by task; task_ids: the id a task's rows are given (NO_TASK: theta0 alone). Writes
    metrics.jsonl, best/ and last/ into ``folder``, and checkpoint.pt, from which it goes on if it finds one there.
    Raises Stopped after the step in which a signal arrived, and RunFailed for numbers gone bad or a full GPU.
    """
    cfg, method, log, device = run.cfg, run.method, run.log, model.device
    steps, batch_size = getattr(cfg, f"{stage}_steps"), getattr(cfg, f"{stage}_batch")
    learns = learning_tensors(model, method, stage, list(task_ids.values()))
    optimizer = build_optimizer(model, learns, cfg)
    if stage == "multitask" and method.fresh_gates:
        for name in learns:
            if name.startswith("gate"):
                torch.nn.init.zeros_(model.get_parameter(name))  # zero-init attention warms up anew (paper: open)
    log(what_learns(model, learns, optimizer))
    sampler = data.Sampler(train, batch_size, cfg.seed, cfg.mixing, cfg.tokens_per_batch or None)
    regularise = stage == "multitask" and method.regularised
    now = {"step": 0, "best": [-1.0, -math.inf], "tokens": 0, "seconds": 0.0, "logged": 0}
    checkpoint, identity = folder / "checkpoint.pt", {"backbone": model.described, "train rows": rows_hash(train)}
    if checkpoint.exists():
        try:
            now = load_checkpoint(checkpoint, model.adapter_state(), optimizer, sampler, now, identity)
            if now["step"] > steps:
                raise ValueError(f"the checkpoint '{checkpoint}' says {now['step']} steps were done of {steps}; delete "
                                 "it to begin this stage anew")
        except ValueError as error:
            raise UserError(str(error)) from error
        log(f"{stage:9} goes on after step {now['step']} of {steps}")
    writes = parallel.RANK == 0
    metrics = open_metrics(folder / "metrics.jsonl", now["logged"], log) if writes else tempfile.TemporaryFile("w")
    started, saved = time.perf_counter() - now["seconds"], time.perf_counter()

    def record(**row):
        row = {**row, **model.diagnose()}
        with naming(folder / "metrics.jsonl"):
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
        return row

    def sound(loss=0.0):
        """Raise RunFailed rather than keep what is not finite: a step from good numbers can end in bad ones."""
        bad = [name for name in learns if not model.get_parameter(name).isfinite().all()]
        if bad or not math.isfinite(loss):
            what = f"{len(bad)} tensors, {bad[0]} first" if bad else f"the loss on development rows, {loss}"
            raise RunFailed(f"{stage}, step {now['step']}: numbers went bad ({what}), and are not saved: "
                            f"{lower(optimizer)}; the last good state is in {checkpoint}")

    def save():
        sound()
        with naming(folder / "metrics.jsonl"):
            os.fsync(metrics.fileno())
        now.update(seconds=time.perf_counter() - started, logged=os.fstat(metrics.fileno()).st_size)
        model.save(folder / "last")
        save_checkpoint(checkpoint, model.adapter_state(), optimizer, sampler, now, identity)

    parallel.same(list(model.adapter_state().values()))
    if not checkpoint.exists():
        record(step=0)
        save()
    model.train()
    while now["step"] < steps:
        step = now["step"]
        with run.signals.finishing(save):
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * rate_factor(step, steps, cfg.warmup)
            rows = sampler.next()  # micro-batches; of each one this process reads its share
            batches = [data.collate(own, [task_ids[row.task] for row in own], 0).to(device)
                       for own in map(parallel.share, rows) if own]
            try:
                measured = train_step(model, optimizer, batches, cfg, regularise)
            except (RunFailed, torch.OutOfMemoryError) as error:
                raise failed(error, stage, step, batches, cfg, checkpoint) from error
            done = now["step"] = step + 1
            now["tokens"] += sum(len(row) for part in rows for row in part)
            seconds = time.perf_counter() - started
            if done % cfg.log_every == 0 or done == steps:
                rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                row = record(step=done, **measured, rates=rates, tokens_per_s=round(now["tokens"] / seconds))
                log(f"{stage:9} {done:>5}/{steps}  {done / steps:4.0%}  loss {measured['loss']:.4f}  "
                    f"reg {measured['reg']:.5f}  " + "  ".join(f"{n} {r:.1e}" for n, r in rates.items()) +
                    (f"  |tanh g| {sum(row['gates']) / len(row['gates']):.3f}" if "gates" in row else "") +
                    f"  {now['tokens'] / seconds:,.0f} tok/s  ETA {clock(seconds / done * (steps - done))}")
            due = done % cfg.save_every == 0 or time.perf_counter() - saved > 60 * cfg.save_minutes or done == steps
            if done % cfg.eval_every == 0 or done == steps:
                right, loss = evaluate.dev_score(model, dev, task_ids)
                sound(loss)
                record(step=done, dev_accuracy=right, dev_loss=loss)
                if [right, -loss] > now["best"]:
                    now["best"], due = [right, -loss], True  # best/ and the checkpoint belong together
                    model.save(folder / "best")
            if due:
                save()
                saved = time.perf_counter()
    metrics.close()
    parallel.wait()
    peak = f"; at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the GPU" * (model.device.type == "cuda")
    log(f"{stage:9} done in {clock(now['seconds'])}; best on development rows: {now['best'][0]:.1%} exactly right, "
        f"loss {-now['best'][1]:.4f}; {sampler.padding:.1%} of the tokens were padding{peak}")


def open_metrics(path: Path, logged: int, log: "Log"):
    """metrics.jsonl to go on with after ``logged`` bytes; what was logged after the checkpoint comes again.

    If somebody shortened the file, its whole lines stay and training goes on: nothing that is learned depends on them.
    """
    found = path.read_bytes() if path.exists() else b""
    if len(found) < logged:
        log(f"{path} is shorter than its checkpoint says ({len(found)} of {logged} bytes): some earlier steps are "
            "missing from it and from the pictures; what was learned is complete")
    file = open(path, "a", encoding="utf-8")
    file.truncate(found.rfind(b"\n", 0, logged) + 1)
    return file


def failed(error: Exception, stage: str, step: int, batches: list[Batch], cfg: Config, checkpoint: Path) -> RunFailed:
    """The sentence for a step that could not be done."""
    kept = f"; the last good state is in {checkpoint}"
    if isinstance(error, RunFailed):
        return RunFailed(f"{stage}, step {step + 1}: {error}{kept}")
    rows, tokens = max((batch.input_ids.shape for batch in batches), key=math.prod)
    return RunFailed(f"{stage}, step {step + 1}: the GPU's memory is full with {rows} rows of {tokens} tokens (at the "
                     f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB); add --checkpointing on, or lower "
                     f"--tokens-per-batch (now {cfg.tokens_per_batch or 'the whole step at once'}){kept}")


def rows_hash(rows: dict[str, list[Encoded]]) -> str:
    """Short hash of tokenised rows: a continuation must find the same ones in the same order."""
    digest = hashlib.sha256()
    for task, encoded in rows.items():
        digest.update(f"{task} {len(encoded)}".encode())
        for row in encoded:
            digest.update(array("i", [*row.prompt_ids, -1, *row.answer_ids]).tobytes())
    return digest.hexdigest()[:16]


def what_learns(model: FrozenLM, learns: dict[str, str], optimizer: torch.optim.Optimizer) -> str:
    """A table of what learns (name, shape, count, rate) and what is frozen; the tensors of a list share a line."""
    rates = {group["name"]: group["initial"] for group in optimizer.param_groups}
    lines = [f"{'learns':12} {'shape':>16} {'count':>12}  rate"]
    for tensor in dict.fromkeys(name.partition(".")[0] for name in learns):
        members = [n for n in learns if n.partition(".")[0] == tensor]
        shapes = ["x".join(map(str, model.get_parameter(n).shape)) for n in members]
        shape = shapes[0] if len(set(shapes)) == 1 else "several"
        shape = f"{len(members)} x {shape}" if "." in members[0] else shape
        count = sum(model.get_parameter(n).numel() for n in members)
        lines.append(f"{tensor:12} {shape:>16} {count:>12,}  {learns[members[0]]} {rates[learns[members[0]]]:.1e}")
    total = sum(model.get_parameter(n).numel() for n in learns)
    lines.append(f"{'in all':12} {'':>16} {total:>12,}")
    adapter = sum(t.numel() for t in model.adapter_state().values()) - total
    frozen = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    lines.append(f"{'frozen':12} {'':>16} {frozen:>12,}  backbone, and {adapter:,} of the adapter")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- the stages

class Run:
    """A run: its options, its folder, its backbone and tokenizer, loaded once for all stages."""

    def __init__(self, cfg: Config, command: str, signals: Signals):
        self.cfg, self.command, self.method, self.signals = cfg, command, method_of(cfg), signals
        self.folder = Path(cfg.run)
        self.device = torch.device(parallel.place(cfg.device))
        self.log = Log(self.folder / "log.txt")
        self.backbone, self.tokenizer = load_backbone(cfg.backbone, cfg.dtype, self.device)
        try:
            self.method.model.check(self.backbone)
        except ValueError as error:
            raise UserError(str(error)) from error
        if cfg.checkpointing == "on":
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for once in ("rows", "rewritten", "rows_of", "references"):  # kept as long as the run is
            setattr(self, once, cache(getattr(self, once)))

    def examples(self, task: str, split: str):
        return data.load_task(task, split, self.cfg.data_root or None)

    def encode(self, examples, keep_answer: bool = True) -> list[Encoded]:
        """Tokens of examples; keep_answer=False shortens a long passage as a test does, not knowing the answer."""
        with evaluate.progress(len(examples), "tokenising") as bar:
            rows = []
            for example in examples:
                rows.append(data.encode(example, self.tokenizer, self.cfg.max_length, keep_answer))
                bar.update()
        return rows

    def rows(self, task: str, split: str) -> list[Encoded]:
        """Tokens of a split; of dev at most --dev-rows."""
        examples = self.examples(task, split)
        examples = examples[: self.cfg.dev_rows] if split == "dev" else examples
        return self.encode(examples, keep_answer=split == "train")

    def check_rows(self, tasks: list[str]) -> None:
        """Tokenise all rows of these tasks, so that one that cannot be used shows now and not after hours."""
        for task in tasks:
            report = data.load_splits(task, self.cfg.data_root or None).report
            dropped = [f"{n} {split} rows: {why}" for split, by in report["dropped"].items() for why, n in by.items()]
            if dropped or report["notes"]:
                print(f"{task}: " + "; ".join(dropped + report["notes"]))
            for split in ("train", "dev", "test"):
                self.rows(task, split)
            for suffix, tests in self.tests([task]).items():  # what only testing reads: rewritten, with hard prompts
                texts = tests[task] * bool(suffix) + in_words(tests[task]) * self.cfg.references
                self.encode([dataclasses.replace(e, row=e.row + suffix) for e in texts], keep_answer=False)
            self.check_answers(task)
            self.check_window(task)

    def check_answers(self, task: str) -> None:
        """A generated answer ends after --max-new-tokens: say which test rows cannot be answered right."""
        most, rows = self.cfg.max_new_tokens, self.examples(task, "test")
        over = sum(all(len(data.answer_ids(self.tokenizer, text)) - 1 > most for text in e.references or (e.answer,))
                   for e in rows if not e.choices)
        if over:
            what = (f"{task}: {over} of {len(rows)} test answers are longer than --max-new-tokens {most} and can never "
                    "be given in full; raise it")
            if over == len(rows):
                raise UserError(what)
            print(what)

    def check_window(self, task: str) -> None:
        """The choices of a row are scored behind its prompt in one pass, which a sliding window must hold."""
        window = getattr(self.backbone.config, "sliding_window", None)
        choices = max(sum(len(choice) - 1 for choice in row.choice_ids) for row in self.rows(task, "test"))
        front = self.cfg.prompt_length if issubclass(self.method.model, InputPrompts) else 0
        left = max(0, (window or 0) - front - choices)
        if window and choices and self.cfg.max_length > left:
            raise UserError(f"the backbone's sliding window of {window} tokens leaves {left} to a row of {task} beside "
                            f"its choices, and --max-length is {self.cfg.max_length}; lower it, or take another "
                            "--backbone")

    def references(self, tasks: tuple[str, ...]) -> dict[str, dict]:
        """What to compare with, on test rows as they are and rewritten: the most frequent answer, the frozen backbone,
        and the instruction put in words."""
        columns, frozen, ids = {}, FrozenLM(self.backbone, TALoRAConfig()), dict.fromkeys(tasks, NO_TASK)
        for suffix, tests in self.tests(tasks).items():
            columns["majority" + suffix] = {t: evaluate.majority_scores(t, self.examples(t, "train"), tests[t])
                                            for t in tasks}
            if not self.cfg.references:
                continue
            columns["frozen backbone" + suffix] = evaluate.evaluate_tasks(frozen, self.tokenizer, tests, ids, self.cfg)
            if all(e.hard_prompt for rows in tests.values() for e in rows):  # hidden in the micro-world's prompts alone
                asked = {t: in_words(rows) for t, rows in tests.items()}
                columns["hard instruction" + suffix] = evaluate.evaluate_tasks(frozen, self.tokenizer, asked, ids,
                                                                               self.cfg)
        return columns

    def tests(self, tasks: Sequence[str]) -> dict[str, dict[str, list[data.Example]]]:
        """Test rows by task, by what ends the name of their columns: as they are, and rewritten."""
        return {"": {task: self.examples(task, "test") for task in tasks},
                REWRITTEN: {task: self.rewritten(task) for task in tasks}}

    def rewritten(self, task: str) -> list[data.Example]:
        """The test rows with their text rewritten as training never shows it, where that can be done."""
        return [data.perturb(example, self.cfg.seed) for example in self.examples(task, "test")]

    def new_model(self, tasks: list[str]) -> FrozenLM:
        cfg = self.cfg
        sizes = TALoRAConfig(cfg.prompt_length, cfg.rank, cfg.scale, cfg.gate_per_head)
        try:
            return self.method.model(self.backbone, tasks, sizes)
        except ValueError as error:
            raise UserError(str(error)) from error

    def load(self, folder: Path, tasks: list[str] | None = None) -> FrozenLM:
        """The best adapter that training left in a folder; tasks: what it has to be for, if that is known."""
        try:
            model = self.method.model.load(folder / "best", self.backbone)
        except ValueError as error:
            raise UserError(str(error)) from error
        if tasks not in (None, model.tasks):
            raise UserError(f"the adapter in '{folder}/best' is for {', '.join(model.tasks) or 'no task'}, not for "
                            f"{', '.join(tasks)}; delete '{folder}' to make it anew")
        return model

    def rows_of(self, task: str) -> str:
        """Hash of all rows of a task."""
        return data.data_hash([e for split in ("train", "dev", "test") for e in self.examples(task, split)])

    def identity(self, stage: str) -> dict:
        """What a stage was made of beside its options: the backbone, and the rows of every task."""
        names = split_names(self.cfg.targets if stage == "target" else self.cfg.sources)
        read = {f"{name} in tokens": rows_hash({name: self.rows(name, "train")}) for name in names}  # by its tokenizer
        return {"backbone": describe(self.backbone), "data": {name: self.rows_of(name) for name in names} | read}

    def check_identity(self, stage: str, folder: Path) -> None:
        """Refuse to build on, or go on with, what was made with another backbone or other data; before any writing."""
        path = folder / "identity.json"
        if not path.exists():
            return
        before = read_json(path, "delete it if backbone and data are those of then, or choose another --run",
                           backbone={}, data={})
        now = self.identity(stage)
        if before["backbone"] != now["backbone"]:
            other = [name for name, value in now["backbone"].items() if before["backbone"].get(name) != value]
            raise UserError(f"{folder} was made with another backbone (other {', '.join(other)}); go on with that one, "
                            "or choose another --run")
        other = [name for name, value in now["data"].items() if before["data"].get(name, value) != value]
        if other:
            raise UserError(f"{folder} was made with other rows of {', '.join(other)}; go on with those, or choose "
                            "another --run")

    def open(self, stage: str) -> Path:
        """The folder of a stage about to begin or to go on, with the options and the machine written into it."""
        folder = stage_folder(self.cfg, stage)
        self.log(f"\n== {stage}: results go to {folder}/")
        begin(folder, self.cfg, self.command, self.log)
        write_json(folder / "identity.json", self.identity(stage))
        torch.manual_seed(10 * self.cfg.seed + ORDER.index(stage))  # the same whatever ran before in this process
        return folder


def begin(folder: Path, cfg: Config, command: str, log: "Log") -> None:
    """Write the options and the machine of a stage into its folder; log which options are others than before."""
    if (folder / "options.json").exists():
        before, now = read_options(folder), dataclasses.asdict(cfg)
        changed = [f"{flag(n)} {now[n]} (was {before.get(n)})" for n in now if before.get(n) != now[n]]
        if changed:
            log(f"options changed since it began: {', '.join(changed)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "env.json", environment(command))  # first: it marks a stage's options.json as no run's
    write_json(folder / "options.json", dataclasses.asdict(cfg))


def base_stage(run: Run) -> None:
    """theta0 and the gates on one source task."""
    cfg, task = run.cfg, run.cfg.base_task
    folder = run.open("base")
    model = run.new_model(split_names(cfg.sources))
    train = {task: run.rows(task, "train")}
    fit(run, model, "base", train, {task: run.rows(task, "dev")}, {task: NO_TASK}, folder)
    if cfg.pictures:
        figures.draw_run(folder)
    finish(folder, {"stage": "base", "task": task, "seed": cfg.seed})


def multitask_stage(run: Run) -> None:
    """All source tasks at once; then every one of them on its test rows, beside the references."""
    cfg, method, sources = run.cfg, run.method, split_names(run.cfg.sources)
    if "base" in method.learns:
        model = run.load(stage_folder(cfg, "base"), sources)
    folder = run.open("multitask")
    if "base" not in method.learns:
        model = run.new_model(sources if method.per_task else [ALL_TASKS])
    ids = {task: model.tasks.index(task if method.per_task else ALL_TASKS) for task in sources}
    train = {task: run.rows(task, "train") for task in sources}
    dev = {task: run.rows(task, "dev") for task in sources}
    fit(run, model, "multitask", train, dev, ids, folder)
    model = run.load(folder)
    numbers = count(model, learning_tensors(model, method, "multitask", list(ids.values())))
    columns = dict(run.references(tuple(sources)))
    columns |= score_columns(run, model, sources, ids)
    if cfg.pictures:
        figures.draw_run(folder)
    report(run, folder, "multitask", columns, numbers=numbers)


def target_stage(run: Run) -> None:
    """Each target task from --shots examples (or all), one after another, with everything shared frozen."""
    cfg, targets = run.cfg, split_names(run.cfg.targets)
    folder = run.open("target")
    columns, starts, numbers = dict(run.references(tuple(targets))), {}, 0
    for task in targets:
        if not (folder / task / "results.json").exists():
            run.log(f"\n-- {task}")
            one_target(run, task, folder / task)
        result = target_results(cfg, folder / task)
        numbers = result["numbers"]
        if result["start"]:
            starts[task] = result["start"]
        for name, scores in result["scores"].items():
            columns.setdefault(name, {})[task] = scores
    if cfg.pictures:
        figures.draw_targets(folder, targets)
    report(run, folder, "target", columns, shots=int(cfg.shots), starts=starts, numbers=numbers)


def target_results(cfg: Config, folder: Path) -> dict:
    """What `one_target` left; UserError if it is not what that writes."""
    scores = {name: {"score": 0.0} for name in (label(cfg), label(cfg) + REWRITTEN)}
    return read_json(folder / "results.json", "delete it, and this target is trained anew", start="", numbers=0,
                     scores=scores)


def one_target(run: Run, task: str, folder: Path) -> None:
    """One target task: its start, its training, its scores on test rows."""
    cfg, method, shots = run.cfg, run.method, int(run.cfg.shots)
    torch.manual_seed(cfg.seed)
    folder.mkdir(exist_ok=True)
    rows, dev = run.rows(task, "train"), run.rows(task, "dev")
    if shots:
        pool = run.examples(task, "train")
        train, held = data.k_shot(pool, shots, cfg.seed)
        rows, dev = run.encode(train), run.encode(held, keep_answer=False)
        write_json(folder / "shots.json", data.k_shot_record(pool, shots, cfg.seed))
        answers, known = {e.answer for e in train}, data.task_of(task, pool).answers
        if len(answers) < len(known):
            run.log(f"{shots} examples cover {len(answers)} of its {len(known)} answers")
    sources = split_names(cfg.sources) if method.per_task else [ALL_TASKS]
    model = (run.load(stage_folder(cfg, "multitask"), sources) if "multitask" in method.learns else
             run.new_model([task]))
    task_id, start, columns = 0, "", {}
    if cfg.method == "talora":
        columns["theta0 (k = 0)"] = evaluate.evaluate_tasks(model, run.tokenizer, {task: run.examples(task, "test")},
                                                            {task: NO_TASK}, cfg)
    if method.per_task:
        task_id, start = nearest_start(model, task, rows)
        run.log(f"starts from {start} (of the sources the one with the lowest loss on its examples)")
    fit(run, model, "target", {task: rows}, {task: dev}, {task: task_id}, folder)
    model = run.load(folder)
    columns |= score_columns(run, model, [task], {task: task_id})
    numbers = count(model, learning_tensors(model, method, "target", [task_id]))
    finish(folder, {"start": start, "numbers": numbers, "scores": {name: c[task] for name, c in columns.items()}})


def nearest_start(model: FrozenLM, task: str, rows: list[Encoded]) -> tuple[int, str]:
    """Add ``task`` with the weights of the source task that give the lowest loss on ``rows``; (id, source)."""
    losses = [evaluate.dev_score(model, {task: rows[:64]}, {task: i})[1] for i in range(len(model.tasks))]
    nearest = min(range(len(losses)), key=losses.__getitem__)
    new = model.add_task(task)
    if max(losses) == losses[nearest] and len(losses) > 1:  # prompts side by side: whose is nearest makes no difference
        return new, "new weights"
    model.copy_task(nearest, new)
    return new, model.tasks[nearest]


def in_words(rows: Sequence[data.Example]) -> list[data.Example]:
    """The rows with the instruction in their prompts, of those that have one."""
    return [dataclasses.replace(example, prompt=example.hard_prompt) for example in rows if example.hard_prompt]


def count(model: FrozenLM, names) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


def score_columns(run: Run, model: FrozenLM, tasks: list[str], ids: dict[str, int]) -> dict[str, dict]:
    """The method's scores on the test rows, and on the same rows rewritten as training never shows them."""
    return {label(run.cfg) + suffix: evaluate.evaluate_tasks(model, run.tokenizer, rows, ids, run.cfg)
            for suffix, rows in run.tests(tasks).items()}


def label(cfg: Config) -> str:
    """What a method is called in tables: talora, deep-pt, talora without a base stage: talora no-base."""
    return cfg.method + f" {cfg.variant}" * bool(cfg.variant)


def finish(folder: Path, results: dict) -> None:
    """results.json says that this is done; what was only there to go on from is removed."""
    write_json(folder / "results.json", results)
    clear(folder)
    parallel.wait()


def clear(folder: Path) -> None:
    """Remove what a finished stage has no more use for: its checkpoint, and what a kill left half-written."""
    for path in (folder / "checkpoint.pt", *folder.rglob("*.part")) if parallel.RANK == 0 else ():
        path.unlink(missing_ok=True)


def report(run: Run, folder: Path, stage: str, columns: dict[str, dict], **more) -> None:
    """The table of a stage, and then, last, its results.json."""
    results = {"stage": stage, "method": label(run.cfg), "seed": run.cfg.seed, "command": run.command, **more,
               "columns": columns}
    metrics = {task: data.task_of(task, run.examples(task, "test")).metric for task in columns["majority"]}
    plain = {name: column for name, column in columns.items() if not name.endswith(REWRITTEN)}
    unseen = {name.removesuffix(REWRITTEN): c for name, c in columns.items() if name.endswith(REWRITTEN)}
    changed = [bool(e.operations) for task in metrics for e in run.rewritten(task)]
    table = (f"test rows\n\n{evaluate.table(plain, metrics)}\nthe same rows, {sum(changed) / len(changed):.0%} of them "
             f"rewritten as training never shows it\n\n{evaluate.table(unseen, metrics)}")
    with atomic(folder / "table.md") as file:
        file.write(table.encode())
    finish(folder, results)
    run.log(f"\n{table}\nsaved in {folder}/: best/ and last/ (adapters), table.md, results.json, metrics.jsonl, *.png")


# ---------------------------------------------------------------------------------------------------- the program

class Log:
    """Prints a line and appends it to a file, which it makes at the first line."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| tee log` died; the training need not
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        if parallel.RANK == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(text + "\n")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def environment(command: str) -> dict:
    try:
        git, changed = (subprocess.run(["git", *words], cwd=Path(__file__).parent, text=True, capture_output=True,
                                       check=False).stdout.strip() for words in
                        (("describe", "--always"), ("status", "--porcelain", "--untracked-files=no", "*.py")))
        git += "-dirty" * bool(changed)
    except OSError:  # no git on this machine
        git = ""
    return {"command": command, "commit": git, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "machine": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "processes": parallel.PROCESSES, "threads": torch.get_num_threads(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S")}


def finished(cfg: Config, stage: str) -> tuple[bool, list[str]]:
    """Whether the run holds this stage; UserError if it, or a part of it, was made with other options that matter.

    Backbone and data may lie in other places than they did, if identity.json says what they were: those are returned.
    """
    folder, moved = stage_folder(cfg, stage), []
    done, targets = (folder / "results.json").exists(), [path.parent for path in folder.glob("*/results.json")]
    for path in targets:
        target_results(cfg, path)
    for path in [folder] * done + targets:
        clear(path)
    if done or targets or any(folder.glob("**/checkpoint.pt")):
        before, now = read_options(folder), dataclasses.asdict(cfg)
        other = {name: f"{flag(name)} {before.get(name)} (now {now[name]})" for name in depends(stage)
                 if before.get(name) != now[name]}
        if (folder / "identity.json").exists():
            moved = [other.pop(name) for name in ("backbone", "data_root") if name in other]
        if other:
            raise UserError(f"{folder} holds {'a finished' if done else 'an unfinished'} stage made with "
                            f"{', '.join(other.values())}; choose another folder with --run, or delete this one")
        if not done:
            print(f"{folder} holds an unfinished stage: it goes on")
    return done, moved


def pretrain_stage(cfg: Config, command: str, lock: Lock) -> None:
    """Make a small backbone from scratch: on the micro-world's instructions, or on the text of --data-root."""
    folder, texts, device = stage_folder(cfg, "pretrain"), [], parallel.place(cfg.device)
    log = Log(Path(cfg.run) / "log.txt")
    if cfg.data_root:
        names = sorted(path.parent.name for path in Path(cfg.data_root).glob("*/train.jsonl"))
        texts = [e.prompt for task in names for e in data.load_task(task, "train", cfg.data_root)]  # no answers
        if not any(texts):
            raise UserError(f"no text was found in '{cfg.data_root}' to pretrain on; it should hold <task>/train.jsonl")
    with Signals() as signals:
        lock.take()
        log(f"\n== pretrain: the backbone goes to {folder}/")
        begin(folder, cfg, command, log)
        write_json(Path(cfg.run) / "options.json", dataclasses.asdict(cfg) | {"backbone": ""})  # for --resume
        saving = dict(checkpoint=folder / "checkpoint.pt", signals=signals, save_every=cfg.save_every,
                      save_minutes=cfg.save_minutes)
        if cfg.data_root:
            model, _ = pretrain.pretrain_text(folder, texts, cfg.seed, cfg.pretrain_steps, cfg.pretrain_width,
                                              cfg.pretrain_layers, cfg.max_length, max(1, 4096 // cfg.max_length), log,
                                              device, **saving)
            scores = {}
        else:
            model, _, scores = pretrain.pretrain_toy(folder, cfg.seed, cfg.pretrain_steps, cfg.pretrain_width,
                                                     cfg.pretrain_layers, log, device, **saving)
        finish(folder, {"stage": "pretrain", "seed": cfg.seed, "command": command,
                        "weights": describe(model)["weights"], "scores": scores})
    log(f"to train on this backbone: --backbone {folder}")


def main(argv: list[str]) -> None:
    cfg, changed = parse(argv, __doc__)
    check(cfg, argv)
    with Lock(Path(cfg.run)) as lock:
        work(cfg, changed, argv, lock)


def work(cfg: Config, changed: dict, argv: list[str], lock: Lock) -> None:
    """Whatever of the stages asked for is not finished; everything is looked at before anything is written."""
    parallel.start(parallel.place(cfg.device))
    cfg.pictures = cfg.pictures and parallel.RANK == 0
    transformers.logging.set_verbosity_error()
    if not cfg.backbone:  # nothing large to load
        transformers.logging.disable_progress_bar()
    command, stages = "python train.py " + " ".join(argv), plan(cfg)
    if "pretrain" in stages and cfg.stage != "pretrain":
        cfg.backbone = str(stage_folder(cfg, "pretrain").resolve())  # the run makes its own
    jobs = [(stage, dataclasses.replace(cfg, shots=str(shots)) if stage == "target" else cfg)
            for stage in stages for shots in (shots_of(cfg) if stage == "target" else [0])]
    found = [finished(stage_cfg, stage) for stage, stage_cfg in jobs]
    todo = [job for job, (done, _) in zip(jobs, found) if not done]
    moved = dict.fromkeys(place for _, places in found for place in places)
    print(f"run {cfg.run}/ on {parallel.place(cfg.device)}; options: "
          + ", ".join(f"{flag(n)} {v}" for n, v in changed.items()))
    sources, targets = split_names(cfg.sources), split_names(cfg.targets)
    needed = sources * (not {"base", "multitask"}.isdisjoint(stages)) + targets * ("target" in stages)
    for task in needed:
        for split in ("train", "dev", "test"):
            rows = data.load_task(task, split, cfg.data_root or None)
            if split == "train" and rows[0].choices and len({row.answer for row in rows}) == 1:
                raise UserError(f"all {len(rows)} train rows of {task} have the answer '{rows[0].answer}': there is "
                                "nothing to tell apart; add rows with another answer, or leave the task out")
            for shots in shots_of(cfg) if split == "train" and task in targets else ():
                if shots:
                    data.k_shot(rows, shots, cfg.seed)
    for stage, _ in todo:
        if stage not in (cfg.stage, "target") and cfg.stage != "all":
            print(f"'{cfg.stage}' builds on stage '{stage}', which {cfg.run}/ does not hold yet: it runs first")
    if todo and todo[0][0] == "pretrain":
        if parallel.PROCESSES > 1:
            raise UserError("--stage pretrain is the work of one process: run it first, without torchrun, as python "
                            "train.py --stage pretrain and the other options of this command")
        pretrain_stage(cfg, command, lock)
        todo.pop(0)
    if todo or moved:
        with Signals() as signals:
            run = Run(cfg, command, signals)
            run.check_rows(needed)
            for stage, run.cfg in jobs:
                if stage != "pretrain":
                    run.check_identity(stage, stage_folder(run.cfg, stage))
            lock.take()
            parallel.wait()  # every process has seen the run's folder as it was
            if moved:
                run.log(f"another place, the same in it: {', '.join(moved)}")
            run.folder.mkdir(parents=True, exist_ok=True)
            write_json(run.folder / "options.json", dataclasses.asdict(cfg))
            for stage, run.cfg in todo:
                {"base": base_stage, "multitask": multitask_stage, "target": target_stage}[stage](run)
    if todo:
        return
    for stage, stage_cfg in jobs:
        folder = stage_folder(stage_cfg, stage)
        print(f"{folder}/ is finished, nothing more to do")
        if (folder / "table.md").exists():
            print((folder / "table.md").read_text(encoding="utf-8", errors="replace"))


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
