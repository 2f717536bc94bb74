r"""What a training step costs, in time and memory, beside the least that it could cost and beside the library `peft`.

    python bench.py                                             the micro-world's shape, in minutes on a laptop
    python bench.py --shape qwen2.5-0.5b --layers 2             two of its layers, on a CPU
    python bench.py --shape qwen2.5-7b --out results/bench      the paper's, on a GPU

A step is forward, backward, clipping and optimizer on one micro-batch. With n parameters outside the embeddings and
t tokens, the forward pass takes 2 n t FLOP and the backward pass through the activations another 2 n t; the 2 n t for
the gradients of frozen weights are never computed. So

    share of peak = 4 n t / (seconds of a step * FLOP a second of the fastest square matrix product measured here)

where t counts all that the backbone reads: text, padding and rows of a prompt in front. Checkpointing computes the
forward pass twice, 6 n t, of which 4 n t count as useful. The *floor* is the frozen backbone with one trainable vector,
added to every input embedding: whoever trains anything at the input pays at least that.

Every contender reads the same batches, rows with the lengths of the sixteen data sets cut by a budget of tokens, and
all take turns on each batch, so that a busy machine slows all of them down. After a warm-up of one step a batch and one
more, a batch counts with the median of its repeats, and a step is the mean over the batches. Floor, TA-LoRA (gates at
zero) and LoRA (B at zero) start as the same function, so their loss in the first step has to be the same: checked.

Peak memory is that of the warm-up, backbone included, other contenders left out; on a CPU there is "-". The weights
are random and nothing is downloaded. What comes out holds for the machine it was measured on; compare ratios.
"""

import argparse
import copy
import gc
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from baselines import METHODS
from checkpoint import write_json
from config import Config, parse
from data import Batch, Encoded, Sampler, collate
from errors import Parser, RunFailed, UserError, program
from frozen import FrozenLM, Output, TALoRAConfig
from model import TALoRA
from parallel import place
from train import build_optimizer, environment, learning_tensors, train_step

try:
    import peft
except ImportError:  # not a dependency: its two rows are left out
    peft = None

# The published shapes, under the names of the presets of train.py.
SHAPES = {
    "toy": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=184, tie_word_embeddings=False),
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
# Characters of prompt and answer, median and 95th percentile, of samples of the sixteen data sets. Here a character is
# a token; a tokenizer makes fewer, so that prompts in front of the text weigh more in practice than they do here.
LENGTHS = {
    "afqmc": (77, 97), "amazon": (85, 168), "thucnews": (76, 81), "bq": (72, 94), "cmnli": (92, 149),
    "cmrc2018": (549, 941), "sanwen": (99, 135), "cote_mfw": (72, 141), "chnsenticorp": (113, 286),
    "tnews": (94, 103), "ocnli": (75, 103), "lcqmc": (68, 81), "drcd": (478, 817), "c3": (180, 772),
    "cote_bd": (69, 153), "finre": (251, 279),
}
LONGEST, ANSWER = 1024, 3  # tokens of a row at most; of an answer, its end included


def mixture(vocabulary: int, longest: int) -> dict[str, list[Encoded]]:
    """600 rows of random tokens for each of the sixteen tasks, their lengths about log-normal."""
    rng, rows = random.Random(0), {}
    for task, (median, most) in LENGTHS.items():
        spread = math.log(most / median) / 1.645  # the 95th percentile is 1.645 deviations away
        lengths = [round(median * math.exp(rng.gauss(0, spread))) for _ in range(600)]
        rows[task] = [random_row(vocabulary, min(max(20, length), longest), task) for length in lengths]
    return rows


def random_row(vocabulary: int, length: int, task: str = "") -> Encoded:
    ids = torch.randint(vocabulary, (length,)).tolist()
    return Encoded(ids[:-ANSWER], tuple(ids[-ANSWER:]), (), task)


class Floor(FrozenLM):
    """The frozen backbone, with the library's own attention, and one vector (d,) that is added to every embedding."""

    method, attention = "floor", "sdpa"

    def __init__(self, backbone: PreTrainedModel):
        super().__init__(backbone, TALoRAConfig())
        self.vector = nn.Parameter(torch.zeros(backbone.config.hidden_size, device=self.device))
        self.add_task("any")

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, task_ids: Tensor,
               text: Tensor) -> dict:
        words = self.backbone.get_input_embeddings()(input_ids)  # (B, T, d)
        return dict(inputs_embeds=words + self.vector.to(words.dtype), attention_mask=attention_mask,
                    position_ids=position_ids)


