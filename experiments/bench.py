r"""What TA-LoRA costs, part by part in seconds and memory, and a training step next to the least it could cost.

    python -m experiments.bench                                                 the micro-world's shape, in minutes
    python -m experiments.bench --shape qwen2.5-7b                              the paper's, on a GPU
    python -m experiments.bench --shape qwen2.5-7b --device cpu --tokens 256    without a GPU, the parts alone

With n parameters outside the embeddings and t tokens (text, padding, peft's prompt in front), forward takes 2 n t FLOP
and backward another 2 n t, since the gradients of frozen weights are never computed. So

    share of peak = 4 n t / (seconds of a step * FLOP a second of the fastest square matrix product measured here)

(checkpointing computes 6 n t, of which 4 count). The *floor* is the frozen backbone with one trainable vector, added to
the first token's embedding: nothing that trains at the input is cheaper. All contenders take turns on the same batches;
a batch counts with the median of its repeats. The weights are random. Compare ratios: times hold for one machine.
"""

import argparse
import copy
import gc
import math
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from checkpoint import Parser, RunFailed, environment, pick_device, run_program, write_json
from data import Batch, Batches, Encoded, collate, collate_prompts
from evaluate import markdown
from model import AdaptedLM, TALoRA, TALoRAConfig
from train import TALORA, Config, build_optimizer, check, count, learning_tensors, parse, train_step

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
TASKS, LONGEST, ANSWER = 16, 1024, 3  # tokens of a row at most; of an answer, its end included
BATCHES, REPEATS = 6, 3  # different micro-batches, timed steps on each
FLOOR, PEFT_PROMPT = "floor", "peft prompt tuning, 100 tokens"
IN_FRONT = {PEFT_PROMPT: 100}  # rows in front of the text
Step = Callable[[list[Batch]], dict]  # one optimizer step, as train.train_step: micro-batches -> {"loss": ..}


class Floor(AdaptedLM):
    """One trainable vector, zero at the start, added to the first token's embedding."""

    def __init__(self, backbone: PreTrainedModel):
        super().__init__(backbone)
        self.vector = nn.Parameter(torch.zeros(backbone.config.hidden_size, device=backbone.device))

    def inputs(self, input_ids, attention_mask, position_ids, task_ids, text) -> dict:
        given = super().inputs(input_ids, attention_mask, position_ids, task_ids, text)
        words = self.backbone.get_input_embeddings()(given.pop("input_ids"))  # (B, T, d)
        first = words[:, :1] + self.vector.to(words.dtype)
        return given | {"inputs_embeds": torch.cat([first, words[:, 1:]], 1)}


def make_rows(vocabulary: int, longest: int) -> list[Encoded]:
    """Rows of random tokens, as long as those of the sixteen data sets together: half of them have 90 tokens (here one
    a character) or more, one in twenty 600. Log-normal: the 95th percentile is 1.645 deviations above the median."""
    lengths = torch.empty(256).log_normal_(math.log(90), math.log(600 / 90) / 1.645).clamp(20, longest).int()
    tokens = [torch.randint(vocabulary, (length,)).tolist() for length in lengths]
    return [Encoded(ids[:-ANSWER], tuple(ids[-ANSWER:]), (), "any") for ids in tokens]


