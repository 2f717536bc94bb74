r"""The three stages of TA-LoRA and the one loop that runs them.

    base        theta0 and the gates, on the first source task
    multitask   B, all u_i and v_i, the gates (from zero again) and, slowly, theta0, on all source tasks
    target      u, v of one new task, from k examples or all of them; everything shared stays frozen

In every stage a step minimises

    loss = L_PLM + lambda * R(A_1 .. A_N)                                                               Eq. (3)

where L_PLM is the cross-entropy of the answer's tokens, averaged within an example and then over the examples of the
step, and R is the orthogonality of the task matrices (multitask stage only). In the multitask stage

    theta0 and B learn slowly,    u_i, v_i and the gates fast                                           Eq. (5)

Baselines and ablations call `main` with another `Method` (experiments/compare.py).
"""

import argparse
import dataclasses
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoint
import data
import evaluate
from checkpoint import RunFailed, UserError
from data import Batch, Encoded
from lowrank import FORMS
from model import NO_TASK, AdaptedLM, TALoRA, TALoRAConfig, describe, load_backbone
from tasks import chinese, micro

# --------------------------------------------------------------------------------------------------------- options

RUN, DATA, METHOD, EVERY, BASE, MULTITASK, TARGET = GROUPS = (
    "the run", "data and backbone", "the method", "every stage", "base stage", "multitask stage", "target stage")


def option(default, group: str, help: str, **how):
    """A field of Config and option of the command line; ``how`` goes to argparse."""
    metavar = {int: "N", float: "X", str: "NAME"}.get(type(default))
    if not how:
        how = {"type": type(default), "metavar": metavar} if metavar else {"action": argparse.BooleanOptionalAction}
    help += f" (default: {default})" if default not in ("", (), (0,)) and "default" not in help else ""
    return field(default=default, metadata={"group": group, "how": {"help": help, **how}})