class EveryPosition(TALoRA):
    """TA-LoRA with logits at every position, of which the loss then picks those of the answer: the usual way."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor, labels: Tensor) -> Output:
        logits = super().forward(input_ids, attention_mask, task_ids).logits[:, :-1].float()  # (B, T-1, V)
        wanted = labels[:, 1:]  # (B, T-1)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return Output(losses=losses.sum(1) / (wanted != -100).sum(1))  # (B,)


# --------------------------------------------------------------------------------------------------------- contenders

Step = Callable[[Batch], float]  # one optimisation step on a batch -> its loss


@dataclass
class Bench:
    """What all measurements share: the options, the machine, the backbone, the batches."""

    options: argparse.Namespace
    cfg: Config  # of the preset with the shape's name: rates, clipping, regulariser, P and r as train.py has them
    device: torch.device

    @cached_property
    def backbone(self) -> PreTrainedModel:
        """Random weights, made where they stay; bf16 on a GPU, fp32 on a CPU. UserError if there is no room for it."""
        shape = Qwen2Config(**shape_of(self.options), max_position_embeddings=32768, rms_norm_eps=1e-6,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None,
                            eos_token_id=1, pad_token_id=0)
        dtype, room = torch.float32, math.inf
        if self.gpu:
            dtype, room = torch.bfloat16, torch.cuda.mem_get_info()[0]
        elif hasattr(os, "sysconf"):  # not on Windows
            room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with torch.device("meta"):
            size = sum(p.nbytes for p in AutoModelForCausalLM.from_config(shape, dtype=dtype).parameters())
        if size > room:
            raise UserError(f"a backbone of this shape takes {size / 1e9:.1f} GB, but there are {room / 1e9:.1f} GB; "
                            "make it smaller with --layers, or take another --shape")
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(shape, dtype=dtype)

    def shared_backbone(self) -> PreTrainedModel:
        """A backbone with modules and settings of its own whose weights are the one backbone's."""
        return copy.deepcopy(self.backbone, {id(p): p for p in self.backbone.parameters()})

    @cached_property
    def batches(self) -> list[Batch]:
        """Micro-batches of the mixture from the shortest rows to the longest, evenly spread over a window."""
        sampler = Sampler(mixture(self.backbone.config.vocab_size, min(LONGEST, self.options.tokens)), 256, 0,
                          tokens_per_batch=self.options.tokens)  # 256 rows a step: the tokens are the limit
        window = sorted((batch for _ in range(Sampler.WINDOW) for batch in sampler.next()), key=len, reverse=True)
        n = self.options.batches
        return [self.collate(window[(2 * i + 1) * len(window) // (2 * n)]) for i in range(n)]

    def collate(self, rows: list[Encoded]) -> Batch:
        return collate(rows, range(len(rows)), 0, self.device)  # `ours` takes the ids modulo the number of tasks

    @cached_property
    def parameters(self) -> int:
        """n: the backbone's parameters but for embeddings and head."""
        return sum(p.numel() for p in self.backbone.model.layers.parameters())

    @cached_property
    def peak(self) -> float:
        """FLOP a second of the fastest of a few square matrix products in the backbone's dtype."""
        found = []
        for n in (4096, 8192, 16384) if self.gpu else (1024, 2048):
            a, b = (torch.randn(n, n, device=self.device, dtype=self.backbone.dtype) for _ in range(2))
            found.append(2 * n**3 / self.seconds(lambda a=a, b=b: a @ b, 10 if self.gpu else self.options.repeats))
        return max(found)

    @cached_property
    def resident(self) -> int:
        """Bytes on the GPU before any contender is made: the backbone, the batches, workspaces."""
        self.backbone, self.peak, self.batches  # noqa: B018  made now
        return torch.cuda.memory_allocated() if self.gpu else 0

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def timed(self, work: Callable) -> float:
        """Seconds of one call; on a GPU by its own clock."""
        if not self.gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def seconds(self, work: Callable, repeats: int) -> float:
        """Median time of a call, after one that is not counted."""
        work()
        return statistics.median(self.timed(work) for _ in range(repeats))

    # How each contender is made; the step that comes back is train.py's own for what is ours.

    def floor(self) -> Step:
        return self.ours(Floor(self.shared_backbone()), {"vector": "fast"}, False)

    def talora(self, tasks: int = len(LENGTHS), length: int = 0, checkpointing: bool = False, regularise: bool = True,
               kind: type[TALoRA] = TALoRA) -> Step:
        """The multitask stage: everything learns. length: P, the preset's if 0."""
        backbone, P = self.shared_backbone(), length or self.cfg.prompt_length
        if checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = kind(backbone, [f"task {i}" for i in range(tasks)], TALoRAConfig(P, min(P, self.cfg.rank)))
        learns = learning_tensors(model, METHODS["talora"], "multitask", list(range(tasks)))
        return self.ours(model, learns, regularise)

    def ours(self, model: FrozenLM, learns: dict[str, str], regularise: bool) -> Step:
        optimizer = build_optimizer(model.train(), learns, self.cfg)

        def step(batch: Batch) -> float:  # a row of each task in turn, which is as many tasks as a batch can hold
            batch = replace(batch, task_ids=batch.task_ids % len(model.tasks))
            return train_step(model, optimizer, [batch], self.cfg, regularise)["loss"]

        return step

    def peft(self, adapter) -> Step:
        """peft as its users call it: labels go in, the loss comes out of logits at every position."""
        model = peft.get_peft_model(self.shared_backbone(), adapter).train()
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.95))

        def step(batch: Batch) -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, self.cfg.clip)
            optimizer.step()
            return loss.item()

        return step