def build_backbone(shape: dict, dtype: str, device: torch.device) -> PreTrainedModel:
    """Random weights of a shape, filled where they stay: at 7B there is no room for a second copy of them."""
    config = Qwen2Config(**shape, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    backbone.to_empty(device=device).tie_weights()
    backbone.model.rotary_emb = type(backbone.model.rotary_emb)(config).to(device)  # frequencies are no weights
    for name, p in backbone.requires_grad_(False).named_parameters():
        nn.init.ones_(p) if "norm" in name else nn.init.uniform_(p, -0.035, 0.035)
    return backbone


class Bench:
    """What the measurements share: the backbone, the batches, the machine's peak, and how each contender is made."""

    def __init__(self, shape: dict, cfg: Config, tokens: int):
        torch.manual_seed(0)
        self.cfg, self.device, self.parts = cfg, torch.device(pick_device(cfg.device)), []
        self.gpu = self.device.type == "cuda"
        self.backbone = self.measure("random weights", partial(build_backbone, shape, cfg.dtype, self.device))
        self.parameters = sum(p.numel() for p in self.backbone.model.layers.parameters())  # n
        rows = make_rows(shape["vocab_size"], min(LONGEST, tokens))
        parts = Batches({"any": rows}, len(rows), 0, budget=tokens)[0]  # short rows to long ones
        self.rows = [parts[(2 * i + 1) * len(parts) // (2 * BATCHES)] for i in range(BATCHES)]
        self.batches = [collate(rows, [i % TASKS for i in range(len(rows))]).to(self.device) for rows in self.rows]
        self.peak = max(self.measure_peak(n) for n in ((4096, 8192, 16384) if self.gpu else (1024, 2048)))

    def measure_peak(self, n: int) -> float:
        """FLOP a second of a product of two n x n matrices in the backbone's dtype."""
        a, b = (torch.randn(n, n, device=self.device, dtype=self.backbone.dtype) for _ in range(2))
        return 2 * n**3 / statistics.median([self.time(partial(torch.mm, a, b))[0] for _ in range(10)][1:])

    def time(self, work: Callable) -> tuple[float, object]:
        """Seconds of one call, and what it returns."""
        device = torch.get_device_module(self.device)
        device.synchronize()
        start = time.perf_counter()
        result = work()
        device.synchronize()
        return time.perf_counter() - start, result

    def measure(self, part: str, work: Callable):
        """Do some work once and note its seconds and peak memory (of the GPU, else of this process) -> its result."""
        gc.collect()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        elif os.access("/proc/self/clear_refs", os.W_OK):  # elsewhere the peak is that of all parts so far
            Path("/proc/self/clear_refs").write_text("5")
        seconds, result = self.time(work)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = torch.cuda.max_memory_allocated() if self.gpu else peak
        self.parts.append({"": part, "seconds": seconds, "peak memory, GB": peak / 1e9})
        return result

    def measure_parts(self) -> list[dict]:
        """All that is done with an adapter of one task. RunFailed if it does not start as the frozen backbone."""
        rows = self.rows[BATCHES // 2]
        batch = collate(rows, [0] * len(rows)).to(self.device)
        frozen = AdaptedLM(self.share_backbone())(**vars(batch)).loss
        model = self.adapter(1, checkpointing=True)
        learning = learning_tensors(model, TALORA.learns["multitask"], [0])
        optimizer = build_optimizer(model, learning, self.cfg)
        loss = self.measure("forward, checkpointing", partial(model, **vars(batch))).loss
        self.measure("backward, checkpointing", loss.backward)
        if not torch.allclose(loss, frozen):  # NaN fails, too
            raise RunFailed(f"with its gates at zero the adapter's loss is {loss}, the frozen backbone's {frozen}")
        self.measure("optimizer step", optimizer.step)
        with tempfile.TemporaryDirectory() as folder:
            self.measure("save the adapter", partial(model.save, folder))
            model = self.measure("load the adapter", partial(TALoRA.load, folder, model.backbone))
        ids, mask = (tensor.to(self.device) for tensor in collate_prompts(rows))
        labels = [[[2, 1], [3, 1], [4, 5, 1]]] * len(rows)
        self.measure("score three labels", partial(model.score, ids, mask, batch.task_ids, labels))
        self.measure("generate four tokens", partial(model.generate, ids, mask, batch.task_ids, 4))
        plain = self.adapter(1, checkpointing=False)  # last: what it frees, the allocator of a CPU may keep
        loss = self.measure("forward", partial(plain, **vars(batch))).loss
        self.measure("backward", loss.backward)
        print(f"{count(model, learning):,} trainable parameters for one task; {len(rows)} rows of "
              f"{batch.input_ids.shape[1]} tokens; a first loss of {frozen:.4f}, as without a prompt")
        return self.parts

    def share_backbone(self) -> PreTrainedModel:
        """A backbone with modules and settings of its own whose weights are the one backbone's."""
        return copy.deepcopy(self.backbone, {id(p): p for p in self.backbone.parameters()})

    def adapter(self, tasks: int, checkpointing: bool) -> TALoRA:
        backbone = self.share_backbone()
        if checkpointing:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sizes = TALoRAConfig(self.cfg.prompt_length, self.cfg.rank)
        return TALoRA(backbone, [f"task {i}" for i in range(tasks)], sizes).train()

    def train(self, model: AdaptedLM, learns: dict[str, str], regularise: bool) -> Step:
        learning = learning_tensors(model, learns, list(range(TASKS)))
        return partial(train_step, model, build_optimizer(model, learning, self.cfg), cfg=self.cfg,
                       regularise=regularise)

    def peft(self, adapter) -> Step:
        model = peft.get_peft_model(self.share_backbone(), adapter).train()
        learning = [p for p in model.parameters() if p.requires_grad]
        return partial(peft_step, model, torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.95)), clip=self.cfg.clip)

    def contenders(self) -> dict[str, Step]:
        """The floor, TA-LoRA's multitask stage and peft, by name."""
        steps = {FLOOR: self.train(Floor(self.share_backbone()).train(), {"vector": "target"}, regularise=False)}
        for checkpointing, name in ((False, "TA-LoRA"), (True, "TA-LoRA, checkpointing")):
            model = self.adapter(TASKS, checkpointing)
            steps[name] = self.train(model, TALORA.learns["multitask"], regularise=True)
        if peft:
            prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=IN_FRONT[PEFT_PROMPT])
            lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
            steps |= {PEFT_PROMPT: self.peft(prompt), "peft LoRA": self.peft(lora)}
        return steps

    def compare(self) -> list[dict]:
        """Steps of all contenders, in turns -> a row of the table for each. RunFailed if those that start as the frozen
        backbone differ in the first loss."""
        rows, steps, text = [], self.contenders(), sum(int(batch.attention_mask.sum()) for batch in self.batches)
        times = {name: [[] for _ in self.batches] for name in steps}
        for name, step in steps.items():
            found = self.measure(name, partial(list, map(step, zip([*self.batches, self.batches[0]]))))  # the warm-up
            peak = self.parts.pop()["peak memory, GB"]
            rows.append({"": name, "first loss": found[0]["loss"], "peak memory, GB": peak})
        start = [row["first loss"] for row in rows if row[""] not in IN_FRONT]
        if not max(start) - min(start) <= (0.02 if self.cfg.dtype == "bfloat16" else 1e-3) * max(start):  # nor NaN
            raise RunFailed(f"the contenders do not compute the same: their losses in the first step are {start}")
        for _ in range(REPEATS):
            for i, batch in enumerate(self.batches):
                for name, step in steps.items():
                    times[name][i].append(self.time(partial(step, [batch]))[0])
        for row in rows:
            seconds, front = sum(map(statistics.median, times[row[""]])), IN_FRONT.get(row[""], 0)  # of all batches
            read = sum(batch.input_ids.numel() + front * len(batch.input_ids) for batch in self.batches)
            row |= {"step, ms": 1000 * seconds / len(self.batches), "text tokens/s": text / seconds,
                    "share of padding and prompt": 1 - text / read,
                    "share of peak": 4 * self.parameters * read / seconds / self.peak}
            row["x the first row"] = row["step, ms"] / rows[0]["step, ms"]
        return rows


def peft_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], clip: float) -> dict:
    """peft as its users call it: labels go in, the loss comes out of logits at every position."""
    batch, = batches
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    return {"loss": loss.item()}


