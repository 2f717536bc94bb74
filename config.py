r"""Every option of the program in one dataclass: its default, what it does, and what the paper says of it.

The command line is made from the fields (``multitask_steps`` becomes ``--multitask-steps``). Defaults are the
micro-world's; ``--preset`` changes a set of them for a large backbone; what is typed on the command line wins.

Stages follow one another (pretrain, base, multitask, target). Each option names the first stage whose outcome it
changes, so that a finished stage is used again if, and only if, it would come out the same.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import parallel
import tasks
import toy
from baselines import METHODS, VARIANTS, Method
from checkpoint import read_json
from errors import Parser, UserError
from frozen import TALoRAConfig
from lowrank import FORMS

ORDER = ("pretrain", "base", "multitask", "target")
MAY_BE_ZERO = ("scale", "reg_weight", "weight_decay", "save_minutes")
MOST = {"seed": 2**32 - 1, **dict.fromkeys(("prompt_length", "rank", "pretrain_width", "pretrain_layers"), 10**4),
        **dict.fromkeys(("base_batch", "multitask_batch", "target_batch"), 10**5), "clip": 1e12, "save_minutes": 1e12}
NEVER = "never"  # an option that changes how a run goes, not what comes out


def option(default, since: str, help: str, choices=None):
    return field(default=default, metadata={"since": since, "help": help, "choices": choices})


def named(methods: dict[str, Method]) -> str:
    return "; ".join(f"{name}: {method.says}" for name, method in methods.items())


@dataclass
class Config:
    """[paper: ...] is what the public summaries of the paper say; most of it is open, and the default is ours."""

    stage: str = option("multitask", NEVER, "what to run; 'all' is base, multitask, target", (*ORDER, "all"))
    preset: str = option("toy", "pretrain", "a set of defaults for a backbone", ("toy", "qwen2.5-0.5b", "qwen2.5-7b"))
    method: str = option("talora", "base", named(METHODS), tuple(METHODS))
    variant: str = option("", "base", f"talora but for one thing; {named(VARIANTS)}", tuple(VARIANTS))
    run: str = option("", NEVER, "folder of the run, one subfolder a stage; runs/<preset>[-method][-variant][-seedN] "
                      "if not given")
    seed: int = option(0, "pretrain", "changes everything random [paper: number of seeds open]")
    # data
    data_root: str = option("", "pretrain", "folder with <task>/{train,test}.jsonl, instead of downloads or the "
                            "micro-world")
    sources: str = option("", "base", "source tasks, separated by commas; the preset's if not given [paper: 8]")
    targets: str = option("", "target", "target tasks, separated by commas; the preset's if not given [paper: 8]")
    base_task: str = option("", "base", "source task of the base stage; the first source if not given [paper: one, "
                            "which is open]")
    shots: str = option("0", "target", "examples of a target task in all, 0 = full data; 8,32,0 for one after another "
                        "[paper: up to 32, and full]")
    max_length: int = option(128, "pretrain", "tokens of a row at most; longer passages are cut around the answer")
    max_new_tokens: int = option(8, "multitask", "tokens of a generated answer at most")
    dev_rows: int = option(64, "base", "development rows of a task at most; they choose the best checkpoint")
    mixing: str = option("uniform", "multitask", "how source tasks share a step [paper: open]",
                         ("uniform", "proportional"))
    references: bool = option(True, NEVER, "score the frozen backbone and the instruction in words, too")
    pictures: bool = option(True, NEVER, "draw losses, gates and cosines of a stage")
    # backbone
    backbone: str = option("", "base", "folder or hub name of a causal language model; the preset's if not given "
                           "[paper: Qwen2.5-7B]")
    dtype: str = option("float32", "base", "dtype of the frozen backbone; adapters are always float32",
                        ("float32", "bfloat16"))
    autocast: bool = option(False, "base", "compute in bfloat16 where torch's autocast holds it right")
    checkpointing: str = option("off", NEVER, "recompute activations in backward: less memory, a third more time",
                                ("on", "off"))
    device: str = option("auto", NEVER, "cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    # the method
    prompt_length: int = option(16, "base", "P, rows of the prompt in every layer [paper: open; 12 gives its 1.3 M]")
    rank: int = option(8, "base", "r, columns of the shared B [paper: open; 8 gives its 1.3 M]")
    scale: float = option(1.0, "base", "s, scale of a task's step [paper: open]")
    gate_per_head: bool = option(False, "base", "one gate per head instead of one per layer [paper: per layer]")
    regulariser: str = option("cosine", "multitask", "form of the orthogonality term, off = none [paper: printed]",
                              FORMS)
    reg_weight: float = option(0.1, "multitask", "lambda, weight of the orthogonality term [paper: open]")
    # optimisation
    prompt_rate: float = option(4e-2, "base", "learning rate of theta0 and gates in the base stage, and of the other "
                                "methods on the sources [paper: open]")
    slow_rate: float = option(0.12, "multitask", "learning rate of theta0 and B in the multitask stage [paper: open]")
    fast_rate: float = option(0.16, "multitask", "learning rate of u, v and the gates in the multitask stage [paper: "
                              "open, but higher than the slow one]")
    target_rate: float = option(0.08, "target", "learning rate of whatever learns in the target stage [paper: open]")
    base_steps: int = option(30, "base", "optimisation steps of the base stage [paper: open]")
    multitask_steps: int = option(400, "multitask", "optimisation steps of the multitask stage [paper: open]")
    target_steps: int = option(120, "target", "optimisation steps for each target task [paper: open]")
    base_batch: int = option(32, "base", "examples of a step in the base stage")
    multitask_batch: int = option(32, "multitask", "examples of a step in the multitask stage, over all source tasks")
    target_batch: int = option(8, "target", "examples of a step in the target stage")
    tokens_per_batch: int = option(0, "base", "padded tokens of a forward pass at most; a step accumulates gradients "
                                   "over as many passes as it needs (0 = the whole step at once)")
    warmup: int = option(20, "base", "steps over which the rates rise from 0; then they fall linearly to 0")
    weight_decay: float = option(0.0, "base", "AdamW's weight decay; never applied to gates")
    clip: float = option(1.0, "base", "gradient norm at most")
    log_every: int = option(40, NEVER, "steps between two lines of progress")
    eval_every: int = option(100, "base", "steps between two evaluations on development rows")
    # checkpoints
    save_every: int = option(100, NEVER, "steps between two checkpoints to go on from")
    save_minutes: float = option(10.0, NEVER, "minutes between two checkpoints at most")
    # a small backbone from scratch
    pretrain_steps: int = option(1500, "pretrain", "steps of --stage pretrain")
    pretrain_width: int = option(128, "pretrain", "width d of a backbone that --stage pretrain makes")
    pretrain_layers: int = option(4, "pretrain", "layers L of a backbone that --stage pretrain makes")


# The rates of the large presets are ours and unswept: sweep --fast-rate and --slow-rate on development rows first.
LARGE = dict(sources=",".join(tasks.SOURCES), targets=",".join(tasks.TARGETS), max_length=1024, max_new_tokens=64,
             prompt_length=12, rank=8, dtype="bfloat16", slow_rate=1e-3, fast_rate=5e-3, prompt_rate=5e-3,
             target_rate=5e-3, base_steps=200, multitask_steps=2000, multitask_batch=64, target_steps=300, warmup=50,
             target_batch=16, eval_every=200, dev_rows=32)
PRESETS = {
    "toy": dict(sources=",".join(toy.SOURCES), targets=",".join(toy.TARGETS)),
    "qwen2.5-0.5b": dict(LARGE, backbone="Qwen/Qwen2.5-0.5B", tokens_per_batch=8192),
    "qwen2.5-7b": dict(LARGE, backbone="Qwen/Qwen2.5-7B", tokens_per_batch=4096, checkpointing="on"),
}


# Options of a method, by the kind of preset. The micro-world's rates are the best of the grids in suite.py on
# development rows, one seed; the large ones are unswept, after the sources in brackets.
METHOD_OPTIONS = {
    "toy": {
        "pt": dict(target_rate=0.1),
        "spot": dict(prompt_rate=0.1, target_rate=0.03),
        "spot-nearest": dict(prompt_rate=0.1, target_rate=0.03),  # not swept: as spot
        "attempt": dict(prompt_rate=0.1, target_rate=0.3),
        "mpt": dict(prompt_rate=0.1, target_rate=0.03),
        "deep-pt": dict(target_rate=0.04),
        "deep-spot": dict(prompt_rate=0.1, target_rate=0.02),
        "deep-spot-nearest": dict(prompt_rate=0.1, target_rate=0.04),
        "deep-mpt": dict(prompt_rate=0.04, target_rate=0.2),
        "adapter": dict(prompt_rate=0.01, target_rate=0.003),
        "lora": dict(prompt_rate=0.01, target_rate=0.003),
        "bitfit": dict(prompt_rate=0.1, target_rate=0.03),
        "ft": dict(prompt_rate=0.0003, target_rate=0.0001),
    },
    "large": {
        **{name: dict(prompt_length=100) for name in ("pt", "spot", "spot-nearest", "mpt")},  # [Lester et al. 2021]
        "attempt": dict(prompt_length=100, rank=100),  # [Asai et al. 2022]
        "adapter": dict(rank=64, prompt_rate=2e-4, target_rate=2e-4),  # [Houlsby et al. 2019]
        "lora": dict(rank=8, prompt_rate=2e-4, target_rate=2e-4),  # [Hu et al. 2022]
        "bitfit": dict(dtype="float32", autocast=True, prompt_rate=1e-3, target_rate=1e-3),
        "ft": dict(dtype="float32", autocast=True, prompt_rate=1e-5, target_rate=1e-5),
    },
}


def parse(argv: list[str], about: str = "") -> tuple[Config, dict]:
    """Command line -> Config, and the options that differ from the defaults: the preset's and those typed.

    Raises UserError for an unknown option, value or type.
    """
    parser = Parser(prog="train.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    for f in dataclasses.fields(Config):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default != "" else "")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata["choices"])
        parser.add_argument(flag(f.name), default=None, help=text.replace("%", "%%"), **kind)
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run by its own options and whatever "
                        "else is given (repeating the command does the same)")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    typed.pop("debug")  # errors.py takes it
    for name in ("backbone", "data_root"):
        if os.path.isdir(typed.get(name, "")):  # its whole path: seen from another folder it is not the hub's, say
            typed[name] = str(Path(typed[name]).resolve())
    if "resume" in typed:  # the run's own options as they are, but for what is typed
        resumed = Path(typed.pop("resume"))
        options = read_options(resumed)
        if (resumed / "env.json").exists():
            raise UserError(f"--resume '{resumed}' is a stage of a run; go on with the run: --resume {resumed.parent}")
        if Path(typed.get("run", resumed)) != resumed:
            raise UserError(f"--resume '{resumed}' goes on in that folder, but --run is '{typed['run']}'; leave one of "
                            "them out")
        typed["run"] = str(resumed)
        return Config(**{**options, **typed}), typed
    preset, method = typed.get("preset", "toy"), typed.get("method", "talora")
    changed = {**PRESETS[preset], **METHOD_OPTIONS["toy" if preset == "toy" else "large"].get(method, {}), **typed}
    cfg = Config(**changed)
    sets = method_of(cfg).options
    wanted = {name: follow(cfg, value) if isinstance(value, str) else value for name, value in sets.items()}
    for name, value in wanted.items():
        if value == sets[name] and typed.get(name, value) != value:  # not one that follows another option
            raise UserError(f"--variant {cfg.variant} sets {flag(name)} {value}, the command {typed[name]}; leave one "
                            "of them out")
    cfg, changed = dataclasses.replace(cfg, **wanted), {**changed, **wanted}

    # what follows from other options
    if not cfg.run:
        parts = [cfg.preset] + [cfg.method] * (cfg.method != "talora") + [cfg.variant] * bool(cfg.variant)
        parts += [f"seed{cfg.seed}"] * (cfg.seed != 0)
        cfg.run = "runs/" + "-".join(parts)
    if cfg.data_root:  # whatever tasks are there
        here = {name: [task for task in names if os.path.isdir(Path(cfg.data_root) / task)]
                for name, names in (("sources", tasks.SOURCES), ("targets", tasks.TARGETS))}
        cfg.sources = typed.get("sources", ",".join(here["sources"]))
        cfg.targets = typed.get("targets", ",".join(here["targets"]))
    if not cfg.base_task:
        cfg.base_task = (split_names(cfg.sources) or [""])[0]
    return cfg, {name: getattr(cfg, name) for name in changed}


def follow(cfg: Config, value: str):
    """The value of another option ("fast_rate"), a part of it ("fast_rate/8"), or the string itself."""
    name, _, part = value.partition("/")
    return getattr(cfg, name) / float(part) if part else getattr(cfg, name, value)


def unread(cfg: Config) -> list[str]:
    """Options that some methods read, but not this one: sizes, rates, regulariser. By its row in the table."""
    method = method_of(cfg)
    reads = set(method.model.reads)
    if not any(tensor.startswith("gate") for learns in method.learns.values() for tensor in learns):
        reads.discard("gate_per_head")
    reads |= {f"{rate}_rate" for learns in method.learns.values() for rate in learns.values()}
    if method.regularised:
        reads |= {"regulariser", "reg_weight"}
    sizes = [f.name for f in dataclasses.fields(TALoRAConfig)]
    rates = [f.name for f in dataclasses.fields(Config) if f.name.endswith("_rate")]
    return [name for name in (*sizes, *rates, "regulariser", "reg_weight") if name not in reads]


def check(cfg: Config, argv: Sequence[str] = ()) -> None:
    """Refuse options that cannot work before anything is loaded or written; UserError with all of them at once.

    argv: the command line, in which nothing may stand that the method does not read.
    """
    problems, typed = [], {word.partition("=")[0].replace("--no-", "--") for word in argv}
    idle = [flag(name) for name in unread(cfg) if flag(name) in typed]
    method = f"--variant {cfg.variant}" if cfg.variant else f"--method {cfg.method}"
    if idle and cfg.stage != "pretrain":
        problems.append(f"{method} does not read {', '.join(idle)}; leave {'it' if len(idle) == 1 else 'them'} out")
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        least = 0 if f.name in ("seed", "warmup", "tokens_per_batch") else 1
        most = MOST.get(f.name, 10**9 if f.type is int else 10**4)
        if f.type is int and not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            problems.append(f"{flag(f.name)} is {value}, but must be {limit}")
        if f.type is float and not (0 <= value <= most and (value > 0 or f.name in MAY_BE_ZERO)):
            zero = " or 0" * (f.name in MAY_BE_ZERO)
            problems.append(f"{flag(f.name)} is {value}, but must be a number above 0{zero}, and at most {most:g}")
        if f.type is str and not tasks.writable(value):
            problems.append(f"{flag(f.name)} {value!r} has characters that no name has, or is too long; type it anew")
    if cfg.method == "talora" and cfg.rank > cfg.prompt_length:
        problems.append(f"--rank is {cfg.rank}, above --prompt-length {cfg.prompt_length}: B has only that many rows, "
                        "so a larger rank adds nothing; lower it")
    if cfg.data_root and not os.path.isdir(cfg.data_root):
        problems.append(f"--data-root '{cfg.data_root}' is no folder; it should hold <task>/train.jsonl and test.jsonl")
    try:
        shots_of(cfg)
    except ValueError:
        problems.append(f"--shots is '{cfg.shots}', but must be numbers from 0 (all examples), such as 32 or 8,32,0")
    if cfg.variant and cfg.method != "talora":
        problems.append(f"--variant {cfg.variant} is one of talora and does not go with --method {cfg.method}; leave "
                        "one of them out")
    if cfg.method in ("ft", "bitfit") and cfg.dtype != "float32":
        problems.append(f"--method {cfg.method} changes weights of the backbone, and --dtype {cfg.dtype} rounds small "
                        "steps away; use --dtype float32 --autocast")
    stages = method_of(cfg).stages
    if cfg.stage not in ("pretrain", "all", *stages):
        problems.append(f"{method} has no stage '{cfg.stage}'; its stages are {', '.join(stages)}")
    sources, targets = split_names(cfg.sources), split_names(cfg.targets)
    if not sources and not problems:
        problems.append(f"no source task was found in '{cfg.data_root}' (known: {', '.join(tasks.SOURCES)}); name the "
                        "tasks that are there with --sources")
    elif cfg.base_task not in sources and not problems:
        problems.append(f"--base-task '{cfg.base_task}' is not among the sources {', '.join(sources)}")
    if not targets and cfg.stage in ("target", "all") and not problems:
        problems.append(f"no target task was found in '{cfg.data_root}'; name some with --targets")
    unfit = [name for name in [*sources, *targets] if not tasks.can_be_folder(name)]
    if unfit:
        problems.append(f"{unfit[0]!r} cannot be a task: its name is a folder's, without / or \\, no dot in front, no "
                        f"ending such as {', '.join(tasks.OURS)}, and no longer than 255 bytes")
    for names in (sources, targets):
        problems += [f"task '{name}' is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    both = [name for name in targets if name in sources]
    if both and "multitask" in stages:
        problems.append(f"{', '.join(both)} is a source and a target; leave it out of one of them")
    if 0 < cfg.tokens_per_batch < cfg.max_length:
        problems.append(f"--tokens-per-batch is {cfg.tokens_per_batch}, less than one row of --max-length "
                        f"{cfg.max_length}; raise it or lower that")
    if cfg.pretrain_width % 8:
        problems.append(f"--pretrain-width is {cfg.pretrain_width}, but must be a multiple of 8 (4 heads of even size)")
    place = next(folder for folder in (Path(cfg.run).absolute(), *Path(cfg.run).absolute().parents)
                 if os.path.exists(folder))
    if not place.is_dir():
        problems.append(f"--run '{cfg.run}' is a file, or in one; name a folder")
    elif not os.access(place, os.W_OK):
        problems.append(f"--run '{cfg.run}' cannot be written: there is no permission for {place}; name another folder")
    device, here = parallel.place(cfg.device), parallel.told("LOCAL_WORLD_SIZE")
    if device.startswith("cuda") and here > torch.cuda.device_count() > 0:
        problems.append(f"torchrun started {here} processes, but there are {torch.cuda.device_count()} GPUs; lower "
                        "--nproc-per-node")
        device = "cpu"
    usable = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", cfg.device) is not None
    try:
        if usable:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if usable and device.startswith("cuda") and "bfloat16" in (cfg.dtype, "bfloat16" * cfg.autocast):
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            problems.append(f"--device {device} does not know bfloat16; use --dtype float32 --no-autocast")
    if not usable:
        problems.append(f"--device '{device}' is not to be had here; use --device cpu, cuda, cuda:1, mps or auto")
    if problems:
        raise UserError("; ".join(problems))


def plan(cfg: Config) -> list[str]:
    """The stages that --stage asks for, preceded by those they build on."""
    if cfg.stage == "pretrain":
        return ["pretrain"]
    last = "target" if cfg.stage == "all" else cfg.stage
    stages = method_of(cfg).stages
    first = ["pretrain"] if cfg.data_root and not cfg.backbone else []  # the micro-world's backbone reads no Chinese
    return first + list(stages[: stages.index(last) + 1])


def read_options(folder: Path) -> dict:
    """What options.json of a run or a stage holds; UserError if it is not there, or an option is not what it can be."""
    path, remedy = folder / "options.json", "give --run or --resume a folder that train.py made"
    options, fields = read_json(path, remedy, run=""), {f.name: f for f in dataclasses.fields(Config)}
    for name, value in options.items():
        f = fields.get(name)
        choices, kind = (f.metadata["choices"], f.type) if f else ((), None)
        if not (type(value) is kind or kind is float and type(value) is int) or choices and value not in (
                *choices, f.default):
            must = f"be one of {', '.join(choices)}" if choices else f"be of type {kind.__name__}" if f else "go"
            raise UserError(f"'{path}' says {name} {str(value)[:80]!r}, but that must {must}; {remedy}")
    return options


def depends(stage: str) -> list[str]:
    """Names of the options that the outcome of a stage depends on."""
    until = ORDER[: ORDER.index(stage) + 1]
    return [f.name for f in dataclasses.fields(Config) if f.metadata["since"] in until]


def method_of(cfg: Config) -> Method:
    """The method of these options, or the variant of it."""
    return VARIANTS[cfg.variant] if cfg.variant else METHODS[cfg.method]


def shots_of(cfg: Config) -> list[int]:
    """The numbers of --shots; ValueError for anything else."""
    shots = [int(part) for part in cfg.shots.split(",")]
    if min(shots) < 0 or len(set(shots)) < len(shots):
        raise ValueError
    return shots


def stage_folder(cfg: Config, stage: str) -> Path:
    """The subfolder of a stage; the target stage has one for each number of shots."""
    name = (f"target-{cfg.shots}-shot" if cfg.shots != "0" else "target-full") if stage == "target" else stage
    return Path(cfg.run) / name


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