def measure(bench: Bench, contenders: dict[str, Callable[[], Step]], batches: list[Batch] | None = None,
            in_front: dict[str, int] | None = None) -> list[dict]:
    """Steps of all contenders in turns -> a row of the table for each. in_front: rows of a prompt before each text."""
    gc.collect()  # the contenders of the measurement before
    resident, batches = bench.resident, batches or bench.batches
    steps, times, losses, peaks = {}, {name: [[] for _ in batches] for name in contenders}, {}, {}

    def begin(name: str) -> None:
        torch.manual_seed(0)
        if bench.gpu:
            others = torch.cuda.memory_allocated() - resident
            torch.cuda.reset_peak_memory_stats()
        step = contenders[name]()
        losses[name] = [step(batch) for batch in (*batches, batches[0])][0]
        peaks[name] = (torch.cuda.max_memory_allocated() - others) / 1e9 if bench.gpu else None
        steps[name] = step

    for name in contenders:
        affordable(lambda name=name: begin(name))
    for _ in range(bench.options.repeats):
        for i, batch in enumerate(batches):
            for name, step in list(steps.items()):
                taken = affordable(lambda step=step, batch=batch: bench.timed(lambda: step(batch)))
                if taken is None:
                    del steps[name], step
                else:
                    times[name][i].append(taken)

    seconds = {name: sum(map(statistics.median, times[name])) for name in steps}  # of a step on each batch
    first, text = seconds.get(next(iter(contenders))), sum(int(batch.attention_mask.sum()) for batch in batches)
    table = []
    for name in contenders:
        table.append({"": name, "step, ms": "out of memory"})
        if name in steps:
            front = (in_front or {}).get(name, 0)
            read = sum(batch.input_ids.numel() + front * len(batch.input_ids) for batch in batches)
            table[-1] = {"": name, "step, ms": 1000 * seconds[name] / len(batches),
                         "x the first row": seconds[name] / first if first else None,
                         "text tokens/s": text / seconds[name],
                         "share of peak": 4 * bench.parameters * read / seconds[name] / bench.peak,
                         "peak memory, GB": peaks[name], "share of padding and prompt": 1 - text / read,
                         "first loss": losses[name]}
    return table


def affordable(work: Callable):
    """What ``work`` returns, or None if the memory does not suffice for it."""
    try:
        return work()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    gc.collect()  # after the except clause: the error's traceback held on to all tensors
    torch.cuda.empty_cache()
    return None


# ------------------------------------------------------------------------------------------------------- measurements

def methods(bench: Bench) -> list[dict]:
    """A step of each method, and of the floor below them all"""
    contenders = {"floor": bench.floor, "TA-LoRA": bench.talora,
                  "TA-LoRA, checkpointing": lambda: bench.talora(checkpointing=True)}
    if peft:
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=100)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        contenders |= {PEFT_PROMPT: lambda: bench.peft(prompt), "peft LoRA": lambda: bench.peft(lora)}
    rows = measure(bench, contenders, in_front={PEFT_PROMPT: 100})
    start = [row["first loss"] for row in rows if "first loss" in row and row[""] != PEFT_PROMPT]
    if start and not max(start) - min(start) <= (0.02 if bench.gpu else 1e-3) * max(start):  # NaN fails, too
        raise RunFailed(f"the contenders do not compute the same: their losses in the first step are {start}")
    return rows


def tasks(bench: Bench) -> list[dict]:
    """TA-LoRA's step against the number of tasks N, with the regulariser, which reaches every task, and without"""
    return [row for r, says in ((True, ""), (False, ", no regulariser")) for row in
            measure(bench, {f"N = {N}{says}": lambda N=N, r=r: bench.talora(N, regularise=r) for N in (8, 64, 512)})]