def show(rows: Sequence[dict]) -> str:
    return markdown(list(rows[0]), [[format_cell(key, value) for key, value in row.items()] for row in rows])


def format_cell(key: str, value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1%}" if "share" in key else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.bench", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy", help="the backbone's (default: the micro-world's)")
    parser.add_argument("--tokens", type=int, help="of a micro-batch at most (default: 4096 on a GPU, 1024 on a CPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU and for 7B")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for <shape>-<device>-<dtype>.json")
    asked = parser.parse_args(argv)
    device = torch.device(pick_device(asked.device)).type
    large = device == "cpu" and asked.shape == "qwen2.5-7b"
    cfg = parse(["--preset", asked.shape, "--device", asked.device, "--run", str(asked.out)])
    cfg.dtype = asked.dtype or ("float32" if device == "cpu" and not large else "bfloat16")
    check(cfg)
    shape, tokens = SHAPES[asked.shape], asked.tokens or (1024 if device == "cpu" else 4096)
    bench = Bench(shape, cfg, tokens)
    report = environment(shlex.join(["python", "-m", "experiments.bench", *argv])) | {
        "peft": peft.__version__ if peft else "not installed: its two rows are left out",
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}", "shape": asked.shape, **shape,
        "dtype": cfg.dtype, "tokens": tokens, "n": bench.parameters, "peak TFLOP/s": bench.peak / 1e12, "tables": {}}
    print("".join(f"{name:20} {value}\n" for name, value in report.items()), flush=True)
    path = asked.out / f"{asked.shape}-{device}-{cfg.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    measures = {"parts": bench.measure_parts, "methods": bench.compare}
    for name in ["parts"] if large else measures:  # a comparison would take hours
        report["tables"][name] = measures[name]()
        print(show(report["tables"][name]), flush=True)
        write_json(path, report)  # what was measured is kept
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