@dataclass
class Config:
    """Every option. [paper: ...] is what the public summaries of the paper say; where it is open, the value is ours."""

    stage: str = option("multitask", RUN, "what to run", choices=("base", "multitask", "target", "all"))
    preset: str = option("toy", RUN, "a set of defaults", choices=("toy", "qwen2.5-0.5b", "qwen2.5-7b"))
    run: str = option("", RUN, "folder of the run, one subfolder a stage (default: runs/PRESET[-seedN])")
    backbone: str = option("", RUN, "folder or hub name of a causal language model [paper: Qwen2.5-7B]")
    data_root: str = option("", RUN, "folder with <task>/train.jsonl and test.jsonl; it need not hold all tasks")
    device: str = option("auto", RUN, "cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    checkpointing: bool = option(False, RUN, "recompute activations in backward: less memory, up to a third more time")
    references: bool = option(True, RUN, "also score the frozen backbone and the instruction in words")
    pictures: bool = option(True, RUN, "draw losses, gates and cosines")
    log_every: int = option(40, RUN, "print progress every N steps")
    save_every: int = option(100, RUN, "save a checkpoint every N steps")
    eval_tokens: int = option(0, RUN, "tokens in an evaluation batch, with padding (default: 8192, on a CPU 512)")

    seed: int = option(0, DATA, "seed of everything random [paper: number of seeds open]")
    sources: tuple[str, ...] = option((), DATA, "source tasks [paper: 8]", nargs="+", metavar="TASK")
    max_length: int = option(128, DATA, "maximum tokens of a row; longer passages are cut around the answer")
    max_new_tokens: int = option(8, DATA, "maximum tokens of a generated answer")
    dev_rows: int = option(64, DATA, "maximum development rows of a task; they choose the best checkpoint")
    test_rows: int = option(0, DATA, "maximum test rows of a task (0: all)")
    dtype: str = option("float32", DATA, "data type of the backbone (adapters: float32); auto: the faster one",
                        choices=("float32", "bfloat16", "auto"))
    chat_template: str = option("auto", RUN, "prompts as a user's turn; auto: on for an instruct or chat model",
                                choices=("auto", "on", "off"))

    prompt_length: int = option(16, METHOD, "P, rows of the prompt in a layer [paper: open; 12 gives its 1.3 M]")
    rank: int = option(8, METHOD, "r, columns of the shared B [paper: open; 8 gives its 1.3 M]")
    scale: float = option(1.0, METHOD, "s, scale of a task's step [paper: open]")
    gate_per_head: bool = option(False, METHOD, "one gate per head instead of one per layer [paper: per layer]")

    tokens_per_batch: int = option(0, EVERY, "tokens in a pass, with padding; a step adds up several (0: no limit)")
    warmup: int = option(20, EVERY, "steps in which learning rates rise from 0; then they fall to 0")
    clip: float = option(1.0, EVERY, "maximum gradient norm")
    relative_rates: bool = option(False, EVERY, "multiply steps of theta0, v by |weight| of the layer's input norm")
    eval_every: int = option(100, EVERY, "evaluate on development rows every N steps")

    prompt_rate: float = option(4e-2, BASE, "learning rate of theta0 and gates [paper: open]")
    base_steps: int = option(30, BASE, "steps [paper: open]")
    base_batch: int = option(32, BASE, "examples of a step")

    slow_rate: float = option(0.12, MULTITASK, "learning rate of theta0 and B [paper: open]")
    fast_rate: float = option(0.16, MULTITASK, "learning rate of u, v and gates [paper: open, above the slow one]")
    regulariser: str = option("cosine", MULTITASK, "form of the orthogonality term [paper: printed]", choices=FORMS)
    reg_weight: float = option(0.1, MULTITASK, "lambda, weight of the orthogonality term [paper: open]")
    multitask_steps: int = option(400, MULTITASK, "steps [paper: open]")
    multitask_batch: int = option(32, MULTITASK, "examples of a step, over all source tasks")

    targets: tuple[str, ...] = option((), TARGET, "target tasks [paper: 8]", nargs="+", metavar="TASK")
    shots: tuple[int, ...] = option((0,), TARGET, "examples of a target; several: one after another (default: 0 = all)",
                                    nargs="+", type=int, metavar="K")
    target_rate: float = option(0.08, TARGET, "learning rate of u, v [paper: open]")
    target_steps: int = option(120, TARGET, "steps for each target task [paper: open]")
    target_batch: int = option(8, TARGET, "examples of a step")


LARGE = dict(sources=chinese.SOURCES, targets=chinese.TARGETS, max_length=1024, max_new_tokens=64, dev_rows=32,
             dtype="auto", prompt_length=12, rank=8, relative_rates=True, prompt_rate=4e-2, slow_rate=1e-2,
             fast_rate=4e-2, target_rate=3e-2, base_steps=200, multitask_steps=2000, multitask_batch=64,
             target_steps=300, target_batch=16, warmup=50, eval_every=200)
PRESETS = {
    "toy": dict(sources=micro.SOURCES, targets=micro.TARGETS),
    "qwen2.5-0.5b": dict(LARGE, backbone="Qwen/Qwen2.5-0.5B", tokens_per_batch=8192),
    "qwen2.5-7b": dict(LARGE, backbone="Qwen/Qwen2.5-7B", tokens_per_batch=4096, checkpointing=True),
}

LEARNS = {  # stage -> tensor -> its learning rate: --slow-rate and so on; whatever is not named is frozen.  Eq. (5)
    "base": {"theta0": "prompt", "gate": "prompt"},
    "multitask": {"theta0": "slow", "B": "slow", "u": "fast", "v": "fast", "gate": "fast"},
    "target": {"u": "target", "v": "target"},
}


@dataclass(frozen=True)
class Method:
    """What the stages and the loop need to know of a method."""

    name: str  # in tables and in the name of the run's folder
    says: str  # one line for --help
    model: type[AdaptedLM]
    learns: dict[str, dict[str, str]]  # as LEARNS; a stage without an entry is skipped
    per_task: bool = False  # weights of its own for each source; a target starts from the nearest source's
    regularised: bool = False  # Eq. (4) in the multitask stage
    fresh_gates: bool = False  # gates start the multitask stage from zero again
    defaults: dict[str, dict] = field(default_factory=dict)  # "toy" | "large" -> options other than Config's
    fixes: Callable[[Config], dict] = lambda cfg: {}  # options that an ablation overrides


TALORA = Method("talora", "the method of the paper", TALoRA, LEARNS, per_task=True, regularised=True, fresh_gates=True)
ALL_TASKS = "all tasks"  # the one task of a method that has one set of weights for all sources


def parse(argv: list[str], method: Method = TALORA) -> Config:
    """Command line -> options: Config's defaults, the preset's, the method's, those that the run began with, then what
    is typed; the last one wins. Raises UserError for an unknown option, value or type."""
    parser = checkpoint.Parser(
        prog="python train.py", usage="python train.py [--stage STAGE] [OPTION ...]", allow_abbrev=False,
        description=__doc__.partition("\n\nIn every")[0],
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120))
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for f in dataclasses.fields(Config):
        groups[f.metadata["group"]].add_argument(flag(f.name), default=None, **f.metadata["how"])
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "stage" not in typed and {"targets", "shots"} & typed.keys():
        raise UserError("--targets and --shots need --stage target, or --stage all")
    for name in {"sources", "targets"} & typed.keys():
        typed[name] = tuple(" ".join(typed[name]).replace(",", " ").split())
    preset = typed.get("preset", "toy")
    words = [preset, *method.name.split(), f"seed{typed.get('seed', 0)}"]
    run = typed.get("run") or "runs/" + "-".join(word for word in words if word not in ("talora", "seed0"))
    before = options_before(Path(run))
    if typed.get("preset", before.get("preset")) != before.get("preset"):
        before = {}  # same_run refuses another preset below
    preset = before.get("preset", preset)
    typed = {name: value for name, value in typed.items() if not (value == "auto" and name in before)}
    defaults = PRESETS[preset] | method.defaults.get("toy" if preset == "toy" else "large", {})
    if root := typed.get("data_root", before.get("data_root")):  # whatever is there of the sixteen sets
        defaults |= {name: tuple(task for task in known if os.path.isdir(Path(root) / task))
                     for name, known in (("sources", chinese.SOURCES), ("targets", chinese.TARGETS))}
    cfg = Config(**defaults | before | typed | {"run": run})
    cfg = dataclasses.replace(cfg, shots=tuple(cfg.shots), **method.fixes(cfg))
    for name in ("backbone", "data_root"):  # whole paths, so that evaluate.py finds them from any folder
        if os.path.isdir(getattr(cfg, name)):
            setattr(cfg, name, str(Path(getattr(cfg, name)).resolve()))
    return cfg


