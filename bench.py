r"""Measurements of cost: scoring against the number of labels, and padding against how batches are made.

    python bench.py

*Scoring.* A closed set is answered by the whole label with the highest probability. `TALoRA.score` reads the text
once, with all labels packed behind it, each blind to the others; the plain way reads the text again for every label.
Text of T tokens and C labels of c tokens cost about T + C c against C (T + c) tokens.

*Padding.* A batch is as wide as its longest row. The sixteen tasks mix titles of 20 characters with articles of 1,000,
so rows in random order are mostly padding; rows sorted within a window and cut by a token budget are not.

Random weights and random rows of the right lengths: nothing is downloaded. What is printed holds for this machine.
"""

import argparse
import math
import platform
import random
import statistics
import sys
import time

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from data import Encoded, Sampler
from model import TALoRA

# Characters of prompt and answer, median and 95th percentile, of samples of the sixteen data sets.
LENGTHS = {
    "afqmc": (77, 97), "amazon": (85, 168), "thucnews": (76, 81), "bq": (72, 94), "cmnli": (92, 149),
    "cmrc2018": (549, 941), "sanwen": (99, 135), "cote_mfw": (72, 141), "chnsenticorp": (113, 286),
    "tnews": (94, 103), "ocnli": (75, 103), "lcqmc": (68, 81), "drcd": (478, 817), "c3": (180, 772),
    "cote_bd": (69, 153), "finre": (251, 279),
}
VOCABULARY = 6000


def seconds(run, repeats: int) -> float:
    """Median time of `run`, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scoring(width: int, layers: int, rows: int, text: int, repeats: int) -> str:
    """A table of milliseconds a row for 2, 15 and 44 labels of 1 to 3 tokens and their end token."""
    torch.manual_seed(0)
    backbone = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None)).eval()
    model = TALoRA(backbone, ["task"])
    torch.nn.init.constant_(model.gate, 0.5)
    ids, rng = torch.randint(2, VOCABULARY, (rows, text)), random.Random(0)
    mask, tasks = torch.ones_like(ids), torch.zeros(rows, dtype=torch.long)
    lines = ["| labels | text read once, ms a row | text read per label, ms a row | ratio |", "|---:|---:|---:|---:|"]
    for count in (2, 15, 44):
        labels = [[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, 3))] + [1] for _ in range(count)]

        def once(labels=labels):
            return model.score(ids, mask, tasks, [labels] * rows)

        def per_label(labels=labels):
            return torch.cat([model.score(ids, mask, tasks, [[label]] * rows) for label in labels], 1)

        torch.testing.assert_close(once(), per_label(), rtol=1e-4, atol=1e-4)
        fast, slow = (1000 * seconds(run, repeats) / rows for run in (once, per_label))
        lines.append(f"| {count} | {fast:.1f} | {slow:.1f} | {slow / fast:.1f} |")
    return "\n".join(lines)


def padding(steps: int, batch_size: int) -> str:
    """A table of the share of padding for batches in random order and for token budgets, over all sixteen tasks."""
    rng, rows = random.Random(0), {}
    for task, (median, most) in LENGTHS.items():
        spread = math.log(most / median) / 1.645  # about log-normal; the 95th percentile is 1.645 deviations away
        lengths = [round(median * math.exp(rng.gauss(0, spread))) for _ in range(600)]
        lengths = [min(max(20, length), 1024) for length in lengths]
        rows[task] = [Encoded([0] * length, (1,), (), task) for length in lengths]
    order = rng.sample([row for task in rows.values() for row in task], steps * batch_size)
    whole = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    waste = 1 - sum(map(len, order)) / sum(len(step) * max(map(len, step)) for step in whole)
    lines = ["| batches | padding | rows a forward pass |", "|---|---:|---:|",
             f"| {batch_size} rows in random order | {waste:.1%} | {batch_size} |"]
    for budget in (None, 2048, 4096, 8192, 16384):
        sampler, batches = Sampler(rows, batch_size, 0, tokens_per_batch=budget), []
        for _ in range(steps):
            batches += sampler.next()
        name = f"sorted in a window, at most {budget:,} tokens" if budget else f"{batch_size} rows sorted and cut"
        lines.append(f"| {name} | {sampler.padding:.1%} | {statistics.mean(map(len, batches)):.0f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="width d of the random backbone (default: 256)")
    parser.add_argument("--layers", type=int, default=4, help="layers L of the random backbone (default: 4)")
    parser.add_argument("--rows", type=int, default=8, help="rows scored at once (default: 8)")
    parser.add_argument("--text", type=int, default=200, help="tokens of a text (default: 200)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, of which the median counts (default: 5)")
    options = parser.parse_args(argv)
    print(f"python bench.py {' '.join(argv)}\n{platform.platform()}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, transformers {transformers.__version__}\n")
    print(f"Scoring: {options.layers} layers of width {options.width}, {options.rows} rows of {options.text} tokens\n")
    print(scoring(options.width, options.layers, options.rows, options.text, options.repeats))
    print("\nPadding: the sixteen tasks, equally many rows of each, 64 rows a step, 64 steps\n")
    print(padding(64, 64))


if __name__ == "__main__":
    main(sys.argv[1:])
