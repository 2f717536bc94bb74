r"""What a training step costs in time and memory, next to the least it could cost and next to the library peft.

    python -m experiments.bench                                      the micro-world's shape, in minutes on a laptop
    python -m experiments.bench --shape qwen2.5-0.5b --layers 2      two of its layers, on a CPU
    python -m experiments.bench --shape qwen2.5-7b                   the paper's, on a GPU

A step is forward, backward, clipping and optimizer on one micro-batch. With n parameters outside the embeddings and t
tokens (text, padding, prompt rows in front), forward takes 2 n t FLOP and backward another 2 n t, since the gradients
of frozen weights are never computed. So

    share of peak = 4 n t / (seconds of a step * FLOP a second of the fastest square matrix product measured here)

(checkpointing computes 6 n t, of which 4 count). The *floor* is the frozen backbone with one trainable vector, added to
every input embedding: nothing that trains at the input can be cheaper. All contenders take turns on the same batches,
rows with the lengths of the sixteen data sets cut by a budget of tokens; a batch counts with the median of its repeats.
Peak memory is that of the warm-up, with the backbone and without the other contenders. The weights are random. The
numbers hold for the machine they were measured on: compare ratios.
"""

import argparse
import copy
import gc
import math
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from checkpoint import Parser, RunFailed, environment, pick_device, run_program, write_json
from data import Batch, Batches, Encoded, collate
from evaluate import markdown
from model import AdaptedLM, TALoRA, TALoRAConfig
from train import TALORA, Config, build_optimizer, check, learning_tensors, parse, train_step

try:
    import peft
except ImportError:  # not a dependency: its two rows are left out
    peft = None

# The published shapes, under the names of train.py's presets.
SHAPES = {
    "toy": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=184, tie_word_embeddings=False),
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}
# Characters of prompt and answer in samples of the data sets, median and 95th percentile; here a character is a token.
LENGTHS = {
    "afqmc": (77, 97), "amazon": (85, 168), "thucnews": (76, 81), "bq": (72, 94), "cmnli": (92, 149),
    "cmrc2018": (549, 941), "sanwen": (99, 135), "cote_mfw": (72, 141), "chnsenticorp": (113, 286),
    "tnews": (94, 103), "ocnli": (75, 103), "lcqmc": (68, 81), "drcd": (478, 817), "c3": (180, 772),
    "cote_bd": (69, 153), "finre": (251, 279),
}
LONGEST, ANSWER = 1024, 3  # tokens of a row at most; of an answer, its end included
BATCHES, REPEATS = 6, 3  # different micro-batches, timed steps on each
TASKS = (8, 64, 512)
PEFT_PROMPT, PEFT_ROWS = "peft prompt tuning, 100 tokens", 100

Step = Callable[[Batch], float]  # one optimizer step on a batch -> its loss


class Floor(AdaptedLM):
    """The frozen backbone, with the library's own attention, and one vector (d,) that is added to every embedding."""

    method, attention = "floor", "sdpa"

    def __init__(self, backbone: PreTrainedModel):
        super().__init__(backbone)
        self.vector = nn.Parameter(torch.zeros(backbone.config.hidden_size, device=self.device))
        self.add_task("any")

    def inputs(self, input_ids: Tensor, *others: Tensor) -> dict:
        given = super().inputs(input_ids, *others)
        words = self.backbone.get_input_embeddings()(given.pop("input_ids"))  # (B, T, d)
        return given | {"inputs_embeds": words + self.vector.to(words.dtype)}


def make_rows(vocabulary: int, longest: int) -> dict[str, list[Encoded]]:
    """600 rows of random tokens for each of the sixteen tasks, their lengths log-normal."""
    rng, rows = random.Random(0), {}
    for task, (median, most) in LENGTHS.items():
        spread = math.log(most / median) / 1.645  # the 95th percentile is 1.645 deviations away
        lengths = [round(rng.lognormvariate(math.log(median), spread)) for _ in range(600)]
        tokens = [torch.randint(vocabulary, (min(max(20, length), longest),)).tolist() for length in lengths]
        rows[task] = [Encoded(ids[:-ANSWER], tuple(ids[-ANSWER:]), (), task) for ids in tokens]
    return rows