def options_before(run: Path) -> dict:
    """The options that the stages of a run were started with, except those of the machine and of single targets."""
    for file in (run / "multitask/stage.json", run / "base/stage.json", *sorted(run.glob("target/*/stage.json"))):
        if file.exists():
            own = {f.name for f in dataclasses.fields(Config)}
            own -= {"stage", "run", "device", "eval_tokens", "targets", "shots"}
            stored = {"relative_rates": False} | checkpoint.read_json(file)  # runs older than the option
            return {name: stored[name] for name in own & stored.keys()} | {"sources": tuple(stored["sources"])}
    return {}


MAY_BE_ZERO = ("seed", "warmup", "tokens_per_batch", "eval_tokens", "test_rows", "scale", "reg_weight")


def check(cfg: Config, method: Method = TALORA) -> None:
    """Refuse options that cannot work, before anything is loaded or written; UserError with all of them at once."""
    problems = [f"{flag(name)} is {value}, but must be {'0 or more' if name in MAY_BE_ZERO else 'above 0'}"
                for name, value in vars(cfg).items() if type(value) in (int, float)
                and not (0 < value < math.inf or value == 0 and name in MAY_BE_ZERO)]
    names, there = [*cfg.sources, *cfg.targets], f"is in '{cfg.data_root}'; name those that are there with"
    twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
    problems += [sentence for sentence, wrong in {
        f"--data-root '{cfg.data_root}' is not a folder; it should hold <task>/train.jsonl and test.jsonl":
            cfg.data_root and not os.path.isdir(cfg.data_root),
        "--data-root needs --backbone, such as Qwen/Qwen2.5-0.5B: the micro-world's own knows 184 words":
            cfg.data_root and not cfg.backbone and not options_before(Path(cfg.run)),
        f"method {method.name} has no stage '{cfg.stage}'; its stages are {', '.join(method.learns)}":
            cfg.stage not in ("all", *method.learns),
        f"no known source {there} --sources": not cfg.sources,
        f"no known target {there} --targets": cfg.stage in ("target", "all") and not cfg.targets,
        f"{twice}: named twice among this run's sources and targets; rename your task's folder, or remove one": twice,
    }.items() if wrong]
    try:
        torch.empty(1, device=checkpoint.pick_device(cfg.device))
    except (RuntimeError, AssertionError):
        problems.append(f"--device '{cfg.device}' is not available here; use --device cpu, or auto")
    if problems:
        raise UserError("; ".join(problems))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# -------------------------------------------------------------------------------------------------------- the loop

