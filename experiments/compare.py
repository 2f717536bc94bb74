r"""Baselines and ablations by TA-LoRA's own program: train.py with another Method (what is trained, in which stage).

    python -m experiments.compare --method lora --stage all --shots 8 32        a baseline
    python -m experiments.compare --variant reg-off --stage all --shots 8       an ablation of TA-LoRA

All other options are those of train.py (python train.py --help). An option that the method does not use is refused.
`python evaluate.py --run RUN` prints the tables of any method's run again.
"""

import argparse
import dataclasses
import sys

import train
from checkpoint import Parser, UserError, run_program
from experiments import baselines
from experiments.variants import VARIANTS
from model import TALoRAConfig
from train import TALORA, Config, Method, flag


def on_both(*tensors: str) -> dict[str, dict[str, str]]:
    """Trained on the sources and then on a target: at --prompt-rate, then at --target-rate."""
    return {"multitask": dict.fromkeys(tensors, "prompt"), "target": dict.fromkeys(tensors, "target")}


def rates(prompt: float, target: float, **large) -> dict[str, dict]:
    """Learning rates in the micro-world, the best on development rows of the grids in suite.py, with one seed; options
    of the large presets: sizes of the papers that baselines.py names, rates from suite.py's grids where it has one."""
    return {"toy": {"prompt_rate": prompt, "target_rate": target}, "large": large}


AT_INPUT = {"prompt_length": 100, "prompt_rate": 1e-2, "target_rate": 1e-3}  # the best of spot and of pt
METHODS = {method.name: method for method in (
    TALORA,
    Method("pt", "an input prompt for each target, from scratch", baselines.InputPrompts,
           {"target": {"prompt": "target"}}, defaults={"toy": {"target_rate": 0.1}, "large": AT_INPUT}),
    Method("spot", "one input prompt for all sources, the start of every target's", baselines.InputPrompts,
           on_both("prompt"), defaults=rates(0.1, 0.03, prompt_length=100, prompt_rate=0.01, target_rate=0.003)),
    Method("attempt", "an input prompt for each source; a target mixes them, by the text, into its own",
           baselines.Attempt, {"multitask": {"prompt": "prompt"},
                               "target": {"down": "target", "up": "target", "prompt": "target"}}, per_task=True,
           defaults=rates(0.1, 0.3, **AT_INPUT, rank=100)),
    Method("mpt", "a shared input prompt times a rank-1 factor of the task; without distillation", baselines.MPT,
           on_both("shared", "u", "v"), per_task=True,
           defaults=rates(0.1, 0.03, prompt_length=100, prompt_rate=0.1, target_rate=0.03)),
    Method("deep-pt", "a gated prompt in every layer for each target, from scratch", baselines.DeepPrompts,
           {"target": {"prompt": "target", "gate": "target"}}, defaults={"toy": {"target_rate": 0.04}}),
    Method("deep-spot", "one gated prompt in every layer for all sources, the start of every target's",
           baselines.DeepPrompts, on_both("prompt", "gate"), defaults=rates(0.1, 0.02)),
    Method("deep-spot-nearest", "gated prompts in every layer for each source; a target starts from the nearest",
           baselines.DeepPrompts, on_both("prompt", "gate"), per_task=True,
           defaults=rates(0.1, 0.04, prompt_rate=0.02, target_rate=0.01)),
    Method("deep-mpt", "a shared gated prompt in every layer times a rank-1 factor of the task", baselines.DeepMPT,
           on_both("shared", "u", "v", "gate") | {"target": {"u": "target", "v": "target"}}, per_task=True,
           defaults=rates(0.04, 0.2)),
    Method("adapter", "a bottleneck after attention and MLP of every layer", baselines.Adapter, on_both("backbone"),
           defaults=rates(0.01, 0.003, rank=64, prompt_rate=2e-4, target_rate=2e-4)),
    Method("lora", "low-rank changes of q_proj and v_proj", baselines.LoRA, on_both("backbone"),
           defaults=rates(0.01, 0.003, rank=8, prompt_rate=1e-3, target_rate=1e-3)),
    Method("bitfit", "the backbone's biases", baselines.BitFit, on_both("backbone"),
           defaults=rates(0.1, 0.03, dtype="float32", prompt_rate=1e-3, target_rate=1e-3)),
    Method("ft", "all weights of the backbone", baselines.FullFineTuning, on_both("backbone"),
           defaults=rates(0.0003, 0.0001, dtype="float32", prompt_rate=1e-5, target_rate=1e-5)),
)}


def unused_options(method: Method) -> list[str]:
    """The sizes, options of learning rates and of the regulariser that other methods use, but not this one."""
    used = {*method.model.reads, *(f"{rate}_rate" for stage in method.learns.values() for rate in stage.values())}
    used |= {"regulariser", "reg_weight"} if method.regularised else set()
    used |= {"relative_rates"} if method.model.in_layers else set()
    some = ["regulariser", "reg_weight", "relative_rates", *(f.name for f in dataclasses.fields(TALoRAConfig))]
    return [f.name for f in dataclasses.fields(Config)
            if (f.name in some or f.name.endswith("_rate")) and f.name not in used]


def check_typed(argv: list[str], method: Method) -> None:
    """Refuse what is typed but would have no effect. Raises UserError."""
    typed = {word.partition("=")[0].replace("--no-", "--") for word in argv}
    unused = [flag(name) for name in unused_options(method) if flag(name) in typed]
    if unused:
        raise UserError(f"{method.name} does not use {', '.join(unused)}; leave out what has no effect")
    cfg = train.parse(argv, dataclasses.replace(method, fixes=lambda cfg: {}))
    for name, value in method.fixes(cfg).items():  # its own learning rates follow from those that are typed
        if flag(name) in typed and not name.endswith("_rate") and getattr(cfg, name) != value:
            raise UserError(f"{method.name} sets {flag(name)} {value}, the command {getattr(cfg, name)}; leave it out")
    if method.model in (baselines.BitFit, baselines.FullFineTuning) and cfg.dtype != "float32":
        raise UserError(f"{method.name} needs --dtype float32: {cfg.dtype} would round its small steps away")


def main(argv: list[str]) -> None:
    about = ["methods, then ablations of TA-LoRA (--variant):",
             *(f"  {name:18} {method.says}" for name, method in (METHODS | VARIANTS).items())]
    parser = Parser(prog="python -m experiments.compare", description=__doc__, epilog="\n".join(about),
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--method", choices=METHODS, metavar="NAME", help="TA-LoRA or a baseline")
    which.add_argument("--variant", choices=VARIANTS, metavar="NAME", help="an ablation of TA-LoRA")
    options, rest = parser.parse_known_args(argv)
    method = METHODS[options.method] if options.method else VARIANTS[options.variant]
    check_typed(rest, method)
    name = ["--method", options.method] if options.method else ["--variant", options.variant]
    train.main(rest, method, " ".join(["python -m experiments.compare", *name]))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