def prompts(bench: Bench) -> list[dict]:
    """TA-LoRA's step against the length of the prompt P"""
    return measure(bench, {"floor": bench.floor, **{f"P = {P}": lambda P=P: bench.talora(length=P)
                                                    for P in (4, 16, 64, 128)}})


def lengths(bench: Bench) -> list[dict]:
    """A step against the length of the text T, at the same number of tokens and no padding"""
    table, tokens = [], bench.options.tokens
    for T in (T for T in (64, 256, 1024, 4096) if T <= tokens):
        batch = bench.collate([random_row(bench.backbone.config.vocab_size, T) for _ in range(tokens // T)])
        table += measure(bench, {f"T = {T}, floor": bench.floor, f"T = {T}, TA-LoRA": bench.talora},
                         [batch] * bench.options.batches)
    return table


def logits(bench: Bench) -> list[dict]:
    """Logits of the answers only, as here, against logits at every position, most of which no loss looks at"""
    rows = measure(bench, {"answers only": bench.talora, "every position": lambda: bench.talora(kind=EveryPosition)})
    wanted = [batch.labels[:, 1:] for batch in bench.batches]
    counts = [max(int((w != -100).sum()) for w in wanted), max(w.numel() for w in wanted)]  # of the largest batch
    return [{"": row[""], "logits in fp32, GB": 4 * count * bench.backbone.config.vocab_size / 1e9, **row}
            for row, count in zip(rows, counts)]


@torch.no_grad()
def labels(bench: Bench) -> list[dict]:
    """Scoring labels of 1 to 3 tokens and their end: all behind one copy of the text, against the text once a label"""
    text, count = min(200, bench.options.tokens), max(1, bench.options.tokens // 512)
    vocabulary, rng, rows = bench.backbone.config.vocab_size, random.Random(0), []
    model = TALoRA(bench.shared_backbone(), ["task"], TALoRAConfig(bench.cfg.prompt_length, bench.cfg.rank))
    torch.nn.init.constant_(model.gate, 0.5)
    ids = torch.randint(2, vocabulary, (count, text), device=bench.device)
    mask, task_ids = torch.ones_like(ids), torch.zeros(count, dtype=torch.long, device=bench.device)
    for C in (2, 15, 44):
        choices = [[rng.randrange(2, vocabulary) for _ in range(rng.randint(1, 3))] + [1] for _ in range(C)]

        def once(choices=choices):
            return model.score(ids, mask, task_ids, [choices] * count)

        def per_label(choices=choices):
            return torch.cat([model.score(ids, mask, task_ids, [[choice]] * count) for choice in choices], 1)

        def both(once=once, per_label=per_label):
            close = dict(rtol=2e-2, atol=0.5) if bench.gpu else dict(rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(once(), per_label(), **close)
            return [1000 * bench.seconds(work, bench.options.repeats) / count for work in (once, per_label)]

        fast, slow = affordable(both) or ("out of memory", None)
        rows.append({"labels": C, "text read once, ms a row": fast, "text read per label, ms a row": slow,
                     "ratio": slow / fast if slow else None})
    return rows


def padding(bench: Bench) -> list[dict]:
    """Padding: the sixteen tasks, equally many rows of each, 64 rows a step, 64 steps, by how batches are made"""
    rows, size, steps = mixture(2, LONGEST), 64, 64
    order = random.Random(0).sample([row for task in rows.values() for row in task], steps * size)
    whole = [order[i : i + size] for i in range(0, len(order), size)]
    waste = 1 - sum(map(len, order)) / sum(len(step) * max(map(len, step)) for step in whole)
    table = [{"batches": f"{size} rows in random order", "share of padding": waste, "rows a forward pass": size}]
    for budget in (None, 2048, 4096, 8192, 16384):
        sampler, batches = Sampler(rows, size, 0, tokens_per_batch=budget), []
        for _ in range(steps):
            batches += sampler.next()
        name = f"sorted in a window, at most {budget:,} tokens" if budget else f"{size} rows sorted and cut"
        table.append({"batches": name, "share of padding": sampler.padding,
                      "rows a forward pass": round(statistics.mean(map(len, batches)))})
    return table


def imports(bench: Bench) -> list[dict]:
    """Imports in a process of its own: the libraries alone, and train.py with all that it needs"""
    table = []
    for what, code in (("torch", "pass"), ("torch and transformers", "from transformers import Qwen2Model"),
                       ("train.py", "import train")):
        seconds = []
        for _ in range(bench.options.repeats):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import torch; {code}"], cwd=Path(__file__).parent, check=True)
            seconds.append(time.perf_counter() - started)
        table.append({"": what, "seconds": statistics.median(seconds)})
    return table


PEFT_PROMPT = "peft prompt tuning, 100 tokens"
SECTIONS = {f.__name__: f for f in (methods, tasks, prompts, lengths, logits, labels, padding, imports)}


def goals(tables: dict[str, list[dict]]) -> list[dict]:
    """The goals, which are set for the shape qwen2.5-7b on a GPU with 4,096 tokens a step"""
    row = {r[""]: r for table in ("tasks", "methods") for r in tables.get(table, ())}

    def ratio(key: str, above: str, below: str) -> float | None:
        a, b = (row.get(name, {}).get(key) for name in (above, below))
        return a / b if isinstance(a, float) and isinstance(b, float) else None

    return [{"": what, "here": value, "goal": goal} for what, value, goal in (
        ("step, TA-LoRA / floor", ratio("step, ms", "TA-LoRA", "floor"), "<= 1.05"),
        ("text tokens/s, TA-LoRA / peft prompt tuning", ratio("text tokens/s", "TA-LoRA", PEFT_PROMPT), ">= 2.5"),
        ("step, 512 tasks / 8 tasks", ratio("step, ms", "N = 512", "N = 8"), "<= 1.05"),
        ("TA-LoRA's share of the measured peak", row.get("TA-LoRA", {}).get("share of peak"), ">= 75%"),
        ("peak memory with checkpointing, GB", row.get("TA-LoRA, checkpointing", {}).get("peak memory, GB"), "<= 18"))]


def show(title: str, rows: list[dict]) -> str:
    """Rows as a table of Markdown; what a row lacks is a dash."""
    def cell(row: dict, key: str) -> str:
        value = row.get(key)
        if isinstance(value, float):
            share = "share" in f"{key} {row.get('')}"
            return f"{value:.1%}" if share else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else value

    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---", *["---:"] * (len(keys) - 1)], *([cell(row, key) for key in keys] for row in rows)]
    return f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shape_of(options: argparse.Namespace) -> dict:
    asked = {"num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    return SHAPES[options.shape] | {name: value for name, value in asked.items() if value}


def parser() -> Parser:
    options = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="toy", help="the backbone's (default: the micro-world's)")
    options.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these measurements")
    options.add_argument("--tokens", type=int, help="tokens of a micro-batch at most, padding included (default: 4,096 "
                         "on a GPU, 1,024 on a CPU)")
    options.add_argument("--batches", type=int, default=6, help="different micro-batches (default: 6)")
    options.add_argument("--repeats", type=int, default=3, help="timed steps on each, the median counts (default: 3)")
    options.add_argument("--layers", type=int, help="layers instead of the shape's")
    options.add_argument("--vocabulary", type=int, help="size of the vocabulary instead of the shape's")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    options.add_argument("--out", default="runs/bench", help="folder for <shape>-<device>.json (default: runs/bench)")
    return options


def main(argv: list[str]) -> None:
    options = parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use --device cpu, or auto")
    for name, least in (("tokens", 32), ("batches", 1), ("repeats", 1), ("layers", 1), ("vocabulary", 8)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}, but must be at least {least}")
    cfg, _ = parse(["--preset", options.shape, *(("--device", options.device) if options.device != "auto" else ())])
    bench = Bench(options, cfg, torch.device(place(cfg.device)))
    options.tokens = options.tokens or (4096 if bench.gpu else 1024)
    out = Path(options.out) / f"{options.shape}-{bench.device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = environment(" ".join(["python bench.py", *argv])) | {
        "peft": peft.__version__ if peft else "not installed: its two rows are left out",
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "shape": options.shape, **shape_of(options), "tokens": options.tokens}
    print("\n".join(f"{name:20} {value}" for name, value in report.items()), flush=True)
    report["tables"] = {}
    for name in options.only:
        report["tables"][name] = SECTIONS[name](bench)
        print(show(SECTIONS[name].__doc__, report["tables"][name]), flush=True)
        if "resident" in vars(bench):  # something was trained
            report |= {"peak TFLOP/s": bench.peak / 1e12, "n": bench.parameters, "goals": goals(report["tables"])}
        write_json(out, report)  # as it goes: what was measured is kept
    if "goals" in report:
        print(show(goals.__doc__, report["goals"]))
        print(f"\npeak: {report['peak TFLOP/s']:.3g} TFLOP/s in {bench.backbone.dtype}, n = {bench.parameters:,}")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    sys.exit(program(main, sys.argv[1:]))