def learning_tensors(model: AdaptedLM, learns: dict[str, str], task_ids: list[int]) -> dict[str, str]:
    """Name of every tensor that learns -> its learning rate ("slow", "fast" ...), by one stage of a method's table. Of
    the tensors that each task has one of (u.i, v.i) only those of ``task_ids`` learn."""
    learning = {}
    for tensor, rate in learns.items():
        for name in model.adapter_state():
            kind, _, task = name.partition(".")  # "u.0" -> "u", "0"
            if kind == tensor and (not task.isdigit() or int(task) in task_ids):
                learning[name] = rate
    return learning


def build_optimizer(model: AdaptedLM, learning: dict[str, str], cfg: Config) -> torch.optim.AdamW:
    """AdamW with one group for each learning rate, which it remembers as "initial"; the rest is frozen. Eq. (5)
    No weight decay: pulled towards zero, the gates would close."""
    model.requires_grad_(False)
    groups = {}
    for name, rate in learning.items():
        groups.setdefault(rate, []).append(model.get_parameter(name).requires_grad_())
    return torch.optim.AdamW([
        {"name": rate, "params": tensors, "lr": getattr(cfg, f"{rate}_rate"), "initial": getattr(cfg, f"{rate}_rate")}
        for rate, tensors in groups.items()], betas=(0.9, 0.95), weight_decay=0.0)


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """What every learning rate is multiplied by: it rises linearly over the warm-up, then falls linearly to 0."""
    warmup = min(warmup, steps // 3)
    return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)


def train_step(model: AdaptedLM, optimizer: torch.optim.Optimizer, batches: list[Batch], cfg: Config,
               regularise: bool) -> dict[str, float]:
    """One optimizer step over the micro-batches of one step; returns what it measured. Eq. (3)
    Raises RunFailed, before any weight has changed, if the loss or the gradient is not finite."""
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()  # with --checkpointing, layers are recomputed in this mode only
    examples = checkpoint.sum_over_processes(sum(len(batch.task_ids) for batch in batches))
    task_loss = torch.zeros((), device=model.device)
    optimizer.zero_grad(set_to_none=True)  # None, not 0: without R, AdamW then leaves absent tasks alone
    for batch in batches:
        losses = model(batch.input_ids, batch.attention_mask, batch.task_ids, batch.labels).losses  # (B,)
        loss = losses.sum() / examples  # L_PLM: the mean over the examples of the whole step, however it was cut
        loss.backward()
        task_loss += loss.detach()
    checkpoint.sum_gradients(learning, task_loss)
    reg = model.orthogonality(cfg.regulariser) if regularise else torch.zeros(())  # Eq. (4)
    if reg.requires_grad and cfg.reg_weight:
        (cfg.reg_weight * reg).backward()  # Eq. (3)
    norm = torch.nn.utils.clip_grad_norm_(learning, cfg.clip)
    if not torch.isfinite(task_loss + norm):
        raise RunFailed(f"loss is {task_loss:.3g}, gradient norm {norm:.3g}; try a new --run with lower learning rates")
    relative_step(model, optimizer) if cfg.relative_rates else optimizer.step()
    return {"loss": task_loss.item(), "reg": reg.item(), "grad_norm": norm.item()}


@torch.no_grad()
def relative_step(model: AdaptedLM, optimizer: torch.optim.Optimizer) -> None:
    """A step, of theta0 and v times the size of what their layer reads, the weight of its input norm. AdamW alone moves
    an entry by about the learning rate, whatever its size; in Qwen2.5-Coder-0.5B this weight is 0.1 in the first layer
    and 1 to 4 in the others, so a rate that suits them replaces the first prompt within ten steps."""
    state, sizes = model.adapter_state(), model.input_sizes()
    before = {name: state[name].clone() for name in sizes}
    optimizer.step()
    for name, size in sizes.items():
        state[name].copy_(before[name] + size * (state[name] - before[name]))