class Bench:
    """What the measurements share: the backbone, the batches, the machine's peak, and how each contender is made."""

    def __init__(self, shape: dict, cfg: Config, tokens: int):
        torch.manual_seed(0)
        self.cfg, self.device = cfg, torch.device(pick_device(cfg.device))
        self.gpu = self.device.type == "cuda"
        config = Qwen2Config(**shape, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=1, pad_token_id=0)
        with self.device:  # random weights, made where they stay
            self.backbone = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if self.gpu else torch.float32)
        self.parameters = sum(p.numel() for p in self.backbone.model.layers.parameters())  # n
        steps = Batches(make_rows(shape["vocab_size"], min(LONGEST, tokens)), 256, 0, budget=tokens)
        parts = steps[0]  # short rows to long ones
        spread = [parts[(2 * i + 1) * len(parts) // (2 * BATCHES)] for i in range(BATCHES)]
        self.batches = [collate(part, range(len(part))).to(self.device) for part in spread]
        self.peak = max(self.measure_peak(n) for n in ((4096, 8192, 16384) if self.gpu else (1024, 2048)))
        self.resident = torch.cuda.memory_allocated() if self.gpu else 0  # before any contender is made

    def measure_peak(self, n: int) -> float:
        """FLOP a second of a product of two n x n matrices in the backbone's dtype."""
        a, b = (torch.randn(n, n, device=self.device, dtype=self.backbone.dtype) for _ in range(2))
        return 2 * n**3 / statistics.median([self.time(lambda: a @ b) for _ in range(10)][1:])

    def time(self, work: Callable) -> float:
        """Seconds of one call."""
        device = torch.get_device_module(self.device)
        device.synchronize()
        start = time.perf_counter()
        work()
        device.synchronize()
        return time.perf_counter() - start

    def share_backbone(self) -> PreTrainedModel:
        """A backbone with modules and settings of its own whose weights are the one backbone's."""
        return copy.deepcopy(self.backbone, {id(p): p for p in self.backbone.parameters()})

    def floor(self) -> Step:
        return self.train(Floor(self.share_backbone()), {"vector": "fast"}, regularise=False)

    def talora(self, tasks: int = len(LENGTHS), checkpointing: bool = False, regularise: bool = True) -> Step:
        """The multitask stage."""
        backbone, cfg = self.share_backbone(), self.cfg
        if checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = TALoRA(backbone, [f"task {i}" for i in range(tasks)], TALoRAConfig(cfg.prompt_length, cfg.rank))
        return self.train(model, TALORA.learns["multitask"], regularise)

    def train(self, model: AdaptedLM, learns: dict[str, str], regularise: bool) -> Step:
        """train.py's own step; row i of a batch belongs to task i modulo their number."""
        tasks = len(model.tasks)
        optimizer = build_optimizer(model.train(), learning_tensors(model, learns, list(range(tasks))), self.cfg)

        def step(batch: Batch) -> float:
            batch = replace(batch, task_ids=batch.task_ids % tasks)
            return train_step(model, optimizer, [batch], self.cfg, regularise)["loss"]

        return step

    def peft(self, adapter) -> Step:
        """peft as its users call it: labels go in, the loss comes out of logits at every position."""
        model = peft.get_peft_model(self.share_backbone(), adapter).train()
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

    def measure(self, contenders: dict[str, Callable[[], Step]]) -> list[dict]:
        """Steps of all contenders, in turns -> a row of the table for each."""
        gc.collect()  # the contenders of the measurement before
        rows, steps, times = [], {}, {}
        for name, make in contenders.items():
            torch.manual_seed(0)
            if self.gpu:
                others = torch.cuda.memory_allocated() - self.resident
                torch.cuda.reset_peak_memory_stats()
            steps[name], times[name] = make(), [[] for _ in self.batches]
            losses = [steps[name](batch) for batch in (*self.batches, self.batches[0])]  # the warm-up
            rows.append({"": name, "first loss": losses[0]})
            if self.gpu:
                rows[-1]["peak memory, GB"] = (torch.cuda.max_memory_allocated() - others) / 1e9
        for _ in range(REPEATS):
            for i, batch in enumerate(self.batches):
                for name, step in steps.items():
                    times[name][i].append(self.time(partial(step, batch)))
        text = sum(int(batch.attention_mask.sum()) for batch in self.batches)
        for row in rows:
            seconds = sum(map(statistics.median, times[row[""]]))  # of all batches
            in_front = PEFT_ROWS if row[""] == PEFT_PROMPT else 0
            read = sum(batch.input_ids.numel() + in_front * len(batch.input_ids) for batch in self.batches)
            row |= {"step, ms": 1000 * seconds / len(self.batches), "text tokens/s": text / seconds,
                    "share of padding and prompt": 1 - text / read,
                    "share of peak": 4 * self.parameters * read / seconds / self.peak}
            row["x the first row"] = row["step, ms"] / rows[0]["step, ms"]
        return rows


def measure_methods(bench: Bench) -> list[dict]:
    """The floor, TA-LoRA and peft. RunFailed if those that start as the frozen backbone differ in the first loss."""
    contenders = {"floor": bench.floor, "TA-LoRA": bench.talora,
                  "TA-LoRA, checkpointing": partial(bench.talora, checkpointing=True)}
    if peft:
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PEFT_ROWS)
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        contenders |= {PEFT_PROMPT: partial(bench.peft, prompt), "peft LoRA": partial(bench.peft, lora)}
    rows = bench.measure(contenders)
    start = [row["first loss"] for row in rows if row[""] != PEFT_PROMPT]
    if not max(start) - min(start) <= (0.02 if bench.gpu else 1e-3) * max(start):  # NaN fails, too
        raise RunFailed(f"the contenders do not compute the same: their losses in the first step are {start}")
    return rows


def measure_tasks(bench: Bench) -> list[dict]:
    """TA-LoRA by the number of tasks N, with the regulariser, which reaches every task in every step, and without."""
    return [row for regularise, words in ((True, ""), (False, ", no regulariser")) for row in bench.measure({
        f"N = {N}{words}": partial(bench.talora, N, regularise=regularise) for N in TASKS})]


def show(rows: Sequence[dict]) -> str:
    """Rows as a table of Markdown."""
    return markdown(list(rows[0]), [[format_cell(key, value) for key, value in row.items()] for row in rows])


def format_cell(key: str, value) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if "share" in key else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "-" if value is None else value


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.bench", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy", help="the backbone's (default: the micro-world's)")
    parser.add_argument("--layers", type=int, help="layers, instead of the shape's")
    parser.add_argument("--tokens", type=int, help="of a micro-batch at most (default: 4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for <shape>-<device>.json")
    asked = parser.parse_args(argv)
    cfg = parse(["--preset", asked.shape, "--device", asked.device])
    check(cfg)
    device = torch.device(pick_device(cfg.device)).type
    shape = SHAPES[asked.shape] | ({"num_hidden_layers": asked.layers} if asked.layers else {})
    tokens = asked.tokens or (4096 if device == "cuda" else 1024)
    bench = Bench(shape, cfg, tokens)
    report = environment(shlex.join(["python", "-m", "experiments.bench", *argv])) | {
        "peft": peft.__version__ if peft else "not installed: its two rows are left out",
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}", "shape": asked.shape, **shape,
        "tokens": tokens, "n": bench.parameters, "peak TFLOP/s": bench.peak / 1e12}
    print("".join(f"{name:20} {value}\n" for name, value in report.items()), flush=True)
    path, report["tables"] = asked.out / f"{asked.shape}-{device}.json", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in (("methods", measure_methods), ("tasks", measure_tasks)):
        report["tables"][name] = measure(bench)
        print(show(report["tables"][name]), flush=True)
        write_json(path, report)  # what was measured is kept
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