def fit(run: "Run", model: AdaptedLM, stage: str, rows: dict[str, dict[str, list[Encoded]]], task_ids: dict[str, int],
        folder: Path) -> None:
    """The one loop. Keeps the adapter that is best on development rows in best/ and resumes from checkpoint.pt.

    rows: task -> "train" and "dev" -> rows; task_ids: task -> the id that its rows are given (NO_TASK: theta0 alone).
    SystemExit after the step in which a signal arrived, RunFailed for numbers that are not finite."""
    cfg, method, steps = run.cfg, run.method, getattr(run.cfg, f"{stage}_steps")
    learning = learning_tensors(model, method.learns[stage], list(task_ids.values()))
    optimizer = build_optimizer(model, learning, cfg)
    train, dev = ({task: rows[task][split] for task in task_ids} for split in ("train", "dev"))
    batches = data.Batches(train, getattr(cfg, f"{stage}_batch"), cfg.seed, cfg.tokens_per_batch)
    for tensor in model.adapter_state().values() if checkpoint.PROCESSES > 1 else ():
        torch.distributed.broadcast(tensor, 0)
    run.log(describe_learning(model, learning, cfg))
    now = checkpoint.load_checkpoint(folder, model.adapter_state(), optimizer) or {
        "step": 0, "best": [-1.0, -math.inf], "seconds": 0.0, "tokens": 0, "history": [{"step": 0, **model.diagnose()}]}
    if now["step"]:
        run.log(f"resumes after step {now['step']}")
    started = time.perf_counter() - now["seconds"]
    with checkpoint.catch_signals() as caught:
        for step in range(now["step"], steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial"] * rate_factor(step, steps, cfg.warmup)
            drawn = batches[step]  # a list of micro-batches
            parts = [data.collate(own, [task_ids[row.task] for row in own]).to(model.device)
                     for part in drawn if (own := part[checkpoint.RANK :: checkpoint.PROCESSES])]
            measured = train_step(model, optimizer, parts, cfg, stage == "multitask" and method.regularised)

            done, better = step + 1, False
            now.update(step=done, tokens=now["tokens"] + sum(len(row) for part in drawn for row in part),
                       seconds=time.perf_counter() - started)
            now["history"].append({"step": done, **measured})
            tell = done % cfg.log_every == 0 or done == steps
            if tell or done % max(1, steps // 20) == 0:  # as many as a picture needs
                rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                now["history"][-1] |= {"learning_rates": rates, **model.diagnose()}
            if tell:
                run.log(describe_progress(run, stage, now))
            if done % cfg.eval_every == 0 or done == steps:
                accuracy, loss = evaluate.dev_score(model, dev, task_ids, cfg.eval_tokens)
                now["history"].append({"step": done, "dev_accuracy": accuracy, "dev_loss": loss, **model.diagnose()})
                if not math.isfinite(loss):
                    raise RunFailed(f"step {done}: development loss {loss}; try a new --run with lower learning rates")
                higher = checkpoint.RANK == 0 and [accuracy, -loss] > now["best"]
                better = checkpoint.sum_over_processes(higher)  # the first process decides
                if better:
                    now["best"] = [accuracy, -loss]
                    save_best(model, learning, method, stage, folder / "best")
            stop = checkpoint.sum_over_processes(len(caught))  # all processes stop after the same step, or none
            if done % cfg.save_every == 0 or better or done == steps or stop:
                checkpoint.save_checkpoint(folder, model.adapter_state(), optimizer, now)
            if stop:
                run.log("stopped; everything is saved: repeat the command to resume")
                raise SystemExit(128 + (caught or [15])[0])


def describe_learning(model: AdaptedLM, learning: dict[str, str], cfg: Config) -> str:
    """A table of what learns; the tensors of a list share a line."""
    lines = [f"{'learns':12} {'shape':>16} {'parameters':>12}  learning rate"]
    for kind in dict.fromkeys(name.partition(".")[0] for name in learning):
        names = [name for name in learning if name.partition(".")[0] == kind]
        shape, rate = "x".join(map(str, model.get_parameter(names[0]).shape)), learning[names[0]]
        shape = f"{len(names)} x {shape}" if len(names) > 1 else shape
        lines.append(f"{kind:12} {shape:>16} {count(model, names):>12,}  {rate} {getattr(cfg, f'{rate}_rate'):.1e}")
    return "\n".join([*lines, f"{'in all':12} {count(model, learning):>29,}"])


def describe_progress(run: "Run", stage: str, now: dict) -> str:
    row, done, rows_of = now["history"][-1], now["step"], getattr(run.cfg, f"{stage}_batch")
    steps = getattr(run.cfg, f"{stage}_steps")
    left = int(now["seconds"] / (done * rows_of) * ((steps - done) * rows_of + run.rows_later))
    return "  ".join([f"{stage:9} {done:>5}/{steps}  task loss {row['loss']:.4f}",
                      *([f"reg {row['reg']:.5f}"] if row["reg"] else []),
                      *([f"|tanh g| {sum(map(abs, row['gates'])) / len(row['gates']):.3f}"] if "gates" in row else []),
                      *(f"{name} {rate:.1e}" for name, rate in row["learning_rates"].items()),
                      f"{now['tokens'] / now['seconds']:,.0f} tok/s",
                      f"training left {left // 60}:{left % 60:02d}"])


def save_best(model: AdaptedLM, learning: dict[str, str], method: Method, stage: str, folder: Path) -> None:
    """Save the whole adapter, or only u and v where the target stage trains nothing else."""
    task = len(model.tasks) - 1  # a target is added last
    if stage == "target" and method.per_task and all(name.endswith(f".{task}") for name in learning):
        model.save_task(model.tasks[task], folder)
    else:
        model.save(folder)


def count(model: AdaptedLM, names) -> int:
    return sum(model.get_parameter(name).numel() for name in names)


# ------------------------------------------------------------------------------------------------------ the stages

class Run:
    """What the stages share: options, the backbone, and the rows of every task as tokens."""

    def __init__(self, cfg: Config, method: Method, command: str, jobs: list[tuple[str, str, int]]):
        """Load all that ``jobs`` need, so that whatever cannot be used shows now and not after hours."""
        self.cfg, self.method, self.command, self.log, self.rows_later = cfg, method, command, print, 0
        if cfg.preset == "qwen2.5-7b" and cfg.device == "cpu":
            print("warning: on a CPU a step of this preset takes minutes; use a GPU, or --preset qwen2.5-0.5b")
        self.backbone, self.tokenizer = load_backbone(cfg.backbone, cfg.dtype, cfg.device)
        self.backbone_hash, most = describe(self.backbone)["hash"], self.backbone.config.max_position_embeddings
        cfg.eval_tokens = cfg.eval_tokens or (512 if cfg.device == "cpu" else 8192)
        cfg.chat_template, why = data.choose_chat_template(
            cfg.chat_template, cfg.backbone, AdaptedLM(self.backbone).end_tokens, self.tokenizer)
        begin = self.tokenizer.decode(data.frame_of(self.tokenizer).before) or "none"
        print(f"backbone: {type(self.backbone).__name__}, {self.backbone.num_parameters():,} weights in {cfg.dtype}, "
              f"{most:,} positions, begin token {begin}, end token {self.tokenizer.eos_token}, chat template "
              f"{cfg.chat_template} ({why})")
        if cfg.checkpointing:
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.rows, self.warnings, self.hashes = {}, {}, {}  # task -> split -> rows; what to know of them; their hash
        self.references = {}  # task -> column -> scores
        for task in dict.fromkeys(name for _, own, _ in jobs for name in ([own] if own else cfg.sources)):
            print(data.describe_task(task, cfg.data_root))
            self.rows[task], self.warnings[task] = data.encode_task(task, self.tokenizer, cfg)
            self.hashes[task] = data.rows_hash(sum(self.rows[task].values(), []))
            for note in data.list_notes(task, cfg.data_root, self.warnings[task]):
                print(f"{task}: {note}")
        every = (row for splits in self.rows.values() for rows in splits.values() for row in rows)
        longest = max(len(row.prompt_ids) + max(len(row.answer_ids), sum(map(len, row.choice_ids))) for row in every)
        if longest > (getattr(self.backbone.config, "sliding_window", None) or longest):
            raise UserError(f"a row has {longest} tokens with its choices, but the sliding window of the backbone is "
                            f"{self.backbone.config.sliding_window}; lower --max-length, or take another --backbone")
        if longest > most:
            print(f"warning: a row has {longest} tokens, the backbone only {most} positions; lower --max-length")

    def new_model(self, tasks: list[str]) -> AdaptedLM:
        sizes = {field.name: getattr(self.cfg, field.name) for field in dataclasses.fields(TALoRAConfig)}
        return self.method.model(self.backbone, tasks, TALoRAConfig(**sizes))

    def load(self, folder: Path) -> AdaptedLM:
        """What a stage left in ``folder``/best."""
        return evaluate.load_adapter(evaluate.adapter_of(Path(self.cfg.run), folder), self.backbone, self.method.model)

    def describe_tasks(self, model: AdaptedLM, tasks: list[str]) -> None:
        """Describe tasks in adapter.json, so that evaluate.answer can work without the data."""
        specs = {task: data.spec_of(task, data.load_task(task, "train", self.cfg.data_root)) for task in tasks}
        reads = {name: getattr(self.cfg, name) for name in ("chat_template", "max_length", "max_new_tokens")}
        model.about = reads | {"tasks": specs}

    def identify(self, task: str) -> dict:
        """Hashes that identify a stage besides its options: the backbone, and the rows (of the sources, if task is "")
        as far as they were loaded."""
        rows = {f"rows of {name}": self.hashes[name]
                for name in ([task] if task else self.cfg.sources) if name in self.hashes}
        return {"backbone hash": self.backbone_hash, "chat_template": self.cfg.chat_template, **rows}


def folder_of(cfg: Config, stage: str, task: str = "", shots: int = 0) -> Path:
    """Folder of a stage; each target task has one for each number of examples."""
    name = f"{task}-{shots}-shot" if shots else f"{task}-full"
    return Path(cfg.run) / stage / (name if stage == "target" else "")


def train_base(run: Run, folder: Path, task: str, shots: int) -> None:
    """theta0 and the gates of a new adapter, on one source task."""
    torch.manual_seed(10 * run.cfg.seed + 1)
    fit(run, run.new_model(list(run.cfg.sources)), "base", run.rows, {task: NO_TASK}, folder)
    finish(run, folder, {"stage": "base", "task": task}, {})


def train_multitask(run: Run, folder: Path, task: str, shots: int) -> None:
    """All source tasks at once, from what the base stage left; then each one on its test rows."""
    method, sources = run.method, list(run.cfg.sources)
    torch.manual_seed(10 * run.cfg.seed + 2)
    tasks = sources if method.per_task else [ALL_TASKS]
    model = run.load(folder_of(run.cfg, "base")) if "base" in method.learns else run.new_model(tasks)
    run.describe_tasks(model, sources)
    for name, tensor in model.adapter_state().items():
        if method.fresh_gates and name.startswith("gate"):
            tensor.zero_()  # zero-init attention warms up again (paper: open)
    ids = {task: i if method.per_task else 0 for i, task in enumerate(sources)}
    fit(run, model, "multitask", run.rows, ids, folder)
    finish(run, folder, {"stage": "multitask"}, ids)


def train_target(run: Run, folder: Path, task: str, shots: int) -> None:
    """One target task, from k examples or all of them; everything that tasks share is frozen."""
    cfg, method, rows, task_id = run.cfg, run.method, run.rows[task], 0
    start, held = "", None
    if shots:
        rows, held, chosen = data.draw_shots(task, shots, run.tokenizer, cfg)
        checkpoint.write_json(folder / "shots.json", {"k": shots, "seed": cfg.seed, **chosen})
    torch.manual_seed(cfg.seed)
    model = run.load(folder_of(cfg, "multitask")) if "multitask" in method.learns else run.new_model([task])
    if method.per_task:
        task_id, start = nearest_start(model, task, rows["train"], cfg)
        run.log(f"starts from {start} (of the sources the one with the lowest loss on its examples)")
    run.describe_tasks(model, [task])
    fit(run, model, "target", {task: rows}, {task: task_id}, folder)
    about = {"stage": "target", "task": task, "shots": shots, "start": start}
    finish(run, folder, about, {task: task_id}, held)


def nearest_start(model: AdaptedLM, task: str, rows: list[Encoded], cfg: Config) -> tuple[int, str]:
    """Add ``task`` with the weights of the source task that give the lowest loss on ``rows``; (id, source)."""
    losses = [evaluate.dev_score(model, {task: rows[:64]}, {task: i}, cfg.eval_tokens)[1]
              for i in range(len(model.tasks))]
    new = model.add_task(task)
    return new, model.copy_task(losses.index(min(losses)), new)


def finish(run: Run, folder: Path, about: dict, ids: dict[str, int], held: list[data.Example] | None = None) -> None:
    """Test the tasks in ``ids``, draw the stage and write results.json: the stage is finished. held: the development
    rows of a few-shot target."""
    model = run.load(folder)
    learning = learning_tensors(model, run.method.learns[about["stage"]], list(ids.values()))
    about |= {"method": run.method.name, "seed": run.cfg.seed, "trainable": count(model, learning)}
    about |= evaluate.test_stage(run, model, folder, ids, held) if ids else {}
    if run.cfg.pictures:
        evaluate.draw_run(folder, run.log)
    checkpoint.write_json(folder / "results.json", about | checkpoint.environment(run.command))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------- the program

STAGES = {"base": train_base, "multitask": train_multitask, "target": train_target}


def plan(cfg: Config, method: Method) -> list[tuple[str, str, int]]:
    """The stages that --stage asks for, after those they build on: (stage, task, shots)."""
    stages = list(method.learns)
    last = stages[-1] if cfg.stage == "all" else cfg.stage
    jobs = {"base": [("base", cfg.sources[0], 0)], "multitask": [("multitask", "", 0)],
            "target": [("target", task, shots) for shots in cfg.shots for task in cfg.targets]}
    return [job for stage in stages[: stages.index(last) + 1] for job in jobs[stage]]


def options_of(cfg: Config, method: Method, stage: str, finished: bool) -> dict:
    """The options that decide what comes out of a stage: those of its own group and of the groups before it. A finished
    one leaves some free: another --eval-every or --max-length is meant for what is to come."""
    groups = GROUPS[1 : GROUPS.index(f"{stage} stage") + 1]
    if finished:
        groups = (METHOD, f"{stage} stage", *([DATA] if stage == "target" else []))
    options = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.metadata["group"] in groups}
    for name in {"targets", "shots"} & options.keys():
        del options[name]
    return {**options, "method": method.name, "sources": list(cfg.sources)}


def main(argv: list[str], method: Method = TALORA, command: str = "python train.py") -> None:
    """Run whatever of the stages asked for is not finished; everything is checked before anything is written."""
    cfg = parse(argv, method)
    check(cfg, method)
    cfg.device, cfg.run = checkpoint.join_processes(checkpoint.pick_device(cfg.device), cfg.run)
    cfg.dtype = checkpoint.pick_dtype(cfg.dtype, cfg.device)
    folders = {job: folder_of(cfg, *job) for job in plan(cfg, method)}
    todo = [job for job in folders if not (folders[job] / "results.json").exists()]
    last = list(folders)[-1]
    made_of = {job: options_of(cfg, method, job[0], job not in todo and job != last) for job in folders}
    for job in folders:
        checkpoint.same_run(folders[job], made_of[job])
        for task in ([job[1]] if job[1] else cfg.sources) if job not in todo else ():
            if data.is_newer(task, cfg.data_root, folders[job] / "results.json"):
                print(f"warning: rows of {task} are newer than {folders[job]}; delete that folder to train on them")
    run = Run(cfg, method, f"{command} {shlex.join(argv)}", todo) if todo else None
    for job in folders if run else ():  # finished stages, too
        made_of[job] |= run.identify(job[1])
        checkpoint.same_run(folders[job], made_of[job])
    with checkpoint.lock(Path(cfg.run)):
        log = checkpoint.open_log(Path(cfg.run))
        for n, job in enumerate(todo):
            run.log = log
            run.rows_later = sum(getattr(cfg, f"{later}_steps") * getattr(cfg, f"{later}_batch")
                                 for later, *_ in todo[n + 1:])
            folders[job].mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(folders[job] / "stage.json", dataclasses.asdict(cfg) | made_of[job])
            log(f"\n== stage {n + 1} of {len(todo)}: {' '.join(filter(None, job[:2]))}; results go to {folders[job]}/")
            STAGES[job[0]](run, folders[job], *job[1:])
        evaluate.report(Path(cfg.run), log, [folders[job] for job in todo or folders])


if __name__ == "__main__":
    sys.exit(checkpoint.run_program(main, sys.argv[1:]))
